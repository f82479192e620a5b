//! Who does the work of a role that one process should do: for efficiency only.

use std::{fmt, time::Duration};

use bytes::Bytes;
use geminga_proto::storage::v1 as storage;
use geminga_runtime::tasks::Tasks;
use prost::Message;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Compare, Key, LeaseId, LeaseKeeper, Op, Revision, SharedStore, StoreError, Txn, TxnOutcome,
    keys,
};

/// Format of the values written here.
const FORMAT: u32 = 1;
/// The key is read again after this long, or a third of the lease if that is shorter, whatever its watch says.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// After a failed look.
const PAUSE: Duration = Duration::from_millis(500);

/// Handle to a candidacy for a role: the holder of `elections/<role>` leads. Clones share it.
///
/// **Two may lead at once**: a holder whose lease ran out learns it a moment after its successor took over (O1). So the
/// work of a role must be harmless when two do it: every change it makes is a transaction on what it read (MD1). What is
/// saved is only that ten processes do not do the same work.
///
/// A leader lets go when its lease is lost, when the key is another's, and when nobody confirmed the lease for its length.
#[derive(Clone)]
pub struct Election {
    leads: watch::Receiver<bool>,
}

impl fmt::Debug for Election {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Election").field("leads", &self.is_leader()).finish()
    }
}

impl Election {
    /// Stands for a role in a task of `tasks`, under the lease of `lease`, until either ends. `holder` and `instance` are
    /// what others read; the instance must differ from that of every other process.
    #[must_use]
    pub fn start(
        store: SharedStore,
        role: &str,
        holder: &str,
        instance: [u8; 16],
        lease: LeaseKeeper,
        tasks: &Tasks,
    ) -> Self {
        let value = storage::Election {
            format: FORMAT,
            holder: holder.to_owned(),
            instance: Bytes::copy_from_slice(&instance),
        };
        let value = Bytes::from(value.encode_to_vec());
        let candidate = Candidate { store, key: keys::election(role), value, lease };
        let (sender, leads) = watch::channel(false);
        tasks.spawn("election", candidate.stand(Leads(sender), tasks.token()));
        Self { leads }
    }

    /// Whether this process should do the work now. A hint: ask before each piece of it.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        *self.leads.borrow()
    }

    /// The same as it changes. Closed when the candidacy has ended.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.leads.clone()
    }
}

/// Tells that nobody leads here when the task ends, in whatever way.
struct Leads(watch::Sender<bool>);

impl Leads {
    fn set(&self, leads: bool, role: &Key) {
        if self.0.send_if_modified(|now| std::mem::replace(now, leads) != leads) {
            tracing::info!(%role, leads, "leadership changed");
        }
    }
}

impl Drop for Leads {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

struct Candidate {
    store: SharedStore,
    key: Key,
    value: Bytes,
    lease: LeaseKeeper,
}

impl Candidate {
    async fn stand(self, leads: Leads, stop: CancellationToken) {
        loop {
            let lease = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                lease = self.lease.held() => lease,
            };
            let Some(lease) = lease else { return }; // the keeper has ended
            let looked = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.lease.lost(lease) => { leads.set(false, &self.key); continue }
                looked = self.look(lease) => looked,
            };
            let (seen, wait) = match looked {
                Ok((leading, seen)) => {
                    leads.set(leading, &self.key);
                    (Some(seen), LOOK_AGAIN.min(self.lease.ttl() / 3))
                }
                Err(error) => {
                    tracing::debug!(%error, role = %self.key, "election is looked at again");
                    if !self.lease.confirmed_within(self.lease.ttl()) {
                        leads.set(false, &self.key);
                    }
                    (None, PAUSE)
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.lease.lost(lease) => leads.set(false, &self.key),
                () = self.changed(seen) => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Takes the key if nobody holds it, or if an earlier lease of this process does. Whether it is held now, as of which
    /// revision. A lost answer does no harm: the next look finds what stands.
    async fn look(&self, lease: LeaseId) -> Result<(bool, Revision), StoreError> {
        let (revision, found) = self.store.get(&self.key).await?;
        let condition = match found {
            None => Compare::Absent(self.key.clone()),
            Some(found) if found.value != self.value => return Ok((false, revision)),
            Some(found) if found.lease == Some(lease) => return Ok((true, revision)),
            Some(found) => Compare::ModRevision(self.key.clone(), found.mod_revision),
        };
        let put = Op::Put { key: self.key.clone(), value: self.value.clone(), lease: Some(lease) };
        match self.store.txn(Txn::new().when(condition).then(put)).await? {
            TxnOutcome::Done(revision) => Ok((true, revision)),
            TxnOutcome::Conflict { revision, .. } => Ok((false, revision)),
        }
    }

    /// Waits for a change of the key after this revision; for ever where that cannot be told.
    async fn changed(&self, seen: Option<Revision>) {
        if let Some(Revision(seen)) = seen
            && let Ok(mut watch) = self.store.watch(&self.key, Revision(seen + 1)).await
            && watch.next().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use geminga_runtime::random::Random;
    use tokio::time::Instant;

    use super::*;
    use crate::{FaultPlan, FaultyStore, MemoryStore, MetadataStore};

    const TTL: Duration = Duration::from_secs(5);

    struct Process {
        tasks: Tasks,
        keeper: LeaseKeeper,
        election: Election,
    }

    fn process(store: SharedStore, number: u8) -> Process {
        let tasks = Tasks::new(format!("process {number}"));
        let keeper = LeaseKeeper::start(store.clone(), TTL, &tasks);
        let holder = format!("p{number}");
        let election =
            Election::start(store, "auditor", &holder, [number; 16], keeper.clone(), &tasks);
        Process { tasks, keeper, election }
    }

    async fn leads(election: &Election, wanted: bool) {
        let mut leads = election.watch();
        let come = leads.wait_for(|leads| *leads == wanted);
        let come = tokio::time::timeout(TTL * 20, come).await.expect("it comes to that");
        come.expect("the candidacy goes on");
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_and_another_takes_over_when_its_lease_runs_out() {
        let store = MemoryStore::new();
        let first = process(Arc::new(store.clone()), 1);
        leads(&first.election, true).await;
        let second = process(Arc::new(store.clone()), 2);
        tokio::time::sleep(TTL * 10).await;
        assert!(first.election.is_leader() && !second.election.is_leader());
        let died = Instant::now();
        first.tasks.abort(); // as kill -9: the lease runs out
        leads(&second.election, true).await;
        assert!(died.elapsed() <= TTL + Duration::from_secs(1), "{:?}", died.elapsed());
        tokio::task::yield_now().await;
        assert!(!first.election.is_leader());
        let found = store.get(&keys::election("auditor")).await.expect("read").1.expect("held");
        let value = storage::Election::decode(&found.value[..]).expect("valid");
        assert_eq!((value.holder.as_str(), &value.instance[..]), ("p2", &[2; 16][..]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clean_end_hands_over_at_once() {
        let store = MemoryStore::new();
        let first = process(Arc::new(store.clone()), 1);
        leads(&first.election, true).await;
        let second = process(Arc::new(store.clone()), 2);
        second.keeper.held().await;
        let ended = Instant::now();
        first.keeper.end().await;
        leads(&second.election, true).await;
        assert!(ended.elapsed() < Duration::from_secs(1), "{:?}", ended.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_lease_ends_leadership_and_a_new_one_may_win_again() {
        let store = MemoryStore::new();
        let only = process(Arc::new(store.clone()), 1);
        leads(&only.election, true).await;
        let mut watch = only.election.watch();
        watch.mark_unchanged();
        store.expire_lease(only.keeper.current().expect("held"));
        let told = tokio::time::timeout(TTL * 20, watch.changed()).await;
        told.expect("told").expect("let go, and perhaps won again already");
        leads(&only.election, true).await;
        let found = store.get(&keys::election("auditor")).await.expect("read").1.expect("held");
        assert_eq!(found.lease, only.keeper.current());
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_cut_off_from_the_store_lets_go_when_its_lease_is_no_longer_confirmed() {
        let memory = MemoryStore::new();
        let tasks = Tasks::new("network");
        let plan = FaultPlan::default();
        let cut_off =
            FaultyStore::new(Arc::new(memory.clone()), Random::from_seed(1), plan, &tasks);
        let first = process(Arc::new(cut_off.clone()), 1);
        leads(&first.election, true).await;
        let second = process(Arc::new(memory), 2);
        let cut = Instant::now();
        cut_off.set_partitioned(true);
        leads(&second.election, true).await;
        leads(&first.election, false).await;
        assert!(cut.elapsed() <= TTL + TTL / 3 + PAUSE, "{:?}", cut.elapsed());
    }
}
