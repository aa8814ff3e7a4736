//! Where a request comes from.
//!
//! Behind a reverse proxy the connection is the proxy's, and the client stands in `X-Forwarded-For`. Anybody can
//! write that header, so only what trusted proxies have appended is believed: it is read from its end, each address
//! that is itself a trusted proxy is passed over, and the first other one is the client.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// The client's address. `forwarded` are the header's values in their order.
pub(super) fn client<'a>(
    peer: IpAddr,
    forwarded: impl DoubleEndedIterator<Item = &'a str>,
    trusted: &[IpNet],
) -> IpAddr {
    let trusts = |address: &IpAddr| trusted.iter().any(|net| net.contains(address));
    let mut client = peer.to_canonical();
    for entry in forwarded.rev().flat_map(|line| line.rsplit(',')) {
        if !trusts(&client) {
            break;
        }
        // What a trusted proxy wrote unreadably ends the chain at that proxy.
        let Some(address) = address(entry) else { break };
        client = address;
    }
    client
}

/// An address with or without a port.
fn address(entry: &str) -> Option<IpAddr> {
    let entry = entry.trim();
    let bare = entry.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse::<IpAddr>().ok();
    address
        .or_else(|| entry.parse::<SocketAddr>().ok().map(|socket| socket.ip()))
        .map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn nets() -> Vec<IpNet> {
        ["10.0.0.0/8", "fd00::/8"]
            .iter()
            .map(|net| net.parse().expect("a network"))
            .collect()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        for (peer, forwarded, expected) in [
            ("192.0.2.1", vec!["203.0.113.9"], "192.0.2.1"),
            ("10.0.0.1", vec![], "10.0.0.1"),
            ("10.0.0.1", vec!["203.0.113.9"], "203.0.113.9"),
            // The client's own lie stands before what the proxy has appended.
            ("10.0.0.1", vec!["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1", vec!["1.1.1.1", "203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1", vec!["203.0.113.9, 10.2.3.4"], "203.0.113.9"),
            ("10.0.0.1", vec!["203.0.113.9:4711"], "203.0.113.9"),
            ("10.0.0.1", vec!["[2001:db8::1]:4711"], "2001:db8::1"),
            ("10.0.0.1", vec!["[2001:db8::1]"], "2001:db8::1"),
            ("::ffff:10.0.0.1", vec!["::ffff:203.0.113.9"], "203.0.113.9"),
            ("fd00::1", vec!["unknown"], "fd00::1"),
            ("10.0.0.1", vec!["1.1.1.1, nonsense"], "10.0.0.1"),
            ("10.0.0.1", vec![""], "10.0.0.1"),
        ] {
            let got = client(ip(peer), forwarded.iter().copied(), &nets());
            assert_eq!(got, ip(expected), "{peer} {forwarded:?}");
        }
    }

    proptest! {
        #[test]
        fn an_untrusted_peer_is_itself(header in "\\PC{0,60}") {
            let peer = ip("192.0.2.1");
            prop_assert_eq!(client(peer, [header.as_str()].into_iter(), &nets()), peer);
        }

        #[test]
        fn what_the_client_writes_before_a_proxys_entry_does_not_matter(lie in "[^,]{0,40}") {
            let header = format!("{lie},203.0.113.9");
            prop_assert_eq!(client(ip("10.0.0.1"), [header.as_str()].into_iter(), &nets()), ip("203.0.113.9"));
        }
    }
}
