//! A full scan of all ledgers at one revision: whom they name, and which of them must be listed for repair.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use geminga_bookie_client::{
    ensemble::LimboBound,
    metadata::{LedgerMetadata, LedgerState, Versioned},
};
use geminga_metadata::{
    Compare, Op, RangeRequest, Revision, SharedStore, StoreError, Txn, TxnOutcome, keys,
};
use geminga_proto::{
    ids::{Incarnation, LedgerId},
    storage::v1 as wire,
};
use geminga_runtime::clock::SharedClock;
use prost::Message;

use super::drain::Left;

/// Ledgers that one scan remembers for listing; the rest is found by the next one.
const TO_LIST_MAX: usize = 100_000;
/// Listings of one transaction.
const LISTINGS_PER_TXN: usize = 32;

/// What a scan looks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Ledgers that name them are listed.
    pub(crate) condemned: BTreeSet<Incarnation>,
    /// So are those that name them and were created at or below the bound (D8).
    pub(crate) limbo: BTreeMap<Incarnation, LimboBound>,
    /// What names it is counted (DC1).
    pub(crate) draining: Option<Incarnation>,
}

/// What a scan found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scan {
    /// Where it was made.
    pub(crate) revision: Revision,
    /// Every incarnation that a ledger names which is not Deleted.
    pub(crate) named: BTreeSet<Incarnation>,
    pub(crate) to_list: Vec<LedgerId>,
    pub(crate) left: Left,
    /// Values that could not be read: they may name anyone, so nothing is proven.
    pub(crate) unreadable: u64,
}

impl Scan {
    /// Whether the scan proves that no ledger names this incarnation.
    pub(crate) fn proves_unnamed(&self, incarnation: Incarnation) -> bool {
        self.unreadable == 0 && !self.named.contains(&incarnation)
    }

    fn take(&mut self, ledger: &Versioned<LedgerMetadata>, wanted: &Wanted) {
        let metadata = &ledger.value;
        if matches!(metadata.state, LedgerState::Deleted { .. }) {
            return;
        }
        let mut short = metadata.is_closed() && metadata.has_vacancy();
        for incarnation in metadata.fragments.iter().flat_map(|f| f.slots.iter().copied().flatten())
        {
            self.named.insert(incarnation);
            let limbo = wanted.limbo.get(&incarnation);
            short |= wanted.condemned.contains(&incarnation)
                || limbo.is_some_and(|bound| is_below(ledger, bound));
        }
        if short && self.to_list.len() < TO_LIST_MAX {
            self.to_list.push(metadata.id);
        }
        if let Some(draining) = wanted.draining {
            self.left.take(metadata, draining);
        }
    }
}

/// D8: created at or below the bound; a later generation is above it.
fn is_below(ledger: &Versioned<LedgerMetadata>, bound: &LimboBound) -> bool {
    let generation = (ledger.value.id.0 >> 56) as u32;
    (generation, ledger.create_revision) <= (bound.generation, bound.revision)
}

/// Scans all ledgers at one revision.
///
/// # Errors
/// [`StoreError`], `Compacted` among them when it took too long: scan again.
pub(crate) async fn scan(store: &SharedStore, wanted: &Wanted) -> Result<Scan, StoreError> {
    let mut scan = Scan::default();
    let (mut after, mut at) = (None, None);
    loop {
        let request = RangeRequest { prefix: keys::ledgers(), after, limit: 0, at };
        let page = store.range(request).await?;
        at = Some(page.revision);
        scan.revision = page.revision;
        for item in &page.items {
            match LedgerMetadata::from_key_value(item) {
                Ok(ledger) => scan.take(&ledger, wanted),
                Err(error) => {
                    scan.unreadable += 1;
                    tracing::error!(key = %item.key, %error, "ledger metadata is damaged");
                }
            }
        }
        after = page.items.last().map(|last| last.key.clone());
        if !page.more || after.is_none() {
            return Ok(scan);
        }
    }
}

/// Writes `underreplicated/<ledger>` for those that are not listed yet, at a bounded pace (A1, T16). Returns how many were
/// written. A standing listing is left as it is, so that whoever works on it is not disturbed.
///
/// # Errors
/// [`StoreError`]; what is missing is found by the next scan.
pub(crate) async fn list(
    store: &SharedStore,
    clock: &SharedClock,
    ledgers: &[LedgerId],
    reason: &str,
    pause: Duration,
) -> Result<u64, StoreError> {
    let mut listed = 0;
    for chunk in ledgers.chunks(LISTINGS_PER_TXN) {
        let keys: Vec<_> = chunk.iter().map(|ledger| keys::under_replicated(*ledger)).collect();
        let (_, found) = store.get_many(&keys).await?;
        let value =
            wire::UnderReplicated { format: 1, reason: reason.to_owned(), at_ms: clock.now().0 }
                .encode_to_vec();
        let mut txn = Txn::new();
        for (key, found) in keys.into_iter().zip(found) {
            if found.is_none() {
                txn = txn.when(Compare::Absent(key.clone())).then(Op::put(key, value.clone()));
            }
        }
        let count = txn.changes.len() as u64;
        if count == 0 {
            continue;
        }
        if let TxnOutcome::Done(_) = store.txn(txn).await? {
            listed += count;
        }
        tokio::time::sleep(pause).await;
    }
    Ok(listed)
}
