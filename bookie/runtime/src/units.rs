//! Sizes and times as people write them in configuration: `64MiB`, `5s`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// A number of bytes. Units: `B` (or none), `KiB`, `MiB`, `GiB`, `TiB`, and the decimal `kB`, `MB`, `GB`, `TB`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

/// A duration. Units: `us`, `ms`, `s`, `m`, `h`, `d`; one is required unless the number is 0.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Period(pub Duration);

/// Why a size or a time was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// It does not begin with a whole number.
    #[error("{0:?} does not begin with a whole number")]
    Number(String),
    /// The unit is missing or unknown.
    #[error("{text:?} needs one of the units {units}")]
    Unit {
        /// The whole text.
        text: String,
        /// The units there are.
        units: String,
    },
    /// The value does not fit 64 bits.
    #[error("{0:?} is too large")]
    TooLarge(String),
}

/// Largest first, so that formatting finds the largest that divides. The first of equal names is written.
const SIZES: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1_000),
    ("B", 1),
];

/// In microseconds, largest first.
const TIMES: [(&str, u64); 6] = [
    ("d", 86_400_000_000),
    ("h", 3_600_000_000),
    ("m", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1_000),
    ("us", 1),
];

fn parse(text: &str, units: &[(&str, u64)], unit_default: Option<u64>) -> Result<u64, UnitError> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(UnitError::Number(text.to_owned()));
    }
    let number: u64 = number.parse().map_err(|_| UnitError::TooLarge(text.to_owned()))?;
    let unit = unit.trim_start();
    let factor = match units.iter().find(|(name, _)| *name == unit) {
        Some((_, factor)) => Some(*factor),
        None if unit.is_empty() && number == 0 => Some(1),
        None if unit.is_empty() => unit_default,
        None => None,
    };
    let factor = factor.ok_or_else(|| UnitError::Unit {
        text: text.to_owned(),
        units: units.iter().rev().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
    })?;
    number.checked_mul(factor).ok_or_else(|| UnitError::TooLarge(text.to_owned()))
}

/// Writes the value with the largest unit that divides it.
fn write(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)]) -> fmt::Result {
    match units.iter().find(|(_, factor)| value != 0 && value.is_multiple_of(*factor)) {
        Some((name, factor)) => write!(f, "{}{name}", value / factor),
        None => f.write_str("0"),
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse(text, &SIZES, Some(1)).map(Self)
    }
}

impl FromStr for Period {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse(text, &TIMES, None).map(|micros| Self(Duration::from_micros(micros)))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write(f, self.0, &SIZES)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write(f, u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX), &TIMES)
    }
}

impl TryFrom<String> for ByteSize {
    type Error = UnitError;

    fn try_from(text: String) -> Result<Self, UnitError> {
        text.parse()
    }
}

impl TryFrom<String> for Period {
    type Error = UnitError;

    fn try_from(text: String) -> Result<Self, UnitError> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl From<Period> for String {
    fn from(period: Period) -> Self {
        period.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn people_write_sizes_and_times() {
        for (text, bytes) in
            [("64MiB", 64 << 20), ("0", 0), ("17", 17), (" 5 kB ", 5_000), ("3TiB", 3 << 40)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for (text, ms) in
            [("5s", 5_000), ("250ms", 250), ("2m", 120_000), ("0", 0), ("1d", 86_400_000)]
        {
            assert_eq!(text.parse(), Ok(Period(Duration::from_millis(ms))), "{text}");
        }
        assert_eq!(ByteSize(64 << 20).to_string(), "64MiB");
        assert_eq!(Period(Duration::from_millis(1500)).to_string(), "1500ms");
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in [
            "",
            "MiB",
            "-1B",
            "1.5GiB",
            "1XB",
            "1 MiB x",
            "1mib",
            "99999999999999999999",
            "16777216TiB",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        for text in ["5", "s", "5S", "1w", "-1s", "999999999999999d"] {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value: u64) {
            prop_assert_eq!(ByteSize(value).to_string().parse(), Ok(ByteSize(value)));
            let period = Period(Duration::from_micros(value));
            prop_assert_eq!(period.to_string().parse(), Ok(period));
        }

        #[test]
        fn no_text_panics(text in "[0-9a-zA-Z. -]{0,30}|.{0,30}") {
            let _ = (text.parse::<ByteSize>(), text.parse::<Period>());
        }
    }
}
