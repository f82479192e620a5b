//! Sizes as Kubernetes writes them: `100Gi`, `1500M`, `0.5Ti`.

/// Bytes; none for what is no size. Fractions are rounded up, as Kubernetes does.
pub(crate) fn bytes(text: &str) -> Option<u128> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u128 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "E" => 1_000_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        "Ei" => 1 << 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || whole.len() > 18 || fraction.len() > 9 {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let number = whole.parse::<u128>().ok()? * scale + part;
    Some((number * factor).div_ceil(scale))
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
        ] {
            assert_eq!(bytes(text), expected, "{text:?}");
        }
        assert!(bytes("9Gi") < bytes("10Gi") && bytes("10G") < bytes("10Gi"));
    }
}
