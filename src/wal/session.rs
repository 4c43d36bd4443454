//! One connection's worth of archiving: from "who are you" to the end of the stream.
//!
//! Order matters here. The server's identity is compared with the archive's before anything is written;
//! the history files of all its timelines are stored before any segment of theirs; the slot is read on
//! every connection, because one that was lost silently holds back nothing.

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::error::Error;
use super::receiver::{self, Ended, Position, Run, Settings};
use super::start::{self, ArchiveEnd, ServerState, Start};
use crate::catalog::SiteIdentity;
use crate::postgres::{
    self, Connection, Expected, Lsn, SlotName, SlotState, Started, SystemIdentity, TimelineHistory,
    TimelineId, WalFileName,
};
use crate::repository::{Facts, ObjectName, Repository};

/// The largest history file that is read: a line is some fifty bytes, and nobody promotes 100,000 times.
const HISTORY_LIMIT: u64 = 8 << 20;

/// The slot that keeps WAL on the server until it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Made when it is missing, and kept.
    Permanent(SlotName),
    /// Used if it is there and free, never made.
    Existing(SlotName),
    /// Goes away with the connection.
    Temporary(SlotName),
}

impl Slot {
    const fn name(&self) -> &SlotName {
        match self {
            Self::Permanent(name) | Self::Existing(name) | Self::Temporary(name) => name,
        }
    }
}

/// What the archive is known to hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// `None` while the archive is empty.
    pub identity: Option<SiteIdentity>,
    pub end: Option<ArchiveEnd>,
}

/// WAL that the server no longer has and the archive does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalGap {
    pub timeline: TimelineId,
    /// Where the archive ends.
    pub from: Lsn,
    /// Where it goes on.
    pub to: Lsn,
    pub reason: String,
}

/// What a session tells while it runs.
pub struct Reports<'a> {
    pub position: &'a watch::Sender<Option<Position>>,
    /// Called once for each gap; a new base backup is then needed.
    pub gap: &'a (dyn Fn(WalGap) + Send + Sync),
}

/// Archives from `connection` until the server stops, something fails, or `cancel` fires.
pub async fn archive(
    connection: &mut Connection,
    repository: &Repository,
    known: Known,
    slot: &Slot,
    settings: &Settings,
    reports: &Reports<'_>,
    cancel: &CancellationToken,
) -> Result<Ended, Error> {
    let system = connection.identify_system().await?;
    let identity = connection.identity().await?;
    check_identity(known.identity, &identity)?;
    let size = identity.segment_size;
    let history = store_histories(connection, repository, system.timeline).await?;
    let held = prepare_slot(connection, slot).await?;
    let server = ServerState { history: &history, flush: system.flush_lsn, slot: held.restart_lsn };
    let mut start = start::choose(known.end, &server, size)?;
    if start.diverged {
        warn!(
            timeline = %start.timeline, lsn = %start.lsn,
            "the archive holds WAL that this server's history left behind; it is kept, archiving goes on with the server's timeline"
        );
    }
    let expected = Expected {
        system_identifier: Some(identity.system_identifier),
        segment_size: Some(identity.segment_size),
    };
    let mut gap_found = false;
    loop {
        let run = Run {
            timeline: start.timeline,
            size,
            start: start.lsn,
            pg_version: identity.server_version_num,
            expected,
        };
        let streamed = match connection.start_replication(Some(slot.name()), start.lsn, start.timeline).await
        {
            Ok(Started::Streaming) => {
                info!(timeline = %start.timeline, lsn = %start.lsn, "streaming WAL");
                receiver::stream(connection, repository, run, settings, reports.position, cancel).await
            }
            Ok(Started::TimelineEnded { next, switch }) => Ok(Ended::Timeline { next, switch }),
            Err(error) => Err(error.into()),
        };
        let ended = match streamed {
            Ok(ended) => ended,
            Err(Error::Server(
                error @ (postgres::Error::WalRemoved(_) | postgres::Error::SlotInvalidated(..)),
            )) if !gap_found => {
                // Never just try again: the WAL will not come back, and what is lost now grows.
                gap_found = true;
                let renewed = renew_slot(connection, slot).await?;
                let server = ServerState { slot: renewed.restart_lsn, ..server.clone() };
                let resumed = start::choose(None, &server, size)?;
                report_gap(reports, start, resumed, &error.to_string());
                start = resumed;
                continue;
            }
            Err(error) => return Err(error),
        };
        let Ended::Timeline { next, switch } = ended else { return Ok(ended) };
        info!(timeline = %next, lsn = %switch, "the server went over to another timeline");
        store_history(connection, repository, next).await?;
        let lsn = size.floor(switch);
        start = Start { timeline: next, lsn, stored: lsn, diverged: false };
    }
}

fn report_gap(reports: &Reports<'_>, before: Start, after: Start, reason: &str) {
    let gap =
        WalGap { timeline: before.timeline, from: before.stored, to: after.lsn, reason: reason.to_owned() };
    (reports.gap)(gap);
}

/// Compares the server with what the archive was made from; an empty archive takes any server.
pub fn check_identity(known: Option<SiteIdentity>, server: &SystemIdentity) -> Result<(), Error> {
    let Some(known) = known else { return Ok(()) };
    let (archive, found) = (known.system_identifier, server.system_identifier);
    if archive != found {
        return Err(Error::OtherSystem { archive, server: found });
    }
    let (archive, found) = (known.segment_size.bytes(), server.segment_size.bytes());
    if archive != found {
        return Err(Error::OtherSegmentSize { archive, server: found });
    }
    Ok(())
}

/// Stores the history files of the server's timeline and of all its ancestors.
async fn store_histories(
    connection: &mut Connection,
    repository: &Repository,
    timeline: TimelineId,
) -> Result<TimelineHistory, Error> {
    let Some(text) = store_history(connection, repository, timeline).await? else {
        return Ok(TimelineHistory::root(timeline));
    };
    let history =
        TimelineHistory::parse(timeline, &text).map_err(|source| Error::History { timeline, source })?;
    for ancestor in history.ancestors() {
        store_history(connection, repository, ancestor.timeline).await?;
    }
    Ok(history)
}

/// Stores the history file of one timeline, if it has one and the server still knows it. The archive's
/// own copy stands in for one that the server has lost.
async fn store_history(
    connection: &mut Connection,
    repository: &Repository,
    timeline: TimelineId,
) -> Result<Option<Bytes>, Error> {
    if timeline == TimelineId::FIRST {
        return Ok(None);
    }
    let name = ObjectName::Wal(WalFileName::History(timeline));
    match connection.timeline_history(timeline).await? {
        Some(text) => {
            repository.put(name, text.clone(), Facts::default()).await?;
            Ok(Some(text))
        }
        None => match history_in_archive(repository, name).await {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.is_not_found() => Err(Error::NoHistory(timeline)),
            Err(error) => Err(error.into()),
        },
    }
}

/// Forks are all that is wanted of it, and those are known without the private key, too.
async fn history_in_archive(
    repository: &Repository,
    name: ObjectName,
) -> Result<Bytes, crate::repository::Error> {
    match repository.get(name, HISTORY_LIMIT).await {
        Err(error) if error.is_locked() => repository.outline(name, error).await,
        read => read,
    }
}

/// A slot that is ready to stream from.
struct Held {
    /// `None` where the server does not tell.
    restart_lsn: Option<Lsn>,
}

async fn prepare_slot(connection: &mut Connection, slot: &Slot) -> Result<Held, Error> {
    if let Slot::Temporary(name) = slot {
        connection.create_slot(name, true).await?;
        return Ok(Held { restart_lsn: restart_lsn(connection.read_slot(name).await?) });
    }
    let name = slot.name();
    match connection.read_slot(name).await? {
        state @ SlotState::Reserved { .. } => Ok(Held { restart_lsn: restart_lsn(state) }),
        SlotState::Invalidated => {
            warn!(slot = %name, "the replication slot had been invalidated; making it anew");
            renew_slot(connection, slot).await
        }
        SlotState::Missing | SlotState::Unknown if matches!(slot, Slot::Existing(_)) => {
            // Starting to stream tells what looking could not.
            Ok(Held { restart_lsn: None })
        }
        SlotState::Missing => create_slot(connection, name).await,
        // Before 15 a physical replication connection cannot look; creating tells whether it is there.
        SlotState::Unknown => match create_slot(connection, name).await {
            Err(Error::Server(postgres::Error::SlotExists(..))) => Ok(Held { restart_lsn: None }),
            created => created,
        },
    }
}

async fn create_slot(connection: &mut Connection, name: &SlotName) -> Result<Held, Error> {
    connection.create_slot(name, false).await?;
    info!(slot = %name, "made the replication slot");
    Ok(Held { restart_lsn: restart_lsn(connection.read_slot(name).await?) })
}

/// Drops the slot and makes it again, so that it holds back WAL from now on.
async fn renew_slot(connection: &mut Connection, slot: &Slot) -> Result<Held, Error> {
    let name = slot.name();
    match connection.drop_slot(name).await {
        Ok(()) | Err(postgres::Error::SlotMissing(..)) => {}
        Err(error) => return Err(error.into()),
    }
    match slot {
        Slot::Permanent(name) | Slot::Existing(name) => create_slot(connection, name).await,
        Slot::Temporary(_) => Box::pin(prepare_slot(connection, slot)).await,
    }
}

const fn restart_lsn(state: SlotState) -> Option<Lsn> {
    match state {
        SlotState::Reserved { restart_lsn, .. } => Some(restart_lsn),
        _ => None,
    }
}
