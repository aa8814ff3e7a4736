//! Files: uploads and downloads stream, the rest is JSON.

use axum::Json;
use axum::body::Body as StreamBody;
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use wrenn_proto::rest::{ErrorBody, FileList, FilePath, MadeDir};

use super::convert;
use super::error::ApiResult;
use super::extract::{Body, Caller, Segments};
use crate::domain::Principal;
use crate::service::Services;
use crate::service::files::FileTarget;
use crate::{Error, Result};

/// Largest part other than the file.
const MAX_TEXT_PART: usize = 8192;

/// A multipart upload, for the document.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "describes the form in the OpenAPI document")]
pub(crate) struct Upload {
    /// Where to write it; has to come before the file.
    path: String,
    /// User whose home a relative path starts from, and who owns what is made; the template's default user
    /// when absent. Has to come before the file.
    user: Option<String>,
    /// The file's bytes.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
}

/// Write a file.
///
/// A multipart form with `path` first, then `user` if wanted, and `file` last; the file streams through and may be
/// of any size.
#[utoipa::path(post, path = "/{id}/files/write", tag = "files",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body(content = Upload, content_type = "multipart/form-data"), responses(
    (status = 204, description = "Written"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 502, body = ErrorBody, description = "`agent_error`")))]
pub(crate) async fn write(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    request: Request,
) -> ApiResult<StatusCode> {
    upload(&services, caller, &id, request).await
}

/// Write a file (the streaming SDK method's name for the same).
#[utoipa::path(post, path = "/{id}/files/stream/write", tag = "files",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body(content = Upload, content_type = "multipart/form-data"), responses(
    (status = 204, description = "Written"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running"),
    (status = 413, body = ErrorBody, description = "`payload_too_large`"),
    (status = 502, body = ErrorBody, description = "`agent_error`")))]
pub(crate) async fn stream_write(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    request: Request,
) -> ApiResult<StatusCode> {
    upload(&services, caller, &id, request).await
}

/// A body's target, and how deep to list it.
fn target(FilePath { path, depth, user }: FilePath) -> (FileTarget, u32) {
    (FileTarget { path, user }, depth.unwrap_or_default())
}

async fn upload(services: &Services, caller: Principal, id: &str, request: Request) -> ApiResult<StatusCode> {
    let mut form = Multipart::from_request(request, services)
        .await
        .map_err(|_| Error::invalid("the body must be multipart/form-data with the parts path and file"))?;
    let broken = |error: axum::extract::multipart::MultipartError| {
        Error::invalid(format!(
            "the multipart body is malformed or ended early: {}",
            error.body_text()
        ))
    };
    let (mut path, mut user) = (None, None);
    while let Some(mut part) = form.next_field().await.map_err(broken)? {
        match part.name() {
            Some(name @ ("path" | "user")) => {
                let name = name.to_owned();
                let mut text = Vec::new();
                while let Some(chunk) = part.chunk().await.map_err(broken)? {
                    text.extend_from_slice(&chunk);
                    if text.len() > MAX_TEXT_PART {
                        return Err(Error::invalid(format!("{name} is too long")).into());
                    }
                }
                let text =
                    String::from_utf8(text).map_err(|_| Error::invalid(format!("{name} must be UTF-8")))?;
                *(if name == "path" { &mut path } else { &mut user }) = Some(text);
            }
            Some("file") => {
                let path =
                    path.ok_or_else(|| Error::invalid("the part path has to come before the part file"))?;
                let target = FileTarget { path, user };
                let content = futures::stream::unfold(Some(part), |part| async move {
                    let mut part = part?;
                    match part.chunk().await {
                        Ok(Some(chunk)) => Some((Ok(chunk), Some(part))),
                        Ok(None) => None,
                        Err(error) => {
                            let error =
                                Error::invalid(format!("the upload ended early: {}", error.body_text()));
                            Some((Err(error), None))
                        }
                    }
                });
                services.write_file(caller, id, target, content).await?;
                return Ok(StatusCode::NO_CONTENT);
            }
            // Parts that nobody asked for are skipped; the next call to the form discards them.
            _ => {}
        }
    }
    Err(Error::invalid("the part file is missing").into())
}

/// Read a file.
#[utoipa::path(post, path = "/{id}/files/read", tag = "files",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body = FilePath, responses(
    (status = 200, content_type = "application/octet-stream", body = Vec<u8>, description = "The bytes"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running"),
    (status = 502, body = ErrorBody, description = "`agent_error`")))]
pub(crate) async fn read(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Body(body): Body<FilePath>,
) -> ApiResult<Response> {
    download(&services, caller, &id, body).await
}

/// Read a file (the streaming SDK method's name for the same).
#[utoipa::path(post, path = "/{id}/files/stream/read", tag = "files",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body = FilePath, responses(
    (status = 200, content_type = "application/octet-stream", body = Vec<u8>, description = "The bytes"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running"),
    (status = 502, body = ErrorBody, description = "`agent_error`")))]
pub(crate) async fn stream_read(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Body(body): Body<FilePath>,
) -> ApiResult<Response> {
    download(&services, caller, &id, body).await
}

async fn download(services: &Services, caller: Principal, id: &str, body: FilePath) -> ApiResult<Response> {
    let file = services.read_file(caller, id, target(body).0).await?;
    // An error in the middle cuts the connection: the client sees an incomplete answer, not a short file.
    let bytes = file
        .into_stream()
        .map(|chunk: Result<Bytes>| chunk.map_err(axum::Error::new));
    let headers = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((headers, StreamBody::from_stream(bytes)).into_response())
}

/// List a directory.
#[utoipa::path(post, operation_id = "list_files", path = "/{id}/files/list", tag = "files",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body = FilePath, responses(
    (status = 200, body = FileList),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running")))]
pub(crate) async fn list(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Body(body): Body<FilePath>,
) -> ApiResult<Json<FileList>> {
    let (target, depth) = target(body);
    let entries = services.list_dir(caller, &id, target, depth).await?;
    Ok(Json(FileList {
        entries: entries.into_iter().map(convert::entry).collect(),
    }))
}

/// Make a directory with its parents.
#[utoipa::path(post, path = "/{id}/files/mkdir", tag = "files",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body = FilePath, responses(
    (status = 200, body = MadeDir),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`conflict`: it exists; `invalid_state`: not running")))]
pub(crate) async fn mkdir(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Body(body): Body<FilePath>,
) -> ApiResult<Json<MadeDir>> {
    let entry = services.make_dir(caller, &id, target(body).0).await?;
    Ok(Json(MadeDir {
        entry: convert::entry(entry),
    }))
}

/// Remove a file, or a directory with what is in it.
#[utoipa::path(post, path = "/{id}/files/remove", tag = "files",
    params(("id" = String, Path, description = "`sb-{uuid}`")), security(("api_key" = []), ("session" = [])),
    request_body = FilePath, responses(
    (status = 204, description = "Removed"),
    (status = 400, body = ErrorBody, description = "`invalid_request`"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 404, body = ErrorBody, description = "`not_found`"),
    (status = 409, body = ErrorBody, description = "`invalid_state`: not running")))]
pub(crate) async fn remove(
    State(services): State<Services>,
    Caller(caller): Caller,
    Segments(id): Segments<String>,
    Body(body): Body<FilePath>,
) -> ApiResult<StatusCode> {
    services.remove_path(caller, &id, target(body).0).await?;
    Ok(StatusCode::NO_CONTENT)
}
