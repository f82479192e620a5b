//! O3, EC7: what waits for the store while the claim is provisional.

use tokio::time::Instant;

use super::{Action, WriterCore};

impl WriterCore {
    /// Whether the claim under which the ledger is written is confirmed. While it is provisional no ensemble change is
    /// started; one that is in flight goes on (MD3).
    pub fn on_standing(&mut self, confirmed: bool, now: Instant) {
        if confirmed != self.provisional {
            return;
        }
        self.provisional = !confirmed;
        if confirmed {
            if std::mem::take(&mut self.listing_owed) && self.poison.is_none() {
                self.actions.push(Action::List);
            }
            // Changes go on at once; whoever waits for Qa has waited for the store, not for bookies.
            self.short_since = None;
            self.look_after = now;
            self.next_wish = now;
        }
        self.evaluate(now);
        self.advance_seal(now);
    }

    /// Whether a listing waits for the claim to be confirmed.
    #[must_use]
    pub fn listing_owed(&self) -> bool {
        self.listing_owed
    }

    /// EC7's listing, now or when the store is back.
    pub(super) fn list(&mut self) {
        if self.provisional {
            self.listing_owed = true;
        } else {
            self.actions.push(Action::List);
        }
    }
}
