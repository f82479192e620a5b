//! Whoever runs the cluster, for good or ill: takes bookies away, wishes that they go, deletes ledgers.

use geminga_bookie_client::{LedgerMetadata, LedgerState, metadata::Nonce};
use geminga_metadata::{Compare, Op, Txn, TxnOutcome, keys};
use geminga_proto::{ids::LedgerId, storage::v1 as wire};
use geminga_runtime::random::Random;
use prost::Message;

use super::{
    history::LedgerState as Stands,
    nodes::Nodes,
    upkeep::{bookie_id, wish},
    world::World,
};

/// See the module's text.
pub(crate) struct Operator {
    random: Random,
    /// So many bookies always stay, or come back.
    ensemble: usize,
    /// Whether bookies may go for good. Not in runs in which disks are damaged: a bookie in limbo replaces nobody (EC6).
    takes_away: bool,
    /// Nodes that go, by an operator's wish.
    wished: Vec<usize>,
}

impl Operator {
    /// Nothing wished yet.
    pub(crate) fn new(random: Random, ensemble: usize, takes_away: bool) -> Self {
        Self { random, ensemble, takes_away, wished: Vec::new() }
    }

    /// Whether it is the operator's turn.
    pub(crate) fn acts(&self) -> bool {
        self.random.chance(0.15)
    }

    /// One act. `losses` are the disks that may still be lost before all is whole again.
    pub(crate) async fn act(&mut self, world: &World, nodes: &mut Nodes, losses: &mut usize) {
        let node = self.random.below(nodes.count() as u64) as usize;
        match self.random.below(10) {
            0 | 1 if *losses > 0 && self.may_go(nodes, node) => {
                *losses -= 1;
                nodes.vanish(node).await;
            }
            2 | 3 if *losses > 0 && self.takes_away && !nodes.is_gone(node) => {
                *losses -= 1;
                nodes.wipe(node).await;
                nodes.start(node).await;
            }
            4 | 5 if nodes.incarnation(node).0 != 0 && self.may_go(nodes, node) => {
                self.wished.push(node);
                self.drain(world, node).await;
            }
            6..=8 => self.delete(world).await,
            _ => {}
        }
    }

    /// Whether enough others stay without this node.
    fn may_go(&self, nodes: &Nodes, node: usize) -> bool {
        let stays = |node: &usize| !nodes.is_gone(*node) && !self.wished.contains(node);
        self.takes_away && stays(&node) && (0..nodes.count()).filter(stays).count() > self.ensemble
    }

    async fn drain(&self, world: &World, node: usize) {
        world.history.note(format!("bookie {node} is to go"));
        let at_ms = world.shared_clock().now().0;
        let value = wire::Draining { format: 1, at_ms, ..Default::default() };
        let put = Op::put(keys::draining_bookie(&bookie_id(node)), value.encode_to_vec());
        let done = world.observed.txn(Txn::new().then(put)).await;
        done.expect("the store below its faults works");
    }

    /// A ledger of that kind, drawn evenly.
    fn pick(&self, world: &World, kind: impl Fn(Stands) -> bool) -> Option<LedgerId> {
        let found: Vec<u64> = world.history.with_checks(|checks| {
            let states = checks.ledgers.all().filter(|(_, known)| !known.is_gone());
            let states = states.filter_map(|(id, known)| Some((id, known.value.as_ref()?.state)));
            states.filter(|(_, state)| kind(*state)).map(|(id, _)| id).collect()
        });
        found.get(self.random.below(found.len().max(1) as u64) as usize).copied().map(LedgerId)
    }

    /// A Closed ledger is not needed any more (MD4).
    async fn delete(&self, world: &World) {
        let Some(id) = self.pick(world, |state| matches!(state, Stands::Closed { .. })) else {
            return;
        };
        let key = keys::ledger(id);
        let found = world.observed.get(&key).await.expect("the store below its faults works").1;
        let Some(Ok(ledger)) = found.as_ref().map(LedgerMetadata::from_key_value) else { return };
        let state = LedgerState::Deleted { nonce: Nonce(self.random.uuid()) };
        let next = LedgerMetadata { state, ..ledger.value };
        let txn = Txn::new()
            .when(Compare::ModRevision(key.clone(), ledger.mod_revision))
            .then(Op::put(key, next.encode()));
        let done = world.observed.txn(txn).await.expect("the store below its faults works");
        world
            .history
            .note(format!("ledger {id} is deleted: {}", matches!(done, TxnOutcome::Done(_))));
    }

    /// What a janitor does with a Deleted one, a day later: when nothing of its creation is on its way any more.
    pub(crate) async fn remove(&self, world: &World) {
        let Some(id) = self.pick(world, |state| state == Stands::Deleted) else { return };
        let txn = Txn::new().then(Op::Delete(keys::ledger(id)));
        world.observed.txn(txn).await.expect("the store below its faults works");
    }

    /// Nodes whose wish stands: not done when none is left.
    pub(crate) async fn unfinished(&self, world: &World) -> Vec<usize> {
        let mut left = Vec::new();
        for node in &self.wished {
            if wish(world, *node).await.is_some_and(|wish| wish.proof_revision == 0) {
                left.push(*node);
            }
        }
        left
    }
}
