//! `pgkeep prune`: remove what retention no longer keeps.

use clap::Args;
use serde_json::json;

use super::runtime::block_on;
use super::{Context, render};
use crate::agent::{self, Site};
use crate::catalog::Catalog;
use crate::retention::{self, RetentionPlan, Verdict};
use crate::runtime::{Clock, SystemClock};
use crate::storage::Access;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PruneArgs {
    /// Show what would go and why, and change nothing
    #[arg(long)]
    dry_run: bool,
}

const EXAMPLES: &str = "\
What is kept follows basebackup_count, basebackup_count_min and
basebackup_age_days_max. WAL is kept from the oldest kept backup on, timeline
history files always. The agent prunes after each base backup.

Examples:
  pgkeep prune --dry-run
  pgkeep prune --json";

pub fn run(args: &PruneArgs, context: &Context) -> anyhow::Result<()> {
    let config = context.start()?;
    let site = context.site(&config)?;
    let access = if args.dry_run { Access::Read } else { Access::Write };
    let (plan, report) = block_on(config.parallelism, async {
        let opened = Site::open(&config, site, access).await?;
        let mut catalog = Catalog::load(&opened.repository).await?;
        let now = SystemClock.now();
        let plan = retention::survey(&opened.repository, &mut catalog, &agent::policy(site), now).await?;
        let report =
            if args.dry_run { None } else { Some(retention::apply(&opened.repository, &plan, now).await?) };
        anyhow::Ok((plan, report))
    })??;
    if context.json() {
        return render::json(&as_json(&plan, report.as_ref()));
    }
    let verdict = |verdict| if verdict == Verdict::Keep { "keep" } else { "drop" }.to_owned();
    let rows: Vec<_> = plan
        .backups
        .iter()
        .map(|decision| [decision.backup.to_string(), verdict(decision.verdict), decision.reason.clone()])
        .chain(plan.unfinished.iter().map(|decision| {
            [format!("{} (unfinished)", decision.backup), verdict(decision.verdict), decision.reason.clone()]
        }))
        .collect();
    render::table(["backup", "verdict", "reason"], &rows)?;
    for note in &plan.notes {
        render::line(format_args!("note: {note}"))?;
    }
    match (plan.wal.first_needed, &plan.wal.nothing_goes) {
        (_, Some(reason)) => render::line(format_args!("WAL: all kept, because {reason}"))?,
        (Some(segment), None) => render::line(format_args!("WAL: kept from {segment} on"))?,
        (None, None) => {}
    }
    match report {
        Some(report) => render::line(format_args!(
            "removed {} and {}: {}, {}",
            render::count(report.backup_count, "backup"),
            render::count(report.segment_count, "WAL segment"),
            render::count(report.object_count, "object"),
            render::size(report.stored_bytes)
        )),
        None => render::line("nothing was changed (--dry-run)"),
    }
}

fn as_json(plan: &RetentionPlan, report: Option<&retention::PruneReport>) -> serde_json::Value {
    let verdict = |verdict| if verdict == Verdict::Keep { "keep" } else { "drop" };
    let decided = |backup: &dyn std::fmt::Display, verdict_of, reason: &str| json!({ "backup": backup.to_string(), "verdict": verdict(verdict_of), "reason": reason });
    let backups: Vec<_> =
        plan.backups.iter().map(|made| decided(&made.backup, made.verdict, &made.reason)).collect();
    let unfinished: Vec<_> =
        plan.unfinished.iter().map(|made| decided(&made.backup, made.verdict, &made.reason)).collect();
    json!({
        "dry_run": report.is_none(),
        "backups": backups,
        "unfinished": unfinished,
        "first_wal_segment_kept": plan.wal.first_needed.map(|segment| segment.to_string()),
        "all_wal_kept_because": plan.wal.nothing_goes,
        "notes": plan.notes,
        "removed": report,
    })
}
