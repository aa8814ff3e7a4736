//! Pings. Those to the gateway are answered here. Those to the internet go out through the system's
//! unprivileged ICMP sockets where the system grants them (`net.ipv4.ping_group_range`), and are lost where
//! it does not, as on many networks.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::packet;
use super::shared::Shared;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of an ICMP echo header.
const HEADER_LEN: usize = 8;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// Sends one ping and hands the answer to the guest.
pub(super) async fn forward(shared: &Shared, dst: Ipv4Addr, ident: u16, seq_no: u16, data: Vec<u8>) {
    match timeout(PATIENCE, exchange(dst, seq_no, &data)).await {
        Ok(Ok(data)) => {
            packet::pong(&shared.sink, dst, ident, seq_no, &data);
        }
        Ok(Err(error)) => tracing::trace!(%dst, %error, "a ping could not be sent"),
        Err(_) => tracing::trace!(%dst, "a ping was not answered"),
    }
}

async fn exchange(dst: Ipv4Addr, seq_no: u16, data: &[u8]) -> io::Result<Vec<u8>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, Some(ipproto::ICMP))?;
    let socket = UdpSocket::from_std(std::net::UdpSocket::from(socket))?;
    socket.connect(SocketAddrV4::new(dst, 0)).await?;
    // The system fills in the checksum and an identifier of its own.
    let mut message = vec![ECHO_REQUEST, 0, 0, 0, 0, 0];
    message.extend_from_slice(&seq_no.to_be_bytes());
    message.extend_from_slice(data);
    socket.send(&message).await?;
    let mut answer = vec![0; HEADER_LEN + data.len()];
    loop {
        let len = socket.recv(&mut answer).await?;
        let Some(header) = answer[..len].first_chunk::<HEADER_LEN>() else {
            continue;
        };
        if header[0] == ECHO_REPLY && header[6..8] == seq_no.to_be_bytes() {
            return Ok(answer[HEADER_LEN..len].to_vec());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_ping_is_answered_where_the_system_grants_the_socket() {
        match timeout(PATIENCE, exchange(Ipv4Addr::LOCALHOST, 7, b"hello"))
            .await
            .expect("loopback answers")
        {
            Ok(data) => assert_eq!(data, b"hello"),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        }
    }
}
