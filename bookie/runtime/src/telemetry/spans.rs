//! Spans of sampled messages, exported by OTLP.
//!
//! A span is made only where the message's own context says that its trace is recorded, and only in a process that has a
//! collector: all others pay one branch. Nothing here ever waits: a collector that is slow or gone costs spans, not messages.

use std::{sync::OnceLock, time::Duration};

use opentelemetry::{
    Context, KeyValue, SpanId as OtelSpanId, TraceFlags, TraceId as OtelTraceId,
    trace::{
        Link, Span as _, SpanBuilder, SpanContext, SpanKind as OtelKind, Status, TraceContextExt,
        TraceState, Tracer as _, TracerProvider as _,
    },
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracer, SdkTracerProvider},
};

use super::TraceContext;

/// Time for one export, and for the last one when the process ends.
const EXPORT_DEADLINE: Duration = Duration::from_secs(5);

/// Where spans go.
#[derive(Clone, Debug)]
pub struct SpanExport {
    /// The collector's OTLP gRPC endpoint, such as `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// `service.name`, such as `geminga-broker`.
    pub service: &'static str,
    /// `service.instance.id`: the member's id in the cluster.
    pub instance: String,
    /// The share of recorded traces that this process takes part in, 0 to 1: the same traces in every process.
    pub ratio: f64,
}

/// What a span does, in the terms of the messaging conventions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// Hands messages to a server.
    Producer,
    /// Takes messages from a server.
    Consumer,
    /// Serves another's request.
    Server,
    /// Asks another process.
    Client,
}

struct Exporter {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// Of the lower half of a trace id, the first that is left out.
    ids_below: u64,
}

static EXPORTER: OnceLock<Exporter> = OnceLock::new();

/// Starts to export, once a process; a second call does nothing. Needs a tokio runtime. The collector need not be there.
///
/// # Errors
/// When the endpoint is no URL.
pub fn init_spans(export: SpanExport) -> Result<(), String> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(export.endpoint)
        .with_timeout(EXPORT_DEADLINE)
        .build()
        .map_err(|error| error.to_string())?;
    let resource = Resource::builder()
        .with_service_name(export.service)
        .with_attribute(KeyValue::new("service.instance.id", export.instance))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    // Whether a trace is recorded was decided where it began.
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::AlwaysOn)
        .with_resource(resource)
        .build();
    let tracer = provider.tracer("geminga");
    let ids_below = (export.ratio.clamp(0.0, 1.0) * u64::MAX as f64) as u64;
    let _first_wins = EXPORTER.set(Exporter { provider, tracer, ids_below });
    Ok(())
}

/// Sends what is left; at the end of a process. Waits up to 5 s for the collector.
pub fn flush_spans() {
    if let Some(exporter) = EXPORTER.get() {
        let _a_collector_that_is_gone = exporter.provider.shutdown_with_timeout(EXPORT_DEADLINE);
    }
}

/// A span under way; it ends, and is exported, when dropped.
#[derive(Debug)]
pub struct MessageSpan {
    span: opentelemetry_sdk::trace::Span,
    context: TraceContext,
}

impl MessageSpan {
    /// Begins a span below `parent`; none if the trace is not recorded, or this process exports nothing. `destination` is
    /// the topic, `operation` one of `send`, `receive`, `process`, `settle`.
    #[must_use]
    pub fn below(
        parent: &TraceContext,
        name: &'static str,
        kind: SpanKind,
        operation: &'static str,
    ) -> Option<Self> {
        Self::start(Some(parent), &[], name, kind, operation)
    }

    /// Begins a span of a trace of its own that points at the spans which sent its messages; none as in [`Self::below`].
    #[must_use]
    pub fn linked_to(
        sent: &TraceContext,
        name: &'static str,
        kind: SpanKind,
        operation: &'static str,
    ) -> Option<Self> {
        // The conventions allow a message's context to be the parent as well, where there is one message: then a whole
        // delivery is one tree.
        Self::start(Some(sent), &[*sent], name, kind, operation)
    }

    fn start(
        parent: Option<&TraceContext>,
        links: &[TraceContext],
        name: &'static str,
        kind: SpanKind,
        operation: &'static str,
    ) -> Option<Self> {
        let exporter = EXPORTER.get()?;
        let parent = parent.filter(|p| p.sampled && p.ids().0 as u64 <= exporter.ids_below)?;
        let builder = SpanBuilder::from_name(name)
            .with_kind(match kind {
                SpanKind::Producer => OtelKind::Producer,
                SpanKind::Consumer => OtelKind::Consumer,
                SpanKind::Server => OtelKind::Server,
                SpanKind::Client => OtelKind::Client,
            })
            .with_links(links.iter().map(|link| Link::with_context(remote(link))).collect())
            .with_attributes([
                KeyValue::new("messaging.system", "geminga"),
                KeyValue::new("messaging.operation.type", operation),
            ]);
        let above = Context::new().with_remote_span_context(remote(parent));
        let span = exporter.tracer.build_with_context(builder, &above);
        let own = span.span_context();
        let context = TraceContext::of(
            u128::from_be_bytes(own.trace_id().to_bytes()),
            u64::from_be_bytes(own.span_id().to_bytes()),
            true,
        )?;
        Some(Self { span, context })
    }

    /// What is handed on, so that the next hop's span is below this one.
    #[must_use]
    pub fn context(&self) -> TraceContext {
        self.context
    }

    /// Adds an attribute.
    pub fn set(&mut self, name: &'static str, value: impl Into<opentelemetry::Value>) {
        self.span.set_attribute(KeyValue::new(name, value));
    }

    /// Says that it failed, and why.
    pub fn failed(&mut self, why: impl Into<String>) {
        self.span.set_status(Status::error(why.into()));
    }
}

fn remote(context: &TraceContext) -> SpanContext {
    let (trace, span) = context.ids();
    let flags = if context.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    SpanContext::new(
        OtelTraceId::from_bytes(trace.to_be_bytes()),
        OtelSpanId::from_bytes(span.to_be_bytes()),
        flags,
        true,
        TraceState::default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn a_process_without_a_collector_makes_no_span() {
        let parent = TraceContext::root(&Random::from_seed(1), true);
        assert!(MessageSpan::below(&parent, "publish", SpanKind::Server, "receive").is_none());
    }
}
