//! Which WAL the archive has from a position on, without looking at all of it.

use futures_util::TryStreamExt;

use crate::catalog::{Piece, WalCoverage, WalCoverageBuilder};
use crate::postgres::{Lsn, SegmentSize, TimelineId, WalFileName};
use crate::repository::{Error, Folder, ObjectName, Repository};

/// The archive's WAL from the segment that holds `start` on `timeline` onwards, as the listing sorts it.
pub async fn coverage_from(
    repository: &Repository,
    size: SegmentSize,
    timeline: TimelineId,
    start: Lsn,
) -> Result<WalCoverage, Error> {
    let first = size.floor(start);
    // Listing starts after a name, so it starts after the segment before.
    let before = (!first.is_zero()).then(|| {
        let before = size.segment_at(timeline, Lsn::new(first.get() - 1));
        ObjectName::Wal(WalFileName::Segment(before))
    });
    let mut builder = WalCoverageBuilder::new(size);
    // Pieces first: they go only after their segment is stored.
    for listed in repository.list(Folder::Pieces, None).await? {
        if let ObjectName::Piece { segment, start, end } = listed.name {
            builder.piece(segment, Piece { start, end });
        }
    }
    let mut segments = repository.list_stream(Folder::Segments, before);
    while let Some(listed) = segments.try_next().await? {
        if let ObjectName::Wal(WalFileName::Segment(segment)) = listed.name {
            builder.segment(segment);
        }
    }
    Ok(builder.finish())
}
