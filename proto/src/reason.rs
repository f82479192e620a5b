//! Why a call was refused: one enum for servers, SDKs, docs and `geminga explain`.
//!
//! It travels as `google.rpc.ErrorInfo{reason, domain = "geminga.io"}` beside the canonical gRPC code.

use tonic::Code;

/// The domain of every `ErrorInfo`.
pub const DOMAIN: &str = "geminga.io";

macro_rules! reasons {
    ($($variant:ident, $text:literal, $code:ident, $retry:ident, $meaning:literal, $advice:literal;)*) => {
        /// Every reason a call can be refused for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $(#[doc = $meaning] $variant,)*
        }

        impl Reason {
            /// All of them, in the order of the documentation page.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The text on the wire, `UPPER_SNAKE`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The canonical gRPC code it comes with.
            #[must_use]
            pub fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)* }
            }

            /// Whether, and how, the same request may be sent again.
            #[must_use]
            pub fn retry(self) -> Retry {
                match self { $(Self::$variant => Retry::$retry,)* }
            }

            /// What it means, one sentence.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning,)* }
            }

            /// What the caller can do next, one sentence.
            #[must_use]
            pub fn advice(self) -> &'static str {
                match self { $(Self::$variant => $advice,)* }
            }
        }
    };
}

/// What may be done with the refused request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Nothing happened; the same request may be sent again, after a pause.
    Safe,
    /// Nothing happened, and the same request will be refused again.
    Never,
    /// It may have happened; a retry is safe only under the same producer name and sequences.
    SameSequence,
}

reasons! {
    InvalidName, "INVALID_NAME", InvalidArgument, Never,
        "A tenant, namespace, topic, subscription, producer or consumer name is not allowed.",
        "Use 1 to 200 characters of A-Z a-z 0-9 . _ ~ - in each part.";
    InvalidRequest, "INVALID_REQUEST", InvalidArgument, Never,
        "A field of the request is missing, out of range, or contradicts another.",
        "Correct the field that the message names.";
    UnexpectedFrame, "UNEXPECTED_FRAME", FailedPrecondition, Never,
        "A stream frame came out of turn, for instance a batch before the open frame was answered.",
        "Open the stream first; use an SDK that follows the protocol.";
    TenantNotFound, "TENANT_NOT_FOUND", NotFound, Never,
        "The tenant does not exist.",
        "Create it: geminga tenant create NAME.";
    NamespaceNotFound, "NAMESPACE_NOT_FOUND", NotFound, Never,
        "The namespace does not exist.",
        "Create it: geminga namespace create TENANT/NAMESPACE.";
    TopicNotFound, "TOPIC_NOT_FOUND", NotFound, Never,
        "The topic does not exist, and its namespace does not create topics on first use.",
        "Create it: geminga topic create TENANT/NAMESPACE/TOPIC.";
    SubscriptionNotFound, "SUBSCRIPTION_NOT_FOUND", NotFound, Never,
        "The subscription does not exist.",
        "Create it: geminga sub create TOPIC NAME.";
    SegmentNotFound, "SEGMENT_NOT_FOUND", NotFound, Never,
        "The topic has no segment of this number.",
        "Read the layout again: it may have changed.";
    AlreadyExists, "ALREADY_EXISTS", AlreadyExists, Never,
        "Something of this name exists with other parameters.",
        "Describe it and compare, or choose another name.";
    NotEmpty, "NOT_EMPTY", FailedPrecondition, Never,
        "It still contains something and is not deleted.",
        "Delete what is inside first.";
    LayoutChanged, "LAYOUT_CHANGED", FailedPrecondition, Safe,
        "The topic's layout is newer than the one the request was routed by.",
        "Read the layout again and reopen.";
    NotOwner, "NOT_OWNER", Unavailable, Safe,
        "This broker does not own the segment; the details carry the owner where it is known.",
        "Reconnect to the owner in the details.";
    SegmentLoading, "SEGMENT_LOADING", Unavailable, Safe,
        "The segment is being recovered and will be served soon.",
        "Retry after the given delay.";
    SegmentFenced, "SEGMENT_FENCED", Unavailable, SameSequence,
        "Another owner took the segment, or its ledger could not be closed; what was in flight is of unknown outcome.",
        "Reconnect and resume with the same producer; the server answers what was stored.";
    NotEnoughBookies, "NOT_ENOUGH_BOOKIES", Unavailable, Safe,
        "Fewer bookies are writable than a new ledger needs.",
        "Bring bookies back or free disk space; the request can be retried.";
    MetadataUnavailable, "METADATA_UNAVAILABLE", Unavailable, Safe,
        "The metadata store does not answer; changes wait, traffic on open ledgers goes on.",
        "Retry after the given delay.";
    OutOfSequence, "OUT_OF_SEQUENCE", FailedPrecondition, Safe,
        "The batch does not follow the last one accepted of this producer.",
        "Send again from the sequence after the one given, in order.";
    SequenceConflict, "SEQUENCE_CONFLICT", InvalidArgument, Never,
        "The batch overlaps stored or pending sequences with other bounds.",
        "Never re-cut a batch: repeat it as it was first sent.";
    ProducerFenced, "PRODUCER_FENCED", FailedPrecondition, Never,
        "A newer stream of the same producer was opened.",
        "Close this producer; give each its own name.";
    ProducerExists, "PRODUCER_EXISTS", FailedPrecondition, Safe,
        "Another producer has the segment for itself, or is there while this one wants it for itself.",
        "Wait until it has closed, or open with the access mode exclusive-with-fencing.";
    UnexpectedOffset, "UNEXPECTED_OFFSET", FailedPrecondition, Never,
        "The batch would not get the offset it was to be stored at; the details carry the one it would get.",
        "Read what was stored meanwhile, and decide again.";
    ProducerExpired, "PRODUCER_EXPIRED", FailedPrecondition, Never,
        "The session producer to resume is no longer remembered; what was in flight is of unknown outcome.",
        "Open a new producer, and check the last messages before sending them again.";
    TooManyProducers, "TOO_MANY_PRODUCERS", ResourceExhausted, Safe,
        "The segment has as many producers as it may, or remembers as many.",
        "Close unused producers, wait until idle sessions expire, or change the policy: geminga policy set.";
    MessageTooLarge, "MESSAGE_TOO_LARGE", InvalidArgument, Never,
        "A message or batch is larger than the limit in the details.",
        "Send smaller messages, or put the payload elsewhere and send a reference.";
    CreditExceeded, "CREDIT_EXCEEDED", ResourceExhausted, Never,
        "More was sent than the granted totals allow.",
        "Wait for credit; use an SDK that follows the protocol.";
    Busy, "BUSY", ResourceExhausted, Safe,
        "A byte or request budget of the server is used up.",
        "Retry after the given delay.";
    BacklogQuota, "BACKLOG_QUOTA", ResourceExhausted, Safe,
        "More waits for the slowest subscription of the segment than its quota allows; nothing of the batch was stored.",
        "Let the subscription catch up, delete it, or change the policy: geminga sub explain, geminga policy set.";
    RateLimited, "RATE_LIMITED", ResourceExhausted, Safe,
        "The topic's publish rate is used up; nothing of the batch was stored.",
        "Retry after the given delay, publish on a stream (it is slowed instead), or change the policy: geminga policy set.";
    TooManyTopics, "TOO_MANY_TOPICS", ResourceExhausted, Safe,
        "The namespace has as many topics as it may.",
        "Delete unused topics, or change the policy: geminga policy set.";
    TooManySubscriptions, "TOO_MANY_SUBSCRIPTIONS", ResourceExhausted, Safe,
        "The topic has as many subscriptions as it may.",
        "Delete unused subscriptions, or change the policy: geminga policy set.";
    TooManyStreams, "TOO_MANY_STREAMS", ResourceExhausted, Safe,
        "The connection or the server has as many streams as it may.",
        "Close unused streams.";
    ConsumerExists, "CONSUMER_EXISTS", FailedPrecondition, Safe,
        "An exclusive subscription is already being consumed.",
        "Stop the other consumer, or use another subscription.";
    ConsumerReplaced, "CONSUMER_REPLACED", FailedPrecondition, Never,
        "Another consumer of the same name attached; it goes on in this one's place.",
        "Give each consumer its own name, or stop this one.";
    TooManyConsumers, "TOO_MANY_CONSUMERS", ResourceExhausted, Safe,
        "The subscription has as many consumers on the segment as it may.",
        "Stop some of them, use more segments, or change the policy: geminga policy set.";
    InvalidHandle, "INVALID_HANDLE", FailedPrecondition, Never,
        "The handle was never given, or its messages are no longer held under it: settled, released, or delivered again.",
        "Consume again: a message that is not settled is delivered with a new handle.";
    CursorLimit, "CURSOR_LIMIT", ResourceExhausted, Safe,
        "The subscription has as many holes in its acknowledgements as it may.",
        "Settle the oldest unsettled messages.";
    NoColdStorage, "NO_COLD_STORAGE", FailedPrecondition, Never,
        "The segment's broker has no cold storage to offload to or to read from.",
        "Start every broker of the cluster with the same tier.url.";
    ReadDamaged, "READ_DAMAGED", DataLoss, Safe,
        "No readable copy of a stored entry was found; its ledger and entry are in the message.",
        "Bring the bookies that hold it back; the server goes on trying.";
    PermissionDenied, "PERMISSION_DENIED", PermissionDenied, Never,
        "The principal may not do this.",
        "Ask for the permission that the message names.";
    StreamSilent, "STREAM_SILENT", Unavailable, Safe,
        "Nothing came on the stream for three of the heartbeat intervals that its open frame promised.",
        "Open it again: a producer sends again what it has no receipt for, a consumer presents its claims.";
    ShuttingDown, "SHUTTING_DOWN", Unavailable, SameSequence,
        "The server is stopping; what was in flight is of unknown outcome.",
        "Reconnect, to another server where there is one.";
    DeadlineExceeded, "DEADLINE_EXCEEDED", DeadlineExceeded, SameSequence,
        "The request was not finished in time and may still take effect.",
        "Retry under the same producer name and sequences.";
    Internal, "INTERNAL", Internal, SameSequence,
        "The server met a defect in itself.",
        "Report it with the server's log.";
}

impl Reason {
    /// The reason with this wire text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == text)
    }
}

/// The documentation page of all reasons, made from this enum.
#[must_use]
pub fn markdown() -> String {
    let mut page = String::from(
        "# Error reasons\n\n\
         Every refused call carries a canonical gRPC code and `google.rpc.ErrorInfo{reason, domain = \"geminga.io\"}`.\n\
         `geminga explain REASON` prints one of them. This page is made from the code; a test keeps it equal.\n\n\
         | reason | gRPC code | retry | what it means | what to do |\n|---|---|---|---|---|\n",
    );
    for reason in Reason::ALL {
        let retry = match reason.retry() {
            Retry::Safe => "safe: nothing happened",
            Retry::Never => "will be refused again",
            Retry::SameSequence => "only under the same producer name and sequences",
        };
        page += &format!(
            "| `{}` | {:?} | {retry} | {} | {} |\n",
            reason.as_str(),
            reason.code(),
            reason.meaning(),
            reason.advice()
        );
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_page_is_made_from_this_enum() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reasons.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, markdown()).expect("the page can be written");
        }
        let page = std::fs::read_to_string(path).expect("docs/reasons.md exists");
        assert!(page == markdown(), "run: UPDATE_DOCS=1 cargo test -p geminga-proto");
    }

    #[test]
    fn every_reason_parses_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
            assert!(reason.advice().ends_with('.') && reason.meaning().ends_with('.'));
        }
    }
}
