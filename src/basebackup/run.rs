//! Takes one base backup.
//!
//! The server's stream is parsed as it arrives and cut into frames; frames are encoded on several
//! threads, put into packs in order, and the packs go to storage while the next ones fill. Nothing
//! touches the local disk, and what is in memory is a handful of frames and upload parts. The record is
//! written last, when every pack, the file list and the WAL up to the backup's end are stored.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::error::Error;
use super::framing::{Framer, RawFrame};
use crate::catalog::{
    BackupFrom, BackupRecord, ENCRYPTED_RECORD_FORMAT, EntryPath, FileListRecord, FileListWriter, PackUse,
    RECORD_FORMAT, TablespaceRecord, WrappedKey, new_backup_key,
};
use crate::codec::{TarEntry, TarEvent, TarKind, TarStream};
use crate::observe::Progress;
use crate::postgres::{
    BackupEvent, BackupLabel, BackupSource, BaseBackupOptions, Connection, Lsn, ManifestCheck,
    SystemIdentity, Tablespace, TimelineId,
};
use crate::repository::{
    BackupName, BackupPart, EncodedFrame, Facts, FrameEncoder, FrameRef, ObjectName, PackId, PackWriter,
    Repository, SealingKey,
};
use crate::runtime::Clock;

/// A pack is finished when it has grown to this many stored bytes.
const PACK_SIZE: u64 = 64 << 20;

/// Frames handed over beyond those being encoded, so that no encoder waits for the stream. Each is 1 MiB
/// and an encoder of another 1.5.
const QUEUED: usize = 2;

/// What the caller wants of a backup.
#[derive(Clone, Debug)]
pub struct Request {
    /// Fast or spread checkpoint, rate limit, label.
    pub options: BaseBackupOptions,
    /// The user's own words, kept in the record.
    pub note: Option<String>,
    pub host: String,
    /// Frames encoded at a time; each takes about 4 MiB with its input, output and compressor.
    pub parallelism: usize,
}

/// Where a backup comes from and where it goes.
pub struct Ends<'a> {
    pub connection: &'a mut Connection,
    pub identity: SystemIdentity,
    pub repository: &'a Repository,
}

/// Takes a base backup over `connection` and returns its record, which is then stored.
///
/// `wal_stored` resolves when the WAL of the given timeline is stored up to the given position.
pub async fn take<W, F>(
    ends: Ends<'_>,
    request: &Request,
    clock: &dyn Clock,
    progress: &Progress,
    wal_stored: W,
    cancel: &CancellationToken,
) -> Result<BackupRecord, Error>
where
    W: FnOnce(TimelineId, Lsn, Lsn) -> F,
    F: Future<Output = Result<(), String>>,
{
    let Ends { connection, identity, repository } = ends;
    let name = claim(repository, request, clock).await?;
    let start_time = clock.now();
    let key = repository.settings().keys.writing();
    let mut sealing = key.map(|key| new_backup_key(name, key));
    info!(backup = %name, key = key.map(|key| key.id().as_str()), "starting base backup");
    let result = tokio::select! { biased;
        () = cancel.cancelled() => Err(Error::Cancelled),
        result = Box::pin(collect(connection, repository, request, name, sealing.as_mut(), progress)) => result,
    };
    let collected = match result {
        Ok(collected) => collected,
        Err(error) => {
            give_up(repository, name).await;
            return Err(error);
        }
    };
    let stop_time = clock.now();
    progress.phase("waiting for the WAL up to the end of the backup");
    let waited = tokio::select! { biased;
        () = cancel.cancelled() => Err(Error::Cancelled),
        waited = wal_stored(collected.timeline, collected.start_lsn, collected.stop_lsn) =>
            waited.map_err(|why| Error::Wal(collected.stop_lsn, why)),
    };
    if let Err(error) = waited {
        give_up(repository, name).await;
        return Err(error);
    }
    let mut record = collected.into_record(name, &identity, request, start_time, stop_time);
    if let (Some(key), Some(sealing)) = (key, &sealing) {
        record.format = ENCRYPTED_RECORD_FORMAT;
        record.keys = vec![WrappedKey::of(name, key, sealing)];
    }
    publish(repository, &record, sealing.as_ref()).await?;
    info!(backup = %name, plaintext = record.plaintext_bytes, stored = record.stored_bytes, "base backup stored");
    Ok(record)
}

/// What the stream and its storing yielded.
struct Collected {
    timeline: TimelineId,
    start_lsn: Lsn,
    stop_timeline: TimelineId,
    stop_lsn: Lsn,
    backup_from: BackupFrom,
    checksum_failures: Option<String>,
    tablespaces: Vec<TablespaceRecord>,
    packs: Vec<PackUse>,
    files: FileListRecord,
    file_count: u64,
    plaintext_bytes: u64,
}

impl Collected {
    fn into_record(
        self,
        name: BackupName,
        identity: &SystemIdentity,
        request: &Request,
        start_time: Timestamp,
        stop_time: Timestamp,
    ) -> BackupRecord {
        let stored_bytes =
            self.packs.iter().map(|pack| pack.stored_length).sum::<u64>() + self.files.stored_length;
        BackupRecord {
            format: RECORD_FORMAT,
            name,
            system_identifier: identity.system_identifier,
            server_version_num: identity.server_version_num,
            segment_size: identity.segment_size,
            timeline: self.timeline,
            start_lsn: self.start_lsn,
            stop_timeline: self.stop_timeline,
            stop_lsn: self.stop_lsn,
            start_time,
            stop_time,
            note: request.note.clone(),
            backup_from: self.backup_from,
            host: request.host.clone(),
            pgkeep_version: env!("CARGO_PKG_VERSION").to_owned(),
            plaintext_bytes: self.plaintext_bytes,
            stored_bytes,
            file_count: self.file_count,
            tablespaces: self.tablespaces,
            packs: self.packs,
            files: self.files,
            manifest_digest: None,
            checksum_failures: self.checksum_failures,
            keys: Vec::new(),
            proof: None,
        }
    }
}

/// Takes a name for the backup by creating its first object. Two backups begun in the same second would
/// share a name; the later one waits for the next second.
async fn claim(repository: &Repository, request: &Request, clock: &dyn Clock) -> Result<BackupName, Error> {
    loop {
        let name = BackupName::from_timestamp(clock.now());
        let claim = serde_json::json!({
            "host": request.host,
            "process": std::process::id(),
            "nonce": format!("{:016x}", rand::random::<u64>()),
        });
        let part = ObjectName::Backup { backup: name, part: BackupPart::Started };
        match repository.put(part, claim.to_string().into(), Facts::default()).await {
            Ok(_) => return Ok(name),
            Err(crate::repository::Error::Conflict { .. }) => {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes what an unfinished backup has stored. What this cannot remove is swept later, and is never
/// listed meanwhile.
async fn give_up(repository: &Repository, name: BackupName) {
    let removal = async {
        let parts = repository.list(crate::repository::Folder::BackupParts(name), None).await?;
        repository.delete(parts.into_iter().map(|part| part.name)).await
    };
    match tokio::time::timeout(Duration::from_secs(5), removal).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => warn!(backup = %name, %error, "the unfinished backup will be swept later"),
        Err(_) => warn!(backup = %name, "the unfinished backup will be swept later"),
    }
}

/// Stores the record, then makes sure that no sweep has begun meanwhile: a sweep removes the claim first
/// and looks for the record after that, so one of the two always notices the other.
async fn publish(
    repository: &Repository,
    record: &BackupRecord,
    sealing: Option<&SealingKey>,
) -> Result<(), Error> {
    let name = |part| ObjectName::Backup { backup: record.name, part };
    let json = sealing.map_or_else(|| record.encode(), |key| record.encode_proven(key));
    repository.put(name(BackupPart::Record), json.into(), Facts::default()).await?;
    match repository.head(name(BackupPart::Started)).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => {
            repository.delete([name(BackupPart::Record)]).await?;
            Err(Error::Swept)
        }
        // The record stands; a sweep within this minute would need a claim an hour old.
        Err(error) => {
            warn!(backup = %record.name, %error, "the claim could not be checked again");
            Ok(())
        }
    }
}

async fn collect(
    connection: &mut Connection,
    repository: &Repository,
    request: &Request,
    name: BackupName,
    sealing: Option<&mut SealingKey>,
    progress: &Progress,
) -> Result<Collected, Error> {
    progress.phase("waiting for the checkpoint");
    let start = connection.base_backup(&request.options).await?;
    let total: u64 = start.tablespaces.iter().filter_map(|tablespace| tablespace.size_kb).sum();
    progress.phase("backing up");
    progress.set_total(total << 10);

    let mut sink = Sink::new(repository, name, request.parallelism, sealing);
    let mut reader = StreamReader::default();
    let finished = loop {
        match connection.next_backup().await? {
            BackupEvent::ArchiveStart { tablespace } => reader.begin_archive(tablespace)?,
            BackupEvent::ManifestStart => reader.begin_manifest(&mut sink)?,
            BackupEvent::Data(bytes) => {
                progress.add(bytes.len() as u64);
                reader.data(bytes, &mut sink)?;
                sink.encode(false).await?;
            }
            BackupEvent::Progress(_) => {}
            BackupEvent::Finished { stop_lsn, timeline, checksum_failure } => {
                break (stop_lsn, timeline, checksum_failure);
            }
        }
    };
    let (stop_lsn, stop_timeline, checksum_failure) = finished;
    let read = reader.finish(&mut sink)?;
    let (packs, files) = sink.finish().await?;
    if let Some(failure) = &checksum_failure {
        warn!(backup = %name, server = %failure, "the server found checksum failures; the backup is kept and marked");
    }
    Ok(Collected {
        timeline: start.timeline,
        start_lsn: start.start_lsn,
        stop_timeline,
        stop_lsn,
        backup_from: read.backup_from,
        checksum_failures: checksum_failure.map(|failure| failure.to_string()),
        tablespaces: read.tablespaces,
        packs,
        files,
        file_count: read.file_count,
        plaintext_bytes: read.plaintext_bytes,
    })
}

/// The stream's archives, read into files.
#[derive(Default)]
struct StreamReader {
    tar: Option<TarStream>,
    in_manifest: bool,
    /// What goes before the paths of the archive at hand.
    prefix: Vec<u8>,
    events: Vec<TarEvent>,
    check: ManifestCheck,
    /// `backup_label`, kept to learn what kind of server wrote it.
    label: Vec<u8>,
    in_label: bool,
    read: Read,
}

struct Read {
    file_count: u64,
    plaintext_bytes: u64,
    tablespaces: Vec<TablespaceRecord>,
    backup_from: BackupFrom,
}

impl Default for Read {
    fn default() -> Self {
        Self { file_count: 0, plaintext_bytes: 0, tablespaces: Vec::new(), backup_from: BackupFrom::Primary }
    }
}

impl StreamReader {
    fn end_archive(&mut self) -> Result<(), Error> {
        match self.tar.take() {
            Some(tar) => Ok(tar.finish()?),
            None => Ok(()),
        }
    }

    fn begin_archive(&mut self, tablespace: Option<Tablespace>) -> Result<(), Error> {
        self.end_archive()?;
        self.tar = Some(TarStream::default());
        self.prefix.clear();
        if let Some(Tablespace { oid: Some(oid), location, .. }) = tablespace {
            self.prefix = format!("pg_tblspc/{oid}/").into_bytes();
            let location = location.unwrap_or_default();
            self.read.tablespaces.push(TablespaceRecord { oid, location, plaintext_bytes: 0 });
        }
        Ok(())
    }

    fn begin_manifest(&mut self, sink: &mut Sink<'_>) -> Result<(), Error> {
        self.end_archive()?;
        self.in_manifest = true;
        let path = b"backup_manifest".to_vec();
        let place = EntryPath::new(path.clone())?;
        let kind = TarKind::File { size: 0 };
        let entry = TarEntry { path, kind, mode: 0o600, modified: 0 };
        sink.framer.begin(place, entry, &mut sink.frames);
        Ok(())
    }

    fn data(&mut self, bytes: Bytes, sink: &mut Sink<'_>) -> Result<(), Error> {
        if self.in_manifest {
            self.check.manifest(&bytes)?;
            sink.framer.data(&bytes, &mut sink.frames);
            return Ok(());
        }
        let Some(tar) = &mut self.tar else { return Err(Error::Bug("data before an archive")) };
        tar.push(bytes, &mut self.events)?;
        for event in self.events.drain(..) {
            match event {
                TarEvent::Entry(entry) => {
                    let path = [self.prefix.as_slice(), &entry.path].concat();
                    self.in_label = path == b"backup_label";
                    sink.framer.begin(EntryPath::new(path)?, entry, &mut sink.frames);
                }
                TarEvent::Data(data) => {
                    if self.in_label && self.label.len() < 8192 {
                        self.label.extend_from_slice(&data);
                    }
                    sink.framer.data(&data, &mut sink.frames);
                }
                TarEvent::EndOfFile => {
                    let Some((path, length, crc32c)) = sink.framer.end(&mut sink.frames) else {
                        return Err(Error::Bug("a file ended that had not begun"));
                    };
                    self.check.file(path.as_bytes(), length, crc32c);
                    self.read.file_count += 1;
                    self.read.plaintext_bytes += length;
                    if !self.prefix.is_empty()
                        && let Some(tablespace) = self.read.tablespaces.last_mut()
                    {
                        tablespace.plaintext_bytes += length;
                    }
                }
            }
        }
        Ok(())
    }

    fn finish(mut self, sink: &mut Sink<'_>) -> Result<Read, Error> {
        self.end_archive()?;
        sink.framer.end(&mut sink.frames);
        sink.framer.finish(&mut sink.frames);
        self.check.finish()?;
        self.read.backup_from = match BackupLabel::parse(&self.label)?.source {
            BackupSource::Primary => BackupFrom::Primary,
            BackupSource::Standby => BackupFrom::Standby,
        };
        Ok(self.read)
    }
}

/// Frames on their way into packs.
struct Sink<'a> {
    repository: &'a Repository,
    name: BackupName,
    framer: Framer,
    /// Cut and not yet being encoded.
    frames: Vec<RawFrame>,
    /// Being encoded or about to be, in order.
    encoding: VecDeque<JoinHandle<(FrameEncoder, EncodedFrame)>>,
    parallelism: usize,
    /// Encoders at rest: their contexts are costly to make.
    encoders: Vec<FrameEncoder>,
    pack: Option<OpenPack>,
    /// At most one pack waits for storage to confirm it while the next one fills: each holds up to three
    /// upload parts in memory.
    finishing: tokio::task::JoinSet<Result<PackUse, crate::repository::Error>>,
    packs: Vec<PackUse>,
    list: FileListWriter,
    /// The backup's own key, when it is encrypted.
    sealing: Option<&'a mut SealingKey>,
}

struct OpenPack {
    number: u32,
    writer: PackWriter,
}

impl<'a> Sink<'a> {
    fn new(
        repository: &'a Repository,
        name: BackupName,
        parallelism: usize,
        mut sealing: Option<&'a mut SealingKey>,
    ) -> Self {
        let list_sealer = sealing.as_mut().map(|key| key.list());
        Self {
            repository,
            name,
            framer: Framer::default(),
            frames: Vec::new(),
            encoding: VecDeque::new(),
            parallelism: parallelism.max(1),
            encoders: Vec::new(),
            pack: None,
            finishing: tokio::task::JoinSet::new(),
            packs: Vec::new(),
            list: FileListWriter::new(repository, name, Facts::default(), list_sealer),
            sealing,
        }
    }

    /// Sends cut frames to be encoded, and places encoded ones when there are enough under way, or all
    /// of them when `all` is set.
    async fn encode(&mut self, all: bool) -> Result<(), Error> {
        for frame in std::mem::take(&mut self.frames) {
            while self.encoding.len() >= self.parallelism + QUEUED {
                self.place_next().await?;
            }
            let mut encoder = self.encoders.pop().unwrap_or_else(|| self.new_encoder());
            self.encoding.push_back(tokio::task::spawn_blocking(move || {
                let encoded = encoder.encode(&frame.bytes);
                (encoder, encoded)
            }));
        }
        while all && !self.encoding.is_empty() {
            self.place_next().await?;
        }
        while let Some(entry) = self.framer.next_entry() {
            self.list.add(&entry).await?;
        }
        Ok(())
    }

    /// Waits for the oldest frame under way and appends it to the pack at hand.
    async fn place_next(&mut self) -> Result<(), Error> {
        let Some(oldest) = self.encoding.pop_front() else { return Ok(()) };
        let (encoder, frame) = oldest.await.map_err(|_| Error::Bug("a frame could not be encoded"))?;
        self.encoders.push(encoder);
        let mut pack = match self.pack.take() {
            Some(pack) => pack,
            None => self.next_pack()?,
        };
        let offset = pack.writer.length();
        pack.writer.append(frame.stored).await?;
        let frame_ref = FrameRef {
            pack: PackId { backup: self.name, number: pack.number },
            offset,
            stored_length: u32::try_from(pack.writer.length() - offset).unwrap_or(u32::MAX),
            raw_length: frame.raw_length,
            compression: frame.compression,
            digest: frame.digest,
        };
        self.framer.place(frame_ref);
        if pack.writer.length() >= PACK_SIZE {
            self.finish_pack(pack).await?;
        } else {
            self.pack = Some(pack);
        }
        Ok(())
    }

    fn new_encoder(&self) -> FrameEncoder {
        let settings = self.repository.settings();
        FrameEncoder::new(settings.compression, settings.level)
    }

    fn next_pack(&mut self) -> Result<OpenPack, Error> {
        let number = self.packs.len() + self.finishing.len() + 1;
        let number = u32::try_from(number).map_err(|_| Error::Bug("too many packs"))?;
        let part = BackupPart::Pack(number);
        let sealer = self.sealing.as_mut().map(|key| key.pack(number));
        let writer = self.repository.pack_writer(ObjectName::Backup { backup: self.name, part }, sealer);
        Ok(OpenPack { number, writer })
    }

    async fn finish_pack(&mut self, pack: OpenPack) -> Result<(), Error> {
        while !self.finishing.is_empty() {
            self.pack_finished().await?;
        }
        let OpenPack { number, writer } = pack;
        let stored_length = writer.length();
        let backup = self.name;
        self.finishing.spawn(async move {
            writer.finish().await?;
            Ok(PackUse { backup, number, stored_length })
        });
        Ok(())
    }

    async fn pack_finished(&mut self) -> Result<(), Error> {
        if let Some(done) = self.finishing.join_next().await {
            self.packs.push(done.map_err(|_| Error::Bug("a pack could not be finished"))??);
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(Vec<PackUse>, FileListRecord), Error> {
        self.encode(true).await?;
        if !self.framer.is_empty() {
            return Err(Error::Bug("files were left without their frames"));
        }
        if let Some(pack) = self.pack.take() {
            self.finish_pack(pack).await?;
        }
        while !self.finishing.is_empty() {
            self.pack_finished().await?;
        }
        self.packs.sort_by_key(|pack| pack.number);
        let files = FileListRecord::from(&self.list.finish().await?);
        Ok((self.packs, files))
    }
}
