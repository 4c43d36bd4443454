//! `pghoard_postgres_command`: PGHoard's `archive_command` and `restore_command`.
//!
//! Its exit status decides whether a recovery ends, so "does not exist" (4) is told only when the server
//! said so. What is not known is 255, at which PostgreSQL stops: PGHoard said 255 too until 2.7.0, which
//! says 5, and ends recoveries with it.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use super::agent_client::AgentError;
use super::pghoard::parse_or;
use super::pghoard_client::{Answer, Hoard};
use super::render;
use crate::postgres::WalFileName;
use crate::runtime::variable;
use crate::secret::Secret;
use crate::serve;

/// PGHoard's statuses.
const ARCHIVE_UNEXPECTED: u8 = 2;
const ARCHIVE_FAIL: u8 = 3;
const NOT_FOUND: u8 = 4;
/// Above 125, at which PostgreSQL stops instead of ending recovery.
const UNKNOWN: u8 = 255;
const TRIES: u32 = 3;

/// PostgreSQL's hooks.
#[derive(Debug, Parser)]
#[command(name = "pghoard_postgres_command", version, infer_long_args = true)]
#[command(about = "archive_command and restore_command for PostgreSQL")]
struct Options {
    /// Service host
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Service port
    #[arg(long, default_value_t = 16000)]
    port: u16,
    #[arg(long, help = "Service user name [env: PGKEEP_HTTP_USERNAME]")]
    username: Option<String>,
    #[arg(long, help = "Service password [env: PGKEEP_HTTP_PASSWORD]")]
    password: Option<String>,
    /// Backup site
    #[arg(long)]
    site: String,
    /// WAL file name
    #[arg(long)]
    xlog: String,
    /// Output file
    #[arg(long)]
    output: Option<OsString>,
    /// Operation mode
    #[arg(long)]
    mode: Mode,
    /// Seconds between tries
    #[arg(long, default_value_t = 5.0, hide = true)]
    retry_interval: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Archive,
    Restore,
}

/// Why it failed, and the status that says so.
struct Ended {
    status: u8,
    reason: String,
}

impl Ended {
    fn unknown(reason: impl std::fmt::Display) -> Self {
        Self { status: UNKNOWN, reason: reason.to_string() }
    }
}

/// The status for what should not happen: one that keeps PostgreSQL's archiver alive, and stops a recovery.
pub fn unexpected(arguments: &[OsString]) -> u8 {
    let archive = arguments.iter().any(|argument| argument == "archive" || argument == "--mode=archive");
    if archive { ARCHIVE_UNEXPECTED } else { UNKNOWN }
}

pub fn run(arguments: &[OsString]) -> ExitCode {
    let options: Options = match parse_or(arguments, unexpected(arguments)) {
        Ok(options) => options,
        Err(status) => return status,
    };
    let ended = match options.mode {
        Mode::Archive => archive(&options),
        Mode::Restore => restore(&options),
    };
    let Err(Ended { status, reason }) = ended else { return ExitCode::SUCCESS };
    let called = arguments.first().map_or_else(String::new, |called| called.to_string_lossy().into_owned());
    render::line(format_args!("{called}: ERROR: {reason}")).ok();
    status.into()
}

fn hoard(options: &Options) -> Result<Hoard, String> {
    let username = options.username.clone().or_else(|| variable("PGKEEP_HTTP_USERNAME"));
    let password = options.password.clone().or_else(|| variable("PGKEEP_HTTP_PASSWORD"));
    let credentials = username.zip(password.map(Secret::new));
    Hoard::at(&options.host, options.port, credentials).map_err(|error| error.to_string())
}

fn archive(options: &Options) -> Result<(), Ended> {
    let unexpected = |reason: String| Ended { status: ARCHIVE_UNEXPECTED, reason };
    if options.xlog.ends_with(".backup") {
        let label = super::pghoard::python_text(&options.xlog);
        let text = format!("Ignoring request to archive backup label {label}: PGHoard does not use them");
        render::line(text).ok();
        return Ok(());
    }
    let path = [options.site.as_str(), "archive", options.xlog.as_str()];
    // Without a body, the server takes the file from its own WAL directory.
    let answer = hoard(options).map_err(unexpected)?.ask("PUT", &path, "content-length: 0\r\n");
    let answer = answer.map_err(|error| unexpected(connection_failed(options, &error)))?;
    // PostgreSQL deletes its own copy after this, so whoever says it must be one who stores.
    if answer.head.status == 201 && answer.is_known() {
        return Ok(());
    }
    let reason = format!("Archival failed with HTTP status {}{}", answer.head.status, said(&answer));
    Err(Ended { status: ARCHIVE_FAIL, reason })
}

fn restore(options: &Options) -> Result<(), Ended> {
    let path = [options.site.as_str(), "archive", options.xlog.as_str()];
    let hoard = hoard(options).map_err(Ended::unknown)?;
    let Some(output) = options.output.as_deref().filter(|output| !output.is_empty()) else {
        let answer = ask(options, &hoard, "HEAD", &path, "")?;
        return if answer.head.status == 200 && answer.is_known() {
            Ok(())
        } else {
            Err(not_restored(options, &answer))
        };
    };
    let target = std::env::current_dir().map_err(Ended::unknown)?.join(output);
    if let (Ok(file), Some(directory)) = (options.xlog.parse::<WalFileName>(), target.parent())
        && serve::take_prefetched(directory, file, &target)
    {
        return Ok(());
    }
    let header = target.to_str().filter(|path| !path.contains(['\r', '\n']));
    let header = header.ok_or_else(|| Ended::unknown("the output's path cannot be told to the server"))?;
    let before = identity_of(&target);
    let answer = ask(options, &hoard, "GET", &path, &format!("x-pghoard-target-path: {header}\r\n"))?;
    if answer.head.status == 201 && answer.is_known() {
        let after = identity_of(&target);
        if after.is_none() || after == before {
            let reason =
                "the server says that the file is there, but it is not; does it run on this machine?";
            return Err(Ended::unknown(reason));
        }
        return Ok(());
    }
    Err(not_restored(options, &answer))
}

/// What tells one file of a name from another.
fn identity_of(path: &Path) -> Option<(u64, i64, i64)> {
    use std::os::unix::fs::MetadataExt;
    path.metadata().ok().map(|metadata| (metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Asks up to three times, as long as another answer may come.
fn ask(options: &Options, hoard: &Hoard, method: &str, path: &[&str], fields: &str) -> Result<Answer, Ended> {
    let mut left = TRIES - 1;
    loop {
        let failed = match hoard.ask(method, path, fields) {
            Ok(answer) if (500..600).contains(&answer.head.status) && answer.head.status != 501 => {
                format!("Restore failed with HTTP status {}{}", answer.head.status, said(&answer))
            }
            Ok(answer) => return Ok(answer),
            Err(error @ AgentError::Malformed { .. }) => return Err(Ended::unknown(error)),
            Err(error) => connection_failed(options, &error),
        };
        if left == 0 {
            return Err(Ended::unknown(failed));
        }
        let pause = options.retry_interval.clamp(0.0, 600.0);
        let text = format!("{failed}; {left} retries left, sleeping {pause} seconds and retrying");
        render::line(text).ok();
        std::thread::sleep(Duration::from_secs_f64(pause));
        left -= 1;
    }
}

fn not_restored(options: &Options, answer: &Answer) -> Ended {
    if answer.says_missing() {
        let name = super::pghoard::python_text(&options.xlog);
        return Ended { status: NOT_FOUND, reason: format!("{name} not found from archive") };
    }
    Ended::unknown(format!("Restore failed with HTTP status {}{}", answer.head.status, said(answer)))
}

fn connection_failed(options: &Options, error: &AgentError) -> String {
    format!("HTTP connection to {}:{} failed: {error}", options.host, options.port)
}

/// The server's own words, in one line.
fn said(answer: &Answer) -> String {
    let text = String::from_utf8_lossy(&answer.body);
    let text: String =
        text.trim().chars().take(500).map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    if text.is_empty() { text } else { format!(": {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_stops_a_recovery_and_never_the_archiver() {
        let status = |line: &str| unexpected(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert_eq!(status("pghoard_postgres_command --mode archive --xlog x"), ARCHIVE_UNEXPECTED);
        assert_eq!(status("pghoard_postgres_command --mode=archive"), ARCHIVE_UNEXPECTED);
        assert_eq!(status("pghoard_postgres_command --mode restore --xlog x"), UNKNOWN);
        assert_eq!(status("pghoard_postgres_command --mdoe restore"), UNKNOWN);
        assert_eq!(status("pghoard_postgres_command"), UNKNOWN);
    }
}
