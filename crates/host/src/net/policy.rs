//! What a guest may reach.
//!
//! [`decide`] is a pure function of the destination, the sandbox's [`EgressPolicy`] and the addresses the
//! host has at that moment. Its order is the whole design:
//!
//! 1. what nobody may ever be allowed: loopback, link-local (cloud metadata lives there), multicast,
//!    broadcast, reserved space, the guests' own network, and every address of the host;
//! 2. the policy's `allow` list;
//! 3. the policy's `deny` list;
//! 4. `allow_internet`, then `allow_private` for addresses that are not globally routable.
//!
//! An address that the host has only behind a NAT (its public address, seen from outside) cannot be read
//! from its interfaces; whoever runs hosts behind one puts it in `deny`.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;

use super::{GUEST_IP, GUEST_PREFIX_LEN};

/// How long a reading of the host's addresses may be used.
const HOST_ADDRS_TTL: Duration = Duration::from_secs(3);

/// What one sandbox may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressPolicy {
    /// Whether addresses that no list names may be reached at all.
    pub allow_internet: bool,
    /// Whether private and other not globally routable ranges count as internet.
    pub allow_private: bool,
    /// Networks that may be reached whatever the other fields say. They never open the host itself,
    /// loopback, link-local, multicast or reserved addresses.
    pub allow: Vec<Ipv4Net>,
    /// Networks that may not be reached unless `allow` names them too.
    pub deny: Vec<Ipv4Net>,
}

impl Default for EgressPolicy {
    fn default() -> Self {
        Self {
            allow_internet: true,
            allow_private: false,
            allow: Vec::new(),
            deny: Vec::new(),
        }
    }
}

impl EgressPolicy {
    /// A policy that lets nothing out.
    #[must_use]
    pub fn sealed() -> Self {
        Self {
            allow_internet: false,
            ..Self::default()
        }
    }

    /// Whether names may be resolved through the gateway. A sealed guest may not: queries are a way out.
    #[must_use]
    pub fn allows_dns(&self) -> bool {
        self.allow_internet || !self.allow.is_empty()
    }
}

/// The answer of [`decide`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The guest may talk to the address.
    Allow,
    /// It may not.
    Deny(DenyReason),
}

/// Why an address is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// `0.0.0.0/8`: "this host".
    ThisNetwork,
    /// `127.0.0.0/8`.
    Loopback,
    /// `169.254.0.0/16`, where cloud metadata services live.
    LinkLocal,
    /// `224.0.0.0/4`.
    Multicast,
    /// `240.0.0.0/4`, the broadcast address included.
    Reserved,
    /// The network between the guest and its gateway.
    GuestNetwork,
    /// An address of the host, or a broadcast address of one of its networks.
    Host,
    /// The addresses of the host could not be read, so nothing can be told apart from them.
    HostUnknown,
    /// The policy's `deny` list names it.
    DenyList,
    /// The policy does not allow the internet.
    NoInternet,
    /// Not globally routable, and the policy does not allow that.
    Private,
}

/// The IPv4 addresses that the host has on its interfaces, and their broadcast addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostAddrs(BTreeSet<Ipv4Addr>);

impl HostAddrs {
    /// Reads them from the system now.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn read() -> io::Result<Self> {
        let mut addrs = BTreeSet::new();
        for interface in nix::ifaddrs::getifaddrs()? {
            for addr in [interface.address, interface.broadcast].into_iter().flatten() {
                if let Some(v4) = addr.as_sockaddr_in() {
                    addrs.insert(v4.ip());
                }
            }
        }
        Ok(Self(addrs))
    }

    /// A reading that is at most a few seconds old. One reading serves all sandboxes of the process.
    pub(crate) fn recent() -> io::Result<Arc<Self>> {
        static CACHE: Mutex<Option<(Instant, Arc<HostAddrs>)>> = Mutex::new(None);
        let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, addrs)) = cache.as_ref()
            && at.elapsed() < HOST_ADDRS_TTL
        {
            return Ok(Arc::clone(addrs));
        }
        let addrs = Arc::new(Self::read()?);
        *cache = Some((Instant::now(), Arc::clone(&addrs)));
        Ok(addrs)
    }

    /// Whether the host has this address.
    #[must_use]
    pub fn contains(&self, addr: Ipv4Addr) -> bool {
        self.0.contains(&addr)
    }
}

impl FromIterator<Ipv4Addr> for HostAddrs {
    fn from_iter<T: IntoIterator<Item = Ipv4Addr>>(iter: T) -> Self {
        Self(iter.into_iter().collect())
    }
}

/// Decides whether a guest under `policy` may talk to `dst`.
#[must_use]
pub fn decide(dst: Ipv4Addr, policy: &EgressPolicy, host: &HostAddrs) -> Verdict {
    if let Some(reason) = never(dst, host) {
        return Verdict::Deny(reason);
    }
    let named = |nets: &[Ipv4Net]| nets.iter().any(|net| net.contains(&dst));
    if named(&policy.allow) {
        Verdict::Allow
    } else if named(&policy.deny) {
        Verdict::Deny(DenyReason::DenyList)
    } else if !policy.allow_internet {
        Verdict::Deny(DenyReason::NoInternet)
    } else if !policy.allow_private && is_private(dst) {
        Verdict::Deny(DenyReason::Private)
    } else {
        Verdict::Allow
    }
}

/// The reason why no policy can allow `dst`, if there is one.
fn never(dst: Ipv4Addr, host: &HostAddrs) -> Option<DenyReason> {
    let [first, ..] = dst.octets();
    let guest_prefix = u32::MAX << (32 - u32::from(GUEST_PREFIX_LEN));
    if first == 0 {
        Some(DenyReason::ThisNetwork)
    } else if dst.is_loopback() {
        Some(DenyReason::Loopback)
    } else if dst.is_link_local() {
        Some(DenyReason::LinkLocal)
    } else if dst.is_multicast() {
        Some(DenyReason::Multicast)
    } else if first >= 240 {
        Some(DenyReason::Reserved)
    } else if (dst.to_bits() ^ GUEST_IP.to_bits()) & guest_prefix == 0 {
        Some(DenyReason::GuestNetwork)
    } else if host.contains(dst) {
        Some(DenyReason::Host)
    } else {
        None
    }
}

/// Whether the address is not globally routable, or belongs to a platform rather than to the internet.
fn is_private(dst: Ipv4Addr) -> bool {
    let [a, b, c, _] = dst.octets();
    dst.is_private()
        // Carrier-grade NAT; some clouds keep their metadata service here.
        || (a == 100 && (64..128).contains(&b))
        // Protocol assignments, and a cloud's instance services.
        || (a == 192 && b == 0 && c == 0)
        // Benchmark networks.
        || (a == 198 && (b == 18 || b == 19))
        // A virtual address through which one large cloud's virtual machines talk to their host.
        || dst == Ipv4Addr::new(168, 63, 129, 16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().expect("a valid network")
    }

    fn any_net() -> impl Strategy<Value = Ipv4Net> {
        (any::<u32>(), 0u8..=32)
            .prop_map(|(bits, len)| Ipv4Net::new(bits.into(), len).expect("a valid length").trunc())
    }

    fn any_policy() -> impl Strategy<Value = EgressPolicy> {
        let nets = || proptest::collection::vec(any_net(), 0..4);
        (any::<bool>(), any::<bool>(), nets(), nets()).prop_map(
            |(allow_internet, allow_private, allow, deny)| EgressPolicy {
                allow_internet,
                allow_private,
                allow,
                deny,
            },
        )
    }

    /// Addresses with an emphasis on the special ranges, which random bits would seldom hit.
    fn any_addr() -> impl Strategy<Value = Ipv4Addr> {
        let within = |text: &str| {
            let net = net(text);
            any::<u32>().prop_map(move |bits| {
                Ipv4Addr::from_bits(net.network().to_bits() | (bits & net.hostmask().to_bits()))
            })
        };
        prop_oneof![
            any::<u32>().prop_map(Ipv4Addr::from_bits),
            within("127.0.0.0/8"),
            within("169.254.0.0/16"),
            within("10.0.2.0/24"),
            within("10.0.0.0/8"),
            within("192.168.0.0/16"),
            within("100.64.0.0/10"),
            within("224.0.0.0/3"),
        ]
    }

    proptest! {
        #[test]
        fn no_policy_opens_the_host_or_special_ranges(policy in any_policy(), dst in any_addr(), own in any_addr()) {
            let wide_open = EgressPolicy {
                allow_internet: true,
                allow_private: true,
                allow: vec![net("0.0.0.0/0")],
                deny: vec![],
            };
            let host: HostAddrs = [own].into_iter().collect();
            for policy in [&policy, &wide_open] {
                prop_assert_ne!(decide(own, policy, &host), Verdict::Allow);
                let special = ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "10.0.2.0/24"];
                if special.iter().any(|text| net(text).contains(&dst)) {
                    prop_assert_ne!(decide(dst, policy, &host), Verdict::Allow);
                }
            }
        }

        #[test]
        fn allow_beats_deny_and_both_beat_the_switches(policy in any_policy(), dst in any_addr()) {
            let host = HostAddrs::default();
            let open = decide(dst, &EgressPolicy { allow: vec![net("0.0.0.0/0")], ..EgressPolicy::sealed() }, &host);
            let allowed = policy.allow.iter().any(|net| net.contains(&dst));
            let denied = policy.deny.iter().any(|net| net.contains(&dst));
            let verdict = decide(dst, &policy, &host);
            if open != Verdict::Allow {
                // One of the ranges that nothing opens: the policy has no say, also not in the reason.
                prop_assert_eq!(verdict, open);
            } else if allowed {
                prop_assert_eq!(verdict, Verdict::Allow);
            } else if denied {
                prop_assert_eq!(verdict, Verdict::Deny(DenyReason::DenyList));
            } else if !policy.allow_internet {
                prop_assert_eq!(verdict, Verdict::Deny(DenyReason::NoInternet));
            } else if policy.allow_private {
                prop_assert_eq!(verdict, Verdict::Allow);
            }
        }

        #[test]
        fn more_host_addresses_never_open_anything(policy in any_policy(), dst in any_addr(), own in any_addr()) {
            let host: HostAddrs = [own].into_iter().collect();
            if decide(dst, &policy, &host) == Verdict::Allow {
                prop_assert_eq!(decide(dst, &policy, &HostAddrs::default()), Verdict::Allow);
            }
        }
    }

    #[test]
    fn the_default_policy_in_examples() {
        let host: HostAddrs = [Ipv4Addr::new(203, 0, 114, 9)].into_iter().collect();
        let verdict = |text: &str| decide(text.parse().expect("an address"), &EgressPolicy::default(), &host);
        for open in [
            "1.1.1.1",
            "8.8.8.8",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "11.0.0.1",
        ] {
            assert_eq!(verdict(open), Verdict::Allow, "{open}");
        }
        for (closed, reason) in [
            ("0.0.0.0", DenyReason::ThisNetwork),
            ("127.0.0.53", DenyReason::Loopback),
            ("169.254.169.254", DenyReason::LinkLocal),
            ("224.0.0.251", DenyReason::Multicast),
            ("255.255.255.255", DenyReason::Reserved),
            ("10.0.2.2", DenyReason::GuestNetwork),
            ("203.0.114.9", DenyReason::Host),
            ("10.1.2.3", DenyReason::Private),
            ("172.16.0.1", DenyReason::Private),
            ("192.168.1.1", DenyReason::Private),
            ("100.100.100.200", DenyReason::Private),
            ("192.0.0.192", DenyReason::Private),
            ("168.63.129.16", DenyReason::Private),
        ] {
            assert_eq!(verdict(closed), Verdict::Deny(reason), "{closed}");
        }
    }

    #[test]
    fn the_hosts_own_addresses_are_found() {
        let addrs = HostAddrs::read().expect("the system tells its addresses");
        assert!(addrs.contains(Ipv4Addr::LOCALHOST));
    }
}
