//! How far a listed ledger's way to cold storage has come (section 13), and its stored form.
//!
//! ```text
//! None ──► Uploading{uuid} ──► Uploaded{uuid, objects, digests} ──► LedgerDeleted
//!              └──► Uploading{another uuid}: the upload failed, or its owner is gone
//! ```

use std::sync::Arc;

use bytes::Bytes;
use geminga_proto::{ids::EntryId, storage::v1 as wire};

/// Where the entries of a ledger are, besides or instead of bookies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offload {
    pub stage: Stage,
    /// Of the upload; part of its objects' names (X1).
    pub uuid: [u8; 16],
    /// When the stage was entered, ms since the epoch.
    pub at_ms: u64,
    /// In entry order, without a hole; none while uploading.
    pub objects: Arc<[Object]>,
}

/// See [`Offload`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Objects of this uuid may exist; nobody counts on them.
    Uploading,
    /// The objects were read back and are whole (X2); the ledger is still on bookies.
    Uploaded,
    /// The objects are the only copy.
    LedgerDeleted,
}

/// One object of a ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    pub bytes: u64,
    /// Of all its bytes.
    pub crc32c: u32,
    pub first_entry: EntryId,
    pub entries: u64,
}

impl Offload {
    /// Bytes in cold storage.
    #[must_use]
    pub fn object_bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.bytes).sum()
    }

    pub(crate) fn to_wire(&self) -> wire::Offload {
        use wire::offload::{Object as WireObject, State};
        let state = match self.stage {
            Stage::Uploading => State::Uploading,
            Stage::Uploaded => State::Uploaded,
            Stage::LedgerDeleted => State::LedgerDeleted,
        };
        let objects = self.objects.iter().map(|object| WireObject {
            bytes: object.bytes,
            crc32c: object.crc32c,
            first_entry: object.first_entry.0,
            entries: object.entries,
        });
        wire::Offload {
            state: state as i32,
            uuid: Bytes::copy_from_slice(&self.uuid),
            at_ms: self.at_ms,
            objects: objects.collect(),
        }
    }

    /// Reads it back; `entries` are the ledger's. `Err` says what makes no sense.
    pub(crate) fn from_wire(value: &wire::Offload, entries: u64) -> Result<Self, &'static str> {
        use wire::offload::State;
        let stage = match value.state() {
            State::Uploading => Stage::Uploading,
            State::Uploaded => Stage::Uploaded,
            State::LedgerDeleted => Stage::LedgerDeleted,
            State::Unspecified => return Err("an offload in no known state"),
        };
        let uuid = value.uuid[..].try_into().map_err(|_| "an offload without a uuid")?;
        let mut next = 0u64;
        for object in &value.objects {
            if object.first_entry != next || object.entries == 0 {
                return Err("objects with a hole");
            }
            next = next.checked_add(object.entries).ok_or("objects past the end of numbers")?;
        }
        if (stage == Stage::Uploading && next != 0)
            || (stage != Stage::Uploading && next != entries)
        {
            return Err("objects that are not its entries");
        }
        let objects = value.objects.iter().map(|object| Object {
            bytes: object.bytes,
            crc32c: object.crc32c,
            first_entry: EntryId(object.first_entry),
            entries: object.entries,
        });
        Ok(Self { stage, uuid, at_ms: value.at_ms, objects: objects.collect() })
    }
}
