//! Writes a backup into an empty directory.
//!
//! The file list is read once, in order; runs of neighbouring frames are fetched, decoded and written on
//! several threads. Every frame is checked against its digest and every file against the CRC-32C that the
//! server computed. `global/pg_control` gets its name last: without it PostgreSQL does not start, so a
//! restore that was cut short can never be taken for a whole one.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::error::Error;
use crate::catalog::{BackupKeys, BackupRecord, EntryKind, FileEntry, FileListReader};
use crate::codec::{FrameFacts, OpeningKey};
use crate::observe::Progress;
use crate::repository::{BackupPart, FrameDecoder, FrameRef, ObjectName, Repository};

/// Stored bytes fetched in one request at most: enough to make a request worth its round trip.
const RUN_SIZE: u64 = 4 << 20;

/// A write from this size on is sent to disk at once; smaller ones are better gathered by the system.
pub(super) const LARGE_WRITE: usize = 512 << 10;

/// Stands in the target directory while a restore is under way. Whoever finds it knows that the directory
/// was empty before and holds nothing but the beginning of a restore. The same goes for the tablespace
/// directories it lists, each after a zero byte, and for no others.
const MARKER: &str = ".pgkeep-restore";

pub(super) const CONTROL_FILE: &[u8] = b"global/pg_control";

/// Where one tablespace goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceTarget {
    pub oid: u32,
    pub directory: PathBuf,
}

/// What is to be written where.
#[derive(Clone, Debug)]
pub struct Work {
    /// Absolute.
    pub directory: PathBuf,
    /// Of tablespaces outside the data directory; the others lie inside it.
    pub tablespaces: Vec<TablespaceTarget>,
    /// Runs of frames under way at a time; each takes about 6 MiB.
    pub parallelism: usize,
    /// Flush everything to disk before the restore counts as done.
    pub durable: bool,
}

impl Work {
    /// Where the entry of this path belongs. It is known to be a plain relative path.
    pub(super) fn place(&self, path: &[u8]) -> PathBuf {
        for target in &self.tablespaces {
            let prefix = format!("pg_tblspc/{}/", target.oid);
            if let Some(inside) = path.strip_prefix(prefix.as_bytes()) {
                return target.directory.join(OsStr::from_bytes(inside));
            }
        }
        let place = self.directory.join(OsStr::from_bytes(path));
        if path == CONTROL_FILE { waiting_name(&place) } else { place }
    }

    pub(super) fn is_tablespace_link(&self, path: &[u8]) -> bool {
        self.tablespaces.iter().any(|target| path == format!("pg_tblspc/{}", target.oid).as_bytes())
    }
}

/// What a directory holds before a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing, or it does not exist.
    Empty,
    /// The beginning of a restore that was cut short; it may be removed.
    Unfinished,
    /// A data directory that PostgreSQL could start.
    DataDirectory,
    Other,
}

/// Looks at what `directory` holds. `lost+found` counts as nothing.
pub fn look_at(directory: &Path) -> Result<Found, Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Empty),
        Err(error) => return Err(Error::io("read", directory, error)),
    };
    let mut empty = true;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("read", directory, error))?;
        empty &= entry.file_name() == "lost+found";
    }
    if empty {
        Ok(Found::Empty)
    } else if directory.join("global/pg_control").exists() {
        // Even with a marker: whoever was cut short after giving this name has left a whole data directory.
        Ok(Found::DataDirectory)
    } else if directory.join(MARKER).exists() {
        Ok(Found::Unfinished)
    } else {
        Ok(Found::Other)
    }
}

/// Whether `tablespace` may be filled by a restore into `directory`: it is empty, or holds only what a
/// restore into `directory` that was cut short has written there.
pub fn may_fill(directory: &Path, tablespace: &Path) -> Result<bool, Error> {
    if look_at(tablespace)? == Found::Empty {
        return Ok(true);
    }
    if look_at(directory)? != Found::Unfinished {
        return Ok(false);
    }
    let marker = directory.join(MARKER);
    let text = fs::read(&marker).map_err(|error| Error::io("read", &marker, error))?;
    Ok(text.split(|byte| *byte == 0).skip(1).any(|listed| listed == tablespace.as_os_str().as_bytes()))
}

/// Restores the files of `record`. What is needed to recover from there is written afterwards by
/// the recovery settings, and [`finish`] then makes the directory startable.
pub async fn restore_files(
    repository: &Repository,
    record: &BackupRecord,
    work: &Work,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<(), Error> {
    let keys = BackupKeys::open(record, &repository.settings().keys)?;
    prepare(work)?;
    progress.phase("restoring");
    progress.set_total(record.plaintext_bytes);
    let mut list = FileListReader::open(repository, record.name, record.files, keys.of(record.name)).await?;
    let mut writer = Writer::new(repository, record, work, &keys, progress);
    loop {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let Some(entry) = list.next().await? else { break };
        writer.entry(entry).await?;
    }
    writer.finish().await?;
    settle(work, progress).await
}

/// Brings what was written to disk and makes the links to tablespaces.
pub(super) async fn settle(work: &Work, progress: &Progress) -> Result<(), Error> {
    if work.durable {
        progress.phase("writing to disk");
        let tablespaces = work.tablespaces.iter().map(|target| &target.directory);
        for directory in [&work.directory].into_iter().chain(tablespaces) {
            sync_file_system(directory).await?;
        }
    }
    link_tablespaces(work)
}

/// Gives `global/pg_control` its name and removes the marker: from here on PostgreSQL can start.
pub fn finish(directory: &Path) -> Result<(), Error> {
    let control = directory.join("global/pg_control");
    let waiting = waiting_name(&control);
    fs::rename(&waiting, &control).map_err(|error| Error::io("rename", &waiting, error))?;
    sync_directory(&directory.join("global"))?;
    let marker = directory.join(MARKER);
    fs::remove_file(&marker).map_err(|error| Error::io("remove", &marker, error))?;
    sync_directory(directory)
}

fn waiting_name(control: &Path) -> PathBuf {
    let mut name = control.as_os_str().to_owned();
    name.push(".pgkeep");
    name.into()
}

/// Flushes a directory's entries to disk.
pub fn sync_directory(directory: &Path) -> Result<(), Error> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::io("flush", directory, error))
}

/// Flushes the whole file system: one call instead of one for each of what may be a million files.
async fn sync_file_system(directory: &Path) -> Result<(), Error> {
    let directory = directory.to_owned();
    blocking(move || {
        let file = File::open(&directory).map_err(|error| Error::io("open", &directory, error))?;
        rustix::fs::syncfs(&file).map_err(|error| Error::io("flush", &directory, error.into()))
    })
    .await
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Bug("a thread that writes files panicked"))?
}

/// Refuses directories that are in use, and makes those that are needed.
pub(super) fn prepare(work: &Work) -> Result<(), Error> {
    // Everything is looked at before anything is removed.
    for target in &work.tablespaces {
        if !may_fill(&work.directory, &target.directory)? {
            return Err(Error::NotEmpty(target.directory.clone()));
        }
    }
    let found = look_at(&work.directory)?;
    if matches!(found, Found::DataDirectory | Found::Other) {
        return Err(Error::NotEmpty(work.directory.clone()));
    }
    for target in &work.tablespaces {
        if look_at(&target.directory)? != Found::Empty {
            remove_contents(&target.directory)?;
        }
    }
    if found == Found::Unfinished {
        remove_contents(&work.directory)?;
    }
    for directory in
        [&work.directory].into_iter().chain(work.tablespaces.iter().map(|target| &target.directory))
    {
        fs::create_dir_all(directory).map_err(|error| Error::io("create", directory, error))?;
        // A volume's mount point belongs to whoever made the volume: what counts is that we can use it.
        if let Err(error) = fs::set_permissions(directory, Permissions::from_mode(0o700)) {
            tracing::warn!(directory = %directory.display(), %error, "the directory's mode stays as it is");
        }
    }
    let marker = work.directory.join(MARKER);
    let mut text = b"a restore is under way or was cut short; what is here may be removed\n".to_vec();
    for target in &work.tablespaces {
        text.push(0);
        text.extend_from_slice(target.directory.as_os_str().as_bytes());
    }
    fs::write(&marker, text).map_err(|error| Error::io("write", &marker, error))?;
    sync_directory(&work.directory)
}

fn remove_contents(directory: &Path) -> Result<(), Error> {
    let entries = fs::read_dir(directory).map_err(|error| Error::io("read", directory, error))?;
    let mut marker = None;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("read", directory, error))?;
        let path = entry.path();
        if entry.file_name() == "lost+found" {
            continue;
        }
        // The marker goes last, so that being cut short again is noticed again.
        if entry.file_name() == MARKER {
            marker = Some(path);
            continue;
        }
        let kind = entry.file_type().map_err(|error| Error::io("look at", &path, error))?;
        let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(|error| Error::io("remove", &path, error))?;
    }
    match marker {
        Some(path) => fs::remove_file(&path).map_err(|error| Error::io("remove", &path, error)),
        None => Ok(()),
    }
}

/// Links tablespaces at the very end, so that nothing was ever written through a link.
fn link_tablespaces(work: &Work) -> Result<(), Error> {
    let parent = work.directory.join("pg_tblspc");
    if !work.tablespaces.is_empty() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&parent)
            .map_err(|error| Error::io("create", &parent, error))?;
    }
    for target in &work.tablespaces {
        let link = parent.join(target.oid.to_string());
        std::os::unix::fs::symlink(&target.directory, &link)
            .map_err(|error| Error::io("create", &link, error))?;
    }
    sync_directory(&parent)
}

/// A file being written by several threads.
struct Target {
    path: PathBuf,
    size: u64,
    mode: u32,
    modified: i64,
    crc32c: u32,
    durable: bool,
    state: Mutex<TargetState>,
}

#[derive(Default)]
struct TargetState {
    file: Option<Arc<File>>,
    written: u64,
    /// Offset, length and CRC-32C of each stretch written.
    stretches: Vec<(u64, usize, u32)>,
}

impl Target {
    fn lock(&self) -> std::sync::MutexGuard<'_, TargetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Result<Arc<File>, Error> {
        let mut state = self.lock();
        if let Some(file) = &state.file {
            return Ok(Arc::clone(file));
        }
        // Nothing may be there yet: a path that comes twice would mix two files.
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&self.path)
            .map_err(|error| Error::io("create", &self.path, error))?;
        let file = Arc::new(file);
        state.file = Some(Arc::clone(&file));
        Ok(file)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let file = self.open()?;
        file.write_all_at(bytes, offset).map_err(|error| Error::io("write", &self.path, error))?;
        if self.durable && bytes.len() >= LARGE_WRITE {
            // Linux starts writing such pages to disk at once (mm/fadvise.c), so that the disk works while
            // the next frames are decoded, and the flush at the end finds little left.
            let length = std::num::NonZeroU64::new(bytes.len() as u64);
            let _ = rustix::fs::fadvise(&file, offset, length, rustix::fs::Advice::DontNeed);
        }
        let crc32c = crc32c::crc32c(bytes);
        let mut state = self.lock();
        state.stretches.push((offset, bytes.len(), crc32c));
        state.written += bytes.len() as u64;
        if state.written < self.size {
            return Ok(());
        }
        let stretches = std::mem::take(&mut state.stretches);
        state.file = None;
        drop(state);
        self.complete(&file, stretches)
    }

    fn complete(&self, file: &File, mut stretches: Vec<(u64, usize, u32)>) -> Result<(), Error> {
        stretches.sort_unstable();
        let whole = stretches
            .iter()
            .fold(0, |whole, (_, length, crc32c)| crc32c::crc32c_combine(whole, *crc32c, *length));
        if whole != self.crc32c {
            return Err(Error::Damaged(format!(
                "`{}` does not have the checksum that the server gave it",
                self.path.display()
            )));
        }
        let modified =
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(self.modified).unwrap_or(0));
        file.set_permissions(Permissions::from_mode(self.mode))
            .and_then(|()| file.set_modified(modified))
            .map_err(|error| Error::io("set the mode of", &self.path, error))
    }
}

/// Where a stretch of a decoded frame goes.
struct Destination {
    target: Arc<Target>,
    offset: u64,
    skip: u32,
    take: u32,
}

/// Neighbouring frames of one pack, fetched in one request.
#[derive(Default)]
struct FrameRun {
    frames: Vec<(FrameRef, Vec<Destination>)>,
}

impl FrameRun {
    /// Whether `frame` follows directly and still fits.
    fn takes(&self, frame: &FrameRef) -> bool {
        let (Some((first, _)), Some((last, _))) = (self.frames.first(), self.frames.last()) else {
            return true;
        };
        last.pack == frame.pack
            && last.offset + u64::from(last.stored_length) == frame.offset
            && frame.offset + u64::from(frame.stored_length) - first.offset <= RUN_SIZE
    }
}

struct Writer<'a> {
    repository: &'a Repository,
    record: &'a BackupRecord,
    work: &'a Work,
    keys: &'a BackupKeys,
    progress: &'a Progress,
    made: HashSet<PathBuf>,
    run: FrameRun,
    under_way: JoinSet<Result<FrameDecoder, Error>>,
    decoders: Vec<FrameDecoder>,
    empty: Vec<Arc<Target>>,
    files: u64,
    saw_control_file: bool,
}

impl<'a> Writer<'a> {
    fn new(
        repository: &'a Repository,
        record: &'a BackupRecord,
        work: &'a Work,
        keys: &'a BackupKeys,
        progress: &'a Progress,
    ) -> Self {
        Self {
            repository,
            record,
            work,
            keys,
            progress,
            made: HashSet::new(),
            run: FrameRun::default(),
            under_way: JoinSet::new(),
            decoders: Vec::new(),
            empty: Vec::new(),
            files: 0,
            saw_control_file: false,
        }
    }

    fn make_directory(&mut self, directory: &Path, mode: u32) -> Result<(), Error> {
        fs::create_dir_all(directory)
            .and_then(|()| fs::set_permissions(directory, Permissions::from_mode(mode | 0o700)))
            .map_err(|error| Error::io("create", directory, error))?;
        self.made.insert(directory.to_owned());
        Ok(())
    }

    async fn entry(&mut self, entry: FileEntry) -> Result<(), Error> {
        let FileEntry { path, mode, kind } = entry;
        let path = path.as_bytes();
        let place = self.work.place(path);
        match kind {
            // The links are made at the end, to where the tablespaces go now.
            EntryKind::Directory | EntryKind::Symlink { .. } if self.work.is_tablespace_link(path) => Ok(()),
            EntryKind::Directory => self.make_directory(&place, mode),
            EntryKind::Symlink { .. } => Err(Error::Damaged(format!(
                "the backup holds a link `{}`, which PostgreSQL does not make",
                String::from_utf8_lossy(path)
            ))),
            EntryKind::File { size, mtime: modified, crc32c, extents } => {
                if let Some(parent) = place.parent()
                    && !self.made.contains(parent)
                {
                    self.make_directory(parent, 0o700)?;
                }
                self.saw_control_file |= path == CONTROL_FILE;
                self.files += 1;
                let state = Mutex::default();
                let durable = self.work.durable;
                let target = Arc::new(Target { path: place, size, mode, modified, crc32c, durable, state });
                let mut offset = 0;
                for extent in extents {
                    let destination = Destination {
                        target: Arc::clone(&target),
                        offset,
                        skip: extent.skip,
                        take: extent.take,
                    };
                    offset += u64::from(extent.take);
                    self.add(extent.frame, destination).await?;
                }
                if offset == 0 {
                    self.empty.push(target);
                    if self.empty.len() >= 256 {
                        self.write_empty().await?;
                    }
                }
                Ok(())
            }
        }
    }

    async fn add(&mut self, frame: FrameRef, destination: Destination) -> Result<(), Error> {
        if let Some((last, destinations)) = self.run.frames.last_mut()
            && *last == frame
        {
            destinations.push(destination);
            return Ok(());
        }
        if !self.run.takes(&frame) {
            self.start_run().await?;
        }
        self.run.frames.push((frame, vec![destination]));
        Ok(())
    }

    async fn start_run(&mut self) -> Result<(), Error> {
        let run = std::mem::take(&mut self.run);
        if run.frames.is_empty() {
            return Ok(());
        }
        while self.under_way.len() >= self.work.parallelism.max(1) {
            self.run_done().await?;
        }
        let decoder = self.decoders.pop().unwrap_or_default();
        let key = run.frames.first().and_then(|(frame, _)| self.keys.of(frame.pack.backup)).cloned();
        self.under_way.spawn(write_run(self.repository.clone(), run, key, decoder, self.progress.clone()));
        Ok(())
    }

    async fn run_done(&mut self) -> Result<(), Error> {
        if let Some(done) = self.under_way.join_next().await {
            let decoder = done.map_err(|_| Error::Bug("a task that restores frames panicked"))??;
            self.decoders.push(decoder);
        }
        Ok(())
    }

    async fn write_empty(&mut self) -> Result<(), Error> {
        let targets = std::mem::take(&mut self.empty);
        blocking(move || targets.iter().try_for_each(|target| target.write(0, &[]))).await
    }

    async fn finish(mut self) -> Result<(), Error> {
        self.start_run().await?;
        while !self.under_way.is_empty() {
            self.run_done().await?;
        }
        self.write_empty().await?;
        // The manifest is in the list and not in the server's count.
        if self.files != self.record.file_count + 1 || !self.saw_control_file {
            return Err(Error::Damaged(format!(
                "the file list of backup `{}` names {} files, its record {}",
                self.record.name,
                self.files,
                self.record.file_count + 1
            )));
        }
        Ok(())
    }
}

async fn write_run(
    repository: Repository,
    run: FrameRun,
    key: Option<OpeningKey>,
    mut decoder: FrameDecoder,
    progress: Progress,
) -> Result<FrameDecoder, Error> {
    let (Some((first, _)), Some((last, _))) = (run.frames.first(), run.frames.last()) else {
        return Ok(decoder);
    };
    let start = first.offset;
    let range = start..last.offset + u64::from(last.stored_length);
    let part = BackupPart::Pack(first.pack.number);
    let name = ObjectName::Backup { backup: first.pack.backup, part };
    let stored: Bytes = repository.get_range(name, range).await?;
    blocking(move || {
        let (mut raw, mut opened) = (Vec::new(), Vec::new());
        for (frame, destinations) in &run.frames {
            let at = usize::try_from(frame.offset - start).unwrap_or(usize::MAX);
            let bytes = stored.get(at..at.saturating_add(frame.stored_length as usize));
            let bytes = bytes
                .ok_or_else(|| Error::Damaged(format!("`{name}` is shorter than the file list says")))?;
            let damaged = |why: &dyn std::fmt::Display| {
                Error::Damaged(format!("`{name}`, frame at {}: {why}", frame.offset))
            };
            match &key {
                None => decoder.decode(frame, bytes, &mut raw).map_err(|error| damaged(&error))?,
                Some(key) => {
                    key.open_frame(frame.pack.number, frame.offset, bytes, &mut opened)
                        .map_err(|error| damaged(&error))?;
                    let facts = FrameFacts {
                        stored_length: u32::try_from(opened.len()).unwrap_or(u32::MAX),
                        ..FrameFacts::from(frame)
                    };
                    decoder.decode(facts, &opened, &mut raw).map_err(|error| damaged(&error))?;
                }
            }
            for destination in destinations {
                let (skip, take) = (destination.skip as usize, destination.take as usize);
                let bytes = raw
                    .get(skip..skip.saturating_add(take))
                    .ok_or_else(|| Error::Damaged(format!("`{name}` holds less than the file list says")))?;
                destination.target.write(destination.offset, bytes)?;
                progress.add(bytes.len() as u64);
            }
        }
        Ok(decoder)
    })
    .await
}
