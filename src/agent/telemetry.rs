//! What the agent counts, and who hears of it: metrics, transfers, the storage's own notifier and statsd.
//!
//! It outlives a reload, so that counters only ever grow.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::transfers::{Operation, Transfers, file_name, kind_of};
use crate::config::{SiteConfig, StorageStatsd};
use crate::observe::{Metrics, StatsdSocket, names, statsd_line};
use crate::runtime::{Clock, SystemClock};
use crate::secret::Secret;
use crate::storage::{Answer, Asked, Observer, PROBE, Store, StoreEvent};

/// Events on the way to a notifier or a storage's statsd server: some 300 bytes each, so 150 KiB in all.
/// What comes on top while it is away is dropped, and told.
const QUEUE: usize = 512;
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(10);

/// Of the whole process.
#[derive(Debug, Default)]
pub struct Telemetry {
    pub metrics: Metrics,
    pub started: Timestamp,
    transfers: Mutex<BTreeMap<String, Arc<Mutex<Transfers>>>>,
}

impl Telemetry {
    /// Goes on where `state`, an earlier run's state file, ended.
    pub fn resume(state: &Value) -> Self {
        let sites = state["transfer_agent_state"].as_object().into_iter().flatten();
        let transfers =
            sites.map(|(site, state)| (site.clone(), Arc::new(Mutex::new(Transfers::resume(state)))));
        let telemetry = Self {
            metrics: Metrics::default(),
            started: SystemClock.now(),
            transfers: Mutex::new(transfers.collect()),
        };
        telemetry.metrics.set(&names::BUILD_INFO, &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        telemetry.metrics.set(&names::START_TIME, &[], seconds(telemetry.started));
        telemetry
    }

    fn transfers_of(&self, site: &str) -> Arc<Mutex<Transfers>> {
        let mut sites = self.transfers.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(sites.entry(site.to_owned()).or_default())
    }
}

/// A time as Prometheus wants it.
pub fn seconds(time: Timestamp) -> f64 {
    time.as_duration().as_secs_f64()
}

/// A number as metrics have it. Positions in WAL lose their last bits above 8 PiB, which no chart shows.
#[expect(clippy::cast_precision_loss, reason = "metrics are floats")]
pub const fn float(number: u64) -> f64 {
    number as f64
}

/// Of one site. Clones are the same.
#[derive(Clone)]
pub struct SiteTelemetry(Arc<Inner>);

struct Inner {
    site: String,
    prefix: String,
    metrics: Metrics,
    transfers: Arc<Mutex<Transfers>>,
    /// Failures of storage since it last took something.
    failures: AtomicU32,
    notices: Option<mpsc::Sender<String>>,
    lines: Option<(StorageStatsd, mpsc::Sender<String>)>,
}

/// What a site's telemetry needs done beside it.
#[derive(Default)]
pub struct Outlets {
    pub notifier: Option<(Secret, mpsc::Receiver<String>)>,
    pub statsd: Option<(StorageStatsd, mpsc::Receiver<String>)>,
}

impl SiteTelemetry {
    pub fn new(site: &SiteConfig, telemetry: &Telemetry) -> (Self, Outlets) {
        let mut outlets = Outlets::default();
        let notices = site.notifier_url.clone().map(|url| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            outlets.notifier = Some((url, receiver));
            sender
        });
        let lines = site.storage_statsd.clone().map(|statsd| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            outlets.statsd = Some((statsd.clone(), receiver));
            (statsd, sender)
        });
        let inner = Inner {
            site: site.name.clone(),
            prefix: site.prefix.clone(),
            metrics: telemetry.metrics.clone(),
            transfers: telemetry.transfers_of(&site.name),
            failures: AtomicU32::new(0),
            notices,
            lines,
        };
        (Self(Arc::new(inner)), outlets)
    }

    /// For commands that are over before anybody could ask.
    pub fn unheard(site: &SiteConfig) -> Self {
        Self::new(site, &Telemetry::default()).0
    }

    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    pub fn with_transfers<T>(&self, look: impl FnOnce(&Transfers) -> T) -> T {
        look(&self.0.transfers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts an error by our name for where it happened and by PGHoard's.
    pub fn error(&self, place: &'static str, pghoard_place: &'static str, exception: &'static str) {
        let site = self.0.site.as_str();
        self.0.metrics.add(&names::ERRORS, &[("site", site), ("where", place)], 1.0);
        let labels = [("exception", exception), ("where", pghoard_place)];
        self.0.metrics.add(&names::PGHOARD_EXCEPTION, &labels, 1.0);
    }

    /// Notes that storage did not take something.
    pub fn storage_failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Failures of storage since it last took something.
    pub fn storage_failures(&self) -> u32 {
        self.0.failures.load(Ordering::Relaxed)
    }

    /// The store with everything counted.
    pub fn observe(&self, store: &Store) -> Store {
        let inner = Arc::clone(&self.0);
        let base = store.full_key(&self.0.prefix);
        let observer: Observer = Arc::new(move |event| inner.seen(event, &base));
        store.observed(observer)
    }
}

impl Inner {
    fn seen(&self, event: &StoreEvent<'_>, base: &str) {
        let key = event.key.strip_prefix(base).unwrap_or(event.key).trim_start_matches('/');
        if file_name(key).starts_with(PROBE) {
            return;
        }
        let kind = kind_of(key);
        let site = self.site.as_str();
        let (operation, transfer) = match event.asked {
            Asked::Put => ("put", Some(Operation::Upload)),
            Asked::Get => ("get", Some(Operation::Download)),
            Asked::Head => ("head", Some(Operation::Metadata)),
            Asked::List => ("list", Some(Operation::List)),
            Asked::Delete => ("delete", None),
        };
        let result = match event.answer {
            Answer::Done => "ok",
            Answer::Otherwise => "otherwise",
            Answer::Failed => "failed",
        };
        let labels = [("site", site), ("operation", operation), ("result", result)];
        self.metrics.add(&names::REQUESTS, &labels, 1.0);
        let elapsed = event.elapsed.as_secs_f64();
        self.metrics.add(&names::REQUEST_SECONDS, &[("site", site), ("operation", operation)], elapsed);
        let now = SystemClock.now();
        if let Some(transfer) = transfer {
            let mut transfers = self.transfers.lock().unwrap_or_else(PoisonError::into_inner);
            match event.answer {
                Answer::Done => transfers.succeeded(transfer, kind, key, event.bytes, elapsed, now),
                Answer::Failed => transfers.failed(transfer, kind),
                Answer::Otherwise => {}
            }
        }
        if event.answer == Answer::Failed {
            self.metrics.add(&names::PGHOARD_TRANSFER_ERRORS, &[("site", site)], 1.0);
        }
        match event.asked {
            Asked::Put => self.put(event, kind, now),
            Asked::Get => self.got(event, kind),
            _ => {}
        }
        if event.answer == Answer::Done {
            self.notify(event, key, now);
        }
        self.tell_statsd(event);
    }

    fn put(&self, event: &StoreEvent<'_>, kind: &str, now: Timestamp) {
        let site = self.site.as_str();
        let labels = [("site", site), ("type", kind)];
        let bytes = float(event.bytes);
        let upload = |result, bytes| {
            let labels = [("site", site), ("type", kind), ("result", result)];
            self.metrics.add(&names::PGHOARD_UPLOAD, &labels, bytes);
        };
        match event.answer {
            Answer::Failed => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                upload("failed", bytes);
            }
            // It is there, so storage works.
            Answer::Otherwise => self.failures.store(0, Ordering::Relaxed),
            Answer::Done => {
                self.failures.store(0, Ordering::Relaxed);
                upload("ok", bytes);
                self.metrics.add(&names::STORED_OBJECTS, &labels, 1.0);
                self.metrics.add(&names::STORED_BYTES, &labels, bytes);
                self.metrics.set(&names::LAST_STORED, &labels, seconds(now));
                if kind.starts_with("basebackup") {
                    let labels = [("site", site), ("delta", "False")];
                    self.metrics.add(&names::PGHOARD_BACKUP_BYTES, &labels, bytes);
                }
                self.ratio(event, kind);
                let transfers = self.transfers.lock().unwrap_or_else(PoisonError::into_inner);
                let total =
                    transfers.uploads().find(|(each, _)| *each == kind).map_or(0, |(_, kind)| kind.data);
                let xlogs = float(transfers.xlogs_since_basebackup());
                self.metrics.set(&names::PGHOARD_TOTAL_UPLOAD, &labels, float(total));
                self.metrics.set(&names::PGHOARD_XLOGS, &[("site", site)], xlogs);
                self.metrics.set(&names::WAL_SINCE_BACKUP, &[("site", site)], xlogs);
            }
        }
    }

    /// What compression made of the object, where its metadata tells.
    fn ratio(&self, event: &StoreEvent<'_>, kind: &str) {
        let (mut original, mut algorithm) = (None, None);
        for (key, value) in event.metadata() {
            match key {
                "original-file-size" => original = value.parse::<u64>().ok(),
                "compression-algorithm" => algorithm = Some(value),
                _ => {}
            }
        }
        let Some(original) = original.filter(|original| *original > 0) else { return };
        let site = self.site.as_str();
        self.metrics.add(&names::STORED_PLAIN_BYTES, &[("site", site), ("type", kind)], float(original));
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner).compressed(kind, original, event.bytes);
        if let Some(algorithm) = algorithm {
            let labels = [("algorithm", algorithm), ("site", site), ("type", kind)];
            self.metrics.set(&names::PGHOARD_RATIO, &labels, float(event.bytes) / float(original));
        }
    }

    fn got(&self, event: &StoreEvent<'_>, kind: &str) {
        let site = self.site.as_str();
        let result = match event.answer {
            Answer::Done => "ok",
            Answer::Failed => "failed",
            Answer::Otherwise => return,
        };
        let bytes = float(event.bytes);
        let labels = [("site", site), ("type", kind), ("result", result)];
        self.metrics.add(&names::PGHOARD_DOWNLOAD, &labels, bytes);
        if event.answer == Answer::Done {
            self.metrics.add(&names::READ_BYTES, &[("site", site), ("type", kind)], bytes);
        }
    }

    /// As rohmu posts it: the key is that of the site, without the storage's own prefix.
    fn notify(&self, event: &StoreEvent<'_>, key: &str, now: Timestamp) {
        let Some(notices) = &self.notices else { return };
        let key = if self.prefix.is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) };
        let notice = match event.asked {
            Asked::Put => json!({
                "op": "UPLOAD",
                "key": key,
                "size": event.bytes,
                "last_modified": now.strftime("%Y-%m-%dT%H:%M:%S.%6f+00:00").to_string(),
                "metadata": event.metadata().collect::<BTreeMap<_, _>>(),
            }),
            Asked::Delete => json!({ "op": "DELETE", "key": key }),
            _ => return,
        };
        if notices.try_send(notice.to_string()).is_err() {
            warn!(site = self.site, key, "the notifier does not keep up; it is not told of an object");
        }
    }

    /// As rohmu counts them.
    fn tell_statsd(&self, event: &StoreEvent<'_>) {
        let Some((statsd, lines)) = &self.lines else { return };
        let operation = match event.asked {
            Asked::Put => "store_file",
            Asked::Get => "get_file",
            Asked::Head => "metadata_for_key",
            Asked::List => "iter_key",
            Asked::Delete => "delete_key",
        };
        let operation = statsd.operation_names.get(operation).map_or(operation, String::as_str);
        let mut tags = statsd.target.tags.clone();
        tags.insert("operation".to_owned(), operation.to_owned());
        let line = |name, value| {
            let tags = tags.iter().map(|(tag, value)| (tag.as_str(), value.as_str()));
            statsd_line(statsd.target.format, name, tags, value, 'c')
        };
        // What does not fit is lost, as any datagram may be.
        let _ = lines.try_send(line("rohmu_operation_count", 1.0));
        if matches!(event.asked, Asked::Put | Asked::Get) {
            let _ = lines.try_send(line("rohmu_operation_size", float(event.bytes)));
        }
    }
}

/// Posts what happened to objects until cancelled. A notifier that is away loses notices and nothing else.
///
/// # Errors
/// None.
pub async fn post_notices(
    url: Secret,
    mut notices: mpsc::Receiver<String>,
    cancel: CancellationToken,
) -> Result<(), std::convert::Infallible> {
    let client = match reqwest::Client::builder().timeout(NOTIFY_TIMEOUT).build() {
        Ok(client) => client,
        Err(error) => {
            warn!(%error, "the notifier cannot be told anything");
            cancel.cancelled().await;
            return Ok(());
        }
    };
    let mut failing = false;
    loop {
        let notice = tokio::select! { biased;
            () = cancel.cancelled() => return Ok(()),
            notice = notices.recv() => notice,
        };
        let Some(notice) = notice else {
            // The site is gone; the task waits for its owner.
            cancel.cancelled().await;
            return Ok(());
        };
        let post = client.post(url.reveal()).header("content-type", "application/json").body(notice);
        let sent = tokio::select! { biased;
            () = cancel.cancelled() => return Ok(()),
            sent = post.send() => sent.and_then(reqwest::Response::error_for_status),
        };
        match sent {
            Ok(_) => failing = false,
            Err(error) => {
                // The address may hold a password.
                let error = error.without_url();
                if std::mem::replace(&mut failing, true) {
                    debug!(%error, "the notifier was not told");
                } else {
                    warn!(%error, "the notifier was not told");
                }
            }
        }
    }
}

/// Passes lines on to a storage's statsd server until cancelled.
///
/// # Errors
/// None.
pub async fn pass_lines(
    statsd: StorageStatsd,
    mut lines: mpsc::Receiver<String>,
    cancel: CancellationToken,
) -> Result<(), std::convert::Infallible> {
    let mut socket = StatsdSocket::new(&statsd.target.host, statsd.target.port);
    loop {
        tokio::select! { biased;
            () = cancel.cancelled() => return Ok(()),
            line = lines.recv() => {
                if let Some(line) = line {
                    socket.send(&line).await;
                } else {
                    cancel.cancelled().await;
                    return Ok(());
                }
            }
        }
    }
}
