//! `pgkeep run`: the daemon.

use super::runtime::block_on_many;
use super::{Context, allocator};
use crate::agent;
use crate::config::Config;
use crate::runtime::variable;

pub const EXAMPLES: &str = "\
Runs until SIGTERM or SIGINT; what has arrived by then is stored first. SIGHUP
reads the configuration again: a bad one is told and changes nothing.

Examples:
  pgkeep --config /etc/pgkeep.json run
  PGKEEP_STORAGE=file:///backups PGKEEP_SITE=main PGHOST=db PGUSER=backup pgkeep run";

pub fn run(context: &Context) -> anyhow::Result<()> {
    allocator::settle();
    let config = context.start()?;
    let source = context.source()?;
    let reload = || Config::load(&source, &variable).map(|loaded| loaded.config);
    Ok(block_on_many(config.parallelism, agent::run(config, &reload))??)
}
