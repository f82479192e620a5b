//! What a request must be before anything is made of it: not from a foreign page, not too large, not for ever on its way.

use std::time::Duration;

use axum::{
    extract::Request,
    http::{
        header::{AUTHORIZATION, CONTENT_LENGTH, HOST, ORIGIN},
        request::Parts,
    },
};
use bytes::Bytes;
use geminga_proto::reason::Reason;
use geminga_runtime::budget::{ByteBudget, Permit};
use tokio::time::timeout;

use crate::answer::Refused;

/// Time for a body to arrive.
const BODY_DEADLINE: Duration = Duration::from_secs(30);

/// A request with its body; the body's bytes are held until it is dropped.
pub(crate) struct Taken {
    pub(crate) parts: Parts,
    pub(crate) body: Bytes,
    _held: Permit,
}

/// Takes a request in.
///
/// # Errors
/// PERMISSION_DENIED for one that a page of another origin sent: a browser beside a broker without authentication would
/// otherwise publish for any site. MESSAGE_TOO_LARGE, BUSY, DEADLINE_EXCEEDED, INVALID_REQUEST for its body.
pub(crate) async fn take(
    request: Request,
    bodies: &ByteBudget,
    body_bytes_max: usize,
) -> Result<Taken, Refused> {
    let (parts, body) = request.into_parts();
    same_origin(&parts)?;
    let announced = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    let announced = match announced.map(str::parse::<u64>) {
        None => body_bytes_max as u64, // chunked: as much as it may be
        Some(Ok(length)) if length <= body_bytes_max as u64 => length,
        Some(_) => return Err(too_large(body_bytes_max)),
    };
    let Some(held) = bodies.try_acquire(announced.max(1)) else {
        return Err(Refused::new(Reason::Busy, "too many request bodies are on their way"));
    };
    let read = axum::body::to_bytes(body, body_bytes_max);
    let body = match timeout(BODY_DEADLINE, read).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return Err(too_large(body_bytes_max)),
        Err(_) => {
            let message = format!("the body did not arrive within {BODY_DEADLINE:?}");
            return Err(Refused::new(Reason::DeadlineExceeded, message));
        }
    };
    Ok(Taken { parts, body, _held: held })
}

fn too_large(body_bytes_max: usize) -> Refused {
    let message = format!("the body has more than {body_bytes_max} bytes, or broke off");
    Refused::new(Reason::MessageTooLarge, message)
}

fn same_origin(parts: &Parts) -> Result<(), Refused> {
    let Some(origin) = parts.headers.get(ORIGIN) else { return Ok(()) };
    let host = parts.headers.get(HOST).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| parts.uri.authority().map(|authority| authority.as_str()));
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    match (origin, host) {
        (Some((_, origin)), Some(host)) if origin == host => Ok(()),
        _ => {
            let message = "the request comes from a page of another origin";
            Err(Refused::new(Reason::PermissionDenied, message))
        }
    }
}

/// The call that a service gets: on the same connection, with the caller's credentials and nothing else of its headers.
pub(crate) fn call<T>(parts: &Parts, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    *request.extensions_mut() = parts.extensions.clone();
    if let Some(credentials) = parts.headers.get(AUTHORIZATION)
        && let Ok(text) = credentials.to_str()
        && let Ok(value) = text.parse()
    {
        request.metadata_mut().insert("authorization", value);
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = axum::http::Request::builder().uri("/v1/tenants");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    #[test]
    fn a_page_of_another_origin_is_refused() {
        assert!(same_origin(&parts(&[("host", "localhost:8650")])).is_ok());
        let own = [("host", "localhost:8650"), ("origin", "http://localhost:8650")];
        assert!(same_origin(&parts(&own)).is_ok());
        for origin in ["https://example.org", "null", "http://localhost:80", ""] {
            let foreign = [("host", "localhost:8650"), ("origin", origin)];
            assert!(same_origin(&parts(&foreign)).is_err(), "{origin:?}");
        }
    }

    #[test]
    fn of_the_headers_only_credentials_reach_a_service() {
        let sent = [("authorization", "Bearer x"), ("geminga-relayed-for", "admin"), ("x", "y")];
        let call = call(&parts(&sent), ());
        assert_eq!(call.metadata().len(), 1);
        assert!(call.metadata().contains_key("authorization"));
    }
}
