//! What the simulation is made of: a world of real parts on virtual time, faults, a history, and its checkers.
//!
//! ```text
//! plan (from the seed) --> runs: actors --> LedgerClient --> network --> ObservedBookie --> bookie --> disk
//!                          faults  -------------------------> network, nodes, stores, clock
//!                                             history <------ everything observed --> checks
//! ```

pub(crate) mod agents;
pub(crate) mod checks;
pub(crate) mod claims;
pub(crate) mod coverage;
pub(crate) mod disk_node;
pub(crate) mod dispatch_run;
pub(crate) mod faults;
pub(crate) mod history;
pub(crate) mod ledger_run;
pub(crate) mod memory_node;
pub(crate) mod network;
pub(crate) mod nodes;
pub(crate) mod observe;
pub(crate) mod operator;
pub(crate) mod plan;
pub(crate) mod run;
pub(crate) mod seeds;
pub(crate) mod segment_run;
pub(crate) mod store_view;
pub(crate) mod upkeep;
pub(crate) mod upkeep_run;
pub(crate) mod world;
