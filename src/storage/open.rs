//! From a configuration to a store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::error::Error;
use super::local::LocalStore;
use super::s3;
use super::store::Store;
use crate::secret::Secret;

/// Where objects are kept.
#[expect(clippy::large_enum_variant, reason = "there is one per site, made once")]
#[derive(Clone, Debug)]
pub enum StorageConfig {
    Local { directory: PathBuf },
    S3(S3Config),
}

/// A bucket, and how to get at it.
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own, as the user writes them")]
#[derive(Clone, Debug)]
pub struct S3Config {
    pub bucket: String,
    /// Put before every key; may be empty.
    pub prefix: String,
    /// `us-east-1` when missing.
    pub region: Option<String>,
    /// `http(s)://host:port` of a store that is not Amazon's.
    pub endpoint: Option<String>,
    /// Without both keys the credentials come from the environment, a web identity, or the instance.
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<Secret>,
    pub session_token: Option<Secret>,
    /// Permits an `http://` endpoint.
    pub allow_http: bool,
    pub verify_tls: bool,
    /// PEM certificates to trust beside those of the system.
    pub ca_file: Option<PathBuf>,
    /// Bucket in the host name (`bucket.host`) instead of in the path.
    pub virtual_hosted: bool,
    /// Ask the store to encrypt at rest with its own keys (`AES256`).
    pub sse_s3: bool,
    /// Amazon's endpoints that answer by IPv6, too.
    pub dual_stack: bool,
    /// 5 s when missing.
    pub connect_timeout: Option<Duration>,
    /// For one request in all; never less than [`Options::request_timeout`], which a large body needs.
    pub request_timeout: Option<Duration>,
    pub user_agent_extra: Option<String>,
    /// URL of a proxy.
    pub proxy: Option<Secret>,
}

impl Default for S3Config {
    fn default() -> Self {
        Self {
            bucket: String::new(),
            prefix: String::new(),
            region: None,
            endpoint: None,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            allow_http: false,
            verify_tls: true,
            ca_file: None,
            virtual_hosted: false,
            sse_s3: false,
            dual_stack: false,
            connect_timeout: None,
            request_timeout: None,
            user_agent_extra: None,
            proxy: None,
        }
    }
}

impl StorageConfig {
    /// The place as a URL, for messages: `s3://bucket/prefix`, with `?endpoint=` where it is not Amazon's, or
    /// `file:///directory`.
    pub fn description(&self) -> String {
        match self {
            Self::Local { directory } => {
                let absolute = std::path::absolute(directory);
                format!("file://{}", absolute.as_deref().unwrap_or(directory).display())
            }
            Self::S3(config) => {
                let prefix = config.prefix.trim_matches('/');
                let slash = if prefix.is_empty() { "" } else { "/" };
                let endpoint = config.endpoint.as_ref();
                let endpoint = endpoint.map(|at| format!("?endpoint={at}")).unwrap_or_default();
                format!("s3://{}{slash}{prefix}{endpoint}", config.bucket)
            }
        }
    }
}

/// What the store is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing is created or changed.
    Read,
    /// Directory and bucket are created when they are missing.
    Write,
}

/// How long to insist.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A request that fails for a passing reason is tried again within this time. Loops that go on for
    /// longer belong to the callers, who know what waits.
    pub retry_timeout: Duration,
    /// One try of one request, body included.
    pub request_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        // A 16 MiB object passes within two minutes on a line of 1.2 Mbit/s.
        Self { retry_timeout: Duration::from_secs(45), request_timeout: Duration::from_mins(2) }
    }
}

/// Opens the store and makes sure that it is there.
pub async fn open(config: &StorageConfig, access: Access) -> Result<Store, Error> {
    open_with(config, access, Options::default()).await
}

/// [`open`] with other limits on time.
pub async fn open_with(config: &StorageConfig, access: Access, options: Options) -> Result<Store, Error> {
    let description = config.description();
    let store = match config {
        StorageConfig::Local { directory } => {
            let local = open_directory(directory.clone(), access, description.clone()).await?;
            Store::new(Arc::new(local), "", description)
        }
        StorageConfig::S3(s3_config) => {
            let bucket = s3::Bucket::new(s3_config, &description, options)?;
            let store = Store::new(bucket.store(), &s3_config.prefix, description);
            if access == Access::Write
                && let Err(error @ Error::Missing { .. }) = store.check_reachable().await
            {
                bucket.create(error).await?;
            }
            store
        }
    };
    store.check_reachable().await?;
    Ok(store)
}

async fn open_directory(
    directory: PathBuf,
    access: Access,
    description: String,
) -> Result<LocalStore, Error> {
    let open = move || {
        if access == Access::Write {
            create_directory(&directory).map_err(|error| Error::from_io(&description, "write", error))?;
        }
        LocalStore::open(&directory).map_err(|error| match error {
            // The library says only that it cannot make the path absolute.
            object_store::Error::Generic { .. } if is_missing(&directory) => Error::Missing {
                store: description.clone(),
                operation: "open the directory",
                detail: "no such directory".to_owned(),
            },
            error => Error::classify(&description, "open the directory", &error),
        })
    };
    tokio::task::spawn_blocking(open).await.expect("opening a directory does not panic")
}

fn is_missing(directory: &Path) -> bool {
    std::fs::metadata(directory).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Creates `directory` with its parents and leaves the marker that tells it from a bare mount point.
fn create_directory(directory: &Path) -> std::io::Result<()> {
    let sync = |path: &Path| std::fs::File::open(path).and_then(|directory| directory.sync_all());
    let absolute = std::path::absolute(directory)?;
    let missing: Vec<_> = absolute.ancestors().take_while(|path| !path.exists()).collect();
    std::fs::create_dir_all(&absolute)?;
    for path in missing {
        sync(path)?;
        path.parent().map_or(Ok(()), sync)?;
    }
    let marker = absolute.join(LocalStore::MARKER);
    if !marker.exists() {
        std::fs::write(
            &marker,
            "This directory is a pgkeep store. Leave this file: an empty directory is taken for a missing mount.\n",
        )?;
        sync(&marker)?;
        sync(&absolute)?;
    }
    Ok(())
}
