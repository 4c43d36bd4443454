//! Taking a base backup: protocol stream, files, frames, record; and when one is due.

mod error;
mod framing;
mod manifest_check;
mod run;
mod schedule;

pub use error::Error;
pub use framing::{FRAME_SIZE, Framer, RawFrame};
pub use manifest_check::{ManifestCheck, ManifestError};
pub use run::{Ends, Request, take};
pub use schedule::Schedule;
