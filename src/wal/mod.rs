//! Continuous archiving: assembler, ledger and tail (pure), receiver (the loop).

mod assembler;
mod ledger;
mod start;
mod tail;

pub use assembler::{Chunk, PAGE_SIZE, SegmentAssembler, Step, StreamGap};
pub use ledger::StoredLedger;
pub use start::{ArchiveEnd, Refusal, ServerState, Start};
pub use tail::{Piece, Tail};
