//! Point reads of ledger keys while something is in limbo (D8): created above the bound, or not.

use std::sync::Arc;

use geminga_bookie_client::metadata::{LedgerMetadata, LedgerState};
use geminga_metadata::keys;
use geminga_proto::ids::LedgerId;
use tokio::time::Instant;

use crate::state::Shared;

/// What a point read said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    /// The core knows now.
    Known,
    /// There is no such key: in limbo as long as that is so.
    Absent,
    /// It could not be read.
    Unreadable,
}

/// Reads the ledger's key linearizably and tells the core when it was created.
pub(crate) async fn judge(shared: &Arc<Shared>, ledger: LedgerId, deadline: Instant) -> Judged {
    let key = keys::ledger(ledger);
    match tokio::time::timeout_at(deadline, shared.store.get(&key)).await {
        Ok(Ok((_, Some(found)))) => {
            let created = found.create_revision.0;
            let deleted = LedgerMetadata::from_key_value(&found)
                .is_ok_and(|ledger| matches!(ledger.value.state, LedgerState::Deleted { .. }));
            if deleted && crate::gc::drop_deleted(shared, ledger, deadline).await {
                return Judged::Known;
            }
            shared.core().ledgers.judge(ledger, created);
            Judged::Known
        }
        Ok(Ok((_, None))) => Judged::Absent,
        Ok(Err(_)) | Err(_) => Judged::Unreadable,
    }
}
