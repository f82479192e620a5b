//! `geminga kube plan`: the operator's own reading and deciding, with the user's rights, and nothing done.

mod file;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use futures::{StreamExt, TryStreamExt, stream};
use geminga_operator::{
    controllers::{
        context::Error as OperatorError,
        preview::{Object, Preview, Previewer},
    },
    crd::{ConditionStatus, GemingaClusterSpec, Reason},
    server::Servers,
};
use geminga_runtime::clock::SystemClock;
use kube::{Api, ResourceExt, api::DynamicObject, core::ApiResource};
use serde_json::{Value, json};

use super::{
    access::{self, Access, all, failure},
    forward::Outside,
};
use crate::cli::{
    Global,
    exit::{Code, Failure},
    output::{self, Format},
};

/// Objects whose plans are made at a time.
const AT_ONCE: usize = 8;
/// Every kind, in the order in which their plans are shown.
const KINDS: [&str; 7] = [
    "gemingacluster",
    "bookiepool",
    "gemingaconnection",
    "tenant",
    "topicnamespace",
    "topic",
    "subscription",
];

const AFTER_HELP: &str = "\
Brokers are asked at --server, else through a port that is forwarded to a broker's pod; where neither works the plan says
what it could not see.

  geminga kube plan                        everything in the namespace
  geminga kube plan bookiepool/main
  geminga kube plan -f cluster.yaml        before it is applied";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct PlanArgs {
    /// Only this object, such as bookiepool/main. Default: all of them.
    #[arg(value_name = "KIND/NAME", conflicts_with = "file")]
    object: Option<String>,
    /// Of the objects of this file as they are written there, checked against what is live; - for standard input.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// An object, and the spec of its pool's cluster where that is to be another one than the stored one.
struct Subject {
    object: Object,
    cluster: Option<GemingaClusterSpec>,
}

pub(super) async fn run(args: &PlanArgs, access: &Access, global: &Global) -> Result<(), Failure> {
    let subjects = match (&args.file, &args.object) {
        (Some(file), _) => file::subjects(file, access).await?,
        (None, Some(object)) => vec![one(object, access).await?],
        (None, None) => everything(access).await?,
    };
    let outside = Arc::new(Outside::new(access.client.clone(), global.given_server()));
    let address = Arc::new(outside.address());
    unseen(&subjects, &outside).await;
    let previewer =
        Previewer::new(access.client.clone(), outside.clone(), address, Arc::new(SystemClock));
    let made: Vec<(Object, Preview)> = stream::iter(subjects)
        .map(|subject| made(&previewer, subject))
        .buffered(AT_ONCE)
        .try_collect()
        .await?;
    print(&made, access, global.output)
}

/// Plans one. A server's refusal is a part of the plan; what Kubernetes refuses to this user is an error.
async fn made(previewer: &Previewer, subject: Subject) -> Result<(Object, Preview), Failure> {
    let Subject { object, cluster } = subject;
    let preview = match previewer.preview(&object, cluster.as_ref()).await {
        Ok(preview) => preview,
        Err(OperatorError::Kubernetes(error)) => return Err(failure(&error)),
        Err(error) => Preview { actions: Vec::new(), report: error.report() },
    };
    Ok((object, preview))
}

/// Tells which clusters do not answer, once each.
async fn unseen(subjects: &[Subject], outside: &Outside) {
    let mut clusters = BTreeMap::new();
    for subject in subjects {
        let namespace = subject.object.meta().namespace.clone().unwrap_or_default();
        let name = match &subject.object {
            Object::GemingaCluster(cluster) => cluster.name_any(),
            Object::BookiePool(pool) => pool.spec.cluster.clone(),
            _ => continue,
        };
        clusters.insert((namespace.clone(), name.clone()), outside.address()(&namespace, &name));
    }
    for ((_, name), address) in clusters {
        let asked = match outside.connect(&address).await {
            Ok(server) => server.cluster().await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = asked {
            output::note(&format!(
                "not seen: what the brokers of {name} know (bookies, ledgers, drains, policies): {error}"
            ));
        }
    }
}

/// Objects of one kind, whatever is in them.
fn dynamic(access: &Access, resource: &ApiResource, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(access.client.clone(), namespace, resource)
}

/// Reads an object of ours as the operator does.
fn parsed(kind: &str, object: Value) -> Result<Option<Object>, Failure> {
    Object::parse(kind, object).map_err(|error| {
        let words = format!("{kind}: {error}");
        Failure::new(Code::Usage, words, format!("kubectl explain {}.spec", kind.to_lowercase()))
    })
}

async fn everything(access: &Access) -> Result<Vec<Subject>, Failure> {
    let mut subjects = Vec::new();
    for kind in KINDS {
        let Some(resource) = access::kind_of(kind) else { continue };
        let api = if access.all {
            Api::all_with(access.client.clone(), &resource)
        } else {
            dynamic(access, &resource, &access.namespace)
        };
        let found: Vec<DynamicObject> =
            all(&api, "").await.map_err(|error| access::of_our_kinds(&error))?;
        for object in found {
            let object = parsed(&resource.kind, json!(object))?;
            subjects.extend(object.map(|object| Subject { object, cluster: None }));
        }
    }
    Ok(subjects)
}

async fn one(word: &str, access: &Access) -> Result<Subject, Failure> {
    let wrong = |words: String| Failure::usage(words, "kube plan");
    let (kind, name) = word
        .split_once('/')
        .ok_or_else(|| wrong(format!("{word:?} is not KIND/NAME, such as bookiepool/main")))?;
    let resource = access::kind_of(kind)
        .ok_or_else(|| wrong(format!("{kind:?} is none of our kinds: {}", KINDS.join(", "))))?;
    if access.all {
        return Err(wrong("one object is in one namespace: leave -A out".into()));
    }
    let api = dynamic(access, &resource, &access.namespace);
    let found = api.get_opt(name).await.map_err(|error| failure(&error))?;
    let Some(found) = found else {
        let there = all(&api, "").await.map_err(|error| access::of_our_kinds(&error))?;
        let there: Vec<String> = there.iter().map(ResourceExt::name_any).collect();
        return Err(access.not_found(&resource.kind, name, &there));
    };
    let object = parsed(&resource.kind, json!(found))?;
    let object = object.ok_or_else(|| wrong(format!("{kind:?} is none of our kinds")))?;
    Ok(Subject { object, cluster: None })
}

fn print(made: &[(Object, Preview)], access: &Access, format: Format) -> Result<(), Failure> {
    if format != Format::Table {
        let rows: Vec<Value> = made.iter().map(|(object, preview)| row(object, preview)).collect();
        return Ok(output::document(format, &rows)?);
    }
    let quiet = |preview: &Preview| {
        preview.actions.is_empty() && preview.report.reason == Reason::AsSpecified
    };
    let mut still = 0;
    for (object, preview) in made {
        if quiet(preview) && made.len() > 1 {
            still += 1;
            continue;
        }
        output::line(&text(object, preview, access.all))?;
    }
    if still > 0 {
        output::note(&format!("{still} objects are as specified: nothing to do"));
    }
    if made.is_empty() {
        output::note(&format!("there are no objects of ours in {}", access.place()));
    }
    Ok(())
}

fn text(object: &Object, preview: &Preview, with_namespace: bool) -> String {
    let meta = object.meta();
    let name = meta.name.as_deref().unwrap_or_default();
    let mut text = match meta.namespace.as_deref().filter(|_| with_namespace) {
        Some(namespace) => format!("{}/{name} in {namespace}\n", object.kind()),
        None => format!("{}/{name}\n", object.kind()),
    };
    for action in &preview.actions {
        text += &format!("  {action}\n");
    }
    if preview.actions.is_empty() {
        text += "  nothing to do\n";
    }
    let report = &preview.report;
    text + &format!("  => {}, {:?}: {}", readiness(report.ready), report.reason, report.message)
}

fn readiness(ready: ConditionStatus) -> &'static str {
    match ready {
        ConditionStatus::True => "Ready",
        ConditionStatus::False => "not ready",
        ConditionStatus::Unknown => "unknown",
    }
}

fn row(object: &Object, preview: &Preview) -> Value {
    let (meta, report) = (object.meta(), &preview.report);
    json!({
        "kind": object.kind(),
        "namespace": meta.namespace,
        "name": meta.name,
        "actions": preview.actions,
        "ready": report.ready,
        "stalled": report.stalled,
        "reason": report.reason,
        "message": report.message,
    })
}
