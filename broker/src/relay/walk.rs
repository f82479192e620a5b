//! A walk over a segment's messages or objects, an offload, a verification or a compaction: it runs at the owner and tells its steps, to a client there
//! or to the broker that was asked.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream::BoxStream};
use geminga_proto::{
    admin::v1::TierProgress,
    ids::SegmentId,
    internal::v1::{SegmentRequest, segment_request::Verb},
    reason::Reason,
};
use tokio::{sync::mpsc, time::timeout};
use tonic::Status;

use super::{segments::at_owner, streams::broken};
use crate::{
    context::{Context, Shared, Slot, shutting_down},
    errors::Refusal,
    storage_errors,
};

/// Steps that wait for a slow client.
const STEPS_MAX: usize = 64;
/// Longest time without a step: one ledger goes up, or one object is read, within it.
const STEP_PATIENCE: Duration = Duration::from_secs(30 * 60);

/// What a client reads.
pub(crate) type Steps = BoxStream<'static, Result<TierProgress, Status>>;
/// Where steps go.
pub(crate) type ToClient = mpsc::Sender<Result<TierProgress, Status>>;

/// Runs `walk` as a stream of its own, which ends with it, with its client, or when the broker stops.
pub(crate) fn in_steps<F>(shared: &Shared, slot: Slot, walk: impl FnOnce(ToClient) -> F) -> Steps
where
    F: Future<Output = Result<(), Refusal>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(STEPS_MAX);
    let (shared, walk) = (shared.clone(), walk(sender.clone()).boxed());
    let tasks = shared.streams.clone();
    tasks.spawn("tier stream", async move {
        let _slot = slot;
        let _open = shared.metrics.stream("tier");
        let ended = tokio::select! {
            biased;
            () = sender.closed() => Ok(()),
            () = shared.draining.started() => Err(shutting_down()),
            ended = walk => ended,
        };
        if let Err(refusal) = ended {
            let status = shared.refused(refusal);
            // A client that does not read is let go with its connection; the stop of the broker waits for nobody.
            let told = timeout(shared.config.limits.write_stall_max, sender.send(Err(status)));
            let _gone = told.await;
        }
    });
    let next = |mut steps: mpsc::Receiver<_>| async move { Some((steps.recv().await?, steps)) };
    futures::stream::unfold(receiver, next).boxed()
}

/// Walks at the segment's owner, here or elsewhere. One that is being moved or recovered is waited for; once a step was told
/// the loss of the owner ends the walk, and the call may be repeated: what is done stays done.
///
/// # Errors
/// What the owner refuses; SEGMENT_LOADING when it is not reached within the load deadline; SEGMENT_FENCED or NOT_OWNER when
/// it is lost on the way; DEADLINE_EXCEEDED without a step for too long.
pub(crate) async fn walk(
    context: &Context,
    id: SegmentId,
    verb: Verb,
    to: &ToClient,
) -> Result<(), Refusal> {
    let ended = at_owner(context, id, |owner| {
        let verb = verb.clone();
        async move {
            let begun = AtomicBool::new(false);
            let ended = match owner {
                Some(owner) => walk_there(context, &owner.address, id, verb, to, &begun).await,
                None => walk_begun(context, id, &verb, to, &begun).await,
            };
            match ended {
                // Not one to look for the owner again.
                Err(refusal) if begun.load(Ordering::Relaxed) => Ok(Err(refusal)),
                ended => ended.map(Ok),
            }
        }
    });
    ended.await?
}

/// Walks here.
///
/// # Errors
/// As [`walk`]; NOT_OWNER with the owner.
pub(super) async fn walk_here(
    context: &Context,
    id: SegmentId,
    verb: &Verb,
    to: &ToClient,
) -> Result<(), Refusal> {
    walk_begun(context, id, verb, to, &AtomicBool::new(false)).await
}

async fn walk_begun(
    context: &Context,
    id: SegmentId,
    verb: &Verb,
    to: &ToClient,
    begun: &AtomicBool,
) -> Result<(), Refusal> {
    let segment = context.ownership.segment(id).await?;
    let steps = match verb {
        Verb::OffloadTier(asked) => segment.ledger().offload_now(asked.roll),
        Verb::VerifyTier(_) => segment.ledger().verify_tier(),
        Verb::Compact(_) => segment.ledger().compact_now(),
        _ => return Err(Refusal::request("this is asked for, and is no walk")),
    };
    let mut steps = steps.map_err(|error| storage_errors::of_tier(&error))?;
    loop {
        let step = tokio::select! {
            biased;
            step = timeout(STEP_PATIENCE, steps.recv()) => step.map_err(|_| no_step(id))?,
            why = segment.fenced() => return Err(why),
        };
        let Some(step) = step else {
            // Its owner lets go of those who listen also when it ends.
            return if segment.serves() { Ok(()) } else { Err(segment.fenced().await) };
        };
        begun.store(true, Ordering::Relaxed);
        let step = TierProgress {
            segment: id.segment,
            ledger: step.ledger.0,
            bytes_done: step.bytes_done,
            bytes_total: step.bytes_total,
            problem: step.problem,
        };
        if to.send(Ok(step)).await.is_err() {
            return Ok(()); // nobody listens
        }
    }
}

async fn walk_there(
    context: &Context,
    address: &str,
    id: SegmentId,
    verb: Verb,
    to: &ToClient,
    begun: &AtomicBool,
) -> Result<(), Refusal> {
    let request = SegmentRequest { topic: id.topic.0, segment: id.segment, verb: Some(verb) };
    let mut steps = context.peers.walk(address, request).await?;
    context.metrics.relayed.inc();
    loop {
        let step = timeout(STEP_PATIENCE, steps.message()).await.map_err(|_| no_step(id))?;
        match step {
            Ok(Some(step)) => {
                begun.store(true, Ordering::Relaxed);
                if to.send(Ok(step)).await.is_err() {
                    return Ok(());
                }
            }
            Ok(None) => return Ok(()),
            Err(status) => return Err(broken(id, &status)),
        }
    }
}

fn no_step(id: SegmentId) -> Refusal {
    let message =
        format!("segment {} told no step within {STEP_PATIENCE:?}; it may go on", id.segment);
    Refusal::new(Reason::DeadlineExceeded, message)
}
