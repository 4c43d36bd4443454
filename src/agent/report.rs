//! What the agent tells of itself: gauges, `/status`, `/metrics` and the state file.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Map, Value, json};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::exposure::Exposure;
use super::opening::Opening;
use super::site::Site;
use super::state_file;
use super::telemetry::{SiteTelemetry, Telemetry, float, seconds};
use crate::config::{Reporting, WalIntake};
use crate::observe::{Tags, exposition, names};
use crate::postgres::Lsn;
use crate::runtime::{Clock, SystemClock};
use crate::serve::pghoard_json;
use crate::wal::Position;

/// How finely the age of WAL that is not stored is known.
const ROUND: Duration = Duration::from_secs(1);
/// Rounds from one state file to the next, as PGHoard has it.
const STATE_ROUNDS: u32 = 5;

/// Tells how the sites of one configuration are.
pub struct Reporter {
    openings: Arc<[Opening]>,
    telemetry: Arc<Telemetry>,
    reporting: Reporting,
    sampled: Mutex<BTreeMap<String, Sampled>>,
}

/// What is remembered of a site from one look to the next.
#[derive(Debug, Default)]
struct Sampled {
    exposure: Exposure,
    position: Option<Position>,
    /// When WAL last came.
    wal_activity: Option<Timestamp>,
    /// Bytes of the running backup, and when they last grew.
    backup: Option<(u64, Timestamp)>,
}

impl Reporter {
    pub fn new(openings: Arc<[Opening]>, telemetry: Arc<Telemetry>, reporting: Reporting) -> Self {
        Self { openings, telemetry, reporting, sampled: Mutex::default() }
    }

    /// Samples, and writes the state file, until cancelled.
    ///
    /// # Errors
    /// None: a disk that is full of other things is no reason to stop backing up.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), Infallible> {
        let mut rounds = interval(ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut round, mut failing) = (0_u32, false);
        loop {
            tokio::select! { biased;
                () = cancel.cancelled() => break,
                _ = rounds.tick() => {}
            }
            self.look(SystemClock.now());
            if round.is_multiple_of(STATE_ROUNDS) {
                self.measure(SystemClock.now());
                self.write_state(&mut failing).await;
            }
            round = round.wrapping_add(1);
        }
        self.write_state(&mut failing).await;
        Ok(())
    }

    async fn write_state(&self, failing: &mut bool) {
        let file = self.reporting.state_file.clone();
        let state = pghoard_json(&self.status());
        let written = tokio::task::spawn_blocking(move || {
            if state_file::is_wanted(&file) {
                state_file::write(&file.path, &state).map_err(|error| (file, error))
            } else {
                Ok(())
            }
        });
        match written.await {
            Ok(Err((file, error))) if file.configured && !std::mem::replace(failing, true) => {
                warn!(path = %file.path.display(), %error, "the state file cannot be written");
            }
            Ok(Ok(())) => *failing = false,
            _ => {}
        }
    }

    fn sites(&self) -> impl Iterator<Item = &Arc<Site>> {
        self.openings.iter().filter_map(Opening::opened)
    }

    /// Notes how far each site is.
    fn look(&self, now: Timestamp) {
        let mut sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
        for site in self.sites() {
            let sampled = sampled.entry(site.config.name.clone()).or_default();
            let position = *site.position.borrow();
            if let Some(position) = position {
                let server = site.is_streaming().then_some(position.server.max(position.received));
                sampled.exposure.note(now, server, position.stored);
            }
            if sampled.position != position {
                sampled.position = position;
                sampled.wal_activity = Some(now);
            }
            sampled.backup = site.running_backup().map(|(_, progress)| match sampled.backup {
                Some((done, since)) if done == progress.done() => (done, since),
                _ => (progress.done(), now),
            });
        }
    }

    /// Sets the gauges.
    fn measure(&self, now: Timestamp) {
        let sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = &self.telemetry.metrics;
        for site in self.sites() {
            let name = site.config.name.as_str();
            let labels = [("site", name)];
            let set = |metric, value| metrics.set(metric, &labels, value);
            let nothing = Sampled::default();
            let sampled = sampled.get(name).unwrap_or(&nothing);
            if site.config.active && site.config.wal_intake == WalIntake::Stream {
                let streaming = site.is_streaming();
                set(&names::ARCHIVING_UP, f64::from(u8::from(streaming)));
                set(&names::WAL_OLDEST_UNSTORED, sampled.exposure.seconds(now, streaming));
            }
            if let Some(position) = *site.position.borrow() {
                let server = position.server.max(position.received);
                set(&names::WAL_RECEIVED, float(position.received.get()));
                set(&names::WAL_STORED, float(position.stored.get()));
                set(&names::WAL_SERVER, float(server.get()));
                set(&names::WAL_LAG, float(server.bytes_since(position.stored)));
            }
            let running = site.running_backup();
            set(&names::BACKUP_RUNNING, f64::from(u8::from(running.is_some())));
            let stalled = sampled.backup.map_or(0.0, |(_, since)| now.duration_since(since).as_secs_f64());
            set(&names::BACKUP_STALLED, stalled);
            metrics.set(&names::PGHOARD_STALLED, &[], stalled);
            if let Some((_, progress)) = running
                && let Some(total) = progress.total()
            {
                let ratio = (float(progress.done()) / float(total)).min(1.0);
                set(&names::BACKUP_PROGRESS, ratio);
                set(&names::PGHOARD_PROGRESS, ratio * 100.0);
            }
            let newest = site.listed(|listed| listed.iter().filter_map(|(_, start)| *start).max());
            if let Some(newest) = newest {
                set(&names::BACKUP_TIME, seconds(newest));
            }
            if site.config.active {
                set(&names::BACKUP_COUNT, site.listed(|listed| float(listed.len() as u64)));
            }
            upload_ages(&site.telemetry, name, now);
        }
    }

    /// What `/metrics` answers: ours always, PGHoard's names when `prometheus` is configured.
    pub fn metrics(&self) -> String {
        let now = SystemClock.now();
        self.look(now);
        self.measure(now);
        let samples = self.telemetry.metrics.samples();
        let none = Tags::new();
        let tags = self.reporting.prometheus.as_ref();
        let shown = samples.iter().filter(|sample| tags.is_some() || !sample.metric.is_pghoard());
        exposition(shown, tags.unwrap_or(&none))
    }

    /// What `/status` answers and the state file holds: ours, and PGHoard's keys beside it.
    pub fn status(&self) -> Value {
        let statuses = self.openings.iter().map(Opening::status);
        let ours: Map<String, Value> = statuses
            .map(|status| (status.site.clone(), serde_json::to_value(status).unwrap_or_default()))
            .collect();
        let mut status = self.pghoard_status();
        status.insert("version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
        status.insert("sites".to_owned(), Value::Object(ours));
        Value::Object(status)
    }

    fn pghoard_status(&self) -> Map<String, Value> {
        let sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
        let mut top: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
        for name in
            ["backup_sites", "pg_basebackups", "pg_receivexlogs", "walreceivers", "transfer_agent_state"]
        {
            top.insert(name, Map::new());
        }
        let mut put = |key, site: &str, value| {
            if let Some(sites) = top.get_mut(key) {
                sites.insert(site.to_owned(), value);
            }
        };
        let mut compressor = Map::new();
        for opening in self.openings.iter() {
            let name = opening.name();
            let telemetry = opening.telemetry();
            let (state, compressed) =
                telemetry.with_transfers(|transfers| (transfers.to_state(), transfers.to_compressor()));
            put("transfer_agent_state", name, state);
            compressor.insert(name.to_owned(), compressed);
            let Some(site) = opening.opened() else {
                put("backup_sites", name, json!({ "basebackups": [] }));
                continue;
            };
            let backups =
                site.listed(|listed| listed.iter().map(|(entry, _)| entry.clone()).collect::<Vec<_>>());
            put("backup_sites", name, json!({ "basebackups": backups }));
            let sampled = sampled.get(name);
            if site.config.active && site.config.wal_intake == WalIntake::Stream {
                let activity = sampled.and_then(|sampled| sampled.wal_activity).map(z_time);
                let running = site.is_streaming();
                let stored = site.position.borrow().map(|position| position.stored).map(Lsn::get);
                put("pg_receivexlogs", name, json!({ "latest_activity": activity, "running": running }));
                put(
                    "walreceivers",
                    name,
                    json!({ "latest_activity": activity, "running": running, "last_flushed_lsn": stored }),
                );
            }
            if let Some((began, _)) = site.running_backup() {
                let activity = sampled.and_then(|sampled| sampled.backup).map_or(began, |(_, since)| since);
                let backup = json!({ "latest_activity": z_time(activity), "running": true });
                put("pg_basebackups", name, backup);
            }
        }
        let mut status: Map<String, Value> =
            top.into_iter().map(|(key, sites)| (key.to_owned(), Value::Object(sites))).collect();
        let started = self.telemetry.started.to_zoned(TimeZone::UTC);
        status
            .insert("startup_time".to_owned(), json!(started.strftime("%Y-%m-%dT%H:%M:%S.%6f").to_string()));
        status.insert("compressors".to_owned(), json!([compressor]));
        // Nothing waits in queues here: what is not stored is kept by PostgreSQL.
        status.insert("queues".to_owned(), json!({ "compression_queue": 0, "transfer_queue": 0 }));
        status.insert("served_files".to_owned(), json!({}));
        status
    }
}

fn upload_ages(telemetry: &SiteTelemetry, site: &str, now: Timestamp) {
    telemetry.with_transfers(|transfers| {
        for (kind, transfer) in transfers.uploads() {
            if let Some(last) = transfer.last_success {
                let age = now.duration_since(last).as_secs_f64().max(0.0);
                let labels = [("site", site), ("type", kind)];
                telemetry.metrics().set(&names::PGHOARD_LAST_UPLOAD_AGE, &labels, age);
            }
        }
    });
}

/// As PGHoard's JSON has a time.
fn z_time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}
