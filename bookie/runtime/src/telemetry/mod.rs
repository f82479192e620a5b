//! What a process tells about itself: logs, metrics, health, and the trace a message belongs to.

mod health;
mod logging;
mod process;
mod registry;
mod spans;
mod trace;

pub use health::serve_health;
pub use logging::{LogFormat, init_logging};
pub use process::ProcessMetrics;
pub use registry::{
    DURATION_BUCKETS_S, MetricsRegistry, SIZE_BUCKETS_BYTES, bytes_histogram, duration_histogram,
    metric_name,
};
pub use spans::{MessageSpan, SpanExport, SpanKind, flush_spans, init_spans};
pub use trace::{SpanId, TraceContext, TraceError, TraceId};
