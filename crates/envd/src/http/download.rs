//! `GET /files`: a file's bytes, streamed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, State};
use axum::response::Response;
use bytes::BytesMut;
use futures::StreamExt;
use http::header::{ACCEPT_ENCODING, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, VARY};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_util::io::ReaderStream;

use super::Failure;
use super::signature::{FilesQuery, Operation};
use crate::files::paths;
use crate::logging::log;
use crate::state::Agent;

/// One read from disk, and one frame to the client.
const CHUNK: usize = 128 * 1024;

pub(crate) async fn download(
    State(agent): State<Arc<Agent>>,
    headers: HeaderMap,
    query: Result<Query<FilesQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Failure> {
    let Query(query) = query.map_err(|error| Failure::bad_request(error.body_text()))?;
    query.authorize(
        &headers,
        agent.settings().access_token.as_deref(),
        Operation::Read,
    )?;
    if !accepts_identity(&headers) {
        return Err(Failure::new(
            StatusCode::NOT_ACCEPTABLE,
            "only the identity encoding is available",
        ));
    }
    let path = target(&agent, &query, query.path.as_deref().unwrap_or_default())?;
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let opened = tokio::task::spawn_blocking(move || open(&path));
    let (file, size) = opened
        .await
        .map_err(|_| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "the file cannot be read"))??;
    let (body, length) = body(tokio::fs::File::from_std(file), size).await?;

    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    if let Ok(disposition) = HeaderValue::from_str(&content_disposition(&name)) {
        headers.insert(CONTENT_DISPOSITION, disposition);
    }
    Ok(response)
}

/// The file that a request is about, as its user sees it.
pub(super) fn target(agent: &Agent, query: &FilesQuery, path: &str) -> Result<PathBuf, Failure> {
    let user = agent
        .resolve_user(query.username.as_deref())
        .map_err(|name| Failure::unauthorized(format!("invalid username: '{name}'")))?;
    paths::resolve(path, &user, agent.settings().default_workdir.as_deref()).map_err(Failure::bad_request)
}

/// Opens a regular file; anything else may block for ever, or is no sequence of bytes.
fn open(path: &std::path::Path) -> Result<(File, u64), Failure> {
    // Some files in /proc are regular by their mode and block all the same.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nonblock)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Failure::new(
                StatusCode::NOT_FOUND,
                format!("path '{}' does not exist", path.display()),
            ),
            _ => Failure::bad_request(format!("path '{}' cannot be read: {error}", path.display())),
        })?;
    let found = file
        .metadata()
        .map_err(|error| Failure::bad_request(format!("'{}': {error}", path.display())))?;
    if found.is_dir() {
        return Err(Failure::bad_request(format!(
            "path '{}' is a directory",
            path.display()
        )));
    }
    if !found.is_file() {
        return Err(Failure::bad_request(format!(
            "path '{}' is not a regular file",
            path.display()
        )));
    }
    Ok((file, found.len()))
}

/// A body and its length, where that is certain. The files of /proc claim to be empty, so the first chunk of
/// such a file is read before anything is promised.
async fn body(mut file: tokio::fs::File, size: u64) -> Result<(Body, Option<u64>), Failure> {
    file.set_max_buf_size(CHUNK);
    if size > 0 {
        // A file that grows meanwhile is cut, one that shrinks breaks the response, which the client notices.
        return Ok((stream(file.take(size)), Some(size)));
    }
    let mut first = BytesMut::new();
    while first.len() < CHUNK {
        first.reserve(16 * 1024);
        match file.read_buf(&mut first).await {
            Ok(0) => {
                let length = u64::try_from(first.len()).ok();
                return Ok((Body::from(first.freeze()), length));
            }
            Ok(_) => {}
            Err(error) => return Err(Failure::bad_request(format!("the file cannot be read: {error}"))),
        }
    }
    let first = futures::stream::iter([io::Result::Ok(first.freeze())]);
    Ok((
        Body::from_stream(first.chain(ReaderStream::with_capacity(file, CHUNK))),
        None,
    ))
}

fn stream(reader: impl AsyncRead + Send + 'static) -> Body {
    Body::from_stream(ReaderStream::with_capacity(reader, CHUNK).inspect(|chunk| {
        if let Err(error) = chunk {
            log!("download: {error}");
        }
    }))
}

/// `inline` with the name in both forms: plain where it can be, percent-encoded for everything else.
fn content_disposition(name: &str) -> String {
    let plain: String = name
        .chars()
        .map(|c| {
            if (' '..='~').contains(&c) && c != '"' && c != '\\' {
                c
            } else {
                '_'
            }
        })
        .collect();
    let mut header = format!("inline; filename=\"{plain}\"");
    if plain != name {
        header.push_str("; filename*=UTF-8''");
        for byte in name.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                header.push(char::from(byte));
            } else {
                header.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    header
}

/// Whether the client takes the bytes as they are, which is so unless it says otherwise.
fn accepts_identity(headers: &HeaderMap) -> bool {
    let mut any_refused = false;
    for value in headers
        .get_all(ACCEPT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok())
    {
        for item in value.split(',') {
            let mut parts = item.split(';');
            let coding = parts.next().unwrap_or_default().trim();
            let refused = parts
                .filter_map(|part| part.trim().strip_prefix("q="))
                .any(|weight| weight.trim().parse::<f32>().is_ok_and(|weight| weight == 0.0));
            if coding.eq_ignore_ascii_case("identity") {
                return !refused;
            }
            any_refused |= coding == "*" && refused;
        }
    }
    !any_refused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_acceptable_unless_refused() {
        let accepts = |value: &'static str| {
            accepts_identity(&HeaderMap::from_iter([(
                ACCEPT_ENCODING,
                HeaderValue::from_static(value),
            )]))
        };
        assert!(accepts_identity(&HeaderMap::new()));
        assert!(accepts("gzip, deflate"));
        assert!(accepts("*;q=0, identity"));
        assert!(!accepts("gzip, identity;q=0"));
        assert!(!accepts("gzip, *;q=0.0"));
    }

    #[test]
    fn names_survive_the_header() {
        assert_eq!(content_disposition("a b.txt"), "inline; filename=\"a b.txt\"");
        assert_eq!(
            content_disposition("é\".x"),
            "inline; filename=\"__.x\"; filename*=UTF-8''%C3%A9%22.x"
        );
    }
}
