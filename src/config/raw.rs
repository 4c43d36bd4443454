//! The file as written. Pure.
//!
//! Names, shapes and defaults are PGHoard's unless a field's text says otherwise; the texts are also the
//! descriptions in `pgkeep config schema`. A `null` means the default, except where it means "off".

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize};

use super::nodes::KEYWORDS;
use super::reporting::{RawPrometheus, RawPushgateway, RawStatsd, RawStatsdInfo};
use super::units::{Bytes, Port, Span};
use crate::secret::Secret;

/// Configuration of pgkeep.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, title = "pgkeep configuration")]
#[serde(default)]
pub struct RawConfig {
    /// The clusters under care, by name.
    pub backup_sites: Option<BTreeMap<String, RawSite>>,
    pub compression: Option<RawCompression>,
    /// Address of the HTTP server (default 127.0.0.1); an empty text means every IPv4 address.
    pub http_address: Option<String>,
    /// Port of the HTTP server (default 16000).
    pub http_port: Option<Port>,
    /// User name that HTTP clients must give; needs `webserver_password` too.
    pub webserver_username: Option<String>,
    #[serde(deserialize_with = "secret")]
    #[schemars(with = "Option<String>")]
    /// Password that HTTP clients must give; needs `webserver_username` too.
    pub webserver_password: Option<Secret>,
    /// Writes PGHoard's hash beside WAL, too: sha1, sha224, sha256, sha384 or sha512 (default: none).
    pub hash_algorithm: Option<String>,
    /// error, warn, info (default), debug or trace; Python's names are understood.
    pub log_level: Option<String>,
    /// Put before each site's name to make its default `prefix`.
    pub path_prefix: Option<String>,
    /// Where PGHoard kept its files: what it left there is uploaded at start. Nothing is written there but
    /// alert files.
    pub backup_location: Option<PathBuf>,
    /// Where alert files appear (default: `backup_location`).
    pub alert_file_dir: Option<PathBuf>,
    /// Where the state is written every 5 seconds (default `/var/lib/pghoard/pghoard_state.json`, if that
    /// directory is there).
    pub json_state_file_path: Option<PathBuf>,
    /// While this file exists no base backup begins (default `/var/lib/pghoard/maintenance_mode_file`).
    pub maintenance_mode_file: Option<PathBuf>,
    /// With the next, how long a stop may take to store what has arrived (default: `shutdown_grace`).
    pub graceful_shutdown_compression_timeout: Option<Span>,
    /// Added to the one before.
    pub graceful_shutdown_upload_timeout: Option<Span>,
    /// Failures of storage in a row after which an alert file appears (default 3).
    pub upload_retries_warning_limit: Option<u32>,
    /// Log to syslog, too (default false).
    pub syslog: Option<bool>,
    /// A socket (default /dev/log) or `host:port`.
    pub syslog_address: Option<String>,
    /// Default local2.
    pub syslog_facility: Option<String>,
    pub statsd: Option<RawStatsd>,
    pub pushgateway: Option<RawPushgateway>,
    pub prometheus: Option<RawPrometheus>,
    /// Most memory for data in flight (default 64MiB).
    pub memory_limit: Option<Bytes>,
    /// WAL segments to fetch ahead into the WAL directory for PGHoard's clients (default 4); 0 or less: none.
    pub restore_prefetch: Option<i32>,
    /// Worker threads for compression and transfers (default: the number of CPUs, at most 16).
    pub parallelism: Option<u16>,
}

/// How objects are compressed.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawCompression {
    /// Default here is zstd (PGHoard: snappy).
    pub algorithm: Option<Algorithm>,
    /// Level of zstd, from -7 to 22, where 0 is its own default, 3; or preset of lzma, from 0 to 9. Snappy has
    /// no levels.
    pub level: Option<i32>,
    /// Used for `parallelism` when that is not set.
    pub thread_count: Option<u16>,
}

/// A compression algorithm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    Snappy,
    Lzma,
    #[default]
    Zstd,
}

/// A key pair for encryption, RSA, as PEM texts.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawKeyPair {
    /// Needed to write.
    pub public: Option<String>,
    #[serde(deserialize_with = "secret")]
    #[schemars(with = "Option<String>")]
    /// Needed to read: to restore, and to give WAL to a recovering server.
    pub private: Option<Secret>,
}

/// One PostgreSQL cluster under care.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawSite {
    /// false: nothing is streamed, backed up or pruned; WAL is still served and taken over HTTP (default true).
    pub active: Option<bool>,
    /// Where WAL comes from: `pg_receivexlog` (default) or `walreceiver`, streamed over the replication protocol;
    /// `archive_command`, pushed by PostgreSQL; `basic` or `standalone_hot_backup`, not archived: base backups
    /// bring the WAL they need. With any other value nothing is started.
    pub active_backup_mode: Option<String>,
    /// The cluster's servers: connection keywords, connection strings or URIs.
    pub nodes: Option<Vec<RawNode>>,
    /// Where the site is stored; required.
    pub object_storage: Option<RawObjectStorage>,
    /// Everything written is encrypted for this one of `encryption_keys` (default: not encrypted).
    pub encryption_key_id: Option<String>,
    /// Sites whose base backups and WAL this one continues, the latest first.
    pub moved_from: Option<Vec<String>>,
    /// Key pairs by name. A host that only backs up needs no private part.
    pub encryption_keys: Option<BTreeMap<String, RawKeyPair>>,
    /// Put before the name of every object of the site (default: the site's name).
    pub prefix: Option<String>,
    /// The cluster's data directory; optional here.
    pub pg_data_directory: Option<PathBuf>,
    /// The version that the server should have, as its `server_version_num`; another major version is an alert.
    pub pg_version: Option<u32>,
    #[serde(default = "default_interval")]
    /// Hours between base backups (default 24); null: none on schedule.
    pub basebackup_interval_hours: Option<f64>,
    /// Hour of the day (UTC) to take base backups at.
    pub basebackup_hour: Option<u8>,
    /// Minute of `basebackup_hour`.
    pub basebackup_minute: Option<u8>,
    #[serde(default = "default_count")]
    /// Base backups to keep (default 2); null: no limit.
    pub basebackup_count: Option<u32>,
    /// Base backups to keep whatever their age (default 2); 0: age removes none.
    pub basebackup_count_min: Option<u32>,
    /// Remove base backups older than this many days.
    pub basebackup_age_days_max: Option<f64>,
    /// Replication slot on every node that names none (default: `pgkeep_` and the site's name).
    pub slot: Option<String>,
    /// Longest time that written WAL stays out of storage (default 1s).
    pub wal_flush_interval: Option<Span>,
    /// Longest time to wait for storage when PostgreSQL shuts down (default 10s).
    pub shutdown_grace: Option<Span>,
    /// Most bytes a second that a base backup reads from the server (default: no limit).
    pub backup_rate_limit: Option<Bytes>,
    /// How scheduled base backups start: with a spread checkpoint (default), or at once with a fast one.
    pub backup_checkpoint: Option<RawCheckpoint>,
}

impl Default for RawSite {
    fn default() -> Self {
        Self {
            active: None,
            active_backup_mode: None,
            nodes: None,
            object_storage: None,
            encryption_key_id: None,
            moved_from: None,
            encryption_keys: None,
            prefix: None,
            pg_data_directory: None,
            pg_version: None,
            basebackup_interval_hours: default_interval(),
            basebackup_hour: None,
            basebackup_minute: None,
            basebackup_count: default_count(),
            basebackup_count_min: None,
            basebackup_age_days_max: None,
            slot: None,
            wal_flush_interval: None,
            shutdown_grace: None,
            backup_rate_limit: None,
            backup_checkpoint: None,
        }
    }
}

// The next two are functions, not `unwrap_or` in the model, because there `null` must differ from absent.
#[expect(clippy::unnecessary_wraps, reason = "the shape that serde asks of a default")]
fn default_interval() -> Option<f64> {
    Some(24.0)
}

#[expect(clippy::unnecessary_wraps, reason = "the shape that serde asks of a default")]
fn default_count() -> Option<u32> {
    Some(2)
}

/// How the checkpoint that starts a base backup is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RawCheckpoint {
    Spread,
    Fast,
}

/// An object store; which keys apply depends on `storage_type`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawObjectStorage {
    /// Required.
    pub storage_type: Option<StorageType>,
    /// Put before every key.
    pub prefix: Option<String>,
    /// local: the directory; required.
    pub directory: Option<PathBuf>,
    /// s3: the bucket; required.
    pub bucket_name: Option<String>,
    /// s3: the region (default: `AWS_REGION`).
    pub region: Option<String>,
    /// s3: with both keys left out, `AWS_ACCESS_KEY_ID` and the rest of the environment, then the role
    /// of the instance or container.
    pub aws_access_key_id: Option<String>,
    #[serde(deserialize_with = "secret")]
    #[schemars(with = "Option<String>")]
    /// s3: belongs to `aws_access_key_id`.
    pub aws_secret_access_key: Option<Secret>,
    #[serde(deserialize_with = "secret")]
    #[schemars(with = "Option<String>")]
    /// s3: for temporary credentials.
    pub aws_session_token: Option<Secret>,
    /// s3: host of an endpoint other than Amazon's; needs `port` too.
    pub host: Option<String>,
    /// s3: port of that endpoint.
    pub port: Option<Port>,
    /// s3: whether that endpoint speaks https (default false).
    pub is_secure: Option<bool>,
    /// s3: whether that endpoint's certificate is checked (default false).
    pub is_verify_tls: Option<bool>,
    /// s3: PEM file of certificates to trust; needs `is_verify_tls`.
    pub cert_path: Option<PathBuf>,
    /// s3: how that endpoint is told the bucket (default path).
    pub addressing_style: Option<AddressingStyle>,
    /// s3: ask for server-side encryption, AES256 (default false).
    pub encrypted: Option<bool>,
    /// s3: longest time for a connection to come about (default 5s).
    pub connect_timeout: Option<Span>,
    /// s3: longest time for a request in all, when that is more than 2min (default 2min).
    pub read_timeout: Option<Span>,
    /// s3: reach Amazon by IPv6 as well (default true); not used for another endpoint.
    pub use_dualstack_endpoint: Option<bool>,
    /// s3: added to the user agent.
    pub user_agent_extra: Option<String>,
    pub proxy_info: Option<RawProxy>,
    pub notifier: Option<RawNotifier>,
    pub statsd_info: Option<RawStatsdInfo>,
}

/// s3: a proxy on the way to the store.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawProxy {
    #[serde(rename = "type")]
    pub kind: Option<RawProxyKind>,
    /// Required.
    pub host: Option<String>,
    /// Required.
    pub port: Option<Port>,
    pub user: Option<String>,
    #[serde(rename = "pass", deserialize_with = "secret")]
    #[schemars(with = "Option<String>")]
    pub password: Option<Secret>,
}

/// What a proxy speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RawProxyKind {
    Http,
    Socks5,
}

/// Who is told, by HTTP, of every object that is stored or deleted.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[serde(default)]
pub struct RawNotifier {
    pub notifier_type: Option<RawNotifierKind>,
    /// Where JSON is posted to; required.
    pub url: Option<String>,
}

/// The kinds of notifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RawNotifierKind {
    Http,
}

/// The kinds of object store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StorageType {
    Local,
    S3,
    /// Refused by this version, as are the next three.
    Google,
    Azure,
    Sftp,
    Swift,
}

/// Where the bucket's name stands in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AddressingStyle {
    Auto,
    Path,
    Virtual,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Secret>, D::Error> {
    Option::<String>::deserialize(deserializer).map(|value| value.map(Secret::new))
}

/// One server, in one of the forms PGHoard takes.
#[derive(Debug, Clone)]
pub enum RawNode {
    /// A libpq connection string or URI.
    Text { conninfo: Secret, slot: Option<String> },
    /// libpq keywords and their values.
    Keywords { keywords: Vec<(String, Secret)>, slot: Option<String> },
}

impl<'de> Deserialize<'de> for RawNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = RawNode;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a connection string, or an object of connection keywords")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<RawNode, E> {
        Ok(RawNode::Text { conninfo: Secret::new(text.to_owned()), slot: None })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawNode, A::Error> {
        let (mut conninfo, mut slot, mut keywords) = (None, None, Vec::new());
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "connection_string" => conninfo = map.next_value::<Option<String>>()?.map(Secret::new),
                "slot" => slot = map.next_value()?,
                "port" => {
                    let ports = map.next_value::<Option<PortList>>()?;
                    keywords.extend(ports.map(|ports| (key, Secret::new(ports.0))));
                }
                _ => {
                    let value = map.next_value::<Option<Scalar>>()?;
                    keywords.extend(value.map(|value| (key, Secret::new(value.0))));
                }
            }
        }
        match conninfo {
            None => Ok(RawNode::Keywords { keywords, slot }),
            Some(conninfo) if keywords.is_empty() => Ok(RawNode::Text { conninfo, slot }),
            Some(_) => Err(A::Error::custom(format_args!(
                "`connection_string` and `{}` do not go together; put all into one of them",
                keywords[0].0
            ))),
        }
    }
}

/// A value as libpq would take it: always text in the end.
#[derive(Debug, Clone)]
pub struct Scalar(String);

impl Scalar {
    pub(super) fn text(&self) -> String {
        self.0.clone()
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

struct ScalarVisitor;

impl Visitor<'_> for ScalarVisitor {
    type Value = Scalar;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a number")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Scalar, E> {
        Ok(Scalar(text.to_owned()))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Scalar, E> {
        Ok(Scalar(number.to_string()))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Scalar, E> {
        Ok(Scalar(number.to_string()))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Scalar, E> {
        // libpq's switches are 0 and 1.
        Ok(Scalar(u8::from(value).to_string()))
    }
}

impl JsonSchema for Scalar {
    fn schema_name() -> Cow<'static, str> {
        "KeywordValue".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "number", "boolean", "null"] })
    }
}

/// One port, or one for each of several hosts separated by commas; an empty one is the default.
struct PortList(String);

impl<'de> Deserialize<'de> for PortList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PortListVisitor)
    }
}

struct PortListVisitor;

impl Visitor<'_> for PortListVisitor {
    type Value = PortList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<PortList, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<PortList, E> {
        let is_port = |port: &str| port.is_empty() || port.parse::<u16>().is_ok_and(|port| port > 0);
        if text.split(',').all(|port| is_port(port.trim())) {
            Ok(PortList(text.to_owned()))
        } else {
            Err(E::invalid_value(Unexpected::Str(text), &self))
        }
    }
}

impl JsonSchema for RawNode {
    fn schema_name() -> Cow<'static, str> {
        "Node".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut properties = serde_json::Map::new();
        for keyword in KEYWORDS {
            properties.insert((*keyword).to_owned(), generator.subschema_for::<Scalar>().to_value());
        }
        for (key, description) in [
            ("connection_string", "A libpq connection string or URI, instead of keywords."),
            ("slot", "Replication slot on this node (default: the site's)."),
        ] {
            properties
                .insert(key.to_owned(), serde_json::json!({ "type": "string", "description": description }));
        }
        json_schema!({
            "description": "A libpq connection string or URI, or an object of libpq's keywords.",
            "type": ["string", "object"],
            "properties": properties,
            "additionalProperties": false,
        })
    }
}
