//! Bytes to bytes, synchronously: digest, compress, and back. Knows no files, no PostgreSQL, no async.
//!
//! ```text
//! plaintext ─push─▶ Encoder [count, digest] ─▶ [compress] ─▶ stored bytes ─▶ Summary
//! plaintext ◀─────  Decoder [count, digest] ◀─ [decompress] ◀─push─ stored bytes
//! ```
//!
//! Everything is push-shaped, because both of PostgreSQL's sources push, and free of a runtime, so that
//! property tests and benchmarks call it as plain functions. An `Ok` of a decompressor proves nothing
//! (snappy has no end mark, several zstd frames may follow each other): [`Decoder::finish`] compares
//! length and digest wherever they are known.

mod compress;
mod decoder;
mod digest;
mod encoder;
mod frame;
mod tar;

pub use compress::{Compression, ParseCompressionError};
pub use decoder::{Decoder, Error, Expected};
pub use digest::{Digest, Hasher, ParseDigestError};
pub use encoder::{Encoder, Summary};
pub use frame::{EncodedFrame, FrameDecoder, FrameEncoder, FrameFacts, MAX_FRAME_LENGTH};
pub use tar::{TarEntry, TarError, TarEvent, TarKind, TarStream};
