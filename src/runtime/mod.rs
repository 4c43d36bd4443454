//! The few things every shell needs: clock, retry, tasks, signals, environment.

mod backoff;
mod clock;
mod environment;
mod retry;
mod signals;
mod tasks;

pub use backoff::{Backoff, RetryPolicy};
pub use clock::{Clock, ManualClock, SystemClock};
pub use environment::{Lookup, variable};
pub use retry::{Stopped, retry};
pub use signals::{Signal, Signals, shutdown_signal};
pub use tasks::{BoxError, TaskEnd, TaskGroup};
