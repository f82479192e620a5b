//! R1 and R7 as one call: the step into recovery with patience towards rivals, and the close.

use std::time::Duration;

use geminga_metadata::{Committed, KeyValue, StoreError, commit, keys};
use geminga_proto::ids::{Epoch, LedgerId};
use tokio::time::{Instant, sleep, timeout};

use super::types::{ClosedLedger, Recovered, RecoveryError};
use crate::{
    client::LedgerClient,
    metadata::{LedgerMetadata, LedgerState, RecoveryNonce, Versioned},
    settle::{CloseVerdict, settled_recovery},
};

/// How often a standing nonce is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Somebody else's recovery, and since when it stood unchanged, by this node's monotonic clock.
struct Standing {
    nonce: RecoveryNonce,
    since: Instant,
}

/// See [`LedgerClient::recover_and_close`].
pub(crate) async fn recover_and_close(
    client: &LedgerClient,
    ledger: LedgerId,
    epoch: Epoch,
) -> Result<ClosedLedger, RecoveryError> {
    let give_up =
        Instant::now() + client.parts.config.recovery_patience + rival_patience(client) * 2;
    let mut standing: Option<Standing> = None;
    loop {
        let current = read(client, ledger).await?;
        match &current.value.state {
            LedgerState::Closed { .. } => return Ok(closed(&current.value)),
            LedgerState::Deleted { .. } => return Err(RecoveryError::Gone { ledger }),
            LedgerState::Open => {}
            LedgerState::InRecovery(by) => {
                // A standing nonce is replaced only by a higher epoch, or if it stood unchanged for long enough; an owner
                // of a lower epoch gives up (R1). Helpers (epoch 0) only ever wait.
                if epoch != Epoch(0) && epoch < by.epoch {
                    return Err(RecoveryError::Superseded { ledger, by: by.epoch });
                }
                let since = match &standing {
                    Some(standing) if standing.nonce == *by => standing.since,
                    _ => Instant::now(),
                };
                standing = Some(Standing { nonce: *by, since });
                if epoch <= by.epoch && Instant::now() < since + rival_patience(client) {
                    if Instant::now() >= give_up {
                        return Err(RecoveryError::Superseded { ledger, by: by.epoch });
                    }
                    pause(client, LOOK).await;
                    continue;
                }
            }
        }
        if let Some(closed) = take_over(client, &current, epoch).await? {
            return Ok(closed);
        }
        // Another nonce stands: back off with jitter, start again (R7).
        if Instant::now() >= give_up {
            let why = "rivals take turns".to_owned();
            return Err(RecoveryError::Incomplete { ledger, why });
        }
        pause(client, LOOK).await;
    }
}

/// R1's CAS, R2..R6, R7. None: somebody else was faster.
async fn take_over(
    client: &LedgerClient,
    current: &Versioned<LedgerMetadata>,
    epoch: Epoch,
) -> Result<Option<ClosedLedger>, RecoveryError> {
    let ledger = current.value.id;
    let Some(start) = client.begin_recovery(current, epoch) else { return Ok(None) };
    let token = client.parts.tasks.token();
    let started = match commit(&client.parts.store, &start.txn, &token).await {
        Committed::Done(revision) => current.changed(start.metadata.clone(), revision),
        Committed::Conflict { found, .. } => match ours(&found, start.nonce) {
            Some(started) => started,
            None => return Ok(None),
        },
        Committed::Unsettled => return Err(RecoveryError::Stopped { ledger }),
        Committed::Refused(error) => return Err(error.into()),
    };
    let mut recovered: Recovered = super::recover(client, started, start.nonce).await?;
    loop {
        match commit(&client.parts.store, &recovered.txn, &token).await {
            Committed::Done(_) => return Ok(Some(closed(&recovered.closed))),
            Committed::Conflict { found, .. } => {
                let found = found.first().and_then(Option::as_ref);
                match settled_recovery(found, &recovered) {
                    CloseVerdict::Ours => return Ok(Some(closed(&recovered.closed))),
                    // The same end may lie on other bookies: what stands is accepted, not what would have been written.
                    CloseVerdict::SameEnd | CloseVerdict::Lost => {
                        return Ok(found.and_then(accepted));
                    }
                    CloseVerdict::Rebuild(rebuilt) => recovered = *rebuilt,
                }
            }
            Committed::Unsettled => return Err(RecoveryError::Stopped { ledger }),
            Committed::Refused(error) => return Err(error.into()),
        }
    }
}

/// R7: a ledger that a rival closed is accepted as it stands.
fn accepted(found: &KeyValue) -> Option<ClosedLedger> {
    let found = LedgerMetadata::from_key_value(found).ok()?;
    found.value.is_closed().then(|| closed(&found.value))
}

/// After R1's CAS conflicted: an earlier try of it may be the reason (MD3).
fn ours(found: &[Option<KeyValue>], nonce: RecoveryNonce) -> Option<Versioned<LedgerMetadata>> {
    let found = LedgerMetadata::from_key_value(found.first()?.as_ref()?).ok()?;
    (found.value.state == LedgerState::InRecovery(nonce)).then_some(found)
}

fn closed(metadata: &LedgerMetadata) -> ClosedLedger {
    let length = match metadata.state {
        LedgerState::Closed { length, .. } => length,
        _ => 0,
    };
    let (id, last) = (metadata.id, metadata.last());
    ClosedLedger { id, last, length, metadata: metadata.clone() }
}

async fn read(
    client: &LedgerClient,
    ledger: LedgerId,
) -> Result<Versioned<LedgerMetadata>, RecoveryError> {
    let key = keys::ledger(ledger);
    let late = |_| StoreError::Unavailable("no answer in time".to_owned());
    let get = timeout(client.parts.config.read_timeout, client.parts.store.get(&key));
    let (_, found) = get.await.map_err(late)??;
    let found = found.ok_or(RecoveryError::Gone { ledger })?;
    Ok(LedgerMetadata::from_key_value(&found)?)
}

/// R1: max(2 s, twice one's own last recovery).
fn rival_patience(client: &LedgerClient) -> Duration {
    client.parts.config.rival_patience.max(client.last_recovery() * 2)
}

async fn pause(client: &LedgerClient, base: Duration) {
    let jitter = client.parts.random.below(base.as_millis() as u64 + 1);
    sleep(base / 2 + Duration::from_millis(jitter)).await;
}
