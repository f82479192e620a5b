//! A cluster whose answers the test chooses, and an operator in this process that asks it.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use geminga_operator::{
    crd::PolicyValues,
    metrics::Metrics,
    operator::{OperatorConfig, OperatorParts, run},
    server::{BookieFacts, ClusterFacts, DrainFacts, Server, ServerError, Servers},
    thing::{Found, Thing},
};
use geminga_runtime::{clock::SystemClock, random::Random, tasks::Tasks};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::apiserver::{Kubernetes, NAMESPACE};

/// The cluster. Clones share it.
#[derive(Clone)]
pub(crate) struct Scripted(Arc<Mutex<State>>);

struct State {
    /// None: nobody answers.
    facts: Option<ClusterFacts>,
    policies: PolicyValues,
    calls: Vec<String>,
}

impl Scripted {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(State {
            facts: None,
            policies: PolicyValues::new(),
            calls: Vec::new(),
        })))
    }

    /// Changes what it says.
    pub(crate) fn say(&self, change: impl FnOnce(&mut ClusterFacts)) {
        let mut state = self.0.lock().expect("no panic");
        change(
            state
                .facts
                .get_or_insert_with(|| ClusterFacts { id: "c1".into(), ..ClusterFacts::default() }),
        );
    }

    /// Changes what it says of a bookie; one that is not there joins.
    pub(crate) fn bookie(&self, id: &str, change: impl FnOnce(&mut BookieFacts)) {
        self.say(|facts| {
            if !facts.bookies.iter().any(|bookie| bookie.id == id) {
                let joined = BookieFacts { id: id.to_owned(), ..BookieFacts::default() };
                facts.bookies.push(joined);
            }
            let found = facts.bookies.iter_mut().find(|bookie| bookie.id == id);
            change(found.expect("it is there now"));
        });
    }

    /// What was asked to change so far.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.0.lock().expect("no panic").calls.clone()
    }

    fn called(&self, call: String) {
        self.0.lock().expect("no panic").calls.push(call);
    }

    /// An operator of this process; it ends when the guard is dropped.
    pub(crate) fn operator(&self, kubernetes: &Kubernetes, id: &str) -> Running {
        let stop = CancellationToken::new();
        let tasks = Tasks::new("operator");
        let parts = OperatorParts {
            client: kubernetes.operator_client(),
            servers: Arc::new(self.clone()),
            address: Arc::new(|_, name| format!("scripted://{name}")),
            clock: Arc::new(SystemClock),
            random: Random::from_os(),
            tasks: tasks.child("controllers"),
            metrics: Metrics::default(),
            ready: watch::channel(false).0,
            config: OperatorConfig {
                namespace: Some(NAMESPACE.into()),
                id: id.into(),
                lease_namespace: NAMESPACE.into(),
                lease_name: "geminga-operator".into(),
                lease_length: std::time::Duration::from_secs(2),
                resync: std::time::Duration::from_millis(300),
            },
        };
        tasks.spawn("operator", run(parts, stop.clone()));
        Running(stop, tasks)
    }
}

/// A running operator.
pub(crate) struct Running(CancellationToken, Tasks);

impl Running {
    /// `kill -9`: nothing is given back.
    pub(crate) fn kill(self) {
        self.1.abort();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.cancel();
        self.1.abort();
    }
}

#[async_trait]
impl Servers for Scripted {
    async fn connect(&self, _addresses: &str) -> Result<Arc<dyn Server>, ServerError> {
        Ok(Arc::new(self.clone()))
    }
}

#[async_trait]
impl Server for Scripted {
    async fn cluster(&self) -> Result<ClusterFacts, ServerError> {
        let facts = self.0.lock().expect("no panic").facts.clone();
        facts.ok_or_else(|| ServerError::Unreachable("nobody answers".into()))
    }

    async fn drain_bookie(&self, id: &str, cancel: bool) -> Result<(), ServerError> {
        self.called(format!("{} {id}", if cancel { "cancel" } else { "drain" }));
        self.bookie(id, |bookie| {
            bookie.draining = !cancel;
            bookie.drain = (!cancel).then(|| DrainFacts { ledgers_left: 5, ..Default::default() });
        });
        Ok(())
    }

    async fn find(&self, thing: &Thing) -> Result<Option<Found>, ServerError> {
        let name = thing.full_name();
        assert!(!name.ends_with("/poison"), "the test wants a panic");
        Ok(None)
    }

    async fn create(&self, thing: &Thing) -> Result<(), ServerError> {
        self.called(format!("create {thing}"));
        Ok(())
    }

    async fn update(&self, thing: &Thing) -> Result<(), ServerError> {
        self.called(format!("update {thing}"));
        Ok(())
    }

    async fn delete(&self, thing: &Thing) -> Result<(), ServerError> {
        self.called(format!("delete {thing}"));
        Ok(())
    }

    async fn policies(&self, _scope: &str) -> Result<PolicyValues, ServerError> {
        Ok(self.0.lock().expect("no panic").policies.clone())
    }

    async fn set_policies(
        &self,
        scope: &str,
        set: &PolicyValues,
        unset: &[String],
    ) -> Result<(), ServerError> {
        self.called(format!("policies of {scope:?}"));
        let mut state = self.0.lock().expect("no panic");
        state.policies.extend(set.clone());
        state.policies.retain(|name, _| !unset.contains(name));
        Ok(())
    }
}
