//! The topics of a namespace that match, as the server tells of them. Pure.
//!
//! ```text
//! watch:   come a#1 b#2, synced | come c#3 | gone b#2, come b#4 |  (broken)  come a#1 b#4 d#5, synced
//! changes: a#1 b#2 come         | c comes  | b goes, b comes    |            c goes, d comes
//! ```
//! A watch begins with everything that there is. After a break that list counts once it is complete: what is missing from it
//! has gone meanwhile, and a name with another id is another topic.

use std::collections::BTreeMap;

use geminga_proto::{names::TopicName, v1::WatchTopicsReply};

use super::matcher::Pattern;

/// Topics consumed at a time: each has a stream a segment.
const TOPICS_MAX: usize = 10_000;

/// One topic comes, or goes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Change {
    Gone(TopicName),
    Come(TopicName, u64),
}

#[derive(Debug, Default)]
pub(super) struct Topics {
    known: BTreeMap<TopicName, u64>,
    /// The list of the present watch, until it is complete.
    list: Option<BTreeMap<TopicName, u64>>,
}

impl Topics {
    /// A watch was opened: it begins anew.
    pub(super) fn on_watching(&mut self) {
        self.list = Some(BTreeMap::new());
    }

    /// Whether the present watch has told everything that there is.
    pub(super) fn is_synced(&self) -> bool {
        self.list.is_none()
    }

    /// The topic that has this name now.
    pub(super) fn id(&self, name: &TopicName) -> Option<u64> {
        self.known.get(name).copied()
    }

    /// What it changes, in order. Names that are none are passed by; past the limit so are topics.
    pub(super) fn on_reply(&mut self, reply: WatchTopicsReply, pattern: &Pattern) -> Vec<Change> {
        let mut changes = Vec::new();
        let named = |text: &str| TopicName::parse(text).ok().filter(|name| pattern.matches(name));
        for gone in &reply.gone {
            let Some(name) = named(&gone.name) else { continue };
            let of = self.list.as_mut().unwrap_or(&mut self.known);
            if of.get(&name) == Some(&gone.id) {
                of.remove(&name);
                if self.list.is_none() {
                    changes.push(Change::Gone(name));
                }
            }
        }
        for come in &reply.come {
            let Some(name) = named(&come.name) else { continue };
            match &mut self.list {
                Some(list) if list.len() < TOPICS_MAX => drop(list.insert(name, come.id)),
                Some(_) => {}
                None => self.come(name, come.id, &mut changes),
            }
        }
        if reply.synced
            && let Some(list) = self.list.take()
        {
            let gone = self.known.keys().filter(|name| !list.contains_key(*name));
            let gone: Vec<TopicName> = gone.cloned().collect();
            for name in gone {
                self.known.remove(&name);
                changes.push(Change::Gone(name));
            }
            for (name, id) in list {
                self.come(name, id, &mut changes);
            }
        }
        changes
    }

    fn come(&mut self, name: TopicName, id: u64, changes: &mut Vec<Change>) {
        let before = self.known.get(&name).copied();
        if before == Some(id) || (before.is_none() && self.known.len() >= TOPICS_MAX) {
            return;
        }
        if before.is_some() {
            changes.push(Change::Gone(name.clone()));
        }
        self.known.insert(name.clone(), id);
        changes.push(Change::Come(name, id));
    }
}

#[cfg(test)]
mod tests {
    use geminga_proto::v1::TopicRef;
    use proptest::prelude::*;

    use super::*;

    fn name(number: u8) -> TopicName {
        TopicName::parse(&format!("public/default/t{number}")).expect("a name")
    }

    fn refs(topics: &[(u8, u64)]) -> Vec<TopicRef> {
        let topic =
            |(number, id): &(u8, u64)| TopicRef { name: name(*number).to_string(), id: *id };
        topics.iter().map(topic).collect()
    }

    fn reply(come: &[(u8, u64)], gone: &[(u8, u64)], synced: bool) -> WatchTopicsReply {
        WatchTopicsReply { come: refs(come), gone: refs(gone), synced }
    }

    fn pattern() -> Pattern {
        Pattern::new("t.*").expect("a pattern")
    }

    #[test]
    fn nothing_changes_before_the_list_is_complete_and_then_only_what_differs() {
        use Change::{Come, Gone};
        let mut topics = Topics::default();
        topics.on_watching();
        assert_eq!(topics.on_reply(reply(&[(1, 10)], &[], false), &pattern()), []);
        assert!(!topics.is_synced());
        let first = topics.on_reply(reply(&[(2, 20)], &[], true), &pattern());
        assert_eq!(first, [Come(name(1), 10), Come(name(2), 20)]);
        assert!(topics.is_synced());
        let again = topics.on_reply(reply(&[(2, 21), (3, 30)], &[(2, 20)], true), &pattern());
        assert_eq!(again, [Gone(name(2)), Come(name(2), 21), Come(name(3), 30)]);
        assert_eq!(topics.on_reply(reply(&[], &[(3, 99)], true), &pattern()), [], "another one");
        topics.on_watching();
        let after = topics.on_reply(reply(&[(1, 10), (2, 22), (4, 40)], &[], true), &pattern());
        assert_eq!(
            after,
            [Gone(name(3)), Gone(name(2)), Come(name(2), 22), Come(name(4), 40)],
            "1 is as it was"
        );
        assert_eq!((topics.id(&name(2)), topics.id(&name(3))), (Some(22), None));
    }

    #[test]
    fn what_does_not_match_or_is_no_name_is_passed_by() {
        let mut topics = Topics::default();
        topics.on_watching();
        let named = |text: &str| TopicRef { name: text.into(), id: 1 };
        let come = ["public/default/other", "public/default/t~x", "t", "", "public/default/t1"];
        let come = come.map(named).to_vec();
        let changes = topics
            .on_reply(WatchTopicsReply { come, synced: true, ..Default::default() }, &pattern());
        assert_eq!(changes, [Change::Come(name(1), 1)]);
    }

    proptest! {
        /// Topics come and go while watches break: who follows the changes has what there is, whenever a list is complete.
        #[test]
        fn who_follows_the_changes_has_what_there_is(
            steps in prop::collection::vec((0u8..6, 0u8..5), 1..80),
        ) {
            let (mut server, mut ours) = (BTreeMap::new(), BTreeMap::new());
            let mut topics = Topics::default();
            let mut next = 1;
            let mut follow = |changes: Vec<Change>| -> Result<_, TestCaseError> {
                for change in changes {
                    match change {
                        Change::Gone(name) => prop_assert!(ours.remove(&name).is_some()),
                        Change::Come(name, id) => prop_assert_eq!(ours.insert(name, id), None),
                    }
                }
                Ok(ours.clone())
            };
            topics.on_watching();
            let mut watching = false;
            for (number, act) in steps {
                let at = name(number);
                let mut change = WatchTopicsReply { synced: true, ..Default::default() };
                match act {
                    0 => watching = false,
                    1 => {
                        // A new watch, in two frames.
                        topics.on_watching();
                        watching = true;
                        let all: Vec<TopicRef> = server.iter().map(|(name, id): (&TopicName, &u64)| {
                            TopicRef { name: name.to_string(), id: *id }
                        }).collect();
                        let (first, second) = all.split_at(all.len() / 2);
                        let reply = WatchTopicsReply { come: first.to_vec(), ..Default::default() };
                        prop_assert_eq!(topics.on_reply(reply, &pattern()), []);
                        change.come = second.to_vec();
                    }
                    _ => {
                        if let Some(id) = server.remove(&at) {
                            change.gone.push(TopicRef { name: at.to_string(), id });
                        }
                        if act > 2 {
                            server.insert(at.clone(), next);
                            change.come.push(TopicRef { name: at.to_string(), id: next });
                            next += 1;
                        }
                    }
                }
                if watching {
                    let now = follow(topics.on_reply(change, &pattern()))?;
                    prop_assert_eq!(now, server.clone());
                }
            }
        }
    }
}
