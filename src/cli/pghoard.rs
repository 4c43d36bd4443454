//! PGHoard's programs: which of them this one was started as.
//!
//! `pgkeep links DIR` makes links of these names; started through one of them, the program takes PGHoard's
//! options, prints what PGHoard prints and exits as PGHoard does. The work is done where pgkeep's own
//! commands have it done.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use super::exit::hints_of;
use super::{
    Context, GlobalOptions, LogFormatOption, pghoard_archive_cleanup, pghoard_archive_sync,
    pghoard_create_keys, pghoard_daemon, pghoard_postgres_command, pghoard_restore, render,
};
use crate::config;
use crate::observe::LogLevel;

/// What Python's `argparse` exits with on wrong usage.
const WRONG_USAGE: u8 = 2;

/// One of PGHoard's programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Daemon,
    Restore,
    PostgresCommand,
    ArchiveSync,
    ArchiveCleanup,
    CreateKeys,
}

/// Every name and what it starts.
pub const PROGRAMS: [(&str, Program); 6] = [
    ("pghoard", Program::Daemon),
    ("pghoard_archive_cleanup", Program::ArchiveCleanup),
    ("pghoard_archive_sync", Program::ArchiveSync),
    ("pghoard_create_keys", Program::CreateKeys),
    ("pghoard_postgres_command", Program::PostgresCommand),
    ("pghoard_restore", Program::Restore),
];

impl Program {
    /// What `called` (the first argument, by custom the program's own name) asks for.
    pub fn of(called: &OsStr) -> Option<Self> {
        let name = Path::new(called).file_name()?;
        PROGRAMS.iter().find(|(known, _)| *known == name).map(|(_, program)| *program)
    }

    /// Runs it with all of its arguments, the name first.
    pub fn run(self, arguments: &[OsString]) -> ExitCode {
        match self {
            Self::Daemon => pghoard_daemon::run(arguments),
            Self::Restore => pghoard_restore::run(arguments),
            Self::PostgresCommand => pghoard_postgres_command::run(arguments),
            Self::ArchiveSync => pghoard_archive_sync::run(arguments),
            Self::ArchiveCleanup => pghoard_archive_cleanup::run(arguments),
            Self::CreateKeys => pghoard_create_keys::run(arguments),
        }
    }

    /// The exit status after a panic.
    pub fn after_panic(self, arguments: &[OsString]) -> ExitCode {
        match self {
            Self::PostgresCommand => pghoard_postgres_command::unexpected(arguments).into(),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Reads the arguments; `Err` is the status to exit with at once, which for `--help` and `--version` is 0.
pub fn parse<T: Parser>(arguments: &[OsString]) -> Result<T, ExitCode> {
    parse_or(arguments, WRONG_USAGE)
}

/// As [`parse`], with another status for wrong usage.
pub fn parse_or<T: Parser>(arguments: &[OsString], wrong_usage: u8) -> Result<T, ExitCode> {
    T::try_parse_from(arguments).map_err(|usage| {
        let told = render::usage(&usage);
        if usage.use_stderr() { wrong_usage.into() } else { told }
    })
}

/// The context that PGHoard's options make.
pub fn context(config: Option<PathBuf>, site: Option<String>, debug: bool) -> Context {
    Context::new(GlobalOptions {
        config,
        site,
        json: false,
        log_level: debug.then_some(LogLevel::Debug),
        log_format: LogFormatOption::Text,
    })
}

/// Ends as PGHoard's programs end on an error: a line on standard output and status 1. What else there is to
/// say goes to standard error.
pub fn fatal(result: anyhow::Result<()>, kind: &str) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let kind = if error.chain().any(<dyn std::error::Error>::is::<config::Error>) {
        "InvalidConfigurationError"
    } else {
        kind
    };
    render::line(format_args!("FATAL: {kind}: {}", render::with_causes(error.as_ref()))).ok();
    for hint in hints_of(&error) {
        render::aside(format_args!("hint: {hint}"));
    }
    ExitCode::FAILURE
}

/// A text as Python prints it in messages and dictionaries.
pub fn python_text(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut printed = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => printed.push_str("\\\\"),
            '\n' => printed.push_str("\\n"),
            '\r' => printed.push_str("\\r"),
            '\t' => printed.push_str("\\t"),
            character if character == quote => printed.extend(['\\', quote]),
            character => printed.push(character),
        }
    }
    printed.push(quote);
    printed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_its_name_wherever_it_lies() {
        let of = |called: &str| Program::of(OsStr::new(called));
        assert_eq!(of("pghoard"), Some(Program::Daemon));
        assert_eq!(of("/usr/bin/pghoard_restore"), Some(Program::Restore));
        assert_eq!(of("./pghoard_postgres_command"), Some(Program::PostgresCommand));
        for other in ["pgkeep", "pghoard_gnutaremu", "", "/", "pghoard/", "/opt/pghoard/pgkeep"] {
            assert!(of(other).is_none() || other == "pghoard/", "{other}");
        }
    }

    #[test]
    fn texts_look_like_pythons() {
        assert_eq!(python_text("a"), "'a'");
        assert_eq!(python_text("it's"), "\"it's\"");
        assert_eq!(python_text("'\"\\\n"), "'\\'\"\\\\\\n'");
    }
}
