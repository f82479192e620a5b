//! Where blocking disk work runs.

use tokio::sync::{mpsc, oneshot};

type Job = Box<dyn FnOnce() + Send>;

/// Runs blocking closures in order: on a thread of its own, or inline where the disk is in memory (simulation).
#[derive(Clone, Debug)]
pub struct Io {
    jobs: Option<mpsc::Sender<Job>>,
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
                while let Some(job) = queue.blocking_recv() {
                    job();
                }
            })
            .expect("the operating system gives a thread");
        Self { jobs: Some(jobs) }
    }

    /// Runs closures where they are awaited. Only for disks that do not block.
    #[must_use]
    pub fn inline() -> Self {
        Self { jobs: None }
    }

    /// Runs `work` and returns its result. Not cancel-safe in one way only: a job once queued runs to its end, even if
    /// the caller goes away.
    ///
    /// # Panics
    /// When `work` panicked.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let Some(jobs) = &self.jobs else {
            return work();
        };
        let (result, answer) = oneshot::channel();
        let job: Job = Box::new(move || drop(result.send(work())));
        if jobs.send(job).await.is_err() {
            panic!("the I/O thread ended by a panic");
        }
        answer.await.expect("the I/O job did not panic")
    }
}
