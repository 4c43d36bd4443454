//! From a run of stored bytes to an object: one conditional put, or a multipart upload when it is large.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{
    Attributes, GetOptions, MultipartUpload, PutMode, PutMultipartOptions, PutOptions, PutPayload,
};
use tokio::task::JoinSet;

use super::error::Error;
use super::name::ObjectName;
use super::repository::Repository;
use super::writer::Outcome;
use crate::codec::{Digest, NamedHash};
use crate::postgres::WalFileName;
use crate::storage::ConditionalPut;

/// What the finished object holds, to compare it with one that is already there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content {
    pub length: u64,
    pub digest: Digest,
    /// Length and digest are those of the plaintext behind the codec, not of the stored bytes.
    pub encoded: bool,
    /// Of the plaintext, as the metadata of WAL has it.
    pub hash: Option<NamedHash>,
    /// Of the stored bytes, when the object is encrypted.
    pub stored_digest: Option<Digest>,
}

/// Parts under way at once, beside the one being filled: three parts of memory in all.
const PARTS_IN_FLIGHT: usize = 2;

/// A 16 MiB segment that does not compress, with what zstd or snappy adds to it, is still one put.
const WAL_SINGLE_PUT: usize = (16 << 20) + (1 << 20);

pub(super) struct Upload {
    repository: Repository,
    name: ObjectName,
    key: Path,
    /// Up to this many stored bytes the object is one put.
    single_put: usize,
    pending: VecDeque<Bytes>,
    pending_length: usize,
    length: u64,
    state: State,
}

enum State {
    Gathering,
    Parts {
        upload: Shareable,
        in_flight: JoinSet<object_store::Result<()>>,
    },
    /// The name is taken. The rest is only counted and hashed, to be compared in the end.
    Taken,
}

/// `MultipartUpload` promises nothing about sharing, so futures that borrow an [`Upload`] could not move
/// between threads. The mutex is never locked: every use has the only reference.
struct Shareable(Mutex<Box<dyn MultipartUpload>>);

impl Shareable {
    fn get(&mut self) -> &mut dyn MultipartUpload {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).as_mut()
    }
}

impl Upload {
    pub(super) fn new(repository: Repository, name: ObjectName) -> Self {
        let part_size = repository.part_size();
        let single_put = match name {
            ObjectName::Wal(_) => part_size.max(WAL_SINGLE_PUT),
            _ => part_size,
        };
        let key = repository.key(&name);
        Self {
            repository,
            name,
            key,
            single_put,
            pending: VecDeque::new(),
            pending_length: 0,
            length: 0,
            state: State::Gathering,
        }
    }

    pub(super) const fn name(&self) -> ObjectName {
        self.name
    }

    /// Stored bytes taken so far.
    pub(super) const fn length(&self) -> u64 {
        self.length
    }

    /// Takes the next bytes, without sending any.
    pub(super) fn accept(&mut self, bytes: Bytes) {
        self.length += bytes.len() as u64;
        if !bytes.is_empty() && !matches!(self.state, State::Taken) {
            self.pending_length += bytes.len();
            self.pending.push_back(bytes);
        }
    }

    /// Sends what makes whole parts, waiting for room first. May be dropped at any point and called again.
    pub(super) async fn flush(&mut self, attributes: impl FnOnce() -> Attributes) -> Result<(), Error> {
        if matches!(self.state, State::Gathering) && self.pending_length > self.single_put {
            self.start(attributes()).await?;
        }
        let part_size = self.repository.part_size();
        while matches!(self.state, State::Parts { .. }) && self.pending_length >= part_size {
            self.send(part_size).await?;
        }
        Ok(())
    }

    async fn start(&mut self, attributes: Attributes) -> Result<(), Error> {
        // Multipart has no conditional create, so look first, and again before completing.
        if self.is_taken().await? {
            self.state = State::Taken;
            self.pending.clear();
            self.pending_length = 0;
            return Ok(());
        }
        let options = PutMultipartOptions { attributes, ..PutMultipartOptions::default() };
        let upload = self.repository.store().inner().put_multipart_opts(&self.key, options).await;
        let upload = upload.map_err(|error| self.error("start an upload", &error))?;
        self.state = State::Parts { upload: Shareable(Mutex::new(upload)), in_flight: JoinSet::new() };
        Ok(())
    }

    async fn send(&mut self, length: usize) -> Result<(), Error> {
        while let State::Parts { in_flight, .. } = &mut self.state
            && in_flight.len() >= PARTS_IN_FLIGHT
        {
            self.join_one().await?;
        }
        let payload = self.take(length);
        if let State::Parts { upload, in_flight } = &mut self.state {
            in_flight.spawn(upload.get().put_part(payload));
        }
        Ok(())
    }

    /// Waits for one part; false when none is under way.
    async fn join_one(&mut self) -> Result<bool, Error> {
        let State::Parts { in_flight, .. } = &mut self.state else { return Ok(false) };
        match in_flight.join_next().await {
            None => Ok(false),
            Some(Ok(Ok(()))) => Ok(true),
            Some(Ok(Err(error))) => Err(self.error("upload a part", &error)),
            Some(Err(error)) => Err(self.error("upload a part", &error.into())),
        }
    }

    /// The next `length` pending bytes, or all of them.
    fn take(&mut self, length: usize) -> PutPayload {
        let mut left = length.min(self.pending_length);
        self.pending_length -= left;
        let mut parts = Vec::new();
        while left > 0 {
            let Some(first) = self.pending.front_mut() else { break };
            let bytes = if first.len() <= left {
                self.pending.pop_front().unwrap_or_default()
            } else {
                first.split_to(left)
            };
            left -= bytes.len();
            parts.push(bytes);
        }
        parts.into_iter().collect()
    }

    /// Makes the object visible.
    pub(super) async fn finish(mut self, attributes: Attributes, content: Content) -> Result<Outcome, Error> {
        self.flush(|| attributes.clone()).await?;
        match self.state {
            State::Gathering => self.put(attributes, content).await,
            State::Taken => self.compare(content).await?.ok_or_else(|| self.vanished()),
            State::Parts { .. } => {
                if self.pending_length > 0 {
                    self.send(self.pending_length).await?;
                }
                while self.join_one().await? {}
                self.complete(content).await
            }
        }
    }

    async fn put(&mut self, attributes: Attributes, content: Content) -> Result<Outcome, Error> {
        let mode = match self.repository.store().conditional_put() {
            Some(ConditionalPut::Ignored) => {
                if self.is_taken().await?
                    && let Some(outcome) = self.compare(content).await?
                {
                    return Ok(outcome);
                }
                PutMode::Overwrite
            }
            Some(ConditionalPut::Honoured) | None => PutMode::Create,
        };
        let payload = self.take(self.pending_length);
        let options = PutOptions { mode, attributes, ..PutOptions::default() };
        match self.repository.store().inner().put_opts(&self.key, payload, options).await {
            Ok(_) => Ok(Outcome::Created),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                self.compare(content).await?.ok_or_else(|| self.vanished())
            }
            Err(error) => self.after_failure(self.error("write an object", &error), content).await,
        }
    }

    async fn complete(&mut self, content: Content) -> Result<Outcome, Error> {
        if self.is_taken().await?
            && let Some(outcome) = self.compare(content).await?
        {
            return Ok(outcome);
        }
        let State::Parts { upload, .. } = &mut self.state else { return Err(self.vanished()) };
        let completed = upload.get().complete().await;
        match completed {
            Ok(_) => {
                self.state = State::Taken;
                Ok(Outcome::Created)
            }
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                self.compare(content).await?.ok_or_else(|| self.vanished())
            }
            Err(error) => self.after_failure(self.error("complete an upload", &error), content).await,
        }
    }

    /// The write may have taken effect although it failed: what is there now decides.
    async fn after_failure(&mut self, error: Error, content: Content) -> Result<Outcome, Error> {
        if !error.is_transient() {
            return Err(error);
        }
        match self.compare(content).await {
            Ok(Some(_)) => Ok(Outcome::Created),
            Err(conflict @ Error::Conflict { .. }) => Err(conflict),
            Ok(None) | Err(_) => Err(error),
        }
    }

    async fn is_taken(&mut self) -> Result<bool, Error> {
        let options = GetOptions { head: true, ..GetOptions::default() };
        match self.repository.store().inner().get_opts(&self.key, options).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.error("look for an object", &error)),
        }
    }

    /// Reads the object that is there: the same content, none at all, or a conflict.
    async fn compare(&mut self, content: Content) -> Result<Option<Outcome>, Error> {
        let opened = if content.encoded {
            self.repository.read(self.name).await
        } else {
            self.repository.read_stored(self.name).await
        };
        let reader = match opened {
            Ok(reader) => reader,
            Err(Error::NotFound(_)) => return Ok(None),
            Err(error) if error.is_locked() => return self.compare_locked(content, error).await,
            Err(error) => return Err(error),
        };
        let there = reader.drain().await?;
        if there.plaintext_length == content.length && there.digest == content.digest {
            return Ok(Some(Outcome::AlreadySame));
        }
        Err(Error::Conflict { name: self.name, existing: there.plaintext_length, offered: content.length })
    }

    /// Compares without the key that would open the object which is there: by what its metadata says, or by
    /// its stored bytes, of which no other writer makes the same.
    async fn compare_locked(&mut self, content: Content, locked: Error) -> Result<Option<Outcome>, Error> {
        let there = match self.repository.head(self.name).await {
            Ok(info) => info.metadata,
            Err(Error::NotFound(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let lengths_differ = there.plaintext_length.is_some_and(|length| length != content.length);
        let same = if lengths_differ {
            Some(false)
        } else if let Some(digest) = there.digest {
            Some(digest == content.digest)
        } else if let (Some(one), Some(other)) = (there.hash, content.hash)
            && one.algorithm() == other.algorithm()
        {
            Some(one == other)
        } else if let ObjectName::Wal(WalFileName::History(_)) = self.name
            && there.plaintext_length.is_some()
        {
            // PGHoard's, which has no hash. A timeline has one history, which differs from others in length
            // about as surely as in content.
            Some(true)
        } else {
            None
        };
        match same {
            Some(true) => return Ok(Some(Outcome::AlreadySame)),
            Some(false) => {
                let existing = there.plaintext_length.unwrap_or(content.length);
                return Err(Error::Conflict { name: self.name, existing, offered: content.length });
            }
            None => {}
        }
        match self.repository.read_stored(self.name).await?.drain().await? {
            stored if Some(stored.digest) == content.stored_digest => Ok(Some(Outcome::AlreadySame)),
            _ => Err(locked),
        }
    }

    /// It was said to exist, and then it did not: somebody deletes, or a store is not yet of one mind.
    fn vanished(&self) -> Error {
        let store = self.repository.store().description().to_owned();
        let detail = "the object was there and is not there any more".to_owned();
        let cause = crate::storage::Error::Unavailable { store, operation: "write an object", detail };
        Error::of_store(self.subject(), cause)
    }

    fn error(&self, operation: &'static str, error: &object_store::Error) -> Error {
        Error::of_store(self.subject(), self.repository.store().error(operation, error))
    }

    fn subject(&self) -> String {
        format!("object `{}`", self.name)
    }

    /// Gives up; the store forgets the parts it has.
    pub(super) async fn abort(mut self) {
        if let State::Parts { mut upload, mut in_flight } = std::mem::replace(&mut self.state, State::Taken) {
            in_flight.shutdown().await;
            // Nobody waits for the answer; a lifecycle rule of the bucket takes what is left.
            let _ = upload.get().abort().await;
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let State::Parts { mut upload, mut in_flight } = std::mem::replace(&mut self.state, State::Taken)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                in_flight.shutdown().await;
                let _ = upload.get().abort().await;
            });
        }
    }
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upload")
            .field("name", &self.name)
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}
