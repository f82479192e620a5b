//! The core's actions, carried out; answers to those who wait; what is shown of it.

use std::time::Duration;

use geminga_proto::reason::Reason;
use geminga_proto::v1::{
    Assigned, ConsumeReply, ConsumerState, Delivery as DeliveryReply, Held, HeldBy as HeldByProto,
    Revoked, SegmentExplained, Settled, consume_reply::Reply,
};
use tokio::time::Instant;

use super::{
    super::{dispatchers::Answer, durable},
    Dispatcher, Done,
    members::ranges,
    reads::Queued,
};
use crate::{
    dispatcher::{Action, Change, Delivery, HeldBy, Kind},
    errors::Refusal,
    spans,
};

/// How often what holds the next message up is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Who waits for the outcome of a record.
pub(super) enum AnswerTo {
    Stream {
        consumer: u64,
        token: u64,
        began: Instant,
    },
    Call(Answer<u64>, Instant),
    /// With what is answered instead of mark-delete.
    Cancel(Answer<u64>, u64),
    Nobody,
}

impl Dispatcher {
    pub(super) fn carry_out(&mut self, action: Action<Queued>) {
        match action {
            Action::Deliver(delivery) => self.deliver(delivery),
            Action::Read { of, generation, from, bytes_max, messages_max } => {
                self.read((of, generation), from, (bytes_max, messages_max));
            }
            Action::Record { id, change } => self.record(id, change),
            Action::Revoke { consumer, attempt, runs } => {
                let handle = self.encoded_handle(consumer, attempt);
                let ranges = ranges(&runs);
                if let Some(member) = self.members.get(&consumer) {
                    member.push(Reply::Revoked(Revoked { ranges, handle }));
                }
            }
            Action::Assign { consumer, active, epoch } => {
                if let Some(member) = self.members.get(&consumer) {
                    member.push(Reply::Assigned(Assigned { active, epoch }));
                }
            }
            Action::Replaced { consumer } => {
                let message = "a consumer of the same name took its place";
                self.finish(consumer, Err(Refusal::new(Reason::ConsumerReplaced, message)));
            }
            Action::LogLeases(leases) => {
                durable::log_leases(self.segment.ledger(), self.id, leases);
            }
            Action::PublishDead(letter) => {
                let copy = self.dead_letters.publish(&self.shared, &self.segment, letter);
                self.publishing = Some(copy);
            }
        }
    }

    fn record(&mut self, id: u64, change: Change) {
        if let Change::DeadLetter(letters) = &change
            && letters.is_empty()
        {
            let here = geminga_proto::ids::Offset(self.core.mark_delete());
            let done = Done::Record { id, result: Ok(here) };
            self.records.push_back(Box::pin(async move { done }));
            return;
        }
        let settled = self.segment.ledger().settle(self.id, durable::settlement(change));
        self.records.push_back(Box::pin(async move { Done::Record { id, result: settled.await } }));
    }

    fn deliver(&mut self, delivery: Delivery<Queued>) {
        let consumer = delivery.consumer;
        let handle = self.encoded_handle(consumer, delivery.attempt);
        let stored = &delivery.batch.stored;
        let header = &stored.header;
        let bytes = stored.payload.len();
        self.shared.metrics.dispatch_messages.inc_by(delivery.messages);
        self.shared.metrics.dispatch_bytes.inc_by(bytes as u64);
        let span = spans::deliver(&header.traceparent, &self.segment, header.count);
        let message = DeliveryReply {
            deliver: ranges(&delivery.runs),
            attempt: delivery.attempt,
            handle,
            lease_ms: delivery.lease_ms,
            ..super::super::reader::as_stored(stored)
        };
        if let Some(pull) = self.pulls.get_mut(&consumer) {
            pull.deliveries.push(message);
        } else if let Some(member) = self.members.get(&consumer) {
            let reply = ConsumeReply { reply: Some(Reply::Delivery(message)) };
            member.outbox.push_holding(reply, bytes, delivery.batch.held);
            self.core.on_outbox(consumer, member.outbox.is_open());
        }
        drop(span);
    }

    pub(super) fn answer(&mut self, to: AnswerTo, result: Result<u64, Refusal>) {
        match to {
            AnswerTo::Stream { consumer, token, began } => {
                self.shared.metrics.settle_duration.observe(began.elapsed().as_secs_f64());
                if let Err(refusal) = &result {
                    self.shared.metrics.refuse(refusal.reason);
                }
                let Some(member) = self.members.get_mut(&consumer) else { return };
                member.settles = member.settles.saturating_sub(1);
                member.push(match result {
                    Ok(mark_delete_next) => Reply::Settled(Settled { token, mark_delete_next }),
                    Err(refusal) => Reply::SettleRefused(refusal.settle_refused(token)),
                });
                member.set_gate(self.shared.config.limits.settles_in_flight_max);
            }
            AnswerTo::Call(answer, began) => {
                self.shared.metrics.settle_duration.observe(began.elapsed().as_secs_f64());
                let _gone = answer.send(result);
            }
            AnswerTo::Cancel(answer, messages) => drop(answer.send(result.map(|_| messages))),
            AnswerTo::Nobody => {}
        }
    }

    /// What everybody may see, and what is counted.
    pub(super) fn count(&mut self) {
        let tally = self.core.take_tally();
        let metrics = &self.shared.metrics;
        metrics.redeliveries.inc_by(tally.redelivered);
        metrics.dead_letters.inc_by(tally.dead_lettered);
        metrics.lease_expiries.inc_by(tally.leases_expired);
        metrics.key_range_moves.inc_by(tally.key_ranges_moved);
        metrics.dispatch_throttled.inc_by(Duration::from_millis(tally.throttled_ms).as_secs_f64());
        metrics.dispatch_throttled_bytes.inc_by(tally.throttled_bytes);
        let (delayed, consumers) = self.core.gauges();
        let look = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY);
        if look {
            self.looked = Some(Instant::now());
        }
        let mut seen = self.seen.lock();
        if look {
            let next = self.core.has_next().then(|| self.core.why_not());
            seen.blocked =
                next.filter(|by| *by != HeldBy::Nothing).map(|by| held_by(by).as_str_name());
        }
        seen.delayed = delayed;
        seen.dead_letters = self.core.dead_letters();
        if seen.consumers as u64 != consumers || self.core.kind() == Kind::Failover {
            seen.consumers = u32::try_from(consumers).unwrap_or(u32::MAX);
        }
        let active = self.core.active_name();
        if seen.consumer.as_deref() != active {
            seen.consumer = active.map(str::to_owned);
        }
    }

    pub(super) fn explained(&self) -> SegmentExplained {
        let explained = self.core.explain();
        let held = explained.held.iter().map(|held| Held {
            by: held_by(held.by).into(),
            messages: held.messages,
            first_offset: held.first,
            consumer: held.consumer.clone(),
            until_ms: held.until_ms,
        });
        let consumers = explained.consumers.iter().map(|consumer| ConsumerState {
            name: consumer.name.clone(),
            active: consumer.active,
            connected: consumer.connected,
            credit_messages: consumer.credit_messages,
            credit_bytes: consumer.credit_bytes,
            held_messages: consumer.held,
        });
        SegmentExplained {
            segment: self.segment.id().segment,
            broker: self.shared.config.id.clone(),
            first_offset: self.segment.ledger().first_offset().0,
            mark_delete_next: explained.mark_delete,
            next_offset: explained.end,
            held: held.collect(),
            consumers: consumers.collect(),
            settings: Some(self.settings.clone()),
            summary: summary(&explained),
            evicted: self.segment.ledger().evicted(self.id),
        }
    }
}

fn held_by(by: HeldBy) -> HeldByProto {
    match by {
        HeldBy::Nothing => HeldByProto::Nothing,
        HeldBy::NoConsumer => HeldByProto::NoConsumer,
        HeldBy::NoCredit => HeldByProto::NoCredit,
        HeldBy::Lease => HeldByProto::Lease,
        HeldBy::Key => HeldByProto::Key,
        HeldBy::Delay => HeldByProto::Delay,
        HeldBy::DeadLetter => HeldByProto::DeadLetter,
        HeldBy::UnackedLimit => HeldByProto::UnackedLimit,
        HeldBy::SlowConnection => HeldByProto::SlowConnection,
        HeldBy::Read => HeldByProto::Read,
        HeldBy::Grace => HeldByProto::Grace,
        HeldBy::HolesLimit => HeldByProto::HolesLimit,
        HeldBy::RateLimit => HeldByProto::RateLimit,
    }
}

/// What stands between the next message and a consumer: the class of the first message that is not with one.
fn summary(explained: &crate::dispatcher::Explained) -> String {
    let next = explained.held.iter().filter(|held| held.by != HeldBy::Lease);
    let Some(next) = next.min_by_key(|held| held.first).or_else(|| explained.held.first()) else {
        return String::new();
    };
    let who = &next.consumer;
    let why = match next.by {
        HeldBy::Nothing => return String::new(),
        HeldBy::NoConsumer => "no consumer is attached".to_owned(),
        HeldBy::NoCredit => "no consumer has granted credit for it".to_owned(),
        HeldBy::Lease => format!("it is with consumer {who:?}, not settled yet"),
        HeldBy::Key => "an earlier message of its key is with a consumer, or waits".to_owned(),
        HeldBy::Delay => format!("it waits for its time, {} ms since the epoch", next.until_ms),
        HeldBy::DeadLetter => {
            "it goes to the dead-letter topic, and its copy is not stored yet".to_owned()
        }
        HeldBy::UnackedLimit => {
            "as many messages as may be are delivered and not settled".to_owned()
        }
        HeldBy::SlowConnection => "no consumer reads what it was sent".to_owned(),
        HeldBy::Read => "it is being read, or no copy of it can be read now".to_owned(),
        HeldBy::Grace if who.is_empty() => "its consumer may come back".to_owned(),
        HeldBy::Grace => format!("its consumer {who:?} may come back"),
        HeldBy::HolesLimit => "as many messages as may be wait for a time or a key".to_owned(),
        HeldBy::RateLimit if next.until_ms == 0 => "the delivery rate lets nothing go".to_owned(),
        HeldBy::RateLimit => {
            format!("the delivery rate is used up until {} ms since the epoch", next.until_ms)
        }
    };
    format!("message {}: {why}", next.first)
}
