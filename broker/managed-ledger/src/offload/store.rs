//! Cold storage: immutable objects in a bucket or a directory, behind `object_store`.
//!
//! Contract, the same in every form (`store/tests.rs` is the exam): an object is written once and whole, it never changes,
//! and a read gives exactly the bytes asked for or an error. A write whose answer was lost may have happened. Every request
//! has a deadline; what may pass is tried a bounded number of times.

mod connect;
pub mod faulty;
#[cfg(test)]
pub(crate) mod s3_server;
#[cfg(test)]
mod tests;
mod write;

use std::{future::Future, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use object_store::{
    Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, PutOptions, path::Path,
};
use tokio::time::{sleep, timeout};

pub use connect::ColdStorageError;
pub(crate) use write::ObjectWrite;

/// Settings of cold storage.
#[derive(Clone, Debug)]
pub struct ColdStorageConfig {
    /// A single request, one part of an upload included, ends after this.
    pub request_timeout: Duration,
    /// How often a request that may succeed later is sent in all.
    pub tries: u32,
    /// Pause before the second try; doubled for each further one.
    pub retry_pause: Duration,
    /// Uploads go in parts of this size, bytes; a smaller object goes in one request. At least 5 MiB for S3.
    pub part_bytes: usize,
    /// A ledger's next object begins once one has this size, bytes.
    pub object_bytes: u64,
    /// What is compressed, checked and fetched as one, bytes of entries; at most 1 MiB.
    pub block_bytes: usize,
}

impl Default for ColdStorageConfig {
    fn default() -> Self {
        Self {
            request_timeout: Duration::from_secs(30),
            tries: 4,
            retry_pause: Duration::from_millis(200),
            part_bytes: 8 << 20,
            object_bytes: 256 << 20,
            block_bytes: 1 << 20,
        }
    }
}

/// Where offloaded ledgers lie. Clones share it.
#[derive(Clone, Debug)]
pub struct ColdStorage {
    store: Arc<dyn ObjectStore>,
    /// `<prefix of the URL>/<cluster id>`: two clusters in one bucket never see each other's objects.
    root: Path,
    config: Arc<ColdStorageConfig>,
}

/// Why a request to cold storage failed. Whatever it is, nothing is ever deleted because of it (X4).
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ColdError {
    /// The store is certain that there is no such object.
    #[error("object {object} does not exist")]
    NotFound { object: String },
    /// An object of that name and another size is there: a name was used twice, which must not be (X1).
    #[error("object {object} exists with another content")]
    Conflict { object: String },
    /// Repeating it helps nothing until somebody changes permissions or settings.
    #[error("object {object} is refused: {why}")]
    Refused { object: String, why: String },
    /// It may or may not have happened; try again later.
    #[error("object {object} cannot be reached: {why}")]
    Unavailable { object: String, why: String },
}

/// An object as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Below the listed prefix.
    pub(crate) rest: String,
    pub(crate) name: String,
    pub(crate) modified_ms: u64,
}

impl ColdStorage {
    /// Cold storage over a store that is there already; objects lie below `cluster_id`.
    #[must_use]
    pub fn over(
        store: Arc<dyn ObjectStore>,
        prefix: &str,
        cluster_id: &str,
        config: ColdStorageConfig,
    ) -> Self {
        let root =
            Path::from_iter(prefix.split('/').filter(|part| !part.is_empty()).chain([cluster_id]));
        Self { store, root, config: Arc::new(config) }
    }

    /// In memory, for tests and simulation.
    #[must_use]
    pub fn in_memory() -> Self {
        let store = Arc::new(object_store::memory::InMemory::new());
        Self::over(store, "", "test", ColdStorageConfig::default())
    }

    pub(crate) fn config(&self) -> &ColdStorageConfig {
        &self.config
    }

    fn path(&self, name: &str) -> Path {
        Path::from_iter(self.root.parts().chain(
            name.split('/').filter(|part| !part.is_empty()).map(object_store::path::PathPart::from),
        ))
    }

    /// Writes a small object. One of that name and size counts as written: an earlier try of ours whose answer was lost.
    pub(crate) async fn put(&self, name: &str, bytes: Bytes) -> Result<(), ColdError> {
        let path = self.path(name);
        let put = || {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let payload = bytes.clone().into();
            async { self.store.put_opts(&path, payload, options).await.map(drop) }
        };
        match self.retry(name, put).await {
            Err(Failed::AlreadyThere) => match self.size(name).await? {
                size if size == bytes.len() as u64 => Ok(()),
                _ => Err(ColdError::Conflict { object: name.to_owned() }),
            },
            other => other.map_err(|failed| failed.into_error(name)),
        }
    }

    /// The object's size, bytes.
    pub(crate) async fn size(&self, name: &str) -> Result<u64, ColdError> {
        let path = self.path(name);
        let head = self.retry(name, || self.store.head(&path)).await;
        head.map(|meta| meta.size).map_err(|failed| failed.into_error(name))
    }

    /// When it was written, by the store's clock.
    #[cfg(test)]
    pub(crate) async fn modified_ms(&self, name: &str) -> u64 {
        let meta = self.store.head(&self.path(name)).await.expect("it is there");
        meta.last_modified.timestamp_millis() as u64
    }

    /// Exactly these bytes.
    pub(crate) async fn read(&self, name: &str, range: Range<u64>) -> Result<Bytes, ColdError> {
        let path = self.path(name);
        let read = || async {
            let bytes = self.store.get_range(&path, range.clone()).await?;
            if bytes.len() as u64 == range.end - range.start {
                return Ok(bytes);
            }
            let why = format!("{} bytes instead of {range:?}", bytes.len());
            Err(StoreError::Generic { store: "cold storage", source: why.into() })
        };
        self.retry(name, read).await.map_err(|failed| failed.into_error(name))
    }

    /// Each object below `prefix`, in no order; one listing, not repeated. A listing proves nothing about what it lacks.
    pub(crate) async fn list(
        &self,
        prefix: &str,
        mut each: impl FnMut(Found),
    ) -> Result<(), ColdError> {
        let path = self.path(prefix);
        let mut listing = self.store.list(Some(&path));
        loop {
            let next = timeout(self.config.request_timeout, listing.next());
            match next.await {
                Ok(None) => return Ok(()),
                Ok(Some(Ok(meta))) => {
                    let rest = meta.location.prefix_match(&path).map(|parts| {
                        parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/")
                    });
                    let Some(rest) = rest else { continue };
                    let modified_ms = meta.last_modified.timestamp_millis().max(0) as u64;
                    each(Found { name: format!("{prefix}/{rest}"), rest, modified_ms });
                }
                Ok(Some(Err(error))) => return Err(Failed::of(&error).into_error(prefix)),
                Err(_) => return Err(Failed::Later("no answer in time".into()).into_error(prefix)),
            }
        }
    }

    /// Names directly below `prefix` that have objects below them. A listing proves nothing about what it lacks.
    pub(crate) async fn folders(&self, prefix: &str) -> Result<Vec<String>, ColdError> {
        let path = self.path(prefix);
        let listed = self.retry(prefix, || self.store.list_with_delimiter(Some(&path))).await;
        let listed = match listed {
            Err(Failed::NotThere) => return Ok(Vec::new()),
            listed => listed.map_err(|failed| failed.into_error(prefix))?,
        };
        let last = |folder: &Path| folder.parts().next_back().map(|part| part.as_ref().to_owned());
        Ok(listed.common_prefixes.iter().filter_map(last).collect())
    }

    /// Removes an object; one that is not there is fine. For the janitor alone (X4).
    pub(crate) async fn delete(&self, name: &str) -> Result<(), ColdError> {
        let path = self.path(name);
        match self.retry(name, || self.store.delete(&path)).await {
            Ok(()) | Err(Failed::NotThere) => Ok(()),
            Err(failed) => Err(failed.into_error(name)),
        }
    }

    /// Tries what may pass again, each try with a deadline.
    async fn retry<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        name: &str,
        request: impl Fn() -> F,
    ) -> Result<T, Failed> {
        let mut pause = self.config.retry_pause;
        let mut last = Failed::Later("never tried".to_owned());
        for attempt in 0..self.config.tries.max(1) {
            if attempt > 0 {
                sleep(pause).await;
                pause *= 2;
            }
            last = match timeout(self.config.request_timeout, request()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => Failed::of(&error),
                Err(_) => Failed::Later("no answer in time".to_owned()),
            };
            let Failed::Later(why) = &last else { break };
            tracing::debug!(object = name, attempt, why, "cold storage request failed");
        }
        Err(last)
    }
}

/// Why a try failed.
#[derive(Debug)]
enum Failed {
    NotThere,
    AlreadyThere,
    Never(String),
    Later(String),
}

impl Failed {
    fn of(error: &StoreError) -> Self {
        match error {
            StoreError::NotFound { .. } => Self::NotThere,
            StoreError::AlreadyExists { .. } | StoreError::Precondition { .. } => {
                Self::AlreadyThere
            }
            StoreError::PermissionDenied { .. }
            | StoreError::Unauthenticated { .. }
            | StoreError::NotSupported { .. }
            | StoreError::NotImplemented { .. }
            | StoreError::InvalidPath { .. }
            | StoreError::UnknownConfigurationKey { .. } => Self::Never(error.to_string()),
            _ => Self::Later(error.to_string()),
        }
    }

    fn into_error(self, object: &str) -> ColdError {
        let object = object.to_owned();
        match self {
            Self::NotThere => ColdError::NotFound { object },
            Self::AlreadyThere => ColdError::Conflict { object },
            Self::Never(why) => ColdError::Refused { object, why },
            Self::Later(why) => ColdError::Unavailable { object, why },
        }
    }
}
