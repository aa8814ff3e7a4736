//! Files in a sandbox. Contents stream through with back-pressure: a few chunks are in memory at a
//! time, however large the file.

use bytes::Bytes;
use connectrpc::StreamMessage;
use connectrpc::client::{CallOptions, ServerStream};
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use wrenn_proto::hostagent;
use wrenn_proto::hostagent::__buffa::oneof::write_file_stream_request::Part;
use wrenn_proto::hostagent::__buffa::view::ReadFileChunkView;

use super::{Services, validate};
use crate::domain::Principal;
use crate::hosts::rpc;
use crate::{Error, ErrorCode, Result};

/// Chunks on their way to the host.
const IN_FLIGHT: usize = 4;
/// Largest chunk sent to the host.
const CHUNK: usize = 256 * 1024;
/// How much of a refused upload is read and thrown away, so that its sender gets to see the refusal.
const DRAIN: u64 = 8 << 20;

/// What a request is about in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileTarget {
    /// Absolute, or relative to the user's home.
    pub path: String,
    /// Whose home that is, and who owns what is made; the template's default user when absent.
    pub user: Option<String>,
}

impl FileTarget {
    fn checked(self) -> Result<Self> {
        let Self { path, user } = self;
        validate::path(&path)?;
        Ok(Self {
            path,
            user: validate::word("user", user)?,
        })
    }
}

/// A file's bytes on their way out.
pub struct FileStream {
    first: Option<Bytes>,
    chunks: ServerStream<hyper::body::Incoming, ReadFileChunkView<'static>>,
}

impl Services {
    /// Writes a file from a stream. If the stream fails, the call to the host is cut short, not ended:
    /// half a file is never taken for a whole one.
    pub async fn write_file(
        &self,
        principal: Principal,
        id: &str,
        target: FileTarget,
        content: impl Stream<Item = Result<Bytes>> + Send,
    ) -> Result<()> {
        let FileTarget { path, user } = target.checked()?;
        let (sandbox, client) = self.running(principal, id, "write a file in").await?;
        let limit = self.config.limits.max_upload_bytes.unwrap_or(u64::MAX);
        // The sender outlives the call in every early return: the call sees an end only when `drop` says so.
        let (sender, receiver) = mpsc::channel(IN_FLIGHT);
        let target = hostagent::write_file_stream_request::Target {
            sandbox_id: sandbox.id.to_string(),
            path,
            user,
            ..Default::default()
        };
        let first = hostagent::WriteFileStreamRequest {
            part: Some(Part::from(target)),
            ..Default::default()
        };
        let requests = futures::stream::iter([first]).chain(ReceiverStream::new(receiver));
        let call = client.write_file_stream_with_options(requests, CallOptions::default());
        tokio::pin!(call);
        tokio::pin!(content);
        let mut size = 0u64;
        loop {
            let chunk = tokio::select! {
                // Before the end of the content only a refusal can come.
                answer = &mut call => {
                    let refusal = match answer {
                        Ok(_) => Error::new(ErrorCode::AgentError, "the host ended the upload early"),
                        Err(error) => rpc::guest_error(error),
                    };
                    drain(content).await;
                    return Err(refusal);
                }
                chunk = content.next() => chunk,
            };
            let Some(chunk) = chunk else { break };
            let mut chunk = chunk?;
            size = size.saturating_add(chunk.len() as u64);
            if size > limit {
                return Err(Error::new(
                    ErrorCode::PayloadTooLarge,
                    format!("a file must be at most {limit} bytes"),
                ));
            }
            while !chunk.is_empty() {
                let piece = chunk.split_to(chunk.len().min(CHUNK));
                let request = hostagent::WriteFileStreamRequest {
                    part: Some(Part::Data(piece.into())),
                    ..Default::default()
                };
                tokio::select! {
                    answer = &mut call => {
                        let refusal = match answer {
                            Ok(_) => Error::new(ErrorCode::AgentError, "the host ended the upload early"),
                            Err(error) => rpc::guest_error(error),
                        };
                        drain(content).await;
                        return Err(refusal);
                    }
                    sent = sender.send(request) => {
                        if sent.is_err() {
                            // The transport has let go of the stream; its answer says why.
                            break;
                        }
                    }
                }
            }
        }
        drop(sender);
        call.await.map_err(rpc::guest_error)?;
        self.used(sandbox.id, sandbox.last_active_at).await
    }

    /// Opens a file. Its first bytes are there when this returns, so a missing file is an error here and
    /// not in the middle of an answer.
    pub async fn read_file(&self, principal: Principal, id: &str, target: FileTarget) -> Result<FileStream> {
        let FileTarget { path, user } = target.checked()?;
        let (sandbox, client) = self.running(principal, id, "read a file of").await?;
        let request = hostagent::ReadFileRequest {
            sandbox_id: sandbox.id.to_string(),
            path,
            user,
            ..Default::default()
        };
        let chunks = self.first_answer(client.read_file_stream(request)).await?;
        let mut stream = FileStream { first: None, chunks };
        stream.first = stream.pull().await?;
        self.used(sandbox.id, sandbox.last_active_at).await?;
        Ok(stream)
    }

    /// A directory's entries.
    pub async fn list_dir(
        &self,
        principal: Principal,
        id: &str,
        target: FileTarget,
        depth: u32,
    ) -> Result<Vec<hostagent::FileEntry>> {
        let FileTarget { path, user } = target.checked()?;
        validate::within("depth", depth, 0, 64)?;
        let (sandbox, client) = self.running(principal, id, "list files of").await?;
        let request = hostagent::ListDirRequest {
            sandbox_id: sandbox.id.to_string(),
            path,
            depth,
            user,
            ..Default::default()
        };
        let answer = client
            .list_dir_with_options(request, self.short())
            .await
            .map_err(rpc::guest_error)?;
        Ok(answer.into_owned().entries)
    }

    /// Makes a directory with its parents.
    pub async fn make_dir(
        &self,
        principal: Principal,
        id: &str,
        target: FileTarget,
    ) -> Result<hostagent::FileEntry> {
        let FileTarget { path, user } = target.checked()?;
        let (sandbox, client) = self.running(principal, id, "make a directory in").await?;
        let request = hostagent::MakeDirRequest {
            sandbox_id: sandbox.id.to_string(),
            path,
            user,
            ..Default::default()
        };
        let answer = client
            .make_dir_with_options(request, self.short())
            .await
            .map_err(rpc::guest_error)?
            .into_owned();
        answer
            .entry
            .into_option()
            .ok_or_else(|| Error::new(ErrorCode::AgentError, "the host's answer lacks the directory"))
    }

    /// Removes a file, or a directory with what is in it.
    pub async fn remove_path(&self, principal: Principal, id: &str, target: FileTarget) -> Result<()> {
        let FileTarget { path, user } = target.checked()?;
        let (sandbox, client) = self.running(principal, id, "remove a file of").await?;
        let request = hostagent::RemovePathRequest {
            sandbox_id: sandbox.id.to_string(),
            path,
            user,
            ..Default::default()
        };
        client
            .remove_path_with_options(request, self.short())
            .await
            .map_err(rpc::guest_error)
            .map(drop)
    }
}

impl FileStream {
    async fn pull(&mut self) -> Result<Option<Bytes>> {
        loop {
            let message: Option<StreamMessage<hostagent::ReadFileChunk>> =
                self.chunks.message().await.map_err(rpc::guest_error)?;
            let Some(message) = message else { return Ok(None) };
            let chunk = message.to_owned_message();
            if !chunk.data.is_empty() {
                return Ok(Some(chunk.data.into()));
            }
        }
    }

    /// The bytes. An error in the middle ends the stream with it.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> + Send + 'static {
        futures::stream::unfold(Some(self), |state| async move {
            let mut file = state?;
            let next = match file.first.take() {
                Some(first) => Ok(Some(first)),
                None => file.pull().await,
            };
            match next {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(file))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}

async fn drain(mut content: std::pin::Pin<&mut (impl Stream<Item = Result<Bytes>> + Send)>) {
    let mut left = DRAIN;
    while let Some(Ok(chunk)) = content.next().await {
        left = left.saturating_sub(chunk.len() as u64);
        if left == 0 {
            return;
        }
    }
}
