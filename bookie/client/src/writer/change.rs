//! Publishing an ensemble change (EC3, EC4) through an uncertain store (MD3).

use geminga_metadata::{Committed, SharedStore, commit};
use tokio_util::sync::CancellationToken;

use super::core::{ChangeOutcome, ChangePlan};
use crate::{
    metadata::{LedgerMetadata, LedgerState, Versioned},
    settle::{ledger_txn, merge_earlier},
};

/// Repeats the CAS until it is settled. The owner's core acknowledges nothing meanwhile (EC2), so it does not matter when
/// the CAS lands (T49).
///
/// EC4: on conflict, own nonce -> it landed; not Open -> lost; only earlier fragments differ (replicator) -> merge, retry;
/// last fragment differs -> lost.
pub(super) async fn publish(
    store: SharedStore,
    mut base: Versioned<LedgerMetadata>,
    plan: ChangePlan,
    cancel: CancellationToken,
) -> ChangeOutcome {
    loop {
        let next = with_fragment(&base.value, &plan);
        let txn = ledger_txn(&base, &next, plan.list.then_some("a fragment ended short"));
        match commit(&store, &txn, &cancel).await {
            Committed::Done(revision) => {
                return ChangeOutcome::Landed(base.changed(next, revision));
            }
            Committed::Unsettled => return ChangeOutcome::Unsettled,
            Committed::Refused(error) => {
                tracing::warn!(ledger = base.value.id.0, %error, "ensemble change refused by the store");
                return ChangeOutcome::Refused;
            }
            Committed::Conflict { found, .. } => {
                let found = found.first().and_then(Option::as_ref);
                let Some(found) = found.and_then(|kv| LedgerMetadata::from_key_value(kv).ok())
                else {
                    return ChangeOutcome::Lost;
                };
                if found.value.state != LedgerState::Open {
                    return ChangeOutcome::Lost;
                }
                if found.value.last_fragment().nonce == plan.fragment.nonce {
                    return ChangeOutcome::Landed(found);
                }
                if merge_earlier(&base.value, &found.value).is_none() {
                    return ChangeOutcome::Lost;
                }
                base = found;
            }
        }
    }
}

/// EC3: a fragment that starts where the last one does replaces it, else it is appended.
fn with_fragment(base: &LedgerMetadata, plan: &ChangePlan) -> LedgerMetadata {
    let mut next = base.clone();
    if next.last_fragment().first_entry == plan.fragment.first_entry {
        next.fragments.pop();
    }
    next.fragments.push(plan.fragment.clone());
    next
}
