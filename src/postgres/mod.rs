//! PostgreSQL's vocabulary and wire protocol. Knows nothing of storage.
//!
//! Values come first (positions, timelines, segments, page headers, the label of a base backup),
//! then the wire, from bytes up: `wire` cuts messages, `auth` proves who we are, `replication` and
//! `backup_stream` fold messages into what they mean, and [`Connection`] does all of it over a byte
//! stream that a [`Connector`] opens.

mod auth;
mod backup_label;
mod backup_stream;
mod connect;
mod connection;
mod conninfo;
mod error;
mod lsn;
mod manifest_check;
mod passfile;
mod replication;
mod segment;
mod system;
mod timeline;
mod tls;
mod wal_page;
mod walsender;
mod wire;

pub use auth::AuthError;
pub use backup_label::{BackupLabel, BackupSource, ParseBackupLabelError};
pub use backup_stream::{BackupEvent, BackupStep, BackupStream, BaseBackupStart, Tablespace};
pub use connect::{ByteStream, Connector, Duplex, Encryption, Link, Network};
pub use connection::{Connection, Mode};
pub use conninfo::{
    ChannelBindingPolicy, ConnInfo, ConnInfoError, Host, Keepalive, RootCert, SslMode, TargetSession,
};
pub use error::{Error, OLDEST_MAJOR};
pub use lsn::{Lsn, ParseLsnError};
pub use manifest_check::{ManifestCheck, ManifestError};
pub use passfile::password_for;
pub use replication::{
    BaseBackupOptions, Grammar, ManifestChecksums, SlotName, SlotNameError, SlotState, Started,
    SystemPosition, WalMessage,
};
pub use segment::{ParseWalFileNameError, SegmentName, SegmentSize, SegmentSizeError, WalFileName};
pub use system::SystemIdentity;
pub use timeline::{Ancestor, ParseHistoryError, ParseTimelineError, TimelineHistory, TimelineId};
pub use wal_page::{
    Expected, LONG_HEADER_BYTES, LongFields, LongHeader, PageHeader, Tail, WAL_PAGE_BYTES, WalPageError,
    check_pages, check_segment_start,
};
pub use wire::{Message, Row, ServerError, WireError};
