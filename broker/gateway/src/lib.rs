//! REST/JSON and CloudEvents over HTTP: the way in for curl, scripts and webhooks, on the same port as gRPC.
//!
//! ```text
//! request ─► guard.rs  origin, size, time ─► json.rs  path + query + body = one request message ─► the gRPC service
//!            answer.rs ◄─ JSON, or an error with reason, advice and HTTP status ◄──────────────────┘
//! ```
//! [`resources`](crate::router) are one table of paths, each of them one unary call; messages have their own pages
//! (`messages.rs`, `events.rs`), since JSON is no way to write a batch. It promises what the calls promise and nothing more. It
//! deliberately knows no topic, no segment and no owner: only the API.

mod answer;
mod events;
mod guard;
mod json;
mod messages;
mod resources;

use std::sync::Arc;

use geminga_proto::{
    admin::v1::admin_server::Admin, v1::publisher_server::Publisher,
    v1::subscriber_server::Subscriber,
};
use geminga_runtime::budget::ByteBudget;

/// The services behind the gateway, and what it may hold.
#[derive(Debug)]
pub struct Gateway<P, S, A> {
    pub publisher: Arc<P>,
    pub subscriber: Arc<S>,
    pub admin: Arc<A>,
    /// Bytes of request bodies in memory, over all requests.
    pub bodies: ByteBudget,
    /// Largest body, bytes.
    pub body_bytes_max: usize,
}

// Handles only: the services need not be Clone.
impl<P, S, A> Clone for Gateway<P, S, A> {
    fn clone(&self) -> Self {
        Self {
            publisher: Arc::clone(&self.publisher),
            subscriber: Arc::clone(&self.subscriber),
            admin: Arc::clone(&self.admin),
            bodies: self.bodies.clone(),
            body_bytes_max: self.body_bytes_max,
        }
    }
}

/// All paths, below `/v1`. [`unknown`] answers for all others.
pub fn router<P: Publisher, S: Subscriber, A: Admin>(gateway: Gateway<P, S, A>) -> axum::Router {
    resources::routes(&gateway)
        .merge(messages::routes(&gateway))
        .method_not_allowed_fallback(answer::not_allowed)
}

/// The answer to a path that nobody serves, in the words of whoever asks: gRPC or HTTP.
pub async fn unknown(request: axum::extract::Request) -> axum::response::Response {
    answer::unknown(&request)
}

/// The documentation's table of paths, made from the code.
#[must_use]
pub fn markdown() -> String {
    resources::markdown()
}
