//! Geminga's wire and storage formats, ids and names. No I/O happens here.
//!
//! - [`v1`] is what clients speak, [`admin`] what administrators speak, [`storage`] what lies in the metadata store and
//!   in ledger entries.
//! - [`ids`] holds the newtypes that keep a ledger id from being taken for an offset.
//! - [`names`] parses `tenant/namespace/topic` once, into types that cannot hold a name that escapes (security S3).
//! - [`key_hash`] is the one hash that places keys on segments, with test vectors for every SDK.

pub mod ids;
pub mod key_hash;
pub mod names;
pub mod policies;
pub mod reason;
pub mod records;

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
pub mod v1 {
    //! Generated from `proto/geminga/v1`.
    tonic::include_proto!("geminga.v1");
}

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
pub mod admin {
    //! Generated from `proto/geminga/admin/v1`.
    pub mod v1 {
        tonic::include_proto!("geminga.admin.v1");
    }
}

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
pub mod internal {
    //! Generated from `proto/geminga/internal/v1`: what brokers ask each other.
    pub mod v1 {
        tonic::include_proto!("geminga.internal.v1");
    }
}

#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
pub mod storage {
    //! Generated from `proto/geminga/storage/v1`.
    pub mod v1 {
        tonic::include_proto!("geminga.storage.v1");
    }
}

/// The encoded `FileDescriptorSet` of every package, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/geminga_descriptor.bin"));
