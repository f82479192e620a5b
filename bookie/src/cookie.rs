//! The cookie (D7): which incarnation this directory is, told by the directory and the store, and refused when they differ.
//!
//! ```text
//! empty: part-cookie (uuids, nonce) -> journal, checkpoint, reserve -> store: bookies/<id> -> cookie (rename) -> serve
//! ```
//! A crash in between is resumed under the same uuids, so that a store transaction of unknown outcome is found again (MD3).

use std::{io, time::Duration};

use bytes::{Buf, BufMut};
use geminga_metadata::{
    Cluster, Committed, Compare, KeyValue, Op, Revision, SharedStore, StoreError, commit, keys,
    next_id,
};
use geminga_proto::{
    ids::{Incarnation, generation_base_32},
    storage::v1 as wire,
};
use geminga_runtime::{
    clock::SharedClock,
    disk::{Disk, OpenMode},
    random::Random,
};
use prost::Message;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    crash_points::{CrashPoint, CrashPoints},
    journal::format::{Nonce, crc32c},
    ledger_storage::checkpoint::remove_if_there,
};

/// Why a directory and the store do not fit together. Nothing was changed; an operator decides (D7).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CookieError {
    /// The store knows this bookie, and the directory is empty: an empty volume behind an old name.
    #[error(
        "the directory is empty, but bookie {bookie} is registered as incarnation {incarnation}: its data is missing"
    )]
    EmptyVolume { bookie: String, incarnation: Incarnation },
    /// The directory has data and no cookie.
    #[error("the directory has files of a bookie, but no cookie")]
    Missing,
    /// The local cookie cannot be read.
    #[error("the local cookie is damaged")]
    Damaged,
    /// The local cookie is of another bookie or cluster.
    #[error("the directory belongs to {field} {found}, not to {expected}")]
    Foreign { field: &'static str, found: String, expected: String },
    /// The store does not know this bookie any more.
    #[error("the store has no cookie of bookie {bookie}")]
    NotInStore { bookie: String },
    /// The bookie was decommissioned: a full scan found no ledger naming it, and its cookie was removed with that proof (DC1).
    /// Its volume may go; a new bookie of this name starts on an empty one.
    #[error("bookie {bookie} was decommissioned")]
    Decommissioned { bookie: String },
    /// The store knows another incarnation of this bookie.
    #[error("the directory is another incarnation than {in_store}, which the store has")]
    OtherIncarnation { in_store: Incarnation },
    /// The incarnation may never serve again.
    #[error("incarnation {0} is revoked")]
    Revoked(Incarnation),
}

/// Who this directory is.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) incarnation: Incarnation,
    pub(crate) uuid: [u8; 16],
    pub(crate) directory: [u8; 16],
    pub(crate) nonce: Nonce,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("incarnation", &self.incarnation).finish_non_exhaustive() // the nonce is told to nobody (D4)
    }
}

#[derive(Clone, PartialEq, Message)]
struct LocalCookie {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(string, tag = "2")]
    cluster: String,
    #[prost(string, tag = "3")]
    bookie: String,
    #[prost(uint32, tag = "4")]
    incarnation: u32,
    #[prost(bytes = "vec", tag = "5")]
    uuid: Vec<u8>,
    #[prost(bytes = "vec", tag = "6")]
    directory: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    nonce: Vec<u8>,
}

const FORMAT: u32 = 1;
const COOKIE: &str = "cookie";
const PROVISIONAL: &str = "part-cookie";
const FINAL_PART: &str = "part-cookie-final";
/// The name of the lock file.
pub(crate) const LOCK: &str = "lock";
/// The counter that incarnation numbers come from.
pub const INCARNATION_COUNTER: &str = "incarnations";

/// What lies in the directory.
#[derive(Debug)]
pub(crate) enum Local {
    /// A cookie.
    Known(Identity),
    /// A format that did not end: nothing was ever served.
    Unfinished(Identity),
    /// Nothing.
    Empty,
}

/// Reads the local cookie and compares it with what this bookie is meant to be. Blocking.
pub(crate) fn read_local(
    disk: &dyn Disk,
    cluster: &Cluster,
    bookie: &str,
) -> io::Result<Result<Local, CookieError>> {
    let names = disk.list()?;
    let has = |name: &str| names.iter().any(|found| found == name);
    let known = has(COOKIE);
    if !known && !has(PROVISIONAL) {
        let empty = names.iter().all(|name| name == LOCK || name.starts_with("part-"));
        return Ok(if empty { Ok(Local::Empty) } else { Err(CookieError::Missing) });
    }
    let Some(cookie) = read_cookie(disk, if known { COOKIE } else { PROVISIONAL })? else {
        // A provisional cookie may be torn: it was not synced, and nothing follows it.
        let torn = !known && names.iter().all(|name| name == LOCK || name.starts_with("part-"));
        return Ok(if torn { Ok(Local::Empty) } else { Err(CookieError::Damaged) });
    };
    for (field, found, expected) in
        [("cluster", &cookie.cluster, cluster.id.as_str()), ("bookie", &cookie.bookie, bookie)]
    {
        if found != expected {
            let (found, expected) = (found.clone(), expected.to_owned());
            return Ok(Err(CookieError::Foreign { field, found, expected }));
        }
    }
    let fixed = |bytes: &[u8]| <[u8; 16]>::try_from(bytes).ok();
    let identity = (|| {
        Some(Identity {
            incarnation: Incarnation(cookie.incarnation),
            uuid: fixed(&cookie.uuid)?,
            directory: fixed(&cookie.directory)?,
            nonce: fixed(&cookie.nonce)?,
        })
    })();
    let Some(identity) = identity.filter(|_| cookie.format == FORMAT) else {
        return Ok(Err(CookieError::Damaged));
    };
    Ok(Ok(if known { Local::Known(identity) } else { Local::Unfinished(identity) }))
}

fn read_cookie(disk: &dyn Disk, name: &str) -> io::Result<Option<LocalCookie>> {
    const COOKIE_BYTES_MAX: usize = 64 << 10;
    let file = disk.open(name, OpenMode::Read)?;
    let mut bytes = vec![0u8; COOKIE_BYTES_MAX];
    let got = file.read_at(&mut bytes, 0)?;
    let mut input = &bytes[..got];
    if input.len() < 8 {
        return Ok(None);
    }
    let (crc, length) = (input.get_u32_le(), input.get_u32_le() as usize);
    Ok(input
        .get(..length)
        .filter(|body| crc32c(body) == crc)
        .and_then(|body| LocalCookie::decode(body).ok()))
}

fn write_cookie(
    disk: &dyn Disk,
    name: &str,
    cluster: &Cluster,
    bookie: &str,
    identity: &Identity,
) -> io::Result<()> {
    let body = LocalCookie {
        format: FORMAT,
        cluster: cluster.id.clone(),
        bookie: bookie.to_owned(),
        incarnation: identity.incarnation.0,
        uuid: identity.uuid.to_vec(),
        directory: identity.directory.to_vec(),
        nonce: identity.nonce.to_vec(),
    }
    .encode_to_vec();
    let mut bytes = Vec::new();
    bytes.put_u32_le(crc32c(&body));
    bytes.put_u32_le(body.len() as u32);
    bytes.extend_from_slice(&body);
    remove_if_there(disk, name)?;
    let file = disk.open(name, OpenMode::CreateNew)?;
    file.write_all_at(&bytes, 0)?;
    file.sync()
}

/// A fresh identity, still without a number.
pub(crate) fn mint(random: &Random) -> Identity {
    let mut nonce = [0u8; 16];
    nonce[..8].copy_from_slice(&random.u64().to_le_bytes());
    nonce[8..].copy_from_slice(&random.u64().to_le_bytes());
    Identity { incarnation: Incarnation(0), uuid: random.uuid(), directory: random.uuid(), nonce }
}

/// Makes the provisional cookie durable: the first step of a format. Everything else in the directory goes. Blocking.
pub(crate) fn write_provisional(
    disk: &dyn Disk,
    crash: &CrashPoints,
    cluster: &Cluster,
    bookie: &str,
    identity: &Identity,
) -> io::Result<()> {
    for name in disk.list()? {
        if name != LOCK && name != PROVISIONAL {
            disk.remove(&name)?;
        }
    }
    disk.sync_dir()?;
    write_cookie(disk, PROVISIONAL, cluster, bookie, identity)?;
    disk.sync_dir()?;
    crash.pass(CrashPoint::CookieProvisional)
}

/// Names the local cookie: the last step of a format. Blocking.
pub(crate) fn write_final(
    disk: &dyn Disk,
    crash: &CrashPoints,
    cluster: &Cluster,
    bookie: &str,
    identity: &Identity,
) -> io::Result<()> {
    write_cookie(disk, FINAL_PART, cluster, bookie, identity)?;
    disk.rename(FINAL_PART, COOKIE)?;
    crash.pass(CrashPoint::CookieRenamed)?;
    disk.sync_dir()?;
    remove_if_there(disk, PROVISIONAL)?;
    disk.sync_dir()
}

/// The store's cookie of a bookie.
#[derive(Clone, Debug)]
pub(crate) struct StoreCookie {
    pub(crate) cookie: wire::Cookie,
    pub(crate) revision: Revision,
}

impl StoreCookie {
    fn from_key_value(found: &KeyValue) -> Option<Self> {
        let cookie = wire::Cookie::decode(&found.value[..]).ok()?;
        Some(Self { cookie, revision: found.mod_revision })
    }

    /// Whether this is the cookie of `identity`, and may serve (D7).
    pub(crate) fn check(&self, identity: &Identity) -> Result<(), CookieError> {
        let revoked = self.cookie.revoked.contains(&identity.incarnation.0);
        if revoked && identity.incarnation.0 != 0 {
            return Err(CookieError::Revoked(identity.incarnation));
        }
        let same = *self.cookie.incarnation_uuid == identity.uuid
            && self.cookie.incarnation == identity.incarnation.0
            && self.cookie.directory_uuids.iter().any(|uuid| **uuid == identity.directory);
        if same {
            Ok(())
        } else {
            Err(CookieError::OtherIncarnation { in_store: Incarnation(self.cookie.incarnation) })
        }
    }
}

/// Reads `bookies/<id>`.
pub(crate) async fn read_store(
    store: &SharedStore,
    bookie: &str,
) -> Result<Option<StoreCookie>, StoreError> {
    let (_, found) = store.get(&keys::cookie(bookie)).await?;
    match found {
        None => Ok(None),
        Some(found) => StoreCookie::from_key_value(&found).map(Some).ok_or_else(|| {
            StoreError::Refused(format!("the cookie of bookie {bookie} cannot be decoded"))
        }),
    }
}

/// Why the store has no cookie of a bookie that has one: decommissioned with a proof, or gone without (D7).
pub(crate) async fn absent(store: &SharedStore, bookie: &str) -> Result<CookieError, StoreError> {
    let (_, found) = store.get(&keys::draining_bookie(bookie)).await?;
    let draining = found.and_then(|found| wire::Draining::decode(&found.value[..]).ok());
    let bookie = bookie.to_owned();
    Ok(match draining {
        Some(draining) if draining.proof_revision > 0 => CookieError::Decommissioned { bookie },
        _ => CookieError::NotInStore { bookie },
    })
}

/// Whom a new cookie replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replace {
    /// Nobody: the key must be absent.
    Nobody,
    /// Whoever stands there: it is revoked, and listed as lost, in the same transaction (D7).
    Revoke,
}

/// Writes `bookies/<id>` under a new incarnation number, once, however often it is called for the same uuid (MD3).
pub(crate) async fn intern(
    store: &SharedStore,
    clock: &SharedClock,
    cluster: &Cluster,
    bookie: &str,
    identity: &Identity,
    replace: Replace,
    patience: Duration,
) -> Result<Result<Identity, CookieError>, StoreError> {
    let deadline = Instant::now() + patience;
    loop {
        let standing = read_store(store, bookie).await?;
        if let Some(standing) = &standing
            && *standing.cookie.incarnation_uuid == identity.uuid
        {
            let incarnation = Incarnation(standing.cookie.incarnation);
            let ours = Identity { incarnation, ..identity.clone() };
            return Ok(standing.check(&ours).map(|()| ours));
        }
        let next = next_id(
            store,
            &keys::counter(INCARNATION_COUNTER),
            u64::from(generation_base_32(cluster.generation)),
        )
        .await?;
        let number = u32::try_from(next.id)
            .map_err(|_| StoreError::Refused("incarnation numbers are used up".to_owned()))?;
        let key = keys::cookie(bookie);
        let mut value = wire::Cookie {
            format: FORMAT,
            cluster_id: cluster.id.clone(),
            bookie_id: bookie.to_owned(),
            incarnation: number,
            incarnation_uuid: identity.uuid.to_vec().into(),
            directory_uuids: vec![identity.directory.to_vec().into()],
            revoked: Vec::new(),
        };
        let mut txn = next.txn;
        match (standing, replace) {
            // A wish of that name was about an earlier bookie, and is done or void: it goes with the first step of the new one.
            (None, _) => {
                txn = txn.when(Compare::Absent(key.clone()));
                txn = txn.then(Op::Delete(keys::draining_bookie(bookie)));
            }
            (Some(old), Replace::Nobody) => {
                let incarnation = Incarnation(old.cookie.incarnation);
                return Ok(Err(CookieError::EmptyVolume {
                    bookie: bookie.to_owned(),
                    incarnation,
                }));
            }
            (Some(old), Replace::Revoke) => {
                value.revoked = old.cookie.revoked.clone();
                value.revoked.push(old.cookie.incarnation);
                let lost = wire::Lost { format: FORMAT, at_ms: clock.now().0 };
                let lost_key = keys::lost(Incarnation(old.cookie.incarnation));
                txn = txn.when(Compare::ModRevision(key.clone(), old.revision));
                txn = txn.then(Op::put(lost_key, lost.encode_to_vec()));
            }
        }
        txn = txn.then(Op::put(key, value.encode_to_vec()));
        let cancel = CancellationToken::new();
        match tokio::time::timeout_at(deadline, commit(store, &txn, &cancel)).await {
            Ok(Committed::Done(_) | Committed::Conflict { .. }) => {} // the next round reads what stands
            Ok(Committed::Refused(error)) => return Err(error),
            Ok(Committed::Unsettled) | Err(_) => {
                return Err(StoreError::Unknown("the cookie was not written in time".to_owned()));
            }
        }
    }
}
