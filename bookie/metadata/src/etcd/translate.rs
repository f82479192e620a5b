//! Between our words and etcd's. Pure.
//!
//! Every key gets the cluster's prefix on the way in and loses it on the way out. What etcd answers is looked at, never
//! trusted: a wrong shape is an error, not a panic.

use bytes::Bytes;
use etcd_client::{
    Compare as EtcdCompare, CompareOp, GetOptions, PutOptions, Txn as EtcdTxn, TxnOp,
    proto::{
        PbKeyValue, PbRangeResponse, PbResponseHeader, PbResponseOp, PbTxnOpResponse, PbTxnResponse,
    },
};

use crate::{Compare, Key, KeyValue, LeaseId, Op, RangeRequest, Revision, Txn, TxnOutcome};

/// etcd's answer does not fit the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("etcd's answer does not fit the question")]
pub(super) struct Odd;

pub(super) fn full(prefix: &str, key: &Key) -> Vec<u8> {
    [prefix.as_bytes(), &key.0].concat()
}

/// Takes the prefix off.
pub(super) fn stripped(prefix: &str, key: Vec<u8>) -> Result<Key, Odd> {
    if !key.starts_with(prefix.as_bytes()) {
        return Err(Odd);
    }
    Ok(Key(Bytes::from(key).slice(prefix.len()..)))
}

/// The first key after all that start with `prefix`; an empty one means no end.
fn end_of(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0] // etcd's word for "to the very end"
}

pub(super) fn key_value(prefix: &str, found: PbKeyValue) -> Result<KeyValue, Odd> {
    Ok(KeyValue {
        key: stripped(prefix, found.key)?,
        value: Bytes::from(found.value),
        create_revision: Revision(found.create_revision),
        mod_revision: Revision(found.mod_revision),
        lease: (found.lease != 0).then_some(LeaseId(found.lease)),
    })
}

/// MD1: a condition, in etcd's words. A key that does not exist has revision 0 there; no condition on a revision may
/// ever hold for it.
fn compare(prefix: &str, compare: &Compare) -> EtcdCompare {
    let key = full(prefix, compare.key());
    match compare {
        Compare::Absent(_) => EtcdCompare::create_revision(key, CompareOp::Equal, 0),
        Compare::Present(_) => EtcdCompare::create_revision(key, CompareOp::Greater, 0),
        Compare::ModRevision(_, at) | Compare::CreateRevision(_, at) if at.0 <= 0 => {
            EtcdCompare::create_revision(key, CompareOp::Less, 0) // never
        }
        Compare::ModRevision(_, at) => EtcdCompare::mod_revision(key, CompareOp::Equal, at.0),
        Compare::CreateRevision(_, at) => EtcdCompare::create_revision(key, CompareOp::Equal, at.0),
    }
}

fn op(prefix: &str, op: &Op) -> TxnOp {
    let key = full(prefix, op.key());
    match op {
        Op::Put { value, lease, .. } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key, value.to_vec(), options)
        }
        Op::Delete(_) => TxnOp::delete(key, None),
    }
}

/// A transaction that, when a condition fails, reads every compared key at the revision of the comparison.
pub(super) fn txn(prefix: &str, txn: &Txn) -> EtcdTxn {
    let compares: Vec<EtcdCompare> = txn.compares.iter().map(|c| compare(prefix, c)).collect();
    let changes: Vec<TxnOp> = txn.changes.iter().map(|change| op(prefix, change)).collect();
    let read = |compare: &Compare| TxnOp::get(full(prefix, compare.key()), None);
    let reads: Vec<TxnOp> = txn.compares.iter().map(read).collect();
    // the client panics if these come in another order
    EtcdTxn::new().when(compares).and_then(changes).or_else(reads)
}

/// The same conditions, without the changes and the reads.
pub(super) fn conditions(prefix: &str, txn: &Txn) -> EtcdTxn {
    let compares: Vec<EtcdCompare> = txn.compares.iter().map(|c| compare(prefix, c)).collect();
    EtcdTxn::new().when(compares)
}

/// Reads of several keys at one revision.
pub(super) fn gets(prefix: &str, keys: &[Key]) -> EtcdTxn {
    let reads: Vec<TxnOp> = keys.iter().map(|key| TxnOp::get(full(prefix, key), None)).collect();
    EtcdTxn::new().and_then(reads)
}

pub(super) fn outcome(
    prefix: &str,
    txn: &Txn,
    header: &PbResponseHeader,
    answer: PbTxnResponse,
) -> Result<TxnOutcome, Odd> {
    let revision = Revision(header.revision);
    if answer.succeeded {
        return Ok(TxnOutcome::Done(revision));
    }
    let found = found(prefix, answer.responses, txn.compares.len())?;
    Ok(TxnOutcome::Conflict { revision, found })
}

/// What the reads of a transaction found, in their order.
pub(super) fn found(
    prefix: &str,
    answers: Vec<PbResponseOp>,
    count: usize,
) -> Result<Vec<Option<KeyValue>>, Odd> {
    if answers.len() != count {
        return Err(Odd);
    }
    let one = |answer: PbResponseOp| match answer.response {
        Some(PbTxnOpResponse::ResponseRange(range)) => first(prefix, range),
        _ => Err(Odd),
    };
    answers.into_iter().map(one).collect()
}

pub(super) fn first(prefix: &str, answer: PbRangeResponse) -> Result<Option<KeyValue>, Odd> {
    answer.kvs.into_iter().next().map(|found| key_value(prefix, found)).transpose()
}

/// Where a page starts, and the rest of its request.
pub(super) fn range(prefix: &str, request: &RangeRequest, limit: usize) -> (Vec<u8>, GetOptions) {
    let start = full(prefix, &request.prefix);
    let end = end_of(&start);
    let after = request.after.as_ref().map(|after| {
        let mut next = full(prefix, after);
        next.push(0);
        next
    });
    let mut options =
        GetOptions::new().with_range(end).with_limit(i64::try_from(limit).unwrap_or(i64::MAX));
    if let Some(at) = request.at {
        options = options.with_revision(at.0);
    }
    (after.map_or(start.clone(), |after| after.max(start)), options)
}

/// Whether the transaction, once carried out, does not hold any more: then looking at its conditions tells whether it
/// was. [`crate::commit`] asks this of every transaction.
pub(super) fn breaks_itself(txn: &Txn) -> bool {
    txn.compares.iter().any(|compare| {
        txn.changes.iter().filter(|change| change.key() == compare.key()).any(|change| {
            match (compare, change) {
                (Compare::Absent(_), Op::Put { .. }) | (Compare::ModRevision(..), _) => true,
                (Compare::Present(_) | Compare::CreateRevision(..), Op::Delete(_)) => true,
                (Compare::Absent(_), Op::Delete(_)) => false,
                (Compare::Present(_) | Compare::CreateRevision(..), Op::Put { .. }) => false,
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key(Bytes::copy_from_slice(name.as_bytes()))
    }

    #[test]
    fn the_end_of_a_prefix_is_the_first_key_beyond_it() {
        assert_eq!(end_of(b"/a/"), b"/a0");
        assert_eq!(end_of(b"a\xff\xff"), b"b");
        assert_eq!(end_of(b"\xff"), [0]);
    }

    #[test]
    fn a_key_of_another_prefix_is_never_taken_for_ours() {
        let ours = full("/geminga/a/", &key("cluster"));
        assert_eq!(stripped("/geminga/a/", ours.clone()), Ok(key("cluster")));
        assert_eq!(stripped("/geminga/b/", ours), Err(Odd));
    }

    #[test]
    fn a_page_starts_after_the_last_key_but_never_before_its_prefix() {
        let mut request = RangeRequest { prefix: key("p/"), after: None, limit: 0, at: None };
        assert_eq!(range("/g/", &request, 1).0, b"/g/p/");
        request.after = Some(key("p/a"));
        assert_eq!(range("/g/", &request, 1).0, b"/g/p/a\0");
        request.after = Some(key("a"));
        assert_eq!(range("/g/", &request, 1).0, b"/g/p/");
    }

    #[test]
    fn answers_of_a_wrong_shape_are_errors() {
        let header = PbResponseHeader { revision: 5, ..Default::default() };
        let txn = Txn::new().when(Compare::Absent(key("a")));
        let none = PbTxnResponse::default();
        assert_eq!(outcome("/g/", &txn, &header, none), Err(Odd));
        let empty = PbTxnResponse {
            responses: vec![PbResponseOp { response: None }],
            ..Default::default()
        };
        assert_eq!(outcome("/g/", &txn, &header, empty), Err(Odd));
        let done = PbTxnResponse { succeeded: true, ..Default::default() };
        assert_eq!(outcome("/g/", &txn, &header, done), Ok(TxnOutcome::Done(Revision(5))));
    }

    #[test]
    fn a_transaction_breaks_itself_when_its_effect_undoes_one_of_its_conditions() {
        let a = || key("a");
        let put = || Op::put(a(), "x");
        let cases = [
            (Compare::Absent(a()), put(), true),
            (Compare::Absent(a()), Op::Delete(a()), false),
            (Compare::Present(a()), put(), false),
            (Compare::Present(a()), Op::Delete(a()), true),
            (Compare::ModRevision(a(), Revision(3)), put(), true),
            (Compare::CreateRevision(a(), Revision(3)), put(), false),
            (Compare::ModRevision(key("b"), Revision(3)), put(), false),
        ];
        for (compare, change, breaks) in cases {
            let txn = Txn::new().when(compare).then(change);
            assert_eq!(breaks_itself(&txn), breaks, "{txn:?}");
        }
        assert!(!breaks_itself(&Txn::new().then(put())));
    }
}
