//! TCP connections that the guest opens.
//!
//! The guest's SYN is held back until the real destination has answered, so that the guest sees what it
//! would see without anything in between: a connection, a refusal, or an unreachable host.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use smoltcp::wire::Icmpv4DstUnreachable;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::flow::{Flow, FlowKey, Handshake, Opening};
use super::packet::{self, ResetOf};
use super::shared::Shared;
use super::stats::bump;
use super::stream::GuestStream;
use crate::net::policy::Verdict;

/// How long the guest may take to acknowledge our SYN-ACK.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(30);
/// Silence after which the destination is probed, and the time between probes.
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(120);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Bytes copied at a time in each direction.
const COPY_BUFFER: usize = 32 * 1024;

/// Where a connection really goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// To the address that the guest named.
    Internet(SocketAddrV4),
    /// To the host's name servers.
    Resolver,
}

/// A connection that the guest asked for.
pub(super) struct Wanted {
    pub(super) key: FlowKey,
    pub(super) attempt: u64,
    pub(super) target: Target,
    /// The guest's SYN, as an IP packet.
    pub(super) syn: Vec<u8>,
    pub(super) reset: ResetOf,
    pub(super) permit: OwnedSemaphorePermit,
}

/// Forgets the dial however its task ends.
struct DialSlot<'a> {
    shared: &'a Shared,
    key: FlowKey,
    attempt: u64,
}

impl DialSlot<'_> {
    /// True when the guest still waits.
    fn release(&self) -> bool {
        self.shared.table().end_dial(&self.key, Some(self.attempt))
    }
}

impl Drop for DialSlot<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

/// Dials, answers the guest, and carries bytes until both sides are done.
pub(super) async fn serve(shared: Arc<Shared>, wanted: Wanted) {
    let Wanted {
        key,
        attempt,
        target,
        syn,
        reset,
        permit,
    } = wanted;
    let slot = DialSlot {
        shared: &shared,
        key,
        attempt,
    };
    let dialled = match timeout(shared.config.limits.dial_timeout, dial(&shared, target)).await {
        Ok(dialled) => dialled,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    let outside = match dialled {
        Ok(outside) => outside,
        Err(error) => {
            tracing::debug!(?key, %error, "the guest's destination could not be reached");
            bump(&shared.counters.tcp_unreachable);
            if slot.release() {
                answer_failure(&shared, &error, reset, &syn);
            }
            return;
        }
    };
    // The policy may have been tightened meanwhile.
    if let Target::Internet(dst) = target
        && shared.verdict(*dst.ip()) != Verdict::Allow
    {
        if slot.release() {
            reset.send(&shared.sink);
        }
        return;
    }
    let buffer = shared.config.limits.buffer_for(shared.table().open_count());
    let Some(flow) = Flow::new(
        key,
        &Opening::Accept { syn: &syn },
        buffer,
        permit,
        Arc::clone(&shared),
    ) else {
        return;
    };
    let flow = Arc::new(flow);
    if !shared.table().insert(&flow, Some(attempt)) {
        // The guest gave up while we dialled.
        return;
    }
    drop(slot);
    bump(&shared.counters.tcp_from_guest);
    let guest = GuestStream::new(Arc::clone(&flow));
    flow.service();
    if !matches!(
        timeout(HANDSHAKE_PATIENCE, guest.handshake()).await,
        Ok(Handshake::Done)
    ) {
        guest.reset();
        return;
    }
    splice(guest, outside).await;
}

/// Carries bytes and the ends of both directions; an error on one side becomes a reset on the other.
async fn splice(mut guest: GuestStream, mut outside: TcpStream) {
    // The guest's stack has already decided what belongs into one segment.
    let _ = outside.set_nodelay(true);
    keep_alive(&outside);
    let carried =
        tokio::io::copy_bidirectional_with_sizes(&mut guest, &mut outside, COPY_BUFFER, COPY_BUFFER).await;
    if let Err(error) = carried {
        tracing::trace!(key = ?guest.flow().key, %error, "a connection broke");
        let _ = outside.set_zero_linger();
        guest.reset();
    }
}

/// Notices peers that have silently gone: the guest's own probes are answered on its link and cannot.
fn keep_alive(outside: &TcpStream) {
    let set = sockopt::set_socket_keepalive(outside, true)
        .and_then(|()| sockopt::set_tcp_keepidle(outside, KEEP_ALIVE_IDLE))
        .and_then(|()| sockopt::set_tcp_keepintvl(outside, KEEP_ALIVE_INTERVAL));
    if let Err(error) = set {
        tracing::debug!(%error, "a connection goes without keep-alive");
    }
}

async fn dial(shared: &Shared, target: Target) -> io::Result<TcpStream> {
    match target {
        Target::Internet(dst) => shared.config.dialer.tcp(dst).await,
        Target::Resolver => {
            let mut last = io::Error::from(io::ErrorKind::ConnectionRefused);
            for resolver in &shared.config.resolvers {
                match TcpStream::connect::<SocketAddr>(*resolver).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

/// Tells the guest why there is no connection, in the way in which a network would.
fn answer_failure(shared: &Shared, error: &io::Error, reset: ResetOf, syn: &[u8]) {
    let reason = match error.kind() {
        io::ErrorKind::NetworkUnreachable => Icmpv4DstUnreachable::NetUnreachable,
        io::ErrorKind::HostUnreachable | io::ErrorKind::TimedOut => Icmpv4DstUnreachable::HostUnreachable,
        _ => {
            reset.send(&shared.sink);
            return;
        }
    };
    packet::unreachable(&shared.sink, reason, syn);
}
