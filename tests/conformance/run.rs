//! Runs the rows of the table against a shape and says which passed.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use tokio::{runtime::Builder, task::LocalSet};

use crate::{
    page,
    rows::table,
    world::{Shape, World},
};

/// A row's work; it panics if the promise does not hold.
pub(crate) type Work = Pin<Box<dyn Future<Output = ()>>>;

/// One row of the table.
pub(crate) struct Row {
    /// The promise in docs/semantics.md that it is of.
    pub(crate) promise: &'static str,
    /// The fact that it proves.
    pub(crate) name: &'static str,
    /// It harms the processes: it has them to itself.
    pub(crate) harm: bool,
    pub(crate) run: fn(Arc<World>) -> Work,
}

/// Longest time of one row; it is stuck then. A hundred moves in a cluster take the longest.
const ROW_TIME_MAX: Duration = Duration::from_secs(300);
/// Rows that share processes, at a time.
const CALM_AT_A_TIME: usize = 8;
/// Rows that have processes of their own, at a time.
const HARM_AT_A_TIME: usize = 3;

/// Runs all rows, keeps the page, and fails if one of them did not pass.
///
/// # Panics
/// With the rows that failed.
pub(crate) async fn all_rows(shape: Shape) {
    let wanted = std::env::var("ROWS").ok();
    let rows: Vec<Row> = table()
        .into_iter()
        .filter(|row| {
            let text = wanted.as_deref().unwrap_or_default();
            row.promise.contains(text) || row.name.contains(text)
        })
        .collect();
    let results = run(shape, &rows).await;
    let failed: Vec<&str> = rows
        .iter()
        .zip(&results)
        .filter(|(_, passed)| !**passed)
        .map(|(row, _)| row.name)
        .collect();
    eprintln!("{shape:?}: {} rows passed of {}", rows.len() - failed.len(), rows.len());
    if wanted.is_none() && page::is_to_be_written() {
        page::write(shape, &rows, &results);
    }
    assert!(failed.is_empty(), "{} of {} rows failed: {failed:#?}", failed.len(), rows.len());
    if wanted.is_none() {
        page::compare(shape, &rows, &results);
    }
}

async fn run(shape: Shape, rows: &[Row]) -> Vec<bool> {
    let calm = async {
        let mut results = Vec::new();
        if rows.iter().any(|row| !row.harm) {
            let world = Arc::new(World::start(shape).await);
            let of_calm = rows.iter().enumerate().filter(|(_, row)| !row.harm);
            let running = of_calm.map(|(at, row)| {
                let world = Arc::clone(&world);
                async move { (at, one(row, world).await) }
            });
            results = stream::iter(running).buffer_unordered(CALM_AT_A_TIME).collect().await;
        }
        results
    };
    let harm = async {
        let of_harm = rows.iter().enumerate().filter(|(_, row)| row.harm);
        let running = of_harm.map(|(at, row)| async move {
            let world = Arc::new(World::start(shape).await);
            (at, one(row, world).await)
        });
        let at_a_time = if shape == Shape::Cluster { 1 } else { HARM_AT_A_TIME };
        stream::iter(running).buffer_unordered(at_a_time).collect::<Vec<_>>().await
    };
    let (calm, harm) =
        if shape == Shape::Cluster { (calm.await, harm.await) } else { futures::join!(calm, harm) };
    let mut results: Vec<(usize, bool)> = calm.into_iter().chain(harm).collect();
    results.sort_unstable();
    results.into_iter().map(|(_, passed)| passed).collect()
}

/// Whether a row passes. It has a thread and a runtime to itself: what it leaves behind ends with it.
async fn one(row: &Row, world: Arc<World>) -> bool {
    let began = tokio::time::Instant::now();
    let (name, work) = (row.name.to_owned(), row.run);
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let in_time = async { tokio::time::timeout(ROW_TIME_MAX, work(world)).await.is_ok() };
        LocalSet::new().block_on(&runtime, in_time)
    });
    let thread = thread.expect("a thread");
    let result = tokio::task::spawn_blocking(move || thread.join()).await.expect("it is joined");
    let took = began.elapsed().as_millis();
    let why = match result {
        Ok(true) => {
            eprintln!("passed  {} | {} ({took} ms)", row.promise, row.name);
            return true;
        }
        Ok(false) => format!("stuck for {ROW_TIME_MAX:?}"),
        Err(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default(),
    };
    eprintln!("FAILED  {} | {} ({took} ms): {why}", row.promise, row.name);
    false
}
