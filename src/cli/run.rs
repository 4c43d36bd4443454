//! `pgkeep run`: the daemon.

use std::os::unix::process::CommandExt;
use std::process::Command;

use super::Context;
use super::runtime::block_on;
use crate::agent;
use crate::config::Config;
use crate::runtime::variable;

pub const EXAMPLES: &str = "\
Runs until SIGTERM or SIGINT; what has arrived by then is stored first. SIGHUP
reads the configuration again: a bad one is told and changes nothing.

Examples:
  pgkeep --config /etc/pgkeep.json run
  PGKEEP_STORAGE=file:///backups PGKEEP_SITE=main PGHOST=db PGUSER=backup pgkeep run";

/// From this size on glibc's allocator gives memory back to the system as soon as it is freed. Left to
/// itself it raises the size to that of the largest buffer freed, and then keeps those of every thread:
/// a catch-up was seen to need 108 MiB instead of 60.
const MMAP_THRESHOLD: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "65536");

pub fn run(context: &Context) -> anyhow::Result<()> {
    settle_allocator();
    let config = context.start()?;
    let source = context.source()?;
    let reload = || Config::load(&source, &variable).map(|loaded| loaded.config);
    Ok(block_on(config.parallelism, agent::run(config, &reload))??)
}

/// Starts this program over, as the same process, with the allocator set: it reads the setting only once.
/// Where that does not work it goes on without, which costs memory and nothing else.
fn settle_allocator() {
    let (name, value) = MMAP_THRESHOLD;
    if cfg!(target_env = "gnu") && variable(name).is_none() {
        let mut arguments = std::env::args_os();
        let name_called = arguments.next().unwrap_or_default();
        let error = Command::new("/proc/self/exe").arg0(name_called).args(arguments).env(name, value).exec();
        tracing::debug!(%error, "cannot set the allocator");
    }
}
