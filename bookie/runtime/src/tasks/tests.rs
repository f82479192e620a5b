//! What owners promise about their tasks.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicBool, Ordering},
};

use tokio::time::{Instant, sleep};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Sets a flag when dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn flag() -> Arc<AtomicBool> {
    Arc::default()
}

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_tasks_that_drain_in_time() {
    let tasks = Tasks::new("owner");
    let (token, drained) = (tasks.child("part").token(), flag());
    let seen = Arc::clone(&drained);
    tasks.child("part").spawn("drains", async move {
        token.cancelled().await;
        sleep(SECOND).await;
        seen.store(true, Ordering::SeqCst);
    });
    assert!(tasks.shutdown(2 * SECOND).await);
    assert!(drained.load(Ordering::SeqCst));
    assert_eq!(tasks.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn shutdown_aborts_what_outlives_the_grace_period() {
    let tasks = Tasks::new("owner");
    let gone = flag();
    let held = Dropped(Arc::clone(&gone));
    tasks.child("part").spawn("stubborn", async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    let started = Instant::now();
    assert!(!tasks.shutdown(2 * SECOND).await);
    assert_eq!(started.elapsed(), 2 * SECOND);
    assert!(gone.load(Ordering::SeqCst), "the task's values are dropped when shutdown returns");
}

#[tokio::test(start_paused = true)]
async fn a_childs_end_reaches_nobody_else() {
    let tasks = Tasks::new("owner");
    let child = tasks.child("part");
    tasks.spawn("other", std::future::pending());
    child.spawn("own", std::future::pending());
    assert!(!child.shutdown(SECOND).await);
    assert!(child.token().is_cancelled() && !tasks.token().is_cancelled());
    assert_eq!((child.running(), tasks.running()), (0, 1));
    tasks.abort();
    tasks.idle().await;
}

#[tokio::test(start_paused = true)]
async fn after_an_abort_nothing_runs_on_and_nothing_starts() {
    let tasks = Tasks::new("owner");
    let child = tasks.child("part");
    let ran = flag();
    let ran_on = Arc::clone(&ran);
    child.spawn("sleeper", async move {
        sleep(SECOND).await;
        ran_on.store(true, Ordering::SeqCst);
    });
    tokio::task::yield_now().await;
    tasks.abort();
    for late in [tasks.clone(), child.clone(), child.child("later"), tasks.child("later")] {
        let ran_late = Arc::clone(&ran);
        let handle =
            late.spawn_returning("late", async move { ran_late.store(true, Ordering::SeqCst) });
        assert!(handle.await.expect_err("it never ran").is_cancelled());
    }
    sleep(2 * SECOND).await;
    assert!(!ran.load(Ordering::SeqCst));
    assert_eq!(tasks.running(), 0);
    assert!(child.token().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_counted_and_ends_only_its_task() {
    let tasks = Tasks::new("owner");
    let child = tasks.child("part");
    child.spawn("bad", async { panic!("on purpose") });
    let good = child.spawn_returning("good", async { 7 });
    let bad = child.spawn_returning("also bad", async { panic!("on {}", "purpose") });
    assert_eq!(good.await.expect("it did not panic"), 7);
    let error = bad.await.expect_err("it panicked");
    assert_eq!(panic_message(&*error.into_panic()), "on purpose");
    child.idle().await;
    assert_eq!((child.panicked(), tasks.panicked()), (2, 2));
    assert!(timeout(SECOND, tasks.failed()).await.is_err(), "neither was critical");
}

#[tokio::test(start_paused = true)]
async fn a_critical_failure_is_heard_here_and_above_early_or_late() {
    let tasks = Tasks::new("node");
    let child = tasks.child("bookie");
    let sibling = tasks.child("broker");
    let early = tasks.failed();
    child.spawn_critical("fine", async { Ok::<(), Infallible>(()) });
    child.spawn_critical("journal", async { Err::<(), _>("the disk is gone") });
    let failure = early.await;
    assert_eq!(failure.to_string(), "task journal of node/bookie failed: the disk is gone");
    child.spawn_critical("second", async {
        if true { panic!("too late") } else { Ok::<(), Infallible>(()) }
    });
    child.idle().await;
    assert_eq!(child.failed().await, failure, "the first failure is the one that is told");
    assert!(timeout(SECOND, sibling.failed()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_a_critical_task_is_a_failure() {
    let tasks = Tasks::new("node");
    tasks.spawn_critical("journal", async {
        if true { panic!("broken") } else { Ok::<(), Infallible>(()) }
    });
    assert_eq!(tasks.failed().await.cause, "broken");
}

#[tokio::test(start_paused = true)]
async fn failed_stays_silent_when_the_owner_is_gone() {
    let failed = Tasks::new("node").failed();
    assert!(timeout(SECOND, failed).await.is_err());
}
