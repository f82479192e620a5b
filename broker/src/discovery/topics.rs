//! What a watch of a namespace tells: the difference between what it told and what the mirror has, a frame at a time. A slow
//! reader is told of many changes as one, and costs a reference per topic that it was told of, however long it waits.

use std::{
    collections::{BTreeMap, btree_map::Range},
    iter::Peekable,
    ops::Bound,
    sync::Arc,
};

use geminga_proto::{
    ids::TopicId,
    names::{NamespaceName, TopicName},
    v1::{TopicRef, WatchTopicsReply},
};

/// Changes in one frame: with the longest names some 300 KiB.
const CHANGES_MAX: usize = 500;

/// What was told. Names are shared with the mirror.
pub(super) type Told = BTreeMap<Arc<TopicName>, TopicId>;

/// A frame's worth of changes.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// The name, what it was, and what it is.
    changes: Vec<(Arc<TopicName>, Option<TopicId>, Option<TopicId>)>,
    /// Where to go on; none: this was the end.
    pub(super) next: Option<Arc<TopicName>>,
}

impl Step {
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// As it is told, and remembered to be.
    pub(super) fn tell(self, told: &mut Told, synced: bool) -> WatchTopicsReply {
        let mut reply = WatchTopicsReply { synced, ..WatchTopicsReply::default() };
        for (name, was, is) in self.changes {
            let of = |id: TopicId| TopicRef { name: name.to_string(), id: id.0 };
            reply.gone.extend(was.map(of));
            reply.come.extend(is.map(of));
            match is {
                Some(id) => told.insert(name, id),
                None => told.remove(&name),
            };
        }
        reply
    }
}

/// The names of a namespace whose own part begins so, behind `after`, in order.
pub(super) fn names_in<'a>(
    names: &'a Told,
    namespace: &'a NamespaceName,
    prefix: &'a str,
    after: Option<&TopicName>,
) -> impl Iterator<Item = (&'a Arc<TopicName>, TopicId)> {
    // No topic's name is lower than `-`; a prefix that is no name itself (one dot, or two) is looked for from there on.
    let first = |prefix: &str| TopicName::parse(&format!("{namespace}/{prefix}"));
    let first = first(prefix).or_else(|_| first("-")).expect("a namespace and a name");
    let from = match after {
        Some(after) => Bound::Excluded(after.clone()),
        None => Bound::Included(first),
    };
    names
        .range::<TopicName, _>((from, Bound::Unbounded))
        .take_while(move |(name, _)| name.namespace() == namespace)
        .skip_while(move |(name, _)| name.topic() < prefix)
        .take_while(move |(name, _)| name.topic().starts_with(prefix))
        .map(|(name, id)| (name, *id))
}

/// The next changes from what was told to what is, behind `after`, in the order of names. `now` begins there too.
pub(super) fn step<'a>(
    told: &Told,
    now: impl Iterator<Item = (&'a Arc<TopicName>, TopicId)>,
    after: Option<&TopicName>,
) -> Step {
    let from = after.map_or(Bound::Unbounded, |after| Bound::Excluded(after.clone()));
    let mut told: Peekable<Range<'_, _, _>> =
        told.range::<TopicName, _>((from, Bound::Unbounded)).peekable();
    let mut now = now.peekable();
    let mut step = Step::default();
    while step.changes.len() < CHANGES_MAX {
        let name = match (told.peek(), now.peek()) {
            (None, None) => return step,
            (Some((told, _)), None) => Arc::clone(told),
            (None, Some((now, _))) => Arc::clone(now),
            (Some((told, _)), Some((now, _))) => Arc::clone(told.min(now)),
        };
        let was = told.next_if(|(of, _)| **of == name).map(|(_, id)| *id);
        let is = now.next_if(|(of, _)| **of == name).map(|(_, id)| id);
        if was != is {
            step.changes.push((Arc::clone(&name), was, is));
        }
        step.next = Some(name);
    }
    step
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Arc<TopicName> {
        Arc::new(TopicName::parse(text).expect("valid"))
    }

    fn world(topics: &[(&str, u64)]) -> Told {
        topics.iter().map(|(text, id)| (name(text), TopicId(*id))).collect()
    }

    fn all_of(names: &Told, prefix: &str) -> Vec<String> {
        let namespace = NamespaceName::parse("a/b").expect("valid");
        names_in(names, &namespace, prefix, None).map(|(name, _)| name.to_string()).collect()
    }

    #[test]
    fn a_prefix_finds_what_begins_so_in_its_namespace_only() {
        let names = world(&[
            ("a/a/x", 1),
            ("a/b/-", 2),
            ("a/b/.x", 3),
            ("a/b/x", 4),
            ("a/b/xy", 5),
            ("a/b/y", 6),
            ("a/bb/x", 7),
            ("a/c/x", 8),
        ]);
        assert_eq!(all_of(&names, "x"), ["a/b/x", "a/b/xy"]);
        assert_eq!(all_of(&names, "."), ["a/b/.x"]);
        assert_eq!(all_of(&names, "").len(), 5);
        assert_eq!(all_of(&names, "z"), [""; 0]);
    }

    #[test]
    fn a_topic_that_was_made_again_goes_and_comes() {
        let (mut told, now) = (world(&[("a/b/x", 1), ("a/b/y", 2)]), world(&[("a/b/x", 3)]));
        let step = step(&told, now.iter().map(|(name, id)| (name, *id)), None);
        let reply = step.tell(&mut told, true);
        let ids = |refs: &[TopicRef]| refs.iter().map(|of| of.id).collect::<Vec<_>>();
        assert_eq!((ids(&reply.gone), ids(&reply.come)), (vec![1, 2], vec![3]));
        assert_eq!(told, now);
    }

    proptest! {
        #[test]
        fn what_was_told_becomes_what_is_whatever_happens_between_two_frames(
            worlds in prop::collection::vec(prop::collection::btree_map(0u32..3_000, 0u64..3, 0..1_500), 1..4),
        ) {
            let (mut told, mut heard) = (Told::new(), Told::new());
            let mut pass = |now: &Told, frames: usize| {
                let mut after = None;
                for _ in 0..frames {
                    let namespace = NamespaceName::parse("a/b").expect("valid");
                    let names = names_in(now, &namespace, "", after.as_deref());
                    let step = step(&told, names, after.as_deref());
                    prop_assert!(step.changes.len() <= CHANGES_MAX);
                    after.clone_from(&step.next);
                    let reply = step.tell(&mut told, false);
                    for gone in reply.gone {
                        prop_assert_eq!(heard.remove(&name(&gone.name)), Some(TopicId(gone.id)));
                    }
                    for come in reply.come {
                        prop_assert_eq!(heard.insert(name(&come.name), TopicId(come.id)), None);
                    }
                    if after.is_none() {
                        break;
                    }
                }
                prop_assert_eq!(&heard, &told);
                Ok(())
            };
            let as_told = |world: &BTreeMap<u32, u64>| -> Told {
                world.iter().map(|(n, id)| (name(&format!("a/b/t{n}")), TopicId(*id))).collect()
            };
            for world in &worlds {
                pass(&as_told(world), 1)?; // cut short
            }
            let last = as_told(worlds.last().expect("one"));
            pass(&last, usize::MAX)?;
            prop_assert_eq!(heard, last);
        }
    }
}
