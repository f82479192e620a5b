//! The recoverer's core against brute force: any contents, any order of answers, any mix of the three classes.

use proptest::prelude::*;

use super::*;
use crate::{
    entry::Payload,
    metadata::{LedgerOwner, LedgerState, RecoveryNonce},
};
use geminga_proto::ids::{Epoch, LedgerId, SegmentId, TopicId};

const ID: LedgerId = LedgerId(5);

struct Bookie {
    held: BTreeMap<EntryId, Entry>,
    fenced: bool,
    /// Answers nothing at all.
    dead: bool,
    /// Reads of these entries fail.
    unknown: BTreeSet<EntryId>,
    takes_write_back: bool,
}

struct Sim {
    random: Random,
    quorum: Quorum,
    core: RecoveryCore,
    ens0: Fragment,
    bookies: BTreeMap<u32, Bookie>,
    /// Entries below were acknowledged by the writer.
    acked: u64,
    queue: Vec<Action>,
    /// Slots that were heard to be fenced, and the highest LAC they told (R2).
    fenced: BTreeSet<usize>,
    told: Option<EntryId>,
}

fn entry(id: u64, lac: u64) -> Entry {
    let lac = lac.checked_sub(1).map(EntryId);
    Entry::seal(ID, EntryId(id), lac, id * 3, Payload::default())
}

impl Sim {
    fn new(seed: u64, quorum: Quorum, entries: u64, healthy: bool) -> Self {
        let random = Random::from_seed(seed);
        let e = quorum.ensemble() as u32;
        let first = random.below(4).min(entries);
        let mut slots: Vec<_> = (1..=e).map(|i| Some(Incarnation(i))).collect();
        if random.chance(0.3) {
            let vacant = random.below(u64::from(e)) as usize;
            let holder = slots[vacant].take();
            if !quorum.every_write_set_has(quorum.ack(), |slot| slots[slot.0].is_some()) {
                slots[vacant] = holder;
            }
        }
        let fragment = |first: u64, slots: Vec<_>| Fragment {
            first_entry: EntryId(first),
            nonce: Nonce([first as u8; 16]),
            slots,
        };
        let mut fragments = vec![fragment(0, slots.clone())];
        if first > 0 {
            // The earlier fragment lies on bookies that nobody may ask (T4): they do not exist.
            fragments[0].slots = (0..e).map(|i| Some(Incarnation(100 + i))).collect();
            fragments.push(fragment(first, slots.clone()));
        }
        let ens0 = fragments.last().expect("there").clone();
        let nonce = RecoveryNonce { epoch: Epoch(1), nonce: Nonce([9; 16]) };
        let segment = SegmentId { topic: TopicId(1), segment: 0 };
        let metadata = LedgerMetadata {
            id: ID,
            state: LedgerState::InRecovery(nonce),
            quorum,
            fragments,
            owner: LedgerOwner { segment, epoch: Epoch(1) },
        };
        let bookie = |i| {
            let dead = !healthy && random.chance(0.2);
            let unknown =
                (0..entries + 3).map(EntryId).filter(|_| !healthy && random.chance(0.1)).collect();
            let takes_write_back = healthy || random.chance(0.8);
            (i, Bookie { held: BTreeMap::new(), fenced: false, dead, unknown, takes_write_back })
        };
        let mut bookies: BTreeMap<u32, Bookie> = (1..=e + 2).map(bookie).collect();
        // What a writer may have left: a prefix acknowledged, later entries anywhere.
        let mut acked = first;
        for id in first..entries {
            let copies: Vec<u32> = quorum
                .write_set(EntryId(id))
                .filter_map(|slot| slots[slot.0])
                .filter(|_| random.chance(0.7))
                .map(|i| i.0)
                .collect();
            // Its bytes are frozen at the first send: the same lac on every copy, acknowledged at that time.
            let frozen = entry(id, random.below(acked + 1));
            for i in &copies {
                bookies.get_mut(i).expect("there").held.insert(EntryId(id), frozen.clone());
            }
            if acked == id && copies.len() >= quorum.ack() && random.chance(0.9) {
                acked += 1;
            }
        }
        let age = LedgerAge::new(ID, None);
        let window = 1 + random.below(6) as usize;
        let core = RecoveryCore::new(metadata, age, window);
        let (queue, fenced) = (Vec::new(), BTreeSet::new());
        Self { random, quorum, core, ens0, bookies, acked, queue, fenced, told: None }
    }

    fn run(&mut self) -> Progress {
        loop {
            self.queue.extend(self.core.take_actions());
            match self.core.progress() {
                Progress::Working if self.queue.is_empty() => panic!("it waits for nothing"),
                Progress::Working => {}
                // Sometimes the stragglers come, sometimes nobody waits for them.
                Progress::Finished if !self.queue.is_empty() && self.random.chance(0.8) => {}
                done => return done,
            }
            let at = self.random.below(self.queue.len() as u64) as usize;
            let action = self.queue.swap_remove(at);
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Fence { slot, to, list } => {
                assert_eq!(self.ens0.holder(slot), Some(to), "R2: ens0 alone is fenced");
                let bookie = self.bookies.get_mut(&to.0).expect("of ens0");
                if bookie.dead {
                    return self.core.on_fenced(slot, FenceAnswer::Unknown(Unknown::Timeout));
                }
                bookie.fenced = true;
                let lac = bookie.held.values().filter_map(|entry| entry.lac).max();
                let held = bookie.held.range(list.first..=list.last).map(|(id, _)| *id).collect();
                self.fenced.insert(slot.0);
                self.told = self.told.max(lac);
                self.core.on_fenced(slot, FenceAnswer::Fenced { lac, held: Some(held) });
            }
            Action::Read { slot, to, range } => {
                assert_eq!(self.ens0.holder(slot), Some(to), "R3: ens0 alone is read");
                assert!(range.first >= self.ens0.first_entry, "T4");
                let counts =
                    |slot: Slot| self.fenced.contains(&slot.0) || self.ens0.holder(slot).is_none();
                assert!(
                    self.quorum.every_write_set_has(self.quorum.cover(), counts),
                    "R2: cover is fenced before anything is read"
                );
                let bookie = self.bookies.get_mut(&to.0).expect("of ens0");
                if bookie.dead {
                    let unknown = vec![EntryAnswer::Unknown(Unknown::Timeout)];
                    return self.core.on_read(slot, range, unknown);
                }
                bookie.fenced = true;
                let told = 1 + self.random.below(range.last.0 - range.first.0 + 1);
                let answer = |id: EntryId| match bookie.held.get(&id) {
                    _ if bookie.unknown.contains(&id) => EntryAnswer::Unknown(Unknown::Damaged),
                    Some(entry) => EntryAnswer::Held(entry.clone()),
                    None => EntryAnswer::Absent,
                };
                let answers =
                    (range.first.0..range.first.0 + told).map(|id| answer(EntryId(id))).collect();
                self.core.on_read(slot, range, answers);
            }
            Action::Write { entry, slot, to } => {
                let bookie = self.bookies.get_mut(&to.0).expect("chosen");
                if bookie.dead || !bookie.takes_write_back {
                    let unknown = AddAnswer::Unknown(Unknown::Timeout);
                    return self.core.on_written(entry.id, slot, to, unknown);
                }
                let id = entry.id;
                if let Some(held) = bookie.held.insert(id, entry.clone()) {
                    assert_eq!(held.digest, entry.digest, "I6: frozen bytes");
                }
                self.core.on_written(id, slot, to, AddAnswer::Ok);
            }
            Action::Look => {
                let available = |i: &u32| Available {
                    incarnation: Incarnation(*i),
                    writable: true,
                    draining: false,
                    limbo: None,
                    disk_free: 1,
                    zone: String::new(),
                };
                let all: Vec<Available> = self.bookies.keys().map(available).collect();
                self.core.on_candidates(Some(&all), &self.random);
            }
        }
    }

    fn holds(&self, fragment: &Fragment, slot: Slot, id: EntryId) -> bool {
        fragment.holder(slot).is_some_and(|i| self.bookies[&i.0].held.contains_key(&id))
    }

    fn check(&self, conclusion: &Conclusion) -> Result<(), TestCaseError> {
        let end = conclusion.last.map_or(0, |last| last.0 + 1);
        prop_assert!(end >= self.acked, "I1: closes at {end}, {} were acknowledged", self.acked);
        prop_assert!(conclusion.last >= self.told, "I3: {:?} was told", self.told);
        prop_assert!(end >= self.ens0.first_entry.0, "T4");
        prop_assert_eq!(conclusion.private[0].first_entry >= self.ens0.first_entry, true);
        // The end was certain: cover of ens0 hold nothing there, or are vacant.
        let noes = |id: EntryId| {
            let empty = |slot: &Slot| {
                self.ens0.holder(*slot).is_none_or(|i| {
                    let bookie = &self.bookies[&i.0];
                    bookie.fenced
                        && !bookie.dead
                        && !bookie.unknown.contains(&id)
                        && !bookie.held.contains_key(&id)
                })
            };
            self.quorum.write_set(id).filter(empty).count()
        };
        prop_assert!(noes(EntryId(end)) >= self.quorum.cover(), "R3");
        let mut fragments = conclusion.private.clone();
        if conclusion.last.is_some_and(|last| fragments[0].first_entry > last) {
            return Ok(()); // everything from f on is dropped
        }
        cut(&mut fragments, conclusion.last);
        for id in (self.ens0.first_entry.0..end).map(EntryId) {
            let fragment = crate::metadata::fragment_of(&fragments, id);
            let slots: Vec<Slot> = self.quorum.write_set(id).collect();
            let held = slots.iter().filter(|slot| self.holds(fragment, **slot, id)).count();
            prop_assert!(held >= self.quorum.ack(), "I4: entry {id} has {held} copies");
            prop_assert!(
                conclusion.short || held == slots.len(),
                "R8: entry {id} is short, not listed"
            );
        }
        let vacant = fragments.iter().any(Fragment::has_vacancy);
        prop_assert!(conclusion.short || !vacant, "R8: a vacant slot, not listed");
        Ok(())
    }
}

fn shapes() -> impl Strategy<Value = Quorum> {
    prop::sample::select(vec![
        (3, 3, 2),
        (3, 3, 3),
        (3, 2, 2),
        (4, 3, 2),
        (5, 3, 2),
        (1, 1, 1),
        (2, 2, 1),
        (5, 5, 3),
    ])
    .prop_map(|(e, w, a)| Quorum::new(e, w, a).expect("valid"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn whatever_is_concluded_keeps_every_acknowledged_entry(seed: u64, quorum in shapes(), entries in 0u64..24) {
        let mut sim = Sim::new(seed, quorum, entries, false);
        if sim.run() == Progress::Finished {
            let conclusion = sim.core.conclude();
            sim.check(&conclusion)?;
        }
    }

    #[test]
    fn with_every_bookie_certain_it_always_concludes(seed: u64, quorum in shapes(), entries in 0u64..24) {
        let mut sim = Sim::new(seed, quorum, entries, true);
        prop_assert_eq!(sim.run(), Progress::Finished);
        let conclusion = sim.core.conclude();
        sim.check(&conclusion)?;
    }
}

/// Guards against properties that hold because everything aborts.
#[test]
fn the_simulation_concludes_aborts_and_replaces() {
    let (mut finished, mut aborted, mut replaced, mut complete) = (0, 0, 0, 0);
    for seed in 0..500 {
        let mut sim = Sim::new(seed, Quorum::default(), 12, false);
        match sim.run() {
            Progress::Finished => {
                let conclusion = sim.core.conclude();
                finished += 1;
                replaced += usize::from(conclusion.private.len() > 1);
                complete += usize::from(!conclusion.short);
            }
            _ => aborted += 1,
        }
    }
    assert!(finished > 100, "{finished}");
    assert!(aborted > 50, "{aborted}");
    assert!(replaced > 5, "{replaced}");
    assert!(complete > 5, "{complete}");
}
