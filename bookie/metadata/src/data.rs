//! Keys, revisions and bounded history: the part of the store's state that readers and watchers see. Pure.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use crate::{Change, Key, KeyValue, Page, RangeRequest, Revision, StoreError, WatchError};

/// One key's change at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) key: Key,
    pub(crate) before: Option<KeyValue>,
    pub(crate) after: Option<KeyValue>,
}

/// All that happened at one revision. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) revision: Revision,
    pub(crate) events: Vec<Event>,
}

impl Applied {
    fn bytes(&self) -> usize {
        let size = |event: &Event| {
            event.key.0.len() + event.after.as_ref().map_or(0, |found| found.value.len())
        };
        self.events.iter().map(size).sum()
    }
}

/// How much history is kept for watches and for reads at an older revision; the older bound wins.
#[derive(Clone, Copy, Debug)]
pub struct HistoryLimits {
    /// Revisions, at least 1.
    pub revisions_max: usize,
    /// Bytes of keys and values changed.
    pub bytes_max: usize,
}

impl Default for HistoryLimits {
    fn default() -> Self {
        Self { revisions_max: 10_000, bytes_max: 32 << 20 }
    }
}

/// The revision of an empty store, as in etcd: the first change makes revision 2.
pub(crate) const FIRST_REVISION: Revision = Revision(1);
/// Keys of one page when the request names no limit.
pub(crate) const PAGE_KEYS: usize = 1_000;
/// Changes after which a watch's batch is handed out (whole revisions, so it may be a little longer).
const BATCH_CHANGES: usize = 1_000;

/// What readers see.
#[derive(Clone, Debug)]
pub(crate) struct Data {
    revision: Revision,
    keys: BTreeMap<Key, KeyValue>,
    /// Dense: the revisions `compacted + 1 ..= revision`.
    history: VecDeque<Arc<Applied>>,
    history_bytes: usize,
    /// Changes up to this revision are forgotten.
    compacted: Revision,
    /// Reads below this revision are refused; at least `compacted`.
    readable: Revision,
    limits: HistoryLimits,
}

impl Data {
    pub(crate) fn new(limits: HistoryLimits) -> Self {
        Self {
            revision: FIRST_REVISION,
            keys: BTreeMap::new(),
            history: VecDeque::new(),
            history_bytes: 0,
            compacted: FIRST_REVISION,
            readable: FIRST_REVISION,
            limits,
        }
    }

    /// As loaded from disk: `history` serves watches, but not reads at older revisions (its values before each change
    /// were not kept). None when the parts do not fit together.
    pub(crate) fn resume(
        limits: HistoryLimits,
        revision: Revision,
        keys: BTreeMap<Key, KeyValue>,
        history: Vec<Applied>,
    ) -> Option<Self> {
        let compacted = Revision(revision.0.checked_sub(i64::try_from(history.len()).ok()?)?);
        let dense = (compacted.0 + 1..).zip(&history).all(|(n, applied)| applied.revision.0 == n);
        let sane = |found: &KeyValue| {
            FIRST_REVISION < found.create_revision
                && found.create_revision <= found.mod_revision
                && found.mod_revision <= revision
        };
        if compacted < FIRST_REVISION || !dense || !keys.values().all(sane) {
            return None;
        }
        let mut data = Self { revision, keys, compacted, readable: revision, ..Self::new(limits) };
        data.history_bytes = history.iter().map(Applied::bytes).sum();
        data.history = history.into_iter().map(Arc::new).collect();
        data.trim();
        Some(data)
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    pub(crate) fn compacted(&self) -> Revision {
        self.compacted
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&KeyValue> {
        self.keys.get(key)
    }

    pub(crate) fn keys(&self) -> &BTreeMap<Key, KeyValue> {
        &self.keys
    }

    /// Everything that happened after `revision`, oldest first.
    pub(crate) fn since(&self, revision: Revision) -> impl Iterator<Item = &Arc<Applied>> {
        let skip = usize::try_from(revision.0 - self.compacted.0).unwrap_or(0);
        self.history.iter().skip(skip)
    }

    /// The next revision's changes.
    pub(crate) fn apply(&mut self, applied: Arc<Applied>) {
        assert_eq!(applied.revision.0, self.revision.0 + 1, "revisions are dense");
        self.revision = applied.revision;
        for event in &applied.events {
            match &event.after {
                Some(found) => drop(self.keys.insert(event.key.clone(), found.clone())),
                None => drop(self.keys.remove(&event.key)),
            }
        }
        self.history_bytes += applied.bytes();
        self.history.push_back(applied);
        self.trim();
    }

    /// Forgets history up to and including `revision`.
    pub(crate) fn compact(&mut self, revision: Revision) {
        while self.compacted < revision.min(self.revision) {
            self.forget_oldest();
        }
    }

    fn trim(&mut self) {
        while self.history.len() > self.limits.revisions_max.max(1)
            || (self.history_bytes > self.limits.bytes_max && self.history.len() > 1)
        {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let oldest = self.history.pop_front().expect("the history reaches back to `compacted`");
        self.history_bytes -= oldest.bytes();
        self.compacted = oldest.revision;
        self.readable = self.readable.max(self.compacted);
    }

    pub(crate) fn range(&self, request: &RangeRequest) -> Result<Page, StoreError> {
        let limit = if request.limit == 0 { PAGE_KEYS } else { request.limit };
        let at = request.at.unwrap_or(self.revision);
        if at < self.readable {
            return Err(StoreError::Compacted(self.readable));
        }
        if at > self.revision {
            return Err(StoreError::Refused(format!(
                "revision {} is in the future, the store is at {}",
                at.0, self.revision.0
            )));
        }
        let wanted = |key: &Key| {
            key.0.starts_with(&request.prefix.0)
                && request.after.as_ref().is_none_or(|after| key > after)
        };
        let mut undone = BTreeMap::new();
        for event in self.since(at).flat_map(|applied| &applied.events) {
            if wanted(&event.key) {
                undone.entry(&event.key).or_insert(event.before.as_ref());
            }
        }
        let start = match &request.after {
            Some(after) if *after >= request.prefix => Bound::Excluded(after),
            _ => Bound::Included(&request.prefix),
        };
        let mut now = self
            .keys
            .range::<Key, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.0.starts_with(&request.prefix.0))
            .filter(|(key, _)| !undone.contains_key(key))
            .map(|(_, found)| found)
            .peekable();
        let mut then = undone.values().filter_map(|before| *before).peekable();
        let mut items = Vec::new();
        loop {
            let from_then = match (now.peek(), then.peek()) {
                (None, None) => return Ok(Page { revision: at, items, more: false }),
                (Some(now), Some(then)) => then.key < now.key,
                (now, _) => now.is_none(),
            };
            if items.len() == limit {
                return Ok(Page { revision: at, items, more: true });
            }
            let next = if from_then { then.next() } else { now.next() };
            items.extend(next.cloned());
        }
    }

    /// The changes below `prefix` from revision `from` on, and where to go on; empty when there are none yet.
    pub(crate) fn changes(
        &self,
        prefix: &Key,
        from: Revision,
    ) -> Result<(Vec<Change>, Revision), WatchError> {
        if from <= self.compacted {
            return Err(WatchError::Compacted(self.compacted));
        }
        let mut changes = Vec::new();
        let mut next = from;
        for applied in self.since(Revision(from.0 - 1)) {
            if changes.len() >= BATCH_CHANGES {
                break;
            }
            next = Revision(applied.revision.0 + 1);
            let below = applied.events.iter().filter(|event| event.key.0.starts_with(&prefix.0));
            changes.extend(below.map(|event| match &event.after {
                Some(found) => Change::Put(found.clone()),
                None => Change::Deleted { key: event.key.clone(), revision: applied.revision },
            }));
        }
        Ok((changes, next))
    }
}
