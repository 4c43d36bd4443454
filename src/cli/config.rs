//! `pgkeep config`: check, show and describe the configuration.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::{Context, render};
use crate::config::{Loaded, Warning, json_schema};

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

const EXAMPLES: &str = "\
Examples:
  pgkeep --config /etc/pgkeep.json config check
  pgkeep config show --json
  pgkeep config schema > pgkeep.schema.json";

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say whether the configuration can be used; unknown keys count as errors here
    Check,
    /// Print the configuration in effect, with defaults and without secrets
    Show,
    /// Print the JSON Schema of the configuration file
    Schema,
}

pub fn run(args: &ConfigArgs, context: &Context) -> anyhow::Result<()> {
    match args.command {
        ConfigCommand::Check => check(context),
        ConfigCommand::Show => show(context),
        ConfigCommand::Schema => render::json(&json_schema()),
    }
}

fn check(context: &Context) -> anyhow::Result<()> {
    let Loaded { warnings, .. } = context.load()?;
    let (failing, notes): (Vec<_>, Vec<_>) = warnings.iter().partition(|warning| warning.fails_check());
    let lines = |warnings: &[&Warning]| warnings.iter().map(ToString::to_string).collect::<Vec<_>>();
    if context.json() {
        render::json(&json!({
            "ok": failing.is_empty(),
            "problems": lines(&failing),
            "notes": lines(&notes),
        }))?;
    } else {
        for note in &notes {
            render::line(format_args!("note: {note}"))?;
        }
        for problem in &failing {
            render::line(format_args!("problem: {problem}"))?;
        }
    }
    match failing.len() {
        0 if context.json() => Ok(()),
        0 => render::line("ok"),
        1 => Err(Failure::new(Exit::Configuration, "the configuration has a problem").into()),
        count => {
            Err(Failure::new(Exit::Configuration, format!("the configuration has {count} problems")).into())
        }
    }
}

fn show(context: &Context) -> anyhow::Result<()> {
    let shown = context.load()?.config.shown();
    if context.json() {
        return render::json(&shown);
    }
    let mut rows = Vec::new();
    flatten("", &shown, &mut rows);
    render::table(["key", "value"], &rows)
}

/// One row for each value, under its place in the file.
fn flatten(place: &str, value: &Value, rows: &mut Vec<[String; 2]>) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                let dot = if place.is_empty() { "" } else { "." };
                flatten(&format!("{place}{dot}{key}"), member, rows);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{place}[{index}]"), item, rows);
            }
        }
        Value::Null => {}
        Value::String(text) => rows.push([place.to_owned(), text.clone()]),
        other => rows.push([place.to_owned(), other.to_string()]),
    }
}
