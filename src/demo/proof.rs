//! The demo's judge: it knows what was sent and what was received, and nothing of how.
//!
//! Lost and repeated: every flight has a number, its place in the input; the consumer must see each number once, at one
//! message id, with the same bytes (a checksum over all of them). Order: per key, numbers must rise along the offsets of
//! the segment; without a key there is no promise of order. Offsets of a segment must be dense.

use std::collections::BTreeMap;

use bytes::Bytes;

/// What went wrong, by count; all zero is the proof.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Verdict {
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// Sent, but never received.
    pub(crate) lost: u64,
    /// Received at more than one message id.
    pub(crate) repeated: u64,
    /// Received, but never sent, or with other bytes.
    pub(crate) changed: u64,
    /// Pairs of neighbours of one key that came in another order than they were sent.
    pub(crate) reordered: u64,
    /// A key that came from more than one segment.
    pub(crate) keys_on_two_segments: u64,
    /// Offsets missing or out of step in a segment.
    pub(crate) offset_gaps: u64,
    /// A receipt that names another place than the message was read from.
    pub(crate) receipts_wrong: u64,
}

impl Verdict {
    /// Nothing lost, repeated, changed or reordered.
    pub(crate) fn holds(&self) -> bool {
        let counts = [
            self.lost,
            self.repeated,
            self.changed,
            self.reordered,
            self.keys_on_two_segments,
            self.offset_gaps,
            self.receipts_wrong,
        ];
        self.sent == self.received && counts.iter().all(|count| *count == 0)
    }
}

/// One received message.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    /// The flight's place in the input, as it travelled with the message.
    pub(crate) number: usize,
    pub(crate) key: Option<Bytes>,
    pub(crate) line: Bytes,
}

/// One sent message, with the place its receipt named.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) key: Option<Bytes>,
    pub(crate) line: Bytes,
    /// (segment, offset)
    pub(crate) receipt: Option<(u32, u64)>,
}

/// Judges a run. `seen` in the order each consumer got it.
pub(crate) fn judge(sent: &[Sent], seen: &[Seen]) -> Verdict {
    let mut verdict =
        Verdict { sent: sent.len() as u64, received: seen.len() as u64, ..Verdict::default() };
    let mut times = vec![0u32; sent.len()];
    let mut next_offset: BTreeMap<u32, u64> = BTreeMap::new();
    let mut last_of_key: BTreeMap<&[u8], (usize, u32)> = BTreeMap::new();
    for message in seen {
        let next = next_offset.entry(message.segment).or_default();
        if message.offset != *next {
            verdict.offset_gaps += 1;
        }
        *next = message.offset + 1;

        let Some(original) = sent.get(message.number) else {
            verdict.changed += 1;
            continue;
        };
        times[message.number] += 1;
        if original.line != message.line || original.key != message.key {
            verdict.changed += 1;
        }
        if original.receipt.is_some_and(|place| place != (message.segment, message.offset)) {
            verdict.receipts_wrong += 1;
        }
        if let Some(key) = &message.key {
            if let Some((before, segment)) = last_of_key.get(&key[..]) {
                verdict.reordered += u64::from(*before >= message.number);
                verdict.keys_on_two_segments += u64::from(*segment != message.segment);
            }
            last_of_key.insert(key, (message.number, message.segment));
        }
    }
    verdict.lost = times.iter().filter(|count| **count == 0).count() as u64;
    verdict.repeated = times.iter().filter(|count| **count > 1).count() as u64;
    verdict
}

/// An order-independent checksum: the wrapping sum of the CRC-64 of each line with its number.
pub(crate) fn checksum<'a>(lines: impl Iterator<Item = (usize, &'a [u8])>) -> u64 {
    lines.fold(0u64, |sum, (number, line)| {
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
        digest.update(&number.to_le_bytes());
        digest.update(line);
        sum.wrapping_add(digest.finalize())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> (Vec<Sent>, Vec<Seen>) {
        let mut sent = Vec::new();
        let mut seen = Vec::new();
        for number in 0..6usize {
            let segment = (number % 2) as u32;
            let key = (number < 4).then(|| Bytes::from(format!("key-{segment}")));
            let line = Bytes::from(format!("line {number}"));
            let offset = (number / 2) as u64;
            sent.push(Sent {
                key: key.clone(),
                line: line.clone(),
                receipt: Some((segment, offset)),
            });
            seen.push(Seen { segment, offset, number, key, line });
        }
        (sent, seen)
    }

    #[test]
    fn a_faithful_run_holds() {
        let (sent, seen) = run();
        assert!(judge(&sent, &seen).holds());
        let sum = |seen: &[Seen]| checksum(seen.iter().map(|m| (m.number, &m.line[..])));
        let mut shuffled = seen.clone();
        shuffled.reverse();
        assert_eq!(sum(&seen), sum(&shuffled));
        shuffled[0].line = Bytes::from_static(b"line x");
        assert_ne!(sum(&seen), sum(&shuffled));
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let (sent, mut seen) = run();
        seen.pop();
        assert_eq!(judge(&sent, &seen).lost, 1);

        let (sent, mut seen) = run();
        let again = Seen { offset: 3, ..seen[4].clone() };
        seen.push(again);
        let verdict = judge(&sent, &seen);
        assert_eq!((verdict.repeated, verdict.receipts_wrong), (1, 1));

        let (sent, mut seen) = run();
        seen[3].line = Bytes::from_static(b"other");
        assert_eq!(judge(&sent, &seen).changed, 1);

        let (mut sent, mut seen) = run();
        seen.swap(0, 2);
        (seen[0].offset, seen[2].offset) = (0, 1);
        sent.iter_mut().for_each(|m| m.receipt = None);
        assert_eq!(judge(&sent, &seen).reordered, 1);

        let (sent, mut seen) = run();
        seen[5].offset = 9;
        assert_eq!(judge(&sent, &seen).offset_gaps, 1);

        let (sent, mut seen) = run();
        seen[2].segment = 1;
        assert_eq!(judge(&sent, &seen).keys_on_two_segments, 1);
        assert!(!judge(&sent, &seen).holds());
    }
}
