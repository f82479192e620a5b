//! A node with the small bookie: its disk never fails, its registration is written here.

use std::sync::Arc;

use futures::FutureExt;
use geminga_bookie_client::bookie_rpc::memory::{AddMode, MemoryBookie};
use geminga_metadata::{Op, Txn, keys};
use geminga_proto::{ids::Incarnation, storage::v1 as wire};
use prost::Message;

use super::{nodes::Life, world::World};

/// One node.
#[derive(Debug)]
pub(crate) struct MemoryNode {
    name: String,
    full: bool,
    bookie: MemoryBookie,
}

impl MemoryNode {
    /// An empty one.
    pub(crate) fn new(world: &World, number: usize) -> Self {
        let bookie = MemoryBookie::new(Incarnation(world.next_incarnation()));
        Self { name: format!("bookie-{number}"), full: false, bookie }
    }

    pub(crate) async fn start(&mut self, world: &World) -> Option<Life> {
        self.bookie.restart();
        self.register(world, true).await;
        let (incarnation, bookie) = (self.bookie.incarnation(), Arc::new(self.bookie.clone()));
        Some(Life { incarnation, bookie, failed: std::future::pending().boxed() })
    }

    pub(crate) async fn kill(&mut self, world: &World, deregister: bool) {
        if deregister {
            self.register(world, false).await;
        }
    }

    pub(crate) fn wipe(&mut self, world: &World) {
        self.bookie = MemoryBookie::new(Incarnation(world.next_incarnation()));
    }

    /// Entries go silently, and the bookie finds out (D8).
    pub(crate) fn damage(&mut self) {
        self.bookie.lose_entries();
    }

    pub(crate) async fn fill(&mut self, world: &World, full: bool, up: bool) {
        let full_mode = if self.bookie.incarnation().0.is_multiple_of(2) {
            AddMode::NoSpace
        } else {
            AddMode::ReadOnly
        };
        self.full = full;
        self.bookie.set_mode(if full { full_mode } else { AddMode::Writable });
        if up {
            self.register(world, true).await;
        }
    }

    /// What a real bookie does by itself, under its lease.
    async fn register(&self, world: &World, present: bool) {
        let key = keys::available(&self.name);
        let value = wire::Available {
            format: 1,
            incarnation: self.bookie.incarnation().0,
            address: self.name.clone(),
            writable: !self.full,
            disk_free_bytes: 1 << 30,
            disk_total_bytes: 1 << 31,
            ..Default::default()
        };
        let op = if present { Op::put(key, value.encode_to_vec()) } else { Op::Delete(key) };
        let outcome = world.observed.txn(Txn::new().then(op)).await;
        outcome.expect("the store below its faults works");
    }
}
