//! One battery that every store must pass.

#![expect(clippy::unwrap_used, reason = "tests; the lint's own exception ends at their functions")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{Attributes, ObjectStore, ObjectStoreExt, PutOptions};
use pgkeep::codec::{Compression, Digest};
use pgkeep::postgres::{SegmentName, WalFileName};
use pgkeep::repository::{
    BackupName, BackupPart, Error, Facts, Folder, FrameDecoder, FrameEncoder, FrameRef, ObjectName, Outcome,
    PackId, Repository, Settings, StoredAs,
};
use pgkeep::secret::Secret;
use pgkeep::storage::{
    self, Access, ConditionalPut, Fault, FaultPlan, Operation, Options, S3Config, StorageConfig, Store,
};

const MIB: usize = 1 << 20;

fn settings(compression: Compression) -> Settings {
    Settings {
        compression,
        level: 3,
        host: "bücher host".to_owned(),
        part_size: 5 * MIB,
        ..Settings::default()
    }
}

fn segment(number: u32) -> SegmentName {
    format!("00000001{:08X}{:08X}", number / 256, number % 256).parse().unwrap()
}

fn wal(number: u32) -> ObjectName {
    ObjectName::segment(segment(number))
}

fn backup() -> BackupName {
    "20261121T093000Z".parse().unwrap()
}

fn pack(number: u32) -> ObjectName {
    PackId { backup: backup(), number }.object()
}

/// Bytes that do not compress, other ones for each seed.
fn noise(seed: u64, length: usize) -> Bytes {
    let mut state = seed.wrapping_mul(2) + 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

/// Something like WAL: half of it compresses.
fn like_wal(seed: u64, length: usize) -> Bytes {
    let mut bytes = noise(seed, length).to_vec();
    bytes.chunks_mut(64).step_by(2).for_each(|chunk| chunk.fill(b'w'));
    bytes.into()
}

async fn write_in_chunks(
    repository: &Repository,
    name: ObjectName,
    content: &Bytes,
) -> Result<Outcome, Error> {
    let mut writer = repository.writer(name, Facts { pg_version: Some(180_000) });
    let mut at = 0;
    while at < content.len() {
        let end = (at + 100_003).min(content.len());
        writer.write(content.slice(at..end)).await?;
        at = end;
    }
    Ok(writer.finish().await?.outcome)
}

/// What every store must do. The store is empty before, and is left empty. `raw` is the same place without
/// anything of ours in front of it, for doing damage.
pub async fn battery(store: Store, raw: Arc<dyn ObjectStore>) {
    assert_eq!(store.probe_conditional_put().await.unwrap(), ConditionalPut::Honoured);
    store.check_reachable().await.unwrap();
    round_trips(&store).await;
    names_are_taken_once(&store).await;
    one_of_many_writers_wins(&store).await;
    large_objects_go_in_parts(&store).await;
    packs_give_their_frames(&store).await;
    listings_are_complete_and_in_order(&store).await;
    odd_prefixes_are_places_like_others(&store).await;
    failures_after_the_effect_are_seen_through(&store).await;
    broken_reads_are_not_damage(&store).await;
    damage_is_seen(&store, &*raw).await;
    objects_do_without_metadata(&store, &*raw).await;
}

async fn clear(repository: &Repository) {
    for folder in [Folder::Segments, Folder::Histories, Folder::Pieces, Folder::Backups] {
        let listed = repository.list(folder, None).await.unwrap();
        let count = listed.len() as u64;
        let deleted = repository.delete(listed.into_iter().map(|listed| listed.name)).await.unwrap();
        assert_eq!(deleted, count);
        assert_eq!(repository.list(folder, None).await.unwrap(), []);
    }
}

async fn round_trips(store: &Store) {
    for compression in [Compression::None, Compression::Snappy, Compression::Zstd] {
        let repository = Repository::new(store.clone(), "main", settings(compression));
        let facts = Facts { pg_version: Some(160_004) };
        for (number, length) in [0, 1, 4096, 700_000, 16 * MIB].into_iter().enumerate() {
            let name = wal(u32::try_from(number).unwrap());
            let content = like_wal(7, length);
            assert!(repository.read(name).await.unwrap_err().is_not_found());
            assert!(repository.head(name).await.unwrap_err().is_not_found());
            let stored = repository.put(name, content.clone(), facts).await.unwrap();
            assert_eq!((stored.outcome, stored.plaintext_length), (Outcome::Created, length as u64));
            assert_eq!(stored.digest, Digest::of(&content));
            assert!(repository.get(name, length as u64).await.unwrap() == content);
            let info = repository.head(name).await.unwrap();
            assert_eq!(info.stored_length, stored.stored_length);
            assert_eq!(info.metadata.pg_version, Some(160_004));
            assert_eq!(info.metadata.host.as_deref(), Some("b?cher?host"));
            assert_eq!(info.metadata.plaintext_length, Some(length as u64));
            assert_eq!(info.metadata.digest, Some(stored.digest));
            assert_eq!(info.metadata.stored_as, StoredAs::Declared(compression));
            let age = jiff::Timestamp::now().as_second() - info.last_modified.as_second();
            assert!((-5..600).contains(&age), "{age}");
            if length > 0 {
                let too_large = repository.get(name, length as u64 - 1).await;
                assert!(matches!(too_large, Err(Error::TooLarge { .. })));
            }
        }
        assert_eq!(repository.delete([wal(999)]).await.map(|_| ()).ok(), Some(()), "a missing one is fine");
        clear(&repository).await;
    }
}

async fn names_are_taken_once(store: &Store) {
    let repository = Repository::new(store.clone(), "main", settings(Compression::Zstd));
    let (one, other) = (like_wal(1, 300_000), like_wal(2, 300_000));
    assert_eq!(write_in_chunks(&repository, wal(1), &one).await.unwrap(), Outcome::Created);
    assert_eq!(write_in_chunks(&repository, wal(1), &one).await.unwrap(), Outcome::AlreadySame);
    // The same content in another encoding is the same.
    let plain = Repository::new(store.clone(), "main", settings(Compression::None));
    assert_eq!(write_in_chunks(&plain, wal(1), &one).await.unwrap(), Outcome::AlreadySame);
    for offered in [other.clone(), one.slice(..299_999), Bytes::new()] {
        let refused = write_in_chunks(&repository, wal(1), &offered).await;
        assert!(matches!(refused, Err(Error::Conflict { existing: 300_000, .. })), "{refused:?}");
    }
    assert!(repository.get(wal(1), u64::MAX).await.unwrap() == one);
    // Without conditional put, as far as one writer goes.
    clear(&repository).await;
}

async fn one_of_many_writers_wins(store: &Store) {
    let repository = Repository::new(store.clone(), "main", settings(Compression::Zstd));
    for round in 0..5 {
        let contents: Vec<_> = (0..6).map(|writer| like_wal(writer, 50_000)).collect();
        let writes = contents.iter().map(|content| write_in_chunks(&repository, wal(round), content));
        let results = futures_util::future::join_all(writes).await;
        let created: Vec<_> = results.iter().filter(|result| result.is_ok()).collect();
        assert_eq!(created.len(), 1, "{results:?}");
        let there = repository.get(wal(round), u64::MAX).await.unwrap();
        let winner = results.iter().position(Result::is_ok).unwrap();
        assert!(there == contents[winner]);
        for result in results.iter().filter(|result| result.is_err()) {
            assert!(matches!(result, Err(Error::Conflict { .. })), "{result:?}");
        }
    }
    clear(&repository).await;
}

async fn large_objects_go_in_parts(store: &Store) {
    let plan = FaultPlan::script([]);
    let repository =
        Repository::new(store.with_faults(Arc::clone(&plan)), "main", settings(Compression::Zstd));
    let (one, other) = (noise(1, 20 * MIB), noise(2, 20 * MIB));
    assert_eq!(write_in_chunks(&repository, wal(1), &one).await.unwrap(), Outcome::Created);
    assert_eq!(plan.count(Operation::Complete), 1, "it went in parts");
    assert_eq!(plan.count(Operation::Part), 5);
    assert_eq!(write_in_chunks(&repository, wal(1), &one).await.unwrap(), Outcome::AlreadySame);
    let refused = write_in_chunks(&repository, wal(1), &other).await;
    assert!(matches!(refused, Err(Error::Conflict { .. })), "{refused:?}");
    assert!(repository.get(wal(1), u64::MAX).await.unwrap() == one);
    let info = repository.head(wal(1)).await.unwrap();
    assert_eq!(info.metadata.stored_as, StoredAs::Declared(Compression::Zstd));
    assert_eq!((info.metadata.plaintext_length, info.metadata.digest), (None, None));

    // Nothing is left of an upload that is given up, dropped, or fails.
    let mut writer = repository.writer(wal(2), Facts::default());
    writer.write(one.clone()).await.unwrap();
    writer.write(one.clone()).await.unwrap();
    writer.abort().await;
    let mut writer = repository.writer(wal(3), Facts::default());
    writer.write(one.clone()).await.unwrap();
    writer.write(one.clone()).await.unwrap();
    drop(writer);
    // Its parts are cancelled behind its back, and must not meet the faults below.
    tokio::time::sleep(Duration::from_millis(200)).await;
    plan.push(Operation::Part, Fault::None);
    plan.push(Operation::Part, Fault::Before);
    let failed = write_in_chunks(&repository, wal(4), &one).await;
    assert!(failed.unwrap_err().is_transient());
    for number in 2..=4 {
        assert!(repository.read(wal(number)).await.unwrap_err().is_not_found());
    }
    assert_eq!(repository.list(Folder::Segments, None).await.unwrap().len(), 1);
    // Completed, and told that it was not.
    plan.push(Operation::Complete, Fault::After);
    assert_eq!(write_in_chunks(&repository, wal(5), &one).await.unwrap(), Outcome::Created);
    assert!(repository.get(wal(5), u64::MAX).await.unwrap() == one);
    clear(&repository).await;
}

async fn packs_give_their_frames(store: &Store) {
    let repository = Repository::new(store.clone(), "main", settings(Compression::Zstd));
    for (number, count) in [(0_u32, 3_u64), (1, 14)] {
        let mut encoder = FrameEncoder::new(Compression::Zstd, 1);
        let mut writer = repository.pack_writer(pack(number), None);
        let mut frames = Vec::new();
        for seed in 0..count {
            let raw = if seed % 3 == 0 { noise(seed, MIB) } else { like_wal(seed, 900_000) };
            let frame = encoder.encode(&raw);
            frames.push((
                FrameRef {
                    pack: PackId { backup: backup(), number },
                    offset: writer.length(),
                    stored_length: u32::try_from(frame.stored.len()).unwrap(),
                    raw_length: frame.raw_length,
                    compression: frame.compression,
                    digest: frame.digest,
                },
                raw,
            ));
            writer.append(frame.stored).await.unwrap();
        }
        let length = writer.length();
        let stored = writer.finish().await.unwrap();
        assert_eq!((stored.stored_length, stored.outcome), (length, Outcome::Created));
        let (mut decoder, mut out) = (FrameDecoder::new(), Vec::new());
        for (frame, raw) in frames.iter().rev() {
            let end = frame.offset + u64::from(frame.stored_length);
            let bytes = repository.get_range(frame.pack.object(), frame.offset..end).await.unwrap();
            decoder.decode(frame, &bytes, &mut out).unwrap();
            assert!(out == raw[..]);
        }
        for range in [length - 1..length + 1, length..length + 1, length + 5..length + 9] {
            let error = repository.get_range(pack(number), range).await.unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{error}");
        }
        assert_eq!(repository.get_range(pack(number), 5..5).await.unwrap(), Bytes::new());
    }
    assert!(repository.get_range(pack(9), 0..1).await.unwrap_err().is_not_found());
    clear(&repository).await;
}

async fn listings_are_complete_and_in_order(store: &Store) {
    const COUNT: u32 = 1_050;
    let repository = Repository::new(store.clone(), "main", settings(Compression::None));
    let others = Repository::new(store.clone(), "main2", settings(Compression::None));
    others.put(wal(5), Bytes::from_static(b"x"), Facts::default()).await.unwrap();
    futures_util::stream::iter((0..COUNT).rev())
        .map(|number| repository.put(wal(number), Bytes::from_static(b"x"), Facts::default()))
        .buffer_unordered(16)
        .try_for_each(|_| futures_util::future::ready(Ok(())))
        .await
        .unwrap();
    let more = [
        ObjectName::Wal(WalFileName::Partial(segment(3))),
        ObjectName::Wal("00000002.history".parse().unwrap()),
        ObjectName::Piece { segment: segment(9), start: 0, end: 8192 },
        ObjectName::Piece { segment: segment(9), start: 8192, end: 16384 },
        ObjectName::Piece { segment: segment(10), start: 0, end: 8192 },
        ObjectName::Backup { backup: backup(), part: BackupPart::Started },
        ObjectName::record(backup()),
    ];
    for name in more {
        repository.put(name, Bytes::from_static(b"y"), Facts::default()).await.unwrap();
    }
    let names = |listed: Vec<pgkeep::repository::Listed>| -> Vec<ObjectName> {
        listed.into_iter().map(|listed| listed.name).collect()
    };
    let mut expected: Vec<_> = (0..COUNT).map(wal).collect();
    expected.insert(4, more[0]);
    let listed = repository.list(Folder::Segments, None).await.unwrap();
    assert!(listed.iter().all(|listed| listed.stored_length == 1));
    assert_eq!(names(listed), expected);
    let after = repository.list(Folder::Segments, Some(wal(1_020))).await.unwrap();
    assert_eq!(names(after), (1_021..COUNT).map(wal).collect::<Vec<_>>());
    assert_eq!(names(repository.list(Folder::Histories, None).await.unwrap()), more[1..2]);
    assert_eq!(names(repository.list(Folder::Pieces, None).await.unwrap()), more[2..5]);
    assert_eq!(names(repository.list(Folder::PiecesOf(segment(9)), None).await.unwrap()), more[2..4]);
    // In the order of keys, in which `record` comes before `started`.
    let backups = [more[6], more[5]];
    assert_eq!(names(repository.list(Folder::Backups, None).await.unwrap()), backups);
    assert_eq!(names(repository.list(Folder::BackupParts(backup()), None).await.unwrap()), backups);
    let first: Vec<_> = repository.list_stream(Folder::Segments, None).take(2).try_collect().await.unwrap();
    assert_eq!(names(first), [wal(0), wal(1)]);
    assert_eq!(repository.unknown_keys(), 0);
    clear(&repository).await;
    assert_eq!(others.list(Folder::Segments, None).await.unwrap().len(), 1, "another site is left alone");
    clear(&others).await;
}

async fn odd_prefixes_are_places_like_others(store: &Store) {
    for prefix in ["", "a b/ü+ß", "%2e%2e/x%20y", "q?a=b&c#frag", "/lead//double/", "..", "~!$'()*,;:@=[]"]
    {
        let repository = Repository::new(store.clone(), prefix, settings(Compression::Snappy));
        let content = Bytes::from(prefix.repeat(3));
        repository.put(wal(1), content.clone(), Facts::default()).await.unwrap();
        assert!(repository.get(wal(1), 1000).await.unwrap() == content, "{prefix}");
        let listed = repository.list(Folder::Segments, None).await.unwrap();
        assert_eq!(listed.len(), 1, "{prefix}");
        assert_eq!(listed[0].name, wal(1));
        assert!(repository.list(Folder::Segments, Some(wal(1))).await.unwrap().is_empty(), "{prefix}");
        clear(&repository).await;
    }
}

async fn failures_after_the_effect_are_seen_through(store: &Store) {
    let plan = FaultPlan::script([(Operation::Put, Fault::After), (Operation::Put, Fault::Before)]);
    let repository =
        Repository::new(store.with_faults(Arc::clone(&plan)), "main", settings(Compression::Zstd));
    let content = like_wal(3, 100_000);
    // Stored, and told that it was not: our own write is recognised.
    assert_eq!(write_in_chunks(&repository, wal(1), &content).await.unwrap(), Outcome::Created);
    let failed = write_in_chunks(&repository, wal(2), &content).await.unwrap_err();
    assert!(failed.is_transient(), "{failed}");
    assert!(repository.read(wal(2)).await.unwrap_err().is_not_found());
    // Nothing is known when the read back fails as well.
    plan.push(Operation::Put, Fault::After);
    plan.push(Operation::Get, Fault::Before);
    assert!(write_in_chunks(&repository, wal(3), &content).await.unwrap_err().is_transient());
    assert_eq!(write_in_chunks(&repository, wal(3), &content).await.unwrap(), Outcome::AlreadySame);
    // "Not found" is not believed from a store that cannot be listed.
    plan.push(Operation::List, Fault::Before);
    assert!(repository.read(wal(4)).await.unwrap_err().is_transient());
    plan.push(Operation::List, Fault::After);
    assert!(repository.list(Folder::Segments, None).await.unwrap_err().is_transient());
    clear(&repository).await;
}

async fn broken_reads_are_not_damage(store: &Store) {
    let plan = FaultPlan::script([]);
    let repository =
        Repository::new(store.with_faults(Arc::clone(&plan)), "main", settings(Compression::None));
    let content = noise(9, 3 * MIB);
    repository.put(wal(1), content.clone(), Facts::default()).await.unwrap();
    for at in [0, 1, 1_000_000, 3 * MIB as u64 - 1] {
        for fault in [Fault::Truncate(at), Fault::Break(at)] {
            plan.push(Operation::Get, fault);
            let error = repository.get(wal(1), u64::MAX).await.unwrap_err();
            assert!(error.is_transient(), "{fault:?}: {error}");
        }
        plan.push(Operation::Get, Fault::Truncate(at));
        let error = repository.get_range(wal(1), 0..3 * MIB as u64).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }
    clear(&repository).await;
}

async fn damage_is_seen(store: &Store, raw: &dyn ObjectStore) {
    for compression in [Compression::None, Compression::Snappy, Compression::Zstd] {
        let repository = Repository::new(store.clone(), "main", settings(compression));
        let contents = [like_wal(1, 200_000), like_wal(2, 200_000)];
        let mut stored = Vec::new();
        for (number, content) in (0..).zip(&contents) {
            repository.put(wal(number), content.clone(), Facts::default()).await.unwrap();
            let key = Path::from(format!("main/{}", wal(number)));
            let result = raw.get(&key).await.unwrap();
            let attributes = result.attributes.clone();
            stored.push((key, attributes, result.bytes().await.unwrap()));
        }
        let (key, attributes, bytes) = &stored[0];
        let replace = |bytes: Bytes| {
            let options = PutOptions { attributes: attributes.clone(), ..PutOptions::default() };
            raw.put_opts(key, bytes.into(), options)
        };
        let flipped = |at: usize| {
            let mut bytes = bytes.to_vec();
            bytes[at] ^= 1;
            Bytes::from(bytes)
        };
        let mut longer = bytes.to_vec();
        longer.push(0);
        let last = bytes.len() - 1;
        for (damage, bytes) in [
            ("emptied", Bytes::new()),
            ("truncated", bytes.slice(..bytes.len() / 2)),
            ("last byte lost", bytes.slice(..last)),
            ("first bit flipped", flipped(0)),
            ("bit flipped", flipped(bytes.len() / 2)),
            ("last bit flipped", flipped(last)),
            ("byte appended", longer.into()),
            ("swapped", stored[1].2.clone()),
        ] {
            replace(bytes).await.unwrap();
            match repository.get(wal(0), u64::MAX).await {
                // Snappy may copy the same bytes from another place; then nothing was lost.
                Ok(content) => assert!(content == contents[0] && damage.contains("flipped"), "{damage}"),
                Err(error) => {
                    assert!(matches!(error, Error::Damaged { .. }), "{compression}, {damage}: {error}");
                    // Nor is a damaged object taken for the same, or mended in passing.
                    let error =
                        repository.put(wal(0), contents[0].clone(), Facts::default()).await.unwrap_err();
                    assert!(matches!(error, Error::Damaged { .. }), "{compression}, {damage}: {error}");
                }
            }
        }
        replace(bytes.clone()).await.unwrap();
        assert!(repository.get(wal(0), u64::MAX).await.unwrap() == contents[0]);
        clear(&repository).await;
    }
}

async fn objects_do_without_metadata(store: &Store, raw: &dyn ObjectStore) {
    for compression in [Compression::None, Compression::Snappy, Compression::Zstd] {
        let repository = Repository::new(store.clone(), "main", settings(compression));
        let content = like_wal(1, 700_000);
        repository.put(wal(0), content.clone(), Facts::default()).await.unwrap();
        let key = Path::from(format!("main/{}", wal(0)));
        let bytes = raw.get(&key).await.unwrap().bytes().await.unwrap();
        let options = PutOptions { attributes: Attributes::new(), ..PutOptions::default() };
        raw.put_opts(&key, bytes.into(), options).await.unwrap();
        let _ = raw.delete(&Path::from(format!("{key}.metadata"))).await;
        assert_eq!(repository.head(wal(0)).await.unwrap().metadata.stored_as, StoredAs::Undeclared);
        assert!(repository.get(wal(0), u64::MAX).await.unwrap() == content, "{compression}");
        clear(&repository).await;
    }
}

#[tokio::test]
async fn memory_passes() {
    let memory = Arc::new(InMemory::new());
    battery(Store::new(memory.clone(), "", "memory:"), memory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_directory_passes_and_is_left_empty() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("new/odd näme");
    let config = StorageConfig::Local { directory: directory.clone() };
    let missing = storage::open(&config, Access::Read).await.unwrap_err();
    assert!(matches!(missing, storage::Error::Missing { .. }), "{missing}");
    let store = storage::open(&config, Access::Write).await.unwrap();
    battery(store, Arc::new(LocalFileSystem::new_with_prefix(&directory).unwrap())).await;
    storage::open(&config, Access::Read).await.unwrap();
    let left: Vec<_> =
        std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".pgkeep"]);
}

#[tokio::test]
async fn a_directory_that_goes_away_is_unknown_and_not_empty() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("store");
    let config = StorageConfig::Local { directory: directory.clone() };
    let store = storage::open(&config, Access::Write).await.unwrap();
    let repository = Repository::new(store, "main", settings(Compression::Zstd));
    assert!(repository.read(wal(1)).await.unwrap_err().is_not_found());
    // As when a file system is unmounted: the directory is there, and empty.
    std::fs::rename(&directory, parent.path().join("elsewhere")).unwrap();
    std::fs::create_dir(&directory).unwrap();
    for round in 0..2 {
        let unknown = |error: Error| error.is_transient() && error.hint().unwrap().contains("mounted");
        assert!(unknown(repository.read(wal(1)).await.unwrap_err()));
        assert!(unknown(repository.head(wal(1)).await.unwrap_err()));
        assert!(unknown(repository.list(Folder::Segments, None).await.unwrap_err()));
        assert!(unknown(repository.delete([wal(1)]).await.unwrap_err()));
        assert!(unknown(repository.put(wal(1), Bytes::new(), Facts::default()).await.unwrap_err()));
        let missing = storage::open(&config, Access::Read).await.unwrap_err();
        assert!(matches!(missing, storage::Error::Missing { .. }), "{missing}");
        if round == 0 {
            std::fs::remove_dir(&directory).unwrap();
        }
    }
}

/// A store that takes every put, whatever its condition.
#[tokio::test]
async fn a_store_that_ignores_conditions_is_found_out_and_still_never_overwritten_by_one_writer() {
    let memory = Arc::new(InMemory::new());
    let store = Store::new(Arc::new(Careless(memory.clone())), "", "careless:");
    assert_eq!(store.probe_conditional_put().await.unwrap(), ConditionalPut::Ignored);
    assert_eq!(memory.list(None).count().await, 0, "the probe is gone");
    let repository = Repository::new(store, "main", settings(Compression::Zstd));
    let content = like_wal(1, 10_000);
    assert_eq!(write_in_chunks(&repository, wal(1), &content).await.unwrap(), Outcome::Created);
    assert_eq!(write_in_chunks(&repository, wal(1), &content).await.unwrap(), Outcome::AlreadySame);
    let refused = write_in_chunks(&repository, wal(1), &like_wal(2, 10_000)).await;
    assert!(matches!(refused, Err(Error::Conflict { .. })), "{refused:?}");
    assert!(repository.get(wal(1), u64::MAX).await.unwrap() == content);
}

#[derive(Debug)]
struct Careless(Arc<InMemory>);

impl std::fmt::Display for Careless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Careless")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Careless {
    async fn put_opts(
        &self,
        location: &Path,
        payload: object_store::PutPayload,
        options: PutOptions,
    ) -> object_store::Result<object_store::PutResult> {
        let options = PutOptions { mode: object_store::PutMode::Overwrite, ..options };
        self.0.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: object_store::PutMultipartOptions,
    ) -> object_store::Result<Box<dyn object_store::MultipartUpload>> {
        self.0.put_multipart_opts(location, options).await
    }

    async fn get_opts(
        &self,
        location: &Path,
        options: object_store::GetOptions,
    ) -> object_store::Result<object_store::GetResult> {
        self.0.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: futures_util::stream::BoxStream<'static, object_store::Result<Path>>,
    ) -> futures_util::stream::BoxStream<'static, object_store::Result<Path>> {
        self.0.delete_stream(locations)
    }

    fn list(
        &self,
        prefix: Option<&Path>,
    ) -> futures_util::stream::BoxStream<'static, object_store::Result<object_store::ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(
        &self,
        prefix: Option<&Path>,
    ) -> object_store::Result<object_store::ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: object_store::CopyOptions,
    ) -> object_store::Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

/// Fails fast, for errors that are expected.
const IMPATIENT: Options =
    Options { retry_timeout: Duration::from_secs(1), request_timeout: Duration::from_secs(5) };

#[tokio::test]
async fn an_endpoint_without_an_answer_is_a_passing_matter() {
    // Port 9 of the loopback address: nobody listens.
    let config = S3Config {
        bucket: "bucket".to_owned(),
        endpoint: Some("http://127.0.0.1:9".to_owned()),
        access_key_id: Some("id".to_owned()),
        secret_access_key: Some(Secret::new("secret-text".to_owned())),
        allow_http: true,
        ..S3Config::default()
    };
    let error =
        storage::open_with(&StorageConfig::S3(config.clone()), Access::Write, IMPATIENT).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(error.hint().unwrap().contains("endpoint"));
    assert!(!format!("{error} {error:?} {config:?}").contains("secret-text"));

    let secure = S3Config { allow_http: false, ..config };
    let error = storage::open_with(&StorageConfig::S3(secure), Access::Read, IMPATIENT).await.unwrap_err();
    assert!(matches!(error, storage::Error::Misconfigured { .. }), "{error}");
}

/// The S3 server that the test harness has started, if it has.
fn s3() -> Option<S3Config> {
    let variable = |name: &str| std::env::var(format!("PGKEEP_TEST_S3_{name}")).ok();
    Some(S3Config {
        bucket: variable("BUCKET")?,
        prefix: format!("battery-{:x}", rand::random::<u32>()),
        endpoint: Some(variable("ENDPOINT")?),
        access_key_id: Some(variable("ACCESS_KEY")?),
        secret_access_key: Some(Secret::new(variable("SECRET_KEY")?)),
        allow_http: true,
        ..S3Config::default()
    })
}

fn raw_s3(config: &S3Config) -> object_store::aws::AmazonS3 {
    AmazonS3Builder::new()
        .with_bucket_name(&config.bucket)
        .with_endpoint(config.endpoint.as_deref().unwrap())
        .with_access_key_id(config.access_key_id.as_deref().unwrap())
        .with_secret_access_key(config.secret_access_key.as_ref().unwrap().reveal())
        .with_allow_http(true)
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_passes() {
    let Some(config) = s3() else { return };
    let store = storage::open(&StorageConfig::S3(config.clone()), Access::Write).await.unwrap();
    let raw = object_store::prefix::PrefixStore::new(raw_s3(&config), config.prefix.as_str());
    battery(store, Arc::new(raw)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_is_missing_is_unknown_and_is_made_for_writing() {
    let Some(config) = s3() else { return };
    let bucket = format!("missing-{:x}", rand::random::<u64>());
    let config = S3Config { bucket, ..config };
    let error =
        storage::open_with(&StorageConfig::S3(config.clone()), Access::Read, IMPATIENT).await.unwrap_err();
    assert!(matches!(error, storage::Error::Missing { .. }), "{error}");
    assert!(error.hint().unwrap().contains("bucket"));
    let store = Store::new(Arc::new(raw_s3(&config)), "", "s3://missing");
    let repository = Repository::new(store, "main", settings(Compression::Zstd));
    for error in [
        repository.read(wal(1)).await.unwrap_err(),
        repository.head(wal(1)).await.unwrap_err(),
        repository.get_range(pack(1), 0..1).await.unwrap_err(),
        repository.list(Folder::Segments, None).await.unwrap_err(),
        repository.delete([wal(1)]).await.unwrap_err(),
    ] {
        assert!(error.is_transient(), "{error:?}");
    }
    let store = storage::open(&StorageConfig::S3(config), Access::Write).await.unwrap();
    let repository = Repository::new(store, "main", settings(Compression::Zstd));
    assert!(repository.read(wal(1)).await.unwrap_err().is_not_found());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_key_is_denied_with_the_bucket_and_the_operation() {
    let Some(config) = s3() else { return };
    let secret = Secret::new("wrong-secret".to_owned());
    let config = S3Config { secret_access_key: Some(secret), ..config };
    let error = storage::open_with(&StorageConfig::S3(config), Access::Write, IMPATIENT).await.unwrap_err();
    assert!(matches!(error, storage::Error::Denied { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("list objects") && text.contains("s3://"), "{text}");
    assert!(!text.contains("wrong-secret"), "{text}");
}
