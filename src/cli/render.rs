//! Tables, JSON, errors: the only file that knows about terminals.

use std::error::Error as StdError;
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Context as _;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
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

/// Prints an error with its causes, then its hints, to standard error.
pub fn error(error: &anyhow::Error) {
    let mut lines = vec![format!("error: {}", with_causes(error.as_ref()))];
    lines.extend(hints_of(error).iter().map(|hint| format!("hint: {hint}")));
    // Nothing is left to tell when standard error is gone; the exit status still tells.
    writeln!(io::stderr().lock(), "{}", lines.join("\n")).ok();
}

/// The error and its causes in one line, without a cause that the message before it has told already.
fn with_causes(error: &(dyn StdError + 'static)) -> String {
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
