//! Dispatchers that run learn of changed settings: from the mirror of subscriptions, however long it lags or is cut off; and at
//! once by the call that changed them. What they are told was read from the store, and never replaces something later.

use std::{collections::BTreeSet, time::Duration};

use geminga_proto::names::SubscriptionName;
use tokio::time::sleep;

use crate::{context::Shared, discovery::SubscriptionKey, errors::Refusal, ownership::Segment};

/// Pause between two rounds: many changes make one.
const PAUSE: Duration = Duration::from_millis(200);
/// Pause after a round in which something was not read.
const RETRY: Duration = Duration::from_secs(1);

/// Tells dispatchers until it is dropped.
pub(crate) async fn keep(shared: Shared) {
    let mut changed = shared.hub.subscriptions_version();
    let mut due = BTreeSet::new();
    loop {
        changed.borrow_and_update();
        due.extend(shared.hub.take_changed());
        due = round(&shared, &due).await;
        if !due.is_empty() {
            sleep(RETRY).await;
            continue;
        }
        sleep(PAUSE).await;
        if changed.changed().await.is_err() {
            return;
        }
    }
}

/// Returns those that could not be read.
async fn round(shared: &Shared, due: &BTreeSet<SubscriptionKey>) -> BTreeSet<SubscriptionKey> {
    let mut left = BTreeSet::new();
    if due.is_empty() {
        return left;
    }
    for segment in shared.ownership.served() {
        for (name, known) in segment.dispatchers().running_settings() {
            let key = (segment.id().topic, name);
            let seen = shared.hub.subscription_revision(&key);
            if !due.contains(&key) || seen.is_none_or(|seen| seen <= known) {
                continue;
            }
            if let Err(refusal) = reread(shared, &segment, &key.1).await {
                tracing::debug!(%refusal, "settings not read; they are tried again");
                left.insert(key);
            }
        }
    }
    left
}

/// Reads a subscription, and tells its dispatcher on this segment.
///
/// # Errors
/// What the store answers.
pub(crate) async fn reread(
    shared: &Shared,
    segment: &Segment,
    name: &SubscriptionName,
) -> Result<(), Refusal> {
    if let Some(found) = shared.catalog.find_subscription(segment.id().topic, name).await? {
        segment.dispatchers().tell_settings(&found);
    }
    Ok(())
}
