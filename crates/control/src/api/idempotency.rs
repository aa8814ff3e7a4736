//! `Idempotency-Key` on creates, as a middleware over the routes that `audit`'s table marks.

use axum::body::{Body, HttpBody as _};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};
use wrenn_proto::rest::Secret;

use super::audit;
use super::error::{ApiError, ApiResult};
use super::extract::bearer;
use crate::domain::Realm;
use crate::service::Services;
use crate::service::idempotency::{Begun, Execution, KeptAnswer};
use crate::tasks::TaskKind;
use crate::{Error, ErrorCode};

/// Largest answer that is kept, bytes.
const MAX_KEPT: u64 = 1 << 20;
const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Says that an answer was given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// Marks an answer that was given before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Replayed;

/// Executes a create once, however often it is sent under one key.
pub(super) async fn once(
    State(services): State<Services>,
    matched: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let marked = matched
        .as_ref()
        .is_some_and(|matched| audit::takes_key(request.method(), matched.as_str()));
    if !marked || !request.headers().contains_key(KEY) {
        return next.run(request).await;
    }
    // The name that was called is no part of the route: both names lead to the same create.
    let route = matched.map_or_else(String::new, |matched| {
        matched.as_str().replace("/v1/capsules", "/v1/sandboxes")
    });
    keyed(services, &route, request, next)
        .await
        .unwrap_or_else(|error| error.into_response())
}

async fn keyed(services: Services, route: &str, request: Request, next: Next) -> ApiResult<Response> {
    let headers = request.headers();
    if headers.get_all(KEY).iter().count() > 1 {
        return Err(Error::invalid("there must be one Idempotency-Key").into());
    }
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let key = text(&KEY).unwrap_or_default();
    let api_key = text(&HeaderName::from_static("x-api-key"));
    let route = route.trim_end_matches('/');
    let action = format!("{} {route}", request.method());
    let realm = if audit::of_platform(route) {
        Realm::Platform
    } else {
        Realm::Team
    };
    let Some(scope) = services
        .idempotency_scope(realm, api_key, bearer(headers), &action, key)
        .await?
    else {
        return Ok(next.run(request).await);
    };
    let limit = services.config.limits.max_json_bytes;
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, limit).await.map_err(|_| {
        Error::new(
            ErrorCode::PayloadTooLarge,
            format!("a JSON body must be at most {limit} bytes, and has to arrive whole"),
        )
    })?;
    let mut digest = Sha256::new();
    digest.update(parts.uri.query().unwrap_or_default());
    digest.update([0]);
    digest.update(&bytes);
    if route.contains('{') {
        // What a path names is a part of the request; where it names nothing, both of a route's names are the same.
        digest.update([0]);
        digest.update(parts.uri.path());
    }
    let request_hash = hex::encode(digest.finalize());
    let execution = match services.idempotency_begin(&scope, &request_hash).await? {
        Begun::Execute(execution) => execution,
        Begun::Answered(answer) => return Ok(replay(answer)),
        Begun::UnderWay => {
            let mut response = ApiError(Error::new(
                ErrorCode::Conflict,
                "a request with this Idempotency-Key is still under way; try again later",
            ))
            .into_response();
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
            return Ok(response);
        }
    };
    // In a task of its own: a client that goes away and asks again must find the answer, not half a create.
    let request = Request::from_parts(parts, Body::from(bytes));
    let (tell, told) = tokio::sync::oneshot::channel();
    let worker = services.clone();
    services.tasks.spawn(TaskKind::Drive, async move {
        let response = execute(&worker, &execution, request, next).await;
        // Nobody may be waiting any more.
        let _ = tell.send(response);
    });
    told.await
        .map_err(|_| Error::internal("a create under an Idempotency-Key ended without an answer").into())
}

/// Runs a request under its claim, and keeps what came of it.
async fn execute(services: &Services, execution: &Execution, request: Request, next: Next) -> Response {
    let running = next.run(request);
    tokio::pin!(running);
    let response = loop {
        tokio::select! {
            response = &mut running => break response,
            () = tokio::time::sleep(services.idempotency_renewal()) => {
                services.idempotency_renew(execution).await;
            }
        }
    };
    let small = response
        .body()
        .size_hint()
        .upper()
        .is_some_and(|size| size <= MAX_KEPT);
    if !response.status().is_success() || !small {
        services.idempotency_end(execution, None).await;
        return response;
    }
    let (parts, body) = response.into_parts();
    let bytes = axum::body::to_bytes(body, MAX_KEPT as usize)
        .await
        .unwrap_or_default();
    let answer = KeptAnswer {
        status: parts.status.as_u16(),
        content_type: parts
            .headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned),
        body: Secret::new(String::from_utf8_lossy(&bytes)),
    };
    services.idempotency_end(execution, Some(answer)).await;
    Response::from_parts(parts, Body::from(bytes))
}

fn replay(answer: KeptAnswer) -> Response {
    let KeptAnswer {
        status,
        content_type,
        body,
    } = answer;
    let mut response = Response::new(Body::from(body.reveal().to_owned()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    if let Some(value) = content_type.and_then(|value| HeaderValue::try_from(value).ok()) {
        response.headers_mut().insert(header::CONTENT_TYPE, value);
    }
    response
        .headers_mut()
        .insert(REPLAYED, HeaderValue::from_static("true"));
    response.extensions_mut().insert(Replayed);
    response
}
