//! Order per key. A message is first delivered only when no earlier one of its key hash waits or is with another consumer
//! than the one that has the hash; a hash whose range moved goes on once its former consumer holds nothing of it (L5).

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{KeyRange, rebalanced},
    Batch, Change, Core, Delivery, Kind, State,
    deliver::RUNS_MAX,
    records::What,
};

/// Messages below the frontier that are looked past because their consumer or key is not ready.
const LOOK_PAST_MAX: u64 = 20_000;

/// What is known of keys. Empty but for key-shared subscriptions.
#[derive(Debug)]
pub(super) struct Keys {
    /// In force: durable (L5).
    pub(super) table: Vec<KeyRange>,
    pub(super) recording: bool,
    /// Who is there, or in grace, may have changed.
    pub(super) dirty: bool,
    /// The table with the consumers that are known, by the last hash of each range.
    owners: Vec<(u32, Option<u64>)>,
    /// Of every unsettled message below the frontier.
    hash_of: BTreeMap<u64, u32>,
    /// (hash, offset) of what is with a consumer.
    held: BTreeSet<(u32, u64)>,
    /// (hash, offset) of what is not, and comes before anything later of its hash.
    waiting: BTreeSet<(u32, u64)>,
    /// Per hash: the consumer and the offset that it may get now.
    head_of: BTreeMap<u32, (u64, u64)>,
    heads: BTreeSet<(u64, u64)>,
    /// From here on a handle of an earlier owner stands for nothing: the attempt of a message ended whose key is not known yet,
    /// and what comes after it may be of the same.
    pub(super) doubt: u64,
}

impl Keys {
    pub(super) fn new(table: Vec<KeyRange>) -> Self {
        Self {
            table,
            recording: false,
            dirty: true,
            owners: Vec::new(),
            hash_of: BTreeMap::new(),
            held: BTreeSet::new(),
            waiting: BTreeSet::new(),
            head_of: BTreeMap::new(),
            heads: BTreeSet::new(),
            doubt: u64::MAX,
        }
    }

    fn owner(&self, hash: u32) -> Option<u64> {
        let at = self.owners.partition_point(|(last, _)| *last < hash);
        self.owners.get(at).and_then(|(_, consumer)| *consumer)
    }

    fn waits(&self, hash: u32) -> Option<u64> {
        self.waiting.range((hash, 0)..=(hash, u64::MAX)).next().map(|(_, offset)| *offset)
    }

    fn held_of(&self, hash: u32) -> Option<u64> {
        self.held.range((hash, 0)..=(hash, u64::MAX)).next().map(|(_, offset)| *offset)
    }

    /// Who may get this offset now; none: an earlier one of its key comes first, or nobody has its hash.
    pub(super) fn head_owner(&self, offset: u64) -> Option<u64> {
        let head = self.hash_of.get(&offset).and_then(|hash| self.head_of.get(hash))?;
        (head.1 == offset).then_some(head.0)
    }
}

impl<B: Batch> Core<B> {
    /// Offsets got this state.
    pub(super) fn keys_changed(&mut self, start: u64, end: u64, state: Option<State>) {
        if self.policy.kind != Kind::KeyShared {
            return;
        }
        // A settle of one that left may fail yet: what comes after waits for it.
        let left = match state {
            Some(State::Settling { by, .. }) => !self.consumers.contains_key(&by),
            _ => false,
        };
        let of: Vec<(u64, u32)> =
            self.keys.hash_of.range(start..end).map(|(offset, hash)| (*offset, *hash)).collect();
        for (offset, hash) in &of {
            let key = (*hash, *offset);
            self.keys.held.remove(&key);
            self.keys.waiting.remove(&key);
            match state {
                Some(State::Held { .. } | State::Settling { accept: true, .. }) if !left => {
                    self.keys.held.insert(key);
                }
                Some(State::Dead | State::Gone) | None => {
                    self.keys.hash_of.remove(offset);
                }
                Some(_) => {
                    self.keys.waiting.insert(key);
                }
            }
        }
        for (_, hash) in of {
            self.find_head(hash);
        }
    }

    /// Who holds messages of this hash.
    fn holder(&self, hash: u32) -> Option<u64> {
        let held = self.keys.held_of(hash)?;
        match self.states.get(held)?.2 {
            State::Held { by, .. } | State::Settling { by, .. } => Some(by),
            _ => None,
        }
    }

    /// Who holds an earlier message of this one's key.
    pub(super) fn key_holder(&self, offset: u64) -> Option<u64> {
        self.holder(*self.keys.hash_of.get(&offset)?)
    }

    fn find_head(&mut self, hash: u32) {
        let head = self.head(hash);
        let keys = &mut self.keys;
        let before = match head {
            Some(head) => keys.head_of.insert(hash, head),
            None => keys.head_of.remove(&hash),
        };
        if let Some(before) = before.filter(|before| Some(*before) != head) {
            keys.heads.remove(&before);
        }
        keys.heads.extend(head);
    }

    fn head(&self, hash: u32) -> Option<(u64, u64)> {
        let first = self.keys.waits(hash)?;
        let owner = self.keys.owner(hash)?;
        let ready = matches!(self.states.get(first)?.2, State::Ready { .. });
        let free = self.holder(hash).is_none_or(|holder| holder == owner);
        (ready && free).then_some((owner, first))
    }

    /// Consumers, or the table, changed.
    pub(super) fn refresh_owners(&mut self) {
        if self.policy.kind != Kind::KeyShared {
            return;
        }
        let ids: BTreeMap<&str, u64> =
            self.consumers.iter().map(|(id, consumer)| (consumer.name.as_str(), *id)).collect();
        let owner = |range: &KeyRange| (range.last, ids.get(range.consumer.as_str()).copied());
        let owners: Vec<_> = self.keys.table.iter().map(owner).collect();
        if owners == self.keys.owners {
            return;
        }
        self.keys.owners = owners;
        let hashes: BTreeSet<u32> = self.keys.waiting.iter().map(|(hash, _)| *hash).collect();
        for hash in hashes {
            self.find_head(hash);
        }
    }

    /// L5: the table follows those who are there, or may come back; it is durable before it takes effect.
    pub(super) fn settle_table(&mut self) {
        let wait = !self.keys.dirty || self.keys.recording || self.record_failed;
        if self.policy.kind != Kind::KeyShared || wait || self.stopping {
            return;
        }
        self.keys.dirty = false;
        let mut members: BTreeSet<&str> =
            self.consumers.values().map(|consumer| consumer.name.as_str()).collect();
        if self.now_ms < self.grace_until {
            members.extend(self.keys.table.iter().map(|range| range.consumer.as_str()));
        }
        if members.is_empty() {
            return; // it stands for those who come next
        }
        let members: Vec<&str> = members.into_iter().collect();
        let table = rebalanced(&self.keys.table, &members);
        if table != self.keys.table {
            self.keys.recording = true;
            self.record(What::Keys(table.clone()), Change::Keys(table));
        }
    }

    pub(super) fn table_recorded(&mut self, table: Option<Vec<KeyRange>>) {
        self.keys.recording = false;
        self.keys.dirty = true;
        if let Some(table) = table {
            self.tally.key_ranges_moved += moved(&self.keys.table, &table);
            self.keys.table = table;
            self.refresh_owners();
        }
    }

    /// The next messages of keys that were held up, for a consumer with room.
    pub(super) fn deliver_ready_keys(&mut self) -> Option<Delivery<B>> {
        let after = self.consumers.range(self.turn.saturating_add(1)..);
        let turn: Vec<u64> =
            after.chain(self.consumers.range(..=self.turn)).map(|(id, _)| *id).collect();
        for consumer in turn {
            let heads = &self.keys.heads;
            let Some((_, first)) =
                heads.range((consumer, 0)..=(consumer, u64::MAX)).next().copied()
            else {
                continue;
            };
            let room = self.room(&self.consumers[&consumer]);
            if room == 0 {
                continue;
            }
            let Some(batch) = self.at_hand(first) else {
                self.replay_wanted.get_or_insert(first);
                continue;
            };
            let Some((_, _, State::Ready { attempt })) = self.states.get(first) else { continue };
            let (until, mut runs, mut messages) = (self.lease_until(consumer), Vec::new(), 0);
            while messages < room
                && runs.len() < RUNS_MAX
                && let Some(offset) = self.head_in(consumer, attempt, &batch)
            {
                self.put(offset, offset + 1, Some(State::Held { by: consumer, attempt, until }));
                runs.push((offset, offset + 1));
                messages += 1;
            }
            return Some(self.give(consumer, batch, joined(runs), attempt));
        }
        None
    }

    fn head_in(&self, consumer: u64, attempt: u32, batch: &B) -> Option<u64> {
        let heads = self.keys.heads.range((consumer, batch.base())..(consumer, batch.end()));
        let mut offsets = heads.map(|(_, offset)| *offset);
        offsets.find(|offset| {
            self.states.get(*offset).is_some_and(|run| run.2 == State::Ready { attempt })
        })
    }

    /// Looks through the next batches, until one has something for somebody.
    pub(super) fn scan_keys(&mut self) {
        while self.out.is_empty() && self.scan_batch() {}
    }

    /// Looks through the next batch: each of its messages goes to the consumer that has its hash, or waits for it. False: there
    /// is none, or nobody to look for.
    fn scan_batch(&mut self) -> bool {
        let rooms = self.consumers.iter().map(|(id, consumer)| (*id, self.room(consumer)));
        let mut rooms: BTreeMap<u64, u64> = rooms.filter(|(_, room)| *room > 0).collect();
        if rooms.is_empty() || self.looked_too_far() || self.keys.table.is_empty() {
            return false;
        }
        let Some(batch) = self.queue.front().cloned() else { return false };
        let mut left = self.limits.unacked_messages_max.saturating_sub(self.unacked);
        let mut given: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
        let mut offset = self.frontier.max(batch.base());
        while offset < batch.end() {
            offset = self.settled.next_outside(offset);
            if offset >= batch.end() {
                break;
            }
            let at = (offset - batch.base()) as u32;
            let hash = batch.key_hash(at);
            let known = self.states.get(offset).map(|run| run.2);
            if !matches!(known, Some(State::Dead | State::Gone)) {
                self.keys.hash_of.insert(offset, hash);
            }
            let state = match known {
                Some(_) => known,
                None => {
                    let due = batch.deliver_at(at);
                    let owner = self.keys.owner(hash).filter(|_| left > 0);
                    let room = owner.and_then(|owner| rooms.get_mut(&owner));
                    let free = due <= self.now_ms && self.keys.waits(hash).is_none();
                    match (owner, room) {
                        (Some(by), Some(room))
                            if free && *room > 0 && self.holder(hash).is_none_or(|h| h == by) =>
                        {
                            *room -= 1;
                            left -= 1;
                            given.entry(by).or_default().push((offset, offset + 1));
                            let until = self.lease_until(by);
                            Some(State::Held { by, attempt: 1, until })
                        }
                        _ => Some(self.parked_state(1, due)),
                    }
                }
            };
            if known.is_some() {
                self.keys_changed(offset, offset + 1, state);
            } else {
                self.put(offset, offset + 1, state);
            }
            offset += 1;
        }
        self.frontier = batch.end();
        self.pop();
        for (consumer, runs) in given {
            for runs in joined(runs).chunks(RUNS_MAX) {
                let delivery = self.give(consumer, batch.clone(), runs.to_vec(), 1);
                self.out.push_back(super::Action::Deliver(delivery));
            }
        }
        let held: u64 = self.replay.iter().map(Batch::bytes).sum();
        let ready = self.ready.next_inside(batch.base()).is_some_and(|at| at < batch.end());
        if ready && held + batch.bytes() <= self.limits.read_ahead_bytes_max {
            self.replay.push_back(batch);
        }
        true
    }

    /// Whether as many messages as may be are held up by keys and their consumers.
    pub(super) fn looked_too_far(&self) -> bool {
        self.ready.len() >= LOOK_PAST_MAX || self.full()
    }

    /// What a consumer holds of the keys of these messages, and came after them: it comes again, after them.
    pub(super) fn revoke_followers(&mut self, runs: &[(u64, u64, State)]) {
        if self.policy.kind != Kind::KeyShared {
            return;
        }
        let mut later = Vec::new();
        for (start, end, state) in runs {
            if (self.keys.hash_of.range(*start..*end).count() as u64) < end - start {
                self.doubt_followers(*start, *end, *state);
            }
            for (offset, hash) in self.keys.hash_of.range(*start..*end) {
                let after = (*hash, offset + 1)..=(*hash, u64::MAX);
                later.extend(self.keys.held.range(after).map(|(_, offset)| *offset));
            }
        }
        later.sort_unstable();
        later.dedup();
        for offset in later {
            if let Some((_, _, state @ State::Held { .. })) = self.states.get(offset) {
                self.revoke(&[(offset, offset + 1, state)]);
            }
        }
    }

    /// The keys of these messages are not known (they were claimed, and not read since): whatever their consumer holds behind
    /// them may be of the same.
    fn doubt_followers(&mut self, start: u64, end: u64, state: State) {
        self.keys.doubt = self.keys.doubt.min(start);
        if let State::Held { by, .. } | State::Settling { by, .. } = state {
            let held = |state| matches!(state, State::Held { by: other, .. } if other == by);
            let behind = self.runs_where(end, u64::MAX, held);
            self.revoke(&behind);
        }
    }

    /// Whether another consumer than the one that holds this offset holds something of its hash.
    fn shares_key(&self, offset: u64, hash: u32) -> bool {
        let by = |offset: u64| match self.states.get(offset) {
            Some((_, _, State::Held { by, .. } | State::Settling { by, .. })) => Some(by),
            _ => None,
        };
        let mine = by(offset);
        let mut of_key = self.keys.held.range((hash, 0)..=(hash, u64::MAX));
        of_key.any(|(_, other)| by(*other) != mine)
    }

    /// Held again, because a settle was not recorded: not if an earlier one of its key was given back meanwhile, or another
    /// consumer got something of its key.
    pub(super) fn revoke_behind(&mut self, start: u64, end: u64) {
        let behind: Vec<u64> = self
            .keys
            .hash_of
            .range(start..end)
            .filter(|(offset, hash)| {
                let behind = self.keys.waits(**hash).is_some_and(|first| first < **offset);
                behind || self.shares_key(**offset, **hash)
            })
            .map(|(offset, _)| *offset)
            .collect();
        for offset in behind {
            if let Some((_, _, state @ State::Held { .. })) = self.states.get(offset) {
                let run = [(offset, offset + 1, state)];
                self.revoke(&run);
                self.revoke_followers(&run);
            }
        }
    }

    pub(super) fn forget_keys(&mut self) {
        let keys = &mut self.keys;
        keys.hash_of.clear();
        keys.held.clear();
        keys.waiting.clear();
        keys.head_of.clear();
        keys.heads.clear();
    }
}

fn joined(runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    let mut runs = runs;
    runs.sort_unstable();
    for (start, end) in runs {
        match joined.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => joined.push((start, end)),
        }
    }
    joined
}

/// Ranges of the new table that had another consumer before.
fn moved(before: &[KeyRange], after: &[KeyRange]) -> u64 {
    let other = |range: &&KeyRange| {
        super::super::hash_owner(before, range.first).is_some_and(|owner| owner != range.consumer)
    };
    after.iter().filter(other).count() as u64
}
