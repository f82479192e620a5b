//! What an error of etcd's says about the request: surely not carried out, perhaps, or refused for good. Pure.
//!
//! Only etcd's own words count as a verdict. Every other error (a reset, a time-out, a proxy's opinion) leaves open what
//! happened, unless the connection was never made.

use std::error::Error as _;

use etcd_client::Error;
use tonic::{Code, ConnectError, Status};

use crate::{LeaseId, Revision, StoreError};

/// What an operator does about a full store.
pub(super) const NO_SPACE: &str = "etcd is out of space: compact its history, defragment each \
    member, raise --quota-backend-bytes if the data needs it, then disarm the NOSPACE alarm";

/// What became of a request that was not answered with a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It surely did not happen; another endpoint may do it.
    NotDone(String),
    /// It may have happened, or may still.
    Unsure(String),
    /// Nothing happened, and nothing will.
    Refused(String),
    /// Refused for lack of space, *after or before* it was carried out: see [`super::EtcdStore`].
    NoSpace,
    /// A lease is not known (any more); nothing happened.
    LeaseGone,
    /// History at the asked revision is gone.
    Compacted,
    /// The answer is larger than we take.
    TooLarge,
}

impl Fate {
    /// Whether the endpoint should not be asked next time.
    pub(super) fn blames_endpoint(&self) -> bool {
        matches!(self, Self::NotDone(_) | Self::Unsure(_))
    }

    /// As an error of a call that changes something. `lease` is the one that the call was about.
    pub(super) fn of_write(self, lease: LeaseId) -> StoreError {
        match self {
            Self::NotDone(reason) => StoreError::Unavailable(reason),
            Self::Unsure(reason) => StoreError::Unknown(reason),
            Self::Refused(reason) => StoreError::Refused(reason),
            Self::NoSpace => StoreError::Refused(NO_SPACE.to_owned()),
            Self::LeaseGone => StoreError::LeaseGone(lease),
            // not answers to a change; what became of it is open
            Self::Compacted => StoreError::Unknown("etcd spoke of compaction".to_owned()),
            Self::TooLarge => StoreError::Unknown("etcd's answer is too large".to_owned()),
        }
    }

    /// As an error of a read at this revision.
    pub(super) fn of_read(self, at: Revision) -> StoreError {
        match self {
            Self::NotDone(reason) | Self::Unsure(reason) => StoreError::Unavailable(reason),
            Self::Refused(reason) => StoreError::Refused(reason),
            Self::NoSpace => StoreError::Refused(NO_SPACE.to_owned()),
            Self::LeaseGone => StoreError::Unavailable("etcd spoke of a lease".to_owned()),
            Self::Compacted => StoreError::Compacted(at),
            Self::TooLarge => StoreError::Refused("etcd's answer is too large".to_owned()),
        }
    }
}

/// Reads an error of etcd's client.
pub(super) fn fate(error: &Error) -> Fate {
    match error {
        Error::GRpcStatus(status) => of_status(status),
        // the client's words for an answer without time to live
        Error::LeaseKeepAliveError(reason) if reason == "lease not found" => Fate::LeaseGone,
        Error::InvalidArgs(_)
        | Error::InvalidUri(_)
        | Error::Utf8Error(_)
        | Error::InvalidMetadataValue(_) => Fate::Refused(error.to_string()),
        // only ever given while the channel is set up
        Error::TransportError(_) | Error::EndpointError(_) | Error::EndpointsNotManaged => {
            Fate::NotDone(error.to_string())
        }
        _ => Fate::Unsure(error.to_string()),
    }
}

fn of_status(status: &Status) -> Fate {
    let reason = || format!("{:?}: {}", status.code(), status.message());
    if never_connected(status) {
        return Fate::NotDone(reason());
    }
    let message = status.message();
    if status.code() == Code::OutOfRange && message.contains("decoded message length too large") {
        return Fate::TooLarge;
    }
    // a server's own limit on what it takes in, checked before anything is done
    if message.starts_with("grpc: received message larger than max") {
        return Fate::Refused(reason());
    }
    let Some(word) = message.strip_prefix("etcdserver: ") else {
        return Fate::Unsure(reason());
    };
    match (status.code(), word) {
        (Code::ResourceExhausted, "mvcc: database space exceeded") => Fate::NoSpace,
        (Code::NotFound, "requested lease not found") => Fate::LeaseGone,
        (Code::OutOfRange, "mvcc: required revision has been compacted") => Fate::Compacted,
        // Looked at before the request is proposed. The auth store's revision is looked at once more when it is applied,
        // with the same outcome: not carried out.
        (Code::ResourceExhausted, "too many requests")
        | (Code::Unavailable, "no leader")
        | (Code::FailedPrecondition, "rpc not supported for learner")
        | (Code::InvalidArgument, "revision of auth store is old")
        | (Code::Unauthenticated, _) => Fate::NotDone(reason()),
        (
            Code::InvalidArgument
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::NotFound
            | Code::DataLoss,
            _,
        ) => Fate::Refused(reason()),
        // "request timed out", "leader changed", "server stopped", "unhealthy cluster", "context deadline exceeded", ...
        _ => Fate::Unsure(reason()),
    }
}

/// The connection was refused, or not made in time: no byte of the request left.
fn never_connected(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(code: Code, message: &str) -> StoreError {
        fate(&Error::GRpcStatus(Status::new(code, message))).of_write(LeaseId(7))
    }

    fn read(code: Code, message: &str) -> StoreError {
        fate(&Error::GRpcStatus(Status::new(code, message))).of_read(Revision(5))
    }

    #[test]
    fn what_may_have_been_proposed_is_unknown_to_a_write_and_unavailable_to_a_read() {
        for (code, message) in [
            (Code::Unavailable, "etcdserver: request timed out"),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
            ),
            (Code::Unavailable, "etcdserver: leader changed"),
            (Code::Unavailable, "etcdserver: server stopped"),
            (Code::DeadlineExceeded, "etcdserver: context deadline exceeded"),
            (Code::Cancelled, "etcdserver: request canceled"),
            (Code::Unknown, "raft proposal dropped"),
            (Code::Unavailable, "error reading from server: EOF"),
            (Code::Internal, "h2 protocol error: http2 error"),
            // not etcd's own words: a proxy's, or the transport's
            (Code::ResourceExhausted, "h2 protocol error: ENHANCE_YOUR_CALM"),
            (Code::PermissionDenied, "inadequate security"),
            (Code::NotFound, "no such route"),
        ] {
            assert!(matches!(write(code, message), StoreError::Unknown(_)), "{message}");
            assert!(matches!(read(code, message), StoreError::Unavailable(_)), "{message}");
        }
    }

    #[test]
    fn what_was_turned_away_before_it_was_proposed_is_unavailable() {
        for (code, message) in [
            (Code::ResourceExhausted, "etcdserver: too many requests"),
            (Code::Unavailable, "etcdserver: no leader"),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old"),
            (Code::Unauthenticated, "etcdserver: invalid auth token"),
        ] {
            assert!(matches!(write(code, message), StoreError::Unavailable(_)), "{message}");
        }
        let refused = ConnectError("connection refused".into());
        let status = Status::from_error(Box::new(refused));
        assert!(matches!(fate(&Error::GRpcStatus(status)), Fate::NotDone(_)));
    }

    #[test]
    fn a_refusal_for_good_says_what_to_do() {
        let full = write(Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");
        assert!(matches!(&full, StoreError::Refused(why) if why.contains("defragment")), "{full}");
        for (code, message) in [
            (Code::InvalidArgument, "etcdserver: request is too large"),
            (Code::ResourceExhausted, "grpc: received message larger than max (9 vs. 8)"),
            (Code::PermissionDenied, "etcdserver: permission denied"),
            (Code::DataLoss, "etcdserver: corrupt cluster"),
            (Code::OutOfRange, "etcdserver: mvcc: required revision is a future revision"),
        ] {
            assert!(matches!(write(code, message), StoreError::Refused(_)), "{message}");
        }
    }

    #[test]
    fn lost_leases_and_lost_history_have_errors_of_their_own() {
        let gone = write(Code::NotFound, "etcdserver: requested lease not found");
        assert!(matches!(gone, StoreError::LeaseGone(LeaseId(7))));
        let gone = fate(&Error::LeaseKeepAliveError("lease not found".to_owned()));
        assert_eq!(gone, Fate::LeaseGone);
        let message = "etcdserver: mvcc: required revision has been compacted";
        let compacted = read(Code::OutOfRange, message);
        assert!(matches!(compacted, StoreError::Compacted(Revision(5))));
    }
}
