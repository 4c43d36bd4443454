//! `pghoard_archive_cleanup`: removes WAL that lies before everything any backup needs.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use clap::Parser;

use super::pghoard::{context, fatal, parse, python_text};
use super::render;
use super::runtime::block_on;
use crate::agent::Site;
use crate::catalog::Catalog;
use crate::retention::{self, RetentionPolicy};
use crate::runtime::{Clock, SystemClock, variable};
use crate::storage::Access;

/// Everything is kept but what no backup needs.
const KEEP_ALL: RetentionPolicy =
    RetentionPolicy { count: None, count_min: 0, age_days_max: None, interval: Duration::ZERO };

/// Clean up unused WAL from the archive.
#[derive(Debug, Parser)]
#[command(name = "pghoard_archive_cleanup", version, infer_long_args = true)]
struct Options {
    /// Site
    #[arg(long)]
    site: Option<String>,
    #[arg(help = "Configuration file [env: PGHOARD_CONFIG]")]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only list redundant segments and calculate total file size but do not delete
    #[arg(long)]
    dry_run: bool,
}

pub fn run(arguments: &[OsString]) -> ExitCode {
    let options: Options = match parse(arguments) {
        Ok(options) => options,
        Err(status) => return status,
    };
    if options.config.is_none() && variable("PGHOARD_CONFIG").is_none() {
        render::line("pghoard: config file path must be given with --config or via env PGHOARD_CONFIG").ok();
        return ExitCode::FAILURE;
    }
    fatal(clean_up(options), "CleanupError")
}

fn clean_up(options: Options) -> anyhow::Result<()> {
    let context = context(options.config, options.site, false);
    let config = context.start()?;
    let site = context.site(&config)?;
    let access = if options.dry_run { Access::Read } else { Access::Write };
    block_on(config.parallelism, async {
        let opened = Site::open(&config, site, access).await?;
        let catalog = Catalog::load(&opened.repository).await?;
        if catalog.has_no_backup() {
            return Err(anyhow!("the archive holds no backup, so no WAL is known to be needless"));
        }
        let now = SystemClock.now();
        let mut plan = retention::plan(&catalog, &KEEP_ALL, now);
        // What interrupted backups left is not WAL.
        plan.unfinished.clear();
        if let Some(reason) = &plan.wal.nothing_goes {
            tracing::warn!("No WAL is removed, because {reason}");
        }
        if let Some(first) = plan.wal.first_needed {
            tracing::info!("First required WAL segment is {}", python_text(&first.to_string()));
        }
        let orphans = retention::wal_dropped(&opened.repository, &plan).await?;
        for orphan in &orphans {
            let name = orphan.name.to_string();
            let segment = name.rsplit('/').next().unwrap_or(&name);
            tracing::info!("Orphan WAL segment {} needs to be deleted", python_text(segment));
        }
        if !options.dry_run {
            retention::apply(&opened.repository, &plan, now).await?;
        }
        let total: u64 = orphans.iter().map(|orphan| orphan.stored_length).sum();
        tracing::info!("Total orphan WAL segments size is {total} bytes");
        Ok(())
    })?
}
