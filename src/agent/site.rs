//! One cluster under care: its repository, its receiver, its base backups.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::alerts::{Alert, Alerts, major_of};
use super::backup::{self, Wish};
use super::former::open_former;
use super::nodes::{self, NodesError};
use super::status::{ArchivingStatus, ErrorStatus, GapStatus, ServerStatus, SiteStatus, StatusCell};
use super::telemetry::{SiteTelemetry, float};
use crate::basebackup::Schedule;
use crate::catalog::Catalog;
use crate::config::{CheckpointMode, Config, SiteConfig, WalIntake};
use crate::observe::{Progress, names};
use crate::postgres::{self, Expected};
use crate::repository::{self, Repository, Settings as RepositorySettings};
use crate::retention::{self, RetentionPolicy};
use crate::runtime::{Backoff, BoxError, Clock, RetryPolicy, SystemClock};
use crate::serve::BackupEntry;
use crate::storage::{self, Access, ConditionalPut};
use crate::wal::{self, Budget, Ended, Known, Position, Reports, SegmentMemory, Slot};

/// How often the schedule is looked at.
const SCHEDULE_INTERVAL: Duration = Duration::from_secs(5);
/// Attempts to archive again: quick at first, then about as often as a server needs to come back.
const ARCHIVE_RETRY: RetryPolicy =
    RetryPolicy { first: Duration::from_millis(200), max: Duration::from_secs(15), give_up_after: None };
/// A reason that does not change is told again after this long.
const REMIND_INTERVAL: Duration = Duration::from_mins(1);
/// A receiver that has had nothing to report for so long streams from an idle server.
const SETTLE_TIME: Duration = Duration::from_secs(3);
/// What nobody but an operator can mend is not worth knocking for more often.
const OPERATOR_RETRY: Duration = Duration::from_secs(30);
/// A base backup that failed is tried again, but not over and over: each attempt costs the server.
const BACKUP_RETRY: RetryPolicy =
    RetryPolicy { first: Duration::from_mins(1), max: Duration::from_hours(1), give_up_after: None };

/// A site with its repository opened.
pub struct Site {
    pub config: SiteConfig,
    pub repository: Repository,
    pub receiver: wal::Settings,
    /// Where the receiver of this process stands; `None` until it streams.
    pub position: watch::Sender<Option<Position>>,
    pub status: StatusCell,
    /// What is known of the cluster, for those who check WAL files against it.
    pub expected: watch::Sender<Expected>,
    pub host: String,
    pub parallelism: usize,
    pub telemetry: SiteTelemetry,
    pub alerts: Alerts,
    /// An alert is raised after more failures of storage in a row than this.
    upload_retries_warning_limit: u32,
    /// While this file exists no base backup begins.
    maintenance_file: PathBuf,
    /// How long storing what has arrived may take when the agent is stopped.
    stop_grace: Duration,
    /// The base backups there are as PGHoard lists them, and when each began.
    listed: Mutex<Vec<(Value, Option<Timestamp>)>>,
    /// The base backup that is being taken, and when that began.
    running: Mutex<Option<(Timestamp, Progress)>>,
    /// Asks for a base backup out of turn.
    pub backup_wanted: Arc<Notify>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Storage(#[from] storage::Error),
}

/// Bytes in a part of a multipart upload, of which an object holds up to three: S3 wants at least 5 MiB, and
/// larger ones only save requests.
fn part_size(memory_limit: u64) -> usize {
    usize::try_from(memory_limit / 12).unwrap_or(usize::MAX).clamp(5 << 20, 16 << 20)
}

/// How many frames may be under way within a memory limit: each takes some 4 MiB in a backup, with its
/// compressor, and some 6 MiB in a restore, and both leave three quarters of the limit to the rest.
fn memory_bound(limit: u64) -> usize {
    usize::try_from(limit / (16 << 20)).unwrap_or(usize::MAX).max(1)
}

impl Error {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Storage(error) => error.hint(),
        }
    }

    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Storage(error) => error.is_transient(),
        }
    }
}

impl Site {
    /// Opens the site's storage. `access` says whether anything will be written.
    pub async fn open(config: &Config, site: &SiteConfig, access: Access) -> Result<Self, Error> {
        Self::open_watched(config, site, access, SiteTelemetry::unheard(site)).await
    }

    /// [`Site::open`] with everything counted in `telemetry`.
    pub async fn open_watched(
        config: &Config,
        site: &SiteConfig,
        access: Access,
        telemetry: SiteTelemetry,
    ) -> Result<Self, Error> {
        let store = telemetry.observe(&storage::open(&site.storage, access).await?);
        let honoured = match access {
            Access::Write => Some(store.probe_conditional_put().await?),
            Access::Read => None,
        };
        if honoured == Some(ConditionalPut::Ignored) {
            warn!(
                site = site.name,
                storage = store.description(),
                "this storage ignores conditional puts: two agents writing to one site would not be kept apart"
            );
        }
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let status = SiteStatus {
            site: site.name.clone(),
            storage: store.description().to_owned(),
            conditional_put: honoured.map(|honoured| match honoured {
                ConditionalPut::Honoured => "honoured",
                ConditionalPut::Ignored => "ignored",
            }),
            archiving: ArchivingStatus { state: "off", ..ArchivingStatus::default() },
            ..SiteStatus::default()
        };
        let settings = RepositorySettings {
            compression: config.compression,
            level: config.compression_level,
            hash_algorithm: config.hash_algorithm,
            keys: site.keys.clone(),
            host: host.clone(),
            part_size: part_size(config.memory_limit),
        };
        let former = open_former(config, site, &settings, access).await?;
        // Five sixteenths of the limit: the rest is the program itself, compressors, upload parts and
        // the frames of a base backup. Far behind the server this budget is hardly used, and half of the
        // limit holds whole segments instead.
        let budget = usize::try_from(config.memory_limit / 16 * 5).unwrap_or(usize::MAX);
        Ok(Self {
            repository: Repository::continuing(store, &site.prefix, settings, former),
            receiver: wal::Settings {
                flush_interval: site.wal_flush_interval,
                shutdown_grace: site.shutdown_grace,
                budget: Budget::new(budget),
                segment_memory: SegmentMemory::new(config.memory_limit / 2),
            },
            position: watch::Sender::new(None),
            status: StatusCell::new(status),
            expected: watch::Sender::new(Expected::default()),
            host,
            parallelism: config.parallelism.min(memory_bound(config.memory_limit)),
            backup_wanted: Arc::default(),
            telemetry,
            alerts: Alerts::new(config.reporting.alert_directory.clone()),
            upload_retries_warning_limit: config.reporting.upload_retries_warning_limit,
            maintenance_file: config.reporting.maintenance_file.clone(),
            stop_grace: config.reporting.stop_grace.unwrap_or(site.shutdown_grace),
            listed: Mutex::default(),
            running: Mutex::default(),
            config: site.clone(),
        })
    }

    /// Whether WAL comes from a server now.
    pub fn is_streaming(&self) -> bool {
        self.status.snapshot(None).archiving.state == "streaming"
    }

    /// The base backup that is being taken, and when that began.
    pub fn running_backup(&self) -> Option<(Timestamp, Progress)> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_running(&self, running: Option<(Timestamp, Progress)>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = running;
    }

    /// Looks at the list of base backups as it was last read.
    pub fn listed<T>(&self, look: impl FnOnce(&[(Value, Option<Timestamp>)]) -> T) -> T {
        look(&self.listed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers which base backups there are.
    fn list(&self, catalog: &Catalog) {
        let (prefix, name) = (&self.config.prefix, &self.config.name);
        let own = catalog.backups.iter();
        let own = own.map(|record| (BackupEntry::of(prefix, name, record), record.start_time));
        let theirs = catalog.pghoard.iter();
        let theirs = theirs.map(|backup| (BackupEntry::of_pghoard(backup), backup.start_time));
        let entries = own.chain(theirs).map(|(entry, start_time)| {
            let mut entry = entry.to_json();
            // PGHoard's state has the last part of the name only.
            let name = entry["name"].as_str().map(|name| name.rsplit('/').next().unwrap_or(name).to_owned());
            entry["name"] = Value::from(name);
            (entry, Some(start_time))
        });
        *self.listed.lock().unwrap_or_else(PoisonError::into_inner) = entries.collect();
    }

    /// Whether a file asks for no base backup to begin.
    async fn is_in_maintenance(&self) -> bool {
        tokio::fs::try_exists(&self.maintenance_file).await.unwrap_or(false)
    }

    /// Raises an alert when storage has failed too often.
    async fn alert_storage(&self) {
        if self.telemetry.storage_failures() > self.upload_retries_warning_limit {
            self.alerts.raise(Alert::UploadRetries).await;
        }
    }

    /// Raises an alert when the server is not of the version it should be.
    async fn check_version(&self, server: Option<&str>) {
        let Some(server) = server.and_then(|version| version.split('.').next()?.parse::<u32>().ok()) else {
            return;
        };
        let configured = self.config.pg_version.map(|version| version / 10_000);
        let on_disk = self.config.data_directory.as_deref().and_then(major_of);
        for (expected, why) in
            [(configured, "`pg_version`"), (on_disk, "`PG_VERSION` in `pg_data_directory`")]
        {
            if let Some(expected) = expected.filter(|expected| *expected != server) {
                warn!(
                    site = self.config.name,
                    server, expected, "the server is of another version than {why} says"
                );
                self.alerts.raise(Alert::VersionMismatch).await;
            }
        }
    }

    /// What the archive holds now, as far as archiving needs to know it.
    pub async fn known(&self) -> Result<Known, repository::Error> {
        let catalog = Catalog::load(&self.repository).await?;
        let end = catalog.coverage.as_ref().and_then(|coverage| {
            let timeline = coverage.timelines().next_back()?;
            let stored = coverage.end_of(timeline)?;
            let whole = coverage.segment_size().floor(stored);
            Some(wal::ArchiveEnd { timeline, whole, stored })
        });
        let identity = catalog.identity();
        if let Some(identity) = identity {
            self.expected.send_replace(Expected {
                system_identifier: Some(identity.system_identifier),
                segment_size: Some(identity.segment_size),
            });
        }
        Ok(Known { identity, end })
    }
}

fn failed_now(message: &str, hint: Option<String>) -> ErrorStatus {
    ErrorStatus { time: SystemClock.now(), message: message.to_owned(), hint }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Since when no server could be connected to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Unreached {
    /// Never was one: what is wrong is wrong with the configuration.
    #[default]
    Always,
    /// There was one; `None` while there still is.
    Since(Option<Instant>),
}

impl Unreached {
    /// Whether an alert is due; a server that is just being restarted is none.
    fn is_alarming(&mut self, transient: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Since(since) => {
                !transient || since.get_or_insert_with(Instant::now).elapsed() >= REMIND_INTERVAL
            }
        }
    }
}

impl Site {
    /// Counts what ended archiving, and raises the alert that it deserves.
    async fn archiving_failed(&self, error: &ArchiveError, unreached: &mut Unreached) {
        let exception = if error.is_of_storage() { "StorageError" } else { "PostgresError" };
        self.telemetry.error("archiving", "walreceiver_run", exception);
        if error.is_of_storage() {
            self.telemetry.storage_failed();
        }
        self.alert_storage().await;
        if let Some(alert) = error.server().and_then(Alert::of)
            && unreached.is_alarming(error.is_transient())
        {
            self.alerts.raise(alert).await;
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum ArchiveError {
    #[error(transparent)]
    Nodes(#[from] NodesError),
    #[error(transparent)]
    Repository(#[from] repository::Error),
    #[error(transparent)]
    Wal(#[from] wal::Error),
}

impl ArchiveError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Nodes(error) => error.hint(),
            Self::Wal(error) => error.hint(),
            Self::Repository(error) => error.hint(),
        }
    }

    /// Whether storage is what fails. It does not mind being asked, and PostgreSQL keeps WAL meanwhile.
    const fn is_of_storage(&self) -> bool {
        matches!(
            self,
            Self::Repository(_) | Self::Wal(wal::Error::Repository(_) | wal::Error::StorageStalled(_))
        )
    }

    /// What the server, or the way to it, has to do with it.
    const fn server(&self) -> Option<&postgres::Error> {
        match self {
            Self::Nodes(NodesError::Server(error)) | Self::Wal(wal::Error::Server(error)) => Some(error),
            _ => None,
        }
    }

    /// Whether it may pass without anybody's help.
    fn is_transient(&self) -> bool {
        match self {
            Self::Nodes(error) => error.is_transient(),
            Self::Repository(error) => error.is_transient(),
            Self::Wal(error) => error.is_transient(),
        }
    }
}

/// The last reason told, so that attempts that fail for the same one do not fill the log.
#[derive(Default)]
struct Told(Option<(String, Instant)>);

impl Told {
    fn tell(&mut self, site: &str, message: &str, hint: Option<&str>, transient: bool, again: Duration) {
        let again_in = format!("{:.1} s", again.as_secs_f32());
        if self.0.as_ref().is_some_and(|(last, at)| last == message && at.elapsed() < REMIND_INTERVAL) {
            debug!(site, error = message, again_in, "archiving stopped, as before");
            return;
        }
        if transient {
            warn!(site, error = message, hint, again_in, "archiving stopped");
        } else {
            error!(site, error = message, hint, again_in, "archiving stopped");
        }
        self.0 = Some((message.to_owned(), Instant::now()));
    }
}

/// Archives WAL until cancelled, through every failure.
pub async fn keep_archiving(site: Arc<Site>, cancel: CancellationToken) -> Result<(), BoxError> {
    let mut backoff = Backoff::new(&ARCHIVE_RETRY, rand::random());
    let mut told = Told::default();
    let mut unreached = Unreached::default();
    while !cancel.is_cancelled() {
        site.status.update(|status| status.archiving.state = "connecting");
        let before = site.position.borrow().map(|position| position.stored);
        let ended = tokio::select! { biased;
            ended = archive_once(&site, &cancel) => ended,
            () = refused_to_stop(&site, &cancel) => {
                warn!(site = site.config.name, "storage did not take the tail in time; stopping without it, the slot keeps it");
                break;
            }
        };
        if site.position.borrow().map(|position| position.stored) != before {
            backoff.reset();
            unreached = Unreached::Since(None);
        }
        let delay = match ended {
            Ok(Ended::Cancelled) => break,
            Ok(_) => {
                info!(site = site.config.name, "the server was shut down; everything it had is stored");
                backoff.next().unwrap_or(ARCHIVE_RETRY.max)
            }
            Err(error) => {
                let (message, hint) = (chain(&error), error.hint());
                let transient = error.is_transient();
                let again = backoff.next().unwrap_or(ARCHIVE_RETRY.max);
                let again = if transient || error.is_of_storage() { again } else { OPERATOR_RETRY };
                told.tell(&site.config.name, &message, hint.as_deref(), transient, again);
                site.archiving_failed(&error, &mut unreached).await;
                site.status.failed(&message, hint);
                again
            }
        };
        site.status.update(|status| {
            status.archiving.state = "waiting";
            status.server = None;
        });
        tokio::select! { biased;
            () = cancel.cancelled() => break,
            () = sleep(delay) => {}
        }
    }
    site.status.update(|status| status.archiving.state = "off");
    Ok(())
}

/// Resolves when stopping has taken longer than storage is given.
async fn refused_to_stop(site: &Site, cancel: &CancellationToken) {
    cancel.cancelled().await;
    sleep(site.stop_grace.max(site.config.shutdown_grace) + Duration::from_secs(2)).await;
}

async fn archive_once(site: &Site, cancel: &CancellationToken) -> Result<Ended, ArchiveError> {
    // Until something is received there is nothing to be stored, and nothing to wait for on the way out.
    let (known, mut connected) = tokio::select! { biased;
        () = cancel.cancelled() => return Ok(Ended::Cancelled),
        prepared = async {
            let known = site.known().await?;
            Ok::<_, ArchiveError>((known, nodes::connect(&site.config).await?))
        } => prepared?,
    };
    let slot = Slot::Permanent(nodes::slot_name(&site.config, connected.node)?);
    let server = ServerStatus {
        place: connected.connection.place().to_owned(),
        version: connected.connection.parameter("server_version").unwrap_or("unknown").to_owned(),
        system_identifier: connected
            .connection
            .identify_system()
            .await
            .map_err(wal::Error::from)?
            .system_identifier
            .to_string(),
        standby: connected.standby,
    };
    if connected.standby {
        warn!(
            site = site.config.name,
            server = server.place,
            "none of the nodes is a primary; archiving from a standby"
        );
    }
    let version = server.version.clone();
    site.status.update(|status| status.server = Some(server));
    site.check_version(Some(&version)).await;
    let reports = Reports {
        position: &site.position,
        gap: &|gap| {
            error!(
                site = site.config.name, timeline = %gap.timeline, from = %gap.from, to = %gap.to, reason = gap.reason,
                "WAL is lost: there is a gap in the archive, a base backup will follow"
            );
            site.status.update(|status| {
                let wal::WalGap { timeline, from, to, reason } = gap;
                status.gaps.push(GapStatus { timeline, from, to, reason });
            });
            site.telemetry.metrics().add(&names::WAL_GAPS, &[("site", &site.config.name)], 1.0);
            site.backup_wanted.notify_one();
        },
    };
    let settings = &site.receiver;
    let connection = &mut connected.connection;
    let watched = follow_recovery(site);
    let ended = tokio::select! { biased;
        ended = wal::archive(connection, &site.repository, known, &slot, settings, &reports, cancel) => ended?,
        never = watched => match never {},
    };
    Ok(ended)
}

/// Says that WAL is streamed once it is, and forgets the last error when it has passed: when something is
/// stored again, or everything is, or nothing has been left to store for a while.
async fn follow_recovery(site: &Site) -> Infallible {
    let mut position = site.position.subscribe();
    let mut first: Option<Position> = None;
    loop {
        let idle = match timeout(SETTLE_TIME, position.changed()).await {
            Ok(Ok(())) => false,
            Ok(Err(_)) => break,
            // Before the first report there is nothing to say.
            Err(_) if first.is_none() => continue,
            Err(_) => true,
        };
        let Some(now) = *position.borrow_and_update() else { continue };
        let first = *first.get_or_insert_with(|| {
            site.status.update(|status| status.archiving.state = "streaming");
            now
        });
        let all_stored = now.stored >= now.server;
        if now.stored > first.stored || (all_stored && (idle || now.server > first.server)) {
            site.status.update(|status| status.archiving.last_error = None);
            break;
        }
    }
    std::future::pending().await
}

/// Takes base backups when they are due, and prunes after each, until cancelled.
pub async fn keep_backing_up(site: Arc<Site>, cancel: CancellationToken) -> Result<(), BoxError> {
    let schedule = Schedule { interval: site.config.schedule.interval, at: site.config.schedule.at };
    let mut backoff = Backoff::new(&BACKUP_RETRY, rand::random());
    let mut last = None;
    let mut loaded = false;
    let mut asked = false;
    let mut held = false;
    // A gap that no backup has healed yet: an earlier run may have found it, or the backup after it failed.
    let mut cut_off = false;
    while !cancel.is_cancelled() {
        let wanted = tokio::select! { biased;
            () = cancel.cancelled() => break,
            () = site.backup_wanted.notified() => true,
            () = sleep(SCHEDULE_INTERVAL) => false,
        };
        // Without WAL a backup could not be finished, so archiving comes first.
        if site.config.wal_intake == WalIntake::Stream && site.position.borrow().is_none() {
            if wanted {
                site.backup_wanted.notify_one();
                sleep(SCHEDULE_INTERVAL).await;
            }
            continue;
        }
        if !loaded {
            match Catalog::load(&site.repository).await {
                Ok(catalog) => {
                    site.list(&catalog);
                    last = catalog.last_start();
                    cut_off = schedule.interval.is_some() && is_cut_off(&catalog);
                    loaded = true;
                }
                Err(error) => {
                    warn!(site = site.config.name, error = chain(&error), "the catalog cannot be read");
                    continue;
                }
            }
        }
        asked |= wanted;
        if !asked && !cut_off && !schedule.is_due(last, SystemClock.now()) {
            continue;
        }
        // While somebody works on the server no backup begins; what was asked for is taken afterwards.
        let maintenance = site.is_in_maintenance().await;
        if maintenance != held {
            held = maintenance;
            info!(
                site = site.config.name, file = %site.maintenance_file.display(), maintenance,
                "a base backup is due, and waits while the maintenance file exists"
            );
        }
        if maintenance {
            continue;
        }
        asked = false;
        // Counted by start time, as the record does; and a backup asked for is asked for until it is there.
        loaded = false;
        if back_up(&site, &cancel).await {
            backoff.reset();
        } else {
            let delay = backoff.next().unwrap_or(BACKUP_RETRY.max);
            tokio::select! { biased;
                () = cancel.cancelled() => break,
                () = sleep(delay) => {}
            }
        }
    }
    Ok(())
}

/// Whether there are backups, and none from which recovery could get to the end of the newest timeline.
fn is_cut_off(catalog: &Catalog) -> bool {
    let windows = catalog.windows();
    !catalog.has_no_backup()
        && windows.last().is_some_and(|newest| newest.earliest.is_none() && !newest.gaps.is_empty())
}

/// One backup with pruning after it; returns whether the backup succeeded.
async fn back_up(site: &Arc<Site>, cancel: &CancellationToken) -> bool {
    site.status.update(|status| status.backup.running = true);
    let began = SystemClock.now();
    let metrics = site.telemetry.metrics();
    let labels = [("site", site.config.name.as_str())];
    metrics.set(&names::PGHOARD_REQUESTED, &labels, 1.0);
    let wish = Wish { fast_checkpoint: site.config.backup_checkpoint == CheckpointMode::Fast, note: None };
    let progress = Progress::lines(format!("backup of {}", site.config.name));
    site.set_running(Some((began, progress.clone())));
    let result = if site.config.wal_intake == WalIntake::Stream {
        Box::pin(backup::with_agent(site, &wish, &progress, cancel)).await
    } else {
        Box::pin(backup::alone(site, &wish, &progress, cancel)).await
    };
    progress.finish();
    site.set_running(None);
    let took = SystemClock.now().duration_since(began).as_secs_f64();
    let count = |result| {
        metrics.add(&names::BACKUPS, &[("site", site.config.name.as_str()), ("result", result)], 1.0);
    };
    let (succeeded, failed) = match result {
        Ok(record) => {
            count("ok");
            metrics.add(&names::PGHOARD_COMPLETED, &[], 1.0);
            metrics.set(&names::PGHOARD_BACKUP_TIME, &[("basebackup_mode", "pgkeep")], took);
            metrics.set(&names::BACKUP_DURATION, &labels, took);
            metrics.set(&names::BACKUP_BYTES, &labels, float(record.stored_bytes));
            metrics.set(&names::BACKUP_PLAIN_BYTES, &labels, float(record.plaintext_bytes));
            site.status.update(|status| {
                status.backup.last = Some(record.name.to_string());
                status.backup.last_start_time = Some(record.start_time);
            });
            (true, None)
        }
        Err(_) if cancel.is_cancelled() => (false, None),
        Err(error) => {
            count("failed");
            metrics.add(&names::PGHOARD_FAILED, &[], 1.0);
            site.telemetry.error("backup", "PGBaseBackup", "BackupError");
            if let Some(alert) = error.server().and_then(Alert::of) {
                site.alerts.raise(alert).await;
            }
            site.alert_storage().await;
            let (message, hint) = (chain(&error), error.hint());
            error!(site = site.config.name, error = message, hint, "the base backup failed");
            (false, Some(failed_now(&message, hint)))
        }
    };
    site.status.update(|status| {
        status.backup.running = false;
        status.backup.last_error = failed;
    });
    if succeeded && let Err(error) = prune(site).await {
        site.telemetry.error("prune", "delete_remote_basebackup", "StorageError");
        warn!(
            site = site.config.name,
            error = chain(&error),
            "pruning failed; it is tried again after the next backup"
        );
    }
    succeeded
}

/// What the site's configuration says of keeping backups.
pub fn policy(site: &SiteConfig) -> RetentionPolicy {
    RetentionPolicy {
        count: site.retention.count,
        count_min: site.retention.count_min,
        age_days_max: site.retention.age_days_max,
        interval: site.schedule.interval.map_or(Duration::ZERO, SignedDuration::unsigned_abs),
    }
}

async fn prune(site: &Site) -> Result<(), repository::Error> {
    let mut catalog = Catalog::load(&site.repository).await?;
    site.list(&catalog);
    let now = SystemClock.now();
    let plan = retention::survey(&site.repository, &mut catalog, &policy(&site.config), now).await?;
    let report = retention::apply(&site.repository, &plan, now).await?;
    let labels = [("site", site.config.name.as_str())];
    site.telemetry.metrics().add(&names::PRUNED, &labels, float(report.backup_count));
    info!(
        site = site.config.name,
        backups = report.backup_count,
        segments = report.segment_count,
        bytes = report.stored_bytes,
        "pruned"
    );
    Ok(())
}
