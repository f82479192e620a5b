//! After a conflict of a close: whose close stands (MD3, section 6, R7)?

use geminga_metadata::{Compare, KeyValue, Op, Txn, keys};
use geminga_proto::{ids::LedgerId, storage::v1 as wire};
use prost::Message;

use crate::{
    metadata::{Fragment, LedgerMetadata, LedgerState, Versioned, cut},
    recovery::Recovered,
    writer::Sealed,
};

/// What a conflict of a close means.
#[derive(Clone, Debug)]
pub enum CloseVerdict<T> {
    /// The very value that was to be written stands: an earlier try landed.
    Ours,
    /// Somebody closed it with the same end: as good as ours.
    SameEnd,
    /// Another end, a recovery, or a deletion: what was not acknowledged is indeterminate, reload (section 6).
    Lost,
    /// Nothing but earlier fragments moved (the replicator), or this key did not conflict at all: send this one instead.
    Rebuild(Box<T>),
}

/// Judges the conflict of a writer's close. `found` is the ledger's key as the conflict showed it.
#[must_use]
pub fn settled_close(found: Option<&KeyValue>, sealed: &Sealed) -> CloseVerdict<Sealed> {
    let Some(found) = found.and_then(|found| LedgerMetadata::from_key_value(found).ok()) else {
        return CloseVerdict::Lost;
    };
    match &found.value.state {
        LedgerState::Closed { .. } => same_end(&found.value, &sealed.closed),
        LedgerState::Open => match merge_earlier(&sealed.base.value, &found.value) {
            Some(_) => CloseVerdict::Rebuild(Box::new(Sealed::build(
                found,
                sealed.last,
                sealed.length,
                sealed.short,
            ))),
            None => CloseVerdict::Lost,
        },
        LedgerState::InRecovery(_) | LedgerState::Deleted { .. } => CloseVerdict::Lost,
    }
}

/// Judges the conflict of a recoverer's close (R7). `Lost`: accept a Closed ledger's own end, else restart at R1.
#[must_use]
pub fn settled_recovery(
    found: Option<&KeyValue>,
    recovered: &Recovered,
) -> CloseVerdict<Recovered> {
    let Some(found) = found.and_then(|found| LedgerMetadata::from_key_value(found).ok()) else {
        return CloseVerdict::Lost;
    };
    match &found.value.state {
        LedgerState::Closed { .. } => same_end(&found.value, &recovered.closed),
        LedgerState::InRecovery(nonce) if *nonce == recovered.nonce => {
            match merge_earlier(&recovered.base.value, &found.value) {
                Some(_) => CloseVerdict::Rebuild(Box::new(Recovered::build(
                    found,
                    recovered.nonce,
                    recovered.last,
                    recovered.length,
                    recovered.private.clone(),
                    recovered.short,
                ))),
                None => CloseVerdict::Lost,
            }
        }
        _ => CloseVerdict::Lost,
    }
}

fn same_end<T>(found: &LedgerMetadata, ours: &LedgerMetadata) -> CloseVerdict<T> {
    if found == ours {
        CloseVerdict::Ours
    } else if found.last() == ours.last() {
        CloseVerdict::SameEnd
    } else {
        CloseVerdict::Lost
    }
}

/// The fragments as they now stand, if only earlier ones differ from what was known; none if the last one moved (EC4).
pub(crate) fn merge_earlier<'a>(
    known: &LedgerMetadata,
    now: &'a LedgerMetadata,
) -> Option<&'a [Fragment]> {
    let same_last = known.last_fragment() == now.last_fragment();
    let same_starts = known.fragments.len() == now.fragments.len()
        && known.fragments.iter().zip(&now.fragments).all(|(a, b)| a.first_entry == b.first_entry);
    (same_last && same_starts).then_some(&now.fragments[..])
}

/// The CAS that moves a ledger on, with its listing if it is short (EC3, section 6, R8).
pub(crate) fn ledger_txn(
    base: &Versioned<LedgerMetadata>,
    next: &LedgerMetadata,
    listing: Option<&str>,
) -> Txn {
    debug_assert!(base.value.may_become(next), "MD4");
    let key = keys::ledger(next.id);
    let txn = Txn::new()
        .when(Compare::ModRevision(key.clone(), base.mod_revision))
        .then(Op::put(key, next.encode()));
    match listing {
        Some(reason) => txn.then(listing_op(next.id, reason)),
        None => txn,
    }
}

/// Writes `underreplicated/<ledger>`. Its time is left to the auditor: no clock decides anything here.
pub(crate) fn listing_op(ledger: LedgerId, reason: &str) -> Op {
    let value = wire::UnderReplicated { format: 1, reason: reason.to_owned(), at_ms: 0 };
    Op::put(keys::under_replicated(ledger), value.encode_to_vec())
}

impl Sealed {
    /// Section 6: Open -> Closed{last}, fragments beyond it dropped, listed if short.
    pub(crate) fn build(
        base: Versioned<LedgerMetadata>,
        last: Option<geminga_proto::ids::EntryId>,
        length: u64,
        short: bool,
    ) -> Self {
        let closed = base.value.closed(last, length);
        let listed = short || closed.has_vacancy();
        let txn = ledger_txn(&base, &closed, listed.then_some("closed short"));
        Self { id: base.value.id, last, length, txn, closed, base, short }
    }
}

impl Recovered {
    /// R7 and R8: earlier fragments as in `base`, then the private ones, cut at `last`.
    pub(crate) fn build(
        base: Versioned<LedgerMetadata>,
        nonce: crate::metadata::RecoveryNonce,
        last: Option<geminga_proto::ids::EntryId>,
        length: u64,
        private: Vec<Fragment>,
        short: bool,
    ) -> Self {
        let mut fragments = base.value.fragments.clone();
        if let Some(first) = private.first() {
            fragments.retain(|fragment| fragment.first_entry < first.first_entry);
        }
        fragments.extend(private.iter().cloned());
        cut(&mut fragments, last);
        let closed = LedgerMetadata {
            state: LedgerState::Closed { last, length },
            fragments,
            ..base.value.clone()
        };
        let listed = short || closed.has_vacancy();
        let txn = ledger_txn(&base, &closed, listed.then_some("recovered short"));
        Self { id: base.value.id, last, length, txn, closed, nonce, base, private, short }
    }
}
