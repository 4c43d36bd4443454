//! A snapshot of one site: its backups, its timelines, its WAL.
//!
//! Pure. [`Catalog::load`](super::Catalog::load) fills it from the repository; everything that plans
//! (restore, retention, status) works on these values only.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;

use super::backup::BackupRecord;
use super::histories::{Histories, RecoveryPath};
use super::known::{Backup, BackupId};
use super::pghoard_backup::PghoardBackup;
use super::wal_range::{SegmentRange, WalCoverage};
use crate::postgres::{Lsn, SegmentSize, TimelineHistory, TimelineId};
use crate::repository::BackupName;

/// What the repository holds of one site at one moment.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// Backups that exist, oldest first.
    pub backups: Vec<BackupRecord>,
    /// Those that PGHoard took, here and in the sites this one was moved from, oldest first.
    pub pghoard: Vec<PghoardBackup>,
    /// Backups whose record cannot be read, oldest first. They are neither restored nor pruned.
    pub damaged: Vec<DamagedBackup>,
    /// Data of backups without a record, oldest first: being taken, interrupted, or left by pruning.
    pub unfinished: Vec<UnfinishedBackup>,
    pub histories: Histories,
    /// None as long as the segment size is not known, which means that there is neither backup nor WAL.
    pub coverage: Option<WalCoverage>,
    pub wal_totals: BTreeMap<TimelineId, WalTotals>,
    /// What the WAL says about its origin; looked at only when there is no record to ask.
    pub wal_identity: Option<SiteIdentity>,
    /// Why the WAL does not say so, when there is WAL and no record.
    pub wal_problem: Option<String>,
    /// Keys in the site's folders that are not pgkeep's nor PostgreSQL's.
    pub unknown_key_count: u64,
}

/// A backup whose record cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedBackup {
    pub name: BackupId,
    pub reason: String,
}

/// Objects of a backup that has no record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnfinishedBackup {
    pub name: BackupName,
    /// Its `started` object is there: it is being taken or was interrupted. Else pruning left the rest.
    pub started: bool,
    pub newest_object: Timestamp,
    pub object_count: u64,
    pub stored_bytes: u64,
}

/// The WAL objects of one timeline, whole segments and pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalTotals {
    pub object_count: u64,
    pub stored_bytes: u64,
    /// When the last one was stored, by the store's clock: about how far in time the archive reaches.
    pub newest: Timestamp,
}

/// The cluster that a site belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteIdentity {
    pub system_identifier: u64,
    pub segment_size: SegmentSize,
}

/// A backup as asked for on the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackupChoice {
    #[default]
    Latest,
    Named(BackupName),
    /// A name of PGHoard's, in full or without what comes before and after it.
    Pghoard(String),
}

impl BackupChoice {
    /// Whether `backup` is the one asked for; any is the latest among others.
    pub fn is(&self, backup: &BackupId) -> bool {
        match (self, backup) {
            (Self::Latest, _) => true,
            (Self::Named(name), BackupId::Own(own)) => name == own,
            (Self::Pghoard(text), BackupId::Pghoard(id)) => id.answers_to(text),
            _ => false,
        }
    }
}

impl FromStr for BackupChoice {
    type Err = <BackupName as FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            _ if text == "latest" => Ok(Self::Latest),
            Ok(name) => Ok(Self::Named(name)),
            // PGHoard takes whatever lies under `basebackup/` for a backup.
            Err(_) if text.contains('/') || is_dated(text) => Ok(Self::Pghoard(text.to_owned())),
            Err(error) => Err(error),
        }
    }
}

/// `YYYY-MM-DD_…`, as PGHoard names its backups.
fn is_dated(text: &str) -> bool {
    let date = text.as_bytes().get(..11).unwrap_or_default();
    !date.is_empty()
        && date.iter().enumerate().all(|(at, byte)| match at {
            4 | 7 => *byte == b'-',
            10 => *byte == b'_',
            _ => byte.is_ascii_digit(),
        })
}

impl fmt::Display for BackupChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Named(name) => name.fmt(f),
            Self::Pghoard(text) => f.write_str(text),
        }
    }
}

/// The points of one timeline that can be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    pub timeline: TimelineId,
    /// The end of the oldest backup from which all WAL up to `latest` is there; none when no backup has it.
    pub earliest: Option<WindowStart>,
    pub latest: Lsn,
    /// When the last WAL of the timeline was stored.
    pub latest_time: Option<Timestamp>,
    /// Segments missing on this timeline, between its first and its last.
    pub gaps: Vec<SegmentRange>,
    /// Why the ancestors of the timeline are not known, when they are not; then only backups taken on the
    /// timeline itself count.
    pub history_problem: Option<String>,
}

/// Where a window begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowStart {
    pub backup: BackupId,
    pub lsn: Lsn,
    pub time: Timestamp,
}

impl Catalog {
    /// The cluster this site belongs to: what its newest record says, else what its WAL says.
    pub fn identity(&self) -> Option<SiteIdentity> {
        self.backups
            .last()
            .map(|record| SiteIdentity {
                system_identifier: record.system_identifier,
                segment_size: record.segment_size,
            })
            .or(self.wal_identity)
    }

    /// The backup asked for; the newest one for `latest`.
    pub fn backup(&self, choice: &BackupChoice) -> Option<Backup> {
        self.known().into_iter().rev().find(|backup| choice.is(&backup.name))
    }

    /// Why the backup asked for cannot be used, if it is there.
    pub fn damage_of(&self, choice: &BackupChoice) -> Option<&DamagedBackup> {
        self.damaged.iter().find(|damaged| choice.is(&damaged.name))
    }

    /// When the last WAL of `timeline` was stored.
    pub fn newest_wal(&self, timeline: TimelineId) -> Option<Timestamp> {
        self.wal_totals.get(&timeline).map(|totals| totals.newest)
    }

    /// What can be restored, for each timeline of which there is WAL, ascending.
    pub fn windows(&self) -> Vec<Window> {
        let Some(coverage) = &self.coverage else { return Vec::new() };
        let known = self.known();
        coverage.timelines().filter_map(|timeline| self.window(&known, coverage, timeline)).collect()
    }

    fn window(&self, known: &[Backup], coverage: &WalCoverage, timeline: TimelineId) -> Option<Window> {
        let latest = coverage.end_of(timeline)?;
        let (history, history_problem) = match self.histories.history(timeline) {
            Ok(history) => (history, None),
            Err(error) => (TimelineHistory::root(timeline), Some(error.to_string())),
        };
        let path = RecoveryPath::new(&history);
        let earliest = known
            .iter()
            .filter(|record| history.contains(record.stop_timeline, record.stop_lsn))
            .filter(|record| record.needed_lsn <= latest)
            .filter(|record| path.check(coverage, record.start_lsn, latest).is_ok())
            .min_by_key(|record| record.stop_lsn)
            .map(|record| WindowStart {
                backup: record.name.clone(),
                lsn: record.stop_lsn,
                time: record.stop_time,
            });
        Some(Window {
            timeline,
            earliest,
            latest,
            latest_time: self.newest_wal(timeline),
            gaps: coverage.gaps(timeline),
            history_problem,
        })
    }
}

/// Catalogs for the tests of every room that plans with them.
#[cfg(test)]
pub(crate) mod example {
    pub use super::super::backup::example::record;
    use super::super::pieces::Piece;
    use super::super::wal_range::WalCoverageBuilder;
    use super::*;

    pub const SIZE: SegmentSize = SegmentSize::DEFAULT;

    pub fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    /// `offset` bytes into segment `number`.
    pub fn at(number: u64, offset: u64) -> Lsn {
        Lsn::new(number * SIZE.bytes() + offset)
    }

    pub fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// Builds a catalog step by step.
    pub struct Archive {
        catalog: Catalog,
        builder: WalCoverageBuilder,
    }

    impl Archive {
        pub fn new() -> Self {
            Self { catalog: Catalog::default(), builder: WalCoverageBuilder::new(SIZE) }
        }

        /// Segments `first` to `last` of a timeline, the last of them stored at `newest`.
        pub fn wal(mut self, timeline: u32, first: u64, last: u64, newest: &str) -> Self {
            for number in first..=last {
                self.builder.segment(SIZE.segment_at(tli(timeline), at(number, 0)));
            }
            let totals = WalTotals { object_count: 1, stored_bytes: 1, newest: time(newest) };
            self.catalog.wal_totals.insert(tli(timeline), totals);
            self
        }

        /// The first `end` bytes of a segment.
        pub fn piece(mut self, timeline: u32, number: u64, end: u32) -> Self {
            self.builder.piece(SIZE.segment_at(tli(timeline), at(number, 0)), Piece { start: 0, end });
            self
        }

        pub fn history(mut self, timeline: u32, text: &str) -> Self {
            let history = TimelineHistory::parse(tli(timeline), text.as_bytes());
            self.catalog.histories.insert(tli(timeline), history.map_err(|error| error.to_string()));
            self
        }

        /// A backup that begins at `start`, lasts a minute, and takes most of segment `number`.
        pub fn backup(self, timeline: u32, number: u64, start: &str) -> Self {
            self.backup_with(timeline, number, start, |_| {})
        }

        pub fn backup_with(
            mut self,
            timeline: u32,
            number: u64,
            start: &str,
            change: impl FnOnce(&mut BackupRecord),
        ) -> Self {
            let mut record = record(start, at(number, 0x28), at(number, 0x1000));
            (record.timeline, record.stop_timeline) = (tli(timeline), tli(timeline));
            change(&mut record);
            self.catalog.backups.push(record);
            self.catalog.backups.sort_by_key(|record| record.name);
            self
        }

        pub fn change(mut self, change: impl FnOnce(&mut Catalog)) -> Self {
            change(&mut self.catalog);
            self
        }

        pub fn catalog(self) -> Catalog {
            Catalog { coverage: Some(self.builder.finish()), ..self.catalog }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::example::{Archive, SIZE, at, tli};
    use super::*;

    #[test]
    fn the_window_begins_at_the_oldest_backup_with_unbroken_wal() {
        let catalog = Archive::new()
            .wal(1, 1, 3, "2026-11-21T09:00:00Z")
            .wal(1, 5, 9, "2026-11-21T12:00:00Z")
            .piece(1, 10, 77)
            .backup(1, 2, "2026-11-21T08:00:00Z")
            .backup(1, 6, "2026-11-21T10:00:00Z")
            .backup(1, 8, "2026-11-21T11:00:00Z")
            .catalog();
        let windows = catalog.windows();
        assert_eq!(windows.len(), 1);
        let start = windows[0].earliest.clone().unwrap();
        assert_eq!((start.backup.to_string(), start.lsn), ("20261121T100000Z".to_owned(), at(6, 0x1000)));
        assert_eq!(windows[0].latest, at(10, 77));
        assert_eq!(windows[0].latest_time, Some("2026-11-21T12:00:00Z".parse().unwrap()));
        assert_eq!(windows[0].gaps.len(), 1);
    }

    #[test]
    fn a_backup_opens_the_windows_of_all_timelines_that_come_from_it() {
        let catalog = Archive::new()
            .wal(1, 1, 9, "2026-11-21T09:00:00Z")
            .wal(2, 5, 7, "2026-11-21T12:00:00Z")
            .wal(4, 5, 7, "2026-11-21T12:00:00Z")
            .history(2, "1\t0/5000100\tx\n")
            .backup(1, 2, "2026-11-21T08:00:00Z")
            .backup(1, 8, "2026-11-21T08:30:00Z")
            .catalog();
        let windows = catalog.windows();
        let backups: Vec<_> = windows
            .iter()
            .map(|window| (window.timeline, window.earliest.as_ref().map(|start| start.backup.to_string())))
            .collect();
        let first = Some("20261121T080000Z".to_owned());
        assert_eq!(backups, [(tli(1), first.clone()), (tli(2), first), (tli(4), None)]);
        assert!(windows[2].history_problem.is_some());
    }

    #[test]
    fn the_newest_record_says_whose_site_it_is() {
        let mut catalog = Archive::new().backup(1, 2, "2026-11-21T08:00:00Z").catalog();
        let identity = catalog.identity().unwrap();
        assert_eq!(identity.segment_size, SIZE);
        let other = SiteIdentity { system_identifier: 5, ..identity };
        catalog.wal_identity = Some(other);
        assert_eq!(catalog.identity(), Some(identity));
        catalog.backups.clear();
        assert_eq!(catalog.identity(), Some(other));
    }

    #[test]
    fn finds_backups_by_name_and_the_latest() {
        let catalog = Archive::new()
            .backup(1, 2, "2026-11-21T08:00:00Z")
            .backup(1, 6, "2026-11-21T10:00:00Z")
            .catalog();
        let find = |text: &str| catalog.backup(&text.parse().unwrap()).map(|record| record.name.to_string());
        assert_eq!(find("latest"), Some("20261121T100000Z".to_owned()));
        assert_eq!(find("20261121T080000Z"), Some("20261121T080000Z".to_owned()));
        assert_eq!(find("20261121T080001Z"), None);
        assert!("newest".parse::<BackupChoice>().is_err());
        for text in ["default/basebackup/2026-11-21_01-38_0", "2016-11-21_0", "basebackup/any"] {
            assert_eq!(text.parse(), Ok(BackupChoice::Pghoard(text.to_owned())));
        }
    }
}
