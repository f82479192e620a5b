//! What clients ask for, checked before anything is built from it (S4): settles, claims, settings.

use bytes::Bytes;
use geminga_proto::v1::{
    OffsetRange, RetryPolicy, Settle, SubscriptionSettings, SubscriptionStart, SubscriptionType,
    settle::Verb as Asked,
};

use crate::{
    catalog::Start,
    dispatcher::{Kind, Policy, Verb},
    errors::Refusal,
};

/// Longest reason of a rejected message, bytes.
const REASON_BYTES_MAX: usize = 256;
/// Longest lease, and longest backoff: a week. Longest delay: a hundred years.
const LEASE_MS_MAX: u64 = 7 * 24 * 3_600_000;
const DELAY_MS_MAX: u64 = 100 * 366 * 24 * 3_600_000;
/// Defaults of the settings.
const LEASE_MS: u64 = 5 * 60_000;
const BACKOFF_MS_MAX: u64 = 10 * 60_000;

/// A settle as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SettleWanted {
    pub(crate) token: u64,
    pub(crate) handle: Bytes,
    pub(crate) verb: Verb,
}

impl SettleWanted {
    /// Checks it.
    ///
    /// # Errors
    /// INVALID_REQUEST.
    pub(crate) fn parse(settle: Settle, ranges_max: usize) -> Result<Self, Refusal> {
        let token = settle.token;
        let (handle, verb) = match settle.verb {
            None => return Err(Refusal::request("settle has no verb")),
            Some(Asked::Accept(verb)) => {
                (verb.handle, Verb::Accept { runs: runs(&verb.ranges, ranges_max)? })
            }
            Some(Asked::AcceptUpTo(verb)) => {
                let end = verb.offset.checked_add(1);
                let end = end.ok_or_else(|| Refusal::request("offset is out of range"))?;
                (verb.handle, Verb::UpTo { end })
            }
            Some(Asked::Release(verb)) => {
                if verb.delay_ms.is_some_and(|delay| delay > DELAY_MS_MAX) {
                    let message = format!("delay_ms is more than {DELAY_MS_MAX}");
                    return Err(Refusal::request(message).with("delay_ms_max", DELAY_MS_MAX));
                }
                let runs = runs(&verb.ranges, ranges_max)?;
                let (delay_ms, counts) = (verb.delay_ms, verb.counts);
                (verb.handle, Verb::Release { runs, delay_ms, counts })
            }
            Some(Asked::Reject(verb)) => {
                if verb.reason.len() > REASON_BYTES_MAX {
                    let message = format!("reason is longer than {REASON_BYTES_MAX} bytes");
                    return Err(
                        Refusal::request(message).with("reason_bytes_max", REASON_BYTES_MAX)
                    );
                }
                let runs = runs(&verb.ranges, ranges_max)?;
                (verb.handle, Verb::Reject { runs, reason: verb.reason })
            }
            Some(Asked::Extend(verb)) => {
                lease(verb.lease_ms)?;
                let runs = runs(&verb.ranges, ranges_max)?;
                (verb.handle, Verb::Extend { runs, lease_ms: verb.lease_ms })
            }
        };
        Ok(Self { token, handle, verb })
    }
}

/// A lease that a client asks for; 0 is the subscription's.
///
/// # Errors
/// INVALID_REQUEST past a week.
pub(crate) fn lease(lease_ms: u64) -> Result<(), Refusal> {
    if lease_ms > LEASE_MS_MAX {
        let message = format!("lease_ms is {lease_ms}, at most {LEASE_MS_MAX} is allowed");
        return Err(Refusal::request(message).with("lease_ms_max", LEASE_MS_MAX));
    }
    Ok(())
}

/// Ranges as half-open runs in order; those that overlap or touch are one.
///
/// # Errors
/// INVALID_REQUEST for none, too many, or one that is empty or out of range.
pub(crate) fn runs(ranges: &[OffsetRange], ranges_max: usize) -> Result<Vec<(u64, u64)>, Refusal> {
    if ranges.is_empty() || ranges.len() > ranges_max {
        let message = format!("there must be 1 to {ranges_max} ranges, not {}", ranges.len());
        return Err(Refusal::request(message).with("ranges_max", ranges_max));
    }
    let mut runs = Vec::with_capacity(ranges.len());
    for range in ranges {
        if range.first > range.last || range.last == u64::MAX {
            let message =
                format!("the range {}..={} is empty or out of range", range.first, range.last);
            return Err(Refusal::request(message));
        }
        runs.push((range.first, range.last + 1));
    }
    runs.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for (start, end) in runs {
        match joined.last_mut() {
            Some((_, last)) if *last >= start => *last = (*last).max(end),
            _ => joined.push((start, end)),
        }
    }
    Ok(joined)
}

/// Where a new subscription begins.
///
/// # Errors
/// INVALID_REQUEST.
pub(crate) fn start_of(start: i32) -> Result<Start, Refusal> {
    match SubscriptionStart::try_from(start) {
        Ok(SubscriptionStart::Earliest) => Ok(Start::Earliest),
        Ok(SubscriptionStart::Latest | SubscriptionStart::Unspecified) => Ok(Start::Latest),
        Err(_) => Err(Refusal::request(format!("start {start} is unknown"))),
    }
}

/// Settings with their defaults filled in, as they are stored and shown.
///
/// # Errors
/// INVALID_REQUEST; INVALID_NAME of the dead-letter topic.
pub(crate) fn settings(asked: &SubscriptionSettings) -> Result<SubscriptionSettings, Refusal> {
    let kind = match SubscriptionType::try_from(asked.r#type) {
        Ok(SubscriptionType::Unspecified) => SubscriptionType::Exclusive,
        Ok(kind) => kind,
        Err(_) => {
            return Err(Refusal::request(format!("subscription type {} is unknown", asked.r#type)));
        }
    };
    lease(asked.lease_ms)?;
    let retry = asked.retry.clone().unwrap_or_default();
    for (name, value) in
        [("backoff_ms", retry.backoff_ms), ("backoff_ms_max", retry.backoff_ms_max)]
    {
        if value > LEASE_MS_MAX {
            let message = format!("{name} is {value}, at most {LEASE_MS_MAX} is allowed");
            return Err(Refusal::request(message).with("backoff_ms_max", LEASE_MS_MAX));
        }
    }
    if retry.backoff_ms_max > 0 && retry.backoff_ms > retry.backoff_ms_max {
        return Err(Refusal::request("backoff_ms is more than backoff_ms_max"));
    }
    if !retry.dead_letter_topic.is_empty() {
        geminga_proto::names::TopicName::parse(&retry.dead_letter_topic)?;
    }
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    Ok(SubscriptionSettings {
        r#type: kind.into(),
        retry: Some(RetryPolicy {
            backoff_ms_max: or(retry.backoff_ms_max, BACKOFF_MS_MAX.max(retry.backoff_ms)),
            ..retry
        }),
        lease_ms: or(asked.lease_ms, LEASE_MS),
    })
}

/// The policy that stored settings make.
pub(crate) fn policy(settings: &SubscriptionSettings) -> Policy {
    let kind = match SubscriptionType::try_from(settings.r#type) {
        Ok(SubscriptionType::Failover) => Kind::Failover,
        Ok(SubscriptionType::Shared) => Kind::Shared,
        Ok(SubscriptionType::KeyShared) => Kind::KeyShared,
        _ => Kind::Exclusive,
    };
    let retry = settings.retry.clone().unwrap_or_default();
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    Policy {
        kind,
        attempts_max: retry.attempts_max,
        backoff_ms: retry.backoff_ms,
        backoff_ms_max: or(retry.backoff_ms_max, BACKOFF_MS_MAX),
        lease_ms: or(settings.lease_ms, LEASE_MS),
    }
}
