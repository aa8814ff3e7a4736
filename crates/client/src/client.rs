//! The connection: one HTTP client with the key, the rule of what is retried, and the reading of
//! answers within bounds.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use wrenn_proto::rest::Health;

use crate::error::{Error, Result};
use crate::sandboxes::{SandboxHandle, Sandboxes};
use crate::settings::Settings;
use crate::snapshots::Snapshots;

/// Largest answer that is read into memory. A command's collected output is at most 16 MiB a stream,
/// which JSON can blow up sixfold.
const MAX_ANSWER: usize = 256 << 20;
/// Largest error body that is read.
const MAX_ERROR: usize = 64 << 10;
/// How long a call that does not wait for anything may take.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Pauses before the second and the third try.
const BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];
/// A server that asks for a longer pause than this gets its refusal reported instead.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(5);

/// A client of one server with one API key. Cheap to clone; clones share their connections.
///
/// ```no_run
/// use wrenn_client::Client;
///
/// # async fn example() -> Result<(), wrenn_client::Error> {
/// let client = Client::new("http://127.0.0.1:8000", "wrn_0123")?;
/// println!("server {}", client.health().await?.version);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    http: reqwest::Client,
    base: Url,
}

/// Settings of a [`Client`] beyond URL and key.
///
/// ```no_run
/// use std::time::Duration;
/// use wrenn_client::Client;
///
/// let client = Client::builder("https://wrenn.example", "wrn_0123")
///     .connect_timeout(Duration::from_secs(3))
///     .build()?;
/// # Ok::<(), wrenn_client::Error>(())
/// ```
#[derive(Debug)]
pub struct ClientBuilder {
    settings: Settings,
    connect_timeout: Duration,
    user_agent: String,
}

impl ClientBuilder {
    /// How long opening a connection may take; 10 s unless set.
    #[must_use]
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// The `User-Agent` header; the SDK's name and version unless set.
    #[must_use]
    pub fn user_agent(mut self, name: impl Into<String>) -> Self {
        self.user_agent = name.into();
        self
    }

    /// The client.
    ///
    /// # Errors
    /// [`Error::Config`] when the URL is not one of `http` or `https`, or the key cannot be a header.
    pub fn build(self) -> Result<Client> {
        let Settings { base_url, api_key } = self.settings;
        let base = Url::parse(&base_url)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| {
                Error::Config(format!(
                    "'{base_url}' is not a server's address; expected something like http://127.0.0.1:8000"
                ))
            })?;
        let mut key = HeaderValue::from_str(&api_key)
            .map_err(|_| Error::Config("the API key holds characters that no API key has".to_owned()))?;
        key.set_sensitive(true);
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", key);
        let mut http = reqwest::Client::builder()
            .default_headers(headers)
            .user_agent(self.user_agent)
            .connect_timeout(self.connect_timeout)
            .tcp_keepalive(Duration::from_secs(30))
            .tcp_nodelay(true)
            // WebSockets are opened by an upgrade of a connection, which HTTP/1.1 alone has.
            .http1_only()
            // A redirect would carry the key to another place.
            .redirect(reqwest::redirect::Policy::none());
        if is_loopback(&base) {
            http = http.no_proxy();
        }
        let http = http
            .build()
            .map_err(|error| Error::Config(format!("the HTTP client cannot start: {error}")))?;
        Ok(Client {
            inner: Arc::new(Inner { http, base }),
        })
    }
}

/// A proxy on the way to one's own machine would be a mistake of the environment.
fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.ends_with(".localhost")
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Which failures of a call may be answered by trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// The call only reads: any failure on the way.
    Reads,
    /// The call changes something: only when the connection could not be opened.
    Unsent,
}

impl Client {
    /// A client for a server and a key.
    ///
    /// # Errors
    /// [`Error::Config`], see [`ClientBuilder::build`].
    pub fn new(base_url: impl Into<String>, api_key: impl Into<String>) -> Result<Self> {
        Self::builder(base_url, api_key).build()
    }

    /// A client with the settings that [`Settings::discover`] finds.
    ///
    /// ```no_run
    /// let client = wrenn_client::Client::from_env()?;
    /// # Ok::<(), wrenn_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] when there is no key or the URL is wrong.
    pub fn from_env() -> Result<Self> {
        let Settings { base_url, api_key } = Settings::discover(None, None)?;
        Self::new(base_url, api_key)
    }

    /// Starts a builder.
    pub fn builder(base_url: impl Into<String>, api_key: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            settings: Settings {
                base_url: base_url.into(),
                api_key: api_key.into(),
            },
            connect_timeout: Duration::from_secs(10),
            user_agent: concat!("wrenn-rust/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    /// The sandboxes of this key's team.
    #[must_use]
    pub fn sandboxes(&self) -> Sandboxes {
        Sandboxes::new(self.clone())
    }

    /// One sandbox, by id; asks the server nothing.
    ///
    /// ```no_run
    /// # async fn example(client: wrenn_client::Client) -> Result<(), wrenn_client::Error> {
    /// let entries = client.sandbox("sb-0198c0de-0000-7000-8000-000000000000").files().list("/tmp", 1).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn sandbox(&self, id: impl Into<String>) -> SandboxHandle {
        SandboxHandle::new(self.clone(), id.into())
    }

    /// Snapshots and templates.
    #[must_use]
    pub fn snapshots(&self) -> Snapshots {
        Snapshots::new(self.clone())
    }

    /// The server's health and version.
    ///
    /// # Errors
    /// [`Error::Transport`] when it cannot be reached.
    pub async fn health(&self) -> Result<Health> {
        self.json(
            self.request(Method::GET, &["health"]).timeout(CALL_TIMEOUT),
            Retry::Reads,
        )
        .await
    }

    /// The server's address.
    #[must_use]
    pub fn base_url(&self) -> &str {
        self.inner.base.as_str().trim_end_matches('/')
    }

    /// A request to a path of the given segments, each percent-encoded as needed.
    pub(crate) fn request(&self, method: Method, segments: &[&str]) -> RequestBuilder {
        let mut url = self.inner.base.clone();
        // A URL with a host (the builder refuses others) always has path segments.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        self.inner.http.request(method, url)
    }

    /// Sends, retries what may be, and turns every answer that is no success into an error.
    pub(crate) async fn send(&self, request: RequestBuilder, retry: Retry) -> Result<Response> {
        let answer = self.send_any(request, retry).await?;
        if answer.status().is_success() {
            Ok(answer)
        } else {
            Err(self.refusal(answer).await)
        }
    }

    /// As [`Self::send`], but leaves the status to the caller.
    pub(crate) async fn send_any(&self, request: RequestBuilder, retry: Retry) -> Result<Response> {
        let mut pauses = BACKOFF.into_iter();
        let mut next = Some(request);
        loop {
            let Some(request) = next.take() else {
                return Err(Error::protocol(
                    self.base_url(),
                    "the request's body cannot be sent again",
                ));
            };
            // A streamed body cannot be cloned: such a request gets one try.
            let again = request.try_clone();
            let outcome = request.send().await;
            let pause = match &outcome {
                Ok(answer) if retry == Retry::Reads => retry_pause(answer, &mut pauses),
                Ok(_) => None,
                Err(error) if error.is_connect() || (retry == Retry::Reads && !error.is_timeout()) => {
                    pauses.next()
                }
                Err(_) => None,
            };
            match (pause, again) {
                (Some(pause), Some(again)) => {
                    tokio::time::sleep(pause).await;
                    next = Some(again);
                }
                _ => return outcome.map_err(|error| Error::transport(self.base_url(), error.without_url())),
            }
        }
    }

    /// Sends and reads a JSON answer.
    pub(crate) async fn json<T: DeserializeOwned>(&self, request: RequestBuilder, retry: Retry) -> Result<T> {
        let answer = self.send(request, retry).await?;
        let body = self.read(answer, MAX_ANSWER).await?;
        serde_json::from_slice(&body).map_err(|error| Error::protocol(self.base_url(), error.to_string()))
    }

    /// Posts a JSON body.
    pub(crate) fn post(&self, segments: &[&str], body: &impl Serialize) -> RequestBuilder {
        self.request(Method::POST, segments).json(body)
    }

    /// The error of an answer that is no success.
    pub(crate) async fn refusal(&self, answer: Response) -> Error {
        let status = answer.status().as_u16();
        match self.read(answer, MAX_ERROR).await {
            Ok(body) => Error::from_answer(self.base_url(), status, &body),
            Err(_) => Error::from_answer(self.base_url(), status, b""),
        }
    }

    pub(crate) async fn read(&self, mut answer: Response, limit: usize) -> Result<Bytes> {
        let mut body = Vec::new();
        while let Some(chunk) = answer
            .chunk()
            .await
            .map_err(|error| Error::transport(self.base_url(), error.without_url()))?
        {
            if body.len() + chunk.len() > limit {
                return Err(Error::protocol(
                    self.base_url(),
                    format!("the answer is larger than {limit} bytes"),
                ));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.into())
    }
}

/// How long to pause before asking again after this answer, if that may help.
fn retry_pause(answer: &Response, pauses: &mut impl Iterator<Item = Duration>) -> Option<Duration> {
    let busy = [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::BAD_GATEWAY,
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::GATEWAY_TIMEOUT,
    ];
    if !busy.contains(&answer.status()) {
        return None;
    }
    let pause = pauses.next()?;
    let asked = answer
        .headers()
        .get("retry-after")
        .and_then(|value| value.to_str().ok()?.parse().ok());
    match asked.map(Duration::from_secs) {
        Some(asked) if asked > MAX_RETRY_AFTER => None,
        Some(asked) => Some(pause.max(asked)),
        None => Some(pause),
    }
}
