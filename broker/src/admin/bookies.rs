//! Bookies: cookies, registrations, wishes to drain and lost incarnations, joined.

use std::collections::{BTreeMap, BTreeSet};

use geminga_metadata::{
    KeyValue,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    admin::v1::{
        Bookie, DrainBookieRequest, DrainBookieResponse, ListBookiesResponse, bookie::Drain,
    },
    reason::Reason,
    storage::v1::{Available, Cookie, Draining},
};

use super::cluster::{check_id, set_wish};
use crate::{catalog::Record, context::Context, errors::Refusal, mirror::read_all};

pub(super) async fn list(context: &Context) -> Result<ListBookiesResponse, Refusal> {
    Ok(ListBookiesResponse { bookies: all(context).await?.into_values().collect() })
}

/// DC1: writes or takes back the wish that a bookie gives its ledgers away for good.
pub(super) async fn drain(
    context: &Context,
    request: &DrainBookieRequest,
) -> Result<DrainBookieResponse, Refusal> {
    check_id(&request.id)?;
    let bookies = all(context).await?;
    let Some(bookie) = bookies.get(&request.id) else {
        return Err(Refusal::request(format!("no bookie {} is known", request.id)));
    };
    if !request.cancel && bookie.drain.is_none() {
        let stay = |b: &&Bookie| b.registered && b.writable && !b.draining && b.id != request.id;
        let (left, least) = (bookies.values().filter(stay).count(), context.config.bookies_min);
        if left < least {
            let message =
                format!("{left} writable bookies would be left, at least {least} are needed");
            return Err(Refusal::new(Reason::NotEnoughBookies, message)
                .with("left", left)
                .with("bookies_min", least));
        }
    }
    let wish = Draining { format: 1, at_ms: context.catalog.now_ms(), ..Draining::default() };
    let key = keys::draining_bookie(&request.id);
    set_wish(context, &key, (!request.cancel).then_some(wish)).await?;
    Ok(DrainBookieResponse { bookie: all(context).await?.remove(&request.id) })
}

/// Every bookie that has a cookie or is registered, by its id.
pub(super) async fn all(context: &Context) -> Result<BTreeMap<String, Bookie>, Refusal> {
    let store = context.catalog.store();
    let mut bookies: BTreeMap<String, Bookie> = BTreeMap::new();
    for item in read_all(store, &keys::cookies()).await?.1 {
        let Some(ParsedKey::Cookie(id)) = keys::parse(&item.key) else { continue };
        let incarnation = Cookie::decode_value(&item)?.incarnation;
        bookies.insert(id.clone(), Bookie { id, incarnation, ..Bookie::default() });
    }
    for item in read_all(store, &keys::availables()).await?.1 {
        let Some(ParsedKey::Available(id)) = keys::parse(&item.key) else { continue };
        let value = Available::decode_value(&item)?;
        let bookie =
            bookies.entry(id.clone()).or_insert_with(|| Bookie { id, ..Bookie::default() });
        register(bookie, value);
    }
    for item in read_all(store, &keys::draining_bookies()).await?.1 {
        let Some(ParsedKey::DrainingBookie(id)) = keys::parse(&item.key) else { continue };
        if let Some(bookie) = bookies.get_mut(&id) {
            bookie.draining = true;
            bookie.drain = Some(progress(Draining::decode_value(&item)?));
        }
    }
    let lost = read_all(store, &keys::losts()).await?.1;
    let lost: BTreeSet<u32> = lost.iter().filter_map(incarnation_of).collect();
    for bookie in bookies.values_mut() {
        bookie.lost = lost.contains(&bookie.incarnation);
    }
    Ok(bookies)
}

fn register(bookie: &mut Bookie, value: Available) {
    bookie.registered = true;
    bookie.incarnation = value.incarnation;
    bookie.address = value.address;
    bookie.zone = value.zone;
    bookie.writable = value.writable;
    bookie.draining = value.draining;
    bookie.limbo = value.limbo.is_some();
    bookie.disk_free_bytes = value.disk_free_bytes;
    bookie.disk_total_bytes = value.disk_total_bytes;
    bookie.version = value.version;
}

fn progress(value: Draining) -> Drain {
    Drain {
        since_ms: value.at_ms,
        bytes_total: value.bytes_total,
        bytes_left: value.bytes_left,
        ledgers_left: value.ledgers_left,
        blocked: value.blocked,
        proven: value.proof_revision > 0,
    }
}

fn incarnation_of(item: &KeyValue) -> Option<u32> {
    match keys::parse(&item.key) {
        Some(ParsedKey::Lost(incarnation)) => Some(incarnation.0),
        _ => None,
    }
}
