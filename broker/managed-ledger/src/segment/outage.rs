//! O3: what a segment does while nobody confirms that its claim stands, because the metadata store does not answer.
//!
//! No list change is started. Traffic on open ledgers goes on, and shows every second that they still take adds: that is
//! what tells this owner, without the store, that nobody has fenced them. What needs a change is refused, and whoever is
//! refused may come back.

use std::time::Duration;

use geminga_bookie_client::LedgerWriter;
use geminga_proto::storage::v1::entry_header::{Probe, control::Kind};
use tokio::time::Instant;

use super::{cursors::Group, lane::Lane, owner::Owner, publish::Item};
use crate::cursor_log;

/// How often an idle ledger is probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// How many times its size limit a ledger may reach while it cannot be rolled.
const STRETCH: u64 = 4;

impl Owner {
    /// Whether a list change may be started now.
    pub(super) fn may_change(&self) -> bool {
        self.ledgers.parts().client.standing().confirmed()
    }

    /// Waits until the answer of [`Self::may_change`] is another one than now.
    pub(super) fn standing_turns(&self) -> impl Future<Output = ()> + use<> {
        let standing = self.ledgers.parts().client.standing().clone();
        let confirmed = standing.confirmed();
        async move {
            if confirmed {
                standing.until_provisional().await;
            } else {
                standing.until_confirmed().await;
            }
        }
    }

    /// Publishing needs an open data ledger with room, or a change under way that will give one.
    pub(super) fn refuses_batches(&self) -> bool {
        let roll_bytes = self.ledgers.parts().config.roll_bytes;
        !self.may_change() && self.job.is_none() && !has_room(&self.data, roll_bytes)
    }

    /// Settling needs an open cursor log.
    pub(super) fn refuses_settles(&self) -> bool {
        let roll_bytes = self.ledgers.parts().config.cursor_roll_bytes + self.snapshot_bytes;
        !self.may_change() && self.job.is_none() && !has_room(&self.log, roll_bytes)
    }

    /// When ledgers are looked at next; none while the store answers.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        (!self.may_change())
            .then(|| self.probed_at.map_or_else(Instant::now, |at| at + PROBE_INTERVAL))
    }

    /// Shows that the segment is still ours, or ends it.
    pub(super) fn probe(&mut self) {
        let first_look = self.probed_at.replace(Instant::now()).is_none();
        if self.job.is_some() {
            return; // its outcome is waited for (MD3)
        }
        if self.closing.is_some() && self.is_quiet() {
            return self
                .fence("the metadata store does not answer, and the segment is to be closed");
        }
        if !self.data.is_open() && !self.log.is_open() {
            return self.fence("the metadata store does not answer, and no ledger is open");
        }
        let overdue = self.ledgers.parts().config.probe_overdue;
        // What was slow while the store still answered has until the next look.
        if !first_look && (self.data.overdue(overdue) || self.log.overdue(overdue)) {
            return self.fence("the metadata store does not answer, and an add is overdue");
        }
        if self.data.is_open() && self.data.is_empty() {
            let header = self.control(Kind::Probe(Probe {}));
            self.data.pending.push_back(Item::Control(Box::new(header), None));
        }
        if self.log.is_open() && self.log.is_empty() {
            let entry = cursor_log::encode(Vec::new());
            self.log.pending.push_back(Group::Changes { entry, changes: Vec::new(), dedup: None });
        }
    }
}

fn has_room<T>(lane: &Lane<T>, roll_bytes: u64) -> bool {
    let length = lane.writer().map_or(0, LedgerWriter::length);
    lane.is_open() && length < roll_bytes.saturating_mul(STRETCH)
}
