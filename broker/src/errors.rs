//! The one place where a refusal becomes a gRPC status: reason, canonical code, and google.rpc details.

use std::{fmt, time::Duration};

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
    pub facts: Vec<(&'static str, String)>,
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
        self.facts.push((name, value.to_string()));
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
            self.facts.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
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
    fn the_owner_travels_in_the_details() {
        let owner = OwnerHint { segment: 3, address: "h:1".into(), layout_epoch: 9 };
        let status = Status::from(Refusal::new(Reason::NotOwner, "elsewhere").owned_by(owner));
        let info = status.get_details_error_info().expect("error info");
        assert_eq!(info.metadata.get("owner_address").map(String::as_str), Some("h:1"));
        assert_eq!(info.metadata.get("owner_segment").map(String::as_str), Some("3"));
    }
}
