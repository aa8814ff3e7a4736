//! The name server that the guest sees. Queries go to the host's own resolvers, wherever those are: they
//! are the one thing of the host that a guest may reach, and only with name queries.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::packet;
use super::shared::Shared;
use super::stats::bump;
use super::udp::take_error;
use crate::net::DNS_IP;

/// The port of name servers.
pub(super) const PORT: u16 = 53;
/// How long one resolver may take before the next is asked.
const PATIENCE: Duration = Duration::from_secs(3);
/// Resolvers that are asked at all, as in other resolvers' libraries.
const MAX_RESOLVERS: usize = 3;
/// Bytes of the header of a name query.
const HEADER_LEN: usize = 12;

/// What an answer that is made here says.
#[derive(Clone, Copy)]
pub(super) enum Failure {
    /// No resolver answered.
    ServFail = 2,
    /// The policy does not let the guest ask.
    Refused = 5,
}

/// The resolvers of the host, from its `resolv.conf`.
#[must_use]
pub(super) fn system_resolvers() -> Vec<SocketAddr> {
    match std::fs::read_to_string(Path::new("/etc/resolv.conf")) {
        Ok(text) => parse_resolv_conf(&text),
        Err(error) => {
            tracing::warn!(%error, "the host's resolvers are unknown, so guests cannot resolve names");
            Vec::new()
        }
    }
}

/// The name servers in the text of a `resolv.conf`. A file without any means the local host.
fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let servers: Vec<SocketAddr> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            if words.next() != Some("nameserver") {
                return None;
            }
            let word = words.next()?;
            let ip = word
                .parse::<Ipv4Addr>()
                .map(Into::into)
                .or_else(|_| word.parse::<Ipv6Addr>().map(Into::into));
            // An address with a zone (`fe80::1%eth0`) is left out: the zone's number is not in the file.
            Some(SocketAddr::new(ip.ok()?, PORT))
        })
        .take(MAX_RESOLVERS)
        .collect();
    if servers.is_empty() {
        vec![(Ipv4Addr::LOCALHOST, PORT).into()]
    } else {
        servers
    }
}

/// Forwards one query and hands the answer to the guest.
pub(super) async fn forward(shared: &Shared, guest_port: u16, query: Vec<u8>) {
    bump(&shared.counters.dns_queries);
    for resolver in &shared.config.resolvers {
        match timeout(PATIENCE, exchange(*resolver, &query)).await {
            Ok(Ok(answer)) => return reply(shared, guest_port, &query, &answer),
            Ok(Err(error)) => tracing::debug!(%resolver, %error, "a resolver cannot be asked"),
            Err(_) => tracing::debug!(%resolver, "a resolver does not answer"),
        }
    }
    fail(shared, guest_port, &query, Failure::ServFail);
}

/// Answers a query here, with a failure.
pub(super) fn fail(shared: &Shared, guest_port: u16, query: &[u8], failure: Failure) {
    let mut answer = query.to_vec();
    let [_, _, flags, code, ..] = &mut answer[..] else {
        return;
    };
    *flags |= 0x80;
    *code = (*code & 0x70) | failure as u8;
    reply(shared, guest_port, query, &answer);
}

fn reply(shared: &Shared, guest_port: u16, query: &[u8], answer: &[u8]) {
    // The query's own number is as good as any to tell fragments apart.
    let ident = query.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    if !packet::datagram(
        &shared.sink,
        SocketAddrV4::new(DNS_IP, PORT),
        guest_port,
        answer,
        ident,
    ) {
        bump(&shared.counters.dropped_overload);
    }
}

async fn exchange(resolver: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    if query.len() < HEADER_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let any: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // A fresh socket has a fresh random port, and being connected it hears nobody but the resolver.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    loop {
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if let Some(error) = take_error(&socket, ready) {
            return Err(error);
        }
        match take_answer(&socket, query) {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// One datagram, if it answers the query. The large buffer stays off the task.
fn take_answer(socket: &UdpSocket, query: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = [0u8; 65536];
    let len = socket.try_recv(&mut buffer)?;
    let answer = &buffer[..len];
    Ok((len >= HEADER_LEN && answer[..2] == query[..2]).then(|| answer.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_as_others_read_it() {
        let text = "# nameserver 9.9.9.9\nsearch example.org\nnameserver 127.0.0.53 # local\n\
                    nameserver\t2001:db8::1\nnameserver fe80::1%eth0\nnameserver nonsense\noptions edns0\n";
        let expected: Vec<SocketAddr> = ["127.0.0.53:53", "[2001:db8::1]:53"]
            .iter()
            .map(|text| text.parse().expect("an address"))
            .collect();
        assert_eq!(parse_resolv_conf(text), expected);
        assert_eq!(
            parse_resolv_conf("search x\n"),
            [SocketAddr::from((Ipv4Addr::LOCALHOST, 53))]
        );
        let many = "nameserver 1.1.1.1\n".repeat(9);
        assert_eq!(parse_resolv_conf(&many).len(), MAX_RESOLVERS);
    }
}
