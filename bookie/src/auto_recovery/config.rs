//! Settings of auto-recovery, as data. Defaults are those of the protocol.

use std::time::Duration;

/// Settings of auditor and replicator.
#[derive(Clone, Debug)]
pub struct AutoRecoveryConfig {
    /// How often the auditor looks at registrations and wishes.
    pub audit_interval: Duration,
    /// An incarnation is lost when the auditor itself saw it missing for so long (A1).
    pub lost_after: Duration,
    /// Pause between full scans while something is lost or missing; the longest one while a bookie drains.
    pub scan_interval: Duration,
    /// Pause between full scans otherwise.
    pub idle_scan_interval: Duration,
    /// Pause between two listings of up to 32 ledgers: no storm (T16).
    pub listing_pause: Duration,
    /// Pause between periodic checks of all copies (A1).
    pub check_interval: Duration,
    /// Ledgers checked in one audit.
    pub check_batch: usize,
    /// A drain is done when two full scans so far apart find no ledger that names the bookie (DC1).
    pub proof_apart: Duration,
    /// Slots of new ledgers: a drain must leave as many writable bookies (DC1).
    pub ensemble_size: usize,
    /// How often the replicator looks for listed ledgers.
    pub repair_interval: Duration,
    /// Nobody must have claimed a ledger's bundle for so long before the replicator fences it (A3).
    pub unclaimed_for: Duration,
    /// Bytes per second that one bookie's replicator copies.
    pub bytes_per_second: u64,
    /// Bytes in flight, besides one entry.
    pub chunk_bytes: usize,
    /// Deadline of one READ, LIST or ADD.
    pub rpc_timeout: Duration,
}

impl Default for AutoRecoveryConfig {
    fn default() -> Self {
        Self {
            audit_interval: Duration::from_secs(10),
            lost_after: Duration::from_secs(600),
            scan_interval: Duration::from_secs(60),
            idle_scan_interval: Duration::from_secs(600),
            listing_pause: Duration::from_millis(100),
            check_interval: Duration::from_secs(7 * 24 * 3600),
            check_batch: 100,
            proof_apart: Duration::from_secs(60),
            ensemble_size: 3,
            repair_interval: Duration::from_secs(5),
            unclaimed_for: Duration::from_secs(60),
            bytes_per_second: 50 << 20,
            chunk_bytes: 1 << 20,
            rpc_timeout: Duration::from_secs(10),
        }
    }
}
