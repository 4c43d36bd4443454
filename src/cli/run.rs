//! `pgkeep run`: the daemon.

use super::runtime::block_on_many;
use super::{Context, allocator, context};
use crate::agent;
use crate::config::Config;
use crate::observe::set_syslog;
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
    set_syslog(config.reporting.syslog.clone());
    let source = context.source()?;
    let reload = || {
        let loaded = Config::load(&source, &variable)?;
        context.log_level_changed(loaded.config.log_level);
        set_syslog(loaded.config.reporting.syslog.clone());
        context::tell(&loaded.warnings);
        Ok(loaded.config)
    };
    Ok(block_on_many(config.parallelism, agent::run(config, &reload))??)
}
