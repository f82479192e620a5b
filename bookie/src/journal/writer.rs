//! The journal's owner: group commit (D1, D4). One group is outstanding; the next is whatever queued meanwhile.
//!
//! ```text
//! queue --take--> [ group: one buffer, one write, one sync ] --complete--> rows, flags, answers
//! ```

use std::{io, sync::Arc};

use geminga_bookie_client::bookie_rpc::{AddAnswer, Unknown};
use geminga_runtime::disk::DiskFile;
use tokio::time::Instant;

use super::{
    files::Purpose,
    format::{GROUP_BYTES_MAX, GROUP_HEADER_BYTES, GroupBuilder, RECORD_HEADER_BYTES},
    queue::Item,
};
use crate::{
    crash_points::CrashPoint,
    disk_guard,
    fencing::{Room, Row},
    ledger_storage::checkpoint::Mark,
    state::Shared,
};

/// The file that is written now.
#[derive(Debug)]
pub(crate) struct Current {
    pub(crate) number: u64,
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) position: u64,
    pub(crate) first_live: u64,
    /// It was a reserve file (D10): no plain adds go to it as long as the disk is full.
    pub(crate) reserve: bool,
}

/// The owner task's state.
#[derive(Debug)]
pub(crate) struct JournalWriter {
    shared: Arc<Shared>,
    /// None after a write that ran out of space: no old file is appended to again (D3).
    current: Option<Current>,
    /// Number of the next group.
    next: u64,
    buffer: Vec<u8>,
    /// The newest group has records, or is the first: an empty one follows (D4).
    owes_empty: bool,
}

/// One group's items with the places of their entries in it.
type Batch = Vec<(Item, u32)>;

impl JournalWriter {
    pub(crate) fn new(shared: Arc<Shared>, current: Current, next: u64) -> Self {
        let room = shared.config.group_bytes_max + (64 << 10);
        Self {
            shared,
            current: Some(current),
            next,
            buffer: Vec::with_capacity(room),
            owes_empty: true,
        }
    }

    /// Runs until cancelled or until a write or sync fails (D3).
    pub(crate) async fn run(mut self) -> Result<(), io::Error> {
        let cancelled = self.shared.tasks.token();
        loop {
            let batch = self.take();
            if !batch.is_empty() {
                self.commit(batch).await?;
                continue;
            }
            let shared = Arc::clone(&self.shared);
            let idle_at = Instant::now() + self.shared.config.idle_group_after;
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return Ok(()),
                () = shared.journal_wake.notified() => {}
                () = tokio::time::sleep_until(idle_at), if self.owes_empty => self.commit_empty().await?,
            }
        }
    }

    /// Takes what queued, up to the bytes of a group. Adds whose deadline has passed are dropped, not written (D12); plain
    /// adds that were accepted before the disk ran full do not eat up the reserve (D10).
    fn take(&self) -> Batch {
        let now = Instant::now();
        let bytes_max = self.shared.config.group_bytes_max.min(GROUP_BYTES_MAX);
        let mut core = self.shared.core();
        let on_reserve = self.current.as_ref().is_some_and(|current| current.reserve);
        let urgent_only = on_reserve && core.room != Room::Writable;
        let mut batch = Vec::new();
        let mut bytes = GROUP_HEADER_BYTES;
        while let Some(next) = core.queue.next_bytes() {
            let with_next = bytes + RECORD_HEADER_BYTES + next;
            if with_next > bytes_max && !batch.is_empty() {
                break;
            }
            let Some(item) = core.queue.pop() else { break };
            let refusal = match &item {
                Item::Add { deadline, .. } if *deadline <= now => {
                    Some(AddAnswer::Unknown(Unknown::Timeout))
                }
                Item::Add { recovery: false, .. } if urgent_only => Some(AddAnswer::NoSpace),
                _ => None,
            };
            match (item, refusal) {
                (Item::Add { entry, ticket, answer, .. }, Some(refusal)) => {
                    core.ledgers.withdraw(entry.ledger, entry.id, ticket);
                    let _gone = answer.send(refusal);
                }
                (item, _) => {
                    bytes = with_next;
                    batch.push((item, 0));
                }
            }
        }
        batch
    }

    /// Encodes the batch; remembers where each entry lies in the group.
    fn encode(&mut self, batch: &mut Batch) -> GroupBuilder {
        let mut group = GroupBuilder::new(std::mem::take(&mut self.buffer));
        for (item, place) in batch {
            match item {
                Item::Add { entry, recovery, .. } => *place = group.add(entry, *recovery),
                Item::Fence { ledger, .. } => group.fence(*ledger),
                Item::Tombstone { ledger, .. } => group.tombstone(*ledger),
                Item::MovedAway { ledger, .. } => group.moved_away(*ledger),
                Item::Repeat { .. } | Item::Barrier { .. } => {}
            }
        }
        group
    }

    async fn commit(&mut self, mut batch: Batch) -> io::Result<()> {
        let group = self.encode(&mut batch);
        if group.is_empty() {
            self.buffer = group.finish(&[0; 16], 0, 0, 0); // nothing to write: all before is synced
            complete(&self.shared, batch, None);
            return Ok(());
        }
        match self.write(group, Purpose::Normal).await {
            Ok(place) => complete(&self.shared, batch, Some(place)),
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                self.commit_urgent(batch).await?
            }
            Err(error) => return Err(error),
        }
        self.owes_empty = true;
        Ok(())
    }

    /// The disk is full (D10): plain adds are refused; fences and recovery adds go to a reserve file.
    async fn commit_urgent(&mut self, batch: Batch) -> io::Result<()> {
        tracing::warn!(bookie_id = self.shared.config.id, "journal ran out of space: read-only");
        let mut urgent = Vec::new();
        {
            let mut core = self.shared.core();
            core.ran_full = true;
            core.room = core.room.max(Room::RecoveryOnly);
            for (item, place) in batch {
                match item {
                    Item::Add { entry, recovery: false, ticket, answer, .. } => {
                        core.ledgers.withdraw(entry.ledger, entry.id, ticket);
                        let _gone = answer.send(AddAnswer::NoSpace);
                    }
                    item => urgent.push((item, place)),
                }
            }
        }
        self.shared.status_wake.notify_one();
        let group = self.encode(&mut urgent);
        if group.is_empty() {
            self.buffer = group.finish(&[0; 16], 0, 0, 0);
            complete(&self.shared, urgent, None);
            return Ok(());
        }
        match self.write(group, Purpose::Reserve).await {
            Ok(place) => complete(&self.shared, urgent, Some(place)),
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                refuse(&self.shared, urgent)
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn commit_empty(&mut self) -> io::Result<()> {
        let group = GroupBuilder::new(std::mem::take(&mut self.buffer));
        self.owes_empty = false;
        match self.write(group, Purpose::Normal).await {
            Ok(place) => complete(&self.shared, Vec::new(), Some(place)),
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                self.shared.core().ran_full = true;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Writes and syncs one group; rolls to another file when this one is full. After `StorageFull` the group's number is
    /// free again, since the file that follows cuts this one in front of it.
    async fn write(&mut self, group: GroupBuilder, purpose: Purpose) -> io::Result<Mark> {
        let bytes = group.len() as u64;
        let full =
            |current: &Current, limit| current.position > 0 && current.position + bytes > limit;
        let limit = self.shared.config.journal_file_bytes;
        if self.current.as_ref().is_none_or(|current| full(current, limit)) {
            self.current = None;
            let (number, file) =
                self.shared.run(&self.shared.journal_io, move |s| s.files.take(purpose)).await?;
            let reserve = purpose == Purpose::Reserve;
            self.current =
                Some(Current { number, file, position: 0, first_live: self.next, reserve });
            self.shared.checkpoint_wake.notify_one();
        }
        let Some(current) = self.current.take() else {
            return Err(io::Error::other("no journal file"));
        };
        let bytes = group.finish(
            &self.shared.identity.nonce,
            current.number,
            self.next,
            current.first_live,
        );
        let started = Instant::now();
        let length = bytes.len();
        let (file, number, position) =
            (Arc::clone(&current.file), current.number, current.position);
        let written = self.shared.run(&self.shared.journal_io, move |shared| {
            file.write_all_at(&bytes, position)?;
            shared.crash.pass(CrashPoint::GroupWritten)?;
            file.sync()?;
            shared.crash.pass(CrashPoint::GroupSynced)?;
            Ok(bytes)
        });
        self.buffer = match written.await {
            Err(error) if error.kind() == io::ErrorKind::StorageFull && position == 0 => {
                // It holds nothing that counts: left behind, each refusal would cost the full disk another file.
                self.shared.run(&self.shared.journal_io, move |s| s.files.discard(number)).await?;
                return Err(error);
            }
            written => written?,
        };
        self.shared.metrics.journal_sync_duration.observe(started.elapsed().as_secs_f64());
        self.shared.metrics.journal_group_bytes.observe(length as f64);
        disk_guard::note_written(&self.shared, length as u64);
        let mark = Mark { number: self.next, file: current.number, position };
        self.current = Some(Current { position: position + length as u64, ..current });
        self.next += 1;
        Ok(mark)
    }
}

/// The group is synced: entries are held, flags stand, everybody is told. `place` is none for a batch without records.
fn complete(shared: &Shared, batch: Batch, place: Option<Mark>) {
    let mut core = shared.core();
    let core = &mut *core;
    if core.ended {
        return;
    }
    // Without a place there is no record among them.
    let mut info = place.map(|place| {
        core.last = place;
        let info = core.files.entry(place.file).or_default();
        if info.first == 0 {
            info.first = place.number;
        }
        info.last = place.number;
        info
    });
    let place = place.unwrap_or_default();
    let mut adds = 0;
    for (item, at) in batch {
        match item {
            // Dropped by a tombstone in front of it: nothing of it is kept (D13).
            Item::Add { entry, answer, .. } if core.ledgers.is_dropped(entry.ledger) => {
                let _gone = answer.send(AddAnswer::Unknown(Unknown::Dropped));
            }
            Item::Add { entry, answer, .. } => {
                let row = Row {
                    file: place.file,
                    position: place.position + u64::from(at),
                    length: entry.encoded_len() as u32,
                    digest: entry.digest,
                };
                core.ledgers.on_synced(entry.ledger, entry.id, entry.lac, row);
                if let Some(info) = &mut info {
                    info.ledgers.insert(entry.ledger);
                }
                core.cache.insert(entry);
                adds += 1;
                let _gone = answer.send(AddAnswer::Ok);
            }
            Item::Repeat { ledger, entry, digest, answer } => {
                let held = core.ledgers.is_held(ledger, entry, digest);
                let verdict =
                    if held { AddAnswer::Ok } else { AddAnswer::Unknown(Unknown::Timeout) };
                let _gone = answer.send(verdict);
            }
            Item::Fence { ledger, answer } => {
                core.ledgers.on_fence_synced(ledger);
                let _gone = answer.send(Ok(()));
            }
            Item::Tombstone { ledger, answer } => {
                core.ledgers.drop_deleted(ledger);
                shared.metrics.ledgers_dropped.inc();
                let _gone = answer.send(Ok(()));
            }
            Item::MovedAway { ledger, answer } => {
                core.ledgers.drop_moved_away(ledger);
                core.cache.forget(ledger);
                shared.metrics.ledgers_moved.inc();
                let _gone = answer.send(Ok(()));
            }
            Item::Barrier { answer } => {
                let _gone = answer.send(Ok(()));
            }
        }
    }
    shared.metrics.adds.inc_by(adds);
    shared.metrics.write_cache_bytes.set(core.cache.bytes() as i64);
    if core.ledgers.memory_rows() >= shared.config.checkpoint_rows_max {
        shared.checkpoint_wake.notify_one();
    }
}

/// Not even the reserve has room: nothing of the batch was written.
fn refuse(shared: &Shared, batch: Batch) {
    let mut core = shared.core();
    core.room = Room::Full;
    let full = || Unknown::Io("no space".to_owned());
    for (item, _) in batch {
        match item {
            Item::Add { entry, ticket, answer, .. } => {
                core.ledgers.withdraw(entry.ledger, entry.id, ticket);
                let _gone = answer.send(AddAnswer::NoSpace);
            }
            Item::Repeat { answer, .. } => {
                let _gone = answer.send(AddAnswer::Unknown(full()));
            }
            Item::MovedAway { ledger, answer } => {
                core.ledgers.unmark_leaving(ledger);
                let _gone = answer.send(Err(full()));
            }
            Item::Fence { answer, .. }
            | Item::Tombstone { answer, .. }
            | Item::Barrier { answer } => {
                let _gone = answer.send(Err(full()));
            }
        }
    }
}
