//! Failover: which consumer is the active one, and how it changes.

use super::{super::active_on, Action, Batch, Core, Kind, consumers::Link};

impl<B: Batch> Core<B> {
    /// Failover: who is to be active is a pure function of who is there. The former one is given nothing more, and the next
    /// is told only when it holds nothing, or the grace has passed.
    pub(super) fn settle_active(&mut self) {
        if self.policy.kind != Kind::Failover {
            return;
        }
        let wanted = match self.wanted {
            Some(wanted) => wanted,
            None => self.find_wanted(),
        };
        self.wanted = Some(wanted);
        let Some(wanted) = wanted else {
            return; // nobody else: the one that is gone may come back
        };
        if self.active == Some(wanted) {
            self.drain_until = None;
            return;
        }
        if let Some(former) = self.active
            && let Some(known) = self.consumers.get(&former)
        {
            let ends = match known.link {
                Link::Gone { since } => since.saturating_add(self.limits.grace_ms),
                _ => *self
                    .drain_until
                    .get_or_insert(self.now_ms.saturating_add(self.limits.grace_ms)),
            };
            if known.held > 0 && self.now_ms < ends {
                return;
            }
            let (gone, here) = (!known.is_here(), known.is_here());
            if gone {
                self.let_go(former, true);
            } else if here {
                self.revoke_all(former);
                self.assign_epoch += 1;
                let epoch = self.assign_epoch;
                self.out.push_back(Action::Assign { consumer: former, active: false, epoch });
            }
        } else {
            self.assign_epoch += 1;
        }
        self.drain_until = None;
        self.active = Some(wanted);
        self.say_active(wanted);
    }

    fn find_wanted(&self) -> Option<u64> {
        let names: Vec<&str> =
            self.consumers.values().filter(|c| c.is_here()).map(|c| c.name.as_str()).collect();
        active_on(&names, self.owner.segment, self.owner.segments)
            .and_then(|name| self.consumers.iter().find(|(_, c)| c.name == name))
            .map(|(id, _)| *id)
    }

    /// Until it is told otherwise.
    pub(super) fn say_standby(&mut self, consumer: u64) {
        if self.policy.kind == Kind::Failover {
            let epoch = self.assign_epoch;
            self.out.push_back(Action::Assign { consumer, active: false, epoch });
        }
    }

    pub(super) fn say_active(&mut self, consumer: u64) {
        if self.policy.kind == Kind::Failover {
            self.assign_epoch += 1;
            let epoch = self.assign_epoch;
            self.out.push_back(Action::Assign { consumer, active: true, epoch });
        }
    }
}
