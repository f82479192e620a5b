//! The copies of dead letters: one message each, published through the topic's own owner by a named producer whose sequence
//! is the decision's number, so that a copy published again after a crash is stored once (L1).

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use geminga_managed_ledger::StoredBatch;
use geminga_proto::{
    ids::{Offset, SubscriptionId},
    key_hash::key_hash,
    names::{SubscriptionName, TopicName},
    reason::Reason,
    records::Records,
    v1::{
        Batch, Codec, PayloadFormat, PublishRequest, Record, RecordBatch, RecordIndex,
        SubscriptionSettings,
    },
};
use parking_lot::Mutex;
use prost::Message;
use tokio::time::sleep;

use super::Command;
use crate::{
    catalog::Subscription, context::Shared, dispatcher::DeadLetter, errors::Refusal, lifecycle,
    listener::Connection, ownership::Segment, publish, storage_errors,
};

/// Pauses between tries of one copy; it is tried for ever.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Longest part of a name that is made of others.
const NAME_PART_MAX: usize = 90;
/// Between two looks for dead letters that nobody publishes.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// And at least so long: many loads make one look.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Where a subscription's dead letters go.
#[derive(Clone, Debug)]
pub(super) struct DeadLetters {
    /// Full name; changes with the settings.
    topic: Arc<Mutex<String>>,
    default_topic: String,
    producer: String,
    subscription: SubscriptionName,
}

impl DeadLetters {
    pub(super) fn new(segment: &Segment, subscription: &Subscription) -> Self {
        let default_topic = default_topic(segment.topic(), subscription);
        let (name, id) = (part(subscription.name.as_str()), subscription.id.0);
        let this = Self {
            topic: Arc::default(),
            default_topic,
            producer: format!("{name}~{id}~{}~dlq", segment.id().segment),
            subscription: subscription.name.clone(),
        };
        this.settings(&subscription.settings);
        this
    }

    /// The settings changed; a copy that cannot be stored goes to the new topic at its next try.
    pub(super) fn settings(&self, settings: &SubscriptionSettings) {
        let named = settings.retry.as_ref().map(|retry| retry.dead_letter_topic.clone());
        let named = named.filter(|name| !name.is_empty());
        *self.topic.lock() = named.unwrap_or_else(|| self.default_topic.clone());
    }

    /// Stores the copy of a message; resolves with its number once it is stored, however long that takes.
    pub(super) fn publish(
        &self,
        shared: &Shared,
        segment: &Arc<Segment>,
        letter: DeadLetter,
    ) -> BoxFuture<'static, u64> {
        let (this, shared, segment) = (self.clone(), Arc::clone(shared), Arc::clone(segment));
        Box::pin(async move {
            let (mut pause, mut prev) = (PAUSE_MIN, letter.number - 1);
            loop {
                let refusal = match this.try_publish(&shared, &segment, &letter, prev).await {
                    Ok(()) => return letter.number,
                    Err(refusal) => refusal,
                };
                // The topic was made anew, or holds less than is settled: go on where it stands.
                let pushed = refusal.facts.iter().find(|(name, _)| name == "pushed_sequence");
                if refusal.reason == Reason::OutOfSequence
                    && let Some(pushed) = pushed.and_then(|(_, pushed)| pushed.parse().ok())
                    && pushed < letter.number
                    && pushed != prev
                {
                    prev = pushed;
                    continue;
                }
                let id = segment.id();
                tracing::warn!(
                    topic = %id.topic, segment = id.segment, subscription = %this.subscription,
                    offset = letter.offset, %refusal, "dead letter is not stored yet"
                );
                shared.metrics.refuse(refusal.reason);
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        })
    }

    async fn try_publish(
        &self,
        shared: &Shared,
        segment: &Arc<Segment>,
        letter: &DeadLetter,
        prev: u64,
    ) -> Result<(), Refusal> {
        let name = TopicName::parse(&self.topic.lock().clone())?;
        let read = segment.ledger().read(Offset(letter.offset), 1, 1).await;
        let stored = read.map_err(|error| storage_errors::of_read(&error));
        let stored = match stored {
            Ok(stored) => stored.into_iter().next(),
            // Not in the log any more: there is nothing to keep.
            Err(_) if letter.offset < segment.ledger().first_offset().0 => return Ok(()),
            Err(refusal) => return Err(refusal),
        };
        let Some(stored) = stored.filter(|stored| stored.base_offset.0 <= letter.offset) else {
            return Ok(());
        };
        let topic = match shared.catalog.find_topic(&name).await? {
            Some(topic) => topic,
            // Of the broker's own: no policy keeps it out.
            None => lifecycle::create_topic_unlimited(shared, &name, 0).await?,
        };
        let segments = u32::try_from(topic.segments.len()).unwrap_or(1).max(1);
        let (record, hash) = self.copy(segment, &stored, letter);
        let has_key = vec![record.key.is_some()];
        let payload = RecordBatch { records: vec![record] }.encode_to_vec();
        let batch = Batch {
            prev_sequence: prev,
            lo_sequence: letter.number,
            hi_sequence: letter.number,
            count: 1,
            format: PayloadFormat::Native.into(),
            codec: Codec::Unspecified.into(),
            uncompressed_size: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            index: Some(RecordIndex { key_hash: vec![hash], has_key, ..RecordIndex::default() }),
            payload: payload.into(),
            ..Batch::default()
        };
        let request = PublishRequest {
            topic: name.to_string(),
            // One producer's sequences make one chain on one segment (DD5): it is the same for all of them.
            segment: Some(segment.id().segment % segments),
            producer_name: self.producer.clone(),
            batch: Some(batch),
        };
        let own = Connection::internal(&shared.config.limits);
        publish::publish_own(shared, &own, request).await.map(drop)
    }

    /// The message as it was, with where it comes from in its headers. What cannot be decoded is kept as it is stored.
    fn copy(&self, segment: &Segment, stored: &StoredBatch, letter: &DeadLetter) -> (Record, u32) {
        let at = (letter.offset - stored.base_offset.0) as usize;
        let hash = stored.header.index.as_ref().and_then(|index| index.key_hash.get(at)).copied();
        let mut record = record_of(stored, at).unwrap_or_else(|| {
            let headers = [("geminga-undecodable".to_owned(), "true".to_owned())];
            Record {
                value: stored.payload.clone(),
                headers: headers.into_iter().collect(),
                ..Record::default()
            }
        });
        let origin = [
            ("geminga-origin-topic", segment.topic().to_string()),
            ("geminga-origin-segment", segment.id().segment.to_string()),
            ("geminga-origin-offset", letter.offset.to_string()),
            ("geminga-origin-publish-time-ms", stored.header.publish_time_ms.to_string()),
            ("geminga-subscription", self.subscription.to_string()),
            ("geminga-attempts", letter.attempt.to_string()),
            ("geminga-reason", letter.reason.clone()),
        ];
        record.headers.extend(origin.map(|(name, value)| (name.to_owned(), value)));
        let hash = hash.unwrap_or_else(|| key_hash(record.key.as_deref().unwrap_or_default()));
        (record, hash)
    }
}

/// A message of a stored batch; none when it cannot be decoded within its bounds.
fn record_of(stored: &StoredBatch, at: usize) -> Option<Record> {
    let header = &stored.header;
    let codec = Codec::try_from(header.codec).ok()?;
    let payload = stored.payload.clone();
    let mut records = Records::open(codec, header.uncompressed_size, header.count, payload).ok()?;
    for _ in 0..at {
        records.skip().ok()?;
    }
    records.read().ok()?
}

/// TENANT/NAMESPACE/TOPIC~SUBSCRIPTION~dlq; where that is too long for a name, its parts are cut and the subscription's
/// id keeps it apart from others.
fn default_topic(topic: &TopicName, subscription: &Subscription) -> String {
    let plain = format!("{topic}~{}~dlq", subscription.name);
    if TopicName::parse(&plain).is_ok() {
        return plain;
    }
    let (of, name) = (part(topic.topic()), part(subscription.name.as_str()));
    format!("{}/{of}~{name}~{}~dlq", topic.namespace(), subscription.id.0)
}

fn part(name: &str) -> &str {
    // Names are ASCII.
    &name[..name.len().min(NAME_PART_MAX)]
}

/// Decisions so far on a segment that is here.
pub(crate) fn decided(segment: &Segment, id: SubscriptionId) -> u64 {
    segment.ledger().dead_letters(id).map_or(0, |letters| letters.decided)
}

/// Dead letters whose copy is not stored are published by whoever has the segment, also when nobody consumes: looks through
/// the segments after each load, and now and then.
pub(crate) async fn resume(shared: Shared) {
    let mut loads = shared.ownership.loads();
    loop {
        for segment in shared.ownership.served() {
            for (id, name) in segment.subscriptions() {
                if segment.ledger().dead_letters(id).is_some_and(|letters| letters.waiting)
                    && segment.dispatchers().seen(id).is_none()
                    && let Err(refusal) = start(&shared, &segment, &name).await
                {
                    let topic = segment.id().topic;
                    tracing::warn!(%topic, subscription = %name, %refusal, "dead letters wait");
                }
            }
        }
        sleep(LOOK_PAUSE).await;
        tokio::select! {
            changed = loads.changed() => if changed.is_err() { return },
            () = sleep(LOOK_EVERY) => {}
        }
    }
}

async fn start(
    shared: &Shared,
    segment: &Arc<Segment>,
    name: &SubscriptionName,
) -> Result<(), Refusal> {
    let found = shared.catalog.find_subscription(segment.id().topic, name).await?;
    match found {
        Some(found) => segment.dispatchers().send(shared, segment, &found, Command::Resume).await,
        None => Ok(()),
    }
}
