//! The segments in service and on their way to it: one load at a time per segment, with a pause after a failed one.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use geminga_proto::{ids::SegmentId, reason::Reason};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::{Segment, loading};
use crate::errors::Refusal;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A segment that was served for so long begins its backoff anew.
const STABLE: Duration = Duration::from_secs(10);

pub(super) type LoadResult = Option<Result<Arc<Segment>, Refusal>>;

/// What the asker is to do.
pub(super) enum Turn {
    /// It is served.
    Served(Arc<Segment>),
    /// It failed a moment ago.
    Refused(Refusal),
    /// Somebody loads it.
    Wait(watch::Receiver<LoadResult>),
    /// The asker starts the load.
    Load(watch::Receiver<LoadResult>),
}

#[derive(Debug, Default)]
pub(super) struct Registry {
    slots: Mutex<BTreeMap<SegmentId, Slot>>,
}

#[derive(Debug)]
struct Slot {
    state: State,
    failures: u32,
}

#[derive(Debug)]
enum State {
    Loading(watch::Sender<LoadResult>),
    Served {
        segment: Arc<Segment>,
        since: Instant,
    },
    /// Not before this time; until then the last refusal stands.
    Resting {
        until: Instant,
        refusal: Refusal,
    },
}

impl Registry {
    pub(super) fn ask(&self, id: SegmentId) -> Turn {
        let mut slots = self.slots.lock();
        let failures = match slots.get(&id) {
            None => 0,
            Some(Slot { state: State::Served { segment, .. }, .. }) => {
                return Turn::Served(Arc::clone(segment));
            }
            Some(Slot { state: State::Loading(sender), .. }) => {
                return Turn::Wait(sender.subscribe());
            }
            Some(Slot { state: State::Resting { until, refusal }, failures }) => {
                let left = until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    return Turn::Refused(refusal.clone().after(left));
                }
                *failures
            }
        };
        let (sender, receiver) = watch::channel(None);
        slots.insert(id, Slot { state: State::Loading(sender), failures });
        Turn::Load(receiver)
    }

    pub(super) fn loaded_with(&self, id: SegmentId, result: Result<Arc<Segment>, Refusal>) {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get_mut(&id) else { return };
        let State::Loading(sender) = &slot.state else { return };
        sender.send_replace(Some(result.clone()));
        match result {
            Ok(segment) => slot.state = State::Served { segment, since: Instant::now() },
            // Nobody failed: the bundle was moved, or is to be asked for elsewhere.
            Err(refusal) if refusal.reason == Reason::NotOwner => drop(slots.remove(&id)),
            Err(refusal) if refusal.retry_safe() => {
                slot.failures += 1;
                slot.state =
                    State::Resting { until: Instant::now() + backoff(slot.failures), refusal };
            }
            Err(_) => drop(slots.remove(&id)),
        }
    }

    /// Takes a fenced segment out, unless it is not the one that is served. True if it was.
    pub(super) fn fenced(&self, id: SegmentId, fenced: &Arc<Segment>) -> bool {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get_mut(&id) else { return false };
        let State::Served { segment, since } = &slot.state else { return false };
        if !Arc::ptr_eq(segment, fenced) {
            return false;
        }
        slot.failures = if since.elapsed() >= STABLE { 0 } else { slot.failures + 1 };
        let until = Instant::now()
            + if slot.failures == 0 { Duration::ZERO } else { backoff(slot.failures) };
        slot.state = State::Resting { until, refusal: loading(id) };
        true
    }

    pub(super) fn remove(&self, id: SegmentId) -> Option<Arc<Segment>> {
        let mut slots = self.slots.lock();
        let Some(Slot { state: State::Served { segment, .. }, .. }) = slots.get(&id) else {
            return None;
        };
        let segment = Arc::clone(segment);
        slots.remove(&id);
        Some(segment)
    }

    pub(super) fn loaded(&self, id: SegmentId) -> Option<Arc<Segment>> {
        match self.slots.lock().get(&id) {
            Some(Slot { state: State::Served { segment, .. }, .. }) => Some(Arc::clone(segment)),
            _ => None,
        }
    }

    /// Loads that are under way, of the segments that `which` names.
    pub(super) fn loading(
        &self,
        which: impl Fn(SegmentId) -> bool,
    ) -> Vec<watch::Receiver<LoadResult>> {
        let slots = self.slots.lock();
        let loading = slots.iter().filter_map(|(id, slot)| match &slot.state {
            State::Loading(sender) if which(*id) => Some(sender.subscribe()),
            _ => None,
        });
        loading.collect()
    }

    pub(super) fn served(&self) -> Vec<Arc<Segment>> {
        let slots = self.slots.lock();
        let served = slots.values().filter_map(|slot| match &slot.state {
            State::Served { segment, .. } => Some(Arc::clone(segment)),
            State::Loading(_) | State::Resting { .. } => None,
        });
        served.collect()
    }
}

fn backoff(failures: u32) -> Duration {
    BACKOFF_MAX.min(BACKOFF_MIN * 2u32.saturating_pow(failures.saturating_sub(1).min(10)))
}

#[cfg(test)]
mod tests {
    use geminga_proto::ids::TopicId;

    use super::*;

    const ID: SegmentId = SegmentId { topic: TopicId(1), segment: 0 };

    #[tokio::test(start_paused = true)]
    async fn one_load_at_a_time_and_a_pause_that_grows_after_each_failure() {
        let registry = Registry::default();
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert!(matches!(registry.ask(ID), Turn::Load(_)));
            let Turn::Wait(mut waiter) = registry.ask(ID) else { panic!("only one loads") };
            registry.loaded_with(ID, Err(Refusal::new(Reason::NotEnoughBookies, "none")));
            waiter.wait_for(Option::is_some).await.expect("told");
            let Turn::Refused(refusal) = registry.ask(ID) else { panic!("it rests") };
            let pause = refusal.retry_after.expect("a delay");
            pauses.push(pause);
            tokio::time::advance(pause).await;
        }
        assert_eq!(pauses[0], BACKOFF_MIN);
        assert!(pauses.windows(2).all(|p| p[0] <= p[1]));
        assert_eq!(pauses[11], BACKOFF_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_segment_owned_elsewhere_is_asked_for_again_at_once() {
        let registry = Registry::default();
        for _ in 0..12 {
            assert!(matches!(registry.ask(ID), Turn::Load(_)));
            registry.loaded_with(ID, Err(Refusal::new(Reason::NotOwner, "elsewhere")));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_will_never_load_is_not_remembered() {
        let registry = Registry::default();
        assert!(matches!(registry.ask(ID), Turn::Load(_)));
        registry.loaded_with(ID, Err(Refusal::new(Reason::TopicNotFound, "gone")));
        assert!(matches!(registry.ask(ID), Turn::Load(_)));
    }
}
