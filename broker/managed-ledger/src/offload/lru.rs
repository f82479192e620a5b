//! A small cache with a bound: what was not used for longest leaves first.

use std::collections::BTreeMap;

use parking_lot::Mutex;

/// See the module's text. Costs are bytes.
#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    bytes_max: u64,
    held: Mutex<Held<K, V>>,
}

#[derive(Debug)]
struct Held<K, V> {
    values: BTreeMap<K, Kept<V>>,
    /// Last use -> key.
    order: BTreeMap<u64, K>,
    clock: u64,
    bytes: u64,
}

#[derive(Debug)]
struct Kept<V> {
    value: V,
    bytes: u64,
    used: u64,
}

impl<K: Ord + Clone, V: Clone> Lru<K, V> {
    pub(crate) fn new(bytes_max: u64) -> Self {
        let held = Held { values: BTreeMap::new(), order: BTreeMap::new(), clock: 0, bytes: 0 };
        Self { bytes_max, held: Mutex::new(held) }
    }

    pub(crate) fn get(&self, key: &K) -> Option<V> {
        let mut held = self.held.lock();
        let held = &mut *held;
        let kept = held.values.get_mut(key)?;
        held.clock += 1;
        held.order.remove(&kept.used);
        held.order.insert(held.clock, key.clone());
        kept.used = held.clock;
        Some(kept.value.clone())
    }

    /// Keeps the value, unless it alone is over the bound.
    pub(crate) fn insert(&self, key: K, value: V, bytes: u64) {
        if bytes > self.bytes_max {
            return;
        }
        let mut held = self.held.lock();
        let held = &mut *held;
        held.clock += 1;
        let used = held.clock;
        if let Some(old) = held.values.insert(key.clone(), Kept { value, bytes, used }) {
            held.order.remove(&old.used);
            held.bytes -= old.bytes;
        }
        held.order.insert(used, key);
        held.bytes += bytes;
        while held.bytes > self.bytes_max
            && let Some((_, oldest)) = held.order.pop_first()
        {
            held.bytes -= held.values.remove(&oldest).map_or(0, |kept| kept.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_leaves_and_the_bound_holds() {
        let lru = Lru::new(10);
        for key in 0..5 {
            lru.insert(key, key, 2);
        }
        assert_eq!(lru.get(&0), Some(0));
        lru.insert(5, 5, 4);
        assert_eq!((lru.get(&0), lru.get(&1), lru.get(&2)), (Some(0), None, None));
        lru.insert(5, 50, 4);
        assert_eq!((lru.get(&5), lru.get(&3)), (Some(50), Some(3)));
        lru.insert(6, 6, 11);
        assert_eq!(lru.get(&6), None);
        assert!(lru.held.lock().bytes <= 10);
    }
}
