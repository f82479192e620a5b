//! The journal: groups of records, one write and one sync each; and the verdict on what a start finds.

pub(crate) mod files;
pub mod format;
pub(crate) mod queue;
pub mod replay;
pub(crate) mod scan;
pub(crate) mod writer;
