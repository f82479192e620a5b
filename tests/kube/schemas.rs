//! What the API server refuses before the operator sees it.

use serde_json::{Value, json};

use crate::apiserver::Kubernetes;

fn merged(mut base: Value, change: &Value) -> Value {
    for (key, value) in change.as_object().into_iter().flatten() {
        if value.is_null() {
            base.as_object_mut().expect("an object").remove(key);
        } else {
            base[key] = value.clone();
        }
    }
    base
}

async fn refused(kubernetes: &Kubernetes, kind: &str, base: &Value, change: Value, why: &str) {
    let spec = merged(base.clone(), &change);
    let done = kubernetes.apply(kind, "one", spec).await;
    let error = done.expect_err(&format!("{kind} with {change} is refused"));
    assert!(error.contains(why), "{kind} with {change}: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rules_of_the_schemas_hold_in_the_api_server() {
    let kubernetes = Kubernetes::start().await;
    let cluster = json!({"image": "geminga:1", "etcd": {"endpoints": ["http://etcd:2379"]}});
    let pool = json!({"cluster": "one", "storage": {"size": "10Gi"}});
    let topic = json!({"clusterRef": {"name": "one"}, "segments": 4});
    let subscription = json!({"clusterRef": {"name": "one"}, "topic": "public/default/orders"});

    // Before anything exists: what is never allowed.
    for (change, why) in [
        (json!({"ledgers": {"ensemble": 2, "writeQuorum": 3}}), "ensemble >= writeQuorum"),
        (json!({"ledgers": {"ackQuorum": 1}}), "ackQuorum"),
        (json!({"etcd": {"endpoints": []}}), "endpoints"),
        (json!({"etcd": {"endpoints": ["etcd:2379"]}}), "endpoints"),
        (json!({"tiering": {"url": "file:///tmp"}}), "url"),
        (json!({"brokers": {"replicas": -1}}), "replicas"),
        (json!({"policies": {"ttlMs": -1}}), "ttlMs"),
        (json!({"policies": {"backlogAction": "Ignore"}}), "backlogAction"),
    ] {
        refused(&kubernetes, "GemingaCluster", &cluster, change, why).await;
    }
    refused(&kubernetes, "BookiePool", &pool, json!({"storage": {"size": "a lot"}}), "size").await;
    refused(&kubernetes, "Topic", &topic, json!({"segments": 0}), "segments").await;
    refused(&kubernetes, "Topic", &topic, json!({"namespace": "public"}), "namespace").await;
    refused(&kubernetes, "Topic", &topic, json!({"name": "a/b"}), "name").await;
    let of_namespaces = json!({"policies": {"topicsMax": 5}});
    refused(&kubernetes, "Topic", &topic, of_namespaces, "policy of namespaces").await;
    let backoff = json!({"backoffMs": 9, "backoffMaxMs": 8});
    refused(&kubernetes, "Subscription", &subscription, backoff, "backoffMaxMs").await;
    let long = kubernetes.apply("BookiePool", &"x".repeat(41), pool.clone()).await;
    assert!(long.expect_err("a long name").contains("at most 40"), "names of pods stay labels");

    // Afterwards: what cannot be changed.
    for (kind, spec) in [
        ("GemingaCluster", &cluster),
        ("BookiePool", &pool),
        ("Topic", &topic),
        ("Subscription", &subscription),
    ] {
        kubernetes.apply(kind, "one", spec.clone()).await.expect("sound");
    }
    let prefix = json!({"etcd": {"endpoints": ["http://etcd:2379"], "prefix": "/other/"}});
    refused(&kubernetes, "GemingaCluster", &cluster, prefix, "cannot be changed").await;
    for (change, why) in [
        (json!({"cluster": "two"}), "another cluster"),
        (json!({"storage": {"size": "9Gi"}}), "never shrink"),
        (json!({"storage": {"size": "10G"}}), "never shrink"),
        (json!({"storage": {"size": "10Gi", "storageClass": "fast"}}), "storage class"),
    ] {
        refused(&kubernetes, "BookiePool", &pool, change, why).await;
    }
    for (change, why) in [
        (json!({"segments": 5}), "number of segments"),
        (json!({"name": "other"}), "name on the server"),
        (json!({"namespace": "acme/logs"}), "another namespace"),
        (json!({"clusterRef": {"name": "two"}}), "another cluster"),
    ] {
        refused(&kubernetes, "Topic", &topic, change, why).await;
    }
    let kind = json!({"type": "Shared"});
    refused(&kubernetes, "Subscription", &subscription, kind, "type of a subscription").await;

    // And what may be.
    let grown = merged(pool, &json!({"storage": {"size": "20Gi"}, "replicas": 5, "zone": "b"}));
    let grown = kubernetes.apply("BookiePool", "one", grown).await.expect("volumes grow");
    assert_eq!(grown["spec"]["replicas"], 5);
    let quorums =
        merged(cluster, &json!({"ledgers": {"ensemble": 5, "writeQuorum": 3, "ackQuorum": 2}}));
    let cluster = kubernetes.apply("GemingaCluster", "one", quorums).await.expect("quorums change");
    assert_eq!(cluster["spec"]["brokers"]["replicas"], 1, "defaults are shown");
    assert_eq!(cluster["spec"]["service"]["type"], "ClusterIP");
}
