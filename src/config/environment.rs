//! A configuration of one site made from environment variables alone. Pure.
//!
//! The result has the shape of a file, so that everything after this is the same for both.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use url::Url;

use super::error::Problem;
use super::nodes::conninfo;
use crate::runtime::Lookup;

/// Where the objects are. That this variable is set means that the environment is the configuration.
pub const STORAGE: &str = "PGKEEP_STORAGE";
/// The site's name.
pub const SITE: &str = "PGKEEP_SITE";
const DEFAULT_SITE: &str = "default";

/// Variables and the top-level keys they stand for.
const TOP_LEVEL: &[(&str, &[&str])] = &[
    ("PGKEEP_COMPRESSION", &["compression", "algorithm"]),
    ("PGKEEP_COMPRESSION_LEVEL", &["compression", "level"]),
    ("PGKEEP_HTTP_ADDRESS", &["http_address"]),
    ("PGKEEP_HTTP_PASSWORD", &["webserver_password"]),
    ("PGKEEP_HTTP_PORT", &["http_port"]),
    ("PGKEEP_HTTP_USERNAME", &["webserver_username"]),
    ("PGKEEP_MEMORY_LIMIT", &["memory_limit"]),
    ("PGKEEP_PARALLELISM", &["parallelism"]),
];

/// Variables and the keys of the site they stand for.
const OF_SITE: &[(&str, &str)] = &[
    ("PGDATA", "pg_data_directory"),
    ("PGKEEP_BACKUP_COUNT", "basebackup_count"),
    ("PGKEEP_BACKUP_INTERVAL_HOURS", "basebackup_interval_hours"),
    ("PGKEEP_BACKUP_RATE_LIMIT", "backup_rate_limit"),
    ("PGKEEP_PREFIX", "prefix"),
    ("PGKEEP_SHUTDOWN_GRACE", "shutdown_grace"),
    ("PGKEEP_SLOT", "slot"),
    ("PGKEEP_WAL_FLUSH_INTERVAL", "wal_flush_interval"),
];

/// Keys whose value is a number: the text of their variable is made one where it can be.
const NUMBERS: &[&str] = &["level", "parallelism", "basebackup_count", "basebackup_interval_hours"];

/// Their name in messages.
pub const LIBPQ_VARIABLES: &str = "PG* variables";

/// libpq's variables and their keywords, from its documentation (section 32.15).
const LIBPQ: &[(&str, &str)] = &[
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGPORT", "port"),
    ("PGDATABASE", "dbname"),
    ("PGUSER", "user"),
    ("PGPASSWORD", "password"),
    ("PGPASSFILE", "passfile"),
    ("PGREQUIREAUTH", "require_auth"),
    ("PGCHANNELBINDING", "channel_binding"),
    ("PGSERVICE", "service"),
    ("PGOPTIONS", "options"),
    ("PGAPPNAME", "application_name"),
    ("PGSSLMODE", "sslmode"),
    ("PGSSLNEGOTIATION", "sslnegotiation"),
    ("PGSSLCERT", "sslcert"),
    ("PGSSLKEY", "sslkey"),
    ("PGSSLROOTCERT", "sslrootcert"),
    ("PGSSLCRL", "sslcrl"),
    ("PGSSLCRLDIR", "sslcrldir"),
    ("PGSSLSNI", "sslsni"),
    ("PGREQUIREPEER", "requirepeer"),
    ("PGSSLMINPROTOCOLVERSION", "ssl_min_protocol_version"),
    ("PGSSLMAXPROTOCOLVERSION", "ssl_max_protocol_version"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
    ("PGLOADBALANCEHOSTS", "load_balance_hosts"),
];

/// A document in the file's shape.
pub struct Document {
    pub value: Value,
    /// Which variable stands at which place, so that messages can name it.
    variables: BTreeMap<String, String>,
}

impl Document {
    /// The variable a person has to change for what is wrong at `place`; the place itself if none is known.
    pub fn variable_for(&self, place: &str) -> String {
        let enclosing = self.variables.iter().rev().find(|(known, _)| {
            place
                .strip_prefix(known.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        });
        enclosing.map_or_else(|| place.to_owned(), |(_, variable)| variable.clone())
    }
}

/// Reads the variables; `None` when [`STORAGE`] is not among them.
///
/// # Errors
/// When the value of [`STORAGE`] is not a place.
pub fn document(env: Lookup) -> Option<Result<Document, Problem>> {
    let storage = env(STORAGE)?;
    Some(
        storage_from_url(&storage)
            .map_err(|why| Problem::new(STORAGE, why))
            .map(|storage| assemble(storage, env)),
    )
}

fn assemble(storage: Map<String, Value>, env: Lookup) -> Document {
    let name = env(SITE).unwrap_or_else(|| DEFAULT_SITE.to_owned());
    let site_place = format!("backup_sites.{name}");
    let mut variables = BTreeMap::from([
        (site_place.clone(), SITE.to_owned()),
        (format!("{site_place}.object_storage"), STORAGE.to_owned()),
        (format!("{site_place}.nodes"), LIBPQ_VARIABLES.to_owned()),
    ]);

    let mut site = Map::new();
    site.insert("object_storage".to_owned(), Value::Object(storage));
    let keywords: Vec<(&str, String)> =
        LIBPQ.iter().filter_map(|(variable, keyword)| Some((*keyword, env(variable)?))).collect();
    let node = conninfo(keywords.iter().map(|(keyword, value)| (*keyword, value.as_str())));
    site.insert("nodes".to_owned(), json!([node]));
    for (variable, key) in OF_SITE {
        if let Some(text) = env(variable) {
            variables.insert(format!("{site_place}.{key}"), (*variable).to_owned());
            site.insert((*key).to_owned(), scalar(key, text));
        }
    }

    let mut document = json!({ "backup_sites": { name: site } });
    for (variable, path) in TOP_LEVEL {
        if let Some(text) = env(variable) {
            variables.insert(path.join("."), (*variable).to_owned());
            let place = path.iter().fold(&mut document, |value, key| &mut value[*key]);
            *place = scalar(path[path.len() - 1], text);
        }
    }
    Document { value: document, variables }
}

fn scalar(key: &str, text: String) -> Value {
    let number = NUMBERS.contains(&key).then(|| text.trim().parse::<serde_json::Number>().ok()).flatten();
    number.map_or(Value::String(text), Value::Number)
}

/// `s3://bucket/prefix?region=R&endpoint=U&addressing_style=S&ca_file=F` or `file:///directory`, as the
/// keys of an object storage.
fn storage_from_url(text: &str) -> Result<Map<String, Value>, String> {
    let url: Url = text
        .parse()
        .map_err(|_| "expected a place such as `s3://bucket/prefix` or `file:///directory`".to_owned())?;
    let storage = match url.scheme() {
        "file" => {
            let directory = url.to_file_path().map_err(|()| {
                "expected three slashes and a directory, as in `file:///var/backups/pg`".to_owned()
            })?;
            if let Some((name, _)) = url.query_pairs().next() {
                return Err(format!("a directory takes no parameters, found `{name}`"));
            }
            json!({ "storage_type": "local", "directory": directory })
        }
        "s3" => s3_from_url(&url)?,
        other => {
            return Err(format!(
                "`{other}://` is not supported by this version; expected `s3://` or `file:///`"
            ));
        }
    };
    match storage {
        Value::Object(keys) => Ok(keys),
        _ => unreachable!("both arms make an object"),
    }
}

fn s3_from_url(url: &Url) -> Result<Value, String> {
    let bucket = url.host_str().filter(|bucket| !bucket.is_empty());
    let bucket = bucket.ok_or("expected a bucket after `s3://`")?;
    if !url.username().is_empty() || url.password().is_some() || url.port().is_some() {
        return Err("expected only a bucket before the path; keys go into `AWS_ACCESS_KEY_ID` and \
                    `AWS_SECRET_ACCESS_KEY`, another server into `?endpoint=https://host:port`"
            .to_owned());
    }
    let prefix = percent_decoded(url.path().trim_matches('/'))?;
    let mut storage = json!({ "storage_type": "s3", "bucket_name": bucket, "prefix": prefix });
    for (name, value) in url.query_pairs() {
        match name.as_ref() {
            "region" | "addressing_style" => storage[name.as_ref()] = json!(value),
            "ca_file" => storage["cert_path"] = json!(value),
            "endpoint" => {
                let endpoint = Endpoint::parse(&value)?;
                storage["host"] = json!(endpoint.host);
                storage["port"] = json!(endpoint.port);
                storage["is_secure"] = json!(endpoint.is_secure);
                // PGHoard's default is not to check. Who writes a URL has no file of PGHoard's to stay true to.
                storage["is_verify_tls"] = json!(endpoint.is_secure);
            }
            _ => {
                return Err(format!(
                    "unknown parameter `{name}`; expected region, endpoint, addressing_style or ca_file"
                ));
            }
        }
    }
    Ok(storage)
}

/// Where an S3 server other than Amazon's listens.
#[derive(Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
    pub is_secure: bool,
}

impl Endpoint {
    pub fn url(&self) -> String {
        let scheme = if self.is_secure { "https" } else { "http" };
        let bare_v6 = self.host.contains(':') && !self.host.starts_with('[');
        let (open, close) = if bare_v6 { ("[", "]") } else { ("", "") };
        format!("{scheme}://{open}{}{close}:{}", self.host, self.port)
    }

    /// # Errors
    /// When it is not `http://host:port` or `https://host:port` (the port may be left out).
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected an endpoint such as `https://host:port`, found `{text}`");
        let url: Url = text.parse().map_err(|_| wrong())?;
        let is_secure = match url.scheme() {
            "https" => true,
            "http" => false,
            _ => return Err(wrong()),
        };
        let host = url.host_str().ok_or_else(wrong)?.to_owned();
        let port = url.port_or_known_default().ok_or_else(wrong)?;
        if url.path().trim_matches('/').is_empty() && url.username().is_empty() && url.query().is_none() {
            Ok(Self { host, port, is_secure })
        } else {
            Err("expected only host and port in the endpoint".to_owned())
        }
    }
}

/// The path of a URL as the text it stands for.
fn percent_decoded(path: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let value = digit().zip(digit()).map(|(high, low)| high * 16 + low);
        bytes.push(
            value
                .and_then(|v| u8::try_from(v).ok())
                .ok_or("a `%` in the path needs two hex digits after it")?,
        );
    }
    String::from_utf8(bytes).map_err(|_| "the path is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Document, Problem> {
        let env = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        document(&env).expect("storage is set")
    }

    #[test]
    fn variables_become_a_document_of_one_site() {
        let made = from(&[
            ("PGKEEP_STORAGE", "s3://bucket/a/b%20c/?region=eu-1&endpoint=http://127.0.0.1:9000"),
            ("PGHOST", "db"),
            ("PGPASSWORD", "it's"),
            ("PGKEEP_HTTP_PORT", "17000"),
            ("PGKEEP_COMPRESSION_LEVEL", "5"),
            ("PGKEEP_BACKUP_COUNT", "7"),
            ("PGDATA", "/data"),
        ]);
        assert_eq!(
            made.unwrap().value,
            json!({
                "http_port": "17000",
                "compression": {"level": 5},
                "backup_sites": {"default": {
                    "nodes": [r"host='db' password='it\'s'"],
                    "basebackup_count": 7,
                    "pg_data_directory": "/data",
                    "object_storage": {
                        "storage_type": "s3", "bucket_name": "bucket", "prefix": "a/b c", "region": "eu-1",
                        "host": "127.0.0.1", "port": 9000, "is_secure": false, "is_verify_tls": false,
                    },
                }},
            })
        );
    }

    #[test]
    fn without_storage_the_environment_is_no_configuration() {
        assert!(document(&|_| None).is_none());
    }

    #[test]
    fn the_variable_behind_a_place_is_found() {
        let made =
            from(&[("PGKEEP_STORAGE", "file:///x"), ("PGKEEP_SITE", "a"), ("PGKEEP_SLOT", "S")]).unwrap();
        assert_eq!(made.variable_for("backup_sites.a.slot"), "PGKEEP_SLOT");
        assert_eq!(made.variable_for("backup_sites.a.object_storage.directory"), "PGKEEP_STORAGE");
        assert_eq!(made.variable_for("backup_sites.a.prefix"), "PGKEEP_SITE");
        assert_eq!(made.variable_for("http_port"), "http_port");
    }

    #[test]
    fn a_storage_that_is_no_place_says_what_would_be_one() {
        for (text, why) in [
            ("/var/backups", "such as"),
            ("file://relative/x", "three slashes"),
            ("gs://bucket", "not supported"),
            ("s3:///prefix", "a bucket"),
            ("s3://key:secret@bucket", "AWS_ACCESS_KEY_ID"),
            ("s3://bucket?reg=x", "unknown parameter `reg`"),
            ("s3://bucket?endpoint=localhost:9000", "https://host:port"),
            ("s3://bucket?endpoint=http://h/path", "only host and port"),
            ("file:///x?y=z", "no parameters"),
        ] {
            let problem = from(&[("PGKEEP_STORAGE", text)]).err().expect(text);
            assert!(problem.why.contains(why), "{text}: {problem}");
            assert!(!problem.why.contains("secret@"), "{problem}");
        }
    }

    proptest! {
        #[test]
        fn no_storage_text_panics(text in "(s3|file)://.{0,30}") {
            let _ = storage_from_url(&text);
        }
    }
}
