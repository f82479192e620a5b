//! W3C trace context: the `traceparent` header.
//!
//! ```text
//! 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
//! version  trace id                   parent span      flags (bit 0: sampled)
//! ```

use std::{fmt, str::FromStr};

use crate::random::Random;

/// Names a trace; never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceId(u128);

/// Names a span; never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(u64);

/// Where a message stands in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace_id: TraceId,
    /// The span that sent this.
    pub span_id: SpanId,
    /// Whether the sender records the trace.
    pub sampled: bool,
}

/// Text that is not a `traceparent`. The message is carried all the same, without a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a W3C traceparent")]
pub struct TraceError;

impl TraceContext {
    /// The header's name.
    pub const HEADER: &str = "traceparent";

    /// Reads `00-<32 hex>-<16 hex>-<2 hex>`; of a later version the parts it shares with this one.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        parse(text).ok_or(TraceError)
    }

    /// From numbers; none if one of them is zero.
    pub(super) fn of(trace: u128, span: u64, sampled: bool) -> Option<Self> {
        let sound = trace != 0 && span != 0;
        sound.then_some(Self { trace_id: TraceId(trace), span_id: SpanId(span), sampled })
    }

    /// As numbers: trace, span.
    pub(super) fn ids(&self) -> (u128, u64) {
        (self.trace_id.0, self.span_id.0)
    }

    /// Whether somebody records the trace.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.sampled
    }

    /// A new trace.
    #[must_use]
    pub fn root(random: &Random, sampled: bool) -> Self {
        let trace_id = u128::from(random.u64()) << 64 | u128::from(random.u64());
        Self { trace_id: TraceId(trace_id.max(1)), span_id: SpanId::new(random), sampled }
    }

    /// A new span below this one.
    #[must_use]
    pub fn child(&self, random: &Random) -> Self {
        Self { span_id: SpanId::new(random), ..*self }
    }
}

impl SpanId {
    fn new(random: &Random) -> Self {
        Self(random.u64().max(1))
    }
}

/// Reads `digits` lower case hexadecimal digits off the front of `rest`.
fn hex(rest: &mut &[u8], digits: usize) -> Option<u128> {
    let (number, after) = rest.split_at_checked(digits)?;
    *rest = after;
    number.iter().try_fold(0, |value: u128, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(digit))
    })
}

fn dash(rest: &mut &[u8]) -> Option<()> {
    let (first, after) = rest.split_first()?;
    *rest = after;
    (*first == b'-').then_some(())
}

fn parse(text: &str) -> Option<TraceContext> {
    let rest = &mut text.as_bytes();
    let version = hex(rest, 2)?;
    dash(rest)?;
    let trace_id = hex(rest, 32).filter(|id| *id != 0)?;
    dash(rest)?;
    let span_id = hex(rest, 16).filter(|id| *id != 0)?;
    dash(rest)?;
    let flags = hex(rest, 2)?;
    // Later versions may add fields; 255 is forbidden.
    let ends_well = rest.is_empty() || (version != 0 && rest[0] == b'-');
    let span_id = u64::try_from(span_id).ok()?;
    let parsed = TraceContext {
        trace_id: TraceId(trace_id),
        span_id: SpanId(span_id),
        sampled: flags & 1 == 1,
    };
    (ends_well && version != 0xff).then_some(parsed)
}

impl FromStr for TraceContext {
    type Err = TraceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_standards_example_goes_in_and_out() {
        let parsed: TraceContext = EXAMPLE.parse().unwrap();
        assert_eq!(parsed.to_string(), EXAMPLE);
        assert_eq!(parsed.trace_id.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(parsed.sampled);
    }

    #[test]
    fn later_versions_are_read_as_far_as_known() {
        for text in [EXAMPLE.replacen("00", "01", 1), EXAMPLE.replacen("00", "cc", 1) + "-more"] {
            assert_eq!(text.parse(), EXAMPLE.parse::<TraceContext>());
        }
    }

    #[test]
    fn broken_headers_are_refused() {
        for text in [
            "",
            "00",
            &EXAMPLE.to_uppercase(),
            &EXAMPLE.replacen("00", "ff", 1),
            &EXAMPLE.replace('-', "_"),
            &EXAMPLE[..54],
            &format!("{EXAMPLE}-more"),
            &format!("{EXAMPLE}0"),
            &format!("{}x", EXAMPLE.replacen("00", "01", 1)),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b7-01",
        ] {
            assert_eq!(text.parse::<TraceContext>(), Err(TraceError), "{text}");
        }
    }

    #[test]
    fn a_child_stays_in_its_trace() {
        let random = Random::from_seed(1);
        let root = TraceContext::root(&random, true);
        let child = root.child(&random);
        assert_eq!((child.trace_id, child.sampled), (root.trace_id, true));
        assert_ne!(child.span_id, root.span_id);
    }

    proptest! {
        #[test]
        fn what_is_formatted_parses_back(seed: u64, sampled: bool) {
            let made = TraceContext::root(&Random::from_seed(seed), sampled);
            prop_assert_eq!(made.to_string().parse(), Ok(made));
        }

        #[test]
        fn no_text_panics(text in "[0-9a-f-]{0,60}|.{0,60}") {
            let _ = text.parse::<TraceContext>();
        }
    }
}
