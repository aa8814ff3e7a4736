//! Networking of the sandboxes.
//!
//! Every microVM has exactly one NIC, and the other end of its wire is a Unix socket that this process
//! holds. [`user`] is what sits there: a TCP/IP stack in user space that plays gateway, NAT and DNS
//! forwarder. It needs no privileges, no tap device and no port of the host, and it is the only way a
//! packet can leave a guest, so what [`policy`] refuses is refused for good.
//!
//! The addresses below are the same in every guest. The links are point to point, so they cannot clash,
//! and being constant they stay valid in a memory snapshot that is restored many times.

use std::net::Ipv4Addr;

pub mod policy;
pub mod user;

pub use policy::{DenyReason, EgressPolicy, HostAddrs, Verdict, decide};
pub use user::{
    ConnectError, Dialer, GuestStream, HostDialer, Limits, LinkEnd, LinkError, LinkTask, NetStats, UserNet,
    UserNetConfig,
};

/// The guest's address.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Prefix length of the guest's network.
pub const GUEST_PREFIX_LEN: u8 = 24;
/// The guest's hardware address, as QEMU is told.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
/// The gateway: the guest's default route, and the source of connections from the host into the guest.
pub const GATEWAY_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's name server, played by this process.
pub const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// Hardware address of everything that is not the guest.
pub const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02];
/// The largest IP packet on the link.
pub const MTU: usize = 1500;
