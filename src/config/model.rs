//! The configuration as meant: validated, with defaults and units. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;

use super::encryption::{hash_algorithm, key_ring};
use super::environment::LIBPQ_VARIABLES;
use super::error::{Error, Problem, Warning};
use super::indirect::member_place;
use super::nodes::{conninfo, default_slot, parsed};
use super::raw::{Algorithm, RawCheckpoint, RawConfig, RawNode, RawSite};
use super::reporting::{Reporting, StorageStatsd};
use super::storage::{notifier_url, storage_config};
use crate::codec::{Compression, HashAlgorithm, KeyRing};
use crate::observe::LogLevel;
use crate::postgres::{ConnInfo, SlotName};
use crate::runtime::Lookup;
use crate::secret::Secret;
use crate::storage::StorageConfig;

/// Enough to keep two downloads busy while one segment is replayed.
const DEFAULT_PREFETCH: i32 = 4;
const DEFAULT_HTTP_PORT: u16 = 16000;
const DEFAULT_MEMORY_LIMIT: u64 = 64 << 20;
/// Below this not even one multipart part, one segment and their codecs fit.
const LEAST_MEMORY_LIMIT: u64 = 32 << 20;
/// More threads than this bring nothing before the network is full, and each costs memory.
const MOST_DEFAULT_PARALLELISM: usize = 16;
const MOST_PARALLELISM: u16 = 256;

/// What the program goes by.
#[derive(Debug, Clone)]
pub struct Config {
    /// In the order of their names.
    pub sites: Vec<SiteConfig>,
    pub http: HttpConfig,
    pub compression: Compression,
    /// Level of zstd, where 0 is zstd's own default, or preset of lzma.
    pub compression_level: i32,
    /// Of PGHoard's hash beside WAL, where it is wanted.
    pub hash_algorithm: Option<HashAlgorithm>,
    /// Bytes of data in flight in the whole process.
    pub memory_limit: u64,
    /// Threads for compression and transfers.
    pub parallelism: usize,
    /// WAL segments to fetch ahead for PGHoard's clients.
    pub restore_prefetch: usize,
    /// Set when the configuration says so; flag and environment go before it.
    pub log_level: Option<LogLevel>,
    /// Who is told what, and by which signs.
    pub reporting: Reporting,
    /// The file this came from, absolute; `None` when it came from the environment.
    pub source: Option<PathBuf>,
}

/// The HTTP server.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    pub address: String,
    pub port: u16,
    /// Clients must give these.
    pub credentials: Option<Credentials>,
}

/// User name and password of HTTP basic authentication.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub username: String,
    pub password: Secret,
}

/// One cluster under care.
#[derive(Debug, Clone)]
pub struct SiteConfig {
    pub name: String,
    /// Stands before every object of the site.
    pub prefix: String,
    pub active: bool,
    pub wal_intake: WalIntake,
    pub nodes: Vec<NodeConfig>,
    /// On every node that names none.
    pub slot: String,
    pub storage: StorageConfig,
    /// Who is told of every object stored or deleted; may hold a password.
    pub notifier_url: Option<Secret>,
    /// Who is told of requests to storage.
    pub storage_statsd: Option<StorageStatsd>,
    /// The directory in which PGHoard kept this site's files.
    pub state_directory: Option<PathBuf>,
    /// What the server's version should be.
    pub pg_version: Option<u32>,
    pub keys: KeyRing,
    /// Other sites whose backups and WAL this one continues.
    pub moved_from: Vec<String>,
    pub data_directory: Option<PathBuf>,
    pub schedule: Schedule,
    pub retention: Retention,
    /// Longest time that written WAL stays out of storage.
    pub wal_flush_interval: Duration,
    /// Longest time to wait for storage when PostgreSQL shuts down.
    pub shutdown_grace: Duration,
    /// Bytes a second.
    pub backup_rate_limit: Option<u64>,
    /// Of scheduled base backups.
    pub backup_checkpoint: CheckpointMode,
}

/// Where a site's WAL comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalIntake {
    /// Over the replication protocol.
    Stream,
    /// From PostgreSQL's `archive_command`.
    Push,
    /// Nowhere; a base backup brings the WAL it needs.
    BackupOnly,
    /// A mode that nobody knows: nothing is started.
    Unknown,
}

/// A server.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// libpq connection string or URI, as configured.
    pub conninfo: Secret,
    /// The same, with what it leaves out filled in from libpq's environment variables.
    pub connection: ConnInfo,
    /// Replication slot, where it differs from the site's.
    pub slot: Option<String>,
}

/// When base backups are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// `None`: never by themselves.
    pub interval: Option<SignedDuration>,
    /// Hour and minute of the day, UTC.
    pub at: Option<(u8, u8)>,
}

/// Which base backups are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retention {
    /// At most this many; `None`: no limit.
    pub count: Option<u32>,
    /// Age never leaves fewer than this; 0: age removes none.
    pub count_min: u32,
    /// Days.
    pub age_days_max: Option<f64>,
}

/// How a base backup's checkpoint is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointMode {
    /// Over time, easy on the server.
    Spread,
    /// At once.
    Fast,
}

/// Facts about the host that defaults depend on.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// CPUs this process may use.
    pub cpus: usize,
    /// Where relative paths start.
    pub current_directory: &'a Path,
    pub env: Lookup<'a>,
}

impl Config {
    /// The site to work on: the named one, or the only one.
    ///
    /// # Errors
    /// When there is none of that name, or several and none was named.
    pub fn site(&self, name: Option<&str>) -> Result<&SiteConfig, Error> {
        let known = || {
            let names: Vec<String> = self.sites.iter().map(|site| format!("`{}`", site.name)).collect();
            names.join(", ")
        };
        match (name, self.sites.as_slice()) {
            (_, []) => Err(Error::NoSites),
            (None, [only]) => Ok(only),
            (None, _) => Err(Error::SiteNotNamed { known: known() }),
            (Some(name), sites) => sites
                .iter()
                .find(|site| site.name == name)
                .ok_or_else(|| Error::NoSuchSite { name: name.to_owned(), known: known() }),
        }
    }

    /// Gives the file its meaning; every problem is found, not only the first.
    pub(super) fn from_raw(raw: &RawConfig, host: Host) -> Result<(Self, Vec<Warning>), Vec<Problem>> {
        let mut findings = Findings::default();
        let compression = raw.compression.clone().unwrap_or_default();
        let algorithm = compression.algorithm.unwrap_or_default();
        let config = Self {
            http: http(raw, &mut findings),
            compression: match algorithm {
                Algorithm::Snappy => Compression::Snappy,
                Algorithm::Lzma => Compression::Lzma,
                Algorithm::Zstd => Compression::Zstd,
            },
            compression_level: level(algorithm, compression.level, &mut findings),
            hash_algorithm: hash(raw, &mut findings),
            memory_limit: memory_limit(raw, &mut findings),
            restore_prefetch: usize::try_from(raw.restore_prefetch.unwrap_or(DEFAULT_PREFETCH)).unwrap_or(0),
            parallelism: parallelism(raw, compression.thread_count, host.cpus, &mut findings),
            log_level: raw.log_level.as_ref().and_then(|level| {
                level.parse().map_err(|error| findings.problem("log_level", format!("{error}"))).ok()
            }),
            sites: sites(raw, host, &mut findings),
            reporting: Reporting::from_raw(
                raw,
                host.current_directory,
                &mut |problem| findings.problems.push(problem),
                &mut |place, why| {
                    findings
                        .warnings
                        .push(Warning::Doubtful { place: place.to_owned(), why: why.to_owned() });
                },
            ),
            source: None,
        };
        findings.check_sites_are_apart(&config.sites);
        if findings.problems.is_empty() { Ok((config, findings.warnings)) } else { Err(findings.problems) }
    }
}

#[derive(Default)]
struct Findings {
    problems: Vec<Problem>,
    warnings: Vec<Warning>,
}

impl Findings {
    fn problem(&mut self, place: &str, why: impl Into<String>) {
        self.problems.push(Problem::new(place, why));
    }

    fn doubtful(&mut self, place: &str, why: &str) {
        self.warnings.push(Warning::Doubtful { place: place.to_owned(), why: why.to_owned() });
    }

    /// Two sites in one place would write each other's objects.
    fn check_sites_are_apart(&mut self, sites: &[SiteConfig]) {
        let mut seen = BTreeMap::new();
        for site in sites {
            let place = (bucket_of(&site.storage), site.prefix.as_str());
            if let Some(other) = seen.insert(place, &site.name) {
                let why = format!(
                    "site `{other}` has the same object storage and prefix; give one another `prefix`"
                );
                self.problem(&format!("backup_sites.{}", site.name), why);
            }
        }
    }
}

/// What two sites must not share together with their prefix. Credentials do not count.
fn bucket_of(storage: &StorageConfig) -> [&str; 3] {
    match storage {
        StorageConfig::Local { directory } => ["", "", directory.to_str().unwrap_or_default()],
        StorageConfig::S3(s3) => [s3.endpoint.as_deref().unwrap_or("amazon"), &s3.bucket, &s3.prefix],
    }
}

fn http(raw: &RawConfig, findings: &mut Findings) -> HttpConfig {
    let credentials = match (&raw.webserver_username, &raw.webserver_password) {
        (Some(username), Some(password)) => {
            Some(Credentials { username: username.clone(), password: password.clone() })
        }
        (Some(_), None) => {
            findings.doubtful(
                "webserver_username",
                "no password is asked for unless `webserver_password` is set, too",
            );
            None
        }
        (None, Some(_)) => {
            findings.doubtful(
                "webserver_password",
                "no password is asked for unless `webserver_username` is set, too",
            );
            None
        }
        (None, None) => None,
    };
    let address = match raw.http_address.as_deref() {
        None => "127.0.0.1",
        Some("") => "0.0.0.0",
        Some(address) => address,
    };
    HttpConfig {
        address: address.to_owned(),
        port: raw.http_port.map_or(DEFAULT_HTTP_PORT, |port| port.0),
        credentials,
    }
}

fn level(algorithm: Algorithm, level: Option<i32>, findings: &mut Findings) -> i32 {
    let level = level.unwrap_or(0);
    let range = match algorithm {
        Algorithm::Snappy => return level,
        Algorithm::Lzma => 0..=9,
        Algorithm::Zstd => -7..=22,
    };
    if !range.contains(&level) {
        let (least, most) = (range.start(), range.end());
        findings
            .problem("compression.level", format!("expected a level from {least} to {most}, found {level}"));
    }
    level
}

fn hash(raw: &RawConfig, findings: &mut Findings) -> Option<HashAlgorithm> {
    Some(match raw.hash_algorithm.as_deref().map(hash_algorithm)? {
        Ok(Some(algorithm)) => algorithm,
        Ok(None) => {
            findings.doubtful("hash_algorithm", "not available here; sha1 is written instead, and says so");
            HashAlgorithm::default()
        }
        Err(problem) => {
            findings.problems.push(problem);
            HashAlgorithm::default()
        }
    })
}

fn memory_limit(raw: &RawConfig, findings: &mut Findings) -> u64 {
    let limit = raw.memory_limit.map_or(DEFAULT_MEMORY_LIMIT, |limit| limit.0);
    if limit < LEAST_MEMORY_LIMIT {
        findings.problem("memory_limit", "expected at least 32MiB; below that not even one segment fits");
    }
    limit
}

fn parallelism(raw: &RawConfig, threads: Option<u16>, cpus: usize, findings: &mut Findings) -> usize {
    let asked = [("parallelism", raw.parallelism), ("compression.thread_count", threads)];
    let asked = asked.into_iter().find_map(|(place, count)| count.map(|count| (place, count)));
    if let Some((place, count)) = asked {
        if !(1..=MOST_PARALLELISM).contains(&count) {
            findings.problem(place, format!("expected 1 to {MOST_PARALLELISM}, found {count}"));
        }
        return usize::from(count);
    }
    cpus.clamp(1, MOST_DEFAULT_PARALLELISM)
}

fn sites(raw: &RawConfig, host: Host, findings: &mut Findings) -> Vec<SiteConfig> {
    let sites = raw.backup_sites.iter().flatten();
    sites.filter_map(|(name, site)| SiteReader::new(name, findings).read(raw, site, host)).collect()
}

/// Reads one site, with its place at hand for messages.
struct SiteReader<'a> {
    name: &'a str,
    place: String,
    findings: &'a mut Findings,
}

impl<'a> SiteReader<'a> {
    fn new(name: &'a str, findings: &'a mut Findings) -> Self {
        Self { name, place: format!("backup_sites.{name}"), findings }
    }

    fn problem(&mut self, key: &str, why: impl Into<String>) {
        self.findings.problem(&member_place(&self.place, key), why);
    }

    fn doubtful(&mut self, key: &str, why: &str) {
        self.findings.doubtful(&member_place(&self.place, key), why);
    }

    fn read(mut self, raw: &RawConfig, site: &RawSite, host: Host) -> Option<SiteConfig> {
        self.check_name();
        let active = site.active.unwrap_or(true);
        let wal_intake = self.wal_intake(site);
        let nodes = self.nodes(site, host);
        if active && site.nodes.as_ref().is_none_or(Vec::is_empty) {
            self.doubtful("nodes", "an active site without nodes cannot be streamed or backed up");
        }
        let storage = self.storage(raw, site, host);
        let store = site.object_storage.as_ref();
        let notifier_url = store.and_then(|store| store.notifier.as_ref()).map(notifier_url);
        let notifier_url = notifier_url.transpose().unwrap_or_else(|problem| {
            self.storage_problem(problem);
            None
        });
        let keys = key_ring(site).unwrap_or_else(|problems| {
            for problem in problems {
                self.problem(&problem.place, problem.why);
            }
            KeyRing::default()
        });
        let wal_flush_interval = site.wal_flush_interval.map_or(Duration::from_secs(1), |span| span.0);
        if wal_flush_interval < Duration::from_millis(50) {
            self.problem("wal_flush_interval", "expected at least 50ms");
        }
        let slot = site.slot.clone().unwrap_or_else(|| default_slot(self.name));
        let slot = self.slot("slot", &slot);
        let prefix = self.prefix(raw, site);
        let schedule = self.schedule(site);
        let retention = self.retention(site);
        // Only now, so that the problems of every key above are found.
        let (storage, slot) = storage.zip(slot)?;
        let backup_location = raw.backup_location.as_ref();
        Some(SiteConfig {
            state_directory: backup_location.map(|path| host.current_directory.join(path).join(&prefix)),
            prefix,
            notifier_url,
            storage_statsd: store.and_then(|store| store.statsd_info.as_ref()).map(StorageStatsd::from),
            pg_version: site.pg_version,
            active,
            wal_intake,
            nodes,
            slot,
            storage,
            keys,
            moved_from: site.moved_from.clone().unwrap_or_default(),
            data_directory: site.pg_data_directory.as_ref().map(|path| host.current_directory.join(path)),
            schedule,
            retention,
            wal_flush_interval,
            shutdown_grace: site.shutdown_grace.map_or(Duration::from_secs(10), |span| span.0),
            backup_rate_limit: site.backup_rate_limit.map(|limit| limit.0).filter(|limit| *limit > 0),
            backup_checkpoint: match site.backup_checkpoint {
                None | Some(RawCheckpoint::Spread) => CheckpointMode::Spread,
                Some(RawCheckpoint::Fast) => CheckpointMode::Fast,
            },
            name: self.name.to_owned(),
        })
    }

    fn wal_intake(&mut self, site: &RawSite) -> WalIntake {
        match site.active_backup_mode.as_deref() {
            None | Some("pg_receivexlog" | "walreceiver") => WalIntake::Stream,
            Some("archive_command") => WalIntake::Push,
            Some("standalone_hot_backup" | "basic") => WalIntake::BackupOnly,
            Some(other) => {
                let why = format!(
                    "nothing is started for a mode `{other}`; expected `pg_receivexlog`, `walreceiver`, \
                     `archive_command`, `standalone_hot_backup` or `basic`"
                );
                self.doubtful("active_backup_mode", &why);
                WalIntake::Unknown
            }
        }
    }

    fn storage(&mut self, config: &RawConfig, site: &RawSite, host: Host) -> Option<StorageConfig> {
        let Some(raw) = &site.object_storage else {
            self.problem("object_storage", "missing; it says where the site is stored");
            return None;
        };
        if raw.host.is_some() && raw.is_secure == Some(true) && !raw.is_verify_tls.unwrap_or(false) {
            let why = "the server's certificate is not checked, as in PGHoard; set it to true";
            self.doubtful("object_storage.is_verify_tls", why);
        }
        let storage = storage_config(raw, host.current_directory, host.env);
        let storage = storage.map_err(|problem| self.storage_problem(problem)).ok()?;
        if let (StorageConfig::Local { directory }, Some(state)) = (&storage, &config.backup_location)
            && host.current_directory.join(state).components().eq(directory.components())
        {
            let why =
                "the same as `backup_location`, where PGHoard's working files lie; use another directory";
            self.problem("object_storage.directory", why);
            return None;
        }
        Some(storage)
    }

    fn storage_problem(&mut self, problem: Problem) {
        // What Amazon's variables say stands in no file.
        if problem.place.starts_with("AWS_") {
            self.findings.problems.push(problem);
        } else {
            self.problem(&format!("object_storage.{}", problem.place), problem.why);
        }
    }

    /// A site's name is part of URLs.
    fn check_name(&mut self) {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.chars().all(fits) {
            let place = self.place.clone();
            let why = "expected a site name of letters, digits, `-`, `_` and `.`, not starting with `.`";
            self.findings.problem(&place, why);
        }
    }

    fn slot(&mut self, key: &str, name: &str) -> Option<String> {
        let slot = name.parse::<SlotName>().map_err(|error| self.problem(key, format!("{error}")));
        slot.ok().map(|slot| slot.to_string())
    }

    fn nodes(&mut self, site: &RawSite, host: Host) -> Vec<NodeConfig> {
        let mut nodes = Vec::new();
        let defaults = ConnInfo::from_env(host.env).unwrap_or_else(|error| {
            self.findings.problem(LIBPQ_VARIABLES, error.to_string());
            ConnInfo::default()
        });
        for (index, node) in site.nodes.iter().flatten().enumerate() {
            let (text, slot) = match node {
                RawNode::Text { conninfo, slot } => (conninfo.clone(), slot.clone()),
                RawNode::Keywords { keywords, slot } => {
                    let pairs =
                        keywords.iter().map(|(keyword, value)| (keyword.as_str(), value.reveal().as_str()));
                    (Secret::new(conninfo(pairs)), slot.clone())
                }
            };
            let slot = slot.and_then(|slot| self.slot(&format!("nodes[{index}].slot"), &slot));
            match parsed(text.reveal()) {
                Ok(given) => {
                    nodes.push(NodeConfig { conninfo: text, connection: given.or(defaults.clone()), slot });
                }
                Err(why) => self.problem(&format!("nodes[{index}]"), why),
            }
        }
        nodes
    }

    fn prefix(&mut self, raw: &RawConfig, site: &RawSite) -> String {
        let prefix = site.prefix.clone().unwrap_or_else(|| match raw.path_prefix.as_deref() {
            None | Some("") => self.name.to_owned(),
            Some(before) => format!("{before}/{}", self.name),
        });
        let prefix = prefix.trim_matches('/').to_owned();
        if prefix.split('/').any(|part| matches!(part, "." | "..")) {
            self.problem("prefix", "`.` and `..` are not allowed in it");
        }
        prefix
    }

    fn schedule(&mut self, site: &RawSite) -> Schedule {
        let interval = site.basebackup_interval_hours.and_then(|hours| {
            let interval = SignedDuration::try_from_secs_f64(hours * 3600.0).ok();
            let interval = interval.filter(|interval| *interval > SignedDuration::ZERO);
            if interval.is_none() {
                self.problem("basebackup_interval_hours", format!("expected hours above 0, found {hours}"));
            }
            interval
        });
        let (hour, minute) = (site.basebackup_hour, site.basebackup_minute);
        for (key, value, limit) in [("basebackup_hour", hour, 23), ("basebackup_minute", minute, 59)] {
            if let Some(value) = value.filter(|value| *value > limit) {
                self.problem(key, format!("expected 0 to {limit}, found {value}"));
            }
        }
        if hour.is_none() && minute.is_some() {
            self.doubtful("basebackup_minute", "not used without `basebackup_hour`");
        }
        if hour.is_some() && minute.is_none() {
            self.doubtful("basebackup_hour", "taken as the full hour; set `basebackup_minute`, too");
        }
        Schedule { interval, at: hour.map(|hour| (hour, minute.unwrap_or(0))) }
    }

    fn retention(&mut self, site: &RawSite) -> Retention {
        if site.basebackup_count == Some(0) {
            self.problem("basebackup_count", "expected at least 1, or null for no limit");
        }
        let age_days_max = site.basebackup_age_days_max;
        if let Some(age) = age_days_max.filter(|age| age.is_nan() || *age <= 0.0) {
            self.problem("basebackup_age_days_max", format!("expected days above 0, found {age}"));
        }
        Retention {
            count: site.basebackup_count,
            count_min: site.basebackup_count_min.unwrap_or(2),
            age_days_max,
        }
    }
}
