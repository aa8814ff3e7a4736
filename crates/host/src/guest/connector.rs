//! Lets the HTTP client dial into a guest's user-mode network.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;

use crate::net::{GuestStream, UserNet};

/// Connects to one port of one guest, whatever the URI says.
#[derive(Clone)]
pub(super) struct GuestConnector {
    net: UserNet,
    port: u16,
}

impl GuestConnector {
    pub(super) fn new(net: UserNet, port: u16) -> Self {
        Self { net, port }
    }
}

impl tower::Service<http::Uri> for GuestConnector {
    type Response = GuestIo;
    type Error = crate::net::ConnectError;
    type Future = BoxFuture<'static, Result<GuestIo, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let (net, port) = (self.net.clone(), self.port);
        Box::pin(async move { Ok(GuestIo(TokioIo::new(net.connect(port).await?))) })
    }
}

/// A connection into a guest, in the HTTP client's terms.
pub(super) struct GuestIo(TokioIo<GuestStream>);

impl Connection for GuestIo {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for GuestIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl Write for GuestIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
