//! Stores one WAL file that PostgreSQL wants archived.
//!
//! Shell. Nothing is stored that is not what its name says, that is cut short, or in place of other bytes.
//! Success means that storage has confirmed it: PostgreSQL deletes its own copy then.

use std::io;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};

use super::fetch::SMALL_FILE_BYTES;
use crate::postgres::{
    Expected, LONG_HEADER_BYTES, ParseHistoryError, SegmentName, SegmentSize, TimelineHistory, WalFileName,
    WalPageError, check_segment_start,
};
use crate::repository::{self, Facts, ObjectName, Repository, Stored};

/// Why a file was not stored.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// No file of this name has such a length.
    #[error("`{file}` cannot have {length} bytes")]
    Length { file: WalFileName, length: u64 },
    /// The bytes belong to another name or cluster.
    #[error("`{file}` is not what its name says: {source}")]
    Mismatch { file: WalFileName, source: WalPageError },
    #[error("`{file}` is not a timeline history file: {source}")]
    History { file: WalFileName, source: ParseHistoryError },
    /// The bytes did not all arrive.
    #[error("`{file}` broke off: {source}")]
    Cut { file: WalFileName, source: io::Error },
    /// Refused or failed by storage; [`repository::Error::Conflict`] when other bytes have the name.
    #[error(transparent)]
    Storage(#[from] repository::Error),
}

impl ArchiveError {
    /// Whether other bytes are stored under the name.
    pub const fn is_conflict(&self) -> bool {
        matches!(self, Self::Storage(repository::Error::Conflict { .. }))
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Storage(error) => error.hint(),
            _ => None,
        }
    }
}

/// Stores `file`, whose `length` bytes come out of `body`.
pub async fn archive<B>(
    repository: &Repository,
    expected: &Expected,
    file: WalFileName,
    length: u64,
    mut body: B,
) -> Result<Stored, ArchiveError>
where
    B: Stream<Item = io::Result<Bytes>> + Unpin,
{
    check_length(file, length, expected)?;
    match file {
        WalFileName::Segment(segment) | WalFileName::Partial(segment) => {
            archive_segment(repository, expected, file, segment, length, body).await
        }
        WalFileName::History(timeline) => {
            let content = read_up_to(&mut body, file, length, length).await?;
            TimelineHistory::parse(timeline, &content)
                .map_err(|source| ArchiveError::History { file, source })?;
            Ok(repository.put(ObjectName::Wal(file), content, Facts::default()).await?)
        }
        WalFileName::BackupLabel(..) => {
            let content = read_up_to(&mut body, file, length, length).await?;
            Ok(repository.put(ObjectName::Wal(file), content, Facts::default()).await?)
        }
    }
}

async fn archive_segment<B>(
    repository: &Repository,
    expected: &Expected,
    file: WalFileName,
    segment: SegmentName,
    length: u64,
    mut body: B,
) -> Result<Stored, ArchiveError>
where
    B: Stream<Item = io::Result<Bytes>> + Unpin,
{
    let first = read_up_to(&mut body, file, LONG_HEADER_BYTES as u64, length).await?;
    let header = check_segment_start(&first, segment, expected)
        .map_err(|source| ArchiveError::Mismatch { file, source })?;
    check_length(file, length, &Expected { segment_size: Some(header.segment_size), ..*expected })?;
    let facts = Facts { pg_version: Some(header.major * 10_000) };
    let mut writer = repository.writer(ObjectName::Wal(file), facts);
    let mut left = length - first.len() as u64;
    let mut chunk = Some(first);
    loop {
        if let Some(chunk) = chunk.take()
            && let Err(error) = writer.write(chunk).await
        {
            writer.abort().await;
            return Err(error.into());
        }
        if left == 0 {
            return Ok(writer.finish().await?);
        }
        match next(&mut body, left).await {
            Ok(next) => {
                left -= next.len() as u64;
                chunk = Some(next);
            }
            Err(source) => {
                writer.abort().await;
                return Err(ArchiveError::Cut { file, source });
            }
        }
    }
}

/// Reads chunks until there are at least `enough` of the `length` bytes.
async fn read_up_to<B>(
    body: &mut B,
    file: WalFileName,
    enough: u64,
    length: u64,
) -> Result<Bytes, ArchiveError>
where
    B: Stream<Item = io::Result<Bytes>> + Unpin,
{
    let mut content = BytesMut::new();
    while (content.len() as u64) < enough.min(length) {
        let left = length - content.len() as u64;
        let chunk = next(body, left).await.map_err(|source| ArchiveError::Cut { file, source })?;
        if content.is_empty() && chunk.len() as u64 >= enough {
            return Ok(chunk);
        }
        content.extend_from_slice(&chunk);
    }
    Ok(content.freeze())
}

/// The next chunk, of at most `left` bytes.
async fn next<B>(body: &mut B, left: u64) -> io::Result<Bytes>
where
    B: Stream<Item = io::Result<Bytes>> + Unpin,
{
    match body.next().await {
        Some(Ok(chunk)) if chunk.len() as u64 > left => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "more bytes than announced"))
        }
        Some(chunk) => chunk,
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{left} bytes are missing"))),
    }
}

fn check_length(file: WalFileName, length: u64, expected: &Expected) -> Result<(), ArchiveError> {
    let fits = match file {
        WalFileName::Segment(_) => SegmentSize::try_from(length)
            .is_ok_and(|size| expected.segment_size.is_none_or(|known| known == size)),
        WalFileName::Partial(_) => {
            (1..=expected.segment_size.map_or(1 << 30, SegmentSize::bytes)).contains(&length)
        }
        WalFileName::BackupLabel(..) | WalFileName::History(_) => (1..=SMALL_FILE_BYTES).contains(&length),
    };
    if fits { Ok(()) } else { Err(ArchiveError::Length { file, length }) }
}
