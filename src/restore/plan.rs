//! Which backup, which way, which WAL, and what is missing.
//!
//! Pure. Everything that can be known before the first byte is written is decided here, so that a restore
//! that cannot reach its target is refused while the old data directory is still there.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use super::target::{RecoveryTarget, TargetTimeline};
use crate::catalog::{
    Backup, BackupChoice, BackupId, Catalog, HistoryError, Missing, RecoveryPath, SegmentRange, WalCoverage,
    WalCoverageBuilder, Window,
};
use crate::postgres::{Lsn, TimelineHistory, TimelineId};

/// Stores cut the time of an object down to the second, so its bytes may be this much younger.
const STORE_TIME_RESOLUTION: SignedDuration = SignedDuration::from_secs(1);

/// A restore that will reach its target, as far as that can be known beforehand.
#[derive(Clone, Debug, PartialEq)]
pub struct RestorePlan {
    pub backup: Backup,
    pub target: RecoveryTarget,
    /// As asked for; this is what PostgreSQL is told.
    pub target_timeline: TargetTimeline,
    /// The timeline that this means.
    pub timeline: TimelineId,
    pub reach: Reach,
    /// The WAL recovery reads, in order; the last segment may be there in part only.
    pub wal: Vec<SegmentRange>,
    pub wal_segment_count: u64,
    /// What the operator should know before starting.
    pub warnings: Vec<String>,
}

/// The point a restore arrives at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The timeline that holds the point, or may: only replay finds the place of a time, name or transaction.
    pub timeline: TimelineId,
    /// None when only replay can tell.
    pub lsn: Option<Lsn>,
    /// About when; none when only replay can tell.
    pub time: Option<Timestamp>,
}

/// Why a restore is refused.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("the archive holds no backup")]
    NoBackup,
    #[error("there is no backup `{0}`")]
    UnknownBackup(BackupChoice),
    #[error("backup `{name}` cannot be used: {reason}")]
    DamagedBackup { name: BackupId, reason: String },
    #[error("timeline {0} is not in the archive: its history file is missing")]
    UnknownTimeline(TimelineId),
    #[error("the way to the target timeline is not known: {0}")]
    History(#[source] HistoryError),
    #[error(
        "timeline {timeline} does not continue backup `{backup}`, which ends on timeline {ended_on} at `{ended_at}`"
    )]
    OtherBranch { backup: BackupId, ended_on: TimelineId, ended_at: Lsn, timeline: TimelineId },
    #[error("{target} is outside what can be restored: {reason}{window}")]
    OutsideWindow { target: RecoveryTarget, reason: String, window: WindowText },
    #[error("WAL needed to restore backup `{backup}` to {target} is missing: {missing}")]
    WalMissing {
        backup: BackupId,
        target: RecoveryTarget,
        missing: Missing,
        /// How far recovery would come, when that is past the end of the backup.
        reaches: Option<Lsn>,
    },
}

impl PlanError {
    /// What to type next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownBackup(_) => Some("`pgkeep list` shows the backups there are".to_owned()),
            Self::NoBackup => Some("take one with `pgkeep backup`".to_owned()),
            Self::OtherBranch { .. } => Some(
                "follow the backup's own timeline with `--target-timeline current`, or choose another with `--backup`"
                    .to_owned(),
            ),
            Self::OutsideWindow { .. } => {
                Some("leave the target away to restore to the end of the archive".to_owned())
            }
            Self::WalMissing { reaches: Some(lsn), .. } => Some(format!(
                "the WAL is whole up to `{lsn}`: `--target-lsn` before that, or `--target-immediate`"
            )),
            Self::WalMissing { reaches: None, .. } => Some("choose another backup with `--backup`".to_owned()),
            _ => None,
        }
    }

    /// The exit code of `pgkeep restore`.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoBackup | Self::UnknownBackup(_) => 3,
            Self::UnknownTimeline(_) | Self::OtherBranch { .. } | Self::OutsideWindow { .. } => 5,
            Self::DamagedBackup { .. } | Self::History(HistoryError::Damaged { .. }) => 7,
            Self::WalMissing { .. } | Self::History(HistoryError::Missing(_)) => 8,
        }
    }
}

/// The windows of all timelines, as they stand at the end of an error message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowText(Vec<Window>);

impl fmt::Display for WindowText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for window in &self.0 {
            let Some(start) = &window.earliest else { continue };
            write!(
                f,
                "; timeline {} can be restored from `{}` (`{}`) to `{}`",
                window.timeline, start.time, start.lsn, window.latest
            )?;
            if let Some(time) = window.latest_time {
                write!(f, " (about `{time}`)")?;
            }
        }
        Ok(())
    }
}

/// Plans the restore of `wanted` to `target` on `timeline`.
pub fn plan(
    catalog: &Catalog,
    wanted: &BackupChoice,
    target: &RecoveryTarget,
    timeline: TargetTimeline,
    now: Timestamp,
) -> Result<RestorePlan, PlanError> {
    let known = catalog.known();
    let Chosen { backup, history, mut warnings } = choose(catalog, &known, wanted, target, timeline)?;
    let nothing;
    let coverage = if let Some(coverage) = &catalog.coverage {
        coverage
    } else {
        nothing = WalCoverageBuilder::new(backup.segment_size).finish();
        &nothing
    };
    let way = Way { catalog, known: &known, coverage, backup, path: RecoveryPath::new(&history), target };
    if let Some(plan) = way.without_archive(&history, timeline, &mut warnings) {
        return Ok(plan);
    }
    way.require(backup.needed_lsn)?;
    let (to, reach) = way.destination(&history, now, &mut warnings)?;
    way.require(to)?;

    if timeline == TargetTimeline::Latest {
        warn_of_other_timelines(catalog, backup, &history, &mut warnings);
    }
    let wal: Vec<SegmentRange> = way
        .path
        .stretches(coverage, backup.start_lsn, to)
        .into_iter()
        .filter_map(|part| SegmentRange::holding(coverage.segment_size(), part.timeline, part.from, part.to))
        .collect();
    Ok(RestorePlan {
        backup: backup.clone(),
        target: target.clone(),
        target_timeline: timeline,
        timeline: history.timeline(),
        reach,
        wal_segment_count: wal.iter().map(|range| range.count(coverage.segment_size())).sum(),
        wal,
        warnings,
    })
}

/// A backup from which the target may be reached, and the way there.
struct Chosen<'a> {
    backup: &'a Backup,
    history: TimelineHistory,
    warnings: Vec<String>,
}

fn choose<'a>(
    catalog: &Catalog,
    known: &'a [Backup],
    wanted: &BackupChoice,
    target: &RecoveryTarget,
    timeline: TargetTimeline,
) -> Result<Chosen<'a>, PlanError> {
    let mut candidates: Vec<&Backup> = known.iter().filter(|backup| wanted.is(&backup.name)).collect();
    if candidates.is_empty() && *wanted != BackupChoice::Latest {
        return Err(match catalog.damage_of(wanted) {
            Some(damaged) => {
                PlanError::DamagedBackup { name: damaged.name.clone(), reason: damaged.reason.clone() }
            }
            None => PlanError::UnknownBackup(wanted.clone()),
        });
    }
    // Clean ones first, the newest first among them.
    candidates.sort_by_key(|record| (record.is_suspect(), std::cmp::Reverse(record.stop_time)));

    let mut refusal: Option<PlanError> = None;
    for backup in candidates {
        let mut warnings = Vec::new();
        let history = history_for(catalog, backup, timeline, &mut warnings)?;
        let error = if !history.contains(backup.stop_timeline, backup.stop_lsn) {
            PlanError::OtherBranch {
                backup: backup.name.clone(),
                ended_on: backup.stop_timeline,
                ended_at: backup.stop_lsn,
                timeline: history.timeline(),
            }
        } else if ends_after(backup, target) {
            PlanError::OutsideWindow {
                target: target.clone(),
                reason: format!(
                    "backup `{}` ends later, at `{}` (`{}`)",
                    backup.name, backup.stop_lsn, backup.stop_time
                ),
                window: WindowText(catalog.windows()),
            }
        } else {
            warn_of_choice(catalog, backup, target, refusal.as_ref(), &mut warnings);
            return Ok(Chosen { backup, history, warnings });
        };
        // The one about the oldest backup says how far back the archive goes.
        refusal = Some(error);
    }
    Err(match (refusal, catalog.damaged.last()) {
        (Some(refusal), _) => refusal,
        (None, Some(damaged)) => {
            PlanError::DamagedBackup { name: damaged.name.clone(), reason: damaged.reason.clone() }
        }
        (None, None) => PlanError::NoBackup,
    })
}

/// Whether the backup is not yet consistent at the target.
fn ends_after(backup: &Backup, target: &RecoveryTarget) -> bool {
    match target {
        RecoveryTarget::Lsn(lsn) => *lsn < backup.stop_lsn,
        RecoveryTarget::Time(time) => *time <= backup.stop_time,
        RecoveryTarget::Latest
        | RecoveryTarget::Immediate
        | RecoveryTarget::Name(_)
        | RecoveryTarget::Xid(_) => false,
    }
}

/// The history that PostgreSQL will follow from this backup.
fn history_for(
    catalog: &Catalog,
    backup: &Backup,
    timeline: TargetTimeline,
    warnings: &mut Vec<String>,
) -> Result<TimelineHistory, PlanError> {
    let own = backup.stop_timeline;
    let number = match timeline {
        TargetTimeline::Latest => catalog.histories.latest_from(own),
        TargetTimeline::Current => own,
        TargetTimeline::Number(number) => number,
    };
    match catalog.histories.history(number) {
        Ok(history) => Ok(history),
        // `readTimeLineHistory` takes a timeline without a file for one without ancestors, and the backup's
        // own needs none; only a number that was asked for must exist.
        Err(HistoryError::Missing(_)) if number == own && !matches!(timeline, TargetTimeline::Number(_)) => {
            warnings.push(format!("history file of timeline {own}, the backup's own, is not in the archive"));
            Ok(TimelineHistory::root(own))
        }
        Err(HistoryError::Missing(number)) => Err(PlanError::UnknownTimeline(number)),
        Err(damaged @ HistoryError::Damaged { .. }) => Err(PlanError::History(damaged)),
    }
}

fn warn_of_choice(
    catalog: &Catalog,
    backup: &Backup,
    target: &RecoveryTarget,
    passed_over: Option<&PlanError>,
    warnings: &mut Vec<String>,
) {
    if let Some(failures) = &backup.checksum_failures {
        warnings.push(format!(
            "backup `{}` has pages with wrong checksums, as the server said: {failures}",
            backup.name
        ));
    }
    if let Some(error @ PlanError::OtherBranch { .. }) = passed_over {
        warnings.push(format!("a newer backup was passed over: {error}"));
    }
    if let (RecoveryTarget::Lsn(_) | RecoveryTarget::Time(_) | RecoveryTarget::Immediate, false) =
        (target, backup.end_is_known)
    {
        warnings.push(format!(
            "PGHoard did not write down where backup `{}` ends; should PostgreSQL say that the target comes before the backup is consistent, choose an earlier one with `--backup`",
            backup.name
        ));
    }
    // Names of one kind sort by time.
    if let Some(damaged) = catalog.damaged.iter().rfind(|damaged| match (&damaged.name, &backup.name) {
        (BackupId::Own(damaged), BackupId::Own(name)) => damaged > name,
        (BackupId::Pghoard(damaged), BackupId::Pghoard(id)) => damaged > id,
        _ => true,
    }) {
        warnings.push(format!(
            "newer backup `{}` was passed over, because it cannot be used: {}",
            damaged.name, damaged.reason
        ));
    }
}

/// One backup and the way from it.
struct Way<'a> {
    catalog: &'a Catalog,
    known: &'a [Backup],
    coverage: &'a WalCoverage,
    backup: &'a Backup,
    path: RecoveryPath,
    target: &'a RecoveryTarget,
}

impl Way<'_> {
    /// Demands that recovery can read everything up to `to`.
    fn require(&self, to: Lsn) -> Result<(), PlanError> {
        self.path.check(self.coverage, self.backup.start_lsn, to).map_err(|missing| {
            let hole = self.hole(&missing, to);
            PlanError::WalMissing {
                backup: self.backup.name.clone(),
                target: self.target.clone(),
                missing,
                reaches: (hole > self.backup.stop_lsn).then_some(hole),
            }
        })
    }

    /// The plan for a backup with WAL of its own, when the archive has none of it.
    fn without_archive(
        &self,
        history: &TimelineHistory,
        target_timeline: TargetTimeline,
        warnings: &mut Vec<String>,
    ) -> Option<RestorePlan> {
        let enough = matches!(self.target, RecoveryTarget::Latest | RecoveryTarget::Immediate);
        if !self.backup.holds_wal || !enough || self.require(self.backup.needed_lsn).is_ok() {
            return None;
        }
        warnings.push(format!(
            "the archive has no WAL for backup `{}`: recovery ends with what the backup holds itself",
            self.backup.name
        ));
        Some(RestorePlan {
            backup: self.backup.clone(),
            target: self.target.clone(),
            target_timeline,
            timeline: history.timeline(),
            reach: Reach { timeline: self.backup.timeline, lsn: None, time: None },
            wal: Vec::new(),
            wal_segment_count: 0,
            warnings: std::mem::take(warnings),
        })
    }

    /// The first byte that is not there, at or before `to`.
    fn hole(&self, missing: &Missing, to: Lsn) -> Lsn {
        let first = missing.segments[0].first;
        let start = self.coverage.segment_size().start(first);
        self.coverage.stretch_at(first.timeline(), start).map_or(start, |stretch| stretch.end).min(to)
    }

    /// Up to where WAL is needed, and the point reached with it.
    fn destination(
        &self,
        history: &TimelineHistory,
        now: Timestamp,
        warnings: &mut Vec<String>,
    ) -> Result<(Lsn, Reach), PlanError> {
        let backup = self.backup;
        let (end_timeline, end) =
            self.path.end(self.coverage).unwrap_or((backup.stop_timeline, backup.stop_lsn));
        let end = end.max(backup.needed_lsn);
        let end_time = self.newest_wal();
        let found_by_replay = |time| Reach { timeline: self.path.timeline(), lsn: None, time };
        match self.target {
            RecoveryTarget::Latest => {
                Ok((end, Reach { timeline: end_timeline, lsn: Some(end), time: end_time }))
            }
            RecoveryTarget::Immediate if backup.end_is_known => Ok((
                backup.needed_lsn,
                Reach {
                    timeline: backup.stop_timeline,
                    lsn: Some(backup.stop_lsn),
                    time: Some(backup.stop_time),
                },
            )),
            // It may be anywhere.
            RecoveryTarget::Immediate => Ok((end, found_by_replay(None))),
            RecoveryTarget::Lsn(lsn) => {
                // PostgreSQL stops at the first record that begins at or after the target, so there must be
                // one (`recoveryStopsAfter`); without, it ends with an error.
                if *lsn >= end {
                    return Err(
                        self.outside(format!("the archive ends at `{end}` on timeline {end_timeline}"))
                    );
                }
                let reach = Reach { timeline: self.path.timeline_at(*lsn), lsn: Some(*lsn), time: None };
                Ok((lsn.advance(1), reach))
            }
            RecoveryTarget::Time(time) => {
                let reaches_until = end_time.map_or(now, |newest| newest + STORE_TIME_RESOLUTION);
                if *time > reaches_until {
                    return Err(self.outside(match end_time {
                        Some(newest) => format!("the archive reaches until about `{newest}`"),
                        None => format!("it is now `{now}`"),
                    }));
                }
                Ok((self.surely_after(history, *time, end), found_by_replay(Some(*time))))
            }
            RecoveryTarget::Name(_) | RecoveryTarget::Xid(_) => {
                warnings.push(format!(
                    "only replay can find {}: it must lie after the end of backup `{}` (`{}`); if it is older, choose an earlier backup",
                    self.target, backup.name, backup.stop_time
                ));
                let to = match self.path.check(self.coverage, backup.start_lsn, end) {
                    Ok(()) => end,
                    Err(missing) => {
                        let hole = self.hole(&missing, end);
                        warnings.push(format!(
                            "recovery can search up to `{hole}` only: WAL is missing after that: {missing}"
                        ));
                        hole
                    }
                };
                Ok((to, found_by_replay(None)))
            }
        }
    }

    fn outside(&self, reason: String) -> PlanError {
        PlanError::OutsideWindow {
            target: self.target.clone(),
            reason,
            window: WindowText(self.catalog.windows()),
        }
    }

    /// When the last WAL on the rest of this way was stored.
    fn newest_wal(&self) -> Option<Timestamp> {
        self.path
            .legs()
            .iter()
            .filter(|leg| leg.end.is_none_or(|end| end > self.backup.start_lsn))
            .filter_map(|leg| self.catalog.newest_wal(leg.timeline))
            .max()
    }

    /// A position at which `time` has surely passed: where the next backup on this way began, else the end.
    fn surely_after(&self, history: &TimelineHistory, time: Timestamp, end: Lsn) -> Lsn {
        self.known
            .iter()
            .filter(|later| later.start_time > time && later.start_lsn > self.backup.stop_lsn)
            .filter(|later| history.contains(later.timeline, later.start_lsn))
            .map(|later| later.start_lsn)
            .chain([end])
            .min()
            .unwrap_or(end)
    }
}

/// What `recovery_target_timeline = latest` may get wrong without a word.
fn warn_of_other_timelines(
    catalog: &Catalog,
    backup: &Backup,
    history: &TimelineHistory,
    warnings: &mut Vec<String>,
) {
    let (own, latest) = (backup.stop_timeline, history.timeline());
    if let Some((first, last)) = catalog.histories.holes().into_iter().find(|(first, _)| *first > latest) {
        let numbers = if first == last { first.to_string() } else { format!("{first} to {last}") };
        warnings.push(format!(
            "PostgreSQL takes timeline {latest} for the latest, because the history file of {numbers} is missing, although higher ones are there"
        ));
    }
    for stray in catalog.histories.strays_from(own, backup.stop_lsn) {
        warnings.push(format!(
            "timeline {stray} is in the archive and does not continue backup `{}`",
            backup.name
        ));
    }
    let newest = catalog.newest_wal(latest);
    let newer = catalog
        .wal_totals
        .iter()
        .filter(|(timeline, _)| {
            **timeline != latest && !history.ancestors().iter().any(|a| a.timeline == **timeline)
        })
        .filter(|(_, totals)| newest.is_none_or(|newest| totals.newest > newest))
        .max_by_key(|(_, totals)| totals.newest);
    if let Some((timeline, totals)) = newer {
        warnings.push(format!(
            "timeline {timeline} has newer WAL (stored `{}`) than timeline {latest}, which PostgreSQL takes for the latest",
            totals.newest
        ));
    }
}

impl fmt::Display for RestorePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backup = &self.backup;
        writeln!(
            f,
            "backup `{}`: timeline {}, `{}` to `{}`, ended `{}`",
            backup.name, backup.timeline, backup.start_lsn, backup.stop_lsn, backup.stop_time
        )?;
        writeln!(f, "target: {} on timeline {} ({})", self.target, self.timeline, self.target_timeline)?;
        writeln!(f, "WAL: {} segments: {}", self.wal_segment_count, crate::catalog::list_ranges(&self.wal))?;
        match (self.reach.lsn, self.reach.time) {
            (Some(lsn), Some(time)) => {
                writeln!(f, "reaches: `{lsn}` on timeline {}, about `{time}`", self.reach.timeline)?;
            }
            (Some(lsn), None) => writeln!(f, "reaches: `{lsn}` on timeline {}", self.reach.timeline)?,
            (None, Some(time)) => writeln!(f, "reaches: the last transaction that ended by `{time}`")?,
            (None, None) => writeln!(f, "reaches: {}, if replay finds it", self.target)?,
        }
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::example::{Archive, SIZE, at, time, tli};
    use crate::catalog::{BackupRecord, DamagedBackup};
    use crate::repository::BackupName;
    use proptest::prelude::*;

    const NOW: &str = "2026-11-21T12:00:00Z";

    /// Three backups, at 8, 9 and 10 o'clock, in segments 2, 5 and 8; WAL from segment 1 to the middle of 12.
    fn archive() -> Archive {
        Archive::new()
            .wal(1, 1, 11, "2026-11-21T11:59:00Z")
            .piece(1, 12, 777)
            .backup(1, 2, "2026-11-21T08:00:00Z")
            .backup(1, 5, "2026-11-21T09:00:00Z")
            .backup(1, 8, "2026-11-21T10:00:00Z")
    }

    fn run(archive: Archive, target: &RecoveryTarget) -> Result<RestorePlan, PlanError> {
        run_on(archive, "latest", target, TargetTimeline::Latest)
    }

    fn run_on(
        archive: Archive,
        backup: &str,
        target: &RecoveryTarget,
        timeline: TargetTimeline,
    ) -> Result<RestorePlan, PlanError> {
        plan(&archive.catalog(), &backup.parse().unwrap(), target, timeline, time(NOW))
    }

    fn to_time(text: &str) -> RecoveryTarget {
        RecoveryTarget::Time(time(text))
    }

    fn name(plan: &RestorePlan) -> String {
        plan.backup.name.to_string()
    }

    #[test]
    fn the_latest_point_comes_from_the_newest_backup_and_the_tail() {
        let plan = run(archive(), &RecoveryTarget::Latest).unwrap();
        insta::assert_snapshot!(plan, @r"
        backup `20261121T100000Z`: timeline 1, `0/8000028` to `0/8001000`, ended `2026-11-21T10:01:00Z`
        target: end of the archive on timeline 1 (latest)
        WAL: 5 segments: `000000010000000000000008` to `00000001000000000000000C`
        reaches: `0/C000309` on timeline 1, about `2026-11-21T11:59:00Z`
        ");
    }

    #[test]
    fn the_newest_backup_that_ended_before_the_target_is_taken() {
        let plan = run(archive(), &RecoveryTarget::Lsn(at(7, 5))).unwrap();
        assert_eq!((name(&plan), plan.reach.lsn), ("20261121T090000Z".to_owned(), Some(at(7, 5))));
        assert_eq!(plan.wal_segment_count, 3);
        // Ends inside the second backup: the first one serves.
        let plan = run(archive(), &RecoveryTarget::Lsn(at(5, 0x500))).unwrap();
        assert_eq!(name(&plan), "20261121T080000Z");
        let plan = run(archive(), &RecoveryTarget::Lsn(at(5, 0x1000))).unwrap();
        assert_eq!(name(&plan), "20261121T090000Z");
        for (target, expected) in [
            ("2026-11-21T09:01:00Z", "20261121T080000Z"),
            ("2026-11-21T09:01:00.000001Z", "20261121T090000Z"),
            ("2026-11-21T11:59:00.5Z", "20261121T100000Z"),
        ] {
            assert_eq!(name(&run(archive(), &to_time(target)).unwrap()), expected);
        }
    }

    #[test]
    fn immediate_needs_the_wal_of_the_backup_only() {
        let archive = Archive::new().wal(1, 8, 8, "2026-11-21T10:02:00Z").wal(1, 10, 11, NOW).backup(
            1,
            8,
            "2026-11-21T10:00:00Z",
        );
        let plan = run(archive, &RecoveryTarget::Immediate).unwrap();
        assert_eq!((plan.wal_segment_count, plan.reach.lsn), (1, Some(at(8, 0x1000))));
    }

    #[test]
    fn a_target_before_the_first_backup_is_outside_the_window() {
        for target in [RecoveryTarget::Lsn(at(1, 0)), to_time("2026-11-21T08:01:00Z")] {
            let error = run(archive(), &target).unwrap_err();
            assert_eq!(error.exit_code(), 5);
            assert!(
                error.to_string().contains("timeline 1 can be restored from `2026-11-21T08:01:00Z`"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_target_after_the_archive_is_outside_the_window() {
        // At the very end PostgreSQL would miss the record that tells it to stop.
        for target in [
            RecoveryTarget::Lsn(at(12, 777)),
            RecoveryTarget::Lsn(at(40, 0)),
            to_time("2026-11-21T11:59:02Z"),
        ] {
            let error = run(archive(), &target).unwrap_err();
            assert_eq!(error.exit_code(), 5, "{error}");
        }
        assert!(run(archive(), &RecoveryTarget::Lsn(at(12, 776))).is_ok());
        let error = run(archive(), &to_time("2026-11-21T11:59:02Z")).unwrap_err();
        insta::assert_snapshot!(error, @"time `2026-11-21 11:59:02.000000+00` is outside what can be restored: the archive reaches until about `2026-11-21T11:59:00Z`; timeline 1 can be restored from `2026-11-21T08:01:00Z` (`0/2001000`) to `0/C000309` (about `2026-11-21T11:59:00Z`)");
    }

    /// Segments 1 to 6 and 9 to 11, so 7 and 8 are lost; backups in 2 and 10.
    fn broken() -> Archive {
        Archive::new()
            .wal(1, 1, 6, "2026-11-21T09:00:00Z")
            .wal(1, 9, 11, "2026-11-21T11:59:00Z")
            .backup(1, 2, "2026-11-21T08:00:00Z")
            .backup(1, 10, "2026-11-21T10:00:00Z")
    }

    #[test]
    fn missing_segments_are_named_before_anything_is_written() {
        assert_eq!(name(&run(broken(), &RecoveryTarget::Latest).unwrap()), "20261121T100000Z");
        assert!(run(broken(), &RecoveryTarget::Lsn(at(6, 0xFF_FFFF))).is_ok());
        for target in
            [RecoveryTarget::Lsn(at(7, 0)), RecoveryTarget::Lsn(at(9, 1)), to_time("2026-11-21T09:30:00Z")]
        {
            let error = run(broken(), &target).unwrap_err();
            assert_eq!(error.exit_code(), 8);
            assert!(error.to_string().contains("`000000010000000000000007`"), "{error}");
            assert!(error.hint().unwrap().contains("`0/7000000`"));
        }
        let latest = RecoveryTarget::Latest;
        let error = run_on(broken(), "20261121T080000Z", &latest, TargetTimeline::Latest).unwrap_err();
        insta::assert_snapshot!(error, @"WAL needed to restore backup `20261121T080000Z` to end of the archive is missing: `000000010000000000000007` to `000000010000000000000008`");
    }

    #[test]
    fn a_backup_without_its_own_wal_is_refused() {
        let archive = Archive::new().wal(1, 9, 11, NOW).backup(1, 8, "2026-11-21T10:00:00Z");
        let error = run(archive, &RecoveryTarget::Immediate).unwrap_err();
        assert!(matches!(error, PlanError::WalMissing { reaches: None, .. }));
        let archive =
            Archive::new().backup(1, 8, "2026-11-21T10:00:00Z").change(|catalog| catalog.coverage = None);
        assert_eq!(run(archive, &RecoveryTarget::Latest).unwrap_err().exit_code(), 8);
    }

    #[test]
    fn a_name_or_transaction_is_searched_as_far_as_the_wal_is_whole() {
        for target in [RecoveryTarget::Name("before".to_owned()), RecoveryTarget::Xid(777)] {
            let plan = run(archive(), &target).unwrap();
            assert_eq!((plan.reach.lsn, plan.wal_segment_count, plan.warnings.len()), (None, 5, 1));
            let plan = run_on(broken(), "20261121T080000Z", &target, TargetTimeline::Latest).unwrap();
            assert_eq!(plan.wal_segment_count, 5);
            assert!(plan.warnings[1].contains("`0/7000000`"));
        }
    }

    #[test]
    fn backups_that_are_not_there_are_told_from_damaged_ones() {
        let latest = RecoveryTarget::Latest;
        assert!(matches!(run(Archive::new(), &latest), Err(PlanError::NoBackup)));
        let damaged = |catalog: &mut Catalog| {
            catalog.damaged.push(DamagedBackup {
                name: "20261121T110000Z".parse::<BackupName>().unwrap().into(),
                reason: "truncated".to_owned(),
            });
        };
        let on = |archive, backup| run_on(archive, backup, &latest, TargetTimeline::Latest);
        assert_eq!(on(archive(), "20261121T080001Z").unwrap_err().exit_code(), 3);
        assert_eq!(on(archive().change(damaged), "20261121T110000Z").unwrap_err().exit_code(), 7);
        assert_eq!(on(Archive::new().change(damaged), "latest").unwrap_err().exit_code(), 7);
        let plan = on(archive().change(damaged), "latest").unwrap();
        assert!(plan.warnings[0].contains("`20261121T110000Z` was passed over"));
    }

    #[test]
    fn a_suspect_backup_is_the_last_choice() {
        let suspect = |record: &mut BackupRecord| record.checksum_failures = Some("2 pages".to_owned());
        let both = || archive().backup_with(1, 11, "2026-11-21T11:00:00Z", suspect);
        let plan = run(both(), &RecoveryTarget::Latest).unwrap();
        assert_eq!((name(&plan), plan.warnings.len()), ("20261121T100000Z".to_owned(), 0));
        let plan =
            run_on(both(), "20261121T110000Z", &RecoveryTarget::Latest, TargetTimeline::Latest).unwrap();
        assert!(plan.warnings[0].contains("2 pages"));
        let alone = Archive::new().wal(1, 1, 9, NOW).backup_with(1, 2, "2026-11-21T08:00:00Z", suspect);
        assert_eq!(run(alone, &RecoveryTarget::Latest).unwrap().warnings.len(), 1);
    }

    /// Timeline 1 to segment 9, left in segment 6 for timeline 2; a backup before and one on each after.
    fn forked() -> Archive {
        Archive::new()
            .wal(1, 1, 9, "2026-11-21T09:30:00Z")
            .wal(2, 6, 11, "2026-11-21T11:59:00Z")
            .history(2, "1\t0/6000100\tx")
            .backup(1, 2, "2026-11-21T08:00:00Z")
            .backup(1, 8, "2026-11-21T09:00:00Z")
    }

    #[test]
    fn the_way_follows_the_latest_timeline_from_a_backup_that_it_continues() {
        let plan = run(forked(), &RecoveryTarget::Latest).unwrap();
        assert_eq!((name(&plan), plan.timeline), ("20261121T080000Z".to_owned(), tli(2)));
        insta::assert_snapshot!(plan, @r"
        backup `20261121T080000Z`: timeline 1, `0/2000028` to `0/2001000`, ended `2026-11-21T08:01:00Z`
        target: end of the archive on timeline 2 (latest)
        WAL: 10 segments: `000000010000000000000002` to `000000010000000000000005`, `000000020000000000000006` to `00000002000000000000000B`
        reaches: `0/C000000` on timeline 2, about `2026-11-21T11:59:00Z`
        warning: a newer backup was passed over: timeline 2 does not continue backup `20261121T090000Z`, which ends on timeline 1 at `0/8001000`
        ");
    }

    #[test]
    fn the_old_branch_is_reached_by_its_number_or_as_current() {
        for timeline in [TargetTimeline::Current, TargetTimeline::Number(tli(1))] {
            let plan = run_on(forked(), "latest", &RecoveryTarget::Latest, timeline).unwrap();
            assert_eq!((name(&plan), plan.reach.lsn), ("20261121T090000Z".to_owned(), Some(at(10, 0))));
        }
        let latest = RecoveryTarget::Latest;
        let error = run_on(forked(), "20261121T090000Z", &latest, TargetTimeline::Latest).unwrap_err();
        assert!(matches!(error, PlanError::OtherBranch { .. }));
        assert_eq!(error.exit_code(), 5);
        let error = run_on(forked(), "latest", &latest, TargetTimeline::Number(tli(3))).unwrap_err();
        assert!(matches!(error, PlanError::UnknownTimeline(_)));
    }

    #[test]
    fn a_target_before_the_fork_still_reads_the_newer_timelines_segment() {
        let plan = run(forked(), &RecoveryTarget::Lsn(at(6, 0x50))).unwrap();
        assert_eq!(plan.reach, Reach { timeline: tli(1), lsn: Some(at(6, 0x50)), time: None });
        assert_eq!(plan.wal.last().unwrap().first, SIZE.segment_at(tli(2), at(6, 0)));
    }

    #[test]
    fn holes_strays_and_newer_branches_are_told() {
        let archive = forked().history(4, "1\t0/6000100\tx").history(5, "1\t0/1000100\tx").wal(4, 6, 20, NOW);
        let plan =
            run_on(archive, "20261121T080000Z", &RecoveryTarget::Latest, TargetTimeline::Latest).unwrap();
        assert_eq!(plan.timeline, tli(2));
        insta::assert_snapshot!(plan.warnings.join("\n"), @r"
        PostgreSQL takes timeline 2 for the latest, because the history file of 3 is missing, although higher ones are there
        timeline 5 is in the archive and does not continue backup `20261121T080000Z`
        timeline 4 has newer WAL (stored `2026-11-21T12:00:00Z`) than timeline 2, which PostgreSQL takes for the latest
        ");
    }

    #[test]
    fn a_damaged_history_on_the_way_is_refused() {
        let error = run(archive().history(2, "nonsense"), &RecoveryTarget::Latest).unwrap_err();
        assert_eq!(error.exit_code(), 7);
    }

    #[test]
    fn the_backups_own_timeline_needs_no_history_file() {
        let archive = || Archive::new().wal(3, 1, 9, NOW).backup(3, 2, "2026-11-21T08:00:00Z");
        assert_eq!(run(archive(), &RecoveryTarget::Latest).unwrap().warnings.len(), 1);
        let asked = TargetTimeline::Number(tli(3));
        assert!(run_on(archive(), "latest", &RecoveryTarget::Latest, asked).is_err());
    }

    proptest! {
        /// Whatever is planned can be read: every segment named is there, from the backup's start on and
        /// without a hole, and the target lies in it.
        #[test]
        fn a_plan_never_names_wal_that_is_not_there(
            segments in prop::collection::btree_set(1_u64..24, 0..24),
            tail in prop::option::of((1_u64..25, 1_u32..1000)),
            backups in prop::collection::btree_set(1_u64..20, 0..4),
            target in 0_u64..25, offset in 0_u64..0x2000, kind in 0..3,
        ) {
            let mut archive = Archive::new();
            for number in &segments {
                archive = archive.wal(1, *number, *number, "2026-11-21T11:00:00Z");
            }
            if let Some((number, end)) = tail {
                archive = archive.piece(1, number, end);
            }
            for number in &backups {
                archive = archive.backup(1, *number, &format!("2026-11-21T{number:02}:00:00Z"));
            }
            let target = match kind {
                0 => RecoveryTarget::Latest,
                1 => RecoveryTarget::Immediate,
                _ => RecoveryTarget::Lsn(at(target, offset)),
            };
            let Ok(plan) = run(archive, &target) else { return Ok(()) };
            let reached = plan.reach.lsn.unwrap();
            prop_assert!(plan.backup.stop_lsn <= reached);
            if let RecoveryTarget::Lsn(lsn) = target {
                prop_assert_eq!(reached, lsn);
            }
            let start = SIZE.floor(plan.backup.start_lsn).get() / SIZE.bytes();
            for number in start..=SIZE.floor(reached).get() / SIZE.bytes() {
                let begins = at(number, 0);
                let whole = segments.contains(&number);
                let part = tail.is_some_and(|(tail, end)| tail == number && reached <= begins.advance(end.into()));
                prop_assert!(whole || part || reached == begins, "segment {}", number);
            }
        }
    }
}
