//! The exam every form of [`Disk`] passes, run on an empty disk with room for some kilobytes. What power cuts do is not
//! asked here: only the form in memory can be asked.

use std::io::ErrorKind;

use super::{OpenMode, SharedDisk};

/// Asks everything.
///
/// # Panics
/// When an answer is wrong; the message says which.
pub fn exam(disk: &SharedDisk) {
    files_keep_bytes(disk);
    holes_read_as_zeros(disk);
    modes_are_kept(disk);
    names_change(disk);
    removed_files_stay_open(disk);
    locks_exclude(disk);
    bad_names_are_refused(disk);
    let space = disk.space().expect("space is told");
    assert!(space.free > 0 && space.free <= space.total, "free is a part of total");
}

fn files_keep_bytes(disk: &SharedDisk) {
    let file = disk.open("kept", OpenMode::CreateNew).expect("a new file opens");
    assert_eq!(file.len().expect("length is told"), 0, "a new file is empty");
    file.write_all_at(b"hello world", 0).expect("a write succeeds");
    file.write_all_at(b"W", 6).expect("an overwrite succeeds");
    file.write_all_at(b"", 500).expect("an empty write succeeds");
    file.sync().expect("a sync succeeds");
    disk.sync_dir().expect("a directory sync succeeds");
    file.evict().expect("an evict succeeds");
    assert_eq!(file.len().expect("length is told"), 11, "an empty write does not extend");
    let again = disk.open("kept", OpenMode::Read).expect("it opens again");
    let mut buffer = [0; 32];
    assert_eq!(
        again.read_at(&mut buffer, 0).expect("a read succeeds"),
        11,
        "a read is short only at the end"
    );
    assert_eq!(&buffer[..11], b"hello World");
    assert_eq!(again.read_at(&mut buffer[..3], 9).expect("a read succeeds"), 2);
    assert_eq!(again.read_at(&mut buffer, 11).expect("a read succeeds"), 0, "nothing at the end");
    assert_eq!(
        again.read_at(&mut buffer, 1 << 40).expect("a read succeeds"),
        0,
        "nothing far past it"
    );
}

fn holes_read_as_zeros(disk: &SharedDisk) {
    let file = disk.open("hole", OpenMode::CreateNew).expect("a new file opens");
    file.write_all_at(&[1; 4], 3000).expect("a write past the end succeeds");
    let mut buffer = [9; 3004];
    assert_eq!(file.read_at(&mut buffer, 0).expect("a read succeeds"), 3004);
    assert!(buffer[..3000].iter().all(|byte| *byte == 0), "what was never written is zero");
    assert_eq!(buffer[3000..], [1; 4]);
}

fn modes_are_kept(disk: &SharedDisk) {
    let missing = disk.open("missing", OpenMode::ReadWrite).expect_err("it must exist");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let missing = disk.open("missing", OpenMode::Read).expect_err("it must exist");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let taken = disk.open("kept", OpenMode::CreateNew).expect_err("it must not exist");
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    let read_only = disk.open("kept", OpenMode::Read).expect("it opens");
    assert!(read_only.write_all_at(b"x", 0).is_err(), "a read handle does not write");
    let both = disk.open("kept", OpenMode::ReadWrite).expect("it opens");
    both.write_all_at(b"H", 0).expect("a write succeeds");
    let mut first = [0];
    read_only.read_at(&mut first, 0).expect("a read succeeds");
    assert_eq!(&first, b"H", "handles see each other's writes at once");
}

fn names_change(disk: &SharedDisk) {
    assert_eq!(disk.list().expect("names are told"), ["hole", "kept"], "names are sorted");
    disk.rename("hole", "kept").expect("a rename replaces");
    assert_eq!(disk.list().expect("names are told"), ["kept"]);
    let file = disk.open("kept", OpenMode::Read).expect("it opens");
    assert_eq!(file.len().expect("length is told"), 3004, "it is the other file now");
    assert_eq!(disk.rename("missing", "x").expect_err("it must exist").kind(), ErrorKind::NotFound);
    assert_eq!(disk.remove("missing").expect_err("it must exist").kind(), ErrorKind::NotFound);
}

fn removed_files_stay_open(disk: &SharedDisk) {
    let file = disk.open("kept", OpenMode::ReadWrite).expect("it opens");
    disk.remove("kept").expect("a removal succeeds");
    disk.sync_dir().expect("a directory sync succeeds");
    assert!(disk.list().expect("names are told").is_empty());
    file.write_all_at(&[7], 0).expect("an open handle still writes");
    let mut first = [0];
    file.read_at(&mut first, 0).expect("an open handle still reads");
    assert_eq!(first, [7]);
    drop(disk.open("kept", OpenMode::CreateNew).expect("the name is free"));
    disk.remove("kept").expect("a removal succeeds");
}

fn locks_exclude(disk: &SharedDisk) {
    let lock = disk.lock("LOCK").expect("a free lock is taken");
    let held = disk.lock("LOCK").map(drop).expect_err("it is held");
    assert_eq!(held.kind(), ErrorKind::WouldBlock);
    drop(disk.lock("OTHER").expect("another lock is free"));
    drop(lock);
    drop(disk.lock("LOCK").expect("a dropped lock is free"));
    assert_eq!(
        disk.list().expect("names are told"),
        ["LOCK", "OTHER"],
        "a lock is a file that stays"
    );
}

fn bad_names_are_refused(disk: &SharedDisk) {
    for name in ["", ".", "..", "a/b", "/etc", "nul\0"] {
        assert!(disk.open(name, OpenMode::CreateNew).is_err(), "{name:?} is not a file name");
        assert!(disk.rename("LOCK", name).is_err(), "{name:?} is not a file name");
        assert!(disk.lock(name).is_err(), "{name:?} is not a file name");
    }
}
