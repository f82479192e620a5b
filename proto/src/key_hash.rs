//! The hash that places keys on segments.

/// murmur3 x86_32 with seed 0, the same in every SDK.
#[must_use]
pub fn key_hash(key: &[u8]) -> u32 {
    murmur3::murmur3_32(&mut &key[..], 0).expect("reading from a slice cannot fail")
}

/// The inclusive hash ranges of `segments` equal segments, in order; together they cover every hash once.
#[must_use]
pub fn equal_ranges(segments: u32) -> Vec<(u32, u32)> {
    let segments = u64::from(segments.max(1));
    let first = |i: u64| (i << 32).div_ceil(segments) as u32;
    (0..segments)
        .map(|i| {
            let last = if i + 1 == segments { u32::MAX } else { first(i + 1) - 1 };
            (first(i), last)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_vectors_hold() {
        let vectors = include_str!("../key_hash_vectors.txt");
        let mut checked = 0;
        for line in vectors.lines().filter(|line| !line.starts_with('#')) {
            let (key, hash) = line.split_once('\t').expect("key, tab, hash");
            let hash = u32::from_str_radix(hash, 16).expect("a hexadecimal hash");
            assert_eq!(key_hash(key.as_bytes()), hash, "{key:?}");
            checked += 1;
        }
        assert_eq!(checked, 4);
    }

    #[test]
    fn equal_ranges_cover_every_hash_once() {
        for segments in [1, 2, 3, 4, 7, 64, 1000] {
            let ranges = equal_ranges(segments);
            assert_eq!(ranges.len() as u32, segments);
            assert_eq!(ranges[0].0, 0);
            assert_eq!(ranges[ranges.len() - 1].1, u32::MAX);
            for pair in ranges.windows(2) {
                assert_eq!(pair[0].1 + 1, pair[1].0);
            }
        }
    }
}
