//! Bookies in this process, found by incarnation. A bookie may come and go behind the same handle.

use std::{collections::BTreeMap, sync::Arc};

use futures::FutureExt;
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    AddAnswer, AddRequest, Answer, BookieRpc, Bookies, EntryRange, FenceAnswer, FenceRequest,
    LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown,
};

/// The bookies of one process. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Loopback {
    attached: Arc<Mutex<BTreeMap<Incarnation, Attached>>>,
}

#[derive(Clone, Debug)]
struct Attached {
    bookie: Arc<dyn BookieRpc>,
    /// Cancelled when it goes: what waits for an answer learns at once, as by a connection reset.
    gone: CancellationToken,
}

/// What [`Loopback`] hands out: looks the bookie up at every call.
#[derive(Clone, Debug)]
struct Handle {
    loopback: Loopback,
    to: Incarnation,
}

impl Loopback {
    /// No bookies yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on requests to `incarnation` reach `bookie`; one attached before is detached.
    pub fn attach(&self, incarnation: Incarnation, bookie: Arc<dyn BookieRpc>) {
        self.detach(incarnation);
        let attached = Attached { bookie, gone: CancellationToken::new() };
        self.attached.lock().insert(incarnation, attached);
    }

    /// From now on requests to `incarnation` are answered `Unknown(Disconnected)`, those under way too.
    pub fn detach(&self, incarnation: Incarnation) {
        if let Some(attached) = self.attached.lock().remove(&incarnation) {
            attached.gone.cancel();
        }
    }

    fn find(&self, incarnation: Incarnation) -> Option<Attached> {
        self.attached.lock().get(&incarnation).cloned()
    }
}

impl Bookies for Loopback {
    fn bookie(&self, incarnation: Incarnation) -> Arc<dyn BookieRpc> {
        Arc::new(Handle { loopback: self.clone(), to: incarnation })
    }
}

impl Handle {
    /// Sends now, in the caller's order; the future ends when the bookie answers, by its deadline at the latest as for
    /// every form, or when the bookie goes. One more timer here would be paid for by every add.
    fn call<T: Send + 'static>(
        &self,
        unknown: fn(Unknown) -> T,
        send: impl FnOnce(&dyn BookieRpc) -> Answer<T>,
    ) -> Answer<T> {
        let Some(Attached { bookie, gone }) = self.loopback.find(self.to) else {
            return std::future::ready(unknown(Unknown::Disconnected)).boxed();
        };
        let mut answer = send(&*bookie);
        if let Some(ready) = (&mut answer).now_or_never() {
            return std::future::ready(ready).boxed();
        }
        async move {
            tokio::select! {
                biased;
                answer = answer => answer,
                () = gone.cancelled() => unknown(Unknown::Disconnected),
            }
        }
        .boxed()
    }
}

impl BookieRpc for Handle {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        self.call(AddAnswer::Unknown, |bookie| bookie.add(request))
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        self.call(|_| (), |bookie| bookie.write_lac(to, ledger, lac))
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.call(FenceAnswer::Unknown, |bookie| bookie.fence(request))
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        self.call(ReadAnswer::unknown, |bookie| bookie.read(request))
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        self.call(LacAnswer::Unknown, |bookie| bookie.read_lac(to, ledger, deadline))
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer> {
        self.call(ListAnswer::Unknown, |bookie| bookie.list(to, ledger, range, deadline))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bookie_rpc::{memory::MemoryBookie, scripted::ScriptedBookies};

    #[tokio::test(start_paused = true)]
    async fn a_bookie_that_goes_answers_unknown_and_may_come_back_behind_the_same_handle() {
        let loopback = Loopback::new();
        let one = Incarnation(1);
        let handle = loopback.bookie(one);
        let deadline = Instant::now() + Duration::from_secs(1);
        let lac = || handle.read_lac(one, LedgerId(1), deadline);
        assert_eq!(lac().await, LacAnswer::Unknown(Unknown::Disconnected));
        loopback.attach(one, Arc::new(MemoryBookie::new(one)));
        assert_eq!(lac().await, LacAnswer::Known(None));
        loopback.detach(one);
        assert_eq!(lac().await, LacAnswer::Unknown(Unknown::Disconnected));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_bookie_is_answered_for_at_the_deadline_and_at_once_when_it_goes() {
        let loopback = Loopback::new();
        let one = Incarnation(1);
        let (silent, _calls) = ScriptedBookies::new();
        loopback.attach(one, silent.bookie(one));
        let handle = loopback.bookie(one);
        let start = Instant::now();
        let deadline = start + Duration::from_secs(3);
        assert_eq!(
            handle.read_lac(one, LedgerId(1), deadline).await,
            LacAnswer::Unknown(Unknown::Timeout)
        );
        assert_eq!(Instant::now(), deadline);
        let waiting = handle.read_lac(one, LedgerId(1), deadline + Duration::from_secs(9));
        loopback.detach(one);
        assert_eq!(waiting.await, LacAnswer::Unknown(Unknown::Disconnected));
        assert_eq!(Instant::now(), deadline);
    }
}
