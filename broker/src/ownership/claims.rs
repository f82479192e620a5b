//! Claims on bundles under this broker's lease (O1), and what is known of them: made on absence, confirmed, made again when
//! the lease ran out, given back.

use std::collections::BTreeMap;

use bytes::Bytes;
use geminga_managed_ledger::Claim as LedgerClaim;
use geminga_metadata::{
    Compare, KeyValue, LeaseId, Op, Revision, SharedStore, StoreError, TXN_OPS_MAX, Txn,
    TxnOutcome, keys,
};
use geminga_proto::{
    ids::Bundle,
    storage::v1::{Broker, Claim},
};
use parking_lot::Mutex;
use prost::Message;
use tokio::time::Instant;

use super::OwnershipParts;
use crate::{catalog::Record, errors::Refusal, mirror::read_all};

/// Who this broker is, in its registration and its claims.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) broker: String,
    pub(super) instance: Bytes,
    pub(super) address: String,
    pub(super) started_at_ms: u64,
}

/// This broker's claims.
#[derive(Debug)]
pub(super) struct Claims {
    store: SharedStore,
    me: Identity,
    held: Mutex<BTreeMap<Bundle, Hold>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    /// A transaction that makes it is under way.
    Making,
    Held(Held),
    /// A transaction that gives it back is under way.
    Leaving,
}

/// A claim of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) lease: LeaseId,
    pub(super) create_revision: Revision,
    /// When it was first made, for the balance.
    pub(super) since: Instant,
}

/// Somebody's claim on a bundle, as it stands.
#[derive(Clone, Debug)]
pub(super) struct Standing {
    pub(super) claim: Claim,
    pub(super) create_revision: Revision,
    pub(super) lease: Option<LeaseId>,
}

/// How the claims stand after a look at all of them.
#[derive(Debug, Default)]
pub(super) struct Review {
    /// Another instance has them.
    pub(super) foreign: Vec<Bundle>,
    /// They ran out, and nobody has them.
    pub(super) missing: Vec<Bundle>,
}

/// What a try to make a claim came to.
pub(super) enum Made {
    Ours(LedgerClaim),
    Theirs(Standing),
}

impl Claims {
    pub(super) fn new(parts: &OwnershipParts, me: Identity) -> Self {
        Self { store: parts.store.clone(), me, held: Mutex::default() }
    }

    /// The claim, if it was made under this lease.
    pub(super) fn held_under(&self, bundle: Bundle, lease: LeaseId) -> Option<LedgerClaim> {
        match self.held.lock().get(&bundle) {
            Some(Hold::Held(held)) if held.lease == lease => {
                Some(ledger_claim(bundle, held.create_revision))
            }
            _ => None,
        }
    }

    /// Whether a claim of ours counts as held, under whatever lease.
    pub(super) fn is_held(&self, bundle: Bundle) -> bool {
        matches!(self.held.lock().get(&bundle), Some(Hold::Held(_)))
    }

    /// Every claim held.
    pub(super) fn held(&self) -> BTreeMap<Bundle, Held> {
        let held = self.held.lock();
        let held = held.iter().filter_map(|(bundle, hold)| match hold {
            Hold::Held(held) => Some((*bundle, *held)),
            Hold::Making | Hold::Leaving => None,
        });
        held.collect()
    }

    fn hold(&self, bundle: Bundle, lease: LeaseId, create_revision: Revision) {
        let mut held = self.held.lock();
        let since = match held.get(&bundle) {
            Some(Hold::Held(held)) => held.since,
            _ => Instant::now(),
        };
        held.insert(bundle, Hold::Held(Held { lease, create_revision, since }));
    }

    /// The claim as it stands in the store.
    pub(super) async fn read(&self, bundle: Bundle) -> Result<Option<Standing>, Refusal> {
        let (_, found) = self.store.get(&keys::owner(bundle)).await?;
        found.map(|found| standing(&found)).transpose()
    }

    /// Whether a claim is this instance's.
    pub(super) fn is_mine(&self, standing: &Standing) -> bool {
        standing.claim.instance == self.me.instance
    }

    /// Remembers a claim of ours that was found.
    pub(super) fn adopt(&self, bundle: Bundle, lease: LeaseId, standing: &Standing) -> LedgerClaim {
        self.hold(bundle, lease, standing.create_revision);
        ledger_claim(bundle, standing.create_revision)
    }

    /// Makes the claim on its absence; without an answer it may land later, and is given back by [`Self::review`] (MD3).
    pub(super) async fn make(&self, bundle: Bundle, lease: LeaseId) -> Result<Made, Refusal> {
        self.held.lock().entry(bundle).or_insert(Hold::Making);
        let key = keys::owner(bundle);
        let txn = Txn::new().when(Compare::Absent(key.clone())).then(self.put(bundle, lease));
        let outcome = self.store.txn(txn).await;
        match outcome {
            Ok(TxnOutcome::Done(create_revision)) => {
                self.hold(bundle, lease, create_revision);
                Ok(Made::Ours(ledger_claim(bundle, create_revision)))
            }
            other => {
                {
                    let mut held = self.held.lock();
                    if held.get(&bundle) == Some(&Hold::Making) {
                        held.remove(&bundle);
                    }
                }
                match other? {
                    TxnOutcome::Conflict { found, .. } => {
                        match found.into_iter().next().flatten() {
                            Some(found) => Ok(Made::Theirs(standing(&found)?)),
                            None => Err(Refusal::internal("a claim is neither there nor absent")),
                        }
                    }
                    TxnOutcome::Done(_) => unreachable!("handled above"),
                }
            }
        }
    }

    /// Compares what is held with one linearizable reading of all claims (O3). A claim of ours that nobody expects is given
    /// back (MD3).
    pub(super) async fn review(&self, lease: LeaseId) -> Result<Review, Refusal> {
        let before = self.held.lock().clone();
        let (_, all) = read_all(&self.store, &keys::owners()).await?;
        let mut stand = BTreeMap::new();
        for found in &all {
            if let Some(keys::ParsedKey::Owner(bundle)) = keys::parse(&found.key) {
                stand.insert(bundle, standing(found)?);
            }
        }
        let mut review = Review::default();
        for bundle in before.iter().filter(|(_, hold)| matches!(hold, Hold::Held(..))).map(|b| b.0)
        {
            match stand.get(bundle) {
                Some(found) if !self.is_mine(found) => review.foreign.push(*bundle),
                Some(found) if found.lease == Some(lease) => {}
                // Under a lease that is gone: it falls with it, and is made again then.
                Some(_) => {}
                None => review.missing.push(*bundle),
            }
        }
        let unexpected = |(bundle, found): &(&Bundle, &Standing)| {
            self.is_mine(found)
                && !before.contains_key(bundle)
                && !self.held.lock().contains_key(bundle)
        };
        for (bundle, found) in stand.iter().filter(unexpected) {
            tracing::warn!(bundle = bundle.0, "a claim that was not expected is given back");
            self.delete(*bundle, found.create_revision).await?;
        }
        let held = self.held.lock();
        // Given back meanwhile: not missed.
        review.missing.retain(|bundle| held.get(bundle) == before.get(bundle));
        Ok(review)
    }

    /// O3: claims that ran out are made again on absence, as many as fit one transaction at a time. Those that came back;
    /// the others belong to somebody else now and are forgotten.
    pub(super) async fn make_again(
        &self,
        bundles: &[Bundle],
        lease: LeaseId,
    ) -> Result<(Vec<Bundle>, Vec<Bundle>), Refusal> {
        let (mut again, mut lost) = (Vec::new(), Vec::new());
        let mut left: Vec<Bundle> = bundles.to_vec();
        while !left.is_empty() {
            let batch: Vec<Bundle> = left.iter().copied().take(TXN_OPS_MAX).collect();
            let mut txn = Txn::new();
            for bundle in &batch {
                let absent = Compare::Absent(keys::owner(*bundle));
                txn = txn.when(absent).then(self.put(*bundle, lease));
            }
            match self.store.txn(txn).await? {
                TxnOutcome::Done(revision) => {
                    batch.iter().for_each(|bundle| self.hold(*bundle, lease, revision));
                    again.extend(&batch);
                    left.drain(..batch.len());
                }
                TxnOutcome::Conflict { found, .. } => {
                    let mut taken = Vec::new();
                    for (bundle, found) in batch.iter().zip(found) {
                        let Some(found) = found else { continue };
                        let found = standing(&found)?;
                        if self.is_mine(&found) && found.lease == Some(lease) {
                            self.adopt(*bundle, lease, &found); // an earlier try landed
                            again.push(*bundle);
                        } else {
                            self.forget(*bundle);
                            lost.push(*bundle);
                        }
                        taken.push(*bundle);
                    }
                    left.retain(|bundle| !taken.contains(bundle));
                }
            }
        }
        Ok((again, lost))
    }

    /// Gives a claim back: compared by its create revision, so that nobody else's falls. False: it was not held.
    ///
    /// # Errors
    /// What the store answers; the claim counts as held again, since it may stand.
    pub(super) async fn release(&self, bundle: Bundle) -> Result<bool, Refusal> {
        let hold = self.held.lock().get(&bundle).copied();
        let Some(hold @ Hold::Held(Held { create_revision, .. })) = hold else { return Ok(false) };
        self.held.lock().insert(bundle, Hold::Leaving);
        let deleted = self.delete(bundle, create_revision).await;
        let mut held = self.held.lock();
        match deleted {
            Ok(()) => {
                held.remove(&bundle);
                Ok(true)
            }
            Err(error) => {
                held.insert(bundle, hold);
                Err(error.into())
            }
        }
    }

    async fn delete(&self, bundle: Bundle, create_revision: Revision) -> Result<(), StoreError> {
        let key = keys::owner(bundle);
        let txn = Txn::new()
            .when(Compare::CreateRevision(key.clone(), create_revision))
            .then(Op::Delete(key));
        self.store.txn(txn).await.map(drop) // a conflict: it is gone
    }

    /// Forgets what is known about the claim on a bundle; it is read again.
    pub(super) fn forget(&self, bundle: Bundle) {
        self.held.lock().remove(&bundle);
    }

    /// Writes `brokers/<id>` under this lease. Another run's registration at our own address is proof that the run is over
    /// (O5: another instance at the address), so its lease is revoked and its claims fall at once.
    pub(super) async fn register(&self, lease: LeaseId, draining: bool) -> Result<(), Refusal> {
        let key = keys::broker(&self.me.broker);
        let (_, found) = self.store.get(&key).await?;
        if let Some(found) = &found {
            let other = Broker::decode_value(found)?;
            if other.instance != self.me.instance
                && other.address == self.me.address
                && let Some(dead) = found.lease
            {
                tracing::info!("an earlier run's lease is revoked");
                self.store.revoke_lease(dead).await.or_else(|error| match error {
                    StoreError::LeaseGone(_) => Ok(()),
                    error => Err(error),
                })?;
            }
        }
        let value = Broker {
            format: 1,
            instance: self.me.instance.clone(),
            address: self.me.address.clone(),
            draining,
            started_at_ms: self.me.started_at_ms,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let put = Op::Put { key, value: Bytes::from(value.encode_to_vec()), lease: Some(lease) };
        self.store.txn(Txn::new().then(put)).await?;
        Ok(())
    }

    fn put(&self, bundle: Bundle, lease: LeaseId) -> Op {
        let value = Claim {
            format: 1,
            broker: self.me.broker.clone(),
            instance: self.me.instance.clone(),
            address: self.me.address.clone(),
        };
        Op::Put {
            key: keys::owner(bundle),
            value: Bytes::from(value.encode_to_vec()),
            lease: Some(lease),
        }
    }
}

fn ledger_claim(bundle: Bundle, create_revision: Revision) -> LedgerClaim {
    LedgerClaim { key: keys::owner(bundle), create_revision }
}

fn standing(found: &KeyValue) -> Result<Standing, Refusal> {
    let claim = Claim::decode_value(found)?;
    Ok(Standing { claim, create_revision: found.create_revision, lease: found.lease })
}
