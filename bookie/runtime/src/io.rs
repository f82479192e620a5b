//! Where blocking disk work runs.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Mutex, mpsc, oneshot};

use crate::random::Random;

/// Runs and answers a piece of work; false when the work panicked.
type Job = Box<dyn FnOnce() -> bool + Send>;

/// Runs blocking closures in order: on a thread of its own, or inline where the disk is in memory (simulation).
#[derive(Clone, Debug)]
pub struct Io {
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    Thread(mpsc::Sender<Job>),
    Inline(Arc<Inline>),
}

#[derive(Debug, Default)]
struct Inline {
    panicked: AtomicBool,
    delay: Option<(Random, Duration)>,
    turn: Mutex<()>,
}

/// Jobs that wait for an I/O thread; a caller past that waits.
const QUEUED_JOBS_MAX: usize = 1024;

impl Io {
    /// One thread, which runs the closures in the order they were given. It ends when the last handle is dropped.
    ///
    /// # Panics
    /// When the operating system gives no thread.
    #[must_use]
    pub fn thread(name: &str) -> Self {
        let (jobs, mut queue) = mpsc::channel::<Job>(QUEUED_JOBS_MAX);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let mut sound = true;
                while let Some(job) = queue.blocking_recv() {
                    // After a panic the rest of the queue is dropped, which its callers notice.
                    if sound && !job() {
                        sound = false;
                        queue.close();
                    }
                }
            })
            .expect("the operating system gives a thread");
        Self { form: Form::Thread(jobs) }
    }

    /// Runs closures where they are awaited. Only for disks that do not block.
    #[must_use]
    pub fn inline() -> Self {
        Self { form: Form::Inline(Arc::default()) }
    }

    /// As [`Self::inline`], after a random time up to `delay_max` on tokio's clock, in the order of the calls: a slow disk
    /// for tests. Here a dropped call may not have run its closure.
    #[must_use]
    pub fn delayed(random: Random, delay_max: Duration) -> Self {
        let inline = Inline { delay: Some((random, delay_max)), ..Inline::default() };
        Self { form: Form::Inline(Arc::new(inline)) }
    }

    /// Runs `work` and returns its result. Not cancel-safe in one way only: a job once queued runs to its end, even if
    /// the caller goes away.
    ///
    /// # Panics
    /// When `work` panicked, or earlier work on this `Io` did: what the panic left half done is not built upon.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let outcome = match &self.form {
            Form::Thread(jobs) => on_thread(jobs, work).await,
            Form::Inline(inline) => inline.run(work).await,
        };
        match outcome {
            Some(Ok(result)) => result,
            Some(Err(panic)) => resume_unwind(panic),
            None => panic!("earlier I/O work panicked"),
        }
    }
}

/// What became of a piece of work; none if it never ran.
type Outcome<T> = Option<Result<T, Box<dyn Any + Send>>>;

async fn on_thread<T: Send + 'static>(
    jobs: &mpsc::Sender<Job>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Outcome<T> {
    let (result, answer) = oneshot::channel();
    let job: Job = Box::new(move || {
        let outcome = catch_unwind(AssertUnwindSafe(work));
        let sound = outcome.is_ok();
        drop(result.send(outcome));
        sound
    });
    jobs.send(job).await.ok()?;
    answer.await.ok()
}

impl Inline {
    async fn run<T>(&self, work: impl FnOnce() -> T) -> Outcome<T> {
        let _turn = match &self.delay {
            Some((random, delay_max)) => {
                let turn = self.turn.lock().await;
                let delay_us =
                    random.below(u64::try_from(delay_max.as_micros()).unwrap_or(u64::MAX));
                tokio::time::sleep(Duration::from_micros(delay_us)).await;
                Some(turn)
            }
            None => None,
        };
        if self.panicked.load(Ordering::SeqCst) {
            return None;
        }
        let outcome = catch_unwind(AssertUnwindSafe(work));
        if outcome.is_err() {
            self.panicked.store(true, Ordering::SeqCst);
        }
        Some(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Tasks;

    #[tokio::test]
    async fn a_thread_runs_jobs_in_order_even_when_callers_leave() {
        let io = Io::thread("test");
        let seen = Arc::new(parking_lot::Mutex::new(Vec::new()));
        for n in 0..100 {
            let seen = Arc::clone(&seen);
            let mut call = Box::pin(io.run(move || seen.lock().push(n)));
            tokio::select! { biased; () = call.as_mut() => {}, () = std::future::ready(()) => {} }
        }
        io.run(|| ()).await;
        assert_eq!(*seen.lock(), (0..100).collect::<Vec<_>>());
    }

    /// A panic reaches its own caller, those in the queue, and all later ones; nobody hangs.
    async fn a_panic_reaches_everyone(io: Io) {
        let tasks = Tasks::new("test");
        let (first, second) = (io.clone(), io.clone());
        let first = tasks.spawn_returning("first", async move {
            first.run(|| panic!("broken disk code")).await
        });
        let second = tasks.spawn_returning("second", async move {
            second.run(|| ()).await;
            second.run(|| ()).await;
        });
        let panic = first.await.expect_err("it panicked").into_panic();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"broken disk code"));
        drop(second.await);
        let later = tasks.spawn_returning("later", async move { io.run(|| ()).await });
        assert!(later.await.expect_err("the Io is dead").is_panic());
    }

    #[tokio::test]
    async fn a_panic_on_the_thread_reaches_everyone() {
        a_panic_reaches_everyone(Io::thread("test")).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_inline_reaches_everyone() {
        a_panic_reaches_everyone(Io::inline()).await;
        a_panic_reaches_everyone(Io::delayed(Random::from_seed(0), Duration::from_secs(1))).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_disk_takes_virtual_time_and_keeps_order() {
        let (io, tasks) =
            (Io::delayed(Random::from_seed(1), Duration::from_millis(10)), Tasks::new("test"));
        let started = tokio::time::Instant::now();
        let seen = Arc::new(parking_lot::Mutex::new(Vec::new()));
        for n in 0..20 {
            let (io, seen) = (io.clone(), Arc::clone(&seen));
            tasks.spawn("job", async move { io.run(move || seen.lock().push(n)).await });
        }
        tasks.idle().await;
        assert_eq!(*seen.lock(), (0..20).collect::<Vec<_>>());
        assert!(
            started.elapsed() > Duration::from_millis(40)
                && started.elapsed() < Duration::from_millis(200)
        );
    }
}
