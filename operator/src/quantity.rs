//! Sizes as Kubernetes writes them: `100Gi`, `1500M`, `0.5Ti`.

/// Bytes; none for what is no size. Fractions are rounded up, as Kubernetes does.
pub(crate) fn bytes(text: &str) -> Option<u128> {
    nanos(text).map(|nanos| nanos.div_ceil(NANO))
}

/// Whether two texts are one quantity: Kubernetes stores 0.5 as 500m and 1024Mi as 1Gi.
pub(crate) fn same(one: &str, other: &str) -> bool {
    one == other || nanos(one).is_some_and(|one| Some(one) == nanos(other))
}

/// A unit in its smallest parts.
const NANO: u128 = 1_000_000_000;

fn nanos(text: &str) -> Option<u128> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u128 = match suffix {
        "n" => 1,
        "u" => 1_000,
        "m" => 1_000_000,
        "" => NANO,
        "k" => NANO * 1_000,
        "M" => NANO * 1_000_000,
        "G" => NANO * 1_000_000_000,
        "T" => NANO * 1_000_000_000_000,
        "P" => NANO * 1_000_000_000_000_000,
        "E" => NANO * 1_000_000_000_000_000_000,
        "Ki" => NANO << 10,
        "Mi" => NANO << 20,
        "Gi" => NANO << 30,
        "Ti" => NANO << 40,
        "Pi" => NANO << 50,
        "Ei" => NANO << 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || whole.len() > 18 || fraction.len() > 9 {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let number = whole.parse::<u128>().ok()? * scale + part;
    Some(number.checked_mul(factor)?.div_ceil(scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_compare_as_bytes_not_as_text() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1500M", Some(1_500_000_000)),
            ("1Gi", Some(1 << 30)),
            ("1024Mi", Some(1 << 30)),
            ("0.5Ki", Some(512)),
            ("1.0000000001k", None),
            ("0.3", Some(1)),
            ("", None),
            ("Gi", None),
            ("1gi", None),
            ("-1Gi", None),
            ("1.2.3", None),
            ("9999999999999999999", None),
            ("999999999999999999.999999999Ei", None),
            ("1500m", Some(2)),
        ] {
            assert_eq!(bytes(text), expected, "{text:?}");
        }
        assert!(bytes("9Gi") < bytes("10Gi") && bytes("10G") < bytes("10Gi"));
    }
}
