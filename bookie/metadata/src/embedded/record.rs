//! How keys and history lie on disk. Numbers are little-endian; every length is checked against the bytes left.

use bytes::Bytes;

use crate::{
    Key, KeyValue, LeaseId, Revision,
    data::{Applied, Event},
};

/// A key's value with its revisions: create, modify, lease (0 for none), value.
pub(super) fn encode_value(found: &KeyValue) -> Vec<u8> {
    let mut out = Vec::with_capacity(24 + found.value.len());
    out.extend(found.create_revision.0.to_le_bytes());
    out.extend(found.mod_revision.0.to_le_bytes());
    out.extend(found.lease.map_or(0, |lease| lease.0).to_le_bytes());
    out.extend(&found.value);
    out
}

/// None for bytes that [`encode_value`] does not make.
pub(super) fn decode_value(key: Key, mut bytes: &[u8]) -> Option<KeyValue> {
    let create_revision = Revision(number(&mut bytes)?);
    let mod_revision = Revision(number(&mut bytes)?);
    let lease = match number(&mut bytes)? {
        0 => None,
        id if id > 0 => Some(LeaseId(id)),
        _ => return None,
    };
    let value = Bytes::copy_from_slice(bytes);
    Some(KeyValue { key, value, create_revision, mod_revision, lease })
}

/// One revision: for each change the key's length, the value record's length + 1 (0 when the key went), key, record.
pub(super) fn encode_applied(applied: &Applied) -> Vec<u8> {
    let mut out = Vec::new();
    for event in &applied.events {
        let record = event.after.as_ref().map(encode_value);
        let record_bytes = record.as_ref().map_or(0, |record| record.len() as u64 + 1);
        out.extend((event.key.0.len() as u64).to_le_bytes());
        out.extend(record_bytes.to_le_bytes());
        out.extend(&event.key.0);
        out.extend(record.iter().flatten());
    }
    out
}

/// None for bytes that [`encode_applied`] does not make. The values before each change are not kept.
pub(super) fn decode_applied(revision: Revision, mut bytes: &[u8]) -> Option<Applied> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let key_bytes = usize::try_from(number(&mut bytes)?).ok()?;
        let record_bytes = usize::try_from(number(&mut bytes)?).ok()?;
        let key = Key(Bytes::copy_from_slice(take(&mut bytes, key_bytes)?));
        let after = match record_bytes.checked_sub(1) {
            None => None,
            Some(record_bytes) => Some(decode_value(key.clone(), take(&mut bytes, record_bytes)?)?),
        };
        events.push(Event { key, before: None, after });
    }
    (!events.is_empty()).then_some(Applied { revision, events })
}

fn number(bytes: &mut &[u8]) -> Option<i64> {
    let (first, rest) = bytes.split_first_chunk::<8>()?;
    *bytes = rest;
    Some(i64::from_le_bytes(*first))
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (first, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event() -> impl Strategy<Value = Event> {
        let value = (prop::collection::vec(any::<u8>(), 0..20), 2i64..9, 2i64..9, 0i64..3);
        ("[a-z/]{1,9}", prop::option::of(value)).prop_map(|(key, value)| {
            let key = Key(Bytes::from(key));
            let after = value.map(|(value, create, modify, lease)| KeyValue {
                key: key.clone(),
                value: value.into(),
                create_revision: Revision(create),
                mod_revision: Revision(modify),
                lease: (lease > 0).then_some(LeaseId(lease)),
            });
            Event { key, before: None, after }
        })
    }

    proptest! {
        #[test]
        fn a_revision_comes_back_as_it_was(events in prop::collection::vec(event(), 1..5)) {
            let applied = Applied { revision: Revision(7), events };
            let back = decode_applied(Revision(7), &encode_applied(&applied));
            prop_assert_eq!(back, Some(applied));
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _either = decode_applied(Revision(7), &bytes);
            let _either = decode_value(Key(Bytes::new()), &bytes);
        }
    }
}
