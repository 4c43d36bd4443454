//! What the repository holds, as values.

mod backup;
mod backup_keys;
mod content;
mod file_list;
mod file_list_object;
mod histories;
mod known;
mod load;
mod pghoard_backup;
mod pghoard_control;
mod pghoard_read;
mod pieces;
mod snapshot;
mod wal_range;

pub use backup::{
    BackupFrom, BackupRecord, ENCRYPTED_RECORD_FORMAT, FileListRecord, PackUse, RECORD_FORMAT, RecordError,
    RecordProof, TablespaceRecord,
};
pub use backup_keys::{BackupKeyError, BackupKeys, WrappedKey, new_backup_key};
pub use content::Content;
pub use file_list::{
    EntryKind, EntryPath, Extent, FILE_LIST_FORMAT, FileEntry, FileListDecoder, FileListEncoder,
    FileListError, MAX_LINE_LENGTH,
};
pub use file_list_object::{FileListObjectError, FileListReader, FileListWriter};
pub use histories::{Histories, HistoryError, Leg, PathStretch, RecoveryPath};
pub use known::{Backup, BackupId};
pub use pghoard_backup::{
    PGHOARD_SEGMENT_SIZE, PghoardBackup, PghoardFormat, PghoardId, PghoardTablespace, parse_time,
};
pub use pghoard_control::{
    CONTROL_MEMBER, DeltaFile, EmbeddedFile, FileDigest, NameSet, PghoardChunk, PghoardControl, PghoardDelta,
};
pub use pghoard_read::{PghoardError, read_control};
pub use pieces::{Join, Piece, Step, join_pieces};
pub use snapshot::{
    BackupChoice, Catalog, DamagedBackup, SiteIdentity, UnfinishedBackup, WalTotals, Window, WindowStart,
};
pub use wal_range::{Missing, SegmentRange, Stretch, WalCoverage, WalCoverageBuilder, list_ranges};

#[cfg(test)]
pub(crate) use snapshot::example;
