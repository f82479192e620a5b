//! What a segment's holder may say and ask about tiers: policy, status, offload now, verify.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Command, ManagedLedger};
use crate::{
    error::TierError,
    list::ListedState,
    offload::{Stage, TierPolicy, verify::verify},
    types::{TierProgress, TierStatus},
};

/// Steps of progress that may wait for who listens.
const PROGRESS_MAX: usize = 1_024;

impl ManagedLedger {
    /// Sets how long messages are kept and where. Until this was called once nothing is trimmed, offloaded or deleted:
    /// call it after all subscriptions have their cursors (C6). Takes effect at once.
    pub fn set_policy(&self, policy: TierPolicy) {
        self.shared.policy.send_if_modified(|set| {
            let changed = set.as_ref() != Some(&policy);
            *set = Some(policy);
            changed
        });
    }

    /// Takes the policy back: nothing is trimmed, offloaded or deleted from now on, as before one was set. An upload that is
    /// under way comes to its end, which adds a copy.
    pub fn clear_policy(&self) {
        self.shared.policy.send_if_modified(|set| set.take().is_some());
    }

    /// The policy in force; none was set yet.
    #[must_use]
    pub fn policy(&self) -> Option<TierPolicy> {
        self.shared.policy.borrow().clone()
    }

    /// Where the segment's closed ledgers are.
    #[must_use]
    pub fn tier_status(&self) -> TierStatus {
        let list = self.shared.view.list();
        let mut status = TierStatus {
            first_offset: self.first_offset(),
            next_offset: *self.shared.end.borrow(),
            last_error: {
                let errors = self.shared.tier_errors.lock();
                if errors.upload.is_empty() { errors.change.clone() } else { errors.upload.clone() }
            },
            ledgers: 0,
            ledgers_uploading: 0,
            ledgers_uploaded: 0,
            ledgers_object_only: 0,
            bytes_bookies: 0,
            bytes_objects: 0,
        };
        for listed in &list.data {
            status.ledgers += 1;
            let on_bookies = match listed.stage() {
                None => true,
                Some(Stage::Uploading) => {
                    status.ledgers_uploading += 1;
                    true
                }
                Some(Stage::Uploaded) => {
                    status.ledgers_uploaded += 1;
                    true
                }
                Some(Stage::LedgerDeleted) => {
                    status.ledgers_object_only += 1;
                    false
                }
            };
            if on_bookies && listed.state == ListedState::Closed {
                status.bytes_bookies += listed.counts.bytes;
            }
            status.bytes_objects += listed.offload.as_ref().map_or(0, |o| o.object_bytes());
        }
        status
    }

    /// Offloads every closed ledger now, whatever the policy says; with `roll` the open one is closed first, if it holds
    /// anything. The channel ends when all is done; a step with a `problem` is a ledger that was not offloaded. Dropping the
    /// receiver stops nothing. Steps are lost to who does not listen.
    ///
    /// # Errors
    /// [`TierError`].
    pub fn offload_now(&self, roll: bool) -> Result<mpsc::Receiver<TierProgress>, TierError> {
        self.shared.ledgers.cold_reader().ok_or(TierError::NoColdStorage)?;
        let (sender, receiver) = mpsc::channel(PROGRESS_MAX);
        self.commands.try_send(Command::Offload(roll, sender)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => TierError::Busy,
            mpsc::error::TrySendError::Closed(_) => TierError::Fenced,
        })?;
        Ok(receiver)
    }

    /// Reads every object of the segment and checks every byte of it; a step with a `problem` is a damaged one. Changes
    /// nothing. The channel ends when all is done; dropping the receiver stops the walk.
    ///
    /// # Errors
    /// [`TierError`].
    pub fn verify_tier(&self) -> Result<mpsc::Receiver<TierProgress>, TierError> {
        let ledgers = &self.shared.ledgers;
        let reader = Arc::clone(ledgers.cold_reader().ok_or(TierError::NoColdStorage)?);
        let (sender, receiver) = mpsc::channel(16);
        let walk = verify(reader, self.shared.segment, self.shared.view.list(), sender);
        ledgers.parts().tasks.spawn("verify-tier", walk);
        Ok(receiver)
    }
}
