//! The writing end of the pipeline, and the receipt it gives.

use std::fmt;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::error::Error;
use super::metadata::{ObjectMetadata, StoredAs};
use super::name::ObjectName;
use super::pghoard_name::PghoardFolder;
use super::repository::{Facts, Repository};
use super::summary;
use super::upload::{Content, Upload};
use crate::codec::{Digest, Encoder, StreamSealer, Summary};
use crate::postgres::WalFileName;

/// How it came to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Created,
    /// The same content was there under this name.
    AlreadySame,
}

/// The receipt for a stored object. Only a finished writer makes one, and only with a receipt may anything
/// be acknowledged.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: ObjectName,
    pub plaintext_length: u64,
    /// Bytes this writer made; another writer's encoding of the same content may differ.
    pub stored_length: u64,
    /// Of the plaintext.
    pub digest: Digest,
    pub outcome: Outcome,
    _receipt: Receipt,
}

/// Keeps the constructor of [`Stored`] to the repository.
#[derive(Clone, Debug)]
struct Receipt;

impl Stored {
    pub(super) fn new(name: ObjectName, content: Content, stored_length: u64, outcome: Outcome) -> Self {
        Self {
            name,
            plaintext_length: content.length,
            stored_length,
            digest: content.digest,
            outcome,
            _receipt: Receipt,
        }
    }
}

/// Writes one object: push plaintext in, get the receipt out.
///
/// Compression runs on a blocking thread while the caller gathers the next batch and earlier parts are
/// under way. Dropped without `finish`, it stores nothing.
pub struct ObjectWriter {
    upload: Upload,
    metadata: ObjectMetadata,
    encoder: Work,
    begun: bool,
    /// Written, not encoded yet.
    batch: Vec<Bytes>,
    batch_length: usize,
}

enum Work {
    Idle(Box<Encoder>),
    Busy(JoinHandle<(Box<Encoder>, Vec<u8>)>),
    Over,
}

/// Plaintext per turn of the encoder: a millisecond of zstd, many times what a hop to its thread costs.
const BATCH: usize = 512 << 10;

/// What PGHoard reads of a request to keep a backup: its name again, in parts.
fn preservation(name: ObjectName) -> Option<(String, String)> {
    let ObjectName::Pghoard { folder: PghoardFolder::Preservations, name } = name else { return None };
    let (backup, until) = name.as_str().rsplit_once('_')?;
    Some((backup.to_owned(), until.to_owned()))
}

/// Whether objects of this name are encrypted as a whole. A record must be readable without the private
/// key, the mark beside it says nothing, a file list is sealed with its backup's own key, and a request to keep
/// a backup is empty.
const fn is_encrypted(name: ObjectName) -> bool {
    !matches!(
        name,
        ObjectName::Backup { .. } | ObjectName::Pghoard { folder: PghoardFolder::Preservations, .. }
    )
}

impl ObjectWriter {
    pub(super) fn new(
        repository: Repository,
        name: ObjectName,
        facts: Facts,
        length: Option<u64>,
        sealer: Option<StreamSealer>,
    ) -> Self {
        let settings = repository.settings();
        let (compression, level) = (settings.compression, settings.level);
        let key = settings.keys.writing().filter(|_| is_encrypted(name));
        let metadata = ObjectMetadata {
            stored_as: StoredAs::Declared(compression),
            key: key.map(|key| key.id().clone()),
            is_sealed: sealer.is_some(),
            compression_level: Some(level),
            pg_version: facts.pg_version,
            host: Some(settings.host.clone()).filter(|host| !host.is_empty()),
            preserve: preservation(name),
            ..ObjectMetadata::default()
        };
        let mut encoder = match length {
            Some(length) => Encoder::for_length(compression, level, length),
            None => Encoder::new(compression, level),
        };
        if let Some(key) = key {
            encoder = encoder.encrypted(key);
        } else if let Some(sealer) = sealer {
            encoder = encoder.sealed(sealer);
        }
        if let ObjectName::Wal(WalFileName::Segment(_) | WalFileName::Partial(_)) = name
            && let Some(algorithm) = settings.hash_algorithm
        {
            encoder = encoder.hashed(algorithm);
        }
        Self {
            upload: Upload::new(repository, name),
            metadata,
            encoder: Work::Idle(Box::new(encoder)),
            begun: false,
            batch: Vec::new(),
            batch_length: 0,
        }
    }

    /// Takes the next plaintext. The bytes are taken even when the call is dropped before it returns.
    pub async fn write(&mut self, plaintext: Bytes) -> Result<(), Error> {
        if !std::mem::replace(&mut self.begun, true) && self.metadata.key.is_some() {
            self.metadata.summary = summary::of(self.upload.name(), &plaintext);
        }
        self.batch_length += plaintext.len();
        self.batch.push(plaintext);
        if self.batch_length >= BATCH {
            self.settle().await;
            self.begin();
            self.upload.flush(|| self.metadata.to_attributes()).await?;
        }
        Ok(())
    }

    /// Waits for the encoder and passes on what it made.
    async fn settle(&mut self) {
        if let Work::Busy(job) = &mut self.encoder {
            let (encoder, stored) = job.await.expect("the encoder does not panic");
            self.encoder = Work::Idle(encoder);
            self.upload.accept(stored.into());
        }
    }

    /// Sets the encoder to work on the batch.
    fn begin(&mut self) {
        self.encoder = match std::mem::replace(&mut self.encoder, Work::Over) {
            Work::Idle(mut encoder) => {
                let batch = std::mem::take(&mut self.batch);
                let room = self.batch_length / 2;
                self.batch_length = 0;
                Work::Busy(tokio::task::spawn_blocking(move || {
                    let mut stored = Vec::with_capacity(room);
                    for bytes in &batch {
                        encoder.push(bytes, &mut stored);
                    }
                    // It may wait as part of an upload, which counts bytes and not capacities.
                    stored.shrink_to_fit();
                    (encoder, stored)
                }))
            }
            other => other,
        };
    }

    /// Ends the object and stores it. A receipt means that the store has confirmed it.
    ///
    /// # Panics
    /// When the encoder does, for want of memory.
    pub async fn finish(mut self) -> Result<Stored, Error> {
        self.settle().await;
        let Work::Idle(mut encoder) = std::mem::replace(&mut self.encoder, Work::Over) else {
            unreachable!("an encoder that has settled is idle");
        };
        let batch = std::mem::take(&mut self.batch);
        let last = tokio::task::spawn_blocking(move || {
            let mut stored = Vec::new();
            for bytes in &batch {
                encoder.push(bytes, &mut stored);
            }
            let summary = encoder.finish(&mut stored);
            (summary, stored)
        });
        let (summary, stored): (Summary, _) = last.await.expect("the encoder does not panic");
        self.upload.accept(stored.into());
        // Too large for one put: length and digest come too late for its metadata.
        self.upload.flush(|| self.metadata.to_attributes()).await?;
        self.metadata.plaintext_length = Some(summary.plaintext_length);
        self.metadata.digest = Some(summary.digest);
        self.metadata.hash = summary.hash;
        self.metadata.stored_length = Some(summary.stored_length);
        let content = Content {
            length: summary.plaintext_length,
            digest: summary.digest,
            encoded: true,
            hash: summary.hash,
            stored_digest: summary.stored_digest,
        };
        let name = self.upload.name();
        let outcome = self.upload.finish(self.metadata.to_attributes(), content).await?;
        Ok(Stored::new(name, content, summary.stored_length, outcome))
    }

    /// Gives up; nothing is stored.
    pub async fn abort(self) {
        self.upload.abort().await;
    }
}

impl fmt::Debug for ObjectWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectWriter").field("upload", &self.upload).finish_non_exhaustive()
    }
}
