//! The whole bookie on a disk and a store in memory: kills, power cuts, damage, full disks, cookies, garbage; and
//! several of them that repair each other.

mod cluster;
mod cookies;
mod crashes;
mod damage;
mod drains;
mod failures;
mod full_disk;
mod garbage;
mod harness;
mod repairs;
mod reuse;
mod serving;
