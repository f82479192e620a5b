//! Gives back what the cluster has deleted (G1). Only a linearizable point read that says Deleted drops a ledger here; the
//! tombstone is durable first (D13). Absence, errors, and listings prove nothing.

use std::{io, sync::Arc, time::Duration};

use geminga_bookie_client::metadata::{LedgerMetadata, LedgerState};
use geminga_metadata::{Cluster, Revision, StoreError, keys};
use geminga_proto::ids::LedgerId;
use tokio::{sync::oneshot, time::Instant};

use crate::{
    fencing::Room,
    journal::queue::Item,
    state::{INTERNAL_PATIENCE, Shared, until},
};

/// Pause between passes while the disk is read-only for want of room (D10).
const INTERVAL_WHEN_SHORT: Duration = Duration::from_secs(5);
/// Keys of one read.
const KEYS_PER_READ: usize = 100;

/// Makes the tombstone durable and drops the ledger. True once that is done.
pub(crate) async fn drop_deleted(
    shared: &Arc<Shared>,
    ledger: LedgerId,
    deadline: Instant,
) -> bool {
    let synced = {
        let mut core = shared.core();
        if core.closed {
            return false;
        }
        let (answer, synced) = oneshot::channel();
        shared.push(&mut core, Item::Tombstone { ledger, answer });
        synced
    };
    until(deadline, synced).await.is_ok()
}

/// Compares local ledgers with the store until cancelled: at the interval, and more often while the disk is short of room.
pub(crate) async fn run(shared: Arc<Shared>) -> io::Result<()> {
    let cancelled = shared.tasks.token();
    let interval = shared.config.gc_interval;
    let mut highest = Revision(0);
    let mut last = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = cancelled.cancelled() => return Ok(()),
            () = tokio::time::sleep(interval.min(INTERVAL_WHEN_SHORT)) => {}
        }
        if last.elapsed() < interval && shared.core().room == Room::Writable {
            continue;
        }
        last = Instant::now();
        match pass(&shared, &mut highest).await {
            Ok(0) => {}
            Ok(dropped) => {
                tracing::info!(
                    bookie_id = shared.config.id,
                    dropped,
                    "deleted ledgers were dropped"
                );
                shared.checkpoint_wake.notify_one();
            }
            Err(error) => {
                tracing::debug!(bookie_id = shared.config.id, %error, "gc pass ended early")
            }
        }
    }
}

/// One pass; returns how many ledgers were dropped. It stops while a restore of the store is unconfirmed, or when the
/// store's revision fell (G3).
pub(crate) async fn pass(
    shared: &Arc<Shared>,
    highest: &mut Revision,
) -> Result<usize, StoreError> {
    let ledgers: Vec<LedgerId> = shared.core().ledgers.ids().collect();
    let mut dropped = 0;
    for chunk in ledgers.chunks(KEYS_PER_READ) {
        let keys: Vec<_> = std::iter::once(keys::cluster())
            .chain(chunk.iter().map(|ledger| keys::ledger(*ledger)))
            .collect();
        let (revision, found) = shared.store.get_many(&keys).await?;
        let cluster = found
            .first()
            .and_then(Option::as_ref)
            .and_then(|found| Cluster::decode(&found.value).ok());
        let confirmed = cluster.is_some_and(|cluster| cluster.generation == cluster.confirmed);
        if !confirmed || revision < *highest {
            return Err(StoreError::Refused(
                "the metadata store was restored and is not confirmed".to_owned(),
            ));
        }
        *highest = revision;
        for (ledger, found) in chunk.iter().zip(&found[1..]) {
            let deleted = found
                .as_ref()
                .and_then(|found| LedgerMetadata::from_key_value(found).ok())
                .is_some_and(|ledger| matches!(ledger.value.state, LedgerState::Deleted { .. }));
            if deleted && drop_deleted(shared, *ledger, Instant::now() + INTERNAL_PATIENCE).await {
                dropped += 1;
            }
        }
    }
    Ok(dropped)
}
