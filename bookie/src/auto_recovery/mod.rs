//! Keeps every ledger at its full number of copies (A1-A4), and lets bookies go (DC1).
//!
//! ```text
//! auditor (one, elected)      view.rs    who is registered, lost, revoked, draining
//!                             absences.rs, drain.rs   what follows from it (pure)
//!                             scan.rs    all ledgers at one revision -> underreplicated/, lost/, proof
//! replicator (every bookie)   plan.rs    which slots lack what (pure)
//!                             repair.rs  survey, copy, swap one slot, survey again, unlist
//! ```
//! It runs in the process of a bookie and knows nothing of its inside: it reaches all bookies, its own too, through the
//! ledger client's seam. Locks and the election are for efficiency only; what makes two at once harmless is that every
//! change of a ledger compares what was read (A2).

mod absences;
mod auditor;
mod config;
mod copy;
mod drain;
mod pace;
mod plan;
mod repair;
mod replicator;
mod scan;
mod view;

use geminga_bookie_client::{LedgerClient, bookie_rpc::SharedBookies};
use geminga_metadata::{Election, LeaseKeeper, SharedStore};
use geminga_proto::storage::v1 as wire;
use geminga_runtime::{clock::SharedClock, random::Random, tasks::Tasks};
use prost::Message;

pub use self::config::AutoRecoveryConfig;
use crate::metrics::AutoRecoveryMetrics;

/// What auto-recovery is made of.
#[derive(Clone, Debug)]
pub struct AutoRecoveryParts {
    pub store: SharedStore,
    /// Recovers ledgers that nobody owns (A3).
    pub client: LedgerClient,
    /// The way to all bookies; the same as the client's.
    pub bookies: SharedBookies,
    pub clock: SharedClock,
    pub random: Random,
    /// Owner of its tasks: ended with it.
    pub tasks: Tasks,
    /// Election and locks live under this lease: that of the bookie's registration.
    pub keeper: LeaseKeeper,
    /// The bookie this process runs.
    pub bookie_id: String,
    /// A uuid of this process, to tell its own election from one before.
    pub instance: [u8; 16],
    pub config: AutoRecoveryConfig,
    pub metrics: AutoRecoveryMetrics,
}

/// The role in the election.
const AUDITOR: &str = "auditor";

impl AutoRecoveryParts {
    /// Starts auditor and replicator as tasks of `tasks`; they end with that owner.
    pub fn start(self) {
        let election = Election::start(
            self.store.clone(),
            AUDITOR,
            &self.bookie_id,
            self.instance,
            self.keeper.clone(),
            &self.tasks,
        );
        let auditor = auditor::Auditor::new(self.clone(), election);
        let replicator = replicator::Replicator::new(self.clone());
        self.tasks.spawn("auditor", auditor.run());
        self.tasks.spawn("replicator", replicator.run());
    }
}

/// How the reason begins why a drain has not started; the bookie stays in service as long as it stands (DC1).
pub const WAITS: &str = "waits: ";

/// Whether a bookie with this value of `draining/bookies/<id>` leaves service: its drain neither waits nor is done.
pub(crate) fn is_draining(value: &[u8]) -> bool {
    wire::Draining::decode(value).is_ok_and(|wish| in_progress(&wish))
}

fn in_progress(wish: &wire::Draining) -> bool {
    wish.proof_revision == 0 && !wish.blocked.starts_with(WAITS)
}
