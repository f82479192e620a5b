//! Table tests: every file of `tests/plans/` is a case, named by the fact it shows. A case says what differs from a world
//! where everything is as specified.

use std::{collections::BTreeMap, fs};

use geminga_operator::{
    controllers::{cluster, marks::Marks, pool, resource},
    crd::{
        BookiePoolSpec, BookiePoolStatus, ConditionStatus, GemingaClusterSpec,
        GemingaClusterStatus, ResourceStatus, StatusReport, Subscription, Tenant, Topic,
        TopicNamespace,
    },
    manifest::Manifest,
    thing::Described,
    workloads::{
        Owner, bookie_service, bookie_set, broker_deployment, broker_service, disruption_budget,
        template_hash,
    },
};
use geminga_runtime::clock::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A case.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Case {
    fact: String,
    kind: String,
    /// Over the defaults of the kind.
    #[serde(default)]
    spec: Value,
    /// Over the defaults of a cluster; null: there is no cluster.
    #[serde(default = "empty")]
    cluster: Value,
    #[serde(default)]
    marks: Marks,
    /// The status that was last written.
    #[serde(default = "empty")]
    before: Value,
    #[serde(default)]
    world: World,
    #[serde(default)]
    observed: Value,
    #[serde(default)]
    now_ms: u64,
    expect: Expect,
}

/// What there is of a pool or a cluster; maps say what differs, by name, and null is what is not there.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct World {
    /// Bookies that the StatefulSet has; none: there is no StatefulSet.
    running: Option<i32>,
    /// What the cluster was when the pods were made.
    old_cluster: Option<Value>,
    /// What the pool was when the StatefulSet was applied.
    old_spec: Option<Value>,
    pods: BTreeMap<String, Value>,
    claims: BTreeMap<String, Value>,
    bookies: BTreeMap<String, Value>,
    server: Option<Value>,
    others: Option<String>,
    /// Changes of the live objects, by kind.
    drift: BTreeMap<String, Value>,
    brokers: Option<Value>,
    pools: Value,
    own_policies: BTreeMap<String, u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Expect {
    actions: Vec<String>,
    /// True, False or Unknown.
    ready: String,
    /// Reconciling, Stalled, or nothing.
    #[serde(default)]
    also: String,
    reason: String,
    /// A part of the message.
    #[serde(default)]
    message: String,
    /// A part of the status.
    #[serde(default = "empty")]
    status: Value,
}

fn empty() -> Value {
    json!({})
}

/// Lays `over` over `base`: objects field by field, null removes.
fn patched(mut base: Value, over: &Value) -> Value {
    match (&mut base, over) {
        (Value::Object(fields), Value::Object(changes)) => {
            for (key, change) in changes {
                let old = fields.remove(key).unwrap_or(Value::Null);
                if !change.is_null() {
                    fields.insert(key.clone(), patched(old, change));
                }
            }
            base
        }
        (_, Value::Null) => base,
        _ => over.clone(),
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"))
}

fn owner(kind: &'static str, name: &str) -> Owner {
    Owner { kind, name: name.into(), namespace: "ns".into(), uid: "u-1".into() }
}

fn cluster_spec(over: &Value) -> GemingaClusterSpec {
    let base = json!({"image": "geminga:1", "etcd": {"endpoints": ["http://etcd:2379"]}});
    read(patched(base, over))
}

fn pool_spec(over: &Value) -> BookiePoolSpec {
    read(patched(json!({"cluster": "demo", "replicas": 3, "storage": {"size": "10Gi"}}), over))
}

fn live(manifest: &Manifest, drift: &BTreeMap<String, Value>) -> Value {
    let change = drift.get(manifest.kind()).cloned().unwrap_or_else(empty);
    patched(manifest.object().clone(), &change)
}

/// The names of a map's entries over generated ones; null removes.
fn list(mut all: BTreeMap<String, Value>, changes: &BTreeMap<String, Value>) -> Vec<Value> {
    for (name, change) in changes {
        match change {
            Value::Null => drop(all.remove(name)),
            change => {
                let old = all.remove(name).unwrap_or_else(empty);
                all.insert(name.clone(), patched(old, change));
            }
        }
    }
    all.into_values().collect()
}

impl World {
    fn of_pool(&self, case: &Case) -> pool::plan::Observed {
        let name = |ordinal: i32| format!("pool-bookie-{ordinal}");
        let spec = pool_spec(&case.spec);
        let owner = owner("BookiePool", "pool");
        let exists = !case.cluster.is_null();
        let now = cluster_spec(if exists { &case.cluster } else { &Value::Null });
        let old_cluster = self.old_cluster.as_ref().map_or_else(|| now.clone(), cluster_spec);
        let old_spec = self.old_spec.as_ref().map_or_else(|| spec.clone(), pool_spec);
        let running = self.running.unwrap_or_default();
        let set = |cluster, spec| bookie_set(&owner, "demo", cluster, spec, running);
        let old = template_hash(&set(&old_cluster, &old_spec)).to_owned();
        let new = template_hash(&set(&now, &spec)).to_owned();
        let mut objects = Map::new();
        if self.running.is_some() {
            let service = bookie_service(&owner, "demo");
            objects.insert("StatefulSet".into(), live(&set(&now, &old_spec), &self.drift));
            objects.insert("Service".into(), live(&service, &self.drift));
        }
        let (mut pods, mut claims, mut bookies) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for pod in (0..running).map(name) {
            let made = json!({
                "name": pod, "uid": format!("uid-{pod}"), "template": old,
                "image": old_cluster.image, "ready": true,
            });
            pods.insert(pod.clone(), made);
            let size = &old_spec.storage.size;
            let claim = format!("data-{pod}");
            claims
                .insert(claim.clone(), json!({"name": claim, "requested": size, "capacity": size}));
            bookies.insert(pod.clone(), json!({"id": pod, "registered": true}));
        }
        let pods: Vec<Value> = list(pods, &self.pods)
            .into_iter()
            .map(|pod| match pod["template"].as_str() {
                Some("new") => patched(pod, &json!({"template": new, "image": now.image})),
                _ => pod,
            })
            .collect();
        let answers = json!({"answers": {"id": "c1", "bookies": list(bookies, &self.bookies)}});
        let server = match &self.server {
            Some(silent) if silent.get("silent").is_some() => silent.clone(),
            Some(over) => patched(answers, &json!({"answers": over})),
            None => answers,
        };
        pool::plan::Observed {
            cluster: exists.then_some(now),
            set: self.running.map(|replicas| pool::plan::SetSeen {
                replicas,
                storage: old_spec.storage.size.clone(),
            }),
            objects: objects.into_iter().collect(),
            pods: read(json!(pods)),
            claims: read(json!(list(claims, &self.claims))),
            others: self.others.clone(),
            server: read(server),
        }
    }

    fn of_cluster(&self, spec: &GemingaClusterSpec) -> cluster::plan::Observed {
        let owner = owner("GemingaCluster", "demo");
        let old = self.old_cluster.as_ref().map_or_else(|| spec.clone(), cluster_spec);
        let mut objects = BTreeMap::new();
        if self.brokers.is_some() {
            for manifest in [
                broker_service(&owner, &old),
                disruption_budget(&owner, "broker"),
                disruption_budget(&owner, "bookie"),
                broker_deployment(&owner, &old, &old.image),
            ] {
                let key = format!("{}/{}", manifest.kind(), manifest.name());
                objects.insert(key, live(&manifest, &self.drift));
            }
        }
        let brokers = self.brokers.as_ref().map(|over| {
            let n = old.brokers.replicas;
            let base = json!({"image": old.image, "replicas": n, "ready": n, "updated": n, "settled": true});
            read(patched(base, over))
        });
        let bookies = json!([{"id": "a", "registered": true}, {"id": "b", "registered": true}]);
        let answers = json!({"answers": {"id": "c1", "bookies": bookies}});
        let server = match &self.server {
            Some(silent) if silent.get("silent").is_some() => silent.clone(),
            Some(over) => patched(answers, &json!({"answers": over})),
            None => answers,
        };
        cluster::plan::Observed {
            brokers,
            objects,
            pools: if self.pools.is_null() { Vec::new() } else { read(self.pools.clone()) },
            server: read(server),
            own_policies: self.own_policies.clone(),
        }
    }
}

fn words(actions: &[impl ToString]) -> Vec<String> {
    actions.iter().map(ToString::to_string).collect()
}

/// Actions, report, and status as JSON.
fn decided(case: &Case) -> (Vec<String>, StatusReport, Value) {
    match case.kind.as_str() {
        "BookiePool" => {
            let before: BookiePoolStatus = read(case.before.clone());
            let (owner, spec) = (owner("BookiePool", "pool"), pool_spec(&case.spec));
            let observed = case.world.of_pool(case);
            let plan = pool::plan::plan(&owner, &spec, &case.marks, &before, &observed);
            (words(&plan.actions), plan.report, json!(plan.status))
        }
        "GemingaCluster" => {
            let before: GemingaClusterStatus = read(case.before.clone());
            let (owner, spec) = (owner("GemingaCluster", "demo"), cluster_spec(&case.spec));
            let observed = case.world.of_cluster(&spec);
            let plan = cluster::plan::plan(&owner, &spec, &case.marks, &before, &observed);
            (words(&plan.actions), plan.report, json!(plan.status))
        }
        "Tenant" => described::<Tenant>(case),
        "TopicNamespace" => described::<TopicNamespace>(case),
        "Topic" => described::<Topic>(case),
        "Subscription" => described::<Subscription>(case),
        other => panic!("{other} is no kind"),
    }
}

fn described<K: Described>(case: &Case) -> (Vec<String>, StatusReport, Value) {
    let spec = patched(json!({"clusterRef": {"name": "demo"}}), &case.spec);
    let object: K = read(json!({
        "apiVersion": "geminga.io/v1alpha1", "kind": case.kind,
        "metadata": {"name": "orders", "namespace": "ns"}, "spec": spec,
    }));
    let before: ResourceStatus = read(case.before.clone());
    let observed = read(patched(json!({"target": "answers"}), &case.observed));
    let wish = object.wish().map_err(|error| error.to_string());
    let now = Timestamp(case.now_ms);
    let plan = resource::plan::plan(&wish, &case.marks, &before, &observed, now);
    (words(&plan.actions), plan.report, json!({"managedPolicies": plan.managed_policies}))
}

/// What is expected of a status is a part of it.
fn holds(status: &Value, expected: &Value) -> bool {
    match expected {
        Value::Object(fields) => fields.iter().all(|(key, value)| {
            status.get(key).map_or_else(|| *value == json!([]), |found| holds(found, value))
        }),
        Value::Array(items) => status.as_array().is_some_and(|found| {
            found.len() == items.len() && found.iter().zip(items).all(|(f, i)| holds(f, i))
        }),
        expected => status == expected,
    }
}

fn check(file: &str, case: &Case) -> Result<(), String> {
    let (actions, report, status) = decided(case);
    let ready = match report.ready {
        ConditionStatus::True => "True",
        ConditionStatus::False => "False",
        ConditionStatus::Unknown => "Unknown",
    };
    let also = match (report.reconciling, report.stalled) {
        (true, false) => "Reconciling",
        (false, true) => "Stalled",
        (false, false) => "",
        (true, true) => "Reconciling and Stalled",
    };
    let expect = &case.expect;
    let reason = format!("{:?}", report.reason);
    let same = actions == expect.actions
        && (ready, also, reason.as_str())
            == (expect.ready.as_str(), expect.also.as_str(), expect.reason.as_str())
        && report.message.contains(&expect.message)
        && holds(&status, &expect.status);
    if same {
        return Ok(());
    }
    Err(format!(
        "{file}: {}\n  actions {actions:#?}\n  ready {ready}, also {also:?}, reason {reason}, message {:?}\n  status {status}\n  expected {expect:#?}\n",
        case.fact, report.message
    ))
}

#[test]
fn every_case_of_the_table_holds() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/plans");
    let mut files: Vec<_> = fs::read_dir(directory)
        .expect("the directory of cases")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut facts = BTreeMap::new();
    let mut wrong = String::new();
    for path in files {
        let file = path.file_name().expect("a file").to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).expect("readable");
        let case: Case =
            serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        if let Err(why) = check(&file, &case) {
            wrong.push_str(&why);
        }
        let twin = facts.insert(case.fact, file.clone());
        assert!(twin.is_none(), "{file} says the same as {twin:?}");
    }
    assert!(facts.len() >= 40, "the cases are there: {}", facts.len());
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn ordinals_are_numbers() {
    use pool::plan::ordinal;
    let mut names = ["p-bookie-10", "p-bookie-9", "p-bookie-0", "p-bookie-100"];
    names.sort_by_key(|name| ordinal("p-bookie", name));
    assert_eq!(names, ["p-bookie-0", "p-bookie-9", "p-bookie-10", "p-bookie-100"]);
    for other in ["p-bookie", "p-bookie-", "p-bookie-x", "p-bookie-01", "p-bookie-+1", "q-bookie-1"]
    {
        assert_eq!(ordinal("p-bookie", other), None, "{other}");
    }
    assert_eq!(ordinal("p", "p-bookie-1"), None, "of another pool whose name begins alike");
}
