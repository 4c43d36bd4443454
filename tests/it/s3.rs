//! The S3 server that `scripts/with-s3` runs around the tests.

use std::env;

use serde_json::{Value, json};

/// Where an S3 server listens, and how to get in.
#[derive(Clone, Debug)]
pub struct S3 {
    pub host: String,
    pub port: u16,
    pub access_key: String,
    pub secret_key: String,
    pub bucket: String,
}

impl S3 {
    /// The server of this run. `None` (with a word on the terminal) when there is none, which is a failure under
    /// `make test` and in CI: a test that never runs there would not be missed.
    pub fn from_environment() -> Option<Self> {
        let Ok(endpoint) = env::var("PGKEEP_TEST_S3_ENDPOINT") else {
            assert!(
                env::var_os("CI").is_none() && env::var_os("PGKEEP_TEST_REQUIRED").is_none(),
                "PGKEEP_TEST_S3_ENDPOINT is not set: run the tests by `scripts/with-s3 cargo test`"
            );
            crate::process::skipped(
                "no S3 server (PGKEEP_TEST_S3_ENDPOINT is not set); scripts/with-s3 runs one",
            );
            return None;
        };
        let variable = |name| env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        let (host, port) = endpoint
            .strip_prefix("http://")
            .and_then(|address| address.split_once(':'))
            .and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)))
            .unwrap_or_else(|| panic!("PGKEEP_TEST_S3_ENDPOINT `{endpoint}` is not http://HOST:PORT"));
        Some(Self {
            host,
            port,
            access_key: variable("PGKEEP_TEST_S3_ACCESS_KEY"),
            secret_key: variable("PGKEEP_TEST_S3_SECRET_KEY"),
            bucket: variable("PGKEEP_TEST_S3_BUCKET"),
        })
    }

    /// `http://HOST:PORT`
    pub fn endpoint(&self) -> String {
        format!("http://{}:{}", self.host, self.port)
    }

    /// The `object_storage` of a configuration file. Tests share the bucket: give each a `prefix` of its own.
    pub fn object_storage(&self, prefix: &str) -> Value {
        json!({
            "storage_type": "s3",
            "bucket_name": self.bucket,
            "prefix": prefix,
            "region": "us-east-1",
            "host": self.host,
            "port": self.port,
            "is_secure": false,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
        })
    }
}

/// A prefix that no other test and no earlier run has used.
pub fn unique_prefix(name: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("it is after 1970");
    format!("{name}-{}-{}", std::process::id(), now.as_nanos())
}

#[test]
fn the_server_of_this_run_answers() {
    if let Some(s3) = S3::from_environment() {
        let address = format!("{}:{}", s3.host, s3.port).parse().unwrap();
        let response = crate::http::get(address, &format!("/{}/", s3.bucket)).unwrap();
        assert_eq!(response.status, 403, "it must ask for a signature: {}", response.text());
    }
}
