//! Numbered crash points: one for every durable step, so that a test can cut the power at each.

use std::{fmt, io, sync::Arc};

macro_rules! crash_points {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A durable step, named by what has just been done.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum CrashPoint { $($(#[$doc])* $name,)* }

        impl CrashPoint {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

crash_points! {
    /// A reserve file was written to its full length, not synced.
    ReserveWritten,
    /// A reserve file got its name; the directory is not synced.
    ReserveNamed,
    /// Format: the first journal file holds its first group.
    FormatJournalSynced,
    /// Format: the first checkpoint stands.
    FormatCheckpointDone,
    /// Format: the local cookie lies there under its provisional name.
    CookieProvisional,
    /// Format: the store has the cookie.
    CookieStored,
    /// Format: the local cookie has its name; the directory is not synced.
    CookieRenamed,
    /// A journal file was created or renamed for use; the directory is not synced.
    FileTaken,
    /// A journal file was made durable under its name.
    FileNamed,
    /// Start: groups were copied forward, not synced (D3).
    CopyWritten,
    /// Start: the copies are synced.
    CopySynced,
    /// Start: the first group was written, not synced (D4).
    StartGroupWritten,
    /// Start: the first group is synced.
    StartGroupSynced,
    /// A group was written, not synced.
    GroupWritten,
    /// A group is synced, and nobody was told.
    GroupSynced,
    /// Checkpoint: the index file is written, not synced.
    IndexWritten,
    /// Checkpoint: the index file is synced.
    IndexSynced,
    /// Checkpoint: its file is synced under the provisional name.
    CheckpointSynced,
    /// Checkpoint: renamed; the directory is not synced.
    CheckpointRenamed,
    /// Checkpoint: it stands.
    CheckpointDone,
    /// Superseded checkpoints and index files were removed; the directory is not synced.
    OldRemoved,
    /// A journal file got the name of a free or reserve file, or was removed; the directory is not synced.
    FileReleased,
    /// A file that could not be filled for want of space was removed; the directory is not synced.
    FileDiscarded,
}

/// Is told of every crash point; an error makes the bookie end there, as by a failed write (D3).
pub trait CrashHook: Send + Sync + 'static {
    /// `point` has just been passed.
    ///
    /// # Errors
    /// Whatever the test wants the bookie to die of.
    fn reached(&self, point: CrashPoint) -> io::Result<()>;
}

/// The hook of a bookie; none in production.
#[derive(Clone, Default)]
pub struct CrashPoints(Option<Arc<dyn CrashHook>>);

impl CrashPoints {
    /// Calls `hook` at every point.
    #[must_use]
    pub fn new(hook: Arc<dyn CrashHook>) -> Self {
        Self(Some(hook))
    }

    /// Passes a point.
    pub(crate) fn pass(&self, point: CrashPoint) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |hook| hook.reached(point))
    }
}

impl fmt::Debug for CrashPoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CrashPoints").field(&self.0.is_some()).finish()
    }
}
