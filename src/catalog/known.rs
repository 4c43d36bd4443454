//! Base backups as planning sees them, whichever program took them.
//!
//! Pure.

use std::fmt;

use jiff::Timestamp;
use serde::{Serialize, Serializer};

use super::backup::BackupRecord;
use super::pghoard_backup::{PGHOARD_SEGMENT_SIZE, PghoardBackup, PghoardId};
use super::snapshot::Catalog;
use crate::postgres::{Lsn, SegmentSize, TimelineId};
use crate::repository::BackupName;

/// The name of a backup of either program.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackupId {
    Own(BackupName),
    Pghoard(PghoardId),
}

impl BackupId {
    pub const fn own(&self) -> Option<BackupName> {
        match self {
            Self::Own(name) => Some(*name),
            Self::Pghoard(_) => None,
        }
    }
}

impl From<BackupName> for BackupId {
    fn from(name: BackupName) -> Self {
        Self::Own(name)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own(name) => name.fmt(f),
            Self::Pghoard(id) => id.fmt(f),
        }
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What restore and retention plan with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    pub name: BackupId,
    pub segment_size: SegmentSize,
    pub timeline: TimelineId,
    /// Recovery begins here; with PGHoard's, at the start of the segment.
    pub start_lsn: Lsn,
    /// The backup is consistent from here on; with PGHoard's, not before.
    pub stop_lsn: Lsn,
    /// All WAL before this is needed to make it consistent.
    pub needed_lsn: Lsn,
    pub stop_timeline: TimelineId,
    pub start_time: Timestamp,
    /// With PGHoard's raw backups the time they began at, as the end was not written down.
    pub stop_time: Timestamp,
    /// Whether the WAL that makes it consistent is in the backup itself.
    pub holds_wal: bool,
    /// Whether `stop_lsn` and `stop_time` are where it ends, and not merely not after it.
    pub end_is_known: bool,
    /// Bytes; none when PGHoard did not write it down.
    pub plaintext_bytes: Option<u64>,
    /// What the server said about page checksums that failed.
    pub checksum_failures: Option<String>,
    /// Until when somebody asked to keep it.
    pub preserved_until: Option<Timestamp>,
    /// Why it cannot be pruned, when it cannot.
    pub held: Option<String>,
}

impl Backup {
    pub const fn is_suspect(&self) -> bool {
        self.checksum_failures.is_some()
    }
}

impl From<&BackupRecord> for Backup {
    fn from(record: &BackupRecord) -> Self {
        Self {
            name: record.name.into(),
            segment_size: record.segment_size,
            timeline: record.timeline,
            start_lsn: record.start_lsn,
            stop_lsn: record.stop_lsn,
            needed_lsn: record.stop_lsn,
            stop_timeline: record.stop_timeline,
            start_time: record.start_time,
            stop_time: record.stop_time,
            holds_wal: false,
            end_is_known: true,
            plaintext_bytes: Some(record.plaintext_bytes),
            checksum_failures: record.checksum_failures.clone(),
            preserved_until: None,
            held: None,
        }
    }
}

impl From<&PghoardBackup> for Backup {
    fn from(backup: &PghoardBackup) -> Self {
        Self {
            name: BackupId::Pghoard(backup.id.clone()),
            segment_size: PGHOARD_SEGMENT_SIZE,
            timeline: backup.start_segment.timeline(),
            start_lsn: backup.start_lsn(),
            stop_lsn: backup.stop_lsn(),
            needed_lsn: backup.needed_lsn(),
            stop_timeline: backup.end_segment.unwrap_or(backup.start_segment).timeline(),
            start_time: backup.start_time,
            stop_time: backup.end_time.unwrap_or(backup.start_time).max(backup.start_time),
            holds_wal: backup.holds_wal(),
            end_is_known: backup.end_segment.is_some() && backup.end_time.is_some(),
            plaintext_bytes: backup.plaintext_bytes,
            checksum_failures: None,
            preserved_until: backup.preserved_until,
            held: backup.held.clone(),
        }
    }
}

impl Catalog {
    /// All backups of either program, oldest first.
    pub fn known(&self) -> Vec<Backup> {
        let mut known: Vec<Backup> =
            self.backups.iter().map(Backup::from).chain(self.pghoard.iter().map(Backup::from)).collect();
        known.sort_by(|one, other| (one.start_time, &one.name).cmp(&(other.start_time, &other.name)));
        known
    }

    /// Whether there is neither a backup nor anything that may be one.
    pub fn has_no_backup(&self) -> bool {
        self.backups.is_empty() && self.pghoard.is_empty() && self.damaged.is_empty()
    }

    /// When the newest backup was begun.
    pub fn last_start(&self) -> Option<Timestamp> {
        self.known().last().map(|backup| backup.start_time)
    }
}
