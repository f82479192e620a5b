//! Where the latest message of each key is, among messages that are newer than a view. Pure.
//!
//! Only the keys of what is new are held: a view has each key once, so that all it needs is which of its keys are newer
//! elsewhere. A view may thus have any number of keys, and every round gets on.

use std::collections::BTreeMap;

use geminga_proto::ids::Offset;
use sha2::{Digest, Sha256};

/// What a key in the table takes, bytes: hash, offset, and its part of a half-filled tree.
const KEY_BYTES: u64 = 48;

/// A key, by 128 bits of SHA-256: nobody finds two keys that are taken for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KeyHash([u8; 16]);

impl KeyHash {
    pub(crate) fn of(key: &[u8]) -> Self {
        let digest = Sha256::digest(key);
        Self(digest[..16].try_into().expect("32 bytes"))
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct KeyTable {
    latest: BTreeMap<KeyHash, Offset>,
    keys_max: usize,
}

impl KeyTable {
    /// A table of about so many bytes.
    pub(crate) fn new(bytes_max: u64) -> Self {
        let keys_max = usize::try_from(bytes_max / KEY_BYTES).unwrap_or(usize::MAX).max(1);
        Self { latest: BTreeMap::new(), keys_max }
    }

    /// Whether the next batch must wait for the next round: the table may outgrow its bound by the keys of one batch.
    pub(crate) fn is_full(&self) -> bool {
        self.latest.len() >= self.keys_max
    }

    /// A message of this key; later ones have higher offsets.
    pub(crate) fn observe(&mut self, key: KeyHash, offset: Offset) {
        self.latest.insert(key, offset);
    }

    /// Whether the message is the latest of its key; one in the view that came before is if the key is not new.
    pub(crate) fn is_latest(&self, key: KeyHash, offset: Offset, of_view: bool) -> bool {
        match self.latest.get(&key) {
            Some(latest) => *latest == offset && !of_view,
            None => of_view,
        }
    }
}
