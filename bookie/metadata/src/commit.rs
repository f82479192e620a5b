//! Rule MD3: a transaction whose outcome is unknown is repeated, unchanged, until it is done or conflicts.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::{KeyValue, Revision, SharedStore, StoreError, Txn, TxnOutcome};

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// What [`commit`] came to.
#[derive(Clone, Debug)]
pub enum Committed {
    /// The changes stand, at this revision.
    Done(Revision),
    /// A condition does not hold. An *earlier try of this same call may be the reason*: look for your nonce in what was
    /// found (MD3) before you take it for somebody else's.
    Conflict {
        /// The revision of the comparison.
        revision: Revision,
        /// Every compared key as it stood, in the order of the conditions.
        found: Vec<Option<KeyValue>>,
    },
    /// Cancelled while a try was under way or after one without an answer: it may have happened, or may still. This
    /// caller will never know; it must not clean up, acknowledge, or reuse what the transaction was about.
    Unsettled,
    /// The transaction did not happen and will not: the store refuses it for good (limits, a lease that is gone), or the
    /// caller cancelled before any try could have reached it (`Unavailable`). With `LeaseGone`, an earlier try may have
    /// stood while the lease lived.
    Refused(StoreError),
}

/// Carries out a transaction to an end (MD3: "a CAS whose outcome is unknown is never assumed failed, and no clean-up
/// follows it ... Repeat the *same* CAS until it succeeds or conflicts; on a conflict read for the caller's nonce").
///
/// Repeats after `Unavailable` and `Unknown`, with pauses of 10 ms, doubling up to 1 s, for as long as `cancel` lets it.
/// A transaction must therefore carry conditions that its own success breaks (a modify revision, an absence).
///
/// Cancel-safe in this sense: cancelling the token, or dropping the future, is the same as [`Committed::Unsettled`].
pub async fn commit(store: &SharedStore, txn: &Txn, cancel: &CancellationToken) -> Committed {
    let mut pause = BACKOFF_MIN;
    let mut unsettled = false;
    loop {
        if cancel.is_cancelled() {
            return stopped(unsettled);
        }
        let answer = tokio::select! {
            biased; // an answer that is there settles more than a cancellation
            answer = attempt(store, txn, &mut unsettled) => Some(answer),
            () = cancel.cancelled() => None,
        };
        let Some(answer) = answer else { return stopped(unsettled) };
        match answer {
            Ok(TxnOutcome::Done(revision)) => return Committed::Done(revision),
            Ok(TxnOutcome::Conflict { revision, found }) => {
                return Committed::Conflict { revision, found };
            }
            Err(StoreError::Unavailable(reason)) => {
                tracing::debug!(reason, "metadata transaction waits for the store");
            }
            Err(StoreError::Unknown(reason)) => {
                tracing::debug!(reason, "metadata transaction without an answer is repeated");
            }
            Err(error) => return Committed::Refused(error),
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return stopped(unsettled),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(BACKOFF_MAX);
    }
}

/// One try. `unsettled` is true from the moment it may have left until an answer says that nothing happened.
async fn attempt(
    store: &SharedStore,
    txn: &Txn,
    unsettled: &mut bool,
) -> Result<TxnOutcome, StoreError> {
    let earlier = std::mem::replace(unsettled, true);
    let answer = store.txn(txn.clone()).await;
    if matches!(answer, Err(StoreError::Unavailable(_))) {
        *unsettled = earlier;
    }
    answer
}

fn stopped(unsettled: bool) -> Committed {
    if unsettled {
        Committed::Unsettled
    } else {
        Committed::Refused(StoreError::Unavailable(
            "cancelled before the store was reached".to_owned(),
        ))
    }
}
