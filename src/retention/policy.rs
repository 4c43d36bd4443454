//! What to keep, and why.
//!
//! Pure. The policy has PGHoard's keys and their meaning: the oldest backups go while there are more than
//! `basebackup_count`, then those past `basebackup_age_days_max` while more than `basebackup_count_min` are
//! left. On top of that the last backup always stays, and so does the last one without checksum failures.
//!
//! WAL follows from the backups: a segment goes only when no kept backup can ever ask for it. When it is
//! not certain what a backup needs, nothing goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::catalog::{BackupRecord, Catalog, Histories, SegmentRange, UnfinishedBackup, WalCoverage};
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};
use crate::repository::{BackupName, PackId};

/// How long an unfinished backup must have stored nothing before it counts as interrupted. A backup that
/// runs stores a pack of 64 MiB at least every 35 minutes even at 32 kB/s, PostgreSQL's lowest `MAX_RATE`.
pub const UNFINISHED_AGE: SignedDuration = SignedDuration::from_hours(1);

/// How many backups to keep, and for how long.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RetentionPolicy {
    /// `basebackup_count`: keep at most so many.
    pub count: Option<u32>,
    /// `basebackup_count_min`: keep so many whatever their age. With 0, age is not looked at, as in PGHoard.
    pub count_min: u32,
    /// `basebackup_age_days_max`: keep none that is older, counted from when the next one was due.
    pub age_days_max: Option<f64>,
    /// `basebackup_interval_hours`: the time from one backup to the next.
    pub interval: Duration,
}

/// Everything pruning will do, decided before it does anything.
#[derive(Clone, Debug, PartialEq)]
pub struct RetentionPlan {
    /// Oldest first.
    pub backups: Vec<BackupDecision>,
    /// Backups without a record, oldest first.
    pub unfinished: Vec<SweepDecision>,
    pub wal: WalPlan,
    /// What the operator should know: why less is pruned than the policy asks for.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupDecision {
    pub backup: BackupName,
    pub verdict: Verdict,
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Keep,
    Drop,
}

/// Whether the objects of a backup without a record go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SweepDecision {
    pub backup: BackupName,
    pub verdict: Verdict,
    pub reason: String,
}

/// Which WAL goes. History files always stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalPlan {
    segment_size: Option<SegmentSize>,
    /// The segment in which recovery of the oldest kept backup begins.
    pub first_needed: Option<SegmentName>,
    /// Why no WAL goes at all, when none does.
    pub nothing_goes: Option<String>,
    /// What goes of each timeline; of timelines not listed nothing does.
    pub cuts: BTreeMap<TimelineId, WalCut>,
}

/// What goes of one timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalCut {
    pub extent: CutExtent,
    /// Segments that go, whole or in part from their start.
    pub segment_count: u64,
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutExtent {
    Nothing,
    /// Everything before this segment.
    Before(SegmentName),
    Whole,
}

impl WalPlan {
    /// Whether `segment`, its pieces and its companions (`.partial`, `.backup`) go.
    pub fn drops(&self, segment: SegmentName) -> bool {
        let (Some(size), Some(cut)) = (self.segment_size, self.cuts.get(&segment.timeline())) else {
            return false;
        };
        match cut.extent {
            CutExtent::Nothing => false,
            // Names of a timeline ascend with position as long as the segment size admits them.
            CutExtent::Before(first) => size.admits(segment) && segment < first,
            CutExtent::Whole => size.admits(segment),
        }
    }

    pub fn segment_count(&self) -> u64 {
        self.cuts.values().map(|cut| cut.segment_count).sum()
    }
}

impl RetentionPlan {
    /// Backups that go, oldest first.
    pub fn dropped(&self) -> impl Iterator<Item = BackupName> {
        self.backups.iter().filter(|backup| backup.verdict == Verdict::Drop).map(|backup| backup.backup)
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.dropped().next().is_none()
            && self.unfinished.iter().all(|sweep| sweep.verdict == Verdict::Keep)
            && self.wal.segment_count() == 0
    }
}

/// Decides what `policy` keeps of `catalog` at the time `now`.
pub fn plan(catalog: &Catalog, policy: &RetentionPolicy, now: Timestamp) -> RetentionPlan {
    if let Some(damaged) = catalog.damaged.first() {
        return keep_everything(catalog, damaged.name, &damaged.reason);
    }
    let backups = decide_backups(&catalog.backups, policy, now);
    let kept: Vec<&BackupRecord> = catalog
        .backups
        .iter()
        .filter(|record| {
            backups.iter().any(|backup| backup.backup == record.name && backup.verdict == Verdict::Keep)
        })
        .collect();
    let mut notes = Vec::new();
    if let Some(running) = PackRule::running(&catalog.unfinished, now) {
        notes.push(format!(
            "backup `{running}` may be running and point into packs of earlier ones: no pack goes until it ends"
        ));
    }
    let unfinished = catalog.unfinished.iter().map(|backup| decide_sweep(backup, now)).collect();
    RetentionPlan { backups, unfinished, wal: plan_wal(catalog, &kept), notes }
}

/// An unreadable record says neither where its backup begins nor which packs it uses.
fn keep_everything(catalog: &Catalog, damaged: BackupName, reason: &str) -> RetentionPlan {
    let why = format!("what the unreadable backup `{damaged}` needs is not known");
    RetentionPlan {
        backups: catalog
            .backups
            .iter()
            .map(|record| BackupDecision {
                backup: record.name,
                verdict: Verdict::Keep,
                reason: why.clone(),
            })
            .collect(),
        unfinished: catalog
            .unfinished
            .iter()
            .map(|backup| SweepDecision { backup: backup.name, verdict: Verdict::Keep, reason: why.clone() })
            .collect(),
        wal: WalPlan { nothing_goes: Some(why), ..WalPlan::default() },
        notes: vec![format!(
            "record of backup `{damaged}` cannot be read ({reason}): nothing is pruned as long as it is there"
        )],
    }
}

fn decide_backups(records: &[BackupRecord], policy: &RetentionPolicy, now: Timestamp) -> Vec<BackupDecision> {
    let mut sorted: Vec<&BackupRecord> = records.iter().collect();
    sorted.sort_by_key(|record| (record.start_time, record.name));
    let age_limit = policy.age_days_max.filter(|days| *days > 0.0 && policy.count_min > 0);
    let count_min = (policy.count_min as usize).max(1);

    // How many of the oldest go, and from which on it is by age.
    let by_count = policy.count.map_or(0, |count| sorted.len().saturating_sub((count as usize).max(1)));
    let by_age = age_limit.map_or(0, |limit| {
        sorted
            .iter()
            .enumerate()
            .skip(by_count)
            .take_while(|(index, record)| {
                sorted.len() - index > count_min && age_days(record, policy, now) > limit
            })
            .count()
    });
    let gone = by_count + by_age;
    let rescued = if sorted[gone..].iter().any(|record| !record.is_suspect()) {
        None
    } else {
        sorted[..gone].iter().rposition(|record| !record.is_suspect())
    };

    sorted
        .iter()
        .enumerate()
        .map(|(index, record)| {
            let (verdict, reason) = if Some(index) == rescued {
                (Verdict::Keep, "the last one without checksum failures".to_owned())
            } else if index < by_count {
                let count = policy.count.unwrap_or_default().max(1);
                (Verdict::Drop, format!("{} newer ones are kept (`basebackup_count`)", count))
            } else if index < gone {
                let (age, limit) = (age_days(record, policy, now), age_limit.unwrap_or_default());
                (
                    Verdict::Drop,
                    format!("{age:.1} days past its time, more than {limit} (`basebackup_age_days_max`)"),
                )
            } else {
                (Verdict::Keep, keep_reason(record, sorted.len() - index, policy, age_limit, now))
            };
            BackupDecision { backup: record.name, verdict, reason }
        })
        .collect()
}

/// Why the backup that is number `rank` from the newest (1) stays.
fn keep_reason(
    record: &BackupRecord,
    rank: usize,
    policy: &RetentionPolicy,
    age_limit: Option<f64>,
    now: Timestamp,
) -> String {
    let age = age_days(record, policy, now);
    match (age_limit, policy.count) {
        _ if rank == 1 => "the newest one".to_owned(),
        (Some(limit), _) if age > limit && rank <= policy.count_min as usize => {
            format!("one of the newest {} (`basebackup_count_min`)", policy.count_min)
        }
        (_, Some(count)) => format!("one of the newest {count} (`basebackup_count`)"),
        (Some(limit), None) => {
            format!(
                "{:.1} days past its time, not more than {limit} (`basebackup_age_days_max`)",
                age.max(0.0)
            )
        }
        (None, None) => "no limit is set".to_owned(),
    }
}

/// Days since the backup after this one was due, which is when nobody needed this one any more.
fn age_days(record: &BackupRecord, policy: &RetentionPolicy, now: Timestamp) -> f64 {
    now.duration_since(record.start_time).as_secs_f64() / 86_400.0 - policy.interval.as_secs_f64() / 86_400.0
}

fn decide_sweep(backup: &UnfinishedBackup, now: Timestamp) -> SweepDecision {
    let idle = now.duration_since(backup.newest_object);
    let (verdict, reason) = match (idle >= UNFINISHED_AGE, backup.started) {
        (false, true) => (Verdict::Keep, "may still be running".to_owned()),
        (false, false) => (Verdict::Keep, "its objects are younger than an hour".to_owned()),
        (true, true) => {
            (Verdict::Drop, format!("interrupted: nothing stored since `{}`", backup.newest_object))
        }
        (true, false) => (Verdict::Drop, "left by a pruned backup, where no kept one uses it".to_owned()),
    };
    SweepDecision { backup: backup.name, verdict, reason }
}

/// Which packs must stay. Made from the records as they are *after* the dropped ones are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackRule {
    used: BTreeSet<PackId>,
    all_stay: bool,
}

impl PackRule {
    pub fn new(catalog: &Catalog, now: Timestamp) -> Self {
        let uses = catalog.backups.iter().flat_map(|record| &record.packs);
        Self {
            used: uses.map(|pack| PackId { backup: pack.backup, number: pack.number }).collect(),
            all_stay: !catalog.damaged.is_empty() || Self::running(&catalog.unfinished, now).is_some(),
        }
    }

    pub fn may_go(&self, pack: PackId) -> bool {
        !self.all_stay && !self.used.contains(&pack)
    }

    /// A backup that may be running: its record, once there, may name packs of any earlier backup.
    fn running(unfinished: &[UnfinishedBackup], now: Timestamp) -> Option<BackupName> {
        unfinished
            .iter()
            .find(|backup| backup.started && now.duration_since(backup.newest_object) < UNFINISHED_AGE)
            .map(|backup| backup.name)
    }
}

fn plan_wal(catalog: &Catalog, kept: &[&BackupRecord]) -> WalPlan {
    let Some(coverage) = &catalog.coverage else { return WalPlan::default() };
    let size = coverage.segment_size();
    let oldest = kept.iter().min_by_key(|record| record.start_lsn);
    let since = kept.iter().map(|record| record.start_time).min();
    let (Some(oldest), Some(since)) = (oldest, since) else {
        let why = "there is no backup, and the first one to come may need any of it".to_owned();
        return WalPlan { nothing_goes: Some(why), ..WalPlan::default() };
    };
    let cuts = coverage
        .timelines()
        .map(|timeline| {
            let written_since = catalog.newest_wal(timeline).is_none_or(|newest| newest >= since);
            let (extent, reason) = cut(catalog, kept, timeline, oldest, written_since, size);
            let segment_count = match extent {
                CutExtent::Nothing => 0,
                CutExtent::Before(first) => coverage.segment_count_below(timeline, size.start(first)),
                CutExtent::Whole => coverage.segment_count_below(timeline, Lsn::new(u64::MAX)),
            };
            (timeline, WalCut { extent, segment_count, reason })
        })
        .collect();
    WalPlan {
        segment_size: Some(size),
        first_needed: Some(size.segment_at(oldest.timeline, oldest.start_lsn)),
        nothing_goes: None,
        cuts,
    }
}

fn cut(
    catalog: &Catalog,
    kept: &[&BackupRecord],
    timeline: TimelineId,
    oldest: &BackupRecord,
    written_since: bool,
    size: SegmentSize,
) -> (CutExtent, String) {
    let before = |record: &BackupRecord| CutExtent::Before(size.segment_at(timeline, record.start_lsn));
    let reaching = kept.iter().filter(|record| reaches(&catalog.histories, record, timeline));
    if let Some(first) = reaching.min_by_key(|record| record.start_lsn) {
        return (before(first), format!("backup `{}` begins there", first.name));
    }
    if written_since {
        let why = "no kept backup leads to this timeline, but it was written to since the oldest one began";
        return (CutExtent::Nothing, why.to_owned());
    }
    match catalog.histories.history(timeline) {
        Ok(_) => (CutExtent::Whole, "no kept backup leads to this timeline".to_owned()),
        Err(error) => (before(oldest), format!("{error}; no kept backup begins earlier than `{}`", oldest.name)),
    }
}

/// Whether recovery of the backup can ever read WAL of `timeline`: on the way to it, or through it to
/// another one.
fn reaches(histories: &Histories, record: &BackupRecord, timeline: TimelineId) -> bool {
    let passes = |history: &TimelineHistory| {
        history.contains(record.timeline, record.start_lsn)
            && (history.timeline() == timeline
                || history
                    .ancestors()
                    .iter()
                    .any(|ancestor| ancestor.timeline == timeline && record.start_lsn < ancestor.end))
    };
    record.timeline == timeline
        || record.stop_timeline == timeline
        || histories.timelines().chain([timeline]).any(|other| histories.history(other).as_ref().is_ok_and(passes))
}

impl fmt::Display for RetentionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for backup in &self.backups {
            writeln!(f, "{} backup `{}`: {}", backup.verdict, backup.backup, backup.reason)?;
        }
        for sweep in &self.unfinished {
            writeln!(f, "{} unfinished backup `{}`: {}", sweep.verdict, sweep.backup, sweep.reason)?;
        }
        if let Some(why) = &self.wal.nothing_goes {
            writeln!(f, "keep all WAL: {why}")?;
        }
        for (timeline, cut) in &self.wal.cuts {
            let count = cut.segment_count;
            let segments = if count == 1 { "segment" } else { "segments" };
            match cut.extent {
                CutExtent::Nothing => writeln!(f, "keep WAL of timeline {timeline}: {}", cut.reason)?,
                CutExtent::Before(first) => writeln!(
                    f,
                    "drop WAL of timeline {timeline} before `{first}` ({count} {segments}): {}",
                    cut.reason
                )?,
                CutExtent::Whole => {
                    writeln!(f, "drop WAL of timeline {timeline} ({count} {segments}): {}", cut.reason)?;
                }
            }
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
        })
    }
}
