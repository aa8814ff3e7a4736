//! `POST /files`: bytes into files, streamed.
//!
//! The body is one file (`application/octet-stream`) or several (`multipart/form-data`, field `file`). Nothing
//! is held in memory beyond one buffer. The order of system calls is visible to watchers, and clients rely on
//! it: a new small file is created, given to its user, and written in one go, which makes three events.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{FromRequest, Multipart, Query, Request, State};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use rustix::fs::{XattrFlags, fremovexattr, fsetxattr};
use tokio::io::AsyncWriteExt;
use wrenn_proto::guest::WrittenFile;

use super::Failure;
use super::signature::{FilesQuery, Operation};
use crate::files::entry::{XATTR_PREFIX, metadata};
use crate::files::{paths, tree};
use crate::logging::log;
use crate::state::{Agent, lock};
use crate::users::User;

/// Gathered before each write: also the size up to which a new file is written in one go.
const BUFFER: usize = 256 * 1024;
const NO_SPACE: &str = "not enough disk space for the file";
const METADATA_HEADER: &str = "x-metadata-";
/// What a refused client may still send before the connection is closed.
const DISCARD_BYTES: usize = 256 * 1024 * 1024;
const DISCARD_TIME: Duration = Duration::from_secs(20);
/// The kernel's bound of an attribute's name.
const MAX_XATTR_NAME: usize = 255;

pub(crate) async fn upload(
    State(agent): State<Arc<Agent>>,
    query: Result<Query<FilesQuery>, axum::extract::rejection::QueryRejection>,
    request: Request,
) -> Result<Json<Vec<WrittenFile>>, Failure> {
    let (head, body) = request.into_parts();
    let body = SharedBody(Arc::new(Mutex::new(body.into_data_stream())));
    let request = Request::from_parts(head, Body::from_stream(body.clone()));
    let written = receive(agent, query, request).await;
    if written.is_err() {
        body.discard().await;
    }
    Ok(Json(written?))
}

async fn receive(
    agent: Arc<Agent>,
    query: Result<Query<FilesQuery>, axum::extract::rejection::QueryRejection>,
    request: Request,
) -> Result<Vec<WrittenFile>, Failure> {
    let Query(query) = query.map_err(|error| Failure::bad_request(error.body_text()))?;
    query.authorize(
        request.headers(),
        agent.settings().access_token.as_deref(),
        Operation::Write,
    )?;
    let user = agent
        .resolve_user(query.username.as_deref())
        .map_err(|name| Failure::unauthorized(format!("invalid username: '{name}'")))?;
    let upload = Upload {
        expected: expected_length(request.headers()),
        workdir: agent.settings().default_workdir.clone(),
        metadata: metadata_of(request.headers())?,
        agent,
        user,
    };
    let kind = request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let kind = kind
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    let query_path = query.path.as_deref().filter(|path| !path.is_empty());
    match kind.as_str() {
        "application/octet-stream" => {
            let path =
                query_path.ok_or_else(|| Failure::bad_request("the path query parameter is required"))?;
            let body = request
                .into_body()
                .into_data_stream()
                .map_err(|error| error.to_string());
            Ok(vec![upload.write(path, body).await?])
        }
        "multipart/form-data" => {
            let parts = Multipart::from_request(request, &()).await;
            let parts = parts.map_err(|error| Failure::new(error.status(), error.body_text()))?;
            upload.write_parts(query_path, parts).await
        }
        _ => {
            let message = "content type must be application/octet-stream or multipart/form-data";
            Err(Failure::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
        }
    }
}

/// The request's body, of which the rest can still be read when its reader has given up.
#[derive(Clone)]
struct SharedBody(Arc<Mutex<BodyDataStream>>);

impl Stream for SharedBody {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        lock(&self.0).poll_next_unpin(cx)
    }
}

impl SharedBody {
    /// Reads the rest and drops it, within bounds. A connection that is closed while the client still sends is
    /// reset, and the client never sees the answer that says what is wrong.
    async fn discard(mut self) {
        let rest = async {
            let mut length = 0;
            while let Some(Ok(chunk)) = self.next().await {
                length += chunk.len();
                if length > DISCARD_BYTES {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(DISCARD_TIME, rest).await;
    }
}

/// The length of what will be written, where the client says so. A multipart body is a little longer than its
/// files, which does not matter; of a packed one the length says nothing.
fn expected_length(headers: &HeaderMap) -> u64 {
    let packed = headers
        .get(CONTENT_ENCODING)
        .is_some_and(|encoding| encoding != "identity");
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    length.filter(|_| !packed).unwrap_or(0)
}

/// The metadata that the headers carry; names arrive in lower case.
fn metadata_of(headers: &HeaderMap) -> Result<BTreeMap<String, String>, Failure> {
    let mut metadata = BTreeMap::new();
    for (name, value) in headers {
        let Some(key) = name
            .as_str()
            .strip_prefix(METADATA_HEADER)
            .filter(|key| !key.is_empty())
        else {
            continue;
        };
        if key.len() + XATTR_PREFIX.len() > MAX_XATTR_NAME {
            return Err(Failure::bad_request(format!("metadata key '{key}' is too long")));
        }
        let value = value.to_str().map_err(|_| {
            Failure::bad_request(format!(
                "the value of metadata key '{key}' is not printable ASCII"
            ))
        })?;
        metadata.insert(key.to_owned(), value.to_owned());
    }
    Ok(metadata)
}

struct Upload {
    agent: Arc<Agent>,
    expected: u64,
    user: User,
    workdir: Option<String>,
    metadata: BTreeMap<String, String>,
}

impl Upload {
    async fn write_parts(
        &self,
        path: Option<&str>,
        mut parts: Multipart,
    ) -> Result<Vec<WrittenFile>, Failure> {
        let malformed =
            |error: axum::extract::multipart::MultipartError| Failure::new(error.status(), error.body_text());
        let mut written: Vec<WrittenFile> = Vec::new();
        let mut seen = HashSet::new();
        while let Some(part) = parts.next_field().await.map_err(malformed)? {
            if part.name() != Some("file") {
                continue;
            }
            // The query names the file of a single upload; several files carry their paths as file names.
            let target = path.or(part.file_name()).filter(|path| !path.is_empty());
            let target = target
                .ok_or_else(|| Failure::bad_request("a file needs a name or the path query parameter"))?;
            let target = target.to_owned();
            if !seen.insert(self.resolve(&target)?) {
                let message = format!("only one file can be written to the path '{target}' in one request");
                return Err(Failure::bad_request(message));
            }
            written.push(
                self.write(&target, part.map_err(|error| error.body_text()))
                    .await?,
            );
        }
        if written.is_empty() {
            return Err(Failure::bad_request("the request holds no field named file"));
        }
        Ok(written)
    }

    fn resolve(&self, path: &str) -> Result<PathBuf, Failure> {
        paths::resolve(path, &self.user, self.workdir.as_deref()).map_err(Failure::bad_request)
    }

    async fn write(
        &self,
        path: &str,
        body: impl Stream<Item = Result<Bytes, String>>,
    ) -> Result<WrittenFile, Failure> {
        let path = self.resolve(path)?;
        let target = self.open(path.clone()).await?;
        let outcome = fill(target.file, body).await;
        self.agent.watchers.sync().await;
        if let Err(failure) = outcome {
            if target.created {
                // Half a file that nobody asked for would also keep a full disk full.
                let _ = tokio::fs::remove_file(&path).await;
            }
            return Err(failure);
        }
        Ok(WrittenFile {
            name: path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            path: path.to_string_lossy().into_owned(),
            kind: "file".to_owned(),
            metadata: (!self.metadata.is_empty()).then(|| self.metadata.clone()),
        })
    }

    /// Creates what is missing above the file, covers it with the watches that want it, and opens the file.
    async fn open(&self, path: PathBuf) -> Result<Target, Failure> {
        let (agent, user, metadata) = (self.agent.clone(), self.user.clone(), self.metadata.clone());
        let expected = self.expected;
        tokio::task::spawn_blocking(move || {
            if let Some(parent) = path.parent()
                && tree::make_dirs(parent, &user).map_err(|error| refused(parent, &error))?
            {
                agent.watchers.sync_here();
            }
            require_space(&path, expected)?;
            open_target(&path, &user, &metadata)
        })
        .await
        .map_err(|_| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "the file cannot be opened"))?
    }
}

/// Refuses a file for which there is no room before anything of it is written. The agent is root and could use
/// what the file system reserves for root, so its own writes would fail too late.
fn require_space(path: &Path, expected: u64) -> Result<(), Failure> {
    let Some(Ok(disk)) = path.parent().map(rustix::fs::statvfs) else {
        return Ok(());
    };
    let present = std::fs::metadata(path).map_or(0, |found| found.blocks().saturating_mul(512));
    let room = disk
        .f_bavail
        .saturating_mul(disk.f_frsize)
        .saturating_add(present);
    // The kernel's own file systems have no size.
    if disk.f_blocks > 0 && expected > room {
        return Err(Failure::new(StatusCode::INSUFFICIENT_STORAGE, NO_SPACE));
    }
    Ok(())
}

struct Target {
    file: File,
    created: bool,
}

fn open_target(path: &Path, user: &User, wanted: &BTreeMap<String, String>) -> Result<Target, Failure> {
    let found = std::fs::metadata(path);
    if let Ok(found) = &found
        && !found.is_file()
    {
        let what = if found.is_dir() {
            "a directory"
        } else {
            "not a regular file"
        };
        return Err(Failure::bad_request(format!(
            "path '{}' is {what}",
            path.display()
        )));
    }
    let created = found.is_err();
    // What is there is not given up before its new attributes are set: these can be refused for their size, or for the
    // file system. Without any, one call empties the file.
    let careful = !created && !wanted.is_empty();
    // Should the path become a pipe just now, this refuses instead of waiting for its reader.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(!careful)
        .mode(0o644)
        .custom_flags(nonblock)
        .open(path)
        .map_err(|error| refused(path, &error))?;
    let own = || match fchown(&file, Some(user.uid), Some(user.gid)) {
        // Without root the file belongs to the agent's own user, the only one it can act as.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        outcome => outcome,
    };
    let prepared = if careful {
        replace_metadata(&file, &metadata(path), wanted)
            .and_then(|()| own())
            .and_then(|()| file.set_len(0))
    } else {
        let present = if created { BTreeMap::new() } else { metadata(path) };
        own().and_then(|()| replace_metadata(&file, &present, wanted))
    };
    match prepared {
        Ok(()) => Ok(Target { file, created }),
        Err(error) => {
            if created {
                // Nobody asked for a file without content and attributes.
                let _ = std::fs::remove_file(path);
            }
            Err(refused(path, &error))
        }
    }
}

/// Gives a file the attributes `wanted` instead of `present`, all or none.
fn replace_metadata(
    file: &File,
    present: &BTreeMap<String, String>,
    wanted: &BTreeMap<String, String>,
) -> io::Result<()> {
    let set = |key: &str, value: Option<&String>| {
        let name = format!("{XATTR_PREFIX}{key}");
        match value {
            Some(value) => fsetxattr(file, name, value.as_bytes(), XattrFlags::empty()),
            None => fremovexattr(file, name),
        }
    };
    let mut touched = Vec::new();
    // Those that go first: they share their room with those that come.
    for key in present.keys().filter(|key| !wanted.contains_key(*key)) {
        let _ = set(key, None);
        touched.push(key);
    }
    for (key, value) in wanted {
        if let Err(error) = set(key, Some(value)) {
            for key in touched.into_iter().rev() {
                let _ = set(key, present.get(key));
            }
            return Err(error.into());
        }
        touched.push(key);
    }
    Ok(())
}

/// Copies the body into the file, a buffer at a time.
async fn fill(file: File, body: impl Stream<Item = Result<Bytes, String>>) -> Result<(), Failure> {
    let mut file = tokio::fs::File::from_std(file);
    file.set_max_buf_size(BUFFER);
    let mut body = std::pin::pin!(body);
    let mut buffer = BytesMut::new();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|error| Failure::bad_request(format!("the body broke off: {error}")))?;
        buffer.extend_from_slice(&chunk);
        if buffer.len() >= BUFFER {
            file.write_all(&buffer)
                .await
                .map_err(|error| write_failed(&error))?;
            buffer.clear();
        }
    }
    if !buffer.is_empty() {
        file.write_all(&buffer)
            .await
            .map_err(|error| write_failed(&error))?;
    }
    // The last write still runs on another thread, and its error would be lost.
    file.flush().await.map_err(|error| write_failed(&error))
}

fn write_failed(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Failure::new(
            StatusCode::INSUFFICIENT_STORAGE,
            "not enough disk space for the file",
        ),
        io::ErrorKind::FileTooLarge => Failure::bad_request("the file is too large for its file system"),
        _ => {
            log!("upload: {error}");
            Failure::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("the file cannot be written: {error}"),
            )
        }
    }
}

fn refused(path: &Path, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => write_failed(error),
        _ => Failure::bad_request(format!("path '{}' cannot be written: {error}", path.display())),
    }
}
