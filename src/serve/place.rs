//! Writes a fetched file where a client on this machine wants it.

use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::fetch::{Fetched, Unknown};
use super::new_file::NewFile;

/// Chunks on the way to the thread that writes a file: two of at most 1 MiB, one being written and one ready.
const FILE_QUEUE: usize = 2;

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error(transparent)]
    Unknown(#[from] Unknown),
    #[error("cannot write the target: {0}")]
    Target(#[from] io::Error),
}

/// Writes all of `fetched` to `target`, which gets its name only when the last byte is verified and on disk.
pub async fn write_file(mut fetched: Fetched, target: PathBuf) -> Result<(), PlaceError> {
    // Writing and syncing block, so a thread of its own does them. It commits only when told so; a
    // dropped sender means that the fetch failed or the client is gone.
    let (sender, mut receiver) = mpsc::channel::<Option<Bytes>>(FILE_QUEUE);
    let writer = tokio::task::spawn_blocking(move || {
        let mut new_file = NewFile::create(&target)?;
        while let Some(chunk) = receiver.blocking_recv() {
            match chunk {
                Some(chunk) => new_file.write_all(&chunk)?,
                None => return new_file.commit(),
            }
        }
        Ok(())
    });
    loop {
        let chunk = fetched.next().await?;
        let last = chunk.is_none();
        // A writer that is gone has failed, and says why below.
        if sender.send(chunk).await.is_err() || last {
            break;
        }
    }
    drop(sender);
    Ok(writer.await.map_err(io::Error::other).flatten()?)
}
