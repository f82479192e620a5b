//! Connections that fail, hang, or must prove who they are.

use std::{path::PathBuf, sync::Arc, time::Duration};

use etcd_client::PermissionType;
use geminga_metadata::{
    Committed, Compare, EtcdConfig, EtcdStore, EtcdTls, MetadataStore, Op, Revision, Secret,
    SharedStore, StoreError, Txn, WatchError, commit,
};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{harness::Etcd, key, proxy::Proxy, put};

const PREFIX: &str = "/geminga/a/";

async fn connect(config: EtcdConfig) -> SharedStore {
    Arc::new(EtcdStore::connect(config).await.expect("configured"))
}

fn create(name: &str, value: &str) -> Txn {
    Txn::new().when(Compare::Absent(key(name))).then(Op::put(key(name), value.to_owned()))
}

async fn settled(store: &SharedStore, txn: &Txn) -> Committed {
    let cancel = CancellationToken::new();
    timeout(Duration::from_secs(20), commit(store, txn, &cancel)).await.expect("etcd is there")
}

#[tokio::test]
async fn a_transaction_whose_answer_is_lost_is_unknown_and_its_repetition_finds_it() {
    let etcd = Etcd::start(1, &[]).await;
    let proxy = Proxy::start(&etcd.endpoints()[0]).await;
    let store = connect(EtcdConfig::new([&proxy.endpoint], PREFIX)).await;
    let direct = etcd.store(PREFIX).await;
    put(&*store, "connected", "x").await;
    proxy.lose(false, true);
    let txn = create("created", "ours");
    let landed_then_cut = async {
        while direct.get(&key("created")).await.expect("read").1.is_none() {
            sleep(Duration::from_millis(5)).await;
        }
        proxy.cut();
    };
    let (answer, ()) = tokio::join!(store.txn(txn.clone()), landed_then_cut);
    assert!(matches!(answer, Err(StoreError::Unknown(_))), "{answer:?}");
    proxy.lose(false, false);
    match settled(&store, &txn).await {
        Committed::Conflict { found, .. } => {
            assert_eq!(found[0].as_ref().map(|found| &found.value[..]), Some(&b"ours"[..]));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_transaction_that_never_arrived_is_unknown_too() {
    let etcd = Etcd::start(1, &[]).await;
    let proxy = Proxy::start(&etcd.endpoints()[0]).await;
    let mut config = EtcdConfig::new([&proxy.endpoint], PREFIX);
    config.request_deadline = Duration::from_secs(1);
    let store = connect(config).await;
    put(&*store, "connected", "x").await;
    proxy.lose(true, false);
    let txn = create("created", "ours");
    let answer = store.txn(txn.clone()).await;
    assert!(matches!(answer, Err(StoreError::Unknown(_))), "{answer:?}");
    let read = store.get(&key("created")).await;
    assert!(matches!(read, Err(StoreError::Unavailable(_))), "a read has no effect: {read:?}");
    proxy.lose(false, false);
    proxy.cut(); // what was swallowed is gone for good
    assert!(matches!(settled(&store, &txn).await, Committed::Done(_)));
}

#[tokio::test]
async fn a_hung_endpoint_costs_one_deadline_and_a_dead_one_nothing() {
    let etcd = Etcd::start(1, &[]).await;
    let hung = Proxy::start(&etcd.endpoints()[0]).await;
    hung.lose(true, true);
    let dead = "http://127.0.0.1:1".to_owned(); // nobody listens there
    let endpoints = [hung.endpoint.clone(), dead, etcd.endpoints()[0].clone()];
    let mut config = EtcdConfig::new(endpoints, PREFIX);
    config.request_deadline = Duration::from_secs(2);
    let reads = connect(config.clone()).await;
    let start = Instant::now();
    reads.get(&key("a")).await.expect("the third endpoint answers in time");
    assert!(start.elapsed() < config.request_deadline, "{:?}", start.elapsed());
    let writes = connect(config.clone()).await;
    let answer = writes.txn(create("a", "x")).await;
    assert!(matches!(answer, Err(StoreError::Unknown(_))), "it was sent: {answer:?}");
    writes.txn(create("a", "x")).await.expect("the hung and the dead endpoint were left");
    config.first = 1;
    let dead_first = connect(config).await;
    dead_first.txn(create("b", "x")).await.expect("a refused connection sent nothing");
}

#[tokio::test]
async fn a_caller_with_less_patience_than_the_deadline_leaves_a_hung_endpoint_too() {
    let etcd = Etcd::start(1, &[]).await;
    let hung = Proxy::start(&etcd.endpoints()[0]).await;
    hung.lose(true, true);
    let mut config = EtcdConfig::new([&hung.endpoint, &etcd.endpoints()[0]], PREFIX);
    config.request_deadline = Duration::from_secs(4);
    let store = connect(config).await;
    let patience = Duration::from_millis(1_500);
    assert!(timeout(patience, store.get(&key("a"))).await.is_err(), "the first is hung");
    let second = timeout(patience, store.get(&key("a"))).await;
    second.expect("the second endpoint is asked").expect("and answers");
}

#[tokio::test]
async fn a_watch_on_a_network_gone_silent_is_lost() {
    let etcd = Etcd::start(1, &[]).await;
    let proxy = Proxy::start(&etcd.endpoints()[0]).await;
    let store = connect(EtcdConfig::new([&proxy.endpoint], PREFIX)).await;
    let start = put(&*store, "w/1", "x").await;
    let mut watch = store.watch(&key("w/"), Revision(start.0 + 1)).await.expect("watch");
    proxy.lose(true, true);
    let lost = timeout(Duration::from_secs(15), watch.next()).await;
    assert_eq!(lost.expect("pings are not answered"), Err(WatchError::Lost));
}

#[tokio::test]
async fn an_endpoint_of_another_etcd_cluster_is_never_taken_for_the_same_store() {
    let (mut ours, other) = (Etcd::start(1, &[]).await, Etcd::start(1, &[]).await);
    let endpoints = [ours.endpoints(), other.endpoints()].concat();
    let store = connect(EtcdConfig::new(endpoints, PREFIX)).await;
    put(&*store, "a", "x").await;
    ours.kill(0);
    let read = store.get(&key("a")).await;
    assert!(matches!(read, Err(StoreError::Unavailable(_))), "absent there: {read:?}");
    let written = store.txn(create("b", "x")).await;
    assert!(
        matches!(written, Err(StoreError::Unknown(_) | StoreError::Unavailable(_))),
        "{written:?}"
    );
    ours.run(0);
    ours.ready().await;
    while store.get(&key("a")).await.is_err() {
        sleep(Duration::from_millis(20)).await;
    }
    assert!(store.get(&key("a")).await.expect("read").1.is_some());
}

#[tokio::test]
async fn a_store_may_be_made_before_etcd_is_there() {
    let mut etcd = Etcd::plan(1, &[]);
    let store: SharedStore = Arc::new(etcd.store(PREFIX).await);
    let answer = store.txn(create("a", "x")).await;
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "nothing was sent: {answer:?}");
    assert!(matches!(store.get(&key("a")).await, Err(StoreError::Unavailable(_))));
    etcd.run(0);
    let done = settled(&store, &create("a", "x")).await;
    // a try while etcd was starting may have landed without an answer
    assert!(matches!(done, Committed::Done(_) | Committed::Conflict { .. }), "{done:?}");
}

#[tokio::test]
async fn a_user_sees_what_the_password_opens_and_a_wrong_one_is_refused() {
    let etcd = Etcd::start(1, &[]).await;
    let mut admin = etcd.admin(0).await;
    admin.role_add("root").await.expect("role");
    admin.role_add("geminga").await.expect("role");
    let rights = etcd_client::Permission::new(PermissionType::Readwrite, PREFIX).with_prefix();
    admin.role_grant_permission("geminga", rights).await.expect("granted");
    for (user, role) in [("root", "root"), ("broker", "geminga")] {
        admin.user_add(user, "open sesame", None).await.expect("user");
        admin.user_grant_role(user, role).await.expect("granted");
    }
    admin.auth_enable().await.expect("on");
    let mut config = EtcdConfig::new(etcd.endpoints(), PREFIX);
    let nobody = connect(config.clone()).await.get(&key("a")).await;
    assert!(matches!(nobody, Err(StoreError::Refused(_))), "{nobody:?}");
    config.user = Some(("broker".to_owned(), Secret::new("open sesame")));
    let store = connect(config.clone()).await;
    store.txn(create("a", "x")).await.expect("within its prefix");
    let start = store.get(&key("a")).await.expect("read").0;
    let mut watch = store.watch(&key("a"), start).await.expect("watch");
    assert_eq!(watch.next().await.expect("goes on").len(), 1);
    let mut elsewhere = config.clone();
    elsewhere.prefix = "/other/".to_owned();
    let denied = connect(elsewhere).await.txn(create("a", "x")).await;
    assert!(matches!(denied, Err(StoreError::Refused(_))), "{denied:?}");
    config.user = Some(("broker".to_owned(), Secret::new("wrong")));
    let wrong = connect(config).await.get(&key("a")).await;
    assert!(matches!(wrong, Err(StoreError::Refused(_))), "{wrong:?}");
}

#[tokio::test]
async fn tls_proves_both_sides_and_trusts_the_given_authority_alone() {
    let file = |name: &str| {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/etcd/tls")).join(name)
    };
    let argument = |name: &str, value: &str| format!("{name}={}", file(value).display());
    let arguments = [
        argument("--cert-file", "server.pem"),
        argument("--key-file", "server.key"),
        argument("--trusted-ca-file", "ca.pem"),
        "--client-cert-auth".to_owned(),
    ];
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let etcd = Etcd::start(1, &arguments).await;
    let client = Some((file("client.pem"), file("client.key")));
    let mut config = EtcdConfig::new(etcd.endpoints(), PREFIX);
    config.tls = Some(EtcdTls { ca_file: file("ca.pem"), client: client.clone(), domain: None });
    let done = settled(&connect(config.clone()).await, &create("a", "x")).await;
    assert!(matches!(done, Committed::Done(_)), "{done:?}");
    config.tls = Some(EtcdTls { ca_file: file("ca.pem"), client: None, domain: None });
    let stranger = connect(config.clone()).await.get(&key("a")).await;
    assert!(matches!(stranger, Err(StoreError::Unavailable(_))), "{stranger:?}");
    config.tls = Some(EtcdTls { ca_file: file("other-ca.pem"), client, domain: None });
    let impostor = connect(config).await.get(&key("a")).await;
    assert!(
        matches!(&impostor, Err(StoreError::Unavailable(why)) if why.contains("certificate")),
        "{impostor:?}"
    );
}
