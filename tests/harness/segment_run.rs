//! The second layer: a segment that owners take from each other while producers, consumers and helpers go on, and
//! everything fails. Claims are a hint (O1), so here every owner holds the same one.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use geminga_managed_ledger::{
    Claim, LoadError, ManagedLedger, ManagedLedgerMetrics, ManagedLedgers, ManagedLedgersParts,
    ProducerIdentity, ProducerOpen, PublishBatch, PublishError, SettleError, Settlement, Start,
    Status, StoredBatch,
};
use geminga_metadata::{Op, Standing, Txn, TxnOutcome, keys};
use geminga_proto::{
    ids::{Bundle, Offset, SegmentId, SubscriptionId, TopicId},
    names::ProducerName,
    v1::RecordIndex,
};
use geminga_runtime::{budget::ByteBudget, clock::Clock, random::Random};
use tokio::time::{Instant, sleep, timeout};

use super::{
    coverage::Seen,
    history::{CursorShown, Event, Hash, LogBatch},
    plan::SegmentPlan,
    world::{ClientNode, World},
};

/// The longest that anything may take once all is healed (I20), virtual time.
const HEALED_PATIENCE: Duration = Duration::from_secs(300);
/// An answer that does not come by then is not waited for; its owner may stand still.
pub(super) const CALLER_PATIENCE: Duration = Duration::from_secs(40);

/// The segment, as its callers find it. Actors hold it in an `Arc`.
pub(crate) struct Segment {
    pub(super) world: Arc<World>,
    pub(super) plan: SegmentPlan,
    id: SegmentId,
    claim: Claim,
    budget: ByteBudget,
    owners: AtomicU32,
    serving: Mutex<Vec<Serving>>,
}

/// A load that succeeded.
#[derive(Clone)]
pub(super) struct Serving {
    pub(super) owner: u32,
    pub(super) ledger: ManagedLedger,
    standing: Standing,
}

impl Segment {
    /// Makes it, with its claim.
    pub(crate) async fn create(world: &Arc<World>, plan: SegmentPlan) -> Arc<Self> {
        let id = SegmentId { topic: TopicId(1), segment: 0 };
        let key = keys::owner(Bundle(0));
        let txn = Txn::new()
            .then(ManagedLedgers::initial_list(id))
            .then(Op::put(key.clone(), "everyone"));
        let outcome = world.observed.txn(txn).await.expect("the store below its faults works");
        let TxnOutcome::Done(create_revision) = outcome else {
            unreachable!("nothing is compared")
        };
        Arc::new(Self {
            world: Arc::clone(world),
            plan,
            id,
            claim: Claim { key, create_revision },
            budget: ByteBudget::new(1 << 30),
            owners: AtomicU32::new(1),
            serving: Mutex::default(),
        })
    }

    fn key(&self) -> (u64, u32) {
        (self.id.topic.0, self.id.segment)
    }

    pub(super) fn factory(&self, node: &ClientNode) -> ManagedLedgers {
        ManagedLedgers::new(ManagedLedgersParts {
            client: node.client.clone(),
            store: Arc::new(node.store.clone()),
            clock: self.world.shared_clock(),
            random: self.world.random.fork(),
            tasks: node.tasks.clone(),
            config: self.plan.config.clone(),
            metrics: ManagedLedgerMetrics::default(),
            cold: None,
        })
    }

    /// Takes it over, and shows what was found.
    pub(super) async fn load(
        &self,
        node: &ClientNode,
        ledgers: &ManagedLedgers,
    ) -> Result<Serving, LoadError> {
        let owner = self.owners.fetch_add(1, Ordering::Relaxed);
        let history = &self.world.history;
        history.record(Event::LoadBegun { segment: self.key(), owner });
        node.store.loads(true);
        let loaded = ledgers.load(self.id, self.claim.clone()).await;
        node.store.loads(false);
        let ledger = loaded?;
        history.saw(Seen::Takeover);
        history.note(format!("owner {owner} serves in epoch {}", ledger.epoch()));
        let serving = Serving { owner, ledger, standing: node.standing.clone() };
        for subscription in 0..self.plan.subscriptions {
            self.show_cursor(&serving, subscription);
        }
        let mut all = self.serving.lock().expect("no panic in here");
        all.retain(|serving| *serving.ledger.status().borrow() == Status::Serving);
        if !all.is_empty() {
            history.saw(Seen::StaleOwnerAnswered);
        }
        history.saw_if(all.iter().any(|one| !one.standing.confirmed()), Seen::TakenProvisional);
        all.push(serving.clone());
        Ok(serving)
    }

    fn show_cursor(&self, serving: &Serving, subscription: u64) {
        let shown = serving.ledger.cursor(SubscriptionId(subscription)).map(|view| CursorShown {
            next: view.mark_delete_next.0,
            holes: view.holes.iter().map(|(first, last)| (first.0, last.0)).collect(),
        });
        let (segment, epoch, owner) = (self.key(), serving.ledger.epoch().0, serving.owner);
        self.world.history.record(Event::CursorSeen { segment, epoch, owner, subscription, shown });
    }

    /// Somebody who serves, or believes to.
    fn pick(&self, random: &Random) -> Option<Serving> {
        let all = self.serving.lock().expect("no panic in here");
        let stale = random.chance(0.2).then(|| random.below(all.len().max(1) as u64) as usize);
        all.get(stale.unwrap_or_else(|| all.len().saturating_sub(1))).cloned()
    }
}

/// An owner: takes the segment, keeps it for a while, loses it, gives it back or dies.
pub(crate) async fn own(segment: Arc<Segment>, node: ClientNode, random: Random, until: Instant) {
    let history = segment.world.history.clone();
    let ledgers = segment.factory(&node);
    while Instant::now() < until {
        sleep(Duration::from_millis(random.below(segment.plan.takeover_ms + 1))).await;
        node.standing.until_confirmed().await;
        let serving = match segment.load(&node, &ledgers).await {
            Ok(serving) => serving,
            Err(error) => {
                history.note(format!("client {} does not load: {error}", node.number));
                continue;
            }
        };
        let mut status = serving.ledger.status();
        let kept = Duration::from_millis(random.below(4 * segment.plan.takeover_ms + 1));
        let ended = async {
            status
                .wait_for(|status| *status != Status::Serving)
                .await
                .ok()
                .map(|status| status.clone())
        };
        if let Ok(Some(status)) = timeout(kept, ended).await {
            if matches!(status, Status::Fenced(_)) {
                history.saw(Seen::OwnerFenced);
                history.saw_if(!node.standing.confirmed(), Seen::FencedProvisional);
            }
            history.note(format!("owner {}: {status:?}", serving.owner));
            continue;
        }
        match random.below(5) {
            0 => {
                let closed = timeout(CALLER_PATIENCE, serving.ledger.close()).await.is_ok();
                history.saw_if(closed, Seen::OwnerClosed);
            }
            1 => {
                history.saw(Seen::ClientKilled);
                history.note(format!("client {} is killed", node.number));
                node.tasks.abort();
                return;
            }
            _ => {} // goes on serving, and others take it meanwhile
        }
    }
}

/// Keys of a producer's messages.
const KEYS: u64 = 6;

/// A batch as it was cut; it never changes (DD3).
struct Cut {
    low: u64,
    high: u64,
    payload: Bytes,
    index: RecordIndex,
    stored: bool,
    sent: bool,
}

/// A named producer, who repeats whatever is of unknown outcome until it is stored.
pub(crate) struct Producer {
    segment: Arc<Segment>,
    name: String,
    random: Random,
    stream: u64,
    cuts: Vec<Cut>,
}

impl Producer {
    /// Nothing sent yet.
    pub(crate) fn new(segment: &Arc<Segment>, number: u64, random: Random) -> Self {
        Self {
            segment: Arc::clone(segment),
            name: format!("p{number}"),
            random,
            stream: 0,
            cuts: Vec::new(),
        }
    }

    /// Publishes until the time is over; gives itself back.
    pub(crate) async fn run(mut self, until: Instant) -> Self {
        while Instant::now() < until && self.cuts.len() < self.segment.plan.steps {
            sleep(Duration::from_millis(self.random.below(self.segment.plan.gap_ms + 1))).await;
            let Some(serving) = self.segment.pick(&self.random) else { continue };
            if !self.open(&serving).await {
                continue;
            }
            for _ in 0..1 + self.random.below(8) {
                if Instant::now() >= until || !self.round(&serving).await {
                    break;
                }
            }
        }
        self
    }

    /// True if everything that was acknowledged is known there.
    async fn open(&mut self, serving: &Serving) -> bool {
        self.stream += 1;
        let name = ProducerName::parse(&self.name).expect("a legal name");
        let open = ProducerOpen::shared(ProducerIdentity::Named(name), self.stream);
        let opened = timeout(CALLER_PATIENCE, serving.ledger.open_producer(open)).await;
        let Ok(Ok(opened)) = opened else { return false };
        let (segment, owner, persisted) = (self.segment.key(), serving.owner, opened.persisted);
        let producer = self.name.clone();
        self.segment.world.history.record(Event::ProducerOpened {
            segment,
            owner,
            producer,
            persisted,
        });
        for i in 0..self.cuts.len() {
            if self.cuts[i].high <= persisted && !self.cuts[i].stored {
                self.stored(serving, i, None, true);
            }
        }
        // A superseded owner may know less; whoever loads later may not.
        self.cuts.iter().all(|cut| !cut.stored || cut.high <= persisted)
    }

    fn stored(&mut self, serving: &Serving, cut: usize, offset: Option<u64>, duplicate: bool) {
        let cut = &mut self.cuts[cut];
        cut.stored = true;
        if !serving.standing.confirmed() {
            self.segment.world.history.saw(Seen::PublishedProvisional);
        }
        self.segment.world.history.record(Event::Published {
            segment: self.segment.key(),
            epoch: serving.ledger.epoch().0,
            owner: serving.owner,
            producer: self.name.clone(),
            high: cut.high,
            offset,
            duplicate,
            payload: Hash::of(&cut.payload),
        });
    }

    /// Some batches in a row, from the first that is not stored; one may be left out, one may be sent twice. False: open
    /// again first.
    async fn round(&mut self, serving: &Serving) -> bool {
        let history = self.segment.world.history.clone();
        let first = self.cuts.iter().position(|cut| !cut.stored).unwrap_or(self.cuts.len());
        let mut sent = Vec::new();
        for i in first..first + 1 + self.random.below(self.segment.plan.outstanding) as usize {
            self.cut_up_to(i);
            if self.random.chance(0.05) {
                continue; // lost on its way: what follows must be refused (DD5)
            }
            for _ in 0..if self.random.chance(0.1) { 2 } else { 1 } {
                if std::mem::replace(&mut self.cuts[i].sent, true) {
                    history.saw(Seen::BatchRepeated);
                }
                sent.push((i, serving.ledger.publish(self.batch(i))));
            }
            if self.random.chance(0.1) {
                sleep(Duration::from_millis(self.random.below(50))).await;
            }
        }
        let mut going_on = true;
        for (i, outcome) in sent {
            let Ok(outcome) = timeout(CALLER_PATIENCE, outcome).await else { return false };
            match outcome {
                Ok(stored) => self.stored(
                    serving,
                    i,
                    stored.base_offset.map(|offset| offset.0),
                    stored.duplicate,
                ),
                Err(PublishError::OutOfSequence { .. }) => history.saw(Seen::OutOfSequence),
                Err(
                    error @ (PublishError::SequenceConflict
                    | PublishError::Invalid(_)
                    | PublishError::TooLarge { .. }),
                ) => {
                    history.fail(
                        "DD3",
                        format!(
                            "batch {} of {} was refused: {error}",
                            self.cuts[i].high, self.name
                        ),
                    );
                    return false;
                }
                Err(error) => {
                    if error == PublishError::Fenced {
                        history.saw(Seen::PublishIndeterminate);
                    }
                    history.note(format!("batch {} of {}: {error}", self.cuts[i].high, self.name));
                    going_on = false;
                }
            }
        }
        going_on
    }

    fn cut_up_to(&mut self, cut: usize) {
        while self.cuts.len() <= cut {
            // Sequences may have gaps; a batch is a run of them.
            let before = self.cuts.last().map_or(0, |cut| cut.high);
            let low = before + 1 + if self.random.chance(0.1) { self.random.below(3) } else { 0 };
            let high = low + self.random.below(3);
            let payload = format!(
                "{} {low}-{high} {}",
                self.name,
                ".".repeat(self.random.below(60) as usize)
            );
            let index = self.index(low, high);
            let payload = payload.into();
            self.cuts.push(Cut { low, high, payload, index, stored: false, sent: false });
        }
    }

    /// Keys and times of the messages, where the run has any.
    fn index(&self, low: u64, high: u64) -> RecordIndex {
        if !self.segment.plan.keyed {
            return RecordIndex::default();
        }
        let now = self.segment.world.clock.now().0;
        let due =
            |number: u64| if number.is_multiple_of(4) { now + number * 7_919 % 20_000 } else { 0 };
        RecordIndex {
            key_hash: (low..=high).map(|number| (number % KEYS) as u32 * (u32::MAX / 7)).collect(),
            has_key: Vec::new(),
            deliver_at_ms: (low..=high).map(due).collect(),
        }
    }

    fn batch(&self, cut: usize) -> PublishBatch {
        let prev = cut.checked_sub(1).map_or(0, |before| self.cuts[before].high);
        let Cut { low, high, payload, index, .. } = &self.cuts[cut];
        PublishBatch {
            producer: Bytes::from(self.name.clone()),
            stream_number: self.stream,
            prev,
            lo: *low,
            hi: *high,
            count: (high - low + 1) as u32,
            format: 1,
            codec: 0,
            uncompressed_size: payload.len() as u32,
            index: index.clone(),
            payload: payload.clone(),
            expected_offset: None,
            traceparent: String::new(),
            trace: None,
            permit: self
                .segment
                .budget
                .try_acquire(payload.len() as u64)
                .expect("the budget is large"),
        }
    }
}

/// A subscription's consumer: reads somewhere, settles some of it, in any order.
pub(crate) async fn consume(
    segment: Arc<Segment>,
    subscription: u64,
    random: Random,
    until: Instant,
) {
    let id = SubscriptionId(subscription);
    for _ in 0..2 * segment.plan.steps {
        if Instant::now() >= until {
            return;
        }
        sleep(Duration::from_millis(random.below(2 * segment.plan.gap_ms + 1))).await;
        let Some(serving) = segment.pick(&random) else { continue };
        if serving.ledger.cursor(id).is_none() {
            let made =
                timeout(CALLER_PATIENCE, serving.ledger.create_cursor(id, Start::Earliest)).await;
            if !matches!(made, Ok(Ok(()))) {
                continue;
            }
            segment
                .world
                .history
                .record(Event::CursorMade { segment: segment.key(), subscription });
        }
        let next = serving.ledger.cursor(id).map_or(0, |view| view.mark_delete_next.0);
        let from = if random.chance(0.8) { next } else { random.below(next + 1) };
        let read = timeout(CALLER_PATIENCE, serving.ledger.read(Offset(from), 2_000, 50)).await;
        let Ok(Ok(batches)) = read else { continue };
        for batch in &batches {
            let batch = seen(batch);
            segment.world.history.record(Event::BatchRead { segment: segment.key(), batch });
        }
        let Some(end) =
            batches.last().map(|batch| batch.base_offset.0 + u64::from(batch.header.count))
        else {
            continue;
        };
        for _ in 0..1 + random.below(3) {
            settle_some(&segment, &serving, subscription, from, end, &random).await;
        }
    }
}

async fn settle_some(
    segment: &Segment,
    serving: &Serving,
    subscription: u64,
    from: u64,
    end: u64,
    random: &Random,
) {
    let history = &segment.world.history;
    let first = from + random.below(end - from);
    let last = first + random.below((end - first).min(5));
    // Everything at or below is settled by an UpTo, also what lies before `from`.
    let (settlement, first) = if random.chance(0.4) {
        (Settlement::UpTo(Offset(last)), 0)
    } else {
        (Settlement::Accept(vec![(Offset(first), Offset(last))]), first)
    };
    let key = segment.key();
    let asked = history.record(Event::SettleAsked { segment: key, subscription, first, last });
    match timeout(CALLER_PATIENCE, serving.ledger.settle(SubscriptionId(subscription), settlement))
        .await
    {
        Ok(Ok(next)) => {
            history.saw_if(!serving.standing.confirmed(), Seen::SettledProvisional);
            let (epoch, owner, next) = (serving.ledger.epoch().0, serving.owner, next.0);
            history.record(Event::Settled {
                segment: key,
                epoch,
                owner,
                subscription,
                asked,
                first,
                last,
                next,
            });
        }
        Ok(Err(error)) => {
            if error == SettleError::Fenced {
                history.saw(Seen::SettleIndeterminate);
            }
            history
                .note(format!("settle {first} to {last} of subscription {subscription}: {error}"));
        }
        Err(_) => history
            .note(format!("settle {first} to {last} of subscription {subscription}: no answer")),
    }
}

fn seen(batch: &StoredBatch) -> LogBatch {
    let (producer, low, high) = match &batch.header.producer {
        Some(producer) => (producer.name.clone(), producer.lo_sequence, producer.hi_sequence),
        None => Default::default(),
    };
    let (offset, count) = (batch.base_offset.0, u64::from(batch.header.count));
    LogBatch { offset, count, producer, low, high, payload: Hash::of(&batch.payload) }
}

/// When all is healed: one more owner takes it, finds everything, and serves (I16, I20). A load of another owner that was
/// under way may still take it away; then once more.
pub(crate) async fn inspect(
    segment: &Arc<Segment>,
    node: &ClientNode,
    mut producers: Vec<Producer>,
) {
    let history = &segment.world.history;
    let ledgers = segment.factory(node);
    let deadline = Instant::now() + HEALED_PATIENCE;
    while history.violation().is_none() {
        match segment.load(node, &ledgers).await {
            Ok(serving) => match inspect_once(segment, &serving, &mut producers).await {
                Ok(()) => return,
                Err((invariant, what)) if Instant::now() > deadline || invariant != "I20" => {
                    return history.fail(invariant, what);
                }
                Err((_, what)) => history.note(format!("once more: {what}")),
            },
            Err(error) if Instant::now() > deadline => {
                return history.fail(
                    "I20",
                    format!("the segment does not load though all is healed: {error}"),
                );
            }
            Err(error) => history.note(format!("not loaded yet: {error}")),
        }
        sleep(Duration::from_millis(500)).await;
    }
}

type Broken = (&'static str, String);

async fn inspect_once(
    segment: &Segment,
    serving: &Serving,
    producers: &mut [Producer],
) -> Result<(), Broken> {
    let history = &segment.world.history;
    for producer in producers {
        if !producer.open(serving).await {
            return Err((
                "I20",
                format!("the owner does not know all batches of {}", producer.name),
            ));
        }
        // What is left, and one more.
        let wanted =
            producer.cuts.iter().position(|cut| !cut.stored).unwrap_or(producer.cuts.len()) + 1;
        while producer.cuts.iter().take_while(|cut| cut.stored).count() < wanted {
            if !producer.round(serving).await {
                return Err(("I20", format!("{} cannot publish", producer.name)));
            }
        }
    }
    let (first, end) = (serving.ledger.first_offset().0, serving.ledger.end().borrow().0);
    let mut batches: Vec<LogBatch> = Vec::new();
    let mut next = first;
    while next < end {
        let read = serving.ledger.read(Offset(next), 5_000, 100).await;
        let read =
            read.map_err(|error| ("I20", format!("offset {next} cannot be read: {error}")))?;
        batches.extend(read.iter().map(seen));
        let after = batches.last().map_or(first, |batch| batch.offset + batch.count);
        if after <= next {
            return Err(("I11", format!("a read from {next} to {end} gave what ends at {after}")));
        }
        next = after;
    }
    history.record(Event::LogRead { segment: segment.key(), first, end, batches });
    let random = segment.world.random.fork();
    for subscription in 0..segment.plan.subscriptions {
        let made =
            serving.ledger.create_cursor(SubscriptionId(subscription), Start::Earliest).await;
        made.map_err(|error| ("I20", format!("no cursor: {error}")))?;
        settle_some(segment, serving, subscription, first, end, &random).await;
    }
    serving.ledger.close().await;
    Ok(())
}
