//! Collected runs: a command, and all that it wrote, on connections that are kept for this ([`wrenn_proto::run`]).

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use buffa::Message as _;
use connectrpc::{ConnectError, ErrorCode};
use futures::StreamExt as _;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{Method, StatusCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, ReadBuf,
};
use wrenn_proto::guest::{MAX_RUN_MESSAGE, RUN_PATH, RUN_PROTOCOL};
use wrenn_proto::hostagent as host;
use wrenn_proto::run::__buffa::oneof::run_event::Event as RunEventKind;
use wrenn_proto::run::{RunEvent, RunRequest};

use super::processes::{process_config, translate_event};
use super::{FIRST_ANSWER, GuestClient, MAX_EVENT, empty, first, request, rpc_error};
use crate::error::{HostError, Result};

use host::__buffa::oneof::process_event::Event as HostEvent;

/// Output of a collected exec is cut at this many bytes a stream unless the request says otherwise.
const DEFAULT_MAX_OUTPUT: u64 = 16 << 20;

/// Connections that are kept for the next runs.
const MAX_IDLE: usize = 8;

/// How long after its time limit a process's end may take to arrive.
const GRACE: Duration = Duration::from_secs(30);

/// What a collected exec left behind.
#[derive(Default)]
pub(crate) struct Collected {
    pub(crate) pid: u32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit_code: i32,
    pub(crate) duration: Duration,
    pub(crate) truncated: (bool, bool),
}

impl Collected {
    /// Takes an event in; true when it was the last.
    fn take(&mut self, event: HostEvent, max: usize) -> bool {
        match event {
            HostEvent::Start(start) => self.pid = start.pid,
            HostEvent::Stdout(bytes) => self.truncated.0 |= keep(&mut self.stdout, &bytes, max),
            HostEvent::Stderr(bytes) => self.truncated.1 |= keep(&mut self.stderr, &bytes, max),
            HostEvent::Exit(exit) => {
                self.exit_code = exit.exit_code;
                return true;
            }
            HostEvent::Pty(_) | HostEvent::Keepalive(_) => {}
        }
        false
    }
}

/// Appends what fits; true when something did not.
fn keep(kept: &mut Vec<u8>, bytes: &[u8], max: usize) -> bool {
    let room = max - kept.len().min(max);
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    bytes.len() > room
}

/// Connections without a run.
#[derive(Default)]
pub(super) struct Connections {
    idle: Mutex<Vec<Connection>>,
}

impl Connections {
    /// One that is open and silent, as it has to be.
    async fn take(&self) -> Option<Connection> {
        loop {
            let mut connection = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            if connection.is_quiet().await {
                return Some(connection);
            }
        }
    }

    fn put(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }
}

struct Connection {
    stream: BufReader<TokioIo<Upgraded>>,
}

impl Connection {
    /// Whether the guest has neither closed it nor said anything that nobody asked for.
    async fn is_quiet(&mut self) -> bool {
        if !self.stream.buffer().is_empty() {
            return false;
        }
        poll_fn(|cx| {
            let mut byte = [0];
            let read = Pin::new(self.stream.get_mut()).poll_read(cx, &mut ReadBuf::new(&mut byte));
            Poll::Ready(read.is_pending())
        })
        .await
    }

    async fn send(&mut self, request: &RunRequest) -> Result<()> {
        let mut message = vec![0; 4];
        request.encode(&mut message);
        let length = message.len() - 4;
        if length > MAX_RUN_MESSAGE {
            return Err(HostError::InvalidArgument {
                field: "process",
                message: format!(
                    "command, arguments and environment are {length} bytes; at most {MAX_RUN_MESSAGE} can be passed"
                ),
            });
        }
        // Checked just above.
        message[..4].copy_from_slice(&u32::try_from(length).unwrap_or(0).to_le_bytes());
        self.stream.write_all(&message).await.map_err(lost)?;
        self.stream.flush().await.map_err(lost)
    }

    async fn receive(&mut self) -> Result<RunEventKind> {
        let length = self.stream.read_u32_le().await.map_err(lost)? as usize;
        if length > MAX_EVENT {
            return Err(HostError::Guest(format!("it sends a message of {length} bytes")));
        }
        let event = match self.stream.buffer().get(..length) {
            Some(message) => {
                let event = RunEvent::decode_from_slice(message);
                self.stream.consume(length);
                event
            }
            None => {
                let mut message = vec![0; length];
                self.stream.read_exact(&mut message).await.map_err(lost)?;
                RunEvent::decode_from_slice(&message)
            }
        };
        event
            .ok()
            .and_then(|event| event.event)
            .ok_or_else(|| HostError::Guest("its message makes no sense".to_owned()))
    }
}

fn lost(error: io::Error) -> HostError {
    HostError::Guest(format!("the connection ended before the process ({error})"))
}

impl GuestClient {
    /// Runs a process to its end and collects what it wrote. The process outlives a caller that leaves.
    pub(crate) async fn collect(
        &self,
        spec: host::ProcessSpec,
        limit: Option<Duration>,
        max: u64,
    ) -> Result<Collected> {
        let max = usize::try_from(if max == 0 {
            DEFAULT_MAX_OUTPUT
        } else {
            max.min(DEFAULT_MAX_OUTPUT)
        })
        .unwrap_or(usize::MAX);
        let started = Instant::now();
        let connection = match self.inner.runs.take().await {
            Some(connection) => Some(connection),
            None => self.connect_for_runs().await?,
        };
        let mut out = match connection {
            Some(connection) => self.run(connection, spec, limit, max).await?,
            // The agent of a template or a paused sandbox from before there were such connections.
            None => {
                let mut out = Collected::default();
                let mut events = self.start(spec, None, false, limit).await?;
                loop {
                    let Some(event) = events.next().await.transpose()? else {
                        return Err(HostError::Guest(
                            "the process's stream ended before the process".to_owned(),
                        ));
                    };
                    if event.event.is_some_and(|event| out.take(event, max)) {
                        break out;
                    }
                }
            }
        };
        out.duration = started.elapsed();
        Ok(out)
    }

    async fn run(
        &self,
        mut connection: Connection,
        spec: host::ProcessSpec,
        limit: Option<Duration>,
        max: usize,
    ) -> Result<Collected> {
        let (tag, user) = (spec.tag.clone(), spec.user.clone());
        let request = RunRequest {
            process: process_config(spec).into(),
            tag: tag.unwrap_or_default(),
            user,
            limit_ms: limit.map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            ..Default::default()
        };
        connection.send(&request).await?;
        let mut out = Collected::default();
        let started = Instant::now();
        let mut until = Some(started + FIRST_ANSWER);
        loop {
            let received = connection.receive();
            let event = match until {
                Some(until) => tokio::time::timeout_at(until.into(), received)
                    .await
                    .map_err(|_| {
                        let waited = started.elapsed().as_secs();
                        HostError::Guest(format!("the process's end did not come within {waited} s"))
                    })?,
                None => received.await,
            };
            // The agent tells of the start at once; how long the process then takes is its own affair, within its limit.
            until = limit.and_then(|limit| started.checked_add(limit.saturating_add(GRACE)));
            match event? {
                RunEventKind::Process(event) => {
                    let event = event.event.and_then(|event| translate_event(event, ""));
                    if event.is_some_and(|event| out.take(event, max)) {
                        self.inner.runs.put(connection);
                        return Ok(out);
                    }
                }
                RunEventKind::Refused(refused) => {
                    self.inner.runs.put(connection);
                    let code = refused.code.parse().unwrap_or(ErrorCode::Unknown);
                    return Err(rpc_error(ConnectError::new(code, refused.message)));
                }
            }
        }
    }

    /// A new connection for runs; `None` where the agent knows of no such thing.
    async fn connect_for_runs(&self) -> Result<Option<Connection>> {
        let mut request = request(Method::GET, RUN_PATH, empty());
        let headers = request.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static(RUN_PROTOCOL));
        let answered = async {
            let answer = self.http(request).await?;
            match answer.status() {
                StatusCode::SWITCHING_PROTOCOLS => {}
                StatusCode::NOT_FOUND
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                    return Ok(None);
                }
                _ => return self.expect_success(answer).await.map(|_| None),
            }
            let upgraded = hyper::upgrade::on(answer)
                .await
                .map_err(|error| HostError::Guest(format!("its connection for runs fails: {error}")))?;
            Ok(Some(Connection {
                stream: BufReader::new(TokioIo::new(upgraded)),
            }))
        };
        first(answered).await?
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncRead, AsyncWrite};
    use wrenn_proto::guest::ENVD_PORT;
    use wrenn_proto::process as envd;
    use wrenn_proto::process::process_event::{DataEvent, EndEvent, StartEvent};
    use wrenn_proto::process::{ProcessEvent, StartResponse};
    use wrenn_proto::run::run_event::Refused;

    use super::*;
    use crate::net::UserNet;
    use crate::net::user::tests::sim::{self, SimGuest, SimStream};

    struct World {
        guest: SimGuest,
        client: GuestClient,
        _link: crate::net::LinkTask,
    }

    impl World {
        fn new() -> Self {
            let (ours, theirs) = sim::wire();
            let (net, link) = UserNet::start(ours, sim::config(&std::sync::Arc::default()));
            Self {
                guest: SimGuest::start(theirs),
                client: GuestClient::new(&net, "aa"),
                _link: link,
            }
        }

        /// Collects a command while the guest does this with the next connection.
        async fn collect(&self, acts: impl AsyncFnOnce(SimStream)) -> Result<Collected> {
            let stream = self.guest.listen(ENVD_PORT);
            let acting = async {
                sim::within(stream.established()).await.expect("a connection");
                acts(stream).await;
            };
            let (collected, ()) = sim::within(async { tokio::join!(self.ask(), acting) }).await;
            collected
        }

        async fn ask(&self) -> Result<Collected> {
            let spec = host::ProcessSpec {
                cmd: "true".to_owned(),
                ..Default::default()
            };
            self.client.collect(spec, Some(Duration::from_secs(50)), 4).await
        }
    }

    async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("a request"));
        }
        String::from_utf8(head).expect("text")
    }

    async fn accept(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        let head = read_head(stream).await;
        assert!(head.starts_with("GET /run HTTP/1.1\r\n"), "{head}");
        assert!(head.contains("x-access-token: aa\r\n"), "{head}");
        let answer = format!("HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: {RUN_PROTOCOL}\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.expect("written");
    }

    async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> RunRequest {
        let mut message = vec![0; stream.read_u32_le().await.expect("a request") as usize];
        stream.read_exact(&mut message).await.expect("all of it");
        RunRequest::decode_from_slice(&message).expect("a request")
    }

    fn events() -> [ProcessEvent; 3] {
        let event = |event: envd::__buffa::oneof::process_event::Event| ProcessEvent {
            event: Some(event),
            ..Default::default()
        };
        let data = DataEvent {
            output: Some(envd::__buffa::oneof::process_event::data_event::Output::Stdout(
                b"too much".to_vec(),
            )),
            ..Default::default()
        };
        [
            event(
                StartEvent {
                    pid: 7,
                    ..Default::default()
                }
                .into(),
            ),
            event(data.into()),
            event(
                EndEvent {
                    exit_code: 3,
                    ..Default::default()
                }
                .into(),
            ),
        ]
    }

    async fn write_run(stream: &mut (impl AsyncWrite + Unpin), event: RunEventKind) {
        let event = RunEvent {
            event: Some(event),
            ..Default::default()
        };
        let message = event.encode_to_vec();
        stream.write_u32_le(message.len() as u32).await.expect("written");
        stream.write_all(&message).await.expect("written");
    }

    async fn answer(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        let request = read_request(stream).await;
        assert_eq!((request.process.cmd.as_str(), request.limit_ms), ("true", 50_000));
        for event in events() {
            write_run(stream, RunEventKind::Process(event.into())).await;
        }
    }

    fn assert_collected(collected: &Collected) {
        assert_eq!((collected.pid, collected.exit_code), (7, 3));
        assert_eq!(
            (&collected.stdout[..], collected.truncated),
            (&b"too "[..], (true, false))
        );
    }

    #[tokio::test]
    async fn a_connection_is_used_again_until_the_guest_closes_it() {
        let world = World::new();
        let mut kept = None;
        let first = world.collect(async |mut stream| {
            accept(&mut stream).await;
            answer(&mut stream).await;
            kept = Some(stream);
        });
        assert_collected(&first.await.expect("it ran"));
        let mut stream = kept.expect("a connection");
        let (second, ()) = tokio::join!(world.ask(), answer(&mut stream));
        assert_collected(&second.expect("it ran"));
        let (refused, ()) = tokio::join!(world.ask(), async {
            read_request(&mut stream).await;
            let refused = Refused {
                code: "invalid_argument".to_owned(),
                message: "no".to_owned(),
                ..Default::default()
            };
            write_run(&mut stream, RunEventKind::Refused(refused.into())).await;
        });
        assert!(
            matches!(refused, Err(HostError::GuestRefused(error)) if error.code == ErrorCode::InvalidArgument)
        );

        // Once the end has arrived, the next run has a connection of its own.
        stream.shutdown().await.expect("closed");
        sim::eventually(|| {
            futures::FutureExt::now_or_never(world.client.inner.runs.take()).is_some_and(|idle| match idle {
                Some(open) => {
                    world.client.inner.runs.put(open);
                    false
                }
                None => true,
            })
        })
        .await;
        let third = world.collect(async |mut stream| {
            accept(&mut stream).await;
            answer(&mut stream).await;
        });
        assert_collected(&third.await.expect("it ran"));
    }

    #[tokio::test]
    async fn nonsense_fails_its_run_and_no_other() {
        let world = World::new();
        for nonsense in [&[0xff; 4][..], &[2, 0, 0, 0, 0xff, 0xff], &[0, 0, 0, 0], &[9, 0]] {
            let failed = world.collect(async |mut stream| {
                accept(&mut stream).await;
                read_request(&mut stream).await;
                stream.write_all(nonsense).await.expect("written");
                stream.shutdown().await.expect("closed");
                // Until the host closes it too.
                let _ = stream.read_to_end(&mut Vec::new()).await;
            });
            assert!(matches!(failed.await, Err(HostError::Guest(_))), "{nonsense:?}");
        }
        let fine = world.collect(async |mut stream| {
            accept(&mut stream).await;
            answer(&mut stream).await;
        });
        assert_collected(&fine.await.expect("it ran"));
    }

    #[tokio::test]
    async fn an_agent_that_refuses_the_connection_is_heard() {
        let world = World::new();
        let refused = world.collect(async |mut stream| {
            read_head(&mut stream).await;
            let body = r#"{"code":401,"message":"no"}"#;
            let answer = format!("HTTP/1.1 401 x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.expect("written");
        });
        assert!(
            matches!(refused.await, Err(HostError::GuestRefused(error)) if error.code == ErrorCode::Unauthenticated)
        );
    }

    #[tokio::test]
    async fn an_agent_from_before_is_asked_in_the_old_way() {
        let world = World::new();
        let mut body = Vec::new();
        for event in events() {
            let message = StartResponse {
                event: event.into(),
                ..Default::default()
            };
            let message = message.encode_to_vec();
            body.push(0);
            body.extend((message.len() as u32).to_be_bytes());
            body.extend(message);
        }
        body.extend(b"\x02\0\0\0\x02{}");
        let old = world.collect(async |mut stream| {
            read_head(&mut stream).await;
            let next = world.guest.listen(ENVD_PORT);
            stream
                .write_all(b"HTTP/1.1 404 x\r\ncontent-length: 0\r\n\r\n")
                .await
                .expect("written");
            next.established().await.expect("another connection");
            let mut stream = next;
            let head = read_head(&mut stream).await;
            assert!(head.starts_with("POST /process.Process/Start "), "{head}");
            let answer = format!(
                "HTTP/1.1 200 x\r\ncontent-type: application/connect+proto\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await.expect("written");
            stream.write_all(&body).await.expect("written");
        });
        assert_collected(&old.await.expect("it ran"));
    }
}
