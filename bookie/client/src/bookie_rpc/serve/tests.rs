use std::sync::Arc;

use bytes::{Buf, Bytes};
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::mpsc,
    time::Instant,
};

use super::{connection::Connection, *};
use crate::{
    bookie_rpc::{
        AddAnswer, AddRequest, Answer, Bookies, EntryRange, FenceAnswer, FenceRequest, LacAnswer,
        ListAnswer, ReadAnswer, ReadRequest,
        frame::{Inbox, Kind, Outbox},
        memory::MemoryBookie,
        scripted::{Call, ScriptedBookies},
        wire::{Reply, Request},
    },
    entry::{Entry, Payload},
};

const ME: Incarnation = Incarnation(5);

fn shared(bookie: Arc<dyn BookieRpc>, change: impl FnOnce(&mut ServeConfig)) -> Arc<Shared> {
    let mut config = ServeConfig::new("c1");
    change(&mut config);
    let metrics = RpcMetrics::default();
    let memory = ClientMemory::new(config.total_bytes_max, metrics.in_flight_bytes.clone());
    let (memory, connections) = (Arc::new(memory), Arc::default());
    let closing = CancellationToken::new();
    Arc::new(Shared { bookie, config, metrics, memory, connections, closing })
}

/// A connection past its handshake over a pipe; its task tells why it ended.
fn connect(shared: &Arc<Shared>, pipe: usize) -> (DuplexStream, tokio::task::JoinHandle<String>) {
    let (near, far) = duplex(pipe);
    let shared = Arc::clone(shared);
    let ended = Tasks::new("test").spawn_returning("connection", async move {
        let (mut reader, mut writer) = tokio::io::split(far);
        Connection::new(&shared).run(&mut reader, &mut writer).await.to_string()
    });
    (near, ended)
}

fn add(id: u64, bytes: usize) -> Request {
    let payload = Payload::from(Bytes::from(vec![3u8; bytes]));
    let entry = Entry::seal(LedgerId(1), EntryId(id), None, 0, payload);
    let deadline = Instant::now() + Duration::from_secs(60);
    Request::Add(AddRequest { to: ME, entry, recovery: false, deadline })
}

fn read(first: u64, last: u64, fence: bool, bytes_max: usize) -> Request {
    let range = EntryRange { first: EntryId(first), last: EntryId(last) };
    let (ledger, deadline) = (LedgerId(1), Instant::now() + Duration::from_secs(60));
    Request::Read(ReadRequest { to: ME, ledger, range, fence, bytes_max, deadline })
}

fn bytes(requests: impl IntoIterator<Item = Request>) -> Bytes {
    let mut out = Outbox::default();
    for (id, request) in requests.into_iter().enumerate() {
        request.encode(id as u64, Instant::now(), &mut out).expect("within the limits");
    }
    out.copy_to_bytes(out.remaining())
}

async fn next_reply(stream: &mut DuplexStream, inbox: &mut Inbox) -> (u64, Reply) {
    loop {
        if let Some(frame) = inbox.next_frame().expect("frames") {
            return Reply::decode(frame).expect("an answer");
        }
        assert_ne!(stream.read_buf(inbox.room()).await.expect("open"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn answers_leave_as_they_come_while_requests_arrive_in_order() {
    let (silent, mut calls) = ScriptedBookies::new();
    let shared = shared(silent.bookie(ME), |_| {});
    let (mut stream, _ended) = connect(&shared, 1 << 20);
    stream.write_all(&bytes((0..3).map(|id| add(id, 10)))).await.expect("open");
    let mut replies = Vec::new();
    for expected in 0..3 {
        let Some(Call::Add(request, reply)) = calls.recv().await else { panic!("an add") };
        assert_eq!(request.entry.id, EntryId(expected), "in the order of arrival");
        replies.push(reply);
    }
    let mut inbox = Inbox::default();
    for id in [2u64, 0, 1] {
        replies.remove(if id == 2 { 2 } else { 0 }).send(AddAnswer::Ok);
        let reply = next_reply(&mut stream, &mut inbox).await;
        assert_eq!(reply, (id, Reply::Add(AddAnswer::Ok)));
    }
}

#[tokio::test(start_paused = true)]
async fn malformed_bytes_end_their_connection_and_no_other() {
    let shared = shared(Arc::new(MemoryBookie::new(ME)), |_| {});
    let (mut bad, ended) = connect(&shared, 1 << 20);
    let (mut good, _other) = connect(&shared, 1 << 20);
    bad.write_all(&[7u8; 100]).await.expect("open");
    assert!(ended.await.expect("no panic").contains("frame version 7"));
    good.write_all(&bytes([add(0, 1)])).await.expect("open");
    let reply = next_reply(&mut good, &mut Inbox::default()).await;
    assert_eq!(reply, (0, Reply::Add(AddAnswer::Ok)));
}

#[tokio::test(start_paused = true)]
async fn who_takes_no_answers_is_cut_and_its_bytes_are_free() {
    let bookie = MemoryBookie::new(ME);
    let shared = shared(Arc::new(bookie), |_| {});
    let (mut stream, ended) = connect(&shared, 1_000);
    let start = Instant::now();
    stream.write_all(&bytes((0..500).map(|id| add(id, 1)))).await.expect("open");
    assert_eq!(ended.await.expect("no panic"), "the peer does not take its answers");
    assert!(start.elapsed() >= shared.config.write_stall);
    assert_eq!(shared.metrics.in_flight_bytes.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_gone_after_a_while() {
    let shared = shared(Arc::new(MemoryBookie::new(ME)), |_| {});
    let (mut stream, ended) = connect(&shared, 1_000);
    let start = Instant::now();
    let mut out = Outbox::default();
    crate::bookie_rpc::transfer::ping(Kind::Ping, &mut out).expect("fits");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let ping = out.copy_to_bytes(out.remaining());
    stream.write_all(&ping).await.expect("open");
    assert_eq!(ended.await.expect("no panic"), "the peer is silent");
    assert_eq!(start.elapsed().as_secs(), 150);
}

async fn settle(calls: &mut mpsc::Receiver<Call>) -> Vec<Call> {
    let mut arrived = Vec::new();
    while let Ok(Some(call)) = timeout(Duration::from_secs(1), calls.recv()).await {
        arrived.push(call);
    }
    arrived
}

#[tokio::test(start_paused = true)]
async fn nothing_more_is_read_while_too_many_bytes_are_in_flight() {
    let (silent, mut calls) = ScriptedBookies::new();
    let shared = shared(silent.bookie(ME), |config| {
        config.connection_bytes_max = 100_000;
        config.total_bytes_max = 150_000;
    });
    let mut streams = Vec::new();
    for _ in 0..2 {
        let (mut stream, ended) = connect(&shared, 10_000);
        let writer = Tasks::new("writer");
        let requests = bytes((0..100).map(|id| add(id, 10_000)));
        let writing = writer.spawn_returning("write", async move {
            let _ = stream.write_all(&requests).await;
            stream
        });
        streams.push((writing, ended));
    }
    let arrived = settle(&mut calls).await;
    let held = shared.metrics.in_flight_bytes.get();
    assert!((140_000..180_000).contains(&held), "{held} bytes, {} requests", arrived.len());
    let mut more = arrived.len();
    let mut arrived = arrived;
    while more > 0 {
        for call in arrived.drain(..) {
            if let Call::Add(_, reply) = call {
                reply.send(AddAnswer::Unknown(crate::bookie_rpc::Unknown::Busy));
            }
        }
        arrived = settle(&mut calls).await;
        more = arrived.len();
    }
    assert_eq!(shared.metrics.in_flight_bytes.get(), 0, "all were taken in the end");
    assert_eq!(shared.metrics.frames_in.get(), 200);
}

#[tokio::test(start_paused = true)]
async fn reads_beyond_their_room_wait_and_adds_pass_them() {
    let (silent, mut calls) = ScriptedBookies::new();
    let shared = shared(silent.bookie(ME), |config| config.connection_bytes_max = 100_000);
    let (mut stream, _ended) = connect(&shared, 1 << 20);
    let mut requests: Vec<Request> = (0..10).map(|n| read(n, n, false, 20_000)).collect();
    requests.push(add(0, 10));
    requests.push(read(9, 9, true, 1)); // a fencing read waits for nobody
    stream.write_all(&bytes(requests)).await.expect("open");
    let arrived = settle(&mut calls).await;
    let seen: Vec<String> = arrived
        .iter()
        .map(|call| match call {
            Call::Read(request, _) if request.fence => "fence".to_owned(),
            Call::Read(request, _) => format!("read {}", request.range.first),
            Call::Add(..) => "add".to_owned(),
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(seen, ["read 0", "read 1", "add", "fence"]);
    let mut answered = 0;
    let mut arrived = arrived;
    while !arrived.is_empty() {
        for call in arrived.drain(..) {
            if let Call::Read(_, reply) = call {
                reply.send(ReadAnswer::unknown(crate::bookie_rpc::Unknown::Limbo));
                answered += 1;
            }
        }
        arrived = settle(&mut calls).await;
    }
    assert_eq!(answered, 11);
}

/// Panics at the first add.
#[derive(Debug)]
struct Fragile(MemoryBookie);

impl BookieRpc for Fragile {
    fn add(&self, request: AddRequest) -> Answer<AddAnswer> {
        assert_ne!(request.entry.id, EntryId(13), "unlucky");
        self.0.add(request)
    }
    fn write_lac(&self, to: Incarnation, ledger: LedgerId, lac: EntryId) -> Answer<()> {
        self.0.write_lac(to, ledger, lac)
    }
    fn fence(&self, request: FenceRequest) -> Answer<FenceAnswer> {
        self.0.fence(request)
    }
    fn read(&self, request: ReadRequest) -> Answer<ReadAnswer> {
        self.0.read(request)
    }
    fn read_lac(&self, to: Incarnation, ledger: LedgerId, by: Instant) -> Answer<LacAnswer> {
        self.0.read_lac(to, ledger, by)
    }
    fn list(&self, to: Incarnation, l: LedgerId, r: EntryRange, by: Instant) -> Answer<ListAnswer> {
        self.0.list(to, l, r, by)
    }
}

async fn tcp(bookie: Arc<dyn BookieRpc>, config: ServeConfig) -> (String, RpcMetrics, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let (metrics, tasks) = (RpcMetrics::default(), Tasks::new("server"));
    let (shown, connections, closing) = (metrics.clone(), tasks.clone(), tasks.token());
    tasks.spawn("serve", async move {
        serve(listener, bookie, config, metrics, &connections, closing).await;
    });
    (address, shown, tasks)
}

async fn dial(address: &str, cluster: &str) -> Result<TcpStream, HandshakeError> {
    let mut stream = TcpStream::connect(address).await?;
    handshake::ask(&mut stream, cluster).await?;
    Ok(stream)
}

async fn asked(stream: &mut TcpStream, id: u64) -> Option<Reply> {
    stream.write_all(&bytes([add(id, 1)])).await.ok()?;
    let mut inbox = Inbox::default();
    loop {
        if let Some(frame) = inbox.next_frame().expect("frames") {
            return Some(Reply::decode(frame).expect("an answer").1);
        }
        if stream.read_buf(inbox.room()).await.ok()? == 0 {
            return None;
        }
    }
}

#[tokio::test]
async fn a_panic_in_one_connection_ends_only_that_one() {
    let bookie = Arc::new(Fragile(MemoryBookie::new(ME)));
    let (address, metrics, tasks) = tcp(bookie, ServeConfig::new("c1")).await;
    let mut one = dial(&address, "c1").await.expect("welcome");
    let mut other = dial(&address, "c1").await.expect("welcome");
    assert_eq!(asked(&mut one, 13).await, None, "cut");
    assert_eq!(asked(&mut other, 14).await, Some(Reply::Add(AddAnswer::Ok)));
    let mut third = dial(&address, "c1").await.expect("still accepting");
    assert_eq!(asked(&mut third, 15).await, Some(Reply::Add(AddAnswer::Ok)));
    assert_eq!(tasks.panicked(), 1);
    assert_eq!(metrics.in_flight_bytes.get(), 0);
    assert_eq!(metrics.connections.get(), 2);
}

#[tokio::test]
async fn refused_handshakes_are_counted_and_leave_room_for_others() {
    let config = ServeConfig { connections_max: 1, ..ServeConfig::new("c1") };
    let (address, metrics, tasks) = tcp(Arc::new(MemoryBookie::new(ME)), config).await;
    let refused = dial(&address, "c2").await;
    assert!(matches!(refused, Err(HandshakeError::OtherCluster(_))), "{refused:?}");
    let mut kept = loop {
        match dial(&address, "c1").await {
            Ok(stream) => break stream,
            Err(HandshakeError::NoRoom(_)) => {} // the refused one is still being put away
            Err(other) => panic!("{other}"),
        }
    };
    let refused = dial(&address, "c1").await;
    assert!(matches!(refused, Err(HandshakeError::NoRoom(_))), "{refused:?}");
    assert_eq!(asked(&mut kept, 0).await, Some(Reply::Add(AddAnswer::Ok)));
    assert!(metrics.handshakes_refused.get() >= 2);
    tasks.token().cancel();
    tasks.idle().await;
    assert_eq!(metrics.connections.get(), 0);
}
