//! The daemon: one supervised task set per site; wiring, no domain logic.

mod backup;
mod coverage;
mod nodes;
mod opening;
mod site;
mod status;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub use backup::{Error as BackupError, Wish, alone as back_up_alone};
pub use nodes::{NodesError, current_segment};
pub use site::{Error as SiteError, Site, chain, policy};
pub use status::SiteStatus;

use crate::config::{self, Config, HttpConfig, WalIntake};
use crate::runtime::{Signal, Signals, TaskEnd, TaskGroup};
use crate::serve;
use opening::Opening;
use site::chain as causes;

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

/// Runs the agent until it is told to stop. When it is told to (SIGHUP), it calls `reload` and starts anew
/// with what that returns; a configuration that cannot be used leaves it as it is.
pub async fn run(
    mut config: Config,
    reload: &dyn Fn() -> Result<Config, config::Error>,
) -> Result<(), Error> {
    let mut signals = Signals::install().map_err(Error::Signals)?;
    while let Some(next) = run_with(&config, &mut signals, reload).await? {
        info!("starting anew with the new configuration");
        config = next;
    }
    info!("stopped");
    Ok(())
}

/// Runs with one configuration; returns the next one, if there is one.
async fn run_with(
    config: &Config,
    signals: &mut Signals,
    reload: &dyn Fn() -> Result<Config, config::Error>,
) -> Result<Option<Config>, Error> {
    let listener = listen(&config.http).await?;
    let cancel = CancellationToken::new();
    let openings: Arc<[Opening]> = config.sites.iter().map(Opening::new).collect();
    let mut serving = TaskGroup::new(&CancellationToken::new());
    let deps = dependencies(config, &openings);
    serving.spawn("HTTP server", move |cancel| serve::run(listener, deps, cancel));
    info!(sites = openings.len(), address = config.http.address, port = config.http.port, "pgkeep runs");

    let mut opening: FuturesUnordered<_> =
        openings.iter().map(|opening| opening.open(config, &cancel)).collect();
    let mut archiving = TaskGroup::new(&cancel);
    let mut next = None;
    let ended = loop {
        tokio::select! { biased;
            signal = signals.next() => match signal {
                Signal::Reload => match reload() {
                    Ok(config) => {
                        info!("the configuration is read again; it counts as soon as no base backup runs");
                        next = Some(config);
                    }
                    Err(error) => {
                        let hint = error.hint();
                        error!(error = causes(&error), hint, "the new configuration cannot be used; the old one stays");
                    }
                },
                signal => {
                    info!(?signal, "stopping");
                    next = None;
                    break Ok(());
                }
            },
            () = no_backup_runs(&openings), if next.is_some() => break Ok(()),
            Some(opened) = opening.next() => match opened {
                Ok(Some(site)) => start(&mut archiving, &site),
                Ok(None) => {}
                Err(error) => break Err(error),
            },
            ended = archiving.unexpected_end() => break Err(ended.into()),
            ended = serving.unexpected_end() => break Err(ended.into()),
        }
    };
    let grace = config.sites.iter().map(|site| site.shutdown_grace).max().unwrap_or_default() + DRAIN_MARGIN;
    for name in archiving.drain(grace).await {
        warn!(task = name, "did not stop in time");
    }
    serving.drain(DRAIN_MARGIN).await;
    ended.map(|()| next)
}

/// Starts what an opened site needs.
fn start(archiving: &mut TaskGroup, site: &Arc<Site>) {
    if !site.config.active {
        return;
    }
    let name = &site.config.name;
    if site.config.wal_intake == WalIntake::Stream {
        let site = Arc::clone(site);
        archiving.spawn(format!("archiving of {name}"), move |cancel| site::keep_archiving(site, cancel));
    }
    let site = Arc::clone(site);
    archiving.spawn(format!("base backups of {name}"), move |cancel| site::keep_backing_up(site, cancel));
}

async fn no_backup_runs(openings: &[Opening]) {
    while openings.iter().any(|opening| opening.status().backup.running) {
        sleep(Duration::from_secs(1)).await;
    }
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

fn dependencies(config: &Config, openings: &Arc<[Opening]>) -> serve::Deps {
    let (watched, asked) = (Arc::clone(openings), Arc::clone(openings));
    let status = move || {
        let sites: serde_json::Map<_, _> = watched
            .iter()
            .map(Opening::status)
            .map(|status| (status.site.clone(), serde_json::to_value(status).unwrap_or_default()))
            .collect();
        serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "sites": sites })
    };
    serve::Deps {
        sites: openings.iter().map(Opening::served).collect(),
        status: Arc::new(status),
        ready: Arc::new(move || asked.iter().try_for_each(Opening::ready)),
        limits: serve::Limits::default(),
        credentials: config
            .http
            .credentials
            .as_ref()
            .map(|credentials| (credentials.username.clone(), credentials.password.clone())),
    }
}
