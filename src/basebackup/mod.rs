//! Taking a base backup: protocol stream, files, frames, record; and when one is due.

mod error;
mod framing;
mod run;
mod schedule;

pub use error::Error;
pub use framing::{FRAME_SIZE, Framer, RawFrame};
pub use run::{Ends, Request, take};
pub use schedule::Schedule;
