//! Settings of a ledger client. Data only; every number is a default.

use std::time::Duration;

/// How long things may take, and how much they may hold.
#[derive(Clone, Debug)]
pub struct LedgerClientConfig {
    /// Deadline of one ADD.
    pub add_timeout: Duration,
    /// Deadline of one READ, FENCE, LIST or READ_LAC.
    pub read_timeout: Duration,
    /// Payload bytes one writer may hold until every slot answered or was given up (W5).
    pub writer_bytes_max: usize,
    /// Payload bytes all writers of the client may hold together; new appends wait for room beyond it (W5).
    pub client_bytes_max: usize,
    /// Entries one writer may hold.
    pub writer_entries_max: usize,
    /// A timeout, BUSY or reset alone starts an ensemble change after this (EC1).
    pub resend_for: Duration,
    /// First pause before a failed add is sent again; doubles up to `resend_pause_max`.
    pub resend_pause_min: Duration,
    /// Longest pause before a failed add is sent again.
    pub resend_pause_max: Duration,
    /// With no replacement and fewer than Qa slots answering: how long the writer waits for them before it gives the
    /// ledger up as a write failure (EC7).
    pub short_patience: Duration,
    /// How often a vacant or given-up slot looks for a replacement, and a given-up one is probed (EC1, EC7).
    pub look_interval: Duration,
    /// An idle writer tells its LAC after this; at most 100 ms (W3).
    pub lac_delay: Duration,
    /// How long a close waits for pending entries to be acknowledged (section 6).
    pub seal_patience: Duration,
    /// How long a close then waits for the answers beyond Qa, so that the ledger need not be listed.
    pub straggler_patience: Duration,
    /// Entries recovery reads ahead of its verdicts (R3).
    pub recovery_window: usize,
    /// How long one call of recovery goes on trying before it answers `Incomplete`.
    pub recovery_patience: Duration,
    /// A standing recovery nonce is left alone for at least this long (R1).
    pub rival_patience: Duration,
    /// A read that is not answered by then is also sent to the next bookie, as long as too few reads of the bookie were seen
    /// to know its p95 (RD5).
    pub speculative_after: Duration,
    /// With its p95 known, not before this.
    pub speculative_min: Duration,
}

impl Default for LedgerClientConfig {
    fn default() -> Self {
        Self {
            add_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(5),
            writer_bytes_max: 32 * 1024 * 1024,
            client_bytes_max: 256 * 1024 * 1024,
            writer_entries_max: 16_384,
            resend_for: Duration::from_secs(30),
            resend_pause_min: Duration::from_millis(50),
            resend_pause_max: Duration::from_secs(2),
            short_patience: Duration::from_secs(10),
            look_interval: Duration::from_secs(2),
            lac_delay: Duration::from_millis(50),
            seal_patience: Duration::from_secs(5),
            straggler_patience: Duration::from_millis(200),
            recovery_window: 32,
            recovery_patience: Duration::from_secs(30),
            rival_patience: Duration::from_secs(2),
            speculative_after: Duration::from_millis(200),
            speculative_min: Duration::from_millis(10),
        }
    }
}
