//! HTTP on port 16000: WAL to `restore_command`, WAL from `archive_command`, status.
//!
//! An answer of 404 means one thing: storage said that the file does not exist. It ends a recovery, so
//! everything else that goes wrong is another status, and a body that cannot be verified to its last
//! byte is broken off.

mod archive;
mod backups;
mod fetch;
mod listing;
mod new_file;
mod place;
mod prefetched;
mod read_ahead;
mod route;
#[cfg(test)]
mod sample;
mod server;
mod stall;
mod target;
mod window;

pub use archive::{ArchiveError, archive};
pub use fetch::{FetchError, Fetched, Unknown, fetch};
pub use listing::{BackupEntry, pghoard_json};
pub use new_file::NewFile;
pub use prefetched::take_unasked as take_prefetched;
pub use server::{Deps, Limits, Site, run};
pub use target::wal_directory;
