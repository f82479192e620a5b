//! Readers find a good copy if there is one, and never take trouble for the end.

use super::*;
use crate::testing::{LEDGER, World, append, names, payload};

fn range(first: u64, last: u64) -> EntryRange {
    EntryRange { first: EntryId(first), last: EntryId(last) }
}

async fn closed_world() -> World {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..6).await;
    let sealed = writer.seal().await.expect("ours");
    world.store.txn(sealed.txn).await.expect("the store answers");
    world
}

#[tokio::test(start_paused = true)]
async fn a_flipped_bit_is_found_read_elsewhere_and_reported() {
    let world = closed_world().await;
    let metadata = world.metadata().await.value;
    let order = world.client.reader(LEDGER).order(&metadata, EntryId(3));
    for (_, bookie) in &order[..2] {
        world.bookies[&bookie.0].damage(LEDGER, EntryId(3));
    }
    assert_eq!(world.read_all().await, names(6));
    crate::testing::pass(0.1).await;
    assert!(world.is_listed().await, "RD4: reported for repair");
}

/// The next read may ask another bookie: what this one showed must not be forgotten.
#[tokio::test(start_paused = true)]
async fn damage_behind_good_entries_is_reported_too() {
    let world = closed_world().await;
    let metadata = world.metadata().await.value;
    let reader = world.client.reader(LEDGER);
    let (_, first) = reader.order(&metadata, EntryId(0))[0];
    world.bookies[&first.0].damage(LEDGER, EntryId(3));
    let some = reader.read(&metadata, range(0, 5), 1 << 20).await.expect("up to the damage");
    assert_eq!(some.len(), 3);
    crate::testing::pass(0.1).await;
    assert!(world.is_listed().await, "RD4: reported for repair");
}

#[tokio::test(start_paused = true)]
async fn dead_bookies_are_read_around() {
    let world = closed_world().await;
    world.kill(1);
    world.kill(3);
    assert_eq!(world.read_all().await, names(6));
}

#[tokio::test(start_paused = true)]
async fn trouble_is_never_the_end_of_the_ledger() {
    let world = closed_world().await;
    let metadata = world.metadata().await.value;
    let reader = world.client.reader(LEDGER);
    for bookie in 1..=3 {
        world.bookies[&bookie].damage(LEDGER, EntryId(3));
    }
    let some = reader.read(&metadata, range(0, 5), 1 << 20).await.expect("up to the damage");
    assert_eq!(some.len(), 3);
    let at = reader.read(&metadata, range(3, 5), 1 << 20).await;
    let damaged = Err(ReadError::Damaged { ledger: LEDGER, entry: EntryId(3) });
    assert_eq!(at, damaged, "every holder answered, and none has a good copy");
    for bookie in 1..=3 {
        world.bookies[&bookie].lose_entries();
    }
    let lost = reader.read(&metadata, range(0, 5), 1 << 20).await;
    assert!(matches!(lost, Err(ReadError::Unavailable { .. })));
}

/// RD1.
#[tokio::test(start_paused = true)]
async fn beyond_the_end_of_a_closed_ledger_there_is_nothing_to_read() {
    let world = closed_world().await;
    let metadata = world.metadata().await.value;
    let reader = world.client.reader(LEDGER);
    let beyond = reader.read(&metadata, range(5, 6), 1 << 20).await;
    assert_eq!(beyond, Err(ReadError::BeyondEnd { ledger: LEDGER, entry: EntryId(6) }));
    let deleted = metadata.deleted(crate::Nonce([0; 16])).expect("closed");
    let trimmed = reader.read(&deleted, range(0, 1), 1 << 20).await;
    assert_eq!(trimmed, Err(ReadError::Trimmed { ledger: LEDGER }));
}

#[tokio::test(start_paused = true)]
async fn striped_ledgers_are_read_in_order() {
    let world = World::new(3).await;
    let striped = crate::Quorum::new(3, 2, 2).expect("valid");
    let writer = world.create_by(&world.client, striped).await;
    append(&writer, 0..9).await;
    assert_eq!(world.copies(4), 2);
    assert_eq!(writer.append(payload("entry 9")).await, Ok(EntryId(9)));
    let sealed = writer.seal().await.expect("ours");
    world.store.txn(sealed.txn).await.expect("the store answers");
    assert_eq!(world.read_all().await, names(10));
}

/// RD4: an open ledger's bytes rot as well.
#[tokio::test(start_paused = true)]
async fn damage_of_an_open_ledger_is_reported_and_an_add_on_its_way_is_not() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..6).await;
    let metadata = world.metadata().await.value;
    let reader = world.client.reader(LEDGER);
    let first = reader.order(&metadata, EntryId(3))[0].1;
    world.bookies[&first.0].forget(LEDGER, EntryId(3));
    let read = reader.read(&metadata, range(3, 5), 1 << 20).await.expect("held elsewhere");
    assert_eq!(read.len(), 3);
    crate::testing::pass(0.1).await;
    assert!(!world.is_listed().await, "Qa < Qw is a window: the third copy may be on its way");
    let first = reader.order(&metadata, EntryId(4))[0].1;
    world.bookies[&first.0].damage(LEDGER, EntryId(4));
    let read = reader.read(&metadata, range(4, 5), 1 << 20).await.expect("held elsewhere");
    assert_eq!(read.len(), 2);
    crate::testing::pass(0.1).await;
    assert!(world.is_listed().await, "RD4");
}

/// RD4: a fragment that ended is final: what is missing there is damage, although the ledger is open.
#[tokio::test(start_paused = true)]
async fn a_copy_missing_from_a_final_fragment_of_an_open_ledger_is_reported() {
    let world = World::new(3).await;
    let writer = world.create().await;
    append(&writer, 0..6).await;
    let mut metadata = world.metadata().await.value;
    let mut next = metadata.last_fragment().clone();
    next.first_entry = EntryId(5);
    metadata.fragments.push(next);
    let reader = world.client.reader(LEDGER);
    let first = reader.order(&metadata, EntryId(3))[0].1;
    world.bookies[&first.0].forget(LEDGER, EntryId(3));
    reader.read(&metadata, range(3, 4), 1 << 20).await.expect("held elsewhere");
    crate::testing::pass(0.1).await;
    assert!(world.is_listed().await);
}

/// RD5: a second bookie is asked after what the first one usually takes, not after a constant.
#[tokio::test(start_paused = true)]
async fn a_second_bookie_is_asked_after_the_p95_of_the_first() {
    use std::time::Duration;

    use crate::bookie_rpc::scripted::{Call, ScriptedBookies};

    let world = closed_world().await;
    let metadata = world.metadata().await.value;
    let (scripted, mut calls) = ScriptedBookies::new();
    let client = world.client_with(Some(Arc::new(scripted)), |_| {});
    let reader = client.reader(LEDGER);
    let (_, usual) = reader.order(&metadata, EntryId(0))[0];
    let usually = Duration::from_millis(30);
    for _ in 0..20 {
        let read = reader.read(&metadata, range(0, 0), 1);
        let answer = async {
            let call = calls.recv().await.expect("asked");
            assert_eq!(call.to(), usual);
            tokio::time::sleep(usually).await;
            call.pass_on(&world.bookies[&usual.0]).await;
        };
        assert_eq!(tokio::join!(read, answer).0.expect("readable").len(), 1);
    }
    let start = Instant::now();
    let read = reader.read(&metadata, range(0, 0), 1);
    let second = async {
        let _never = calls.recv().await.expect("asked");
        let second = calls.recv().await.expect("asked after a while");
        assert_ne!(second.to(), usual);
        assert!(matches!(second, Call::Read(..)));
        assert!((30..=32).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
        let to = second.to().0;
        second.pass_on(&world.bookies[&to]).await;
    };
    assert_eq!(tokio::join!(read, second).0.expect("readable").len(), 1);
}
