//! S3 and what speaks like it.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::client::{HttpConnector, HttpRequest, ReqwestConnector};
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig};

use super::error::Error;
use super::open::{Options, S3Config};

/// The region that needs no name, not even when a bucket is created.
const DEFAULT_REGION: &str = "us-east-1";

/// A bucket that may not be there yet.
pub(super) struct Bucket {
    store: Arc<AmazonS3>,
    client: ClientOptions,
    region: String,
    description: String,
}

/// Amazon's endpoint for IPv4 and IPv6 alike.
fn dual_stack_endpoint(config: &S3Config, region: &str) -> String {
    let bucket = if config.virtual_hosted { format!("{}.", config.bucket) } else { String::new() };
    let china = if region.starts_with("cn-") { ".cn" } else { "" };
    format!("https://{bucket}s3.dualstack.{region}.amazonaws.com{china}")
}

impl Bucket {
    pub(super) fn new(config: &S3Config, description: &str, options: Options) -> Result<Self, Error> {
        let misconfigured = |reason: String| Error::Misconfigured { store: description.to_owned(), reason };
        let plain = config.endpoint.as_deref().is_some_and(|endpoint| !endpoint.starts_with("https://"));
        if plain && !config.allow_http {
            return Err(misconfigured(
                "the endpoint is not `https://`, and `http` is not allowed".to_owned(),
            ));
        }
        let mut user_agent = concat!("pgkeep/", env!("CARGO_PKG_VERSION")).to_owned();
        if let Some(extra) = &config.user_agent_extra {
            user_agent.push(' ');
            user_agent.push_str(extra);
        }
        let mut client = ClientOptions::new()
            .with_user_agent(user_agent.parse().map_err(|_| {
                misconfigured("`user_agent_extra` has letters that a header cannot have".to_owned())
            })?)
            .with_connect_timeout(config.connect_timeout.unwrap_or(Duration::from_secs(5)))
            .with_timeout(config.request_timeout.unwrap_or_default().max(options.request_timeout))
            // No read timeout: the client counts the time in which a body is sent as waiting for a read.
            .with_allow_http(config.allow_http)
            .with_allow_invalid_certificates(!config.verify_tls);
        if let Some(path) = &config.ca_file {
            let read = std::fs::read(path).map_err(|error| error.to_string());
            let certificates =
                read.and_then(|pem| Certificate::from_pem_bundle(&pem).map_err(|error| error.to_string()));
            let certificates = certificates.map_err(|reason| {
                misconfigured(format!("cannot read certificates from `{}`: {reason}", path.display()))
            })?;
            for certificate in certificates {
                client = client.with_root_certificate(certificate);
            }
        }
        if let Some(proxy) = &config.proxy {
            client = client.with_proxy_url(proxy.reveal());
        }
        let region = config.region.clone().unwrap_or_else(|| DEFAULT_REGION.to_owned());
        // Keys given here are the only ones; otherwise those of the environment, as every AWS tool has it.
        let mut builder = match (&config.access_key_id, &config.secret_access_key) {
            (Some(id), Some(secret)) => {
                let builder =
                    AmazonS3Builder::new().with_access_key_id(id).with_secret_access_key(secret.reveal());
                match &config.session_token {
                    Some(token) => builder.with_token(token.reveal()),
                    None => builder,
                }
            }
            (None, None) => AmazonS3Builder::from_env(),
            _ => return Err(misconfigured("access key id and secret access key go together".to_owned())),
        };
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
        } else if config.dual_stack {
            builder = builder.with_endpoint(dual_stack_endpoint(config, &region));
        }
        if config.sse_s3 {
            let key = "aws_server_side_encryption".parse::<AmazonS3ConfigKey>();
            builder = builder.with_config(key.expect("a key of the library"), "AES256");
        }
        let store = builder
            .with_bucket_name(&config.bucket)
            .with_region(&region)
            .with_virtual_hosted_style_request(config.virtual_hosted)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_client_options(client.clone())
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: Duration::from_millis(100),
                    max_backoff: Duration::from_secs(10),
                    base: 2.0,
                },
                max_retries: 10,
                retry_timeout: options.retry_timeout,
            })
            .build()
            .map_err(|error| misconfigured(error.to_string()))?;
        Ok(Self { store: Arc::new(store), client, region, description: description.to_owned() })
    }

    pub(super) fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::<AmazonS3>::clone(&self.store)
    }

    /// Creates the bucket. When that fails, `missing`, the finding that it is not there, says more than
    /// the refusal to create it, and both are told.
    pub(super) async fn create(&self, missing: Error) -> Result<(), Error> {
        let refused = |reason: String| match &missing {
            Error::Missing { store, operation, detail } => Error::Missing {
                store: store.clone(),
                operation,
                detail: format!("{detail}; creating the bucket failed: {reason}"),
            },
            other => other.clone(),
        };
        // The library has no call for this; a signed address of the bucket itself is all it takes.
        let method = "PUT".parse().expect("a method");
        let url = self
            .store
            .signed_url(method, &Path::default(), Duration::from_mins(1))
            .await
            .map_err(|error| refused(error.to_string()))?;
        let body = if self.region == DEFAULT_REGION {
            String::new()
        } else {
            format!(
                "<CreateBucketConfiguration><LocationConstraint>{}</LocationConstraint></CreateBucketConfiguration>",
                self.region
            )
        };
        let mut request = HttpRequest::new(body.into());
        *request.method_mut() = "PUT".parse().expect("a method");
        *request.uri_mut() = url.as_str().parse().map_err(|_| refused("bad address".to_owned()))?;
        let client = ReqwestConnector::default()
            .connect(&self.client)
            .map_err(|error| Error::classify(&self.description, "create the bucket", &error))?;
        let response = client.execute(request).await.map_err(|error| refused(error.to_string()))?;
        let status = response.status();
        // 409: somebody else was faster, or owns the name; the check that follows tells which.
        if status.is_success() || status.as_u16() == 409 {
            Ok(())
        } else {
            Err(refused(format!("the store answered {status}")))
        }
    }
}
