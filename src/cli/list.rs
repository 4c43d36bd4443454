//! `pgkeep list`: the backups there are.

use serde_json::json;

use super::runtime::load_catalog;
use super::{Context, render};
use crate::catalog::BackupRecord;

pub const EXAMPLES: &str = "\
Examples:
  pgkeep list
  pgkeep list --json";

pub fn run(context: &Context) -> anyhow::Result<()> {
    let config = context.start()?;
    let site = context.site(&config)?;
    let catalog = load_catalog(&config, site)?;
    if context.json() {
        let damaged: Vec<_> = catalog
            .damaged
            .iter()
            .map(|damaged| json!({ "name": damaged.name.to_string(), "reason": damaged.reason }))
            .collect();
        return render::json(&json!({ "site": site.name, "backups": catalog.backups, "damaged": damaged }));
    }
    if catalog.backups.is_empty() && catalog.damaged.is_empty() {
        return render::line("no backups");
    }
    let rows: Vec<_> = catalog.backups.iter().map(row).collect();
    render::table(
        ["backup", "finished", "took", "server", "timeline", "start", "stop", "size", "stored", "note"],
        &rows,
    )?;
    for damaged in &catalog.damaged {
        tracing::warn!(backup = %damaged.name, reason = damaged.reason, "this backup's record cannot be used");
    }
    Ok(())
}

fn row(record: &BackupRecord) -> [String; 10] {
    let mut note = record.note.clone().unwrap_or_default();
    if record.is_suspect() {
        let space = if note.is_empty() { "" } else { " " };
        note = format!("CHECKSUM FAILURES{space}{note}");
    }
    if let Some(key) = record.key_id() {
        let space = if note.is_empty() { "" } else { " " };
        note = format!("key {key}{space}{note}");
    }
    let version = record.server_version_num;
    [
        record.name.to_string(),
        render::time(record.stop_time),
        render::duration(record.stop_time.duration_since(record.start_time)),
        format!("{}.{}", version / 10_000, version % 10_000),
        record.timeline.to_string(),
        record.start_lsn.to_string(),
        record.stop_lsn.to_string(),
        render::size(record.plaintext_bytes),
        render::size(record.stored_bytes),
        note,
    ]
}
