//! `pgkeep backup`: take a base backup now.

use std::sync::Arc;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::runtime::{block_on, interruptible};
use super::{Context, allocator, render};
use crate::agent::{self, Site, Wish};
use crate::observe::Progress;
use crate::storage::Access;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BackupArgs {
    /// Have the server checkpoint at once instead of spreading the load over minutes
    #[arg(long)]
    fast: bool,
    /// Your own words, kept with the backup
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
}

const EXAMPLES: &str = "\
Works with or without a running agent: when nobody archives the WAL that the
backup needs, it is streamed for the time of the backup.

Examples:
  pgkeep backup
  pgkeep backup --fast --note 'before the upgrade'";

pub fn run(args: BackupArgs, context: &Context) -> anyhow::Result<()> {
    allocator::settle();
    let config = context.start()?;
    let site = context.site(&config)?;
    let record = block_on(config.parallelism, async {
        let cancel = CancellationToken::new();
        let site = Arc::new(Site::open(&config, site, Access::Write).await?);
        let progress = Progress::start(format!("backup of {}", site.config.name));
        let wish = Wish { fast_checkpoint: args.fast, note: args.note };
        let record =
            interruptible(&cancel, Box::pin(agent::back_up_alone(&site, &wish, &progress, &cancel))).await;
        progress.finish();
        anyhow::Ok(record?)
    })??;
    if context.json() {
        return render::json(&record);
    }
    render::line(record.name)?;
    if let Some(failures) = &record.checksum_failures {
        tracing::warn!(server = failures, "the server found checksum failures in its data; see its log");
    }
    Ok(())
}
