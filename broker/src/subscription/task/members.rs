//! The streams of consumers.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use futures::future::BoxFuture;
use geminga_proto::{
    reason::Reason,
    v1::{Claim, ConsumeOpened, ConsumeReply, GoAway, OffsetRange, consume_reply::Reply},
};

use super::{
    super::{
        dispatchers::{Answer, Attach},
        gate::{Gate, Gated},
        handle::{Handle, Signer},
        wanted,
    },
    Dispatcher,
    lives::Ending,
};
use crate::{
    dispatcher::{AttachRefused, Claimed},
    errors::Refusal,
    listener::{Life, Outbox},
    ownership::Attending,
};

/// A consumer's stream.
pub(super) struct Member {
    pub(super) outbox: Outbox<ConsumeReply>,
    ended: Answer<()>,
    gate: Gate,
    /// Settles whose answer is on its way.
    pub(super) settles: usize,
    pub(super) ending: Option<Ending>,
    pub(super) life: Life,
    handles: BTreeMap<u32, Bytes>,
    _attending: Attending,
}

/// Attempts whose handle is kept made, per consumer.
const HANDLES_MAX: usize = 16;

impl Member {
    pub(super) fn push(&self, reply: Reply) {
        self.outbox.push(ConsumeReply { reply: Some(reply) }, 0);
    }

    fn encoded(&mut self, signer: &Signer, handle: Handle) -> Bytes {
        if let Some(made) = self.handles.get(&handle.attempt) {
            return made.clone();
        }
        let made = signer.encode(handle);
        if self.handles.len() >= HANDLES_MAX {
            self.handles.clear();
        }
        self.handles.insert(handle.attempt, made.clone());
        made
    }

    pub(super) fn drained(&self) -> BoxFuture<'static, ()> {
        Box::pin(self.outbox.drained())
    }

    /// It is listened to while it reads its answers, and has not too many settles on their way.
    pub(super) fn set_gate(&self, settles_max: usize) {
        let hears = !matches!(self.ending, Some(Ending::TimeOver));
        self.gate.set(hears && self.outbox.is_open() && self.settles < settles_max);
    }
}

impl Dispatcher {
    pub(super) fn attach(&mut self, attach: Attach) {
        let Attach { open, layout_epoch, segments, frames, outbox, ended } = attach;
        if outbox.is_gone() {
            // Its client left while it was on its way: it takes nobody's place.
            let _gone = ended.send(Ok(()));
            return;
        }
        let consumer = self.shared.random.u64();
        let name = match open.consumer_name.as_str() {
            "" => format!("consumer-{consumer:016x}"),
            name => name.to_owned(),
        };
        let attached = self.claims(&open.claims).and_then(|claims| {
            self.core.on_segments(segments);
            self.core.attach(consumer, &name, &claims).map_err(|refused| match refused {
                AttachRefused::Taken(by) => {
                    let message = format!("the subscription is consumed by {by:?}");
                    Refusal::new(Reason::ConsumerExists, message).with("consumer", by)
                }
                AttachRefused::TooMany(_) => self.too_many_consumers(),
            })
        });
        let attached = match attached {
            Ok(attached) => attached,
            Err(refusal) => {
                outbox.finish(Err(refusal.clone()));
                let _gone = ended.send(Err(refusal));
                return;
            }
        };
        let gate = Gate::default();
        let member = Member {
            outbox,
            ended,
            gate: gate.clone(),
            settles: 0,
            ending: None,
            life: self.shared.life(open.heartbeat_ms),
            handles: BTreeMap::new(),
            _attending: self.segment.attend(),
        };
        member.outbox.tell(Arc::clone(&self.woken));
        let granted = attached.granted.into_iter().map(|(attempt, runs)| Claim {
            handle: self.signer.encode(self.handle(consumer, attempt)),
            ranges: ranges(&runs),
        });
        let unacked_max = self.shared.config.limits.unacked_messages_max;
        member.push(Reply::Opened(ConsumeOpened {
            mark_delete_next: self.core.mark_delete(),
            layout_epoch,
            epoch: self.segment.epoch().0,
            max_outstanding_messages: u32::try_from(unacked_max).unwrap_or(u32::MAX),
            settings: Some(self.settings.clone()),
            granted: granted.collect(),
            compacted_to: 0,
        }));
        if let Some(go_away) = &self.told {
            member.push(Reply::GoAway(go_away.clone()));
        }
        self.lives.extend(member.life.next().map(|at| (at, consumer)));
        self.members.insert(consumer, member);
        self.inbound.push(Gated::new(consumer, gate, frames));
    }

    pub(super) fn too_many_consumers(&self) -> Refusal {
        let message = "the subscription has consumers on this segment";
        self.consumers_max.reached(Reason::TooManyConsumers, "consumers_max", message)
    }

    /// Handles that are none count for nothing, and say so.
    fn claims(&self, claims: &[Claim]) -> Result<Vec<Claimed>, Refusal> {
        let limits = &self.shared.config.limits;
        if claims.len() > limits.claims_max {
            let message = format!("an open has at most {} claims", limits.claims_max);
            return Err(Refusal::request(message).with("claims_max", limits.claims_max));
        }
        let mut checked = Vec::with_capacity(claims.len());
        for claim in claims {
            let runs = wanted::runs(&claim.ranges, limits.settle_ranges_max)?;
            let presented = self.signer.check(&claim.handle, self.id, self.segment.epoch())?;
            checked.push(Claimed { presented, runs });
        }
        Ok(checked)
    }

    pub(super) fn handle(&self, consumer: u64, attempt: u32) -> Handle {
        Handle { epoch: self.segment.epoch(), subscription: self.id, consumer, attempt }
    }

    /// The handle on the wire of what a consumer gets under an attempt.
    pub(super) fn encoded_handle(&mut self, consumer: u64, attempt: u32) -> Bytes {
        let handle = self.handle(consumer, attempt);
        match self.members.get_mut(&consumer) {
            Some(member) => member.encoded(&self.signer, handle),
            None => self.signer.encode(handle),
        }
    }

    pub(super) fn tell_all(&mut self, go_away: GoAway) {
        for member in self.members.values() {
            member.push(Reply::GoAway(go_away.clone()));
        }
        self.told = Some(go_away);
    }

    pub(super) fn look_at_outboxes(&mut self) {
        let settles_max = self.shared.config.limits.settles_in_flight_max;
        let mut gone = Vec::new();
        for (consumer, member) in &self.members {
            if member.outbox.is_gone() {
                gone.push(*consumer);
                continue;
            }
            member.set_gate(settles_max);
            self.core.on_outbox(*consumer, member.outbox.is_open());
        }
        for consumer in gone {
            let member = self.members.get(&consumer);
            let heard_all = member.is_some_and(|member| {
                member.ending == Some(Ending::HalfClosed) && member.outbox.has_ended()
            });
            self.core.detach(consumer, heard_all);
            self.finish(consumer, Ok(()));
        }
    }

    /// A stream's last word.
    pub(super) fn finish(&mut self, consumer: u64, result: Result<(), Refusal>) {
        if let Some(member) = self.members.remove(&consumer) {
            if let Some(at) = member.life.next() {
                self.lives.remove(&(at, consumer));
            }
            member.gate.end();
            member.outbox.finish(result.clone());
            let _gone = member.ended.send(result);
        }
    }

    /// All streams and calls end with this.
    pub(super) fn end(&mut self, why: &Refusal) {
        let all: Vec<u64> = self.members.keys().copied().collect();
        for consumer in all {
            self.core.detach(consumer, false);
            self.finish(consumer, Err(why.clone()));
        }
        for (_, pull) in std::mem::take(&mut self.pulls) {
            let _gone = pull.answer.send(Err(why.clone()));
        }
        for (_, to) in std::mem::take(&mut self.answers) {
            self.answer(to, Err(why.clone()));
        }
    }
}

/// Half-open runs on the wire.
pub(super) fn ranges(runs: &[(u64, u64)]) -> Vec<OffsetRange> {
    runs.iter().map(|(start, end)| OffsetRange { first: *start, last: end - 1 }).collect()
}
