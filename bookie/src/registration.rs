//! `available/<id>` under a lease (section 2): written only while the cookie in the store is ours and not revoked (D7).

use std::{io, sync::Arc, time::Duration};

use geminga_metadata::{Committed, Compare, LeaseKeeper, Op, Revision, Txn, commit, keys};
use geminga_proto::storage::v1 as wire;
use prost::Message;
use tokio::sync::watch;

use crate::{
    auto_recovery::is_draining,
    cookie::{self, CookieError},
    fencing::Room,
    state::Shared,
};

/// What others may know of this bookie now.
fn status(shared: &Shared, instance: [u8; 16], drains: bool) -> wire::Available {
    let core = shared.core();
    let limbo = core.ledgers.limbo();
    shared.metrics.limbo_ledgers.set(core.ledgers.limbo_ledgers() as i64);
    wire::Available {
        format: 1,
        incarnation: shared.identity.incarnation.0,
        instance: instance.to_vec().into(),
        address: shared.config.address.clone(),
        writable: core.room == Room::Writable,
        draining: shared.config.draining || drains,
        limbo: limbo.map(|bound| wire::Bound {
            generation: bound.generation.into(),
            revision: bound.revision,
        }),
        disk_free_bytes: core.space.0,
        disk_total_bytes: core.space.1,
        zone: shared.config.zone.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// Whether a new status is worth a write: disk figures alone only when they moved by a twentieth.
fn differs(old: &wire::Available, new: &wire::Available) -> bool {
    let moved = old.disk_free_bytes.abs_diff(new.disk_free_bytes) > new.disk_total_bytes / 20;
    let disk = wire::Available { disk_free_bytes: new.disk_free_bytes, ..old.clone() };
    moved || disk != *new
}

/// Keeps the registration until cancelled; re-registers after a lost lease. An error means that this incarnation may not
/// serve any more.
pub(crate) async fn run(
    shared: Arc<Shared>,
    keeper: LeaseKeeper,
    instance: [u8; 16],
    mut cookie_revision: Revision,
    registered: watch::Sender<bool>,
) -> io::Result<()> {
    let cancelled = shared.tasks.token();
    let key = keys::available(&shared.config.id);
    let recheck = shared.config.lease_ttl.max(Duration::from_secs(1));
    let mut lease = None;
    let mut written: Option<wire::Available> = None;
    let mut drains = false;
    loop {
        let held = tokio::select! {
            biased;
            () = cancelled.cancelled() => return Ok(()),
            held = keeper.held() => held,
        };
        let Some(held) = held else { return Ok(()) };
        if lease != Some(held) {
            written = None;
        }
        lease = Some(held);
        if let Ok((_, wish)) = shared.store.get(&keys::draining_bookie(&shared.config.id)).await {
            drains = wish.is_some_and(|wish| is_draining(&wish.value)); // unreadable: as before
        }
        let now = status(&shared, instance, drains);
        if written.as_ref().is_none_or(|old| differs(old, &now)) {
            let put = Op::Put { key: key.clone(), value: now.encode_to_vec().into(), lease };
            let ours = Compare::ModRevision(keys::cookie(&shared.config.id), cookie_revision);
            let txn = Txn::new().when(ours).then(put);
            let attempt = cancelled.child_token();
            let outcome = tokio::select! {
                biased;
                () = keeper.lost(held) => { attempt.cancel(); Committed::Unsettled } // a leased key: a late one does no harm
                outcome = commit(&shared.store, &txn, &attempt) => outcome,
            };
            match outcome {
                Committed::Done(_) => {
                    written = Some(now);
                    registered.send_replace(true);
                }
                Committed::Conflict { .. } => {}
                Committed::Unsettled | Committed::Refused(_) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            }
        }
        if let Ok(found) = cookie::read_store(&shared.store, &shared.config.id).await {
            let Some(found) = found else {
                let Ok(why) = cookie::absent(&shared.store, &shared.config.id).await else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                if matches!(why, CookieError::Decommissioned { .. }) {
                    keeper.end().await;
                    shared.end_decommissioned();
                }
                return Err(io::Error::other(why));
            };
            found.check(&shared.identity).map_err(io::Error::other)?;
            if found.revision != cookie_revision {
                cookie_revision = found.revision;
                written = None; // the conflict above was a change that leaves us in service: once more
                continue;
            }
        }
        tokio::select! {
            biased;
            () = cancelled.cancelled() => return Ok(()),
            () = keeper.lost(held) => {}
            () = shared.status_wake.notified() => {}
            () = tokio::time::sleep(recheck) => {}
        }
    }
}
