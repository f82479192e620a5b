//! What clients saw, and whether it may be: the judge of every test.

use std::collections::BTreeMap;

use geminga_client::MessageId;

/// A producer's message, by who sent it and its number there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sent {
    pub(crate) producer: usize,
    pub(crate) number: u64,
}

/// What became of a send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Where it lies, if the server still knew.
    Acknowledged(Option<MessageId>),
    /// It may have been stored, and it may not.
    Unknown(String),
    /// It was not stored and never will be.
    Refused(String),
}

/// One delivery, in the order of arrival.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Delivered {
    pub(crate) id: MessageId,
    pub(crate) value: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

/// Everything that happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) outcomes: BTreeMap<Sent, Outcome>,
    pub(crate) deliveries: Vec<Delivered>,
}

/// The bytes of a message: every one differs, and each tells whose it is.
pub(crate) fn value_of(sent: &Sent, length: usize) -> Vec<u8> {
    let mut value = format!("{}:{}:", sent.producer, sent.number).into_bytes();
    let mut byte = sent.number.wrapping_mul(31).wrapping_add(sent.producer as u64) as u8;
    while value.len() < length {
        byte = byte.wrapping_mul(167).wrapping_add(13);
        value.push(byte);
    }
    value
}

pub(crate) fn key_of(sent: &Sent, keys: u64) -> Vec<u8> {
    format!("{}-{}", sent.producer, sent.number % keys).into_bytes()
}

fn parse(value: &[u8]) -> Option<Sent> {
    let mut parts = value.splitn(3, |byte| *byte == b':');
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
    Some(Sent { producer: usize::try_from(number()?).ok()?, number: number()? })
}

impl History {
    /// What may not be, in words; empty if all is well.
    pub(crate) fn violations(&self, length: usize) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut by_offset: BTreeMap<(u32, u64), Sent> = BTreeMap::new();
        let mut by_message: BTreeMap<Sent, MessageId> = BTreeMap::new();
        let mut last_in_segment: BTreeMap<u32, u64> = BTreeMap::new();
        let mut last_of_key: BTreeMap<(usize, Vec<u8>), u64> = BTreeMap::new();
        for delivered in &self.deliveries {
            let id = delivered.id;
            let Some(sent) = parse(&delivered.value) else {
                wrong.push(format!("{id} holds what nobody sent"));
                continue;
            };
            if delivered.value != value_of(&sent, length) {
                wrong.push(format!("{id} was changed: {sent:?}"));
            }
            if let Some(other) = by_offset.insert((id.segment, id.offset), sent.clone()) {
                if other != sent {
                    wrong.push(format!("{id} was {other:?} and then {sent:?}"));
                }
                continue; // delivered again, which is allowed
            }
            if let Some(other) = by_message.insert(sent.clone(), id) {
                wrong.push(format!("{sent:?} is stored twice: {other} and {id}"));
            }
            if last_in_segment.get(&id.segment).is_some_and(|last| *last >= id.offset) {
                wrong.push(format!("{id} comes for the first time after a later offset"));
            }
            last_in_segment.insert(id.segment, id.offset);
            let key = (sent.producer, delivered.key.clone());
            if let Some(last) = last_of_key.insert(key, sent.number)
                && last >= sent.number
            {
                wrong.push(format!("{sent:?} comes after {last} of the same key"));
            }
        }
        for (sent, outcome) in &self.outcomes {
            match (outcome, by_message.get(sent)) {
                (Outcome::Acknowledged(id), None) => {
                    wrong.push(format!("{sent:?} was acknowledged as {id:?} and is lost"));
                }
                (Outcome::Acknowledged(Some(id)), Some(found)) if id != found => {
                    wrong.push(format!("{sent:?} was acknowledged as {id} and lies at {found}"));
                }
                (Outcome::Refused(why), Some(found)) => {
                    wrong.push(format!("{sent:?} was refused ({why}) and lies at {found}"));
                }
                _ => {}
            }
        }
        wrong
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.outcomes.values().filter(|o| matches!(o, Outcome::Acknowledged(_))).count()
    }

    pub(crate) fn not_acknowledged(&self) -> Vec<(&Sent, &Outcome)> {
        let failed = |o: &&Outcome| !matches!(o, Outcome::Acknowledged(_));
        self.outcomes.iter().filter(|(_, o)| failed(o)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(number: u64) -> Sent {
        Sent { producer: 0, number }
    }

    fn delivered(number: u64, offset: u64) -> Delivered {
        let sent = sent(number);
        let id = MessageId { segment: 0, offset };
        Delivered { id, value: value_of(&sent, 40), key: key_of(&sent, 2) }
    }

    fn history(acknowledged: &[(u64, u64)], deliveries: &[(u64, u64)]) -> History {
        let outcome = |offset| Outcome::Acknowledged(Some(MessageId { segment: 0, offset }));
        History {
            outcomes: acknowledged.iter().map(|(n, o)| (sent(*n), outcome(*o))).collect(),
            deliveries: deliveries.iter().map(|(n, o)| delivered(*n, *o)).collect(),
        }
    }

    #[test]
    fn the_judge_sees_each_kind_of_wrong() {
        let sound = history(&[(0, 0), (1, 1)], &[(0, 0), (1, 1), (0, 0), (1, 1)]);
        assert_eq!(sound.violations(40), Vec::<String>::new());
        let found = |history: History| history.violations(40).join("; ");
        assert!(found(history(&[(0, 0), (1, 1)], &[(0, 0)])).contains("is lost"));
        assert!(found(history(&[(0, 0)], &[(0, 0), (0, 1)])).contains("stored twice"));
        assert!(found(history(&[(0, 0)], &[(0, 3)])).contains("lies at"));
        assert!(found(history(&[], &[(2, 0), (0, 1)])).contains("of the same key"));
        assert!(found(history(&[], &[(0, 1), (1, 0)])).contains("after a later offset"));
        let mut changed = history(&[(0, 0)], &[(0, 0)]);
        changed.deliveries[0].value[20] ^= 1;
        assert!(found(changed).contains("was changed"));
    }
}
