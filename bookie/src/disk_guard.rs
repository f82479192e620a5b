//! Room on the disk (D10): read-only at 90 %, recovery adds until 97 %, writable again below 85 %. Recomputed, not remembered.

use std::{io, sync::Arc};

use geminga_runtime::disk::Space;

use crate::{config::DiskLimits, fencing::Room, state::Shared};

/// The thresholds with their hysteresis. Pure.
#[derive(Debug)]
pub struct DiskGuard {
    limits: DiskLimits,
    read_only: bool,
}

impl DiskGuard {
    /// A guard that has seen nothing yet: writable until measured.
    #[must_use]
    pub fn new(limits: DiskLimits) -> Self {
        Self { limits, read_only: false }
    }

    /// Judges a measurement. `own_free` are bytes of files kept for reuse; `ran_full` tells that a write found no space.
    pub fn measure(&mut self, space: Space, own_free: u64, ran_full: bool) -> Room {
        let used = used(space, own_free);
        if used >= self.limits.read_only_at || ran_full {
            self.read_only = true;
        } else if used < self.limits.writable_below {
            self.read_only = false;
        }
        match (self.read_only, used >= self.limits.recovery_stops_at) {
            (true, true) => Room::Full,
            (true, false) => Room::RecoveryOnly,
            (false, _) => Room::Writable,
        }
    }
}

/// The share of the file system in use, 0.0 to 1.0.
fn used(space: Space, own_free: u64) -> f64 {
    if space.total == 0 {
        return 1.0;
    }
    1.0 - (space.free.saturating_add(own_free).min(space.total)) as f64 / space.total as f64
}

/// Measures once, and sets what is taken from now on.
pub(crate) async fn check(shared: &Arc<Shared>, guard: &mut DiskGuard) -> io::Result<()> {
    let space = shared.run(&shared.read_io, |shared| shared.disk.space()).await?;
    let own_free = shared.files.free_bytes();
    let changed = {
        let mut core = shared.core();
        let ran_full = std::mem::take(&mut core.ran_full);
        let room = guard.measure(space, own_free, ran_full);
        let changed = room != core.room;
        core.room = room;
        core.space = (space.free, space.total);
        changed.then_some(room)
    };
    shared.metrics.disk_used.set((used(space, own_free) * 1000.0) as i64);
    if let Some(room) = changed {
        tracing::warn!(
            bookie_id = shared.config.id,
            ?room,
            free = space.free,
            total = space.total,
            "disk room changed"
        );
        shared.status_wake.notify_one();
    }
    Ok(())
}

/// Counts what the journal wrote since the last measurement: a fast writer is stopped at the threshold, not a second past
/// it, where nothing on this file system would have room left. The next measurement corrects what this counts too high.
pub(crate) fn note_written(shared: &Shared, bytes: u64) {
    let mut core = shared.core();
    core.space.0 = core.space.0.saturating_sub(bytes);
    let (free, total) = core.space;
    if total == 0 || core.room != Room::Writable {
        return;
    }
    if used(Space { total, free }, shared.files.free_bytes()) >= shared.config.disk.read_only_at {
        core.room = Room::RecoveryOnly;
        drop(core);
        tracing::warn!(bookie_id = shared.config.id, free, total, "disk is filled: read-only");
        shared.status_wake.notify_one();
    }
}

/// Measures until cancelled.
pub(crate) async fn run(shared: Arc<Shared>, mut guard: DiskGuard) -> io::Result<()> {
    let cancelled = shared.tasks.token();
    loop {
        tokio::select! {
            biased;
            () = cancelled.cancelled() => return Ok(()),
            () = tokio::time::sleep(shared.config.disk.check_interval) => {}
        }
        check(&shared, &mut guard).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_takes_adds_again_only_below_85_percent() {
        let mut guard = DiskGuard::new(DiskLimits::default());
        let mut at = |free, full| guard.measure(Space { total: 1000, free }, 0, full);
        assert_eq!(at(500, false), Room::Writable);
        assert_eq!(at(101, false), Room::Writable);
        assert_eq!(at(100, false), Room::RecoveryOnly);
        assert_eq!(at(140, false), Room::RecoveryOnly);
        assert_eq!(at(30, false), Room::Full);
        assert_eq!(at(31, false), Room::RecoveryOnly);
        assert_eq!(at(151, false), Room::Writable);
        assert_eq!(at(140, true), Room::RecoveryOnly);
    }

    #[test]
    fn files_kept_for_reuse_count_as_free() {
        let mut guard = DiskGuard::new(DiskLimits::default());
        assert_eq!(guard.measure(Space { total: 1000, free: 50 }, 200, false), Room::Writable);
    }
}
