//! I10 to I14, for every segment, and M2: a list value and the ledgers it names change together.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, ledger::LedgerChecks, must};
use crate::harness::history::{CursorShown, Event, EventNumber, LedgerState, Listed, LogBatch};

/// What is known of every segment.
#[derive(Default)]
pub(crate) struct SegmentChecks {
    segments: BTreeMap<(u64, u32), Known>,
}

#[derive(Default)]
struct Known {
    /// The epoch and its nonce in the list value.
    epoch: Option<(u64, u64)>,
    /// Its ledgers as last listed: data, cursor log.
    listed: (Vec<Listed>, Vec<Listed>),
    /// Who got an acknowledgement in which epoch.
    owners: BTreeMap<u64, u32>,
    /// What was said to be stored: producer, highest sequence of the batch.
    receipts: BTreeMap<(String, u64), Receipt>,
    /// What any reader got at an offset.
    batches: BTreeMap<u64, LogBatch>,
    cursors: BTreeMap<u64, Cursor>,
    /// What was confirmed when a load began, by owner.
    begun: BTreeMap<u32, Confirmed>,
}

/// What every owner that begins to load later must find.
#[derive(Clone, Default)]
struct Confirmed {
    cursors: BTreeMap<u64, Cursor>,
    /// Per producer, the highest sequence that was said to be stored.
    stored: BTreeMap<String, u64>,
}

struct Receipt {
    payload: u64,
    offset: Option<u64>,
    duplicate: bool,
}

#[derive(Clone, Default)]
struct Cursor {
    made: bool,
    next: u64,
    settled: BTreeSet<u64>,
    /// What anybody ever wanted settled.
    asked: BTreeSet<u64>,
    /// Mark-delete as it was when each settle was asked for.
    floors: BTreeMap<EventNumber, u64>,
}

impl SegmentChecks {
    pub(super) fn observe(
        &mut self,
        number: EventNumber,
        event: &Event,
        ledgers: &LedgerChecks,
    ) -> Verdict {
        match event {
            Event::ListPut { segment, epoch, nonce, data, log, .. } => {
                listed_as_they_are(*segment, data, ledgers)?;
                listed_as_they_are(*segment, log, ledgers)?;
                let known = self.segments.entry(*segment).or_default();
                if let Some((before, nonce_before)) = known.epoch {
                    must!(
                        "I10",
                        *epoch >= before,
                        "the epoch of {segment:?} fell from {before} to {epoch}"
                    );
                    must!(
                        "I10",
                        *epoch > before || *nonce == nonce_before,
                        "epoch {epoch} of {segment:?} has two nonces"
                    );
                }
                known.epoch = Some((*epoch, *nonce));
                known.listed = (data.clone(), log.clone());
                Ok(())
            }
            Event::Published {
                segment,
                epoch,
                owner,
                producer,
                high,
                offset,
                duplicate,
                payload,
            } => {
                let known = self.segments.entry(*segment).or_default();
                known.one_owner(*segment, *epoch, *owner)?;
                let receipt = Receipt { payload: *payload, offset: *offset, duplicate: *duplicate };
                let before = known.receipts.entry((producer.clone(), *high)).or_insert(receipt);
                if let (Some(first), Some(now)) = (before.offset, *offset) {
                    must!(
                        "I13",
                        first == now,
                        "batch {high} of {producer} in {segment:?} was stored at {first} and at {now}"
                    );
                }
                before.offset = before.offset.or(*offset);
                before.duplicate &= duplicate;
                Ok(())
            }
            Event::BatchRead { segment, batch } => {
                self.segments.entry(*segment).or_default().read(*segment, batch)
            }
            Event::LogRead { segment, first, end, batches } => self
                .segments
                .entry(*segment)
                .or_default()
                .whole_log(*segment, *first, *end, batches),
            Event::LoadBegun { segment, owner } => {
                let known = self.segments.entry(*segment).or_default();
                let mut stored = BTreeMap::new();
                for (producer, high) in known.receipts.keys() {
                    let highest: &mut u64 = stored.entry(producer.clone()).or_default();
                    *highest = (*highest).max(*high);
                }
                known.begun.insert(*owner, Confirmed { cursors: known.cursors.clone(), stored });
                Ok(())
            }
            Event::ProducerOpened { segment, owner, producer, persisted } => {
                let known = self.segments.entry(*segment).or_default();
                let before = known
                    .begun
                    .get(owner)
                    .and_then(|begun| begun.stored.get(producer))
                    .copied()
                    .unwrap_or(0);
                must!(
                    "I12",
                    *persisted >= before,
                    "owner {owner} of {segment:?} knows {producer} up to {persisted}, {before} was acknowledged before it loaded"
                );
                Ok(())
            }
            Event::CursorMade { segment, subscription } => {
                self.cursor(*segment, *subscription).made = true;
                Ok(())
            }
            Event::SettleAsked { segment, subscription, first, last } => {
                let cursor = self.cursor(*segment, *subscription);
                cursor.asked.extend(*first..=*last);
                cursor.floors.insert(number, cursor.next);
                Ok(())
            }
            Event::Settled { segment, epoch, owner, subscription, asked, first, last, next } => {
                let known = self.segments.entry(*segment).or_default();
                known.one_owner(*segment, *epoch, *owner)?;
                let cursor = known.cursors.entry(*subscription).or_default();
                // Two settles under way at once may be heard of in any order.
                let floor = cursor.floors.remove(asked).unwrap_or(0);
                must!(
                    "I14",
                    *next >= floor,
                    "mark-delete of subscription {subscription} of {segment:?} fell from {floor} to {next}"
                );
                cursor.settled.extend(*first..=*last);
                cursor.next = cursor.next.max(*next);
                Ok(())
            }
            Event::CursorSeen { segment, epoch, owner, subscription, shown } => {
                let known = self.segments.entry(*segment).or_default();
                if known.epoch.is_some_and(|(current, _)| current > *epoch) {
                    return Ok(());
                }
                let begun = known
                    .begun
                    .get(owner)
                    .and_then(|begun| begun.cursors.get(subscription))
                    .cloned();
                let asked = known.cursors.entry(*subscription).or_default();
                cursor_holds(
                    *segment,
                    *subscription,
                    &begun.unwrap_or_default(),
                    &asked.asked,
                    shown.as_ref(),
                )
            }
            _ => Ok(()),
        }
    }

    /// The segment's ledgers as last listed: data, cursor log.
    pub(crate) fn listed(&self, segment: (u64, u32)) -> (&[Listed], &[Listed]) {
        self.segments.get(&segment).map_or((&[], &[]), |known| (&known.listed.0, &known.listed.1))
    }

    fn cursor(&mut self, segment: (u64, u32), subscription: u64) -> &mut Cursor {
        self.segments.entry(segment).or_default().cursors.entry(subscription).or_default()
    }
}

/// M2, TK2: what the list calls closed is Closed, and of each row at most the last is not.
fn listed_as_they_are(segment: (u64, u32), row: &[Listed], ledgers: &LedgerChecks) -> Verdict {
    for (i, Listed { ledger, closed }) in row.iter().enumerate() {
        let state = ledgers.value(*ledger).map(|value| value.state);
        let is_closed = matches!(state, Some(LedgerState::Closed { .. }));
        must!(
            "M2",
            !closed || is_closed,
            "the list of {segment:?} calls ledger {ledger} closed, it is {state:?}"
        );
        must!(
            "M2",
            is_closed || i + 1 == row.len(),
            "the list of {segment:?} goes on behind ledger {ledger}, which is {state:?}"
        );
    }
    Ok(())
}

/// I12 and I14: nothing confirmed is open again, nothing is settled that nobody settled.
fn cursor_holds(
    segment: (u64, u32),
    subscription: u64,
    before: &Cursor,
    asked: &BTreeSet<u64>,
    shown: Option<&CursorShown>,
) -> Verdict {
    let Some(CursorShown { next, holes }) = shown else {
        must!(
            "I14",
            !before.made,
            "the cursor of subscription {subscription} of {segment:?} is gone"
        );
        return Ok(());
    };
    must!(
        "I14",
        *next >= before.next,
        "mark-delete of subscription {subscription} of {segment:?} fell from {} to {next}",
        before.next
    );
    let settled = |offset: &u64| {
        offset < next || holes.iter().any(|(first, last)| (first..=last).contains(&offset))
    };
    let back = before.settled.iter().find(|offset| !settled(offset));
    must!(
        "I14",
        back.is_none(),
        "offset {back:?} of {segment:?} was settled for subscription {subscription} and is open again"
    );
    let mut shown = (0..*next).chain(holes.iter().flat_map(|(first, last)| *first..=*last));
    let skipped = shown.find(|offset| !asked.contains(offset));
    must!(
        "I12",
        skipped.is_none(),
        "offset {skipped:?} of {segment:?} is settled for subscription {subscription}, and nobody settled it"
    );
    Ok(())
}

impl Known {
    /// I10
    fn one_owner(&mut self, segment: (u64, u32), epoch: u64, owner: u32) -> Verdict {
        let first = *self.owners.entry(epoch).or_insert(owner);
        must!(
            "I10",
            first == owner,
            "owners {first} and {owner} both got an acknowledgement in epoch {epoch} of {segment:?}"
        );
        Ok(())
    }

    /// What was read once at an offset is what everyone reads there.
    fn read(&mut self, segment: (u64, u32), batch: &LogBatch) -> Verdict {
        let first = self.batches.entry(batch.offset).or_insert_with(|| batch.clone());
        must!(
            "I11",
            first == batch,
            "offset {} of {segment:?} was read as {first:?}, then as {batch:?}",
            batch.offset
        );
        Ok(())
    }

    /// The log as it is when nothing moves any more.
    fn whole_log(
        &mut self,
        segment: (u64, u32),
        first: u64,
        end: u64,
        batches: &[LogBatch],
    ) -> Verdict {
        let mut expected = first;
        let mut last_of: BTreeMap<&str, u64> = BTreeMap::new();
        let mut stored: BTreeMap<(String, u64), &LogBatch> = BTreeMap::new();
        for batch in batches {
            must!(
                "I11",
                batch.offset == expected,
                "{segment:?} has offset {} where {expected} follows",
                batch.offset
            );
            expected += batch.count;
            self.read(segment, batch)?;
            let twice = stored.insert((batch.producer.clone(), batch.high), batch);
            must!(
                "I13",
                twice.is_none(),
                "batch {} of {} lies twice in {segment:?}: {twice:?} and {batch:?}",
                batch.high,
                batch.producer
            );
            let before = last_of.insert(&batch.producer, batch.high);
            must!(
                "I11",
                before.is_none_or(|before| before < batch.low),
                "{} in {segment:?} goes from {before:?} to {}",
                batch.producer,
                batch.low
            );
        }
        must!("I11", expected == end, "{segment:?} ends at {end}, its batches at {expected}");
        for batch in self.batches.values() {
            let there = stored.get(&(batch.producer.clone(), batch.high));
            must!(
                "I12",
                batch.offset < first || there == Some(&batch),
                "{batch:?} was read from {segment:?} and is gone, or lies elsewhere: {there:?}"
            );
        }
        for ((producer, high), receipt) in &self.receipts {
            let found = stored.get(&(producer.clone(), *high));
            let Some(batch) = found else {
                must!(
                    "I13",
                    !receipt.duplicate,
                    "batch {high} of {producer} was called a duplicate, but is not in {segment:?}"
                );
                must!(
                    "I12",
                    false,
                    "batch {high} of {producer} was acknowledged, but is not in {segment:?}"
                );
                continue;
            };
            must!(
                "I12",
                batch.payload == receipt.payload,
                "batch {high} of {producer} in {segment:?} has another payload"
            );
            must!(
                "I11",
                receipt.offset.is_none_or(|offset| offset == batch.offset),
                "batch {high} of {producer} in {segment:?} was acknowledged at {:?}, it lies at {}",
                receipt.offset,
                batch.offset
            );
        }
        Ok(())
    }
}
