//! Gives back what the cluster does not need here any more (G1-G3). Only linearizable point reads drop a ledger; what stands
//! for it ever after (tombstone, fenced set) is durable before the data goes (D13).
//!
//! ```text
//! Deleted ------------------------------------------------------------> tombstone, at once
//! absent, twice, 1 h apart -------------------------+--> G2: modest? -> tombstone
//! Closed, 24 h unnamed, unlisted --> mark leaving --+--> read again --> fenced set, or un-mark
//! ```

mod judge;

use std::{io, sync::Arc, time::Duration};

use geminga_bookie_client::metadata::LedgerMetadata;
use geminga_metadata::{Cluster, KeyValue, Revision, StoreError, keys};
use geminga_proto::ids::LedgerId;
use tokio::{sync::oneshot, time::Instant};

use self::judge::{Found, Limits, Verdict, has_left, is_modest};
use crate::{
    fencing::Room,
    journal::queue::Item,
    state::{INTERNAL_PATIENCE, Shared, until},
};

pub(crate) use judge::Memory;

/// Pause between passes while the disk is read-only for want of room (D10).
const INTERVAL_WHEN_SHORT: Duration = Duration::from_secs(5);
/// Ledgers of one read: for each its own key and its listing.
const LEDGERS_PER_READ: usize = 60;

/// Makes the tombstone durable and drops the ledger. True once that is done.
pub(crate) async fn drop_deleted(
    shared: &Arc<Shared>,
    ledger: LedgerId,
    deadline: Instant,
) -> bool {
    push(shared, deadline, |answer| Item::Tombstone { ledger, answer }).await
}

/// Queues the record and waits for its group.
async fn push(
    shared: &Arc<Shared>,
    deadline: Instant,
    item: impl FnOnce(oneshot::Sender<Result<(), geminga_bookie_client::bookie_rpc::Unknown>>) -> Item,
) -> bool {
    let synced = {
        let mut core = shared.core();
        if core.closed {
            return false;
        }
        let (answer, synced) = oneshot::channel();
        shared.push(&mut core, item(answer));
        synced
    };
    until(deadline, synced).await.is_ok()
}

/// Compares local ledgers with the store until cancelled: at the interval, and more often while the disk is short of room.
pub(crate) async fn run(shared: Arc<Shared>) -> io::Result<()> {
    let cancelled = shared.tasks.token();
    let interval = shared.config.gc_interval;
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
        match pass(&shared).await {
            Ok(0) => {}
            Ok(dropped) => {
                tracing::info!(bookie_id = shared.config.id, dropped, "ledgers were dropped");
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
pub(crate) async fn pass(shared: &Arc<Shared>) -> Result<usize, StoreError> {
    let mut memory = shared.gc.lock().await;
    let limits = Limits {
        absent_for: shared.config.gc_absent_after,
        unnamed_for: shared.config.gc_unnamed_after,
        share_max: shared.config.gc_share_max,
    };
    let own = shared.identity.incarnation;
    let ledgers: Vec<LedgerId> = shared.core().ledgers.ids().collect();
    let mut dropped = 0;
    let mut ripe = Vec::new();
    for chunk in ledgers.chunks(LEDGERS_PER_READ) {
        let states = read(shared, chunk, &mut memory.highest).await?;
        let now = Instant::now();
        for (&ledger, (found, listed)) in chunk.iter().zip(&states) {
            match memory.judge(ledger, found, *listed, own, now, &limits) {
                Verdict::Keep => {}
                Verdict::Deleted => {
                    let deadline = Instant::now() + INTERNAL_PATIENCE;
                    dropped += usize::from(drop_deleted(shared, ledger, deadline).await);
                }
                verdict => ripe.push((ledger, verdict)),
            }
        }
    }
    {
        let core = shared.core();
        memory.retain(|ledger| ledgers.binary_search(&ledger).is_ok());
        let bytes = |ledger: &LedgerId| core.ledgers.bytes(*ledger);
        let all = (ledgers.len(), ledgers.iter().map(bytes).sum());
        let going = (ripe.len(), ripe.iter().map(|(ledger, _)| bytes(ledger)).sum());
        if !is_modest(going, all, limits.share_max) {
            shared.metrics.gc_refused.inc();
            tracing::error!(
                bookie_id = shared.config.id,
                ledgers = going.0,
                bytes = going.1,
                "gc stops: too much of what is stored would be dropped at once"
            );
            return Ok(dropped);
        }
    }
    for (ledger, verdict) in ripe {
        let gone = match verdict {
            Verdict::Absent => {
                drop_deleted(shared, ledger, Instant::now() + INTERNAL_PATIENCE).await
            }
            _ => leave(shared, ledger, &mut memory.highest).await?,
        };
        dropped += usize::from(gone);
    }
    Ok(dropped)
}

/// Un-marks unless the drop was handed to the journal.
struct Leaving<'a> {
    shared: &'a Shared,
    ledger: LedgerId,
    decided: bool,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if !self.decided {
            self.shared.core().ledgers.unmark_leaving(self.ledger);
        }
    }
}

/// G1's last part: mark, read ledger and listing at one revision, then drop into the fenced set (D13) or un-mark. A copy that
/// settles here meanwhile is either refused by the mark, or seen by the read as a listing or as a slot that names us (T51).
async fn leave(
    shared: &Arc<Shared>,
    ledger: LedgerId,
    highest: &mut Revision,
) -> Result<bool, StoreError> {
    if !shared.core().ledgers.mark_leaving(ledger) {
        return Ok(false);
    }
    let mut mark = Leaving { shared, ledger, decided: false };
    let states = read(shared, &[ledger], highest).await?;
    let own = shared.identity.incarnation;
    let goes = states.first().is_some_and(|(found, listed)| {
        !listed && matches!(found, Some(Ok(found)) if has_left(&found.value, own))
    });
    if !goes {
        return Ok(false);
    }
    // From here on only the journal decides: the mark stands until the record is synced, or refused for want of room.
    mark.decided = true;
    let deadline = Instant::now() + INTERNAL_PATIENCE;
    Ok(push(shared, deadline, |answer| Item::MovedAway { ledger, answer }).await)
}

/// Point reads of ledgers and their listings at one revision; refused while G3 says so.
async fn read(
    shared: &Arc<Shared>,
    ledgers: &[LedgerId],
    highest: &mut Revision,
) -> Result<Vec<(Found, bool)>, StoreError> {
    let keys: Vec<_> = std::iter::once(keys::cluster())
        .chain(ledgers.iter().flat_map(|l| [keys::ledger(*l), keys::under_replicated(*l)]))
        .collect();
    let (revision, found) = shared.store.get_many(&keys).await?;
    let cluster =
        found.first().and_then(Option::as_ref).and_then(|found| Cluster::decode(&found.value).ok());
    let confirmed = cluster.is_some_and(|cluster| cluster.generation == cluster.confirmed);
    if !confirmed || revision < *highest || found.len() != keys.len() {
        return Err(StoreError::Refused(
            "the metadata store was restored and is not confirmed".to_owned(),
        ));
    }
    *highest = revision;
    let state = |pair: &[Option<KeyValue>]| {
        let ledger = pair[0].as_ref().map(LedgerMetadata::from_key_value);
        (ledger, pair[1].is_some())
    };
    Ok(found[1..].chunks_exact(2).map(state).collect())
}
