//! Tasks with an owner. Nothing runs that nobody can cancel, wait for, and hear of when it fails.
//!
//! ```text
//! Tasks("node") --child--> Tasks("bookie") --spawn--> journal, reads, ...
//!      |                        shutdown: cancel the token, wait, abort the rest
//!      +--child--> Tasks("broker") ...    abort: as kill -9, nothing runs on
//! ```
//! An owner's cancel, shutdown and abort reach its children; a child's reach nobody else. A failed critical task is heard
//! by its owner and by all owners above.

use std::{
    any::Any,
    collections::BTreeMap,
    fmt::{self, Display},
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::{AbortHandle, JoinHandle},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Owner of tasks; clones are handles to the same owner. Dropping handles stops nothing: end with [`Self::shutdown`] or
/// [`Self::abort`].
#[derive(Clone)]
pub struct Tasks(Arc<Owner>);

/// Why a critical task ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("task {task} of {owner} failed: {cause}")]
pub struct Failure {
    /// Name of the owner, with those of the owners above it.
    pub owner: String,
    /// Name of the task.
    pub task: &'static str,
    /// The error's or the panic's message.
    pub cause: String,
}

struct Owner {
    name: String,
    token: CancellationToken,
    parent: Option<Arc<Owner>>,
    state: Mutex<State>,
    /// Tasks of this owner and of all owners below.
    running: AtomicUsize,
    idle: Notify,
    panicked: AtomicU64,
    failure: watch::Sender<Option<Failure>>,
}

#[derive(Default)]
struct State {
    /// No task starts any more.
    closed: bool,
    next_task: u64,
    /// In the order of their start, so that an abort reaches them in the same order in every run of a seed.
    tasks: BTreeMap<u64, Option<AbortHandle>>,
    children: Vec<Weak<Owner>>,
}

impl Tasks {
    /// An owner without a parent.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self(Owner::new(name.into(), CancellationToken::new(), None))
    }

    /// An owner below this one: it ends with this one, or earlier by itself.
    #[must_use]
    pub fn child(&self, name: impl Display) -> Self {
        let name = format!("{}/{name}", self.0.name);
        let child = Owner::new(name, self.0.token.child_token(), Some(Arc::clone(&self.0)));
        let mut state = self.0.state.lock();
        child.state.lock().closed = state.closed;
        state.children.retain(|other| other.strong_count() > 0);
        state.children.push(Arc::downgrade(&child));
        drop(state);
        Self(child)
    }

    /// Starts a task. A panic in it is logged and counted, and ends only this task. After [`Self::abort`] or a finished
    /// [`Self::shutdown`] the future is dropped without running.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let owner = Arc::clone(&self.0);
        drop(self.start(async move {
            if let Err(panic) = caught(future).await {
                owner.note_panic(name, &*panic);
            }
        }));
    }

    /// Starts a task whose result the caller awaits. Dropping the handle does not stop the task. The handle gives an
    /// error when the task panicked, was aborted, or never ran because the owner had ended.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn_returning<T: Send + 'static>(
        &self,
        name: &'static str,
        future: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        let owner = Arc::clone(&self.0);
        self.start(async move {
            match caught(future).await {
                Ok(result) => result,
                Err(panic) => {
                    owner.note_panic(name, &*panic);
                    resume_unwind(panic)
                }
            }
        })
    }

    /// Starts a task the owner cannot do without: if it ends with an error or panics, [`Self::failed`] resolves, here and
    /// in all owners above. The owner's other tasks go on until somebody stops them. The error is logged here.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn_critical<E: Display + Send + 'static>(
        &self,
        name: &'static str,
        future: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let owner = Arc::clone(&self.0);
        drop(self.start(async move {
            let cause = match caught(future).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => {
                    tracing::error!(owner = owner.name, task = name, %error, "critical task failed");
                    error.to_string()
                }
                Err(panic) => owner.note_panic(name, &*panic),
            };
            owner.note_failure(&Failure { owner: owner.name.clone(), task: name, cause });
        }));
    }

    /// Cancelled when the owner, or one above it, is to end. Tasks watch it and settle what they accepted.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.0.token.clone()
    }

    /// Ends the owner and its children: cancels the token, waits up to `grace` for the tasks, aborts the rest and waits
    /// until they are gone. True if none had to be aborted. Not to be awaited inside one of these tasks.
    ///
    /// Cancel-safe: a dropped call has cancelled the token, and can be repeated.
    pub async fn shutdown(&self, grace: Duration) -> bool {
        self.0.token.cancel();
        let in_time = timeout(grace, self.idle()).await.is_ok();
        if !in_time {
            tracing::warn!(
                owner = self.0.name,
                tasks = self.running(),
                "tasks outlived the grace period"
            );
        }
        self.abort();
        self.idle().await;
        in_time
    }

    /// Ends the owner and its children as `kill -9` would: no task runs past its present await, and none starts.
    pub fn abort(&self) {
        self.0.abort();
        self.0.token.cancel();
    }

    /// Resolves when no task of this owner and its children runs. Cancel-safe.
    pub async fn idle(&self) {
        loop {
            let mut idle = pin!(self.0.idle.notified());
            idle.as_mut().enable();
            if self.running() == 0 {
                return;
            }
            idle.await;
        }
    }

    /// Tasks of this owner and of its children that have not ended.
    #[must_use]
    pub fn running(&self) -> usize {
        self.0.running.load(Ordering::SeqCst)
    }

    /// Tasks of this owner and of its children that ended by a panic.
    #[must_use]
    pub fn panicked(&self) -> u64 {
        self.0.panicked.load(Ordering::SeqCst)
    }

    /// Resolves with the first failure of a critical task, now or in the past, of this owner or a child. Cancel-safe.
    pub fn failed(&self) -> impl Future<Output = Failure> + Send + 'static {
        let mut failure = self.0.failure.subscribe();
        async move {
            match failure.wait_for(Option::is_some).await.ok().and_then(|seen| seen.clone()) {
                Some(failure) => failure,
                None => std::future::pending().await, // the owner is gone, and nothing failed
            }
        }
    }

    fn start<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        let (id, closed) = {
            let mut state = self.0.state.lock();
            let id = state.next_task;
            state.next_task += 1;
            let closed = state.closed;
            if !closed {
                state.tasks.insert(id, None);
                self.0.upwards(|owner| {
                    owner.running.fetch_add(1, Ordering::SeqCst);
                });
            }
            (id, closed)
        };
        let entry = (!closed).then(|| Entry { owner: Arc::clone(&self.0), id });
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the seam that everything else goes through"
        )]
        let handle = tokio::spawn(async move {
            let _entry = entry; // dropped last: the future's own values are gone before the task counts as ended
            future.await
        });
        let closed = {
            let mut state = self.0.state.lock();
            if let Some(abort) = state.tasks.get_mut(&id) {
                *abort = Some(handle.abort_handle());
            }
            state.closed
        };
        if closed {
            handle.abort(); // not under the lock: it may drop the task, which takes the lock
        }
        handle
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks")
            .field("name", &self.0.name)
            .field("running", &self.running())
            .finish_non_exhaustive()
    }
}

impl Owner {
    fn new(name: String, token: CancellationToken, parent: Option<Arc<Self>>) -> Arc<Self> {
        Arc::new(Self {
            name,
            token,
            parent,
            state: Mutex::default(),
            running: AtomicUsize::new(0),
            idle: Notify::new(),
            panicked: AtomicU64::new(0),
            failure: watch::Sender::new(None),
        })
    }

    /// Visits this owner, then those above.
    fn upwards(&self, mut visit: impl FnMut(&Self)) {
        let mut next = Some(self);
        while let Some(owner) = next {
            visit(owner);
            next = owner.parent.as_deref();
        }
    }

    fn abort(&self) {
        let (tasks, children) = {
            let mut state = self.state.lock();
            state.closed = true;
            let tasks: Vec<_> = state.tasks.values().flatten().cloned().collect();
            (tasks, state.children.clone())
        };
        for task in tasks {
            task.abort();
        }
        for child in children.iter().filter_map(Weak::upgrade) {
            child.abort();
        }
    }

    fn note_panic(&self, task: &'static str, panic: &(dyn Any + Send)) -> String {
        let cause = panic_message(panic);
        tracing::error!(owner = self.name, task, cause, "task panicked");
        self.upwards(|owner| {
            owner.panicked.fetch_add(1, Ordering::SeqCst);
        });
        cause
    }

    fn note_failure(&self, failure: &Failure) {
        self.upwards(|owner| {
            owner.failure.send_if_modified(|first| {
                let news = first.is_none();
                if news {
                    *first = Some(failure.clone());
                }
                news
            });
        });
    }
}

/// A running task's place in its owner's books; dropped however the task ends.
struct Entry {
    owner: Arc<Owner>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.owner.state.lock().tasks.remove(&self.id);
        self.owner.upwards(|owner| {
            if owner.running.fetch_sub(1, Ordering::SeqCst) == 1 {
                owner.idle.notify_waiters();
            }
        });
    }
}

/// Runs the future; a panic in it becomes an error. The future is not polled again after a panic.
async fn caught<F: Future>(future: F) -> Result<F::Output, Box<dyn Any + Send>> {
    let mut future = pin!(future);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
        Err(panic) => Poll::Ready(Err(panic)),
    })
    .await
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}

#[cfg(test)]
mod tests;
