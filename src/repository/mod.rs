//! Typed names, the one pipeline, receipts: everything of one site in one bucket and prefix.
//!
//! ```text
//! write(Bytes)* ─▶ Encoder [count, digest, compress, encrypt] ─▶ put | multipart ─▶ Stored
//!                  └── pure, on a blocking thread ──┘    └── upload: async, ordered
//! ```
//!
//! Three facts of object stores shape it. Attributes are fixed when a multipart upload *starts*, so the
//! length and digest of a streamed object cannot be its own metadata. Multipart uploads have no conditional
//! create, so only single puts can claim "first writer": a WAL segment of the usual 16 MiB is always one
//! put. And "already exists" after a retried request may be our own write, so content is compared before
//! anything is called a conflict.
//!
//! Nothing is ever replaced: same name and same content is success, other content is
//! [`Error::Conflict`].

mod describe;
mod error;
mod metadata;
mod name;
mod pack;
mod pghoard_name;
mod reader;
#[expect(clippy::module_inception, reason = "the room and its main type are one word")]
mod repository;
mod summary;
mod upload;
mod writer;

pub use crate::codec::{EncodedFrame, FrameDecoder, FrameEncoder, OpeningKey, SealingKey};
pub use describe::Described;
pub use error::Error;
pub use metadata::{ObjectMetadata, StoredAs};
pub use name::{BackupName, BackupPart, Folder, ObjectName, ParseBackupNameError};
pub use pack::{FrameRef, PackId, PackWriter};
pub use pghoard_name::{ParsePghoardNameError, PghoardFolder, PghoardName};
pub use reader::ObjectReader;
pub use repository::{Facts, Listed, ObjectInfo, Repository, Settings};
pub use writer::{ObjectWriter, Outcome, Stored};
