//! Where entries are found again: memory table, index files, checkpoints, recent entries.

pub(crate) mod checkpoint;
pub(crate) mod checkpointer;
pub(crate) mod index;
pub(crate) mod read;
pub(crate) mod write_cache;
