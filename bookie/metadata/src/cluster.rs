//! The cluster's own record: made once, by whoever comes first.

use std::time::Duration;

use geminga_proto::{
    ids,
    names::{NamespaceName, TenantName},
    storage::v1 as storage,
};
use geminga_runtime::{clock::Timestamp, random::Random};
use prost::Message;
use tokio_util::sync::CancellationToken;

use crate::{Committed, Compare, Op, SharedStore, StoreError, Txn, commit, keys};

/// Format of the values written here.
const FORMAT: u32 = 1;
/// The feature level of this version (U2).
pub const FEATURE_LEVEL: u32 = 1;
/// Bundles of a new cluster (section 11): whoever makes it, they are the same.
pub const BUNDLES: u32 = 1_024;
/// How long [`ensure_cluster`] repeats its transaction while the store does not answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// `cluster`: identity, generation, and what is fixed for the cluster's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// A uuid.
    pub id: String,
    /// Raised when the store is restored from a backup; the high bits of all ids and epochs.
    pub generation: u8,
    /// The generation that an operator has confirmed.
    pub confirmed: u8,
    /// The format level that all members write (U2).
    pub feature_level: u32,
    /// Bundles that segments are hashed into; fixed when the cluster is made.
    pub bundles: u32,
}

impl Cluster {
    /// What is added to 64-bit ids and epochs.
    #[must_use]
    pub fn generation_base_64(&self) -> u64 {
        ids::generation_base_64(self.generation)
    }

    /// What is added to incarnation numbers.
    #[must_use]
    pub fn generation_base_32(&self) -> u32 {
        ids::generation_base_32(self.generation)
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// [`ClusterError::Damaged`] for bytes that this version did not write or cannot read.
    pub fn decode(bytes: &[u8]) -> Result<Self, ClusterError> {
        let damaged = |reason: String| ClusterError::Damaged(reason);
        let value = storage::Cluster::decode(bytes).map_err(|error| damaged(error.to_string()))?;
        if value.format != FORMAT {
            return Err(damaged(format!("format {}, this version reads {FORMAT}", value.format)));
        }
        let byte = |name: &str, n: u32| {
            u8::try_from(n).map_err(|_| damaged(format!("{name} {n} does not fit 8 bits")))
        };
        if value.bundles == 0 {
            return Err(damaged("no bundles".to_owned()));
        }
        Ok(Self {
            generation: byte("generation", value.generation)?,
            confirmed: byte("confirmed generation", value.confirmed)?,
            id: value.id,
            feature_level: value.feature_level,
            bundles: value.bundles,
        })
    }

    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        storage::Cluster {
            format: FORMAT,
            id: self.id.clone(),
            generation: u32::from(self.generation),
            confirmed: u32::from(self.confirmed),
            feature_level: self.feature_level,
            bundles: self.bundles,
        }
        .encode_to_vec()
    }
}

/// Why the cluster's record could not be read or made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClusterError {
    /// The store failed; `Unavailable` and `Unknown` are worth another call, which does no harm.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The record is not one this version can work with.
    #[error("the cluster record cannot be used: {0}")]
    Damaged(String),
}

/// The cluster's record; makes it, the tenant `public` and the namespace `public/default` in one transaction if there is
/// none. Idempotent: any number of nodes may call it at once, and all get the same record. `bundles` (1,024 by default)
/// counts only for the one that makes it. The transaction is repeated for up to 30 s. Cancel-safe.
///
/// # Errors
/// [`ClusterError`].
pub async fn ensure_cluster(
    store: &SharedStore,
    random: &Random,
    now: Timestamp,
    bundles: u32,
) -> Result<Cluster, ClusterError> {
    let key = keys::cluster();
    if let (_, Some(found)) = store.get(&key).await? {
        return Cluster::decode(&found.value);
    }
    let cluster = Cluster {
        id: uuid::Uuid::from_bytes(random.uuid()).to_string(),
        generation: 0,
        confirmed: 0,
        feature_level: FEATURE_LEVEL,
        bundles: bundles.max(1),
    };
    let public = TenantName::parse("public").expect("a valid name");
    let default = NamespaceName::parse("public/default").expect("a valid name");
    let tenant = storage::TenantValue { format: FORMAT, created_at_ms: now.0, policies: None };
    let namespace = storage::NamespaceValue {
        format: FORMAT,
        created_at_ms: now.0,
        auto_create_topics: true,
        policies: None,
    };
    let txn = Txn::new()
        .when(Compare::Absent(key.clone()))
        .then(Op::put(key, cluster.encode()))
        .then(Op::put(keys::tenant(&public), tenant.encode_to_vec()))
        .then(Op::put(keys::namespace(&default), namespace.encode_to_vec()));
    let cancel = CancellationToken::new();
    let committed = tokio::time::timeout(PATIENCE, commit(store, &txn, &cancel)).await;
    match committed {
        Ok(Committed::Done(_)) => Ok(cluster),
        // Another's, or an earlier try of ours: the record that stands is the cluster's either way.
        Ok(Committed::Conflict { found, .. }) => match found.first() {
            Some(Some(found)) => Cluster::decode(&found.value),
            _ => Err(ClusterError::Damaged("the record came and went".to_owned())),
        },
        Ok(Committed::Refused(error)) => Err(error.into()),
        Ok(Committed::Unsettled) | Err(_) => {
            Err(StoreError::Unknown("the cluster record was not settled in time".to_owned()).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{MemoryStore, MetadataStore};

    #[tokio::test(start_paused = true)]
    async fn every_caller_gets_the_cluster_that_the_first_one_made() {
        let memory = MemoryStore::new();
        let store: SharedStore = Arc::new(memory.clone());
        let now = Timestamp(7);
        let first = ensure_cluster(&store, &Random::from_seed(1), now, 1024).await.expect("made");
        let second = ensure_cluster(&store, &Random::from_seed(2), now, 9).await.expect("found");
        assert_eq!(first, second);
        assert_eq!((first.bundles, first.generation, first.confirmed), (1024, 0, 0));
        assert_eq!(first.id.len(), 36);
        let default = keys::namespace(&NamespaceName::parse("public/default").expect("valid"));
        assert!(memory.get(&default).await.expect("read").1.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_default_namespace_is_not_made_again() {
        let memory = MemoryStore::new();
        let store: SharedStore = Arc::new(memory.clone());
        let random = Random::from_seed(1);
        ensure_cluster(&store, &random, Timestamp(7), 1024).await.expect("made");
        let default = keys::namespace(&NamespaceName::parse("public/default").expect("valid"));
        memory.txn(Txn::new().then(Op::Delete(default.clone()))).await.expect("deleted");
        ensure_cluster(&store, &random, Timestamp(8), 1024).await.expect("found");
        assert!(memory.get(&default).await.expect("read").1.is_none());
    }

    #[test]
    fn a_record_of_another_format_is_refused() {
        let good = Cluster {
            id: "x".to_owned(),
            generation: 3,
            confirmed: 2,
            feature_level: 1,
            bundles: 4,
        };
        assert_eq!(Cluster::decode(&good.encode()).expect("valid"), good);
        let newer = storage::Cluster { format: 2, bundles: 4, ..Default::default() };
        assert!(Cluster::decode(&newer.encode_to_vec()).is_err());
        let empty = storage::Cluster { format: 1, ..Default::default() };
        assert!(Cluster::decode(&empty.encode_to_vec()).is_err());
        assert!(Cluster::decode(&[0xff; 9]).is_err());
    }
}
