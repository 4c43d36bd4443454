//! A site on its way: the HTTP server answers for it before its storage has been reached.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::Error;
use super::leftovers;
use super::site::{Site, chain};
use super::status::{ArchivingStatus, SiteStatus, StatusCell};
use super::telemetry::{Outlets, SiteTelemetry, Telemetry};
use crate::config::{Config, SiteConfig};
use crate::postgres::Expected;
use crate::repository::Repository;
use crate::runtime::{RetryPolicy, Stopped, retry};
use crate::serve;
use crate::storage::Access;

/// Storage that cannot be reached at start is waited for; PostgreSQL keeps its WAL meanwhile.
const OPEN_RETRY: RetryPolicy =
    RetryPolicy { first: Duration::from_millis(500), max: Duration::from_secs(15), give_up_after: None };

pub struct Opening {
    config: SiteConfig,
    site: OnceLock<Arc<Site>>,
    repository: watch::Sender<Option<Repository>>,
    expected: watch::Sender<Expected>,
    backup_wanted: Arc<Notify>,
    telemetry: SiteTelemetry,
    /// Counts until the site has one of its own.
    status: StatusCell,
}

impl Opening {
    pub fn new(config: &SiteConfig, telemetry: &Telemetry) -> (Self, Outlets) {
        let status = SiteStatus {
            site: config.name.clone(),
            storage: config.storage.description(),
            archiving: ArchivingStatus { state: "opening storage", ..ArchivingStatus::default() },
            ..SiteStatus::default()
        };
        let (telemetry, outlets) = SiteTelemetry::new(config, telemetry);
        let opening = Self {
            config: config.clone(),
            site: OnceLock::new(),
            repository: watch::Sender::new(None),
            expected: watch::Sender::new(Expected::default()),
            backup_wanted: Arc::default(),
            telemetry,
            status: StatusCell::new(status),
        };
        (opening, outlets)
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    pub fn telemetry(&self) -> &SiteTelemetry {
        &self.telemetry
    }

    /// The site, once its storage has been reached.
    pub fn opened(&self) -> Option<&Arc<Site>> {
        self.site.get()
    }

    /// Opens the site's storage, however long that takes; `None` when cancelled.
    pub async fn open(
        &self,
        config: &Config,
        cancel: &CancellationToken,
    ) -> Result<Option<Arc<Site>>, Error> {
        let attempt = async || {
            let opened =
                Site::open_watched(config, &self.config, Access::Write, self.telemetry.clone()).await;
            if let Err(error) = &opened {
                self.telemetry.storage_failed();
                self.telemetry.error("opening", "handle_upload", "StorageError");
                self.status.failed(&chain(error), error.hint());
            }
            opened
        };
        let is_transient = super::SiteError::is_transient;
        let mut site = match retry("open storage", &OPEN_RETRY, cancel, is_transient, attempt).await {
            Ok(site) => site,
            Err(Stopped::Cancelled) => return Ok(None),
            Err(Stopped::Failed(source)) => {
                return Err(Error::Site { site: self.config.name.clone(), source });
            }
        };
        site.expected = self.expected.clone();
        site.backup_wanted = Arc::clone(&self.backup_wanted);
        self.repository.send_replace(Some(site.repository.clone()));
        let site = Arc::new(site);
        let site = self.site.get_or_init(|| site).clone();
        leftovers::take_over(&site, cancel).await;
        Ok(Some(site))
    }

    /// What the HTTP server needs; `read_ahead` is how many segments to fetch ahead for PGHoard's clients.
    pub fn served(&self, read_ahead: usize) -> serve::Site {
        let wanted = Arc::clone(&self.backup_wanted);
        let active = self.config.active;
        serve::Site {
            name: self.config.name.clone(),
            prefix: self.config.prefix.clone(),
            repository: self.repository.subscribe(),
            data_directory: self.config.data_directory.clone(),
            expected: self.expected.subscribe(),
            request_backup: Arc::new(move || {
                if !active {
                    return Err("the site is not active, so no base backups are taken of it".to_owned());
                }
                wanted.notify_one();
                Ok(())
            }),
            read_ahead,
        }
    }

    pub fn status(&self) -> SiteStatus {
        match self.site.get() {
            Some(site) => site.status.snapshot(*site.position.borrow()),
            None => self.status.snapshot(None),
        }
    }

    /// `Err` tells why the site's archive cannot be read yet.
    pub fn ready(&self) -> Result<(), String> {
        if self.site.get().is_some() {
            return Ok(());
        }
        let why = self.status.snapshot(None).archiving.last_error.map(|error| error.message);
        let why = why.unwrap_or_else(|| "its storage is being opened".to_owned());
        Err(format!("site `{}`: {why}", self.config.name))
    }
}
