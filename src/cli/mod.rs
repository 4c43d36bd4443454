//! What a person types: one thin file per command.

mod agent_client;
mod allocator;
mod backup;
mod config;
mod context;
mod exit;
mod http_response;
mod links;
mod list;
mod pghoard;
mod pghoard_archive_cleanup;
mod pghoard_archive_sync;
mod pghoard_client;
mod pghoard_create_keys;
mod pghoard_daemon;
mod pghoard_postgres_command;
mod pghoard_preserve;
mod pghoard_restore;
mod pghoard_table;
mod prune;
mod render;
mod restore;
mod run;
mod runtime;
mod status;
mod wal_fetch;
mod wal_push;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use context::Context;
pub use exit::{Exit, Failure};

use crate::observe::{LogFormat, LogLevel};

/// Backup and WAL archiving for PostgreSQL.
#[derive(Debug, Parser)]
#[command(name = "pgkeep", version, max_term_width = 110, after_help = EXAMPLES)]
#[command(disable_help_subcommand = true, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: GlobalOptions,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  pgkeep --config /etc/pgkeep.json config check
  pgkeep --config /etc/pgkeep.json run
  PGKEEP_STORAGE=s3://bucket/prefix PGKEEP_SITE=main pgkeep list
  pgkeep restore --target-dir /var/lib/postgresql/17/main

Exit status:
  0 done · 1 failed · 2 usage or configuration · 3 no such backup
  4 target not empty · 5 target outside the recovery window
  6 storage unreachable · 7 corrupt data · 8 WAL missing";

/// Options that stand before or after any command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct GlobalOptions {
    #[arg(help = "Configuration file [env: PGKEEP_CONFIG, PGHOARD_CONFIG]")]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[arg(help = "Site to work on; may be left out when there is one [env: PGKEEP_SITE]")]
    #[arg(long, global = true, value_name = "NAME")]
    site: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[arg(help = "error, warn, info, debug or trace [env: PGKEEP_LOG]")]
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<LogLevel>,
    /// How log lines look
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormatOption,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormatOption {
    Text,
    Json,
}

impl From<LogFormatOption> for LogFormat {
    fn from(option: LogFormatOption) -> Self {
        match option {
            LogFormatOption::Text => Self::Text,
            LogFormatOption::Json => Self::Json,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent: archive WAL, take base backups on schedule, serve WAL over HTTP
    #[command(after_help = run::EXAMPLES)]
    Run,
    /// Take a base backup now
    Backup(backup::BackupArgs),
    /// Restore a backup into a directory that PostgreSQL can start on
    Restore(Box<restore::RestoreArgs>),
    /// List the backups
    #[command(after_help = list::EXAMPLES)]
    List,
    /// Show what can be restored, what is missing, and how archiving stands
    #[command(after_help = status::EXAMPLES)]
    Status,
    /// Remove backups and WAL that retention no longer keeps
    Prune(prune::PruneArgs),
    /// Fetch one WAL file for `restore_command`
    WalFetch(wal_fetch::WalFetchArgs),
    /// Store one WAL file for `archive_command`
    WalPush(wal_push::WalPushArgs),
    /// Make links of PGHoard's names, through which this program takes PGHoard's place
    Links(links::LinksArgs),
    /// Check, show and describe the configuration
    Config(config::ConfigArgs),
}

/// Parses the arguments, runs the command, prints what went wrong.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(program) = arguments.first().and_then(|called| pghoard::Program::of(called)) {
        let run = std::panic::catch_unwind(|| program.run(&arguments));
        return run.unwrap_or_else(|_| program.after_panic(&arguments));
    }
    // A panic would exit with 101, which PostgreSQL takes for "no more WAL".
    match std::panic::catch_unwind(|| parse_and_run(&arguments)) {
        Ok(status) => status,
        Err(_) if exit::is_restore_command(&arguments) => Exit::Unknown.into(),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn parse_and_run(arguments: &[OsString]) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(usage) => {
            let status = render::usage(&usage);
            return if usage.use_stderr() { exit::of_wrong_usage(arguments).into() } else { status };
        }
    };
    let context = Context::new(cli.global);
    let result = match cli.command {
        Command::Run => run::run(&context),
        Command::Backup(args) => backup::run(args, &context),
        Command::Restore(args) => restore::run(&args, &context),
        Command::List => list::run(&context),
        Command::Status => status::run(&context),
        Command::Prune(args) => prune::run(&args, &context),
        Command::WalFetch(args) => return wal_fetch::run(&args, &context).into(),
        Command::WalPush(args) => wal_push::run(&args, &context),
        Command::Links(args) => links::run(&args, &context),
        Command::Config(args) => config::run(&args, &context),
    };
    match result {
        Ok(()) => Exit::Success.into(),
        Err(error) => {
            render::error(&error);
            exit::status_of(&error).into()
        }
    }
}
