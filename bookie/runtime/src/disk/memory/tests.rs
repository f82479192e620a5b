//! What power cuts take and what they leave.

use proptest::prelude::*;

use super::*;

const ROOMY: u64 = 1 << 24;

fn disk(seed: u64) -> MemoryDisk {
    MemoryDisk::new(ROOMY, Random::from_seed(seed))
}

fn bytes_of(disk: &MemoryDisk, name: &str) -> io::Result<Vec<u8>> {
    let file = disk.open(name, OpenMode::Read)?;
    let mut bytes = vec![0; file.len()? as usize];
    let count = file.read_at(&mut bytes, 0)?;
    assert_eq!(count, bytes.len());
    Ok(bytes)
}

/// A file with synced content and a synced name.
fn durable(disk: &MemoryDisk, name: &str, bytes: &[u8]) -> MemoryFile {
    let file = disk.open_file(name, OpenMode::CreateNew).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync().unwrap();
    disk.sync_dir().unwrap();
    file
}

#[test]
fn it_passes_the_exam() {
    super::super::conformance::exam(&(Arc::new(disk(0)) as Arc<dyn Disk>));
}

#[test]
fn synced_bytes_and_names_survive_every_power_cut() {
    for seed in 0..50 {
        let disk = disk(seed);
        durable(&disk, "a", &[7; 1500]);
        disk.crash();
        assert_eq!(bytes_of(&disk, "a").unwrap(), [7; 1500]);
    }
}

#[test]
fn an_unsynced_write_is_torn_by_whole_sectors() {
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let disk = disk(seed);
        let file = durable(&disk, "a", &[1; 1536]);
        file.write_all_at(&[2; 1536], 0).unwrap();
        disk.crash();
        let bytes = bytes_of(&disk, "a").unwrap();
        for sector in bytes.chunks(512) {
            assert!(sector.iter().all(|b| b == &sector[0]), "a sector is whole");
        }
        seen.insert([bytes[0], bytes[512], bytes[1024]]);
    }
    assert_eq!(seen.len(), 8, "every combination happens, later sectors without earlier ones too");
}

#[test]
fn a_grown_file_may_keep_its_old_length_the_new_one_or_one_between() {
    let lengths: BTreeSet<_> = (0..200)
        .map(|seed| {
            let disk = disk(seed);
            let file = durable(&disk, "a", &[1; 100]);
            file.write_all_at(&[2; 2000], 100).unwrap();
            disk.crash();
            bytes_of(&disk, "a").unwrap().len()
        })
        .collect();
    assert_eq!(lengths, BTreeSet::from([100, 512, 1024, 1536, 2048, 2100]));
}

#[test]
fn an_older_unsynced_version_of_a_sector_may_be_what_is_left() {
    let left: BTreeSet<_> = (0..100)
        .map(|seed| {
            let disk = disk(seed);
            let file = durable(&disk, "a", &[1; 512]);
            file.write_all_at(&[2; 512], 0).unwrap();
            file.write_all_at(&[3; 512], 0).unwrap();
            disk.crash();
            bytes_of(&disk, "a").unwrap()[0]
        })
        .collect();
    assert_eq!(left, BTreeSet::from([1, 2, 3]));
}

#[test]
fn unsynced_names_are_lost_or_back() {
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let disk = disk(seed);
        durable(&disk, "removed", b"r");
        durable(&disk, "old", b"o");
        disk.open("created", OpenMode::CreateNew).unwrap();
        disk.remove("removed").unwrap();
        disk.rename("old", "new").unwrap();
        assert_eq!(disk.list().unwrap(), ["created", "new"]);
        disk.crash();
        let names = disk.list().unwrap();
        for name in names.iter().filter(|name| *name != "created") {
            assert_eq!(
                bytes_of(&disk, name).unwrap().len(),
                1,
                "content is synced apart from the name"
            );
        }
        assert_eq!(
            names.iter().filter(|n| *n == "old" || *n == "new").count(),
            1,
            "a rename is atomic"
        );
        seen.insert(names);
    }
    assert_eq!(seen.len(), 8, "each change happens or not, by itself");
}

#[test]
fn losing_all_goes_back_to_the_last_sync() {
    let disk = disk(0);
    let file = durable(&disk, "a", b"synced");
    file.write_all_at(b"not yet, and longer", 0).unwrap();
    disk.open("b", OpenMode::CreateNew).unwrap();
    disk.rename("a", "c").unwrap();
    disk.crash_losing_all_unsynced();
    assert_eq!(disk.list().unwrap(), ["a"]);
    assert_eq!(bytes_of(&disk, "a").unwrap(), b"synced");
}

#[test]
fn a_killed_process_leaves_its_writes_and_loses_its_handles_and_locks() {
    let disk = disk(0);
    let lock = disk.lock("LOCK").unwrap();
    let file = disk.open("a", OpenMode::CreateNew).unwrap();
    file.write_all_at(b"written", 0).unwrap();
    disk.kill();
    assert_eq!(bytes_of(&disk, "a").unwrap(), b"written");
    assert!(file.write_all_at(b"late", 0).is_err() && file.sync().is_err() && file.len().is_err());
    let again = disk.lock("LOCK").unwrap();
    drop(lock); // the dead process's guard must not free the new holder's lock
    assert_eq!(disk.lock("LOCK").map(drop).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(again);
    disk.crash_losing_all_unsynced();
    assert!(disk.list().unwrap().is_empty(), "kill makes nothing durable");
}

#[test]
fn a_full_disk_takes_what_fits_and_overwrites_are_free() {
    let disk = MemoryDisk::new(1000, Random::from_seed(0));
    let file = disk.open("a", OpenMode::CreateNew).unwrap();
    file.write_all_at(&[1; 900], 0).unwrap();
    assert_eq!(disk.space().unwrap(), Space { total: 1000, free: 100 });
    assert_eq!(file.write_all_at(&[2; 200], 900).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(file.len().unwrap(), 1000);
    file.write_all_at(&[3; 1000], 0).unwrap();
    assert_eq!(file.write_all_at(&[4; 1], 5000).unwrap_err().kind(), io::ErrorKind::StorageFull);
    disk.set_capacity(2000);
    file.write_all_at(&[4; 1000], 1000).unwrap();
    disk.remove("a").unwrap();
    assert_eq!(disk.space().unwrap().free, 2000);
}

#[test]
fn a_flipped_bit_stays_through_a_power_cut() {
    for seed in 0..20 {
        let disk = disk(seed);
        let file = durable(&disk, "a", &[0; 600]);
        file.write_all_at(&[0; 600], 0).unwrap();
        disk.flip_bit("a", 513 * 8 + 3).unwrap();
        disk.crash();
        let bytes = bytes_of(&disk, "a").unwrap();
        assert_eq!((bytes[513], bytes.iter().map(|b| b.count_ones()).sum::<u32>()), (8, 1));
    }
    assert!(disk(0).flip_bit("a", 0).is_err());
}

#[test]
fn a_failed_sync_loses_pages_that_later_syncs_report_as_written() {
    let (mut evicted, mut cut) = (BTreeSet::new(), BTreeSet::new());
    for seed in 0..50 {
        let disk = disk(seed);
        let file = durable(&disk, "a", &[1; 512]);
        file.write_all_at(&[2; 1024], 0).unwrap();
        file.sync_and_fail();
        assert_eq!(bytes_of(&disk, "a").unwrap(), [2; 1024], "the cache shows the write");
        file.sync().unwrap();
        let copy = disk.copy(Random::from_seed(seed));
        copy.open("a", OpenMode::Read).unwrap().evict().unwrap();
        evicted.insert(bytes_of(&copy, "a").unwrap());
        disk.crash();
        cut.insert(bytes_of(&disk, "a").unwrap());
    }
    assert!(evicted.contains(&vec![1; 512]) && evicted.contains(&vec![2; 1024]), "lost or not");
    assert!(cut.contains(&vec![1; 512]) && cut.contains(&vec![2; 1024]));
}

#[test]
fn open_handles_of_a_removed_file_stay_usable_and_its_room_is_freed() {
    let disk = disk(0);
    let file = durable(&disk, "a", b"abc");
    disk.remove("a").unwrap();
    disk.sync_dir().unwrap();
    assert_eq!(file.len().unwrap(), 3);
    drop(file);
    assert!(disk.0.lock().files.is_empty(), "nothing is kept of it");
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Sync,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..2000, 1usize..1500, any::<u8>()).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        2 => Just(Step::Sync),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    /// Bytes that no write touched since the last sync are the same after any power cut, and one seed gives one disk.
    #[test]
    fn only_unsynced_sectors_change_and_a_seed_repeats(steps in prop::collection::vec(step(), 1..30), seed in any::<u64>()) {
        let run = || {
            let disk = disk(seed);
            let mut file = durable(&disk, "a", &[]);
            let (mut model, mut dirty) = (Vec::<u8>::new(), BTreeSet::new());
            let mut synced_len = 0;
            for step in &steps {
                match step {
                    Step::Write(at, len, byte) => {
                        file.write_all_at(&vec![*byte; *len], *at).unwrap();
                        let end = *at as usize + len;
                        model.resize(model.len().max(end), 0);
                        model[*at as usize..end].fill(*byte);
                        dirty.extend(*at as usize / 512..end.div_ceil(512));
                    }
                    Step::Sync => { file.sync().unwrap(); dirty.clear(); synced_len = model.len(); }
                    Step::Crash => {
                        disk.crash();
                        file = disk.open_file("a", OpenMode::ReadWrite).unwrap();
                        let found = bytes_of(&disk, "a").unwrap();
                        assert!(found.len() >= synced_len && found.len() <= model.len());
                        for (at, byte) in model.iter().enumerate() {
                            if !dirty.contains(&(at / 512)) && at < found.len() { assert_eq!(*byte, found[at]); }
                        }
                        synced_len = found.len();
                        model = found;
                        dirty.clear();
                    }
                }
            }
            bytes_of(&disk, "a").unwrap()
        };
        prop_assert_eq!(run(), run());
    }
}
