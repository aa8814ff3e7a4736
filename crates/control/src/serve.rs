//! Serving connections: so many at a time, and none for ever that asks for nothing.
//!
//! A connection on which no request is under way is ended after a while, whatever it is in the middle of: silence, half a
//! header, half of HTTP/2's greeting, or a rest between two requests. A connection counts until its socket closes, so one
//! that became a WebSocket does too. Those beyond the limit wait in the listener's queue.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use http::{Request, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// Wait after a connection could not be accepted: most often the process has too many files open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often an HTTP/2 client is asked whether it is there.
const H2_PING: Duration = Duration::from_secs(30);

/// Serves a listener until `closing`, and then until its open connections end.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    idle: Duration,
    places: Arc<Semaphore>,
    closing: CancellationToken,
) {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http2()
        .timer(hyper_util::rt::TokioTimer::new())
        .keep_alive_interval(H2_PING);
    http.http1()
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(idle);
    // Dropped with what remains in it when the grace is over.
    let mut open = JoinSet::new();
    let _ = closing
        .run_until_cancelled(async {
            loop {
                let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                    return;
                };
                match listener.accept().await {
                    Ok((stream, peer)) => {
                        let connection = Connection {
                            http: http.clone(),
                            router: router.clone(),
                            peer,
                            idle,
                            closing: closing.clone(),
                        };
                        while open.try_join_next().is_some() {}
                        open.spawn(connection.serve(Socket {
                            stream,
                            _place: place,
                        }));
                    }
                    // The client left before it was taken.
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        })
        .await;
    drop(listener);
    while open.join_next().await.is_some() {}
}

/// What one connection is served with.
struct Connection {
    http: auto::Builder<TokioExecutor>,
    router: Router,
    peer: SocketAddr,
    idle: Duration,
    closing: CancellationToken,
}

impl Connection {
    async fn serve(self, socket: Socket) {
        let Self {
            http,
            router,
            peer,
            idle,
            closing,
        } = self;
        // As axum does: small answers go out at once.
        let _ = socket.stream.set_nodelay(true);
        notice_absence(&socket.stream);
        let busy = Busy::default();
        let counted = busy.clone();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let under_way = counted.begin();
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(ConnectInfo(peer));
            let answer = router.clone().oneshot(request);
            async move {
                answer.await.map(|response: Response<Body>| {
                    response.map(|inner| Counted {
                        inner,
                        _under_way: under_way,
                    })
                })
            }
        });
        let connection = http.serve_connection_with_upgrades(TokioIo::new(socket), service);
        tokio::pin!(connection);
        let mut asked_to_end = false;
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::trace!(error, "a connection ended");
                    }
                    return;
                }
                () = closing.cancelled(), if !asked_to_end => {
                    asked_to_end = true;
                    connection.as_mut().graceful_shutdown();
                }
                // Nothing of the connection is under way, so nobody misses anything.
                () = busy.idle_for(idle) => return,
            }
        }
    }
}

/// Has the system end a connection whose client went away without a word (a cable, a laptop's lid): a stream on it would
/// keep its sandbox awake, and its place taken, for ever.
fn notice_absence(stream: &TcpStream) {
    use rustix::net::sockopt;
    let set = || {
        sockopt::set_tcp_keepidle(stream, Duration::from_secs(30))?;
        sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10))?;
        sockopt::set_tcp_keepcnt(stream, 3)?;
        sockopt::set_socket_keepalive(stream, true)?;
        // Milliseconds for which what was sent may stay unacknowledged.
        sockopt::set_tcp_user_timeout(stream, 60_000)
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "absent clients of a connection will not be noticed");
    }
}

/// How many requests of a connection are under way, or since when none is.
#[derive(Clone)]
struct Busy(Arc<Mutex<(usize, Instant)>>);

impl Default for Busy {
    fn default() -> Self {
        Self(Arc::new(Mutex::new((0, Instant::now()))))
    }
}

/// A request that is under way, until its answer's body has ended.
struct UnderWay(Busy);

impl Busy {
    fn with<T>(&self, look: impl FnOnce(&mut (usize, Instant)) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn begin(&self) -> UnderWay {
        self.with(|(count, _)| *count += 1);
        UnderWay(self.clone())
    }

    /// Ends when no request has been under way for so long.
    async fn idle_for(&self, idle: Duration) {
        loop {
            let (count, since) = self.with(|state| *state);
            let now = Instant::now();
            if count == 0 && now >= since + idle {
                return;
            }
            let next = if count == 0 { since + idle } else { now + idle };
            tokio::time::sleep_until(next).await;
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.with(|(count, since)| {
            *count = count.saturating_sub(1);
            *since = Instant::now();
        });
    }
}

/// A body that says when it has ended.
struct Counted {
    inner: Body,
    _under_way: UnderWay,
}

impl hyper::body::Body for Counted {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A connection's socket, and its place among the connections.
struct Socket {
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
