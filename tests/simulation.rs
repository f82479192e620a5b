//! Seeded simulation of ledgers and segments on virtual time: see `harness/mod.rs` and `docs/simulation.md`.
//!
//! - `cargo test` runs 40 seeds (SIM_SEEDS=n for more), `cargo sim` the long set, both after the kept ones.
//! - `SEED=n cargo sim` runs one; with `TRACE=1` every event is printed.

mod harness;

use harness::{coverage::Coverage, run::run, seeds};

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.trim().parse().ok()
}

/// The kept seeds and `ranges`, or the one asked for.
fn simulate(ranges: impl IntoIterator<Item = std::ops::Range<u64>>) -> Option<Coverage> {
    let Some(seed) = setting("SEED") else {
        let mut list = seeds::kept();
        list.extend(ranges.into_iter().flatten());
        return Some(seeds::all_hold(&list));
    };
    let outcome = run(seed, seeds::layer_of(seed), setting("TRACE").is_some());
    assert!(outcome.violation.is_none(), "{}", seeds::report(&outcome));
    eprintln!("seed {seed}: {} events, hash {:016x}", outcome.fingerprint.0, outcome.fingerprint.1);
    None
}

/// The first seeds, for every `cargo test`.
const FEW: u64 = 40;
/// The last seed of the long run.
const MANY: u64 = 3_000;

/// From one number to another, and a share of as many for each layer that has seeds of its own.
fn ranges(from: u64, to: u64) -> [std::ops::Range<u64>; 4] {
    let share = |seeds: u64| seeds / 8;
    let of = |layer| layer + share(from)..layer + share(to);
    let leased = seeds::LEASED + share(from)..seeds::LEASED + to / 2;
    [from..to, of(seeds::UPKEEP), leased, of(seeds::DISPATCH)]
}

#[test]
fn bounded_seeds_keep_every_invariant() {
    simulate(ranges(0, setting("SIM_SEEDS").unwrap_or(FEW)));
}

#[test]
#[ignore = "the long run: cargo sim"]
fn many_seeds_keep_every_invariant_and_every_kind_of_fault_occurs_in_them() {
    if setting("SEED").is_none()
        && let Some(coverage) = simulate(ranges(FEW, setting("SIM_SEEDS").unwrap_or(MANY)))
    {
        eprintln!("{}", coverage.table());
        assert!(coverage.missing().is_empty(), "never seen: {:?}", coverage.missing());
    }
}

#[test]
fn one_seed_twice_is_one_run() {
    for seed in 0..8 {
        let once = run(seed, seeds::layer_of(seed), false);
        let twice = run(seed, seeds::layer_of(seed), false);
        assert!(once.fingerprint.0 > 50, "seed {seed} does something");
        assert_eq!(once.fingerprint, twice.fingerprint, "seed {seed}");
    }
    let hashes: std::collections::BTreeSet<u64> =
        (0..8).map(|seed| run(seed, seeds::layer_of(seed), false).fingerprint.1).collect();
    assert_eq!(hashes.len(), 8, "seeds differ");
}
