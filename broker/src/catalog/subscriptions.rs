//! Subscriptions: one key each, Creating -> Ready -> Deleting (C6).

use geminga_metadata::{
    Compare, KeyValue, Op, Revision, Txn,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::{SubscriptionId, TopicId},
    names::SubscriptionName,
    reason::Reason,
    storage::v1::{SubscriptionValue, subscription_value},
    v1::{SubscriptionSettings, SubscriptionType},
};

use super::{
    Catalog, Listing, PageRequest, Record, SUBSCRIPTIONS, TRIES_MAX, Topic, bad_token, contended,
    put, records::FORMAT, topics::topic_not_found,
};
use crate::{errors::Refusal, subscription as wanted};

pub use subscription_value::{Start, State};

/// A subscription as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    pub id: SubscriptionId,
    pub topic: TopicId,
    pub name: SubscriptionName,
    pub start: Start,
    pub state: State,
    pub created_at_ms: u64,
    /// With its defaults filled in.
    pub settings: SubscriptionSettings,
    /// The revision it was read at.
    pub revision: Revision,
}

impl Subscription {
    fn of(topic: TopicId, name: &SubscriptionName, found: &KeyValue) -> Result<Self, Refusal> {
        let value = SubscriptionValue::decode_value(found)?;
        let damaged = |_| Refusal::internal(format!("{} has an unknown state or start", found.key));
        Ok(Self {
            id: SubscriptionId(value.id),
            topic,
            name: name.clone(),
            start: Start::try_from(value.start).map_err(damaged)?,
            state: State::try_from(value.state).map_err(damaged)?,
            created_at_ms: value.created_at_ms,
            // One of before there were settings is exclusive.
            settings: wanted::settings(&value.settings.unwrap_or_default())?,
            revision: found.mod_revision,
        })
    }

    fn value(&self) -> SubscriptionValue {
        SubscriptionValue {
            format: FORMAT,
            id: self.id.0,
            start: self.start.into(),
            state: self.state.into(),
            created_at_ms: self.created_at_ms,
            settings: Some(self.settings.clone()),
        }
    }
}

impl Catalog {
    /// Writes the key of a new subscription as Creating, or returns the one that exists, Creating or Ready (C6). The
    /// topic must stand as given.
    ///
    /// # Errors
    /// ALREADY_EXISTS with another start (unless any will do), with other settings (if some are asked for), or while it is
    /// being deleted; TOPIC_NOT_FOUND.
    pub async fn begin_subscription(
        &self,
        topic: &Topic,
        name: &SubscriptionName,
        (start, any_start): (Start, bool),
        settings: Option<&SubscriptionSettings>,
    ) -> Result<Subscription, Refusal> {
        let key = keys::subscription(topic.id, name);
        let _turn = self.creating.lock().await;
        for _ in 0..TRIES_MAX {
            if let Some(found) = self.find_subscription(topic.id, name).await? {
                if found.state == State::Deleting {
                    let message = format!("subscription {name} of {} is being deleted", topic.name);
                    return Err(Refusal::new(Reason::AlreadyExists, message).with("deleting", true));
                }
                if !any_start && found.start != start {
                    let message =
                        format!("subscription {name} of {} exists with another start", topic.name);
                    return Err(Refusal::new(Reason::AlreadyExists, message)
                        .with("start", found.start.as_str_name()));
                }
                if let Some(settings) = settings
                    && *settings != found.settings
                {
                    let message =
                        format!("subscription {name} of {} exists with other settings", topic.name);
                    let kind = SubscriptionType::try_from(found.settings.r#type);
                    let kind = kind.unwrap_or_default().as_str_name();
                    return Err(Refusal::new(Reason::AlreadyExists, message).with("type", kind));
                }
                return Ok(found);
            }
            let Some(topic) = self.topic_by_id(topic.id).await?.filter(|topic| !topic.deleting)
            else {
                return Err(topic_not_found(&topic.name));
            };
            let (id, txn) = self.next_id(SUBSCRIPTIONS).await?;
            let subscription = Subscription {
                id: SubscriptionId(id),
                topic: topic.id,
                name: name.clone(),
                start,
                state: State::Creating,
                created_at_ms: self.clock.now().0,
                settings: match settings {
                    Some(settings) => settings.clone(),
                    None => wanted::settings(&SubscriptionSettings::default())?,
                },
                revision: Revision(0),
            };
            let txn = txn
                .when(Compare::Absent(key.clone()))
                .when(Compare::ModRevision(keys::topic(topic.id), topic.revision))
                .then(put(key.clone(), &subscription.value()));
            self.commit(&txn).await?; // done or not, the next round reads what stands
        }
        Err(contended("the list of subscriptions"))
    }

    /// Reads a subscription in any state.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn find_subscription(
        &self,
        topic: TopicId,
        name: &SubscriptionName,
    ) -> Result<Option<Subscription>, Refusal> {
        let (_, found) = self.store.get(&keys::subscription(topic, name)).await?;
        found.map(|found| Subscription::of(topic, name, &found)).transpose()
    }

    /// Reads a subscription that streams may open: the record decides, but never one being deleted (C6).
    ///
    /// # Errors
    /// SUBSCRIPTION_NOT_FOUND.
    pub async fn subscription(
        &self,
        topic: &Topic,
        name: &SubscriptionName,
    ) -> Result<Subscription, Refusal> {
        let found = self.find_subscription(topic.id, name).await?;
        found.filter(|found| found.state != State::Deleting).ok_or_else(|| not_found(topic, name))
    }

    /// Changes the settings; the type stays.
    ///
    /// # Errors
    /// SUBSCRIPTION_NOT_FOUND; INVALID_REQUEST for another type.
    pub async fn update_subscription(
        &self,
        topic: &Topic,
        name: &SubscriptionName,
        settings: &SubscriptionSettings,
    ) -> Result<Subscription, Refusal> {
        let key = keys::subscription(topic.id, name);
        for _ in 0..TRIES_MAX {
            let found = self.subscription(topic, name).await?;
            if found.settings.r#type != settings.r#type {
                let message = "the type of a subscription never changes: create another one";
                return Err(Refusal::request(message));
            }
            let updated = Subscription { settings: settings.clone(), ..found.clone() };
            let txn = Txn::new()
                .when(Compare::ModRevision(key.clone(), found.revision))
                .then(put(key.clone(), &updated.value()));
            if self.commit(&txn).await? {
                return Ok(updated);
            }
        }
        Err(contended("the subscription"))
    }

    /// Creating -> Ready, if neither the key nor the topic's layout changed since they were read. False: read again.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn subscription_ready(
        &self,
        topic: &Topic,
        subscription: &Subscription,
    ) -> Result<bool, Refusal> {
        let key = keys::subscription(topic.id, &subscription.name);
        let ready = Subscription { state: State::Ready, ..subscription.clone() };
        let txn = Txn::new()
            .when(Compare::ModRevision(key.clone(), subscription.revision))
            .when(Compare::ModRevision(keys::topic(topic.id), topic.revision))
            .then(put(key, &ready.value()));
        self.commit(&txn).await
    }

    /// Creating or Ready -> Deleting; returns it, or none when it is gone.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn mark_subscription_deleting(
        &self,
        topic: TopicId,
        name: &SubscriptionName,
    ) -> Result<Option<Subscription>, Refusal> {
        let key = keys::subscription(topic, name);
        for _ in 0..TRIES_MAX {
            let Some(found) = self.find_subscription(topic, name).await? else { return Ok(None) };
            if found.state == State::Deleting {
                return Ok(Some(found));
            }
            let marked = Subscription { state: State::Deleting, ..found.clone() };
            let txn = Txn::new()
                .when(Compare::ModRevision(key.clone(), found.revision))
                .then(put(key.clone(), &marked.value()));
            self.commit(&txn).await?;
        }
        Err(contended("the subscription"))
    }

    /// Removes the key of a subscription that is Deleting; it goes last (C6).
    ///
    /// # Errors
    /// What the store answers.
    pub async fn remove_subscription(&self, subscription: &Subscription) -> Result<(), Refusal> {
        let key = keys::subscription(subscription.topic, &subscription.name);
        let txn = Txn::new()
            .when(Compare::ModRevision(key.clone(), subscription.revision))
            .then(Op::Delete(key));
        self.commit(&txn).await?; // a conflict: somebody else removed it
        Ok(())
    }

    /// One page of a topic's subscriptions.
    ///
    /// # Errors
    /// INVALID_REQUEST for a foreign page token.
    pub async fn subscriptions(
        &self,
        topic: &Topic,
        page: &PageRequest,
    ) -> Result<Listing<Subscription>, Refusal> {
        let after = match page.token.as_str() {
            "" => None,
            token => {
                let name = SubscriptionName::parse(token).map_err(|_| bad_token())?;
                Some(keys::subscription(topic.id, &name))
            }
        };
        self.page(keys::subscriptions_of(topic.id), after, page.size, |found| {
            let Some(ParsedKey::Subscription(_, name)) = keys::parse(&found.key) else {
                return Err(Refusal::internal(format!("unexpected key {}", found.key)));
            };
            let token = name.to_string();
            Ok((Subscription::of(topic.id, &name, found)?, token))
        })
        .await
    }

    /// How many subscriptions a topic has, in any state.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn subscription_count(&self, topic: TopicId) -> Result<usize, Refusal> {
        self.count(keys::subscriptions_of(topic)).await
    }

    /// All subscriptions of a topic, in any state.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn all_subscriptions(&self, topic: &Topic) -> Result<Vec<Subscription>, Refusal> {
        self.all_subscriptions_of(topic.id).await
    }

    /// As [`Self::all_subscriptions`].
    ///
    /// # Errors
    /// What the store answers.
    pub async fn all_subscriptions_of(&self, topic: TopicId) -> Result<Vec<Subscription>, Refusal> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let read = |found: &KeyValue| {
                let Some(ParsedKey::Subscription(_, name)) = keys::parse(&found.key) else {
                    return Err(Refusal::internal(format!("unexpected key {}", found.key)));
                };
                Ok((Subscription::of(topic, &name, found)?, name.to_string()))
            };
            let page = self.page(keys::subscriptions_of(topic), after.take(), 1_000, read).await?;
            after = page.items.last().map(|last| keys::subscription(topic, &last.name));
            all.extend(page.items);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
        }
    }
}

/// The subscription does not exist.
fn not_found(topic: &Topic, name: &SubscriptionName) -> Refusal {
    let message = format!("topic {} has no subscription {name}", topic.name);
    Refusal::new(Reason::SubscriptionNotFound, message)
}
