//! What a link has carried and refused.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters since the link came up.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct NetStats {
            $($(#[$doc])* pub $name: u64,)*
            /// TCP connections that are open now, in either direction.
            pub tcp_open: u64,
        }

        #[derive(Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            pub(super) fn snapshot(&self, tcp_open: u64) -> NetStats {
                NetStats { $($name: self.$name.load(Ordering::Relaxed),)* tcp_open }
            }
        }
    };
}

counters! {
    /// Frames that the guest sent.
    frames_from_guest,
    /// Bytes that the guest sent, with all headers.
    bytes_from_guest,
    /// Frames that the guest was sent.
    frames_to_guest,
    /// Bytes that the guest was sent, with all headers.
    bytes_to_guest,
    /// Frames dropped because they were malformed or of a kind that the link does not carry.
    dropped_malformed,
    /// Frames dropped because they did not come from the guest's own addresses.
    dropped_spoofed,
    /// Packets dropped because a bound was reached.
    dropped_overload,
    /// Connections, datagrams and pings that the egress policy refused.
    denied,
    /// TCP connections that the guest opened and whose destination answered.
    tcp_from_guest,
    /// TCP connections that the guest wanted and whose destination could not be reached.
    tcp_unreachable,
    /// TCP connections opened into the guest.
    tcp_to_guest,
    /// UDP flows that the guest opened.
    udp_from_guest,
    /// Name queries that were forwarded.
    dns_queries,
}

/// Adds one.
pub(super) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
