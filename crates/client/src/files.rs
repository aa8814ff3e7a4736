//! Files of a sandbox: whole, streamed, and directories.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use reqwest::multipart::{Form, Part};
use reqwest::{Body, Response};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;
use wrenn_proto::rest::{FileEntry, FileList, FilePath, MadeDir};

use crate::client::{CALL_TIMEOUT, Client, Retry};
use crate::error::{Error, Result};
use crate::sandboxes::SandboxHandle;

/// Bytes read from a local source at a time.
const CHUNK: usize = 256 << 10;
/// Largest file that [`Files::read`] takes into memory.
const MAX_READ: usize = 256 << 20;
/// How long writing a file from memory may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(600);

/// The files of one sandbox. Paths are absolute, or relative to the home of its default user, or of another one
/// ([`Self::as_user`]).
///
/// ```no_run
/// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
/// let files = sandbox.files();
/// files.write("data/in.csv", "a,b\n1,2\n").await?;
/// assert_eq!(files.read("data/in.csv").await?, "a,b\n1,2\n");
/// for entry in files.list("data", 1).await? {
///     println!("{} {}", entry.permissions, entry.name);
/// }
/// files.remove("data").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Files {
    sandbox: SandboxHandle,
    user: Option<String>,
}

/// A file on its way out of a sandbox.
///
/// ```no_run
/// use futures::StreamExt;
///
/// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
/// let mut chunks = Box::pin(sandbox.files().read_stream("/var/log/dpkg.log").await?.into_stream());
/// while let Some(chunk) = chunks.next().await {
///     println!("{} bytes", chunk?.len());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Download {
    answer: Response,
    url: String,
}

impl Download {
    /// Its size, where the server tells it beforehand.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.answer.content_length()
    }

    /// Its bytes. An item that is an error is the last one, and means that bytes are missing.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> + Send {
        let url = self.url;
        self.answer
            .bytes_stream()
            .map_err(move |error| Error::transport(&url, error.without_url()))
    }
}

impl Files {
    pub(crate) fn new(sandbox: SandboxHandle) -> Self {
        Self { sandbox, user: None }
    }

    /// The same files as another user sees them: relative paths start from that user's home, and what is made is
    /// theirs.
    ///
    /// ```no_run
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
    /// sandbox.files().as_user("root").write(".ssh/authorized_keys", "ssh-ed25519 …\n").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A user that the sandbox does not know is an [`Error::InvalidRequest`] of each call.
    #[must_use]
    pub fn as_user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    fn at(&self, path: &str, depth: Option<u32>) -> FilePath {
        FilePath {
            path: path.to_owned(),
            depth,
            user: self.user.clone(),
        }
    }

    fn client(&self) -> &Client {
        self.sandbox.client()
    }

    fn post(&self, route: &[&str], body: &FilePath) -> reqwest::RequestBuilder {
        let mut path = vec!["v1", "sandboxes", self.sandbox.id(), "files"];
        path.extend(route);
        self.client().post(&path, body)
    }

    /// A whole file of up to 256 MiB; see [`Self::read_stream`] and [`Self::download`] for more.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::InvalidRequest`] when the path is a directory.
    pub async fn read(&self, path: &str) -> Result<Bytes> {
        let request = self.post(&["stream", "read"], &self.at(path, None));
        let answer = self.client().send(request, Retry::Reads).await?;
        self.client().read(answer, MAX_READ).await
    }

    /// A file of any size, as a stream.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_stream(&self, path: &str) -> Result<Download> {
        let request = self.post(&["stream", "read"], &self.at(path, None));
        let answer = self.client().send(request, Retry::Reads).await?;
        Ok(Download {
            answer,
            url: self.client().base_url().to_owned(),
        })
    }

    /// Copies a file of any size into a writer, and returns its size.
    ///
    /// ```no_run
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut target = tokio::fs::File::create("result.parquet").await?;
    /// let bytes = sandbox.files().download("/home/user/result.parquet", &mut target).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Self::read`]; [`Error::Io`] when the writer fails.
    pub async fn download(&self, path: &str, target: &mut (impl AsyncWrite + Unpin)) -> Result<u64> {
        let io = |source| Error::Io {
            what: format!("cannot write what was read from {path}"),
            source,
        };
        let mut chunks = std::pin::pin!(self.read_stream(path).await?.into_stream());
        let mut total = 0;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk?;
            target.write_all(&chunk).await.map_err(io)?;
            total += chunk.len() as u64;
        }
        target.flush().await.map_err(io)?;
        Ok(total)
    }

    /// Writes a whole file from memory; missing directories above it are made.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] when the path cannot be written; [`Error::TooLarge`].
    pub async fn write(&self, path: &str, content: impl Into<Bytes>) -> Result<()> {
        let content = content.into();
        let size = content.len() as u64;
        let form = self.form(path, Part::stream_with_length(Body::from(content), size));
        self.send_form(form, Some(WRITE_TIMEOUT)).await
    }

    /// Writes a file of any size from a reader; with `size`, the server learns of a short transfer.
    ///
    /// ```no_run
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), Box<dyn std::error::Error>> {
    /// let source = tokio::fs::File::open("model.bin").await?;
    /// let size = source.metadata().await?.len();
    /// sandbox.files().upload_from("/home/user/model.bin", source, Some(size)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Self::write`]; [`Error::Io`] when the reader fails.
    pub async fn upload_from(
        &self,
        path: &str,
        source: impl AsyncRead + Send + Sync + Unpin + 'static,
        size: Option<u64>,
    ) -> Result<()> {
        // The HTTP client reports a failing body as a failed request: the reason is kept aside.
        let failure: Arc<Mutex<Option<std::io::Error>>> = Arc::default();
        let aside = Arc::clone(&failure);
        let chunks = ReaderStream::with_capacity(source, CHUNK).map_err(move |error| {
            let told = std::io::Error::new(error.kind(), error.to_string());
            if let Ok(mut slot) = aside.lock() {
                *slot = Some(error);
            }
            told
        });
        let body = Body::wrap_stream(chunks);
        let part = match size {
            Some(size) => Part::stream_with_length(body, size),
            None => Part::stream(body),
        };
        match self.send_form(self.form(path, part), None).await {
            Ok(()) => Ok(()),
            Err(error) => match failure.lock().ok().and_then(|mut slot| slot.take()) {
                Some(source) => Err(Error::Io {
                    what: format!("cannot read what is to be written to {path}"),
                    source,
                }),
                None => Err(error),
            },
        }
    }

    /// The file comes last, so that the server knows where to and as whom before its first byte.
    fn form(&self, path: &str, content: Part) -> Form {
        let name = path
            .rsplit('/')
            .next()
            .filter(|name| !name.is_empty())
            .unwrap_or("file")
            .to_owned();
        let mut form = Form::new().text("path", path.to_owned());
        if let Some(user) = &self.user {
            form = form.text("user", user.clone());
        }
        form.part("file", content.file_name(name))
    }

    async fn send_form(&self, form: Form, limit: Option<Duration>) -> Result<()> {
        let path = ["v1", "sandboxes", self.sandbox.id(), "files", "stream", "write"];
        let mut request = self
            .client()
            .request(reqwest::Method::POST, &path)
            .multipart(form);
        if let Some(limit) = limit {
            request = request.timeout(limit);
        }
        self.client().send(request, Retry::Unsent).await.map(drop)
    }

    /// What is in a directory: its own entries with a depth of 1, those below them with more.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::InvalidRequest`] when the path is no directory.
    pub async fn list(&self, path: &str, depth: u32) -> Result<Vec<FileEntry>> {
        let request = self
            .post(&["list"], &self.at(path, Some(depth)))
            .timeout(CALL_TIMEOUT);
        Ok(self
            .client()
            .json::<FileList>(request, Retry::Reads)
            .await?
            .entries)
    }

    /// Makes a directory, and those above it.
    ///
    /// # Errors
    /// [`Error::Conflict`] when it exists already.
    pub async fn mkdir(&self, path: &str) -> Result<FileEntry> {
        let request = self.post(&["mkdir"], &self.at(path, None)).timeout(CALL_TIMEOUT);
        Ok(self.client().json::<MadeDir>(request, Retry::Unsent).await?.entry)
    }

    /// Removes a file, or a directory with all that is in it.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when the sandbox does not run.
    pub async fn remove(&self, path: &str) -> Result<()> {
        let request = self.post(&["remove"], &self.at(path, None)).timeout(CALL_TIMEOUT);
        self.client().send(request, Retry::Unsent).await.map(drop)
    }
}
