//! What the repository holds, as values.

mod wal_range;

pub use wal_range::{
    JoinedPieces, Missing, Piece, SegmentRange, Stretch, WalCoverage, WalCoverageBuilder, join_pieces,
    list_ranges,
};
