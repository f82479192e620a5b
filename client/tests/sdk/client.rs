//! The client itself: waiting for a server that starts at the same time.

use std::time::Duration;

use geminga_client::{Client, Error};
use tokio::net::TcpListener;

use crate::server::{Server, soon};

async fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    listener.local_addr().expect("it listens").to_string()
}

#[tokio::test]
async fn a_client_waits_for_a_server_that_starts_after_it() {
    let address = free_address().await;
    let builder = Client::builder().server(&address).wait_for_server(Duration::from_secs(10));
    let mut building = Box::pin(builder.build());
    let refused = tokio::time::timeout(Duration::from_millis(50), &mut building).await;
    assert!(refused.is_err(), "it is refused and tries again");
    let server = Server::at(&address, 1, None).await;
    let client = soon(building).await.expect("the server is there now");
    client.producer("t").build().await.expect("over the same connection");
    drop(server);
}

#[tokio::test]
async fn a_server_that_is_waited_for_in_vain_is_named() {
    let address = free_address().await;
    let waiting =
        Client::builder().server(&address).wait_for_server(Duration::from_millis(80)).build();
    let Err(Error::Unavailable(words)) = soon(waiting).await else { panic!("nobody listens") };
    assert!(words.contains(&address), "{words}");
}

#[tokio::test]
async fn without_waiting_a_client_is_built_before_its_server() {
    let address = free_address().await;
    Client::builder().server(address).build().await.expect("nothing is connected yet");
    assert!(Client::builder().server("not an address").build().await.is_err());
}
