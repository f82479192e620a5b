//! The whole bookie on a disk and a store in memory: kills, power cuts, damage, full disks, cookies.

mod cookies;
mod crashes;
mod damage;
mod failures;
mod full_disk;
mod harness;
mod reuse;
mod serving;
