//! Removes objects that no list names (X4): those of uploads that failed, of trimmed ledgers, of deleted segments.
//!
//! An object goes only if it is older than a day *and* a linearizable read of its segment's list, made after the listing,
//! names its uuid nowhere. A uuid is listed before the first object of it is written, and once it has left the list it never
//! comes back; so an object that passes is nobody's for ever. Errors, odd names and unreadable lists delete nothing.

use std::{collections::BTreeSet, time::Duration};

use geminga_metadata::{Cluster, keys};
use geminga_proto::ids::SegmentId;

use super::{
    format::{ObjectId, segment_prefix},
    store::{ColdStorage, Found},
};
use crate::{factory::ManagedLedgers, list::List};

/// No object younger than this is removed (X4).
const AGE_MIN: Duration = Duration::from_secs(24 * 3600);
/// Objects removed in one pass; the next pass goes on.
const DELETES_MAX: usize = 1_000;

/// Why a pass ended early. Nothing is lost by it: another pass will come.
#[derive(Debug, thiserror::Error)]
#[error("objects are not swept now: {0}")]
pub struct SweepError(pub String);

fn not_now(error: impl std::fmt::Display) -> SweepError {
    SweepError(error.to_string())
}

impl ManagedLedgers {
    /// Removes what no list names among the objects of a segment, whoever owns it, and also if it is deleted (X4); returns
    /// how many objects went. Without cold storage there are none. Any number of these may run at once. Cancel-safe.
    ///
    /// # Errors
    /// [`SweepError`].
    pub async fn sweep_objects(&self, segment: SegmentId) -> Result<usize, SweepError> {
        self.sweep_at_most(segment, DELETES_MAX).await
    }

    pub(crate) async fn sweep_at_most(
        &self,
        segment: SegmentId,
        deletes_max: usize,
    ) -> Result<usize, SweepError> {
        let Some(cold) = self.cold() else { return Ok(0) };
        self.is_confirmed().await.map_err(not_now)?;
        let now = self.parts().clock.now();
        let old = |found: &Found| {
            let age = now.0.saturating_sub(found.modified_ms);
            Duration::from_millis(age) >= AGE_MIN
        };
        // A hint that spares candidates for what is nobody's; what decides is read after the listing.
        let named = self.named_uploads(segment).await?;
        let mut candidates = Vec::new();
        let keep = |found: Found| {
            if let Some((_, uuid)) = ObjectId::parse(&found.rest)
                && old(&found)
                && !named.contains(&uuid)
                && candidates.len() < deletes_max
            {
                candidates.push((uuid, found.name));
            }
        };
        cold.list(&segment_prefix(segment), keep).await.map_err(not_now)?;
        if candidates.is_empty() {
            return Ok(0);
        }
        let named = self.named_uploads(segment).await?;
        candidates.retain(|(uuid, _)| !named.contains(uuid));
        self.remove(&cold, segment, candidates).await
    }

    /// Every uuid that the list names, as it stands now (MD2); none for a segment that does not exist.
    async fn named_uploads(&self, segment: SegmentId) -> Result<BTreeSet<[u8; 16]>, SweepError> {
        let (_, found) =
            self.parts().store.get(&keys::segment_list(segment)).await.map_err(not_now)?;
        let Some(found) = found else { return Ok(BTreeSet::new()) };
        let list = List::decode(&found.value).map_err(not_now)?;
        let uploads = list.data.iter().filter_map(|listed| listed.offload.as_ref());
        Ok(uploads.map(|offload| offload.uuid).collect())
    }

    async fn remove(
        &self,
        cold: &ColdStorage,
        segment: SegmentId,
        objects: Vec<([u8; 16], String)>,
    ) -> Result<usize, SweepError> {
        let mut removed = 0;
        for (_, name) in objects {
            cold.delete(&name).await.map_err(not_now)?;
            removed += 1;
            self.parts().metrics.objects_swept.inc();
            tracing::info!(
                topic = segment.topic.0,
                segment = segment.segment,
                object = name,
                "object without a ledger removed"
            );
        }
        Ok(removed)
    }

    /// G3: after a restore nothing is removed until an operator has said that the restored state stands. A store without a
    /// cluster's record proves nothing either.
    pub(crate) async fn is_confirmed(&self) -> Result<geminga_metadata::Revision, String> {
        let found = self.parts().store.get(&keys::cluster()).await;
        let (_, found) = found.map_err(|error| error.to_string())?;
        let found = found.ok_or("there is no cluster record")?;
        let cluster = Cluster::decode(&found.value).map_err(|error| error.to_string())?;
        match cluster.generation == cluster.confirmed {
            true => Ok(found.mod_revision),
            false => Err("the cluster was restored, and that is not confirmed yet (G3)".to_owned()),
        }
    }
}
