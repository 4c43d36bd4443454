//! A store as the rooms above see it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use futures_util::StreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::error::Error;
use super::faulty::{FaultPlan, Faulty};
use super::observed::{Observed, Observer};

/// Whether the store keeps an object that is there when a second writer puts the same key "if absent".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionalPut {
    Honoured,
    /// The condition is dropped without a word: two writers of one site are not protected from each other.
    Ignored,
}

/// An opened store. Cheap to clone; clones share what the self-test found.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: Path,
    description: Arc<str>,
    conditional_put: Arc<AtomicU8>,
}

/// How the names begin of objects that only test the store.
pub const PROBE: &str = "pgkeep-probe-";

const UNKNOWN: u8 = 0;
const HONOURED: u8 = 1;
const IGNORED: u8 = 2;

impl Store {
    /// `prefix` comes before every key.
    pub fn new(inner: Arc<dyn ObjectStore>, prefix: &str, description: impl Into<Arc<str>>) -> Self {
        Self {
            inner,
            prefix: key(&Path::default(), prefix),
            description: description.into(),
            conditional_put: Arc::new(AtomicU8::new(UNKNOWN)),
        }
    }

    /// A store that lives and dies with the process, for tests.
    pub fn in_memory() -> Self {
        Self::new(Arc::new(InMemory::new()), "", "memory:")
    }

    /// This store with the faults of `plan` in front of it, for tests.
    #[must_use]
    pub fn with_faults(&self, plan: Arc<FaultPlan>) -> Self {
        Self { inner: Arc::new(Faulty::new(Arc::clone(&self.inner), plan)), ..self.clone() }
    }

    /// This store, with `observer` told of everything asked of it.
    #[must_use]
    pub fn observed(&self, observer: Observer) -> Self {
        Self { inner: Arc::new(Observed::new(Arc::clone(&self.inner), observer)), ..self.clone() }
    }

    /// The whole key of `relative`, as an observer is told it.
    pub fn full_key(&self, relative: &str) -> String {
        self.key(relative).to_string()
    }

    /// `s3://bucket/prefix`, `file:///directory`.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// What [`Store::probe_conditional_put`] found, if it has run.
    pub fn conditional_put(&self) -> Option<ConditionalPut> {
        match self.conditional_put.load(Ordering::Relaxed) {
            HONOURED => Some(ConditionalPut::Honoured),
            IGNORED => Some(ConditionalPut::Ignored),
            _ => None,
        }
    }

    /// Puts one probe object twice and looks whether the second put is refused; remembers the answer.
    ///
    /// The probe is deleted afterwards. Where that is not permitted it stays, a few bytes under
    /// `pgkeep-probe-…`.
    pub async fn probe_conditional_put(&self) -> Result<ConditionalPut, Error> {
        // A key of its own for every probe, or two agents that start together disturb each other.
        let key = self.key(&format!("{PROBE}{:016x}", rand::random::<u64>()));
        let put = |mode| {
            let options = PutOptions { mode, ..PutOptions::default() };
            self.inner.put_opts(&key, PutPayload::from_static(b"pgkeep"), options)
        };
        let exists = |result: &object_store::Result<_>| {
            matches!(
                result,
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })
            )
        };
        let first = put(PutMode::Create).await;
        let found = match &first {
            Ok(_) => {
                let second = put(PutMode::Create).await;
                if exists(&second) {
                    Ok(ConditionalPut::Honoured)
                } else {
                    second.map(|_| ConditionalPut::Ignored)
                }
            }
            // A retry inside the client may meet its own first try.
            Err(_) if exists(&first) => Ok(ConditionalPut::Honoured),
            // Some gateways and file systems refuse the condition but take the object without it.
            Err(_) => match put(PutMode::Overwrite).await {
                Ok(_) => Ok(ConditionalPut::Ignored),
                Err(error) => Err(error),
            },
        };
        let _ = self.inner.delete(&key).await;
        let found = found.map_err(|error| self.error("write an object", &error))?;
        let code = if found == ConditionalPut::Honoured { HONOURED } else { IGNORED };
        self.conditional_put.store(code, Ordering::Relaxed);
        Ok(found)
    }

    /// Proves with one cheap request that the bucket or root directory is there and may be listed.
    pub async fn check_reachable(&self) -> Result<(), Error> {
        self.confirm(&self.key(&format!("{PROBE}none"))).await
    }

    /// Whether `NotFound` for `key` can be believed. S3 gives the same answer for a missing object and
    /// for a missing bucket; a listing below the key, of which there is nothing, tells them apart.
    pub(crate) async fn confirm(&self, key: &Path) -> Result<(), Error> {
        match self.inner.list(Some(key)).next().await {
            None | Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(self.error("list objects", &error)),
        }
    }

    pub(crate) fn inner(&self) -> &Arc<dyn ObjectStore> {
        &self.inner
    }

    /// The key of `relative` below this store's prefix.
    pub(crate) fn key(&self, relative: &str) -> Path {
        key(&self.prefix, relative)
    }

    pub(crate) fn error(&self, operation: &'static str, error: &object_store::Error) -> Error {
        Error::classify(&self.description, operation, error)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.description).finish()
    }
}

/// `relative` below `base`. Empty parts, as a leading or doubled slash makes them, are dropped as
/// PGHoard's S3 and local stores do; `.` and `..` and control characters are written percent-encoded, so
/// that no prefix leads out of the store.
fn key(base: &Path, relative: &str) -> Path {
    let parts = relative.split('/').filter(|part| !part.is_empty());
    let relative = parts.collect::<Vec<_>>().join("/");
    let relative = Path::parse(&relative).unwrap_or_else(|_| Path::from(relative));
    if base.as_ref().is_empty() {
        relative
    } else if relative.as_ref().is_empty() {
        base.clone()
    } else {
        // Both halves are valid paths, hence the whole is.
        Path::parse(format!("{base}/{relative}")).expect("two paths make a path")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_below_the_prefix() {
        let store = Store::new(Arc::new(InMemory::new()), "/odd äé%20 prefix//x/", "memory:");
        assert_eq!(store.key("xlog/1").as_ref(), "odd äé%20 prefix/x/xlog/1");
        assert_eq!(store.key("../../etc").as_ref(), "odd äé%20 prefix/x/%2E%2E/%2E%2E/etc");
        assert_eq!(store.key("").as_ref(), "odd äé%20 prefix/x");
        assert_eq!(Store::in_memory().key("/a/").as_ref(), "a");
    }

    #[tokio::test]
    async fn the_probe_leaves_nothing_behind() {
        let store = Store::in_memory();
        assert_eq!(store.conditional_put(), None);
        assert_eq!(store.probe_conditional_put().await.unwrap(), ConditionalPut::Honoured);
        assert_eq!(store.clone().conditional_put(), Some(ConditionalPut::Honoured));
        assert_eq!(store.inner().list(None).count().await, 0);
    }
}
