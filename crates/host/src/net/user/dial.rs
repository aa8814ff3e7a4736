//! The way out: how connections that the guest may make are made on the host.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use futures::future::BoxFuture;
use tokio::net::{TcpStream, UdpSocket};

/// Makes connections on behalf of guests. The egress policy was asked before.
pub trait Dialer: Send + Sync + 'static {
    /// Connects to a TCP endpoint.
    fn tcp(&self, dst: SocketAddrV4) -> BoxFuture<'static, io::Result<TcpStream>>;
    /// A UDP socket that is connected to the endpoint.
    fn udp(&self, dst: SocketAddrV4) -> BoxFuture<'static, io::Result<UdpSocket>>;
}

/// Connects from the host's own network.
///
/// It refuses destinations that turn out to be the host itself. The policy knows the host's addresses, but
/// an interface may have come up a moment ago, and a routing table can make whole networks local that no
/// interface lists. The system's own route lookup has the last word.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDialer;

impl Dialer for HostDialer {
    fn tcp(&self, dst: SocketAddrV4) -> BoxFuture<'static, io::Result<TcpStream>> {
        Box::pin(async move {
            // Connecting a datagram socket looks up the route and sends nothing.
            drop(host_udp(dst).await?);
            TcpStream::connect(dst).await
        })
    }

    fn udp(&self, dst: SocketAddrV4) -> BoxFuture<'static, io::Result<UdpSocket>> {
        Box::pin(host_udp(dst))
    }
}

async fn host_udp(dst: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(dst).await?;
    // The way to an address of one's own starts at that address.
    match socket.local_addr()? {
        SocketAddr::V4(local) if local.ip() != dst.ip() && !local.ip().is_loopback() => Ok(socket),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_host_is_recognised_by_its_routes() {
        // All of 127/8 is local, although the interface lists one address of it only.
        for ip in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 77, 1, 2)] {
            let listener = tokio::net::TcpListener::bind((ip, 0))
                .await
                .expect("a loopback port");
            let SocketAddr::V4(dst) = listener.local_addr().expect("an address") else {
                panic!("not IPv4")
            };
            let error = HostDialer.tcp(dst).await.expect_err("a way to the host itself");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            let error = HostDialer.udp(dst).await.expect_err("a way to the host itself");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
    }
}
