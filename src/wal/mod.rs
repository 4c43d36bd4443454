//! Continuous archiving: assembler, ledger and tail (pure), receiver (the loop).
//!
//! ```text
//! session: who is there, where to start ─▶ receiver: messages ─▶ assembler ─▶ segments and pieces
//!                                              ▲                                     │ Stored
//!                                              └────── flush position ◀── ledger ◀───┘
//! ```

mod assembler;
mod budget;
mod error;
mod ledger;
mod receiver;
mod session;
mod start;
mod tail;

pub use assembler::{Chunk, PAGE_SIZE, SegmentAssembler, Step, StreamGap};
pub use budget::{Budget, SegmentMemory};
pub use error::Error;
pub use ledger::StoredLedger;
pub use receiver::{Ended, Position, Settings};
pub use session::{Known, Reports, Slot, WalGap, archive, check_identity};
pub use start::{ArchiveEnd, Refusal, ServerState, Start, choose};
pub use tail::Tail;
