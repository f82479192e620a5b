//! The store as one pure state machine: transactions and leases over [`Data`]. No clock inside: time is a monotonic
//! duration that the caller passes in. Shared by the in-memory and the embedded form.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use crate::{
    Compare, Key, KeyValue, LeaseId, Op, Revision, StoreError, TXN_BYTES_MAX, TXN_OPS_MAX, Txn,
    TxnOutcome,
    data::{Applied, Data, Event},
};

/// The shortest lease; a shorter one is lengthened to this.
pub(crate) const LEASE_TTL_MIN: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
struct Lease {
    ttl: Duration,
    deadline: Duration,
    keys: BTreeSet<Key>,
}

#[derive(Clone, Debug)]
pub(crate) struct State {
    data: Data,
    leases: BTreeMap<LeaseId, Lease>,
    next_lease: i64,
    /// What happened since it was last taken, where somebody has to make it durable.
    fresh: Option<Vec<Arc<Applied>>>,
}

impl State {
    /// No leases; the first one will be `first_lease`, 1 at least.
    pub(crate) fn new(data: Data, first_lease: i64) -> Self {
        Self { data, leases: BTreeMap::new(), next_lease: first_lease.max(1), fresh: None }
    }

    /// Keeps what happens for [`Self::take_fresh`].
    pub(crate) fn recording(mut self) -> Self {
        self.fresh = Some(Vec::new());
        self
    }

    /// What happened since the last call, oldest first.
    pub(crate) fn take_fresh(&mut self) -> Vec<Arc<Applied>> {
        self.fresh.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(crate) fn data(&self) -> &Data {
        &self.data
    }

    pub(crate) fn compact(&mut self, revision: Revision) {
        self.data.compact(revision);
    }

    /// Carries out a transaction; an error changed nothing.
    pub(crate) fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome, StoreError> {
        check_limits(txn)?;
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            let found = txn.compares.iter().map(|c| self.data.get(c.key()).cloned()).collect();
            return Ok(TxnOutcome::Conflict { revision: self.data.revision(), found });
        }
        for change in &txn.changes {
            if let Op::Put { lease: Some(lease), .. } = change
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseGone(*lease));
            }
        }
        let revision = Revision(self.data.revision().0 + 1);
        let events = txn.changes.iter().filter_map(|op| self.event(op, revision)).collect();
        self.apply(events);
        Ok(TxnOutcome::Done(self.data.revision()))
    }

    fn holds(&self, compare: &Compare) -> bool {
        let found = self.data.get(compare.key());
        match compare {
            Compare::Absent(_) => found.is_none(),
            Compare::Present(_) => found.is_some(),
            Compare::ModRevision(_, at) => found.is_some_and(|found| found.mod_revision == *at),
            Compare::CreateRevision(_, at) => {
                found.is_some_and(|found| found.create_revision == *at)
            }
        }
    }

    fn event(&self, op: &Op, revision: Revision) -> Option<Event> {
        let before = self.data.get(op.key()).cloned();
        let after = match op {
            Op::Delete(_) => {
                before.as_ref()?;
                None
            }
            Op::Put { key, value, lease } => Some(KeyValue {
                key: key.clone(),
                value: value.clone(),
                create_revision: before.as_ref().map_or(revision, |before| before.create_revision),
                mod_revision: revision,
                lease: *lease,
            }),
        };
        Some(Event { key: op.key().clone(), before, after })
    }

    /// One revision for all the events; none for none.
    fn apply(&mut self, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        for event in &events {
            let lease_of = |found: &Option<KeyValue>| found.as_ref().and_then(|found| found.lease);
            if let Some(lease) = lease_of(&event.before).and_then(|id| self.leases.get_mut(&id)) {
                lease.keys.remove(&event.key);
            }
            if let Some(lease) = lease_of(&event.after).and_then(|id| self.leases.get_mut(&id)) {
                lease.keys.insert(event.key.clone());
            }
        }
        let revision = Revision(self.data.revision().0 + 1);
        let applied = Arc::new(Applied { revision, events });
        if let Some(fresh) = &mut self.fresh {
            fresh.push(Arc::clone(&applied));
        }
        self.data.apply(applied);
    }

    pub(crate) fn grant(&mut self, now: Duration, ttl: Duration) -> LeaseId {
        let id = LeaseId(self.next_lease);
        self.next_lease += 1;
        let ttl = ttl.max(LEASE_TTL_MIN);
        let deadline = now.saturating_add(ttl);
        self.leases.insert(id, Lease { ttl, deadline, keys: BTreeSet::new() });
        id
    }

    /// Renews to the full length from now. A lease past its deadline is gone, whether or not it was swept yet.
    pub(crate) fn keep_alive(&mut self, now: Duration, id: LeaseId) -> Result<(), StoreError> {
        match self.leases.get_mut(&id) {
            Some(lease) if lease.deadline > now => {
                lease.deadline = now.saturating_add(lease.ttl);
                Ok(())
            }
            _ => Err(StoreError::LeaseGone(id)),
        }
    }

    /// Ends a lease; its keys go in one revision.
    pub(crate) fn revoke(&mut self, id: LeaseId) -> Result<(), StoreError> {
        let lease = self.leases.remove(&id).ok_or(StoreError::LeaseGone(id))?;
        self.remove_keys(&lease.keys);
        Ok(())
    }

    /// Ends every lease whose deadline has come, the oldest deadline first, each in a revision of its own.
    pub(crate) fn expire(&mut self, now: Duration) {
        let mut due: Vec<(Duration, LeaseId)> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.deadline <= now)
            .map(|(id, lease)| (lease.deadline, *id))
            .collect();
        due.sort_unstable();
        for (_, id) in due {
            self.revoke(id).expect("the lease was listed a moment ago");
        }
    }

    /// Ends every lease and removes every key that names one, in one revision: all holders are dead.
    pub(crate) fn drop_leases(&mut self) {
        self.leases.clear();
        let leased = |found: &&KeyValue| found.lease.is_some();
        let keys = self.data.keys().values().filter(leased).map(|found| found.key.clone());
        let keys: BTreeSet<Key> = keys.collect();
        self.remove_keys(&keys);
    }

    fn remove_keys(&mut self, keys: &BTreeSet<Key>) {
        let revision = Revision(self.data.revision().0 + 1);
        let remove = |key: &Key| self.event(&Op::Delete(key.clone()), revision);
        let events = keys.iter().filter_map(remove).collect();
        self.apply(events);
    }

    /// When the next lease ends, unless it is renewed.
    pub(crate) fn next_deadline(&self) -> Option<Duration> {
        self.leases.values().map(|lease| lease.deadline).min()
    }
}

/// What every form refuses before it looks at any key.
pub(crate) fn check_limits(txn: &Txn) -> Result<(), StoreError> {
    let refused = |reason: String| Err(StoreError::Refused(reason));
    if txn.compares.len() > TXN_OPS_MAX || txn.changes.len() > TXN_OPS_MAX {
        return refused(format!(
            "{} conditions and {} changes, at most {TXN_OPS_MAX} of each",
            txn.compares.len(),
            txn.changes.len()
        ));
    }
    let mut bytes: usize = txn.compares.iter().map(|compare| compare.key().0.len()).sum();
    let mut changed = BTreeSet::new();
    for change in &txn.changes {
        bytes += change.key().0.len();
        if let Op::Put { value, .. } = change {
            bytes += value.len();
        }
        if !changed.insert(change.key()) {
            return refused(format!("key {} is changed twice", change.key()));
        }
        if change.key().0.is_empty() {
            return refused("a key is empty".to_owned());
        }
    }
    if bytes > TXN_BYTES_MAX {
        return refused(format!("{bytes} bytes, at most {TXN_BYTES_MAX}"));
    }
    Ok(())
}

/// As [`check_limits`], for reads of several keys.
pub(crate) fn check_many(keys: &[Key]) -> Result<(), StoreError> {
    if keys.len() > TXN_OPS_MAX {
        return Err(StoreError::Refused(format!("{} keys, at most {TXN_OPS_MAX}", keys.len())));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
