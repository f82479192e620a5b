//! Follows a range of the store: all of it once, then its changes. After a cut the watch resumes behind what was seen; after
//! a compaction the range is read again.
//!
//! What is made of it is a hint only (MD2): whoever decides reads the store.

use std::time::Duration;

use geminga_metadata::{
    Change, Key, KeyValue, RangeRequest, Revision, SharedStore, StoreError, WatchError,
};
use tokio::time::sleep;

/// Pause before the store is asked again.
const RETRY: Duration = Duration::from_millis(200);

/// What was seen of the range.
pub(crate) enum Seen<'a> {
    /// Everything that stands at this revision; what was seen before and is not in it is gone.
    All(&'a [KeyValue], Revision),
    /// What changed since, in order.
    Changes(&'a [Change]),
}

/// Tells `apply` of everything below `prefix`, until it is dropped.
pub(crate) async fn follow(
    store: SharedStore,
    prefix: Key,
    mut apply: impl FnMut(Seen<'_>) + Send,
) {
    loop {
        match read_all(&store, &prefix).await {
            Ok((revision, all)) => {
                apply(Seen::All(&all, revision));
                watch(&store, &prefix, revision, &mut apply).await;
            }
            Err(error) => {
                tracing::debug!(%error, "range not read; it is tried again");
                sleep(RETRY).await;
            }
        }
    }
}

/// Everything below a prefix, at one revision, linearizably.
///
/// # Errors
/// What the store answers.
pub(crate) async fn read_all(
    store: &SharedStore,
    prefix: &Key,
) -> Result<(Revision, Vec<KeyValue>), StoreError> {
    read_all_at(store, prefix, None).await
}

/// As [`read_all`], at this revision.
///
/// # Errors
/// The same.
pub(crate) async fn read_all_at(
    store: &SharedStore,
    prefix: &Key,
    mut at: Option<Revision>,
) -> Result<(Revision, Vec<KeyValue>), StoreError> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let request = RangeRequest { prefix: prefix.clone(), after, limit: 1_000, at };
        let page = store.range(request).await?;
        at = Some(page.revision);
        after = page.items.last().map(|item| item.key.clone());
        all.extend(page.items);
        if !page.more {
            return Ok((page.revision, all));
        }
    }
}

/// Follows the changes after `seen` until history is lost.
async fn watch(
    store: &SharedStore,
    prefix: &Key,
    mut seen: Revision,
    apply: &mut (impl FnMut(Seen<'_>) + Send),
) {
    loop {
        let mut watch = match store.watch(prefix, Revision(seen.0 + 1)).await {
            Ok(watch) => watch,
            Err(StoreError::Compacted(_)) => return,
            Err(_) => {
                sleep(RETRY).await;
                continue;
            }
        };
        loop {
            match watch.next().await {
                Ok(changes) => {
                    let revisions = changes.iter().map(|change| match change {
                        Change::Put(item) => item.mod_revision,
                        Change::Deleted { revision, .. } => *revision,
                    });
                    seen = revisions.max().unwrap_or(seen).max(seen);
                    apply(Seen::Changes(&changes));
                }
                Err(WatchError::Compacted(_)) => return,
                Err(WatchError::Lost) => break,
            }
        }
        sleep(RETRY).await;
    }
}
