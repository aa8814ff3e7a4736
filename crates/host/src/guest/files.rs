//! Files in the guest. Contents stream in both directions; nothing here holds a whole file.

use bytes::Bytes;
use connectrpc::client::CallOptions;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use http::Method;
use http::header::{CONTENT_TYPE, HeaderValue};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use wrenn_proto::{filesystem as envd, hostagent as host};

use super::{FIRST_ANSWER, GuestClient, begins, empty, request, user_header};
use crate::error::{HostError, Result};

pub(crate) type Chunks = std::pin::Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

impl GuestClient {
    /// Writes a file from a stream; an error in the stream leaves the guest's file incomplete and is returned.
    pub(crate) async fn write_file(
        &self,
        path: &str,
        user: Option<&str>,
        content: impl Stream<Item = std::io::Result<Bytes>> + Send + Sync + 'static,
    ) -> Result<String> {
        let body = BodyExt::boxed(StreamBody::new(content.map_ok(Frame::data)));
        let mut request = request(Method::POST, &files_path(path, user), body);
        request
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let answer = self.http(request).await?;
        let bytes = self.expect_success(answer).await.map_err(unknown_user)?;
        let written: Vec<wrenn_proto::guest::WrittenFile> = serde_json::from_slice(&bytes)
            .map_err(|error| HostError::Guest(format!("its answer to an upload makes no sense: {error}")))?;
        Ok(written
            .into_iter()
            .next()
            .map(|file| file.path)
            .unwrap_or_else(|| path.to_owned()))
    }

    /// Reads a file as a stream of chunks.
    pub(crate) async fn read_file(&self, path: &str, user: Option<&str>) -> Result<Chunks> {
        let answer = self
            .http(request(Method::GET, &files_path(path, user), empty()))
            .await?;
        if !answer.status().is_success() {
            let refused = tokio::time::timeout(FIRST_ANSWER, self.expect_success(answer)).await;
            refused
                .map_err(|_| HostError::Guest("it does not say why it refuses".to_owned()))?
                .map_err(unknown_user)?;
            return Err(HostError::Guest(
                "it answered a download with an odd status".to_owned(),
            ));
        }
        let chunks = answer
            .into_body()
            .into_data_stream()
            .map_err(|error| HostError::Guest(format!("the file's content broke off: {error}")));
        Ok(Box::pin(chunks))
    }

    pub(crate) async fn stat(&self, path: String, user: Option<&str>) -> Result<host::FileEntry> {
        let request = envd::StatRequest {
            path,
            ..Default::default()
        };
        let answer = begins(
            self.inner
                .filesystem
                .stat_with_options(request, user_header(user)),
        )
        .await?;
        Ok(entry(answer.into_owned().entry.into_option().unwrap_or_default()))
    }

    pub(crate) async fn list_dir(
        &self,
        path: String,
        depth: u32,
        user: Option<&str>,
    ) -> Result<Vec<host::FileEntry>> {
        let request = envd::ListDirRequest {
            path,
            depth,
            ..Default::default()
        };
        let options: CallOptions = user_header(user);
        let answer = begins(self.inner.filesystem.list_dir_with_options(request, options)).await?;
        Ok(answer.into_owned().entries.into_iter().map(entry).collect())
    }

    pub(crate) async fn make_dir(&self, path: String, user: Option<&str>) -> Result<host::FileEntry> {
        let request = envd::MakeDirRequest {
            path,
            ..Default::default()
        };
        let answer = begins(
            self.inner
                .filesystem
                .make_dir_with_options(request, user_header(user)),
        )
        .await?;
        Ok(entry(answer.into_owned().entry.into_option().unwrap_or_default()))
    }

    pub(crate) async fn remove(&self, path: String, user: Option<&str>) -> Result<()> {
        let request = envd::RemoveRequest {
            path,
            ..Default::default()
        };
        begins(
            self.inner
                .filesystem
                .remove_with_options(request, user_header(user)),
        )
        .await
        .map(drop)
    }
}

/// Turns a stream that is merely `Send` into a body's content, which has to be `Sync` as well.
pub(crate) fn sync_stream<T: Send + 'static>(
    stream: impl Stream<Item = T> + Send + 'static,
) -> impl Stream<Item = T> + Send + Sync + 'static {
    sync_wrapper::SyncStream::new(stream.boxed())
}

/// The guest's word for an unknown user is a refusal of the caller; for our caller it is a bad argument.
fn unknown_user(error: HostError) -> HostError {
    match error {
        HostError::GuestRefused(refusal) if refusal.code == connectrpc::ErrorCode::Unauthenticated => {
            HostError::InvalidArgument {
                field: "user",
                message: refusal.message.unwrap_or_default(),
            }
        }
        error => error,
    }
}

fn files_path(path: &str, user: Option<&str>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("path", path);
    if let Some(user) = user {
        query.append_pair("username", user);
    }
    format!("/files?{}", query.finish())
}

fn entry(entry: envd::EntryInfo) -> host::FileEntry {
    use buffa::EnumValue;
    let kind = match entry.r#type {
        EnumValue::Known(envd::FileType::FILE_TYPE_DIRECTORY) => host::EntryType::ENTRY_TYPE_DIRECTORY,
        EnumValue::Known(envd::FileType::FILE_TYPE_SYMLINK) => host::EntryType::ENTRY_TYPE_SYMLINK,
        _ if entry.symlink_target.is_some() => host::EntryType::ENTRY_TYPE_SYMLINK,
        _ => host::EntryType::ENTRY_TYPE_FILE,
    };
    host::FileEntry {
        name: entry.name,
        path: entry.path,
        r#type: kind.into(),
        size: entry.size,
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        modified_at: entry.modified_time.into_option().map_or(0, |time| time.seconds),
        symlink_target: entry.symlink_target,
        ..Default::default()
    }
}
