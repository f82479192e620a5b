//! Writes checkpoints, removes what they supersede, and gives journal files back (D5).
//!
//! ```text
//! freeze rows -> index file (merged with its smaller neighbours) -> checkpoint file -> install -> remove old -> release
//! ```
//! Running out of space drops the partial file and tries later (D10); any other failure ends the bookie (D3).

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use geminga_runtime::disk::OpenMode;
use tokio::time::Instant;

use super::{
    checkpoint::{self, Checkpoint, remove_if_there},
    index::{self, IndexFile, IndexWriter},
};
use crate::{
    crash_points::CrashPoint,
    fencing::{Ledgers, MemoryTable, Room, Row},
    ledger_set::LedgerSet,
    state::{Core, Indexes, Kept, Shared},
    validity::Validity,
};

/// Pause between checkpoints that give room back to a disk without.
const INTERVAL_WHEN_SHORT: Duration = Duration::from_secs(1);

/// Runs until cancelled: a checkpoint after each file roll, at the row limit, and at the interval if anything changed.
pub(crate) async fn run(shared: Arc<Shared>) -> io::Result<()> {
    let cancelled = shared.tasks.token();
    let mut next = Instant::now() + shared.config.checkpoint_interval;
    loop {
        tokio::select! {
            biased;
            () = cancelled.cancelled() => return Ok(()),
            () = shared.checkpoint_wake.notified() => {}
            () = tokio::time::sleep_until(next) => {}
        }
        run_once(&shared).await?;
        next = Instant::now() + pause(&shared);
    }
}

/// Files that only wait for another checkpoint are not left waiting while the disk is short of room (D5, D10).
fn pause(shared: &Shared) -> Duration {
    let core = shared.core();
    if core.room != Room::Writable && awaits_release(&core) {
        shared.config.checkpoint_interval.min(INTERVAL_WHEN_SHORT)
    } else {
        shared.config.checkpoint_interval
    }
}

/// One checkpoint, if anything changed since the last one. False if the disk had no room for it; an error has ended the
/// bookie (D3).
pub(crate) async fn run_once(shared: &Arc<Shared>) -> io::Result<bool> {
    let _one_at_a_time = shared.checkpointing.lock().await;
    // Ends the bookie before the next in line can begin.
    attempt(shared).await.inspect_err(|error| shared.end(Some(&format!("checkpoint: {error}"))))
}

async fn attempt(shared: &Arc<Shared>) -> io::Result<bool> {
    let Some((checkpoint, rows)) = begin(shared) else {
        return shared.run(&shared.read_io, |shared| tidy(shared).map(|()| true)).await;
    };
    let work = shared.run(&shared.read_io, move |shared| write(shared, checkpoint, &rows));
    match work.await {
        Ok((checkpoint, indexes)) => {
            install(shared, &checkpoint, indexes);
            shared.metrics.checkpoints.inc();
            shared.run(&shared.read_io, tidy).await?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            tracing::warn!(bookie_id = shared.config.id, "no room for a checkpoint");
            shared.core().ledgers.thaw_back();
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Freezes the state at the newest synced group. None if nothing changed.
fn begin(shared: &Shared) -> Option<(Checkpoint, Arc<MemoryTable>)> {
    let mut core = shared.core();
    let core = &mut *core;
    if core.ended || core.kept.0.mark == core.last.number && !awaits_release(core) {
        return None;
    }
    let (rows, ledgers) = core.ledgers.freeze();
    let sequence = core.sequence_max + 1;
    for (number, info) in &mut core.files {
        // The file being written may look dead before its first entry.
        let written = *number == core.last.file;
        if !written && info.dead_at.is_none() && is_dead(*number, &info.ledgers, &core.ledgers) {
            info.dead_at = Some(sequence);
        }
    }
    let (tombstones, moved_away) = core.ledgers.dropped();
    let checkpoint = Checkpoint {
        sequence,
        mark: core.last,
        ledgers,
        limbo: core.ledgers.limbo(),
        tombstones: tombstones.clone(),
        moved_away: moved_away.clone(),
        indexes: core.indexes.iter().map(|index| index.sequence).collect(),
        files: core.files.iter().map(|(number, info)| (*number, info.clone())).collect(),
    };
    Some((checkpoint, rows))
}

/// Whether a dead file only waits for the older kept checkpoint to know it: then one more is worth it, even on an idle bookie.
fn awaits_release(core: &Core) -> bool {
    let known = core.kept.1.as_ref().map_or(0, |older| older.sequence);
    core.files.iter().any(|(number, info)| {
        *number != core.last.file
            && info.dead_at.is_none_or(|at| at > known)
            && is_dead(*number, &info.ledgers, &core.ledgers)
    })
}

/// Whether nothing in this journal file counts. A ledger that moved away and came back lives in later files only.
fn is_dead(file: u64, there: &LedgerSet, ledgers: &Ledgers) -> bool {
    there.is_within(ledgers.dropped().0)
        || there
            .runs()
            .iter()
            .all(|&(first, last)| (first..=last).all(|id| ledgers.is_dead_in(id.into(), file)))
}

/// Writes index and checkpoint files; returns the checkpoint as written and the index files it names. Blocking.
fn write(
    shared: &Shared,
    mut checkpoint: Checkpoint,
    rows: &MemoryTable,
) -> io::Result<(Checkpoint, Indexes)> {
    let old = Arc::clone(&shared.core().indexes);
    let indexes = if rows.is_empty() { old } else { write_index(shared, &checkpoint, rows, &old)? };
    checkpoint.indexes = indexes.iter().map(|index| index.sequence).collect();
    checkpoint::write(&shared.disk, &shared.crash, &checkpoint)?;
    Ok((checkpoint, indexes))
}

fn write_index(
    shared: &Shared,
    checkpoint: &Checkpoint,
    rows: &MemoryTable,
    old: &Indexes,
) -> io::Result<Indexes> {
    let merged = mergeable(rows.len() as u64, old.iter().map(|index| index.rows));
    let written = match write_merged(shared, checkpoint, rows, &old[..merged]) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::error!(bookie_id = shared.config.id, %error, "damaged index file is left alone until the next start");
            shared.metrics.damage_found.inc();
            let alone = write_merged(shared, checkpoint, rows, &[])?;
            return Ok(Arc::new(
                [Arc::new(alone)].into_iter().chain(old.iter().cloned()).collect(),
            ));
        }
        written => written?,
    };
    Ok(Arc::new([Arc::new(written)].into_iter().chain(old[merged..].iter().cloned()).collect()))
}

/// How many of the newest index files to merge in: as long as the next one is less than twice what is merged already. So
/// each row is rewritten a logarithmic number of times, and the number of files stays logarithmic.
fn mergeable(mut rows: u64, newest_first: impl Iterator<Item = u64>) -> usize {
    newest_first
        .take_while(|&next| {
            let small = next < rows.saturating_mul(2);
            rows += next;
            small
        })
        .count()
}

fn write_merged(
    shared: &Shared,
    checkpoint: &Checkpoint,
    rows: &MemoryTable,
    old: &[Arc<IndexFile>],
) -> io::Result<IndexFile> {
    let name = index::index_name(checkpoint.sequence);
    remove_if_there(&*shared.disk, &name)?;
    let back: BTreeMap<_, _> = checkpoint
        .ledgers
        .iter()
        .filter_map(|summary| Some((summary.ledger, Validity::From(summary.valid_from?))))
        .collect();
    let counts = |ledger, row: &Row| {
        !checkpoint.tombstones.contains(ledger)
            && (!checkpoint.moved_away.contains(ledger)
                || back.get(&ledger).is_some_and(|validity| validity.admits(row)))
    };
    let write = || {
        let file = shared.disk.open(&name, OpenMode::CreateNew)?;
        let mut writer = IndexWriter::new(Arc::clone(&file));
        let mut sources: Vec<index::Source<'_>> =
            vec![Box::new(rows.iter().map(|(key, row)| Ok((*key, *row))))];
        for index in old {
            sources.push(Box::new(index.iter()));
        }
        index::merge(
            sources,
            |key, row| if counts(key.0, &row) { writer.push(key, row) } else { Ok(()) },
        )?;
        writer.finish()?;
        shared.crash.pass(CrashPoint::IndexWritten)?;
        file.sync()?;
        shared.disk.sync_dir()?;
        shared.crash.pass(CrashPoint::IndexSynced)?;
        IndexFile::open(checkpoint.sequence, file)
    };
    let written = write();
    if written
        .as_ref()
        .is_err_and(|e| matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::InvalidData))
    {
        remove_if_there(&*shared.disk, &name)?;
    }
    written
}

fn install(shared: &Shared, checkpoint: &Checkpoint, indexes: Indexes) {
    let mut core = shared.core();
    core.indexes = indexes;
    let frozen = core.ledgers.thaw_into_index();
    core.sequence_max = checkpoint.sequence;
    let kept = Kept {
        sequence: checkpoint.sequence,
        mark: checkpoint.mark.number,
        indexes: checkpoint.indexes.clone(),
    };
    let older = std::mem::replace(&mut core.kept.0, kept);
    core.kept.1 = Some(older);
    drop(core);
    drop(frozen); // many rows: not while adds wait for the lock
}

/// Removes what neither kept checkpoint names, then releases journal files: dead, behind the *older* kept mark, known as
/// dead to the older kept checkpoint, and pinned by no reader; never the one with the newest group (D5(b)). Blocking.
fn tidy(shared: &Shared) -> io::Result<()> {
    let (sequences, indexes, releasable) = {
        let core = shared.core();
        let (newest, older) = &core.kept;
        let Some(older) = older else { return Ok(()) };
        let indexes: Vec<u64> = newest.indexes.iter().chain(&older.indexes).copied().collect();
        let dead = core.files.iter().filter(|(number, info)| {
            let known = info.dead_at.is_some_and(|at| at <= older.sequence);
            known && info.last <= older.mark && **number != core.last.file
        });
        let dead: Vec<u64> = dead.map(|(number, _)| *number).collect();
        (vec![newest.sequence, older.sequence], indexes, dead)
    };
    checkpoint::remove_old(&shared.disk, &shared.crash, &sequences, &indexes)?;
    for number in releasable {
        if shared.files.release(number)? {
            tracing::info!(bookie_id = shared.config.id, file = number, "journal file released");
            shared.core().files.remove(&number);
            shared.metrics.files_released.inc();
        }
    }
    if shared.core().room == Room::Writable {
        shared.files.fill_reserve()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_files_merge_so_that_their_number_stays_logarithmic() {
        let mut files: Vec<u64> = Vec::new();
        for _ in 0..1000 {
            let merged = mergeable(100, files.iter().copied());
            let rows = 100 + files[..merged].iter().sum::<u64>();
            files.splice(..merged, [rows]);
            assert!(files.len() <= 12, "{files:?}");
        }
        assert_eq!(files.iter().sum::<u64>(), 100_000);
    }
}
