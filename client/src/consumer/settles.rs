//! What the application asked for its messages (accept, release, reject, extend) and the server has not answered. Pure.
//!
//! A settle is presented with the handle under which its message is held *now* ([`Holds`]). When a stream breaks, what was
//! asked waits, and so does what the application has not seen: it is claimed like the rest and given back uncounted, so that
//! a break is no attempt of a message that nobody worked on. The next stream says which messages are still ours, and under which handles. What it grants had no effect
//! before the break. What it does not grant is held no more: an accept of it is presented once more under its old handle,
//! since the server answers one that it took before the break with success; everything else ends with [`Error::NotHeld`], or
//! with [`Error::Indeterminate`] if it was on its way in the break. So does an accept that the server does not know: a new
//! owner knows what is settled, but not by whom, and refuses the handle of either case.
//!
//! ```text
//! request -> waiting -> frame (token) -> settled: answered, held no more
//!               ^          |-> refused for now: waiting again
//!               |          `-> refused: one of several is not held: halves of it wait again; alone: NotHeld
//!               `-- a break: under the new handle
//! ```

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use geminga_proto::{
    reason::{Reason, Retry},
    v1::{Accept, AcceptUpTo, Claim, Extend, OffsetRange, Reject, Release, Settle, settle::Verb},
};
use tokio::time::Instant;

use super::{
    asked::{Ask, Entry, Request, Table, Waiter},
    holds::Holds,
};
use crate::error::Error;

/// A wish of nobody's has no deadline.
const NEVER: Duration = Duration::from_secs(30 * 24 * 3600);

/// All wishes of one segment that are not answered, and what is held there.
#[derive(Debug, Default)]
pub(crate) struct Settles {
    holds: Holds,
    /// By offset: those that end a message, those that cover everything below, and those that ask for time.
    ends: Table,
    ups: Table,
    extends: Table,
    mark_delete_next: u64,
    /// Delivered on streams that broke, and not seen by the application: given back once it is granted.
    unseen: Vec<(u64, u64)>,
    /// The highest offset delivered on the present stream, plus one: below, a delivery is another one of its message.
    frontier: u64,
    fresh: Option<(u64, Bytes)>,
    next_key: u64,
    next_token: u64,
    /// The offsets of each frame in flight.
    tokens: BTreeMap<u64, (Kind, Vec<OffsetRange>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    End,
    Up,
    Extend,
    /// Asked for by nobody: leases kept from running out.
    Renewal,
}

impl Settles {
    /// Takes a wish for a message that was handed out.
    pub(crate) fn request(&mut self, request: Request) {
        let Request { offset, key, ask, deadline, waiter } = request;
        if ask == Ask::AcceptUpTo {
            return self.request_up_to(offset, deadline, waiter);
        }
        if ask == Ask::Accept && offset < self.mark_delete_next {
            return drop(waiter.send(Ok(()))); // nobody may wait any more
        }
        let table = if matches!(ask, Ask::Extend(_)) { &mut self.extends } else { &mut self.ends };
        if let Some(entry) = table.entries.get_mut(&offset) {
            if entry.ask == ask && entry.key == key {
                entry.waiters.push(waiter);
            } else {
                let _ = waiter.send(Err(Error::not_held())); // settled in another way already
            }
            return;
        }
        let Some(run) = self.holds.get(offset).filter(|run| run.key == key) else {
            return drop(waiter.send(Err(Error::not_held())));
        };
        let handle = run.handle.clone();
        let waiters = vec![waiter];
        table.entries.insert(
            offset,
            Entry {
                ask,
                key,
                handle,
                sent: None,
                uncertain: false,
                together_max: usize::MAX,
                deadline,
                waiters,
            },
        );
        table.waiting.insert(offset);
    }

    /// Presented with the highest message held at or below: what lies between is settled, or not ours to settle.
    fn request_up_to(&mut self, offset: u64, deadline: Instant, waiter: Waiter) {
        if offset < self.mark_delete_next {
            return drop(waiter.send(Ok(()))); // nobody may wait any more
        }
        let Some((offset, run)) = self.holds.at_or_below(offset) else {
            return drop(waiter.send(Err(Error::not_held())));
        };
        let entry = self.ups.entries.entry(offset).or_insert_with(|| Entry {
            ask: Ask::AcceptUpTo,
            key: run.key,
            handle: run.handle.clone(),
            sent: None,
            uncertain: false,
            together_max: usize::MAX,
            deadline,
            waiters: Vec::new(),
        });
        entry.waiters.push(waiter);
        if entry.sent.is_none() {
            self.ups.waiting.insert(offset);
        }
    }

    /// The stream is left, or broke. What it had delivered can be claimed on the next one; of that, the application has not
    /// seen `unseen` and will not see it.
    pub(crate) fn on_broken(&mut self, unseen: &[(u64, u64)]) {
        self.unseen.extend(unseen);
        self.tokens.clear();
        for table in [&mut self.ends, &mut self.ups, &mut self.extends] {
            for (offset, entry) in &mut table.entries {
                entry.uncertain |= entry.sent.take().is_some();
                table.waiting.insert(*offset);
            }
        }
    }

    /// What this consumer presents when it comes back (L4).
    ///
    /// At most `ranges_max` ranges, the lowest first: what is not claimed is delivered again.
    pub(crate) fn claims(&self, ranges_max: usize) -> Vec<Claim> {
        self.holds.claims(ranges_max)
    }

    /// Whether anything is held.
    pub(crate) fn holds_any(&self) -> bool {
        !self.holds.is_empty()
    }

    /// The server knows none of what was claimed: it is another subscription of the same name.
    pub(crate) fn disown(&mut self) {
        self.holds.clear();
        self.unseen.clear();
    }

    /// A stream is open; everything below `mark_delete_next` is settled, and of what was claimed this is granted.
    ///
    /// # Errors
    /// Words, if more is granted than was claimed.
    pub(crate) fn on_opened(
        &mut self,
        mark_delete_next: u64,
        granted: &[Claim],
        now: Instant,
    ) -> Result<(), &'static str> {
        self.frontier = 0;
        self.fresh = None;
        self.holds.regrant(granted, now)?;
        self.settled_below(mark_delete_next);
        let holds = &self.holds;
        for table in [&mut self.ends, &mut self.ups, &mut self.extends] {
            let accepts = |entry: &Entry| matches!(entry.ask, Ask::Accept | Ask::AcceptUpTo);
            for (offset, entry) in &mut table.entries {
                if let Some(run) = holds.get(*offset).filter(|run| run.key == entry.key) {
                    entry.handle = run.handle.clone();
                    entry.uncertain = false; // it is still held: what was asked before had no effect
                }
            }
            let gone = table.extract(|offset, entry| {
                !accepts(entry) && holds.get(offset).is_none_or(|run| run.key != entry.key)
            });
            for (_, entry) in gone {
                entry.not_held();
            }
        }
        self.give_back_unseen(now);
        Ok(())
    }

    /// What nobody has seen is released, uncounted: it comes again, to anybody.
    fn give_back_unseen(&mut self, now: Instant) {
        for (first, last) in std::mem::take(&mut self.unseen) {
            for (offset, run) in self.holds.each(first, last) {
                let entry = Entry {
                    ask: Ask::Release { delay_ms: None, counts: false },
                    key: run.key,
                    handle: run.handle.clone(),
                    sent: None,
                    uncertain: false,
                    together_max: usize::MAX,
                    deadline: now + NEVER,
                    waiters: Vec::new(),
                };
                if let Some(earlier) = self.ends.remove(offset) {
                    earlier.not_held(); // of a delivery before the one that is given back
                }
                self.ends.entries.insert(offset, entry);
                self.ends.waiting.insert(offset);
            }
        }
    }

    /// The server delivered this; returns the key of the delivery. Everything of it is handed out: what was asked for an
    /// earlier delivery of the same message is answered for that one.
    pub(crate) fn on_delivered(
        &mut self,
        ranges: &[(u64, u64)],
        handle: &Bytes,
        lease: Duration,
        now: Instant,
    ) -> u64 {
        let first = ranges.first().map_or(0, |range| range.0);
        let last = ranges.last().map_or(0, |range| range.1);
        let key = match &self.fresh {
            Some((key, of)) if first >= self.frontier && of == handle => *key,
            _ => {
                self.next_key += 1;
                self.next_key
            }
        };
        if first >= self.frontier {
            self.fresh = Some((key, handle.clone()));
        }
        self.frontier = self.frontier.max(last.saturating_add(1));
        for range in ranges {
            self.holds.insert(*range, key, handle, lease, now);
            self.on_delivered_again(*range);
        }
        key
    }

    /// A release that is on its way has had its effect, whatever comes first: its answer or the next delivery. An accept of an
    /// earlier delivery, whose answer got lost, had none: what is settled does not come again.
    fn on_delivered_again(&mut self, (first, last): (u64, u64)) {
        for (_, entry) in self.ends.entries.range_mut(first..=last) {
            entry.uncertain &= entry.ask != Ask::Accept;
        }
        let released = |entry: &Entry| {
            let asked = entry.sent.is_some() || entry.waiters.is_empty();
            matches!(entry.ask, Ask::Release { .. }) && asked
        };
        let inside = self.ends.entries.range(first..=last);
        let done: Vec<u64> =
            inside.filter(|(_, entry)| released(entry)).map(|(offset, _)| *offset).collect();
        for entry in done.into_iter().filter_map(|offset| self.ends.remove(offset)) {
            entry.answer(&Ok(()));
        }
    }

    /// Held no more, says the server: wishes that were not sent end, those on their way are answered by it. Returns what
    /// was held until now, and the highest key that is meant.
    pub(crate) fn on_revoked(
        &mut self,
        ranges: &[OffsetRange],
        handle: &Bytes,
    ) -> (Vec<(u64, u64)>, u64) {
        let mut revoked = Vec::new();
        for range in ranges {
            revoked.extend(self.holds.take(range.first, range.last, |run| run.handle == *handle));
            for table in [&mut self.ends, &mut self.extends] {
                let gone = table.extract(|offset, entry| {
                    (range.first..=range.last).contains(&offset)
                        && entry.handle == *handle
                        && entry.sent.is_none()
                });
                for (_, entry) in gone {
                    entry.not_held();
                }
            }
        }
        (revoked, self.next_key)
    }

    /// Handed out: leased for as long as the application has asked.
    pub(crate) fn on_handed_out(&mut self, ranges: &[(u64, u64)], until: Instant) {
        self.holds.on_handed_out(ranges, until);
    }

    /// How often [`Self::renewal`] is to be asked; none while no lease is held.
    pub(crate) fn lease_tick(&self) -> Option<Duration> {
        self.holds.tick()
    }

    /// A frame that keeps leases from running out, if one is due.
    pub(crate) fn renewal(&mut self, now: Instant, slack: Duration) -> Option<Settle> {
        let (handle, ranges) = self.holds.due(now, slack)?;
        self.next_token += 1;
        self.tokens.insert(self.next_token, (Kind::Renewal, ranges.clone()));
        let verb = Verb::Extend(Extend { ranges, handle, lease_ms: 0 });
        Some(Settle { token: self.next_token, verb: Some(verb) })
    }

    /// The next frame to send, if anything waits.
    pub(crate) fn frame(&mut self) -> Option<Settle> {
        let token = self.next_token + 1;
        let (kind, ranges, verb) = self
            .up_to_verb(token)
            .or_else(|| {
                let (handle, ask, ranges) = self.ends.gather(token)?;
                Some((Kind::End, ranges.clone(), verb(ask, handle, ranges)))
            })
            .or_else(|| {
                let (handle, ask, ranges) = self.extends.gather(token)?;
                Some((Kind::Extend, ranges.clone(), verb(ask, handle, ranges)))
            })?;
        self.next_token = token;
        self.tokens.insert(token, (kind, ranges));
        Some(Settle { token, verb: Some(verb) })
    }

    /// Only the highest is sent: it covers the others.
    fn up_to_verb(&mut self, token: u64) -> Option<(Kind, Vec<OffsetRange>, Verb)> {
        let offset = *self.ups.waiting.last()?;
        let handle = self.ups.entries.get(&offset)?.handle.clone();
        for covered in std::mem::take(&mut self.ups.waiting) {
            if let Some(entry) = self.ups.entries.get_mut(&covered) {
                entry.sent = Some(token);
            }
        }
        let ranges = vec![OffsetRange { first: 0, last: offset }];
        Some((Kind::Up, ranges, Verb::AcceptUpTo(AcceptUpTo { offset, handle })))
    }

    /// The frame with this token is durable (C3).
    pub(crate) fn on_settled(&mut self, token: u64, mark_delete_next: u64, now: Instant) {
        let Some((kind, ranges)) = self.tokens.remove(&token) else { return };
        for (offset, entry) in self.take(kind, token, &ranges) {
            match &entry.ask {
                Ask::Extend(ms) => {
                    self.holds.on_extended(offset, entry.key, millis(*ms), now);
                }
                Ask::AcceptUpTo => drop(self.holds.take(0, offset, |_| true)),
                _ => drop(self.holds.take(offset, offset, |run| run.key == entry.key)),
            }
            entry.answer(&Ok(()));
        }
        self.settled_below(mark_delete_next);
    }

    /// The frame with this token was refused. For now: it is tried again. As one of several that may not all be held: in
    /// halves. Else its wishes fail.
    pub(crate) fn on_refused(&mut self, token: u64, error: &Error, now: Instant) {
        let Some((kind, ranges)) = self.tokens.remove(&token) else { return };
        if kind == Kind::Renewal {
            return self.holds.on_extension_refused(&ranges, now);
        }
        let again = error.retry() != Retry::Never;
        let not_held = error.reason() == Some(Reason::InvalidHandle);
        let offsets = self.table(kind).in_frame(token, &ranges);
        // Of those that were in it some may be answered by now: it could be one of them that it was refused for.
        let named =
            ranges.iter().map(|range| (range.last - range.first).saturating_add(1)).sum::<u64>();
        if again || (not_held && kind != Kind::Up && named > 1) {
            let half = if again { usize::MAX } else { offsets.len().div_ceil(2).max(1) };
            let table = self.table(kind);
            for offset in offsets {
                if let Some(entry) = table.entries.get_mut(&offset) {
                    entry.together_max = entry.together_max.min(half);
                }
                table.wait(offset);
            }
            return;
        }
        for (offset, entry) in self.take(kind, token, &ranges) {
            if not_held {
                self.holds.take(offset, offset, |run| run.key == entry.key);
                entry.not_held();
            } else {
                entry.answer(&Err(error.clone()));
            }
        }
    }

    fn table(&mut self, kind: Kind) -> &mut Table {
        match kind {
            Kind::End | Kind::Renewal => &mut self.ends,
            Kind::Up => &mut self.ups,
            Kind::Extend => &mut self.extends,
        }
    }

    /// Takes out what the frame with this token asked for.
    fn take(&mut self, kind: Kind, token: u64, ranges: &[OffsetRange]) -> Vec<(u64, Entry)> {
        if kind == Kind::Renewal {
            return Vec::new();
        }
        let table = self.table(kind);
        let offsets = table.in_frame(token, ranges);
        offsets.into_iter().filter_map(|offset| Some((offset, table.remove(offset)?))).collect()
    }

    fn settled_below(&mut self, mark_delete_next: u64) {
        self.mark_delete_next = mark_delete_next;
        let Some(last) = mark_delete_next.checked_sub(1) else { return };
        self.holds.take(0, last, |_| true);
        for table in [&mut self.ends, &mut self.ups, &mut self.extends] {
            let kept = table.entries.split_off(&mark_delete_next);
            for (offset, entry) in std::mem::replace(&mut table.entries, kept) {
                table.waiting.remove(&offset);
                match entry.ask {
                    Ask::Accept | Ask::AcceptUpTo => entry.answer(&Ok(())),
                    _ => entry.not_held(),
                }
            }
        }
    }

    /// Wishes whose time is over fail.
    pub(crate) fn expire(&mut self, now: Instant) {
        for table in [&mut self.ends, &mut self.ups, &mut self.extends] {
            for (_, entry) in table.extract(|_, entry| entry.deadline <= now) {
                let error = Error::Indeterminate("the settle was not confirmed in time".into());
                entry.answer(&Err(error));
            }
        }
    }

    /// Nothing can be settled any more.
    pub(crate) fn fail(&mut self, error: &Error) {
        for table in [&mut self.ends, &mut self.ups, &mut self.extends] {
            for (_, entry) in table.extract(|_, _| true) {
                entry.answer(&Err(error.clone()));
            }
        }
    }

    /// Whether everything that was asked is answered. What is given back unseen was asked by nobody: who leaves gives it back.
    pub(crate) fn is_empty(&self) -> bool {
        let tables = [&self.ends, &self.ups, &self.extends];
        tables.iter().flat_map(|table| table.entries.values()).all(|entry| entry.waiters.is_empty())
    }

    /// Frames of the application's wishes sent and not answered.
    pub(crate) fn in_flight(&self) -> usize {
        self.tokens.values().filter(|(kind, _)| *kind != Kind::Renewal).count()
    }
}

fn verb(ask: Ask, handle: Bytes, ranges: Vec<OffsetRange>) -> Verb {
    match ask {
        Ask::Accept | Ask::AcceptUpTo => Verb::Accept(Accept { ranges, handle }),
        Ask::Release { delay_ms, counts } => {
            Verb::Release(Release { ranges, handle, delay_ms, counts })
        }
        Ask::Reject(reason) => Verb::Reject(Reject { ranges, handle, reason: reason.to_string() }),
        Ask::Extend(lease_ms) => Verb::Extend(Extend { ranges, handle, lease_ms }),
    }
}

/// A time that a server, or an application, names: no longer than a clock can add.
pub(super) fn millis(ms: u64) -> Duration {
    const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);
    Duration::from_millis(ms).min(LONGEST)
}

#[cfg(test)]
#[path = "settles_tests.rs"]
mod tests;
