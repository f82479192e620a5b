//! Bookies behind a bad network, by seed and on virtual time: requests and answers are lost, late, repeated; bookies are cut
//! off. What one handle sends stays in order, as the seam promises, unless reordering is asked for, which the ledger
//! protocol must survive too. A lost answer means that *the work was done*.

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use futures::FutureExt;
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use geminga_runtime::{random::Random, tasks::Tasks};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    AddAnswer, AddRequest, Answer, BookieRpc, Bookies, EntryRange, FenceAnswer, FenceRequest,
    LacAnswer, ListAnswer, ReadAnswer, ReadRequest, SharedBookies, Unknown,
};

/// Requests under way on one stream; one more is lost.
const STREAM_REQUESTS_MAX: usize = 10_000;

/// What goes wrong, and how often (probabilities 0.0 to 1.0). `default()` is a perfect network.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// A request is never delivered.
    pub lose_request: f64,
    /// A request is carried out, its answer never arrives.
    pub lose_answer: f64,
    /// A request is delivered a second time, later.
    pub repeat: f64,
    /// A request, or an answer, is late by up to `delay_max`.
    pub delay: f64,
    pub delay_max: Duration,
    /// Late requests are overtaken by those behind them on the same stream.
    pub reorder: bool,
    /// These are cut off: nothing is delivered, everything ends as unknown.
    pub partitioned: BTreeSet<Incarnation>,
}

/// The plan shared by a test and its bookies; may be changed at any time.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan(Arc<Mutex<Faults>>);

impl FaultPlan {
    /// A plan.
    #[must_use]
    pub fn new(faults: Faults) -> Self {
        Self(Arc::new(Mutex::new(faults)))
    }

    /// Changes it.
    pub fn change(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.0.lock());
    }

    /// A perfect network from now on; what is late still arrives.
    pub fn heal(&self) {
        *self.0.lock() = Faults::default();
    }
}

/// Bookies of `inner`, reached through the plan's faults.
#[derive(Clone, Debug)]
pub struct FaultyBookies {
    inner: SharedBookies,
    plan: FaultPlan,
    random: Random,
    tasks: Tasks,
}

/// One ordered stream to one incarnation.
struct Stream {
    to: Incarnation,
    inner: Arc<dyn BookieRpc>,
    plan: FaultPlan,
    random: Random,
    tasks: Tasks,
    queue: mpsc::Sender<Job>,
}

/// A request on its way.
struct Job {
    at: Instant,
    deliver: Box<dyn FnOnce() + Send>,
}

/// What happens to one request; drawn when it is made, so that a seed gives one run.
struct Fate {
    lose_request: bool,
    lose_answer: bool,
    repeat_after: Option<Duration>,
    request_delay: Duration,
    answer_delay: Duration,
    reorder: bool,
}

impl FaultyBookies {
    /// `tasks` owns what is on its way: aborting it is a network that loses everything.
    #[must_use]
    pub fn new(inner: SharedBookies, plan: FaultPlan, random: Random, tasks: Tasks) -> Self {
        Self { inner, plan, random, tasks }
    }
}

impl Bookies for FaultyBookies {
    fn bookie(&self, incarnation: Incarnation) -> Arc<dyn BookieRpc> {
        let (queue, mut jobs) = mpsc::channel::<Job>(STREAM_REQUESTS_MAX);
        self.tasks.spawn("faulty stream", async move {
            while let Some(job) = jobs.recv().await {
                sleep_until(job.at).await;
                (job.deliver)();
            }
        });
        Arc::new(Stream {
            to: incarnation,
            inner: self.inner.bookie(incarnation),
            plan: self.plan.clone(),
            random: self.random.clone(),
            tasks: self.tasks.clone(),
            queue,
        })
    }
}

impl Stream {
    fn draw(&self) -> Fate {
        let faults = self.plan.0.lock();
        let random = &self.random;
        let delay = || {
            let late = random.chance(faults.delay);
            let by = random.below(faults.delay_max.as_micros() as u64 + 1);
            if late { Duration::from_micros(by) } else { Duration::ZERO }
        };
        Fate {
            lose_request: faults.partitioned.contains(&self.to)
                || random.chance(faults.lose_request),
            lose_answer: random.chance(faults.lose_answer),
            repeat_after: random.chance(faults.repeat).then(delay),
            request_delay: delay(),
            answer_delay: delay(),
            reorder: faults.reorder,
        }
    }

    /// Carries a request, and its answer, as its fate has it. Ends by the deadline.
    fn relay<T: Send + 'static>(
        &self,
        deadline: Instant,
        unknown: fn(Unknown) -> T,
        call: impl Fn(&dyn BookieRpc) -> Answer<T> + Send + Sync + 'static,
    ) -> Answer<T> {
        let fate = self.draw();
        let (answer, outcome) = oneshot::channel();
        if !fate.lose_request {
            let call = Arc::new(call);
            let again = Arc::clone(&call);
            let at = Instant::now() + fate.request_delay;
            let keep = (!fate.lose_answer).then_some(answer);
            self.deliver(at, fate.reorder, call, keep, fate.answer_delay);
            if let Some(after) = fate.repeat_after {
                self.deliver(at + after, true, again, None, Duration::ZERO);
            }
        }
        async move {
            match timeout_at(deadline, outcome).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => {
                    // Lost on the way; nobody knows before the deadline.
                    sleep_until(deadline).await;
                    unknown(Unknown::Timeout)
                }
                Err(_) => unknown(Unknown::Timeout),
            }
        }
        .boxed()
    }

    fn deliver<T: Send + 'static>(
        &self,
        at: Instant,
        overtakes: bool,
        call: Arc<impl Fn(&dyn BookieRpc) -> Answer<T> + Send + Sync + 'static>,
        answer: Option<oneshot::Sender<T>>,
        answer_delay: Duration,
    ) {
        let inner = Arc::clone(&self.inner);
        let tasks = self.tasks.clone();
        let plan = self.plan.clone();
        let to = self.to;
        let deliver = move || {
            let said = call(&*inner);
            tasks.spawn("faulty answer", async move {
                let said = said.await;
                sleep_until(Instant::now() + answer_delay).await;
                let cut_off = plan.0.lock().partitioned.contains(&to);
                if let (Some(answer), false) = (answer, cut_off) {
                    drop(answer.send(said));
                }
            });
        };
        if overtakes {
            self.tasks.spawn("faulty request", async move {
                sleep_until(at).await;
                deliver();
            });
        } else {
            drop(self.queue.try_send(Job { at, deliver: Box::new(deliver) }));
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("to", &self.to).finish_non_exhaustive()
    }
}

impl BookieRpc for Stream {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        self.relay(request.deadline, AddAnswer::Unknown, move |bookie| bookie.add(request.clone()))
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        let deadline = Instant::now() + Duration::from_secs(1);
        self.relay(deadline, |_| (), move |bookie| bookie.write_lac(to, ledger, lac))
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.relay(request.deadline, FenceAnswer::Unknown, move |bookie| {
            bookie.fence(request.clone())
        })
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        self.relay(request.deadline, ReadAnswer::unknown, move |bookie| {
            bookie.read(request.clone())
        })
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        self.relay(deadline, LacAnswer::Unknown, move |bookie| {
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
        self.relay(deadline, ListAnswer::Unknown, move |bookie| {
            bookie.list(to, ledger, range, deadline)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bookie_rpc::{conformance, loopback::Loopback, memory::MemoryBookie};

    fn bookies(plan: &FaultPlan, seed: u64) -> (FaultyBookies, MemoryBookie) {
        let one = Incarnation(1);
        let bookie = MemoryBookie::new(one);
        let loopback = Loopback::new();
        loopback.attach(one, Arc::new(bookie.clone()));
        let random = Random::from_seed(seed);
        (FaultyBookies::new(Arc::new(loopback), plan.clone(), random, Tasks::new("test")), bookie)
    }

    #[tokio::test(start_paused = true)]
    async fn with_late_answers_only_it_passes_the_exam() {
        let late = Faults {
            delay: 0.5,
            delay_max: Duration::from_millis(50),
            repeat: 0.0,
            ..Faults::default()
        };
        let plan = FaultPlan::new(late);
        conformance::exam(async || {
            let (bookies, _) = bookies(&plan, 3);
            (bookies.bookie(Incarnation(1)), Incarnation(1))
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_answer_means_that_the_work_was_done_and_a_lost_request_that_it_was_not() {
        for (faults, done) in [
            (Faults { lose_answer: 1.0, ..Faults::default() }, true),
            (Faults { lose_request: 1.0, ..Faults::default() }, false),
            (Faults { partitioned: [Incarnation(1)].into(), ..Faults::default() }, false),
        ] {
            let plan = FaultPlan::new(faults);
            let (bookies, bookie) = bookies(&plan, 1);
            let deadline = Instant::now() + Duration::from_secs(2);
            let request =
                FenceRequest { to: Incarnation(1), ledger: LedgerId(1), list: None, deadline };
            let answer = bookies.bookie(Incarnation(1)).fence(request).await;
            assert_eq!(answer, FenceAnswer::Unknown(Unknown::Timeout));
            assert_eq!(Instant::now(), deadline);
            assert_eq!(bookie.is_fenced(LedgerId(1)), done);
        }
    }
}
