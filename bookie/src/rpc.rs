//! The bookie-RPC seam, for real: every request is for this incarnation, bounded, and answered by its deadline (D12).

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use geminga_bookie_client::bookie_rpc::{
    AddAnswer, AddRequest, Answer, BookieRpc, EntryAnswer, EntryRange, EntrySet, FenceAnswer,
    FenceRequest, LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown,
};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use geminga_runtime::telemetry::{MessageSpan, SpanKind};
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::{Instant, timeout_at},
};

use crate::{
    bookie::Bookie,
    fencing::{AbsentVerdict, AddFacts, AddVerdict, FenceVerdict, Known, Row},
    journal::queue::Item,
    ledger_storage::read::{self, Got, Wanted},
    limbo::{Judged, judge},
    state::{Core, Shared, until},
};

/// Payload bytes after which any READ answer ends, whatever was asked for: with one more entry it still fits a frame.
const READ_BYTES_MAX: usize = 8 << 20;

/// What an add needs next.
enum Step {
    Answered(AddAnswer),
    /// In the journal's queue.
    Queued(oneshot::Receiver<AddAnswer>),
    LookUp {
        version: u64,
    },
    Inspect {
        version: u64,
        row: Row,
    },
    Judge,
}

impl Bookie {
    /// ADD, see [`BookieRpc::add`].
    fn add_entry(&self, request: AddRequest) -> Answer<AddAnswer> {
        let shared = self.shared();
        if let Err(why) = meant_for(shared, request.to, request.deadline) {
            return failed(shared, AddAnswer::Unknown(why));
        }
        if let Err(damage) = request.entry.verify() {
            return failed(shared, AddAnswer::Unknown(Unknown::Refused(damage.to_string())));
        }
        let deadline = request.deadline;
        match try_add(shared, &request, None) {
            Step::Answered(answer) => failed(shared, answer),
            Step::Queued(answer) => add_answer(Arc::clone(shared), deadline, answer).boxed(),
            step => {
                let Some(permit) = lookup(shared) else {
                    return failed(shared, AddAnswer::Unknown(Unknown::Busy));
                };
                let (sender, answer) = oneshot::channel();
                let resolving = Arc::clone(shared);
                shared.tasks.spawn("add look-up", async move {
                    let _permit = permit;
                    if let Some(result) = resolve_add(&resolving, request, step).await {
                        let _gone = sender.send(result);
                    }
                });
                add_answer(Arc::clone(shared), deadline, answer).boxed()
            }
        }
    }
}

impl BookieRpc for Bookie {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        let span = request.entry.payload.trace.as_ref().and_then(|trace| {
            let mut span = MessageSpan::below(trace, "add", SpanKind::Server, "receive")?;
            span.set("messaging.geminga.ledger_id", format!("{}", request.entry.ledger.0));
            span.set("messaging.geminga.entry_id", format!("{}", request.entry.id.0));
            Some(span)
        });
        let answer = self.add_entry(request);
        let Some(mut span) = span else { return answer };
        async move {
            let answer = answer.await;
            if answer != AddAnswer::Ok {
                span.failed(format!("{answer:?}"));
            }
            answer
        }
        .boxed()
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        let shared = self.shared();
        if to == shared.identity.incarnation {
            let mut core = shared.core();
            if !core.closed {
                core.ledgers.write_lac(ledger, lac);
            }
        }
        futures::future::ready(()).boxed()
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        let shared = Arc::clone(self.shared());
        let fenced = start_fence(&shared, request.to, request.ledger, request.deadline);
        async move {
            let synced = match fenced {
                Ok(Some(synced)) => until(request.deadline, synced).await,
                Ok(None) => Ok(()),
                Err(why) => Err(why),
            };
            if let Err(why) = synced {
                return FenceAnswer::Unknown(why);
            }
            let held = match request.list {
                None => None,
                Some(range) => {
                    match timeout_at(request.deadline, list(&shared, request.ledger, range)).await {
                        Ok(Ok(held)) => Some(held),
                        Ok(Err(why)) => return FenceAnswer::Unknown(why),
                        Err(_) => return FenceAnswer::Unknown(Unknown::Timeout),
                    }
                }
            };
            let core = shared.core();
            if core.ended {
                return FenceAnswer::Unknown(Unknown::Disconnected);
            }
            if core.ledgers.is_dropped(request.ledger) {
                return FenceAnswer::Unknown(Unknown::Dropped);
            }
            FenceAnswer::Fenced { lac: core.ledgers.lac(request.ledger), held }
        }
        .boxed()
    }

    fn read(&self, mut request: ReadRequest) -> Answer<ReadAnswer> {
        request.bytes_max = request.bytes_max.min(READ_BYTES_MAX);
        let shared = Arc::clone(self.shared());
        let fenced = if request.fence {
            start_fence(&shared, request.to, request.ledger, request.deadline)
        } else {
            admit(&shared, request.to, request.deadline).map(|()| None)
        };
        if request.range.first > request.range.last {
            return futures::future::ready(ReadAnswer::unknown(Unknown::Refused(
                "empty range".to_owned(),
            )))
            .boxed();
        }
        let deadline = request.deadline;
        let answer = async move {
            match fenced {
                Ok(Some(synced)) => until(request.deadline, synced).await,
                Ok(None) => Ok(()),
                Err(why) => Err(why),
            }?;
            read_range(&shared, &request).await
        };
        async move {
            match timeout_at(deadline, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(why)) => ReadAnswer::unknown(why),
                Err(_) => ReadAnswer::unknown(Unknown::Timeout),
            }
        }
        .boxed()
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        let shared = self.shared();
        let answer = match admit(shared, to, deadline) {
            Err(why) => LacAnswer::Unknown(why),
            Ok(()) => {
                let core = shared.core();
                if core.ledgers.is_dropped(ledger) {
                    LacAnswer::Unknown(Unknown::Dropped)
                } else {
                    LacAnswer::Known(core.ledgers.lac(ledger))
                }
            }
        };
        futures::future::ready(answer).boxed()
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer> {
        let shared = Arc::clone(self.shared());
        let admitted = admit(&shared, to, deadline);
        async move {
            if let Err(why) = admitted {
                return ListAnswer::Unknown(why);
            }
            match timeout_at(deadline, list(&shared, ledger, range)).await {
                Ok(Ok(held)) => ListAnswer::Held(held),
                Ok(Err(why)) => ListAnswer::Unknown(why),
                Err(_) => ListAnswer::Unknown(Unknown::Timeout),
            }
        }
        .boxed()
    }
}

/// What holds for every request.
fn admit(shared: &Shared, to: Incarnation, deadline: Instant) -> Result<(), Unknown> {
    if shared.core().closed {
        return Err(Unknown::Disconnected);
    }
    meant_for(shared, to, deadline)
}

/// The part of it that needs no lock; an add is refused by a stopped bookie in its one step.
fn meant_for(shared: &Shared, to: Incarnation, deadline: Instant) -> Result<(), Unknown> {
    if to != shared.identity.incarnation {
        return Err(Unknown::WrongIncarnation);
    }
    if deadline <= Instant::now() {
        return Err(Unknown::Timeout);
    }
    Ok(())
}

/// A place among the requests that wait for a look-up (D12).
fn lookup(shared: &Shared) -> Option<OwnedSemaphorePermit> {
    let permit = Arc::clone(&shared.lookups).try_acquire_owned().ok();
    if permit.is_none() {
        shared.metrics.busy.inc();
    }
    permit
}

/// An answer that is known at once.
fn failed(shared: &Shared, answer: AddAnswer) -> Answer<AddAnswer> {
    count(shared, &answer);
    futures::future::ready(answer).boxed()
}

fn count(shared: &Shared, answer: &AddAnswer) {
    match answer {
        AddAnswer::Ok => {}
        AddAnswer::Unknown(Unknown::Busy) => {
            shared.metrics.busy.inc();
        }
        _ => {
            shared.metrics.adds_failed.inc();
        }
    }
}

async fn add_answer(
    shared: Arc<Shared>,
    deadline: Instant,
    answer: oneshot::Receiver<AddAnswer>,
) -> AddAnswer {
    let answer = match timeout_at(deadline, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => AddAnswer::Unknown(Unknown::Disconnected),
        Err(_) => AddAnswer::Unknown(Unknown::Timeout),
    };
    count(&shared, &answer);
    answer
}

/// D2's one step: verdict, visibility and place in the journal's order, under one lock.
fn try_add(shared: &Shared, request: &AddRequest, known: Option<Known>) -> Step {
    let mut core = shared.core();
    let core = &mut *core;
    if core.closed {
        return Step::Answered(AddAnswer::Unknown(Unknown::Disconnected));
    }
    let entry = &request.entry;
    if !core.queue.has_room(entry.encoded_len()) {
        return Step::Answered(AddAnswer::Unknown(Unknown::Busy));
    }
    let facts = AddFacts {
        ledger: entry.ledger,
        entry: entry.id,
        lac: entry.lac,
        digest: entry.digest,
        recovery: request.recovery,
    };
    let ticket = core.next_ticket;
    let version = core.ledgers.version();
    match core.ledgers.accept_add(facts, ticket, core.room, known) {
        AddVerdict::Accept => {
            core.next_ticket += 1;
            let (answer, waiting) = oneshot::channel();
            let (entry, recovery, deadline) = (entry.clone(), request.recovery, request.deadline);
            shared.push(core, Item::Add { entry, recovery, deadline, ticket, answer });
            Step::Queued(waiting)
        }
        AddVerdict::Wait => {
            let (answer, waiting) = oneshot::channel();
            let (ledger, id, digest) = (entry.ledger, entry.id, entry.digest);
            shared.push(core, Item::Repeat { ledger, entry: id, digest, answer });
            Step::Queued(waiting)
        }
        AddVerdict::Held => Step::Answered(AddAnswer::Ok),
        AddVerdict::Fenced => Step::Answered(AddAnswer::Fenced),
        AddVerdict::ReadOnly => Step::Answered(AddAnswer::ReadOnly),
        AddVerdict::NoSpace => Step::Answered(AddAnswer::NoSpace),
        AddVerdict::Dropped => Step::Answered(AddAnswer::Unknown(Unknown::Dropped)),
        AddVerdict::Refused => Step::Answered(refused(shared, request)),
        AddVerdict::LookUp => Step::LookUp { version },
        AddVerdict::Inspect(row) => Step::Inspect { version, row },
        AddVerdict::Judge => Step::Judge,
    }
}

/// Two writers, or a writer that broke the frozen bytes: a human looks.
fn refused(shared: &Shared, request: &AddRequest) -> AddAnswer {
    shared.metrics.digest_conflicts.inc();
    tracing::error!(
        bookie_id = shared.config.id,
        ledger_id = request.entry.ledger.0,
        entry_id = request.entry.id.0,
        "entry refused: held with other bytes"
    );
    AddAnswer::Unknown(Unknown::Refused("the entry is held with other bytes".to_owned()))
}

/// Does the look-ups an add needs, then tries again, until it is answered or its deadline has passed. None once the bookie
/// has ended.
async fn resolve_add(
    shared: &Arc<Shared>,
    request: AddRequest,
    mut step: Step,
) -> Option<AddAnswer> {
    let (ledger, id) = (request.entry.ledger, request.entry.id);
    loop {
        if request.deadline <= Instant::now() {
            return Some(AddAnswer::Unknown(Unknown::Timeout));
        }
        let known = match step {
            Step::Answered(answer) => return Some(answer),
            Step::Queued(answer) => return answer.await.ok(),
            Step::Judge => match judge(shared, ledger, request.deadline).await {
                Judged::Known => None,
                Judged::Absent => return Some(AddAnswer::ReadOnly),
                Judged::Unreadable => return Some(AddAnswer::Unknown(Unknown::Busy)),
            },
            Step::LookUp { version } => {
                let (indexes, validity) = {
                    let core = shared.core();
                    (read::indexes(&core), core.ledgers.validity(ledger))
                };
                let look = move |_: &Shared| Ok(read::look_up(&indexes, ledger, id, id, validity));
                let found = shared.run(&shared.read_io, look).await;
                match found.and_then(|found| found) {
                    Ok(rows) => {
                        Some(Known { version, row: rows.get(&id).copied(), damaged: false })
                    }
                    Err(error) => {
                        let unknown = read::index_error(shared, ledger, &error);
                        return Some(AddAnswer::Unknown(unknown));
                    }
                }
            }
            Step::Inspect { version, row } => {
                let got = shared
                    .run(&shared.read_io, move |s| Ok(read::read_entry(s, ledger, id, row)))
                    .await;
                match got {
                    Ok(Got::Unknown(Unknown::Damaged)) => {
                        Some(Known { version, row: Some(row), damaged: true })
                    }
                    Ok(Got::Held(_)) => Some(Known { version, row: Some(row), damaged: false }),
                    Ok(Got::Unknown(why)) => return Some(AddAnswer::Unknown(why)),
                    Ok(Got::Missing) | Err(_) => {
                        return Some(AddAnswer::Unknown(Unknown::Io(
                            "held copy unreadable".to_owned(),
                        )));
                    }
                }
            }
        };
        step = try_add(shared, &request, known);
    }
}

/// Accepts a fence now; the receiver tells when its group, and so every add accepted before, is synced (D2).
fn start_fence(
    shared: &Shared,
    to: Incarnation,
    ledger: LedgerId,
    deadline: Instant,
) -> Result<Option<oneshot::Receiver<Result<(), Unknown>>>, Unknown> {
    admit(shared, to, deadline)?;
    let mut core = shared.core();
    let core = &mut *core;
    if core.closed {
        return Err(Unknown::Disconnected);
    }
    if !core.queue.has_room(0) {
        shared.metrics.busy.inc();
        return Err(Unknown::Busy);
    }
    let (answer, synced) = oneshot::channel();
    match core.ledgers.accept_fence(ledger) {
        FenceVerdict::Dropped => return Err(Unknown::Dropped),
        FenceVerdict::Done => return Ok(None),
        FenceVerdict::Wait => shared.push(core, Item::Barrier { answer }),
        FenceVerdict::Journal => shared.push(core, Item::Fence { ledger, answer }),
    }
    Ok(Some(synced))
}

async fn read_range(shared: &Arc<Shared>, request: &ReadRequest) -> Result<ReadAnswer, Unknown> {
    let (ledger, range) = (request.ledger, request.range);
    let entries_max = shared.config.read_entries_max;
    let mut waited = false;
    let (wanted, indexes) = loop {
        {
            let core = shared.core();
            if core.ended {
                return Err(Unknown::Disconnected);
            }
            if core.ledgers.is_dropped(ledger) {
                return Err(Unknown::Dropped);
            }
            let last = EntryId(range.last.0.min(range.first.0.saturating_add(entries_max)));
            if waited || !core.ledgers.has_pending(ledger, range.first, last) {
                break (collect_synced(&core, request, entries_max), read::indexes(&core));
            }
        }
        shared.barrier(request.deadline).await?; // accepted, not synced: neither held nor absent yet
        waited = true;
    };
    let (wanted, pending_at) = wanted;
    let cached = wanted.iter().filter(|wanted| matches!(wanted, Wanted::Recent(_))).count() as u64;
    let got = if read::needs_disk(&wanted) {
        let _permit = lookup(shared).ok_or(Unknown::Busy)?;
        let bytes_max = request.bytes_max;
        let work = shared
            .run(&shared.read_io, move |s| Ok(read::fetch(s, &indexes, ledger, wanted, bytes_max)));
        work.await.map_err(|error| Unknown::Io(error.to_string()))?
    } else {
        wanted
            .into_iter()
            .map(|w| if let Wanted::Recent(entry) = w { Got::Held(entry) } else { Got::Missing })
            .collect()
    };
    let missing = if got.iter().any(|got| matches!(got, Got::Missing)) {
        missing(shared, ledger, request.deadline).await
    } else {
        EntryAnswer::Absent
    };
    let mut entries = read::answers(got, &missing);
    if entries.is_empty() && pending_at {
        entries.push(EntryAnswer::Unknown(Unknown::Busy));
    }
    let held = entries.iter().filter(|entry| matches!(entry, EntryAnswer::Held(_))).count() as u64;
    shared.metrics.reads.inc_by(held);
    shared.metrics.reads_cached.inc_by(cached.min(held));
    Ok(ReadAnswer { entries })
}

/// What memory knows of the range, up to the first entry that is accepted and not synced.
fn collect_synced(core: &Core, request: &ReadRequest, entries_max: u64) -> (Vec<Wanted>, bool) {
    let (ledger, range) = (request.ledger, request.range);
    let mut wanted = read::collect(core, ledger, range, request.bytes_max, entries_max);
    let pending = (0..wanted.len()).find(|at| {
        let id = EntryId(range.first.0 + *at as u64);
        !matches!(wanted[*at], Wanted::Recent(_) | Wanted::At(..))
            && core.ledgers.has_pending(ledger, id, id)
    });
    wanted.truncate(pending.unwrap_or(usize::MAX));
    (wanted, pending.is_some())
}

/// What entries of this ledger that were not found may be called (D9).
async fn missing(shared: &Arc<Shared>, ledger: LedgerId, deadline: Instant) -> EntryAnswer {
    const JUDGE_PATIENCE: Duration = Duration::from_millis(500);
    for _ in 0..2 {
        let verdict = {
            let core = shared.core();
            if core.ended {
                return EntryAnswer::Unknown(Unknown::Disconnected);
            }
            core.ledgers.absent(ledger)
        };
        match verdict {
            AbsentVerdict::Absent => return EntryAnswer::Absent,
            AbsentVerdict::Limbo => return EntryAnswer::Unknown(Unknown::Limbo),
            AbsentVerdict::Dropped => return EntryAnswer::Unknown(Unknown::Dropped),
            AbsentVerdict::Judge => {
                let Some(_permit) = lookup(shared) else {
                    return EntryAnswer::Unknown(Unknown::Busy);
                };
                // Half of what is left: the entries that are held must still be answered in time.
                let left = deadline.saturating_duration_since(Instant::now()) / 2;
                if judge(shared, ledger, Instant::now() + left.min(JUDGE_PATIENCE)).await
                    != Judged::Known
                {
                    return EntryAnswer::Unknown(Unknown::Limbo);
                }
            }
        }
    }
    EntryAnswer::Unknown(Unknown::Limbo)
}

async fn list(
    shared: &Arc<Shared>,
    ledger: LedgerId,
    range: EntryRange,
) -> Result<EntrySet, Unknown> {
    if range.first > range.last {
        return Ok(EntrySet::default());
    }
    let (rows, indexes, indexed, validity) = {
        let core = shared.core();
        if core.ended {
            return Err(Unknown::Disconnected);
        }
        if core.ledgers.is_dropped(ledger) {
            return Err(Unknown::Dropped);
        }
        if core.ledgers.is_leaving(ledger) {
            return Err(Unknown::Dropped); // nobody may count on what is about to go (G1)
        }
        let indexed = core.ledgers.indexed_max(ledger) >= Some(range.first);
        let rows = core.ledgers.rows(ledger, range.first, range.last);
        (rows, read::indexes(&core), indexed, core.ledgers.validity(ledger))
    };
    let rows = if indexed {
        let _permit = lookup(shared).ok_or(Unknown::Busy)?;
        let work = move |s: &Shared| Ok(read::list(s, &indexes, ledger, range, rows, validity));
        let listed = shared.run(&shared.read_io, work).await;
        listed.map_err(|error| Unknown::Io(error.to_string()))??
    } else {
        rows
    };
    // What a reader found damaged is not held: A2 fills it in, and the repeated add replaces it (section 3).
    let core = shared.core();
    let good = rows.iter().filter(|(entry, row)| !core.ledgers.is_damaged(ledger, **entry, row));
    Ok(good.map(|(entry, _)| *entry).collect())
}
