//! PostgreSQL's vocabulary and wire protocol. Knows nothing of storage.

mod lsn;
mod segment;
mod timeline;

pub use lsn::{Lsn, ParseLsnError};
pub use segment::{ParseWalFileNameError, SegmentName, SegmentSize, SegmentSizeError, WalFileName};
pub use timeline::{Ancestor, ParseHistoryError, ParseTimelineError, TimelineHistory, TimelineId};
