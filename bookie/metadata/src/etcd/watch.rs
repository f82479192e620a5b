//! A watch on etcd: one stream of its own, whose answers are put together to whole revisions.
//!
//! etcd cuts a long answer into fragments, at any event, also inside a revision; only the last one is not marked. What is
//! kept back here is thus at most one revision. Nothing else is buffered: the stream is read when the caller asks, and
//! HTTP/2's window stops etcd meanwhile. etcd in turn keeps the changes of a slow watch in its history; when they are
//! compacted away, the watch ends with [`WatchError::Compacted`].

use async_trait::async_trait;
use etcd_client::{Client, WatchStream, proto::PbEvent, proto::PbWatchResponse};

use super::translate::{Odd, key_value, stripped};
use crate::{Change, Revision, Watch, WatchError};

/// etcd's code of a deletion.
const DELETE: i32 = 1;
const PUT: i32 = 0;

/// Puts answers together to batches of whole revisions. Pure.
#[derive(Debug)]
pub(super) struct Assembler {
    prefix: String,
    /// Older revisions are not passed on: they were asked for by nobody, or were passed on already.
    next: Revision,
    /// Changes of the revision that more may follow of.
    open: Vec<Change>,
}

impl Assembler {
    pub(super) fn new(prefix: String, from: Revision) -> Self {
        Self { prefix, next: from, open: Vec::new() }
    }

    /// Takes an answer; returns the changes of all revisions it completes, empty if there are none.
    pub(super) fn on_answer(&mut self, answer: PbWatchResponse) -> Result<Vec<Change>, WatchError> {
        if answer.compact_revision != 0 {
            return Err(WatchError::Compacted(Revision(answer.compact_revision)));
        }
        if answer.canceled {
            tracing::debug!(reason = answer.cancel_reason, "etcd ended a watch");
            return Err(WatchError::Lost);
        }
        let fragment = answer.fragment;
        let mut changes = std::mem::take(&mut self.open);
        for event in answer.events {
            let change = self.change(event).map_err(|Odd| {
                tracing::error!("etcd sent a change that cannot be read");
                WatchError::Lost
            })?;
            if revision(&change) < self.next {
                continue;
            }
            changes.push(change);
        }
        if fragment && let Some(last) = changes.last().map(revision) {
            let whole = changes.partition_point(|change| revision(change) < last);
            self.open = changes.split_off(whole);
        }
        if let Some(last) = changes.last() {
            self.next = Revision(revision(last).0 + 1);
        }
        Ok(changes)
    }

    fn change(&self, event: PbEvent) -> Result<Change, Odd> {
        let found = event.kv.ok_or(Odd)?;
        match event.r#type {
            PUT => Ok(Change::Put(key_value(&self.prefix, found)?)),
            DELETE => Ok(Change::Deleted {
                revision: Revision(found.mod_revision),
                key: stripped(&self.prefix, found.key)?,
            }),
            _ => Err(Odd),
        }
    }
}

fn revision(change: &Change) -> Revision {
    match change {
        Change::Put(found) => found.mod_revision,
        Change::Deleted { revision, .. } => *revision,
    }
}

pub(super) struct EtcdWatch {
    stream: WatchStream,
    assembler: Assembler,
    ended: Option<WatchError>,
    /// The connection lives as long as somebody holds it.
    _client: Client,
}

impl EtcdWatch {
    pub(super) fn new(stream: WatchStream, assembler: Assembler, client: Client) -> Self {
        Self { stream, assembler, ended: None, _client: client }
    }

    async fn read(&mut self) -> Result<Vec<Change>, WatchError> {
        loop {
            match self.stream.message().await {
                // A progress report and the report of the watch's making have no changes.
                Ok(Some(answer)) => {
                    let changes = self.assembler.on_answer(answer.0)?;
                    if !changes.is_empty() {
                        return Ok(changes);
                    }
                }
                Ok(None) => return Err(WatchError::Lost),
                Err(error) => {
                    tracing::debug!(%error, "watch on etcd was cut off");
                    return Err(WatchError::Lost);
                }
            }
        }
    }
}

#[async_trait]
impl Watch for EtcdWatch {
    async fn next(&mut self) -> Result<Vec<Change>, WatchError> {
        if let Some(error) = self.ended {
            return Err(error);
        }
        let batch = self.read().await;
        self.ended = batch.as_ref().err().copied();
        batch
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::PbKeyValue;
    use proptest::prelude::*;

    use super::*;

    fn event(revision: i64, name: &str, kind: i32) -> PbEvent {
        let key = format!("/g/{name}").into_bytes();
        let kv = PbKeyValue { key, mod_revision: revision, ..Default::default() };
        PbEvent { r#type: kind, kv: Some(kv), prev_kv: None }
    }

    fn answer(events: Vec<PbEvent>, fragment: bool) -> PbWatchResponse {
        PbWatchResponse { events, fragment, ..Default::default() }
    }

    fn assembler() -> Assembler {
        Assembler::new("/g/".to_owned(), Revision(1))
    }

    #[test]
    fn what_is_older_than_asked_for_is_left_out() {
        let mut assembler = Assembler::new("/g/".to_owned(), Revision(5));
        let events = vec![event(4, "a", PUT), event(5, "b", PUT)];
        let changes = assembler.on_answer(answer(events.clone(), false)).expect("goes on");
        assert_eq!(changes.iter().map(revision).collect::<Vec<_>>(), [Revision(5)]);
        assert_eq!(assembler.on_answer(answer(events, false)), Ok(Vec::new()), "sent twice");
    }

    #[test]
    fn an_end_is_told_apart_from_lost_history_and_nonsense_ends_the_watch() {
        let lost = PbWatchResponse { canceled: true, ..Default::default() };
        assert_eq!(assembler().on_answer(lost), Err(WatchError::Lost));
        let compacted =
            PbWatchResponse { canceled: true, compact_revision: 9, ..Default::default() };
        let expected = Err(WatchError::Compacted(Revision(9)));
        assert_eq!(assembler().on_answer(compacted), expected);
        for nonsense in [event(1, "a", 7), PbEvent { kv: None, ..event(1, "a", PUT) }] {
            let answer = answer(vec![nonsense], false);
            assert_eq!(assembler().on_answer(answer), Err(WatchError::Lost));
        }
    }

    proptest! {
        /// Any revisions, cut into any answers, each of which is cut into any fragments.
        #[test]
        fn no_batch_ever_splits_a_revision_and_none_is_left_out(
            sizes in prop::collection::vec(1usize..5, 1..12),
            answer_ends in prop::collection::vec(any::<bool>(), 12),
            cuts in prop::collection::vec(any::<bool>(), 60),
        ) {
            let mut assembler = assembler();
            let mut cuts = cuts.into_iter();
            let mut seen: Vec<Change> = Vec::new();
            let mut sent = 0;
            let mut fragment = Vec::new();
            for (n, size) in sizes.iter().enumerate() {
                let at = n as i64 + 1;
                for part in 0..*size {
                    fragment.push(event(at, &format!("{part}"), if part % 2 == 0 { PUT } else { DELETE }));
                    sent += 1;
                    let revision_ends = part + 1 == *size;
                    let last = revision_ends && (n + 1 == sizes.len() || answer_ends[n]);
                    if last || cuts.next().unwrap_or(false) {
                        let events = std::mem::take(&mut fragment);
                        let batch = assembler.on_answer(answer(events, !last)).expect("goes on");
                        for change in &batch {
                            let of = |other: &&Change| revision(other) == revision(change);
                            let whole = sizes[revision(change).0 as usize - 1];
                            prop_assert_eq!(batch.iter().filter(of).count(), whole);
                        }
                        seen.extend(batch);
                        if last {
                            prop_assert_eq!(seen.len(), sent, "nothing is kept back");
                        }
                    }
                }
            }
            prop_assert!(seen.is_sorted_by_key(revision));
        }
    }
}
