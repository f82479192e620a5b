//! A segment in service: its log, the topic it belongs to, and who consumes it.

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use geminga_managed_ledger::{ManagedLedger, Status};
use geminga_proto::{
    ids::{Epoch, SegmentId, SubscriptionId},
    names::{SubscriptionName, TopicName},
    reason::Reason,
    v1::OwnerHint,
};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use crate::{
    errors::Refusal,
    limits::{ProducerSlot, Producers, PublishRate, SegmentLimits},
    metrics::{BacklogOf, Metrics},
    publish::Anonymous,
    subscription::Dispatchers,
};

/// A loaded segment. It serves until it is fenced or ended; streams on it end then.
pub struct Segment {
    id: SegmentId,
    topic: TopicName,
    ledger: ManagedLedger,
    dispatchers: Dispatchers,
    subscriptions: Mutex<BTreeMap<SubscriptionId, SubscriptionName>>,
    anonymous: Anonymous,
    limits: watch::Sender<SegmentLimits>,
    publish_rate: PublishRate,
    producers: Producers,
    ended: watch::Sender<Option<Refusal>>,
    /// Streams on it.
    streams: watch::Sender<usize>,
    moving: watch::Sender<Option<Moving>>,
}

/// A segment on its way to another broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Moving {
    pub(crate) to: OwnerHint,
    /// Streams have until then.
    pub(crate) until: Instant,
}

/// A stream on a segment, until dropped.
#[derive(Debug)]
pub(crate) struct Attending(Arc<Segment>);

impl Drop for Attending {
    fn drop(&mut self) {
        self.0.streams.send_modify(|streams| *streams -= 1);
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Segment {
    pub(super) fn new(id: SegmentId, topic: TopicName, ledger: ManagedLedger) -> Self {
        Self {
            id,
            topic,
            ledger,
            dispatchers: Dispatchers::default(),
            subscriptions: Mutex::new(BTreeMap::new()),
            anonymous: Anonymous::default(),
            limits: watch::Sender::default(),
            publish_rate: PublishRate::default(),
            producers: Producers::default(),
            ended: watch::Sender::new(None),
            streams: watch::Sender::new(0),
            moving: watch::Sender::new(None),
        }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Its topic's name.
    #[must_use]
    pub fn topic(&self) -> &TopicName {
        &self.topic
    }

    /// The ownership epoch it is served under.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.ledger.epoch()
    }

    /// Its log.
    #[must_use]
    pub fn ledger(&self) -> &ManagedLedger {
        &self.ledger
    }

    /// Who serves its subscriptions.
    pub(crate) fn dispatchers(&self) -> &Dispatchers {
        &self.dispatchers
    }

    /// The producer behind unary calls that name none.
    pub(crate) fn anonymous(&self) -> &Anonymous {
        &self.anonymous
    }

    /// What policies limit here, and each change of it.
    pub(crate) fn limits(&self) -> watch::Receiver<SegmentLimits> {
        self.limits.subscribe()
    }

    /// Policies limit this from now on. What is above a lowered count stays.
    pub(crate) fn set_limits(&self, limits: SegmentLimits) {
        self.publish_rate.set(limits.publish);
        self.limits.send_if_modified(|now| {
            let changed = *now != limits;
            *now = limits;
            changed
        });
    }

    /// Who publishes waits for it.
    pub(crate) fn publish_rate(&self) -> &PublishRate {
        &self.publish_rate
    }

    /// A place among the producers; see [`Producers::slot`].
    ///
    /// # Errors
    /// TOO_MANY_PRODUCERS.
    pub(crate) fn producer_slot(&self, of: Option<Bytes>) -> Result<ProducerSlot, Refusal> {
        self.producers.slot(of, self.limits.borrow().producers_max)
    }

    /// Remembers the name of a subscription with a cursor here, for the backlog metric.
    pub fn name_subscription(&self, id: SubscriptionId, name: SubscriptionName) {
        self.subscriptions.lock().insert(id, name);
    }

    /// The name of a subscription with a cursor here.
    pub(crate) fn subscription_name(&self, id: SubscriptionId) -> Option<SubscriptionName> {
        self.subscriptions.lock().get(&id).cloned()
    }

    /// Forgets a subscription and ends its consumers.
    pub fn forget_subscription(&self, id: SubscriptionId) {
        self.subscriptions.lock().remove(&id);
        self.dispatchers.end(id);
    }

    /// Ends its streams. The first reason stands.
    pub fn end(&self, why: Refusal) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(why);
            first
        });
    }

    /// Counts a stream on it.
    pub(crate) fn attend(self: &Arc<Self>) -> Attending {
        self.streams.send_modify(|streams| *streams += 1);
        Attending(Arc::clone(self))
    }

    /// Resolves when no stream is on it. Cancel-safe.
    pub(super) async fn deserted(&self) {
        let mut streams = self.streams.subscribe();
        let _here = streams.wait_for(|streams| *streams == 0).await;
    }

    /// Its streams are asked to leave for another broker.
    pub(super) fn move_to(&self, to: OwnerHint, until: Instant) {
        self.moving.send_replace(Some(Moving { to, until }));
    }

    /// Whether it is on its way to another broker.
    pub(crate) fn is_moving(&self) -> bool {
        self.moving.borrow().is_some()
    }

    /// Resolves when it is on its way to another broker. Cancel-safe.
    pub(crate) async fn moving(&self) -> Moving {
        let mut moving = self.moving.subscribe();
        let found = match moving.wait_for(Option::is_some).await {
            Ok(moving) => moving.clone(),
            Err(_) => None,
        };
        match found {
            Some(moving) => moving,
            None => std::future::pending().await,
        }
    }

    /// Resolves when streams on it must end, with the reason. Cancel-safe.
    pub async fn ended(&self) -> Refusal {
        let mut ended = self.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(why) => why.clone().expect("waited for it"),
            Err(_) => fenced("the segment is no longer served"),
        }
    }

    /// Resolves when its log serves no more, or it was ended otherwise. Cancel-safe.
    pub(crate) async fn fenced(&self) -> Refusal {
        let mut status = self.ledger.status();
        tokio::select! {
            biased;
            why = self.ended() => why,
            status = status.wait_for(|status| !matches!(status, Status::Serving)) => match status {
                Ok(status) => fenced(&format!("the segment is no longer served here: {:?}", *status)),
                Err(_) => fenced("the segment is no longer served here"),
            },
        }
    }

    /// Whether its log serves, and nobody has ended it.
    pub(crate) fn serves(&self) -> bool {
        self.ended.borrow().is_none() && matches!(*self.ledger.status().borrow(), Status::Serving)
    }

    /// The subscriptions that have a cursor here.
    pub(crate) fn subscriptions(&self) -> Vec<(SubscriptionId, SubscriptionName)> {
        self.subscriptions.lock().iter().map(|(id, name)| (*id, name.clone())).collect()
    }

    pub(super) fn report_backlog(&self, metrics: &Metrics, now_ms: u64) {
        for (id, name) in self.subscriptions.lock().iter() {
            let Some(cursor) = self.ledger.cursor(*id) else { continue };
            let labels = BacklogOf {
                topic: self.topic.to_string(),
                segment: self.id.segment,
                subscription: name.to_string(),
            };
            let backlog = i64::try_from(cursor.backlog).unwrap_or(i64::MAX);
            metrics.backlog.get_or_create(&labels).set(backlog);
            let behind = self.ledger.backlog(cursor.mark_delete_next);
            let bytes = i64::try_from(behind.bytes).unwrap_or(i64::MAX);
            metrics.backlog_bytes.get_or_create(&labels).set(bytes);
            let age_ms = behind.oldest_publish_ms.map_or(0, |at| now_ms.saturating_sub(at));
            let age = i64::try_from(age_ms / 1_000).unwrap_or(i64::MAX);
            metrics.backlog_age.get_or_create(&labels).set(age);
        }
    }
}

fn fenced(message: &str) -> Refusal {
    Refusal::new(Reason::SegmentFenced, message)
}
