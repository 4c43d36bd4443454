//! The writing half of the pipeline: count and hash, compress, encrypt.
//!
//! Pure.

use super::compress::{Compression, Compressor};
use super::digest::{Digest, HashAlgorithm, Hasher, NamedHash, NamedHasher};
use super::envelope::Sealer;
use super::keys::PublicKey;
use super::seal::StreamSealer;

/// What an encoder has seen and made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub plaintext_length: u64,
    pub stored_length: u64,
    /// Of the plaintext.
    pub digest: Digest,
    /// Of the plaintext, when it was asked for.
    pub hash: Option<NamedHash>,
    /// Of the stored bytes of an encrypted object: no two of them are the same, so that its writer knows
    /// it again without a key.
    pub stored_digest: Option<Digest>,
}

/// Turns plaintext, in chunks of any size, into the stored bytes of one object.
pub struct Encoder {
    hasher: Hasher,
    named: Option<NamedHasher>,
    compressor: Compressor,
    sealing: Option<Box<Sealing>>,
    stored_length: u64,
}

enum AnySealer {
    Envelope(Sealer),
    Stream(StreamSealer),
}

impl AnySealer {
    /// Replaces what lies in `stored` from `start` on.
    fn seal(&mut self, stored: &mut Vec<u8>, start: usize) {
        match self {
            Self::Envelope(sealer) => sealer.seal(stored, start),
            Self::Stream(sealer) => {
                let content = stored.split_off(start);
                sealer.push(&content, stored);
            }
        }
    }

    fn finish(self, stored: &mut Vec<u8>) {
        match self {
            Self::Envelope(sealer) => sealer.finish(stored),
            Self::Stream(sealer) => sealer.finish(stored),
        }
    }
}

/// The encryption, and the digest of what it made.
struct Sealing {
    sealer: AnySealer,
    hasher: Hasher,
}

impl Encoder {
    /// `level` is zstd's, where 0 stands for its default, 3, or lzma's preset, 0 to 9.
    pub fn new(compression: Compression, level: i32) -> Self {
        Self::with_compressor(Compressor::new(compression, level, None))
    }

    /// An encoder for exactly `length` bytes, which spares memory when they are few.
    pub fn for_length(compression: Compression, level: i32, length: u64) -> Self {
        Self::with_compressor(Compressor::new(compression, level, Some(length)))
    }

    fn with_compressor(compressor: Compressor) -> Self {
        Self { hasher: Hasher::new(), named: None, compressor, sealing: None, stored_length: 0 }
    }

    /// Has everything put into PGHoard's envelope for the owner of `key`. Call it before the first push.
    #[must_use]
    pub fn encrypted(self, key: &PublicKey) -> Self {
        self.with_sealer(AnySealer::Envelope(Sealer::new(key)))
    }

    /// Has everything sealed with a backup's own key. Call it before the first push.
    #[must_use]
    pub fn sealed(self, sealer: StreamSealer) -> Self {
        self.with_sealer(AnySealer::Stream(sealer))
    }

    fn with_sealer(mut self, sealer: AnySealer) -> Self {
        self.sealing = Some(Box::new(Sealing { sealer, hasher: Hasher::new() }));
        self
    }

    /// Has the plaintext hashed by `algorithm` as well. Call it before the first push.
    #[must_use]
    pub fn hashed(mut self, algorithm: HashAlgorithm) -> Self {
        self.named = Some(NamedHasher::new(algorithm));
        self
    }

    /// Takes the next bytes of plaintext; appends to `stored` what is ready.
    ///
    /// # Panics
    /// When more is pushed than was announced to [`Encoder::for_length`].
    pub fn push(&mut self, plaintext: &[u8], stored: &mut Vec<u8>) {
        let before = stored.len();
        self.hasher.update(plaintext);
        if let Some(named) = &mut self.named {
            named.update(plaintext);
        }
        self.compressor.push(plaintext, stored);
        if let Some(sealing) = &mut self.sealing {
            sealing.sealer.seal(stored, before);
            sealing.hasher.update(&stored[before..]);
        }
        self.stored_length += (stored.len() - before) as u64;
    }

    /// Appends the rest.
    ///
    /// # Panics
    /// When less was pushed than was announced to [`Encoder::for_length`].
    pub fn finish(mut self, stored: &mut Vec<u8>) -> Summary {
        let before = stored.len();
        self.compressor.finish(stored);
        let stored_digest = self.sealing.map(|mut sealing| {
            sealing.sealer.seal(stored, before);
            sealing.sealer.finish(stored);
            sealing.hasher.update(&stored[before..]);
            sealing.hasher.digest()
        });
        self.stored_length += (stored.len() - before) as u64;
        Summary {
            plaintext_length: self.hasher.length(),
            stored_length: self.stored_length,
            digest: self.hasher.digest(),
            hash: self.named.map(NamedHasher::finish),
            stored_digest,
        }
    }
}
