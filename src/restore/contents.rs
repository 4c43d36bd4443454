//! Writes a backup that comes as streams of files: one of PGHoard's.
//!
//! Several parts are read at a time, each by a task of its own, and written on blocking threads. A part
//! whose stream ends with an error fails the restore, which leaves its marker: what is there is the
//! beginning of a restore, and PostgreSQL does not start on it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::apply::{CONTROL_FILE, LARGE_WRITE, Work, blocking, prepare, settle};
use super::error::Error;
use crate::catalog::{Content, EntryPath, PghoardError};
use crate::observe::Progress;

/// Files without which a directory is no base backup.
const REQUIRED: [&[u8]; 3] = [b"PG_VERSION", b"backup_label", CONTROL_FILE];

/// Restores all `parts`, each of which `open` makes a stream of. `name` is that of the backup. As with
/// [`restore_files`](super::restore_files), recovery settings and [`finish`](super::finish) follow.
pub async fn restore_contents<P, S>(
    name: &str,
    parts: impl IntoIterator<Item = P>,
    open: impl Fn(P) -> S,
    work: &Work,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<(), Error>
where
    S: Stream<Item = Result<Vec<Content>, PghoardError>> + Send + Unpin + 'static,
{
    prepare(work)?;
    progress.phase("restoring");
    let shared = Arc::new(work.clone());
    let (mut under_way, mut links) = (JoinSet::new(), Vec::new());
    for part in parts {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        while under_way.len() >= work.parallelism.max(1) {
            links.extend(part_done(&mut under_way).await?);
        }
        under_way.spawn(write_part(open(part), Arc::clone(&shared), progress.clone(), cancel.clone()));
    }
    while !under_way.is_empty() {
        links.extend(part_done(&mut under_way).await?);
    }
    for required in REQUIRED {
        if !work.place(required).exists() {
            let file = String::from_utf8_lossy(required);
            return Err(Error::Damaged(format!("backup `{name}` has no `{file}`")));
        }
    }
    for (path, target) in links {
        link(work, &path, &target)?;
    }
    settle(work, progress).await
}

type Links = Vec<(EntryPath, Vec<u8>)>;

async fn part_done(under_way: &mut JoinSet<Result<Links, Error>>) -> Result<Links, Error> {
    match under_way.join_next().await {
        Some(done) => done.map_err(|_| Error::Bug("a task that restores files panicked"))?,
        None => Ok(Links::new()),
    }
}

async fn write_part(
    mut contents: impl Stream<Item = Result<Vec<Content>, PghoardError>> + Send + Unpin,
    work: Arc<Work>,
    progress: Progress,
    cancel: CancellationToken,
) -> Result<Links, Error> {
    let mut writer = PartWriter { work, progress, current: None, links: Links::new() };
    while let Some(batch) = contents.next().await {
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let batch = batch?;
        writer = blocking(move || {
            batch.into_iter().try_for_each(|content| writer.write(content))?;
            Ok(writer)
        })
        .await?;
    }
    if writer.current.is_some() {
        return Err(Error::Bug("a stream ended within a file"));
    }
    Ok(writer.links)
}

/// Writes the files of one part.
struct PartWriter {
    work: Arc<Work>,
    progress: Progress,
    current: Option<Writing>,
    links: Links,
}

struct Writing {
    file: File,
    path: PathBuf,
    modified: i64,
    length: u64,
}

impl PartWriter {
    fn write(&mut self, content: Content) -> Result<(), Error> {
        match content {
            Content::Directory { path, mode } => self.directory(&path, mode),
            Content::File { path, mode, modified } => self.begin(&path, mode, modified),
            Content::Symlink { path, .. } if self.work.is_tablespace_link(path.as_bytes()) => Ok(()),
            Content::Symlink { path, target } => {
                self.links.push((path, target));
                Ok(())
            }
            Content::Data(data) => {
                let Some(writing) = &mut self.current else { return Err(OUT_OF_ORDER) };
                writing.file.write_all(&data).map_err(|error| Error::io("write", &writing.path, error))?;
                if self.work.durable && data.len() >= LARGE_WRITE {
                    let length = std::num::NonZeroU64::new(data.len() as u64);
                    let dont_need = rustix::fs::Advice::DontNeed;
                    let _ = rustix::fs::fadvise(&writing.file, writing.length, length, dont_need);
                }
                writing.length += data.len() as u64;
                self.progress.add(data.len() as u64);
                Ok(())
            }
            Content::EndOfFile => {
                let Some(Writing { file, path, modified, .. }) = self.current.take() else {
                    return Err(OUT_OF_ORDER);
                };
                let seconds = Duration::from_secs(u64::try_from(modified).unwrap_or(0));
                file.set_modified(SystemTime::UNIX_EPOCH + seconds)
                    .map_err(|error| Error::io("set the time of", &path, error))
            }
        }
    }

    fn directory(&self, path: &EntryPath, mode: u32) -> Result<(), Error> {
        if self.work.is_tablespace_link(path.as_bytes()) {
            return Ok(());
        }
        let place = self.work.place(path.as_bytes());
        make_directory(&place)?;
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o7777 | 0o700);
        fs::set_permissions(&place, permissions).map_err(|error| Error::io("set the mode of", &place, error))
    }

    fn begin(&mut self, path: &EntryPath, mode: u32, modified: i64) -> Result<(), Error> {
        let place = self.work.place(path.as_bytes());
        // Nothing may be there yet: a path that comes twice would mix two files.
        let create =
            || OpenOptions::new().write(true).create_new(true).mode(mode & 0o777 | 0o600).open(&place);
        let file = match create() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_directory(place.parent().unwrap_or(&place))?;
                create()
            }
            other => other,
        };
        let file = match file {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Damaged(format!("the backup holds `{path}` twice")));
            }
            Err(error) => return Err(Error::io("create", &place, error)),
        };
        self.current = Some(Writing { file, path: place, modified, length: 0 });
        Ok(())
    }
}

const OUT_OF_ORDER: Error = Error::Bug("content that belongs to no file");

fn make_directory(directory: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|error| Error::io("create", directory, error))
}

/// Makes a link that the data directory had, such as one to a configuration file. Never in a place that
/// something else has, and only in the data directory itself: links are made when nothing is written any
/// more, so nothing is ever written through one.
fn link(work: &Work, path: &EntryPath, target: &[u8]) -> Result<(), Error> {
    let place = work.place(path.as_bytes());
    let shown = String::from_utf8_lossy(target);
    if path.components().count() > 1 || place.exists() {
        tracing::warn!(path = %path, target = %shown, "the backup holds a link, which is left out");
        return Ok(());
    }
    tracing::warn!(path = %path, target = %shown, "the backup holds a link to elsewhere: see that its target is there");
    std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), &place)
        .map_err(|error| Error::io("create", &place, error))
}
