//! Bytes to bytes, synchronously: digest, compress, encrypt, and back. Knows no files, no PostgreSQL, no async.
//!
//! ```text
//! plaintext ─push─▶ Encoder [count, digest] ─▶ [compress] ─▶ [seal] ─▶ stored bytes ─▶ Summary
//! plaintext ◀─────  Decoder [count, digest] ◀─ [decompress] ◀─ [open] ◀─push─ stored bytes
//! ```
//!
//! Everything is push-shaped, because both of PostgreSQL's sources push, and free of a runtime, so that
//! property tests and benchmarks call it as plain functions. An `Ok` of a decompressor proves nothing
//! (snappy has no end mark, several zstd frames or xz streams may follow each other): [`Decoder::finish`] compares
//! length and digest wherever they are known.

mod compress;
mod decoder;
mod decompress;
mod digest;
mod encoder;
mod envelope;
mod frame;
mod keys;
mod seal;
mod tar;

pub use compress::{Compression, ParseCompressionError};
pub use decoder::{Decoder, Error, Expected};
pub use digest::{Digest, HashAlgorithm, Hasher, NamedHash, NamedHasher, ParseDigestError};
pub use encoder::{Encoder, Summary};
pub use envelope::{EnvelopeError, Opener, Sealer, is_sealed};
pub use frame::{EncodedFrame, FrameDecoder, FrameEncoder, FrameFacts, MAX_FRAME_LENGTH};
pub use keys::{KeyError, KeyId, KeyPart, KeyRing, NewKeyPair, PrivateKey, PublicKey};
pub use seal::{OpeningKey, PackSealer, SEAL_LENGTH, SealError, SealingKey, StreamOpener, StreamSealer};
pub use tar::{TarEntry, TarError, TarEvent, TarKind, TarStream};
