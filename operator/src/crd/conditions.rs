//! Conditions: `Ready`, `Reconciling`, `Stalled`, each with a reason of one enum.

use std::time::Duration;

use geminga_runtime::clock::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a condition is about.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum ConditionType {
    /// It is as the spec says, and works.
    Ready,
    /// The operator is working on it, or waits for something that should come by itself.
    Reconciling,
    /// It does not go on without somebody's help.
    Stalled,
}

/// Whether it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It does.
    True,
    /// It does not.
    False,
    /// Nobody knows now.
    Unknown,
}

/// Why a condition is as it is. The same words are the reasons of Events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Reason {
    /// Everything is as the spec says.
    AsSpecified,
    /// The object carries geminga.io/paused: nothing is done.
    Paused,
    /// The object carries geminga.io/dry-run: what would be done stands in status.plan.
    DryRun,
    /// The spec cannot be carried out; the message names the field.
    InvalidSpec,
    /// The cluster or connection that the spec names does not exist.
    ClusterNotFound,
    /// The server does not answer; it is asked again.
    ServerUnreachable,
    /// The server refused a change; the message has its reason.
    ServerRefused,
    /// The Kubernetes API refused a change; the message has its words.
    ApiRefused,
    /// The server behind the address is of another cluster than before: nothing is concluded from it.
    ClusterChanged,
    /// The tenant, namespace or topic that it belongs to is not there yet.
    ParentNotFound,
    /// It exists on the server with other parameters, which cannot be changed.
    Conflict,
    /// Something inside it keeps it from being deleted.
    NotEmpty,
    /// Objects are being created or corrected.
    Applying,
    /// Pods are starting.
    Starting,
    /// A pod cannot start, crashes, or does not go; the message names it, and why.
    PodFailing,
    /// Pods are replaced, one at a time.
    Rolling,
    /// The next pod waits until every copy is whole and every bookie is there.
    RollBlocked,
    /// Brokers keep their image until every bookie runs the new one.
    WaitingForBookies,
    /// A bookie's ledgers are being moved away.
    Draining,
    /// A drain does not go on; the message names what stands in its way.
    DrainBlocked,
    /// Volumes are growing.
    GrowingVolumes,
    /// The spec asks for smaller volumes than there are: volumes never shrink.
    VolumesNeverShrink,
    /// The object is being deleted.
    Deleting,
}

impl Reason {
    /// Whether it is told as a warning though the object is not stalled: it may pass by itself, and often does not.
    pub(crate) fn warns(self) -> bool {
        matches!(self, Self::PodFailing | Self::DrainBlocked)
    }
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub type_: ConditionType,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// The generation of the spec that this is about.
    pub observed_generation: i64,
    /// When the status of this condition last changed.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// Why, in one word.
    pub reason: Reason,
    /// Why, in a sentence.
    pub message: String,
}

impl Condition {
    /// How long its status has held.
    pub(crate) fn lasted(&self, now: Timestamp) -> Duration {
        let since = self.last_transition_time.parse::<jiff::Timestamp>();
        let since = since.map_or(now, |since| {
            Timestamp(u64::try_from(since.as_millisecond()).unwrap_or_default())
        });
        now.since(since)
    }
}

/// What a plan says about its object, before it becomes conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusReport {
    /// Whether it is as the spec says, and works.
    pub ready: ConditionStatus,
    /// Work under way, or something that is waited for.
    pub reconciling: bool,
    /// Somebody has to help.
    pub stalled: bool,
    /// The weightiest reason.
    pub reason: Reason,
    /// The case in words.
    pub message: String,
}

/// Longest message of a condition, characters.
const MESSAGE_MAX: usize = 1_000;

impl StatusReport {
    /// As specified.
    #[must_use]
    pub fn ready() -> Self {
        Self {
            ready: ConditionStatus::True,
            reconciling: false,
            stalled: false,
            reason: Reason::AsSpecified,
            message: "as specified".into(),
        }
    }

    /// Under way.
    #[must_use]
    pub fn working(ready: bool, reason: Reason, message: impl Into<String>) -> Self {
        let ready = if ready { ConditionStatus::True } else { ConditionStatus::False };
        Self { ready, reconciling: true, stalled: false, reason, message: message.into() }
    }

    /// Not to be known now; it is looked at again.
    #[must_use]
    pub fn unknown(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            ready: ConditionStatus::Unknown,
            reconciling: true,
            stalled: false,
            reason,
            message: message.into(),
        }
    }

    /// Stuck until somebody helps.
    #[must_use]
    pub fn stalled(ready: bool, reason: Reason, message: impl Into<String>) -> Self {
        let ready = if ready { ConditionStatus::True } else { ConditionStatus::False };
        Self { ready, reconciling: false, stalled: true, reason, message: message.into() }
    }

    /// Nothing is done and nothing is claimed.
    #[must_use]
    pub fn idle(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            ready: ConditionStatus::Unknown,
            reconciling: false,
            stalled: false,
            reason,
            message: message.into(),
        }
    }

    /// As conditions; a condition whose status is as in `before` keeps its time.
    #[must_use]
    pub fn conditions(
        &self,
        before: &[Condition],
        generation: i64,
        now: Timestamp,
    ) -> Vec<Condition> {
        let truth = |holds| if holds { ConditionStatus::True } else { ConditionStatus::False };
        [
            (ConditionType::Ready, self.ready),
            (ConditionType::Reconciling, truth(self.reconciling)),
            (ConditionType::Stalled, truth(self.stalled)),
        ]
        .into_iter()
        .map(|(type_, status)| {
            let same = before.iter().find(|c| c.type_ == type_ && c.status == status);
            Condition {
                type_,
                status,
                observed_generation: generation,
                last_transition_time: same
                    .map_or_else(|| rfc3339(now), |c| c.last_transition_time.clone()),
                reason: self.reason,
                message: self.message.chars().take(MESSAGE_MAX).collect(),
            }
        })
        .collect()
    }
}

/// A time as Kubernetes writes it: seconds, in UTC.
fn rfc3339(time: Timestamp) -> String {
    let seconds = i64::try_from(time.0 / 1_000).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_keeps_its_time_while_its_status_stays() {
        let first = StatusReport::working(false, Reason::Starting, "1 of 3 pods are ready")
            .conditions(&[], 1, Timestamp(1_000));
        assert_eq!(first[0].last_transition_time, "1970-01-01T00:00:01Z");
        let second = StatusReport::working(true, Reason::Rolling, "2 of 3 pods are replaced")
            .conditions(&first, 2, Timestamp(9_000));
        assert_eq!(second[0].last_transition_time, "1970-01-01T00:00:09Z", "ready changed");
        assert_eq!(second[1].last_transition_time, "1970-01-01T00:00:01Z", "still reconciling");
        assert!(second.iter().all(|c| c.observed_generation == 2 && c.reason == Reason::Rolling));
        assert_eq!(second[1].lasted(Timestamp(9_500)), Duration::from_millis(8_500));
        assert_eq!(second[1].lasted(Timestamp(0)), Duration::ZERO, "a clock that was set back");
    }

    #[test]
    fn a_long_message_is_cut() {
        let long = "x".repeat(5_000);
        let report = StatusReport::stalled(false, Reason::ServerRefused, long);
        assert_eq!(report.conditions(&[], 1, Timestamp(0))[0].message.len(), MESSAGE_MAX);
    }
}
