//! Consumers of the layer "subscriptions": they outlive every owner, and remember what they hold.

use std::collections::{BTreeMap, BTreeSet};

use geminga_broker::dispatcher::{Claimed, Presented};
use geminga_runtime::random::Random;

/// A message with a consumer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holding {
    pub(crate) offset: u64,
    pub(crate) attempt: u32,
    pub(crate) key: u32,
    /// Of the stream that it came over, or was granted to.
    pub(crate) instance: u64,
    pub(crate) epoch: u64,
    /// The owner and the number of the record that is to settle it.
    pub(crate) settling: Option<(u32, u64)>,
}

/// A consumer.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    pub(crate) name: String,
    /// The owner that its stream goes to, and its instance there.
    pub(crate) place: Option<(u32, u64)>,
    /// In order of arrival.
    pub(crate) held: Vec<Holding>,
    /// Credit that it has given, as a total of its stream.
    pub(crate) credit: u64,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Agents {
    pub(crate) all: Vec<Agent>,
    next_instance: u64,
}

impl Agents {
    /// So many, nobody connected.
    pub(crate) fn new(count: u64) -> Self {
        let agent = |number| Agent {
            name: format!("agent-{number}"),
            place: None,
            held: Vec::new(),
            credit: 0,
        };
        Self { all: (0..count).map(agent).collect(), next_instance: 1 }
    }

    /// A number that no stream had.
    pub(crate) fn instance(&mut self) -> u64 {
        self.next_instance += 1;
        self.next_instance
    }

    /// Whose stream of this owner it is.
    pub(crate) fn with(&mut self, owner: u32, instance: u64) -> Option<&mut Agent> {
        self.all.iter_mut().find(|agent| agent.place == Some((owner, instance)))
    }

    /// Whether the stream is still somebody's.
    pub(crate) fn is_there(&self, owner: u32, instance: u64) -> bool {
        self.all.iter().any(|agent| agent.place == Some((owner, instance)))
    }
}

impl Agent {
    /// What it presents when it comes back: also what it has no answer for. It may have lost some; then of a key all that
    /// follows as well, for a consumer that works in order goes on with none of it.
    pub(crate) fn claims(&self, epoch: u64, random: &Random) -> Vec<Claimed> {
        let mut groups: BTreeMap<(u64, u32, u64), Vec<(u64, u64)>> = BTreeMap::new();
        let mut in_order = self.held.clone();
        in_order.sort_unstable_by_key(|held| held.offset);
        let mut lost = BTreeSet::new();
        for held in in_order {
            if random.chance(0.1) {
                lost.insert(held.key);
            }
            if !lost.contains(&held.key) {
                let group = (held.instance, held.attempt, held.epoch);
                groups.entry(group).or_default().push((held.offset, held.offset + 1));
            }
        }
        groups
            .into_iter()
            .map(|((consumer, attempt, of), mut runs)| {
                runs.sort_unstable();
                let presented = Presented { consumer, attempt, earlier: of != epoch };
                Claimed { presented, runs }
            })
            .collect()
    }

    /// Something it may settle now: the oldest of a key that it holds, unless that one is being settled.
    pub(crate) fn choose(&self, random: &Random) -> Option<Holding> {
        if self.held.is_empty() {
            return None;
        }
        let key = self.held[random.below(self.held.len() as u64) as usize].key;
        let of_key = self.held.iter().filter(|held| held.key == key);
        of_key.min_by_key(|held| held.offset).copied().filter(|held| held.settling.is_none())
    }
}
