//! One batch in one call. The broker routes it: the given segment, else by its first record's key, else by the producer's
//! name (so that a retry goes the same way), else round robin.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use geminga_managed_ledger::{
    ProducerError, ProducerIdentity, ProducerOpen, ProducerOpened, PublishError, Stored,
};
use geminga_proto::{
    ids::SegmentId,
    key_hash::key_hash,
    names::{ProducerName, TopicName},
    reason::Reason,
    v1::{Batch, PublishRequest, PublishResponse, RecordIndex},
};
use tokio::time::{Instant, sleep, timeout};

use super::{
    batch,
    stream::{count_stored, receipt, to_publish},
};
use crate::{
    catalog::Topic,
    context::Shared,
    errors::Refusal,
    lifecycle,
    listener::Connection,
    ownership::{Found, Segment},
    relay, storage_errors,
};

/// Sessions that one unnamed call tries.
const SESSIONS_MAX: u32 = 3;
/// Places that one call looks for its segment in, while it is being moved.
const OWNERS_MAX: u32 = 20;
/// Pause before it looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Delay told to those who publish where nothing may be.
const RATE_DELAY: Duration = Duration::from_secs(5);
/// Turns of the round robin.
static TURN: AtomicU64 = AtomicU64::new(0);

pub(super) async fn publish(
    shared: &Shared,
    connection: &Connection,
    request: PublishRequest,
) -> Result<PublishResponse, Refusal> {
    shared.admit(connection, &request)?;
    admitted(shared, connection, request).await
}

/// A batch that may be published, or that the broker publishes itself.
///
/// # Errors
/// What kept it from being stored.
pub(crate) async fn admitted(
    shared: &Shared,
    connection: &Connection,
    mut request: PublishRequest,
) -> Result<PublishResponse, Refusal> {
    let name = match request.producer_name.as_str() {
        "" => None,
        name => Some(ProducerName::parse(name)?),
    };
    let mut batch = request.batch.take().ok_or_else(|| Refusal::request("batch is missing"))?;
    if name.is_none() {
        // Its sequences are the broker's; whatever was sent means nothing.
        (batch.prev_sequence, batch.lo_sequence, batch.hi_sequence) =
            (0, 1, u64::from(batch.count.max(1)));
    }
    batch::check(&batch, &shared.config.limits)?;
    for _ in 0..OWNERS_MAX {
        let (id, found) = route_to(shared, connection, &request, &batch, name.as_ref()).await?;
        let segment = match found {
            Found::Here(segment) => segment,
            Found::Elsewhere(owner) => {
                let request = PublishRequest { batch: Some(batch), ..request };
                return relay::publish_batch(shared, connection, (id, owner), request).await;
            }
        };
        match store(shared, connection, &segment, batch.clone(), name.clone()).await {
            // It is being handed to another broker, and nothing was stored.
            Err(refusal) if refusal.reason == Reason::SegmentLoading && segment.is_moving() => {
                sleep(LOOK_AGAIN).await;
            }
            stored => return stored,
        }
    }
    Err(Refusal::new(Reason::Busy, "the segment keeps moving; nothing of the batch was stored"))
}

/// Stores a batch in a segment that is here.
async fn store(
    shared: &Shared,
    connection: &Connection,
    segment: &Arc<Segment>,
    batch: Batch,
    name: Option<ProducerName>,
) -> Result<PublishResponse, Refusal> {
    let began = Instant::now();
    if !connection.is_internal() {
        pass(shared, segment, &batch).await?;
    }
    let id = name.as_ref().map(|name| Bytes::from(name.as_str().to_owned()));
    let _slot = match connection.is_internal() {
        true => None,
        // All that name none are one.
        false => Some(segment.producer_slot(Some(id.unwrap_or_default()))?),
    };
    let held = batch::held_bytes(&batch);
    let reserve = async {
        (connection.bytes().acquire(held).await, shared.publish_bytes.acquire(held).await)
    };
    let Ok((_mine, permit)) = timeout(shared.config.limits.busy_after, reserve).await else {
        let message = "the bytes in flight are at their limit; nothing of the batch was stored";
        return Err(Refusal::new(Reason::Busy, message));
    };
    let (hi_sequence, stored) = match timeout(shared.config.limits.unary_deadline, async {
        match name {
            Some(name) => named(segment, name, batch, permit).await,
            None => anonymous(shared, segment, batch, permit).await,
        }
    })
    .await
    {
        Ok(stored) => stored?,
        Err(_) => {
            let message = "the batch was not stored in time; it may still be";
            return Err(Refusal::new(Reason::DeadlineExceeded, message));
        }
    };
    shared.metrics.publish_duration.observe(began.elapsed().as_secs_f64());
    count_stored(&shared.metrics, &stored.0, stored.1);
    Ok(PublishResponse {
        segment: segment.id().segment,
        receipt: Some(receipt(segment, hi_sequence, &stored.0)),
    })
}

/// Waits for the topic's rate, but not for long.
///
/// # Errors
/// RATE_LIMITED, with when to come back.
async fn pass(shared: &Shared, segment: &Segment, batch: &Batch) -> Result<(), Refusal> {
    let (rate, patience) = (segment.publish_rate(), shared.config.limits.busy_after);
    let needs = (u64::from(batch.count), batch.payload.len() as u64);
    if timeout(patience, rate.pass(needs, &shared.metrics)).await.is_ok() {
        return Ok(());
    }
    let message = "the topic's publish rate is used up; nothing of the batch was stored";
    Err(Refusal::new(Reason::RateLimited, message).after(rate.wait().unwrap_or(RATE_DELAY)))
}

/// The segment a batch goes to. The mirror of topics is enough to route by, so that a store outage does not stop calls for
/// what is loaded; what it does not know, or knows wrongly, is looked up.
async fn route_to(
    shared: &Shared,
    connection: &Connection,
    request: &PublishRequest,
    batch: &Batch,
    name: Option<&ProducerName>,
) -> Result<(SegmentId, Found), Refusal> {
    let topic = TopicName::parse(&request.topic)?;
    let number = |topic: &Topic| request.segment.map_or_else(|| route(topic, batch, name), Ok);
    if let Some(seen) = shared.hub.topic_named(&topic)
        && let Ok(id) = seen.segment(number(&seen)?)
    {
        if let Some(loaded) = shared.ownership.loaded(id) {
            return Ok((id, Found::Here(loaded)));
        }
        if let Some(owner) = shared.ownership.claimed_elsewhere(id) {
            return Ok((id, Found::Elsewhere(owner)));
        }
    }
    let topic = lifecycle::topic_or_create(shared, connection.principal(), &topic).await?;
    let id = topic.segment(number(&topic)?)?;
    Ok((id, shared.ownership.find(id).await?))
}

/// The stored batch and its payload's bytes.
type StoredBytes = (Stored, u64);

async fn named(
    segment: &Arc<Segment>,
    name: ProducerName,
    batch: Batch,
    permit: geminga_runtime::budget::Permit,
) -> Result<(u64, StoredBytes), Refusal> {
    let (hi_sequence, bytes) = (batch.hi_sequence, batch.payload.len() as u64);
    let ledger = segment.ledger();
    let open =
        |stream_number| ProducerOpen::shared(ProducerIdentity::Named(name.clone()), stream_number);
    let mut stream_number = 0;
    let producer = match ledger.open_producer(open(stream_number)).await {
        // A stream of the same name was open: the call goes on under its number, and the chain keeps them apart.
        Err(ProducerError::StaleStream { current }) => {
            stream_number = current;
            ledger.open_producer(open(stream_number)).await
        }
        opened => opened,
    };
    let producer = producer.map_err(|error| storage_errors::of_producer(&error))?;
    let stored = ledger.publish(to_publish(batch, &producer, stream_number, permit));
    // The call holds no stream: nobody who wants the segment for itself has to wait for it.
    ledger.producer_gone(&producer.id, stream_number);
    let stored = stored.await;
    Ok((hi_sequence, (stored.map_err(|error| storage_errors::of_publish(&error))?, bytes)))
}

/// Under the broker's own producer of the segment. Its chain breaks when a call before this one was refused, and its session
/// may have been forgotten: nothing was stored then, and the caller knows of neither, so the call goes on under a new one.
async fn anonymous(
    shared: &Shared,
    segment: &Arc<Segment>,
    batch: Batch,
    permit: geminga_runtime::budget::Permit,
) -> Result<(u64, StoredBytes), Refusal> {
    let bytes = batch.payload.len() as u64;
    let held = batch::held_bytes(&batch);
    let ledger = segment.ledger();
    let mut permit = Some(permit);
    for _ in 0..SESSIONS_MAX {
        let permit = match permit.take() {
            Some(permit) => permit,
            None => shared.publish_bytes.acquire(held).await,
        };
        let publish = |batch: Batch, producer: &ProducerOpened| {
            let hi_sequence = batch.hi_sequence;
            (hi_sequence, ledger.publish(to_publish(batch, producer, 0, permit)))
        };
        let (session, (hi_sequence, stored)) =
            segment.anonymous().publish(ledger, batch.clone(), publish).await?;
        match stored.await {
            Ok(stored) => return Ok((hi_sequence, (stored, bytes))),
            Err(error) => {
                segment.anonymous().give_up(session).await;
                let broken = matches!(
                    error,
                    PublishError::OutOfSequence { .. }
                        | PublishError::UnknownProducer
                        | PublishError::StaleStream
                        | PublishError::ProducerFenced
                );
                if !broken {
                    return Err(storage_errors::of_publish(&error));
                }
            }
        }
    }
    let message = "the calls before this one keep failing; nothing of the batch was stored";
    Err(Refusal::new(Reason::Busy, message))
}

/// Where a batch goes that names no segment.
///
/// # Errors
/// INVALID_REQUEST when its keys belong to different segments: one call is one batch of one segment.
fn route(topic: &Topic, batch: &Batch, name: Option<&ProducerName>) -> Result<u32, Refusal> {
    let index = batch.index.as_ref().expect("checked before");
    let mut keyed = keyed_hashes(index);
    if let Some(first) = keyed.next() {
        let segment = topic.segment_of(first);
        if keyed.any(|hash| topic.segment_of(hash) != segment) {
            return Err(Refusal::request(
                "the batch has keys of different segments; send one batch for each",
            ));
        }
        return Ok(segment);
    }
    Ok(match name {
        Some(name) => topic.segment_of(key_hash(name.as_str().as_bytes())),
        None => {
            let turn = TURN.fetch_add(1, Ordering::Relaxed) % topic.segments.len() as u64;
            topic.segments[turn as usize].segment
        }
    })
}

fn keyed_hashes(index: &RecordIndex) -> impl Iterator<Item = u32> + '_ {
    index
        .key_hash
        .iter()
        .zip(index.has_key.iter())
        .filter(|(_, has_key)| **has_key)
        .map(|(hash, _)| *hash)
}

#[cfg(test)]
mod tests {
    use geminga_metadata::Revision;
    use geminga_proto::{ids::TopicId, key_hash::equal_ranges};

    use super::*;
    use crate::catalog::SegmentRange;

    fn topic() -> Topic {
        let ranges = equal_ranges(4).into_iter().zip(0..);
        Topic {
            id: TopicId(1),
            name: TopicName::parse("a/b/c").expect("valid"),
            layout_epoch: 1,
            segments: ranges
                .map(|((first, last), segment)| SegmentRange { segment, first, last })
                .collect(),
            created_at_ms: 0,
            deleting: false,
            policies: None,
            revision: Revision(1),
        }
    }

    fn batch(hashes: &[(u32, bool)]) -> Batch {
        let index = RecordIndex {
            key_hash: hashes.iter().map(|h| h.0).collect(),
            has_key: hashes.iter().map(|h| h.1).collect(),
            ..Default::default()
        };
        Batch { index: Some(index), count: hashes.len() as u32, ..Batch::default() }
    }

    #[test]
    fn a_key_decides_then_the_name_then_the_turn() {
        let topic = topic();
        assert_eq!(
            route(&topic, &batch(&[(0, false), (u32::MAX, true)]), None).expect("routed"),
            3
        );
        assert!(
            route(&topic, &batch(&[(0, true), (u32::MAX, true)]), None).is_err(),
            "two segments"
        );
        let name = ProducerName::parse("p").expect("valid");
        let by_name = || route(&topic, &batch(&[(0, false)]), Some(&name)).expect("routed");
        assert_eq!(by_name(), by_name(), "a retry goes the same way");
        let turns: std::collections::BTreeSet<u32> =
            (0..8).map(|_| route(&topic, &batch(&[(0, false)]), None).expect("routed")).collect();
        assert!(turns.len() > 1, "round robin goes on");
    }
}
