//! `pgkeep list`: the backups there are.

use serde_json::{Value, json};

use super::runtime::load_catalog;
use super::{Context, render};
use crate::catalog::{Backup, BackupId, BackupRecord, Catalog, PghoardBackup};

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
        let backups: Vec<_> = each(&catalog, |record| json!(record), pghoard_json);
        return render::json(&json!({ "site": site.name, "backups": backups, "damaged": damaged }));
    }
    if catalog.has_no_backup() {
        return render::line("no backups");
    }
    let rows: Vec<_> = each(&catalog, row, pghoard_row);
    render::table(
        ["backup", "finished", "took", "server", "timeline", "start", "stop", "size", "stored", "note"],
        &rows,
    )?;
    for damaged in &catalog.damaged {
        tracing::warn!(backup = %damaged.name, reason = damaged.reason, "this backup cannot be used");
    }
    Ok(())
}

/// What is shown of every backup, oldest first.
fn each<T>(
    catalog: &Catalog,
    own: impl Fn(&BackupRecord) -> T,
    pghoard: impl Fn(&PghoardBackup) -> T,
) -> Vec<T> {
    let find = |backup: &Backup| match &backup.name {
        BackupId::Own(name) => catalog.backups.iter().find(|record| record.name == *name).map(&own),
        BackupId::Pghoard(id) => catalog.pghoard.iter().find(|backup| backup.id == *id).map(&pghoard),
    };
    catalog.known().iter().filter_map(find).collect()
}

pub(super) fn pghoard_json(backup: &PghoardBackup) -> Value {
    json!({
        "name": backup.id.to_string(),
        "taken_by": "pghoard",
        "pghoard_format": backup.format.to_string(),
        "server_version_num": backup.server_version_num,
        "timeline": backup.start_segment.timeline(),
        "start_lsn": backup.start_lsn(),
        "start_wal_segment": backup.start_segment.to_string(),
        "end_wal_segment": backup.end_segment.map(|segment| segment.to_string()),
        "start_time": backup.start_time,
        "stop_time": backup.end_time,
        "plaintext_bytes": backup.plaintext_bytes,
        "stored_bytes": backup.stored_bytes,
        "encryption_key_id": backup.encryption_key_id,
        "preserved_until": backup.preserved_until,
        "host": backup.metadata.get("host"),
    })
}

fn pghoard_row(backup: &PghoardBackup) -> [String; 10] {
    let mut note = format!("PGHoard, {}", backup.format);
    if let Some(key) = &backup.encryption_key_id {
        note = format!("{note}, encrypted with {key}");
    }
    if let Some(until) = backup.preserved_until {
        note = format!("{note}, preserved until {}", render::time(until));
    }
    let took = backup.end_time.map(|end| render::duration(end.duration_since(backup.start_time)));
    [
        backup.id.to_string(),
        render::time(backup.end_time.unwrap_or(backup.start_time)),
        took.unwrap_or_default(),
        backup.server_version_num.map(version).unwrap_or_default(),
        backup.start_segment.timeline().to_string(),
        backup.start_lsn().to_string(),
        backup.end_segment.map(|_| backup.stop_lsn().to_string()).unwrap_or_default(),
        backup.plaintext_bytes.map(render::size).unwrap_or_default(),
        render::size(backup.stored_bytes),
        note,
    ]
}

fn version(number: u32) -> String {
    // Before 10 the major version had two parts.
    if number < 100_000 {
        return format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100);
    }
    format!("{}.{}", number / 10_000, number % 10_000)
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
    [
        record.name.to_string(),
        render::time(record.stop_time),
        render::duration(record.stop_time.duration_since(record.start_time)),
        version(record.server_version_num),
        record.timeline.to_string(),
        record.start_lsn.to_string(),
        record.stop_lsn.to_string(),
        render::size(record.plaintext_bytes),
        render::size(record.stored_bytes),
        note,
    ]
}
