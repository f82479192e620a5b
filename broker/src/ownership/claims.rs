//! Claims on bundles, and the broker's registration, under its lease (O1).

use std::collections::BTreeMap;

use bytes::Bytes;
use geminga_managed_ledger::Claim as LedgerClaim;
use geminga_metadata::{
    Compare, KeyValue, LeaseId, LeaseKeeper, Op, Revision, SharedStore, Txn, TxnOutcome, keys,
};
use geminga_proto::{
    ids::{Bundle, SegmentId},
    reason::Reason,
    storage::v1::{Broker, Claim},
    v1::OwnerHint,
};
use parking_lot::Mutex;
use prost::Message;

use super::OwnershipParts;
use crate::{catalog::Record, errors::Refusal};

/// Tries of one claim; each lost one means that somebody else wrote the key.
const TRIES_MAX: u32 = 8;

/// This broker's claims.
#[derive(Debug)]
pub(super) struct Claims {
    store: SharedStore,
    lease: LeaseKeeper,
    bundles: u32,
    broker: String,
    instance: [u8; 16],
    address: String,
    held: Mutex<BTreeMap<Bundle, (LeaseId, Revision)>>,
}

impl Claims {
    pub(super) fn new(parts: &OwnershipParts) -> Self {
        Self {
            store: parts.store.clone(),
            lease: parts.lease.clone(),
            bundles: parts.catalog.bundles(),
            broker: parts.config.id.clone(),
            instance: parts.instance,
            address: parts.address.clone(),
            held: Mutex::new(BTreeMap::new()),
        }
    }

    /// Claims the segment's bundle, or finds it claimed by this instance.
    pub(super) async fn claim(&self, id: SegmentId) -> Result<LedgerClaim, Refusal> {
        let bundle = id.bundle(self.bundles);
        let key = keys::owner(bundle);
        let Some(lease) = self.lease.current() else {
            return Err(Refusal::new(
                Reason::MetadataUnavailable,
                "the broker holds no ownership lease",
            ));
        };
        let held = self.held.lock().get(&bundle).copied();
        if let Some((under, create_revision)) = held
            && under == lease
        {
            return Ok(LedgerClaim { key, create_revision });
        }
        for _ in 0..TRIES_MAX {
            let (_, found) = self.store.get(&key).await?;
            if let Some(found) = found {
                self.judge(id, lease, &found)?;
                self.held.lock().insert(bundle, (lease, found.create_revision));
                return Ok(LedgerClaim { key, create_revision: found.create_revision });
            }
            let txn = Txn::new().when(Compare::Absent(key.clone())).then(Op::Put {
                key: key.clone(),
                value: Bytes::from(self.value().encode_to_vec()),
                lease: Some(lease),
            });
            match self.store.txn(txn).await? {
                TxnOutcome::Done(create_revision) => {
                    self.held.lock().insert(bundle, (lease, create_revision));
                    return Ok(LedgerClaim { key, create_revision });
                }
                TxnOutcome::Conflict { .. } => {}
            }
        }
        Err(super::loading(id))
    }

    /// A claim stands: is it ours, under the lease we hold?
    fn judge(&self, id: SegmentId, lease: LeaseId, found: &KeyValue) -> Result<(), Refusal> {
        let claim = Claim::decode_value(found)?;
        if claim.instance[..] == self.instance && found.lease == Some(lease) {
            return Ok(());
        }
        if claim.instance[..] == self.instance || claim.broker == self.broker {
            return Err(super::loading(id)); // of an earlier lease or run of this broker; it goes with that lease
        }
        let owner =
            OwnerHint { segment: id.segment, address: claim.address.clone(), layout_epoch: 0 };
        let message =
            format!("segment {} is served by {} at {}", id.segment, claim.broker, claim.address);
        Err(Refusal::new(Reason::NotOwner, message).owned_by(owner))
    }

    /// Forgets what is known about the claim of a segment's bundle; it is read again.
    pub(super) fn forget(&self, id: SegmentId) {
        self.held.lock().remove(&id.bundle(self.bundles));
    }

    /// Forgets all claims: the lease is lost.
    pub(super) fn clear(&self) {
        self.held.lock().clear();
    }

    /// Writes `brokers/<id>` under the lease held now. Another run's registration at our own address is proof that the
    /// run is over (O5: another instance at the address), so its lease is revoked and its claims fall at once.
    pub(super) async fn register(&self) -> Result<(), Refusal> {
        let Some(lease) = self.lease.current() else { return Ok(()) };
        let key = keys::broker(&self.broker);
        let (_, found) = self.store.get(&key).await?;
        if let Some(found) = &found {
            let other = Broker::decode_value(found)?;
            if other.instance[..] != self.instance
                && other.address == self.address
                && let Some(dead) = found.lease
            {
                tracing::info!("an earlier run's lease is revoked");
                self.store.revoke_lease(dead).await.or_else(|error| match error {
                    geminga_metadata::StoreError::LeaseGone(_) => Ok(()),
                    error => Err(error),
                })?;
            }
        }
        let value =
            Broker { format: 1, instance: self.instance_bytes(), address: self.address.clone() };
        let put = Op::Put { key, value: Bytes::from(value.encode_to_vec()), lease: Some(lease) };
        self.store.txn(Txn::new().then(put)).await?;
        Ok(())
    }

    fn value(&self) -> Claim {
        Claim {
            format: 1,
            broker: self.broker.clone(),
            instance: self.instance_bytes(),
            address: self.address.clone(),
        }
    }

    fn instance_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.instance)
    }
}
