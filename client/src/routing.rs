//! Which segment a message goes to: pure, over the layout as it is known now.

use std::{sync::Arc, time::Duration};

use geminga_proto::{key_hash::key_hash, v1::Layout};
use tokio::time::Instant;

use crate::message::Message;

/// How a producer spreads its messages. Only [`Self::KeyHash`] (and a custom way that does) keeps the order of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Routing {
    /// Equal keys to one segment by the hash of the key (murmur3 x86_32, seed 0); messages without a key as
    /// [`Self::StickyBatch`].
    #[default]
    KeyHash,
    /// To one segment until a batch of it is full or the time for one is over, then to the next, whatever the key.
    StickyBatch,
    /// Every message to the next segment in turn, whatever its key. Batches are small.
    RoundRobin,
    /// Every message to a segment drawn for it.
    Random,
    /// Every message to this segment.
    Segment(u32),
    /// Every message to the segment that this function names.
    Custom(Custom),
}

/// A way of the application's own to choose a segment: of a message, and the segments there are, in order of their key
/// ranges. A message for a segment that is none of them is refused.
#[derive(Clone)]
pub struct Custom(Arc<Choose>);

type Choose = dyn Fn(&Message, &[u32]) -> u32 + Send + Sync;

impl Custom {
    /// The function is called for each message, by the task that sends it: it must not wait.
    #[must_use]
    pub fn new(choose: impl Fn(&Message, &[u32]) -> u32 + Send + Sync + 'static) -> Self {
        Self(Arc::new(choose))
    }
}

impl std::fmt::Debug for Custom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Custom(..)")
    }
}

impl PartialEq for Custom {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Custom {}

/// The key ranges of a layout, in order of their first hash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The layout's epoch.
    pub epoch: u64,
    /// (first, last, segment), both inclusive.
    ranges: Vec<(u32, u32, u32)>,
}

impl Table {
    /// The table of a layout.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let mut ranges: Vec<_> = layout
            .segments
            .iter()
            .map(|info| {
                let keys = info.keys.unwrap_or_default();
                (keys.first, keys.last, info.segment)
            })
            .collect();
        ranges.sort_unstable();
        Self { epoch: layout.epoch, ranges }
    }

    /// The segment whose range holds this hash.
    #[must_use]
    pub fn of_hash(&self, hash: u32) -> Option<u32> {
        let after = self.ranges.partition_point(|(first, _, _)| *first <= hash);
        let (_, last, segment) = *self.ranges.get(after.checked_sub(1)?)?;
        (hash <= last).then_some(segment)
    }

    /// All segments, in order of their ranges.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.ranges.iter().map(|(_, _, segment)| *segment)
    }

    /// Where a message with this hash goes.
    pub(crate) fn place(&self, hash: u32) -> Option<Route> {
        Some(Route { segment: self.of_hash(hash)?, hash })
    }

    /// A hash that falls into this segment: the first of its range.
    fn hash_of(&self, segment: u32) -> Option<u32> {
        self.ranges.iter().find(|(_, _, of)| *of == segment).map(|(first, _, _)| *first)
    }
}

/// Where a message goes, and the hash the server is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The segment.
    pub segment: u32,
    /// The key's hash, or for a message without a key one that its batch was routed by.
    pub hash: u32,
}

/// Chooses segments. Messages without a key stick to one segment until a batch of them is full or the time for one is
/// over, so that round robin does not end in batches of one.
#[derive(Clone, Debug)]
pub struct Router {
    routing: Routing,
    batch_bytes: usize,
    batch_time: Duration,
    turn: usize,
    drawn: u64,
    stuck_bytes: usize,
    stuck_since: Option<Instant>,
}

impl Router {
    /// A router; messages without a key change their segment after `batch_bytes` or `batch_time`. `start` is where the
    /// first one goes (many producers should not all start with the same segment).
    #[must_use]
    pub fn new(routing: Routing, batch_bytes: usize, batch_time: Duration, start: u64) -> Self {
        Self {
            routing,
            batch_bytes,
            batch_time,
            turn: start as usize,
            drawn: start,
            stuck_bytes: 0,
            stuck_since: None,
        }
    }

    /// The place of a message of `bytes`; none if no segment of the table takes it.
    #[must_use]
    pub fn route(
        &mut self,
        table: &Table,
        message: &Message,
        bytes: usize,
        now: Instant,
    ) -> Option<Route> {
        let key = message.key.as_deref();
        let segment = match (&self.routing, key) {
            (Routing::KeyHash, Some(key)) => return table.place(key_hash(key)),
            (Routing::KeyHash | Routing::StickyBatch, _) => self.sticky(table, bytes, now)?.2,
            (Routing::RoundRobin, _) => {
                self.turn = self.turn.wrapping_add(1);
                table.ranges.get(self.turn % table.ranges.len().max(1))?.2
            }
            (Routing::Random, _) => {
                let drawn = self.draw();
                table.ranges.get((drawn % table.ranges.len().max(1) as u64) as usize)?.2
            }
            (Routing::Segment(segment), _) => *segment,
            (Routing::Custom(custom), _) => {
                let segments: Vec<u32> = table.segments().collect();
                (custom.0)(message, &segments)
            }
        };
        let first = table.hash_of(segment)?;
        Some(Route { segment, hash: key.map_or(first, key_hash) })
    }

    /// splitmix64 from the start that was drawn for this router: runs repeat by their seed.
    fn draw(&mut self) -> u64 {
        self.drawn = self.drawn.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.drawn;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn sticky<'t>(
        &mut self,
        table: &'t Table,
        bytes: usize,
        now: Instant,
    ) -> Option<&'t (u32, u32, u32)> {
        let count = table.ranges.len();
        if count == 0 {
            return None;
        }
        let over =
            self.stuck_since.is_some_and(|since| now.duration_since(since) >= self.batch_time);
        if over || (self.stuck_bytes > 0 && self.stuck_bytes + bytes > self.batch_bytes) {
            self.turn = self.turn.wrapping_add(1);
            self.stuck_bytes = 0;
            self.stuck_since = None;
        }
        self.stuck_since.get_or_insert(now);
        self.stuck_bytes += bytes.max(1);
        table.ranges.get(self.turn % count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use geminga_proto::{
        key_hash::equal_ranges,
        v1::{KeyRange, SegmentInfo},
    };
    use proptest::prelude::*;

    use super::*;

    fn table(segments: u32) -> Table {
        let mut segments: Vec<_> = equal_ranges(segments)
            .into_iter()
            .enumerate()
            .map(|(i, (first, last))| SegmentInfo {
                segment: i as u32 + 10,
                keys: Some(KeyRange { first, last }),
            })
            .collect();
        segments.reverse(); // the order on the wire does not matter
        Table::new(&Layout { epoch: 1, segments })
    }

    fn message(key: Option<&[u8]>) -> Message {
        let message = Message::new("value");
        key.map_or(message.clone(), |key| message.with_key(key.to_vec()))
    }

    fn router(routing: Routing) -> Router {
        Router::new(routing, 1_000, Duration::from_millis(10), 0)
    }

    proptest! {
        #[test]
        fn a_key_always_goes_to_the_segment_whose_range_holds_its_hash(
            segments in 1u32..70,
            key in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let table = table(segments);
            let mut router = router(Routing::KeyHash);
            let now = Instant::now();
            let route = router.route(&table, &message(Some(&key)), 10, now).expect("the ranges cover every hash");
            let (first, last) = equal_ranges(segments)[route.segment as usize - 10];
            prop_assert!((first..=last).contains(&route.hash));
            prop_assert_eq!(route.hash, key_hash(&key));
            prop_assert_eq!(router.route(&table, &message(Some(&key)), 999, now), Some(route));
        }

        #[test]
        fn messages_without_a_key_take_turns_a_batch_at_a_time(sizes in prop::collection::vec(1usize..1_200, 1..200)) {
            let table = table(4);
            let mut router = router(Routing::StickyBatch);
            let now = Instant::now();
            let mut runs: Vec<(u32, usize)> = Vec::new();
            for size in sizes {
                let route = router.route(&table, &message(None), size, now).expect("there are segments");
                match runs.last_mut() {
                    Some((segment, bytes)) if *segment == route.segment => *bytes += size,
                    _ => runs.push((route.segment, size)),
                }
                prop_assert_eq!(table.of_hash(route.hash), Some(route.segment), "the hash lies in the segment");
            }
            for pair in runs.windows(2) {
                prop_assert_eq!(pair[1].0, 10 + (pair[0].0 - 10 + 1) % 4, "the next one in turn");
            }
            for (_, bytes) in runs {
                prop_assert!(bytes <= 1_200, "a run is at most a batch, or one large message");
            }
        }
    }

    #[test]
    fn slow_messages_are_spread_by_time() {
        let table = table(3);
        let mut router = router(Routing::KeyHash);
        let start = Instant::now();
        let mut seen: BTreeMap<u32, u32> = BTreeMap::new();
        for i in 0..9 {
            let route =
                router.route(&table, &message(None), 1, start + Duration::from_millis(10) * i);
            *seen.entry(route.expect("a segment").segment).or_default() += 1;
        }
        assert_eq!(seen.into_values().collect::<Vec<_>>(), [3, 3, 3]);
    }

    #[test]
    fn a_chosen_segment_must_exist() {
        let now = Instant::now();
        let route = |routing, table: &Table, key| {
            let route = router(routing).route(table, &message(key), 1, now);
            route.map(|route| route.segment)
        };
        assert_eq!(route(Routing::Segment(9), &table(3), None), None);
        assert_eq!(route(Routing::Segment(11), &table(3), None), Some(11));
        let last = Custom::new(|_, segments| segments.last().copied().unwrap_or_default());
        assert_eq!(route(Routing::Custom(last), &table(3), Some(b"k")), Some(12));
        assert_eq!(route(Routing::Custom(Custom::new(|_, _| 99)), &table(3), None), None);
        for routing in
            [Routing::KeyHash, Routing::RoundRobin, Routing::Random, Routing::StickyBatch]
        {
            assert_eq!(route(routing, &Table::default(), Some(b"k")), None);
        }
    }

    #[test]
    fn turns_and_draws_reach_every_segment_message_by_message_whatever_the_key() {
        let table = table(4);
        let now = Instant::now();
        for routing in [Routing::RoundRobin, Routing::Random] {
            let mut router = router(routing.clone());
            let mut seen: BTreeMap<u32, u32> = BTreeMap::new();
            for _ in 0..400 {
                let route = router.route(&table, &message(Some(b"k")), 1, now).expect("a segment");
                assert_eq!(route.hash, key_hash(b"k"), "the server is told the key's hash");
                *seen.entry(route.segment).or_default() += 1;
            }
            let even = if routing == Routing::RoundRobin { 100..=100 } else { 60..=140 };
            assert!(seen.len() == 4 && seen.values().all(|count| even.contains(count)), "{seen:?}");
        }
    }
}
