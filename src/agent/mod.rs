//! The daemon: one supervised task set per site; wiring, no domain logic.

mod alerts;
mod backup;
mod coverage;
mod exposure;
mod former;
mod leftovers;
mod nodes;
mod opening;
mod report;
mod site;
mod state_file;
mod status;
mod telemetry;
mod transfers;

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
pub use former::open_former;
pub use nodes::{NodesError, current_segment};
pub use site::{Error as SiteError, Site, chain, policy};
pub use status::SiteStatus;

use crate::config::{self, Config, HttpConfig, WalIntake};
use crate::observe::{names, push_metrics, tell_statsd};
use crate::runtime::{ServiceState, Signal, Signals, TaskEnd, TaskGroup, notify_service};
use crate::serve;
use opening::Opening;
use report::Reporter;
use site::chain as causes;
use telemetry::{Outlets, Telemetry, pass_lines, post_notices};

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
    let telemetry = Arc::new(Telemetry::resume(&state_file::read(&config.reporting.state_file)));
    while let Some(next) = run_with(&config, &telemetry, &mut signals, reload).await? {
        info!("starting anew with the new configuration");
        config = next;
    }
    info!("stopped");
    Ok(())
}

/// Runs with one configuration; returns the next one, if there is one.
async fn run_with(
    config: &Config,
    telemetry: &Arc<Telemetry>,
    signals: &mut Signals,
    reload: &dyn Fn() -> Result<Config, config::Error>,
) -> Result<Option<Config>, Error> {
    let listener = listen(&config.http).await?;
    let cancel = CancellationToken::new();
    let (openings, outlets): (Vec<Opening>, Vec<Outlets>) =
        config.sites.iter().map(|site| Opening::new(site, telemetry)).unzip();
    let openings: Arc<[Opening]> = openings.into();
    let mut serving = TaskGroup::new(&CancellationToken::new());
    let reporter =
        Arc::new(Reporter::new(Arc::clone(&openings), Arc::clone(telemetry), config.reporting.clone()));
    let mut reporting = report_with(config, telemetry, &reporter, outlets);
    let deps = dependencies(config, &openings, &reporter);
    serving.spawn("HTTP server", move |cancel| serve::run(listener, deps, cancel));
    info!(sites = openings.len(), address = config.http.address, port = config.http.port, "pgkeep runs");
    notify_service(ServiceState::Ready);

    let mut opening: FuturesUnordered<_> =
        openings.iter().map(|opening| opening.open(config, &cancel)).collect();
    let mut archiving = TaskGroup::new(&cancel);
    let mut next = None;
    let ended = loop {
        tokio::select! { biased;
            signal = signals.next() => match signal {
                Signal::Reload => {
                    notify_service(ServiceState::Reloading);
                    match reload() {
                    Ok(config) => {
                        telemetry.metrics.add(&names::CONFIG_RELOADS, &[("result", "ok")], 1.0);
                        info!("the configuration is read again; it counts as soon as no base backup runs");
                        next = Some(config);
                    }
                    Err(error) => {
                        telemetry.metrics.add(&names::CONFIG_RELOADS, &[("result", "failed")], 1.0);
                        let hint = error.hint();
                        error!(error = causes(&error), hint, "the new configuration cannot be used; the old one stays");
                    }
                }
                    notify_service(ServiceState::Ready);
                }
                signal => {
                    info!(?signal, "stopping");
                    notify_service(ServiceState::Stopping);
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
            ended = reporting.unexpected_end() => break Err(ended.into()),
        }
    };
    let grace = config.sites.iter().map(|site| site.shutdown_grace).max().unwrap_or_default();
    let grace = config.reporting.stop_grace.unwrap_or_default().max(grace) + DRAIN_MARGIN;
    for name in archiving.drain(grace).await {
        warn!(task = name, "did not stop in time");
    }
    serving.drain(DRAIN_MARGIN).await;
    // Last, so that the end is told, too.
    reporting.drain(DRAIN_MARGIN).await;
    ended.map(|()| next)
}

/// Starts what an opened site needs.
fn start(archiving: &mut TaskGroup, site: &Arc<Site>) {
    if !site.config.active || site.config.wal_intake == WalIntake::Unknown {
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

/// Starts those who tell others how we are.
fn report_with(
    config: &Config,
    telemetry: &Arc<Telemetry>,
    reporter: &Arc<Reporter>,
    outlets: Vec<Outlets>,
) -> TaskGroup {
    let mut tasks = TaskGroup::new(&CancellationToken::new());
    let reporter = Arc::clone(reporter);
    tasks.spawn("reporter", move |cancel| reporter.run(cancel));
    if let Some(target) = config.reporting.statsd.clone() {
        let metrics = telemetry.metrics.clone();
        tasks.spawn("statsd", move |cancel| tell_statsd(metrics, target, cancel));
    }
    if let Some(target) = config.reporting.pushgateway.clone() {
        let metrics = telemetry.metrics.clone();
        tasks.spawn("Pushgateway", move |cancel| push_metrics(metrics, target, cancel));
    }
    for outlet in outlets {
        if let Some((url, notices)) = outlet.notifier {
            tasks.spawn("notifier", move |cancel| post_notices(url, notices, cancel));
        }
        if let Some((statsd, lines)) = outlet.statsd {
            tasks.spawn("storage statsd", move |cancel| pass_lines(statsd, lines, cancel));
        }
    }
    tasks
}

fn dependencies(config: &Config, openings: &Arc<[Opening]>, reporter: &Arc<Reporter>) -> serve::Deps {
    let asked = Arc::clone(openings);
    let (status, metrics) = (Arc::clone(reporter), Arc::clone(reporter));
    serve::Deps {
        sites: openings.iter().map(|opening| opening.served(config.restore_prefetch)).collect(),
        status: Arc::new(move || status.status()),
        metrics: Arc::new(move || metrics.metrics()),
        ready: Arc::new(move || asked.iter().try_for_each(Opening::ready)),
        limits: serve::Limits::default(),
        credentials: config
            .http
            .credentials
            .as_ref()
            .map(|credentials| (credentials.username.clone(), credentials.password.clone())),
    }
}
