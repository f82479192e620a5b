//! Batches read from bookies or objects, kept a short while beside the tail's: several subscriptions that go through the same
//! old range ask bookies once, and those that come while it is being read share that read. With a budget of its own over all
//! segments, so that who reads old messages pushes out nothing at the tail.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use geminga_proto::ids::Offset;
use geminga_runtime::budget::{ByteBudget, Permit};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use crate::{
    entry_cache::{OVERHEAD_BYTES, Taken},
    types::StoredBatch,
};

/// How long a batch is kept: readers of the same range are rarely further apart, or they are by far.
const KEPT: Duration = Duration::from_secs(10);

/// See the module's text.
#[derive(Debug)]
pub(crate) struct CatchUp {
    shared: ByteBudget,
    bytes_max: u64,
    held: Mutex<Held>,
    reads: Arc<Mutex<Reads>>,
}

#[derive(Debug, Default)]
struct Held {
    batches: BTreeMap<u64, Kept>,
    /// Base offsets as they came; one that was kept anew stands at its last place.
    order: VecDeque<(Instant, u64)>,
    bytes: u64,
}

#[derive(Debug)]
struct Kept {
    batch: StoredBatch,
    permit: Permit,
    at: Instant,
}

type Answer = Option<Arc<Vec<StoredBatch>>>;

/// Reads under way, by where they begin.
#[derive(Debug, Default)]
struct Reads(BTreeMap<u64, UnderWay>);

#[derive(Debug)]
struct UnderWay {
    /// About where it ends.
    end: u64,
    answer: watch::Receiver<Answer>,
}

/// What to do about a range that is not kept.
pub(crate) enum Missed {
    /// Read it; the others hear of it by this.
    Read(Reading),
    /// Somebody reads it.
    Wait(watch::Receiver<Answer>),
}

/// A read that others may wait for; dropped, they read for themselves.
pub(crate) struct Reading {
    reads: Arc<Mutex<Reads>>,
    from: u64,
    answer: watch::Sender<Answer>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.reads.lock().0.remove(&self.from);
    }
}

impl CatchUp {
    /// Bounded by `bytes_max` here, and over all segments by `shared`.
    pub(crate) fn new(shared: ByteBudget, bytes_max: u64) -> Self {
        Self { shared, bytes_max, held: Mutex::default(), reads: Arc::default() }
    }

    /// Neighbouring batches from the one that contains `from` on; empty if that one is not here.
    pub(crate) fn read(
        &self,
        from: Offset,
        bytes_max: usize,
        messages_max: usize,
    ) -> Vec<StoredBatch> {
        let mut taken = Taken::new(from, bytes_max, messages_max);
        let mut held = self.held.lock();
        held.expire();
        let Some((base, _)) = held.batches.range(..=from.0).next_back() else { return Vec::new() };
        for (_, kept) in held.batches.range(*base..) {
            if !taken.take(&kept.batch) {
                break;
            }
        }
        taken.batches
    }

    /// Nothing is kept at `from`. `about` is how many offsets a read will give.
    pub(crate) fn missed(&self, from: Offset, about: u64) -> Missed {
        let mut reads = self.reads.lock();
        let before = reads.0.range(..=from.0).next_back();
        if let Some((start, read)) = before
            && (*start == from.0 || from.0 < read.end)
        {
            return Missed::Wait(read.answer.clone());
        }
        let (sender, answer) = watch::channel(None);
        let end = from.0.saturating_add(about);
        reads.0.insert(from.0, UnderWay { end, answer });
        let reads = Arc::clone(&self.reads);
        Missed::Read(Reading { reads, from: from.0, answer: sender })
    }

    /// The read has an answer: it is kept, as far as there is room, and given to those who wait.
    pub(crate) fn done(&self, reading: Reading, batches: &[StoredBatch]) {
        let mut held = self.held.lock();
        held.expire();
        for batch in batches {
            self.keep(&mut held, batch);
        }
        drop(held);
        reading.answer.send_replace(Some(Arc::new(batches.to_vec())));
    }

    /// The oldest leave for it.
    fn keep(&self, held: &mut Held, batch: &StoredBatch) {
        let bytes = batch.payload.len() as u64 + OVERHEAD_BYTES;
        held.remove(batch.base_offset.0);
        let permit = loop {
            let fits = held.bytes + bytes <= self.bytes_max && bytes <= self.shared.total();
            if let Some(permit) = fits.then(|| self.shared.try_acquire(bytes)).flatten() {
                break permit;
            }
            match held.order.pop_front() {
                Some((at, base)) => held.remove_if(base, at),
                None => return,
            }
        };
        let at = Instant::now();
        held.bytes += permit.bytes();
        held.order.push_back((at, batch.base_offset.0));
        held.batches.insert(batch.base_offset.0, Kept { batch: batch.clone(), permit, at });
    }

    /// Gives back what was kept long enough; for a segment that nobody reads any more.
    pub(crate) fn expire(&self) {
        self.held.lock().expire();
    }
}

impl Held {
    fn expire(&mut self) {
        while let Some((at, base)) = self.order.front().copied()
            && at.elapsed() >= KEPT
        {
            self.order.pop_front();
            self.remove_if(base, at);
        }
    }

    /// Unless it was kept anew since.
    fn remove_if(&mut self, base: u64, at: Instant) {
        if self.batches.get(&base).is_some_and(|kept| kept.at == at) {
            self.remove(base);
        }
    }

    fn remove(&mut self, base: u64) {
        if let Some(kept) = self.batches.remove(&base) {
            self.bytes -= kept.permit.bytes();
        }
    }
}

/// Waits for somebody else's read: what of it is wanted here, or nothing if it failed or ended elsewhere. Cancel-safe.
pub(crate) async fn wait(
    mut answer: watch::Receiver<Answer>,
    from: Offset,
    bytes_max: usize,
    messages_max: usize,
) -> Vec<StoredBatch> {
    let Ok(Some(batches)) = answer.wait_for(Option::is_some).await.map(|found| found.clone())
    else {
        return Vec::new();
    };
    let mut taken = Taken::new(from, bytes_max, messages_max);
    for batch in batches.iter().filter(|batch| batch.end() > from) {
        if !taken.take(batch) {
            break;
        }
    }
    taken.batches
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use geminga_proto::storage::v1::EntryHeader;

    use super::*;

    fn batches(bases: impl IntoIterator<Item = u64>) -> Vec<StoredBatch> {
        let batch = |base| StoredBatch {
            base_offset: Offset(base),
            header: EntryHeader { base_offset: base, count: 10, ..EntryHeader::default() },
            payload: Bytes::from(vec![0; 488]),
        };
        bases.into_iter().map(batch).collect()
    }

    fn fill(catch_up: &CatchUp, found: &[StoredBatch]) {
        match catch_up.missed(found[0].base_offset, 1) {
            Missed::Read(reading) => catch_up.done(reading, found),
            Missed::Wait(_) => panic!("nobody reads"),
        }
    }

    fn bases(found: &[StoredBatch]) -> Vec<u64> {
        found.iter().map(|batch| batch.base_offset.0).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn batches_are_kept_a_short_while_and_the_oldest_leave_for_new_ones() {
        let budget = ByteBudget::new(10_000);
        let catch_up = CatchUp::new(budget.clone(), 4_000);
        fill(&catch_up, &batches([0, 10, 20]));
        assert_eq!(bases(&catch_up.read(Offset(5), 100_000, 1_000)), [0, 10, 20]);
        assert_eq!(bases(&catch_up.read(Offset(12), 1, 1_000)), [10]);
        assert!(catch_up.read(Offset(30), 100_000, 1_000).is_empty());
        fill(&catch_up, &batches([100, 110]));
        assert_eq!(budget.in_use(), 4_000);
        assert!(catch_up.read(Offset(5), 100_000, 1_000).is_empty(), "the oldest left");
        assert_eq!(bases(&catch_up.read(Offset(10), 100_000, 1_000)), [10, 20]);
        tokio::time::sleep(KEPT / 2).await;
        fill(&catch_up, &batches([20]));
        tokio::time::sleep(KEPT / 2).await;
        catch_up.expire();
        assert_eq!(bases(&catch_up.read(Offset(20), 100_000, 1_000)), [20], "it was kept anew");
        assert_eq!(budget.in_use(), 1_000);
        tokio::time::sleep(KEPT / 2).await;
        assert!(catch_up.read(Offset(20), 100_000, 1_000).is_empty());
        assert_eq!(budget.in_use(), 0);
        let others = budget.try_acquire(10_000);
        fill(&catch_up, &batches([0]));
        assert!(catch_up.read(Offset(0), 1, 1).is_empty(), "without room nothing is kept");
        drop(others);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_misses_the_same_range_waits_for_the_read_under_way() {
        let catch_up = CatchUp::new(ByteBudget::new(1), 1);
        let Missed::Read(reading) = catch_up.missed(Offset(0), 30) else {
            panic!("the first reads")
        };
        let Missed::Wait(same) = catch_up.missed(Offset(0), 1) else { panic!("the same range") };
        let Missed::Wait(inside) = catch_up.missed(Offset(15), 1) else { panic!("inside of it") };
        let Missed::Wait(edge) = catch_up.missed(Offset(29), 1) else { panic!("about inside") };
        let Missed::Read(other) = catch_up.missed(Offset(30), 30) else { panic!("behind it") };
        catch_up.done(reading, &batches([0, 10]));
        assert_eq!(bases(&wait(same, Offset(0), 1_000, 1_000).await), [0, 10], "without any room");
        assert_eq!(bases(&wait(inside, Offset(15), 1_000, 1_000).await), [10]);
        assert!(wait(edge, Offset(29), 1_000, 1_000).await.is_empty(), "it ended before");
        let Missed::Wait(left) = catch_up.missed(Offset(31), 1) else { panic!("inside of it") };
        drop(other); // cancelled, or failed
        assert!(wait(left, Offset(31), 1_000, 1_000).await.is_empty());
        assert!(matches!(catch_up.missed(Offset(31), 1), Missed::Read(_)));
    }
}
