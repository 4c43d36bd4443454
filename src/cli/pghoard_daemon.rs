//! `pghoard`: the daemon, under PGHoard's name and options.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use super::exit::status_of;
use super::pghoard::{context, parse, python_text};
use super::{Exit, render, run};
use crate::runtime::variable;

/// PostgreSQL automatic backup daemon.
#[derive(Debug, Parser)]
#[command(name = "pghoard", version, infer_long_args = true)]
struct Options {
    /// Enable debug logging
    #[arg(short = 'D', long)]
    debug: bool,
    /// Accepted and without effect: lines are short
    #[arg(short = 's', long)]
    short_log: bool,
    #[arg(help = "Configuration file [env: PGHOARD_CONFIG]")]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Configuration file, as old versions took it
    config_file: Option<PathBuf>,
}

pub fn run(arguments: &[OsString]) -> ExitCode {
    let options: Options = match parse(arguments) {
        Ok(options) => options,
        Err(status) => return status,
    };
    let from_environment =
        || variable("PGHOARD_CONFIG").or_else(|| variable("PGKEEP_CONFIG")).map(PathBuf::from);
    let Some(path) = options.config.or_else(from_environment).or(options.config_file) else {
        render::line("pghoard: config file path must be given with --config or via env PGHOARD_CONFIG").ok();
        return ExitCode::FAILURE;
    };
    let shown = path.display().to_string();
    if !path.exists() {
        render::line(format_args!("pghoard: {} doesn't exist", python_text(&shown))).ok();
        return ExitCode::FAILURE;
    }
    let Err(error) = run::run(&context(Some(path), None, options.debug)) else { return ExitCode::SUCCESS };
    if status_of(&error) == Exit::Configuration {
        let text = render::with_causes(error.as_ref());
        render::line(format_args!("pghoard: failed to load config {shown}: {text}")).ok();
    }
    render::error(&error);
    ExitCode::FAILURE
}
