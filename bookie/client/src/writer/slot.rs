//! How one slot of the last fragment is doing, as its answers tell. Pure.

use std::{collections::BTreeSet, time::Duration};

use geminga_proto::ids::EntryId;
use tokio::time::Instant;

use crate::{config::LedgerClientConfig, metadata::Holder};

/// ```text
///            timeout, busy, reset                    30 s, or half of W5's budget, or short of Qa
/// healthy ----------------------> failing (probed) ------------------------------------+
///    ^                               |                                                 v
///    +---------- OK -----------------+     READ_ONLY, NO_SPACE, wrong incarnation   looked for a
///    |                                \--------------------------------------------> replacement
///    +---------- OK ------------------ suspended (EC7: adds given up, probed) <--- none |
///                                                           a new holder: healthy <-----+
/// ```
#[derive(Clone, Debug)]
pub(super) struct SlotState {
    pub(super) holder: Holder,
    /// Since when its adds fail.
    pub(super) failing_since: Option<Instant>,
    /// It said that it takes no adds now: replaced at once (EC1).
    pub(super) hard: bool,
    /// No replacement was found: its adds are given up, one at a time is tried (EC7).
    pub(super) suspended: bool,
    /// Slower than all its peers for long: replaced when another can take its place, and used until then (EC1).
    pub(super) slow: bool,
    /// When one add is tried again. None while failing: the next one may go at once.
    pub(super) retry_at: Option<Instant>,
    /// The one add on its way while failing.
    pub(super) probing: Option<EntryId>,
    /// Adds that wait for it to answer again.
    pub(super) waiting: BTreeSet<EntryId>,
    pause: Duration,
}

impl SlotState {
    pub(super) fn new(holder: Holder) -> Self {
        Self {
            holder,
            failing_since: None,
            hard: false,
            suspended: false,
            slow: false,
            retry_at: None,
            probing: None,
            waiting: BTreeSet::new(),
            pause: Duration::ZERO,
        }
    }

    /// Answers, or has not shown otherwise.
    pub(super) fn is_hopeful(&self) -> bool {
        self.holder.is_some() && self.failing_since.is_none()
    }

    /// Failing, with nothing on its way and no pause to wait for.
    pub(super) fn may_probe(&self) -> bool {
        self.failing_since.is_some() && self.retry_at.is_none() && self.probing.is_none()
    }

    /// It answers again; returns what waited for it.
    pub(super) fn recover(&mut self) -> BTreeSet<EntryId> {
        let (waiting, slow) = (std::mem::take(&mut self.waiting), self.slow);
        *self = Self { waiting, slow, ..Self::new(self.holder) };
        std::mem::take(&mut self.waiting)
    }

    /// An add failed.
    pub(super) fn fail(
        &mut self,
        entry: EntryId,
        hard: bool,
        now: Instant,
        config: &LedgerClientConfig,
    ) {
        self.failing_since.get_or_insert(now);
        self.hard |= hard;
        let probed = self.probing == Some(entry);
        if probed {
            self.probing = None;
        }
        if self.retry_at.is_none() && self.probing.is_none() {
            self.pause = if probed { self.pause * 2 } else { self.pause };
            self.pause = self.pause.clamp(config.resend_pause_min, config.resend_pause_max);
            if self.hard || self.suspended {
                self.pause = self.pause.max(config.look_interval);
            }
            self.retry_at = Some(now + self.pause);
        }
    }

    /// EC1: whether it is to be replaced now. `short`: a pending write set cannot reach Qa; `pressed`: half of W5's
    /// budget is used.
    pub(super) fn wants_replacement(
        &self,
        short: bool,
        pressed: bool,
        now: Instant,
        config: &LedgerClientConfig,
    ) -> bool {
        let Some(since) = self.failing_since else { return false };
        if self.suspended {
            return short;
        }
        self.hard || short || pressed || now >= since + config.resend_for
    }
}
