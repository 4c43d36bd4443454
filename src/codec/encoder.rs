//! The writing half of the pipeline: count and hash, compress, encrypt.
//!
//! Pure.

use super::compress::{Compression, Compressor};
use super::digest::{Digest, Hasher};
use super::envelope::Sealer;
use super::keys::PublicKey;

/// What an encoder has seen and made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub plaintext_length: u64,
    pub stored_length: u64,
    /// Of the plaintext.
    pub digest: Digest,
}

/// Turns plaintext, in chunks of any size, into the stored bytes of one object.
pub struct Encoder {
    hasher: Hasher,
    compressor: Compressor,
    sealing: Option<Box<Sealing>>,
    stored_length: u64,
}

/// The encryption, and what waits for it.
struct Sealing {
    sealer: Sealer,
    compressed: Vec<u8>,
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
        Self { hasher: Hasher::new(), compressor, sealing: None, stored_length: 0 }
    }

    /// Has everything encrypted for the owner of `key`. Call it before the first push.
    #[must_use]
    pub fn encrypted(mut self, key: &PublicKey) -> Self {
        self.sealing = Some(Box::new(Sealing { sealer: Sealer::new(key), compressed: Vec::new() }));
        self
    }

    /// Takes the next bytes of plaintext; appends to `stored` what is ready.
    ///
    /// # Panics
    /// When more is pushed than was announced to [`Encoder::for_length`].
    pub fn push(&mut self, plaintext: &[u8], stored: &mut Vec<u8>) {
        let before = stored.len();
        self.hasher.update(plaintext);
        match &mut self.sealing {
            None => self.compressor.push(plaintext, stored),
            Some(sealing) => {
                self.compressor.push(plaintext, &mut sealing.compressed);
                sealing.sealer.push(&sealing.compressed, stored);
                sealing.compressed.clear();
            }
        }
        self.stored_length += (stored.len() - before) as u64;
    }

    /// Appends the rest.
    ///
    /// # Panics
    /// When less was pushed than was announced to [`Encoder::for_length`].
    pub fn finish(mut self, stored: &mut Vec<u8>) -> Summary {
        let before = stored.len();
        match self.sealing {
            None => self.compressor.finish(stored),
            Some(mut sealing) => {
                self.compressor.finish(&mut sealing.compressed);
                sealing.sealer.push(&sealing.compressed, stored);
                sealing.sealer.finish(stored);
            }
        }
        self.stored_length += (stored.len() - before) as u64;
        Summary {
            plaintext_length: self.hasher.length(),
            stored_length: self.stored_length,
            digest: self.hasher.digest(),
        }
    }
}
