//! Carrying out a retention plan.
//!
//! The order makes an interruption harmless at any point: records go first, so that no backup is listed
//! whose data is going; then data that no remaining record uses; then WAL, oldest first. Every step may be
//! repeated, and what an interrupted run leaves is swept by a later one.

use futures_util::TryStreamExt;
use jiff::Timestamp;

use super::pghoard::remove_pghoard;
use super::policy::{PackRule, RetentionPlan, Verdict, interrupted};
use crate::catalog::{BackupId, Catalog, UnfinishedBackup};
use crate::postgres::{SegmentName, WalFileName};
use crate::repository::{BackupName, BackupPart, Error, Folder, Listed, ObjectName, PackId, Repository};

/// Names deleted at once: what S3 takes in one request.
const BATCH_LENGTH: usize = 1000;

/// What a run of pruning removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PruneReport {
    pub backup_count: u64,
    /// Backups without a record of which something was removed.
    pub unfinished_count: u64,
    /// Whole segments.
    pub segment_count: u64,
    /// Objects of all kinds.
    pub object_count: u64,
    /// Stored bytes of these, records not counted.
    pub stored_bytes: u64,
}

impl PruneReport {
    const fn add(&mut self, other: Self) {
        self.backup_count += other.backup_count;
        self.unfinished_count += other.unfinished_count;
        self.segment_count += other.segment_count;
        self.object_count += other.object_count;
        self.stored_bytes += other.stored_bytes;
    }
}

/// Deletes what `plan` drops.
pub async fn apply(
    repository: &Repository,
    plan: &RetentionPlan,
    now: Timestamp,
) -> Result<PruneReport, Error> {
    let mut pruning = Pruning { repository, report: PruneReport::default(), batch: Vec::new() };
    let dropped: Vec<BackupName> = plan.dropped().filter_map(BackupId::own).collect();
    repository.delete(dropped.iter().copied().map(ObjectName::record)).await?;
    pruning.report.backup_count = dropped.len() as u64;
    pruning.report.object_count = dropped.len() as u64;
    let removed = remove_pghoard(repository, plan).await?;
    pruning.report.add(removed);

    let given_up = give_up_interrupted(repository, plan, now).await?;
    // The records as they are now decide over packs: one may have been added since the plan was made.
    let mut remaining = Catalog::load_backups(repository).await?;
    // Without its record a dropped backup looks like one that is running, which would hold back packs.
    remaining.unfinished.retain(|unfinished| !dropped.contains(&unfinished.name));
    let rule = PackRule::new(&remaining, now);
    for backup in dropped {
        pruning.delete_parts(backup, &rule).await?;
    }
    for backup in given_up {
        // A record that came before its `started` was gone is a backup that was finished after all.
        let before = pruning.report.object_count;
        pruning.report.object_count += u64::from(backup.started);
        if remaining.unfinished.iter().any(|unfinished| unfinished.name == backup.name) {
            pruning.delete_parts(backup.name, &rule).await?;
        }
        pruning.report.unfinished_count += u64::from(pruning.report.object_count > before);
    }
    pruning.delete_wal(plan).await?;
    let mut report = pruning.report;
    for former in repository.former() {
        let mut pruning = Pruning { repository: former, report: PruneReport::default(), batch: Vec::new() };
        pruning.delete_wal(plan).await?;
        report.add(pruning.report);
    }
    Ok(report)
}

/// The WAL objects that `plan` drops, in the order of their names.
pub async fn wal_dropped(repository: &Repository, plan: &RetentionPlan) -> Result<Vec<Listed>, Error> {
    let mut dropped = Vec::new();
    for folder in [Folder::Segments, Folder::Pieces] {
        let mut objects = repository.list_stream(folder, None);
        while let Some(listed) = objects.try_next().await? {
            if segment_of(&listed.name).is_some_and(|segment| plan.wal.drops(segment)) {
                dropped.push(listed);
            }
        }
    }
    Ok(dropped)
}

/// Takes away the `started` of every backup to be swept, which forbids its writer to finish it.
///
/// A writer that is alive after all puts its record and *then* looks for `started`; we take `started` and
/// *then* look for records. So one of the two sees the other: it withdraws its record, or we leave its data.
async fn give_up_interrupted(
    repository: &Repository,
    plan: &RetentionPlan,
    now: Timestamp,
) -> Result<Vec<UnfinishedBackup>, Error> {
    let planned: Vec<BackupName> = plan
        .unfinished
        .iter()
        .filter(|sweep| sweep.verdict == Verdict::Drop)
        .map(|sweep| sweep.backup)
        .collect();
    if planned.is_empty() {
        return Ok(Vec::new());
    }
    // It may have stored something since the plan was made.
    let mut given_up = interrupted(Catalog::load_backups(repository).await?, now);
    given_up.retain(|backup| planned.contains(&backup.name));
    let started =
        |backup: &UnfinishedBackup| ObjectName::Backup { backup: backup.name, part: BackupPart::Started };
    repository.delete(given_up.iter().map(started)).await?;
    Ok(given_up)
}

struct Pruning<'a> {
    repository: &'a Repository,
    report: PruneReport,
    /// Names to delete together, with their stored length.
    batch: Vec<(ObjectName, u64)>,
}

impl Pruning<'_> {
    /// Deletes the objects of a backup, except its record and the packs that others use.
    async fn delete_parts(&mut self, backup: BackupName, rule: &PackRule) -> Result<(), Error> {
        let mut parts = self.repository.list_stream(Folder::BackupParts(backup), None);
        while let Some(listed) = parts.try_next().await? {
            let ObjectName::Backup { part, .. } = listed.name else { continue };
            let goes = match part {
                BackupPart::Record => false,
                BackupPart::Pack(number) => rule.may_go(PackId { backup, number }),
                BackupPart::Started | BackupPart::Files => true,
            };
            if goes {
                self.delete(listed.name, listed.stored_length).await?;
            }
        }
        self.flush().await
    }

    /// Deletes segments in the order of their names, which on each timeline is that of their age, then pieces.
    async fn delete_wal(&mut self, plan: &RetentionPlan) -> Result<(), Error> {
        for folder in [Folder::Segments, Folder::Pieces] {
            let mut objects = self.repository.list_stream(folder, None);
            while let Some(listed) = objects.try_next().await? {
                if segment_of(&listed.name).is_some_and(|segment| plan.wal.drops(segment)) {
                    self.delete(listed.name, listed.stored_length).await?;
                }
            }
            self.flush().await?;
        }
        Ok(())
    }

    async fn delete(&mut self, name: ObjectName, stored_length: u64) -> Result<(), Error> {
        self.batch.push((name, stored_length));
        if self.batch.len() >= BATCH_LENGTH { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return Ok(());
        }
        self.repository.delete(batch.iter().map(|(name, _)| *name)).await?;
        for (name, stored_length) in batch {
            self.report.object_count += 1;
            self.report.stored_bytes += stored_length;
            self.report.segment_count += u64::from(matches!(name, ObjectName::Wal(WalFileName::Segment(_))));
        }
        Ok(())
    }
}

/// The segment whose fate an object shares; none for history files, which stay.
const fn segment_of(name: &ObjectName) -> Option<SegmentName> {
    match name {
        ObjectName::Wal(
            WalFileName::Segment(segment)
            | WalFileName::Partial(segment)
            | WalFileName::BackupLabel(segment, _),
        )
        | ObjectName::Piece { segment, .. } => Some(*segment),
        ObjectName::Wal(WalFileName::History(_)) | ObjectName::Backup { .. } | ObjectName::Pghoard { .. } => {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::policy::{RetentionPolicy, plan};
    use super::*;
    use crate::catalog::example::{SIZE, at, record, time, tli};
    use crate::catalog::{BackupRecord, PackUse};
    use crate::repository::{Facts, Settings};
    use crate::storage::Store;
    use bytes::Bytes;

    /// When the tests' objects count as long forgotten: the memory store dates them by the real clock.
    const LATER: &str = "2999-01-01T00:00:00Z";

    fn repository() -> Repository {
        Repository::new(Store::in_memory(), "site", Settings::default())
    }

    async fn put(repository: &Repository, key: &str) {
        let name = ObjectName::from_key(key).unwrap();
        repository.put(name, Bytes::from_static(b"content"), Facts::default()).await.unwrap();
    }

    async fn put_backup(repository: &Repository, record: &BackupRecord) {
        for part in ["started", "pack/000000", "pack/000001", "files"] {
            put(repository, &format!("backup/{}/{part}", record.name)).await;
        }
        put_record(repository, record).await;
    }

    async fn put_record(repository: &Repository, record: &BackupRecord) {
        let json = record.encode().into();
        repository.put(ObjectName::record(record.name), json, Facts::default()).await.unwrap();
    }

    async fn keys(repository: &Repository) -> Vec<String> {
        let mut keys = Vec::new();
        for folder in [Folder::Backups, Folder::Segments, Folder::Pieces, Folder::Histories] {
            let listed = repository.list(folder, None).await.unwrap();
            keys.extend(listed.into_iter().map(|listed| listed.name.to_key()));
        }
        keys
    }

    fn keep_one() -> RetentionPolicy {
        RetentionPolicy { count: Some(1), ..RetentionPolicy::default() }
    }

    async fn planned(repository: &Repository) -> RetentionPlan {
        plan(&Catalog::load(repository).await.unwrap(), &keep_one(), time(LATER))
    }

    /// Two backups, the later of which uses a pack of the earlier one, and an interrupted one.
    async fn fill(repository: &Repository) -> (BackupRecord, BackupRecord) {
        let old = record("2026-11-20T00:00:00Z", at(2, 0x28), at(2, 0x100));
        let mut new = record("2026-11-21T00:00:00Z", at(4, 0x28), at(4, 0x100));
        new.packs.push(PackUse { backup: old.name, number: 1, stored_length: 7 });
        put_backup(repository, &old).await;
        put_backup(repository, &new).await;
        for part in ["started", "pack/000000"] {
            put(repository, &format!("backup/20261119T000000Z/{part}")).await;
        }
        for number in 1..=5 {
            put(repository, &format!("xlog/{}", SIZE.segment_at(tli(1), at(number, 0)))).await;
        }
        put(repository, "xlog/000000010000000000000002.00000028.backup").await;
        put(repository, "xlog/000000010000000000000003.partial").await;
        put(repository, "xlog_partial/000000010000000000000001/00000000-00000100").await;
        put(repository, "xlog_partial/000000010000000000000006/00000000-00000100").await;
        put(repository, "timeline/00000002.history").await;
        (old, new)
    }

    const LEFT: [&str; 10] = [
        "backup/20261120T000000Z/pack/000001",
        "backup/20261121T000000Z/files",
        "backup/20261121T000000Z/pack/000000",
        "backup/20261121T000000Z/pack/000001",
        "backup/20261121T000000Z/record",
        "backup/20261121T000000Z/started",
        "xlog/000000010000000000000004",
        "xlog/000000010000000000000005",
        "xlog_partial/000000010000000000000006/00000000-00000100",
        "timeline/00000002.history",
    ];

    #[tokio::test]
    async fn removes_what_the_plan_drops_and_nothing_else() {
        let repository = repository();
        fill(&repository).await;
        let plan = planned(&repository).await;
        let before = keys(&repository).await.len() as u64;
        let report = apply(&repository, &plan, time(LATER)).await.unwrap();
        assert_eq!(keys(&repository).await, LEFT);
        assert_eq!((report.backup_count, report.unfinished_count, report.segment_count), (1, 1, 3));
        assert_eq!(report.object_count, before - LEFT.len() as u64);
        assert!(report.stored_bytes > 0);
    }

    #[tokio::test]
    async fn doing_it_again_changes_nothing() {
        let repository = repository();
        fill(&repository).await;
        let first = planned(&repository).await;
        apply(&repository, &first, time(LATER)).await.unwrap();
        // What is left of the old backup is in use, so there is nothing to sweep.
        let second = planned(&repository).await;
        assert!(second.is_empty(), "{second}");
        let report = apply(&repository, &first, time(LATER)).await.unwrap();
        assert_eq!((report.segment_count, report.unfinished_count, report.stored_bytes), (0, 0, 0));
        assert_eq!(keys(&repository).await, LEFT);
    }

    #[tokio::test]
    async fn a_backup_added_after_the_plan_keeps_its_packs() {
        let repository = repository();
        let (old, _) = fill(&repository).await;
        let plan = planned(&repository).await;
        let mut late = record("2026-11-21T01:00:00Z", at(5, 0x28), at(5, 0x100));
        late.packs.push(PackUse { backup: old.name, number: 0, stored_length: 7 });
        put_backup(&repository, &late).await;
        apply(&repository, &plan, time(LATER)).await.unwrap();
        assert!(keys(&repository).await.contains(&format!("backup/{}/pack/000000", old.name)));
    }

    #[tokio::test]
    async fn a_backup_finished_after_the_plan_is_not_swept() {
        let repository = repository();
        fill(&repository).await;
        let plan = planned(&repository).await;
        put_record(&repository, &record("2026-11-19T00:00:00Z", at(1, 0x28), at(1, 0x100))).await;
        apply(&repository, &plan, time(LATER)).await.unwrap();
        let left = keys(&repository).await;
        for part in ["record", "started", "pack/000000"] {
            assert!(left.contains(&format!("backup/20261119T000000Z/{part}")), "{part}");
        }
    }

    #[tokio::test]
    async fn a_running_backup_holds_the_packs_it_may_point_into() {
        let repository = repository();
        let (old, _) = fill(&repository).await;
        let plan = planned(&repository).await;
        // Seen from the real time of the objects, the unfinished backup has just begun.
        let now = Catalog::load(&repository).await.unwrap().unfinished[0].newest_object;
        apply(&repository, &plan, now).await.unwrap();
        let left = keys(&repository).await;
        for number in ["000000", "000001"] {
            assert!(left.contains(&format!("backup/{}/pack/{number}", old.name)));
        }
        assert!(left.contains(&"backup/20261119T000000Z/started".to_owned()));
        assert!(!left.contains(&format!("backup/{}/record", old.name)));
        // When it has ended, a later run takes them.
        let later = planned(&repository).await;
        apply(&repository, &later, time(LATER)).await.unwrap();
        assert_eq!(keys(&repository).await, LEFT);
    }
}
