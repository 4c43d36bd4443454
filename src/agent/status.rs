//! What the agent knows of itself, for `/status` and `pgkeep status`.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;

use crate::postgres::{Lsn, TimelineId};
use crate::runtime::{Clock, SystemClock};
use crate::wal::Position;

/// One site as it is now.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SiteStatus {
    pub site: String,
    /// Where the archive is kept, without credentials.
    pub storage: String,
    /// `honoured`, or `ignored`: then two writers are not protected from each other.
    pub conditional_put: Option<&'static str>,
    pub server: Option<ServerStatus>,
    pub archiving: ArchivingStatus,
    pub backup: BackupStatus,
    /// Gaps found since the agent started; `pgkeep status` finds all there are.
    pub gaps: Vec<GapStatus>,
}

/// The server that WAL comes from.
#[derive(Clone, Debug, Serialize)]
pub struct ServerStatus {
    pub place: String,
    pub version: String,
    /// As text, because it does not fit into the numbers of JSON.
    pub system_identifier: String,
    pub standby: bool,
}

/// How archiving stands.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ArchivingStatus {
    /// `opening storage`, `connecting`, `streaming`, `waiting` (for another attempt) or `off`.
    pub state: &'static str,
    pub timeline: Option<TimelineId>,
    pub received_lsn: Option<Lsn>,
    pub stored_lsn: Option<Lsn>,
    pub server_lsn: Option<Lsn>,
    /// Bytes that the server has and the archive has not.
    pub lag_bytes: Option<u64>,
    pub last_error: Option<ErrorStatus>,
}

/// How base backups stand.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BackupStatus {
    pub running: bool,
    pub last: Option<String>,
    pub last_start_time: Option<Timestamp>,
    pub last_error: Option<ErrorStatus>,
}

/// Something that went wrong, until it goes right again.
#[derive(Clone, Debug, Serialize)]
pub struct ErrorStatus {
    pub time: Timestamp,
    pub message: String,
    pub hint: Option<String>,
}

/// WAL that is lost.
#[derive(Clone, Debug, Serialize)]
pub struct GapStatus {
    pub timeline: TimelineId,
    pub from: Lsn,
    pub to: Lsn,
    pub reason: String,
}

/// The status of one site, shared by those who know parts of it.
#[derive(Clone, Debug, Default)]
pub struct StatusCell(Arc<Mutex<SiteStatus>>);

impl StatusCell {
    pub fn new(status: SiteStatus) -> Self {
        Self(Arc::new(Mutex::new(status)))
    }

    pub fn update(&self, change: impl FnOnce(&mut SiteStatus)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Notes what keeps archiving from going on.
    pub fn failed(&self, message: &str, hint: Option<String>) {
        let error = ErrorStatus { time: SystemClock.now(), message: message.to_owned(), hint };
        self.update(|status| status.archiving.last_error = Some(error));
    }

    /// The status with the receiver's present position.
    pub fn snapshot(&self, position: Option<Position>) -> SiteStatus {
        let mut status = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(position) = position {
            let archiving = &mut status.archiving;
            archiving.timeline = Some(position.timeline);
            archiving.received_lsn = Some(position.received);
            archiving.stored_lsn = Some(position.stored);
            archiving.server_lsn = Some(position.server.max(position.received));
            archiving.lag_bytes = Some(position.server.max(position.received).bytes_since(position.stored));
        }
        status
    }
}
