//! The host's client of the guest agent (envd), over connections that only this process can make.
//!
//! Everything that comes back is hostile: sizes are bounded, answers are parsed strictly, and an answer that
//! makes no sense is [`HostError::Guest`], which concerns this one sandbox.

mod connector;
mod files;
mod processes;
mod run;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use connectrpc::client::{ClientConfig, ServiceTransport};
use connectrpc::{ConnectError, ErrorCode};
use http::header::HeaderValue;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use wrenn_proto::filesystem::FilesystemClient;
use wrenn_proto::guest::{ACCESS_TOKEN_HEADER, ENVD_PORT, HttpError, InitRequest, Metrics};
use wrenn_proto::process::ProcessClient;

use crate::error::{HostError, Result};
use crate::net::UserNet;
use connector::GuestConnector;
pub(crate) use files::{Chunks, sync_stream};
pub(crate) use processes::Events;

type Transport = ServiceTransport<Client<GuestConnector, connectrpc::client::ClientBody>>;
type RawBody = http_body_util::combinators::BoxBody<Bytes, std::io::Error>;

/// Answers of the plain HTTP endpoints other than file contents are never longer.
const MAX_ANSWER: usize = 1 << 20;
/// Messages of the RPC services: a long directory listing is the largest.
const MAX_MESSAGE: usize = 32 << 20;
/// Messages of a process's stream; the agent's own hold at most 32 KiB of output.
const MAX_EVENT: usize = 1 << 20;
/// How long a guest may take to begin its answer, and to finish a small one.
const FIRST_ANSWER: Duration = Duration::from_secs(30);

/// A client of one guest. Cheap to clone; connections are kept and shared.
#[derive(Clone)]
pub(crate) struct GuestClient {
    inner: Arc<Inner>,
}

struct Inner {
    process: ProcessClient<Transport>,
    filesystem: FilesystemClient<Transport>,
    http: Client<GuestConnector, RawBody>,
    token: HeaderValue,
    runs: run::Connections,
}

impl GuestClient {
    /// A client that presents `token` (hex digits) to the guest agent behind `net`.
    pub(crate) fn new(net: &UserNet, token: &str) -> Self {
        let connector = GuestConnector::new(net.clone(), ENVD_PORT);
        let build = || {
            let mut builder = Client::builder(TokioExecutor::new());
            builder
                .pool_idle_timeout(Duration::from_secs(60))
                .pool_max_idle_per_host(8)
                .retry_canceled_requests(true);
            builder
        };
        let transport: Transport = ServiceTransport::new(build().build(connector.clone()));
        let token = HeaderValue::from_str(token).unwrap_or_else(|_| HeaderValue::from_static(""));
        let config = ClientConfig::new(http::Uri::from_static("http://guest"))
            .with_default_max_message_size(MAX_MESSAGE)
            .with_default_header(ACCESS_TOKEN_HEADER, token.clone());
        Self {
            inner: Arc::new(Inner {
                process: ProcessClient::new(transport.clone(), config.clone()),
                filesystem: FilesystemClient::new(transport, config),
                http: build().build(connector),
                token,
                runs: run::Connections::default(),
            }),
        }
    }

    /// A request with a small answer, all of which has to arrive within `limit`: a guest may send a head and then nothing.
    async fn ask(&self, request: Request<RawBody>, limit: Duration) -> Result<Bytes> {
        let answered = async {
            let answer = self.http(request).await?;
            self.expect_success(answer).await
        };
        tokio::time::timeout(limit, answered)
            .await
            .map_err(|_| HostError::Guest(format!("it did not answer whole within {} s", limit.as_secs())))?
    }

    async fn http(&self, mut request: Request<RawBody>) -> Result<Response<Incoming>> {
        request
            .headers_mut()
            .insert(ACCESS_TOKEN_HEADER, self.inner.token.clone());
        self.inner.http.request(request).await.map_err(|error| {
            let cause = std::error::Error::source(&error)
                .map(ToString::to_string)
                .unwrap_or_default();
            HostError::Guest(format!("it does not answer ({error}: {cause})"))
        })
    }

    /// Waits until the agent answers `/health`.
    pub(crate) async fn wait_healthy(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let attempt = async {
                let answer = self.http(request(Method::GET, "/health", empty())).await?;
                if answer.status().is_success() {
                    Ok(())
                } else {
                    Err(HostError::Guest(format!(
                        "its health check answers {}",
                        answer.status()
                    )))
                }
            };
            let outcome = tokio::time::timeout(Duration::from_secs(5), attempt)
                .await
                .unwrap_or_else(|_| Err(HostError::Guest("its health check does not end".to_owned())));
            match outcome {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(25)).await,
            }
        }
    }

    /// Makes the guest a sandbox of its own.
    pub(crate) async fn init(&self, init: &InitRequest) -> Result<()> {
        let body = serde_json::to_vec(init).map_err(|error| HostError::Guest(error.to_string()))?;
        let mut request = request(Method::POST, "/init", full(body.into()));
        request.headers_mut().insert(
            http::header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        self.ask(request, Duration::from_secs(60)).await.map(drop)
    }

    /// Holds the guest's programs still until the next [`Self::init`].
    pub(crate) async fn freeze(&self, limit: Duration) -> Result<()> {
        let request = request(Method::POST, "/freeze", empty());
        self.ask(request, limit).await.map(drop)
    }

    /// Current use of the guest's processor, memory and disk, as the guest says.
    pub(crate) async fn metrics(&self) -> Result<Metrics> {
        let bytes = self
            .ask(request(Method::GET, "/metrics", empty()), FIRST_ANSWER)
            .await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| HostError::Guest(format!("its metrics make no sense: {error}")))
    }

    /// Reads a small answer whole, or turns an error answer into the guest's own words.
    async fn expect_success(&self, answer: Response<Incoming>) -> Result<Bytes> {
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| HostError::Guest(format!("its answer does not arrive: {error}")))?
            .to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let message = serde_json::from_slice::<HttpError>(&body)
            .map_or_else(|_| format!("answered {status}"), |error| error.message);
        let code = match status {
            StatusCode::BAD_REQUEST => ErrorCode::InvalidArgument,
            StatusCode::UNAUTHORIZED => ErrorCode::Unauthenticated,
            StatusCode::FORBIDDEN => ErrorCode::PermissionDenied,
            StatusCode::NOT_FOUND => ErrorCode::NotFound,
            StatusCode::INSUFFICIENT_STORAGE => ErrorCode::ResourceExhausted,
            _ => return Err(HostError::Guest(message)),
        };
        Err(HostError::GuestRefused(Box::new(ConnectError::new(
            code, message,
        ))))
    }
}

fn request(method: Method, path: &str, body: RawBody) -> Request<RawBody> {
    let mut request = Request::new(body);
    *request.method_mut() = method;
    // The paths are ours or percent-encoded by us; the fallback can only miss.
    *request.uri_mut() = format!("http://guest{path}")
        .parse()
        .unwrap_or_else(|_| http::Uri::from_static("http://guest/"));
    request
}

fn empty() -> RawBody {
    full(Bytes::new())
}

fn full(bytes: Bytes) -> RawBody {
    http_body_util::Full::new(bytes)
        .map_err(|never| match never {})
        .boxed()
}

/// An error of the RPC services: the guest's own refusal, or no sensible answer at all.
fn rpc_error(error: ConnectError) -> HostError {
    match error.code {
        ErrorCode::NotFound
        | ErrorCode::AlreadyExists
        | ErrorCode::InvalidArgument
        | ErrorCode::PermissionDenied
        | ErrorCode::FailedPrecondition
        | ErrorCode::ResourceExhausted
        | ErrorCode::OutOfRange => HostError::GuestRefused(Box::new(error)),
        // Whether this side's clock or the guest's ran out first, which differ in words only.
        ErrorCode::DeadlineExceeded => HostError::GuestRefused(Box::new(ConnectError::deadline_exceeded(
            "it did not end within its time limit and was stopped with its process group; raise timeout_sec, or run \
             it in the background",
        ))),
        // An unknown user, in the words of the contract; for our caller it is a bad argument.
        ErrorCode::Unauthenticated => HostError::InvalidArgument {
            field: "user",
            message: error.message.unwrap_or_default(),
        },
        _ => HostError::Guest(error.to_string()),
    }
}

/// The beginning of an answer whose rest may take its time.
async fn begins<T>(answer: impl Future<Output = Result<T, ConnectError>>) -> Result<T> {
    first(answer).await?.map_err(rpc_error)
}

/// What a guest has to come to before it counts as silent.
async fn first<T>(answer: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(FIRST_ANSWER, answer).await.map_err(|_| {
        HostError::Guest(format!(
            "it did not begin to answer within {} s",
            FIRST_ANSWER.as_secs()
        ))
    })
}

/// The header by which a request chooses its user, as the SDKs send it.
fn user_header(user: Option<&str>) -> connectrpc::client::CallOptions {
    use base64::Engine as _;
    let options = connectrpc::client::CallOptions::default();
    match user {
        Some(user) => options.with_header(
            http::header::AUTHORIZATION,
            format!(
                "Basic {}",
                base64::engine::general_purpose::STANDARD.encode(format!("{user}:"))
            ),
        ),
        None => options,
    }
}
