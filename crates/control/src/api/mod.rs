//! The HTTP edge: routes, extractors, errors, WebSockets and the OpenAPI document. No business logic.

mod accounts;
mod address;
mod admin;
mod around;
mod audit;
mod channels;
mod convert;
mod error;
mod events;
mod extract;
mod files;
mod host_management;
mod hosts;
mod idempotency;
mod meta;
mod openapi;
mod pages;
mod processes;
mod sandboxes;
mod snapshots;
mod teams;
mod ws;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::extension::Extensions;
use crate::service::Services;
use crate::{Error, ErrorCode};

pub use error::{ApiError, ApiResult};
pub use extract::{Body, Caller, ClientAddress, Params, PlatformAdmin, Segments, Signed};
pub use openapi::{openapi_json, openapi_yaml};

/// Routes of one sandbox collection; mounted under two names.
fn sandbox_routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(sandboxes::create, sandboxes::list))
        .routes(routes!(around::stats))
        .routes(routes!(around::usage))
        .routes(routes!(sandboxes::get, sandboxes::destroy))
        .routes(routes!(sandboxes::ping))
        .routes(routes!(sandboxes::pause))
        .routes(routes!(sandboxes::resume))
        .routes(routes!(sandboxes::metrics))
        .routes(routes!(sandboxes::console))
        .routes(routes!(processes::exec))
        .routes(routes!(processes::list))
        .routes(routes!(processes::kill))
        .routes(routes!(ws::exec::exec_stream))
        .routes(routes!(ws::exec::process_stream))
        .routes(routes!(ws::pty::pty))
        .routes(routes!(files::write))
        .routes(routes!(files::stream_write))
        .routes(routes!(files::read))
        .routes(routes!(files::stream_read))
        .routes(routes!(files::list))
        .routes(routes!(files::mkdir))
        .routes(routes!(files::remove))
}

/// Everything that the document describes.
fn documented() -> OpenApiRouter<Services> {
    OpenApiRouter::with_openapi(openapi::base())
        .nest(openapi::SANDBOXES, sandbox_routes())
        .routes(routes!(snapshots::create, snapshots::list))
        .routes(routes!(snapshots::delete))
        .routes(routes!(snapshots::templates))
        .routes(routes!(hosts::register))
        .routes(routes!(hosts::refresh))
        .routes(routes!(hosts::heartbeat))
        .routes(routes!(hosts::sandbox_events))
        .merge(host_management::routes())
        .merge(accounts::routes())
        .merge(teams::routes())
        .merge(admin::routes())
        .merge(events::routes())
        .merge(around::routes())
        .routes(routes!(meta::health))
        .routes(routes!(meta::metrics))
}

/// The same with what extensions add.
fn described(extensions: &Extensions) -> OpenApiRouter<Services> {
    extensions.iter().fold(documented(), |described, extension| {
        described.merge(extension.routes())
    })
}

/// The whole API.
pub(crate) fn router(services: Services, extensions: &Extensions) -> Router {
    let (documented, _) = described(extensions).split_for_parts();
    let document = {
        let extensions = extensions.clone();
        move || openapi::complete(described(&extensions).into_openapi())
    };
    // The word that Wrenn's SDKs use; the same handlers.
    let (capsules, _) = sandbox_routes().split_for_parts();
    let mut router = Router::new()
        .merge(documented)
        .nest(openapi::CAPSULES, capsules)
        .merge(meta::undocumented(document))
        .merge(pages::routes())
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        // Bodies are limited where they are read: JSON by the extractor, uploads by the service.
        .layer(DefaultBodyLimit::disable())
        .layer(axum::middleware::from_fn_with_state(
            services.clone(),
            idempotency::once,
        ))
        .with_state(services.clone());
    for extension in extensions.iter() {
        router = extension.wrap(&services, router);
    }
    // Outside of the extensions' middleware: what it refuses is logged and counted, and its panics are caught.
    router
        .layer(axum::middleware::from_fn(meta::observe))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(services, audit::record))
}

async fn unknown_route(uri: Uri) -> ApiError {
    ApiError(Error::not_found("route", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    ApiError(Error::new(
        ErrorCode::MethodNotAllowed,
        format!("{method} is not possible on {path}"),
    ))
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    // The panic hook has logged message and place; the client learns neither.
    metrics::counter!("wrenn_http_panics_total").increment(1);
    let mut response = ApiError(Error::internal("a request handler panicked")).into_response();
    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    response
}
