//! The writer's core on a seeded scheduler: bookies that fail, answers in any order, registrations that come and go,
//! ensemble changes that land late. Every acknowledgement is checked against what bookies really hold and what the store
//! really says.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{
    metadata::{Holder, LedgerOwner, LedgerState, Nonce},
    quorum::Quorum,
    settle::listing_op,
};
use geminga_metadata::Revision;
use geminga_proto::ids::{Epoch, LedgerId, SegmentId, TopicId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Good,
    ReadOnly,
    /// Does the work, its answer is lost.
    Mute,
    Dead,
}

struct Bookie {
    mode: Mode,
    held: BTreeSet<EntryId>,
}

struct Sim {
    random: Random,
    now: Instant,
    core: WriterCore,
    bookies: BTreeMap<u32, Bookie>,
    stored: Versioned<LedgerMetadata>,
    in_flight: Vec<(EntryId, Slot, Incarnation)>,
    look: Option<bool>,
    /// A change not yet in the store; then one whose outcome is not yet told.
    commit: Option<ChangePlan>,
    landed: bool,
    digests: BTreeMap<EntryId, u32>,
    confirmed: u64,
    failed: Option<AppendError>,
    poisoned: bool,
    listed: bool,
    sealed: Option<(Option<EntryId>, bool)>,
    /// OKs that the writer was told.
    told: BTreeSet<(EntryId, usize, Incarnation)>,
    /// Bytes of entries that are not released.
    unreleased: BTreeMap<EntryId, usize>,
    /// Entries released while nothing was given up, hence after all their answers.
    released_whole: u64,
    /// The claim is provisional; and how often a listing had to wait for that to end.
    provisional: bool,
    listings_owed: u64,
}

impl Sim {
    fn new(seed: u64, quorum: Quorum, bookies: u32) -> Option<Self> {
        let random = Random::from_seed(seed);
        let now = Instant::now();
        let free = |i| Available {
            incarnation: Incarnation(i),
            writable: true,
            draining: false,
            limbo: None,
            disk_free: 1,
            zone: String::new(),
        };
        let first = 1 + random.below(2) as u32; // perhaps one is not there yet: a slot may stay vacant
        let all: Vec<Available> = (first..=bookies).map(free).collect();
        let id = LedgerId(1);
        let slots = ensemble::choose(quorum, &all, LedgerAge::new(id, None), &random).ok()?;
        let fragment = Fragment { first_entry: EntryId(0), nonce: Nonce([0; 16]), slots };
        let segment = SegmentId { topic: TopicId(1), segment: 0 };
        let metadata = LedgerMetadata {
            id,
            state: LedgerState::Open,
            quorum,
            fragments: vec![fragment],
            owner: LedgerOwner { segment, epoch: Epoch(1) },
        };
        let stored = Versioned::created(metadata, Revision(1));
        let config =
            LedgerClientConfig { writer_bytes_max: 2_000, ..LedgerClientConfig::default() };
        let bookie = |i| (i, Bookie { mode: Mode::Good, held: BTreeSet::new() });
        Some(Self {
            core: WriterCore::new(stored.clone(), Arc::new(config), now),
            bookies: (1..=bookies).map(bookie).collect(),
            random,
            now,
            stored,
            in_flight: Vec::new(),
            look: None,
            commit: None,
            landed: false,
            digests: BTreeMap::new(),
            confirmed: 0,
            failed: None,
            poisoned: false,
            listed: false,
            sealed: None,
            told: BTreeSet::new(),
            unreleased: BTreeMap::new(),
            released_whole: 0,
            provisional: false,
            listings_owed: 0,
        })
    }

    fn step(&mut self) {
        match self.random.below(13) {
            0 | 1 => {
                if self.core.held_bytes() < 2_000 {
                    let body =
                        Payload::from(Bytes::from(vec![7u8; self.random.below(100) as usize]));
                    let bytes = body.len() + crate::entry::ENTRY_HEADER_BYTES;
                    if let Some(id) = self.core.push(body, self.now) {
                        self.unreleased.insert(id, bytes);
                    }
                }
            }
            2..=7 => self.deliver(),
            8 => {
                let which = 1 + self.random.below(self.bookies.len() as u64) as u32;
                let modes =
                    [Mode::Good, Mode::Good, Mode::Good, Mode::ReadOnly, Mode::Mute, Mode::Dead];
                let mode = modes[self.random.below(modes.len() as u64) as usize];
                self.bookies.get_mut(&which).expect("there").mode = mode;
            }
            9 => {
                self.now += Duration::from_millis(
                    [1, 30, 500, 3_000, 20_000][self.random.below(5) as usize],
                );
                self.tick();
            }
            10 => self.answer_look(),
            11 => self.move_commit(),
            _ => {
                if self.random.chance(0.1) {
                    self.stand(self.provisional);
                }
            }
        }
        self.take_actions();
    }

    fn tick(&mut self) {
        if self.core.next_timer().is_some_and(|at| at <= self.now) {
            self.core.on_timer(self.now);
            let next = self.core.next_timer();
            assert!(next.is_none_or(|at| at > self.now), "its owner would turn without end");
        }
    }

    fn stand(&mut self, confirmed: bool) {
        let owed = self.core.listing_owed();
        assert!(self.provisional || !owed, "a listing waits for nothing else");
        self.listings_owed += u64::from(owed && confirmed);
        self.provisional = !confirmed;
        self.core.on_standing(confirmed, self.now);
        let lists = |action: &Action| matches!(action, Action::List);
        if owed && confirmed && !self.poisoned {
            assert!(self.core.actions.iter().any(lists), "the listing follows (EC7)");
        }
    }

    fn deliver(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        let at = self.random.below(self.in_flight.len() as u64) as usize;
        let (entry, slot, to) = self.in_flight.swap_remove(at);
        let bookie = self.bookies.get_mut(&to.0).expect("sent to one that exists");
        if matches!(bookie.mode, Mode::Good | Mode::Mute) {
            bookie.held.insert(entry);
        }
        let answer = match bookie.mode {
            Mode::Good => {
                self.told.insert((entry, slot.0, to));
                AddAnswer::Ok
            }
            Mode::ReadOnly => AddAnswer::ReadOnly,
            Mode::Mute | Mode::Dead => AddAnswer::Unknown(Unknown::Timeout),
        };
        self.core.on_answered(entry, slot, to, answer, self.now);
    }

    fn answer_look(&mut self) {
        let Some(hint) = self.look.take() else { return };
        let writable = |(i, bookie): (&u32, &Bookie)| Available {
            incarnation: Incarnation(*i),
            writable: bookie.mode == Mode::Good,
            draining: false,
            limbo: None,
            disk_free: 1,
            zone: String::new(),
        };
        let all: Vec<Available> = self.bookies.iter().map(writable).collect();
        let answer = if self.random.chance(0.1) { Err(()) } else { Ok(&all[..]) };
        self.core.on_candidates(answer, hint, &self.random, self.now);
    }

    /// A change lands in the store at one step, its caller hears of it at another.
    fn move_commit(&mut self) {
        let Some(plan) = &self.commit else { return };
        if !self.landed {
            let ended = self.stored.value.last_fragment().clone();
            let mut next = self.stored.value.clone();
            if ended.first_entry == plan.fragment.first_entry {
                next.fragments.pop();
            } else if !plan.list {
                self.assert_complete(
                    ended.first_entry,
                    plan.fragment.first_entry,
                    "EC3: not listed",
                );
            }
            next.fragments.push(plan.fragment.clone());
            assert_eq!(next.validate(), Ok(()), "I9");
            self.listed |= plan.list;
            let revision = Revision(self.stored.mod_revision.0 + 1);
            self.stored = self.stored.changed(next, revision);
            self.landed = true;
        } else {
            self.commit = None;
            self.landed = false;
            self.core.on_change(ChangeOutcome::Landed(self.stored.clone()), self.now);
        }
    }

    fn holders(&self, entry: EntryId) -> (usize, usize) {
        let fragment = self.stored.value.fragment_of(entry);
        let slots = self.stored.value.write_set(entry);
        let holds =
            |holder: Holder| holder.is_some_and(|i| self.bookies[&i.0].held.contains(&entry));
        (slots.iter().filter(|slot| holds(fragment.holder(**slot))).count(), slots.len())
    }

    fn assert_complete(&self, first: EntryId, end: EntryId, rule: &str) {
        for entry in (first.0..end.0).map(EntryId) {
            let (held, all) = self.holders(entry);
            assert_eq!(held, all, "{rule}: entry {entry}");
        }
    }

    /// W5: memory is given back once, and only when every slot that is not vacant answered, or was given up and listed.
    fn assert_released(&mut self, entry: EntryId) {
        assert!(self.unreleased.remove(&entry).is_some(), "released once");
        if self.failed.is_some() {
            return; // its caller was told the worst
        }
        assert!(entry.0 < self.confirmed, "an entry that is not acknowledged is kept");
        if self.listed || self.core.listing_owed() {
            return;
        }
        let fragment = self.core.metadata().value.fragment_of(entry).clone();
        for slot in self.core.metadata().value.write_set(entry) {
            let Some(holder) = fragment.holder(slot) else { continue };
            assert!(self.told.contains(&(entry, slot.0, holder)), "W5: entry {entry} {slot:?}");
        }
        self.released_whole += 1;
    }

    fn take_actions(&mut self) {
        self.take_each_action();
        if self.sealed.is_none() {
            let held: usize = self.unreleased.values().sum();
            assert_eq!(self.core.held_bytes(), held, "W5");
        }
    }

    fn take_each_action(&mut self) {
        for action in self.core.take_actions() {
            match action {
                Action::Send { entry, slot, to } => {
                    let first = *self.digests.entry(entry.id).or_insert(entry.digest);
                    assert_eq!(first, entry.digest, "bytes are frozen at the first send (T44)");
                    assert!(
                        entry.lac.is_none_or(|lac| lac.0 < self.confirmed),
                        "its lac was acknowledged"
                    );
                    let holder = self.core.metadata().value.last_fragment().holder(slot);
                    assert_eq!(holder, Some(to));
                    self.in_flight.push((entry.id, slot, to));
                }
                Action::Confirm { entry } => {
                    assert_eq!(entry, EntryId(self.confirmed), "in order, no hole (W2)");
                    assert!(self.commit.is_none(), "nothing is acknowledged during a change (EC2)");
                    assert!(!self.poisoned && self.sealed.is_none(), "W6");
                    let (held, _) = self.holders(entry);
                    assert!(
                        held >= self.stored.value.quorum.ack(),
                        "I4 by the store's metadata: entry {entry}"
                    );
                    self.confirmed += 1;
                }
                Action::FailPending(error) => self.failed = Some(error),
                Action::Look { hint } => {
                    assert!(!self.provisional, "O3: nothing is looked for");
                    self.look = Some(hint);
                }
                Action::Commit(plan) => {
                    assert!(!self.provisional, "O3: no change is started");
                    assert!(self.commit.is_none(), "one at a time (EC2)");
                    assert_eq!(plan.fragment.first_entry, EntryId(self.confirmed), "LAC+1 (EC3)");
                    self.commit = Some(plan);
                }
                Action::List => {
                    assert!(!self.provisional, "O3: the listing follows later");
                    drop(listing_op(self.stored.value.id, "test"));
                    self.listed = true;
                }
                Action::WriteLac { lac, .. } => assert!(lac.0 < self.confirmed),
                Action::Poisoned(_) => self.poisoned = true,
                Action::Release { entry } => self.assert_released(entry),
                Action::Sealed { last, short, .. } => {
                    assert!(self.commit.is_none(), "never while a change is unsettled (MD3)");
                    self.sealed = Some((last, short));
                }
            }
        }
    }

    fn heal(&mut self) {
        self.stand(true);
        for bookie in self.bookies.values_mut() {
            bookie.mode = Mode::Good;
        }
    }

    /// Every answer that is due comes, and a moment passes.
    fn turn(&mut self) {
        for turn in [Self::deliver, Self::answer_look, Self::move_commit] {
            turn(self);
            self.take_actions();
        }
        self.now += Duration::from_millis(100);
        self.tick();
        self.take_actions();
    }

    /// Everything heals and nobody asks for anything: whatever the writer took up it brings to an end.
    fn settle(&mut self) {
        self.heal();
        for _ in 0..10_000 {
            if self.poisoned
                || (self.core.is_idle() && self.confirmed == self.core.entries_pushed())
            {
                break;
            }
            self.turn();
        }
        if !self.poisoned {
            assert_eq!(self.confirmed, self.core.entries_pushed(), "acknowledged after healing");
            assert_eq!(self.core.held_bytes(), 0, "and its memory is free (W5)");
        }
    }

    /// Everything heals; the writer seals.
    fn finish(&mut self) {
        self.heal();
        self.core.seal(self.now);
        self.take_actions();
        for _ in 0..10_000 {
            if self.sealed.is_some() {
                break;
            }
            self.turn();
        }
        let (last, short) = self.sealed.expect("a close ends in bounded time");
        assert_eq!(last.map_or(0, |last| last.0 + 1), self.confirmed, "last = LAC");
        for entry in (0..self.confirmed).map(EntryId) {
            let (held, _) = self.holders(entry);
            assert!(held >= self.stored.value.quorum.ack(), "I4: entry {entry}");
        }
        let closed = self.stored.value.closed(last, 0);
        if !short && !closed.has_vacancy() && !self.listed {
            self.assert_complete(
                EntryId(0),
                EntryId(self.confirmed),
                "I5: short, and nowhere listed",
            );
        }
        // What in-flight adds still come changes nothing any more.
        while !self.in_flight.is_empty() {
            self.deliver();
            self.take_actions();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn an_acknowledged_entry_is_on_qa_bookies_that_the_store_names(
        seed: u64,
        shape in prop::sample::select(vec![(3, 3, 2), (3, 3, 3), (3, 2, 2), (4, 3, 2), (5, 3, 2), (1, 1, 1), (2, 2, 1)]),
        more in 0u32..3,
        steps in 1usize..600,
    ) {
        let quorum = Quorum::new(shape.0, shape.1, shape.2).expect("valid");
        if let Some(mut sim) = Sim::new(seed, quorum, shape.0 as u32 + more) {
            for _ in 0..steps {
                sim.step();
            }
            sim.finish();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn once_all_bookies_answer_every_entry_is_acknowledged_and_released(
        seed: u64,
        shape in prop::sample::select(vec![(3, 3, 2), (3, 3, 3), (4, 3, 2), (5, 5, 4), (2, 2, 1)]),
        more in 0u32..3,
        steps in 1usize..400,
    ) {
        let quorum = Quorum::new(shape.0, shape.1, shape.2).expect("valid");
        if let Some(mut sim) = Sim::new(seed, quorum, shape.0 as u32 + more) {
            for _ in 0..steps {
                sim.step();
            }
            sim.settle();
        }
    }
}

/// Guards against a simulation that proves nothing because nothing happens.
#[test]
fn the_simulation_reaches_changes_confirmations_and_failures() {
    let (mut changes, mut confirmed, mut failures, mut listings) = (0, 0, 0, 0);
    let (mut released, mut owed) = (0, 0);
    for seed in 0..200 {
        let mut sim = Sim::new(seed, Quorum::default(), 5).expect("enough");
        for _ in 0..500 {
            sim.step();
        }
        changes += sim.stored.value.fragments.len() - 1;
        confirmed += sim.confirmed;
        released += sim.released_whole;
        failures += usize::from(sim.failed == Some(AppendError::NotAcknowledged));
        listings += usize::from(sim.listed);
        owed += sim.listings_owed;
    }
    assert!(owed > 10, "{owed}");
    assert!(released > 500, "{released}");
    assert!(changes > 50, "{changes}");
    assert!(confirmed > 2_000, "{confirmed}");
    assert!(failures > 5, "{failures}");
    assert!(listings > 20, "{listings}");
}

/// Registered and writable.
fn available(bookie: &u32) -> Available {
    Available {
        incarnation: Incarnation(*bookie),
        writable: true,
        draining: false,
        limbo: None,
        disk_free: 1,
        zone: String::new(),
    }
}

/// A core over bookies 1..=3 (Qa = 3), and what a test tells it. Time stands still unless the test moves it.
struct Bench {
    core: WriterCore,
    now: Instant,
    random: Random,
}

impl Bench {
    fn new(ack: usize) -> Self {
        let sim = Sim::new(1, Quorum::new(3, 3, ack).expect("valid"), 5).expect("enough");
        let mut metadata = sim.stored;
        metadata.value.fragments[0].slots = (1..=3).map(|i| Some(Incarnation(i))).collect();
        let now = Instant::now();
        let config = Arc::new(LedgerClientConfig::default());
        let core = WriterCore::new(metadata, config, now);
        Self { core, now, random: Random::from_seed(1) }
    }

    /// Pushes one entry; returns its id.
    fn push(&mut self) -> EntryId {
        let pushed = self.core.push(Payload::from(Bytes::from_static(b"x")), self.now);
        pushed.expect("open")
    }

    fn answer(&mut self, id: EntryId, slot: usize, from: u32, answer: AddAnswer) {
        self.core.on_answered(id, Slot(slot), Incarnation(from), answer, self.now);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        while self.core.next_timer().is_some_and(|at| at <= self.now) {
            self.core.on_timer(self.now);
            let waits = |action: &Action| matches!(action, Action::Look { .. });
            if self.core.actions.iter().any(waits) {
                return;
            }
        }
    }

    /// Answers a look: these are registered and writable.
    fn candidates(&mut self, writable: &[u32]) {
        let all: Vec<Available> = writable.iter().map(available).collect();
        self.core.on_candidates(Ok(&all), false, &self.random, self.now);
    }

    /// The change that was asked for lands.
    fn land(&mut self) {
        let plan = self.core.take_actions().into_iter().find_map(|action| match action {
            Action::Commit(plan) => Some(plan),
            _ => None,
        });
        let plan = plan.expect("a change was asked for");
        let mut next = self.core.metadata().value.clone();
        if next.last_fragment().first_entry == plan.fragment.first_entry {
            next.fragments.pop();
        }
        next.fragments.push(plan.fragment);
        let landed = self.core.metadata().changed(next, Revision(9));
        self.core.on_change(ChangeOutcome::Landed(landed), self.now);
    }

    fn confirmed(&mut self) -> Vec<EntryId> {
        let confirmed = |action| match action {
            Action::Confirm { entry } => Some(entry),
            _ => None,
        };
        self.core.take_actions().into_iter().filter_map(confirmed).collect()
    }

    fn looks(&mut self) -> Vec<bool> {
        let look = |action| match action {
            Action::Look { hint } => Some(hint),
            _ => None,
        };
        self.core.take_actions().into_iter().filter_map(look).collect()
    }
}

/// EC5: what a replaced bookie says of an entry takes nothing from what its successor still owes.
#[test]
fn a_late_ok_of_a_replaced_bookie_does_not_spare_its_successor_the_entry() {
    let mut bench = Bench::new(3);
    let (first, second) = (bench.push(), bench.push());
    for id in [first, second] {
        bench.answer(id, 0, 1, AddAnswer::Ok);
        bench.answer(id, 1, 2, AddAnswer::Ok);
    }
    bench.answer(second, 2, 3, AddAnswer::ReadOnly);
    bench.candidates(&[1, 2, 4]);
    bench.land();
    for id in [first, second] {
        bench.answer(id, 2, 4, AddAnswer::Unknown(Unknown::Busy));
    }
    bench.answer(first, 2, 3, AddAnswer::Ok); // late, and counts for nothing (W4)
    assert_eq!(bench.confirmed(), []);
    bench.pass(Duration::from_millis(60));
    let sent = |bench: &mut Bench| -> Vec<EntryId> {
        let sent = |action| match action {
            Action::Send { entry, slot: Slot(2), to: Incarnation(4) } => Some(entry.id),
            _ => None,
        };
        bench.core.take_actions().into_iter().filter_map(sent).collect()
    };
    let probe = sent(&mut bench)[0];
    bench.answer(probe, 2, 4, AddAnswer::Ok);
    let rest = sent(&mut bench);
    assert_eq!([vec![probe], rest.clone()].concat(), [first, second], "both are sent again");
    for id in rest {
        bench.answer(id, 2, 4, AddAnswer::Ok);
    }
    assert_eq!(bench.core.lac(), Some(second));
    assert_eq!(bench.core.held_bytes(), 0);
}

/// EC1: while every pending write set can reach Qa, a timeout, BUSY or reset triggers nothing for 30 s.
#[test]
fn a_soft_failure_alone_triggers_nothing_for_30_s_and_then_a_change() {
    for soft in [Unknown::Timeout, Unknown::Busy, Unknown::Disconnected] {
        let mut bench = Bench::new(2);
        let id = bench.push();
        bench.answer(id, 0, 1, AddAnswer::Ok);
        bench.answer(id, 1, 2, AddAnswer::Ok);
        drop(bench.core.take_actions());
        bench.answer(id, 2, 3, AddAnswer::Unknown(soft.clone()));
        let failed_at = bench.now;
        let mut resent = 0;
        loop {
            bench.pass(Duration::from_millis(500));
            let mut looked = None;
            for action in bench.core.take_actions() {
                match action {
                    Action::Send { entry, slot, to } => {
                        assert_eq!((entry.id, slot, to), (id, Slot(2), Incarnation(3)));
                        resent += 1;
                        bench.answer(id, 2, 3, AddAnswer::Unknown(soft.clone()));
                    }
                    Action::Look { hint } => looked = Some(hint),
                    Action::Commit(_) | Action::List => panic!("nothing is triggered"),
                    _ => {}
                }
            }
            match looked {
                Some(false) => break,
                // A hint finds nobody worth a change: a failing slot is not wished away (T43).
                Some(true) => {
                    bench.core.on_candidates(Ok(&[]), true, &bench.random, bench.now);
                }
                None => {}
            }
        }
        assert!(resent > 10, "sent again to the same incarnation, {resent} times");
        let waited = bench.now - failed_at;
        assert!((30..=31).contains(&waited.as_secs()), "{soft:?}: {waited:?}");
    }
}

/// EC1: a bookie much slower than its peers is replaced when another is there; while none is, nothing of it is given up.
#[test]
fn a_slow_bookie_is_replaced_once_another_can_take_its_place() {
    for spare in [&[][..], &[4]] {
        let mut bench = Bench::new(2);
        let mut owed: Vec<EntryId> = Vec::new();
        let mut hints = 0;
        for _ in 0..50 * 20 {
            let id = bench.push();
            owed.push(id);
            bench.now += Duration::from_millis(2);
            bench.answer(id, 0, 1, AddAnswer::Ok);
            bench.answer(id, 1, 2, AddAnswer::Ok);
            bench.now += Duration::from_millis(18);
            if owed.len() > 10 {
                bench.answer(owed.remove(0), 2, 3, AddAnswer::Ok); // 200 ms late
            }
            bench.pass(Duration::ZERO);
            let actions = bench.core.take_actions();
            assert!(!actions.iter().any(|action| matches!(action, Action::List)));
            if actions.iter().any(|action| matches!(action, Action::Look { hint: true })) {
                hints += 1;
                let available: Vec<Available> = spare.iter().map(available).collect();
                bench.core.on_candidates(Ok(&available), true, &bench.random, bench.now);
            }
            if bench.looks() == [false] {
                break;
            }
        }
        if spare.is_empty() {
            assert!(hints > 3, "it is looked for again and again");
            continue;
        }
        bench.candidates(spare);
        bench.land();
        let last = bench.core.metadata().value.last_fragment().clone();
        assert_eq!(last.slots, [1, 2, 4].map(|i| Some(Incarnation(i))));
    }
}

/// EC1: the same failures end in a look at once if a pending write set cannot reach Qa, and so does a bookie that says no.
#[test]
fn a_write_set_short_of_qa_or_a_bookie_that_takes_nothing_is_acted_on_at_once() {
    let mut bench = Bench::new(2);
    let id = bench.push();
    bench.answer(id, 1, 2, AddAnswer::Unknown(Unknown::Timeout));
    assert!(bench.looks().is_empty(), "two slots can still acknowledge");
    bench.answer(id, 2, 3, AddAnswer::Unknown(Unknown::Timeout));
    assert_eq!(bench.looks(), [false]);
    for hard in [
        AddAnswer::ReadOnly,
        AddAnswer::NoSpace,
        AddAnswer::Unknown(Unknown::WrongIncarnation),
        AddAnswer::Unknown(Unknown::Limbo),
    ] {
        let mut bench = Bench::new(2);
        let id = bench.push();
        bench.answer(id, 2, 3, hard.clone());
        assert_eq!(bench.looks(), [false], "{hard:?}");
    }
}

/// EC4, MD3: a change that did not come to stand poisons the handle; nothing recorded meanwhile is ever acknowledged.
#[test]
fn a_change_that_is_lost_or_unsettled_or_refused_acknowledges_nothing() {
    for (outcome, poison) in [
        (ChangeOutcome::Lost, Poison::Fenced),
        (ChangeOutcome::Unsettled, Poison::Stopped),
        (ChangeOutcome::Refused, Poison::WriteFailure),
    ] {
        let mut bench = Bench::new(2);
        let id = bench.push();
        bench.answer(id, 2, 3, AddAnswer::ReadOnly);
        bench.candidates(&[1, 2, 4]);
        bench.answer(id, 0, 1, AddAnswer::Ok);
        bench.answer(id, 1, 2, AddAnswer::Ok);
        bench.core.on_change(outcome, bench.now);
        assert_eq!(bench.core.poison(), Some(poison));
        assert_eq!(bench.confirmed(), [], "W6");
        assert_eq!(bench.core.lac(), None);
        assert_eq!(bench.core.push(Payload::default(), bench.now), None);
    }
}

/// MD3, section 6: while a change is unsettled the ledger does not close, however long that takes.
#[test]
fn no_close_while_a_change_is_unsettled() {
    let mut bench = Bench::new(2);
    let id = bench.push();
    bench.answer(id, 0, 1, AddAnswer::Ok);
    bench.answer(id, 1, 2, AddAnswer::Ok);
    bench.answer(id, 2, 3, AddAnswer::ReadOnly);
    bench.candidates(&[1, 2, 4]);
    bench.core.seal(bench.now);
    bench.pass(Duration::from_secs(3_600));
    let sealed =
        |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::Sealed { .. }));
    assert!(!sealed(&bench.core.actions), "all is acknowledged, and the change is still out");
    bench.land();
    bench.pass(Duration::from_secs(1));
    let actions = bench.core.take_actions();
    let end = actions.iter().find_map(|action| match action {
        Action::Sealed { last, short, .. } => Some((*last, *short)),
        _ => None,
    });
    assert_eq!(end, Some((Some(id), true)), "the ended fragment lacks a copy");
}

/// O3, EC7: a provisional claim counts as no replacement. What can reach Qa goes on, what is overdue is given up, and the
/// listing follows; then changes go on.
#[test]
fn on_a_provisional_claim_nothing_is_started_and_the_listing_follows() {
    let mut bench = Bench::new(2);
    bench.core.on_standing(false, bench.now);
    let id = bench.push();
    bench.answer(id, 0, 1, AddAnswer::Ok);
    bench.answer(id, 2, 3, AddAnswer::NoSpace); // calls for a replacement at once (EC1)
    assert!(bench.core.listing_owed());
    bench.answer(id, 1, 2, AddAnswer::Ok);
    let actions = bench.core.take_actions();
    assert!(!actions.iter().any(|a| matches!(a, Action::Look { .. } | Action::List)));
    assert_eq!(bench.core.lac(), Some(id), "goes on");
    assert_eq!(bench.core.held_bytes(), 0, "given up");
    for _ in 0..100 {
        bench.pass(Duration::from_secs(5));
        let id = bench.push();
        bench.answer(id, 0, 1, AddAnswer::Ok);
        bench.answer(id, 1, 2, AddAnswer::Ok);
    }
    let actions = bench.core.take_actions();
    assert!(!actions.iter().any(|a| matches!(a, Action::Look { .. } | Action::List)));
    bench.core.on_standing(true, bench.now);
    let actions = bench.core.take_actions();
    assert!(actions.iter().any(|a| matches!(a, Action::List)), "{actions:?}");
    assert!(actions.iter().any(|a| matches!(a, Action::Look { .. })), "{actions:?}");
    bench.candidates(&[1, 2, 4]);
    bench.land();
    let last = bench.core.metadata().value.last_fragment().clone();
    assert_eq!(last.slots, [1, 2, 4].map(|i| Some(Incarnation(i))));
}

/// O3: what cannot reach Qa waits for the store, however long, and has its patience afresh when it is back.
#[test]
fn on_a_provisional_claim_what_cannot_reach_qa_waits() {
    let mut bench = Bench::new(2);
    bench.core.on_standing(false, bench.now);
    let id = bench.push();
    drop(bench.core.take_actions());
    for (slot, from) in [(1, 2), (2, 3)] {
        bench.answer(id, slot, from, AddAnswer::Unknown(Unknown::Disconnected));
    }
    for _ in 0..100 {
        bench.pass(Duration::from_secs(60));
        let resent: Vec<(Slot, Incarnation)> = bench
            .core
            .take_actions()
            .into_iter()
            .filter_map(|action| match action {
                Action::Send { slot, to, .. } => Some((slot, to)),
                Action::Look { .. } | Action::List | Action::Poisoned(_) => panic!("{action:?}"),
                _ => None,
            })
            .collect();
        for (slot, to) in resent {
            bench.answer(id, slot.0, to.0, AddAnswer::Unknown(Unknown::Disconnected));
        }
    }
    assert_eq!(bench.core.poison(), None);
    bench.core.on_standing(true, bench.now);
    assert_eq!(bench.looks(), [false]);
    bench.candidates(&[]);
    assert_eq!(bench.core.poison(), None, "the bookies have their patience too");
    bench.candidates(&[]);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.looks(), [false]);
    bench.candidates(&[1, 4, 5]);
    bench.land();
    assert_eq!(bench.core.metadata().value.last_fragment().slots[0], Some(Incarnation(1)));
}

/// O3, MD3: a change that is in flight when the claim becomes provisional is brought to its end; a look is not acted on.
#[test]
fn a_change_in_flight_lands_on_a_provisional_claim_and_a_look_does_not_become_one() {
    let mut bench = Bench::new(2);
    let id = bench.push();
    bench.answer(id, 2, 3, AddAnswer::ReadOnly);
    bench.candidates(&[1, 2, 4]);
    bench.core.on_standing(false, bench.now);
    bench.answer(id, 0, 1, AddAnswer::Ok);
    bench.land();
    bench.answer(id, 2, 4, AddAnswer::Ok);
    assert_eq!(bench.confirmed(), [id]);
    let mut bench = Bench::new(2);
    let id = bench.push();
    bench.answer(id, 2, 3, AddAnswer::ReadOnly);
    assert_eq!(bench.looks(), [false]);
    bench.core.on_standing(false, bench.now);
    bench.candidates(&[1, 2, 4]);
    let actions = bench.core.take_actions();
    assert!(!actions.iter().any(|a| matches!(a, Action::Commit(_) | Action::List)), "{actions:?}");
    assert!(bench.core.listing_owed());
}
