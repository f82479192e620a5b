//! Errors that say what the caller may do next.

use std::time::Duration;

use geminga_proto::{
    names::NameError,
    reason::{DOMAIN, Reason, Retry},
    records::Damaged,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The server, or this SDK in its place, refused the request; nothing of it happened unless the reason says so.
    #[error("{0}")]
    Refused(Box<Refused>),
    /// No server answered. Nothing is known to have happened; opening and reading may be retried.
    #[error("no connection to the server: {0}")]
    Unavailable(String),
    /// Not sent before its time was over: it did not happen and will not.
    #[error("not sent within {within:?}, nothing was stored{}", because(trouble.as_deref()))]
    NotSent {
        /// The time it had.
        within: Duration,
        /// What the server, or the connection to it, last refused.
        trouble: Option<String>,
    },
    /// Sent, but not answered in time or across a break: it may have been stored, and it may not. Sending the same again
    /// as a new message can store it twice.
    #[error("the outcome is indeterminate, it may or may not have been stored: {0}")]
    Indeterminate(String),
    /// The message is not this consumer's any more: its lease ran out, the server took it back, it was not granted after a
    /// break, or it was settled already. Nothing of this settle happened; where the message is not settled it is delivered
    /// again, to somebody.
    #[error("{0}")]
    NotHeld(String),
    /// This producer, consumer or client was closed.
    #[error("closed")]
    Closed,
    /// What the server sent cannot be decoded, or is larger than it declared.
    #[error("a delivered batch cannot be decoded: {0}")]
    Damaged(String),
}

/// A typed refusal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", reason.as_str())]
pub struct Refused {
    /// The reason, one of the documented enum.
    pub reason: Reason,
    /// The case in words.
    pub message: String,
    /// When the server suggests to come back.
    pub retry_after: Option<Duration>,
    /// `host:port` of the broker that serves the segment, where the refusal names one.
    pub owner: Option<String>,
}

/// The end of a sentence that tells what stood in the way.
pub(crate) fn because(trouble: Option<&str>) -> String {
    trouble.map_or_else(String::new, |trouble| format!(": {trouble}"))
}

impl Error {
    /// A refusal.
    #[must_use]
    pub fn refused(reason: Reason, message: impl Into<String>) -> Self {
        Self::Refused(Box::new(Refused {
            reason,
            message: printable(&message.into()),
            retry_after: None,
            owner: None,
        }))
    }

    pub(crate) fn not_held() -> Self {
        Self::NotHeld("the message is not held by this consumer any more".into())
    }

    /// The reason, for a refusal.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused(refused) => Some(refused.reason),
            Self::NotHeld(_) => Some(Reason::InvalidHandle),
            _ => None,
        }
    }

    /// What may be done with the same request.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Refused(refused) => refused.reason.retry(),
            Self::Unavailable(_) | Self::NotSent { .. } => Retry::Safe,
            Self::Indeterminate(_) => Retry::SameSequence,
            Self::Closed | Self::Damaged(_) | Self::NotHeld(_) => Retry::Never,
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(refused) => refused.retry_after,
            _ => None,
        }
    }

    pub(crate) fn owner(&self) -> Option<&str> {
        match self {
            Self::Refused(refused) => refused.owner.as_deref(),
            _ => None,
        }
    }

    /// A refusal inside a stream, whose reason travels as text.
    pub(crate) fn in_stream(reason: &str, message: String, retry_safe: bool) -> Self {
        let fallback = if retry_safe { Reason::Busy } else { Reason::InvalidRequest };
        Self::refused(Reason::parse(reason).unwrap_or(fallback), message)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
        let known = info.as_ref().and_then(|info| Reason::parse(&info.reason));
        let reason = match (known, status.code()) {
            (Some(reason), _) => reason,
            // Without details the answer comes from the transport or from something in between.
            (None, Code::OutOfRange) => Reason::MessageTooLarge,
            (None, Code::NotFound) => Reason::TopicNotFound,
            (None, Code::PermissionDenied | Code::Unauthenticated) => Reason::PermissionDenied,
            (None, Code::InvalidArgument | Code::Unimplemented | Code::FailedPrecondition) => {
                Reason::InvalidRequest
            }
            (None, Code::ResourceExhausted) => Reason::Busy,
            (None, Code::DeadlineExceeded) => Reason::DeadlineExceeded,
            (None, _) => return Self::Unavailable(printable(&transport_words(&status))),
        };
        Self::Refused(Box::new(Refused {
            reason,
            message: printable(status.message()),
            retry_after: status.get_details_retry_info().and_then(|retry| retry.retry_delay),
            owner: info
                .and_then(|info| info.metadata.get("owner_address").cloned())
                .filter(|owner| !owner.is_empty()),
        }))
    }
}

impl From<Damaged> for Error {
    fn from(Damaged(why): Damaged) -> Self {
        Self::Damaged(why)
    }
}

impl From<NameError> for Error {
    fn from(error: NameError) -> Self {
        Self::refused(Reason::InvalidName, error.to_string())
    }
}

/// What the transport says; its innermost cause, since "transport error" alone helps nobody.
fn transport_words(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => innermost(source),
        None => status.message().to_owned(),
    }
}

/// The words of the first cause.
pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    printable(&innermost.to_string())
}

/// At most 1,000 characters without control characters: server text goes to terminals and logs.
fn printable(text: &str) -> String {
    text.chars()
        .take(1_000)
        .flat_map(|c| if c.is_control() { Escaped::of(c) } else { Escaped::As(Some(c)) })
        .collect()
}

/// A character, as it is or escaped.
enum Escaped {
    As(Option<char>),
    Default(std::char::EscapeDefault),
}

impl Escaped {
    fn of(c: char) -> Self {
        Self::Default(c.escape_default())
    }
}

impl Iterator for Escaped {
    type Item = char;
    fn next(&mut self) -> Option<char> {
        match self {
            Self::As(c) => c.take(),
            Self::Default(escaped) => escaped.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    fn status(reason: &str, domain: &str) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, domain, [("owner_address".to_owned(), "host:1".to_owned())]);
        details.set_retry_info(Some(Duration::from_millis(250)));
        Status::with_error_details(Code::Unavailable, "a\u{1b}[31m message", details)
    }

    #[test]
    fn every_reason_is_read_from_the_details() {
        for reason in Reason::ALL {
            let error = Error::from(status(reason.as_str(), DOMAIN));
            assert_eq!(error.reason(), Some(*reason));
            assert_eq!(error.retry(), reason.retry());
            assert_eq!(error.retry_after(), Some(Duration::from_millis(250)));
            assert_eq!(error.owner(), Some("host:1"));
            assert!(!error.to_string().contains('\u{1b}'), "no control characters: {error}");
        }
    }

    #[test]
    fn a_status_of_a_stranger_is_no_reason_of_ours() {
        assert!(matches!(
            Error::from(status("NOT_OWNER", "elsewhere.example")),
            Error::Unavailable(_)
        ));
        assert!(matches!(Error::from(Status::unknown("h2 went away")), Error::Unavailable(_)));
    }
}
