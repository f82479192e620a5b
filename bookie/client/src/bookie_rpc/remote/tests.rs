use std::collections::BTreeMap;

use bytes::{Buf, Bytes};
use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use geminga_metadata::{Op, Txn, keys};
use geminga_proto::storage::v1 as wire_store;
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::TcpListener,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{connection::Connection, *};
use crate::{
    Quorum,
    bookie_rpc::{
        conformance,
        directory::{Directory, until},
        frame::{Inbox, Outbox},
        memory::MemoryBookie,
        serve::{ServeConfig, serve},
        wire::Reply,
    },
    entry::{Entry, Payload},
    testing::{World, append, names, pass},
};

const ME: Incarnation = Incarnation(5);

/// Addresses that a test sets.
#[derive(Debug, Default)]
struct Addresses {
    known: Mutex<BTreeMap<Incarnation, String>>,
    looked_again: Mutex<u32>,
}

impl Resolve for Addresses {
    fn address(&self, incarnation: Incarnation) -> Option<Arc<str>> {
        self.known.lock().get(&incarnation).map(|address| Arc::from(address.as_str()))
    }

    fn is_registered(&self, incarnation: Incarnation) -> bool {
        self.known.lock().contains_key(&incarnation)
    }

    fn look_again(&self) {
        *self.looked_again.lock() += 1;
    }
}

struct Server {
    address: String,
    tasks: Tasks,
    closing: CancellationToken,
}

impl Server {
    async fn start(bookie: Arc<dyn BookieRpc>, address: &str) -> Self {
        let listener = TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let (tasks, closing) = (Tasks::new("server"), CancellationToken::new());
        let (connections, token) = (tasks.clone(), closing.clone());
        let config = ServeConfig::new("c1");
        tasks.spawn("serve", async move {
            serve(listener, bookie, config, RpcMetrics::default(), &connections, token).await;
        });
        Self { address, tasks, closing }
    }

    async fn stop(&self) {
        self.closing.cancel();
        self.tasks.idle().await;
    }
}

fn client(resolver: Arc<dyn Resolve>, cluster: &str) -> RemoteBookies {
    let metrics = RpcMetrics::default();
    let (random, tasks) = (Random::from_seed(1), Tasks::new("client"));
    RemoteBookies::new(RemoteConfig::new(cluster), resolver, random, tasks, metrics)
}

fn entry(id: u64, bytes: usize) -> Entry {
    let payload = Payload::from(Bytes::from(vec![3u8; bytes]));
    Entry::seal(LedgerId(1), EntryId(id), None, 0, payload)
}

fn add(id: u64, bytes: usize, seconds: u64) -> AddRequest {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    AddRequest { to: ME, entry: entry(id, bytes), recovery: false, deadline }
}

#[tokio::test]
async fn passes_the_exam_of_every_bookie_over_a_socket() {
    conformance::exam(async || {
        let server = Server::start(Arc::new(MemoryBookie::new(ME)), "127.0.0.1:0").await;
        let addresses = Addresses::default();
        addresses.known.lock().insert(ME, server.address.clone());
        (client(Arc::new(addresses), "c1").bookie(ME), ME)
    })
    .await;
}

#[tokio::test]
async fn large_and_many_adds_arrive_whole() {
    let bookie = MemoryBookie::new(ME);
    let server = Server::start(Arc::new(bookie.clone()), "127.0.0.1:0").await;
    let addresses = Addresses::default();
    addresses.known.lock().insert(ME, server.address.clone());
    let remote = client(Arc::new(addresses), "c1").bookie(ME);
    let size = |id: u64| if id.is_multiple_of(50) { 5 << 20 } else { id as usize * 7 };
    let answers: Vec<_> = (0..200).map(|id| remote.add(add(id, size(id), 60))).collect();
    for answer in answers {
        assert_eq!(answer.await, AddAnswer::Ok);
    }
    for (id, held) in bookie.held(LedgerId(1)) {
        assert_eq!(held, entry(id.0, size(id.0)));
        assert!(held.verify().is_ok());
    }
}

#[tokio::test]
async fn a_member_of_another_cluster_and_an_unknown_incarnation_are_unknown_at_once() {
    let server = Server::start(Arc::new(MemoryBookie::new(ME)), "127.0.0.1:0").await;
    let addresses = Arc::new(Addresses::default());
    addresses.known.lock().insert(ME, server.address.clone());
    let stranger = client(addresses.clone(), "c2");
    let disconnected = AddAnswer::Unknown(Unknown::Disconnected);
    assert_eq!(stranger.bookie(ME).add(add(0, 1, 60)).await, disconnected);
    let nobody = Incarnation(77);
    assert_eq!(stranger.bookie(nobody).add(add(0, 1, 60)).await, disconnected);
    until(|| *addresses.looked_again.lock() == 2).await;
}

#[tokio::test]
async fn a_stale_address_is_left_when_another_incarnation_answers() {
    let other = Server::start(Arc::new(MemoryBookie::new(Incarnation(6))), "127.0.0.1:0").await;
    let right = Server::start(Arc::new(MemoryBookie::new(ME)), "127.0.0.1:0").await;
    let addresses = Arc::new(Addresses::default());
    addresses.known.lock().insert(ME, other.address.clone());
    let remote = client(addresses.clone(), "c1").bookie(ME);
    let wrong = AddAnswer::Unknown(Unknown::WrongIncarnation);
    assert_eq!(remote.add(add(0, 1, 60)).await, wrong);
    addresses.known.lock().insert(ME, right.address.clone());
    loop {
        match remote.add(add(0, 1, 60)).await {
            AddAnswer::Ok => break,
            AddAnswer::Unknown(Unknown::Disconnected) => tokio::task::yield_now().await,
            answer => panic!("{answer:?}"),
        }
    }
}

/// A world whose client reaches its bookies by sockets.
async fn sockets(world: &World, servers: &mut BTreeMap<u32, Server>) -> RemoteBookies {
    for (id, bookie) in &world.bookies {
        let server = Server::start(Arc::new(bookie.clone()), "127.0.0.1:0").await;
        let value = wire_store::Available {
            format: 1,
            incarnation: *id,
            address: server.address.clone(),
            writable: true,
            ..wire_store::Available::default()
        };
        let op = Op::put(keys::available(&format!("b{id}")), value.encode_to_vec());
        world.store.txn(Txn::new().then(op)).await.expect("the store answers");
        servers.insert(*id, server);
    }
    let directory = Directory::start(Arc::clone(&world.store), &world.tasks);
    directory.loaded().await;
    client(directory, "c1")
}

/// EC1: a bookie that restarts costs no metadata write, and gets the entries it missed.
#[tokio::test]
async fn a_lost_connection_changes_no_ensemble_and_what_is_missing_is_sent_again() {
    let world = World::new(4).await; // one to spare: a change would find a replacement
    let mut servers = BTreeMap::new();
    let remote = sockets(&world, &mut servers).await;
    let client = world.client_with(Some(Arc::new(remote)), |_| {});
    let writer = world.create_by(&client, Quorum::default()).await;
    append(&writer, 0..20).await;
    let before = world.metadata().await;
    let (_, lost) = before.value.last_fragment().holders().next().expect("a holder");
    servers[&lost.0].stop().await;
    append(&writer, 20..60).await;
    let address = servers[&lost.0].address.clone();
    let bookie = Arc::new(world.bookies[&lost.0].clone());
    servers.insert(lost.0, Server::start(bookie, &address).await);
    append(&writer, 60..80).await;
    until(|| (0..80).all(|entry| world.copies(entry) == 3)).await;
    assert_eq!(world.metadata().await.mod_revision, before.mod_revision);
    let sealed = writer.seal().await.expect("sealed");
    assert!(!sealed.closed.has_vacancy());
    world.store.txn(sealed.txn).await.expect("the store answers");
    assert!(!world.is_listed().await);
    assert_eq!(world.read_all().await, names(80));
}

/// What the other end of a connection sees and says, in virtual time.
struct FarEnd {
    stream: DuplexStream,
    inbox: Inbox,
}

impl FarEnd {
    async fn request(&mut self) -> (u64, Request) {
        loop {
            if let Some(frame) = self.inbox.next_frame().expect("frames") {
                if frame.kind == crate::bookie_rpc::frame::Kind::Ping {
                    continue; // it is as good as dead
                }
                let (id, request) = Request::decode(frame, Instant::now()).expect("a request");
                return (id.expect("one with an answer"), request);
            }
            assert_ne!(self.stream.read_buf(self.inbox.room()).await.expect("open"), 0);
        }
    }

    async fn answer(&mut self, id: u64, answer: AddAnswer) {
        let mut out = Outbox::default();
        Reply::Add(answer).encode(id, &mut out).expect("small");
        let bytes = out.copy_to_bytes(out.remaining());
        self.stream.write_all(&bytes).await.expect("open");
    }
}

/// A peer with a connection over a pipe of `pipe` bytes; its task tells why it ended.
fn piped(pipe: usize, change: impl FnOnce(&mut RemoteConfig)) -> (Handle, FarEnd, Ended) {
    let addresses = Addresses::default();
    addresses.known.lock().insert(ME, "nowhere:1".to_owned());
    let mut config = RemoteConfig::new("c1");
    change(&mut config);
    let tasks = Tasks::new("client");
    let (random, metrics) = (Random::from_seed(1), RpcMetrics::default());
    let bookies = RemoteBookies::new(config, Arc::new(addresses), random, tasks.clone(), metrics);
    let peer = Arc::new(Peer::new(ME, Arc::clone(&bookies.shared)));
    peer.state.lock().connected = true;
    let (near, far) = duplex(pipe);
    let ended = tasks.spawn_returning("pipe", Connection::new(Arc::clone(&peer)).run_over(near));
    (Handle(peer), FarEnd { stream: far, inbox: Inbox::default() }, ended)
}

type Ended = tokio::task::JoinHandle<String>;

#[tokio::test(start_paused = true)]
async fn every_answer_comes_by_its_deadline_from_a_peer_that_takes_nothing() {
    let (handle, _far, _ended) = piped(100, |_| {});
    let start = Instant::now();
    let mut answers: FuturesUnordered<_> =
        (1..=5u64).map(|n| handle.add(add(n, 1_000, n)).map(move |answer| (n, answer))).collect();
    while let Some((n, answer)) = answers.next().await {
        assert_eq!(answer, AddAnswer::Unknown(Unknown::Timeout));
        assert_eq!(start.elapsed().as_millis().div_ceil(1_000), u128::from(n));
    }
    assert_eq!(handle.0.state.lock().calls.next_deadline(), None, "nothing is left");
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_left_after_ten_seconds_and_a_talking_one_is_not() {
    let (handle, mut far, ended) = piped(1 << 20, |_| {});
    let start = Instant::now();
    let waiting = handle.add(add(0, 1, 600));
    for n in 1..=4 {
        pass(6.0).await;
        let told = handle.add(add(n, 1, 600));
        let id = loop {
            let (id, Request::Add(request)) = far.request().await else { continue };
            if request.entry.id == EntryId(n) {
                break id;
            }
        };
        far.answer(id, AddAnswer::Ok).await;
        assert_eq!(told.await, AddAnswer::Ok, "out of order");
    }
    assert_eq!(waiting.await, AddAnswer::Unknown(Unknown::Disconnected));
    assert_eq!(ended.await.expect("ended"), "the bookie is silent");
    assert_eq!(start.elapsed().as_secs(), 34);
}

#[tokio::test(start_paused = true)]
async fn bytes_beyond_the_limit_are_busy_at_once_and_free_again_when_answered() {
    let (handle, mut far, _ended) = piped(1 << 20, |config| config.bytes_max = 32_000);
    let mut waiting = Vec::new();
    let busy = loop {
        let mut answer = handle.add(add(waiting.len() as u64, 1_000, 60));
        match (&mut answer).now_or_never() {
            None => waiting.push(answer),
            Some(answer) => break answer,
        }
    };
    assert_eq!(busy, AddAnswer::Unknown(Unknown::Busy));
    assert!((15..=30).contains(&waiting.len()), "{}", waiting.len());
    let (id, _) = far.request().await;
    far.answer(id, AddAnswer::Ok).await;
    assert_eq!(waiting.remove(0).await, AddAnswer::Ok);
    assert!(handle.add(add(99, 1_000, 60)).now_or_never().is_none(), "there is room again");
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_told_at_once_and_the_next_one_waits_a_moment() {
    let (handle, far, ended) = piped(1 << 20, |_| {});
    let start = Instant::now();
    let waiting: Vec<_> = (0..3).map(|n| handle.add(add(n, 1, 60))).collect();
    tokio::task::yield_now().await;
    drop(far);
    for answer in waiting {
        assert_eq!(answer.await, AddAnswer::Unknown(Unknown::Disconnected));
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    ended.await.expect("ended");
    let at = handle.0.state.lock().retry_at.expect("a pause");
    assert!((25..=50).contains(&at.duration_since(start).as_millis()), "{at:?}");
    assert_eq!(
        handle.add(add(9, 1, 60)).now_or_never(),
        Some(AddAnswer::Unknown(Unknown::Disconnected))
    );
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_frames_end_the_connection() {
    let (handle, mut far, ended) = piped(1 << 20, |_| {});
    let waiting = handle.add(add(0, 1, 60));
    far.request().await;
    far.stream.write_all(&[0xff; 64]).await.expect("open");
    assert_eq!(waiting.await, AddAnswer::Unknown(Unknown::Disconnected));
    assert!(ended.await.expect("ended").contains("frame version 255"));
}

#[tokio::test(start_paused = true)]
async fn idle_connections_show_that_they_live_and_end_when_the_bookie_is_gone() {
    let (handle, mut far, ended) = piped(1 << 20, |_| {});
    let mut bytes = [0u8; 16];
    far.stream.read_exact(&mut bytes).await.expect("a ping");
    let mut out = Outbox::default();
    crate::bookie_rpc::transfer::ping(crate::bookie_rpc::frame::Kind::Pong, &mut out)
        .expect("fits");
    let pong = out.copy_to_bytes(out.remaining());
    far.stream.write_all(&pong).await.expect("open");
    let twenty = timeout(Duration::from_secs(20), far.stream.read_exact(&mut bytes)).await;
    assert!(twenty.is_err(), "not before it is time again");
    // From here on nobody answers the ping.
    assert_eq!(ended.await.expect("ended"), "the bookie is silent");
    drop(handle);
}

#[tokio::test(start_paused = true)]
async fn when_the_process_stops_everybody_is_told() {
    let addresses = Addresses::default();
    let tasks = Tasks::new("client");
    let bookies = RemoteBookies::new(
        RemoteConfig::new("c1"),
        Arc::new(addresses),
        Random::from_seed(1),
        tasks.clone(),
        RpcMetrics::default(),
    );
    tasks.abort();
    let disconnected = AddAnswer::Unknown(Unknown::Disconnected);
    assert_eq!(bookies.bookie(ME).add(add(0, 1, 60)).await, disconnected);
}
