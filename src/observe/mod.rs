//! Log, progress and metrics.

mod log;
mod metrics;
pub mod names;
mod progress;
mod push;
mod statsd;
mod syslog;

pub use log::{LogError, LogFormat, LogLevel, UnknownLogLevel, init_log, set_log_level};
pub use metrics::{Kind, Metric, Metrics, Sample, StatsdFormat, Tags, exposition, statsd_line};
pub use progress::Progress;
pub use push::{PushTarget, push_metrics};
pub use statsd::{StatsdSocket, StatsdTarget, tell_statsd};
pub use syslog::{Facility, SyslogAddress, SyslogAddressError, SyslogTarget, UnknownFacility, set_syslog};
