//! Settings of a bookie, as data. Defaults are those of the protocol.

use std::time::Duration;

use geminga_metadata::BUNDLES;

/// Settings of one bookie. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct BookieConfig {
    /// The bookie's id: the name of its cookie and of its registration; never the name of its data (that is the incarnation).
    pub id: String,
    /// Where others reach it, as written to `available/<id>`.
    pub address: String,
    /// Failure domain: a replacement is chosen so that copies lie in as many zones as they can (EC6). Empty: none is known.
    pub zone: String,
    /// Registers as draining: nobody chooses it any more (EC6).
    pub draining: bool,
    /// A journal file is left for the next one at this size; also the size of each reserve file (D10).
    pub journal_file_bytes: u64,
    /// Bytes after which a group takes no further record. A single larger record still makes a group.
    pub group_bytes_max: usize,
    /// After so long without a group an empty one is written, so that a synced group does not stay the last one (D4).
    pub idle_group_after: Duration,
    /// Entry bytes that may wait for the journal; beyond that ADD answers busy (D12).
    pub queue_bytes_max: usize,
    /// Requests that may wait for the journal (D12).
    pub queue_requests_max: usize,
    /// Requests that may wait for a look-up on disk or in the metadata store (D12).
    pub lookups_max: usize,
    /// Verdicts of one READ answer.
    pub read_entries_max: u64,
    /// Payload bytes of recent entries kept for tail readers.
    pub write_cache_bytes: usize,
    /// A checkpoint follows at least so often while something changes (D5).
    pub checkpoint_interval: Duration,
    /// A checkpoint follows when the memory table has so many rows.
    pub checkpoint_rows_max: usize,
    /// Freed journal files kept for reuse, besides the reserve.
    pub free_files_max: usize,
    /// Bundles of a cluster that this bookie is the first to reach.
    pub bundles: u32,
    /// Disk thresholds (D10).
    pub disk: DiskLimits,
    /// Length of the registration's lease.
    pub lease_ttl: Duration,
    /// How often local ledgers are compared with the metadata store (G1).
    pub gc_interval: Duration,
    /// A ledger whose key is absent goes only if it was absent twice, at least so far apart (G1). At least 1 h outside tests.
    pub gc_absent_after: Duration,
    /// A Closed ledger goes only if no fragment has named this incarnation for so long (G1). At least 24 h outside tests.
    pub gc_unnamed_after: Duration,
    /// The largest share of ledgers or bytes that one pass drops on grounds other than Deleted (G2), 0.0 to 1.0.
    pub gc_share_max: f64,
    /// How long a start waits for the lock of the directory and for the metadata store.
    pub start_timeout: Duration,
    /// An empty directory behind a known bookie id, or a lost one, becomes a *new* incarnation, and the old one is revoked
    /// and listed as lost (D7, repair). An operator's decision: false refuses to start.
    pub take_new_incarnation: bool,
}

/// Shares of the file system, 0.0 to 1.0 (D10).
#[derive(Clone, Copy, Debug)]
pub struct DiskLimits {
    /// At this use plain adds are refused.
    pub read_only_at: f64,
    /// Below this use plain adds are taken again.
    pub writable_below: f64,
    /// At this use recovery adds are refused, too.
    pub recovery_stops_at: f64,
    /// How often the use is measured.
    pub check_interval: Duration,
}

impl Default for DiskLimits {
    fn default() -> Self {
        Self {
            read_only_at: 0.90,
            writable_below: 0.85,
            recovery_stops_at: 0.97,
            check_interval: Duration::from_secs(1),
        }
    }
}

impl Default for BookieConfig {
    fn default() -> Self {
        Self {
            id: "bookie-0".to_owned(),
            address: "127.0.0.1:8660".to_owned(),
            zone: String::new(),
            draining: false,
            journal_file_bytes: 64 << 20,
            group_bytes_max: 1 << 20,
            idle_group_after: Duration::from_millis(100),
            queue_bytes_max: 64 << 20,
            queue_requests_max: 65_536,
            lookups_max: 4_096,
            read_entries_max: 1_024,
            write_cache_bytes: 64 << 20,
            checkpoint_interval: Duration::from_secs(60),
            checkpoint_rows_max: 200_000,
            free_files_max: 4,
            bundles: BUNDLES,
            disk: DiskLimits::default(),
            lease_ttl: Duration::from_secs(5),
            gc_interval: Duration::from_secs(60),
            gc_absent_after: Duration::from_secs(3600),
            gc_unnamed_after: Duration::from_secs(24 * 3600),
            gc_share_max: 0.2,
            start_timeout: Duration::from_secs(30),
            take_new_incarnation: false,
        }
    }
}
