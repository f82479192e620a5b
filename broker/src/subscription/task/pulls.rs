//! Calls that wait for messages.

use std::time::Duration;

use geminga_proto::{reason::Reason, v1::Delivery};
use tokio::time::Instant;

use super::{
    super::dispatchers::{Answer, PullAsked},
    Dispatcher,
};
use crate::{
    dispatcher::{AttachRefused, Presented, Verb},
    errors::Refusal,
};

/// A call that waits.
pub(super) struct Pull {
    pub(super) deliveries: Vec<Delivery>,
    pub(super) answer: Answer<Vec<Delivery>>,
    pub(super) deadline: Instant,
}

impl Dispatcher {
    pub(super) fn pull(&mut self, asked: PullAsked, answer: Answer<Vec<Delivery>>) {
        let instance = self.shared.random.u64();
        let name = match asked.consumer_name.as_str() {
            "" => format!("pull-{instance:016x}"),
            name => name.to_owned(),
        };
        let attached = self.core.attach_pull(
            instance,
            &name,
            (asked.lease_ms, asked.wait_ms, !asked.consumer_name.is_empty()),
        );
        let consumer = match attached {
            Ok(consumer) if !self.pulls.contains_key(&consumer) => consumer,
            Ok(_) => {
                let message = format!("consumer {name} pulls already; one call at a time");
                let _gone = answer.send(Err(Refusal::new(Reason::Busy, message)));
                return;
            }
            Err(refused) => {
                let refusal = match refused {
                    AttachRefused::Taken(_) => {
                        Refusal::new(Reason::ConsumerExists, refused.to_string())
                    }
                    AttachRefused::TooMany(_) => self.too_many_consumers(),
                };
                let _gone = answer.send(Err(refusal));
                return;
            }
        };
        self.core.set_credit(consumer, asked.messages_max, asked.bytes_max);
        let deadline = Instant::now() + Duration::from_millis(asked.wait_ms);
        self.pulls.insert(consumer, Pull { deliveries: Vec::new(), answer, deadline });
    }

    /// Those that have something, or have waited long enough, or have hung up.
    pub(super) fn answer_pulls(&mut self) {
        let now = Instant::now();
        let done: Vec<u64> = self
            .pulls
            .iter()
            .filter(|(_, pull)| {
                !pull.deliveries.is_empty() || pull.answer.is_closed() || pull.deadline <= now
            })
            .map(|(consumer, _)| *consumer)
            .collect();
        for consumer in done {
            let Some(pull) = self.pulls.remove(&consumer) else { continue };
            self.core.set_credit(consumer, 0, 0);
            if let Err(Ok(unheard)) = pull.answer.send(Ok(pull.deliveries)) {
                self.take_back(consumer, &unheard);
            }
        }
    }

    /// The caller left: what it never saw is somebody else's, and no failure.
    fn take_back(&mut self, consumer: u64, deliveries: &[Delivery]) {
        for delivery in deliveries {
            let runs = delivery.deliver.iter().map(|range| (range.first, range.last + 1)).collect();
            let who = Presented { consumer, attempt: delivery.attempt, earlier: false };
            let release = Verb::Release { runs, delay_ms: None, counts: false };
            let _held_no_more = self.core.settle(who, release);
        }
    }
}
