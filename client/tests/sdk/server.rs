//! A server of one topic without a will of its own: each stream that a client opens is handed to the test.

use std::{future::Future, time::Duration};

use futures::StreamExt;
use geminga_client::{Client, Reason};
use geminga_proto::{
    key_hash::equal_ranges,
    reason::DOMAIN,
    v1::{
        Batch, BatchRefused, Claim, ConsumeFrame, ConsumeOpened, ConsumeReply, Delivery,
        ExplainRequest, ExplainResponse, GoAway, KeyRange, Layout, OffsetRange, OpenConsume,
        OpenPublish, OwnerHint, PeekRequest, PeekResponse, PublishCredit, PublishFrame,
        PublishOpened, PublishReply, PublishRequest, PublishResponse, PullRequest, PullResponse,
        Receipt, Revoked, SeekRequest, SeekResponse, SegmentInfo, Settle, SettleRefused,
        SettleRequest, SettleResponse, Settled, WatchReply, WatchRequest, WatchTopicsReply,
        WatchTopicsRequest, consume_frame, consume_reply,
        discovery_server::{Discovery, DiscoveryServer},
        publish_frame, publish_reply,
        publisher_server::{Publisher, PublisherServer},
        subscriber_server::{Subscriber, SubscriberServer},
    },
};
use geminga_runtime::{random::Random, tasks::Tasks};
use tokio::{
    net::TcpListener,
    sync::{Mutex, mpsc, oneshot},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport};
use tonic_types::{ErrorDetails, StatusExt};

/// What no test waits for: it ends a hanging one.
const HANGS: Duration = Duration::from_secs(20);

type Out<T> = mpsc::Sender<Result<T, Status>>;

/// Watches over a step of a test.
pub(crate) async fn soon<T>(step: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANGS, step).await.expect("the step hangs")
}

/// Lets time pass at once: every timer that is due fires. Connections go on as they are.
pub(crate) async fn jump(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// A status with the details of a refusal.
pub(crate) fn refusal(reason: Reason, owner: Option<&str>) -> Status {
    let mut details = ErrorDetails::new();
    let owner = owner.unwrap_or_default(); // as a server that knows none
    details.set_error_info(
        reason.as_str(),
        DOMAIN,
        [("owner_address".to_owned(), owner.to_owned())],
    );
    details.set_retry_info(Some(Duration::from_millis(1)));
    Status::with_error_details(reason.code(), "as the test says", details)
}

pub(crate) struct Server {
    pub(crate) address: String,
    publishes: Mutex<mpsc::Receiver<PublishCall>>,
    consumes: Mutex<mpsc::Receiver<ConsumeCall>>,
    watches: Mutex<mpsc::Receiver<Out<WatchReply>>>,
    topics: Mutex<mpsc::Receiver<TopicsCall>>,
    calls: Mutex<mpsc::Receiver<Call>>,
    tasks: Tasks,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.abort();
    }
}

impl Server {
    /// A server of one segment, 0, that names no owner.
    pub(crate) async fn start() -> Self {
        Self::with_layout(1, None).await
    }

    pub(crate) async fn with_layout(segments: u32, owner: Option<&str>) -> Self {
        Self::at("127.0.0.1:0", segments, owner).await
    }

    pub(crate) async fn at(address: &str, segments: u32, owner: Option<&str>) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port is free");
        let address = listener.local_addr().expect("it listens").to_string();
        let (publishes_in, publishes) = mpsc::channel(64);
        let (consumes_in, consumes) = mpsc::channel(64);
        let (watches_in, watches) = mpsc::channel(64);
        let (topics_in, topics) = mpsc::channel(64);
        let (calls_in, calls) = mpsc::channel(64);
        let layout = layout(segments, owner);
        let script = Script { publishes_in, consumes_in, watches_in, topics_in, calls_in, layout };
        let incoming = TcpListenerStream::new(listener).map(|connection| {
            connection.and_then(|connection| connection.set_nodelay(true).map(|()| connection))
        });
        let serve = transport::Server::builder()
            .add_service(PublisherServer::new(script.clone()).max_decoding_message_size(16 << 20))
            .add_service(SubscriberServer::new(script.clone()).max_encoding_message_size(64 << 20))
            .add_service(DiscoveryServer::new(script))
            .serve_with_incoming(incoming);
        let tasks = Tasks::new("scripted server");
        tasks.spawn("serve", async move { serve.await.expect("it serves") });
        let (publishes, consumes) = (Mutex::new(publishes), Mutex::new(consumes));
        let (watches, calls) = (Mutex::new(watches), Mutex::new(calls));
        let topics = Mutex::new(topics);
        Self { address, publishes, consumes, watches, topics, calls, tasks }
    }

    pub(crate) async fn client(&self) -> Client {
        let builder = Client::builder().server(&self.address).random(Random::from_seed(1));
        builder.build().await.expect("a good address")
    }

    /// The next publish stream that a client opens.
    pub(crate) async fn publish(&self) -> PublishCall {
        let mut call =
            soon(async { self.publishes.lock().await.recv().await }).await.expect("it listens");
        call.open =
            match soon(call.frames.message()).await.expect("a frame").expect("a frame").frame {
                Some(publish_frame::Frame::Open(open)) => open,
                other => panic!("first comes the open, not {other:?}"),
            };
        call
    }

    /// The next publish stream, opened with everything up to `persisted` stored, and ample credit.
    pub(crate) async fn publish_from(&self, persisted: u64) -> PublishCall {
        let call = self.publish().await;
        call.opened(persisted, 1_000, 1 << 30).await;
        call
    }

    /// The next consume stream that a client opens.
    pub(crate) async fn consume(&self) -> ConsumeCall {
        let mut call =
            soon(async { self.consumes.lock().await.recv().await }).await.expect("it listens");
        call.open =
            match soon(call.frames.message()).await.expect("a frame").expect("a frame").frame {
                Some(consume_frame::Frame::Open(open)) => open,
                other => panic!("first comes the open, not {other:?}"),
            };
        call
    }

    /// The next consume stream, opened at this mark-delete.
    pub(crate) async fn consume_from(&self, mark_delete_next: u64) -> ConsumeCall {
        let call = self.consume().await;
        call.opened(mark_delete_next).await;
        call
    }

    /// The next single call.
    pub(crate) async fn call(&self) -> Call {
        soon(async { self.calls.lock().await.recv().await }).await.expect("it listens")
    }

    /// The next watch of a namespace.
    pub(crate) async fn topics(&self) -> TopicsCall {
        soon(async { self.topics.lock().await.recv().await }).await.expect("it listens")
    }

    /// The next layout watch, answered already.
    pub(crate) async fn watch(&self) -> Out<WatchReply> {
        soon(async { self.watches.lock().await.recv().await }).await.expect("it listens")
    }
}

fn layout(segments: u32, owner: Option<&str>) -> WatchReply {
    let infos = (0..).zip(equal_ranges(segments));
    let infos = infos.map(|(segment, (first, last))| SegmentInfo {
        segment,
        keys: Some(KeyRange { first, last }),
    });
    let owners = (0..segments).filter_map(|segment| {
        owner.map(|address| OwnerHint { segment, address: address.to_owned(), layout_epoch: 1 })
    });
    let (segments, owners) = (infos.collect(), owners.collect());
    WatchReply { topic_id: 1, layout: Some(Layout { epoch: 1, segments }), owners }
}

/// A watch of a namespace in the test's hands. Dropping it ends it.
pub(crate) struct TopicsCall {
    pub(crate) request: WatchTopicsRequest,
    replies: Out<WatchTopicsReply>,
}

impl TopicsCall {
    pub(crate) async fn reply(&self, reply: WatchTopicsReply) {
        let _ = self.replies.send(Ok(reply)).await; // the client may be gone
    }

    /// Ends the stream with this status.
    pub(crate) async fn end(self, status: Status) {
        let _ = self.replies.send(Err(status)).await; // the client may be gone
    }
}

/// A publish stream in the test's hands. Dropping it ends it.
pub(crate) struct PublishCall {
    pub(crate) open: OpenPublish,
    frames: Streaming<PublishFrame>,
    replies: Out<PublishReply>,
}

impl PublishCall {
    pub(crate) async fn reply(&self, reply: publish_reply::Reply) {
        let _ = self.replies.send(Ok(PublishReply { reply: Some(reply) })).await; // the client may be gone
    }

    /// Ends the stream with this status.
    pub(crate) async fn end(self, status: Status) {
        let _ = self.replies.send(Err(status)).await; // the client may be gone
    }

    pub(crate) async fn opened(&self, persisted: u64, batches: u64, bytes: u64) {
        let token = match self.open.resume_token.is_empty() {
            true => format!("session {}", self.open.stream_number).into(),
            false => self.open.resume_token.clone(),
        };
        self.reply(publish_reply::Reply::Opened(PublishOpened {
            resume_token: token,
            last_persisted_sequence: persisted,
            granted_batches: batches,
            granted_bytes: bytes,
            ..PublishOpened::default()
        }))
        .await;
    }

    pub(crate) async fn batch(&mut self) -> Batch {
        soon(self.next()).await.expect("a batch, not the end")
    }

    /// The next batch; none when the client has left.
    pub(crate) async fn next(&mut self) -> Option<Batch> {
        loop {
            match self.frames.message().await.ok().flatten()?.frame {
                Some(publish_frame::Frame::Batch(batch)) => return Some(batch),
                Some(publish_frame::Frame::Ping(_)) => {}
                other => panic!("batches come on an open stream, not {other:?}"),
            }
        }
    }

    /// The next frame is a ping.
    pub(crate) async fn ping(&mut self) {
        let frame = soon(self.frames.message()).await.ok().flatten().and_then(|frame| frame.frame);
        assert!(matches!(frame, Some(publish_frame::Frame::Ping(_))), "a ping, not {frame:?}");
    }

    /// Nothing came until now: a client that would send does so at once.
    pub(crate) async fn nothing_comes(&mut self) {
        let frame = tokio::time::timeout(Duration::from_millis(30), self.frames.message()).await;
        assert!(frame.is_err(), "nothing should come, not {frame:?}");
    }

    pub(crate) async fn receipt(&self, batch: &Batch, base_offset: u64) {
        self.reply(publish_reply::Reply::Receipt(Receipt {
            hi_sequence: batch.hi_sequence,
            base_offset,
            count: batch.count,
            level: 1,
            epoch: 7,
            duplicate: false,
        }))
        .await;
    }

    pub(crate) async fn refuse(&self, batch: &Batch, reason: Reason, pushed_sequence: u64) {
        self.reply(publish_reply::Reply::Refused(BatchRefused {
            hi_sequence: batch.hi_sequence,
            reason: reason.as_str().to_owned(),
            message: "as the test says".to_owned(),
            retry_safe: true,
            pushed_sequence,
        }))
        .await;
    }

    pub(crate) async fn credit(&self, granted_batches: u64, granted_bytes: u64) {
        self.reply(publish_reply::Reply::Credit(PublishCredit { granted_batches, granted_bytes }))
            .await;
    }

    pub(crate) async fn go_away(&self, owner: Option<&str>) {
        self.reply(publish_reply::Reply::GoAway(go_away(owner))).await;
    }
}

pub(crate) fn go_away(owner: Option<&str>) -> GoAway {
    let owner =
        owner.map(|address| OwnerHint { segment: 0, address: address.to_owned(), layout_epoch: 1 });
    GoAway { drain_by_ms: 5_000, owner }
}

/// A consume stream in the test's hands. Dropping it ends it.
pub(crate) struct ConsumeCall {
    pub(crate) open: OpenConsume,
    frames: Streaming<ConsumeFrame>,
    replies: Out<ConsumeReply>,
}

impl ConsumeCall {
    pub(crate) async fn reply(&self, reply: consume_reply::Reply) {
        let _ = self.replies.send(Ok(ConsumeReply { reply: Some(reply) })).await; // the client may be gone
    }

    /// Ends the stream with this status.
    pub(crate) async fn end(self, status: Status) {
        let _ = self.replies.send(Err(status)).await; // the client may be gone
    }

    pub(crate) async fn opened(&self, mark_delete_next: u64) {
        self.opened_granting(mark_delete_next, Vec::new()).await;
    }

    pub(crate) async fn opened_granting(&self, mark_delete_next: u64, granted: Vec<Claim>) {
        self.opened_as(ConsumeOpened { mark_delete_next, granted, ..ConsumeOpened::default() })
            .await;
    }

    pub(crate) async fn opened_as(&self, opened: ConsumeOpened) {
        self.reply(consume_reply::Reply::Opened(opened)).await;
    }

    /// Opened, with all that was claimed under this handle.
    pub(crate) async fn opened_granting_all(&self, mark_delete_next: u64, handle: &str) {
        let claims = self.open.claims.clone();
        let new = |claim| Claim { handle: handle.to_owned().into(), ..claim };
        self.opened_granting(mark_delete_next, claims.into_iter().map(new).collect()).await;
    }

    /// The next frame; none when the client has left.
    pub(crate) async fn next(&mut self) -> Option<consume_frame::Frame> {
        self.frames.message().await.ok().flatten()?.frame
    }

    /// Nothing came until now: a client that would send does so at once.
    pub(crate) async fn nothing_comes(&mut self) {
        let frame = tokio::time::timeout(Duration::from_millis(30), self.frames.message()).await;
        assert!(frame.is_err(), "nothing should come, not {frame:?}");
    }

    /// The next credit, as (messages, bytes).
    pub(crate) async fn credit(&mut self) -> (u64, u64) {
        match soon(self.next()).await {
            Some(consume_frame::Frame::Credit(credit)) => (credit.messages, credit.bytes),
            other => panic!("credit, not {other:?}"),
        }
    }

    /// The next settle, past any credit.
    pub(crate) async fn settle(&mut self) -> Settle {
        loop {
            match soon(self.next()).await {
                Some(consume_frame::Frame::Settle(settle)) => return settle,
                Some(consume_frame::Frame::Credit(_) | consume_frame::Frame::Ping(_)) => {}
                other => panic!("a settle, not {other:?}"),
            }
        }
    }

    pub(crate) async fn deliver(&self, delivery: Delivery) {
        self.reply(consume_reply::Reply::Delivery(delivery)).await;
    }

    pub(crate) async fn settled(&self, settle: &Settle, mark_delete_next: u64) {
        self.reply(consume_reply::Reply::Settled(Settled {
            token: settle.token,
            mark_delete_next,
        }))
        .await;
    }

    pub(crate) async fn revoke(&self, first: u64, last: u64, handle: &str) {
        let ranges = vec![OffsetRange { first, last }];
        let handle = handle.to_owned().into();
        self.reply(consume_reply::Reply::Revoked(Revoked { ranges, handle })).await;
    }

    pub(crate) async fn refuse(&self, settle: &Settle, reason: Reason) {
        self.reply(consume_reply::Reply::SettleRefused(SettleRefused {
            token: settle.token,
            reason: reason.as_str().to_owned(),
            message: "as the test says".to_owned(),
            retry_safe: true,
        }))
        .await;
    }
}

/// A batch of messages whose value is their offset, all of them to be handed out.
pub(crate) fn delivery(base_offset: u64, count: u32, handle: &str) -> Delivery {
    let mut payload = Vec::new();
    for offset in base_offset..base_offset + u64::from(count) {
        let value = offset.to_string();
        payload.extend([10, value.len() as u8 + 2, 18, value.len() as u8]);
        payload.extend(value.bytes());
    }
    Delivery {
        base_offset,
        count,
        format: 1,
        uncompressed_size: payload.len() as u32,
        deliver: vec![OffsetRange { first: base_offset, last: base_offset + u64::from(count) - 1 }],
        attempt: 1,
        handle: handle.to_owned().into(),
        payload: payload.into(),
        ..Delivery::default()
    }
}

#[derive(Clone)]
struct Script {
    publishes_in: mpsc::Sender<PublishCall>,
    consumes_in: mpsc::Sender<ConsumeCall>,
    watches_in: mpsc::Sender<Out<WatchReply>>,
    topics_in: mpsc::Sender<TopicsCall>,
    calls_in: mpsc::Sender<Call>,
    layout: WatchReply,
}

fn over<T>(_: T) -> Status {
    Status::unavailable("the test is over")
}

#[tonic::async_trait]
impl Publisher for Script {
    type PublishStreamStream = ReceiverStream<Result<PublishReply, Status>>;

    async fn publish(
        &self,
        _: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        Err(Status::unimplemented("the SDK publishes by streams"))
    }

    async fn publish_stream(
        &self,
        request: Request<Streaming<PublishFrame>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        let (replies, outgoing) = mpsc::channel(1_000);
        let call =
            PublishCall { open: OpenPublish::default(), frames: request.into_inner(), replies };
        self.publishes_in.send(call).await.map_err(over)?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

#[tonic::async_trait]
impl Subscriber for Script {
    type ConsumeStream = ReceiverStream<Result<ConsumeReply, Status>>;

    async fn consume(
        &self,
        request: Request<Streaming<ConsumeFrame>>,
    ) -> Result<Response<Self::ConsumeStream>, Status> {
        let (replies, outgoing) = mpsc::channel(1_000);
        let call =
            ConsumeCall { open: OpenConsume::default(), frames: request.into_inner(), replies };
        self.consumes_in.send(call).await.map_err(over)?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn settle(
        &self,
        request: Request<SettleRequest>,
    ) -> Result<Response<SettleResponse>, Status> {
        match self.ask(Asked::Settle(request.into_inner())).await? {
            Answer::Settle(answer) => Ok(Response::new(answer)),
            other => panic!("{other:?} is no answer to a settle"),
        }
    }

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<PullResponse>, Status> {
        match self.ask(Asked::Pull(request.into_inner())).await? {
            Answer::Pull(answer) => Ok(Response::new(answer)),
            other => panic!("{other:?} is no answer to a pull"),
        }
    }

    async fn seek(&self, request: Request<SeekRequest>) -> Result<Response<SeekResponse>, Status> {
        match self.ask(Asked::Seek(request.into_inner())).await? {
            Answer::Seek(answer) => Ok(Response::new(answer)),
            other => panic!("{other:?} is no answer to a seek"),
        }
    }

    async fn explain(
        &self,
        request: Request<ExplainRequest>,
    ) -> Result<Response<ExplainResponse>, Status> {
        match self.ask(Asked::Explain(request.into_inner())).await? {
            Answer::Explain(answer) => Ok(Response::new(answer)),
            other => panic!("{other:?} is no answer to an explain"),
        }
    }

    async fn peek(&self, request: Request<PeekRequest>) -> Result<Response<PeekResponse>, Status> {
        match self.ask(Asked::Peek(request.into_inner())).await? {
            Answer::Peek(answer) => Ok(Response::new(answer)),
            other => panic!("{other:?} is no answer to a peek"),
        }
    }
}

/// A single call in the test's hands.
#[derive(Debug)]
pub(crate) enum Asked {
    Settle(SettleRequest),
    Pull(PullRequest),
    Seek(SeekRequest),
    Explain(ExplainRequest),
    Peek(PeekRequest),
}

#[derive(Debug)]
pub(crate) enum Answer {
    Settle(SettleResponse),
    Pull(PullResponse),
    Seek(SeekResponse),
    Explain(ExplainResponse),
    Peek(PeekResponse),
}

pub(crate) type Call = (Asked, oneshot::Sender<Result<Answer, Status>>);

impl Script {
    async fn ask(&self, asked: Asked) -> Result<Answer, Status> {
        let (answer, answered) = oneshot::channel();
        self.calls_in.send((asked, answer)).await.map_err(over)?;
        answered.await.map_err(over)?
    }
}

#[tonic::async_trait]
impl Discovery for Script {
    type WatchStream = ReceiverStream<Result<WatchReply, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (replies, outgoing) = mpsc::channel(10);
        replies.send(Ok(self.layout.clone())).await.map_err(over)?;
        self.watches_in.send(replies).await.map_err(over)?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    type WatchTopicsStream = ReceiverStream<Result<WatchTopicsReply, Status>>;

    async fn watch_topics(
        &self,
        request: Request<WatchTopicsRequest>,
    ) -> Result<Response<Self::WatchTopicsStream>, Status> {
        let (replies, outgoing) = mpsc::channel(10);
        let call = TopicsCall { request: request.into_inner(), replies };
        self.topics_in.send(call).await.map_err(over)?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
