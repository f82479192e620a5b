//! Reading entries (RD1..RD6).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId, Slot};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use crate::{
    bookie_rpc::{EntryAnswer, EntryRange, ReadAnswer, ReadRequest, Unknown},
    client::LedgerClient,
    entry::Entry,
    metadata::{LedgerMetadata, LedgerState},
};

/// Reads one ledger. Opening it writes nothing (RD6).
#[derive(Clone, Debug)]
pub struct LedgerReader {
    pub(crate) client: LedgerClient,
    pub(crate) id: LedgerId,
}

/// Why entries could not be read. None of these ever means "end of ledger" (RD4).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No bookie of the write set could show it now; at least one did not answer. Try again later.
    #[error("ledger {ledger} entry {entry} cannot be read now: {why}")]
    Unavailable { ledger: LedgerId, entry: EntryId, why: String },
    /// Every bookie of the write set answered, and none has a good copy: damage, for repair (RD4).
    #[error("ledger {ledger} entry {entry} has no readable copy")]
    Damaged { ledger: LedgerId, entry: EntryId },
    /// The range reaches beyond the end of a Closed ledger (RD1): a defect of the caller.
    #[error("ledger {ledger} ends before entry {entry}")]
    BeyondEnd { ledger: LedgerId, entry: EntryId },
    /// The ledger is deleted (RD3).
    #[error("ledger {ledger} was trimmed")]
    Trimmed { ledger: LedgerId },
}

/// Bookies that lately did not answer: asked last for a while.
#[derive(Debug, Default)]
pub(crate) struct Silent(Mutex<BTreeMap<Incarnation, Instant>>);

/// How long a bookie that did not answer is asked last.
const SILENT_FOR: Duration = Duration::from_secs(5);

impl Silent {
    fn note(&self, bookie: Incarnation) {
        self.0.lock().insert(bookie, Instant::now() + SILENT_FOR);
    }

    fn is_silent(&self, bookie: Incarnation) -> bool {
        self.0.lock().get(&bookie).is_some_and(|until| *until > Instant::now())
    }
}

/// One bookie's answer to one read.
type Answered = (Incarnation, ReadAnswer);

impl LedgerReader {
    /// Reads entries from `range.first` on: at least one, in order, at most up to `range.last`, about `bytes_max` payload
    /// bytes. One verified positive is enough (RD4); a second bookie is asked when the first is slow (RD5) or does not have
    /// it. Of a Closed ledger nothing beyond `last` is ever returned, whatever bookies hold (RD1); of an Open one, or one
    /// in recovery, the caller asks only up to a LAC it has learned (RD2, RD3).
    ///
    /// # Errors
    /// [`ReadError`]. Cancel-safe.
    pub async fn read(
        &self,
        metadata: &LedgerMetadata,
        range: EntryRange,
        bytes_max: usize,
    ) -> Result<Vec<Entry>, ReadError> {
        let (ledger, entry) = (self.id, range.last);
        match metadata.state {
            LedgerState::Deleted { .. } => return Err(ReadError::Trimmed { ledger }),
            LedgerState::Closed { last, .. } if last.is_none_or(|last| range.last > last) => {
                return Err(ReadError::BeyondEnd { ledger, entry });
            }
            _ => {}
        }
        let mut wait: FuturesUnordered<BoxFuture<'static, Answered>> = FuturesUnordered::new();
        let mut rest = self.order(metadata, range.first);
        rest.reverse();
        let mut unknown = None;
        let mut damaged = Vec::new();
        // In the fragment that is still written a copy may be on its way (Qa < Qw is a window); elsewhere it must be there.
        let is_final =
            |entry: EntryId| metadata.is_closed() || entry < metadata.last_fragment().first_entry;
        let mut asked: Vec<(Incarnation, Instant)> = Vec::new();
        let mut next_ask = Instant::now();
        loop {
            // RD5: the next one is asked when nobody is left to wait for, or the last one takes longer than it should.
            if wait.is_empty() || (Instant::now() >= next_ask && !rest.is_empty()) {
                let Some((slot, to)) = rest.pop() else { break };
                let now = Instant::now();
                asked.push((to, now));
                next_ask = now + self.patience(to);
                wait.push(self.ask(metadata, range, bytes_max, slot, to));
            }
            let (from, answer) = tokio::select! {
                biased;
                Some(answered) = wait.next() => answered,
                () = sleep_until(next_ask), if !rest.is_empty() => continue,
            };
            self.note_time(&mut asked, from, &answer);
            let (entries, trouble) = self.good_part(range.first, answer);
            let at = EntryId(range.first.0 + entries.len() as u64);
            match trouble {
                Some(Trouble::Absent) if !is_final(at) => {}
                Some(Trouble::Absent | Trouble::BadBytes | Trouble::Unknown(Unknown::Damaged)) => {
                    if entries.is_empty() {
                        damaged.push(from);
                    } else {
                        self.report(at, &[from]); // the next read may go round it and never see it
                    }
                }
                Some(Trouble::Unknown(why)) if entries.is_empty() => {
                    if matches!(why, Unknown::Timeout | Unknown::Disconnected) {
                        self.client.silent.note(from);
                    }
                    unknown = Some(why);
                }
                Some(Trouble::Unknown(_)) | None => {}
            }
            if !entries.is_empty() {
                for (slower, since) in asked {
                    self.client.read_times.note_unanswered(slower, since.elapsed());
                }
                self.report(range.first, &damaged);
                return Ok(entries);
            }
        }
        self.report(range.first, &damaged);
        let entry = range.first;
        match unknown {
            Some(why) => Err(ReadError::Unavailable { ledger, entry, why: why.to_string() }),
            None => Err(ReadError::Damaged { ledger, entry }),
        }
    }

    fn patience(&self, bookie: Incarnation) -> Duration {
        let config = &self.client.parts.config;
        let (floor, unknown) = (config.speculative_min, config.speculative_after);
        self.client.read_times.patience(bookie, floor, unknown)
    }

    /// It answered: no longer among those asked. A refusal says nothing of how long its reads take.
    fn note_time(
        &self,
        asked: &mut Vec<(Incarnation, Instant)>,
        from: Incarnation,
        answer: &ReadAnswer,
    ) {
        let Some(at) = asked.iter().position(|(to, _)| *to == from) else { return };
        let (_, since) = asked.remove(at);
        if !matches!(answer.entries.first(), None | Some(EntryAnswer::Unknown(_))) {
            self.client.read_times.note(from, since.elapsed());
        }
    }

    /// The largest LAC that the bookies of the last fragment tell (RD2). A hint: a larger one may be acknowledged.
    pub async fn read_lac(&self, metadata: &LedgerMetadata) -> Option<EntryId> {
        let parts = &self.client.parts;
        let deadline = Instant::now() + parts.config.read_timeout;
        let asked = metadata.last_fragment().holders();
        let answers = asked.map(|(_, to)| parts.bookies.bookie(to).read_lac(to, self.id, deadline));
        let answers = futures::future::join_all(answers).await;
        let told = answers.into_iter().filter_map(|answer| match answer {
            crate::bookie_rpc::LacAnswer::Known(lac) => lac,
            crate::bookie_rpc::LacAnswer::Unknown(_) => None,
        });
        told.max()
    }

    /// Who to ask, in order: spread over the write set by the entry, silent ones last.
    fn order(&self, metadata: &LedgerMetadata, first: EntryId) -> Vec<(Slot, Incarnation)> {
        let fragment = metadata.fragment_of(first);
        let slots = metadata.write_set(first);
        let turn = (self.id.0 as usize).wrapping_add(first.0 as usize / 64) % slots.len();
        let turned = slots[turn..].iter().chain(&slots[..turn]);
        let mut order: Vec<_> =
            turned.filter_map(|slot| Some((*slot, fragment.holder(*slot)?))).collect();
        order.sort_by_key(|(_, to)| self.client.silent.is_silent(*to));
        order
    }

    /// Asks one bookie for as many entries of the range as it should hold, from the first on.
    fn ask(
        &self,
        metadata: &LedgerMetadata,
        range: EntryRange,
        bytes_max: usize,
        slot: Slot,
        to: Incarnation,
    ) -> BoxFuture<'static, Answered> {
        let next = metadata.fragments.iter().find(|f| f.first_entry > range.first);
        let fragment_end = next.map_or(range.last.0, |next| next.first_entry.0 - 1);
        let end = fragment_end.min(range.last.0);
        let holds = |id: &u64| metadata.quorum.position(EntryId(*id), slot).is_some();
        let last = if metadata.quorum.write() == metadata.quorum.ensemble() {
            end
        } else {
            (range.first.0..=end).take_while(holds).last().unwrap_or(range.first.0)
        };
        let parts = &self.client.parts;
        let request = ReadRequest {
            to,
            ledger: self.id,
            range: EntryRange { first: range.first, last: EntryId(last) },
            fence: false,
            bytes_max: bytes_max.max(1),
            deadline: Instant::now() + parts.config.read_timeout,
        };
        parts.bookies.bookie(to).read(request).map(move |answer| (to, answer)).boxed()
    }

    /// The verified entries an answer starts with; and why not more, if something is wrong with the next one.
    fn good_part(&self, first: EntryId, answer: ReadAnswer) -> (Vec<Entry>, Option<Trouble>) {
        let mut good = Vec::new();
        for answer in answer.entries {
            let id = EntryId(first.0 + good.len() as u64);
            let trouble = match answer {
                EntryAnswer::Held(entry)
                    if entry.id == id && entry.ledger == self.id && entry.verify().is_ok() =>
                {
                    good.push(entry);
                    continue;
                }
                EntryAnswer::Held(_) => Trouble::BadBytes,
                EntryAnswer::Absent => Trouble::Absent,
                EntryAnswer::Unknown(why) => Trouble::Unknown(why),
            };
            return (good, Some(trouble));
        }
        let none = good.is_empty();
        (good, none.then_some(Trouble::Unknown(Unknown::Disconnected)))
    }

    /// RD4: copies that should be there and are not, or are bad, are reported for repair.
    fn report(&self, entry: EntryId, damaged: &[Incarnation]) {
        if damaged.is_empty() {
            return;
        }
        for bookie in damaged {
            self.client.parts.metrics.read_damage.inc();
            tracing::warn!(
                ledger = self.id.0,
                entry = entry.0,
                bookie = bookie.0,
                "bookie has no good copy of an entry"
            );
        }
        self.client.list_for_repair(self.id);
    }
}

enum Trouble {
    /// An explicit no.
    Absent,
    /// Bytes that are not the entry.
    BadBytes,
    Unknown(Unknown),
}

/// Shared by all readers of a client.
pub(crate) type SharedSilent = Arc<Silent>;

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
