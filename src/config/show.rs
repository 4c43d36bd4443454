//! The configuration as it is in effect, for people and programs to look at. Pure.
//!
//! In the file's shape and words, with every default filled in and no secret.

use serde_json::{Value, json};

use super::model::{CheckpointMode, Config, NodeConfig, SiteConfig, WalIntake};
use super::nodes::without_passwords;
use super::storage::shown_storage;
use crate::codec::HashAlgorithm;
use crate::observe::StatsdFormat;
use crate::secret::Secret;

impl Config {
    /// The effective configuration; secrets read `***`.
    pub fn shown(&self) -> Value {
        let sites: serde_json::Map<String, Value> =
            self.sites.iter().map(|site| (site.name.clone(), shown_site(site))).collect();
        let credentials = self.http.credentials.as_ref();
        let reporting = &self.reporting;
        json!({
            "alert_file_dir": reporting.alert_directory,
            "json_state_file_path": reporting.state_file.path,
            "maintenance_mode_file": reporting.maintenance_file,
            "upload_retries_warning_limit": reporting.upload_retries_warning_limit,
            "syslog": reporting.syslog.is_some(),
            "statsd": reporting.statsd.as_ref().map(|statsd| json!({
                "host": statsd.host, "port": statsd.port, "tags": statsd.tags,
                "format": match statsd.format {
                    StatsdFormat::Telegraf => "telegraf",
                    StatsdFormat::Datadog => "datadog",
                },
            })),
            "pushgateway": reporting.pushgateway.as_ref().map(|push| json!({
                "endpoint": without_userinfo(&push.endpoint), "job": push.job, "instance": push.instance, "tags": push.tags,
            })),
            "prometheus": reporting.prometheus.as_ref().map(|tags| json!({ "tags": tags })),
            "graceful_shutdown_upload_timeout": reporting.stop_grace.map(|grace| grace.as_secs_f64()),
            "backup_sites": sites,
            "compression": { "algorithm": self.compression, "level": self.compression_level },
            "hash_algorithm": self.hash_algorithm.map(HashAlgorithm::name),
            "http_address": self.http.address,
            "http_port": self.http.port,
            "webserver_username": credentials.map(|credentials| &credentials.username),
            "webserver_password": credentials.map(|credentials| credentials.password.to_string()),
            "log_level": self.log_level.unwrap_or_default().as_str(),
            "memory_limit": self.memory_limit,
            "parallelism": self.parallelism,
            "restore_prefetch": self.restore_prefetch,
        })
    }
}

fn shown_site(site: &SiteConfig) -> Value {
    json!({
        "active": site.active,
        "active_backup_mode": match site.wal_intake {
            WalIntake::Stream => "pg_receivexlog",
            WalIntake::Push => "archive_command",
            WalIntake::BackupOnly => "standalone_hot_backup",
            WalIntake::Unknown => "none",
        },
        "nodes": site.nodes.iter().map(|node| shown_node(node, site)).collect::<Vec<_>>(),
        "object_storage": shown_storage(&site.storage),
        "encryption_key_id": site.keys.writing().map(|key| key.id().as_str()),
        "encryption_keys": shown_keys(site),
        "prefix": site.prefix,
        "pg_data_directory": site.data_directory,
        "basebackup_interval_hours": site.schedule.interval.map(|interval| interval.as_secs_f64() / 3600.0),
        "basebackup_hour": site.schedule.at.map(|(hour, _)| hour),
        "basebackup_minute": site.schedule.at.map(|(_, minute)| minute),
        "basebackup_count": site.retention.count,
        "basebackup_count_min": site.retention.count_min,
        "basebackup_age_days_max": site.retention.age_days_max,
        "wal_flush_interval": site.wal_flush_interval.as_secs_f64(),
        "shutdown_grace": site.shutdown_grace.as_secs_f64(),
        "backup_rate_limit": site.backup_rate_limit,
        "backup_checkpoint": match site.backup_checkpoint {
            CheckpointMode::Spread => "spread",
            CheckpointMode::Fast => "fast",
        },
    })
}

/// What is there of each key, and nothing of what it is.
fn shown_keys(site: &SiteConfig) -> Value {
    let mut shown = serde_json::Map::new();
    for key in site.keys.publics() {
        shown.insert(key.id().to_string(), json!({ "public": format!("RSA, {} bits", key.bits()) }));
    }
    for key in site.keys.privates() {
        let entry = shown.entry(key.id().to_string()).or_insert_with(|| json!({}));
        entry["private"] = json!(Secret::new(()).to_string());
    }
    Value::Object(shown)
}

fn shown_node(node: &NodeConfig, site: &SiteConfig) -> Value {
    json!({
        "connection_string": without_passwords(node.conninfo.reveal()),
        "slot": node.slot.as_ref().unwrap_or(&site.slot),
    })
}

/// A URL without the user and password that may stand in it.
fn without_userinfo(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            format!("{scheme}://{host}{path}")
        }
        None => "***".to_owned(),
    }
}
