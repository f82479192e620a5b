//! Topics: a name, an id that is never reused, and a layout of segments with an epoch.

use geminga_metadata::{
    Compare, Op, Revision, Txn,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::{SegmentId, TopicId},
    key_hash::equal_ranges,
    names::{NamespaceName, TopicName},
    reason::Reason,
    storage::v1::{self as storage, TopicValue, topic_value},
    v1::{KeyRange, Layout, Policies, SegmentInfo},
};

use super::{
    Catalog, Listing, PageRequest, Record, TOPICS, TRIES_MAX, bad_token, contended, put,
    records::FORMAT,
};
use crate::errors::Refusal;

/// A topic as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Topic {
    pub id: TopicId,
    pub name: TopicName,
    pub layout_epoch: u64,
    /// In the order of their ranges; together they cover every hash once.
    pub segments: Vec<SegmentRange>,
    pub created_at_ms: u64,
    /// Its deletion has begun; it is no longer found by clients.
    pub deleting: bool,
    /// Set at the topic itself.
    pub policies: Option<Policies>,
    /// The revision it was read at.
    pub revision: Revision,
}

/// A segment and its inclusive range of key hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRange {
    pub segment: u32,
    pub first: u32,
    pub last: u32,
}

impl Topic {
    /// The layout as clients see it.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let info = |s: &SegmentRange| SegmentInfo {
            segment: s.segment,
            keys: Some(KeyRange { first: s.first, last: s.last }),
        };
        Layout { epoch: self.layout_epoch, segments: self.segments.iter().map(info).collect() }
    }

    /// The segment that a key hash belongs to.
    #[must_use]
    pub fn segment_of(&self, hash: u32) -> u32 {
        let found = self.segments.iter().find(|s| s.first <= hash && hash <= s.last);
        found.expect("the ranges cover every hash").segment
    }

    /// The id of a segment of this topic.
    ///
    /// # Errors
    /// SEGMENT_NOT_FOUND.
    pub fn segment(&self, segment: u32) -> Result<SegmentId, Refusal> {
        if self.segments.iter().any(|s| s.segment == segment) {
            return Ok(SegmentId { topic: self.id, segment });
        }
        let message = format!("topic {} has no segment {segment}", self.name);
        Err(Refusal::new(Reason::SegmentNotFound, message).with("layout_epoch", self.layout_epoch))
    }

    /// All its segments.
    pub fn segment_ids(&self) -> impl Iterator<Item = SegmentId> + '_ {
        self.segments.iter().map(|s| SegmentId { topic: self.id, segment: s.segment })
    }

    /// From a stored value.
    ///
    /// # Errors
    /// INTERNAL for a damaged one.
    pub fn of(id: TopicId, value: &TopicValue, revision: Revision) -> Result<Self, Refusal> {
        let segments: Vec<_> = value
            .segments
            .iter()
            .map(|s| SegmentRange { segment: s.segment, first: s.first, last: s.last })
            .collect();
        let mut next = Some(0u32);
        let covers = segments.iter().all(|s| {
            let joins = next == Some(s.first) && s.first <= s.last;
            next = s.last.checked_add(1);
            joins
        });
        if !covers || next.is_some() {
            return Err(Refusal::internal(format!(
                "the layout of topic {id} does not cover the hash space"
            )));
        }
        let name = TopicName::parse(&value.name).map_err(Refusal::internal)?;
        let (layout_epoch, created_at_ms) = (value.layout_epoch, value.created_at_ms);
        Ok(Self {
            id,
            name,
            layout_epoch,
            segments,
            created_at_ms,
            deleting: value.deleting,
            policies: value.policies,
            revision,
        })
    }

    fn value(&self) -> TopicValue {
        TopicValue {
            format: FORMAT,
            name: self.name.to_string(),
            layout_epoch: self.layout_epoch,
            segments: self
                .segments
                .iter()
                .map(|s| topic_value::Segment { segment: s.segment, first: s.first, last: s.last })
                .collect(),
            created_at_ms: self.created_at_ms,
            deleting: self.deleting,
            policies: self.policies,
        }
    }
}

impl Catalog {
    /// Creates a topic with equal segments and their empty list values, in one transaction. An existing one with as many
    /// segments is returned as it is; `segments` 0 means 1, or what an existing one has.
    ///
    /// # Errors
    /// NAMESPACE_NOT_FOUND, TENANT_NOT_FOUND, ALREADY_EXISTS with another layout or while its deletion is under way.
    pub async fn create_topic(&self, name: &TopicName, segments: u32) -> Result<Topic, Refusal> {
        let name_key = keys::topic_name(name);
        if let Some(topic) = self.find_topic(name).await? {
            return existing(topic, segments);
        }
        let _turn = self.creating.lock().await;
        for _ in 0..TRIES_MAX {
            if let Some(topic) = self.find_topic(name).await? {
                return existing(topic, segments);
            }
            self.namespace(name.namespace()).await?;
            let (id, txn) = self.next_id(TOPICS).await?;
            let ranges = equal_ranges(segments.max(1)).into_iter().zip(0u32..);
            let topic = Topic {
                id: TopicId(id),
                name: name.clone(),
                layout_epoch: 1,
                segments: ranges
                    .map(|((first, last), segment)| SegmentRange { segment, first, last })
                    .collect(),
                created_at_ms: self.clock.now().0,
                deleting: false,
                policies: None,
                revision: Revision(0),
            };
            let mut txn = txn
                .when(Compare::Absent(name_key.clone()))
                .when(Compare::Present(keys::namespace(name.namespace())))
                .then(put(name_key.clone(), &storage::TopicName { format: FORMAT, topic: id }))
                .then(put(keys::topic(topic.id), &topic.value()));
            for segment in topic.segment_ids() {
                txn = txn.then((self.initial_list)(segment));
            }
            if self.commit(&txn).await? {
                // Read back: the revision is needed by whoever compares it.
                return self.topic(name).await;
            }
        }
        Err(contended("the list of topics"))
    }

    /// Reads a topic, also one whose deletion has begun.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn find_topic(&self, name: &TopicName) -> Result<Option<Topic>, Refusal> {
        let Some((value, _)) = self.get::<storage::TopicName>(&keys::topic_name(name)).await?
        else {
            return Ok(None);
        };
        self.topic_by_id(TopicId(value.topic)).await
    }

    /// As [`Self::find_topic`], by id.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn topic_by_id(&self, id: TopicId) -> Result<Option<Topic>, Refusal> {
        let found = self.get::<TopicValue>(&keys::topic(id)).await?;
        found.map(|(value, revision)| Topic::of(id, &value, revision)).transpose()
    }

    /// Reads a topic that clients may use.
    ///
    /// # Errors
    /// TOPIC_NOT_FOUND; NAMESPACE_NOT_FOUND or TENANT_NOT_FOUND when not even those exist.
    pub async fn topic(&self, name: &TopicName) -> Result<Topic, Refusal> {
        match self.find_topic(name).await? {
            Some(topic) if !topic.deleting => Ok(topic),
            _ => {
                self.namespace(name.namespace()).await?;
                Err(topic_not_found(name))
            }
        }
    }

    /// One page of a namespace's topics.
    ///
    /// # Errors
    /// NAMESPACE_NOT_FOUND; INVALID_REQUEST for a foreign page token.
    pub async fn topics(
        &self,
        namespace: &NamespaceName,
        page: &PageRequest,
    ) -> Result<Listing<Topic>, Refusal> {
        self.namespace(namespace).await?;
        let after = match page.token.as_str() {
            "" => None,
            token => {
                let name = TopicName::parse(token).map_err(|_| bad_token())?;
                if name.namespace() != namespace {
                    return Err(bad_token());
                }
                Some(keys::topic_name(&name))
            }
        };
        let names = self
            .page(keys::topic_names_of(namespace), after, page.size, |found| {
                let Some(ParsedKey::TopicName(name)) = keys::parse(&found.key) else {
                    return Err(Refusal::internal(format!("unexpected key {}", found.key)));
                };
                Ok((TopicId(storage::TopicName::decode_value(found)?.topic), name.to_string()))
            })
            .await?;
        let mut items = Vec::with_capacity(names.items.len());
        for ids in names.items.chunks(geminga_metadata::TXN_OPS_MAX) {
            let topics: Vec<_> = ids.iter().map(|id| keys::topic(*id)).collect();
            let (_, found) = self.store.get_many(&topics).await?;
            for (id, found) in ids.iter().zip(found) {
                let Some(found) = found else { continue };
                items.push(Topic::of(*id, &TopicValue::decode_value(&found)?, found.mod_revision)?);
            }
        }
        items.retain(|topic| !topic.deleting);
        Ok(Listing { items, next_page_token: names.next_page_token })
    }

    /// When a topic was last created, in any namespace: each creation changes the counter with it.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn topics_created_at(&self) -> Result<Revision, Refusal> {
        let (_, found) = self.store.get(&keys::counter(TOPICS)).await?;
        Ok(found.map_or(Revision(0), |found| found.mod_revision))
    }

    /// Marks a topic as being deleted: from here on clients do not find it, and nothing new is made inside.
    ///
    /// # Errors
    /// What the store answers. A topic already gone or marked is fine.
    pub async fn mark_topic_deleting(&self, topic: &Topic) -> Result<(), Refusal> {
        for _ in 0..TRIES_MAX {
            let Some(now) = self.topic_by_id(topic.id).await? else { return Ok(()) };
            if now.deleting {
                return Ok(());
            }
            let key = keys::topic(now.id);
            let marked = Topic { deleting: true, ..now.clone() };
            let txn = Txn::new()
                .when(Compare::ModRevision(key.clone(), now.revision))
                .then(put(key, &marked.value()));
            if self.commit(&txn).await? {
                return Ok(());
            }
        }
        Err(contended("the topic"))
    }

    /// Removes the last keys of a topic whose segments are gone.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn remove_topic(&self, topic: &Topic) -> Result<(), Refusal> {
        for subscriptions in self.all_subscriptions(topic).await?.chunks(100) {
            let mut txn = Txn::new().when(Compare::Present(keys::topic(topic.id)));
            for subscription in subscriptions {
                txn = txn.then(Op::Delete(keys::subscription(topic.id, &subscription.name)));
            }
            self.commit(&txn).await?;
        }
        let txn = Txn::new()
            .when(Compare::Present(keys::topic(topic.id)))
            .then(Op::Delete(keys::topic(topic.id)))
            .then(Op::Delete(keys::topic_name(&topic.name)));
        self.commit(&txn).await?; // a conflict: somebody else removed it
        Ok(())
    }
}

fn existing(topic: Topic, segments: u32) -> Result<Topic, Refusal> {
    if topic.deleting {
        let message = format!("topic {} is being deleted", topic.name);
        return Err(Refusal::new(Reason::AlreadyExists, message).with("deleting", true));
    }
    if segments != 0 && topic.segments.len() != segments as usize {
        let message = format!("topic {} exists with {} segments", topic.name, topic.segments.len());
        return Err(
            Refusal::new(Reason::AlreadyExists, message).with("segments", topic.segments.len())
        );
    }
    Ok(topic)
}

/// The topic does not exist.
pub(super) fn topic_not_found(name: &TopicName) -> Refusal {
    Refusal::new(Reason::TopicNotFound, format!("topic {name} does not exist"))
}
