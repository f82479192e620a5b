//! One run: a seed in, a verdict and a fingerprint out. The same seed is the same run.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use geminga_bookie_client::bookie_rpc::{Bookies, EntryAnswer, EntryRange, ReadRequest};
use geminga_metadata::FaultPlan;
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use geminga_runtime::tasks::Tasks;
use tokio::time::Instant;

use super::{
    checks::Violation,
    coverage::Coverage,
    dispatch_run::{self, Subscription},
    faults::Faults,
    history::{History, LedgerState},
    ledger_run,
    nodes::{Form, Nodes},
    plan::{ClusterPlan, DispatchPlan, LedgerPlan, SegmentPlan},
    segment_run::{self, Producer, Segment},
    upkeep_run,
    world::{ClientNode, World},
};

/// What a run came to.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    pub(crate) layer: Layer,
    pub(crate) violation: Option<Violation>,
    pub(crate) tail: Vec<String>,
    /// Number and hash of all events.
    pub(crate) fingerprint: (u64, u64),
    pub(crate) coverage: Coverage,
}

/// What a seed exercises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// Ledger clients on small correct bookies.
    Cores,
    /// Ledger clients on real bookies.
    Bookies,
    /// A segment on small correct bookies.
    SegmentCores,
    /// A segment on real bookies.
    Segments,
    /// Ledger clients on real bookies that keep the ledgers whole.
    Upkeep,
    /// As `SegmentCores`, with owners that confirm their claims.
    LeasedCores,
    /// As `Segments`, with owners that confirm their claims.
    Leased,
    /// As `SegmentCores`, with a dispatcher over it and consumers.
    Subscriptions,
}

/// Runs one seed on a runtime of its own.
pub(crate) fn run(seed: u64, layer: Layer, trace: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime can be built");
    let seen: OnceCell<History> = OnceCell::new();
    let ended = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            let world = World::new(seed, trace);
            seen.get_or_init(|| world.history.clone());
            match layer {
                Layer::Cores => ledgers(&world, Form::Memory).await,
                Layer::Bookies => ledgers(&world, Form::Disk).await,
                Layer::SegmentCores => segment(&world, Form::Memory, false).await,
                Layer::Segments => segment(&world, Form::Disk, false).await,
                Layer::LeasedCores => segment(&world, Form::Memory, true).await,
                Layer::Leased => segment(&world, Form::Disk, true).await,
                Layer::Subscriptions => subscriptions(&world).await,
                Layer::Upkeep => {
                    let clients = upkeep_run::run(&world).await;
                    end(&world, clients).await;
                }
            }
        });
    }));
    let history = seen.get().expect("a world begins with its history");
    if ended.is_err() {
        history.fail("panic", "the run panicked");
    }
    Outcome {
        seed,
        layer,
        violation: history.violation(),
        tail: history.tail(),
        fingerprint: history.fingerprint(),
        coverage: history.coverage(),
    }
}

/// How long what is on its way may still arrive after the healing.
const SETTLING: Duration = Duration::from_secs(60);

/// The bookies of a run with what fails.
struct Cluster {
    plan: ClusterPlan,
    nodes: Nodes,
    clients: Vec<ClientNode>,
    until: Instant,
}

impl Cluster {
    async fn start(world: &Arc<World>, form: Form) -> Self {
        let plan = ClusterPlan::draw(&world.random.fork());
        world.history.note(format!("{plan:?}"));
        let mut nodes = Nodes::new(world, form, plan.bookies);
        for node in plan.late_bookies..plan.bookies {
            nodes.start(node).await;
        }
        world.network.set_weather(plan.weather);
        let until = Instant::now() + plan.faulty_for;
        Self { plan, nodes, clients: Vec::new(), until }
    }

    /// A process with a ledger client.
    fn client(&mut self, world: &Arc<World>, number: u32) -> ClientNode {
        let node = world.client(number, self.plan.store_faults.clone());
        self.clients.push(node.clone());
        node
    }

    /// One that confirms its claims.
    fn leased(&mut self, world: &Arc<World>, number: u32) -> ClientNode {
        let node = world.leased_client(number, self.plan.store_faults.clone());
        self.clients.push(node.clone());
        node
    }

    fn start_recoverers(&mut self, world: &Arc<World>) {
        for i in 0..self.plan.recoverers {
            let node = self.client(world, 10 + i);
            let recoverer = ledger_run::recover_rival(
                Arc::clone(world),
                node.clone(),
                world.random.fork(),
                self.until,
                0..3,
            );
            node.tasks.spawn("recoverer", recoverer);
        }
    }

    /// Breaks everything until the time is over, then heals it; gives the clients back.
    async fn suffer(self, world: &Arc<World>) -> Vec<ClientNode> {
        let Self { plan, nodes, clients, until } = self;
        let faults = Faults::new(
            world,
            nodes,
            clients.clone(),
            plan.losses,
            plan.fault_gap_ms,
            plan.store_faults,
        );
        let mut nodes = faults.run(until).await;
        world.history.note("healing");
        world.heal();
        nodes.heal().await;
        clients
    }
}

/// What is still on its way may go on for a while after the healing, or not.
async fn settle_down(world: &World) {
    if world.random.chance(0.5) {
        tokio::time::sleep(SETTLING).await;
    }
}

/// Ends every process, and looks at what is left.
async fn end(world: &Arc<World>, clients: Vec<ClientNode>) {
    settle_down(world).await;
    for client in &clients {
        client.tasks.abort();
        if client.tasks.panicked() > 0 {
            world.history.fail("panic", "a task panicked");
        }
    }
    if world.ether.panicked() > 0 {
        world.history.fail("panic", "a task of the harness panicked");
    }
    inspect_disks(world).await;
}

async fn ledgers(world: &Arc<World>, form: Form) {
    let mut cluster = Cluster::start(world, form).await;
    let plan = LedgerPlan::draw(&world.random.fork(), cluster.plan.quorum);
    world.history.note(format!("{plan:?}"));
    let writer = cluster.client(world, 1);
    let write =
        ledger_run::write(Arc::clone(world), writer.clone(), plan.clone(), world.random.fork());
    writer.tasks.spawn("writer", write);
    cluster.start_recoverers(world);
    for i in 0..plan.readers {
        let node = cluster.client(world, 20 + i);
        let tail =
            ledger_run::tail(Arc::clone(world), node.clone(), world.random.fork(), cluster.until);
        node.tasks.spawn("reader", tail);
    }
    let mut clients = cluster.suffer(world).await;
    // The writer may go on while everything is closed under it, or has ended by then.
    settle_down(world).await;
    let healer = world.client(30, FaultPlan::default());
    clients.push(healer.clone());
    ledger_run::read_everything(world, &healer).await;
    end(world, clients).await;
}

async fn segment(world: &Arc<World>, form: Form, leased: bool) {
    let mut cluster = Cluster::start(world, form).await;
    let plan = SegmentPlan::draw(&world.random.fork(), cluster.plan.quorum);
    world.history.note(format!("{plan:?}"));
    let segment = Segment::create(world, plan.clone()).await;
    for i in 0..plan.owners {
        let node =
            if leased { cluster.leased(world, 40 + i) } else { cluster.client(world, 40 + i) };
        let own = segment_run::own(
            Arc::clone(&segment),
            node.clone(),
            world.random.fork(),
            cluster.until,
        );
        node.tasks.spawn("owner", own);
    }
    cluster.start_recoverers(world);
    let users = Tasks::new("users");
    let until = cluster.until;
    let mut producers = Vec::new();
    for number in 0..plan.producers {
        let producer = Producer::new(&segment, number, world.random.fork());
        producers.push(users.spawn_returning("producer", producer.run(until)));
    }
    for subscription in 0..plan.subscriptions {
        let consume =
            segment_run::consume(Arc::clone(&segment), subscription, world.random.fork(), until);
        users.spawn("consumer", consume);
    }
    let mut clients = cluster.suffer(world).await;
    settle_down(world).await;
    let mut returned = Vec::new();
    for producer in producers {
        match producer.await {
            Ok(producer) => returned.push(producer),
            Err(_) => return world.history.fail("panic", "a producer panicked"),
        }
    }
    let healer = world.client(30, FaultPlan::default());
    clients.push(healer.clone());
    segment_run::inspect(&segment, &healer, returned).await;
    if users.panicked() > 0 {
        world.history.fail("panic", "a producer or consumer panicked");
    }
    end(world, clients).await;
}

async fn subscriptions(world: &Arc<World>) {
    let mut cluster = Cluster::start(world, Form::Memory).await;
    let random = world.random.fork();
    let drawn = SegmentPlan::draw(&random, cluster.plan.quorum);
    let plan = SegmentPlan { subscriptions: 0, keyed: true, ..drawn };
    let dispatch = DispatchPlan::draw(&random);
    world.history.note(format!("{plan:?} {dispatch:?}"));
    let segment = Segment::create(world, plan.clone()).await;
    let subscription = Subscription::new(world, dispatch);
    for i in 0..plan.owners {
        let node = cluster.client(world, 40 + i);
        let own = dispatch_run::own(
            Arc::clone(&segment),
            Arc::clone(&subscription),
            node.clone(),
            world.random.fork(),
            cluster.until,
        );
        node.tasks.spawn("owner", own);
    }
    let users = Tasks::new("users");
    for number in 0..plan.producers {
        let producer = Producer::new(&segment, number, world.random.fork());
        let until = cluster.until;
        users.spawn("producer", async move { drop(producer.run(until).await) });
    }
    let mut clients = cluster.suffer(world).await;
    settle_down(world).await;
    users.idle().await;
    let healer = world.client(30, FaultPlan::default());
    clients.push(healer.clone());
    dispatch_run::inspect(&segment, &subscription, &healer).await;
    if users.panicked() > 0 {
        world.history.fail("panic", "a producer panicked");
    }
    end(world, clients).await;
}

/// I4, by asking every bookie itself.
async fn inspect_disks(world: &World) {
    if world.history.violation().is_some() {
        return;
    }
    let ledgers: Vec<_> = world.history.with_checks(|checks| {
        checks
            .ledgers
            .all()
            .filter_map(|(id, known)| Some((id, known.value.clone()?, known.promised())))
            .collect()
    });
    let mut held: BTreeMap<(u64, u64), BTreeSet<u32>> = BTreeMap::new();
    for (ledger, value, promised) in ledgers {
        let end = match value.state {
            LedgerState::Closed { last, .. } => last,
            _ => promised,
        };
        for entry in 0..=end {
            let entry = entry as u64;
            for at in value.write_set(entry) {
                if holds(world, at, ledger, entry).await {
                    held.entry((ledger, entry)).or_default().insert(at);
                }
            }
        }
    }
    let verdict =
        world.history.with_checks(|checks| checks.ledgers.check_copies(&held, &checks.lost));
    if let Err(violation) = verdict {
        world.history.fail(violation.invariant, violation.what);
    }
}

async fn holds(world: &World, at: u32, ledger: u64, entry: u64) -> bool {
    let to = Incarnation(at);
    let request = ReadRequest {
        to,
        ledger: LedgerId(ledger),
        range: EntryRange { first: EntryId(entry), last: EntryId(entry) },
        fence: false,
        bytes_max: 1,
        deadline: Instant::now() + Duration::from_secs(5),
    };
    let answer = world.loopback.bookie(to).read(request).await;
    matches!(answer.entries.first(), Some(EntryAnswer::Held(entry)) if entry.verify().is_ok())
}
