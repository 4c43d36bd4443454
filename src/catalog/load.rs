//! Reading a [`Catalog`] out of the repository.
//!
//! Lists in the order that keeps the answer true while others write: backups before WAL, so that the WAL of
//! every record seen is seen; pieces before segments, because pieces go only after their segment is stored;
//! segments before histories, because a timeline's history is stored first.

use std::collections::BTreeMap;

use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;

use super::backup::BackupRecord;
use super::histories::Histories;
use super::pghoard_backup::PGHOARD_SEGMENT_SIZE;
use super::pghoard_read::load_pghoard;
use super::pieces::Piece;
use super::snapshot::{Catalog, DamagedBackup, SiteIdentity, UnfinishedBackup, WalTotals};
use super::wal_range::WalCoverageBuilder;
use crate::postgres::{
    Expected, LONG_HEADER_BYTES, SegmentName, TimelineHistory, TimelineId, WalFileName, check_segment_start,
};
use crate::repository::{BackupName, BackupPart, Error, Folder, Listed, ObjectName, Repository};

/// The longest record that is read: one of a backup of 20 TB is about this long. Damage could claim more.
const MAX_RECORD_LENGTH: u64 = 32 << 20;

/// A history file has a line per ancestor; one this long is none.
const MAX_HISTORY_LENGTH: u64 = 1 << 20;

/// Small objects fetched at once: hides the store's latency, and costs a chunk of memory or two each.
pub(super) const PARALLEL_READS: usize = 8;

impl Catalog {
    /// Reads what there is of the site. Objects that cannot be understood are reported in the catalog; only
    /// a store that does not answer is an error.
    pub async fn load(repository: &Repository) -> Result<Self, Error> {
        let unknown_keys = repository.unknown_keys();
        let mut catalog = Self::load_backups(repository).await?;
        let pieces: Vec<Listed> = repository.list(Folder::Pieces, None).await?;
        catalog.load_wal(repository, &pieces).await?;
        catalog.histories = load_histories(repository).await?;
        for former in repository.former() {
            catalog.histories.absorb(load_histories(former).await?);
        }
        catalog.unknown_key_count = repository.unknown_keys() - unknown_keys;
        Ok(catalog)
    }

    /// Reads the backups only; the rest of the catalog is as if there were no WAL.
    pub async fn load_backups(repository: &Repository) -> Result<Self, Error> {
        let folders = list_backup_folders(repository).await?;
        let names: Vec<BackupName> =
            folders.iter().filter(|(_, folder)| folder.record).map(|(name, _)| *name).collect();
        let records: Vec<(BackupName, Option<Result<BackupRecord, String>>)> = stream::iter(names)
            .map(|name| async move { Ok::<_, Error>((name, read_record(repository, name).await?)) })
            .buffered(PARALLEL_READS)
            .try_collect()
            .await?;
        let mut catalog = Self::default();
        (catalog.pghoard, catalog.damaged) = load_pghoard(repository).await?;
        let mut exists = Vec::new();
        for (name, record) in records {
            match record {
                Some(Ok(record)) => catalog.backups.push(record),
                Some(Err(reason)) => catalog.damaged.push(DamagedBackup { name: name.into(), reason }),
                None => continue,
            }
            exists.push(name);
        }
        catalog.unfinished = folders
            .into_iter()
            .filter(|(name, _)| exists.binary_search(name).is_err())
            .map(|(name, folder)| folder.into_unfinished(name))
            .collect();
        Ok(catalog)
    }

    async fn load_wal(&mut self, repository: &Repository, pieces: &[Listed]) -> Result<(), Error> {
        if self.backups.is_empty() {
            (self.wal_identity, self.wal_problem) = identify_wal(repository, pieces).await?;
        }
        let segment_size = match self.identity() {
            Some(identity) => identity.segment_size,
            // WAL that only a key opens does not say whose it is, but PGHoard knows one size.
            None if !self.pghoard.is_empty() => PGHOARD_SEGMENT_SIZE,
            None => return Ok(()),
        };
        let mut builder = WalCoverageBuilder::new(segment_size);
        for listed in pieces {
            if let ObjectName::Piece { segment, start, end } = listed.name {
                builder.piece(segment, Piece { start, end });
                self.count(segment.timeline(), listed);
            }
        }
        for repository in [repository].into_iter().chain(repository.former()) {
            let mut segments = repository.list_stream(Folder::Segments, None);
            while let Some(listed) = segments.try_next().await? {
                if let ObjectName::Wal(WalFileName::Segment(segment)) = listed.name {
                    builder.segment(segment);
                    self.count(segment.timeline(), &listed);
                }
            }
        }
        self.coverage = Some(builder.finish());
        Ok(())
    }

    fn count(&mut self, timeline: TimelineId, listed: &Listed) {
        let newest = listed.last_modified;
        let totals =
            self.wal_totals.entry(timeline).or_insert(WalTotals { object_count: 0, stored_bytes: 0, newest });
        totals.object_count += 1;
        totals.stored_bytes += listed.stored_length;
        totals.newest = totals.newest.max(newest);
    }
}

/// What a listing shows of one backup.
#[derive(Default)]
struct BackupFolder {
    record: bool,
    started: bool,
    newest_object: Timestamp,
    object_count: u64,
    stored_bytes: u64,
}

impl BackupFolder {
    const fn into_unfinished(self, name: BackupName) -> UnfinishedBackup {
        UnfinishedBackup {
            name,
            started: self.started,
            newest_object: self.newest_object,
            object_count: self.object_count,
            stored_bytes: self.stored_bytes,
        }
    }
}

async fn list_backup_folders(repository: &Repository) -> Result<BTreeMap<BackupName, BackupFolder>, Error> {
    let mut folders: BTreeMap<BackupName, BackupFolder> = BTreeMap::new();
    let mut objects = repository.list_stream(Folder::Backups, None);
    while let Some(listed) = objects.try_next().await? {
        let ObjectName::Backup { backup, part } = listed.name else { continue };
        let folder = folders.entry(backup).or_default();
        folder.record |= part == BackupPart::Record;
        folder.started |= part == BackupPart::Started;
        folder.newest_object = folder.newest_object.max(listed.last_modified);
        folder.object_count += 1;
        folder.stored_bytes += listed.stored_length;
    }
    Ok(folders)
}

/// The record, or why it cannot be used; none when it went away since it was listed.
async fn read_record(
    repository: &Repository,
    name: BackupName,
) -> Result<Option<Result<BackupRecord, String>>, Error> {
    match readable(repository.get(ObjectName::record(name), MAX_RECORD_LENGTH).await)? {
        Some(Ok(json)) => Ok(Some(BackupRecord::decode(name, &json).map_err(|error| describe(&error)))),
        Some(Err(reason)) => Ok(Some(Err(reason))),
        None => Ok(None),
    }
}

async fn load_histories(repository: &Repository) -> Result<Histories, Error> {
    let timelines = repository.list(Folder::Histories, None).await?.into_iter().filter_map(|listed| {
        if let ObjectName::Wal(WalFileName::History(timeline)) = listed.name { Some(timeline) } else { None }
    });
    let mut files = stream::iter(timelines)
        .map(|timeline| async move {
            let name = ObjectName::Wal(WalFileName::History(timeline));
            let text = match repository.get(name, MAX_HISTORY_LENGTH).await {
                Err(error) if error.is_locked() => repository.outline(name, error).await,
                read => read,
            };
            readable(text).map(|text| (timeline, text))
        })
        .buffered(PARALLEL_READS);
    let mut histories = Histories::new();
    while let Some((timeline, text)) = files.try_next().await? {
        let Some(text) = text else { continue };
        let history =
            text.and_then(|text| TimelineHistory::parse(timeline, &text).map_err(|error| error.to_string()));
        histories.insert(timeline, history);
    }
    Ok(histories)
}

/// Asks the newest WAL for its cluster, one object of each timeline until one can be read. The second value
/// says why none could.
async fn identify_wal(
    repository: &Repository,
    pieces: &[Listed],
) -> Result<(Option<SiteIdentity>, Option<String>), Error> {
    // By timeline, the newest object that holds a segment's start.
    let mut newest: BTreeMap<TimelineId, (Timestamp, SegmentName, ObjectName)> = BTreeMap::new();
    let mut consider = |segment: SegmentName, listed: &Listed| {
        let candidate = (listed.last_modified, segment, listed.name);
        let best = newest.entry(segment.timeline()).or_insert(candidate);
        *best = candidate.max(*best);
    };
    for listed in pieces {
        if let ObjectName::Piece { segment, start: 0, .. } = listed.name {
            consider(segment, listed);
        }
    }
    let mut segments = repository.list_stream(Folder::Segments, None);
    while let Some(listed) = segments.try_next().await? {
        if let ObjectName::Wal(WalFileName::Segment(segment)) = listed.name {
            consider(segment, &listed);
        }
    }
    let mut candidates: Vec<_> = newest.into_values().collect();
    candidates.sort_unstable();
    let mut problem = None;
    for (_, segment, name) in candidates.into_iter().rev() {
        match readable(read_start(repository, name).await)? {
            Some(Ok(start)) => match check_segment_start(&start, segment, &Expected::default()) {
                Ok(header) => {
                    let identity = SiteIdentity {
                        system_identifier: header.system_identifier,
                        segment_size: header.segment_size,
                    };
                    return Ok((Some(identity), None));
                }
                Err(error) => problem = Some(format!("object `{name}`: {error}")),
            },
            Some(Err(reason)) => problem = Some(reason),
            None => {}
        }
    }
    Ok((None, problem))
}

/// The first bytes of an object, as many as the header of a segment takes. They are not verified by its
/// digest, which would mean to read all of it; the header itself is checked.
async fn read_start(repository: &Repository, name: ObjectName) -> Result<Vec<u8>, Error> {
    let mut reader = match repository.read(name).await {
        Ok(reader) => reader,
        Err(error) if error.is_locked() => return Ok(repository.outline(name, error).await?.into()),
        Err(error) => return Err(error),
    };
    let mut start = Vec::new();
    while start.len() < LONG_HEADER_BYTES {
        let Some(chunk) = reader.next().await? else { break };
        start.extend_from_slice(&chunk[..chunk.len().min(LONG_HEADER_BYTES)]);
    }
    Ok(start)
}

/// Sorts what was read into content, content that nobody can use (with the reason), and nothing; what only
/// says that the store did not answer stays an error.
pub(super) fn readable<T>(read: Result<T, Error>) -> Result<Option<Result<T, String>>, Error> {
    match read {
        Ok(content) => Ok(Some(Ok(content))),
        Err(Error::NotFound(_)) => Ok(None),
        Err(
            error @ (Error::Damaged { .. }
            | Error::TooLarge { .. }
            | Error::Locked { .. }
            | Error::Unsupported { .. }),
        ) => Ok(Some(Err(error.to_string()))),
        Err(error) => Err(error),
    }
}

/// An error and its causes on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::example::{SIZE, at, record, tli};
    use super::*;
    use crate::repository::{Facts, Settings};
    use crate::storage::{Fault, FaultPlan, Operation, Store};
    use bytes::Bytes;

    fn repository(store: Store) -> Repository {
        Repository::new(store, "site", Settings::default())
    }

    async fn put(repository: &Repository, key: &str, content: &[u8]) {
        let name = ObjectName::from_key(key).unwrap();
        repository.put(name, Bytes::copy_from_slice(content), Facts::default()).await.unwrap();
    }

    /// The first page header of a segment of PostgreSQL 18.
    fn segment_start(number: u64, system_identifier: u64) -> Vec<u8> {
        let mut page = vec![0; 8192];
        page[0..2].copy_from_slice(&0xD118_u16.to_le_bytes());
        page[2..4].copy_from_slice(&2_u16.to_le_bytes());
        page[4..8].copy_from_slice(&1_u32.to_le_bytes());
        page[8..16].copy_from_slice(&at(number, 0).get().to_le_bytes());
        page[24..32].copy_from_slice(&system_identifier.to_le_bytes());
        page[32..36].copy_from_slice(&u32::try_from(SIZE.bytes()).unwrap().to_le_bytes());
        page[36..40].copy_from_slice(&8192_u32.to_le_bytes());
        page
    }

    #[tokio::test]
    async fn finds_everything_that_is_there() {
        let repository = repository(Store::in_memory());
        let good = record("2026-11-20T00:00:00Z", at(2, 0x28), at(2, 0x100));
        put(&repository, "backup/20261120T000000Z/record", &good.encode()).await;
        put(&repository, "backup/20261120T000000Z/started", b"").await;
        put(&repository, "backup/20261121T000000Z/record", b"{\"format\": 9}").await;
        put(&repository, "backup/20261119T000000Z/started", b"x").await;
        put(&repository, "backup/20261118T000000Z/pack/000003", b"x").await;
        for number in [1_u64, 2, 4] {
            put(&repository, &format!("xlog/{}", SIZE.segment_at(tli(1), at(number, 0))), b"x").await;
        }
        put(&repository, "xlog/000000010000000000000003.partial", b"x").await;
        put(&repository, "xlog_partial/000000010000000000000005/00000000-00000010", b"x").await;
        put(&repository, "timeline/00000002.history", b"1\t0/5000000\tx\n").await;
        put(&repository, "timeline/00000004.history", b"nonsense").await;

        let catalog = Catalog::load(&repository).await.unwrap();
        assert_eq!(catalog.backups, [good]);
        assert_eq!(catalog.damaged.len(), 1);
        assert!(catalog.damaged[0].reason.contains("format 9"), "{}", catalog.damaged[0].reason);
        let unfinished: Vec<_> = catalog.unfinished.iter().map(|b| (b.name.to_string(), b.started)).collect();
        assert_eq!(
            unfinished,
            [("20261118T000000Z".to_owned(), false), ("20261119T000000Z".to_owned(), true)]
        );
        let coverage = catalog.coverage.as_ref().unwrap();
        assert_eq!(coverage.end_of(tli(1)), Some(at(5, 0x10)));
        assert_eq!(coverage.gaps(tli(1)).len(), 1);
        assert_eq!(catalog.wal_totals[&tli(1)].object_count, 4);
        assert_eq!(catalog.histories.timelines().collect::<Vec<_>>(), [tli(2), tli(4)]);
        assert_eq!(catalog.histories.damaged().count(), 1);
        assert_eq!(catalog.histories.holes(), [(tli(3), tli(3))]);
    }

    #[tokio::test]
    async fn an_empty_site_is_an_empty_catalog() {
        let catalog = Catalog::load(&repository(Store::in_memory())).await.unwrap();
        assert!(catalog.backups.is_empty() && catalog.identity().is_none() && catalog.coverage.is_none());
        assert!(catalog.windows().is_empty());
    }

    #[tokio::test]
    async fn without_a_record_the_wal_says_whose_it_is() {
        let repository = repository(Store::in_memory());
        put(&repository, "xlog/000000010000000000000001", &segment_start(1, 77)).await;
        let catalog = Catalog::load(&repository).await.unwrap();
        assert_eq!(catalog.identity(), Some(SiteIdentity { system_identifier: 77, segment_size: SIZE }));
        assert_eq!(catalog.coverage.unwrap().end_of(tli(1)), Some(at(2, 0)));
    }

    #[tokio::test]
    async fn a_piece_from_a_segments_start_will_do_and_others_will_not() {
        let repository = repository(Store::in_memory());
        let key = |range: &str| format!("xlog_partial/000000010000000000000001/{range}");
        put(&repository, &key("00001000-00002000"), b"x").await;
        let catalog = Catalog::load(&repository).await.unwrap();
        assert_eq!((catalog.identity(), catalog.wal_problem), (None, None));
        put(&repository, &key("00000000-00002000"), &segment_start(1, 5)).await;
        assert_eq!(Catalog::load(&repository).await.unwrap().identity().unwrap().system_identifier, 5);
    }

    #[tokio::test]
    async fn wal_that_is_none_is_reported() {
        let repository = repository(Store::in_memory());
        put(&repository, "xlog/000000010000000000000001", b"not WAL at all, but long enough to be looked at")
            .await;
        let catalog = Catalog::load(&repository).await.unwrap();
        assert!(catalog.coverage.is_none());
        assert!(catalog.wal_problem.unwrap().contains("xlog/000000010000000000000001"));
    }

    #[tokio::test]
    async fn a_store_that_does_not_answer_is_an_error_and_no_damage() {
        let store = Store::in_memory();
        let good = record("2026-11-20T00:00:00Z", at(2, 0x28), at(2, 0x100));
        put(&repository(store.clone()), "backup/20261120T000000Z/record", &good.encode()).await;
        for operation in [Operation::List, Operation::Get] {
            let faults = FaultPlan::script([(operation, Fault::Before)]);
            let error = Catalog::load(&repository(store.with_faults(faults))).await.unwrap_err();
            assert!(error.is_transient(), "{error}");
        }
    }
}
