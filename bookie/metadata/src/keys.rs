//! Every key of the metadata store (protocol section 2): typed builders, prefixes, and the way back.
//!
//! Parts are joined by `/`; ids are hex of fixed width, so that the order of keys is the order of numbers. Text from
//! outside is either a parsed name or escaped here, and every prefix ends in `/`: no text reaches past its own part, and
//! the prefix of one tenant never matches another's key (security S3).

use std::fmt::Write as _;

use bytes::Bytes;
use geminga_proto::{
    ids::{Bundle, Incarnation, LedgerId, SegmentId, TopicId},
    names::{NamespaceName, SubscriptionName, TenantName, TopicName},
};

use crate::Key;

/// What a key stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParsedKey {
    /// `cluster`
    Cluster,
    /// `counters/<name>`
    Counter(String),
    /// `ledgers/<id>`
    Ledger(LedgerId),
    /// `segments/<topic>/<n>/ledgers`
    SegmentList(SegmentId),
    /// `bookies/<bookie id>`
    Cookie(String),
    /// `available/<bookie id>`
    Available(String),
    /// `lost/<incarnation>`
    Lost(Incarnation),
    /// `underreplicated/<ledger>`
    UnderReplicated(LedgerId),
    /// `brokers/<broker id>`
    Broker(String),
    /// `owners/<bundle>`
    Owner(Bundle),
    /// `tenants/<tenant>`
    Tenant(TenantName),
    /// `namespaces/<tenant>/<namespace>`
    Namespace(NamespaceName),
    /// `names/<tenant>/<namespace>/<topic>`
    TopicName(TopicName),
    /// `topics/<id>`
    Topic(TopicId),
    /// `subs/<topic>/<name>`
    Subscription(TopicId, SubscriptionName),
    /// `draining/brokers/<broker id>`
    DrainingBroker(String),
    /// `draining/bookies/<bookie id>`
    DrainingBookie(String),
    /// `elections/<role>`
    Election(String),
    /// `locks/replication/<ledger>`
    ReplicationLock(LedgerId),
    /// `pauses/auto-recovery`
    AutoRecoveryPause,
    /// `policies/cluster`
    ClusterPolicies,
}

/// The cluster's identity, generation, feature level and bundle count. Never deleted.
#[must_use]
pub fn cluster() -> Key {
    key("cluster".to_owned())
}

/// A counter that ids come from. Never deleted.
#[must_use]
pub fn counter(name: &str) -> Key {
    key(format!("counters/{}", escape(name)))
}

/// A ledger's metadata.
#[must_use]
pub fn ledger(ledger: LedgerId) -> Key {
    key(format!("ledgers/{:016x}", ledger.0))
}

/// All ledgers, in the order of their ids.
#[must_use]
pub fn ledgers() -> Key {
    key("ledgers/".to_owned())
}

/// The list value of a segment.
#[must_use]
pub fn segment_list(segment: SegmentId) -> Key {
    key(format!("segments/{:016x}/{:08x}/ledgers", segment.topic.0, segment.segment))
}

/// The list values of all segments.
#[must_use]
pub fn segment_lists() -> Key {
    key("segments/".to_owned())
}

/// The list values of a topic's segments, in the order of their numbers.
#[must_use]
pub fn segment_lists_of(topic: TopicId) -> Key {
    key(format!("segments/{:016x}/", topic.0))
}

/// A bookie's cookie (D7).
#[must_use]
pub fn cookie(bookie: &str) -> Key {
    key(format!("bookies/{}", escape(bookie)))
}

/// All cookies.
#[must_use]
pub fn cookies() -> Key {
    key("bookies/".to_owned())
}

/// A bookie's registration, under its lease.
#[must_use]
pub fn available(bookie: &str) -> Key {
    key(format!("available/{}", escape(bookie)))
}

/// All registered bookies.
#[must_use]
pub fn availables() -> Key {
    key("available/".to_owned())
}

/// The mark that an incarnation is gone for good (A1, D7).
#[must_use]
pub fn lost(incarnation: Incarnation) -> Key {
    key(format!("lost/{:08x}", incarnation.0))
}

/// All lost incarnations.
#[must_use]
pub fn losts() -> Key {
    key("lost/".to_owned())
}

/// The listing of a ledger that lacks copies.
#[must_use]
pub fn under_replicated(ledger: LedgerId) -> Key {
    key(format!("underreplicated/{:016x}", ledger.0))
}

/// All ledgers that lack copies.
#[must_use]
pub fn under_replicateds() -> Key {
    key("underreplicated/".to_owned())
}

/// A broker's registration, under its lease.
#[must_use]
pub fn broker(broker: &str) -> Key {
    key(format!("brokers/{}", escape(broker)))
}

/// All registered brokers.
#[must_use]
pub fn brokers() -> Key {
    key("brokers/".to_owned())
}

/// The claim on a bundle, under the owner's lease (O1).
#[must_use]
pub fn owner(bundle: Bundle) -> Key {
    key(format!("owners/{:08x}", bundle.0))
}

/// All claims, in the order of the bundles.
#[must_use]
pub fn owners() -> Key {
    key("owners/".to_owned())
}

/// A tenant.
#[must_use]
pub fn tenant(tenant: &TenantName) -> Key {
    key(format!("tenants/{tenant}"))
}

/// All tenants.
#[must_use]
pub fn tenants() -> Key {
    key("tenants/".to_owned())
}

/// A namespace.
#[must_use]
pub fn namespace(namespace: &NamespaceName) -> Key {
    key(format!("namespaces/{namespace}"))
}

/// All namespaces of a tenant.
#[must_use]
pub fn namespaces_of(tenant: &TenantName) -> Key {
    key(format!("namespaces/{tenant}/"))
}

/// All namespaces of all tenants.
#[must_use]
pub fn namespaces() -> Key {
    key("namespaces/".to_owned())
}

/// From a topic's name to its id.
#[must_use]
pub fn topic_name(topic: &TopicName) -> Key {
    key(format!("names/{topic}"))
}

/// The names of all topics of a namespace.
#[must_use]
pub fn topic_names_of(namespace: &NamespaceName) -> Key {
    key(format!("names/{namespace}/"))
}

/// The names of all topics of a tenant.
#[must_use]
pub fn topic_names_of_tenant(tenant: &TenantName) -> Key {
    key(format!("names/{tenant}/"))
}

/// The names of all topics.
#[must_use]
pub fn topic_names() -> Key {
    key("names/".to_owned())
}

/// A topic.
#[must_use]
pub fn topic(topic: TopicId) -> Key {
    key(format!("topics/{:016x}", topic.0))
}

/// All topics, in the order of their ids.
#[must_use]
pub fn topics() -> Key {
    key("topics/".to_owned())
}

/// A subscription (C6).
#[must_use]
pub fn subscription(topic: TopicId, subscription: &SubscriptionName) -> Key {
    key(format!("subs/{:016x}/{subscription}", topic.0))
}

/// All subscriptions of a topic, in the order of their names.
#[must_use]
pub fn subscriptions_of(topic: TopicId) -> Key {
    key(format!("subs/{:016x}/", topic.0))
}

/// All subscriptions of all topics.
#[must_use]
pub fn subscriptions() -> Key {
    key("subs/".to_owned())
}

/// The wish that a broker gives its bundles away.
#[must_use]
pub fn draining_broker(broker: &str) -> Key {
    key(format!("draining/brokers/{}", escape(broker)))
}

/// All brokers that are to give their bundles away.
#[must_use]
pub fn draining_brokers() -> Key {
    key("draining/brokers/".to_owned())
}

/// The wish that a bookie gives its ledgers away for good, and how far that is (DC1).
#[must_use]
pub fn draining_bookie(bookie: &str) -> Key {
    key(format!("draining/bookies/{}", escape(bookie)))
}

/// All bookies that are to give their ledgers away.
#[must_use]
pub fn draining_bookies() -> Key {
    key("draining/bookies/".to_owned())
}

/// Who does the work of a role, under the holder's lease (A1).
#[must_use]
pub fn election(role: &str) -> Key {
    key(format!("elections/{}", escape(role)))
}

/// Who replicates a ledger now, under the holder's lease: for efficiency only (A2).
#[must_use]
pub fn replication_lock(ledger: LedgerId) -> Key {
    key(format!("locks/replication/{:016x}", ledger.0))
}

/// Set by an operator, under a lease of at most 1 h: nothing is declared lost and nothing is replicated (A1).
#[must_use]
pub fn auto_recovery_pause() -> Key {
    key("pauses/auto-recovery".to_owned())
}

/// Retention and offload of the whole cluster.
#[must_use]
pub fn cluster_policies() -> Key {
    key("policies/cluster".to_owned())
}

/// The way back from a key. None for bytes that no builder here makes.
#[must_use]
pub fn parse(key: &Key) -> Option<ParsedKey> {
    let text = std::str::from_utf8(&key.0).ok()?;
    let Some((kind, rest)) = text.split_once('/') else {
        return (text == "cluster").then_some(ParsedKey::Cluster);
    };
    Some(match kind {
        "counters" => ParsedKey::Counter(unescape(rest)?),
        "ledgers" => ParsedKey::Ledger(LedgerId(hex_64(rest)?)),
        "segments" => {
            let (topic, rest) = rest.split_once('/')?;
            let segment = hex_32(rest.strip_suffix("/ledgers")?)?;
            ParsedKey::SegmentList(SegmentId { topic: TopicId(hex_64(topic)?), segment })
        }
        "bookies" => ParsedKey::Cookie(unescape(rest)?),
        "available" => ParsedKey::Available(unescape(rest)?),
        "lost" => ParsedKey::Lost(Incarnation(hex_32(rest)?)),
        "underreplicated" => ParsedKey::UnderReplicated(LedgerId(hex_64(rest)?)),
        "brokers" => ParsedKey::Broker(unescape(rest)?),
        "owners" => ParsedKey::Owner(Bundle(hex_32(rest)?)),
        "tenants" => ParsedKey::Tenant(TenantName::parse(rest).ok()?),
        "namespaces" => ParsedKey::Namespace(NamespaceName::parse(rest).ok()?),
        "names" => ParsedKey::TopicName(TopicName::parse(rest).ok()?),
        "topics" => ParsedKey::Topic(TopicId(hex_64(rest)?)),
        "subs" => {
            let (topic, name) = rest.split_once('/')?;
            ParsedKey::Subscription(TopicId(hex_64(topic)?), SubscriptionName::parse(name).ok()?)
        }
        "draining" => {
            let (kind, id) = rest.split_once('/')?;
            match kind {
                "brokers" => ParsedKey::DrainingBroker(unescape(id)?),
                "bookies" => ParsedKey::DrainingBookie(unescape(id)?),
                _ => return None,
            }
        }
        "elections" => ParsedKey::Election(unescape(rest)?),
        "locks" => {
            ParsedKey::ReplicationLock(LedgerId(hex_64(rest.strip_prefix("replication/")?)?))
        }
        "pauses" => (rest == "auto-recovery").then_some(ParsedKey::AutoRecoveryPause)?,
        "policies" => (rest == "cluster").then_some(ParsedKey::ClusterPolicies)?,
        _ => return None,
    })
}

fn key(text: String) -> Key {
    Key(Bytes::from(text))
}

/// Everything outside `[A-Za-z0-9._~-]` becomes `%` and two hex digits; the empty text becomes a lone `%`.
fn escape(text: &str) -> String {
    if text.is_empty() {
        return "%".to_owned();
    }
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if plain(byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02x}").expect("a String takes any text");
        }
    }
    out
}

fn unescape(text: &str) -> Option<String> {
    if text == "%" {
        return Some(String::new());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            out.push(u8::try_from(hex(std::str::from_utf8(digits).ok()?, 2)?).ok()?);
            rest = tail;
        } else {
            out.push(first);
        }
    }
    let out = String::from_utf8(out).ok()?;
    // One text, one key: an escape that was not needed is nobody's key.
    (escape(&out) == text).then_some(out)
}

fn plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'~' | b'-')
}

fn hex(text: &str, digits: usize) -> Option<u64> {
    let canonical = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != digits || !text.bytes().all(canonical) {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}

fn hex_64(text: &str) -> Option<u64> {
    hex(text, 16)
}

fn hex_32(text: &str) -> Option<u32> {
    hex(text, 8).and_then(|number| u32::try_from(number).ok())
}

#[cfg(test)]
mod tests;
