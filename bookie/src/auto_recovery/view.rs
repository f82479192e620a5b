//! What the store says of bookies: cookies, registrations, losses, wishes, at one revision.

use std::collections::{BTreeMap, BTreeSet};

use geminga_bookie_client::ensemble::Available;
use geminga_metadata::{
    Cluster, Key, KeyValue, RangeRequest, Revision, SharedStore, StoreError,
    keys::{self, ParsedKey},
};
use geminga_proto::{ids::Incarnation, storage::v1 as wire};
use prost::Message;

use super::in_progress;

/// A registration.
#[derive(Clone, Debug)]
pub(crate) struct Registered {
    pub(crate) available: Available,
    pub(crate) zone: String,
}

/// A cookie.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) incarnation: Incarnation,
    pub(crate) revoked: Vec<Incarnation>,
    pub(crate) revision: Revision,
}

/// The wish that a bookie goes (DC1).
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) bookie: String,
    pub(crate) value: wire::Draining,
    pub(crate) revision: Revision,
}

/// The bookies of the cluster as the store has them.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) registered: BTreeMap<Incarnation, Registered>,
    /// By bookie id.
    pub(crate) cookies: BTreeMap<String, Known>,
    /// With the revisions of their keys.
    pub(crate) lost: BTreeMap<Incarnation, Revision>,
    /// Not done yet, oldest first.
    pub(crate) wishes: Vec<Wish>,
    /// An operator paused auto-recovery (A1).
    pub(crate) paused: bool,
    /// No restore of the store waits for its confirmation (G3).
    pub(crate) confirmed: bool,
    /// Bundles of the cluster.
    pub(crate) bundles: u32,
}

impl View {
    /// Reads all of it at one revision, linearizably (MD2).
    pub(crate) async fn read(store: &SharedStore) -> Result<Self, StoreError> {
        let head = [keys::cluster(), keys::auto_recovery_pause()];
        let (revision, found) = store.get_many(&head).await?;
        let cluster = found
            .first()
            .and_then(Option::as_ref)
            .and_then(|found| Cluster::decode(&found.value).ok());
        let mut view = Self {
            paused: found.get(1).is_some_and(Option::is_some),
            confirmed: cluster.as_ref().is_some_and(|c| c.generation == c.confirmed),
            bundles: cluster.map_or(1, |cluster| cluster.bundles),
            ..Self::default()
        };
        for prefix in [keys::availables(), keys::cookies(), keys::losts(), keys::draining_bookies()]
        {
            for item in range(store, prefix, revision).await? {
                view.take(&item);
            }
        }
        view.wishes.sort_by(|a, b| (a.value.at_ms, &a.bookie).cmp(&(b.value.at_ms, &b.bookie)));
        Ok(view)
    }

    fn take(&mut self, item: &KeyValue) {
        match keys::parse(&item.key) {
            Some(ParsedKey::Available(_)) => {
                let zone = wire::Available::decode(&item.value[..]).unwrap_or_default().zone;
                if let Some(available) = Available::from_key_value(item) {
                    self.registered.insert(available.incarnation, Registered { available, zone });
                }
            }
            Some(ParsedKey::Cookie(bookie)) => {
                if let Ok(cookie) = wire::Cookie::decode(&item.value[..]) {
                    let known = Known {
                        incarnation: Incarnation(cookie.incarnation),
                        revoked: cookie.revoked.into_iter().map(Incarnation).collect(),
                        revision: item.mod_revision,
                    };
                    self.cookies.insert(bookie, known);
                }
            }
            Some(ParsedKey::Lost(incarnation)) => {
                self.lost.insert(incarnation, item.mod_revision);
            }
            Some(ParsedKey::DrainingBookie(bookie)) => {
                if let Ok(value) = wire::Draining::decode(&item.value[..])
                    && value.proof_revision == 0
                {
                    self.wishes.push(Wish { bookie, value, revision: item.mod_revision });
                }
            }
            _ => {}
        }
    }

    /// Whether it is registered, and may be.
    pub(crate) fn is_registered(&self, incarnation: Incarnation) -> bool {
        self.registered.contains_key(&incarnation)
    }

    /// The drain under way: the oldest that neither waits nor is done, and its incarnation.
    pub(crate) fn draining(&self) -> Option<(&Wish, Incarnation)> {
        let wish = self.wishes.iter().find(|wish| in_progress(&wish.value))?;
        Some((wish, self.cookies.get(&wish.bookie)?.incarnation))
    }

    /// Whose slots are to get other holders: lost and not back, revoked, or draining (A1, D7, DC1).
    pub(crate) fn condemned(&self) -> BTreeSet<Incarnation> {
        let lost = self.lost.keys().copied().filter(|lost| !self.is_registered(*lost));
        let revoked = self.cookies.values().flat_map(|cookie| cookie.revoked.iter().copied());
        lost.chain(revoked).chain(self.draining().map(|draining| draining.1)).collect()
    }

    /// Who may take a copy, as far as this view tells; EC6 is asked of each besides.
    pub(crate) fn candidates(&self) -> Vec<Available> {
        let condemned = self.condemned();
        let free =
            self.registered.values().filter(|r| !condemned.contains(&r.available.incarnation));
        free.map(|registered| registered.available.clone()).collect()
    }
}

/// All keys of a prefix as of a revision, page by page.
pub(crate) async fn range(
    store: &SharedStore,
    prefix: Key,
    at: Revision,
) -> Result<Vec<KeyValue>, StoreError> {
    let mut all = Vec::new();
    let mut after = None;
    loop {
        let request = RangeRequest { prefix: prefix.clone(), after, limit: 0, at: Some(at) };
        let page = store.range(request).await?;
        after = page.items.last().map(|last| last.key.clone());
        all.extend(page.items);
        if !page.more || after.is_none() {
            return Ok(all);
        }
    }
}
