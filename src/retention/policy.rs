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

use crate::catalog::{Backup, BackupId, BackupRecord, Catalog, FileDigest, Histories, UnfinishedBackup};
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
    /// Files of PGHoard's delta backups that go, with the former site that holds them.
    pub delta_files: Vec<(Option<usize>, FileDigest)>,
    /// What the operator should know: why less is pruned than the policy asks for.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupDecision {
    pub backup: BackupId,
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
    pub fn dropped(&self) -> impl Iterator<Item = &BackupId> {
        self.backups.iter().filter(|backup| backup.verdict == Verdict::Drop).map(|backup| &backup.backup)
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
        return keep_everything(catalog, &damaged.name, &damaged.reason);
    }
    let known = catalog.known();
    let backups = decide_backups(&known, policy, now);
    let stays = |name: &BackupId| {
        backups.iter().any(|backup| backup.backup == *name && backup.verdict == Verdict::Keep)
    };
    let kept: Vec<&Backup> = known.iter().filter(|backup| stays(&backup.name)).collect();
    let mut notes = Vec::new();
    if let Some(running) = PackRule::running(&catalog.unfinished, now) {
        notes.push(format!(
            "backup `{running}` may be running and point into packs of earlier ones: no pack goes until it ends"
        ));
    }
    let used: BTreeSet<PackId> =
        catalog.backups.iter().filter(|record| stays(&record.name.into())).flat_map(packs_of).collect();
    let unfinished = catalog.unfinished.iter().map(|backup| decide_sweep(backup, &used, now)).collect();
    RetentionPlan { backups, unfinished, wal: plan_wal(catalog, &kept), delta_files: Vec::new(), notes }
}

/// An unreadable record says neither where its backup begins nor which packs it uses.
fn keep_everything(catalog: &Catalog, damaged: &BackupId, reason: &str) -> RetentionPlan {
    let why = format!("what the unreadable backup `{damaged}` needs is not known");
    RetentionPlan {
        backups: catalog
            .known()
            .into_iter()
            .map(|known| BackupDecision { backup: known.name, verdict: Verdict::Keep, reason: why.clone() })
            .collect(),
        unfinished: catalog
            .unfinished
            .iter()
            .map(|backup| SweepDecision { backup: backup.name, verdict: Verdict::Keep, reason: why.clone() })
            .collect(),
        wal: WalPlan { nothing_goes: Some(why), ..WalPlan::default() },
        delta_files: Vec::new(),
        notes: vec![format!(
            "record of backup `{damaged}` cannot be read ({reason}): nothing is pruned as long as it is there"
        )],
    }
}

/// `sorted` is oldest first.
fn decide_backups(sorted: &[Backup], policy: &RetentionPolicy, now: Timestamp) -> Vec<BackupDecision> {
    let age_limit = policy.age_days_max.filter(|days| *days > 0.0 && policy.count_min > 0);
    let count_min = (policy.count_min as usize).max(1);

    // How many of the oldest go, and from which on it is by age.
    let surplus = policy.count.map_or(0, |count| sorted.len().saturating_sub((count as usize).max(1)));
    // One that is to be preserved keeps all that are newer, as in PGHoard.
    let preserved = |backup: &Backup| backup.preserved_until.is_some_and(|until| until > now);
    let by_count = sorted.iter().take(surplus).position(preserved).unwrap_or(surplus);
    let by_age = age_limit.map_or(0, |limit| {
        sorted
            .iter()
            .enumerate()
            .skip(by_count)
            .take_while(|(index, record)| {
                sorted.len() - index > count_min
                    && age_days(record, policy, now) > limit
                    && !preserved(record)
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
            let (verdict, reason) = if let Some(why) = &record.held {
                (Verdict::Keep, why.clone())
            } else if Some(index) == rescued {
                (Verdict::Keep, "the last one without checksum failures".to_owned())
            } else if index < by_count {
                let count = policy.count.unwrap_or_default().max(1);
                (Verdict::Drop, format!("{count} newer ones are kept (`basebackup_count`)"))
            } else if index < gone {
                let (age, limit) = (age_days(record, policy, now), age_limit.unwrap_or_default());
                (
                    Verdict::Drop,
                    format!("{age:.1} days past its time, more than {limit} (`basebackup_age_days_max`)"),
                )
            } else {
                (Verdict::Keep, keep_reason(record, sorted.len() - index, policy, age_limit, now))
            };
            BackupDecision { backup: record.name.clone(), verdict, reason }
        })
        .collect()
}

/// Why the backup that is number `rank` from the newest (1) stays.
fn keep_reason(
    record: &Backup,
    rank: usize,
    policy: &RetentionPolicy,
    age_limit: Option<f64>,
    now: Timestamp,
) -> String {
    let age = age_days(record, policy, now);
    match (age_limit, policy.count) {
        _ if record.preserved_until.is_some_and(|until| until > now) => {
            format!("to be preserved until `{}`", record.preserved_until.unwrap_or_default())
        }
        _ if rank == 1 => "the newest one".to_owned(),
        (Some(limit), _) if age > limit && rank <= policy.count_min as usize => {
            format!("one of the newest {} (`basebackup_count_min`)", policy.count_min)
        }
        (_, Some(count)) if rank > count as usize => {
            "an older one is to be preserved, and this one is newer".to_owned()
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
fn age_days(record: &Backup, policy: &RetentionPolicy, now: Timestamp) -> f64 {
    now.duration_since(record.start_time).as_secs_f64() / 86_400.0 - policy.interval.as_secs_f64() / 86_400.0
}

fn decide_sweep(backup: &UnfinishedBackup, used: &BTreeSet<PackId>, now: Timestamp) -> SweepDecision {
    let packs = PackId { backup: backup.name, number: 0 }..=PackId { backup: backup.name, number: u32::MAX };
    let idle = is_idle(backup, now);
    let (verdict, reason) = match (idle, backup.started) {
        (true, false) if used.range(packs).count() as u64 == backup.object_count => {
            (Verdict::Keep, "kept backups use all that is left of it".to_owned())
        }
        (false, true) => (Verdict::Keep, "may still be running".to_owned()),
        (false, false) => (Verdict::Keep, "its objects are younger than an hour".to_owned()),
        (true, true) => {
            (Verdict::Drop, format!("interrupted: nothing stored since `{}`", backup.newest_object))
        }
        (true, false) => (Verdict::Drop, "left by a pruned backup, where no kept one uses it".to_owned()),
    };
    SweepDecision { backup: backup.name, verdict, reason }
}

/// Whether nothing was stored for this backup for so long that it must have been interrupted.
fn is_idle(backup: &UnfinishedBackup, now: Timestamp) -> bool {
    now.duration_since(backup.newest_object) >= UNFINISHED_AGE
}

/// The backups without a record that may be swept.
pub(super) fn interrupted(catalog: Catalog, now: Timestamp) -> Vec<UnfinishedBackup> {
    if !catalog.damaged.is_empty() {
        return Vec::new();
    }
    catalog.unfinished.into_iter().filter(|backup| is_idle(backup, now)).collect()
}

fn packs_of(record: &BackupRecord) -> impl Iterator<Item = PackId> {
    record.packs.iter().map(|pack| PackId { backup: pack.backup, number: pack.number })
}

/// Which packs must stay. Made from the records as they are *after* the dropped ones are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackRule {
    used: BTreeSet<PackId>,
    all_stay: bool,
}

impl PackRule {
    pub fn new(catalog: &Catalog, now: Timestamp) -> Self {
        Self {
            used: catalog.backups.iter().flat_map(packs_of).collect(),
            all_stay: !catalog.damaged.is_empty() || Self::running(&catalog.unfinished, now).is_some(),
        }
    }

    pub fn may_go(&self, pack: PackId) -> bool {
        !self.all_stay && !self.used.contains(&pack)
    }

    /// A backup that may be running: its record, once there, may name packs of any earlier backup.
    fn running(unfinished: &[UnfinishedBackup], now: Timestamp) -> Option<BackupName> {
        unfinished.iter().find(|backup| backup.started && !is_idle(backup, now)).map(|backup| backup.name)
    }
}

fn plan_wal(catalog: &Catalog, kept: &[&Backup]) -> WalPlan {
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
    kept: &[&Backup],
    timeline: TimelineId,
    oldest: &Backup,
    written_since: bool,
    size: SegmentSize,
) -> (CutExtent, String) {
    let before = |record: &Backup| CutExtent::Before(size.segment_at(timeline, record.start_lsn));
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
        Err(error) => {
            (before(oldest), format!("{error}; no kept backup begins earlier than `{}`", oldest.name))
        }
    }
}

/// Whether recovery of the backup can ever read WAL of `timeline`: on the way to it, or through it to
/// another one.
fn reaches(histories: &Histories, record: &Backup, timeline: TimelineId) -> bool {
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
        || histories
            .timelines()
            .chain([timeline])
            .any(|other| histories.history(other).as_ref().is_ok_and(passes))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::example::{Archive, SIZE, at, time, tli};
    use crate::catalog::{DamagedBackup, PackUse};
    use proptest::prelude::*;

    const NOW: &str = "2026-11-21T12:00:00Z";

    fn decide(archive: Archive, policy: &RetentionPolicy) -> RetentionPlan {
        plan(&archive.catalog(), policy, time(NOW))
    }

    fn keep(count: u32) -> RetentionPolicy {
        RetentionPolicy { count: Some(count), ..RetentionPolicy::default() }
    }

    fn suspect(record: &mut BackupRecord) {
        record.checksum_failures = Some("1 total checksum verification failure".to_owned());
    }

    /// A backup a day at 10:00, each in the segment of its day of the month, and the WAL from day 1 on.
    fn daily(days: std::ops::RangeInclusive<u64>) -> Archive {
        days.fold(Archive::new().wal(1, 1, 22, "2026-11-21T11:59:00Z"), |archive, day| {
            archive.backup(1, day, &format!("2026-11-{day:02}T10:00:00Z"))
        })
    }

    #[test]
    fn by_count_the_oldest_go_and_their_wal_with_them() {
        insta::assert_snapshot!(decide(daily(18..=21), &keep(2)), @r"
        drop backup `20261118T100000Z`: 2 newer ones are kept (`basebackup_count`)
        drop backup `20261119T100000Z`: 2 newer ones are kept (`basebackup_count`)
        keep backup `20261120T100000Z`: one of the newest 2 (`basebackup_count`)
        keep backup `20261121T100000Z`: the newest one
        drop WAL of timeline 1 before `000000010000000000000014` (19 segments): backup `20261120T100000Z` begins there
        ");
    }

    #[test]
    fn by_age_the_minimum_stays() {
        let policy = RetentionPolicy {
            count: None,
            count_min: 3,
            age_days_max: Some(1.0),
            interval: Duration::from_hours(24),
        };
        insta::assert_snapshot!(decide(daily(16..=21), &policy), @r"
        drop backup `20261116T100000Z`: 4.1 days past its time, more than 1 (`basebackup_age_days_max`)
        drop backup `20261117T100000Z`: 3.1 days past its time, more than 1 (`basebackup_age_days_max`)
        drop backup `20261118T100000Z`: 2.1 days past its time, more than 1 (`basebackup_age_days_max`)
        keep backup `20261119T100000Z`: one of the newest 3 (`basebackup_count_min`)
        keep backup `20261120T100000Z`: 0.1 days past its time, not more than 1 (`basebackup_age_days_max`)
        keep backup `20261121T100000Z`: the newest one
        drop WAL of timeline 1 before `000000010000000000000013` (18 segments): backup `20261119T100000Z` begins there
        ");
    }

    #[test]
    fn without_a_minimum_age_is_not_looked_at() {
        let policy = RetentionPolicy { age_days_max: Some(0.1), ..RetentionPolicy::default() };
        assert_eq!(decide(daily(1..=21), &policy).dropped().count(), 0);
    }

    #[test]
    fn the_last_backup_stays_whatever_the_policy() {
        let none = RetentionPolicy { count: Some(0), count_min: 1, age_days_max: Some(0.001), ..keep(0) };
        let plan = decide(daily(20..=21), &none);
        assert_eq!(plan.dropped().map(ToString::to_string).collect::<Vec<_>>(), ["20261120T100000Z"]);
    }

    #[test]
    fn suspect_backups_do_not_push_out_the_last_clean_one() {
        let archive = daily(16..=17)
            .backup_with(1, 18, "2026-11-18T10:00:00Z", suspect)
            .backup_with(1, 19, "2026-11-19T10:00:00Z", suspect)
            .backup_with(1, 20, "2026-11-20T10:00:00Z", suspect);
        insta::assert_snapshot!(decide(archive, &keep(2)), @r"
        drop backup `20261116T100000Z`: 2 newer ones are kept (`basebackup_count`)
        keep backup `20261117T100000Z`: the last one without checksum failures
        drop backup `20261118T100000Z`: 2 newer ones are kept (`basebackup_count`)
        keep backup `20261119T100000Z`: one of the newest 2 (`basebackup_count`)
        keep backup `20261120T100000Z`: the newest one
        drop WAL of timeline 1 before `000000010000000000000011` (16 segments): backup `20261117T100000Z` begins there
        ");
    }

    #[test]
    fn without_a_backup_no_wal_goes() {
        let plan = decide(Archive::new().wal(1, 1, 9, "2026-11-01T00:00:00Z"), &keep(1));
        assert!(plan.is_empty());
        assert!(plan.wal.nothing_goes.is_some());
        assert!(!plan.wal.drops(SIZE.segment_at(tli(1), at(1, 0))));
    }

    #[test]
    fn an_unreadable_record_stops_pruning() {
        let damaged = DamagedBackup {
            name: "20261120T100000Z".parse::<BackupName>().unwrap().into(),
            reason: "it has format 2".to_owned(),
        };
        let archive = daily(17..=19).change(|catalog| {
            catalog.damaged.push(damaged);
            catalog.unfinished.push(unfinished("2026-11-01T00:00:00Z", false));
        });
        let plan = decide(archive, &keep(1));
        assert!(plan.is_empty());
        assert!(plan.notes[0].contains("`20261120T100000Z`") && plan.notes[0].contains("format 2"));
    }

    fn unfinished(newest_object: &str, started: bool) -> UnfinishedBackup {
        UnfinishedBackup {
            name: BackupName::from_timestamp(time(newest_object)),
            started,
            newest_object: time(newest_object),
            object_count: 3,
            stored_bytes: 9,
        }
    }

    #[test]
    fn leftovers_go_when_they_are_old_enough() {
        let archive = daily(21..=21).change(|catalog| {
            catalog.unfinished.push(unfinished("2026-11-19T10:00:00Z", false));
            catalog.unfinished.push(unfinished("2026-11-21T11:00:00Z", true));
            catalog.unfinished.push(unfinished("2026-11-21T11:00:01Z", true));
            catalog.unfinished.push(unfinished("2026-11-21T11:30:00Z", false));
        });
        insta::assert_snapshot!(decide(archive, &keep(9)), @r"
        keep backup `20261121T100000Z`: the newest one
        drop unfinished backup `20261119T100000Z`: left by a pruned backup, where no kept one uses it
        drop unfinished backup `20261121T110000Z`: interrupted: nothing stored since `2026-11-21T11:00:00Z`
        keep unfinished backup `20261121T110001Z`: may still be running
        keep unfinished backup `20261121T113000Z`: its objects are younger than an hour
        drop WAL of timeline 1 before `000000010000000000000015` (20 segments): backup `20261121T100000Z` begins there
        note: backup `20261121T110001Z` may be running and point into packs of earlier ones: no pack goes until it ends
        ");
    }

    #[test]
    fn packs_stay_as_long_as_a_record_or_a_running_backup_may_use_them() {
        let old: BackupName = "20261101T000000Z".parse().unwrap();
        let archive = || {
            Archive::new().backup_with(1, 5, "2026-11-20T10:00:00Z", |record| {
                record.packs.push(PackUse { backup: old, number: 7, stored_length: 1 });
            })
        };
        let pack = |number| PackId { backup: old, number };
        let rule = PackRule::new(&archive().catalog(), time(NOW));
        assert!(!rule.may_go(pack(7)));
        assert!(rule.may_go(pack(8)));
        let running = archive().change(|catalog| catalog.unfinished.push(unfinished(NOW, true))).catalog();
        assert!(!PackRule::new(&running, time(NOW)).may_go(pack(8)));
        assert!(PackRule::new(&running, time("2026-11-21T13:00:00Z")).may_go(pack(8)));
    }

    #[test]
    fn a_timeline_goes_with_the_last_backup_that_leads_to_it() {
        // Timeline 2 was made by restoring to segment 5; since then timeline 1 is dead.
        let archive = || {
            Archive::new()
                .wal(1, 1, 20, "2026-11-10T00:00:00Z")
                .wal(2, 5, 30, "2026-11-21T11:00:00Z")
                .history(2, "1\t0/5000100\tx")
                .backup(1, 3, "2026-11-08T00:00:00Z")
                .backup(1, 18, "2026-11-09T00:00:00Z")
                .backup(2, 6, "2026-11-11T00:00:00Z")
                .backup(2, 20, "2026-11-20T00:00:00Z")
        };
        let cuts = |count| {
            decide(archive(), &keep(count))
                .to_string()
                .lines()
                .filter(|line| line.contains("WAL"))
                .collect::<Vec<_>>()
                .join("\n")
        };
        insta::assert_snapshot!(cuts(4), @r"
        drop WAL of timeline 1 before `000000010000000000000003` (2 segments): backup `20261108T000000Z` begins there
        drop WAL of timeline 2 before `000000020000000000000003` (0 segments): backup `20261108T000000Z` begins there
        ");
        insta::assert_snapshot!(cuts(3), @r"
        drop WAL of timeline 1 before `000000010000000000000012` (17 segments): backup `20261109T000000Z` begins there
        drop WAL of timeline 2 before `000000020000000000000006` (1 segment): backup `20261111T000000Z` begins there
        ");
        insta::assert_snapshot!(cuts(2), @r"
        drop WAL of timeline 1 (20 segments): no kept backup leads to this timeline
        drop WAL of timeline 2 before `000000020000000000000006` (1 segment): backup `20261111T000000Z` begins there
        ");
    }

    #[test]
    fn a_timeline_that_is_still_written_stays_until_it_has_a_backup() {
        let archive = Archive::new()
            .wal(1, 1, 20, "2026-11-10T00:00:00Z")
            .wal(2, 5, 30, "2026-11-21T11:00:00Z")
            .history(2, "1\t0/5000100\tx")
            .backup(1, 18, "2026-11-09T00:00:00Z");
        let plan = decide(archive, &keep(1));
        assert_eq!(plan.wal.cuts[&tli(2)].extent, CutExtent::Nothing);
        assert!(!plan.wal.drops(SIZE.segment_at(tli(2), at(5, 0))));
    }

    #[test]
    fn a_timeline_of_unknown_origin_loses_only_what_is_older_than_everything_kept() {
        let archive = Archive::new()
            .wal(1, 1, 20, "2026-11-21T10:00:00Z")
            .wal(7, 5, 30, "2026-11-01T00:00:00Z")
            .backup(1, 18, "2026-11-09T00:00:00Z");
        let plan = decide(archive, &keep(1));
        assert_eq!(plan.wal.cuts[&tli(7)].extent, CutExtent::Before(SIZE.segment_at(tli(7), at(18, 0))));
    }

    #[test]
    fn wal_between_two_timelines_of_a_way_stays() {
        // The history file of timeline 2 is lost; that of 3 still tells that the way leads through it.
        let archive = Archive::new()
            .wal(1, 1, 9, "2026-11-01T00:00:00Z")
            .wal(2, 8, 14, "2026-11-01T00:00:00Z")
            .wal(3, 14, 20, "2026-11-21T10:00:00Z")
            .history(3, "1\t0/8000100\tx\n2\t0/E000100\tx")
            .backup(1, 7, "2026-11-09T00:00:00Z");
        let plan = decide(archive, &keep(1));
        for (timeline, number) in [(1, 7), (1, 9), (2, 8), (2, 14), (3, 14)] {
            assert!(!plan.wal.drops(SIZE.segment_at(tli(timeline), at(number, 0))), "{timeline} {number}");
        }
        assert!(plan.wal.drops(SIZE.segment_at(tli(1), at(6, 0))));
    }

    #[test]
    fn names_no_cluster_has_are_left_alone() {
        let plan = decide(daily(20..=21), &keep(1));
        assert!(plan.wal.drops("000000010000000000000003".parse().unwrap()));
        assert!(!plan.wal.drops("000000010000000000000FFF".parse().unwrap()));
        assert!(!plan.wal.drops("0000000900000000000000FF".parse().unwrap()));
    }

    proptest! {
        /// PGHoard's own loop, written the way its documentation describes it.
        #[test]
        fn agrees_with_pghoard(
            count in prop::option::of(1_u32..8), count_min in 0_u32..6, age in prop::option::of(0.0_f64..12.0),
            interval_hours in 0_u32..48, days in prop::collection::btree_set(1_u32..=20, 0..12),
        ) {
            let policy = RetentionPolicy {
                count, count_min, age_days_max: age, interval: Duration::from_hours(interval_hours.into()),
            };
            let archive = days.iter().fold(Archive::new(), |archive, day| {
                archive.backup(1, (*day).into(), &format!("2026-11-{day:02}T10:00:00Z"))
            });
            let mut left: Vec<u32> = days.iter().copied().collect();
            if let Some(count) = count {
                while left.len() > count as usize {
                    left.remove(0);
                }
            }
            if let (Some(age), true) = (age.filter(|age| *age > 0.0), count_min > 0) {
                while left.len() > count_min as usize {
                    let hours = (21 - left[0]) * 24 + 2;
                    if (f64::from(hours) - f64::from(interval_hours)) / 24.0 <= age {
                        break;
                    }
                    left.remove(0);
                }
            }
            let kept: Vec<String> = decide(archive, &policy)
                .backups
                .iter()
                .filter(|backup| backup.verdict == Verdict::Keep)
                .map(|backup| backup.backup.to_string())
                .collect();
            let expected: Vec<String> = left.iter().map(|day| format!("202611{day:02}T100000Z")).collect();
            prop_assert_eq!(kept, expected);
        }

        /// P4: no kept backup loses a segment on any way that the history files know.
        #[test]
        fn no_kept_backup_loses_wal_it_can_ask_for(
            forks in prop::collection::vec((0_usize..4, 2_u64..25), 1..5),
            backups in prop::collection::vec((0_usize..5, 1_u64..28), 1..8),
            count in 1_u32..4, dead: bool,
        ) {
            let newest = if dead { "2026-10-01T00:00:00Z" } else { "2026-11-21T11:00:00Z" };
            // Timeline i + 2 leaves an earlier one at a segment; its way is its parent's up to there.
            let mut ways: Vec<Vec<(u32, u64)>> = vec![Vec::new()];
            let mut archive = Archive::new().wal(1, 1, 30, newest);
            for (index, (parent, segment)) in forks.iter().enumerate() {
                let parent = parent % ways.len();
                let mut way = ways[parent].clone();
                let begin = way.last().map_or(1, |(_, end)| *end);
                let segment = begin.max(*segment);
                way.push((u32::try_from(parent).unwrap() + 1, segment));
                let number = u32::try_from(index).unwrap() + 2;
                let text: String =
                    way.iter().map(|(timeline, end)| format!("{timeline}\t{}\tx\n", at(*end, 0x100))).collect::<Vec<_>>().concat();
                archive = archive.history(number, &text).wal(number, segment, 30, newest);
                ways.push(way);
            }
            for (index, (timeline, segment)) in backups.iter().enumerate() {
                let timeline = timeline % ways.len();
                let begin = ways[timeline].last().map_or(1, |(_, end)| end + 1);
                let start = format!("2026-11-20T{index:02}:00:00Z");
                archive = archive.backup(u32::try_from(timeline).unwrap() + 1, begin.max(*segment), &start);
            }
            let catalog = archive.catalog();
            let plan = plan(&catalog, &keep(count), time(NOW));
            let dropped: Vec<_> = plan.dropped().collect();
            for record in catalog.backups.iter().filter(|record| !dropped.contains(&&BackupId::Own(record.name))) {
                for number in 1..=u32::try_from(ways.len()).unwrap() {
                    let history = catalog.histories.history(tli(number)).unwrap();
                    if !history.contains(record.stop_timeline, record.stop_lsn) {
                        continue;
                    }
                    let path = crate::catalog::RecoveryPath::new(&history);
                    for segment in SIZE.floor(record.start_lsn).get() / SIZE.bytes()..=30 {
                        let needed = path.segment_at(SIZE, at(segment, 0));
                        prop_assert!(!plan.wal.drops(needed), "{} for {}", needed, record.name);
                    }
                }
            }
        }
    }
}
