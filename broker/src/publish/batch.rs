//! What a batch must be before it is let in: bounds first, then that its parts agree. Nothing is looked at per message.

use geminga_proto::{
    reason::Reason,
    v1::{Batch, Codec, PayloadFormat},
};

use crate::{config::Limits, errors::Refusal};

/// What a batch costs beside its payload and index, bytes.
const BATCH_BYTES: u64 = 256;

/// What a batch holds in memory: its index counts too, which may be far larger than its payload (S7).
pub(super) fn held_bytes(batch: &Batch) -> u64 {
    let index = batch.index.as_ref().map_or(0, |index| {
        4 * index.key_hash.len() + index.has_key.len() + 8 * index.deliver_at_ms.len()
    });
    batch.payload.len() as u64 + index as u64 + BATCH_BYTES
}

/// Checks a batch against the limits. The sequence chain is checked by the segment's owner (DD5).
///
/// # Errors
/// MESSAGE_TOO_LARGE, INVALID_REQUEST.
pub(super) fn check(batch: &Batch, limits: &Limits) -> Result<(), Refusal> {
    check_size(batch, limits)?;
    if batch.count == 0 || batch.count > limits.batch_records_max {
        let message =
            format!("count is {}, must be 1 to {}", batch.count, limits.batch_records_max);
        return Err(Refusal::request(message).with("batch_records_max", limits.batch_records_max));
    }
    let count = batch.count as usize;
    let index = batch.index.as_ref().ok_or_else(|| Refusal::request("index is missing"))?;
    if index.key_hash.len() != count || !(index.has_key.is_empty() || index.has_key.len() == count)
    {
        let message = format!(
            "the index has {} hashes and {} key flags for {count} records",
            index.key_hash.len(),
            index.has_key.len()
        );
        return Err(Refusal::request(message));
    }
    if !(index.deliver_at_ms.is_empty() || index.deliver_at_ms.len() == count) {
        let message = format!(
            "the index has {} delivery times for {count} records",
            index.deliver_at_ms.len()
        );
        return Err(Refusal::request(message));
    }
    if PayloadFormat::try_from(batch.format) != Ok(PayloadFormat::Native) {
        return Err(Refusal::request(format!("format {} is unknown", batch.format)));
    }
    let Ok(codec) = Codec::try_from(batch.codec) else {
        return Err(Refusal::request(format!("codec {} is unknown", batch.codec)));
    };
    if codec == Codec::Unspecified && batch.uncompressed_size as usize != batch.payload.len() {
        let message = format!(
            "uncompressed_size is {} for {} bytes without compression",
            batch.uncompressed_size,
            batch.payload.len()
        );
        return Err(Refusal::request(message));
    }
    if batch.lo_sequence == 0 || batch.hi_sequence < batch.lo_sequence {
        let message = format!(
            "sequences {}..={} are not a range from 1 on",
            batch.lo_sequence, batch.hi_sequence
        );
        return Err(Refusal::request(message));
    }
    Ok(())
}

fn check_size(batch: &Batch, limits: &Limits) -> Result<(), Refusal> {
    let largest = u64::from(batch.uncompressed_size).max(batch.payload.len() as u64);
    if largest > limits.batch_bytes_max {
        let message = format!(
            "the batch has {largest} bytes, at most {} are allowed",
            limits.batch_bytes_max
        );
        return Err(Refusal::new(Reason::MessageTooLarge, message)
            .with("batch_bytes_max", limits.batch_bytes_max)
            .with("message_bytes_max", limits.message_bytes_max));
    }
    // A batch of one shows its message's size; in a larger one the SDK has checked each.
    if batch.count == 1 && largest > limits.message_bytes_max {
        let message = format!(
            "the message has {largest} bytes, at most {} are allowed",
            limits.message_bytes_max
        );
        return Err(Refusal::new(Reason::MessageTooLarge, message)
            .with("message_bytes_max", limits.message_bytes_max));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use geminga_proto::v1::RecordIndex;

    use super::*;

    fn good() -> Batch {
        Batch {
            prev_sequence: 0,
            lo_sequence: 1,
            hi_sequence: 2,
            format: PayloadFormat::Native.into(),
            codec: Codec::Unspecified.into(),
            uncompressed_size: 4,
            index: Some(RecordIndex {
                key_hash: vec![1, 2],
                has_key: vec![],
                ..Default::default()
            }),
            count: 2,
            payload: Bytes::from_static(b"abcd"),
            traceparent: String::new(),
            ..Batch::default()
        }
    }

    #[test]
    fn parts_that_disagree_are_refused_and_never_stored() {
        let limits = Limits::default();
        check(&good(), &limits).expect("good");
        type Spoil = fn(&mut Batch);
        let bad: [(&str, Spoil); 11] = [
            ("no records", |b| b.count = 0),
            ("too many records", |b| b.count = 65_537),
            ("no index", |b| b.index = None),
            ("short index", |b| b.count = 3),
            ("key flags", |b| b.index.as_mut().expect("there").has_key = vec![true]),
            ("format", |b| b.format = 99),
            ("no format", |b| b.format = 0),
            ("codec", |b| b.codec = 99),
            ("size", |b| b.uncompressed_size = 5),
            ("sequence 0", |b| b.lo_sequence = 0),
            ("sequences", |b| b.lo_sequence = 3),
        ];
        for (what, spoil) in bad {
            let mut batch = good();
            spoil(&mut batch);
            assert_eq!(
                check(&batch, &limits).expect_err(what).reason,
                Reason::InvalidRequest,
                "{what}"
            );
        }
    }

    #[test]
    fn a_large_index_of_an_empty_payload_is_held_against_the_budget() {
        let records = 65_536;
        let index = RecordIndex {
            key_hash: vec![0; records],
            has_key: vec![true; records],
            ..Default::default()
        };
        let batch = Batch { index: Some(index), payload: Bytes::new(), ..good() };
        assert!(held_bytes(&batch) >= 5 * records as u64);
    }

    #[test]
    fn a_declared_size_counts_as_much_as_a_real_one() {
        let limits = Limits::default();
        let bomb = Batch { codec: Codec::Zstd.into(), uncompressed_size: u32::MAX, ..good() };
        assert_eq!(check(&bomb, &limits).expect_err("bomb").reason, Reason::MessageTooLarge);
        let index = Some(RecordIndex { key_hash: vec![1], has_key: vec![], ..Default::default() });
        let size = limits.message_bytes_max as usize + 1;
        let one = Batch {
            count: 1,
            index,
            payload: vec![0; size].into(),
            uncompressed_size: size as u32,
            ..good()
        };
        assert_eq!(check(&one, &limits).expect_err("large").reason, Reason::MessageTooLarge);
    }
}
