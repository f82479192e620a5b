//! The cluster itself: members, placement, ledgers, policies, cold data. Any broker answers.

use geminga_proto::{admin::v1 as pb, names::TopicName, v1::Policies};
use tonic::{Request, Streaming};

use super::{Admin, PAGE_ITEMS, PAGES_MAX, answer};
use crate::error::Error;

/// A long walk over a topic's data, as it goes. It ends when the server has nothing more to tell.
#[derive(Debug)]
pub struct TierWalk(Streaming<pb::TierProgress>);

impl TierWalk {
    /// The next word of progress; none at the end. Cancel-safe.
    ///
    /// # Errors
    /// The server's refusal, or that the connection broke; the walk may be started again.
    pub async fn next(&mut self) -> Result<Option<pb::TierProgress>, Error> {
        Ok(self.0.message().await?)
    }
}

/// # Errors
/// Every call gives the server's refusal, or that there is no server.
impl Admin {
    /// The cluster in figures.
    pub async fn cluster(&self) -> Result<pb::Cluster, Error> {
        call!(self, describe_cluster, pb::DescribeClusterRequest {})
    }

    /// The registered brokers.
    pub async fn brokers(&self) -> Result<Vec<pb::Broker>, Error> {
        Ok(call!(self, list_brokers, pb::ListBrokersRequest {})?.brokers)
    }

    /// Asks a broker to give its bundles away, or takes that back; returns how many it still has.
    pub async fn drain_broker(&self, id: &str, cancel: bool) -> Result<u32, Error> {
        let request = pb::DrainBrokerRequest { id: id.to_owned(), cancel };
        Ok(call!(self, drain_broker, request)?.bundles_left)
    }

    /// Every bookie that has a cookie, with what is known of it.
    pub async fn bookies(&self) -> Result<Vec<pb::Bookie>, Error> {
        Ok(call!(self, list_bookies, pb::ListBookiesRequest {})?.bookies)
    }

    /// Asks that a bookie's ledgers are moved away for good, or takes that back.
    pub async fn drain_bookie(&self, id: &str, cancel: bool) -> Result<pb::Bookie, Error> {
        let request = pb::DrainBookieRequest { id: id.to_owned(), cancel };
        Ok(call!(self, drain_bookie, request)?.bookie.unwrap_or_default())
    }

    /// Which broker serves each segment of a topic.
    pub async fn locate_topic(&self, name: &TopicName) -> Result<Vec<pb::SegmentPlace>, Error> {
        let request = pb::LocateTopicRequest { name: name.to_string() };
        Ok(call!(self, locate_topic, request)?.segments)
    }

    /// Ledgers in the order of their ids: of one topic, or of all; `under_replicated`: only those that lack copies.
    pub async fn ledgers(
        &self,
        topic: Option<&TopicName>,
        under_replicated: bool,
    ) -> Result<Vec<pb::Ledger>, Error> {
        let topic = topic.map(ToString::to_string).unwrap_or_default();
        listing!(
            self,
            list_ledgers,
            ledgers,
            ListLedgersRequest { topic: topic.clone(), under_replicated: under_replicated }
        )
    }

    /// One ledger.
    pub async fn ledger(&self, id: u64) -> Result<pb::Ledger, Error> {
        call!(self, describe_ledger, pb::DescribeLedgerRequest { id })
    }

    /// What holds for topics of a scope: the empty text for the cluster, `tenant`, `tenant/namespace`, or
    /// `tenant/namespace/topic`.
    pub async fn policies(&self, scope: &str) -> Result<pb::PoliciesResponse, Error> {
        call!(self, get_policies, pb::GetPoliciesRequest { scope: scope.to_owned() })
    }

    /// Sets the fields that are present, and takes those named in `unset` from the level above again.
    pub async fn set_policies(
        &self,
        scope: &str,
        policies: Policies,
        unset: Vec<String>,
    ) -> Result<pb::PoliciesResponse, Error> {
        let request =
            pb::SetPoliciesRequest { scope: scope.to_owned(), policies: Some(policies), unset };
        call!(self, set_policies, request)
    }

    /// Where a topic's closed ledgers lie.
    pub async fn tier_status(&self, name: &TopicName) -> Result<Vec<pb::SegmentTier>, Error> {
        let request = pb::TierStatusRequest { topic: name.to_string() };
        Ok(call!(self, tier_status, request)?.segments)
    }

    /// Offloads every closed ledger of a topic now; with `roll` the open one is closed first.
    pub async fn offload_topic(&self, name: &TopicName, roll: bool) -> Result<TierWalk, Error> {
        let request = pb::OffloadTopicRequest { topic: name.to_string(), roll };
        Ok(TierWalk(answer(self.client().offload_topic(Request::new(request)).await)?))
    }

    /// Compacts every segment of a topic up to its present end: the latest message of each key is kept for compacted readers.
    pub async fn compact_topic(&self, name: &TopicName) -> Result<TierWalk, Error> {
        let request = pb::CompactTopicRequest { topic: name.to_string() };
        Ok(TierWalk(answer(self.client().compact_topic(Request::new(request)).await)?))
    }

    /// Reads every object of a topic and checks it.
    pub async fn verify_tier(&self, name: &TopicName) -> Result<TierWalk, Error> {
        let request = pb::VerifyTierRequest { topic: name.to_string() };
        Ok(TierWalk(answer(self.client().verify_tier(Request::new(request)).await)?))
    }
}
