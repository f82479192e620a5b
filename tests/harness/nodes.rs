//! The bookies of a run: processes that die, come back, lose their disks.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use geminga_bookie_client::bookie_rpc::BookieRpc;
use geminga_proto::ids::Incarnation;

use super::{
    coverage::Seen, disk_node::DiskNode, history::Event, memory_node::MemoryNode,
    observe::ObservedBookie, store_view::StoreView, upkeep::Upkeep, world::World,
};

/// Which bookies a run has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The small correct one: quick, for the protocol between the cores.
    Memory,
    /// The real one, on a disk in memory that loses power, fails and fills up.
    Disk,
}

/// All bookies of a run.
#[derive(Debug)]
pub(crate) struct Nodes {
    world: Arc<World>,
    nodes: Vec<Node>,
    /// Auto-recovery in every process, in runs that have it.
    pub(crate) upkeep: Option<Upkeep>,
}

#[derive(Debug)]
struct Node {
    body: Body,
    incarnation: Incarnation,
    /// Whether the bookie of the present life serves; it takes this away itself when it fails.
    up: Arc<AtomicBool>,
    /// It never comes back: lost for good, or drained.
    gone: bool,
}

#[derive(Debug)]
enum Body {
    Memory(MemoryNode),
    Disk(Box<DiskNode>),
}

/// What a body gives when it starts.
pub(crate) struct Life {
    pub(crate) incarnation: Incarnation,
    pub(crate) bookie: Arc<dyn BookieRpc>,
    /// Resolves when the bookie ends by itself.
    pub(crate) failed: futures::future::BoxFuture<'static, String>,
}

impl Nodes {
    /// So many bookies, all down.
    pub(crate) fn new(world: &Arc<World>, form: Form, count: usize) -> Self {
        let nodes = (0..count).map(|i| {
            let body = match form {
                Form::Memory => Body::Memory(MemoryNode::new(world, i)),
                Form::Disk => Body::Disk(Box::new(DiskNode::new(world, i))),
            };
            Node { body, incarnation: Incarnation(0), up: Arc::default(), gone: false }
        });
        Self { world: Arc::clone(world), nodes: nodes.collect(), upkeep: None }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.nodes.len()
    }

    /// The incarnation a node has now, or had last; 0 before its first start.
    pub(crate) fn incarnation(&self, node: usize) -> Incarnation {
        self.nodes[node].incarnation
    }

    /// Whether it serves.
    pub(crate) fn is_up(&self, node: usize) -> bool {
        self.nodes[node].up.load(Ordering::Relaxed)
    }

    /// From their next start on, all processes keep the ledgers whole (A1, A2), and collect garbage often.
    pub(crate) fn keep_up(&mut self, upkeep: Upkeep) {
        let random = self.world.random.fork();
        for node in &mut self.nodes {
            if let Body::Disk(body) = &mut node.body {
                body.collect_often(&random);
            }
        }
        self.upkeep = Some(upkeep);
    }

    /// Whether it never comes back.
    pub(crate) fn is_gone(&self, node: usize) -> bool {
        self.nodes[node].gone
    }

    /// Lost for good, disk and all.
    pub(crate) async fn vanish(&mut self, node: usize) {
        self.kill(node, true).await;
        self.world.history.saw(Seen::Vanished);
        self.world.history.note(format!("bookie {node} never comes back"));
        self.nodes[node].gone = true;
    }

    /// Starts a node, if it is down. True if there is nothing to be done for it any more.
    pub(crate) async fn start(&mut self, node: usize) -> bool {
        if self.is_up(node) || self.is_gone(node) {
            return true;
        }
        if let Some(upkeep) = &self.upkeep
            && upkeep.is_drained(&self.world, node).await
        {
            // Its volume may go (DC1): nobody starts it again.
            self.world.history.note(format!("bookie {node} is drained, and gone"));
            self.nodes[node].gone = true;
            return true;
        }
        let (world, this) = (&self.world, &mut self.nodes[node]);
        world.history.note(format!("start bookie {node}, last incarnation {}", this.incarnation));
        let life = match &mut this.body {
            Body::Memory(body) => body.start(world).await,
            Body::Disk(body) => body.start(world).await,
        };
        let Some(Life { incarnation, bookie, failed }) = life else {
            world.history.saw(Seen::StartFailed);
            return false;
        };
        if this.incarnation != incarnation && this.incarnation.0 != 0 {
            world.history.record(Event::DiskLost { at: this.incarnation.0 });
            world.network.moved(this.incarnation, incarnation);
        } else if this.incarnation.0 != 0 {
            world.history.saw(Seen::BookieRestarted);
        }
        world.history.note(format!("bookie {node} serves as {incarnation}"));
        this.incarnation = incarnation;
        this.up = Arc::new(AtomicBool::new(true));
        let (history, loopback) = (world.history.clone(), world.loopback.clone());
        let observed = ObservedBookie::new(incarnation, bookie, history.clone());
        loopback.attach(incarnation, Arc::new(observed));
        let up = Arc::clone(&this.up);
        let upkeep = match (&mut self.upkeep, &this.body) {
            (Some(upkeep), Body::Disk(body)) => upkeep.start(world, node, body),
            _ => None,
        };
        world.ether.spawn("obituary", async move {
            let cause = failed.await;
            if up.swap(false, Ordering::Relaxed) {
                history.saw(Seen::EndedByItself);
                history.note(format!("bookie {incarnation} ended: {cause}"));
                loopback.detach(incarnation);
                if let Some(upkeep) = upkeep {
                    upkeep.abort();
                }
            }
        });
        true
    }

    /// kill -9, and with `power_cut` what was not synced is gone as well, or half of it. It stays registered for a while.
    pub(crate) async fn kill(&mut self, node: usize, power_cut: bool) {
        let (world, this) = (&self.world, &mut self.nodes[node]);
        let at = this.incarnation;
        world.history.note(format!("kill bookie {node} ({at}), power cut: {power_cut}"));
        world.history.saw(if power_cut { Seen::PowerCut } else { Seen::BookieKilled });
        this.up.store(false, Ordering::Relaxed);
        world.loopback.detach(at);
        if let Some(upkeep) = &mut self.upkeep {
            upkeep.end(world, node);
        }
        match &mut this.body {
            Body::Memory(body) => body.kill(world, power_cut).await,
            Body::Disk(body) => body.kill(world, power_cut),
        }
    }

    /// The disk is replaced by an empty one: another incarnation (D7).
    pub(crate) async fn wipe(&mut self, node: usize) {
        self.kill(node, true).await;
        self.world.history.saw(Seen::DiskWiped);
        let (world, this) = (&self.world, &mut self.nodes[node]);
        world.history.record(Event::DiskLost { at: this.incarnation.0 });
        match &mut this.body {
            Body::Memory(body) => body.wipe(world),
            Body::Disk(body) => body.wipe(world),
        }
    }

    /// Bytes change on the disk behind the bookie's back.
    pub(crate) async fn damage(&mut self, node: usize) {
        let (world, this) = (&self.world, &mut self.nodes[node]);
        world.history.saw(Seen::Damage);
        world.history.record(Event::DiskLost { at: this.incarnation.0 });
        match &mut this.body {
            Body::Memory(body) => body.damage(),
            Body::Disk(body) => body.damage(world),
        }
    }

    /// The disk fills up, or has room again.
    pub(crate) async fn fill(&mut self, node: usize, full: bool) {
        let (world, this) = (&self.world, &mut self.nodes[node]);
        world.history.note(format!("bookie {node} full: {full}"));
        if full {
            world.history.saw(Seen::DiskFull);
        }
        let up = this.up.load(Ordering::Relaxed);
        match &mut this.body {
            Body::Memory(body) => body.fill(world, full, up).await,
            Body::Disk(body) => body.fill(full),
        }
    }

    /// A write, a sync, a read of the disk is about to fail. False where there is no disk.
    pub(crate) fn break_disk(&mut self, node: usize) -> bool {
        match &mut self.nodes[node].body {
            Body::Memory(_) => false,
            Body::Disk(body) => {
                body.break_disk(&self.world);
                true
            }
        }
    }

    /// The node's view of the store, where it has one.
    pub(crate) fn store(&self, node: usize) -> Option<&StoreView> {
        match &self.nodes[node].body {
            Body::Memory(_) => None,
            Body::Disk(body) => Some(&body.store),
        }
    }

    /// Every node serves, with room on its disk.
    pub(crate) async fn heal(&mut self) {
        for node in 0..self.count() {
            if self.is_gone(node) {
                continue;
            }
            self.fill(node, false).await;
            if let Body::Disk(body) = &mut self.nodes[node].body
                && body.mend()
            {
                self.kill(node, false).await;
            }
            for _ in 0..20 {
                if self.start(node).await {
                    break;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            if !self.is_up(node) && !self.is_gone(node) {
                self.world.history.fail("I20", format!("bookie {node} does not start again"));
            }
        }
    }
}
