//! Values of flags that several commands know.

use clap::ValueEnum;
use geminga_client::{Position, Start};
use geminga_runtime::{
    clock::{Clock, SystemClock},
    units::Period,
};

/// Where a new subscription begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum From {
    Earliest,
    Latest,
}

impl std::convert::From<From> for Start {
    fn from(from: From) -> Self {
        match from {
            From::Earliest => Self::Earliest,
            From::Latest => Self::Latest,
        }
    }
}

pub(crate) fn millis(period: Period) -> u64 {
    u64::try_from(period.0.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// `earliest`, `latest`, an offset, an RFC 3339 time, or `15m-ago`.
pub(crate) fn position(text: &str) -> Result<Position, String> {
    match text {
        "earliest" => return Ok(Position::Earliest),
        "latest" => return Ok(Position::Latest),
        _ => {}
    }
    if let Ok(offset) = text.parse() {
        return Ok(Position::Offset(offset));
    }
    if let Some(span) = text.strip_suffix("-ago") {
        let span: Period = span.parse().map_err(|error| format!("{error}"))?;
        return Ok(Position::TimeMs(SystemClock.now().0.saturating_sub(millis(span))));
    }
    match time_ms(text) {
        Ok(time) => Ok(Position::TimeMs(time)),
        Err(_) => Err("expected earliest, latest, an offset, a time such as 2026-01-31T12:00:00Z, or a span such as 15m-ago".into()),
    }
}

/// An RFC 3339 time, as milliseconds since the Unix epoch.
pub(crate) fn time_ms(text: &str) -> Result<u64, String> {
    let time: jiff::Timestamp =
        text.parse().map_err(|_| "expected a time such as 2026-01-31T12:00:00Z".to_owned())?;
    u64::try_from(time.as_millisecond()).map_err(|_| "a time before 1970".to_owned())
}

/// Pauses between deliveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backoff {
    pub(crate) first_ms: u64,
    /// 0: the server's.
    pub(crate) max_ms: u64,
}

/// `1s` or `1s..10m`.
pub(crate) fn backoff(text: &str) -> Result<Backoff, String> {
    let parse = |text: &str| {
        text.parse::<Period>().map(millis).map_err(|error| format!("{text:?}: {error}"))
    };
    let Some((first, max)) = text.split_once("..") else {
        return Ok(Backoff { first_ms: parse(text)?, max_ms: 0 });
    };
    let backoff = Backoff { first_ms: parse(first)?, max_ms: parse(max)? };
    if backoff.max_ms < backoff.first_ms {
        return Err("the longest pause is shorter than the first one".into());
    }
    Ok(backoff)
}

/// Messages of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) segment: u32,
    pub(crate) first: u64,
    pub(crate) last: u64,
}

/// `SEGMENT:OFFSET` or `SEGMENT:FIRST-LAST`.
pub(crate) fn range(text: &str) -> Result<Range, String> {
    let wrong = || "expected SEGMENT:OFFSET, or SEGMENT:FIRST-LAST".to_owned();
    let (segment, offsets) = text.split_once(':').ok_or_else(wrong)?;
    let (first, last) = offsets.split_once('-').unwrap_or((offsets, offsets));
    let segment = segment.parse().map_err(|_| wrong())?;
    let (first, last) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first > last {
        return Err(wrong());
    }
    Ok(Range { segment, first, last })
}

/// The beginning of a value, for a cell of a table.
pub(crate) fn preview(value: &[u8]) -> String {
    const SHOWN: usize = 60;
    let text = String::from_utf8_lossy(&value[..value.len().min(4 * SHOWN)]);
    let shown: String =
        text.chars().take(SHOWN).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().count() > SHOWN || value.len() > 4 * SHOWN { shown + "..." } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_word_an_offset_or_a_time() {
        assert_eq!(position("earliest"), Ok(Position::Earliest));
        assert_eq!(position("latest"), Ok(Position::Latest));
        assert_eq!(position("17"), Ok(Position::Offset(17)));
        assert_eq!(position("1970-01-01T00:00:01Z"), Ok(Position::TimeMs(1_000)));
        assert!(matches!(position("15m-ago"), Ok(Position::TimeMs(time)) if time > 0));
        for bad in ["", "-1", "yesterday", "x-ago", "1960-01-01T00:00:00Z", "18446744073709551616"]
        {
            assert!(position(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pauses_and_ranges_are_checked() {
        assert_eq!(backoff("2s"), Ok(Backoff { first_ms: 2_000, max_ms: 0 }));
        assert_eq!(backoff("100ms..1m"), Ok(Backoff { first_ms: 100, max_ms: 60_000 }));
        for bad in ["", "x", "1s..", "2s..1s", "1s..2s..3s"] {
            assert!(backoff(bad).is_err(), "{bad:?}");
        }
        assert_eq!(range("3:9"), Ok(Range { segment: 3, first: 9, last: 9 }));
        assert_eq!(range("0:1-5"), Ok(Range { segment: 0, first: 1, last: 5 }));
        for bad in ["", "3", ":", "a:1", "1:5-4", "1:-4", "1:2-3-4"] {
            assert!(range(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_value_is_shown_short_and_without_control_characters() {
        assert_eq!(preview(b"a\x1b[31m"), "a\u{fffd}[31m");
        assert_eq!(preview(&[b'x'; 500]), "x".repeat(60) + "...");
        assert_eq!(preview("\u{e4}".repeat(60).as_bytes()), "\u{e4}".repeat(60));
    }
}
