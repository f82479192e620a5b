//! Answers: JSON, or an error that says what the caller may do next.

use axum::{
    Json,
    http::{
        HeaderValue, StatusCode,
        header::{CONTENT_TYPE, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
};
use geminga_proto::reason::{Reason, Retry};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// A request that was refused.
#[derive(Debug)]
pub(crate) struct Refused(Box<Error>);

#[derive(Debug)]
struct Error {
    status: StatusCode,
    body: Value,
    retry_after_s: Option<u64>,
}

impl Refused {
    /// Refused before any service was asked.
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self::build(reason.code(), Some(reason), message.into(), json!({}), None)
    }

    /// A field, path or query that cannot be what it should.
    pub(crate) fn request(message: impl Into<String>) -> Self {
        Self::new(Reason::InvalidRequest, message)
    }

    fn build(
        code: Code,
        reason: Option<Reason>,
        message: String,
        details: Value,
        retry_after_s: Option<u64>,
    ) -> Self {
        let retry = reason.map(|reason| match reason.retry() {
            Retry::Safe => "safe",
            Retry::Never => "never",
            Retry::SameSequence => "same-sequence",
        });
        let body = json!({"error": {
            "code": format!("{code:?}"),
            "reason": reason.map(Reason::as_str),
            "message": message,
            "retry": retry,
            "advice": reason.map(Reason::advice),
            "details": details,
        }});
        Self(Box::new(Error { status: http_status(code), body, retry_after_s }))
    }
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info();
        let reason = info.as_ref().and_then(|info| Reason::parse(&info.reason));
        let facts = info.map(|info| info.metadata.into_iter().collect::<Vec<_>>());
        let mut details = serde_json::Map::new();
        for (name, value) in facts.into_iter().flatten() {
            details.insert(name, value.into());
        }
        let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let seconds = delay.map(|delay| delay.as_secs() + u64::from(delay.subsec_nanos() > 0));
        Self::build(status.code(), reason, status.message().to_owned(), details.into(), seconds)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Error { status, body, retry_after_s } = *self.0;
        let mut response = (status, Json(body)).into_response();
        if let Some(seconds) = retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}

/// For a path that has no such method.
pub(crate) async fn not_allowed() -> Response {
    let message = "the path does not have this method; docs/rest.md lists what it has";
    let mut response = Refused::request(message).into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// For a path that nobody serves.
pub(crate) fn unknown(request: &axum::extract::Request) -> Response {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind.is_some_and(|kind| kind.starts_with("application/grpc")) {
        return Status::unimplemented("").into_http::<axum::body::Body>();
    }
    let message =
        format!("{} is no path of the API; docs/rest.md lists them", request.uri().path());
    let mut response = Refused::request(message).into_response();
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

/// The HTTP status of a gRPC code; a conflict of states is 409, so that 400 always means "correct the request".
fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_status_that_tells_whose_turn_it_is() {
        for reason in Reason::ALL {
            let refused = Refused::new(*reason, "because");
            let error = &refused.0.body["error"];
            assert_eq!(error["reason"], reason.as_str());
            assert_eq!(error["advice"], reason.advice());
            let (status, safe) = (refused.0.status, reason.retry() == Retry::Safe);
            assert!(status.is_client_error() || status.is_server_error());
            assert!(
                !(status == StatusCode::BAD_REQUEST && safe),
                "{reason:?}: 400 is never worth repeating"
            );
        }
    }
}
