//! Makes one listed ledger whole (A2-A4).
//!
//! ```text
//! read ledger + listing -> LIST every holder -> plan -> per slot: copy, all durable -> CAS of the one slot
//!      ^                                                                                    |
//!      +------------------------------------------------------------------------------------+
//! complete -> unlist, if neither ledger nor listing changed since they were read
//! ```

use std::collections::BTreeSet;

use futures::future::join_all;
use geminga_bookie_client::{
    bookie_rpc::{EntryRange, EntrySet, ListAnswer},
    ensemble::{Available, LedgerAge, replacements},
    metadata::{LedgerMetadata, LedgerState, Versioned},
};
use geminga_metadata::{
    Committed, Compare, KeyValue, Op, Revision, StoreError, Txn, TxnOutcome, commit, keys,
};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use tokio::time::Instant;

use super::{
    AutoRecoveryParts,
    copy::{Copied, Copy, copy},
    pace::Pace,
    plan::{self, Lists, Part, Task},
};

/// Surveys of one call: one to find, one to prove, one more when something moved in between.
const ROUNDS: usize = 3;
/// Tries of one slot's CAS while other parts of the ledger move.
const SWAPS_MAX: usize = 10;

/// What a call came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Repaired {
    /// Whole, and unlisted.
    Whole,
    /// Not listed any more, or deleted.
    Gone,
    /// All that is final is whole; the rest waits for the ledger to be closed (A3).
    Open(LedgerMetadata),
    /// Something is missing still; it stays listed. `lost` entries no peer could give (A4).
    Short { lost: u64 },
}

/// A listed ledger as it was read.
struct Listed {
    ledger: Versioned<LedgerMetadata>,
    /// Creation and last change of the listing.
    listing: (Revision, Revision),
}

/// What the caller knows of the cluster: whose slots are to be replaced, and who may take them.
pub(crate) struct Bookies {
    pub(crate) condemned: BTreeSet<Incarnation>,
    pub(crate) candidates: Vec<Available>,
}

/// Makes a ledger whole as far as it can be. The first copy is only made while the ledger is listed (A2).
///
/// # Errors
/// [`StoreError`]; the ledger stays listed.
pub(crate) async fn repair(
    parts: &AutoRecoveryParts,
    pace: &mut Pace,
    id: LedgerId,
    bookies: &Bookies,
) -> Result<Repaired, StoreError> {
    let mut short = Repaired::Short { lost: 0 };
    for _ in 0..ROUNDS {
        let Some(mut listed) = read(parts, id).await? else { return Ok(Repaired::Gone) };
        let metadata = listed.ledger.value.clone();
        let finals = plan::parts(&metadata);
        let lists = survey(parts, &metadata, &finals).await;
        let plan = plan::plan(metadata.quorum, &finals, &lists, &bookies.condemned);
        if plan.is_complete() {
            if !metadata.is_closed() {
                return Ok(Repaired::Open(metadata));
            }
            // The survey was asked after the last CAS: what it showed is what metadata names (A2).
            if unlist(parts, &listed).await? {
                parts.metrics.ledgers.inc();
                return Ok(Repaired::Whole);
            }
            continue; // it changed meanwhile: once more
        }
        let (mut lost, mut progress) = (0, false);
        for task in plan.tasks {
            let part = &finals[task.part];
            match carry_out(parts, pace, &mut listed, (part, &lists), task, bookies).await? {
                Done::Yes => progress = true,
                Done::Not => {}
                Done::Without(entries) => lost += entries,
            }
        }
        short = Repaired::Short { lost };
        if !progress {
            break;
        }
    }
    Ok(short)
}

/// Whether some final copy of the ledger is short (A1's periodic check). What did not answer is not short.
pub(crate) async fn lacks_copies(parts: &AutoRecoveryParts, found: &KeyValue) -> bool {
    let Ok(ledger) = LedgerMetadata::from_key_value(found) else { return false };
    let finals = plan::parts(&ledger.value);
    let lists = survey(parts, &ledger.value, &finals).await;
    let plan = plan::plan(ledger.value.quorum, &finals, &lists, &BTreeSet::new());
    !plan.tasks.is_empty()
}

/// The ledger and its listing at one revision. None if it is not listed; a deleted ledger needs no listing.
async fn read(parts: &AutoRecoveryParts, id: LedgerId) -> Result<Option<Listed>, StoreError> {
    let (key, listing_key) = (keys::ledger(id), keys::under_replicated(id));
    let (_, found) = parts.store.get_many(&[key.clone(), listing_key.clone()]).await?;
    let [ledger, Some(listing)] = &found[..] else { return Ok(None) };
    let unchanged = match ledger {
        None => Compare::Absent(key),
        Some(found) => match LedgerMetadata::from_key_value(found) {
            Ok(ledger) if matches!(ledger.value.state, LedgerState::Deleted { .. }) => {
                Compare::ModRevision(key, found.mod_revision)
            }
            Ok(ledger) => {
                let listing = (listing.create_revision, listing.mod_revision);
                return Ok(Some(Listed { ledger, listing }));
            }
            Err(error) => return Err(StoreError::Refused(error.to_string())),
        },
    };
    let listed = Compare::ModRevision(listing_key.clone(), listing.mod_revision);
    let txn = Txn::new().when(unchanged).when(listed).then(Op::Delete(listing_key));
    parts.store.txn(txn).await?; // exempt from MD3
    Ok(None)
}

/// A2's last step: every copy was shown, and neither ledger nor listing changed since they were read.
async fn unlist(parts: &AutoRecoveryParts, listed: &Listed) -> Result<bool, StoreError> {
    let id = listed.ledger.value.id;
    let listing = keys::under_replicated(id);
    let txn = Txn::new()
        .when(Compare::ModRevision(keys::ledger(id), listed.ledger.mod_revision))
        .when(Compare::ModRevision(listing.clone(), listed.listing.1))
        .then(Op::Delete(listing));
    Ok(matches!(parts.store.txn(txn).await?, TxnOutcome::Done(_))) // exempt from MD3
}

/// Asks every holder of every final fragment for LIST.
async fn survey(parts: &AutoRecoveryParts, metadata: &LedgerMetadata, finals: &[Part]) -> Lists {
    let mut lists = Lists::new();
    for (at, part) in finals.iter().enumerate() {
        let holders = part.slots.iter().enumerate().filter_map(|(slot, h)| Some((slot, (*h)?)));
        let asked = holders.map(|(slot, holder)| async move {
            if part.first >= part.end {
                return ((at, slot), Some(EntrySet::default())); // nothing to show
            }
            let range = EntryRange { first: part.first, last: EntryId(part.end.0 - 1) };
            let deadline = Instant::now() + parts.config.rpc_timeout;
            let bookie = parts.bookies.bookie(holder);
            match bookie.list(holder, metadata.id, range, deadline).await {
                ListAnswer::Held(held) => ((at, slot), Some(held)),
                ListAnswer::Unknown(_) => ((at, slot), None),
            }
        });
        lists.extend(join_all(asked).await);
    }
    lists
}

/// What became of a slot.
enum Done {
    Yes,
    /// Not now: no replacement, a refusal, somebody was faster.
    Not,
    /// So many entries no peer could give (A4).
    Without(u64),
}

async fn carry_out(
    parts: &AutoRecoveryParts,
    pace: &mut Pace,
    listed: &mut Listed,
    (part, lists): (&Part, &Lists),
    task: Task,
    bookies: &Bookies,
) -> Result<Done, StoreError> {
    let metadata = listed.ledger.value.clone();
    let target =
        if task.replace { choose(parts, listed, part, task, bookies) } else { task.holder };
    let Some(to) = target else {
        tracing::info!(
            ledger_id = metadata.id.0,
            slot = task.slot.0,
            "no bookie can take the copy"
        );
        return Ok(Done::Not);
    };
    let source = (task.part, part);
    if task.replace {
        // Some holder may come back with what nobody has now: its slot is not given away (A4).
        let given = |e| !plan::sources(metadata.quorum, source, lists, e).is_empty();
        let lost = part.assigned(metadata.quorum, task.slot).filter(|e| !given(*e)).count() as u64;
        if lost > 0 {
            return Ok(Done::Without(lost));
        }
    }
    let none = EntrySet::default();
    let held = match lists.get(&(task.part, task.slot.0)) {
        Some(Some(shown)) if !task.replace => shown,
        _ => &none,
    };
    let work = Copy { metadata: &metadata, part: source, slot: task.slot, lists, held, to };
    match copy(parts, pace, work).await {
        Copied::All if task.replace => swap(parts, listed, part, task, to).await,
        Copied::All => Ok(Done::Yes),
        Copied::Without { entries, first } => {
            tracing::debug!(
                ledger_id = metadata.id.0,
                entry_id = first.0,
                "no peer gives an entry"
            );
            Ok(Done::Without(entries))
        }
        Copied::Refused(answer) => {
            tracing::info!(
                ledger_id = metadata.id.0,
                incarnation = to.0,
                ?answer,
                "a copy was not taken"
            );
            Ok(Done::Not)
        }
    }
}

/// EC6 for the slot, as the fragment stands.
fn choose(
    parts: &AutoRecoveryParts,
    listed: &Listed,
    part: &Part,
    task: Task,
    bookies: &Bookies,
) -> Option<Incarnation> {
    let ledger = &listed.ledger;
    let now = ledger.value.fragments.iter().find(|fragment| fragment.first_entry == part.first)?;
    let age = LedgerAge::new(ledger.value.id, Some(ledger.create_revision));
    let slot = task.slot.0;
    let quorum = ledger.value.quorum;
    let found = replacements(quorum, &now.slots, &[slot], &bookies.candidates, age, &parts.random);
    found.into_iter().find(|found| found.0 == slot).map(|found| found.1)
}

/// A2's CAS of the one slot, after all its copies are durable. It also compares that the listing is the very one under which
/// the copies were made: while that stands, the target's GC keeps them (G1, T51).
async fn swap(
    parts: &AutoRecoveryParts,
    listed: &mut Listed,
    part: &Part,
    task: Task,
    to: Incarnation,
) -> Result<Done, StoreError> {
    let id = listed.ledger.value.id;
    let key = keys::ledger(id);
    let token = parts.tasks.token();
    for _ in 0..SWAPS_MAX {
        let Some(next) = plan::swapped(&listed.ledger.value, part, task, to) else {
            return Ok(Done::Not);
        };
        let txn = Txn::new()
            .when(Compare::ModRevision(key.clone(), listed.ledger.mod_revision))
            .when(Compare::CreateRevision(keys::under_replicated(id), listed.listing.0))
            .then(Op::put(key.clone(), next.encode()));
        match commit(&parts.store, &txn, &token).await {
            Committed::Done(revision) => {
                tracing::info!(
                    ledger_id = id.0,
                    slot = task.slot.0,
                    incarnation = to.0,
                    "slot has another holder"
                );
                listed.ledger = listed.ledger.changed(next, revision);
                parts.metrics.slots.inc();
                return Ok(Done::Yes);
            }
            Committed::Conflict { found, .. } => {
                // Ours landed earlier (MD3), or another part of the ledger moved: decide on what stands now.
                let [Some(ledger), Some(listing)] = &found[..] else { return Ok(Done::Not) };
                let Ok(ledger) = LedgerMetadata::from_key_value(ledger) else {
                    return Ok(Done::Not);
                };
                let same_listing = listing.create_revision == listed.listing.0;
                listed.ledger = ledger;
                if listed.ledger.value == next {
                    return Ok(Done::Yes);
                }
                if !same_listing {
                    return Ok(Done::Not);
                }
            }
            Committed::Refused(error) => return Err(error),
            Committed::Unsettled => return Ok(Done::Not), // stopping; it may land still, which does no harm
        }
    }
    Ok(Done::Not)
}
