//! The layer of auto-recovery and GC: rounds of writing while disks and bookies are lost for good, leave service, come back with
//! stale copies, and ledgers are deleted. After each round all is healed, and must become whole again (I5, I20).

use std::{sync::Arc, time::Duration};

use geminga_bookie_client::bookie_rpc::{BookieRpc, Bookies, EntryRange, ListAnswer, Unknown};
use geminga_metadata::{FaultPlan, Key, Op, RangeRequest, Txn, keys};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use geminga_runtime::random::Random;
use tokio::time::{Instant, sleep};

use super::{
    checks::copies_finals,
    faults::Faults,
    history::{Event, LedgerState, LedgerValue},
    ledger_run,
    nodes::{Form, Nodes},
    observe::claim,
    operator::Operator,
    plan::{ClusterPlan, LedgerPlan, UpkeepPlan},
    upkeep::Upkeep,
    world::{ClientNode, World},
};

/// The longest until every listing, loss and drain is settled once all is healed (I20), virtual time.
const WHOLE_PATIENCE: Duration = Duration::from_secs(900);
/// After so long no transaction is on its way any more.
const LANDED: Duration = Duration::from_secs(25);
/// A copy that is about to be dropped is looked at again (G1).
const AGAIN_AFTER: Duration = Duration::from_secs(20);

/// The whole run; the processes that are left at its end.
pub(crate) async fn run(world: &Arc<World>) -> Vec<ClientNode> {
    let mut cluster = ClusterPlan::draw(&world.random.fork());
    let plan = UpkeepPlan::draw(&world.random.fork(), &mut cluster);
    world.history.note(format!("{cluster:?} {plan:?}"));
    let ensemble = cluster.quorum.0;
    let mut nodes = Nodes::new(world, Form::Disk, cluster.bookies);
    nodes.keep_up(Upkeep::draw(world, cluster.bookies, ensemble));
    for node in cluster.late_bookies..cluster.bookies {
        nodes.start(node).await;
    }
    let mut operator = Operator::new(world.random.fork(), ensemble, !plan.damages);
    let mut losses = cluster.quorum.2 - 1;
    let mut clients = Vec::new();
    for round in 0..plan.rounds {
        world.history.note(format!("round {round}"));
        set_claim(world, plan.claimed).await;
        world.network.set_weather(cluster.weather);
        let actors = start_actors(world, &cluster, round);
        let until = Instant::now() + cluster.faulty_for;
        clients.extend(actors.iter().cloned());
        let mut faults = Faults::new(
            world,
            nodes,
            actors,
            losses,
            cluster.fault_gap_ms,
            cluster.store_faults.clone(),
        );
        let upkeep = faults.nodes.upkeep.as_ref();
        let targets = upkeep.map_or_else(Vec::new, |upkeep| upkeep.targets(&faults.nodes));
        faults.clients.extend(targets);
        (faults.damages, faults.operator) = (plan.damages, Some(operator));
        (nodes, losses, operator) = faults.run_with_operator(until).await;
        world.history.note("healing");
        world.heal();
        sleep(LANDED).await;
        operator.remove(world).await;
        nodes.heal().await;
        sleep(Duration::from_millis(world.random.below(60_000))).await;
        set_claim(world, false).await;
        let healer = world.client(30 + round, FaultPlan::default());
        clients.push(healer.clone());
        ledger_run::read_everything(world, &healer).await;
        become_whole(world, &operator).await;
        if world.history.violation().is_some() {
            break;
        }
        if !plan.damages {
            losses = cluster.quorum.2 - 1;
        }
    }
    if let Some(upkeep) = &mut nodes.upkeep {
        upkeep.end_all(world);
    }
    clients
}

/// A writer of this round, with rivals and readers.
fn start_actors(world: &Arc<World>, cluster: &ClusterPlan, round: u32) -> Vec<ClientNode> {
    let until = Instant::now() + cluster.faulty_for;
    let client = |number| world.client(number, cluster.store_faults.clone());
    let plan = LedgerPlan::draw(&world.random.fork(), cluster.quorum);
    let mut actors = vec![client(40 + round)];
    let writer = actors[0].clone();
    let write =
        ledger_run::write(Arc::clone(world), writer.clone(), plan.clone(), world.random.fork());
    writer.tasks.spawn("writer", write);
    for i in 0..cluster.recoverers.min(1) {
        let node = client(50 + 10 * round + i);
        // An owner's epoch: a helper's is that of the replicators alone (A3).
        let rival = ledger_run::recover_rival(
            Arc::clone(world),
            node.clone(),
            world.random.fork(),
            until,
            1..3,
        );
        node.tasks.spawn("recoverer", rival);
        actors.push(node);
    }
    if plan.readers > 0 {
        let node = client(80 + round);
        let tail = ledger_run::tail(Arc::clone(world), node.clone(), world.random.fork(), until);
        node.tasks.spawn("reader", tail);
        actors.push(node);
    }
    actors
}

/// While the bundle of the ledgers is claimed, no replicator may fence them (A3).
async fn set_claim(world: &World, claimed: bool) {
    let op = if claimed { Op::put(claim(), "somebody") } else { Op::Delete(claim()) };
    world.observed.txn(Txn::new().then(op)).await.expect("the store below its faults works");
}

/// Everything that is to be repaired is, in time (I20), and then every copy is where the metadata says (I5).
async fn become_whole(world: &World, operator: &Operator) {
    let deadline = Instant::now() + WHOLE_PATIENCE;
    while world.history.violation().is_none() {
        let mut left = names(world, keys::under_replicateds()).await;
        left.extend(names(world, keys::losts()).await);
        left.extend(operator.unfinished(world).await.iter().map(|n| format!("drain of {n}")));
        if left.is_empty() {
            let short = world.history.with_checks(|checks| {
                checks.ledgers.all().filter_map(|(id, k)| Some((id, k.value.clone()?))).collect()
            });
            match every_copy(world, short).await {
                None => return,
                Some(short) if Instant::now() > deadline => {
                    return world.history.fail("I5", short);
                }
                // A drain or an audit may list it now; without either it stays as it is, and fails in time.
                Some(short) => world.history.note(format!("not whole: {short}")),
            }
            sleep(AGAIN_AFTER).await;
        } else if Instant::now() > deadline {
            return world
                .history
                .fail("I20", format!("not repaired though all is healed: {left:?}"));
        }
        sleep(Duration::from_secs(3)).await;
    }
}

async fn names(world: &World, prefix: Key) -> Vec<String> {
    let request = RangeRequest { prefix, after: None, limit: 0, at: None };
    let page = world.observed.range(request).await.expect("the store below its faults works");
    page.items.iter().map(|item| item.key.to_string()).collect()
}

/// The first slot that does not show what it should.
async fn every_copy(world: &World, ledgers: Vec<(u64, LedgerValue)>) -> Option<String> {
    for (ledger, value) in &ledgers {
        dropped(world, *ledger, value).await;
        if value.state != LedgerState::Deleted && !matches!(value.state, LedgerState::Closed { .. })
        {
            return Some(format!("ledger {ledger} is {:?}", value.state));
        }
        for (first, end, slots) in copies_finals(value) {
            for (slot, at) in slots.iter().enumerate() {
                if *at == 0 {
                    return Some(format!("slot {slot} of ledger {ledger} is vacant"));
                }
                if first == end {
                    continue;
                }
                let held = list(world, *at, *ledger, first, end - 1).await;
                let missing = (first..end).find(|entry| {
                    let ours =
                        (0..value.write).any(|i| (*entry as usize + i) % value.ensemble == slot);
                    let shown = matches!(&held, ListAnswer::Held(h) if h.contains(EntryId(*entry)));
                    ours && !shown
                });
                if let Some(entry) = missing {
                    return Some(format!("{at} lacks entry {entry} of ledger {ledger}: {held:?}"));
                }
            }
        }
    }
    None
}

async fn list(world: &World, at: u32, ledger: u64, first: u64, last: u64) -> ListAnswer {
    let range = EntryRange { first: EntryId(first), last: EntryId(last) };
    let deadline = Instant::now() + Duration::from_secs(5);
    let to = Incarnation(at);
    let bookie: Arc<dyn BookieRpc> = world.loopback.bookie(to);
    bookie.list(to, LedgerId(ledger), range, deadline).await
}

/// Counts what GC did (G1): who held something of a ledger that is not its own any more, and has nothing now.
async fn dropped(world: &World, ledger: u64, value: &LedgerValue) {
    let holders: Vec<u32> = world.history.with_checks(|checks| checks.copies.holders(ledger));
    for at in holders {
        let named = value.fragments.iter().any(|(_, slots)| slots.contains(&at));
        let deleted = value.state == LedgerState::Deleted;
        let known = world.history.with_checks(|checks| checks.copies.has_dropped(at, ledger));
        if known || (named && !deleted) {
            continue;
        }
        let gone = match list(world, at, ledger, 0, 1_000).await {
            ListAnswer::Held(held) => held.runs().next().is_none(),
            ListAnswer::Unknown(why) => why == Unknown::Dropped,
        };
        if gone {
            world.history.record(Event::Dropped { at, ledger });
        }
    }
}

impl UpkeepPlan {
    /// The plan of a seed; changes what it needs of the cluster's.
    pub(crate) fn draw(random: &Random, cluster: &mut ClusterPlan) -> Self {
        let damages = random.chance(0.2);
        cluster.bookies = cluster.quorum.0 + 1 + random.below(3) as usize;
        cluster.late_bookies =
            if cluster.late_bookies > 0 { cluster.bookies - cluster.quorum.0 + 1 } else { 0 };
        cluster.faulty_for = Duration::from_millis(2_000 + random.below(60_000));
        cluster.fault_gap_ms = [300, 1_000, 3_000][random.below(3) as usize];
        Self { rounds: 1 + random.below(4) as u32, damages, claimed: random.chance(0.5) }
    }
}
