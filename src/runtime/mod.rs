//! The few things every shell needs: clock, retry, tasks, signals, environment, service manager.

mod backoff;
mod clock;
mod environment;
mod retry;
mod service;
mod signals;
mod tasks;

pub use backoff::{Backoff, RetryPolicy};
pub use clock::{Clock, ManualClock, SystemClock};
pub use environment::{Lookup, variable};
pub use retry::{Stopped, retry};
pub use service::{ServiceState, notify_service};
pub use signals::{Signal, Signals, shutdown_signal};
pub use tasks::{BoxError, TaskEnd, TaskGroup};
