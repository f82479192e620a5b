//! From a URL to a store. Credentials come from the environment or from files it names, never from a tenant or the URL.

use std::sync::Arc;

use object_store::{
    ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, S3ConditionalPut},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
    local::LocalFileSystem,
};

use super::{ColdStorage, ColdStorageConfig};

/// Why cold storage cannot be used as configured. A human looks.
#[derive(Debug, thiserror::Error)]
pub enum ColdStorageError {
    /// Not one of the URLs this understands.
    #[error(
        "{url} is no cold storage: {why} (s3://bucket/prefix, gs://, az:// or file:///directory)"
    )]
    Url { url: String, why: &'static str },
    /// Region, endpoint or credentials of the environment make no sense.
    #[error("cold storage at {url} cannot be set up: {why}")]
    Setup { url: String, why: String },
}

impl ColdStorage {
    /// Cold storage at `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix` or `file:///directory`, below
    /// `cluster_id`. No request is made here. The environment gives credentials, region and endpoint (`AWS_*`, `GOOGLE_*`,
    /// `AZURE_*`).
    ///
    /// # Errors
    /// [`ColdStorageError`].
    pub fn from_url(
        url: &str,
        cluster_id: &str,
        config: ColdStorageConfig,
    ) -> Result<Self, ColdStorageError> {
        let refuse = |why| ColdStorageError::Url { url: url.to_owned(), why };
        let setup = |error: object_store::Error| ColdStorageError::Setup {
            url: url.to_owned(),
            why: error.to_string(),
        };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| refuse("there is no scheme"))?;
        if rest.contains(['@', '?', '#']) {
            return Err(refuse("credentials and options do not belong into the URL"));
        }
        if scheme == "file" {
            if !rest.starts_with('/') {
                return Err(refuse("the directory is not absolute"));
            }
            std::fs::create_dir_all(rest).map_err(|error| ColdStorageError::Setup {
                url: url.to_owned(),
                why: error.to_string(),
            })?;
            // An object survives a power cut before anybody counts on it.
            let store = LocalFileSystem::new_with_prefix(rest).map_err(setup)?.with_fsync(true);
            return Ok(Self::over(Arc::new(store), "", cluster_id, config));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(refuse("there is no bucket"));
        }
        let store: Arc<dyn ObjectStore> = match scheme {
            "s3" => Arc::new(s3(AmazonS3Builder::from_env(), bucket, &config).map_err(setup)?),
            "gs" => Arc::new(
                GoogleCloudStorageBuilder::from_env()
                    .with_bucket_name(bucket)
                    .with_client_options(client(&config))
                    .with_retry(no_retry())
                    .build()
                    .map_err(setup)?,
            ),
            "az" => Arc::new(
                MicrosoftAzureBuilder::from_env()
                    .with_container_name(bucket)
                    .with_client_options(client(&config))
                    .with_retry(no_retry())
                    .build()
                    .map_err(setup)?,
            ),
            _ => return Err(refuse("the scheme is unknown")),
        };
        Ok(Self::over(store, prefix, cluster_id, config))
    }
}

/// An S3 bucket; writes are conditional, so that a name is taken once.
pub(super) fn s3(
    builder: AmazonS3Builder,
    bucket: &str,
    config: &ColdStorageConfig,
) -> object_store::Result<object_store::aws::AmazonS3> {
    builder
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_client_options(client(config))
        .with_retry(no_retry())
        .build()
}

fn client(config: &ColdStorageConfig) -> ClientOptions {
    // An endpoint without TLS is used only where the environment names one.
    ClientOptions::new()
        .with_timeout(config.request_timeout)
        .with_connect_timeout(config.request_timeout.min(std::time::Duration::from_secs(5)))
        .with_allow_http(true)
}

/// Requests are repeated in one place, by us: [`ColdStorage`] counts the tries.
fn no_retry() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}
