//! The list value, typed: the one manifest of a segment, and the steps it may take (section 11).
//!
//! Each step is pure; the caller carries it out as one CAS with the ledgers it concerns (M1, M2, M4).

mod view;

use bytes::Bytes;
use geminga_proto::{
    ids::{Epoch, LedgerId, Offset},
    storage::v1 as wire,
};
use prost::Message;

pub use view::Tombstones;

use crate::offload::{Object, Offload, Stage};

const FORMAT: u32 = 1;
/// The largest encoded list, bytes (section 11).
pub const LIST_BYTES_MAX: usize = 256 * 1024;
/// Of it, kept free by [`List::open`]: whatever is listed can still be closed, taken over, and snapshotted inline.
const RESERVED_BYTES: usize = 4 * 1024;
/// What one object adds to the list at most, bytes.
const OBJECT_BYTES_MAX: usize = 40;
/// The largest inline snapshot, bytes (C6).
pub const INLINE_SNAPSHOT_BYTES_MAX: usize = 1024;

/// Which of a segment's two logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// Messages.
    Data,
    /// Cursors and deduplication state, of all subscriptions (C6).
    Cursor,
}

/// Where a listed ledger stands, as far as the list knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListedState {
    Open,
    /// A takeover finds out where it ends.
    InRecovery,
    /// Counts are final.
    Closed,
}

/// What a closed ledger holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub entries: u64,
    /// Messages: offsets it spans.
    pub records: u64,
    /// Payload bytes.
    pub bytes: u64,
    pub first_publish_ms: u64,
    pub last_publish_ms: u64,
}

/// One listed ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub id: LedgerId,
    /// The offset of its first message; 0 in the cursor log.
    pub base_offset: Offset,
    pub state: ListedState,
    /// Zero until it is Closed.
    pub counts: Counts,
    /// How far its way to cold storage has come; none: not begun.
    pub offload: Option<Offload>,
}

impl Listed {
    /// Whether entries are still added to it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state == ListedState::Open
    }

    /// How far its way to cold storage has come.
    #[must_use]
    pub fn stage(&self) -> Option<Stage> {
        self.offload.as_ref().map(|offload| offload.stage)
    }

    /// The offset after its last message, once it is Closed.
    #[must_use]
    pub fn end(&self) -> Offset {
        self.base_offset.advance(self.counts.records)
    }
}

/// The secret that signs handles (L4). It is shown nowhere.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct HandleKey(pub [u8; 32]);

impl std::fmt::Debug for HandleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HandleKey")
    }
}

/// The decoded, checked list value.
#[derive(Clone, Debug, PartialEq)]
pub struct List {
    /// 0 before the first takeover.
    pub epoch: Epoch,
    /// Of the takeover that set the epoch (O2); zeros before the first.
    pub epoch_nonce: [u8; 16],
    /// In offset order, without a hole.
    pub data: Vec<Listed>,
    pub cursor_log: Vec<Listed>,
    /// State of cursors and deduplication, older than any cursor log; empty for none (C6).
    pub inline_snapshot: Bytes,
    /// The first offset kept.
    pub first_offset: Offset,
    /// Where the next ledger starts while `data` is empty.
    pub next_offset: Offset,
    /// Signs the handles of deliveries, over all owners (L4); zeros before the first takeover, which draws it.
    pub handle_key: HandleKey,
    /// The compacted view: the latest message of each key below `compacted_to`. In offset order with gaps, all Closed;
    /// `records` counts what a reader that begins now gets.
    pub compacted: Vec<Listed>,
    /// The compaction horizon.
    pub compacted_to: Offset,
    /// Ledgers of a view that is being written, or that is to be deleted: nobody reads them.
    pub compacting: Vec<Listed>,
    /// Which deleted keys the view still tells of.
    pub tombstones: Tombstones,
    /// Kept as read: delayed messages are not of this version.
    timers: Vec<wire::LedgerEntry>,
}

/// A list that is no list, or has no room left. A defect or damage: a human looks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the list value {0}")]
pub struct ListError(pub String);

impl List {
    /// A new segment's.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            epoch: Epoch(0),
            epoch_nonce: [0; 16],
            data: Vec::new(),
            cursor_log: Vec::new(),
            inline_snapshot: Bytes::new(),
            first_offset: Offset(0),
            next_offset: Offset(0),
            handle_key: HandleKey::default(),
            compacted: Vec::new(),
            compacted_to: Offset(0),
            compacting: Vec::new(),
            tombstones: Tombstones::default(),
            timers: Vec::new(),
        }
    }

    /// All listed ledgers: data in offset order, then the cursor log.
    pub fn ledgers(&self) -> impl Iterator<Item = (Log, &Listed)> + '_ {
        let data = self.data.iter().map(|listed| (Log::Data, listed));
        data.chain(self.cursor_log.iter().map(|listed| (Log::Cursor, listed)))
    }

    /// All ledgers that the list names: those of [`Self::ledgers`], the compacted view, and the one being written.
    pub fn all_ledgers(&self) -> impl Iterator<Item = &Listed> + '_ {
        self.ledgers().map(|(_, listed)| listed).chain(&self.compacted).chain(&self.compacting)
    }

    /// Whether the key that signs handles was drawn.
    #[must_use]
    pub fn has_handle_key(&self) -> bool {
        self.handle_key != HandleKey::default()
    }

    fn find_mut(&mut self, id: LedgerId) -> Option<&mut Listed> {
        let log = self.data.iter_mut().chain(&mut self.cursor_log);
        log.chain(&mut self.compacting).find(|listed| listed.id == id)
    }

    /// TK1: where the ledger ends is being found out.
    pub fn recover(&mut self, id: LedgerId) {
        if let Some(listed) = self.find_mut(id) {
            listed.state = ListedState::InRecovery;
        }
    }

    /// Closes a ledger with its final counts (TK2, M2, section 6).
    pub fn close(&mut self, id: LedgerId, counts: Counts) {
        if let Some(listed) = self.find_mut(id) {
            (listed.state, listed.counts) = (ListedState::Closed, counts);
        }
    }

    /// Lists a new ledger behind the closed ones (M2, M4).
    ///
    /// # Errors
    /// [`ListError`] when there is no room for one more.
    ///
    /// # Panics
    /// When the last ledger of that log is not Closed: where a data ledger ends is not known before.
    pub fn open(&mut self, log: Log, id: LedgerId) -> Result<(), ListError> {
        let bytes = self.to_wire().encoded_len();
        if bytes + RESERVED_BYTES > LIST_BYTES_MAX {
            return Err(ListError(format!(
                "has {bytes} bytes, which leaves no room for another ledger"
            )));
        }
        let base_offset = match log {
            Log::Data => self.closed_end(),
            Log::Cursor => Offset(0),
        };
        let row = match log {
            Log::Data => &mut self.data,
            Log::Cursor => &mut self.cursor_log,
        };
        assert!(
            row.iter().all(|listed| listed.state == ListedState::Closed),
            "a log has one open ledger at most"
        );
        row.push(Listed {
            id,
            base_offset,
            state: ListedState::Open,
            counts: Counts::default(),
            offload: None,
        });
        Ok(())
    }

    /// Unlists a cursor-log ledger that a later full snapshot superseded (C4, M3).
    pub fn drop_cursor_ledger(&mut self, id: LedgerId) {
        self.cursor_log.retain(|listed| listed.id != id);
    }

    /// An upload of a closed data ledger begins, under a uuid of its own; one that did not end is given up (X1).
    ///
    /// # Errors
    /// [`ListError`] when it is not there to be uploaded, or the list has no room for what it would say of `objects`.
    pub fn begin_upload(
        &mut self,
        id: LedgerId,
        uuid: [u8; 16],
        at_ms: u64,
        objects: usize,
    ) -> Result<(), ListError> {
        let stage = Stage::Uploading;
        let offload = Offload { stage, uuid, at_ms, objects: [].into() };
        let Some(listed) = self.data.iter_mut().find(|listed| listed.id == id) else {
            return Err(ListError(format!("does not name ledger {id}")));
        };
        if listed.state != ListedState::Closed || listed.stage() > Some(Stage::Uploading) {
            return Err(ListError(format!("has ledger {id} in no state to be uploaded")));
        }
        listed.offload = Some(offload);
        self.check_room(objects * OBJECT_BYTES_MAX)
    }

    /// The upload ended: its objects were read back whole (X2).
    ///
    /// # Errors
    /// [`ListError`] when another upload stands there, or the list has no room.
    pub fn uploaded(
        &mut self,
        id: LedgerId,
        uuid: [u8; 16],
        at_ms: u64,
        objects: &[Object],
    ) -> Result<(), ListError> {
        let listed = self.data.iter_mut().find(|listed| {
            let offload = listed.offload.as_ref();
            listed.id == id
                && offload.is_some_and(|o| o.uuid == uuid && o.stage == Stage::Uploading)
        });
        let Some(listed) = listed else {
            return Err(ListError(format!("has no such upload of ledger {id}")));
        };
        let offload = Offload { stage: Stage::Uploaded, uuid, at_ms, objects: objects.into() };
        // What could not be read back as a list must not get into one.
        Offload::from_wire(&offload.to_wire(), listed.counts.entries)
            .map_err(|why| ListError(format!("would have ledger {id} with {why}")))?;
        listed.offload = Some(offload);
        self.check_room(0)
    }

    /// Ledgers leave bookies; their objects are the only copy from now on (X3). Others than uploaded ones are left alone.
    pub fn ledgers_deleted(&mut self, ids: &[LedgerId], at_ms: u64) {
        for listed in self.data.iter_mut().filter(|listed| ids.contains(&listed.id)) {
            if let Some(offload) = &mut listed.offload
                && offload.stage == Stage::Uploaded
            {
                (offload.stage, offload.at_ms) = (Stage::LedgerDeleted, at_ms);
            }
        }
    }

    /// What is listed can still be closed and taken over after `more` bytes.
    fn check_room(&self, more: usize) -> Result<(), ListError> {
        let bytes = self.to_wire().encoded_len();
        if bytes + more + RESERVED_BYTES > LIST_BYTES_MAX {
            return Err(ListError(format!("has {bytes} bytes, which leaves no room for objects")));
        }
        Ok(())
    }

    /// Unlists closed data ledgers, the oldest ones (M3), or closed ledgers of a segment that is being deleted.
    pub fn drop_ledgers(&mut self, ids: &[LedgerId]) {
        self.next_offset = self.closed_end();
        self.data.retain(|listed| !ids.contains(&listed.id));
        self.cursor_log.retain(|listed| !ids.contains(&listed.id));
        self.compacted.retain(|listed| !ids.contains(&listed.id));
        self.compacting.retain(|listed| !ids.contains(&listed.id));
        self.first_offset = self.data.first().map_or(self.next_offset, |listed| listed.base_offset);
    }

    /// The offset after the last closed data ledger.
    #[must_use]
    pub fn closed_end(&self) -> Offset {
        let last = self.data.iter().rev().find(|listed| listed.state == ListedState::Closed);
        match (last, self.data.first()) {
            (Some(last), _) => last.base_offset.advance(last.counts.records),
            (None, Some(open)) => open.base_offset,
            (None, None) => self.next_offset,
        }
    }

    /// The data ledger that holds the offset, or will once it is stored; none below the first ledger or without one.
    #[must_use]
    pub fn holding(&self, offset: Offset) -> Option<&Listed> {
        let after = self.data.partition_point(|listed| listed.base_offset <= offset);
        // Ledgers without messages share their base with the next one, which is the one that holds the offset.
        self.data[..after].last()
    }

    /// The stored bytes.
    ///
    /// # Errors
    /// [`ListError`] when they exceed [`LIST_BYTES_MAX`], or the inline snapshot its own limit.
    pub fn encode(&self) -> Result<Vec<u8>, ListError> {
        let bytes = self.to_wire().encode_to_vec();
        if bytes.len() > LIST_BYTES_MAX {
            return Err(ListError(format!(
                "would have {} bytes, at most {LIST_BYTES_MAX} are allowed",
                bytes.len()
            )));
        }
        if self.inline_snapshot.len() > INLINE_SNAPSHOT_BYTES_MAX {
            return Err(ListError(format!(
                "would hold a snapshot of {} bytes",
                self.inline_snapshot.len()
            )));
        }
        Ok(bytes)
    }

    fn to_wire(&self) -> wire::ListValue {
        wire::ListValue {
            format: FORMAT,
            epoch: self.epoch.0,
            epoch_nonce: Bytes::copy_from_slice(&self.epoch_nonce),
            data: self.data.iter().map(to_wire).collect(),
            cursor_log: self.cursor_log.iter().map(to_wire).collect(),
            timers: self.timers.clone(),
            inline_snapshot: self.inline_snapshot.clone(),
            first_offset: self.first_offset.0,
            next_offset: self.next_offset.0,
            handle_key: match self.has_handle_key() {
                true => Bytes::copy_from_slice(&self.handle_key.0),
                false => Bytes::new(),
            },
            compacted: self.compacted.iter().map(to_wire).collect(),
            compacted_to: self.compacted_to.0,
            compacting: self.compacting.iter().map(to_wire).collect(),
            tombstones_from: self.tombstones.from.0,
            tombstones_next: self.tombstones.next.0,
            tombstones_next_at_ms: self.tombstones.next_at_ms,
        }
    }

    /// Reads and checks a stored value.
    ///
    /// # Errors
    /// [`ListError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ListError> {
        let value = wire::ListValue::decode(bytes)
            .map_err(|error| ListError(format!("cannot be decoded: {error}")))?;
        if value.format != FORMAT {
            return Err(ListError(format!("has the unknown format {}", value.format)));
        }
        let epoch_nonce = match value.epoch_nonce.len() {
            0 => [0; 16],
            16 => value.epoch_nonce[..].try_into().expect("16 bytes"),
            other => return Err(ListError(format!("has an epoch nonce of {other} bytes"))),
        };
        let handle_key = match value.handle_key.len() {
            0 => HandleKey::default(),
            32 => HandleKey(value.handle_key[..].try_into().expect("32 bytes")),
            other => return Err(ListError(format!("has a handle key of {other} bytes"))),
        };
        let ledgers = |entries: Vec<wire::LedgerEntry>| -> Result<Vec<Listed>, ListError> {
            entries.into_iter().map(from_wire).collect()
        };
        let list = Self {
            epoch: Epoch(value.epoch),
            epoch_nonce,
            data: ledgers(value.data)?,
            cursor_log: ledgers(value.cursor_log)?,
            inline_snapshot: Bytes::copy_from_slice(&value.inline_snapshot),
            first_offset: Offset(value.first_offset),
            next_offset: Offset(value.next_offset),
            handle_key,
            compacted: ledgers(value.compacted)?,
            compacted_to: Offset(value.compacted_to),
            compacting: ledgers(value.compacting)?,
            tombstones: Tombstones {
                from: Offset(value.tombstones_from),
                next: Offset(value.tombstones_next),
                next_at_ms: value.tombstones_next_at_ms,
            },
            timers: value.timers,
        };
        list.validate()?;
        Ok(list)
    }

    /// Checks that offsets have no hole and that only the last ledger of each row is not Closed.
    ///
    /// # Errors
    /// [`ListError`].
    fn validate(&self) -> Result<(), ListError> {
        for row in [&self.data, &self.cursor_log] {
            let unfinished =
                row.iter().rev().skip(1).find(|listed| listed.state != ListedState::Closed);
            if let Some(ledger) = unfinished {
                return Err(ListError(format!("has ledgers behind {}, which is open", ledger.id)));
            }
        }
        for pair in self.data.windows(2) {
            if pair[0].base_offset.0.checked_add(pair[0].counts.records)
                != Some(pair[1].base_offset.0)
            {
                return Err(ListError(format!("has a hole before ledger {}", pair[1].id)));
            }
        }
        self.validate_view()?;
        let mut ids: Vec<_> = self.all_ledgers().map(|listed| listed.id).collect();
        ids.sort_unstable();
        match ids.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ListError(format!("names ledger {} twice", pair[0]))),
            None => Ok(()),
        }
    }
}

fn to_wire(ledger: &Listed) -> wire::LedgerEntry {
    use wire::ledger_entry::State;
    let state = match ledger.state {
        ListedState::Open => State::Open,
        ListedState::InRecovery => State::InRecovery,
        ListedState::Closed => State::Closed,
    };
    wire::LedgerEntry {
        ledger: ledger.id.0,
        base_offset: ledger.base_offset.0,
        entries: ledger.counts.entries,
        records: ledger.counts.records,
        bytes: ledger.counts.bytes,
        first_publish_ms: ledger.counts.first_publish_ms,
        last_publish_ms: ledger.counts.last_publish_ms,
        state: state as i32,
        offload: ledger.offload.as_ref().map(Offload::to_wire),
    }
}

fn from_wire(entry: wire::LedgerEntry) -> Result<Listed, ListError> {
    use wire::ledger_entry::State;
    let state = match entry.state() {
        State::Open => ListedState::Open,
        State::InRecovery => ListedState::InRecovery,
        State::Closed => ListedState::Closed,
        State::Unspecified => {
            return Err(ListError(format!("has ledger {} in no known state", entry.ledger)));
        }
    };
    let counts = Counts {
        entries: entry.entries,
        records: entry.records,
        bytes: entry.bytes,
        first_publish_ms: entry.first_publish_ms,
        last_publish_ms: entry.last_publish_ms,
    };
    let offload = entry.offload.as_ref().map(|value| {
        if state != ListedState::Closed {
            return Err(ListError(format!(
                "has an upload of ledger {}, which is open",
                entry.ledger
            )));
        }
        Offload::from_wire(value, entry.entries)
            .map_err(|why| ListError(format!("has ledger {} with {why}", entry.ledger)))
    });
    let (base_offset, offload) = (Offset(entry.base_offset), offload.transpose()?);
    Ok(Listed { id: LedgerId(entry.ledger), base_offset, state, counts, offload })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Open(Log),
        CloseAll(u64),
        RecoverAll,
        DropCursorLedger,
        Offload(usize),
        BeginView(u64),
        Swap,
        Clear,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Open(Log::Data)),
            Just(Step::Open(Log::Cursor)),
            (0u64..5).prop_map(Step::CloseAll),
            Just(Step::RecoverAll),
            Just(Step::DropCursorLedger),
            any::<usize>().prop_map(Step::Offload),
            (0u64..9).prop_map(Step::BeginView),
            Just(Step::Swap),
            Just(Step::Clear),
        ]
    }

    fn unfinished(list: &List) -> Vec<(Log, LedgerId)> {
        let open = list.ledgers().filter(|(_, listed)| listed.state != ListedState::Closed);
        open.map(|(log, listed)| (log, listed.id)).collect()
    }

    proptest! {
        #[test]
        fn every_step_keeps_offsets_dense_and_survives_encoding(steps in prop::collection::vec(step(), 0..40)) {
            let (mut list, mut next_id, mut records) = (List::empty(), 1u64, 0u64);
            for step in steps {
                match step {
                    Step::Open(log) => if !unfinished(&list).iter().any(|(open, _)| *open == log) {
                        list.open(log, LedgerId(next_id)).expect("room");
                        next_id += 1;
                    },
                    Step::CloseAll(n) => for (log, id) in unfinished(&list) {
                        list.close(id, Counts { entries: n, records: n, ..Counts::default() });
                        if log == Log::Data { records += n; }
                    },
                    Step::RecoverAll => for (_, id) in unfinished(&list) { list.recover(id); },
                    Step::Offload(n) => {
                        let closed = list.data.iter().filter(|l| l.state == ListedState::Closed && l.counts.entries > 0);
                        let closed: Vec<_> = closed.cloned().collect();
                        if let Some(listed) = closed.get(n % closed.len().max(1)) {
                            let uuid = [next_id as u8; 16];
                            let entries = listed.counts.entries;
                            let object = Object { bytes: 9, crc32c: 7, first_entry: geminga_proto::ids::EntryId(0), entries };
                            match listed.stage() {
                                None => list.begin_upload(listed.id, uuid, 5, 1).expect("closed"),
                                Some(Stage::Uploading) => {
                                    prop_assert!(list.clone().uploaded(listed.id, [0xEE; 16], 6, &[object]).is_err());
                                    let uuid = listed.offload.as_ref().expect("uploading").uuid;
                                    list.uploaded(listed.id, uuid, 6, &[object]).expect("ours");
                                }
                                Some(_) => {
                                    prop_assert!(list.clone().begin_upload(listed.id, uuid, 5, 1).is_err());
                                    list.ledgers_deleted(&[listed.id], 7);
                                }
                            }
                        }
                    }
                    Step::BeginView(at) => {
                        let base = list.compacting.last().map_or(0, |last| last.base_offset.0) + at;
                        if list.compacting.iter().all(|l| l.state == ListedState::Closed) && base < records {
                            list.open_view(LedgerId(next_id), Offset(base)).expect("room");
                            list.close(LedgerId(next_id), Counts { entries: 1, records: 1, ..Counts::default() });
                            next_id += 1;
                        }
                    }
                    Step::Swap => {
                        let (before, new) = (list.compacted.clone(), list.compacting.clone());
                        let tombstones = list.tombstones.after_round(Offset(records), next_id, 5);
                        let gone = list.swap_view(Offset(records), tombstones, 2);
                        prop_assert_eq!(&list.compacted, &new);
                        let left: Vec<_> = list.compacting.iter().map(|l| l.id).collect();
                        prop_assert_eq!([gone, left].concat(), before.iter().map(|l| l.id).collect::<Vec<_>>());
                    }
                    Step::Clear => list.drop_ledgers(&list.compacting.iter().map(|l| l.id).collect::<Vec<_>>()),
                    Step::DropCursorLedger => {
                        let closed = list.cursor_log.iter().find(|listed| listed.state == ListedState::Closed);
                        if let Some(id) = closed.map(|listed| listed.id) { list.drop_cursor_ledger(id); }
                    }
                }
                prop_assert_eq!(list.closed_end(), Offset(records));
                prop_assert_eq!(List::decode(&list.encode().expect("small")), Ok(list.clone()));
                for offset in 0..records {
                    let holder = list.holding(Offset(offset)).expect("every stored offset has a ledger");
                    prop_assert!(holder.base_offset.0 <= offset && offset < holder.base_offset.0 + holder.counts.records);
                }
            }
        }

        #[test]
        fn foreign_bytes_are_refused_or_read_never_a_panic(bytes: Vec<u8>) {
            drop(List::decode(&bytes));
        }
    }

    #[test]
    fn a_hole_between_ledgers_is_refused() {
        let mut list = List::empty();
        list.open(Log::Data, LedgerId(1)).expect("room");
        list.close(LedgerId(1), Counts { records: 5, ..Counts::default() });
        list.open(Log::Data, LedgerId(2)).expect("room");
        list.data[1].base_offset = Offset(6);
        assert!(List::decode(&list.encode().expect("small")).is_err());
    }

    #[test]
    fn a_list_without_room_takes_no_ledger_and_what_it_has_can_still_be_closed() {
        let mut list = List::empty();
        let counts = Counts {
            entries: u64::MAX,
            records: 1,
            bytes: u64::MAX,
            first_publish_ms: u64::MAX,
            last_publish_ms: u64::MAX,
        };
        let mut ids = (0..u64::MAX).rev().map(LedgerId);
        let mut open = |list: &mut List, log| ids.next().map(|id| (id, list.open(log, id)));
        while let Some((id, Ok(()))) = open(&mut list, Log::Data) {
            if let Some((log, Ok(()))) = open(&mut list, Log::Cursor) {
                list.close(log, counts);
            }
            list.recover(id);
            list.close(id, counts);
            list.inline_snapshot = vec![7; INLINE_SNAPSHOT_BYTES_MAX].into();
            list.encode().expect("fits");
            list.inline_snapshot = Bytes::new();
        }
        assert!(list.data.len() > 1_000, "{}", list.data.len());
        while list.encode().is_ok() {
            list.data.push(list.data[0].clone());
        }
    }
}
