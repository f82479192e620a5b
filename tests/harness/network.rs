//! The network between ledger clients and bookies: delays, losses, repeats, reordering, cuts, all from one seed.
//!
//! A link (client, bookie) is an ordered stream, as the real one is; copies that come late or out of order go past it.
//! A request that left is carried out even if its sender gave up or died.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{coverage::Seen, history::History};
use futures::FutureExt;
use geminga_bookie_client::bookie_rpc::{
    AddAnswer, AddRequest, Answer, BookieRpc, Bookies, EntryRange, FenceAnswer, FenceRequest,
    LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown, loopback::Loopback,
};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use geminga_runtime::{random::Random, tasks::Tasks};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout_at},
};

/// How messages fare. Probabilities from 0.0 to 1.0, times in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    pub(crate) delay_max: u64,
    pub(crate) lose_request: f64,
    pub(crate) lose_answer: f64,
    /// A second copy of the request arrives up to `late_max` later.
    pub(crate) repeat: f64,
    /// The request leaves its place in the stream and arrives up to `late_max` later.
    pub(crate) reorder: f64,
    pub(crate) late_max: u64,
}

/// What a cut between a client and a bookie stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Both,
    Answers,
}

/// All links. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Network(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    loopback: Loopback,
    random: Random,
    tasks: Tasks,
    history: History,
    resumed: Notify,
    state: Mutex<State>,
}

type Link = (u32, Incarnation);
type Delivery = Box<dyn FnOnce() + Send>;

#[derive(Debug, Default)]
struct State {
    weather: Weather,
    cuts: BTreeMap<Link, Cut>,
    /// Clients that stand still: nothing leaves them, nothing reaches them.
    paused: BTreeSet<u32>,
    /// Which incarnation lives now where another one did: an address stays (T7).
    moved: BTreeMap<Incarnation, Incarnation>,
    streams: BTreeMap<Link, mpsc::Sender<(Instant, Boxed)>>,
}

/// Has a `Debug` form.
struct Boxed(Delivery);

impl std::fmt::Debug for Boxed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Delivery")
    }
}

/// Messages on their way on one link; past that they are lost.
const LINK_MESSAGES_MAX: usize = 4096;
/// What a WRITE_LAC, which has no deadline of its own, gets.
const LAC_DEADLINE: Duration = Duration::from_secs(5);

impl Network {
    /// Calm links to the bookies of `loopback`.
    pub(crate) fn new(loopback: Loopback, random: Random, tasks: Tasks, history: History) -> Self {
        let (resumed, state) = Default::default();
        Self(Arc::new(Inner { loopback, random, tasks, history, resumed, state }))
    }

    /// The bookies as `client` sees them.
    pub(crate) fn view(&self, client: u32) -> Arc<dyn Bookies> {
        Arc::new(View { network: self.clone(), client })
    }

    /// From now on messages fare like this.
    pub(crate) fn set_weather(&self, weather: Weather) {
        self.state(|state| state.weather = weather);
    }

    /// Cuts a link until [`Network::join`].
    pub(crate) fn cut(&self, client: u32, bookie: Incarnation, cut: Cut) {
        self.state(|state| state.cuts.insert((client, bookie), cut));
    }

    /// Ends a cut.
    pub(crate) fn join(&self, client: u32, bookie: Incarnation) {
        self.state(|state| state.cuts.remove(&(client, bookie)));
    }

    /// The client stands still until [`Network::resume`]: answers wait, and what it sends leaves it only then.
    pub(crate) fn pause(&self, client: u32) {
        self.state(|state| state.paused.insert(client));
    }

    /// Ends a pause.
    pub(crate) fn resume(&self, client: u32) {
        if self.state(|state| state.paused.remove(&client)) {
            self.0.history.saw(Seen::ClientPaused);
        }
        self.0.resumed.notify_waiters();
    }

    /// A new incarnation lives at the address of an old one: what is sent to the old one reaches the new one.
    pub(crate) fn moved(&self, old: Incarnation, new: Incarnation) {
        self.state(|state| {
            for at in state.moved.values_mut().filter(|at| **at == old) {
                *at = new;
            }
            state.moved.insert(old, new);
        });
    }

    /// Calm weather, no cuts, nobody paused.
    pub(crate) fn heal(&self) {
        self.state(|state| {
            state.weather = Weather::default();
            state.cuts.clear();
            state.paused.clear();
        });
        self.0.resumed.notify_waiters();
    }

    /// Waits until the client does not stand still.
    async fn awake(&self, client: u32) {
        loop {
            let resumed = self.0.resumed.notified();
            if !self.state(|state| state.paused.contains(&client)) {
                return;
            }
            resumed.await;
        }
    }

    fn state<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.state.lock().expect("nothing panics while it holds the network"))
    }

    fn passes(&self, link: Link, answer: bool) -> bool {
        match self.state(|state| state.cuts.get(&link).copied()) {
            None => true,
            Some(Cut::Answers) => !answer,
            Some(Cut::Both) => false,
        }
    }

    /// Puts a delivery into the link's stream.
    fn enqueue(&self, link: Link, at: Instant, delivery: Delivery) {
        let sender = self.state(|state| state.streams.get(&link).cloned());
        let sender = sender.unwrap_or_else(|| {
            let network = self.clone();
            let (sender, mut stream) = mpsc::channel::<(Instant, Boxed)>(LINK_MESSAGES_MAX);
            self.0.tasks.spawn("link", async move {
                while let Some((at, Boxed(delivery))) = stream.recv().await {
                    network.awake(link.0).await;
                    if at > Instant::now() {
                        sleep_until(at).await;
                    }
                    delivery();
                }
            });
            self.state(|state| state.streams.insert(link, sender.clone()));
            sender
        });
        drop(sender.try_send((at, Boxed(delivery))));
    }
}

#[derive(Debug)]
struct View {
    network: Network,
    client: u32,
}

impl Bookies for View {
    fn bookie(&self, incarnation: Incarnation) -> Arc<dyn BookieRpc> {
        Arc::new(Sender { network: self.network.clone(), link: (self.client, incarnation) })
    }
}

#[derive(Debug)]
struct Sender {
    network: Network,
    link: Link,
}

type Send_<T> = Arc<dyn Fn(&dyn BookieRpc, Instant) -> Answer<T> + Send + Sync>;

impl Sender {
    fn call<T: Send + 'static>(
        &self,
        deadline: Instant,
        unknown: fn(Unknown) -> T,
        send: impl Fn(&dyn BookieRpc, Instant) -> Answer<T> + Send + Sync + 'static,
    ) -> Answer<T> {
        let random = &self.network.0.random;
        let weather = self.network.state(|state| state.weather);
        let now = Instant::now();
        let send: Send_<T> = Arc::new(send);
        let patience = deadline.saturating_duration_since(now);
        let (answer, wait) = oneshot::channel();
        let ms = |max: u64| Duration::from_millis(random.below(max + 1));
        let there = ms(weather.delay_max);
        let back = ms(weather.delay_max);
        let late = ms(weather.late_max);
        self.network.0.history.saw_if(!(there + back).is_zero(), Seen::Delayed);
        let lost =
            self.network.0.history.saw_if(random.chance(weather.lose_request), Seen::RequestLost);
        let answer_lost =
            self.network.0.history.saw_if(random.chance(weather.lose_answer), Seen::AnswerLost);
        let repeated = self.network.0.history.saw_if(random.chance(weather.repeat), Seen::Repeated);
        let reordered =
            self.network.0.history.saw_if(random.chance(weather.reorder), Seen::Reordered);
        // A lost message shows as a reset, or not at all.
        let silent = random.chance(0.5);
        if repeated {
            let copy = self.carry(Arc::clone(&send), patience, Duration::ZERO, None);
            let at = now + there + late;
            self.network.0.tasks.spawn("late copy", async move {
                sleep_until(at).await;
                copy();
            });
        }
        if !lost {
            let answer = (!answer_lost).then_some(answer);
            let delivery = self.carry(send, patience, back, answer);
            if reordered {
                let at = now + there + late;
                self.network.0.tasks.spawn("reordered", async move {
                    sleep_until(at).await;
                    delivery();
                });
            } else {
                self.network.enqueue(self.link, now + there, delivery);
            }
        }
        let network = self.network.clone();
        let client = self.link.0;
        async move {
            let answer = match timeout_at(deadline, wait).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) if silent => {
                    sleep_until(deadline).await;
                    unknown(Unknown::Timeout)
                }
                Ok(Err(_)) => unknown(Unknown::Disconnected),
                Err(_) => unknown(Unknown::Timeout),
            };
            network.awake(client).await;
            answer
        }
        .boxed()
    }

    /// What happens when a copy arrives.
    fn carry<T: Send + 'static>(
        &self,
        send: Send_<T>,
        patience: Duration,
        back: Duration,
        answer: Option<oneshot::Sender<T>>,
    ) -> Delivery {
        let (network, link) = (self.network.clone(), self.link);
        Box::new(move || {
            if !network.passes(link, false) {
                return;
            }
            let lives_there = network.state(|state| state.moved.get(&link.1).copied());
            let bookie = network.0.loopback.bookie(lives_there.unwrap_or(link.1));
            // The receiver counts the deadline from the arrival, as a remote one would.
            let pending = send(&*bookie, Instant::now() + patience);
            let tasks = network.0.tasks.clone();
            tasks.spawn("answer", async move {
                let result = pending.await;
                if !back.is_zero() {
                    sleep(back).await;
                }
                if let Some(answer) = answer
                    && network.passes(link, true)
                {
                    drop(answer.send(result));
                }
            });
        })
    }
}

impl BookieRpc for Sender {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        self.call(request.deadline, AddAnswer::Unknown, move |bookie, deadline| {
            bookie.add(AddRequest { deadline, ..request.clone() })
        })
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        let deadline = Instant::now() + LAC_DEADLINE;
        self.call(deadline, |_| (), move |bookie, _| bookie.write_lac(to, ledger, lac))
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.call(request.deadline, FenceAnswer::Unknown, move |bookie, deadline| {
            bookie.fence(FenceRequest { deadline, ..request.clone() })
        })
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        self.call(request.deadline, ReadAnswer::unknown, move |bookie, deadline| {
            bookie.read(ReadRequest { deadline, ..request.clone() })
        })
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        self.call(deadline, LacAnswer::Unknown, move |bookie, deadline| {
            bookie.read_lac(to, ledger, deadline)
        })
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer> {
        self.call(deadline, ListAnswer::Unknown, move |bookie, deadline| {
            bookie.list(to, ledger, range, deadline)
        })
    }
}
