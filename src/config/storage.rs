//! From `object_storage` as written to the store that is meant, and back for `config show`. Pure.

use std::path::Path;

use serde_json::{Value, json};

use super::environment::Endpoint;
use super::error::Problem;
use super::raw::{AddressingStyle, RawNotifier, RawObjectStorage, RawProxy, RawProxyKind, StorageType};
use crate::runtime::Lookup;
use crate::secret::Secret;
use crate::storage::{S3Config, StorageConfig};

/// Gives an `object_storage` its meaning. Places in problems are keys of the object itself.
///
/// What the file leaves out about S3 is taken from Amazon's variables in `env`, as Amazon's own tools do.
/// A relative path starts at `current_directory`.
pub fn storage_config(
    raw: &RawObjectStorage,
    current_directory: &Path,
    env: Lookup,
) -> Result<StorageConfig, Problem> {
    let prefix = raw.prefix.as_deref().unwrap_or("").trim_matches('/').to_owned();
    if prefix.split('/').any(|part| matches!(part, "." | "..")) {
        return Err(Problem::new("prefix", "`.` and `..` are not allowed in it"));
    }
    match raw.storage_type {
        None => Err(Problem::new("storage_type", "missing; expected `local` or `s3`")),
        Some(StorageType::Local) => {
            let directory = raw.directory.as_deref().filter(|path| !path.as_os_str().is_empty());
            let directory = directory.ok_or_else(|| Problem::new("directory", "missing"))?;
            let directory = current_directory.join(directory);
            // Joining nothing would leave a slash at the end.
            let directory = if prefix.is_empty() { directory } else { directory.join(prefix) };
            Ok(StorageConfig::Local { directory })
        }
        Some(StorageType::S3) => s3(raw, prefix, env).map(StorageConfig::S3),
        Some(StorageType::Google | StorageType::Azure | StorageType::Sftp | StorageType::Swift) => {
            Err(Problem::new("storage_type", "this version stores to `local` and `s3` only"))
        }
    }
}

/// The address of a notifier.
pub fn notifier_url(raw: &RawNotifier) -> Result<Secret, Problem> {
    let url = raw.url.as_deref().unwrap_or_default();
    if url.starts_with("http://") || url.starts_with("https://") {
        Ok(Secret::new(url.to_owned()))
    } else if url.is_empty() {
        Err(Problem::new("notifier.url", "missing"))
    } else {
        Err(Problem::new("notifier.url", "expected a URL that begins with `http://` or `https://`"))
    }
}

/// A proxy as a URL; it may hold a password.
fn proxy_url(raw: &RawProxy) -> Result<Secret, Problem> {
    let host = raw.host.as_deref().filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| Problem::new("proxy_info.host", "missing"))?;
    let port = raw.port.ok_or_else(|| Problem::new("proxy_info.port", "missing"))?;
    let scheme = match raw.kind {
        // The proxy, not this machine, looks the store's name up.
        Some(RawProxyKind::Socks5) => "socks5h",
        Some(RawProxyKind::Http) => "http",
        None => return Err(Problem::new("proxy_info.type", "missing; expected `http` or `socks5`")),
    };
    let user = raw.user.as_deref().map(|user| {
        let password =
            raw.password.as_ref().map(|password| format!(":{}", percent_encoded(password.reveal())));
        format!("{}{}@", percent_encoded(user), password.unwrap_or_default())
    });
    Ok(Secret::new(format!("{scheme}://{}{host}:{}", user.unwrap_or_default(), port.0)))
}

fn percent_encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    let encode = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encode).collect()
}

fn s3(raw: &RawObjectStorage, prefix: String, env: Lookup) -> Result<S3Config, Problem> {
    let bucket = raw.bucket_name.clone().filter(|bucket| !bucket.is_empty());
    let bucket = bucket.ok_or_else(|| Problem::new("bucket_name", "missing"))?;
    let credentials = credentials(raw, env)?;
    let custom = custom_endpoint(raw, env)?;
    // PGHoard checks Amazon's certificate always, another server's only when told to.
    let verify_tls = custom.as_ref().is_none_or(|custom| custom.verify_tls);
    if raw.cert_path.is_some() && !verify_tls {
        return Err(Problem::new("cert_path", "not used unless `is_verify_tls` is true"));
    }
    let host = custom.as_ref().map(|custom| custom.endpoint.host.as_str());
    Ok(S3Config {
        virtual_hosted: virtual_hosted(raw.addressing_style, host, &bucket),
        bucket,
        prefix,
        region: raw.region.clone().or_else(|| env("AWS_REGION")).or_else(|| env("AWS_DEFAULT_REGION")),
        allow_http: custom.as_ref().is_some_and(|custom| !custom.endpoint.is_secure),
        endpoint: custom.map(|custom| custom.endpoint.url()),
        access_key_id: credentials.access_key_id,
        secret_access_key: credentials.secret_access_key,
        session_token: credentials.session_token,
        verify_tls,
        ca_file: raw.cert_path.clone(),
        sse_s3: raw.encrypted.unwrap_or(false),
        dual_stack: raw.use_dualstack_endpoint.unwrap_or(true),
        connect_timeout: raw.connect_timeout.map(|span| span.0),
        request_timeout: raw.read_timeout.map(|span| span.0),
        user_agent_extra: raw.user_agent_extra.clone(),
        proxy: raw.proxy_info.as_ref().map(proxy_url).transpose()?,
    })
}

#[derive(Default)]
struct AwsCredentials {
    access_key_id: Option<String>,
    secret_access_key: Option<Secret>,
    session_token: Option<Secret>,
}

fn credentials(raw: &RawObjectStorage, env: Lookup) -> Result<AwsCredentials, Problem> {
    let half =
        |place: &str, other: &str| Err(Problem::new(place, format!("missing, though `{other}` is set")));
    match (&raw.aws_access_key_id, &raw.aws_secret_access_key) {
        (Some(_), None) => half("aws_secret_access_key", "aws_access_key_id"),
        (None, Some(_)) => half("aws_access_key_id", "aws_secret_access_key"),
        (Some(id), Some(secret)) => Ok(AwsCredentials {
            access_key_id: Some(id.clone()),
            secret_access_key: Some(secret.clone()),
            session_token: raw.aws_session_token.clone(),
        }),
        (None, None) => match (env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY")) {
            (Some(id), Some(secret)) => Ok(AwsCredentials {
                access_key_id: Some(id),
                secret_access_key: Some(Secret::new(secret)),
                session_token: env("AWS_SESSION_TOKEN").map(Secret::new),
            }),
            (Some(_), None) => half("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
            (None, Some(_)) => half("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
            (None, None) => Ok(AwsCredentials::default()),
        },
    }
}

struct CustomEndpoint {
    endpoint: Endpoint,
    verify_tls: bool,
}

/// The server that is not Amazon's, from the file or else from `AWS_ENDPOINT_URL`.
fn custom_endpoint(raw: &RawObjectStorage, env: Lookup) -> Result<Option<CustomEndpoint>, Problem> {
    match (&raw.host, raw.port) {
        (Some(host), _) if host.contains('/') => Err(Problem::new(
            "host",
            format!("expected a host name without scheme and path, found \"{host}\""),
        )),
        (Some(host), Some(port)) => Ok(Some(CustomEndpoint {
            endpoint: Endpoint {
                host: host.clone(),
                port: port.0,
                is_secure: raw.is_secure.unwrap_or(false),
            },
            verify_tls: raw.is_verify_tls.unwrap_or(false),
        })),
        (Some(_), None) => Err(Problem::new("port", "missing, though `host` is set")),
        (None, Some(_)) => Err(Problem::new("host", "missing, though `port` is set")),
        (None, None) => {
            let Some(url) = env("AWS_ENDPOINT_URL") else { return Ok(None) };
            let endpoint = Endpoint::parse(&url).map_err(|why| Problem::new("AWS_ENDPOINT_URL", why))?;
            Ok(Some(CustomEndpoint { endpoint, verify_tls: true }))
        }
    }
}

/// Whether the bucket goes into the host name. Never where that cannot work: an address has no
/// subdomains, and a bucket with a dot does not match a wildcard certificate.
fn virtual_hosted(style: Option<AddressingStyle>, custom_host: Option<&str>, bucket: &str) -> bool {
    let by_name = |host: &str| host.contains('.') && host.parse::<std::net::IpAddr>().is_err();
    match style {
        Some(AddressingStyle::Virtual) => true,
        Some(AddressingStyle::Path) => false,
        Some(AddressingStyle::Auto) => !bucket.contains('.') && custom_host.is_none_or(by_name),
        // Amazon's own way for its own endpoint, PGHoard's default for another.
        None => !bucket.contains('.') && custom_host.is_none(),
    }
}

/// The store in the file's words, without secrets.
pub fn shown_storage(storage: &StorageConfig) -> Value {
    match storage {
        StorageConfig::Local { directory } => json!({ "storage_type": "local", "directory": directory }),
        StorageConfig::S3(s3) => {
            let endpoint = s3.endpoint.as_deref().and_then(|url| Endpoint::parse(url).ok());
            json!({
                "storage_type": "s3",
                "bucket_name": s3.bucket,
                "prefix": s3.prefix,
                "region": s3.region,
                "aws_access_key_id": s3.access_key_id,
                "aws_secret_access_key": s3.secret_access_key.as_ref().map(ToString::to_string),
                "aws_session_token": s3.session_token.as_ref().map(ToString::to_string),
                "host": endpoint.as_ref().map(|endpoint| &endpoint.host),
                "port": endpoint.as_ref().map(|endpoint| endpoint.port),
                "is_secure": endpoint.as_ref().map(|endpoint| endpoint.is_secure),
                "is_verify_tls": s3.verify_tls,
                "cert_path": s3.ca_file,
                "addressing_style": if s3.virtual_hosted { "virtual" } else { "path" },
                "encrypted": s3.sse_s3,
                "connect_timeout": s3.connect_timeout.map(|time| time.as_secs_f64()),
                "read_timeout": s3.request_timeout.map(|time| time.as_secs_f64()),
                "use_dualstack_endpoint": s3.dual_stack,
                "user_agent_extra": s3.user_agent_extra,
                "proxy_info": s3.proxy.as_ref().and_then(|proxy| shown_proxy(proxy.reveal())),
            })
        }
    }
}

fn shown_proxy(url: &str) -> Option<Value> {
    let url = url::Url::parse(url).ok()?;
    Some(json!({
        "type": if url.scheme() == "http" { "http" } else { "socks5" },
        "host": url.host_str(),
        "port": url.port_or_known_default(),
        "user": Some(url.username()).filter(|user| !user.is_empty()),
        "pass": url.password().map(|_| "***"),
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::from_value;

    use super::*;

    const NO_ENVIRONMENT: Lookup = &|_| None;

    fn convert(value: Value, env: Lookup) -> Result<StorageConfig, String> {
        let raw = from_value(value).unwrap();
        storage_config(&raw, Path::new("/work"), env).map_err(|problem| problem.to_string())
    }

    fn s3_of(value: Value, env: Lookup) -> S3Config {
        match convert(value, env) {
            Ok(StorageConfig::S3(s3)) => s3,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_directory_is_absolute_and_holds_the_prefix() {
        let local =
            convert(json!({"storage_type": "local", "directory": "x", "prefix": "/p/"}), NO_ENVIRONMENT);
        let Ok(StorageConfig::Local { directory }) = local else { panic!("{local:?}") };
        assert_eq!(directory, Path::new("/work/x/p"));
    }

    #[test]
    fn amazon_is_reached_safely_by_default() {
        let s3 = s3_of(json!({"storage_type": "s3", "bucket_name": "b", "region": "r"}), NO_ENVIRONMENT);
        assert_eq!((s3.endpoint, s3.verify_tls, s3.allow_http, s3.virtual_hosted), (None, true, false, true));
    }

    #[test]
    fn another_server_is_reached_as_pghoard_does() {
        let file = json!({"storage_type": "s3", "bucket_name": "b", "host": "h", "port": "9000"});
        let s3 = s3_of(file, NO_ENVIRONMENT);
        assert_eq!(s3.endpoint.as_deref(), Some("http://h:9000"));
        assert_eq!((s3.verify_tls, s3.allow_http, s3.virtual_hosted), (false, true, false));
    }

    #[test]
    fn amazons_variables_fill_what_the_file_leaves_out() {
        let env = |name: &str| match name {
            "AWS_ACCESS_KEY_ID" => Some("id".to_owned()),
            "AWS_SECRET_ACCESS_KEY" => Some("secret".to_owned()),
            "AWS_REGION" => Some("eu".to_owned()),
            "AWS_ENDPOINT_URL" => Some("https://s3.example.com".to_owned()),
            _ => None,
        };
        let s3 = s3_of(json!({"storage_type": "s3", "bucket_name": "b"}), &env);
        assert_eq!(s3.access_key_id.as_deref(), Some("id"));
        assert_eq!(s3.region.as_deref(), Some("eu"));
        assert_eq!(s3.endpoint.as_deref(), Some("https://s3.example.com:443"));
        assert!(s3.verify_tls);
    }

    #[test]
    fn halves_and_holes_are_named() {
        for (value, expected) in [
            (json!({}), "storage_type: missing; expected `local` or `s3`"),
            (json!({"storage_type": "local"}), "directory: missing"),
            (json!({"storage_type": "s3"}), "bucket_name: missing"),
            (
                json!({"storage_type": "s3", "bucket_name": "b", "host": "http://h", "port": 1}),
                "host: expected a host name without scheme and path, found \"http://h\"",
            ),
            (
                json!({"storage_type": "s3", "bucket_name": "b", "aws_access_key_id": "i"}),
                "aws_secret_access_key: missing, though `aws_access_key_id` is set",
            ),
            (
                json!({"storage_type": "s3", "bucket_name": "b", "host": "h"}),
                "port: missing, though `host` is set",
            ),
            (
                json!({"storage_type": "s3", "bucket_name": "b", "prefix": "../x"}),
                "prefix: `.` and `..` are not allowed in it",
            ),
        ] {
            assert_eq!(convert(value, NO_ENVIRONMENT).unwrap_err(), expected);
        }
    }

    #[test]
    fn a_shown_store_reads_back_as_the_same_store_but_for_its_secrets() {
        let file = json!({
            "storage_type": "s3", "bucket_name": "b", "prefix": "p", "region": "r", "host": "h", "port": 443,
            "is_secure": true, "is_verify_tls": true, "aws_access_key_id": "i", "aws_secret_access_key": "hunter2",
        });
        let shown = shown_storage(&convert(file, NO_ENVIRONMENT).unwrap());
        assert!(!shown.to_string().contains("hunter2"), "{shown}");
        let again = shown_storage(&convert(shown.clone(), NO_ENVIRONMENT).unwrap());
        assert_eq!(again, shown);
    }

    #[test]
    fn the_style_of_addressing_is_one_that_works() {
        let auto = Some(AddressingStyle::Auto);
        assert!(!virtual_hosted(auto, Some("10.0.0.1"), "b"));
        assert!(!virtual_hosted(auto, Some("localhost"), "b"));
        assert!(virtual_hosted(auto, Some("s3.example.com"), "b"));
        assert!(!virtual_hosted(auto, None, "b.c"));
        assert!(virtual_hosted(Some(AddressingStyle::Virtual), Some("s3.example.com"), "b.c"));
    }
}
