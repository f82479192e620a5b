//! The parts every run shares: one store, one network, one clock, one history, all from one seed.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use geminga_bookie_client::{
    ClientMetrics, LedgerClient, LedgerClientConfig, LedgerClientParts,
    bookie_rpc::loopback::Loopback,
};
use geminga_metadata::{FaultPlan, FaultyStore, MemoryStore, SharedStore, Standing};
use geminga_runtime::{
    clock::{ManualClock, SharedClock, Timestamp},
    random::Random,
    tasks::Tasks,
};

use super::{
    claims,
    history::History,
    network::Network,
    observe::ObservedStore,
    store_view::{StoreView, TxnBook},
};

/// One run's world. Actors hold it in an `Arc`.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) history: History,
    /// The seed's stream. Every actor takes a fork when it starts, so that its draws do not depend on the others'.
    pub(crate) random: Random,
    pub(crate) clock: ManualClock,
    /// The truth, with every change recorded: what everyone uses, most through a faulty view.
    pub(crate) observed: SharedStore,
    pub(crate) loopback: Loopback,
    pub(crate) network: Network,
    /// Owner of what outlives every process: messages and transactions under way.
    pub(crate) ether: Tasks,
    next_ledger: AtomicU64,
    next_incarnation: AtomicU32,
    book: TxnBook,
    views: Mutex<Vec<StoreView>>,
}

/// Virtual time starts here.
const START: Timestamp = Timestamp(1_800_000_000_000);

impl World {
    /// A new world; call it inside the run's runtime.
    pub(crate) fn new(seed: u64, trace: bool) -> Arc<Self> {
        let history = History::new(trace);
        let random = Random::from_seed(seed);
        let ether = Tasks::new("ether");
        let book = TxnBook::default();
        let observed: SharedStore = Arc::new(ObservedStore::new(
            Arc::new(MemoryStore::new()),
            history.clone(),
            book.clone(),
        ));
        let loopback = Loopback::new();
        let network = Network::new(loopback.clone(), random.fork(), ether.clone(), history.clone());
        Arc::new(Self {
            history,
            random,
            clock: ManualClock::new(START),
            observed,
            book,
            loopback,
            network,
            ether,
            next_ledger: AtomicU64::new(1),
            next_incarnation: AtomicU32::new(1),
            views: Mutex::default(),
        })
    }

    /// A number no ledger has.
    pub(crate) fn next_ledger(&self) -> u64 {
        self.next_ledger.fetch_add(1, Ordering::Relaxed)
    }

    /// For bookies that do not get theirs from the store.
    pub(crate) fn next_incarnation(&self) -> u32 {
        self.next_incarnation.fetch_add(1, Ordering::Relaxed)
    }

    /// A view of the store that can fail.
    pub(crate) fn store_view(&self, plan: FaultPlan) -> StoreView {
        let faulty = FaultyStore::new(self.observed.clone(), self.random.fork(), plan, &self.ether);
        let view = StoreView::new(faulty, self.book.clone(), self.history.clone());
        self.views.lock().expect("no panic in here").push(view.clone());
        view
    }

    /// Store and network work from now on.
    pub(crate) fn heal(&self) {
        for view in self.views.lock().expect("no panic in here").iter() {
            view.set_plan(FaultPlan::default());
            view.set_partitioned(false);
        }
        self.network.heal();
    }

    /// A process with a ledger client in it.
    pub(crate) fn client(&self, number: u32, plan: FaultPlan) -> ClientNode {
        let random = self.random.fork();
        let store = self.store_view(plan);
        self.client_over(number, store, random, Standing::always())
    }

    /// The same over a view of the store that the process uses for other things as well.
    pub(crate) fn client_over(
        &self,
        number: u32,
        store: StoreView,
        random: Random,
        standing: Standing,
    ) -> ClientNode {
        let tasks = Tasks::new(format!("client-{number}"));
        let config = LedgerClientConfig {
            add_timeout: Duration::from_millis(500 + random.below(4_500)),
            read_timeout: Duration::from_millis(500 + random.below(4_500)),
            resend_for: Duration::from_millis(200 + random.below(20_000)),
            short_patience: Duration::from_millis(500 + random.below(9_500)),
            lac_delay: Duration::from_millis(random.below(100)),
            seal_patience: Duration::from_millis(100 + random.below(10_000)),
            recovery_patience: Duration::from_millis(2_000 + random.below(30_000)),
            writer_entries_max: 4 + random.below(200) as usize,
            recovery_window: 1 + random.below(40) as usize,
            ..LedgerClientConfig::default()
        };
        let client = LedgerClient::new(LedgerClientParts {
            store: Arc::new(store.clone()),
            bookies: self.network.view(number),
            clock: self.shared_clock(),
            random,
            tasks: tasks.clone(),
            config,
            metrics: ClientMetrics::default(),
            standing: standing.clone(),
        });
        ClientNode { number, client, store, tasks, standing }
    }

    /// A process that starts no metadata change unless its claims are confirmed (O3), and confirms them from now on.
    pub(crate) fn leased_client(self: &Arc<Self>, number: u32, plan: FaultPlan) -> ClientNode {
        let random = self.random.fork();
        let (setter, standing) = Standing::new();
        let store = self.store_view(plan);
        let node = self.client_over(number, store.clone(), random, standing.clone());
        store.watch_standing(number, standing);
        node.tasks.spawn("claims", claims::confirm(Arc::clone(self), node.clone(), setter));
        node
    }

    /// The clock, as a handle.
    pub(crate) fn shared_clock(&self) -> SharedClock {
        Arc::new(self.clock.clone())
    }
}

/// A process that uses ledgers.
#[derive(Clone, Debug)]
pub(crate) struct ClientNode {
    pub(crate) number: u32,
    pub(crate) client: LedgerClient,
    pub(crate) store: StoreView,
    /// Owner of all it runs: `abort` is kill -9.
    pub(crate) tasks: Tasks,
    /// Whether its claims are confirmed (O3).
    pub(crate) standing: Standing,
}
