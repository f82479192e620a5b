//! Which of several operators works: the holder of a Lease. [`Election`] decides, purely; [`Lease`] is the object.
//!
//! A follower takes the lease when it has not changed for its whole length *on the follower's own clock*, so that clocks need
//! not agree. A holder that cannot renew it stops after two thirds of that length: before anybody else may begin.

use std::time::Duration;

use geminga_runtime::clock::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease as LeaseObject, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::Instant;

/// The lease as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty: nobody.
    pub holder: String,
    /// Changes with every write.
    pub version: String,
    /// Its length as its holder wrote it.
    pub length: Duration,
}

/// What a look at the lease leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is no such object: make it.
    Create,
    /// Write our name into it: it is free, or its holder has been silent for its length.
    Take,
    /// It is ours.
    Renew,
    /// Somebody else works.
    Wait,
}

/// The view of one candidate.
#[derive(Debug)]
pub struct Election {
    me: String,
    seen: Option<(Record, Instant)>,
}

impl Election {
    /// A candidate of this name, which no other process may have.
    #[must_use]
    pub fn new(me: String) -> Self {
        Self { me, seen: None }
    }

    /// Looks at the lease as it is now.
    pub fn look(&mut self, lease: Option<Record>, now: Instant) -> Step {
        let Some(lease) = lease else { return Step::Create };
        if lease.holder == self.me {
            return Step::Renew;
        }
        if lease.holder.is_empty() {
            return Step::Take;
        }
        let since = match &self.seen {
            Some((seen, since)) if seen.version == lease.version => *since,
            _ => now,
        };
        let silent = now.duration_since(since) >= lease.length;
        self.seen = Some((lease, since));
        if silent { Step::Take } else { Step::Wait }
    }
}

/// How long after its last renewal a holder goes on.
#[must_use]
pub fn holds_for(length: Duration) -> Duration {
    length * 2 / 3
}

/// The object in Kubernetes.
#[derive(Clone)]
pub struct Lease {
    api: Api<LeaseObject>,
    name: String,
    length: Duration,
}

impl Lease {
    /// A lease of this name and length: whole seconds, as the object has them, and at least one.
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: String, length: Duration) -> Self {
        let length = Duration::from_secs(length.as_secs().max(1));
        Self { api: Api::namespaced(client, namespace), name, length }
    }

    /// Its length.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.length
    }

    /// One attempt to have or keep it; whether it is ours now.
    ///
    /// # Errors
    /// What the Kubernetes API answered. It may be ours all the same: only the time of the last success counts.
    pub async fn attempt(
        &self,
        election: &mut Election,
        now: Timestamp,
    ) -> Result<bool, kube::Error> {
        let found = self.api.get_opt(&self.name).await?;
        let step = election.look(found.as_ref().map(record), Instant::now());
        let done = match (step, found) {
            (Step::Wait, _) => return Ok(false),
            (_, None) => {
                let object = self.object(&election.me, now, None);
                self.api.create(&PostParams::default(), &object).await
            }
            (_, Some(found)) => {
                let object = self.object(&election.me, now, Some(&found));
                self.api.replace(&self.name, &PostParams::default(), &object).await
            }
        };
        match done {
            Ok(_) => Ok(true),
            // Another candidate was faster.
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Gives it back, so that the next one need not wait.
    ///
    /// # Errors
    /// What the Kubernetes API answered; it runs out by itself then.
    pub async fn release(&self, election: &Election, now: Timestamp) -> Result<(), kube::Error> {
        let found = self.api.get_opt(&self.name).await?;
        let Some(found) = found.filter(|found| record(found).holder == election.me) else {
            return Ok(());
        };
        let object = self.object("", now, Some(&found));
        self.api.replace(&self.name, &PostParams::default(), &object).await.map(drop)
    }

    fn object(&self, holder: &str, now: Timestamp, before: Option<&LeaseObject>) -> LeaseObject {
        let now = i64::try_from(now.0).unwrap_or(i64::MAX);
        let now = jiff::Timestamp::from_millisecond(now).unwrap_or(jiff::Timestamp::MAX);
        let spec = before.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let same = spec.holder_identity.as_deref() == Some(holder);
        let changes = spec.lease_transitions.unwrap_or_default();
        LeaseObject {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: before.and_then(|lease| lease.metadata.resource_version.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: Some(
                    i32::try_from(self.length.as_secs()).unwrap_or(i32::MAX),
                ),
                acquire_time: if same { spec.acquire_time } else { Some(MicroTime(now)) },
                renew_time: Some(MicroTime(now)),
                lease_transitions: Some(if same { changes } else { changes.saturating_add(1) }),
                ..LeaseSpec::default()
            }),
        }
    }
}

fn record(lease: &LeaseObject) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(15);
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        length: Duration::from_secs(seconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(by: &str, version: &str) -> Option<Record> {
        let (holder, version) = (by.to_owned(), version.to_owned());
        Some(Record { holder, version, length: Duration::from_secs(15) })
    }

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_free_lease_is_taken_and_one_of_our_own_is_renewed() {
        let mut election = Election::new("a".into());
        let now = Instant::now();
        assert_eq!(election.look(None, now), Step::Create);
        assert_eq!(election.look(held("", "1"), now), Step::Take);
        assert_eq!(election.look(held("a", "2"), now), Step::Renew);
    }

    #[test]
    fn a_lease_that_does_not_change_for_its_length_is_taken_and_one_that_does_is_not() {
        let mut election = Election::new("a".into());
        let start = Instant::now();
        assert_eq!(election.look(held("b", "1"), start), Step::Wait);
        assert_eq!(election.look(held("b", "1"), after(start, 14)), Step::Wait);
        assert_eq!(election.look(held("b", "2"), after(start, 15)), Step::Wait, "it was renewed");
        assert_eq!(election.look(held("b", "2"), after(start, 29)), Step::Wait);
        assert_eq!(election.look(held("b", "2"), after(start, 30)), Step::Take);
    }

    #[test]
    fn a_holder_stops_before_anybody_else_may_begin() {
        for seconds in [1, 15, 60] {
            let length = Duration::from_secs(seconds);
            assert!(holds_for(length) < length);
        }
    }
}
