//! The auditor (A1, DC1): one loop that looks, declares, lists, and proves. Everything it decides on is in the store, so that
//! any other one goes on where it ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use geminga_bookie_client::ensemble::LimboBound;
use geminga_metadata::{
    Committed, Compare, Election, Key, Op, RangeRequest, StoreError, Txn, commit,
    keys::{self, ParsedKey},
};
use geminga_proto::{ids::Incarnation, storage::v1 as wire};
use prost::Message;
use tokio::time::Instant;

use super::{
    AutoRecoveryParts,
    absences::Absences,
    drain, repair,
    scan::{self, Scan, Wanted},
    view::View,
};

/// The task's state: only what may be lost with it.
pub(crate) struct Auditor {
    parts: AutoRecoveryParts,
    election: Election,
    leads: bool,
    absences: Absences,
    scanned: Option<Instant>,
    /// How long that took.
    scan_took: Duration,
    /// Whom ledgers named at the last scan.
    named: BTreeSet<Incarnation>,
    /// Limbo whose ledgers were listed.
    limbo_listed: BTreeMap<Incarnation, LimboBound>,
    /// The widest ensemble that the draining bookie was found in.
    ensemble: usize,
    /// The first of two scans that found no ledger naming this incarnation.
    unnamed: Option<(Incarnation, Instant)>,
    check: Check,
}

/// Where the periodic check of all copies is.
struct Check {
    /// When the next one starts.
    due: Instant,
    /// The last ledger checked; none between two checks.
    after: Option<Key>,
}

impl Auditor {
    pub(crate) fn new(parts: AutoRecoveryParts, election: Election) -> Self {
        // Sooner than the interval: auditors change, and each begins anew.
        let due = Instant::now() + parts.config.check_interval / 7;
        let ensemble = parts.config.ensemble_size;
        Self {
            parts,
            election,
            leads: false,
            absences: Absences::default(),
            scanned: None,
            scan_took: Duration::ZERO,
            named: BTreeSet::new(),
            limbo_listed: BTreeMap::new(),
            ensemble,
            unnamed: None,
            check: Check { due, after: None },
        }
    }

    /// Stands for the role and audits while it has it, until cancelled.
    pub(crate) async fn run(mut self) {
        let cancelled = self.parts.tasks.token();
        loop {
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return,
                () = tokio::time::sleep(self.parts.config.audit_interval) => {}
            }
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return,
                result = self.turn() => if let Err(error) = result {
                    tracing::debug!(%error, "audit ended early");
                }
            }
        }
    }

    async fn turn(&mut self) -> Result<(), StoreError> {
        if !self.election.is_leader() {
            self.leads = false;
            return Ok(());
        }
        if !self.leads {
            // Nothing of an earlier time counts: who was not watched may have been there (T16).
            let (parts, election) = (self.parts.clone(), self.election.clone());
            *self = Self { leads: true, ..Self::new(parts, election) };
            tracing::info!(bookie_id = self.parts.bookie_id, "bookie audits");
        }
        self.audit().await
    }

    async fn audit(&mut self) -> Result<(), StoreError> {
        let mut view = View::read(&self.parts.store).await?;
        let now = Instant::now();
        let current = view.cookies.values().map(|cookie| cookie.incarnation);
        let known: BTreeSet<_> = current.chain(self.named.iter().copied()).collect();
        self.absences.look(&known, |incarnation| view.is_registered(incarnation), now);
        self.parts.metrics.lost.set(view.lost.len() as i64);
        self.welcome_back(&view).await?;
        if view.paused {
            return Ok(());
        }
        self.admit(&mut view).await?;
        let missing = self.absences.ripe(self.parts.config.lost_after, now);
        let busy = !view.lost.is_empty() || !missing.is_empty();
        let due = self.scanned.is_none_or(|at| at + self.scan_pause(&view, busy) <= now);
        if due || self.new_limbo(&view).is_some() {
            self.scan(&view, &missing).await?;
        }
        self.check_copies().await
    }

    /// From one full scan to the next. A drain goes on, and is proven, with scans only: it gets a tenth of the time for them,
    /// so that it waits for them little where the ledgers are few.
    fn scan_pause(&self, view: &View, busy: bool) -> Duration {
        let config = &self.parts.config;
        if view.draining().is_some() {
            (10 * self.scan_took).max(config.audit_interval).min(config.scan_interval)
        } else if busy || !view.wishes.is_empty() {
            config.scan_interval
        } else {
            config.idle_scan_interval
        }
    }

    /// A1: `lost/` goes when the incarnation is back.
    async fn welcome_back(&self, view: &View) -> Result<(), StoreError> {
        for (lost, revision) in &view.lost {
            if view.is_registered(*lost) {
                tracing::info!(incarnation = lost.0, "lost incarnation is back");
                self.unlose(*lost, *revision).await?;
            }
        }
        Ok(())
    }

    async fn unlose(
        &self,
        lost: Incarnation,
        revision: geminga_metadata::Revision,
    ) -> Result<(), StoreError> {
        let key = keys::lost(lost);
        let txn =
            Txn::new().when(Compare::ModRevision(key.clone(), revision)).then(Op::Delete(key));
        self.parts.store.txn(txn).await.map(drop) // exempt from MD3
    }

    /// Tells every wish whether its drain may go on (DC1).
    async fn admit(&mut self, view: &mut View) -> Result<(), StoreError> {
        for at in 0..view.wishes.len() {
            let wish = view.wishes[at].clone();
            let refusal = drain::refusal(view, &wish, self.ensemble);
            let waits = wish.value.blocked.starts_with(super::WAITS);
            let blocked = match refusal {
                Some(refusal) => refusal,
                None if waits => String::new(),
                None => continue,
            };
            if blocked != wish.value.blocked {
                tracing::info!(bookie_id = wish.bookie, blocked, "drain waits or goes on");
                let value = wire::Draining { format: 1, blocked, ..wish.value };
                self.write_wish(view, at, value).await?;
            }
        }
        Ok(())
    }

    /// Writes a wish's value, unless the operator changed or withdrew it meanwhile.
    async fn write_wish(
        &self,
        view: &mut View,
        at: usize,
        value: wire::Draining,
    ) -> Result<(), StoreError> {
        let wish = &mut view.wishes[at];
        let key = keys::draining_bookie(&wish.bookie);
        let txn = Txn::new()
            .when(Compare::ModRevision(key.clone(), wish.revision))
            .then(Op::put(key, value.encode_to_vec()));
        let token = self.parts.tasks.token();
        if let Committed::Done(revision) = commit(&self.parts.store, &txn, &token).await {
            (wish.value, wish.revision) = (value, revision);
        }
        Ok(())
    }

    /// A registration in limbo whose ledgers this auditor has not listed (I5: from detection by D8).
    fn new_limbo(&self, view: &View) -> Option<BTreeMap<Incarnation, LimboBound>> {
        let limbo: BTreeMap<_, _> = view
            .registered
            .iter()
            .filter_map(|(incarnation, found)| Some((*incarnation, found.available.limbo?)))
            .filter(|(incarnation, bound)| self.limbo_listed.get(incarnation) != Some(bound))
            .collect();
        (!limbo.is_empty()).then_some(limbo)
    }

    async fn scan(&mut self, view: &View, missing: &[Incarnation]) -> Result<(), StoreError> {
        let parts = &self.parts;
        let mut condemned = view.condemned();
        condemned.extend(missing);
        let limbo = self.new_limbo(view).unwrap_or_default();
        let draining = view.draining();
        let draining_incarnation = draining.map(|draining| draining.1);
        let wanted = Wanted { condemned, limbo, draining: draining_incarnation };
        let begun = Instant::now();
        let scan = scan::scan(&parts.store, &wanted).await?;
        parts.metrics.scans.inc();
        self.scanned = Some(Instant::now());
        self.scan_took = begun.elapsed();
        self.named.clone_from(&scan.named);
        // One without ledgers is missed by nobody, and its key would go with the next scan.
        for lost in missing.iter().filter(|missing| scan.named.contains(missing)) {
            self.declare_lost(view, *lost).await?;
        }
        let parts = &self.parts;
        let pause = parts.config.listing_pause;
        let reason = "a holder is lost, revoked, in limbo or leaves, or a slot is vacant";
        let listed = scan::list(&parts.store, &parts.clock, &scan.to_list, reason, pause).await?;
        parts.metrics.listed_by_audit.inc_by(listed);
        self.limbo_listed.extend(wanted.limbo);
        for (lost, revision) in &view.lost {
            if *revision <= scan.revision && scan.proves_unnamed(*lost) {
                tracing::info!(
                    incarnation = lost.0,
                    "no ledger names the lost incarnation any more"
                );
                self.unlose(*lost, *revision).await?;
            }
        }
        self.drain(view.clone(), &scan).await
    }

    async fn declare_lost(&self, view: &View, lost: Incarnation) -> Result<(), StoreError> {
        if view.lost.contains_key(&lost) {
            return Ok(());
        }
        tracing::warn!(incarnation = lost.0, "incarnation is lost: its ledgers are copied");
        let value = wire::Lost { format: 1, at_ms: self.parts.clock.now().0 };
        let key = keys::lost(lost);
        let txn =
            Txn::new().when(Compare::Absent(key.clone())).then(Op::put(key, value.encode_to_vec()));
        self.parts.store.txn(txn).await.map(drop) // exempt from MD3
    }

    /// DC1: how far the drain is; and its end, once two scans a while apart found no ledger naming the incarnation while it
    /// was out of service. One scan alone could miss a ledger that was planned before the bookie left service, and is
    /// created after the scan.
    async fn drain(&mut self, mut view: View, scan: &Scan) -> Result<(), StoreError> {
        let Some((wish, incarnation)) = view.draining() else {
            self.unnamed = None;
            self.ensemble = self.parts.config.ensemble_size;
            return Ok(());
        };
        let bookie = wish.bookie.clone();
        let value = drain::progress(&wish.value, scan.left);
        let changed = value != wish.value;
        self.ensemble = self.parts.config.ensemble_size.max(scan.left.ensemble);
        let Some(at) = view.wishes.iter().position(|wish| wish.bookie == bookie) else {
            return Ok(());
        };
        if changed {
            self.write_wish(&mut view, at, value).await?;
        }
        let in_service = view.registered.get(&incarnation).is_some_and(|r| !r.available.draining);
        if in_service || !view.confirmed || !scan.proves_unnamed(incarnation) {
            self.unnamed = None;
            return Ok(());
        }
        let now = Instant::now();
        match self.unnamed {
            Some((first, at)) if first == incarnation => {
                if at + self.parts.config.proof_apart > now {
                    return Ok(());
                }
            }
            _ => {
                self.unnamed = Some((incarnation, now));
                return Ok(());
            }
        }
        self.finish(&view, at, scan).await
    }

    /// Removes the cookie, with the proof, in one transaction; only then may the volume go (DC1, D7, T17).
    async fn finish(&self, view: &View, at: usize, scan: &Scan) -> Result<(), StoreError> {
        let wish = &view.wishes[at];
        let Some(cookie) = view.cookies.get(&wish.bookie) else { return Ok(()) };
        let (wished, key) = (keys::draining_bookie(&wish.bookie), keys::cookie(&wish.bookie));
        let value = wire::Draining {
            bytes_left: 0,
            ledgers_left: 0,
            blocked: String::new(),
            proof_revision: scan.revision.0,
            ..wish.value.clone()
        };
        let txn = Txn::new()
            .when(Compare::ModRevision(key.clone(), cookie.revision))
            .when(Compare::ModRevision(wished.clone(), wish.revision))
            .then(Op::Delete(key))
            .then(Op::put(wished, value.encode_to_vec()));
        let token = self.parts.tasks.token();
        match commit(&self.parts.store, &txn, &token).await {
            Committed::Done(_) => {
                let proof = scan.revision.0;
                tracing::info!(bookie_id = wish.bookie, proof, "bookie is drained");
                Ok(())
            }
            Committed::Refused(error) => Err(error),
            // Withdrawn meanwhile, or an earlier try landed: the next audit reads which.
            Committed::Conflict { .. } | Committed::Unsettled => Ok(()),
        }
    }

    /// A1's periodic check: what LIST shows against what the metadata says, a few ledgers at a time.
    async fn check_copies(&mut self) -> Result<(), StoreError> {
        let now = Instant::now();
        if self.check.after.is_none() && self.check.due > now {
            return Ok(());
        }
        let (store, config) = (&self.parts.store, &self.parts.config);
        let after = self.check.after.take();
        let request =
            RangeRequest { prefix: keys::ledgers(), after, limit: config.check_batch, at: None };
        let page = store.range(request).await?;
        let mut short = Vec::new();
        for item in &page.items {
            let Some(ParsedKey::Ledger(id)) = keys::parse(&item.key) else { continue };
            if repair::lacks_copies(&self.parts, item).await {
                short.push(id);
            }
            self.parts.metrics.checked.inc();
        }
        let reason = "the periodic check found a copy short";
        let clock = &self.parts.clock;
        let listed = scan::list(store, clock, &short, reason, config.listing_pause).await?;
        self.parts.metrics.listed_by_audit.inc_by(listed);
        self.check.after = page.items.last().map(|last| last.key.clone()).filter(|_| page.more);
        if self.check.after.is_none() {
            self.check.due = now + config.check_interval;
        }
        Ok(())
    }
}
