//! Auto-recovery in the process of each bookie: its own way to the store and to the others, as faulty as any client's.

use std::time::Duration;

use geminga_bookie::{AutoRecoveryConfig, AutoRecoveryMetrics, AutoRecoveryParts};
use geminga_metadata::{FaultPlan, Standing, keys};
use geminga_proto::storage::v1 as wire;
use geminga_runtime::tasks::Tasks;
use prost::Message;

use super::{
    disk_node::DiskNode, faults::Target, nodes::Nodes, store_view::StoreView, world::World,
};

/// What the processes of a run have in common, and those of their tasks that run.
#[derive(Debug)]
pub(crate) struct Upkeep {
    config: AutoRecoveryConfig,
    lives: Vec<Option<Tasks>>,
    /// The ways to the store, one a node.
    stores: Vec<StoreView>,
}

/// Processes of bookies, as clients of others, are numbered from here on.
const NUMBERS: u32 = 100;

/// The id of a node's bookie.
pub(crate) fn bookie_id(node: usize) -> String {
    format!("bookie-{node}")
}

impl Upkeep {
    /// For so many nodes. Nothing that is safe rests on how long anything takes, but for what DC1's two scans are apart.
    pub(crate) fn draw(world: &World, nodes: usize, ensemble: usize) -> Self {
        let random = world.random.fork();
        let seconds = |from: u64, to: u64| {
            Duration::from_millis(from * 1_000 + random.below((to - from) * 1_000))
        };
        let config = AutoRecoveryConfig {
            audit_interval: seconds(1, 5),
            lost_after: seconds(5, 40),
            scan_interval: seconds(2, 10),
            idle_scan_interval: seconds(20, 100),
            listing_pause: Duration::from_millis(100),
            check_interval: if random.chance(0.3) {
                seconds(60, 100)
            } else {
                seconds(90_000, 90_001)
            },
            check_batch: 1 + random.below(5) as usize,
            ensemble_size: ensemble,
            repair_interval: seconds(1, 5),
            unclaimed_for: seconds(5, 30),
            bytes_per_second: [2_000, 50 << 20][random.below(2) as usize],
            chunk_bytes: [1, 500, 1 << 20][random.below(3) as usize],
            rpc_timeout: seconds(1, 8),
            ..AutoRecoveryConfig::default()
        };
        let store = |node: usize| {
            world.store_view(FaultPlan::default()).apart(Duration::from_millis(1 + node as u64))
        };
        let stores = (0..nodes).map(store).collect();
        Self { config, lives: (0..nodes).map(|_| None).collect(), stores }
    }

    /// What the faults may break of the nodes' processes.
    pub(crate) fn targets(&self, nodes: &Nodes) -> Vec<Target> {
        (0..nodes.count())
            .filter_map(|node| {
                let stores = vec![nodes.store(node)?.clone(), self.stores[node].clone()];
                let number = NUMBERS + node as u32;
                Some(Target { number, stores, store_plan: Default::default() })
            })
            .collect()
    }

    /// Starts auditor and replicator in the process of a bookie that serves; the owner of their tasks.
    pub(crate) fn start(&mut self, world: &World, node: usize, bookie: &DiskNode) -> Option<Tasks> {
        let random = world.random.fork();
        let number = NUMBERS + node as u32;
        let store = self.stores[node].clone();
        let client = world.client_over(number, store.clone(), random.fork(), Standing::always());
        let parts = AutoRecoveryParts {
            store: std::sync::Arc::new(store),
            client: client.client,
            bookies: world.network.view(number),
            clock: world.shared_clock(),
            instance: random.uuid(),
            random,
            tasks: client.tasks.clone(),
            keeper: bookie.lease()?,
            bookie_id: bookie_id(node),
            config: self.config.clone(),
            metrics: AutoRecoveryMetrics::default(),
        };
        parts.start();
        self.lives[node] = Some(client.tasks.clone());
        Some(client.tasks)
    }

    /// The process of the bookie has ended.
    pub(crate) fn end(&mut self, world: &World, node: usize) {
        let Some(tasks) = self.lives[node].take() else { return };
        tasks.abort();
        if tasks.panicked() > 0 {
            world
                .history
                .fail("panic", format!("a task of auto-recovery of bookie {node} panicked"));
        }
    }

    /// Ends all of it.
    pub(crate) fn end_all(&mut self, world: &World) {
        for node in 0..self.lives.len() {
            self.end(world, node);
        }
    }

    /// Whether its drain is done (DC1).
    pub(crate) async fn is_drained(&self, world: &World, node: usize) -> bool {
        wish(world, node).await.is_some_and(|wish| wish.proof_revision > 0)
    }
}

/// The operator's wish that a bookie goes, and how far that is.
pub(crate) async fn wish(world: &World, node: usize) -> Option<wire::Draining> {
    let key = keys::draining_bookie(&bookie_id(node));
    let (_, found) = world.observed.get(&key).await.expect("the store below its faults works");
    wire::Draining::decode(found?.value).ok()
}
