//! What has gone to and from storage, by kind: PGHoard's `transfer_agent_state` and `compressors`. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The kinds of transfer that PGHoard tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    Upload,
    Download,
    Metadata,
    List,
}

const OPERATIONS: [Operation; 4] =
    [Operation::Upload, Operation::Download, Operation::Metadata, Operation::List];

/// The kinds of object that PGHoard always shows.
const KINDS: [&str; 6] =
    ["basebackup", "basebackup_chunk", "basebackup_delta", "basebackup_delta_chunk", "timeline", "xlog"];

/// The kind of an object by the first part of its key below the site's prefix: PGHoard's word, where it has
/// one. Of a base backup of ours, the record counts as the backup and the rest as its chunks.
pub fn kind_of(key: &str) -> &'static str {
    let (folder, rest) = key.split_once('/').unwrap_or((key, ""));
    match folder {
        "xlog" => "xlog",
        "timeline" => "timeline",
        "xlog_partial" => "xlog_partial",
        "basebackup" => "basebackup",
        "backup" if rest.ends_with("/record") => "basebackup",
        "backup" | "basebackup_chunk" => "basebackup_chunk",
        "basebackup_delta" => "basebackup_delta",
        "basebackup_delta_chunk" => "basebackup_delta_chunk",
        "preservation_request" => "preservation_request",
        _ => "other",
    }
}

/// The last name in a key.
pub fn file_name(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

/// Transfers of one kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Transfer {
    /// Bytes.
    pub data: u64,
    pub count: u64,
    /// Seconds.
    pub time_taken: f64,
    pub failures: u64,
    pub xlogs_since_basebackup: u64,
    /// Wall clock; PGHoard's own files have a number here that means nothing to others.
    #[serde(deserialize_with = "timestamp")]
    pub last_success: Option<Timestamp>,
    pub latest_filename: Option<String>,
}

fn timestamp<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    Ok(Value::deserialize(deserializer)?.as_str().and_then(|text| text.parse().ok()))
}

/// What compression made of one kind of object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Compressed {
    #[serde(rename = "original_data")]
    pub original: u64,
    #[serde(rename = "compressed_data")]
    pub stored: u64,
    pub count: u64,
}

/// The transfers of one site.
#[derive(Clone, Debug, Default)]
pub struct Transfers {
    by_kind: BTreeMap<(Operation, String), Transfer>,
    compressed: BTreeMap<String, Compressed>,
}

impl Transfers {
    /// Goes on counting where an earlier run ended; `state` is the site's part of `transfer_agent_state`.
    pub fn resume(state: &Value) -> Self {
        let read: BTreeMap<Operation, BTreeMap<String, Transfer>> =
            serde_json::from_value(state.clone()).unwrap_or_default();
        let kinds = read.into_iter().flat_map(|(operation, kinds)| {
            kinds.into_iter().map(move |(kind, transfer)| ((operation, kind), transfer))
        });
        Self { by_kind: kinds.collect(), compressed: BTreeMap::new() }
    }

    pub fn succeeded(
        &mut self,
        operation: Operation,
        kind: &str,
        key: &str,
        bytes: u64,
        seconds: f64,
        now: Timestamp,
    ) {
        let transfer = self.of(operation, kind);
        transfer.data += bytes;
        transfer.count += 1;
        transfer.time_taken += seconds;
        transfer.last_success = Some(now);
        transfer.latest_filename = Some(file_name(key).to_owned());
        if operation == Operation::Upload {
            match kind {
                "xlog" => self.of(operation, "xlog").xlogs_since_basebackup += 1,
                "basebackup" => self.of(operation, "xlog").xlogs_since_basebackup = 0,
                _ => {}
            }
        }
    }

    pub fn failed(&mut self, operation: Operation, kind: &str) {
        self.of(operation, kind).failures += 1;
    }

    pub fn compressed(&mut self, kind: &str, original: u64, compressed: u64) {
        let there = self.compressed.entry(kind.to_owned()).or_default();
        there.original += original;
        there.stored += compressed;
        there.count += 1;
    }

    fn of(&mut self, operation: Operation, kind: &str) -> &mut Transfer {
        self.by_kind.entry((operation, kind.to_owned())).or_default()
    }

    /// Uploads by kind.
    pub fn uploads(&self) -> impl Iterator<Item = (&str, &Transfer)> {
        let uploads = self.by_kind.iter().filter(|((operation, _), _)| *operation == Operation::Upload);
        uploads.map(|((_, kind), transfer)| (kind.as_str(), transfer))
    }

    pub fn xlogs_since_basebackup(&self) -> u64 {
        let uploads = self.by_kind.get(&(Operation::Upload, "xlog".to_owned()));
        uploads.map_or(0, |transfer| transfer.xlogs_since_basebackup)
    }

    /// The site's part of `transfer_agent_state`.
    pub fn to_state(&self) -> Value {
        let nothing = Transfer::default();
        let operations = OPERATIONS.map(|operation| {
            let here = self.by_kind.iter().filter(|((each, _), _)| *each == operation);
            let mut kinds: BTreeMap<&str, &Transfer> = KINDS.iter().map(|kind| (*kind, &nothing)).collect();
            kinds.extend(here.map(|((_, kind), transfer)| (kind.as_str(), transfer)));
            (operation, kinds)
        });
        serde_json::to_value(BTreeMap::from(operations)).unwrap_or(Value::Null)
    }

    /// The site's part of `compressors`.
    pub fn to_compressor(&self) -> Value {
        json!(self.compressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn kinds_are_pghoards() {
        for (key, kind) in [
            ("xlog/000000010000000000000001", "xlog"),
            ("timeline/00000002.history", "timeline"),
            ("xlog_partial/000000010000000000000001/00000000-00001000", "xlog_partial"),
            ("backup/20260101T000000Z/record", "basebackup"),
            ("backup/20260101T000000Z/pack/000001", "basebackup_chunk"),
            ("basebackup/2026-11-21_01-38_0", "basebackup"),
            ("basebackup_chunk/a/a.00000001.pghoard", "basebackup_chunk"),
            ("pgkeep-probe-1", "other"),
        ] {
            assert_eq!(kind_of(key), kind, "{key}");
        }
    }

    #[test]
    fn counting_goes_on_after_a_restart() {
        let mut transfers = Transfers::default();
        transfers.succeeded(Operation::Upload, "xlog", "a/xlog/1", 5, 0.5, time(10));
        transfers.succeeded(Operation::Upload, "xlog", "a/xlog/2", 6, 0.5, time(11));
        transfers.failed(Operation::Download, "xlog");
        let state = transfers.to_state();
        assert_eq!(state["upload"]["xlog"]["data"], 11);
        assert_eq!(state["upload"]["xlog"]["latest_filename"], "2");
        assert_eq!(state["upload"]["basebackup_delta"]["count"], 0);
        assert_eq!(state["download"]["xlog"]["failures"], 1);
        assert_eq!(state["list"]["timeline"]["last_success"], Value::Null);
        let mut again = Transfers::resume(&state);
        assert_eq!(again.to_state(), state);
        assert_eq!(again.xlogs_since_basebackup(), 2);
        again.succeeded(Operation::Upload, "basebackup", "a/backup/x/record", 1, 0.1, time(12));
        assert_eq!(again.xlogs_since_basebackup(), 0);
    }

    #[test]
    fn what_pghoard_left_is_taken_for_what_it_is_worth() {
        let state = json!({"upload": {"xlog": {
            "data": 100, "count": 2, "time_taken": 1.5, "failures": 1, "xlogs_since_basebackup": 7,
            "last_success": 12345.678, "latest_filename": "x"}}});
        let transfers = Transfers::resume(&state);
        assert_eq!(transfers.xlogs_since_basebackup(), 7);
        let (_, xlog) = transfers.uploads().next().unwrap();
        assert_eq!((xlog.data, xlog.last_success), (100, None), "its clock was another");
        for nonsense in [Value::Null, json!(5), json!({"upload": []})] {
            assert_eq!(Transfers::resume(&nonsense).to_state(), Transfers::default().to_state());
        }
    }
}
