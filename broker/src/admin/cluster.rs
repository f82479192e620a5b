//! The cluster, its brokers, and where a topic is: read from the store, so that any broker gives the same answer.

use std::collections::{BTreeMap, BTreeSet};

use geminga_metadata::{
    Cluster as ClusterRecord, Compare, Key, KeyValue, Op, Txn,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    admin::v1::{
        Broker, Cluster, DrainBrokerRequest, DrainBrokerResponse, ListBrokersResponse,
        LocateTopicRequest, LocateTopicResponse, SegmentPlace,
    },
    ids::Bundle,
    names::TopicName,
    reason::Reason,
    storage::v1::{self as storage, Available, Claim, Draining},
};
use prost::Message;

use crate::{
    catalog::Record,
    context::Context,
    errors::Refusal,
    mirror::{read_all, read_all_at},
};

/// Tries of one change; each lost one means that somebody else wrote the key.
const TRIES_MAX: u32 = 16;
/// Longest id of a broker or bookie that a wish may be written for, bytes.
const ID_BYTES_MAX: usize = 200;

/// All figures are of one revision of the store.
pub(super) async fn describe(context: &Context) -> Result<Cluster, Refusal> {
    let store = context.catalog.store();
    let (revision, found) = store.get(&keys::cluster()).await?;
    let found = found.ok_or_else(|| Refusal::internal("the cluster has no record"))?;
    let record = ClusterRecord::decode(&found.value).map_err(Refusal::internal)?;
    let all = async |prefix: Key| read_all_at(store, &prefix, Some(revision)).await;
    let availables = all(keys::availables()).await?.1;
    let writable = availables.iter().filter_map(|item| Available::decode_value(item).ok());
    Ok(Cluster {
        id: record.id,
        generation: u32::from(record.generation),
        confirmed: u32::from(record.confirmed),
        feature_level: record.feature_level,
        bundles: record.bundles,
        bundles_claimed: count(&all(keys::owners()).await?.1),
        brokers: count(&all(keys::brokers()).await?.1),
        bookies: count(&availables),
        bookies_writable: u32::try_from(writable.filter(|a| a.writable).count())
            .unwrap_or(u32::MAX),
        ledgers_under_replicated: all(keys::under_replicateds()).await?.1.len() as u64,
        incarnations_lost: count(&all(keys::losts()).await?.1),
        revision: revision.0,
    })
}

fn count(items: &[KeyValue]) -> u32 {
    u32::try_from(items.len()).unwrap_or(u32::MAX)
}

/// Who claims each bundle.
async fn claims(context: &Context) -> Result<BTreeMap<Bundle, Claim>, Refusal> {
    let (_, all) = read_all(context.catalog.store(), &keys::owners()).await?;
    let claim = |item: &KeyValue| match keys::parse(&item.key) {
        Some(ParsedKey::Owner(bundle)) => Some(Claim::decode_value(item).map(|c| (bundle, c))),
        _ => None,
    };
    all.iter().filter_map(claim).collect()
}

pub(super) async fn list_brokers(context: &Context) -> Result<ListBrokersResponse, Refusal> {
    let store = context.catalog.store();
    let mut bundles: BTreeMap<String, u32> = BTreeMap::new();
    for claim in claims(context).await?.into_values() {
        *bundles.entry(claim.broker).or_default() += 1;
    }
    let wishes: BTreeSet<Key> =
        read_all(store, &keys::draining_brokers()).await?.1.into_iter().map(|i| i.key).collect();
    let mut brokers = Vec::new();
    for item in read_all(store, &keys::brokers()).await?.1 {
        let Some(ParsedKey::Broker(id)) = keys::parse(&item.key) else { continue };
        let value = storage::Broker::decode_value(&item)?;
        brokers.push(Broker {
            bundles: bundles.remove(&id).unwrap_or(0),
            draining: value.draining || wishes.contains(&keys::draining_broker(&id)),
            address: value.address,
            started_at_ms: value.started_at_ms,
            version: value.version,
            id,
        });
    }
    Ok(ListBrokersResponse { brokers })
}

/// Writes or takes back the wish that a broker gives its bundles away.
pub(super) async fn drain_broker(
    context: &Context,
    request: &DrainBrokerRequest,
) -> Result<DrainBrokerResponse, Refusal> {
    check_id(&request.id)?;
    let key = keys::draining_broker(&request.id);
    let known = context.catalog.store().get(&keys::broker(&request.id)).await?.1.is_some();
    if !known && !request.cancel {
        let message = format!("no broker {} is registered", request.id);
        return Err(Refusal::new(Reason::InvalidRequest, message));
    }
    let wish = Draining { format: 1, at_ms: context.catalog.now_ms(), ..Draining::default() };
    set_wish(context, &key, (!request.cancel).then_some(wish)).await?;
    let left = claims(context).await?.into_values().filter(|c| c.broker == request.id).count();
    Ok(DrainBrokerResponse { bundles_left: u32::try_from(left).unwrap_or(u32::MAX) })
}

/// An id that a key is made of.
pub(super) fn check_id(id: &str) -> Result<(), Refusal> {
    if id.is_empty() || id.len() > ID_BYTES_MAX {
        return Err(Refusal::request(format!("an id has 1 to {ID_BYTES_MAX} bytes")));
    }
    Ok(())
}

/// Writes a wish that is not there, or takes it back. One that stands is left as it is, with its progress.
pub(super) async fn set_wish(
    context: &Context,
    key: &Key,
    wish: Option<Draining>,
) -> Result<(), Refusal> {
    for _ in 0..TRIES_MAX {
        let (_, found) = context.catalog.store().get(key).await?;
        let txn = match (&found, &wish) {
            (None, Some(wish)) => Txn::new()
                .when(Compare::Absent(key.clone()))
                .then(Op::put(key.clone(), wish.encode_to_vec())),
            (Some(found), None) => Txn::new()
                .when(Compare::ModRevision(key.clone(), found.mod_revision))
                .then(Op::Delete(key.clone())),
            _ => return Ok(()),
        };
        if context.catalog.commit(&txn).await? {
            return Ok(());
        }
    }
    Err(Refusal::new(Reason::MetadataUnavailable, "the wish is being changed by many; try again"))
}

pub(super) async fn locate(
    context: &Context,
    request: &LocateTopicRequest,
) -> Result<LocateTopicResponse, Refusal> {
    let topic = context.catalog.topic(&TopicName::parse(&request.name)?).await?;
    let claims = claims(context).await?;
    let view = context.ownership.members().view();
    let segments = topic.segment_ids().map(|id| {
        let bundle = id.bundle(context.catalog.bundles());
        let claim = claims.get(&bundle).cloned().unwrap_or_default();
        let placed = view.preferred(bundle, None).map(|(id, _)| id.clone()).unwrap_or_default();
        SegmentPlace {
            segment: id.segment,
            bundle: bundle.0,
            placed: if placed == claim.broker { String::new() } else { placed },
            broker: claim.broker,
            address: claim.address,
        }
    });
    let segments = segments.collect();
    Ok(LocateTopicResponse { segments })
}
