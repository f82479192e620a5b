//! Bookies whose every answer, and its moment, the test chooses.

use std::{fmt, sync::Arc};

use futures::FutureExt;
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout_at},
};

use super::{
    AddAnswer, AddRequest, Answer, BookieRpc, Bookies, EntryRange, FenceAnswer, FenceRequest,
    LacAnswer, ListAnswer, ReadAnswer, ReadRequest, Unknown,
};

/// Requests that nobody looked at yet; past that a request is answered `Busy`.
const CALLS_MAX: usize = 10_000;

/// A request as it arrived, with the place for its answer. Dropping the reply is `Unknown(Disconnected)`.
#[derive(Debug)]
pub enum Call {
    Add(AddRequest, Reply<AddAnswer>),
    WriteLac { to: Incarnation, ledger: LedgerId, lac: EntryId },
    Fence(FenceRequest, Reply<FenceAnswer>),
    Read(ReadRequest, Reply<ReadAnswer>),
    ReadLac { to: Incarnation, ledger: LedgerId, reply: Reply<LacAnswer> },
    List { to: Incarnation, ledger: LedgerId, range: EntryRange, reply: Reply<ListAnswer> },
}

impl Call {
    /// The incarnation it is meant for.
    #[must_use]
    pub fn to(&self) -> Incarnation {
        match self {
            Self::Add(request, _) => request.to,
            Self::Fence(request, _) => request.to,
            Self::Read(request, _) => request.to,
            Self::WriteLac { to, .. } | Self::ReadLac { to, .. } | Self::List { to, .. } => *to,
        }
    }

    /// Lets a real bookie carry the request out, and answers with what it says.
    pub async fn pass_on(self, bookie: &dyn BookieRpc) {
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        match self {
            Self::Add(request, reply) => reply.send(bookie.add(request).await),
            Self::WriteLac { to, ledger, lac } => bookie.write_lac(to, ledger, lac).await,
            Self::Fence(request, reply) => reply.send(bookie.fence(request).await),
            Self::Read(request, reply) => reply.send(bookie.read(request).await),
            Self::ReadLac { to, ledger, reply } => {
                reply.send(bookie.read_lac(to, ledger, deadline).await);
            }
            Self::List { to, ledger, range, reply } => {
                reply.send(bookie.list(to, ledger, range, deadline).await);
            }
        }
    }
}

/// The place for one answer.
pub struct Reply<T>(oneshot::Sender<T>);

impl<T> Reply<T> {
    /// Answers; nothing happens if the asker went away.
    pub fn send(self, answer: T) {
        drop(self.0.send(answer));
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

/// Bookies of any incarnation; all their requests come out of one receiver, in the order they were made.
#[derive(Clone, Debug)]
pub struct ScriptedBookies {
    calls: mpsc::Sender<Call>,
}

impl ScriptedBookies {
    /// The bookies, and where their requests come out.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Call>) {
        let (calls, receiver) = mpsc::channel(CALLS_MAX);
        (Self { calls }, receiver)
    }

    fn ask<T: Send + 'static>(
        &self,
        deadline: Instant,
        unknown: fn(Unknown) -> T,
        call: impl FnOnce(Reply<T>) -> Call,
    ) -> Answer<T> {
        let (reply, answer) = oneshot::channel();
        if self.calls.try_send(call(Reply(reply))).is_err() {
            return std::future::ready(unknown(Unknown::Busy)).boxed();
        }
        async move {
            match timeout_at(deadline, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => unknown(Unknown::Disconnected),
                Err(_) => unknown(Unknown::Timeout),
            }
        }
        .boxed()
    }
}

impl Bookies for ScriptedBookies {
    fn bookie(&self, _incarnation: Incarnation) -> Arc<dyn BookieRpc> {
        Arc::new(self.clone())
    }
}

impl BookieRpc for ScriptedBookies {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        self.ask(request.deadline, AddAnswer::Unknown, |reply| Call::Add(request, reply))
    }

    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        drop(self.calls.try_send(Call::WriteLac { to, ledger, lac }));
        std::future::ready(()).boxed()
    }

    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.ask(request.deadline, FenceAnswer::Unknown, |reply| Call::Fence(request, reply))
    }

    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        self.ask(request.deadline, ReadAnswer::unknown, |reply| Call::Read(request, reply))
    }

    fn read_lac(&self, to: Incarnation, ledger: LedgerId, deadline: Instant) -> Answer<LacAnswer> {
        self.ask(deadline, LacAnswer::Unknown, |reply| Call::ReadLac { to, ledger, reply })
    }

    fn list(
        &self,
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    ) -> Answer<ListAnswer> {
        self.ask(deadline, ListAnswer::Unknown, |reply| Call::List { to, ledger, range, reply })
    }
}
