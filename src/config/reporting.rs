//! Who is told what, and by which signs: metrics, alert files, state file, syslog. Pure.
//!
//! As written and as meant, side by side: these keys are few and each means one thing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::error::Problem;
use super::raw::{RawConfig, Scalar};
use super::units::Port;
use crate::observe::{Facility, PushTarget, StatsdFormat, StatsdTarget, SyslogAddress, SyslogTarget, Tags};

/// PGHoard's own places.
const STATE_FILE: &str = "/var/lib/pghoard/pghoard_state.json";
const MAINTENANCE_FILE: &str = "/var/lib/pghoard/maintenance_mode_file";
const SYSLOG_ADDRESS: &str = "/dev/log";
const SYSLOG_FACILITY: &str = "local2";
const STATSD_HOST: &str = "127.0.0.1";
const STATSD_PORT: u16 = 8125;
const UPLOAD_RETRIES: u32 = 3;

/// Labels by name.
pub type RawTags = BTreeMap<String, Option<Scalar>>;

/// A statsd server that is told everything.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawStatsd {
    /// Default 127.0.0.1.
    pub host: Option<String>,
    /// Default 8125.
    pub port: Option<Port>,
    pub format: Option<RawStatsdFormat>,
    /// Added to every figure.
    pub tags: Option<RawTags>,
}

/// A statsd server that is told about requests to storage.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawStatsdInfo {
    /// Default 127.0.0.1.
    pub host: Option<String>,
    /// Default 8125.
    pub port: Option<Port>,
    pub message_format: Option<RawStatsdFormat>,
    /// Added to every figure.
    pub tags: Option<RawTags>,
    /// Other names for operations.
    pub operation_map: Option<BTreeMap<String, String>>,
}

/// How statsd's tags are written.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RawStatsdFormat {
    /// `name,tag=value:1|c` (default)
    #[default]
    Telegraf,
    /// `name:1|c|#tag:value`
    Datadog,
}

impl From<RawStatsdFormat> for StatsdFormat {
    fn from(format: RawStatsdFormat) -> Self {
        match format {
            RawStatsdFormat::Telegraf => Self::Telegraf,
            RawStatsdFormat::Datadog => Self::Datadog,
        }
    }
}

/// A Prometheus Pushgateway.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawPushgateway {
    /// `http://gateway:9091`; required.
    pub endpoint: Option<String>,
    /// Default `pghoard`.
    pub job: Option<String>,
    /// Default: the site of each figure, or the host's name.
    pub instance: Option<String>,
    /// Added to every figure.
    pub tags: Option<RawTags>,
}

/// Switches PGHoard's names on at `GET /metrics`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawPrometheus {
    /// Added to every figure.
    pub tags: Option<RawTags>,
}

/// Who is told what.
#[derive(Debug, Clone)]
pub struct Reporting {
    /// Where alert files appear; `None`: nowhere.
    pub alert_directory: Option<PathBuf>,
    pub state_file: StateFile,
    /// While this file exists no base backup begins.
    pub maintenance_file: PathBuf,
    pub syslog: Option<SyslogTarget>,
    pub statsd: Option<StatsdTarget>,
    pub pushgateway: Option<PushTarget>,
    /// Labels for every figure at `/metrics`; with `None` PGHoard's names are not there.
    pub prometheus: Option<Tags>,
    /// An alert file appears after more failures of storage in a row than this.
    pub upload_retries_warning_limit: u32,
    /// How long storing what has arrived may take when the agent is stopped; `None`: as long as a site's
    /// `shutdown_grace` says.
    pub stop_grace: Option<Duration>,
}

/// Where the state is written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFile {
    pub path: PathBuf,
    /// Somebody asked for it; PGHoard's own place is written to only when its directory is there.
    pub configured: bool,
}

impl Reporting {
    /// Problems go to `problem`, warnings to `doubtful`, each with its place.
    pub(super) fn from_raw(
        raw: &RawConfig,
        current_directory: &Path,
        problem: &mut dyn FnMut(Problem),
        doubtful: &mut dyn FnMut(&str, &str),
    ) -> Self {
        let absolute = |path: &PathBuf| current_directory.join(path);
        let alert_directory = raw.alert_file_dir.as_ref().or(raw.backup_location.as_ref()).map(absolute);
        let state_file = StateFile {
            path: raw.json_state_file_path.as_ref().map_or_else(|| STATE_FILE.into(), absolute),
            configured: raw.json_state_file_path.is_some(),
        };
        let maintenance_file =
            raw.maintenance_mode_file.as_ref().map_or_else(|| MAINTENANCE_FILE.into(), absolute);
        let stop_times = [raw.graceful_shutdown_compression_timeout, raw.graceful_shutdown_upload_timeout];
        // PGHoard spends one after the other.
        let stop_grace = stop_times.into_iter().flatten().map(|span| span.0).reduce(|a, b| a + b);
        let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        let pushgateway = raw.pushgateway.as_ref().and_then(|raw| {
            let endpoint = raw.endpoint.as_deref().unwrap_or_default().trim_end_matches('/');
            if endpoint.is_empty() {
                doubtful("pushgateway", "nothing is pushed without `endpoint`");
                return None;
            }
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                let why = "expected a URL that begins with `http://` or `https://`";
                problem(Problem::new("pushgateway.endpoint", why));
            }
            Some(PushTarget {
                endpoint: endpoint.to_owned(),
                job: raw.job.clone().unwrap_or_else(|| "pghoard".to_owned()),
                instance: raw.instance.clone().filter(|instance| !instance.is_empty()),
                tags: tags(raw.tags.as_ref()),
                host: host(),
            })
        });
        Self {
            alert_directory,
            state_file,
            maintenance_file,
            syslog: syslog(raw, problem),
            statsd: raw.statsd.as_ref().map(|raw| StatsdTarget {
                host: raw.host.clone().unwrap_or_else(|| STATSD_HOST.to_owned()),
                port: raw.port.map_or(STATSD_PORT, |port| port.0),
                format: raw.format.unwrap_or_default().into(),
                tags: tags(raw.tags.as_ref()),
            }),
            pushgateway,
            prometheus: raw.prometheus.as_ref().map(|raw| tags(raw.tags.as_ref())),
            upload_retries_warning_limit: raw.upload_retries_warning_limit.unwrap_or(UPLOAD_RETRIES),
            stop_grace,
        }
    }
}

/// A store's own statsd server, and its names for operations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageStatsd {
    pub target: StatsdTarget,
    pub operation_names: BTreeMap<String, String>,
}

impl From<&RawStatsdInfo> for StorageStatsd {
    fn from(raw: &RawStatsdInfo) -> Self {
        Self {
            target: StatsdTarget {
                host: raw.host.clone().unwrap_or_else(|| STATSD_HOST.to_owned()),
                port: raw.port.map_or(STATSD_PORT, |port| port.0),
                format: raw.message_format.unwrap_or_default().into(),
                tags: tags(raw.tags.as_ref()),
            },
            operation_names: raw.operation_map.clone().unwrap_or_default(),
        }
    }
}

fn tags(raw: Option<&RawTags>) -> Tags {
    let tags = raw.into_iter().flatten();
    tags.map(|(name, value)| (name.clone(), value.as_ref().map(Scalar::text).unwrap_or_default())).collect()
}

fn syslog(raw: &RawConfig, problem: &mut dyn FnMut(Problem)) -> Option<SyslogTarget> {
    if !raw.syslog.unwrap_or(false) {
        return None;
    }
    let address = raw.syslog_address.as_deref().unwrap_or(SYSLOG_ADDRESS).parse::<SyslogAddress>();
    let address = address.map_err(|error| problem(Problem::new("syslog_address", error.to_string())));
    let facility = raw.syslog_facility.as_deref().unwrap_or(SYSLOG_FACILITY).parse::<Facility>();
    let facility = facility.map_err(|error| problem(Problem::new("syslog_facility", error.to_string())));
    Some(SyslogTarget { address: address.ok()?, facility: facility.ok()? })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: serde_json::Value) -> (Reporting, Vec<String>) {
        let raw: RawConfig = serde_json::from_value(value).unwrap();
        let problems = std::cell::RefCell::new(Vec::new());
        let reporting = Reporting::from_raw(
            &raw,
            Path::new("/cwd"),
            &mut |problem| problems.borrow_mut().push(problem.to_string()),
            &mut |place, why| problems.borrow_mut().push(format!("{place}: {why}")),
        );
        (reporting, problems.into_inner())
    }

    #[test]
    fn defaults_are_pghoards() {
        let (reporting, problems) = read(json!({"statsd": {}, "syslog": true, "prometheus": {}}));
        assert_eq!(problems, [""; 0]);
        assert_eq!(reporting.state_file.path, Path::new("/var/lib/pghoard/pghoard_state.json"));
        assert!(!reporting.state_file.configured);
        assert_eq!(reporting.maintenance_file, Path::new("/var/lib/pghoard/maintenance_mode_file"));
        assert_eq!(reporting.alert_directory, None);
        assert_eq!(reporting.upload_retries_warning_limit, 3);
        assert_eq!(reporting.stop_grace, None);
        let statsd = reporting.statsd.unwrap();
        assert_eq!((statsd.host.as_str(), statsd.port), ("127.0.0.1", 8125));
        assert_eq!(statsd.format, StatsdFormat::Telegraf);
        assert_eq!(reporting.syslog.unwrap().address, SyslogAddress::Socket("/dev/log".into()));
        assert_eq!(reporting.prometheus, Some(Tags::new()));
    }

    #[test]
    fn everything_can_be_said() {
        let (reporting, problems) = read(json!({
            "backup_location": "state", "json_state_file_path": "s.json", "maintenance_mode_file": "/m",
            "graceful_shutdown_compression_timeout": 5, "graceful_shutdown_upload_timeout": "10",
            "statsd": {"host": "h", "port": "1", "format": "datadog", "tags": {"a": 1, "b": "x", "c": null}},
            "pushgateway": {"endpoint": "http://p:9091/", "job": "j", "instance": "i"},
            "syslog": true, "syslog_address": "logs:514", "syslog_facility": "daemon",
        }));
        assert_eq!(problems, [""; 0]);
        assert_eq!(reporting.alert_directory.as_deref(), Some(Path::new("/cwd/state")));
        assert_eq!(reporting.state_file.path, Path::new("/cwd/s.json"));
        assert!(reporting.state_file.configured);
        assert_eq!(reporting.stop_grace, Some(Duration::from_secs(15)));
        let statsd = reporting.statsd.unwrap();
        assert_eq!(statsd.tags.into_iter().collect::<Vec<_>>().len(), 3);
        assert_eq!(reporting.pushgateway.unwrap().endpoint, "http://p:9091");
    }

    #[test]
    fn what_cannot_work_is_told_with_its_place() {
        let (_, problems) = read(json!({
            "syslog": true, "syslog_address": "x:y", "syslog_facility": "loud",
            "pushgateway": {"endpoint": "gateway:9091"},
        }));
        assert_eq!(problems.len(), 3, "{problems:?}");
        let (reporting, problems) =
            read(json!({"pushgateway": {}, "syslog": false, "syslog_facility": "loud"}));
        assert_eq!(problems, ["pushgateway: nothing is pushed without `endpoint`"]);
        assert_eq!((reporting.pushgateway, reporting.syslog), (None, None));
    }
}
