//! Packs: objects of many frames.
//!
//! A pack has no encoding and no metadata of its own. Where a frame lies and what it must decode to is
//! said by a [`FrameRef`] in a backup's file list, which a later backup may copy.

use bytes::Bytes;
use object_store::Attributes;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::error::Error;
use super::name::{BackupName, BackupPart, ObjectName};
use super::repository::Repository;
use super::upload::{Content, Upload};
use super::writer::Stored;
use crate::codec::{Compression, Digest, FrameFacts, Hasher};

/// The pack `number` of the backup that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PackId {
    pub backup: BackupName,
    pub number: u32,
}

impl PackId {
    pub const fn object(self) -> ObjectName {
        ObjectName::Backup { backup: self.backup, part: BackupPart::Pack(self.number) }
    }
}

/// Where a frame lies, and what it must turn out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameRef {
    pub pack: PackId,
    /// Of its first byte in the pack.
    pub offset: u64,
    pub stored_length: u32,
    pub raw_length: u32,
    pub compression: Compression,
    /// Of the raw bytes.
    pub digest: Digest,
}

impl From<&FrameRef> for FrameFacts {
    fn from(frame: &FrameRef) -> Self {
        Self {
            stored_length: frame.stored_length,
            raw_length: frame.raw_length,
            compression: frame.compression,
            digest: frame.digest,
        }
    }
}

/// Writes one pack: bytes as they come, without any encoding.
///
/// Dropped without `finish`, it leaves nothing behind as far as the store can still be reached.
#[derive(Debug)]
pub struct PackWriter {
    upload: Upload,
    hasher: Work,
    /// Appended, not passed on yet.
    fresh: Vec<Bytes>,
    fresh_length: usize,
}

#[derive(Debug)]
enum Work {
    Idle(Box<Hasher>),
    Busy(JoinHandle<Box<Hasher>>),
}

/// Bytes gathered for one turn of the hasher, so that it costs few hops to a blocking thread.
const HASH_BATCH: usize = 1 << 20;

impl PackWriter {
    pub(super) fn new(repository: Repository, name: ObjectName) -> Self {
        let upload = Upload::new(repository, name);
        Self { upload, hasher: Work::Idle(Box::new(Hasher::new())), fresh: Vec::new(), fresh_length: 0 }
    }

    /// Bytes appended so far: the offset of the next frame.
    pub const fn length(&self) -> u64 {
        self.upload.length() + self.fresh_length as u64
    }

    /// Takes the next stored bytes; waits while too many parts are under way. The bytes are taken even
    /// when the call is dropped before it returns.
    pub async fn append(&mut self, stored: Bytes) -> Result<(), Error> {
        self.fresh_length += stored.len();
        self.fresh.push(stored);
        if self.fresh_length >= HASH_BATCH {
            let hasher = self.settle().await;
            self.pass_on(hasher);
            self.upload.flush(Attributes::default).await?;
        }
        Ok(())
    }

    /// Waits for the hasher.
    async fn settle(&mut self) -> Box<Hasher> {
        if let Work::Busy(job) = &mut self.hasher {
            self.hasher = Work::Idle(job.await.expect("hashing does not panic"));
        }
        match &self.hasher {
            Work::Idle(hasher) => hasher.clone(),
            Work::Busy(_) => unreachable!("it has just settled"),
        }
    }

    /// Gives what is fresh to the upload, and to the hasher on its thread.
    fn pass_on(&mut self, mut hasher: Box<Hasher>) {
        let fresh = std::mem::take(&mut self.fresh);
        self.fresh_length = 0;
        for bytes in &fresh {
            self.upload.accept(bytes.clone());
        }
        self.hasher = Work::Busy(tokio::task::spawn_blocking(move || {
            for bytes in &fresh {
                hasher.update(bytes);
            }
            hasher
        }));
    }

    /// Stores the pack. `plaintext_length` and `digest` of the receipt are those of the stored bytes.
    pub async fn finish(mut self) -> Result<Stored, Error> {
        let hasher = self.settle().await;
        self.pass_on(hasher);
        let hasher = self.settle().await;
        let content = Content { length: hasher.length(), digest: hasher.digest(), encoded: false };
        let (name, stored_length) = (self.upload.name(), self.upload.length());
        let outcome = self.upload.finish(Attributes::default(), content).await?;
        Ok(Stored::new(name, content, stored_length, outcome))
    }

    /// Gives up; nothing is stored.
    pub async fn abort(self) {
        self.upload.abort().await;
    }
}
