//! One endpoint at a time: which, how its connection is made, when it is left for the next, and how long all of that may
//! take.
//!
//! The connection to the endpoint in use is made by the first call that needs it. A call that fails by the endpoint's
//! fault (no connection, no answer, no leader) drops it for everybody; the next call starts with the next endpoint. So a
//! hung member costs those calls one deadline that were under way, and a dead one costs nothing but a refused connection.

use std::{
    fmt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use etcd_client::{Client, Error, proto::PbResponseHeader};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use super::{config::EtcdConfig, fate::Fate, fate::fate};

/// Whether a call may be sent again while its first try may still be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Reads, renewals: doing it twice does no harm.
    Harmless,
    /// Changes: sent once, then the caller decides (MD3).
    Never,
}

pub(super) struct Endpoints {
    config: EtcdConfig,
    current: Mutex<Current>,
    /// Held while a connection is set up, so that one caller does it for all.
    setup: tokio::sync::Mutex<()>,
    /// Whether the last call was answered: only a change of that is news.
    answering: AtomicBool,
    /// The etcd cluster that answered first; 0 before that.
    cluster: AtomicU64,
}

#[derive(Default)]
struct Current {
    index: usize,
    /// Counts the endpoints that were left, so that one failure is not held against the next.
    generation: u64,
    client: Option<Client>,
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoints")
            .field("endpoints", &self.config.endpoints)
            .finish_non_exhaustive()
    }
}

impl Endpoints {
    pub(super) fn new(config: EtcdConfig) -> Self {
        let index = config.first % config.endpoints.len();
        Self {
            config,
            current: Mutex::new(Current { index, ..Current::default() }),
            setup: tokio::sync::Mutex::new(()),
            answering: AtomicBool::new(false),
            cluster: AtomicU64::new(0),
        }
    }

    /// Makes a call, within the request deadline. A call that surely was not carried out is tried on every endpoint; one
    /// that may have been, only if its repetition is harmless.
    ///
    /// Dropped, it may have been carried out or may still be; an endpoint that kept it waiting is left all the same.
    pub(super) async fn call<T, F>(
        &self,
        repeat: Repeat,
        mut send: impl FnMut(Client) -> F,
    ) -> Result<T, Fate>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let start = Instant::now();
        let deadline = start + self.config.request_deadline;
        let mut tries_left = self.config.endpoints.len();
        loop {
            tries_left -= 1;
            // A repeatable call does not spend all its time on an endpoint that may be hung.
            let until = match repeat {
                Repeat::Harmless if tries_left > 0 => {
                    let now = Instant::now();
                    now + deadline.saturating_duration_since(now) / 2
                }
                _ => deadline,
            };
            let waiting = Waiting::new(self);
            let sent = AtomicBool::new(false);
            let attempt = async {
                let client = self.client(waiting.generation).await?;
                sent.store(true, Ordering::Relaxed);
                send(client).await.map_err(|error| fate(&error))
            };
            let answer = timeout_at(until, attempt).await;
            let generation = waiting.over();
            let fate = match answer {
                Ok(Ok(answer)) => {
                    if !self.answering.swap(true, Ordering::Relaxed) {
                        tracing::info!("etcd answers");
                    }
                    return Ok(answer);
                }
                Ok(Err(fate)) => fate,
                Err(_elapsed) => no_answer(sent.load(Ordering::Relaxed), start.elapsed()),
            };
            if fate.blames_endpoint() {
                self.leave(generation, &fate);
            }
            let again = match fate {
                Fate::NotDone(_) => true,
                Fate::Unsure(_) => repeat == Repeat::Harmless,
                _ => false,
            };
            if !again || tries_left == 0 || Instant::now() >= deadline {
                return Err(fate);
            }
        }
    }

    pub(super) fn prefix(&self) -> &str {
        &self.config.prefix
    }

    /// The answer's header, if it came from the etcd cluster that answered first. Endpoints of two clusters in one list
    /// would be two stores in one; so would an etcd restored from a backup under a running process (T27).
    pub(super) fn same_cluster(
        &self,
        header: Option<PbResponseHeader>,
    ) -> Result<PbResponseHeader, Fate> {
        let header = header.ok_or_else(|| Fate::Unsure("an answer has no header".to_owned()))?;
        let first = self.cluster.compare_exchange(
            0,
            header.cluster_id,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        match first {
            Err(known) if known != header.cluster_id => {
                tracing::error!(known, found = header.cluster_id, "another etcd cluster answered");
                let fate = Fate::Unsure(format!(
                    "an endpoint belongs to etcd cluster {:x}, the first to {known:x}",
                    header.cluster_id
                ));
                let generation = self.current.lock().generation;
                self.leave(generation, &fate);
                Err(fate)
            }
            _ => Ok(header),
        }
    }

    /// The client of the endpoint in use; sets it up if there is none.
    async fn client(&self, generation: u64) -> Result<Client, Fate> {
        if let Some(client) = self.ready() {
            return Ok(client);
        }
        let _setup = self.setup.lock().await;
        if let Some(client) = self.ready() {
            return Ok(client);
        }
        let endpoint = self.config.endpoints[self.current.lock().index].clone();
        let options = self.config.options().await;
        let options = options.map_err(|error| Fate::NotDone(error.to_string()))?;
        // connects only if there is a user, to get its token
        let client = Client::connect([endpoint], Some(options)).await.map_err(|error| {
            match fate(&error) {
                // whatever it was, it was not the call
                Fate::Unsure(reason) => Fate::NotDone(reason),
                fate => fate,
            }
        })?;
        let mut current = self.current.lock();
        if current.generation == generation {
            current.client = Some(client.clone());
        }
        Ok(client)
    }

    fn ready(&self) -> Option<Client> {
        self.current.lock().client.clone()
    }

    /// Goes on to the next endpoint, unless another caller did so already.
    fn leave(&self, generation: u64, fate: &Fate) {
        let mut current = self.current.lock();
        if current.generation != generation {
            return;
        }
        let endpoint = &self.config.endpoints[current.index];
        if self.answering.swap(false, Ordering::Relaxed) {
            tracing::warn!(endpoint, ?fate, "etcd endpoint failed and the next one is asked");
        } else {
            tracing::debug!(endpoint, ?fate, "etcd endpoint does not answer");
        }
        current.index = (current.index + 1) % self.config.endpoints.len();
        current.generation += 1;
        current.client = None;
    }
}

/// One try under way. Its caller may drop it before the deadline (a lease is renewed with a shorter one): if it waited
/// long by then, the endpoint is left, or a hung one would be asked for ever.
struct Waiting<'a> {
    endpoints: &'a Endpoints,
    generation: u64,
    since: Instant,
    over: bool,
}

impl<'a> Waiting<'a> {
    fn new(endpoints: &'a Endpoints) -> Self {
        let generation = endpoints.current.lock().generation;
        Self { endpoints, generation, since: Instant::now(), over: false }
    }

    /// It was answered or ran into its deadline. The generation it began with.
    fn over(mut self) -> u64 {
        self.over = true;
        self.generation
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let waited = self.since.elapsed();
        if !self.over && waited >= self.endpoints.config.request_deadline / 4 {
            self.endpoints.leave(self.generation, &no_answer(true, waited));
        }
    }
}

fn no_answer(sent: bool, after: Duration) -> Fate {
    let reason = format!("no answer within {} ms", after.as_millis());
    if sent { Fate::Unsure(reason) } else { Fate::NotDone(reason) }
}
