//! `pgkeep run`: the daemon.

use super::Context;
use super::runtime::block_on;
use crate::agent;

pub fn run(context: &Context) -> anyhow::Result<()> {
    let config = context.start()?;
    Ok(block_on(config.parallelism, agent::run(&config))??)
}
