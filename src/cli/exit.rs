//! How a command ends: an exit code that scripts can use, the error, and the next command to try.

use std::{io, process::ExitCode};

use geminga_client::{Error, Reason};

/// Exit codes. They are part of the contract: scripts act on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// It did not work, and no other code says why.
    Failed = 1,
    /// The command or a name in it is wrong.
    Usage = 2,
    /// Something named does not exist.
    NotFound = 3,
    /// The server refused: a conflict or a limit.
    Refused = 4,
    /// No server, or not now: the same command may work later.
    Unavailable = 5,
    /// The data was not what it must be: lost, repeated, changed or reordered.
    ProofFailed = 6,
    /// The state that was asked for is not reached: look again later, or help.
    NotReady = 7,
}

/// A command that did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) message: String,
    /// The next command to try.
    pub(crate) next: String,
    /// Nobody reads our output any more: end without a word.
    quiet: bool,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>, next: impl Into<String>) -> Self {
        Self { code, message: message.into(), next: next.into(), quiet: false }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message, "geminga --help")
    }

    pub(crate) fn usage(message: impl Into<String>, command: &str) -> Self {
        Self::new(Code::Usage, message, format!("geminga {command} --help"))
    }

    /// Prints it and gives the code to exit with.
    pub(crate) fn report(&self) -> ExitCode {
        if self.quiet {
            return ExitCode::SUCCESS;
        }
        use io::Write;
        // A closed standard error is no reason to panic.
        let _ = writeln!(
            io::stderr(),
            "error: {}\n  next: {}",
            printable(&self.message),
            printable(&self.next)
        );
        ExitCode::from(self.code as u8)
    }
}

/// Control characters that a stranger sent do not reach the terminal.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\n' {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let quiet = error.kind() == io::ErrorKind::BrokenPipe;
        Self { quiet, ..Self::failed(error.to_string()) }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match &error {
            Error::Refused(refused) => {
                let reason = refused.reason;
                let message = format!("{error}\n  {}", reason.advice());
                Self::new(code_of(reason), message, next_of(reason))
            }
            Error::Unavailable(_) => {
                Self::new(Code::Unavailable, error.to_string(), "geminga standalone")
            }
            Error::NotSent { .. } => {
                Self::new(Code::Unavailable, error.to_string(), "geminga topic ls")
            }
            Error::NotHeld(_) => {
                Self::new(Code::Refused, error.to_string(), "geminga explain INVALID_HANDLE")
            }
            Error::Indeterminate(_) => {
                Self::new(Code::Failed, error.to_string(), "geminga explain SEGMENT_FENCED")
            }
            Error::Closed | Error::Damaged(_) => {
                Self::new(Code::Failed, error.to_string(), "geminga explain READ_DAMAGED")
            }
        }
    }
}

impl From<geminga_proto::names::NameError> for Failure {
    fn from(error: geminga_proto::names::NameError) -> Self {
        Error::from(error).into()
    }
}

/// The exit code of each reason.
pub(crate) fn code_of(reason: Reason) -> Code {
    match reason {
        Reason::InvalidName => Code::Usage,
        Reason::TenantNotFound
        | Reason::NamespaceNotFound
        | Reason::TopicNotFound
        | Reason::SubscriptionNotFound
        | Reason::SegmentNotFound => Code::NotFound,
        Reason::NotOwner
        | Reason::SegmentLoading
        | Reason::SegmentFenced
        | Reason::NotEnoughBookies
        | Reason::MetadataUnavailable
        | Reason::Busy
        | Reason::ShuttingDown
        | Reason::DeadlineExceeded
        | Reason::LayoutChanged => Code::Unavailable,
        Reason::Internal | Reason::ReadDamaged => Code::Failed,
        _ => Code::Refused,
    }
}

fn next_of(reason: Reason) -> String {
    match reason {
        Reason::TenantNotFound => "geminga tenant ls".into(),
        Reason::NamespaceNotFound => "geminga namespace ls".into(),
        Reason::TopicNotFound | Reason::SegmentNotFound => "geminga topic ls".into(),
        Reason::SubscriptionNotFound => "geminga sub ls TOPIC".into(),
        other => format!("geminga explain {}", other.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_reason() {
        for (reason, code) in [
            (Reason::InvalidName, Code::Usage),
            (Reason::TopicNotFound, Code::NotFound),
            (Reason::AlreadyExists, Code::Refused),
            (Reason::MessageTooLarge, Code::Refused),
            (Reason::SegmentLoading, Code::Unavailable),
            (Reason::Internal, Code::Failed),
        ] {
            assert_eq!(code_of(reason), code, "{reason:?}");
        }
    }

    #[test]
    fn every_reason_leads_to_a_next_command() {
        for reason in Reason::ALL {
            assert!(next_of(*reason).starts_with("geminga "), "{reason:?}");
        }
    }

    #[test]
    fn control_characters_are_shown_not_sent() {
        assert_eq!(printable("a\u{1b}[31m\nb\0"), "a\\u{1b}[31m\nb\\u{0}");
    }
}
