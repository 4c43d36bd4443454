//! What a backup consists of, for backups whose files come as streams and not as frames.
//!
//! Pure.

use bytes::Bytes;

use super::file_list::EntryPath;

/// One step of a stream of files. `Data` and `EndOfFile` belong to the file announced last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Directory {
        path: EntryPath,
        /// Permission bits.
        mode: u32,
    },
    File {
        path: EntryPath,
        /// Permission bits.
        mode: u32,
        /// Seconds since 1970 UTC.
        modified: i64,
    },
    Symlink {
        path: EntryPath,
        target: Vec<u8>,
    },
    Data(Bytes),
    EndOfFile,
}
