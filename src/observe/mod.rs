//! Log and progress.

mod log;
mod progress;

pub use log::{LogError, LogFormat, LogLevel, UnknownLogLevel, init_log};
pub use progress::Progress;
