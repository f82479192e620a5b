//! Clusters and bookie pools: drains with proof, rolls behind a gate, volumes. The test plays the StatefulSet's controller.

use std::collections::BTreeSet;

use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::{PersistentVolumeClaim, Pod},
    events::v1::Event,
    storage::v1::StorageClass,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::{
    apiserver::{Kubernetes, condition},
    harness::{eventually, eventually_ok},
    scripted::{Running, Scripted},
};

/// An API server, a scripted cluster, an operator, and what a StatefulSet's controller would do.
pub(crate) struct World {
    pub(crate) kubernetes: Kubernetes,
    pub(crate) server: Scripted,
}

impl World {
    /// A cluster `demo` with a pool `main` of `replicas` bookies, all of them up.
    pub(crate) async fn start(replicas: i32) -> (Self, Running) {
        let world = Self { kubernetes: Kubernetes::start().await, server: Scripted::new() };
        let operator = world.server.operator(&world.kubernetes, "operator");
        world.server.say(|_| {});
        let classes: Api<StorageClass> = Api::all(world.kubernetes.client.clone());
        let class = json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "standard"},
            "provisioner": "example.com/none", "allowVolumeExpansion": true,
        });
        let params = PatchParams::apply("test");
        classes.patch("standard", &params, &Patch::Apply(&class)).await.expect("a class");
        world.image("geminga:1").await;
        world.pool(replicas, "10Gi").await;
        world
            .until("the pool is ready", async || {
                world.ready("BookiePool", "main", "AsSpecified").await
            })
            .await;
        (world, operator)
    }

    async fn image(&self, image: &str) {
        // In other words than the API server's own: it stores 500m and 1Gi.
        let resources = json!({"requests": {"cpu": "0.5", "memory": "1024Mi"}});
        let spec = json!({
            "image": image, "etcd": {"endpoints": ["http://etcd:2379"]},
            "brokers": {"replicas": 2, "resources": resources},
        });
        self.kubernetes.apply("GemingaCluster", "demo", spec).await.expect("sound");
    }

    pub(crate) async fn pool(&self, replicas: i32, size: &str) {
        let storage = json!({"size": size, "storageClass": "standard"});
        let resources = json!({"limits": {"cpu": "1500m", "memory": "0.5Gi"}});
        let spec = json!({
            "cluster": "demo", "replicas": replicas, "storage": storage, "resources": resources,
        });
        self.kubernetes.apply("BookiePool", "main", spec).await.expect("sound");
    }

    async fn ready(&self, kind: &str, name: &str, reason: &str) -> Option<()> {
        let object = self.kubernetes.get(kind, name).await?;
        let ready = condition(&object, "Ready");
        let present = ready["observedGeneration"] == object["metadata"]["generation"];
        (present && ready["status"] == "True" && ready["reason"] == reason).then_some(())
    }

    pub(crate) async fn status(&self) -> Value {
        self.kubernetes.get("BookiePool", "main").await.expect("there")["status"].clone()
    }

    /// Waits for it, and plays the controller meanwhile.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        mut condition: impl AsyncFnMut() -> Option<T>,
    ) -> T {
        eventually_ok(async || {
            self.play().await;
            match condition().await {
                Some(found) => Ok(found),
                None => Err(format!("{what}; the pool says {}", self.status().await)),
            }
        })
        .await
    }

    /// One turn of a StatefulSet's controller, and of bookies that start and stop.
    pub(crate) async fn play(&self) {
        let sets: Api<StatefulSet> = self.kubernetes.api();
        let Some(set) = sets.get_opt("main-bookie").await.expect("it answers") else { return };
        let set = json!(set);
        let wanted = set["spec"]["replicas"].as_i64().expect("a number");
        let pods = self.pods().await;
        for ordinal in 0..wanted {
            let name = format!("main-bookie-{ordinal}");
            self.claim(&name, &set).await;
            if !pods.contains(&name) {
                let runs = self.pod(&name, &set["spec"]["template"]).await;
                if runs {
                    self.server.bookie(&name, |bookie| bookie.registered = true);
                }
            }
        }
        self.release_claims().await;
        for name in pods {
            let ordinal: i64 = name["main-bookie-".len()..].parse().expect("a number");
            if ordinal >= wanted {
                let api: Api<Pod> = self.kubernetes.api();
                api.delete(&name, &DeleteParams::default()).await.expect("deleted");
            }
        }
    }

    /// What protects claims in use lets go of those that are being deleted, once their pod is gone.
    async fn release_claims(&self) {
        let api: Api<PersistentVolumeClaim> = self.kubernetes.api();
        let pods = self.pods().await;
        for claim in api.list(&ListParams::default()).await.expect("it answers") {
            let name = claim.name_any();
            let used = pods.contains(name.trim_start_matches("data-"));
            if claim.metadata.deletion_timestamp.is_some() && !used {
                let patch = json!({"metadata": {"finalizers": null}});
                let patch = Patch::Merge(&patch);
                api.patch(&name, &PatchParams::default(), &patch).await.expect("let go");
            }
        }
    }

    async fn pods(&self) -> BTreeSet<String> {
        let api: Api<Pod> = self.kubernetes.api();
        let all = api.list(&ListParams::default()).await.expect("it answers");
        all.items.iter().map(ResourceExt::name_any).collect()
    }

    async fn claims(&self) -> BTreeSet<String> {
        let api: Api<PersistentVolumeClaim> = self.kubernetes.api();
        let all = api.list(&ListParams::default()).await.expect("it answers");
        let going = |claim: &&PersistentVolumeClaim| claim.metadata.deletion_timestamp.is_none();
        all.items.iter().filter(going).map(ResourceExt::name_any).collect()
    }

    /// Makes the pod; whether it runs: nobody has the image `geminga:missing`.
    async fn pod(&self, name: &str, template: &Value) -> bool {
        let api: Api<Pod> = self.kubernetes.api();
        let mut metadata = template["metadata"].clone();
        metadata["name"] = json!(name);
        let mut spec = template["spec"].clone();
        spec["volumes"] = json!([{"name": "data", "persistentVolumeClaim": {"claimName": format!("data-{name}")}}]);
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
        let pod = serde_json::from_value(pod).expect("a pod");
        api.create(&PostParams::default(), &pod).await.expect("the template makes a pod");
        let runs = template["spec"]["containers"][0]["image"] != "geminga:missing";
        let container = |state: Value| json!([{"name": "bookie", "image": "i", "imageID": "", "ready": runs, "restartCount": 0, "state": state}]);
        let status = if runs {
            let ready = json!([{"type": "Ready", "status": "True"}]);
            json!({"phase": "Running", "conditions": ready, "containerStatuses": container(json!({"running": {}}))})
        } else {
            let waiting = json!({"reason": "ImagePullBackOff", "message": "no such image"});
            json!({"phase": "Pending", "containerStatuses": container(json!({"waiting": waiting}))})
        };
        let status = json!({"status": status});
        let patch = Patch::Merge(&status);
        api.patch_status(name, &PatchParams::default(), &patch).await.expect("a status");
        runs
    }

    /// Makes the claim, or gives it what it asks for.
    async fn claim(&self, pod: &str, set: &Value) {
        let api: Api<PersistentVolumeClaim> = self.kubernetes.api();
        let name = format!("data-{pod}");
        let found = api.get_opt(&name).await.expect("it answers");
        if found.is_none() {
            let claim = json!({
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "labels": set["spec"]["selector"]["matchLabels"]},
                "spec": set["spec"]["volumeClaimTemplates"][0]["spec"],
            });
            let claim = serde_json::from_value(claim).expect("a claim");
            api.create(&PostParams::default(), &claim).await.expect("a claim");
        }
        let found = json!(api.get(&name).await.expect("there"));
        let asked = &found["spec"]["resources"]["requests"]["storage"];
        if found["status"]["capacity"]["storage"] != *asked {
            let status = json!({"status": {"phase": "Bound", "capacity": {"storage": asked}}});
            let patch = Patch::Merge(&status);
            api.patch_status(&name, &PatchParams::default(), &patch).await.expect("a status");
        }
    }

    /// The proof: the server says so, and then the bookie's cookie is gone.
    pub(crate) fn prove(&self, bookie: &str) {
        self.server.say(|facts| facts.bookies.retain(|known| known.id != bookie));
    }
}

fn names(prefix: &str, ordinals: std::ops::Range<u32>) -> BTreeSet<String> {
    ordinals.map(|ordinal| format!("{prefix}main-bookie-{ordinal}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn fewer_bookies_drain_one_by_one_over_a_restart_and_volumes_go_only_with_the_proof() {
    let (world, operator) = World::start(5).await;
    world.pool(3, "10Gi").await;
    world
        .until("the highest one is drained", async || {
            (world.server.calls() == ["drain main-bookie-4"]).then_some(())
        })
        .await;

    // Another operator goes on where the first one was killed.
    operator.kill();
    let _operator = world.server.operator(&world.kubernetes, "next");
    world.server.bookie("main-bookie-4", |bookie| {
        if let Some(drain) = &mut bookie.drain {
            drain.blocked = "2 bookies would stay writable, ledgers need 3".into();
        }
    });
    world
        .until("a condition names what keeps it", async || {
            let status = world.status().await;
            let ready = condition(&json!({"status": status}), "Ready");
            let says = ready["message"].as_str()?.contains("would stay writable");
            (says && ready["reason"] == "DrainBlocked").then_some(())
        })
        .await;
    assert_eq!(world.pods().await, names("", 0..5), "nothing goes without the proof");
    assert_eq!(world.claims().await, names("data-", 0..5));
    assert_eq!(world.server.calls(), ["drain main-bookie-4"], "asked once");

    world.prove("main-bookie-4");
    world
        .until("its pod and its volume go, and the next one is drained", async || {
            let calls = world.server.calls() == ["drain main-bookie-4", "drain main-bookie-3"];
            (calls && world.claims().await == names("data-", 0..4)).then_some(())
        })
        .await;
    assert_eq!(world.pods().await, names("", 0..4));

    // Raised again: the drain under way is taken back, and the ordinal that went comes back empty.
    world.pool(5, "10Gi").await;
    world
        .until("all five are there again", async || {
            world.ready("BookiePool", "main", "AsSpecified").await?;
            (world.pods().await == names("", 0..5)).then_some(())
        })
        .await;
    assert!(world.server.calls().contains(&"cancel main-bookie-3".to_owned()));
    assert_eq!(world.status().await["drains"], Value::Null);

    // And fewer once more: what went with a proof before needs one of its own now.
    let asked = world.server.calls().len();
    world.pool(3, "10Gi").await;
    for (ordinal, left) in [(4, 4), (3, 3)] {
        let bookie = format!("main-bookie-{ordinal}");
        world
            .until("it is drained", async || {
                (world.server.calls().last() == Some(&format!("drain {bookie}"))).then_some(())
            })
            .await;
        assert_eq!(world.claims().await, names("data-", 0..left + 1), "not before the proof");
        world.prove(&bookie);
        world
            .until("its volume goes", async || {
                (world.claims().await == names("data-", 0..left)).then_some(())
            })
            .await;
    }
    world
        .until("the pool is ready", async || world.ready("BookiePool", "main", "AsSpecified").await)
        .await;
    assert_eq!(world.server.calls()[asked..], ["drain main-bookie-4", "drain main-bookie-3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_breaks_one_bookie_whose_pod_is_named_and_the_old_image_mends_it() {
    let (world, _operator) = World::start(3).await;
    let before = uids(&world).await;
    world.image("geminga:missing").await;
    world
        .until("a condition names the pod and the reason", async || {
            let status = world.status().await;
            let ready = condition(&json!({"status": status}), "Ready");
            let message = ready["message"].as_str()?;
            let says = message.contains("pod main-bookie-2: ImagePullBackOff: no such image");
            (says && ready["reason"] == "PodFailing").then_some(())
        })
        .await;
    assert_eq!(uids(&world).await.intersection(&before).count(), 2, "the others serve on");
    let events: Api<Event> = world.kubernetes.api();
    eventually("an Event warns", async || {
        let all = events.list(&ListParams::default()).await.ok()?;
        let warns = |event: &&Event| event.type_.as_deref() == Some("Warning");
        all.iter()
            .filter(warns)
            .find(|event| event.reason.as_deref() == Some("PodFailing"))
            .map(drop)
    })
    .await;

    // Its lease did not run out yet, and nobody could tell whether copies are whole: a process that does not run needs neither.
    world.server.say(|facts| facts.under_replicated = 3);
    world.image("geminga:1").await;
    world
        .until("all three run", async || world.ready("BookiePool", "main", "AsSpecified").await)
        .await;
    let after = uids(&world).await;
    assert_eq!((after.len(), after.intersection(&before).count()), (3, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_that_panics_hurts_no_other_object_and_is_tried_again() {
    let kubernetes = Kubernetes::start().await;
    let server = Scripted::new();
    server.say(|_| {});
    let _operator = server.operator(&kubernetes, "operator");
    let spec = json!({"servers": ["http://anywhere:1"]});
    kubernetes.apply("GemingaConnection", "out", spec).await.expect("sound");
    let spec = json!({"clusterRef": {"kind": "GemingaConnection", "name": "out"}});
    for topic in ["poison", "fine", "poison-not"] {
        kubernetes.apply("Topic", topic, spec.clone()).await.expect("sound");
    }
    for topic in ["fine", "poison-not"] {
        kubernetes.settles("Topic", topic, "True", "AsSpecified").await;
    }
    // What broke it goes: its next turn is another one.
    let annotations = json!({"geminga.io/paused": "true"});
    kubernetes.apply_with("Topic", "poison", spec, annotations).await.expect("sound");
    kubernetes.settles("Topic", "poison", "Unknown", "Paused").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_replaces_one_bookie_at_a_time_behind_the_gate_and_brokers_last() {
    let (world, _operator) = World::start(3).await;
    let deployments: Api<Deployment> = world.kubernetes.api();
    let image = async || {
        let live = json!(deployments.get("demo-broker").await.expect("there"));
        live["spec"]["template"]["spec"]["containers"][0]["image"].clone()
    };
    eventually("the brokers are there", async || {
        deployments.get_opt("demo-broker").await.expect("it answers")
    })
    .await;
    assert_eq!(image().await, "geminga:1");
    let before = uids(&world).await;

    world.server.say(|facts| facts.under_replicated = 2);
    world.image("geminga:2").await;
    eventually_ok(async || {
        let status = world.status().await;
        let ready = condition(&json!({"status": status}), "Ready");
        if ready["reason"] == "RollBlocked" {
            Ok(())
        } else {
            Err(format!("the gate is shut: {ready}"))
        }
    })
    .await;
    assert_eq!(uids(&world).await, before, "no pod goes while ledgers lack copies");
    assert_eq!(image().await, "geminga:1");

    world.server.say(|facts| facts.under_replicated = 0);
    let mut replaced = Vec::new();
    for left in (0..3).rev() {
        // Before the controller makes it anew, exactly one is missing.
        let gone = eventually("the next one goes", async || {
            let there = world.pods().await;
            let missing: Vec<String> = names("", 0..3).difference(&there).cloned().collect();
            assert!(missing.len() <= 1, "one at a time: {missing:?}");
            missing.into_iter().next()
        })
        .await;
        world.server.bookie(&gone, |bookie| bookie.registered = false);
        replaced.push(gone);
        if left > 0 {
            assert_eq!(image().await, "geminga:1", "brokers wait");
        }
        world.play().await;
    }
    assert_eq!(replaced, ["main-bookie-2", "main-bookie-1", "main-bookie-0"]);
    world.until("brokers follow", async || (image().await == "geminga:2").then_some(())).await;
    world
        .until("the pool is ready", async || world.ready("BookiePool", "main", "AsSpecified").await)
        .await;
    assert_eq!(world.status().await["image"], "geminga:2");

    // Somebody scales the brokers by hand.
    let patch = json!({"spec": {"replicas": 9}});
    let patch = Patch::Merge(&patch);
    deployments.patch("demo-broker", &PatchParams::default(), &patch).await.expect("patched");
    eventually("drift is corrected", async || {
        let live = json!(deployments.get("demo-broker").await.ok()?);
        (live["spec"]["replicas"] == 2).then_some(())
    })
    .await;
}

async fn uids(world: &World) -> BTreeSet<String> {
    let api: Api<Pod> = world.kubernetes.api();
    let all = api.list(&ListParams::default()).await.expect("it answers");
    all.items.iter().filter_map(ResourceExt::uid).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_grow_and_the_statefulset_is_made_anew_around_its_pods() {
    let (world, _operator) = World::start(3).await;
    let sets: Api<StatefulSet> = world.kubernetes.api();
    let before = uids(&world).await;
    world.pool(3, "20Gi").await;
    let size = async || {
        let set = json!(sets.get_opt("main-bookie").await.expect("it answers")?);
        set.pointer("/spec/volumeClaimTemplates/0/spec/resources/requests/storage").cloned()
    };
    // Nobody collects orphans here: the set is only marked until the test lets it go, as the collector would.
    world
        .until("the claim template has the new size", async || {
            let set = sets.get_opt("main-bookie").await.expect("it answers");
            if let Some(set) = set.filter(|set| set.metadata.deletion_timestamp.is_some()) {
                let patch = json!({"metadata": {"finalizers": null}});
                let patch = Patch::Merge(&patch);
                sets.patch(&set.name_any(), &PatchParams::default(), &patch).await.expect("let go");
            }
            (size().await? == "20Gi").then_some(())
        })
        .await;
    world
        .until("the pool is ready", async || world.ready("BookiePool", "main", "AsSpecified").await)
        .await;
    assert_eq!(uids(&world).await, before, "no pod was touched");
    let claims: Api<PersistentVolumeClaim> = world.kubernetes.api();
    for claim in claims.list(&ListParams::default()).await.expect("it answers") {
        assert_eq!(json!(claim)["spec"]["resources"]["requests"]["storage"], "20Gi");
    }
}
