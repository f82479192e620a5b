//! Flipped bits at rest: found, named, never answered as absence (D8, D9).

use geminga_bookie_client::bookie_rpc::{
    AddAnswer, BookieRpc, EntryAnswer, EntryRange, EntrySet, FenceAnswer, ListAnswer, Unknown,
};
use geminga_proto::ids::{EntryId, LedgerId};

use super::harness::*;
use crate::StartError;

#[tokio::test(start_paused = true)]
async fn a_flipped_bit_in_a_stored_entry_is_unknown_counted_and_healed_by_a_repeated_add() {
    let mut world = World::new(1);
    world.config.write_cache_bytes = 0;
    let bookie = world.started().await;
    for id in 0..10 {
        add(&bookie, 1, id).await;
    }
    let row = bookie.shared().core().ledgers.row(1.into(), 4.into()).expect("in memory");
    world
        .disk
        .flip_bit(&format!("journal-{:016x}", row.file), (row.position + 60) * 8)
        .expect("within");
    assert_eq!(read(&bookie, 1, 4).await, EntryAnswer::Unknown(Unknown::Damaged));
    assert_eq!(world.metrics.damage_found.get(), 1);
    assert_eq!(read(&bookie, 1, 5).await, EntryAnswer::Held(entry(1, 5)));
    let listed = async || {
        let range = EntryRange { first: EntryId(4), last: EntryId(4) };
        bookie.list(bookie.incarnation(), LedgerId(1), range, deadline()).await
    };
    assert_eq!(listed().await, ListAnswer::Held(EntrySet::default()), "repair sees the hole (A2)");
    assert_eq!(add(&bookie, 1, 4).await, AddAnswer::Ok);
    assert_eq!(read(&bookie, 1, 4).await, EntryAnswer::Held(entry(1, 4)));
    assert_eq!(listed().await, ListAnswer::Held([EntryId(4)].into_iter().collect()));
}

/// Ten entries and a fence, one group each, killed: all behind the mark of the format.
async fn ten_groups(world: &World) {
    world.put_ledger(1, false).await;
    world.put_ledger(2, false).await;
    let bookie = world.started().await;
    for id in 0..10 {
        add(&bookie, 1, id).await;
    }
    fence(&bookie, 2).await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    bookie.kill();
}

#[tokio::test(start_paused = true)]
async fn a_flipped_bit_in_the_journals_tail_is_limbo_and_a_second_start_says_the_same() {
    let world = World::new(2);
    ten_groups(&world).await;
    let name = world.names("journal-").pop().expect("a journal");
    // Group by group: the bit lies in the header or the first record of the fourth block.
    world.disk.flip_bit(&name, (4 * 4096 + 70) * 8).expect("within");
    let mut bound = None;
    for start in 0..3 {
        let bookie = world.started().await;
        let limbo = bookie.shared().core().ledgers.limbo();
        assert!(limbo.is_some(), "start {start}");
        assert!(bound.is_none_or(|bound| bound == limbo), "the verdict does not grow (T46)");
        bound = Some(limbo);
        let mut unknown = 0;
        for id in 0..10 {
            match read(&bookie, 1, id).await {
                EntryAnswer::Held(found) => assert_eq!(found, entry(1, id)),
                EntryAnswer::Unknown(Unknown::Limbo) => unknown += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(unknown, 1, "one group is lost, and never called absent");
        let expected = if start == 0 { AddAnswer::ReadOnly } else { AddAnswer::Fenced };
        assert_eq!(
            add(&bookie, 1, 50).await,
            expected,
            "no plain add in limbo, and FENCED once it is"
        );
        assert_eq!(recovery_add(&bookie, 1, 60 + start).await, AddAnswer::Ok);
        assert!(matches!(fence(&bookie, 1).await, FenceAnswer::Fenced { .. }));
        assert_eq!(add(&bookie, 1, 51).await, AddAnswer::Fenced, "a held flag comes first");
        assert_eq!(add(&bookie, 2, 0).await, AddAnswer::Fenced);
        let newer = 10 + start;
        world.put_ledger(newer, false).await;
        assert_eq!(add(&bookie, newer, 0).await, AddAnswer::Ok, "created above the bound");
        assert_eq!(read(&bookie, newer, 1).await, EntryAnswer::Absent);
        assert_eq!(add(&bookie, 77, 0).await, AddAnswer::ReadOnly, "no such key");
        bookie.kill();
        world.disk.crash();
    }
}

#[tokio::test(start_paused = true)]
async fn wherever_one_bit_of_the_directory_flips_nothing_acknowledged_is_called_absent() {
    for seed in 0..60 {
        let world = World::new(100 + seed);
        ten_groups(&world).await;
        let bookie = world.started().await;
        for id in 10..20 {
            add(&bookie, 1, id).await;
        }
        bookie.checkpoint().await.expect("room");
        for id in 20..30 {
            add(&bookie, 1, id).await;
        }
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        bookie.kill();
        let names = world.names("");
        let names: Vec<_> = names
            .iter()
            .filter(|name| !name.starts_with("reserve") && *name != "lock" && *name != "cookie")
            .collect();
        let name = names[world.random.below(names.len() as u64) as usize];
        let bits = {
            use geminga_runtime::disk::{Disk, OpenMode};
            world.disk.open(name, OpenMode::Read).expect("there").len().expect("known") * 8
        };
        world.disk.flip_bit(name, world.random.below(bits)).expect("within");
        let bookie = match world.start().await {
            Ok(bookie) => bookie,
            Err(error) => panic!("seed {seed}, {name}: {error}"),
        };
        let mut held = 0;
        for id in 0..30 {
            match read(&bookie, 1, id).await {
                EntryAnswer::Held(found) => {
                    held += 1;
                    assert_eq!(found, entry(1, id));
                }
                EntryAnswer::Unknown(_) => {}
                EntryAnswer::Absent => panic!("seed {seed}, {name}: entry {id} is called absent"),
            }
        }
        assert!(held >= 29, "seed {seed}, {name}: one bit costs at most one group, {held} held");
        let refused = add(&bookie, 2, 0).await;
        assert!(
            matches!(refused, AddAnswer::Fenced | AddAnswer::ReadOnly),
            "seed {seed}, {name}: {refused:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_newest_checkpoint_costs_nothing_and_two_cost_the_incarnation() {
    let mut world = World::new(3);
    ten_groups(&world).await;
    let bookie = world.started().await;
    bookie.checkpoint().await.expect("room");
    add(&bookie, 1, 10).await;
    bookie.checkpoint().await.expect("room");
    bookie.kill();
    let checkpoints = world.names("checkpoint-");
    assert_eq!(checkpoints.len(), 2);
    world.disk.flip_bit(&checkpoints[1], 200).expect("within");
    let bookie = world.started().await;
    for id in 0..=10 {
        assert_eq!(read(&bookie, 1, id).await, EntryAnswer::Held(entry(1, id)));
    }
    assert!(bookie.shared().core().ledgers.limbo().is_none());
    assert_eq!(add(&bookie, 2, 0).await, AddAnswer::Fenced);
    let old = bookie.incarnation();
    bookie.stop().await;
    for name in world.names("checkpoint-") {
        let _perhaps_flipped_already = world.disk.flip_bit(&name, 300);
    }
    assert!(matches!(world.start().await, Err(StartError::IncarnationLost)));
    world.config.take_new_incarnation = true;
    let bookie = world.started().await;
    assert_ne!(bookie.incarnation(), old);
    assert_eq!(
        read(&bookie, 1, 0).await,
        EntryAnswer::Absent,
        "another bookie, which never had it"
    );
}

#[tokio::test(start_paused = true)]
async fn a_damaged_index_block_makes_a_repeated_add_unknown_and_is_counted() {
    let world = World::new(4);
    let bookie = world.started().await;
    for id in 0..10 {
        add(&bookie, 1, id).await;
    }
    bookie.checkpoint().await.expect("room");
    world.disk.flip_bit(&world.names("index-")[0], 100).expect("within");
    assert_eq!(add(&bookie, 1, 4).await, AddAnswer::Unknown(Unknown::Damaged));
    assert_eq!(world.metrics.damage_found.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_that_cannot_be_read_never_counts_as_one_of_the_two_kept() {
    let world = World::new(5);
    let bookie = world.started().await;
    for id in 0..2 {
        add(&bookie, 1, id).await;
        bookie.checkpoint().await.expect("room");
    }
    bookie.kill();
    for id in 2..6 {
        let newest = world.names("checkpoint-").pop().expect("there");
        world.disk.flip_bit(&newest, 200).expect("within");
        let bookie = world.started().await;
        add(&bookie, 1, id).await;
        assert!(bookie.checkpoint().await.expect("room"));
        assert!(!world.names("checkpoint-").contains(&newest));
        bookie.kill();
    }
    let bookie = world.started().await;
    for id in 0..6 {
        assert_eq!(read(&bookie, 1, id).await, EntryAnswer::Held(entry(1, id)));
    }
}

#[tokio::test(start_paused = true)]
async fn entries_of_a_journal_file_that_is_gone_are_unknown_and_it_is_counted() {
    let world = World::new(6);
    let bookie = world.started().await;
    for id in 0..60 {
        add(&bookie, 1, id).await;
    }
    bookie.stop().await;
    let first = world.names("journal-").swap_remove(0);
    {
        use geminga_runtime::disk::Disk;
        world.disk.remove(&first).expect("there");
    }
    let bookie = world.started().await;
    assert_eq!(world.metrics.damage_found.get(), 1);
    assert!(matches!(read(&bookie, 1, 0).await, EntryAnswer::Unknown(Unknown::Io(_))));
    assert_eq!(world.metrics.damage_found.get(), 2);
    assert_eq!(read(&bookie, 1, 59).await, EntryAnswer::Held(entry(1, 59)));
}

#[tokio::test(start_paused = true)]
async fn point_reads_of_ledgers_in_limbo_are_bounded() {
    let mut world = World::new(7);
    ten_groups(&world).await;
    let name = world.names("journal-").pop().expect("a journal");
    world.disk.flip_bit(&name, (4 * 4096 + 70) * 8).expect("within");
    world.config.lookups_max = 0;
    let bookie = world.started().await;
    assert_eq!(read(&bookie, 5, 0).await, EntryAnswer::Unknown(Unknown::Busy), "D12");
}
