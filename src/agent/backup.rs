//! Takes a base backup and sees to it that the WAL it needs is archived.
//!
//! With the agent at work the receiver's position says when that is so. A backup taken on its own finds
//! out from the replication slot whether somebody archives: a slot in use means yes. Otherwise it streams
//! the WAL itself for as long as the backup takes, from the site's slot when there is one, else from a
//! temporary one that goes away with the connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::coverage::coverage_from;
use super::nodes::{self, NodesError};
use super::site::Site;
use crate::basebackup;
use crate::catalog::BackupRecord;
use crate::observe::Progress;
use crate::postgres::{
    self, BaseBackupOptions, Lsn, ManifestChecksums, SlotName, SystemIdentity, TimelineId,
};
use crate::repository::{self, Repository};
use crate::runtime::{Clock, SystemClock};
use crate::wal::{self, Position, Reports, Slot};

/// How often the archive is looked at while somebody else fills it.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// With no WAL archived for this long, whoever archived it has stopped.
const PATIENCE: Duration = Duration::from_mins(2);

/// Memory for WAL that is streamed beside a backup, in bytes: most of the limit belongs to the backup, and
/// the WAL of its duration need not keep up with the server to the second.
const WAL_BUDGET: usize = 8 << 20;

/// What the user or the schedule asks for.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    pub fast_checkpoint: bool,
    pub note: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Nodes(#[from] NodesError),
    #[error(transparent)]
    Server(#[from] postgres::Error),
    #[error(transparent)]
    Repository(#[from] repository::Error),
    #[error(transparent)]
    Wal(#[from] wal::Error),
    #[error(transparent)]
    Backup(#[from] basebackup::Error),
}

impl Error {
    /// What the server, or the way to it, has to do with it.
    pub const fn server(&self) -> Option<&postgres::Error> {
        match self {
            Self::Nodes(NodesError::Server(error))
            | Self::Server(error)
            | Self::Wal(wal::Error::Server(error))
            | Self::Backup(basebackup::Error::Server(error)) => Some(error),
            _ => None,
        }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Nodes(error) => error.hint(),
            Self::Server(error) => error.hint(),
            Self::Wal(error) => error.hint(),
            Self::Backup(error) => error.hint(),
            Self::Repository(error) => error.hint(),
        }
    }
}

/// Takes a backup while `position` follows what the agent's own receiver archives.
pub async fn with_agent(
    site: &Site,
    wish: &Wish,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<BackupRecord, Error> {
    let mut position = site.position.subscribe();
    let repository = &site.repository;
    let _lent = site.receiver.segment_memory.lend();
    let archived = async move |timeline, start, stop, identity: SystemIdentity| {
        let reached = |now: &Option<Position>| now.is_some_and(|now| now.has_stored(timeline, stop));
        position.wait_for(reached).await.map_err(|_| "the agent is stopping".to_owned())?;
        require_wal(repository, &identity, timeline, start, stop).await
    };
    Box::pin(take(site, wish, progress, cancel, archived)).await
}

/// Takes a backup when no agent runs in this process.
pub async fn alone(
    site: &Arc<Site>,
    wish: &Wish,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<BackupRecord, Error> {
    // Not a child of `cancel`: the streaming outlives the backup, which tidies up first when stopped.
    let streaming = CancellationToken::new();
    let stop = cancel.child_token();
    let mut position = site.position.subscribe();
    let mut archiver = tokio::task::JoinSet::new();
    let archiver_site = Arc::clone(site);
    let archiver_cancel = streaming.clone();
    archiver.spawn(async move { archive_meanwhile(&archiver_site, &archiver_cancel).await });
    // Only when it is settled who archives may the backup begin: its WAL must not be recycled meanwhile.
    let somebody_else = tokio::select! {
        () = cancel.cancelled() => return Err(basebackup::Error::Cancelled.into()),
        started = position.wait_for(Option::is_some) => { drop(started); false }
        ended = archiver.join_next() => match ended {
            Some(Ok(Ok(Archived::BySomebodyElse))) => true,
            Some(Ok(Err(error))) => return Err(error),
            _ => return Err(basebackup::Error::Cancelled.into()),
        },
    };
    let repository = site.repository.clone();
    let backup = take(site, wish, progress, &stop, async move |timeline, start, stop, identity| {
        if somebody_else {
            return wait_for_wal(&repository, &identity, timeline, start, stop).await;
        }
        let reached = |now: &Option<Position>| now.is_some_and(|now| now.has_stored(timeline, stop));
        position.wait_for(reached).await.map_err(|_| "streaming it has ended".to_owned())?;
        require_wal(&repository, &identity, timeline, start, stop).await
    });
    let mut backup = std::pin::pin!(backup);
    let result = tokio::select! {
        result = &mut backup => result,
        Some(ended) = archiver.join_next(), if !somebody_else => {
            // Without its WAL the backup is worth nothing; it removes what it has stored.
            stop.cancel();
            let result = backup.await;
            if let Ok(Err(error)) = ended { Err(error) } else { result }
        }
    };
    streaming.cancel();
    while let Some(ended) = archiver.join_next().await {
        if let Ok(Err(error)) = ended {
            warn!(%error, "archiving WAL for the backup ended with an error");
        }
    }
    result
}

enum Archived {
    BySomebodyElse,
    ByUs,
}

/// Streams WAL until cancelled, unless somebody else does already.
async fn archive_meanwhile(site: &Site, cancel: &CancellationToken) -> Result<Archived, Error> {
    let known = site.known().await?;
    let mut connected = nodes::connect(&site.config).await?;
    let name = nodes::slot_name(&site.config, connected.node)?;
    let reports = Reports {
        position: &site.position,
        gap: &|gap| {
            warn!(timeline = %gap.timeline, from = %gap.from, to = %gap.to, reason = gap.reason, "WAL is lost: a gap in the archive");
        },
    };
    let receiver = wal::Settings {
        budget: wal::Budget::new(WAL_BUDGET),
        segment_memory: wal::SegmentMemory::new(0),
        ..site.receiver.clone()
    };
    let mut slot = Slot::Existing(name);
    loop {
        let connection = &mut connected.connection;
        let archived =
            wal::archive(connection, &site.repository, known, &slot, &receiver, &reports, cancel).await;
        match archived {
            Err(wal::Error::Server(postgres::Error::SlotInUse(name, _))) => {
                info!(slot = %name, "an agent archives the WAL");
                return Ok(Archived::BySomebodyElse);
            }
            Err(wal::Error::Server(postgres::Error::SlotMissing(..)))
                if matches!(slot, Slot::Existing(_)) =>
            {
                info!("nobody archives WAL here; streaming it for the time of the backup");
                slot = Slot::Temporary(temporary_slot()?);
            }
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(Archived::ByUs),
        }
    }
}

fn temporary_slot() -> Result<SlotName, NodesError> {
    Ok(format!("pgkeep_backup_{}", std::process::id()).parse()?)
}

async fn take<W>(
    site: &Site,
    wish: &Wish,
    progress: &Progress,
    cancel: &CancellationToken,
    wal_stored: W,
) -> Result<BackupRecord, Error>
where
    W: AsyncFnOnce(TimelineId, Lsn, Lsn, SystemIdentity) -> Result<(), String>,
{
    let mut connected = nodes::connect(&site.config).await?;
    let identity = connected.connection.identity().await?;
    wal::check_identity(site.known().await?.identity, &identity)?;
    let request = basebackup::Request {
        options: BaseBackupOptions {
            label: "pgkeep".to_owned(),
            fast_checkpoint: wish.fast_checkpoint,
            max_rate_kb: site
                .config
                .backup_rate_limit
                .map(|rate| u32::try_from(rate >> 10).unwrap_or(u32::MAX)),
            progress: true,
            manifest_checksums: ManifestChecksums::Crc32c,
            verify_checksums: true,
        },
        note: wish.note.clone(),
        host: site.host.clone(),
        parallelism: site.parallelism,
    };
    let waited = |timeline, start, stop| wal_stored(timeline, start, stop, identity);
    let clock: &dyn Clock = &SystemClock;
    let ends =
        basebackup::Ends { connection: &mut connected.connection, identity, repository: &site.repository };
    let record = basebackup::take(ends, &request, clock, progress, waited, cancel).await?;
    Ok(record)
}

/// Fails when WAL of the backup is missing, which nothing will bring back.
async fn require_wal(
    repository: &Repository,
    identity: &SystemIdentity,
    timeline: TimelineId,
    start: Lsn,
    stop: Lsn,
) -> Result<(), String> {
    let size = identity.segment_size;
    let coverage =
        coverage_from(repository, size, timeline, start).await.map_err(|error| error.to_string())?;
    coverage.covers(timeline, start, stop).map_err(|missing| missing.to_string())
}

/// Waits until somebody else has archived the WAL of the backup.
async fn wait_for_wal(
    repository: &Repository,
    identity: &SystemIdentity,
    timeline: TimelineId,
    start: Lsn,
    stop: Lsn,
) -> Result<(), String> {
    let mut reached = None;
    let mut progress_seen = Instant::now();
    loop {
        let size = identity.segment_size;
        let coverage =
            coverage_from(repository, size, timeline, start).await.map_err(|error| error.to_string())?;
        let Err(missing) = coverage.covers(timeline, start, stop) else { return Ok(()) };
        let end = coverage.end_of(timeline);
        if end != reached {
            reached = end;
            progress_seen = Instant::now();
        } else if progress_seen.elapsed() > PATIENCE {
            return Err(missing.to_string());
        }
        sleep(POLL_INTERVAL).await;
    }
}
