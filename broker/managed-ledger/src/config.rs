//! Settings of managed ledgers. Data only; every number is a default.

use std::time::Duration;

use geminga_bookie_client::Quorum;

/// Settings shared by all segments of a broker.
#[derive(Clone, Debug)]
pub struct ManagedLedgerConfig {
    /// Shape of new ledgers, data and cursor log.
    pub quorum: Quorum,
    /// The cluster's generation, the high byte of every epoch (O2).
    pub generation: u8,
    /// A data ledger is closed and followed by the next at this size, payload bytes.
    pub roll_bytes: u64,
    /// Or at this age.
    pub roll_age: Duration,
    /// A cursor-log ledger is followed by the next at this size, bytes.
    pub cursor_roll_bytes: u64,
    /// A full snapshot follows when the deltas since the last one exceed this, and twice the last one's size (C5).
    pub snapshot_after_bytes: u64,
    /// The deduplication state is written after so many data bytes, so that a load replays no more (DD2).
    pub dedup_snapshot_bytes: u64,
    /// A segment without appends and settles for so long closes its ledgers (O4).
    pub idle_after: Duration,
    /// Runs of a cursor: acknowledged above the mark, waiting for another attempt, and dead-letter decisions together; beyond
    /// it new ones are refused (CURSOR_LIMIT). As many runs of leases may come on top. At most 250,000: a cursor's state
    /// must fit into an entry.
    pub holes_max: usize,
    /// Producers a segment remembers (DD4).
    pub producers_max: usize,
    /// A session producer not seen for so long is forgotten (DD4).
    pub session_idle: Duration,
    /// Requests that may wait for a segment's owner task.
    pub commands_max: usize,
    /// Recent entries kept in memory for readers, payload bytes, all segments together.
    pub cache_bytes: u64,
    /// And per segment.
    pub segment_cache_bytes: u64,
    /// Batches behind the tail kept in memory a short while, so that several readers of the same old range ask bookies once,
    /// payload bytes, all segments together. They never push out those at the tail.
    pub catch_up_cache_bytes: u64,
    /// Read and written by compaction, bytes a second, together with what is published and read meanwhile: compaction takes
    /// what that leaves, and a sixteenth always.
    pub compaction_bytes_per_s: u64,
    /// Memory for the keys of one round of a compaction, bytes; more keys make more rounds.
    pub compaction_table_bytes: u64,
    /// A key that was deleted is told of in the compacted view for so long, and at most for twice as long: longer than a
    /// reader takes for a view.
    pub tombstones_kept: Duration,
    /// Memory of all uploads to cold storage together, bytes; one upload takes about 60 MiB of it.
    pub offload_bytes: u64,
    /// Blocks of offloaded ledgers kept in memory for readers, bytes, all segments together.
    pub object_block_bytes: u64,
    /// And where blocks lie in objects.
    pub object_index_bytes: u64,
    /// Pause after an upload that failed; doubled for each further one, at most 30 s: a healed store is found soon.
    pub offload_retry: Duration,
    /// While the metadata store does not answer: an add without an answer for so long ends the segment (O3).
    pub probe_overdue: Duration,
    /// How long a load goes on before it answers that it is not ready.
    pub load_patience: Duration,
    /// How long an append waits for a ledger to be created.
    pub create_patience: Duration,
}

impl Default for ManagedLedgerConfig {
    fn default() -> Self {
        Self {
            quorum: Quorum::new(3, 3, 2).expect("a valid shape"),
            generation: 0,
            roll_bytes: 256 << 20,
            roll_age: Duration::from_secs(4 * 3600),
            cursor_roll_bytes: 64 << 20,
            snapshot_after_bytes: 1 << 20,
            dedup_snapshot_bytes: 64 << 20,
            idle_after: Duration::from_secs(600),
            holes_max: 200_000,
            producers_max: 100_000,
            session_idle: Duration::from_secs(900),
            commands_max: 16_384,
            cache_bytes: 256 << 20,
            segment_cache_bytes: 32 << 20,
            catch_up_cache_bytes: 64 << 20,
            compaction_bytes_per_s: 64 << 20,
            compaction_table_bytes: 64 << 20,
            tombstones_kept: Duration::from_secs(24 * 3600),
            offload_bytes: 128 << 20,
            object_block_bytes: 64 << 20,
            object_index_bytes: 8 << 20,
            offload_retry: Duration::from_secs(30),
            probe_overdue: Duration::from_secs(1),
            load_patience: Duration::from_secs(30),
            create_patience: Duration::from_secs(10),
        }
    }
}
