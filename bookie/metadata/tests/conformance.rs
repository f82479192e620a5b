//! Every form of the store sits the same exam.

use std::sync::Arc;

use futures::{FutureExt, future::BoxFuture};
use geminga_metadata::{
    EmbeddedStore, FaultPlan, FaultyStore, LeaseId, MemoryStore, Revision, SharedStore,
    conformance::{EXAM_LEASE_TTL, Examinee, exam},
};
use geminga_runtime::{io::Io, random::Random, tasks::Tasks};
use parking_lot::Mutex;
use tempfile::TempDir;

/// In memory, on paused time; behind a faulty store without faults if asked.
struct Memory {
    latest: Mutex<MemoryStore>,
    behind_faulty: bool,
}

impl Memory {
    fn new(behind_faulty: bool) -> Self {
        Self { latest: Mutex::new(MemoryStore::new()), behind_faulty }
    }
}

impl Examinee for Memory {
    fn store(&self) -> BoxFuture<'_, SharedStore> {
        let store = MemoryStore::new();
        *self.latest.lock() = store.clone();
        let mut shared: SharedStore = Arc::new(store);
        if self.behind_faulty {
            let random = Random::from_seed(1);
            let plan = FaultPlan::default();
            shared = Arc::new(FaultyStore::new(shared, random, plan, &Tasks::new("network")));
        }
        async move { shared }.boxed()
    }

    fn run_out<'a>(&'a self, _: &'a SharedStore, _: LeaseId) -> BoxFuture<'a, ()> {
        tokio::time::sleep(EXAM_LEASE_TTL).boxed()
    }

    fn compact<'a>(&'a self, _: &'a SharedStore, revision: Revision) -> BoxFuture<'a, bool> {
        self.latest.lock().compact(revision);
        async { true }.boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn the_in_memory_store_passes_the_exam() {
    exam(&Memory::new(false)).await;
}

#[tokio::test(start_paused = true)]
async fn the_faulty_store_without_faults_passes_the_exam() {
    exam(&Memory::new(true)).await;
}

/// On disk; a directory for each question.
#[derive(Default)]
struct Embedded {
    latest: Mutex<Option<(EmbeddedStore, TempDir)>>,
}

impl Embedded {
    fn latest(&self) -> EmbeddedStore {
        self.latest.lock().as_ref().expect("opened").0.clone()
    }
}

impl Examinee for Embedded {
    fn store(&self) -> BoxFuture<'_, SharedStore> {
        async {
            let directory = TempDir::new().expect("made");
            let tasks = Tasks::new("embedded");
            let io = Io::thread("metadata");
            let store = EmbeddedStore::open(directory.path(), io, &tasks).await.expect("opened");
            *self.latest.lock() = Some((store.clone(), directory));
            let shared: SharedStore = Arc::new(store);
            shared
        }
        .boxed()
    }

    fn run_out<'a>(&'a self, _: &'a SharedStore, lease: LeaseId) -> BoxFuture<'a, ()> {
        async move { self.latest().expire_lease(lease).await.expect("expired") }.boxed()
    }

    fn compact<'a>(&'a self, _: &'a SharedStore, revision: Revision) -> BoxFuture<'a, bool> {
        async move { self.latest().compact(revision).await.is_ok() }.boxed()
    }
}

#[tokio::test]
async fn the_embedded_store_passes_the_exam() {
    exam(&Embedded::default()).await;
}
