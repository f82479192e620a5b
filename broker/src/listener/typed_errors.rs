//! Gives a typed reason to what tonic refuses by itself before a handler runs: a unary request over its frame limit, or
//! with bytes that are no such request.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tonic::{Code, Status, body::Body, codegen::http};
use tower::{Layer, Service};

use crate::errors::unreadable;

/// A layer around all services.
#[derive(Clone, Copy, Debug, Default)]
pub struct TypedErrors;

impl<S> Layer<S> for TypedErrors {
    type Service = Typed<S>;

    fn layer(&self, inner: S) -> Typed<S> {
        Typed { inner }
    }
}

/// The service that [`TypedErrors`] makes.
#[derive(Clone, Debug)]
pub struct Typed<S> {
    inner: S,
}

impl<S, B> Service<http::Request<B>> for Typed<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let answer = self.inner.call(request);
        Box::pin(async move {
            let response = answer.await?;
            // Only a refusal without a body carries its status in the headers; one of ours has details.
            match Status::from_header_map(response.headers()) {
                Some(status)
                    if status.details().is_empty()
                        && matches!(status.code(), Code::OutOfRange | Code::Internal) =>
                {
                    Ok(Status::from(unreadable(&status)).into_http())
                }
                _ => Ok(response),
            }
        })
    }
}
