//! Packs: objects of many frames.
//!
//! A pack has no encoding and no metadata of its own, but the seal of its frames where a backup is encrypted. Where a frame lies and what it must decode to is
//! said by a [`FrameRef`] in a backup's file list, which a later backup may copy.

use std::fmt;

use bytes::Bytes;
use object_store::Attributes;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::error::Error;
use super::name::{BackupName, BackupPart, ObjectName};
use super::repository::Repository;
use super::upload::{Content, Upload};
use super::writer::Stored;
use crate::codec::{Compression, Digest, FrameFacts, Hasher, PackSealer, SEAL_LENGTH};

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

/// Writes one pack: frames as they come, sealed if the backup is encrypted.
///
/// Dropped without `finish`, it leaves nothing behind as far as the store can still be reached.
pub struct PackWriter {
    upload: Upload,
    finisher: Work,
    is_sealed: bool,
    length: u64,
    /// Appended, not passed on yet.
    fresh: Vec<Bytes>,
    fresh_length: usize,
}

enum Work {
    Idle(Finisher),
    Busy(JoinHandle<(Finisher, Vec<Bytes>)>),
    Over,
}

/// What is done to frames before they are uploaded, on a blocking thread.
struct Finisher {
    hasher: Box<Hasher>,
    sealer: Option<PackSealer>,
}

impl Finisher {
    fn finish(&mut self, frames: Vec<Bytes>) -> Vec<Bytes> {
        let frames = match &mut self.sealer {
            Some(sealer) => frames.iter().map(|frame| sealer.seal(frame).into()).collect(),
            None => frames,
        };
        for bytes in &frames {
            self.hasher.update(bytes);
        }
        frames
    }
}

/// Bytes gathered for one turn of the finisher, so that it costs few hops to a blocking thread.
const BATCH: usize = 1 << 20;

impl PackWriter {
    pub(super) fn new(repository: Repository, name: ObjectName, sealer: Option<PackSealer>) -> Self {
        Self {
            upload: Upload::new(repository, name),
            is_sealed: sealer.is_some(),
            length: 0,
            finisher: Work::Idle(Finisher { hasher: Box::new(Hasher::new()), sealer }),
            fresh: Vec::new(),
            fresh_length: 0,
        }
    }

    /// Bytes the pack will have with the frames appended so far: the offset of the next one.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Takes the next frame; waits while too many parts are under way. The frame is taken even when the
    /// call is dropped before it returns.
    pub async fn append(&mut self, frame: Bytes) -> Result<(), Error> {
        let seal = if self.is_sealed { SEAL_LENGTH } else { 0 };
        self.length += (frame.len() + seal) as u64;
        self.fresh_length += frame.len();
        self.fresh.push(frame);
        if self.fresh_length >= BATCH {
            self.settle().await;
            self.begin();
            self.upload.flush(Attributes::default).await?;
        }
        Ok(())
    }

    /// Waits for the finisher and gives what it made to the upload.
    async fn settle(&mut self) {
        if let Work::Busy(job) = &mut self.finisher {
            let (finisher, frames) = job.await.expect("sealing and hashing do not panic");
            self.finisher = Work::Idle(finisher);
            for bytes in frames {
                self.upload.accept(bytes);
            }
        }
    }

    /// Sets the finisher to work on what is fresh.
    fn begin(&mut self) {
        self.finisher = match std::mem::replace(&mut self.finisher, Work::Over) {
            Work::Idle(mut finisher) => {
                let fresh = std::mem::take(&mut self.fresh);
                self.fresh_length = 0;
                Work::Busy(tokio::task::spawn_blocking(move || {
                    let frames = finisher.finish(fresh);
                    (finisher, frames)
                }))
            }
            other => other,
        };
    }

    /// Stores the pack. `plaintext_length` and `digest` of the receipt are those of the stored bytes.
    pub async fn finish(mut self) -> Result<Stored, Error> {
        self.settle().await;
        self.begin();
        self.settle().await;
        let Work::Idle(Finisher { hasher, .. }) = std::mem::replace(&mut self.finisher, Work::Over) else {
            unreachable!("it has just settled");
        };
        let content = Content {
            length: hasher.length(),
            digest: hasher.digest(),
            encoded: false,
            hash: None,
            stored_digest: None,
        };
        let (name, stored_length) = (self.upload.name(), self.upload.length());
        let outcome = self.upload.finish(Attributes::default(), content).await?;
        Ok(Stored::new(name, content, stored_length, outcome))
    }

    /// Gives up; nothing is stored.
    pub async fn abort(self) {
        self.upload.abort().await;
    }
}

impl fmt::Debug for PackWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackWriter").field("upload", &self.upload).finish_non_exhaustive()
    }
}
