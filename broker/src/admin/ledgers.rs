//! Ledgers as the store has them.

use std::collections::BTreeMap;

use geminga_metadata::{
    Key, KeyValue, RangeRequest, TXN_OPS_MAX,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    admin::v1::{
        DescribeLedgerRequest, Ledger, ListLedgersRequest, ListLedgersResponse,
        ledger::{Fragment, Slot},
    },
    ids::LedgerId,
    names::TopicName,
    storage::v1::{Cookie, LedgerMetadata, ListValue, ledger_metadata::State},
};
use prost::Message;

use super::bookies;
use crate::{catalog::Record, context::Context, errors::Refusal, mirror::read_all};

/// One page in the order of the ids: of all ledgers, of a topic's, or of those that lack copies.
pub(super) async fn list(
    context: &Context,
    request: &ListLedgersRequest,
) -> Result<ListLedgersResponse, Refusal> {
    let most = context.config.limits.page_items_max;
    let size = if request.page_size == 0 { most } else { most.min(request.page_size as usize) };
    let after = match request.page_token.as_str() {
        "" => None,
        token => Some(
            token
                .parse::<u64>()
                .map(LedgerId)
                .map_err(|_| Refusal::request("page_token is not one that this listing gave"))?,
        ),
    };
    let (ids, more) = if request.topic.is_empty() {
        page(context, request.under_replicated, after, size).await?
    } else {
        of_topic(context, &TopicName::parse(&request.topic)?, after, size).await?
    };
    let mut ledgers = read(context, &ids).await?;
    if request.under_replicated {
        ledgers.retain(|ledger| ledger.under_replicated);
    }
    let last = ids.last().filter(|_| more).map(|id| id.0.to_string());
    Ok(ListLedgersResponse { ledgers, next_page_token: last.unwrap_or_default() })
}

pub(super) async fn describe(
    context: &Context,
    request: &DescribeLedgerRequest,
) -> Result<Ledger, Refusal> {
    let found = read(context, &[LedgerId(request.id)]).await?.pop();
    found.ok_or_else(|| Refusal::request(format!("there is no ledger {}", request.id)))
}

async fn page(
    context: &Context,
    under_replicated: bool,
    after: Option<LedgerId>,
    limit: usize,
) -> Result<(Vec<LedgerId>, bool), Refusal> {
    let (prefix, key): (Key, fn(LedgerId) -> Key) = if under_replicated {
        (keys::under_replicateds(), keys::under_replicated)
    } else {
        (keys::ledgers(), keys::ledger)
    };
    let request = RangeRequest { prefix, after: after.map(key), limit, at: None };
    let page = context.catalog.store().range(request).await?;
    let id = |item: &KeyValue| match keys::parse(&item.key) {
        Some(ParsedKey::Ledger(id) | ParsedKey::UnderReplicated(id)) => Some(id),
        _ => None,
    };
    Ok((page.items.iter().filter_map(id).collect(), page.more))
}

/// The ledgers in the list values of a topic's segments.
async fn of_topic(
    context: &Context,
    name: &TopicName,
    after: Option<LedgerId>,
    size: usize,
) -> Result<(Vec<LedgerId>, bool), Refusal> {
    let topic = context.catalog.topic(name).await?;
    let lists = keys::segment_lists_of(topic.id);
    let mut ids = Vec::new();
    for item in read_all(context.catalog.store(), &lists).await?.1 {
        let list = ListValue::decode_value(&item)?;
        let log = list.data.iter().chain(&list.cursor_log).chain(&list.timers);
        let listed = log.chain(&list.compacted).chain(&list.compacting);
        ids.extend(listed.map(|entry| LedgerId(entry.ledger)));
    }
    ids.sort_unstable();
    ids.dedup();
    ids.retain(|id| after.is_none_or(|after| *id > after));
    let more = ids.len() > size;
    ids.truncate(size);
    Ok((ids, more))
}

/// Those that exist, in the order asked for.
async fn read(context: &Context, ids: &[LedgerId]) -> Result<Vec<Ledger>, Refusal> {
    let store = context.catalog.store();
    let names = names(context).await?;
    let mut ledgers = Vec::with_capacity(ids.len());
    for ids in ids.chunks(TXN_OPS_MAX / 2) {
        let keys: Vec<Key> =
            ids.iter().flat_map(|id| [keys::ledger(*id), keys::under_replicated(*id)]).collect();
        let (_, found) = store.get_many(&keys).await?;
        for pair in found.chunks(2) {
            if let [Some(ledger), listed] = pair {
                ledgers.push(describe_one(ledger, listed.is_some(), &names)?);
            }
        }
    }
    Ok(ledgers)
}

/// Which bookie an incarnation is, or was, of.
async fn names(context: &Context) -> Result<BTreeMap<u32, String>, Refusal> {
    let mut names = BTreeMap::new();
    for item in read_all(context.catalog.store(), &keys::cookies()).await?.1 {
        let Some(ParsedKey::Cookie(id)) = keys::parse(&item.key) else { continue };
        let revoked = Cookie::decode_value(&item)?.revoked;
        names.extend(revoked.into_iter().map(|incarnation| (incarnation, id.clone())));
    }
    let known = bookies::all(context).await?.into_values();
    names.extend(known.map(|bookie| (bookie.incarnation, bookie.id)));
    Ok(names)
}

fn describe_one(
    found: &KeyValue,
    under_replicated: bool,
    names: &BTreeMap<u32, String>,
) -> Result<Ledger, Refusal> {
    let value = LedgerMetadata::decode(found.value.clone())
        .map_err(|error| Refusal::internal(format!("{} cannot be read: {error}", found.key)))?;
    let (state, last_entry, length_bytes) = match value.state {
        Some(State::Open(_)) => ("Open", None, 0),
        Some(State::InRecovery(_)) => ("InRecovery", None, 0),
        Some(State::Closed(closed)) => ("Closed", u64::try_from(closed.last).ok(), closed.length),
        Some(State::Deleted(_)) => ("Deleted", None, 0),
        None => return Err(Refusal::internal(format!("{} has no state", found.key))),
    };
    let owner = value.owner.unwrap_or_default();
    let slot = |incarnation: &u32| {
        let bookie = names.get(incarnation).cloned().unwrap_or_default();
        Slot { incarnation: *incarnation, bookie }
    };
    let fragment = |fragment: &geminga_proto::storage::v1::Fragment| Fragment {
        first_entry: fragment.first_entry,
        slots: fragment.slots.iter().map(slot).collect(),
    };
    Ok(Ledger {
        id: value.id,
        state: state.to_owned(),
        ensemble_size: value.ensemble_size,
        write_quorum: value.write_quorum,
        ack_quorum: value.ack_quorum,
        last_entry,
        length_bytes,
        topic_id: owner.topic,
        segment: owner.segment,
        epoch: owner.epoch,
        under_replicated,
        fragments: value.fragments.iter().map(fragment).collect(),
    })
}
