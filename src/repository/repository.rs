//! All objects of one site.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, future, stream};
use jiff::Timestamp;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, ObjectMeta};

use super::error::Error;
use super::metadata::{ObjectMetadata, StoredAs};
use super::name::{Folder, ObjectName};
use super::pack::PackWriter;
use super::reader::ObjectReader;
use super::summary;
use super::writer::{ObjectWriter, Stored};
use crate::codec::{Compression, HashAlgorithm, KeyRing, PackSealer, StreamOpener, StreamSealer};
use crate::storage::Store;

/// How this site's objects are written.
#[derive(Clone, Debug)]
pub struct Settings {
    pub compression: Compression,
    /// zstd's, where 0 stands for its default, 3, or lzma's preset.
    pub level: i32,
    /// Of a hash beside WAL, for PGHoard.
    pub hash_algorithm: Option<HashAlgorithm>,
    /// What is written with, if anything, and what can be read.
    pub keys: KeyRing,
    /// Named in the metadata of every object.
    pub host: String,
    /// Stored bytes from which an object is uploaded in parts, and the size of these. S3 wants 5 MiB at
    /// least and takes 10,000 parts at most.
    pub part_size: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            compression: Compression::default(),
            level: 0,
            hash_algorithm: None,
            keys: KeyRing::default(),
            host: String::new(),
            part_size: 8 << 20,
        }
    }
}

/// What a writer knows about an object beside its content.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// As `server_version_num` has it, `150020`.
    pub pg_version: Option<u32>,
}

/// What the store tells about an object without reading it.
#[derive(Clone, Debug)]
pub struct ObjectInfo {
    pub name: ObjectName,
    pub stored_length: u64,
    pub last_modified: Timestamp,
    pub metadata: ObjectMetadata,
}

/// One entry of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: ObjectName,
    pub stored_length: u64,
    pub last_modified: Timestamp,
}

/// Everything of one site in one store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Repository(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    base: Path,
    settings: Settings,
    unknown_keys: AtomicU64,
    site_prefix: String,
    former: Vec<Repository>,
}

impl Repository {
    pub fn new(store: Store, site_prefix: &str, settings: Settings) -> Self {
        Self::continuing(store, site_prefix, settings, Vec::new())
    }

    /// A site that was moved here from others, whose backups and WAL it continues. These are only read, and
    /// pruned.
    pub fn continuing(store: Store, site_prefix: &str, settings: Settings, former: Vec<Self>) -> Self {
        let base = store.key(site_prefix);
        let (unknown_keys, site_prefix) = (AtomicU64::new(0), site_prefix.to_owned());
        Self(Arc::new(Inner { store, base, settings, unknown_keys, site_prefix, former }))
    }

    /// The sites this one was moved from, the latest first.
    pub fn former(&self) -> &[Self] {
        &self.0.former
    }

    /// This site, for none, or the one that it was moved from with this number.
    pub fn of(&self, former: Option<usize>) -> &Self {
        former.and_then(|number| self.0.former.get(number)).unwrap_or(self)
    }

    /// What comes before every key of the site, without what the store puts before that.
    pub fn site_prefix(&self) -> &str {
        &self.0.site_prefix
    }

    pub fn store(&self) -> &Store {
        &self.0.store
    }

    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Writes an object piece by piece. Everything but packs goes this way.
    pub fn writer(&self, name: ObjectName, facts: Facts) -> ObjectWriter {
        ObjectWriter::new(self.clone(), name, facts, None, None)
    }

    /// Writes an object of a backup, sealed with that backup's own key.
    pub fn sealed_writer(&self, name: ObjectName, facts: Facts, sealer: StreamSealer) -> ObjectWriter {
        ObjectWriter::new(self.clone(), name, facts, None, Some(sealer))
    }

    /// Writes an object that is at hand as a whole.
    pub async fn put(&self, name: ObjectName, plaintext: Bytes, facts: Facts) -> Result<Stored, Error> {
        let length = plaintext.len() as u64;
        let mut writer = ObjectWriter::new(self.clone(), name, facts, Some(length), None);
        writer.write(plaintext).await?;
        writer.finish().await
    }

    /// Writes a pack, whose frames are sealed if there is a sealer for it.
    pub fn pack_writer(&self, name: ObjectName, sealer: Option<PackSealer>) -> PackWriter {
        PackWriter::new(self.clone(), name, sealer)
    }

    /// Opens an object for reading.
    ///
    /// WAL that a site lacks may be in one that it was moved from.
    pub async fn read(&self, name: ObjectName) -> Result<ObjectReader, Error> {
        let own = self.read_own(name).await;
        if !matches!((&own, name), (Err(Error::NotFound(_)), ObjectName::Wal(_))) {
            return own;
        }
        for former in self.former() {
            match former.read_own(name).await {
                Err(Error::NotFound(_)) => {}
                found => return found,
            }
        }
        own
    }

    async fn read_own(&self, name: ObjectName) -> Result<ObjectReader, Error> {
        let result = self.get_opts(name, GetOptions::default()).await?;
        let metadata = ObjectMetadata::from_attributes(&result.attributes);
        ObjectReader::new(self.clone(), name, metadata, result, None)
    }

    /// Opens an object that is sealed with its backup's own key.
    pub async fn read_sealed(&self, name: ObjectName, opener: StreamOpener) -> Result<ObjectReader, Error> {
        let result = self.get_opts(name, GetOptions::default()).await?;
        let metadata = ObjectMetadata::from_attributes(&result.attributes);
        ObjectReader::new(self.clone(), name, metadata, result, Some(opener))
    }

    /// Opens an object for reading its stored bytes as they are.
    pub(super) async fn read_stored(&self, name: ObjectName) -> Result<ObjectReader, Error> {
        let result = self.get_opts(name, GetOptions::default()).await?;
        let stored_as = StoredAs::Declared(Compression::None);
        let metadata = ObjectMetadata { stored_as, ..ObjectMetadata::default() };
        ObjectReader::new(self.clone(), name, metadata, result, None)
    }

    /// The whole verified plaintext, unless that is more than `limit` bytes.
    pub async fn get(&self, name: ObjectName, limit: u64) -> Result<Bytes, Error> {
        let mut reader = self.read(name).await?;
        let too_large =
            |length: u64| if length > limit { Err(Error::TooLarge { name, limit }) } else { Ok(()) };
        too_large(reader.plaintext_length().unwrap_or(0))?;
        let mut whole = Vec::new();
        while let Some(chunk) = reader.next().await? {
            too_large(whole.len() as u64 + chunk.len() as u64)?;
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.into())
    }

    /// The beginning of encrypted WAL, or a history file without its reasons, for whoever has no private key:
    /// as the metadata gives it, and therefore not verified. `locked` is why the object itself could not be read.
    pub async fn outline(&self, name: ObjectName, locked: Error) -> Result<Bytes, Error> {
        let info = self.head(name).await?;
        let outline = info.metadata.summary.and_then(|summary| summary::outline(name, &summary));
        outline.map(Bytes::from).ok_or(locked)
    }

    /// The stored bytes in `range`, all of them. For packs, whose frames are verified by their own digests.
    pub async fn get_range(&self, name: ObjectName, range: Range<u64>) -> Result<Bytes, Error> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let short = |length: u64| Error::Damaged {
            name,
            why: format!("it has {length} bytes, of which {}..{} were wanted", range.start, range.end),
        };
        let result = match self.get_opts(name, options).await {
            Ok(result) => result,
            Err(error @ Error::NotFound(_)) => return Err(error),
            // A range behind the end fails in as many ways as there are stores; the length tells.
            Err(error) => {
                return Err(match self.head(name).await {
                    Ok(info) if info.stored_length < range.end => short(info.stored_length),
                    _ => error,
                });
            }
        };
        if result.range != range {
            return Err(short(result.meta.size));
        }
        let bytes = result.bytes().await.map_err(|error| self.error(&name, "read an object", &error))?;
        if bytes.len() as u64 == range.end - range.start {
            Ok(bytes)
        } else {
            let store = self.store().description().to_owned();
            let detail = format!("the read ended after {} bytes", bytes.len());
            let cause = crate::storage::Error::Unavailable { store, operation: "read an object", detail };
            Err(Error::of_store(subject(&name), cause))
        }
    }

    /// What is known about an object without reading it.
    pub async fn head(&self, name: ObjectName) -> Result<ObjectInfo, Error> {
        let result = self.get_opts(name, GetOptions { head: true, ..GetOptions::default() }).await?;
        Ok(ObjectInfo {
            name,
            stored_length: result.meta.size,
            last_modified: timestamp(&result.meta),
            metadata: ObjectMetadata::from_attributes(&result.attributes),
        })
    }

    /// The objects in `folder`, in the order of their keys, behind `after` if given. Keys that are no names
    /// of ours are passed over and counted in [`Repository::unknown_keys`].
    pub async fn list(&self, folder: Folder, after: Option<ObjectName>) -> Result<Vec<Listed>, Error> {
        self.list_stream(folder, after).try_collect().await
    }

    /// [`Repository::list`] as a stream, for archives that do not fit into memory.
    pub fn list_stream(
        &self,
        folder: Folder,
        after: Option<ObjectName>,
    ) -> impl Stream<Item = Result<Listed, Error>> + Send + Unpin + use<> {
        let repository = self.clone();
        let store = self.store().inner();
        let prefix = self.below(&folder.to_key());
        let keys = match after {
            Some(after) => store.list_with_offset(Some(&prefix), &self.key(&after)),
            None => store.list(Some(&prefix)),
        };
        keys.filter_map(move |entry| {
            future::ready(match entry {
                Ok(meta) => repository.listed(&meta).map(Ok),
                Err(error) => {
                    let cause = repository.store().error("list objects", &error);
                    Some(Err(Error::of_store(format!("folder `{}`", folder.to_key()), cause)))
                }
            })
        })
    }

    /// Keys without a meaning that listings of this repository have met so far.
    pub fn unknown_keys(&self) -> u64 {
        self.0.unknown_keys.load(Ordering::Relaxed)
    }

    /// Deletes objects; those that are not there are fine. Returns how many are gone, which includes
    /// missing ones where the store does not tell them apart. Goes on after a failure and returns the first.
    pub async fn delete(&self, names: impl IntoIterator<Item = ObjectName>) -> Result<u64, Error> {
        let keys: Vec<_> = names.into_iter().map(|name| Ok(self.key(&name))).collect();
        let mut results = self.store().inner().delete_stream(stream::iter(keys).boxed());
        let (mut count, mut failure) = (0, None);
        while let Some(result) = results.next().await {
            match result {
                Ok(_) => count += 1,
                Err(error @ object_store::Error::NotFound { .. }) => {
                    // Of an object on a store that is there; of the whole bucket where it is not.
                    if failure.is_none() {
                        failure = self.store().confirm(&self.0.base).await.err().map(|cause| {
                            drop(error);
                            Error::of_store("objects", cause)
                        });
                    }
                }
                Err(error) => {
                    let cause = self.store().error("delete objects", &error);
                    failure.get_or_insert_with(|| Error::of_store("objects", cause));
                }
            }
        }
        failure.map_or(Ok(count), Err)
    }

    pub(super) fn key(&self, name: &ObjectName) -> Path {
        self.below(&name.to_key())
    }

    pub(super) fn part_size(&self) -> usize {
        self.0.settings.part_size.max(1)
    }

    fn below(&self, key: &str) -> Path {
        let base = &self.0.base;
        let slash = if base.as_ref().is_empty() { "" } else { "/" };
        Path::parse(format!("{base}{slash}{key}")).expect("a name below a valid prefix is a valid key")
    }

    fn listed(&self, meta: &ObjectMeta) -> Option<Listed> {
        let key = meta.location.as_ref().strip_prefix(self.0.base.as_ref())?;
        let name = ObjectName::from_key(key.strip_prefix('/').unwrap_or(key));
        if name.is_none() {
            self.0.unknown_keys.fetch_add(1, Ordering::Relaxed);
        }
        Some(Listed { name: name?, stored_length: meta.size, last_modified: timestamp(meta) })
    }

    /// Every read passes here, because here "not found" gets its meaning.
    pub(super) async fn get_opts(&self, name: ObjectName, options: GetOptions) -> Result<GetResult, Error> {
        let key = self.key(&name);
        match self.store().inner().get_opts(&key, options).await {
            Ok(result) => Ok(result),
            Err(object_store::Error::NotFound { .. }) => {
                let confirmed = self.store().confirm(&key).await;
                Err(match confirmed {
                    Ok(()) => Error::NotFound(name),
                    Err(cause) => Error::of_store(subject(&name), cause),
                })
            }
            Err(error) => Err(self.error(&name, "read an object", &error)),
        }
    }

    fn error(&self, name: &ObjectName, operation: &'static str, error: &object_store::Error) -> Error {
        Error::of_store(subject(name), self.store().error(operation, error))
    }
}

fn subject(name: &ObjectName) -> String {
    format!("object `{name}`")
}

pub(super) fn timestamp(meta: &ObjectMeta) -> Timestamp {
    // Stores give times that a calendar can hold.
    Timestamp::from_second(meta.last_modified.timestamp()).unwrap_or(Timestamp::UNIX_EPOCH)
}
