//! Copies the entries of one slot: read from peers, verified, sent on with recovery adds, their bytes frozen (A2, T14).

use futures::future::join_all;
use geminga_bookie_client::{
    bookie_rpc::{AddAnswer, AddRequest, EntryAnswer, EntryRange, EntrySet, ReadRequest},
    entry::Entry,
    metadata::LedgerMetadata,
};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId, Slot};
use tokio::time::Instant;

use super::{
    AutoRecoveryParts,
    pace::Pace,
    plan::{Lists, Part, sources},
};

/// Entries of one READ.
const ENTRIES_PER_READ: u64 = 256;

/// What is to be copied where.
pub(crate) struct Copy<'a> {
    pub(crate) metadata: &'a LedgerMetadata,
    pub(crate) part: (usize, &'a Part),
    pub(crate) slot: Slot,
    pub(crate) lists: &'a Lists,
    /// What the target showed that it has.
    pub(crate) held: &'a EntrySet,
    pub(crate) to: Incarnation,
}

/// How a copy went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// Every entry of the slot is durable at the target.
    All,
    /// All but these, which no peer could give (A4).
    Without { entries: u64, first: EntryId },
    /// The target did not take one.
    Refused(AddAnswer),
}

/// Copies what the target lacks. Bounded in flight by the chunk size and one entry, over time by the budget. Not cancel-safe
/// in one way only: what was copied stays, and is copied again.
pub(crate) async fn copy(parts: &AutoRecoveryParts, pace: &mut Pace, copy: Copy<'_>) -> Copied {
    let quorum = copy.metadata.quorum;
    let (_, part) = copy.part;
    let wanted = |id: EntryId| quorum.position(id, copy.slot).is_some() && !copy.held.contains(id);
    let mut missing: Option<(u64, EntryId)> = None;
    let mut at = part.first;
    while at < part.end {
        if !wanted(at) {
            at = at.next();
            continue;
        }
        let most = part.end.0.min(at.0 + ENTRIES_PER_READ);
        let end = (at.0 + 1..most).find(|id| !wanted(EntryId(*id))).unwrap_or(most);
        let range = EntryRange { first: at, last: EntryId(end - 1) };
        let entries = fetch(parts, &copy, range).await;
        if entries.is_empty() {
            let (count, first) = missing.unwrap_or((0, at));
            missing = Some((count + 1, first));
            at = at.next();
            continue;
        }
        at = EntryId(at.0 + entries.len() as u64);
        let bytes: usize = entries.iter().map(Entry::encoded_len).sum();
        if let Err(refused) = send(parts, copy.to, entries).await {
            return Copied::Refused(refused);
        }
        parts.metrics.bytes.inc_by(bytes as u64);
        pace.spend(bytes as u64).await;
    }
    match missing {
        None => Copied::All,
        Some((entries, first)) => Copied::Without { entries, first },
    }
}

/// Entries from the start of the range on, from the first peer that gives a good one. None if no peer does.
async fn fetch(parts: &AutoRecoveryParts, copy: &Copy<'_>, range: EntryRange) -> Vec<Entry> {
    let metadata = copy.metadata;
    let mut peers = sources(metadata.quorum, copy.part, copy.lists, range.first);
    parts.random.shuffle(&mut peers);
    for peer in peers {
        let request = ReadRequest {
            to: peer,
            ledger: metadata.id,
            range,
            fence: false,
            bytes_max: parts.config.chunk_bytes,
            deadline: Instant::now() + parts.config.rpc_timeout,
        };
        let answer = parts.bookies.bookie(peer).read(request).await;
        let good = good_part(metadata.id, range, answer.entries);
        if !good.is_empty() {
            return good;
        }
    }
    Vec::new()
}

/// The verified entries in front of the first verdict that is not one: misplaced bytes are as bad as flipped ones.
fn good_part(ledger: LedgerId, range: EntryRange, verdicts: Vec<EntryAnswer>) -> Vec<Entry> {
    let expected = (range.first.0..=range.last.0).map(EntryId);
    expected
        .zip(verdicts)
        .map_while(|(id, verdict)| match verdict {
            EntryAnswer::Held(entry) => {
                (entry.ledger == ledger && entry.id == id && entry.verify().is_ok())
                    .then_some(entry)
            }
            EntryAnswer::Absent | EntryAnswer::Unknown(_) => None,
        })
        .collect()
}

async fn send(
    parts: &AutoRecoveryParts,
    to: Incarnation,
    entries: Vec<Entry>,
) -> Result<(), AddAnswer> {
    let bookie = parts.bookies.bookie(to);
    let deadline = Instant::now() + parts.config.rpc_timeout;
    let adds = entries
        .into_iter()
        .map(|entry| bookie.add(AddRequest { to, entry, recovery: true, deadline }));
    let answers = join_all(adds).await;
    answers.into_iter().find(|answer| *answer != AddAnswer::Ok).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use geminga_bookie_client::{bookie_rpc::Unknown, entry::Payload};

    use super::*;

    #[test]
    fn only_verified_entries_in_their_own_place_are_passed_on() {
        let entry = |ledger, id| {
            let payload = Payload::from(bytes::Bytes::from_static(b"x"));
            Entry::seal(LedgerId(ledger), EntryId(id), None, 1, payload)
        };
        let range = EntryRange { first: EntryId(3), last: EntryId(6) };
        let good = |verdicts| good_part(LedgerId(1), range, verdicts).len();
        let held = |ledger, id| EntryAnswer::Held(entry(ledger, id));
        assert_eq!(good(vec![held(1, 3), held(1, 4), EntryAnswer::Absent, held(1, 6)]), 2);
        assert_eq!(good(vec![held(1, 3), held(1, 5)]), 1, "another entry");
        assert_eq!(good(vec![held(2, 3)]), 0, "another ledger");
        assert_eq!(good(vec![EntryAnswer::Unknown(Unknown::Limbo)]), 0);
        let mut flipped = entry(1, 3);
        flipped.digest ^= 1;
        assert_eq!(good(vec![EntryAnswer::Held(flipped)]), 0);
    }
}
