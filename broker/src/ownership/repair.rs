//! A3's "the owner is asked": a ledger that is listed as short of copies and still Open is never touched by the replicator.
//! Its owner rolls it once enough bookies are writable; the closed one is copied then.

use std::time::Duration;

use geminga_metadata::{
    KeyValue, RangeRequest, StoreError, TXN_OPS_MAX,
    keys::{self, ParsedKey},
};
use geminga_proto::{
    ids::{LedgerId, SegmentId, TopicId},
    storage::v1 as wire,
};
use prost::Message;
use tokio::time::{sleep, timeout};

use super::Ownership;

/// How often the listings are looked at.
const INTERVAL: Duration = Duration::from_secs(10);

/// An open ledger that lacks copies, and the segment it belongs to.
struct Short {
    ledger: LedgerId,
    segment: SegmentId,
    ensemble: u32,
}

impl Ownership {
    pub(super) async fn roll_what_lacks_copies(self) {
        loop {
            sleep(INTERVAL).await;
            if !self.inner.parts.standing.confirmed() {
                continue;
            }
            if let Err(error) = self.roll_listed().await {
                tracing::debug!(%error, "ledgers that lack copies are looked at later");
            }
        }
    }

    async fn roll_listed(&self) -> Result<(), StoreError> {
        let store = &self.inner.parts.store;
        let mut after = None;
        loop {
            let request = RangeRequest {
                prefix: keys::under_replicateds(),
                after,
                limit: TXN_OPS_MAX,
                at: None,
            };
            let page = store.range(request).await?;
            let listed: Vec<_> = page
                .items
                .iter()
                .filter_map(|found| match keys::parse(&found.key) {
                    Some(ParsedKey::UnderReplicated(ledger)) => Some(keys::ledger(ledger)),
                    _ => None,
                })
                .collect();
            if !listed.is_empty() {
                let (_, found) = store.get_many(&listed).await?;
                let short: Vec<Short> =
                    found.iter().flatten().filter_map(short).filter(|s| self.is_ours(s)).collect();
                if !short.is_empty() {
                    self.roll(&short, self.writable_bookies().await?).await;
                }
            }
            match page.items.last() {
                Some(last) if page.more => after = Some(last.key.clone()),
                _ => return Ok(()),
            }
        }
    }

    fn is_ours(&self, short: &Short) -> bool {
        let bundle = short.segment.bundle(self.inner.parts.catalog.bundles());
        self.inner.claims.is_held(bundle)
    }

    async fn writable_bookies(&self) -> Result<u32, StoreError> {
        let prefix = keys::availables();
        let request = RangeRequest { prefix, after: None, limit: 0, at: None };
        let page = self.inner.parts.store.range(request).await?;
        let writable = page.items.iter().filter(|found| {
            wire::Available::decode(&found.value[..])
                .is_ok_and(|bookie| bookie.writable && !bookie.draining)
        });
        Ok(u32::try_from(writable.count()).unwrap_or(u32::MAX))
    }

    /// With fewer bookies than places the next ledger would be as short as this one.
    async fn roll(&self, short: &[Short], writable: u32) {
        for Short { ledger, segment, .. } in short.iter().filter(|s| writable >= s.ensemble) {
            // Loading it closes what an earlier owner left open; then there is nothing to roll.
            let patience = self.inner.parts.config.limits.load_deadline;
            match timeout(patience, self.segment(*segment)).await {
                Ok(Ok(loaded)) => loaded.ledger().roll(*ledger),
                Ok(Err(refusal)) => {
                    tracing::debug!(topic = %segment.topic, segment = segment.segment, %refusal, "segment not rolled yet");
                }
                Err(_) => {}
            }
        }
    }
}

fn short(found: &KeyValue) -> Option<Short> {
    let ledger = wire::LedgerMetadata::decode(&found.value[..]).ok()?;
    let open = matches!(ledger.state, Some(wire::ledger_metadata::State::Open(_)));
    let owner = ledger.owner.filter(|_| open)?;
    let segment = SegmentId { topic: TopicId(owner.topic), segment: owner.segment };
    Some(Short { ledger: LedgerId(ledger.id), segment, ensemble: ledger.ensemble_size })
}
