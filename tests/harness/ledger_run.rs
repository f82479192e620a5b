//! The first layer: one writer, tail readers and rival recoverers on a few ledgers, while everything fails.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use geminga_bookie_client::{
    AppendError, AppendFuture, CloseVerdict, LedgerMetadata, LedgerOwner, LedgerState,
    LedgerWriter, Quorum, RecoveryError, Sealed, Versioned, bookie_rpc::EntryRange,
    bookie_rpc::LacAnswer, settled_close,
};
use geminga_metadata::{Committed, commit, keys};
use geminga_proto::ids::{EntryId, Epoch, LedgerId, SegmentId, TopicId};
use geminga_runtime::random::Random;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    coverage::Seen,
    history::{Event, Hash, LedgerState as Stands, LedgerValue},
    plan::LedgerPlan,
    world::{ClientNode, World},
};

/// The longest that anything may take once all is healed (I20), virtual time.
const HEALED_PATIENCE: Duration = Duration::from_secs(300);

/// Writes ledger after ledger, until the plan is done or the ledger is taken away.
pub(crate) async fn write(world: Arc<World>, node: ClientNode, plan: LedgerPlan, random: Random) {
    let mut payloads = Payloads { next: 0, again: VecDeque::new(), random: random.fork() };
    for _ in 0..plan.ledgers {
        let Some(writer) = create(&world, &node, &plan).await else { return };
        let going_on = fill(&world, &writer, &plan, &random, &mut payloads).await;
        if !going_on || random.chance(plan.dies) {
            world.history.note(format!("the writer of ledger {} stops", writer.id()));
            if random.chance(0.5) {
                world.history.saw(Seen::ClientKilled);
                node.tasks.abort();
            }
            return;
        }
        if random.chance(plan.pauses) {
            sleep(Duration::from_millis(random.below(30_000))).await;
        }
        if !close(&world, &node, &writer, &mut payloads).await {
            return;
        }
    }
}

struct Payloads {
    next: u64,
    /// Not acknowledged by a ledger that this writer closed below them: sent again (M2).
    again: VecDeque<Bytes>,
    random: Random,
}

impl Payloads {
    fn take(&mut self) -> Bytes {
        if let Some(payload) = self.again.pop_front() {
            return payload;
        }
        let filler = self.random.below(200) as usize;
        let text = format!("{:08}{}", self.next, ".".repeat(filler));
        self.next += 1;
        text.into()
    }
}

async fn create(world: &World, node: &ClientNode, plan: &LedgerPlan) -> Option<LedgerWriter> {
    let id = LedgerId(world.next_ledger());
    let quorum = Quorum::new(plan.quorum.0, plan.quorum.1, plan.quorum.2).expect("plans are legal");
    let owner =
        LedgerOwner { segment: SegmentId { topic: TopicId(1), segment: 0 }, epoch: Epoch(1) };
    let started = Instant::now();
    let new = loop {
        match node.client.plan_create(id, quorum, owner).await {
            Ok(new) => break new,
            Err(error) if started.elapsed() < HEALED_PATIENCE => {
                world.history.note(format!("no ensemble for ledger {id}: {error}"));
                sleep(Duration::from_millis(500)).await;
            }
            Err(_) => return None,
        }
    };
    let key = keys::ledger(id);
    let store: geminga_metadata::SharedStore = Arc::new(node.store.clone());
    let token = CancellationToken::new();
    let created = match commit(&store, &new.txn, &token).await {
        Committed::Done(revision) => Versioned::created(new.metadata, revision),
        // Ids are never reused, so this very creation landed (MD3); but a rival may have changed it since, and the writer's
        // CAS must not take that revision for its own.
        Committed::Conflict { found, .. } => {
            let found = found.into_iter().flatten().find(|kv| kv.key == key)?;
            let found = LedgerMetadata::from_key_value(&found).ok()?;
            (found.value == new.metadata).then_some(found)?
        }
        Committed::Unsettled | Committed::Refused(_) => return None,
    };
    Some(node.client.writer(created))
}

/// Appends the plan's entries. False if the ledger is not ours any more.
async fn fill(
    world: &World,
    writer: &LedgerWriter,
    plan: &LedgerPlan,
    random: &Random,
    payloads: &mut Payloads,
) -> bool {
    let mut sent = 0;
    let mut pending: VecDeque<(u64, Bytes, AppendFuture)> = VecDeque::new();
    let mut verdict = Going::On;
    while sent < plan.entries && verdict == Going::On {
        let payload = payloads.take();
        writer.ready(payload.len()).await;
        let answer = writer.append(payload.clone().into());
        pending.push_back((sent, payload, answer));
        sent += 1;
        if pending.len() > plan.outstanding {
            verdict = settle_oldest(world, writer, &mut pending, payloads).await;
        }
        if random.chance(plan.gap_chance) {
            sleep(Duration::from_millis(random.below(plan.gap_ms_max + 1))).await;
        }
    }
    if verdict == Going::On && random.chance(0.3) {
        // Leaves the rest pending when it closes.
        payloads.again.extend(pending.iter().map(|(_, payload, _)| payload.clone()));
        let writer = writer.clone();
        let history = world.history.clone();
        let rest = pending;
        world.ether.spawn("late answers", async move {
            for (_, payload, answer) in rest {
                if let Ok(entry) = answer.await {
                    let payload = Hash::of(&payload);
                    history.record(Event::Acknowledged {
                        ledger: writer.id().0,
                        entry: entry.0,
                        payload,
                    });
                }
            }
        });
        return true;
    }
    while !pending.is_empty() {
        let next = settle_oldest(world, writer, &mut pending, payloads).await;
        verdict = verdict.worse(next);
    }
    verdict != Going::Lost
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Going {
    On,
    /// The ledger takes no more: close it, go on in the next.
    Ended,
    /// Somebody else has it.
    Lost,
}

impl Going {
    fn worse(self, other: Self) -> Self {
        self.max(other)
    }
}

async fn settle_oldest(
    world: &World,
    writer: &LedgerWriter,
    pending: &mut VecDeque<(u64, Bytes, AppendFuture)>,
    payloads: &mut Payloads,
) -> Going {
    let Some((number, payload, answer)) = pending.pop_front() else { return Going::On };
    let ledger = writer.id().0;
    match answer.await {
        Ok(entry) => {
            if entry.0 != number {
                world
                    .history
                    .fail("W1", format!("append {number} of ledger {ledger} became entry {entry}"));
            }
            let payload = Hash::of(&payload);
            world.history.record(Event::Acknowledged { ledger, entry: entry.0, payload });
            Going::On
        }
        Err(error) => {
            world.history.note(format!("append {number} of ledger {ledger}: {error}"));
            match error {
                AppendError::Full | AppendError::Ended | AppendError::NotAcknowledged => {
                    payloads.again.push_back(payload);
                    Going::Ended
                }
                AppendError::TooLarge => Going::Ended,
                AppendError::Indeterminate => {
                    // A write failure ends here, too: the close tells whether the ledger is still ours (M2).
                    payloads.again.push_back(payload);
                    Going::Ended
                }
            }
        }
    }
}

/// Section 6. True if the ledger ended where this writer says.
async fn close(
    world: &World,
    node: &ClientNode,
    writer: &LedgerWriter,
    payloads: &mut Payloads,
) -> bool {
    let ledger = writer.id();
    let mut sealed: Sealed = match writer.seal().await {
        Ok(sealed) => sealed,
        Err(error) => {
            world.history.note(format!("seal of ledger {ledger}: {error}"));
            return false;
        }
    };
    let store: geminga_metadata::SharedStore = Arc::new(node.store.clone());
    let token = CancellationToken::new();
    for _ in 0..10 {
        let verdict = match commit(&store, &sealed.txn, &token).await {
            Committed::Done(_) => CloseVerdict::Ours,
            Committed::Conflict { found, .. } => {
                let key = keys::ledger(ledger);
                let found = found.into_iter().flatten().find(|kv| kv.key == key);
                settled_close(found.as_ref(), &sealed)
            }
            Committed::Unsettled | Committed::Refused(_) => return false,
        };
        match verdict {
            CloseVerdict::Ours | CloseVerdict::SameEnd => {
                let last = geminga_bookie_client::entry::encode_lac(sealed.last);
                world.history.record(Event::EndTold {
                    ledger: ledger.0,
                    last,
                    length: sealed.length,
                });
                return true;
            }
            CloseVerdict::Lost => {
                world.history.saw(Seen::WriterLost);
                world.history.note(format!("ledger {ledger} was closed by another"));
                payloads.again.clear();
                return false;
            }
            CloseVerdict::Rebuild(next) => sealed = *next,
        }
    }
    false
}

/// Recovers some ledger at some time, whoever else does, whether its writer lives or not.
pub(crate) async fn recover_rival(
    world: Arc<World>,
    node: ClientNode,
    random: Random,
    until: Instant,
    epochs: std::ops::Range<u64>,
) {
    loop {
        sleep(Duration::from_millis(random.below(15_000))).await;
        if Instant::now() > until {
            return;
        }
        let known: Vec<u64> =
            world.history.with_checks(|checks| checks.ledgers.all().map(|(id, _)| id).collect());
        let Some(last) = known.len().checked_sub(1) else { continue };
        let ledger = LedgerId(known[last - (random.below(2) as usize).min(last)]);
        let epoch = Epoch(epochs.start + random.below(epochs.end - epochs.start));
        if random.chance(0.2) {
            // Dies in the middle of it.
            let patience = Duration::from_millis(random.below(200));
            let _ =
                tokio::time::timeout(patience, recover_once(&world, &node, ledger, epoch)).await;
            world.history.saw(Seen::ClientKilled);
            node.tasks.abort();
            return;
        }
        recover_once(&world, &node, ledger, epoch).await;
    }
}

async fn recover_once(
    world: &World,
    node: &ClientNode,
    ledger: LedgerId,
    epoch: Epoch,
) -> Option<LedgerMetadata> {
    let number = node.number;
    world.history.note(format!("client {number} recovers ledger {ledger} with epoch {epoch}"));
    match node.client.recover_and_close(ledger, epoch).await {
        Ok(closed) => {
            let last = geminga_bookie_client::entry::encode_lac(closed.last);
            let length = closed.length;
            world.history.record(Event::EndTold { ledger: ledger.0, last, length });
            Some(closed.metadata)
        }
        Err(error @ RecoveryError::Metadata(_)) => {
            world.history.fail("I9", error.to_string());
            None
        }
        Err(error) => {
            if matches!(error, RecoveryError::Incomplete { .. }) {
                world.history.saw(Seen::RecoveryAborted);
            }
            world.history.note(format!("client {number}, ledger {ledger}: {error}"));
            None
        }
    }
}

/// Follows the newest ledger as a tail reader does (RD1..RD3).
pub(crate) async fn tail(world: Arc<World>, node: ClientNode, random: Random, until: Instant) {
    let (mut ledger, mut next) = (1, 0);
    while Instant::now() < until {
        sleep(Duration::from_millis(1 + random.below(2_000))).await;
        let id = LedgerId(ledger);
        let store: geminga_metadata::SharedStore = Arc::new(node.store.clone());
        let Ok((_, Some(found))) = store.get(&keys::ledger(id)).await else { continue };
        let metadata = match LedgerMetadata::decode(&found.value) {
            Ok(metadata) => metadata,
            Err(error) => return world.history.fail("I9", error.to_string()),
        };
        let end = match metadata.state {
            LedgerState::Closed { last, .. } => last,
            LedgerState::Open => learn_lac(&world, &node, &metadata).await,
            _ => continue,
        };
        let closed = metadata.is_closed();
        match end {
            Some(end) if next <= end.0 => {
                next = read_some(&world, &node, &metadata, next, end.0).await
            }
            _ if closed => (ledger, next) = (ledger + 1, 0),
            _ => {}
        }
    }
}

/// READ_LAC from everyone in the last fragment.
async fn learn_lac(world: &World, node: &ClientNode, metadata: &LedgerMetadata) -> Option<EntryId> {
    let bookies = world.network.view(node.number);
    let deadline = Instant::now() + Duration::from_secs(2);
    let asked = metadata
        .last_fragment()
        .holders()
        .map(|(_, at)| bookies.bookie(at).read_lac(at, metadata.id, deadline));
    let answers = futures::future::join_all(asked).await;
    answers
        .into_iter()
        .filter_map(|answer| if let LacAnswer::Known(lac) = answer { lac } else { None })
        .max()
}

/// Reads from `next` on; the entry to go on with.
async fn read_some(
    world: &World,
    node: &ClientNode,
    metadata: &LedgerMetadata,
    next: u64,
    end: u64,
) -> u64 {
    let reader = node.client.reader(metadata.id);
    let range = EntryRange { first: EntryId(next), last: EntryId(end) };
    match reader.read(metadata, range, 4_096).await {
        Ok(entries) => {
            let mut expected = next;
            for entry in entries {
                if entry.id.0 != expected || entry.ledger != metadata.id {
                    world.history.fail(
                        "I6",
                        format!(
                            "asked for entry {expected} of ledger {}, got {} of {}",
                            metadata.id, entry.id, entry.ledger
                        ),
                    );
                    return end + 1;
                }
                let payload = Hash::of(&entry.payload.to_bytes());
                if metadata.state == LedgerState::Open {
                    world.history.saw(Seen::TailRead);
                }
                world.history.record(Event::ReadByCaller {
                    ledger: metadata.id.0,
                    entry: expected,
                    payload,
                });
                expected += 1;
            }
            if expected == next {
                world.history.fail(
                    "RD4",
                    format!("a read of ledger {} from {next} to {end} gave nothing", metadata.id),
                );
                return end + 1;
            }
            expected
        }
        Err(error) => {
            world.history.note(format!("client {} reads: {error}", node.number));
            sleep(Duration::from_millis(200)).await;
            next
        }
    }
}

/// When all is healed: every ledger can be closed, and every entry up to its end read (I20, I16).
pub(crate) async fn read_everything(world: &Arc<World>, node: &ClientNode) {
    let ledgers: Vec<u64> = world.history.with_checks(|checks| {
        let needed = |value: &LedgerValue| value.state != Stands::Deleted;
        let ledgers = checks.ledgers.all();
        ledgers.filter(|(_, k)| k.value.as_ref().is_some_and(needed)).map(|(id, _)| id).collect()
    });
    for ledger in ledgers {
        let id = LedgerId(ledger);
        let deadline = Instant::now() + HEALED_PATIENCE;
        let metadata = loop {
            if let Some(metadata) = recover_once(world, node, id, Epoch(9)).await {
                break metadata;
            }
            if Instant::now() > deadline {
                return world
                    .history
                    .fail("I20", format!("ledger {id} cannot be recovered though all is healed"));
            }
            sleep(Duration::from_millis(500)).await;
        };
        let Some(last) = metadata.last() else { continue };
        let mut next = 0;
        while next <= last.0 {
            next = read_some(world, node, &metadata, next, last.0).await;
            if Instant::now() > deadline {
                return world.history.fail(
                    "I20",
                    format!("entry {next} of ledger {id} cannot be read though all is healed"),
                );
            }
        }
    }
}
