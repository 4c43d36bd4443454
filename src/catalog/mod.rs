//! What the repository holds, as values.

mod histories;
mod wal_range;

pub use histories::{Histories, HistoryError, Leg, PathStretch, RecoveryPath};
pub use wal_range::{
    JoinedPieces, Missing, Piece, SegmentRange, Stretch, WalCoverage, WalCoverageBuilder, join_pieces,
    list_ranges,
};
