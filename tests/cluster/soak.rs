//! Random faults for as long as asked: `SOAK_MINUTES=30 cargo soak`. Prints its seed, every fault, and totals of each kind.
//!
//! A round begins with a sound cluster, does one harm under load, heals it, and waits until nothing is stuck. At the end the
//! history checker judges all of it, and a new subscription reads every topic from the start.

#![allow(
    clippy::disallowed_methods,
    reason = "real tasks on a real runtime, outside the processes under test"
)]

#[allow(dead_code, unused_imports, reason = "each test target uses a part of the harness")]
#[path = "harness/mod.rs"]
mod harness;

use std::{collections::BTreeMap, time::Duration};

use geminga_runtime::random::Random;
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use harness::{BookieSpec, Cluster, ClusterSpec, Load, S3, eventually};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    KillBroker,
    FreezeBroker,
    RestartBroker,
    CutBrokerFromEtcd,
    KillBookie,
    FreezeBookie,
    RestartBookie,
    CutBookie,
    KillEtcdMember,
    StopEtcd,
    KillObjectStore,
    FreezeObjectStore,
    /// Everybody stands still for a moment, again and again, one after the other: a machine with too little CPU.
    Stutter,
}

const FAULTS: [Fault; 13] = [
    Fault::KillBroker,
    Fault::FreezeBroker,
    Fault::RestartBroker,
    Fault::CutBrokerFromEtcd,
    Fault::KillBookie,
    Fault::FreezeBookie,
    Fault::RestartBookie,
    Fault::CutBookie,
    Fault::KillEtcdMember,
    Fault::StopEtcd,
    Fault::KillObjectStore,
    Fault::FreezeObjectStore,
    Fault::Stutter,
];

#[tokio::test(flavor = "multi_thread")]
async fn soak() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
    };
    let minutes = number("SOAK_MINUTES", 30);
    let seed = number("SOAK_SEED", Random::from_os().u64());
    println!("soak: seed {seed}, {minutes} minutes");
    let random = Random::from_seed(seed);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut s3 = S3::start(directory.path()).await;
    let spec = ClusterSpec {
        bookies: vec![BookieSpec::default(); 4],
        brokers: 3,
        settings: vec![
            ("bookie-lost-after-ms", "600000".into()),
            ("ledger-roll-ms", number("SOAK_ROLL_MS", 10_000).to_string()),
            ("tier-url", "s3://geminga/cold".into()),
        ],
        environment: s3.environment(),
        ..ClusterSpec::default()
    };
    let mut cluster = Cluster::start(spec).await;
    let keep = ["--retention-ms", "86400000", "--retention-bytes", "1000000000000"];
    let offload = ["--offload-after-ms", "1000", "--delete-lag-ms", "60000"];
    cluster.cli(&[&["policy", "set"], &offload[..], &keep[..]].concat()).await;
    let loads = [Load::start(&cluster, "one", 1).await, Load::start(&cluster, "four", 4).await];
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let mut totals: BTreeMap<Fault, (u32, Duration)> = BTreeMap::new();
    while Instant::now() < end {
        let fault = FAULTS[random.below(FAULTS.len() as u64) as usize];
        let pick = |ids: Vec<String>| ids[random.below(ids.len() as u64) as usize].clone();
        let (broker, bookie) = (pick(cluster.brokers()), pick(cluster.bookies()));
        let time = Duration::from_millis(500 + random.below(12_000));
        let begun = Instant::now();
        match fault {
            Fault::KillObjectStore => {
                s3.process.kill();
                sleep(time).await;
                s3.restart().await;
            }
            Fault::FreezeObjectStore => {
                s3.process.signal(Signal::STOP);
                sleep(time * 4).await;
                s3.process.signal(Signal::CONT);
            }
            Fault::Stutter => stutter(&mut cluster, &random, time).await,
            _ => harm(&mut cluster, fault, &broker, &bookie, time).await,
        }
        for load in &loads {
            load.goes_on(&format!("{fault:?} {broker} {bookie} for {time:?} (seed {seed})")).await;
        }
        let total = totals.entry(fault).or_default();
        *total = (total.0 + 1, total.1 + begun.elapsed());
    }
    let mut acknowledged = 0;
    for load in loads {
        acknowledged += load.finish(&cluster).await;
    }
    println!(
        "soak: {acknowledged} messages acknowledged, none lost, changed, repeated in the log or reordered"
    );
    println!("{:<20} {:>6} {:>12}", "fault", "times", "mean s");
    for (fault, (times, time)) in &totals {
        println!(
            "{:<20} {times:>6} {:>12.1}",
            format!("{fault:?}"),
            time.as_secs_f64() / f64::from(*times)
        );
    }
}

/// Stops random members for 50 to 1,500 ms each, for a time.
async fn stutter(cluster: &mut Cluster, random: &Random, time: Duration) {
    let end = Instant::now() + time;
    let members = [cluster.brokers(), cluster.bookies()].concat();
    while Instant::now() < end {
        let member = &members[random.below(members.len() as u64) as usize];
        cluster.process(member).signal(Signal::STOP);
        sleep(Duration::from_millis(50 + random.below(1_450))).await;
        cluster.process(member).signal(Signal::CONT);
    }
}

/// Does the harm for a time, and heals it.
async fn harm(cluster: &mut Cluster, fault: Fault, broker: &str, bookie: &str, time: Duration) {
    let member = match fault {
        Fault::KillBroker | Fault::FreezeBroker | Fault::RestartBroker => broker,
        _ => bookie,
    };
    match fault {
        Fault::KillBroker | Fault::KillBookie => {
            cluster.kill(member);
            sleep(time).await;
            cluster.start_member(member);
            cluster.ready(member).await;
        }
        Fault::FreezeBroker | Fault::FreezeBookie => {
            cluster.process(member).signal(Signal::STOP);
            sleep(time).await;
            cluster.process(member).signal(Signal::CONT);
        }
        Fault::RestartBroker | Fault::RestartBookie => {
            cluster.terminate(member).await;
            cluster.start_member(member);
            cluster.ready(member).await;
        }
        Fault::CutBrokerFromEtcd | Fault::CutBookie => {
            let id = if fault == Fault::CutBookie { bookie } else { broker };
            cluster.path(id).cut();
            sleep(time).await;
            cluster.path(id).mend();
        }
        Fault::KillEtcdMember => {
            cluster.etcd.kill_member(0);
            cluster.etcd.start_member(0);
            cluster.etcd.healthy().await;
        }
        Fault::StopEtcd => {
            cluster.etcd.stop_all();
            sleep(time).await;
            cluster.etcd.start_all().await;
        }
        Fault::KillObjectStore | Fault::FreezeObjectStore | Fault::Stutter => {}
    }
    let members = cluster.brokers().len();
    eventually("every broker is registered again", async || {
        let output = cluster.cli_output(&["broker", "ls"]).await;
        let brokers: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        (brokers.as_array()?.len() == members).then_some(())
    })
    .await;
}
