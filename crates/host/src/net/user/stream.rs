//! The host's end of a TCP connection with the guest, as a byte stream.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use smoltcp::socket::tcp;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::flow::{Flow, Handshake};

/// A TCP connection with the guest.
///
/// Shutting down the write half sends FIN and leaves the read half open. Dropping the stream closes it in
/// the background: what was written is still delivered, what arrives unread is answered with a reset.
pub struct GuestStream {
    flow: Arc<Flow>,
    write_closed: bool,
}

impl GuestStream {
    pub(super) fn new(flow: Arc<Flow>) -> Self {
        Self {
            flow,
            write_closed: false,
        }
    }

    pub(super) fn flow(&self) -> &Arc<Flow> {
        &self.flow
    }

    /// Waits for the handshake to end, one way or the other.
    pub(super) async fn handshake(&self) -> Handshake {
        std::future::poll_fn(|cx| match self.flow.handshake(Some(cx.waker())) {
            Handshake::Pending => Poll::Pending,
            ended => Poll::Ready(ended),
        })
        .await
    }

    /// Closes the connection with a reset instead of in order.
    pub fn reset(self) {
        self.flow.abort();
    }
}

impl fmt::Debug for GuestStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestStream")
            .field("key", &self.flow.key)
            .finish_non_exhaustive()
    }
}

impl Drop for GuestStream {
    fn drop(&mut self) {
        self.flow.orphan();
    }
}

fn broken(dead: bool) -> io::Error {
    if dead {
        io::ErrorKind::ConnectionAborted.into()
    } else {
        io::ErrorKind::ConnectionReset.into()
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let polled = self.flow.with_socket(|socket, dead| {
            if dead {
                return Poll::Ready(Err(broken(true)));
            }
            let mut taken = 0;
            // The ring buffer gives one contiguous piece at a time; two make a whole round.
            for _ in 0..2 {
                match socket.recv_slice(buf.initialize_unfilled()) {
                    Ok(count) => {
                        buf.advance(count);
                        taken += count;
                        if count == 0 || buf.remaining() == 0 {
                            break;
                        }
                    }
                    Err(_) if taken > 0 => break,
                    Err(tcp::RecvError::Finished) => return Poll::Ready(Ok(())),
                    Err(tcp::RecvError::InvalidState) => return Poll::Ready(Err(broken(false))),
                }
            }
            if taken == 0 {
                socket.register_recv_waker(cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(Ok(()))
        });
        if polled.is_ready() {
            coop.made_progress();
        }
        polled
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        if self.write_closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        let polled = self.flow.with_socket(|socket, dead| {
            if dead {
                return Poll::Ready(Err(broken(true)));
            }
            let mut written = 0;
            for buf in bufs {
                match socket.send_slice(buf) {
                    Ok(count) => {
                        written += count;
                        if count < buf.len() {
                            break;
                        }
                    }
                    Err(tcp::SendError::InvalidState) => return Poll::Ready(Err(broken(false))),
                }
            }
            if written == 0 {
                socket.register_send_waker(cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(Ok(written))
        });
        if polled.is_ready() {
            coop.made_progress();
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was accepted is on its way already.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.write_closed, true) {
            self.flow.close();
        }
        Poll::Ready(Ok(()))
    }
}
