//! `geminga kube drain`: fewer bookies in a pool, by its scale subresource; the operator does the rest, with its proof.

use std::time::Duration;

use geminga_operator::crd::{
    BookiePool, Condition, ConditionStatus, ConditionType, DrainNote, GemingaCluster, Reason,
};
use geminga_runtime::units::Period;
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};

use super::{
    access::{Access, failure},
    status::drain_words,
};
use crate::cli::{
    exit::{Code, Failure},
    output::{self, Format},
};

/// Between two looks at the pool.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// An operator that has not looked at the pool for so long is probably not there.
const OPERATOR_SILENT: Duration = Duration::from_secs(30);

const AFTER_HELP: &str = "\
The bookies with the highest ordinals go, one at a time: their ledgers are moved to others, and when it is proven that no
ledger names a bookie its pod goes, then its volume. Ctrl-C ends the looking, not the drain.

Exit codes: 0 they are gone, 7 not within the timeout (the drain goes on), 4 refused, 3 there is no such pool";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct DrainArgs {
    /// The BookiePool.
    pool: String,
    /// How many bookies are to stay; with --cancel, how many are to be there again. Default: one fewer; with --cancel, as
    /// many as there are now.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(i32).range(0..=1_000))]
    replicas: Option<i32>,
    /// Take it back: the number is raised again. What is proven already goes all the same, and comes back empty.
    #[arg(long, conflicts_with = "force")]
    cancel: bool,
    /// Also below what new ledgers need.
    #[arg(long)]
    force: bool,
    /// Only ask for it.
    #[arg(long)]
    no_wait: bool,
    /// How long to look on; the drain goes on afterwards.
    #[arg(long, default_value = "1h", value_name = "TIME", conflicts_with = "no_wait")]
    timeout: Period,
}

pub(super) async fn run(args: &DrainArgs, access: &Access, format: Format) -> Result<(), Failure> {
    if access.all {
        return Err(Failure::usage("a drain is of one pool: name its namespace", "kube drain"));
    }
    let pools: Vec<BookiePool> = access.list().await?;
    let Some(pool) = pools.iter().find(|pool| pool.name_any() == args.pool) else {
        let there: Vec<String> = pools.iter().map(ResourceExt::name_any).collect();
        return Err(access.not_found("BookiePool", &args.pool, &there));
    };
    let wanted = if args.cancel {
        raised(args, pool)?
    } else {
        let cluster = cluster_of(access, pool).await?;
        lowered(args, pool, &pools, cluster.as_ref())?
    };
    announce(args, pool, wanted, access);
    let api = access.within::<BookiePool>(&access.namespace);
    let patch = json!({"spec": {"replicas": wanted}});
    let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
    api.patch_scale(&args.pool, &params, &patch).await.map_err(|error| failure(&error))?;
    let asked = |done: bool, pool: &BookiePool| row(args, pool, wanted, done);
    if args.no_wait {
        output::note(&format!("look again: geminga kube status{}", access.flags()));
        return Ok(output::object(format, &asked(false, pool))?);
    }
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (done, last) = tokio::select! {
        followed = follow(args, access, wanted) => followed?,
        _ = terminate.recv() => return Err(left(args, access)),
        _ = interrupt.recv() => return Err(left(args, access)),
    };
    output::object(format, &asked(done, &last))?;
    if done {
        return Ok(());
    }
    let words = format!("not done within {}, and goes on: {}", args.timeout, progress(&last));
    Err(Failure::new(Code::NotReady, words, format!("geminga kube status{}", access.flags())))
}

async fn cluster_of(access: &Access, pool: &BookiePool) -> Result<Option<GemingaCluster>, Failure> {
    let clusters = access.within::<GemingaCluster>(&access.namespace);
    clusters.get_opt(&pool.spec.cluster).await.map_err(|error| failure(&error))
}

/// The lower number, if ledgers can live with it.
fn lowered(
    args: &DrainArgs,
    pool: &BookiePool,
    pools: &[BookiePool],
    cluster: Option<&GemingaCluster>,
) -> Result<i32, Failure> {
    let now = pool.spec.replicas;
    let wanted = args.replicas.unwrap_or(now - 1);
    if wanted < 0 || wanted >= now {
        let words = format!("pool {} asks for {now} bookies: a drain asks for fewer", args.pool);
        let next = format!("kubectl scale bookiepool/{} --replicas {wanted}", args.pool);
        return Err(Failure::new(Code::Usage, words, next));
    }
    let Some(cluster) = cluster else {
        let words = format!(
            "there is no GemingaCluster {}, and without its brokers nothing is ever proven",
            pool.spec.cluster
        );
        return Err(Failure::new(Code::NotFound, words, "geminga kube status"));
    };
    let others = pools.iter().filter(|other| {
        other.spec.cluster == pool.spec.cluster && other.name_any() != pool.name_any()
    });
    let stay = wanted + others.map(|other| other.spec.replicas).sum::<i32>();
    let ledgers = &cluster.spec.ledgers;
    if stay < ledgers.ensemble && !args.force {
        let words = format!(
            "{stay} bookies would stay in cluster {}, but ledgers are spread over {} and keep {} copies: the drain would wait for others",
            pool.spec.cluster, ledgers.ensemble, ledgers.write_quorum
        );
        let next = format!("geminga kube drain {} --replicas {wanted} --force", args.pool);
        return Err(Failure::new(Code::Refused, words, next));
    }
    Ok(wanted)
}

/// The number that takes the drain back.
fn raised(args: &DrainArgs, pool: &BookiePool) -> Result<i32, Failure> {
    let status = pool.status.clone().unwrap_or_default();
    let now = pool.spec.replicas;
    let wanted = args.replicas.unwrap_or(status.replicas);
    if wanted <= now {
        let words = format!(
            "nothing to take back: {} bookies are there and {now} are asked for",
            status.replicas
        );
        let next = format!("geminga kube drain {} --cancel --replicas {}", args.pool, now + 1);
        return Err(Failure::new(Code::Refused, words, next));
    }
    Ok(wanted)
}

/// Says what is going to happen.
fn announce(args: &DrainArgs, pool: &BookiePool, wanted: i32, access: &Access) {
    let (name, now) = (&args.pool, pool.spec.replicas);
    let there = pool.status.as_ref().map_or(now, |status| status.replicas.max(now));
    if args.cancel {
        output::note(&format!("pool {name}: {now} -> {wanted} bookies, drains are taken back"));
        return;
    }
    let going: Vec<String> =
        (wanted..there).rev().map(|ordinal| format!("{name}-bookie-{ordinal}")).collect();
    output::note(&format!("pool {name}: {now} -> {wanted} bookies"));
    output::note(&format!(
        "one at a time {} gives its ledgers to others; with the proof its pod goes, then its volume",
        going.join(", then ")
    ));
    output::note(&format!("take it back: geminga kube drain {name} --cancel{}", access.flags()));
}

/// Looks on until the pool has as many bookies as it is to have, and every drain is over; what it was last.
async fn follow(
    args: &DrainArgs,
    access: &Access,
    wanted: i32,
) -> Result<(bool, BookiePool), Failure> {
    let api = access.within::<BookiePool>(&access.namespace);
    let begun = Instant::now();
    let deadline = begun + args.timeout.0;
    let (mut told, mut warned) = (String::new(), false);
    let mut last = None;
    loop {
        match api.get_opt(&args.pool).await {
            Ok(Some(pool)) => last = Some(pool),
            Ok(None) => {
                let words = format!("pool {} was deleted meanwhile; its volumes stay", args.pool);
                return Err(Failure::new(Code::NotFound, words, "geminga kube status"));
            }
            // The API server may be away for a while.
            Err(error @ kube::Error::Api(_)) => return Err(failure(&error)),
            Err(error) => output::note(&failure(&error).message),
        }
        if let Some(pool) = &last {
            if is_done(pool, wanted) {
                return Ok((true, pool.clone()));
            }
            let words = progress(pool);
            if words != told {
                output::note(&words);
                told = words;
            }
            if !seen(pool) && !warned && begun.elapsed() >= OPERATOR_SILENT {
                warned = true;
                output::note(
                    "does an operator run? kubectl get pods -A -l app.kubernetes.io/name=geminga-operator",
                );
            }
        }
        if Instant::now() + LOOK_EVERY > deadline
            && let Some(pool) = last
        {
            return Ok((false, pool));
        }
        sleep(LOOK_EVERY).await;
    }
}

fn seen(pool: &BookiePool) -> bool {
    let observed = pool.status.as_ref().map_or(0, |status| status.observed_generation);
    observed >= pool.metadata.generation.unwrap_or_default()
}

/// Nothing is drained any more, and the pool has the size that was asked for.
fn is_done(pool: &BookiePool, wanted: i32) -> bool {
    let status = pool.status.clone().unwrap_or_default();
    seen(pool) && status.drains.is_empty() && status.replicas == wanted
}

/// What is under way, or what keeps it.
fn progress(pool: &BookiePool) -> String {
    if !seen(pool) {
        return "waiting for the operator to see it".into();
    }
    let status = pool.status.clone().unwrap_or_default();
    let held = ready(&status.conditions).filter(|ready| {
        !matches!(ready.reason, Reason::Draining | Reason::DrainBlocked | Reason::AsSpecified)
    });
    let drains: Vec<String> = status.drains.iter().map(drain).collect();
    match (drains.as_slice(), held) {
        ([], Some(held)) => format!("{:?}: {}", held.reason, held.message),
        ([], None) => format!("{} bookies are there", status.replicas),
        (drains, Some(held)) => {
            format!("{} ({:?}: {})", drains.join("; "), held.reason, held.message)
        }
        (drains, None) => drains.join("; "),
    }
}

fn drain(note: &DrainNote) -> String {
    format!("{}: {}", note.bookie, drain_words(note))
}

fn ready(conditions: &[Condition]) -> Option<&Condition> {
    conditions.iter().find(|condition| condition.type_ == ConditionType::Ready)
}

fn row(args: &DrainArgs, pool: &BookiePool, wanted: i32, done: bool) -> Value {
    let status = pool.status.clone().unwrap_or_default();
    let is_ready =
        ready(&status.conditions).is_some_and(|ready| ready.status == ConditionStatus::True);
    json!({
        "pool": args.pool,
        "namespace": pool.namespace(),
        "wanted": wanted,
        "bookies": status.replicas,
        "done": done,
        "ready": is_ready,
        "drains": status.drains,
    })
}

fn left(args: &DrainArgs, access: &Access) -> Failure {
    let words = format!("the drain of pool {} goes on", args.pool);
    Failure::new(Code::NotReady, words, format!("geminga kube status{}", access.flags()))
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use geminga_operator::crd::BookiePoolStatus;

    use super::*;

    fn pool(name: &str, replicas: i32) -> BookiePool {
        let object = json!({
            "apiVersion": "geminga.io/v1alpha1", "kind": "BookiePool",
            "metadata": {"name": name, "generation": 2},
            "spec": {"cluster": "demo", "replicas": replicas, "storage": {"size": "1Gi"}},
        });
        serde_json::from_value(object).expect("a pool")
    }

    fn cluster() -> GemingaCluster {
        let object = json!({
            "apiVersion": "geminga.io/v1alpha1", "kind": "GemingaCluster",
            "metadata": {"name": "demo"},
            "spec": {"image": "geminga:1", "etcd": {"endpoints": ["http://etcd:2379"]}},
        });
        serde_json::from_value(object).expect("a cluster")
    }

    fn args(replicas: Option<i32>, force: bool) -> DrainArgs {
        DrainArgs {
            pool: "main".into(),
            replicas,
            cancel: false,
            force,
            no_wait: false,
            timeout: Period(Duration::from_secs(1)),
        }
    }

    #[test]
    fn one_fewer_is_the_default_and_ledgers_keep_their_ensemble_over_all_pools() {
        let (five, three, other) = (pool("main", 5), pool("main", 3), pool("other", 2));
        let cluster = cluster();
        let lowered = |args: &DrainArgs, pools: &[BookiePool]| {
            lowered(args, &pools[0], pools, Some(&cluster)).map_err(|failure| failure.code)
        };
        assert_eq!(lowered(&args(None, false), from_ref(&five)), Ok(4));
        assert_eq!(lowered(&args(Some(2), false), from_ref(&five)), Err(Code::Refused));
        assert_eq!(lowered(&args(Some(2), true), from_ref(&five)), Ok(2));
        assert_eq!(lowered(&args(None, false), from_ref(&three)), Err(Code::Refused));
        assert_eq!(lowered(&args(None, false), &[three, other]), Ok(2), "another pool's count");
        assert_eq!(lowered(&args(Some(5), false), &[five]), Err(Code::Usage), "not fewer");
    }

    #[test]
    fn a_drain_is_taken_back_to_what_is_there() {
        let mut pool = pool("main", 3);
        assert_eq!(raised(&args(None, false), &pool).map_err(|f| f.code), Err(Code::Refused));
        pool.status = Some(BookiePoolStatus { replicas: 5, ..BookiePoolStatus::default() });
        assert_eq!(raised(&args(None, false), &pool), Ok(5));
        assert_eq!(raised(&args(Some(4), false), &pool), Ok(4));
    }

    #[test]
    fn it_is_done_when_the_operator_has_seen_it_and_no_drain_is_left() {
        let mut pool = pool("main", 3);
        let status = BookiePoolStatus { replicas: 3, ..BookiePoolStatus::default() };
        pool.status = Some(BookiePoolStatus { observed_generation: 1, ..status.clone() });
        assert!(!is_done(&pool, 3), "that was before");
        let status = BookiePoolStatus { observed_generation: 2, ..status };
        pool.status = Some(status.clone());
        assert!(is_done(&pool, 3));
        let note = DrainNote { bookie: "main-bookie-3".into(), ..DrainNote::default() };
        pool.status = Some(BookiePoolStatus { drains: vec![note], ..status });
        assert!(!is_done(&pool, 3), "its volume is still there");
    }
}
