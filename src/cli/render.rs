//! Tables, JSON, errors: the only file that knows about terminals.

use std::error::Error as StdError;
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Context as _;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::exit::{Exit, hints_of};

/// Prints text and a line end to standard output.
///
/// # Errors
/// When it cannot be written. A reader that has gone, as after `| head`, is no error.
pub fn line(text: impl Display) -> anyhow::Result<()> {
    tolerant(writeln!(io::stdout().lock(), "{text}"))
}

/// Prints a value as JSON, indented.
///
/// # Errors
/// As [`line`].
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value).context("cannot make JSON")?)
}

/// Prints rows in columns under their headings; nothing when there are no rows.
///
/// # Errors
/// As [`line`].
pub fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> anyhow::Result<()> {
    if rows.is_empty() { Ok(()) } else { line(columns(headings, rows)) }
}

/// A number of bytes for people.
pub fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).to_string()
}

/// A point in time for people: UTC, to the second.
pub fn time(time: Timestamp) -> String {
    time.strftime("%F %TZ").to_string()
}

/// A duration for people: `4 s`, `2 min 5 s`, `1 h 4 min`.
pub fn duration(duration: SignedDuration) -> String {
    match duration.as_secs().max(0) {
        seconds @ 0..60 => format!("{} s", seconds.max(1)),
        seconds @ 60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// `1 backup`, `2 backups`.
pub fn count(number: impl Into<u64>, noun: &str) -> String {
    match number.into() {
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}

fn columns<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(headings.map(str::to_uppercase));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

fn tolerant(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Prints a line beside the output, to standard error.
pub fn aside(text: impl Display) {
    writeln!(io::stderr().lock(), "{text}").ok();
}

/// Prints an error with its causes, then its hints, to standard error.
pub fn error(error: &anyhow::Error) {
    let mut lines = vec![format!("error: {}", with_causes(error.as_ref()))];
    lines.extend(hints_of(error).iter().map(|hint| format!("hint: {hint}")));
    // Nothing is left to tell when standard error is gone; the exit status still tells.
    writeln!(io::stderr().lock(), "{}", lines.join("\n")).ok();
}

/// The error and its causes in one line, without a cause that the message before it has told already.
pub fn with_causes(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let told = next.to_string();
        if !text.ends_with(&told) {
            text = format!("{text}: {told}");
        }
        cause = next.source();
    }
    text
}

/// Prints clap's message: help and version to standard output with status 0, the rest is wrong usage.
pub fn usage(message: &clap::Error) -> ExitCode {
    message.print().ok();
    if message.use_stderr() { Exit::Configuration.into() } else { Exit::Success.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_under_their_headings() {
        let rows = [["a".to_owned(), "1".to_owned()], ["longer".to_owned(), "22".to_owned()]];
        assert_eq!(columns(["name", "size"], &rows), "NAME    SIZE\na       1\nlonger  22");
    }

    #[test]
    fn numbers_and_times_are_for_people() {
        assert_eq!(time("2026-11-21T10:00:00.463755264Z".parse().unwrap()), "2026-11-21 10:00:00Z");
        let of = |seconds| duration(SignedDuration::from_secs(seconds));
        assert_eq!([of(0), of(59), of(125), of(3900)], ["1 s", "59 s", "2 min 5 s", "1 h 5 min"]);
        assert_eq!([count(0_u64, "backup"), count(1_u64, "backup")], ["0 backups", "1 backup"]);
    }

    #[test]
    fn causes_follow_in_one_line_and_once() {
        let error =
            anyhow::anyhow!("disk full").context("cannot write").context("cannot store: cannot write");
        assert_eq!(with_causes(error.as_ref()), "cannot store: cannot write: disk full");
    }

    #[test]
    fn a_reader_that_has_gone_is_no_error() {
        assert!(tolerant(Err(ErrorKind::BrokenPipe.into())).is_ok());
        assert!(tolerant(Err(ErrorKind::StorageFull.into())).is_err());
    }
}
