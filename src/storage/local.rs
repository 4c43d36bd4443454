//! A directory as an object store.
//!
//! The library's own `LocalFileSystem` does the writing: staged file, fsync, hard link or rename, fsync of
//! the directory and of the directories it made. Around it this decorator adds what it lacks:
//!
//! - **User metadata** as PGHoard keeps it: `<key>.metadata`, one line of JSON, written after the data and
//!   removed before it. An object without it exists.
//! - **Durability of what an earlier process began.** A directory or a link may be there although nobody
//!   has fsynced it: whoever made it was killed in between. Before the first write below a directory its
//!   whole chain up to the root is fsynced, and so is its directory before "already there" is reported.
//!   Deletions are fsynced too, or a power failure might bring back a backup's record without its data.
//! - **Multipart uploads that do not overwrite**: they are completed under a hidden name and linked.
//! - **A root that is gone is unknown, not empty**: a missing directory, or one without any entry as a bare
//!   mount point is, makes every operation fail. Opening for writing leaves a marker in the root.
//! - Listings in key order ([`super::walk`]).
//! - What killed writers left unpublished is removed after a day.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

use super::walk;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct LocalStore {
    inner: LocalFileSystem,
    root: Arc<Root>,
}

#[derive(Debug)]
struct Root {
    path: PathBuf,
    /// Directories whose whole chain up to the root this process has fsynced.
    durable: Mutex<HashSet<PathBuf>>,
}

/// Names per batch of a listing: about 4 MiB, and thirty passes over a directory of a million files.
const LIST_BATCH: usize = 16 << 10;
/// Paths per deletion job, after which the directories concerned are fsynced once.
const DELETE_BATCH: usize = 256;
/// Age at which an unpublished file has no writer any more: no upload takes so long.
const ABANDONED_AFTER: Duration = Duration::from_hours(24);
/// Directories remembered as durable, about 100 bytes each; beyond that the memory starts anew.
const DURABLE_LIMIT: usize = 4096;

impl LocalStore {
    /// The file that tells a store without objects from a mount point with nothing mounted.
    pub(super) const MARKER: &str = ".pgkeep";

    pub(super) fn open(directory: &FsPath) -> Result<Self> {
        let inner = LocalFileSystem::new_with_prefix(directory)?.with_fsync(true);
        let path = inner.path_to_filesystem(&Path::from("x"))?;
        let path = path.parent().expect("a file has a directory").to_owned();
        Ok(Self { inner, root: Arc::new(Root { path, durable: Mutex::default() }) })
    }

    /// The file of `location`; refuses names that listings hide.
    fn file(&self, location: &Path) -> Result<PathBuf> {
        if location.parts().any(|part| walk::is_hidden(part.as_ref())) {
            return Err(object_store::Error::NotSupported {
                source: format!("`{location}` is a name kept for the store's own files").into(),
            });
        }
        self.inner.path_to_filesystem(location)
    }

    /// Before a write below the directory of `file`: the root is there, and the directory is durable.
    async fn prepare(&self, file: &FsPath) -> Result<()> {
        let (root, file) = (Arc::clone(&self.root), file.to_owned());
        blocking(move || root.prepare(file.parent().unwrap_or(&file))).await
    }

    /// `NotFound` only from a store that is there.
    async fn confirm(&self, error: object_store::Error) -> object_store::Error {
        if !matches!(error, object_store::Error::NotFound { .. }) {
            return error;
        }
        let root = Arc::clone(&self.root);
        blocking(move || root.check()).await.err().unwrap_or(error)
    }

    fn list_after(&self, prefix: Option<&Path>, after: &str) -> BoxStream<'static, Result<ObjectMeta>> {
        let prefix = match prefix {
            Some(prefix) if !prefix.as_ref().is_empty() => format!("{prefix}/"),
            _ => String::new(),
        };
        let state = Some((Arc::clone(&self.root), prefix, after.to_owned()));
        stream::unfold(state, |state| async {
            let (root, prefix, after) = state?;
            let next = blocking(move || {
                let batch = walk::batch(&root.path, &prefix, &after, LIST_BATCH).map_err(generic)?;
                // After the reading: a file system that went away meanwhile has cut the batch short.
                root.check()?;
                let more = match batch.last() {
                    Some(last) if batch.len() == LIST_BATCH => {
                        Some((root, prefix, last.location.to_string()))
                    }
                    _ => None,
                };
                Ok((batch, more))
            });
            Some(match next.await {
                Ok((batch, more)) => (batch.into_iter().map(Ok).collect::<Vec<_>>(), more),
                Err(error) => (vec![Err(error)], None),
            })
        })
        .flat_map(stream::iter)
        .boxed()
    }
}

impl Root {
    /// Fails when the root is missing or empty.
    fn check(&self) -> Result<()> {
        let missing = |reason: String| {
            let source = io::Error::new(io::ErrorKind::NotFound, reason);
            // Not `NotFound`, which speaks about an object.
            object_store::Error::Generic { store: "directory", source: Box::new(RootMissing(source)) }
        };
        let path = self.path.display();
        let mut entries = std::fs::read_dir(&self.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => missing(format!("`{path}`: {error}")),
            _ => generic(error),
        })?;
        match entries.next() {
            Some(entry) => entry.map(drop).map_err(generic),
            None => Err(missing(format!("`{path}` is empty, as if its file system were not mounted"))),
        }
    }

    fn prepare(&self, directory: &FsPath) -> Result<()> {
        self.check()?;
        let known = self.durable.lock().expect("no panic under this lock").contains(directory);
        if known && directory.is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(directory).map_err(generic)?;
        sweep(directory).map_err(generic)?;
        for path in directory.ancestors().take_while(|path| path.starts_with(&self.path)) {
            sync_directory(path).map_err(generic)?;
        }
        let mut durable = self.durable.lock().expect("no panic under this lock");
        if durable.len() >= DURABLE_LIMIT {
            durable.clear();
        }
        durable.insert(directory.to_owned());
        Ok(())
    }

    /// Deletes the objects in `files`; one result for each, and none before its directory is fsynced.
    fn delete(&self, files: &[PathBuf]) -> Vec<io::Result<()>> {
        let mut results: Vec<io::Result<()>> = files
            .iter()
            .map(|file| {
                match std::fs::remove_file(metadata_file(file)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                std::fs::remove_file(file)
            })
            .collect();
        let mut directories: BTreeSet<&FsPath> = files.iter().filter_map(|file| file.parent()).collect();
        // Deepest first, so that a directory is empty once those in it are gone.
        while let Some(directory) = directories.pop_last() {
            let below_root = directory != self.path && directory.starts_with(&self.path);
            if below_root && std::fs::remove_dir(directory).is_ok() {
                directories.extend(directory.parent());
            } else if let Err(error) = sync_directory(directory)
                && error.kind() != io::ErrorKind::NotFound
            {
                for (file, result) in files.iter().zip(&mut results) {
                    if file.starts_with(directory) && result.is_ok() {
                        *result = Err(io::Error::new(error.kind(), error.to_string()));
                    }
                }
            }
        }
        results
    }
}

/// The root directory is not there.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct RootMissing(io::Error);

#[async_trait]
impl ObjectStore for LocalStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let file = self.file(location)?;
        self.prepare(&file).await?;
        let metadata = to_json(&opts.attributes)?;
        let create = matches!(opts.mode, PutMode::Create);
        let data = payload.clone();
        let opts = PutOptions { attributes: Attributes::new(), ..opts };
        let result = self.inner.put_opts(location, payload, opts).await;
        match result {
            Ok(result) => {
                blocking(move || write_metadata(&file, metadata.as_deref())).await?;
                Ok(result)
            }
            Err(error @ object_store::Error::AlreadyExists { .. }) if create => {
                blocking(move || settle(&file, &data, metadata.as_deref())).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let file = self.file(location)?;
        self.prepare(&file).await?;
        let metadata = to_json(&opts.attributes)?;
        let opts = PutMultipartOptions { attributes: Attributes::new(), ..opts };
        // Hidden by its leading dot, and unique, because two writers may be at the same object.
        let name =
            format!(".{}.upload-{:016x}", location.filename().unwrap_or_default(), rand::random::<u64>());
        let directory = location.as_ref().rsplit_once('/').map_or("", |(directory, _)| directory);
        let hidden = Path::parse(format!("{directory}/{name}"))?;
        let inner = self.inner.put_multipart_opts(&hidden, opts).await?;
        let hidden = self.inner.path_to_filesystem(&hidden)?;
        Ok(Box::new(LocalUpload { inner, hidden, file, metadata }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let file = self.file(location)?;
        // Ranges are read out of packs, which have no metadata.
        let with_metadata = options.head || options.range.is_none();
        let mut result = match self.inner.get_opts(location, options).await {
            Ok(result) => result,
            Err(error) => return Err(self.confirm(error).await),
        };
        if with_metadata {
            result.attributes = blocking(move || read_metadata(&file)).await?;
        }
        Ok(result)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        locations
            .ready_chunks(DELETE_BATCH)
            .then(move |chunk| {
                let this = this.clone();
                async move {
                    let deleted = blocking(move || {
                        this.root.check()?;
                        let mut files = Vec::new();
                        let mut results = Vec::new();
                        for location in chunk {
                            match location.and_then(|location| Ok((this.file(&location)?, location))) {
                                Ok((file, location)) => {
                                    files.push(file);
                                    results.push(Ok(location));
                                }
                                Err(error) => results.push(Err(error)),
                            }
                        }
                        let mut outcomes = this.root.delete(&files).into_iter();
                        for result in results.iter_mut().filter(|result| result.is_ok()) {
                            if let Some(Err(error)) = outcomes.next() {
                                let path = result.as_ref().map(ToString::to_string).unwrap_or_default();
                                *result = Err(match error.kind() {
                                    io::ErrorKind::NotFound => {
                                        object_store::Error::NotFound { path, source: Box::new(error) }
                                    }
                                    _ => generic(error),
                                });
                            }
                        }
                        Ok(results)
                    });
                    stream::iter(deleted.await.unwrap_or_else(|error| vec![Err(error)]))
                }
            })
            .flatten()
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_after(prefix, "")
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.list_after(prefix, offset.as_ref())
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(self.not_implemented("list_with_delimiter"))
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(self.not_implemented("copy_opts"))
    }
}

impl LocalStore {
    /// What nobody above asks for.
    fn not_implemented(&self, operation: &str) -> object_store::Error {
        object_store::Error::NotImplemented { operation: operation.to_owned(), implementer: self.to_string() }
    }
}

impl fmt::Display for LocalStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalStore({})", self.root.path.display())
    }
}

/// An upload under a hidden name, which `complete` links to the real one unless that is taken.
#[derive(Debug)]
struct LocalUpload {
    inner: Box<dyn MultipartUpload>,
    hidden: PathBuf,
    file: PathBuf,
    metadata: Option<String>,
}

#[async_trait]
impl MultipartUpload for LocalUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.inner.complete().await?;
        let (hidden, file, metadata) = (self.hidden.clone(), self.file.clone(), self.metadata.take());
        blocking(move || {
            let published = publish(&hidden, &file);
            let _ = std::fs::remove_file(&hidden);
            published?;
            write_metadata(&file, metadata.as_deref())
        })
        .await?;
        Ok(result)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

/// Removes files that were never published and are old. Costs one reading of the directory, once per process.
fn sweep(directory: &FsPath) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(walk::is_unpublished) {
            let age = entry.metadata().and_then(|meta| meta.modified()).map(|time| time.elapsed());
            if age.is_ok_and(|age| age.is_ok_and(|age| age > ABANDONED_AFTER)) {
                // Another agent may be at it as well.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
    Ok(())
}

fn publish(hidden: &FsPath, file: &FsPath) -> Result<()> {
    match std::fs::hard_link(hidden, file) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            sync_parent(file).map_err(generic)?;
            let path = file.display().to_string();
            return Err(object_store::Error::AlreadyExists { path, source: Box::new(error) });
        }
        // Some file systems have no hard links. The caller has looked for the object before.
        Err(_) => std::fs::rename(hidden, file).map_err(generic)?,
    }
    sync_parent(file).map_err(generic)
}

/// After a refused create: what is there gets as durable as a finished put, and metadata that a killed
/// writer did not come to write is added when the object is the same.
fn settle(file: &FsPath, data: &PutPayload, metadata: Option<&str>) -> Result<()> {
    sync_parent(file).map_err(generic)?;
    if metadata.is_some() && !metadata_file(file).exists() && holds(file, data).map_err(generic)? {
        write_metadata(file, metadata)?;
    }
    Ok(())
}

/// Whether the file consists of exactly these bytes.
fn holds(file: &FsPath, data: &PutPayload) -> io::Result<bool> {
    use io::Read;
    let mut file = File::open(file)?;
    if file.metadata()?.len() != data.content_length() as u64 {
        return Ok(false);
    }
    let mut buffer = vec![0; 64 << 10];
    for chunk in data.iter().flat_map(|bytes| bytes.chunks(64 << 10)) {
        let buffer = &mut buffer[..chunk.len()];
        file.read_exact(buffer)?;
        if buffer != chunk {
            return Ok(false);
        }
    }
    Ok(true)
}

fn metadata_file(file: &FsPath) -> PathBuf {
    with_suffix(file, ".metadata")
}

fn with_suffix(file: &FsPath, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// User metadata as one line of JSON; none for an object without.
fn to_json(attributes: &Attributes) -> Result<Option<String>> {
    let mut values = BTreeMap::new();
    for (attribute, value) in attributes {
        match attribute {
            Attribute::Metadata(key) => values.insert(key.as_ref(), value.as_ref()),
            other => {
                return Err(object_store::Error::NotImplemented {
                    operation: format!("attribute {other:?}"),
                    implementer: "LocalStore".to_owned(),
                });
            }
        };
    }
    let json = (!values.is_empty()).then(|| serde_json::to_string(&values));
    json.transpose().map_err(|error| generic(error.into()))
}

fn read_metadata(file: &FsPath) -> Result<Attributes> {
    let text = match std::fs::read(metadata_file(file)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attributes::new()),
        Err(error) => return Err(generic(error)),
    };
    // Objects describe themselves: metadata that cannot be read is as good as none.
    let values: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text).unwrap_or_default();
    let text = |value| match value {
        serde_json::Value::String(text) => Some(text),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    Ok(values
        .into_iter()
        .filter_map(|(key, value)| Some((Attribute::Metadata(key.into()), text(value)?)))
        .collect())
}

/// Writes, or for an object without metadata removes, the file beside `file`.
fn write_metadata(file: &FsPath, json: Option<&str>) -> Result<()> {
    let target = metadata_file(file);
    let write = |json: &str| {
        // PGHoard's suffix for the temporary file, which its listings leave out.
        let staged = with_suffix(file, &format!(".metadata_tmp{:016x}", rand::random::<u64>()));
        let written = File::create_new(&staged)
            .and_then(|mut output| {
                output.write_all(json.as_bytes())?;
                output.sync_all()
            })
            .and_then(|()| std::fs::rename(&staged, &target));
        if written.is_err() {
            let _ = std::fs::remove_file(&staged);
        }
        written.and_then(|()| sync_parent(&target))
    };
    match json {
        Some(json) => write(json),
        None => match std::fs::remove_file(&target) {
            Ok(()) => sync_parent(&target),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        },
    }
    .map_err(generic)
}

fn sync_directory(path: &FsPath) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn sync_parent(path: &FsPath) -> io::Result<()> {
    path.parent().map_or(Ok(()), sync_directory)
}

fn generic(error: io::Error) -> object_store::Error {
    object_store::Error::Generic { store: "directory", source: Box::new(error) }
}

/// File work off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;

    fn store() -> (tempfile::TempDir, LocalStore) {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join(LocalStore::MARKER), b"").unwrap();
        let store = LocalStore::open(root.path()).unwrap();
        (root, store)
    }

    fn options(mode: PutMode) -> PutOptions {
        let attributes = [("pg-version", "150020"), ("host", "db \"one\"\n")]
            .map(|(key, value)| (Attribute::Metadata(key.into()), value))
            .into_iter()
            .collect();
        PutOptions { mode, attributes, ..PutOptions::default() }
    }

    #[tokio::test]
    async fn metadata_is_one_line_beside_the_object_and_goes_with_it() {
        let (root, store) = store();
        let key = Path::from("site/xlog/000000010000000000000001");
        store.put_opts(&key, "data".into(), options(PutMode::Create)).await.unwrap();
        let beside = root.path().join("site/xlog/000000010000000000000001.metadata");
        let text = std::fs::read_to_string(&beside).unwrap();
        assert_eq!(text, r#"{"host":"db \"one\"\n","pg-version":"150020"}"#);
        let result = store.get(&key).await.unwrap();
        assert_eq!(result.attributes, options(PutMode::Create).attributes);
        store.delete(&key).await.unwrap();
        assert!(!beside.exists());
        assert!(!root.path().join("site").exists(), "empty directories go too");
        assert!(root.path().exists());
    }

    #[tokio::test]
    async fn an_object_whose_writer_was_killed_before_the_metadata_is_healed_by_the_same_put() {
        let (root, store) = store();
        let key = Path::from("xlog/a");
        store.put(&key, "data".into()).await.unwrap();
        assert!(store.get(&key).await.unwrap().attributes.is_empty());
        let refused = store.put_opts(&key, "DATA".into(), options(PutMode::Create)).await;
        assert!(matches!(refused, Err(object_store::Error::AlreadyExists { .. })));
        assert!(!root.path().join("xlog/a.metadata").exists(), "other bytes heal nothing");
        let refused = store.put_opts(&key, "data".into(), options(PutMode::Create)).await;
        assert!(matches!(refused, Err(object_store::Error::AlreadyExists { .. })));
        assert_eq!(store.get(&key).await.unwrap().attributes.len(), 2);
    }

    #[tokio::test]
    async fn metadata_of_others_is_read_and_rubbish_is_none() {
        let (root, store) = store();
        let key = Path::from("a");
        store.put(&key, "data".into()).await.unwrap();
        let beside = root.path().join("a.metadata");
        std::fs::write(&beside, br#"{"Content-Length": 12, "_hash": "ff", "x": null}"#).unwrap();
        assert_eq!(store.get(&key).await.unwrap().attributes.len(), 2);
        std::fs::write(&beside, b"\xFF{").unwrap();
        assert!(store.get(&key).await.unwrap().attributes.is_empty());
    }

    #[tokio::test]
    async fn a_root_that_is_gone_or_empty_is_not_an_empty_store() {
        let (root, store) = store();
        let key = Path::from("xlog/a");
        assert!(matches!(store.get(&key).await, Err(object_store::Error::NotFound { .. })));
        std::fs::remove_file(root.path().join(LocalStore::MARKER)).unwrap();
        for gone in [false, true] {
            if gone {
                std::fs::remove_dir(root.path()).unwrap();
            }
            let unknown = |error: object_store::Error| matches!(error, object_store::Error::Generic { .. });
            assert!(unknown(store.get(&key).await.unwrap_err()));
            assert!(unknown(store.head(&key).await.unwrap_err()));
            assert!(unknown(store.list(None).next().await.unwrap().unwrap_err()));
            assert!(unknown(store.put(&key, "x".into()).await.unwrap_err()));
            assert!(unknown(store.delete(&key).await.unwrap_err()));
            assert!(unknown(store.put_multipart(&key).await.unwrap_err()));
        }
        assert!(!root.path().exists(), "nothing was written where the file system should be");
    }

    #[tokio::test]
    async fn a_multipart_upload_neither_overwrites_nor_leaves_anything() {
        let (root, store) = store();
        let key = Path::from("pack/1");
        let mut first = store.put_multipart(&key).await.unwrap();
        let mut second = store.put_multipart(&key).await.unwrap();
        let mut third = store.put_multipart(&key).await.unwrap();
        first.put_part("first".into()).await.unwrap();
        second.put_part("second".into()).await.unwrap();
        third.put_part("third".into()).await.unwrap();
        assert_eq!(store.list(None).count().await, 0, "an unfinished upload is no object");
        first.complete().await.unwrap();
        assert!(matches!(second.complete().await, Err(object_store::Error::AlreadyExists { .. })));
        third.abort().await.unwrap();
        assert_eq!(&store.get(&key).await.unwrap().bytes().await.unwrap()[..], b"first");
        let left: Vec<_> = std::fs::read_dir(root.path().join("pack"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["1"]);
    }

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "file times are compared with the real clock")]
    async fn what_killed_writers_left_goes_after_a_day() {
        let (root, store) = store();
        let left = [
            "a#1",
            ".b.upload-0123456789abcdef",
            ".b.upload-0123456789abcdef#1",
            "c.metadata_tmp0123456789abcdef",
        ];
        let kept = ["d", "d.metadata", ".e", "f#"];
        for name in left.iter().chain(&kept) {
            let file = File::create(root.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - 2 * ABANDONED_AFTER).unwrap();
        }
        std::fs::write(root.path().join("g#1"), b"under way").unwrap();
        store.put(&Path::from("new"), "x".into()).await.unwrap();
        let there = |name: &str| root.path().join(name).exists();
        assert!(!left.iter().any(|name| there(name)));
        assert!(kept.iter().all(|name| there(name)) && there("g#1"));
    }

    #[tokio::test]
    async fn names_of_the_stores_own_files_are_refused() {
        let (_root, store) = store();
        for key in ["a.metadata", ".pgkeep", "a/.b", "a.metadata_tmp1", "a#1"] {
            assert!(store.put(&Path::parse(key).unwrap(), "x".into()).await.is_err(), "{key}");
        }
    }
}
