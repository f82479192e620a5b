//! Many seeds, on two threads; the kept ones first. A failure prints all that is needed to see it again.

use std::{
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    coverage::Coverage,
    run::{Layer, Outcome, run},
};

/// Threads that run seeds. Each seed has a runtime of its own, so their number changes nothing.
const THREADS: usize = 2;

/// Seeds from here on exercise auto-recovery and GC.
pub(crate) const UPKEEP: u64 = 1_000_000;

/// Seeds from here on exercise owners that confirm their claims.
pub(crate) const LEASED: u64 = 2_000_000;

/// Seeds from here on exercise a dispatcher over the segment.
pub(crate) const DISPATCH: u64 = 3_000_000;

/// Which layer a seed exercises.
pub(crate) fn layer_of(seed: u64) -> Layer {
    match seed % 4 {
        _ if seed >= DISPATCH => Layer::Subscriptions,
        0 | 2 if seed >= LEASED => Layer::LeasedCores,
        _ if seed >= LEASED => Layer::Leased,
        _ if seed >= UPKEEP => Layer::Upkeep,
        0 => Layer::Cores,
        1 => Layer::Bookies,
        2 => Layer::SegmentCores,
        _ => Layer::Segments,
    }
}

/// Seeds that failed once, from `tests/simulation-seeds/`: one file a seed, named by it, with a line on what it found.
pub(crate) fn kept() -> Vec<u64> {
    let mut directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/simulation-seeds");
    if !directory.exists() {
        directory = PathBuf::from(file!()).with_file_name("../simulation-seeds");
    }
    let Ok(files) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut seeds: Vec<u64> =
        files.filter_map(|file| file.ok()?.file_name().to_str()?.parse().ok()).collect();
    seeds.sort_unstable();
    seeds
}

/// After so many failures no further seed is begun.
const FAILURES_MAX: usize = 5;

/// Runs all of them; what was seen in them together.
///
/// # Panics
/// With a report, when any breaks an invariant.
pub(crate) fn all_hold(seeds: &[u64]) -> Coverage {
    let next = AtomicU64::new(0);
    let failed: Mutex<Vec<Outcome>> = Mutex::default();
    let coverage: Mutex<Coverage> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed) as usize;
                    let Some(seed) = seeds.get(i) else { return };
                    if failed.lock().expect("no panic in here").len() >= FAILURES_MAX {
                        return;
                    }
                    let outcome = run(*seed, layer_of(*seed), false);
                    coverage.lock().expect("no panic in here").add(&outcome.coverage);
                    if outcome.violation.is_some() {
                        failed.lock().expect("no panic in here").push(outcome);
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().expect("no panic in here");
    failed.sort_by_key(|outcome| outcome.seed);
    if let Some(first) = failed.first() {
        let others: Vec<_> =
            failed.iter().map(|o| (o.seed, o.violation.as_ref().map(|v| v.invariant))).collect();
        let begun = next.load(Ordering::Relaxed).min(seeds.len() as u64);
        panic!("{}\n{} of {begun} seeds failed: {others:?}", report(first), failed.len());
    }
    coverage.into_inner().expect("no panic in here")
}

/// What to print of a failure.
pub(crate) fn report(outcome: &Outcome) -> String {
    let Outcome { seed, layer, violation, tail, .. } = outcome;
    let what = violation.as_ref().map(ToString::to_string).unwrap_or_default();
    let tail = tail.join("\n");
    format!(
        "the last events of seed {seed} ({layer:?}):\n{tail}\n\nseed {seed}: {what}\n\
         see it again: SEED={seed} cargo sim      with every event: TRACE=1 SEED={seed} cargo sim\n\
         keep it: a file tests/simulation-seeds/{seed} that says what it found"
    )
}
