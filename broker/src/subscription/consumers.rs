//! The consumers of one segment, by subscription. Exclusive policy: the first one stands, a second one is refused.
//!
//! A consumer's handles stay good after its stream ended, for calls to `Settle`, until another consumer takes its place.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use geminga_proto::{ids::SubscriptionId, reason::Reason};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Handle, handle::invalid};
use crate::errors::Refusal;

/// Who consumes what on one segment.
#[derive(Clone, Debug, Default)]
pub struct Consumers {
    slots: Arc<Mutex<BTreeMap<SubscriptionId, Slot>>>,
}

#[derive(Debug)]
struct Slot {
    handle: Handle,
    name: String,
    connected: bool,
    shared: Arc<ConsumerShared>,
}

#[derive(Debug, Default)]
struct ConsumerShared {
    /// Everything below was given to this consumer, or settled before.
    given: AtomicU64,
    /// The cursor changed by something else than this consumer's stream.
    cursor_changed: Notify,
    ended: CancellationToken,
}

/// A consumer's place; free again when dropped.
#[derive(Debug)]
pub struct Attached {
    slots: Arc<Mutex<BTreeMap<SubscriptionId, Slot>>>,
    handle: Handle,
    /// The handle on the wire, made once.
    encoded: Bytes,
    shared: Arc<ConsumerShared>,
}

impl Consumers {
    /// Takes the subscription's one place.
    ///
    /// # Errors
    /// CONSUMER_EXISTS, naming the one who has it.
    pub fn attach(&self, handle: Handle, name: &str) -> Result<Attached, Refusal> {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get(&handle.subscription)
            && slot.connected
        {
            let message = format!("the subscription is consumed by {:?}", slot.name);
            return Err(Refusal::new(Reason::ConsumerExists, message).with("consumer", &slot.name));
        }
        let shared = Arc::new(ConsumerShared::default());
        let slot =
            Slot { handle, name: name.to_owned(), connected: true, shared: Arc::clone(&shared) };
        slots.insert(handle.subscription, slot);
        let (slots, encoded) = (Arc::clone(&self.slots), handle.encode());
        Ok(Attached { slots, handle, encoded, shared })
    }

    /// Whether a handle presented outside its stream may settle everything below `end`.
    ///
    /// # Errors
    /// INVALID_HANDLE.
    pub fn check(
        &self,
        subscription: SubscriptionId,
        presented: &[u8],
        end: u64,
    ) -> Result<(), Refusal> {
        let slots = self.slots.lock();
        let Some(slot) = slots.get(&subscription) else {
            Handle::decode(presented)?;
            return Err(invalid(
                "nothing was given on this subscription since the segment was loaded",
            ));
        };
        slot.handle.check(presented)?;
        if end > slot.shared.given.load(Ordering::Acquire) {
            return Err(invalid("an offset was never given with this handle"));
        }
        Ok(())
    }

    /// Tells the consumer's stream that the cursor was changed by somebody else.
    pub fn cursor_changed(&self, subscription: SubscriptionId) {
        if let Some(slot) = self.slots.lock().get(&subscription) {
            slot.shared.cursor_changed.notify_one();
        }
    }

    /// The name of the consumer that is connected.
    #[must_use]
    pub fn name(&self, subscription: SubscriptionId) -> Option<String> {
        let slots = self.slots.lock();
        slots.get(&subscription).filter(|slot| slot.connected).map(|slot| slot.name.clone())
    }

    /// Ends the consumer of a subscription that is deleted.
    pub fn end(&self, subscription: SubscriptionId) {
        if let Some(slot) = self.slots.lock().remove(&subscription) {
            slot.shared.ended.cancel();
        }
    }
}

impl Attached {
    /// What its deliveries carry.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle
    }

    /// As [`Self::handle`], on the wire.
    #[must_use]
    pub fn encoded_handle(&self) -> Bytes {
        self.encoded.clone()
    }

    /// Everything below was given to it.
    pub fn gave(&self, below: u64) {
        self.shared.given.store(below, Ordering::Release);
    }

    /// Resolves when the cursor was changed by somebody else since the last call. Cancel-safe.
    pub async fn cursor_changed(&self) {
        self.shared.cursor_changed.notified().await;
    }

    /// Resolves when the subscription is deleted. Cancel-safe.
    pub async fn ended(&self) {
        self.shared.ended.cancelled().await;
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(slot) = self.slots.lock().get_mut(&self.handle.subscription)
            && slot.handle == self.handle
        {
            slot.connected = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use geminga_proto::ids::Epoch;

    use super::*;

    fn handle(consumer: u64) -> Handle {
        Handle { epoch: Epoch(1), subscription: SubscriptionId(5), consumer }
    }

    #[test]
    fn a_second_consumer_is_refused_until_the_first_has_left() {
        let consumers = Consumers::default();
        let first = consumers.attach(handle(1), "one").expect("free");
        let refused = consumers.attach(handle(2), "two").expect_err("taken");
        assert_eq!(refused.reason, Reason::ConsumerExists);
        assert_eq!(consumers.name(SubscriptionId(5)).as_deref(), Some("one"));
        drop(first);
        assert_eq!(consumers.name(SubscriptionId(5)), None);
        let _second = consumers.attach(handle(2), "two").expect("free again");
    }

    #[test]
    fn a_handle_settles_what_it_was_given_until_another_consumer_comes() {
        let consumers = Consumers::default();
        let first = consumers.attach(handle(1), "one").expect("free");
        first.gave(10);
        let bytes = handle(1).encode();
        consumers.check(SubscriptionId(5), &bytes, 10).expect("given");
        assert!(consumers.check(SubscriptionId(5), &bytes, 11).is_err(), "never given");
        drop(first);
        consumers.check(SubscriptionId(5), &bytes, 10).expect("still good");
        let second = consumers.attach(handle(2), "two").expect("free");
        assert!(consumers.check(SubscriptionId(5), &bytes, 10).is_err(), "another consumer");
        assert!(consumers.check(SubscriptionId(6), &bytes, 10).is_err(), "another subscription");
        drop(second);
    }
}
