//! Connections to addresses that people name: webhooks, and the hosts that teams bring.
//!
//! Such an address is not trusted: it may be this machine's, that of a database beside it, or the one at which a cloud hands
//! out the credentials of its machines. So only public addresses are connected to, unless the operator allows the others;
//! and what is connected to is what was checked, not the name once more.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// How long a name is looked up.
const LOOKUP: Duration = Duration::from_secs(5);

/// An address, or all that a name has, may not be connected to.
#[derive(Debug, thiserror::Error)]
#[error("it leads to a private address")]
pub(crate) struct Refused;

/// Whether a connection failed because it would have led to a private address.
pub(crate) fn was_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<Refused>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// The addresses of a host that may be connected to: at least one.
///
/// # Errors
/// [`Refused`], or the name is not found.
pub(crate) async fn resolve(
    host: &str,
    port: u16,
    allow_private: bool,
) -> std::result::Result<Vec<SocketAddr>, Box<dyn std::error::Error + Send + Sync>> {
    let found: Vec<SocketAddr> = tokio::time::timeout(LOOKUP, tokio::net::lookup_host((host, port)))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??
        .filter(|address| allow_private || is_public(address.ip()))
        .collect();
    if found.is_empty() {
        return Err(Refused.into());
    }
    Ok(found)
}

/// Whether an address is one of the public internet.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => public_v4(address),
        IpAddr::V6(address) => public_v6(address),
    }
}

fn public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = a == 0 // This network.
        || a == 10
        || (a == 100 && (64..128).contains(&b)) // Carrier-grade NAT.
        || a == 127
        || (a == 169 && b == 254) // Link-local, cloud metadata among them.
        || (a == 172 && (16..32).contains(&b))
        || (a == 192 && b == 0 && (c == 0 || c == 2)) // Protocol assignments, documentation.
        || (a == 192 && b == 88 && c == 99) // 6to4 relays.
        || (a == 192 && b == 168)
        || (a == 198 && (b == 18 || b == 19)) // Benchmarks.
        || (a == 198 && b == 51 && c == 100)
        || (a == 203 && b == 0 && c == 113)
        || a >= 224; // Multicast, reserved, broadcast.
    !special
}

fn public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    // Only global unicast is public; and of that, not what leads to an IPv4 address or nowhere.
    let [first, second, third, ..] = segments;
    if first & 0xe000 != 0x2000 {
        // NAT64 translates into IPv4.
        return first == 0x64 && second == 0xff9b && third == 0 && {
            let [.., high, low] = segments;
            segments[2..6] == [0; 4] && public_v4(v4(high, low))
        };
    }
    match (first, second) {
        // 6to4: the IPv4 address follows.
        (0x2002, high) => public_v4(v4(high, third)),
        // Teredo, ORCHID, benchmarks and other protocol assignments.
        (0x2001, second) if second < 0x200 => false,
        // Documentation.
        (0x2001, 0xdb8) => false,
        (0x3fff, second) if second < 0x1000 => false,
        _ => true,
    }
}

fn v4(high: u16, low: u16) -> Ipv4Addr {
    let [a, b] = high.to_be_bytes();
    let [c, d] = low.to_be_bytes();
    Ipv4Addr::new(a, b, c, d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_addresses_are_told_from_public_ones() {
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "192.0.0.8",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::127.0.0.1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::1",
            "2002:a9fe:a9fe::1",
            "2001::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(address.parse().expect("an address")), "{address}");
        }
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "100.63.0.1",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "223.255.255.1",
            "2606:4700::1111",
            "2001:4860:4860::8888",
            "64:ff9b::808:808",
        ] {
            assert!(is_public(address.parse().expect("an address")), "{address}");
        }
    }

    #[tokio::test]
    async fn what_a_name_leads_to_is_checked() {
        for host in ["localhost", "127.0.0.1", "0x7f.1", "2130706433", "::1"] {
            let error = resolve(host, 80, false).await.expect_err("refused");
            assert!(was_refused(error.as_ref()), "{host}: {error}");
            assert!(resolve(host, 80, true).await.is_ok(), "{host}");
        }
        let found = resolve("8.8.8.8", 80, false).await.expect("public");
        assert_eq!(found, ["8.8.8.8:80".parse().expect("an address")]);
    }
}
