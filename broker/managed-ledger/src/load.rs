//! Loading a segment that was taken over: the cursor log, then the deduplication window and the offset index (O4, C5, DD2).

use std::sync::Arc;

use geminga_proto::{
    ids::{LedgerId, Offset, SegmentId},
    storage::v1::entry_header::control::Kind,
};

use crate::{
    change::Current,
    cursor_log::{Fold, LogState},
    dedup::{ProducerId, Window},
    error::{LoadError, ReadError},
    factory::ManagedLedgers,
    list::{List, Listed},
    read::View,
    segment::{self, Loaded, ManagedLedger},
    takeover::Taken,
};

impl From<ReadError> for LoadError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Damaged(_) => Self::Damaged(error.to_string()),
            other => Self::Unavailable(other.to_string()),
        }
    }
}

/// Nothing is served before this is done.
pub(crate) async fn load(
    ledgers: &ManagedLedgers,
    segment: SegmentId,
    taken: Taken,
) -> Result<ManagedLedger, LoadError> {
    let view = Arc::new(View::new(ledgers.clone(), segment, taken.list.clone()));
    let mut state = load_cursor_log(ledgers, &view, &taken.list).await?;
    // One that damage sent back to the beginning (C4) begins with what is kept.
    let first = taken.list.first_offset;
    state.cursors.values_mut().for_each(|cursor| cursor.settle_trimmed(first));
    let (window, replayed_bytes) = load_window(&view, &taken.list, &state).await?;
    tracing::info!(
        topic = segment.topic.0,
        segment = segment.segment,
        epoch = taken.list.epoch.0,
        end = taken.list.closed_end().0,
        cursors = state.cursors.len(),
        producers = window.len(),
        "segment loaded"
    );
    let current = Current { list: taken.list, revision: taken.revision };
    let dedup_next = Offset(state.dedup.next_offset);
    let lost = state.lost;
    let loaded = Loaded { current, window, replayed_bytes, dedup_next, lost };
    Ok(segment::start(ledgers.clone(), segment, view, state.cursors, loaded))
}

/// The inline snapshot, then every entry of the log's ledgers in order (C5, C6).
pub(crate) async fn load_cursor_log(
    ledgers: &ManagedLedgers,
    view: &View,
    list: &List,
) -> Result<LogState, LoadError> {
    let mut fold = Fold::default();
    let damaged = &ledgers.parts().metrics.damaged_cursor_entries;
    if !list.inline_snapshot.is_empty() && fold.apply(&list.inline_snapshot).is_err() {
        return Err(LoadError::Damaged("the inline cursor snapshot cannot be read".to_owned()));
    }
    for listed in &list.cursor_log {
        let each = |entry: Option<&geminga_bookie_client::entry::Entry>| {
            let applied = entry.map(|entry| fold.apply(&entry.payload.to_bytes()));
            if applied.is_none() {
                fold.skip();
            }
            if !matches!(applied, Some(Ok(()))) {
                damaged.inc();
            }
        };
        view.log_entries(listed, each).await?;
    }
    Ok(fold.into_state())
}

/// Whether the snapshot has seen every entry of this ledger.
fn covered(list: &List, listed: &Listed, state: &LogState) -> bool {
    let place = |id| list.data.iter().position(|listed| listed.id == id);
    let (at, here) = (place(LedgerId(state.dedup.ledger)), place(listed.id));
    listed.counts.entries == 0
        || here < at
        || (here == at && state.dedup.entries >= listed.counts.entries)
}

/// DD2: snapshot at offset p, and every entry from p on; and how many bytes those are.
async fn load_window(
    view: &View,
    list: &List,
    state: &LogState,
) -> Result<(Window, u64), LoadError> {
    let mut replayed_bytes = 0;
    let mut window = Window::restore(&state.dedup);
    let from = Offset(state.dedup.next_offset.max(list.first_offset.0));
    for listed in &list.data {
        let end = listed.base_offset.advance(listed.counts.records);
        // One that ends here may hold grants from after the snapshot.
        if end < from || (end == from && covered(list, listed, state)) {
            continue;
        }
        view.replay(listed, from.max(listed.base_offset), |batch| {
            replayed_bytes += batch.payload.len() as u64;
            let control = batch.header.control.as_ref().and_then(|control| control.kind.as_ref());
            if let Some(Kind::Grant(grant)) = control {
                window.replay_grant(grant, batch.header.publish_time_ms);
            }
            if let Some(producer) = &batch.header.producer {
                let id = ProducerId::from(producer.name.clone());
                let at = batch.header.publish_time_ms;
                window.replay(&id, producer.session, producer.hi_sequence, batch.base_offset, at);
            }
        })
        .await?;
    }
    window.begin_absences(view.now_ms());
    Ok((window, replayed_bytes))
}
