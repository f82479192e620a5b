//! The one place where a refusal becomes a gRPC status: reason, canonical code, and google.rpc details.

use std::{borrow::Cow, fmt, time::Duration};

use geminga_metadata::StoreError;
use geminga_proto::{
    names::NameError,
    reason::{DOMAIN, Reason, Retry},
    v1::{BatchRefused, OwnerHint, SettleRefused},
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Default pause before a retry of what is refused only for now.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Why a call was refused, and what the caller can do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The reason on the wire.
    pub reason: Reason,
    /// One sentence with the names and numbers of this case.
    pub message: String,
    /// Facts for programs, sent as `ErrorInfo.metadata`.
    pub facts: Vec<(Cow<'static, str>, String)>,
    /// Where the segment is served instead.
    pub owner: Option<OwnerHint>,
    /// When to come back; a default for reasons that may be retried.
    pub retry_after: Option<Duration>,
}

impl Refusal {
    /// A refusal with a message.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), facts: Vec::new(), owner: None, retry_after: None }
    }

    /// A field of a request is wrong.
    #[must_use]
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidRequest, message)
    }

    /// A defect of the server: `what` says which assumption did not hold.
    #[must_use]
    pub fn internal(what: impl fmt::Display) -> Self {
        tracing::error!(%what, "a request met a defect of the server");
        Self::new(Reason::Internal, format!("the server met a defect in itself: {what}"))
    }

    /// Adds a fact for programs.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.facts.push((Cow::Borrowed(name), value.to_string()));
        self
    }

    /// Says when to come back.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Says who serves the segment.
    #[must_use]
    pub fn owned_by(mut self, owner: OwnerHint) -> Self {
        self.owner = Some(owner);
        self
    }

    /// Whether the same request may simply be sent again.
    #[must_use]
    pub fn retry_safe(&self) -> bool {
        self.reason.retry() == Retry::Safe
    }

    /// As an answer inside a publish stream; `pushed` is the highest sequence accepted so far.
    #[must_use]
    pub fn batch_refused(self, hi_sequence: u64, pushed: u64) -> BatchRefused {
        BatchRefused {
            hi_sequence,
            reason: self.reason.as_str().to_owned(),
            retry_safe: self.retry_safe(),
            message: self.message,
            pushed_sequence: pushed,
        }
    }

    /// As an answer inside a consume stream.
    #[must_use]
    pub fn settle_refused(self, token: u64) -> SettleRefused {
        SettleRefused {
            token,
            reason: self.reason.as_str().to_owned(),
            retry_safe: self.retry_safe(),
            message: self.message,
        }
    }

    fn details(&self) -> ErrorDetails {
        let mut details = ErrorDetails::new();
        let mut metadata: Vec<(String, String)> =
            self.facts.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        if let Some(owner) = &self.owner {
            metadata.push(("owner_segment".into(), owner.segment.to_string()));
            metadata.push(("owner_address".into(), owner.address.clone()));
            metadata.push(("layout_epoch".into(), owner.layout_epoch.to_string()));
        }
        details.set_error_info(
            self.reason.as_str(),
            DOMAIN,
            metadata.into_iter().collect::<Metadata>(),
        );
        if self.reason.retry() == Retry::Safe || self.retry_after.is_some() {
            details.set_retry_info(Some(self.retry_after.unwrap_or(RETRY_DELAY)));
        }
        if self.reason.code() == Code::ResourceExhausted {
            details.add_quota_failure_violation(self.reason.as_str(), self.message.clone());
        }
        details
    }
}

#[expect(
    clippy::disallowed_types,
    reason = "the details' builder takes one; it is encoded and read as a map"
)]
type Metadata = std::collections::HashMap<String, String>;

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str(), self.message)
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let details = refusal.details();
        Status::with_error_details(refusal.reason.code(), refusal.message, details)
    }
}

impl From<NameError> for Refusal {
    fn from(error: NameError) -> Self {
        Self::new(Reason::InvalidName, error.to_string())
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Refused(_) => Self::internal(error),
            StoreError::Unavailable(_)
            | StoreError::Unknown(_)
            | StoreError::LeaseGone(_)
            | StoreError::Compacted(_) => Self::new(Reason::MetadataUnavailable, error.to_string()),
        }
    }
}

/// What the transport itself refuses while it reads what a client sends, in our words.
#[must_use]
pub fn unreadable(status: &Status) -> Refusal {
    if status.code() == Code::OutOfRange && status.message().contains("message length too large") {
        let message = "the frame is larger than this call allows";
        let refusal = Refusal::new(Reason::MessageTooLarge, message);
        return match limit_in(status.message()) {
            Some(limit) => refusal.with("frame_bytes_max", limit),
            None => refusal,
        };
    }
    Refusal::request(format!("what was sent cannot be read: {}", status.message()))
}

/// A refusal that another broker gave, as its own words; none when it is the transport's.
#[must_use]
pub fn of_peer(status: &Status) -> Option<Refusal> {
    let info = status.get_details_error_info()?;
    let mut refusal = Refusal::new(Reason::parse(&info.reason)?, status.message());
    let fact = |name: &str| info.metadata.get(name);
    if let (Some(segment), Some(address)) = (fact("owner_segment"), fact("owner_address"))
        && let Ok(segment) = segment.parse()
    {
        let layout_epoch = fact("layout_epoch").and_then(|epoch| epoch.parse().ok());
        let (address, layout_epoch) = (address.clone(), layout_epoch.unwrap_or(0));
        refusal.owner = Some(OwnerHint { segment, address, layout_epoch });
    }
    let of_owner = ["owner_segment", "owner_address", "layout_epoch"];
    let facts: std::collections::BTreeMap<_, _> = info.metadata.into_iter().collect();
    let kept = |name: &str| refusal.owner.is_none() || !of_owner.contains(&name);
    refusal.facts = facts
        .into_iter()
        .filter(|(name, _)| kept(name))
        .map(|(name, value)| (Cow::Owned(name), value))
        .collect();
    refusal.retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay);
    Some(refusal)
}

/// The transport names its limit as the last number of its message.
fn limit_in(message: &str) -> Option<u64> {
    message.rsplit(|c: char| !c.is_ascii_digit()).find_map(|word| word.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_travels_with_its_code_and_details() {
        for reason in Reason::ALL {
            let status = Status::from(Refusal::new(*reason, "because").with("limit", 7));
            assert_eq!(status.code(), reason.code());
            let info = status.get_details_error_info().expect("error info is always there");
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason.as_str(), DOMAIN));
            assert_eq!(info.metadata.get("limit").map(String::as_str), Some("7"));
            assert_eq!(status.get_details_retry_info().is_some(), reason.retry() == Retry::Safe);
            let exhausted = reason.code() == Code::ResourceExhausted;
            assert_eq!(status.get_details_quota_failure().is_some(), exhausted);
        }
    }

    #[test]
    fn a_refusal_that_is_passed_on_says_what_it_said() {
        let owner = OwnerHint { segment: 3, address: "h:1".into(), layout_epoch: 9 };
        let refusals = [
            Refusal::new(Reason::NotOwner, "elsewhere").owned_by(owner),
            Refusal::new(Reason::LayoutChanged, "newer").with("layout_epoch", 4),
            Refusal::new(Reason::Busy, "later").after(Duration::from_secs(3)),
        ];
        for refusal in refusals {
            let passed = of_peer(&Status::from(refusal.clone())).expect("typed");
            let delay = refusal.retry_after.unwrap_or(RETRY_DELAY);
            assert_eq!(passed, refusal.after(delay));
        }
        assert_eq!(of_peer(&Status::unavailable("transport")), None);
    }

    #[test]
    fn the_owner_travels_in_the_details() {
        let owner = OwnerHint { segment: 3, address: "h:1".into(), layout_epoch: 9 };
        let status = Status::from(Refusal::new(Reason::NotOwner, "elsewhere").owned_by(owner));
        let info = status.get_details_error_info().expect("error info");
        assert_eq!(info.metadata.get("owner_address").map(String::as_str), Some("h:1"));
        assert_eq!(info.metadata.get("owner_segment").map(String::as_str), Some("3"));
    }
}
