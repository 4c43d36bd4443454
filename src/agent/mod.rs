//! The daemon: one supervised task set per site; wiring, no domain logic.

mod backup;
mod coverage;
mod nodes;
mod site;
mod status;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use backup::{Error as BackupError, Wish, alone as back_up_alone};
pub use nodes::NodesError;
pub use site::{Error as SiteError, Site, chain, policy};
pub use status::SiteStatus;

use crate::config::{Config, HttpConfig, SiteConfig, WalIntake};
use crate::runtime::{RetryPolicy, Signals, Stopped, TaskEnd, TaskGroup, retry};
use crate::serve;
use crate::storage::Access;

/// Storage that cannot be reached at start is waited for; PostgreSQL keeps its WAL meanwhile.
const OPEN_RETRY: RetryPolicy =
    RetryPolicy { first: Duration::from_millis(500), max: Duration::from_secs(15), give_up_after: None };

/// What tasks get beyond the grace given to storage before they are abandoned.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address}:{port}")]
    Listen {
        address: String,
        port: u16,
        #[source]
        source: std::io::Error,
    },
    #[error("site `{site}`")]
    Site {
        site: String,
        #[source]
        source: SiteError,
    },
    #[error("signals cannot be received")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Task(#[from] TaskEnd),
}

impl Error {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Listen { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => {
                Some("another agent may be running; set `http_port` to another port".to_owned())
            }
            Self::Site { source, .. } => source.hint(),
            _ => None,
        }
    }
}

/// Runs the agent until it is told to stop.
pub async fn run(config: &Config) -> Result<(), Error> {
    let mut signals = Signals::install().map_err(Error::Signals)?;
    let listener = listen(&config.http).await?;
    let cancel = CancellationToken::new();
    let sites = tokio::select! { biased;
        _ = signals.next() => return Ok(()),
        sites = open_sites(config, &cancel) => sites?,
    };
    let grace = sites.iter().map(|site| site.config.shutdown_grace).max().unwrap_or_default() + DRAIN_MARGIN;

    let mut archiving = TaskGroup::new(&cancel);
    for site in sites.iter().filter(|site| site.config.active) {
        let name = &site.config.name;
        if site.config.wal_intake == WalIntake::Stream {
            let site = Arc::clone(site);
            archiving.spawn(format!("archiving of {name}"), move |cancel| site::keep_archiving(site, cancel));
        }
        let site = Arc::clone(site);
        archiving.spawn(format!("base backups of {name}"), move |cancel| site::keep_backing_up(site, cancel));
    }
    let mut serving = TaskGroup::new(&CancellationToken::new());
    let deps = dependencies(config, &sites);
    serving.spawn("HTTP server", move |cancel| serve::run(listener, deps, cancel));
    info!(sites = sites.len(), address = config.http.address, port = config.http.port, "pgkeep runs");

    let ended = tokio::select! { biased;
        signal = signals.next() => { info!(?signal, "stopping"); None }
        ended = archiving.unexpected_end() => Some(ended),
        ended = serving.unexpected_end() => Some(ended),
    };
    for name in archiving.drain(grace).await {
        warn!(task = name, "did not stop in time");
    }
    serving.drain(DRAIN_MARGIN).await;
    info!("stopped");
    ended.map_or(Ok(()), |ended| Err(ended.into()))
}

async fn listen(http: &HttpConfig) -> Result<TcpListener, Error> {
    // PGHoard's empty address means every IPv4 address.
    let address = if http.address.is_empty() { "0.0.0.0" } else { &http.address };
    if address.parse::<IpAddr>().is_ok_and(|address| !address.is_loopback()) && http.credentials.is_none() {
        warn!(
            address,
            "anybody who can reach this address can read the WAL; set webserver_username and webserver_password"
        );
    }
    TcpListener::bind((address, http.port)).await.map_err(|source| Error::Listen {
        address: address.to_owned(),
        port: http.port,
        source,
    })
}

async fn open_sites(config: &Config, cancel: &CancellationToken) -> Result<Vec<Arc<Site>>, Error> {
    let mut sites = Vec::new();
    for site in &config.sites {
        let opened =
            retry("open storage", &OPEN_RETRY, cancel, SiteError::is_transient, || open(config, site)).await;
        match opened {
            Ok(site) => sites.push(Arc::new(site)),
            Err(Stopped::Cancelled) => return Ok(sites),
            Err(Stopped::Failed(source)) => return Err(Error::Site { site: site.name.clone(), source }),
        }
    }
    Ok(sites)
}

async fn open(config: &Config, site: &SiteConfig) -> Result<Site, SiteError> {
    Site::open(config, site, Access::Write).await
}

fn dependencies(config: &Config, sites: &[Arc<Site>]) -> serve::Deps {
    let served = sites
        .iter()
        .map(|site| serve::Site {
            name: site.config.name.clone(),
            repository: site.repository.clone(),
            data_directory: site.config.data_directory.clone(),
            expected: site.expected.subscribe(),
        })
        .collect();
    let watched: Vec<Arc<Site>> = sites.to_vec();
    let status = move || {
        let sites: serde_json::Map<_, _> = watched
            .iter()
            .map(|site| {
                let position = *site.position.borrow();
                let status = serde_json::to_value(site.status.snapshot(position)).unwrap_or_default();
                (site.config.name.clone(), status)
            })
            .collect();
        serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "sites": sites })
    };
    serve::Deps {
        sites: served,
        status: Arc::new(status),
        ready: Arc::new(|| Ok(())),
        limits: serve::Limits::default(),
        credentials: config
            .http
            .credentials
            .as_ref()
            .map(|credentials| (credentials.username.clone(), credentials.password.clone())),
    }
}
