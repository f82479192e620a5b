//! Carries out the core's actions: R2..R6 as one attempt, repeated while too few bookies are certain.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use geminga_proto::ids::{EntryId, Incarnation, Slot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    core::{Action, Conclusion, Progress, RecoveryCore},
    types::{Recovered, RecoveryError},
};
use crate::{
    bookie_rpc::{
        AddAnswer, AddRequest, BookieRpc, EntryAnswer, EntryRange, FenceAnswer, FenceRequest,
        ReadRequest,
    },
    client::LedgerClient,
    ensemble::{Available, LedgerAge},
    metadata::{LedgerMetadata, LedgerState, RecoveryNonce, Versioned},
};

/// Payload bytes of one read.
const READ_BYTES_MAX: usize = 4 * 1024 * 1024;
/// First pause between attempts; doubles.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between attempts.
const PAUSE_MAX: Duration = Duration::from_secs(2);

enum Event {
    Fenced(Slot, FenceAnswer),
    Read(Slot, EntryRange, Vec<EntryAnswer>),
    Written(EntryId, Slot, Incarnation, AddAnswer),
    Candidates(Option<Vec<Available>>),
}

/// See [`LedgerClient::recover`].
pub(crate) async fn recover(
    client: &LedgerClient,
    started: Versioned<LedgerMetadata>,
    nonce: RecoveryNonce,
) -> Result<Recovered, RecoveryError> {
    let ledger = started.value.id;
    match started.value.state {
        LedgerState::InRecovery(stands) if stands == nonce => {}
        LedgerState::InRecovery(stands) => {
            return Err(RecoveryError::Superseded { ledger, by: stands.epoch });
        }
        LedgerState::Deleted { .. } => return Err(RecoveryError::Gone { ledger }),
        LedgerState::Open | LedgerState::Closed { .. } => {
            let why = "it does not stand under recovery".to_owned();
            return Err(RecoveryError::Incomplete { ledger, why });
        }
    }
    let began = Instant::now();
    let deadline = began + client.parts.config.recovery_patience;
    let token = client.parts.tasks.token();
    let mut pause = PAUSE_MIN;
    loop {
        let attempt = tokio::select! {
            biased;
            () = token.cancelled() => return Err(RecoveryError::Stopped { ledger }),
            attempt = attempt(client, &started) => attempt,
        };
        let why = match attempt {
            Ok((conclusion, length)) => {
                let Conclusion { last, private, short, .. } = conclusion;
                client.parts.metrics.recoveries.inc();
                client.note_recovery(began.elapsed());
                tracing::info!(ledger = ledger.0, last = ?last, short, "ledger recovered");
                return Ok(Recovered::build(started, nonce, last, length, private, short));
            }
            Err(why) => why,
        };
        client.parts.metrics.recovery_aborts.inc();
        tracing::info!(ledger = ledger.0, why, "recovery attempt is repeated later");
        if Instant::now() + pause >= deadline {
            return Err(RecoveryError::Incomplete { ledger, why });
        }
        let jitter = Duration::from_millis(client.parts.random.below(pause.as_millis() as u64 + 1));
        tokio::select! {
            biased;
            () = token.cancelled() => return Err(RecoveryError::Stopped { ledger }),
            () = sleep(pause + jitter) => {}
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// One attempt. Ends, because every request does by its deadline.
async fn attempt(
    client: &LedgerClient,
    started: &Versioned<LedgerMetadata>,
) -> Result<(Conclusion, u64), String> {
    let age = LedgerAge::new(started.value.id, Some(started.create_revision));
    let window = client.parts.config.recovery_window;
    let mut core = RecoveryCore::new(started.value.clone(), age, window);
    let mut events: FuturesUnordered<BoxFuture<'static, Event>> = FuturesUnordered::new();
    let mut stragglers_by = None;
    let mut bookies = BTreeMap::new();
    loop {
        for action in core.take_actions() {
            events.push(carry_out(client, &mut bookies, started, action));
        }
        match core.progress() {
            Progress::Working => {}
            Progress::Aborted(why) => return Err(why),
            Progress::Finished => {
                let patience = client.parts.config.straggler_patience;
                let by = *stragglers_by.get_or_insert_with(|| Instant::now() + patience);
                if !core.has_stragglers() || Instant::now() >= by {
                    break;
                }
            }
        }
        let by = stragglers_by.unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
        tokio::select! {
            biased;
            event = events.next() => match event {
                Some(Event::Fenced(slot, answer)) => core.on_fenced(slot, answer),
                Some(Event::Read(slot, range, answers)) => core.on_read(slot, range, answers),
                Some(Event::Written(id, slot, from, answer)) => core.on_written(id, slot, from, answer),
                Some(Event::Candidates(available)) => {
                    core.on_candidates(available.as_deref(), &client.parts.random);
                }
                None if core.progress() == Progress::Working => {
                    return Err("no bookie of the last fragment is left to ask".to_owned());
                }
                None => break,
            },
            () = sleep_until(by) => {}
        }
    }
    let conclusion = core.conclude();
    let length = match (conclusion.length, conclusion.last) {
        (Some(length), _) => length,
        (None, None) => 0,
        (None, Some(last)) => length_at(client, &started.value, last).await?,
    };
    Ok((conclusion, length))
}

/// LAC0 is acknowledged, so its entry is there, and carries the bytes so far.
async fn length_at(
    client: &LedgerClient,
    metadata: &LedgerMetadata,
    last: EntryId,
) -> Result<u64, String> {
    let range = EntryRange { first: last, last };
    let entries = client.reader(metadata.id).read(metadata, range, 1).await;
    match entries.as_deref() {
        Ok([entry, ..]) => Ok(entry.acc_length),
        Ok([]) => Err("the last entry was not shown".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// One handle per bookie, so that its requests go out in order (R4).
type Handles = BTreeMap<Incarnation, Arc<dyn BookieRpc>>;

fn carry_out(
    client: &LedgerClient,
    bookies: &mut Handles,
    started: &Versioned<LedgerMetadata>,
    action: Action,
) -> BoxFuture<'static, Event> {
    let parts = &client.parts;
    let ledger = started.value.id;
    let deadline = Instant::now() + parts.config.read_timeout;
    let mut bookie = |to| Arc::clone(bookies.entry(to).or_insert_with(|| parts.bookies.bookie(to)));
    match action {
        Action::Fence { slot, to, list } => {
            let request = FenceRequest { to, ledger, list: Some(list), deadline };
            let answer = bookie(to).fence(request);
            answer.map(move |answer| Event::Fenced(slot, answer)).boxed()
        }
        Action::Read { slot, to, range } => {
            let bytes_max = READ_BYTES_MAX;
            let request = ReadRequest { to, ledger, range, fence: true, bytes_max, deadline };
            let answer = bookie(to).read(request);
            answer.map(move |answer| Event::Read(slot, range, answer.entries)).boxed()
        }
        Action::Write { entry, slot, to } => {
            let id = entry.id;
            let deadline = Instant::now() + parts.config.add_timeout;
            let request = AddRequest { to, entry, recovery: true, deadline };
            let answer = bookie(to).add(request);
            answer.map(move |answer| Event::Written(id, slot, to, answer)).boxed()
        }
        Action::Look => {
            let client: LedgerClient = client.clone();
            let patience = parts.config.read_timeout;
            async move {
                let available = timeout(patience, client.available()).await;
                Event::Candidates(available.ok().and_then(Result::ok))
            }
            .boxed()
        }
    }
}
