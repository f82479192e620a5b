//! Retention and offload as the broker drives them; the work itself is the managed ledger's (section 13).
//!
//! - `policies`: what is set for cluster, tenant, namespace and topic reaches every segment that is served here. As long as
//!   nothing is set for a segment nothing of it is trimmed or moved.
//! - `sweep`: the janitor's rounds over cold storage (X4), in which the brokers of a cluster share.

mod policies;
mod sweep;

use geminga_metadata::SharedStore;
use geminga_runtime::tasks::Tasks;

use crate::context::Shared;

/// Starts both; they end with `tasks`.
pub(crate) fn start(shared: &Shared, store: &SharedStore, tasks: &Tasks) {
    let levels = policies::Levels::start(store, tasks);
    tasks.spawn("policy keeper", policies::keep(shared.clone(), levels));
    tasks.spawn("object sweep", sweep::keep_sweeping(shared.clone()));
}
