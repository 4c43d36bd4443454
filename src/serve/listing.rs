//! Base backups as PGHoard lists them.
//!
//! Pure. `GET /<site>/basebackup` and `pghoard_restore list-basebackups` show backups of either program in one
//! shape: a full key, a size, and metadata under PGHoard's names.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::catalog::{BackupFrom, BackupRecord, Catalog, PghoardBackup};
use crate::postgres::Lsn;
use crate::repository::Folder;

/// What stands as `format` of a backup in pgkeep's own format.
const OWN_FORMAT: &str = "pgkeep";

/// One base backup, as PGHoard's listing has it.
#[derive(Clone, Debug, PartialEq)]
pub struct BackupEntry {
    /// The key, with the site's prefix: what `--basebackup` takes.
    pub name: String,
    /// Stored bytes.
    pub size: u64,
    pub last_modified: Timestamp,
    /// The store's checksum of the one object; a backup of ours has many.
    pub md5: Option<String>,
    /// Values are texts, as in an object's metadata.
    pub metadata: Map<String, Value>,
}

impl BackupEntry {
    /// The entry of a backup of the site whose objects lie below `prefix`.
    pub fn of(prefix: &str, site: &str, record: &BackupRecord) -> Self {
        let size = record.segment_size;
        let segment = |timeline, lsn| size.segment_at(timeline, lsn).to_string();
        // The byte before the end: an end at a segment's border needs nothing of the next one.
        let last = Lsn::new(record.stop_lsn.get().saturating_sub(1)).max(record.start_lsn);
        let mut metadata = Map::new();
        let mut put = |key: &str, value: String| metadata.insert(key.to_owned(), Value::String(value));
        put("format", OWN_FORMAT.to_owned());
        put("host", record.host.clone());
        put("pg-version", record.server_version_num.to_string());
        put("site", site.to_owned());
        put("start-time", iso(record.start_time));
        put("start-wal-segment", segment(record.timeline, record.start_lsn));
        put("end-time", iso(record.stop_time));
        // PGHoard knows none of a backup of a standby.
        if record.backup_from == BackupFrom::Primary {
            put("end-wal-segment", segment(record.stop_timeline, last));
        }
        put("original-file-size", record.plaintext_bytes.to_string());
        put("total-size-plain", record.plaintext_bytes.to_string());
        put("total-size-enc", record.stored_bytes.to_string());
        Self {
            name: full_key(prefix, &Folder::BackupParts(record.name).to_key()),
            size: record.stored_bytes,
            last_modified: record.stop_time,
            md5: None,
            metadata,
        }
    }

    /// The entry of a backup that PGHoard took: its own words.
    pub fn of_pghoard(backup: &PghoardBackup) -> Self {
        // What the store calls the object's checksum and what PGHoard's library hides.
        let shown = backup.metadata.iter().filter(|(key, _)| !key.starts_with('_'));
        let mut metadata: Map<String, Value> =
            shown.map(|(key, value)| (key.clone(), Value::String(value.clone()))).collect();
        if let Some(until) = backup.preserved_until {
            metadata.insert("preserve-until".to_owned(), Value::String(z_time(until)));
        }
        Self {
            name: backup.id.to_string(),
            size: backup.object_length,
            last_modified: backup.last_modified,
            md5: backup.metadata.get("_hash").cloned(),
            metadata,
        }
    }

    /// All backups that can be used, of either program, by name.
    pub fn all(prefix: &str, site: &str, catalog: &Catalog) -> Vec<Self> {
        let own = catalog.backups.iter().map(|record| Self::of(prefix, site, record));
        let mut entries: Vec<Self> = own.chain(catalog.pghoard.iter().map(Self::of_pghoard)).collect();
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        entries
    }

    /// As an item of `basebackups`.
    pub fn to_json(&self) -> Value {
        json!({
            "last_modified": z_time(self.last_modified),
            "md5": self.md5,
            "metadata": self.metadata,
            "name": self.name,
            "size": self.size,
        })
    }
}

/// A key with the site's prefix before it.
fn full_key(prefix: &str, key: &str) -> String {
    format!("{}/{key}", prefix.trim_matches('/')).trim_matches('/').to_owned()
}

/// As PGHoard writes a time into metadata; sorts as text.
fn iso(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S+00:00").to_string()
}

/// As PGHoard's JSON has a time.
fn z_time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// A JSON document as PGHoard prints it: four blanks of indent; the keys of a [`Value`] are sorted.
///
/// # Panics
/// Never: a [`Value`] can be written.
pub fn pghoard_json(value: &Value) -> String {
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    serde::Serialize::serialize(value, &mut serializer).expect("a JSON value can be written to memory");
    String::from_utf8(text).expect("JSON is UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::example::{at, record};

    #[test]
    fn an_entry_has_what_pghoards_programs_ask_for() {
        let mut record = record("2026-11-21T09:30:00Z", at(3, 40), at(4, 0));
        record.stored_bytes = 5 << 20;
        let entry = BackupEntry::of("main", "main", &record);
        assert_eq!(entry.name, "main/backup/20261121T093000Z");
        let text = |key: &str| entry.metadata[key].as_str().unwrap().to_owned();
        assert_eq!(text("start-time"), "2026-11-21T09:30:00+00:00");
        assert_eq!(text("start-wal-segment"), "000000010000000000000003");
        assert_eq!(text("end-wal-segment"), "000000010000000000000003");
        assert_eq!(text("total-size-enc"), (5 << 20).to_string());
        assert_eq!(BackupEntry::of("", "main", &record).name, "backup/20261121T093000Z");
        assert_eq!(BackupEntry::of("/a/b/", "main", &record).name, "a/b/backup/20261121T093000Z");
    }

    #[test]
    fn json_looks_like_pghoards() {
        assert_eq!(
            pghoard_json(&json!({ "b": [1], "a": {} })),
            "{\n    \"a\": {},\n    \"b\": [\n        1\n    ]\n}"
        );
    }
}
