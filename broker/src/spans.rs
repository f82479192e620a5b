//! The spans of a recorded message in this process. Everybody else's messages pay one branch.

use geminga_runtime::telemetry::{MessageSpan, SpanKind, TraceContext};

use crate::ownership::Segment;

/// What is kept of a client's `traceparent`: itself, or nothing if it is none.
pub(crate) fn sound(traceparent: String) -> String {
    let parsed = TraceContext::parse(&traceparent);
    if parsed.is_ok() { traceparent } else { String::new() }
}

/// From a batch's arrival to its receipt, below the send.
pub(crate) fn publish(traceparent: &str, segment: &Segment, messages: u32) -> Option<MessageSpan> {
    begin(traceparent, segment, "publish", SpanKind::Server, "receive", messages)
}

/// The delivery of a stored batch to a consumer, below its send.
pub(crate) fn deliver(traceparent: &str, segment: &Segment, messages: u32) -> Option<MessageSpan> {
    begin(traceparent, segment, "deliver", SpanKind::Producer, "send", messages)
}

fn begin(
    traceparent: &str,
    segment: &Segment,
    name: &'static str,
    kind: SpanKind,
    operation: &'static str,
    messages: u32,
) -> Option<MessageSpan> {
    if traceparent.is_empty() {
        return None;
    }
    let sent = TraceContext::parse(traceparent).ok()?;
    let mut span = MessageSpan::below(&sent, name, kind, operation)?;
    span.set("messaging.destination.name", segment.topic().to_string());
    span.set("messaging.destination.partition.id", i64::from(segment.id().segment));
    span.set("messaging.batch.message_count", i64::from(messages));
    Some(span)
}
