//! The server itself: health, metrics, documents, and the middleware that observes requests.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use axum::{Json, Router};
use bytes::Bytes;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::sync::OnceCell;
use utoipa::openapi::OpenApi;
use utoipa_swagger_ui::{Config, SwaggerUi};
use wrenn_proto::rest::{ErrorBody, Health};

use super::error::ApiResult;
use crate::Error;
use crate::domain::HostStatus;
use crate::service::Services;

/// The page at `/test`.
const TEST_PAGE: &str = include_str!("../../assets/test.html");

/// One recorder per process: the `metrics` macros write to a global.
fn recorder() -> &'static PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    RECORDER.get_or_init(|| {
        let recorder = PrometheusBuilder::new()
            .set_buckets(&[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0])
            .unwrap_or_else(|_| PrometheusBuilder::new())
            .build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed; /metrics shows nothing");
        }
        handle
    })
}

/// Pages and documents that the OpenAPI document does not describe. `document` makes that.
pub(super) fn undocumented(document: impl Fn() -> OpenApi + Send + Sync + 'static) -> Router<Services> {
    recorder();
    let document = Arc::new(document);
    let yaml = Arc::clone(&document);
    Router::new()
        .route(
            "/openapi.json",
            text("application/json", move || {
                document().to_json().map_err(|error| error.to_string())
            }),
        )
        .route(
            "/openapi.yaml",
            text("application/yaml", move || {
                yaml().to_yaml().map_err(|error| error.to_string())
            }),
        )
        .route("/test", get(|| async { Html(TEST_PAGE) }))
        .merge(SwaggerUi::new("/docs").config(Config::new(["/openapi.json"])))
}

/// Serves a text that is made when somebody asks for the first time: most starts are never asked. Only the text is kept:
/// as the structure it is, the document takes ten times the memory.
fn text(
    kind: &'static str,
    write: impl Fn() -> Result<String, String> + Send + Sync + 'static,
) -> MethodRouter<Services> {
    let (write, made) = (Arc::new(write), Arc::new(OnceCell::<Bytes>::new()));
    get(move || {
        let (write, made) = (Arc::clone(&write), Arc::clone(&made));
        async move {
            let make = async || {
                let written = tokio::task::spawn_blocking(move || write()).await;
                written
                    .map_err(|error| Error::internal(error.to_string()))?
                    .map(Bytes::from)
                    .map_err(Error::internal)
            };
            let text = made.get_or_try_init(make).await?.clone();
            ApiResult::Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
        }
    })
}

/// Tell whether the server can work: it is up and its database answers.
#[utoipa::path(get, path = "/health", tag = "service", responses(
    (status = 200, body = Health),
    (status = 503, body = ErrorBody, description = "`database_unavailable`: it cannot work")))]
pub(crate) async fn health(State(services): State<Services>) -> ApiResult<Json<Health>> {
    services.healthy().await?;
    Ok(Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }))
}

/// Get the server's metrics in Prometheus' text form.
#[utoipa::path(get, path = "/metrics", tag = "service", responses(
    (status = 200, content_type = "text/plain", body = String)))]
pub(crate) async fn metrics(State(services): State<Services>) -> ApiResult<Response> {
    let (sandboxes, hosts) = services.gauges().await?;
    for status in crate::domain::SandboxStatus::ALL {
        let count = sandboxes.get(status.as_str()).copied().unwrap_or_default();
        metrics::gauge!("wrenn_sandboxes", "status" => status.as_str()).set(count as f64);
    }
    for status in HostStatus::ALL {
        let count = hosts.iter().filter(|host| host.status == status).count();
        metrics::gauge!("wrenn_hosts", "status" => status.as_str()).set(count as f64);
    }
    recorder().run_upkeep();
    let headers = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    Ok((headers, recorder().render()).into_response())
}

/// Counts and times requests by route, never by path: ids would make a series each.
pub(super) async fn observe(matched: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let method = match request.method().as_str() {
        method @ ("GET" | "POST" | "PUT" | "PATCH" | "DELETE" | "HEAD" | "OPTIONS") => method.to_owned(),
        _ => "other".to_owned(),
    };
    let route = matched.map_or_else(|| "unmatched".to_owned(), |matched| matched.as_str().to_owned());
    let start = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_u16().to_string();
    metrics::histogram!("wrenn_http_request_seconds", "route" => route.clone())
        .record(start.elapsed().as_secs_f64());
    metrics::counter!("wrenn_http_requests_total", "method" => method, "route" => route, "status" => status)
        .increment(1);
    response
}
