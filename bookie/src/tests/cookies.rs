//! Which directory may serve as whom (D7).

use std::time::Duration;

use geminga_bookie_client::bookie_rpc::AddAnswer;
use geminga_metadata::{MemoryStore, MetadataStore, Op, Txn, keys};
use geminga_proto::storage::v1 as wire;
use geminga_runtime::disk::MemoryDisk;
use prost::Message;

use super::harness::*;
use crate::{CookieError, StartError};

fn cookie_error(result: Result<crate::Bookie, StartError>) -> CookieError {
    match result {
        Err(StartError::Cookie(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_empty_volume_behind_an_old_name_is_refused_and_repair_revokes_the_old_incarnation() {
    let mut world = World::new(1);
    let old = world.started().await;
    let old_number = old.incarnation();
    old.kill();
    world.disk = MemoryDisk::new(64 << 20, world.random.fork());
    let error = cookie_error(world.start().await);
    assert_eq!(
        error,
        CookieError::EmptyVolume { bookie: "b1".to_owned(), incarnation: old_number }
    );
    world.config.take_new_incarnation = true;
    let new = world.started().await;
    assert!(new.incarnation() > old_number);
    assert_eq!(add(&new, 1, 0).await, AddAnswer::Ok);
    let (_, cookie) = world.store.get(&keys::cookie("b1")).await.expect("the store answers");
    let cookie = wire::Cookie::decode(&cookie.expect("there").value[..]).expect("decodes");
    assert_eq!(cookie.revoked, [old_number.0]);
    let (_, lost) = world.store.get(&keys::lost(old_number)).await.expect("the store answers");
    assert!(lost.is_some(), "the auditor is told");
}

#[tokio::test(start_paused = true)]
async fn a_directory_of_another_bookie_cluster_or_without_cookie_is_refused() {
    let mut world = World::new(2);
    world.started().await.kill();
    world.config.id = "b2".to_owned();
    assert!(matches!(
        cookie_error(world.start().await),
        CookieError::Foreign { field: "bookie", .. }
    ));
    world.config.id = "b1".to_owned();
    let store = std::mem::replace(&mut world.store, MemoryStore::new());
    assert!(matches!(
        cookie_error(world.start().await),
        CookieError::Foreign { field: "cluster", .. }
    ));
    world.store = store;
    world.started().await.kill();
    let delete = Txn::new().then(Op::Delete(keys::cookie("b1")));
    world.store.txn(delete).await.expect("the store answers");
    assert_eq!(
        cookie_error(world.start().await),
        CookieError::NotInStore { bookie: "b1".to_owned() }
    );
    {
        use geminga_runtime::disk::Disk;
        world.disk.remove("cookie").expect("there");
    }
    assert_eq!(cookie_error(world.start().await), CookieError::Missing);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_cookie_is_refused() {
    let world = World::new(3);
    world.started().await.kill();
    world.disk.flip_bit("cookie", 100).expect("within");
    assert_eq!(cookie_error(world.start().await), CookieError::Damaged);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_incarnation_ends_while_it_serves_and_never_starts_again() {
    let world = World::new(4);
    let bookie = world.started().await;
    let (_, found) = world.store.get(&keys::cookie("b1")).await.expect("the store answers");
    let mut cookie = wire::Cookie::decode(&found.expect("there").value[..]).expect("decodes");
    cookie.revoked.push(bookie.incarnation().0);
    let txn = Txn::new().then(Op::put(keys::cookie("b1"), cookie.encode_to_vec()));
    world.store.txn(txn).await.expect("the store answers");
    tokio::time::timeout(Duration::from_secs(20), bookie.failed())
        .await
        .expect("it ends by itself");
    assert_eq!(cookie_error(world.start().await), CookieError::Revoked(bookie.incarnation()));
}

#[tokio::test(start_paused = true)]
async fn incarnations_of_many_bookies_differ() {
    let mut world = World::new(5);
    let mut numbers = std::collections::BTreeSet::new();
    for id in 0..5 {
        world.config.id = format!("b{id}");
        world.disk = MemoryDisk::new(64 << 20, world.random.fork());
        assert!(numbers.insert(world.started().await.incarnation()));
    }
}
