//! The log: one line per event, on standard error, so that standard output stays data.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::str::FromStr;
use std::sync::OnceLock;

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt as tracing_fmt, reload};

use super::progress::beside_bars;
use super::syslog::SyslogLayer;

/// How much is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no log level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown log level `{0}`; expected error, warn, info, debug or trace")]
pub struct UnknownLogLevel(String);

impl FromStr for LogLevel {
    type Err = UnknownLogLevel;

    /// Takes our names and Python's, in any case: PGHoard's files say `INFO` and `WARNING`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "error" | "critical" | "fatal" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warn),
            "info" | "notset" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(UnknownLogLevel(text.to_owned())),
        }
    }
}

/// How a line looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    /// One JSON object a line, for log collectors.
    Json,
}

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("log filter `{filter}` is not valid: {why}")]
    Filter { filter: String, why: String },
    #[error("the log was set up twice")]
    Twice,
}

/// Starts the log of this process.
///
/// `filter` is a level (`debug`) or directives by module (`info,pgkeep::wal=trace`).
///
/// # Errors
/// When the filter does not parse, or the process has a log already.
pub fn init_log(filter: &str, format: LogFormat) -> Result<(), LogError> {
    let filter = EnvFilter::builder()
        .parse(directives(filter))
        .map_err(|error| LogError::Filter { filter: filter.to_owned(), why: error.to_string() })?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_fmt::layer().with_writer(LogOutput);
    let lines = match format {
        LogFormat::Text => lines.with_target(false).with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let log = tracing_subscriber::registry().with(filter).with(lines).with(SyslogLayer);
    log.try_init().map_err(|_| LogError::Twice)?;
    // The log was set up once, so this is, too.
    let _ = FILTER.set(handle);
    Ok(())
}

/// What the log lets through, for those who change it later: a process has one log.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Changes how much is told from now on.
pub fn set_log_level(level: LogLevel) {
    if let Some(handle) = FILTER.get()
        && let Ok(filter) = EnvFilter::builder().parse(directives(level.as_str()))
        && let Err(error) = handle.reload(filter)
    {
        tracing::warn!(%error, "the log level stays as it was");
    }
}

fn directives(filter: &str) -> String {
    match filter.parse::<LogLevel>() {
        // The HTTP and TLS layers below us tell about every connection; that is their debug, not ours.
        Ok(level) => {
            let quiet = level.min(LogLevel::Info);
            // Counts every retry as news; what comes of them is told here anyway.
            let store = if level > LogLevel::Info { LogLevel::Info } else { level.min(LogLevel::Warn) };
            format!(
                "{level},hyper={quiet},hyper_util={quiet},reqwest={quiet},rustls={quiet},h2={quiet},object_store={store}"
            )
        }
        Err(_) => filter.to_owned(),
    }
}

/// Standard error, moved out of the way of progress bars.
struct LogOutput;

impl Write for LogOutput {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // A log that cannot be written must not stop a backup: a closed standard error is ignored.
        beside_bars(|| io::stderr().write_all(line)).ok();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogOutput {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_as_pghoard_writes_them() {
        assert_eq!("INFO".parse(), Ok(LogLevel::Info));
        assert_eq!("WARNING".parse(), Ok(LogLevel::Warn));
        assert_eq!("CRITICAL".parse(), Ok(LogLevel::Error));
        assert_eq!("debug".parse(), Ok(LogLevel::Debug));
        assert!("verbose".parse::<LogLevel>().is_err());
    }

    #[test]
    fn every_level_reads_back_what_it_prints() {
        for level in [LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace] {
            assert_eq!(level.to_string().parse(), Ok(level));
        }
    }

    #[test]
    fn a_filter_that_makes_no_sense_is_refused() {
        let error = init_log("pgkeep=loud", LogFormat::Text).unwrap_err();
        assert!(error.to_string().contains("`pgkeep=loud`"), "{error}");
    }
}
