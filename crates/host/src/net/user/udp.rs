//! Datagrams that the guest sends: one socket and one task per pair of guest port and destination.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::wire::Icmpv4DstUnreachable;
use tokio::io::{Interest, Ready};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::driver::TaskEnd;
use super::packet;
use super::shared::Shared;
use super::stats::bump;

/// Datagrams that may wait for one flow's socket.
const QUEUE: usize = 64;
/// Answers taken from one socket before other tasks get their turn.
const RECEIVE_BUDGET: usize = 32;
/// A flow that was silent for this long may be given up for a new one when all places are taken.
const EVICTABLE_AFTER: Duration = Duration::from_secs(2);
/// The idle time of a name query, which has one answer.
const DNS_IDLE: Duration = Duration::from_secs(10);

/// What tells one flow from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct UdpKey {
    pub(super) guest_port: u16,
    pub(super) dst: SocketAddrV4,
}

/// A datagram on its way out: the whole IP packet, for error messages, and where its payload starts.
struct Outgoing {
    packet: Vec<u8>,
    payload_at: usize,
}

struct Entry {
    queue: mpsc::Sender<Outgoing>,
    last_sent: Instant,
}

/// The UDP flows of a link. Only its driver touches them.
#[derive(Default)]
pub(super) struct UdpFlows {
    entries: HashMap<UdpKey, Entry>,
}

impl UdpFlows {
    /// Sends a datagram that the policy lets through.
    pub(super) fn send(
        &mut self,
        shared: &Arc<Shared>,
        tasks: &mut JoinSet<TaskEnd>,
        key: UdpKey,
        packet: &[u8],
        payload_len: usize,
    ) {
        let now = Instant::now();
        let outgoing = Outgoing {
            packet: packet.to_vec(),
            payload_at: packet.len().saturating_sub(payload_len),
        };
        let outgoing = match self.entries.get_mut(&key) {
            Some(entry) => match entry.queue.try_send(outgoing) {
                Ok(()) => {
                    entry.last_sent = now;
                    return;
                }
                Err(mpsc::error::TrySendError::Full(_)) => return bump(&shared.counters.dropped_overload),
                // The flow has just ended; another takes its place.
                Err(mpsc::error::TrySendError::Closed(outgoing)) => outgoing,
            },
            None => outgoing,
        };
        if !self.entries.contains_key(&key) && !self.make_room(shared.config.limits.udp_from_guest, now) {
            return bump(&shared.counters.dropped_overload);
        }
        let (queue, outgoing_queue) = mpsc::channel(QUEUE);
        // The queue is new and has room.
        let _ = queue.try_send(outgoing);
        self.entries.insert(
            key,
            Entry {
                queue,
                last_sent: now,
            },
        );
        bump(&shared.counters.udp_from_guest);
        let shared = Arc::clone(shared);
        tasks.spawn(async move {
            if let Err(error) = serve(&shared, key, outgoing_queue).await {
                tracing::debug!(?key, %error, "a UDP flow broke");
            }
            TaskEnd::Udp(key)
        });
    }

    /// Forgets a flow whose task has ended, unless another has taken its place.
    pub(super) fn ended(&mut self, key: UdpKey) {
        if self
            .entries
            .get(&key)
            .is_some_and(|entry| entry.queue.is_closed())
        {
            self.entries.remove(&key);
        }
    }

    /// Cuts the flows whose destination is not `allowed` any more.
    pub(super) fn retain(&mut self, mut allowed: impl FnMut(SocketAddrV4) -> bool) {
        // Without its queue, a flow's task ends.
        self.entries.retain(|key, _| allowed(key.dst));
    }

    fn make_room(&mut self, limit: usize, now: Instant) -> bool {
        if self.entries.len() < limit {
            return true;
        }
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_sent);
        match oldest {
            Some((key, entry)) if now.duration_since(entry.last_sent) >= EVICTABLE_AFTER => {
                let key = *key;
                self.entries.remove(&key);
                true
            }
            _ => false,
        }
    }
}

async fn serve(shared: &Shared, key: UdpKey, mut queue: mpsc::Receiver<Outgoing>) -> io::Result<()> {
    let idle = if key.dst.port() == 53 {
        shared.config.limits.udp_idle.min(DNS_IDLE)
    } else {
        shared.config.limits.udp_idle
    };
    let socket = match shared.config.dialer.udp(key.dst).await {
        Ok(socket) => socket,
        Err(error) => {
            if let Some(first) = queue.recv().await {
                packet::unreachable(&shared.sink, reason_of(&error), &first.packet);
            }
            return Err(error);
        }
    };
    let mut ident = 0u16;
    let mut last_packet: Option<Outgoing> = None;
    let mut deadline = Box::pin(tokio::time::sleep(idle));
    loop {
        tokio::select! {
            outgoing = queue.recv() => {
                let Some(outgoing) = outgoing else { return Ok(()) };
                let payload = &outgoing.packet[outgoing.payload_at..];
                let mut sent = socket.send(payload).await;
                if sent.is_err() {
                    // The first error may be the news about an earlier datagram, and then nothing was sent.
                    sent = socket.send(payload).await;
                }
                if let Err(error) = sent {
                    packet::unreachable(&shared.sink, reason_of(&error), &outgoing.packet);
                }
                last_packet = Some(outgoing);
            }
            ready = socket.ready(Interest::READABLE | Interest::ERROR) => {
                let received = match take_error(&socket, ready?) {
                    Some(error) => Err(error),
                    None => receive(shared, key, &socket, &mut ident),
                };
                if let Err(error) = received
                    && let Some(last) = &last_packet
                {
                    packet::unreachable(&shared.sink, reason_of(&error), &last.packet);
                }
            }
            () = deadline.as_mut() => return Ok(()),
        }
        deadline.as_mut().reset(tokio::time::Instant::now() + idle);
    }
}

/// The error that a socket's readiness stands for. Such a socket is not readable for it, so that reading
/// alone would neither return the error nor ever come to an end.
pub(super) fn take_error(socket: &UdpSocket, ready: Ready) -> Option<io::Error> {
    if !ready.is_error() {
        return None;
    }
    let taken = socket.try_io(Interest::ERROR, || match socket.take_error()? {
        Some(error) => Ok(error),
        // There is no more of it: this clears the readiness.
        None => Err(io::ErrorKind::WouldBlock.into()),
    });
    match taken {
        Ok(error) => Some(error),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => Some(error),
    }
}

/// Hands what has arrived to the guest. The buffer lives on the stack for as long as this takes, instead
/// of 64 KiB in every idle flow.
fn receive(shared: &Shared, key: UdpKey, socket: &UdpSocket, ident: &mut u16) -> io::Result<()> {
    let mut buffer = [0u8; 65536];
    for _ in 0..RECEIVE_BUDGET {
        let len = match socket.try_recv(&mut buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        *ident = ident.wrapping_add(1);
        if !packet::datagram(&shared.sink, key.dst, key.guest_port, &buffer[..len], *ident) {
            bump(&shared.counters.dropped_overload);
        }
    }
    Ok(())
}

fn reason_of(error: &io::Error) -> Icmpv4DstUnreachable {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Icmpv4DstUnreachable::CommProhibited,
        io::ErrorKind::NetworkUnreachable => Icmpv4DstUnreachable::NetUnreachable,
        io::ErrorKind::HostUnreachable => Icmpv4DstUnreachable::HostUnreachable,
        _ => Icmpv4DstUnreachable::PortUnreachable,
    }
}
