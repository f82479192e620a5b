//! The listener for metrics and health: `/metrics`, `/livez`, `/readyz`.
//!
//! Bounded: at most [`CONNECTIONS_MAX`] connections at a time, further ones wait in the kernel's queue, and none lives
//! longer than [`CONNECTION_LIFE`], so that slow or idle clients cannot hold it for ever.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
    serve::Listener,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Sleep, sleep},
};

use super::MetricsRegistry;
use crate::tasks::Tasks;

const CONNECTIONS_MAX: usize = 64;
const CONNECTION_LIFE: Duration = Duration::from_secs(30);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Binds and serves until the owner ends; returns the bound address. `/livez` answers 200 while the process runs;
/// `/readyz` 503 until `ready` is true, and again when its sender is gone. A failure to serve is a failure of `tasks`.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve_health(
    address: SocketAddr,
    registry: MetricsRegistry,
    ready: watch::Receiver<bool>,
    tasks: &Tasks,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let listener = Bounded { listener, room: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
    let end = tasks.token().cancelled_owned();
    let service = routes(registry, ready);
    tasks.spawn_critical("health", async move {
        axum::serve(listener, service).with_graceful_shutdown(end).await
    });
    Ok(address)
}

fn routes(registry: MetricsRegistry, ready: watch::Receiver<bool>) -> Router {
    Router::new()
        .route(
            "/metrics",
            get(async |State(registry): State<MetricsRegistry>| {
                ([(header::CONTENT_TYPE, OPEN_METRICS)], registry.encode())
            }),
        )
        .with_state(registry)
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(async move || readiness(&ready)))
}

fn readiness(ready: &watch::Receiver<bool>) -> impl IntoResponse + use<> {
    // A watch whose sender is gone keeps its last value: nobody vouches for it any more.
    if *ready.borrow() && ready.has_changed().is_ok() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

struct Bounded {
    listener: TcpListener,
    room: Arc<Semaphore>,
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let room =
            Arc::clone(&self.room).acquire_owned().await.expect("the semaphore is never closed");
        let (stream, from) = Listener::accept(&mut self.listener).await;
        (Connection { stream, end: Box::pin(sleep(CONNECTION_LIFE)), _room: room }, from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that holds its place among the allowed ones and fails at the end of its time.
struct Connection {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _room: OwnedSemaphorePermit,
}

impl Connection {
    /// The stream, or an error when the time is over; wakes the caller at that moment.
    fn in_time(&mut self, context: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(Pin::new(&mut self.stream)),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.get_mut().in_time(context)?.poll_read(context, to)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().in_time(context)?.poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().in_time(context)?.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    async fn started(tasks: &Tasks, ready: watch::Receiver<bool>) -> SocketAddr {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        serve_health(any, MetricsRegistry::new(), ready, tasks).await.unwrap()
    }

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn metrics_and_health_are_served_until_the_owner_ends() {
        let (tasks, (set_ready, ready)) = (Tasks::new("test"), watch::channel(false));
        let address = started(&tasks, ready).await;
        let metrics = ask(address, "/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.ends_with("# EOF\n"), "{metrics}");
        assert!(metrics.contains("content-type: application/openmetrics-text; version=1.0.0"));
        assert!(ask(address, "/livez").await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        set_ready.send(true).unwrap();
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        drop(set_ready);
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        assert!(ask(address, "/other").await.starts_with("HTTP/1.1 404"));
        assert!(tasks.shutdown(PATIENCE).await);
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn a_taken_address_is_an_error() {
        let (tasks, (_ready, ready)) = (Tasks::new("test"), watch::channel(false));
        let address = started(&tasks, ready.clone()).await;
        assert!(serve_health(address, MetricsRegistry::new(), ready, &tasks).await.is_err());
        tasks.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_ends_after_its_time() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut bounded = Bounded { listener, room: Arc::new(Semaphore::new(1)) };
        let _client = TcpStream::connect(address).await.unwrap();
        let _waiting = TcpStream::connect(address).await.unwrap();
        let (mut connection, _) = bounded.accept().await;
        assert!(
            timeout(Duration::from_millis(1), bounded.accept()).await.is_err(),
            "there is room for one"
        );
        let error = connection.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(connection);
        bounded.accept().await;
    }
}
