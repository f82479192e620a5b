//! The actor that breaks things, and mends them after a while.

use std::{sync::Arc, time::Duration};

use geminga_metadata::FaultPlan;
use geminga_proto::ids::Incarnation;
use geminga_runtime::random::Random;
use tokio::time::{Instant, sleep_until};

use super::{
    coverage::Seen,
    network::Cut,
    nodes::Nodes,
    operator::Operator,
    plan,
    store_view::StoreView,
    world::{ClientNode, World},
};

/// Breaks and mends.
pub(crate) struct Faults {
    pub(crate) world: Arc<World>,
    pub(crate) nodes: Nodes,
    pub(crate) clients: Vec<Target>,
    pub(crate) random: Random,
    /// Disks that may still be lost.
    pub(crate) losses: usize,
    /// Mean time between two faults, milliseconds.
    pub(crate) gap_ms: u64,
    /// The bookie whose bytes were changed: that again costs nothing more.
    victim: Option<(usize, Incarnation)>,
    /// Whether bytes may change on disks.
    pub(crate) damages: bool,
    /// What else may happen to the bookies, and to ledgers.
    pub(crate) operator: Option<Operator>,
    mending: Vec<(Instant, Mend)>,
}

enum Mend {
    Start(usize),
    Join(u32, Incarnation),
    StoreBack(usize),
    NodeStoreBack(usize),
    Calm,
    Resume(u32),
    Room(usize),
}

/// A process as the faults see it: its links, its way to the store, and how bad that is when it is not broken.
pub(crate) struct Target {
    pub(crate) number: u32,
    /// Cut and joined together.
    pub(crate) stores: Vec<StoreView>,
    pub(crate) store_plan: FaultPlan,
}

impl Faults {
    /// Nothing is broken yet.
    pub(crate) fn new(
        world: &Arc<World>,
        nodes: Nodes,
        clients: Vec<ClientNode>,
        losses: usize,
        gap_ms: u64,
        store_plan: FaultPlan,
    ) -> Self {
        let (world, random) = (Arc::clone(world), world.random.fork());
        let target = |client: ClientNode| Target {
            number: client.number,
            stores: vec![client.store],
            store_plan: store_plan.clone(),
        };
        let clients = clients.into_iter().map(target).collect();
        Self {
            world,
            nodes,
            clients,
            random,
            losses,
            gap_ms,
            victim: None,
            damages: true,
            operator: None,
            mending: Vec::new(),
        }
    }

    /// Breaks things until the time is over; gives the bookies back, as they are.
    pub(crate) async fn run(mut self, until: Instant) -> Nodes {
        self.run_on(until).await;
        self.nodes
    }

    async fn run_on(&mut self, until: Instant) {
        loop {
            let next =
                Instant::now() + Duration::from_millis(self.random.below(2 * self.gap_ms + 1));
            while let Some(i) = self.due(next.min(until)) {
                let (at, mend) = self.mending.swap_remove(i);
                sleep_until(at).await;
                self.mend(mend).await;
            }
            sleep_until(next.min(until)).await;
            if Instant::now() >= until {
                return;
            }
            self.strike().await;
        }
    }

    /// The same, and who goes on with what: the losses that are left, the operator.
    pub(crate) async fn run_with_operator(mut self, until: Instant) -> (Nodes, usize, Operator) {
        self.run_on(until).await;
        let operator = self.operator.expect("it was given one");
        (self.nodes, self.losses, operator)
    }

    /// The earliest mending before `by`.
    fn due(&self, by: Instant) -> Option<usize> {
        let earliest = self.mending.iter().enumerate().min_by_key(|(i, (at, _))| (*at, *i))?;
        (earliest.1.0 <= by).then_some(earliest.0)
    }

    fn later(&mut self, ms_max: u64, mend: Mend) {
        let after = Duration::from_millis(self.random.below(ms_max + 1));
        self.mending.push((Instant::now() + after, mend));
    }

    async fn strike(&mut self) {
        if let Some(operator) = &mut self.operator
            && operator.acts()
        {
            return operator.act(&self.world, &mut self.nodes, &mut self.losses).await;
        }
        let node = self.random.below(self.nodes.count() as u64) as usize;
        let client = self.random.below(self.clients.len() as u64) as usize;
        if self.nodes.is_gone(node) {
            return;
        }
        let number = self.clients[client].number;
        let at = self.nodes.incarnation(node);
        let saw = |kind| self.world.history.saw(kind);
        match self.random.below(29) {
            0..=3 => {
                let power_cut = self.random.chance(0.5);
                self.nodes.kill(node, power_cut).await;
                let down_ms = [100, 3_000, 30_000][self.random.below(3) as usize];
                self.later(down_ms, Mend::Start(node));
            }
            4..=7 => {
                let cut = if self.random.chance(0.5) { Cut::Both } else { Cut::Answers };
                saw(if cut == Cut::Both { Seen::CutBoth } else { Seen::CutAnswers });
                self.world.history.note(format!("cut client {number} from bookie {at}: {cut:?}"));
                self.world.network.cut(number, at, cut);
                self.later(20_000, Mend::Join(number, at));
            }
            8 => {
                saw(Seen::Isolated);
                self.world.history.note(format!("cut client {number} from all bookies"));
                for node in 0..self.nodes.count() {
                    let at = self.nodes.incarnation(node);
                    self.world.network.cut(number, at, Cut::Both);
                    self.later(10_000, Mend::Join(number, at));
                }
            }
            9 | 10 => {
                saw(Seen::StoreCut);
                self.world.history.note(format!("cut client {number} from the store"));
                for store in &self.clients[client].stores {
                    store.set_partitioned(true);
                }
                self.later(15_000, Mend::StoreBack(client));
            }
            11 | 12 => {
                self.world.history.note(format!("the store fails for client {number}"));
                let plan = plan::store_faults(&self.random);
                for store in &self.clients[client].stores {
                    store.set_plan(plan.clone());
                }
                self.later(15_000, Mend::StoreBack(client));
            }
            13..=15 => {
                let weather = plan::weather(&self.random);
                self.world.history.note(format!("{weather:?}"));
                self.world.network.set_weather(weather);
                self.later(10_000, Mend::Calm);
            }
            16 => {
                saw(Seen::ClockJump);
                let ms = self.random.below(2_000_000) as i64 - 1_000_000;
                self.world.history.note(format!("the clock jumps by {ms} ms"));
                self.world.clock.jump(ms);
            }
            17 => {
                self.nodes.fill(node, true).await;
                self.later(10_000, Mend::Room(node));
            }
            18 if self.losses > 0 => {
                self.losses -= 1;
                self.nodes.wipe(node).await;
                self.later(10_000, Mend::Start(node));
            }
            19 | 25..=27 if self.damages => self.damage(node).await,
            20 | 21 if self.nodes.break_disk(node) => self.later(10_000, Mend::Start(node)),
            22 => {
                if let Some(store) = self.nodes.store(node) {
                    saw(Seen::BookieStoreCut);
                    self.world.history.note(format!("cut bookie {node} from the store"));
                    store.set_partitioned(true);
                    self.later(15_000, Mend::NodeStoreBack(node));
                }
            }
            23 | 24 => {
                self.world.history.note(format!("client {number} stands still"));
                self.world.network.pause(number);
                self.later(
                    [500, 5_000, 30_000][self.random.below(3) as usize],
                    Mend::Resume(number),
                );
            }
            _ => {}
        }
    }

    /// Bytes change on a disk: another loss, unless it is the disk that was struck before.
    async fn damage(&mut self, node: usize) {
        let node = match self.victim {
            Some((victim, at)) if self.nodes.incarnation(victim) == at => victim,
            _ if self.losses > 0 && self.nodes.incarnation(node).0 != 0 => {
                self.losses -= 1;
                node
            }
            _ => return,
        };
        self.victim = Some((node, self.nodes.incarnation(node)));
        self.nodes.damage(node).await;
        if self.random.chance(0.7) {
            // Found at the next start, if it lies behind the mark.
            self.nodes.kill(node, false).await;
            self.later(3_000, Mend::Start(node));
        }
    }

    async fn mend(&mut self, mend: Mend) {
        match mend {
            Mend::Start(node) => {
                if !self.nodes.start(node).await {
                    self.later(1_000, Mend::Start(node));
                }
            }
            Mend::Join(client, at) => {
                self.world.history.note(format!("join client {client} and bookie {at}"));
                self.world.network.join(client, at);
            }
            Mend::StoreBack(client) => {
                self.world.history.note("the store is back");
                let Target { stores, store_plan, .. } = &self.clients[client];
                for store in stores {
                    store.set_partitioned(false);
                    store.set_plan(store_plan.clone());
                }
            }
            Mend::NodeStoreBack(node) => {
                if let Some(store) = self.nodes.store(node) {
                    store.set_partitioned(false);
                }
            }
            Mend::Resume(client) => {
                self.world.history.note(format!("client {client} goes on"));
                self.world.network.resume(client);
            }
            Mend::Calm => self.world.network.set_weather(Default::default()),
            Mend::Room(node) => self.nodes.fill(node, false).await,
        }
    }
}
