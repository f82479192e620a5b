//! The requests to one bookie that wait to be sent or to be answered. Pure.
//!
//! ```text
//! push --> queue --next--> on its way --answer--> told
//!            |                 |
//!            +--- expire, fail_all: told that nothing is known
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use geminga_proto::ids::Incarnation;
use tokio::{sync::oneshot, time::Instant};

use crate::bookie_rpc::{
    AddAnswer, FenceAnswer, LacAnswer, ListAnswer, ReadAnswer, Unknown,
    wire::{Reply, Request},
};

/// What a request is charged besides its payload, bytes.
const CALL_BYTES: usize = 256;
/// A WRITE_LAC that could not be sent for so long is dropped: a later one tells more.
const WRITE_LAC_FOR: Duration = Duration::from_secs(5);

/// Who waits for an answer.
#[derive(Debug)]
pub(super) enum Waiter {
    Add(oneshot::Sender<AddAnswer>),
    Fence(oneshot::Sender<FenceAnswer>),
    Read(oneshot::Sender<ReadAnswer>),
    ReadLac(oneshot::Sender<LacAnswer>),
    List(oneshot::Sender<ListAnswer>),
    /// A request that has no answer.
    Nobody,
}

impl Waiter {
    /// False if the answer is to another kind of request.
    fn tell(self, reply: Reply) -> bool {
        // Whoever does not want to know any more has dropped the receiver.
        match (self, reply) {
            (Self::Add(waiter), Reply::Add(answer)) => drop(waiter.send(answer)),
            (Self::Fence(waiter), Reply::Fence(answer)) => drop(waiter.send(answer)),
            (Self::Read(waiter), Reply::Read(answer)) => drop(waiter.send(answer)),
            (Self::ReadLac(waiter), Reply::ReadLac(answer)) => drop(waiter.send(answer)),
            (Self::List(waiter), Reply::List(answer)) => drop(waiter.send(answer)),
            (other, _) => {
                other.tell_unknown(Unknown::Disconnected);
                return false;
            }
        }
        true
    }

    fn tell_unknown(self, why: Unknown) {
        match self {
            Self::Add(waiter) => drop(waiter.send(AddAnswer::Unknown(why))),
            Self::Fence(waiter) => drop(waiter.send(FenceAnswer::Unknown(why))),
            Self::Read(waiter) => drop(waiter.send(ReadAnswer::unknown(why))),
            Self::ReadLac(waiter) => drop(waiter.send(LacAnswer::Unknown(why))),
            Self::List(waiter) => drop(waiter.send(ListAnswer::Unknown(why))),
            Self::Nobody => {}
        }
    }
}

#[derive(Debug)]
struct Call {
    /// The incarnation the request names; usually, not always, that of the connection.
    to: Incarnation,
    /// None once it is on its way.
    request: Option<Request>,
    waiter: Waiter,
    deadline: Instant,
    bytes: usize,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Calls {
    bytes_max: usize,
    bytes: usize,
    next_id: u64,
    calls: BTreeMap<u64, Call>,
    /// Not sent yet, in the order of the calls; some may have expired meanwhile.
    queue: VecDeque<u64>,
    deadlines: BTreeSet<(Instant, u64)>,
    /// Since when something waits without a break.
    waiting_since: Option<Instant>,
}

/// How a pushed request fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// No room; it was not taken.
    Full,
    /// Taken; `wake` whoever sends, if it may be waiting for nothing, or for a later deadline.
    Taken { wake: bool },
}

impl Calls {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            bytes: 0,
            next_id: 1,
            calls: BTreeMap::new(),
            queue: VecDeque::new(),
            deadlines: BTreeSet::new(),
            waiting_since: None,
        }
    }

    /// Takes a request up. Adds fill at most 15/16 of the room: what fences and reads is small, and adds that pile up must
    /// not keep a recovery out.
    pub(super) fn push(&mut self, request: Request, waiter: Waiter, now: Instant) -> Pushed {
        let (to, deadline, payload) = match &request {
            Request::Add(add) => (add.to, add.deadline, add.entry.encoded_len()),
            Request::Fence(fence) => (fence.to, fence.deadline, 0),
            Request::Read(read) => (read.to, read.deadline, 0),
            Request::ReadLac { to, deadline, .. } | Request::List { to, deadline, .. } => {
                (*to, *deadline, 0)
            }
            Request::WriteLac { to, .. } => (*to, now + WRITE_LAC_FOR, 0),
        };
        let is_add = matches!(request, Request::Add(_));
        let limit = self.bytes_max - if is_add { self.bytes_max / 16 } else { 0 };
        let bytes = payload + CALL_BYTES;
        if self.bytes + bytes > limit && self.bytes > 0 {
            return Pushed::Full;
        }
        self.bytes += bytes;
        let id = self.next_id;
        self.next_id += 1;
        let earlier = self.deadlines.first().is_none_or(|(first, _)| deadline < *first);
        let wake = self.queue.is_empty() || earlier;
        self.deadlines.insert((deadline, id));
        self.queue.push_back(id);
        self.calls.insert(id, Call { to, request: Some(request), waiter, deadline, bytes });
        self.waiting_since.get_or_insert(now);
        Pushed::Taken { wake }
    }

    /// The next request to send, with its id.
    pub(super) fn next(&mut self) -> Option<(u64, Request)> {
        while let Some(id) = self.queue.pop_front() {
            let Some(call) = self.calls.get_mut(&id) else { continue }; // expired
            let Some(request) = call.request.take() else { continue };
            if matches!(call.waiter, Waiter::Nobody) {
                self.remove(id);
            }
            return Some((id, request));
        }
        None
    }

    /// An answer came; false if it answers another kind of request. One to a request that expired is late: ignored.
    pub(super) fn answer(&mut self, id: u64, reply: Reply) -> bool {
        self.remove(id).is_none_or(|call| call.waiter.tell(reply))
    }

    /// Whether the request that waits under this id names the incarnation.
    pub(super) fn is_for(&self, id: u64, incarnation: Incarnation) -> bool {
        self.calls.get(&id).is_some_and(|call| call.to == incarnation)
    }

    /// This one cannot be sent.
    pub(super) fn fail(&mut self, id: u64, why: Unknown) {
        if let Some(call) = self.remove(id) {
            call.waiter.tell_unknown(why);
        }
    }

    /// Tells those whose deadline is over that nothing is known.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((deadline, id)) = self.deadlines.first().copied() {
            if deadline > now {
                break;
            }
            self.fail(id, Unknown::Timeout);
        }
    }

    /// Tells everybody that nothing is known.
    pub(super) fn fail_all(&mut self, why: &Unknown) {
        for (_, call) in std::mem::take(&mut self.calls) {
            call.waiter.tell_unknown(why.clone());
        }
        *self = Self { next_id: self.next_id, ..Self::new(self.bytes_max) };
    }

    /// When [`Self::expire`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Since when something waits without a break; none if nothing does.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.waiting_since
    }

    fn remove(&mut self, id: u64) -> Option<Call> {
        let call = self.calls.remove(&id)?;
        self.deadlines.remove(&(call.deadline, id));
        self.bytes -= call.bytes;
        if self.calls.is_empty() {
            self.waiting_since = None;
            self.queue.clear();
        }
        Some(call)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use geminga_proto::ids::{EntryId, LedgerId};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        bookie_rpc::AddRequest,
        entry::{Entry, Payload},
    };

    fn add(entry: u64, bytes: usize, deadline: Instant) -> Request {
        let payload = Payload::from(bytes::Bytes::from(vec![0u8; bytes]));
        let entry = Entry::seal(LedgerId(1), EntryId(entry), None, 0, payload);
        Request::Add(AddRequest { to: Incarnation(1), entry, recovery: false, deadline })
    }

    proptest! {
        /// Whatever happens in whatever order: every call is told exactly one thing, by its deadline at the latest; requests
        /// leave in the order of the calls; the charge is what waits.
        #[test]
        fn every_call_is_told_once_and_leaves_in_order(steps in prop::collection::vec((0u8..6, 0u64..40), 1..80)) {
            let mut now = Instant::now();
            let mut calls = Calls::new(4_000);
            let mut waiting = Vec::new();
            let (mut sent, mut pushed) = (Vec::new(), 0);
            for (step, n) in steps {
                match step {
                    0 | 1 => {
                        let deadline = now + Duration::from_millis(n);
                        let (tell, told) = oneshot::channel();
                        let request = add(pushed, n as usize * 10, deadline);
                        match calls.push(request, Waiter::Add(tell), now) {
                            Pushed::Taken { .. } => waiting.push((deadline, told)),
                            Pushed::Full => prop_assert!(calls.bytes + n as usize * 10 > 3_000),
                        }
                        pushed += 1;
                    }
                    2 => if let Some((id, Request::Add(request))) = calls.next() {
                        prop_assert!(sent.last().is_none_or(|(_, last)| *last < request.entry.id.0));
                        sent.push((id, request.entry.id.0));
                    },
                    3 if !sent.is_empty() => {
                        let (id, _) = sent[n as usize % sent.len()];
                        prop_assert!(calls.answer(id, Reply::Add(AddAnswer::Ok)), "late ones are ignored");
                    }
                    4 => {
                        now += Duration::from_millis(n);
                        calls.expire(now);
                    }
                    5 if n == 0 => calls.fail_all(&Unknown::Disconnected),
                    _ => {}
                }
                for (deadline, told) in &mut waiting {
                    let answer = told.now_or_never();
                    prop_assert!(!matches!(answer, Some(Err(_))), "nobody is dropped without a word");
                    if answer.is_some() {
                        let (_, never) = oneshot::channel();
                        *told = never;
                        *deadline = now + Duration::from_secs(3_600);
                    } else {
                        prop_assert!(*deadline > now || step != 4, "told by the deadline");
                    }
                }
                waiting.retain(|(deadline, _)| *deadline < now + Duration::from_secs(3_000));
                prop_assert_eq!(waiting.len(), calls.calls.len());
                prop_assert_eq!(calls.bytes, calls.calls.values().map(|call| call.bytes).sum::<usize>());
                prop_assert_eq!(calls.deadlines.len(), calls.calls.len());
                prop_assert_eq!(calls.waiting_since().is_some(), !calls.calls.is_empty());
            }
        }
    }

    #[test]
    fn an_answer_of_another_kind_is_noticed() {
        let now = Instant::now();
        let mut calls = Calls::new(4_000);
        let (tell, told) = oneshot::channel();
        calls.push(add(0, 1, now), Waiter::Add(tell), now);
        let (id, _) = calls.next().expect("queued");
        assert!(!calls.answer(id, Reply::ReadLac(LacAnswer::Known(None))));
        let told = told.now_or_never().expect("told").expect("told");
        assert_eq!(told, AddAnswer::Unknown(Unknown::Disconnected));
    }

    #[test]
    fn adds_that_pile_up_leave_room_for_a_fence() {
        let now = Instant::now();
        let mut calls = Calls::new(100_000);
        while calls.push(add(0, 1_000, now), Waiter::Nobody, now) != Pushed::Full {}
        let lac = Request::ReadLac { to: Incarnation(1), ledger: LedgerId(1), deadline: now };
        assert!(matches!(calls.push(lac, Waiter::Nobody, now), Pushed::Taken { .. }));
    }
}
