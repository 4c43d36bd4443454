//! What PGHoard left on local disk when it was stopped: WAL received but not yet stored.
//!
//! Before anything is streamed it is stored, so that the archive ends where PGHoard's work ended, even when
//! the server has recycled that WAL since. A file goes only when storage has confirmed its content. What
//! cannot be verified, or belongs elsewhere, stays where it is and is named in the log.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::site::{Site, chain};
use crate::observe::names;
use crate::postgres::{
    LongHeader, PageHeader, SegmentName, Tail, WAL_PAGE_BYTES, WalFileName, check_pages, check_segment_start,
};
use crate::repository::{self, Facts, ObjectName, ObjectReader, Repository};
use crate::runtime::{RetryPolicy, Stopped, retry};
use crate::serve;
use crate::storage::{self, Access, StorageConfig};

/// PGHoard's folders below `backup_location/PREFIX`.
const INCOMING: &str = "xlog_incoming";
const COMPRESSED: [&str; 2] = ["xlog", "timeline"];
const BACKUPS: [&str; 2] = ["basebackup", "basebackup_incoming"];

/// PGHoard's segments have 16 MiB; what is longer than this is none of its unfinished ones.
const LONGEST_PARTIAL: u64 = 64 << 20;
const CHUNK: usize = 512 << 10;

/// Storage that is away at start is waited for this long with each file; the next start tries again.
const RETRY: RetryPolicy = RetryPolicy {
    first: Duration::from_millis(500),
    max: Duration::from_secs(15),
    give_up_after: Some(Duration::from_mins(5)),
};

/// Why a file stays.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Archive(#[from] serve::ArchiveError),
    #[error(transparent)]
    Repository(#[from] repository::Error),
    #[error(transparent)]
    Storage(#[from] storage::Error),
    #[error("cannot read it")]
    Read(#[from] io::Error),
    #[error("it is not what its name says")]
    Page(#[from] crate::postgres::WalPageError),
    #[error("{0} bytes are too many for an unfinished segment")]
    TooLong(u64),
}

impl Error {
    fn is_transient(&self) -> bool {
        match self {
            Self::Archive(serve::ArchiveError::Storage(error)) | Self::Repository(error) => {
                error.is_transient()
            }
            Self::Storage(error) => error.is_transient(),
            _ => false,
        }
    }
}

/// One file, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Leftover {
    /// Plain, as PostgreSQL wrote it.
    Plain(PathBuf, WalFileName),
    /// An unfinished segment, padded with zeros.
    Partial(PathBuf, SegmentName),
    /// Compressed, perhaps encrypted, perhaps with its metadata beside it.
    Stored(PathBuf, WalFileName),
    /// Half of something that is still there in full.
    Scrap(PathBuf),
}

impl Leftover {
    fn path(&self) -> &Path {
        match self {
            Self::Plain(path, _) | Self::Partial(path, _) | Self::Stored(path, _) | Self::Scrap(path) => path,
        }
    }
}

/// Stores what PGHoard left of `site`, then removes it. Returns how many files are gone and how many stay.
pub async fn take_over(site: &Site, cancel: &CancellationToken) -> (u64, u64) {
    let Some(directory) = site.config.state_directory.clone() else { return (0, 0) };
    let looked = directory.clone();
    let found = tokio::task::spawn_blocking(move || look(&looked)).await.unwrap_or_default();
    tell_of_backups(site, &directory);
    if found.is_empty() {
        return (0, 0);
    }
    info!(
        site = site.config.name,
        directory = %directory.display(),
        files = found.len(),
        "storing what PGHoard left behind"
    );
    // What the archive holds already says which cluster's WAL may go there.
    let know = || async { site.known().await };
    if let Err(Stopped::Failed(error)) =
        retry("look at the archive", &RETRY, cancel, repository::Error::is_transient, know).await
    {
        warn!(site = site.config.name, error = chain(&error), "what PGHoard left behind stays for now");
        return (0, found.len() as u64);
    }
    let (mut gone, mut stay) = (0, 0);
    for leftover in found {
        let attempt = || async {
            match store(site, &directory, &leftover).await {
                Err(error) if matches!(error, Error::Storage(_) | Error::Repository(_)) => {
                    site.telemetry.storage_failed();
                    Err(error)
                }
                result => result,
            }
        };
        let path = leftover.path();
        let result =
            match retry("store what PGHoard left", &RETRY, cancel, Error::is_transient, attempt).await {
                Err(Stopped::Cancelled) => break,
                Ok(()) => remove(path).map_err(Error::from),
                Err(Stopped::Failed(error)) => Err(error),
            };
        let label = match result {
            Ok(()) => {
                gone += 1;
                "stored"
            }
            Err(error) => {
                stay += 1;
                warn!(
                    site = site.config.name, path = %path.display(), error = chain(&error),
                    "a file that PGHoard left cannot be stored and stays where it is"
                );
                "left"
            }
        };
        let labels = [("site", site.config.name.as_str()), ("result", label)];
        site.telemetry.metrics().add(&names::LEFTOVERS, &labels, 1.0);
    }
    info!(site = site.config.name, stored = gone, left = stay, "what PGHoard left is stored and removed");
    (gone, stay)
}

/// The WAL files in PGHoard's folders, those first that were finished first.
fn look(directory: &Path) -> Vec<Leftover> {
    let mut found = Vec::new();
    for folder in COMPRESSED {
        for path in files(&directory.join(folder)) {
            let name = name_of(&path);
            if name.ends_with(".tmp-compress") || name.contains(".metadata_tmp") {
                found.push(Leftover::Scrap(path));
            } else if let Ok(file @ (WalFileName::Segment(_) | WalFileName::History(_))) = name.parse() {
                found.push(Leftover::Stored(path, file));
            } else if !name.ends_with(".metadata") {
                warn!(path = %path.display(), "no file of PGHoard's; it stays where it is");
            }
        }
    }
    for path in files(&directory.join(INCOMING)) {
        let name = name_of(&path);
        let unfinished = name.strip_suffix(".partial_incomplete").or_else(|| name.strip_suffix(".partial"));
        match unfinished.unwrap_or(&name).parse() {
            Ok(WalFileName::Segment(segment)) if unfinished.is_some() => {
                found.push(Leftover::Partial(path, segment));
            }
            Ok(file @ (WalFileName::Segment(_) | WalFileName::History(_))) => {
                found.push(Leftover::Plain(path, file));
            }
            // pg_receivewal writes a history file under this name first, and again after a restart.
            _ if name.ends_with(".history.tmp") => found.push(Leftover::Scrap(path)),
            _ => warn!(path = %path.display(), "no file of pg_receivewal's; it stays where it is"),
        }
    }
    // Whole segments before the unfinished one that follows them, histories before the WAL of their timelines.
    found.sort_by_key(|leftover| match leftover {
        Leftover::Stored(_, file @ WalFileName::History(_))
        | Leftover::Plain(_, file @ WalFileName::History(_)) => (0, file.to_string()),
        Leftover::Stored(_, file) | Leftover::Plain(_, file) => (1, file.to_string()),
        Leftover::Partial(_, segment) => (2, segment.to_string()),
        Leftover::Scrap(path) => (3, path.display().to_string()),
    });
    found
}

/// Plain files only: a link may point anywhere.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let plain = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    plain.map(|entry| entry.path()).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Base backups that PGHoard had not finished are of no use, and not ours to remove.
fn tell_of_backups(site: &Site, directory: &Path) {
    for folder in BACKUPS {
        let folder = directory.join(folder);
        let left = fs::read_dir(&folder).into_iter().flatten().flatten().count();
        if left > 0 {
            warn!(
                site = site.config.name, directory = %folder.display(), entries = left,
                "PGHoard left unfinished base backups there; pgkeep takes its own, so they can be removed"
            );
        }
    }
}

async fn store(site: &Site, directory: &Path, leftover: &Leftover) -> Result<(), Error> {
    match leftover {
        Leftover::Plain(path, file) => store_plain(site, path, *file).await,
        Leftover::Partial(path, segment) => store_partial(site, path, *segment).await,
        Leftover::Stored(_, file) => store_decoded(site, directory, *file).await,
        Leftover::Scrap(_) => Ok(()),
    }
}

async fn store_plain(site: &Site, path: &Path, file: WalFileName) -> Result<(), Error> {
    let length = tokio::fs::metadata(path).await?.len();
    let opened = tokio::fs::File::open(path).await?.into_std().await;
    archive(site, file, length, Box::pin(chunks(opened))).await
}

/// PGHoard's folder is a store like any other of PGHoard's; it is read twice, so that nothing is stored before
/// all of it is known to be what PGHoard compressed.
async fn store_decoded(site: &Site, directory: &Path, file: WalFileName) -> Result<(), Error> {
    let config = StorageConfig::Local { directory: directory.to_owned() };
    let store = storage::open(&config, Access::Read).await?;
    let source = Repository::new(store, "", site.repository.settings().clone());
    let mut reader = source.read(ObjectName::Wal(file)).await?;
    let mut length = 0;
    while let Some(chunk) = reader.next().await? {
        length += chunk.len() as u64;
    }
    let reader = source.read(ObjectName::Wal(file)).await?;
    archive(site, file, length, Box::pin(decoded(reader))).await
}

async fn archive<B>(site: &Site, file: WalFileName, length: u64, body: B) -> Result<(), Error>
where
    B: Stream<Item = io::Result<Bytes>> + Unpin,
{
    let expected = *site.expected.borrow();
    serve::archive(&site.repository, &expected, file, length, body).await?;
    Ok(())
}

/// Stores what there is of a segment as a piece of it, unless the archive has the whole segment.
async fn store_partial(site: &Site, path: &Path, segment: SegmentName) -> Result<(), Error> {
    let length = tokio::fs::metadata(path).await?.len();
    if length > LONGEST_PARTIAL {
        return Err(Error::TooLong(length));
    }
    let bytes = tokio::fs::read(path).await?;
    let written = written(&bytes);
    if written == 0 {
        return Ok(());
    }
    let header = check_segment_start(&bytes, segment, &site.expected.borrow())?;
    if length != header.segment_size.bytes() {
        site.telemetry.metrics().add(&names::PGHOARD_PARTIAL, &[("site", &site.config.name)], 1.0);
    }
    let end = written.min(sound(&bytes, segment, &header));
    match site.repository.head(ObjectName::segment(segment)).await {
        Ok(_) => return Ok(()),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
    }
    let piece = Bytes::from(bytes).slice(..end);
    let end = u32::try_from(end).map_err(|_| Error::TooLong(length))?;
    let facts = Facts { pg_version: Some(header.major * 10_000) };
    site.repository.put(ObjectName::Piece { segment, start: 0, end }, piece, facts).await?;
    Ok(())
}

/// Up to where anything but the padding was written.
fn written(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// Up to where every page is what it should be.
fn sound(bytes: &[u8], segment: SegmentName, header: &LongHeader) -> usize {
    let start = header.segment_size.start(segment);
    let mut end = 0;
    for page in bytes.chunks(WAL_PAGE_BYTES) {
        let at = start.advance(end as u64);
        let same = PageHeader::parse(page).is_some_and(|page| page.magic == header.magic);
        if !same || check_pages(page, at, Tail::Written).is_err() {
            break;
        }
        end += page.len();
    }
    end
}

/// Removes a file that is stored, with PGHoard's metadata of it.
fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    let mut metadata = path.as_os_str().to_owned();
    metadata.push(".metadata");
    match fs::remove_file(&metadata) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn chunks(file: fs::File) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(file), |file| async {
        let mut file = file?;
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = Vec::with_capacity(CHUNK);
            let read = io::Read::read_to_end(&mut io::Read::take(&mut file, CHUNK as u64), &mut chunk);
            read.map(|_| (Bytes::from(chunk), file))
        });
        match read.await.map_err(io::Error::other).flatten() {
            Ok((chunk, _)) if chunk.is_empty() => None,
            Ok((chunk, file)) => Some((Ok(chunk), Some(file))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

fn decoded(reader: ObjectReader) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(chunk) => chunk.map(|chunk| (Ok(chunk), Some(reader))),
            Err(error) => Some((Err(io::Error::other(error)), None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart_and_come_in_the_order_of_recovery() {
        let root = tempfile::tempdir().unwrap();
        let names = [
            "xlog_incoming/000000010000000000000004.partial",
            "xlog_incoming/000000010000000000000003",
            "xlog_incoming/000000010000000000000002.partial_incomplete",
            "xlog_incoming/00000002.history",
            "xlog_incoming/00000003.history.tmp",
            "xlog_incoming/notes.txt",
            "xlog/000000010000000000000002",
            "xlog/000000010000000000000002.metadata",
            "xlog/000000010000000000000003.tmp-compress",
            "timeline/00000003.history",
            "timeline/00000003.history.metadata",
        ];
        for name in names {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("xlog/000000010000000000000009")).unwrap();
        let found = look(root.path());
        let found: Vec<_> = found
            .iter()
            .map(|leftover| {
                let path = leftover.path().strip_prefix(root.path()).unwrap().display().to_string();
                let kind = format!("{leftover:?}");
                format!("{} {path}", kind.split('(').next().unwrap())
            })
            .collect();
        assert_eq!(
            found,
            [
                "Plain xlog_incoming/00000002.history",
                "Stored timeline/00000003.history",
                "Stored xlog/000000010000000000000002",
                "Plain xlog_incoming/000000010000000000000003",
                "Partial xlog_incoming/000000010000000000000002.partial_incomplete",
                "Partial xlog_incoming/000000010000000000000004.partial",
                "Scrap xlog/000000010000000000000003.tmp-compress",
                "Scrap xlog_incoming/00000003.history.tmp",
            ]
        );
    }

    #[test]
    fn the_padding_of_an_unfinished_segment_is_not_wal() {
        assert_eq!(written(&[0; 100]), 0);
        assert_eq!(written(&[1, 0, 2, 0, 0]), 3);
        assert_eq!(written(&[]), 0);
    }
}
