//! The janitor's rounds (X4). What is to be swept is found in cold storage itself, not in the catalog: so the objects of deleted
//! topics are found by whichever broker is there then, however often brokers died in between.
//!
//! Each broker takes the topics whose first segment is placed with it. Should two take one, or none this time, no harm is
//! done: every removal is decided by a read of the store, and the next round comes.

use std::time::Duration;

use geminga_managed_ledger::SweepError;
use geminga_proto::ids::{SegmentId, TopicId};
use tokio::time::{sleep, timeout};

use crate::context::{Context, Shared};

/// Passes over one segment in a round; each removes a bounded number of objects.
const PASSES_MAX: usize = 100;
/// Time for one pass.
const PASS_DEADLINE: Duration = Duration::from_secs(600);

/// Sweeps at intervals between half of the configured one and one and a half of it, until it is dropped.
pub(super) async fn keep_sweeping(shared: Shared) {
    loop {
        let interval = shared.config.sweep_interval;
        let spread = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX).max(1);
        sleep(interval / 2 + Duration::from_millis(shared.random.below(spread))).await;
        if let Err(error) = round(&shared).await {
            shared.metrics.sweep_failures.inc();
            tracing::info!(%error, "cold storage not looked through");
        }
    }
}

async fn round(context: &Context) -> Result<(), SweepError> {
    let managed = context.ownership.managed();
    for topic in managed.topics_with_objects().await? {
        if !context.ownership.is_placed_here(SegmentId { topic, segment: 0 }) {
            continue;
        }
        if let Err(error) = sweep_topic(context, topic).await {
            context.metrics.sweep_failures.inc();
            tracing::info!(topic = topic.0, %error, "objects of a topic not swept");
        }
    }
    context.metrics.sweeps.inc();
    Ok(())
}

async fn sweep_topic(context: &Context, topic: TopicId) -> Result<(), SweepError> {
    let managed = context.ownership.managed();
    for segment in managed.segments_with_objects(topic).await? {
        for _ in 0..PASSES_MAX {
            let pass = timeout(PASS_DEADLINE, managed.sweep_objects(segment)).await;
            if pass.map_err(|_| SweepError("a pass took too long".to_owned()))?? == 0 {
                break;
            }
        }
    }
    Ok(())
}
