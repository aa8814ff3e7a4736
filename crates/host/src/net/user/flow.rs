//! One TCP connection with the guest.
//!
//! Each flow has a TCP/IP stack of its own: an interface with the single address that the guest talks to,
//! and one socket. Finding the flow of a segment is then one hash lookup, and the cost of a segment does
//! not grow with the number of connections, as it would with one stack that holds them all.
//!
//! ```text
//!             ingress (driver, per segment)          poll_read / poll_write (whoever holds the stream)
//!                       \                             /
//!                        Mutex<Core { stack, socket }>
//!                       /                             \
//!      timers and blocked list (driver)         FrameSink (frames out)
//! ```
//!
//! Whoever touches the core also sends what became sendable and arms the driver's timer; nothing waits
//! for another task. Locks are taken in the order core, then flow table, timers or sink, and never back.
//!
//! The stack is fed with whatever a hostile guest sends, and arithmetic on sequence numbers in it panics on
//! contradictions. Calls into it are therefore fenced: a panic ends that flow and nothing else.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};
use tokio::sync::OwnedSemaphorePermit;

use super::link::{EtherType, FrameSink};
use super::shared::Shared;
use crate::net::{GUEST_IP, MTU};

/// How long a flow that nobody holds any more may go without progress before it is reset.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(30);
/// The largest receive buffer, and with it the largest window. Beyond this a window is sent in units of
/// several bytes and rounded down, which takes back some bytes that were promised already; the stack then
/// cuts them off segments that are on their way, and the connection stalls until they are sent again.
const MAX_RECEIVE: usize = u16::MAX as usize;
/// Segments sent for one flow before others get their turn.
const EGRESS_BUDGET: usize = 256;
/// The least time before a flow that had nothing to send is asked again.
const TIMER_FLOOR: Duration = Duration::from_millis(2);

/// What tells a flow from all others: the guest's port, and the address and port that the guest talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct FlowKey {
    pub(super) guest_port: u16,
    pub(super) remote: SocketAddrV4,
}

/// A connection; see the module's head.
pub(super) struct Flow {
    pub(super) key: FlowKey,
    /// Whether the guest opened it, so that the egress policy applies to it.
    pub(super) outbound: bool,
    pub(super) shared: Arc<Shared>,
    core: Mutex<Core>,
}

/// Where a handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handshake {
    Pending,
    Done,
    /// The guest refused or reset it.
    Failed,
}

pub(super) struct Core {
    iface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// The first frame of a connection into the guest, to send again sooner than the stack would.
    first_frame: Option<Vec<u8>>,
    capture: bool,
    /// The time for which the driver's timer is armed.
    armed: Option<Instant>,
    /// In the list of flows that wait for room in the sink.
    blocked: bool,
    /// In the driver's list of flows to service after the present batch of frames.
    dirty: bool,
    /// The write half is to be closed once everything written has been acknowledged. The stack would take
    /// a close at once, but while it has both data and FIN to send in LAST-ACK it turns a deaf ear to
    /// window updates, and a guest that reads slowly would get one byte a second.
    closing: bool,
    /// Taken out of the flow table; nothing is sent any more.
    finished: bool,
    /// The stack panicked or the link went away: the socket's own state means nothing any more.
    dead: bool,
    orphan: Option<Orphan>,
    /// The flow's place among the bounded number of flows, given back when it finishes.
    permit: Option<OwnedSemaphorePermit>,
}

/// A flow whose stream was dropped: it lives on only to deliver what was written.
struct Orphan {
    deadline: Instant,
    unsent: usize,
}

/// How a flow starts.
pub(super) enum Opening<'a> {
    /// The guest's SYN, which the flow answers.
    Accept { syn: &'a [u8] },
    /// The flow sends a SYN.
    Connect,
}

impl Flow {
    /// Sets up the flow. Nothing is sent before [`Self::service`].
    pub(super) fn new(
        key: FlowKey,
        opening: &Opening<'_>,
        buffer: usize,
        permit: OwnedSemaphorePermit,
        shared: Arc<Shared>,
    ) -> Option<Self> {
        let local = *key.remote.ip();
        // The stack asserts this; the egress policy has made sure of it long before.
        if local.is_unspecified() || local.is_multicast() || local.is_broadcast() {
            return None;
        }
        let mut port = Port {
            sink: &shared.sink,
            rx: None,
            capture: None,
        };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = super::random_u64();
        let mut iface = Interface::new(config, &mut port, shared.now());
        iface.update_ip_addrs(|addrs| {
            // The list is empty and has room for one.
            let _ = addrs.push(IpCidr::new(IpAddress::Ipv4(local), 32));
        });
        let receive = tcp::SocketBuffer::new(vec![0; buffer.min(MAX_RECEIVE)]);
        let mut socket = tcp::Socket::new(receive, tcp::SocketBuffer::new(vec![0; buffer]));
        // The wire neither loses nor reorders, and a frame costs next to nothing: acknowledge at once, send
        // at once. (Waiting here would meet delayed acknowledgements there: 40 ms per round trip.)
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket.set_congestion_control(tcp::CongestionControl::None);
        let local_endpoint = (IpAddress::Ipv4(local), key.remote.port());
        let (outbound, capture) = match opening {
            Opening::Accept { .. } => {
                socket.listen(local_endpoint).ok()?;
                (true, false)
            }
            Opening::Connect => {
                let guest = (IpAddress::Ipv4(GUEST_IP), key.guest_port);
                socket.connect(iface.context(), guest, local_endpoint).ok()?;
                (false, true)
            }
        };
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        if let Opening::Accept { syn } = opening {
            let mut port = Port {
                sink: &shared.sink,
                rx: Some(syn),
                capture: None,
            };
            let now = shared.now();
            fenced(key, || iface.poll_ingress_single(now, &mut port, &mut sockets))?;
        }
        Some(Self {
            key,
            outbound,
            core: Mutex::new(Core {
                iface,
                sockets,
                handle,
                first_frame: None,
                capture,
                armed: None,
                blocked: false,
                dirty: false,
                closing: false,
                finished: false,
                dead: false,
                orphan: None,
                permit: Some(permit),
            }),
            shared,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one IP packet from the guest. True when the flow was not yet marked for service.
    pub(super) fn ingress(&self, packet: &[u8]) -> bool {
        let mut core = self.lock();
        if core.finished || core.dead {
            return false;
        }
        let now = self.shared.now();
        let Core { iface, sockets, .. } = &mut *core;
        let mut port = Port {
            sink: &self.shared.sink,
            rx: Some(packet),
            capture: None,
        };
        let taken = fenced(self.key, || iface.poll_ingress_single(now, &mut port, sockets));
        if taken.is_none() {
            self.die(&mut core);
        }
        !std::mem::replace(&mut core.dirty, true)
    }

    /// Sends what can be sent and arms the timer.
    pub(super) fn service(&self) {
        let mut core = self.lock();
        core.dirty = false;
        self.settle(&mut core);
    }

    /// The driver's timer for this flow went off.
    pub(super) fn on_timer(&self, at: Instant) {
        let mut core = self.lock();
        if core.armed == Some(at) {
            core.armed = None;
            self.settle(&mut core);
        }
    }

    /// The sink has room again.
    pub(super) fn on_room(&self) {
        let mut core = self.lock();
        core.blocked = false;
        self.settle(&mut core);
    }

    /// Resets the connection: the guest gets a reset, readers and writers on this side an error.
    pub(super) fn abort(&self) {
        let mut core = self.lock();
        core.socket().abort();
        self.settle(&mut core);
    }

    /// The link is gone: like [`Self::abort`] with nobody to tell on the other side.
    pub(super) fn cut(&self) {
        let mut core = self.lock();
        if !core.finished {
            core.socket().abort();
            self.die(&mut core);
        }
    }

    /// Whoever held the stream has dropped it.
    pub(super) fn orphan(&self) {
        let mut core = self.lock();
        if core.finished || core.dead {
            return;
        }
        let socket = core.socket();
        // Data that nobody will read is answered with a reset, so that the guest does not take it as read.
        if socket.can_recv() {
            socket.abort();
        }
        let unsent = socket.send_queue();
        core.closing = true;
        core.orphan = Some(Orphan {
            deadline: Instant::now() + ORPHAN_PATIENCE,
            unsent,
        });
        self.settle(&mut core);
    }

    /// Where the handshake stands.
    pub(super) fn handshake(&self, waker: Option<&std::task::Waker>) -> Handshake {
        let mut core = self.lock();
        if core.dead {
            return Handshake::Failed;
        }
        let socket = core.socket();
        match socket.state() {
            tcp::State::SynSent | tcp::State::SynReceived => {
                if let Some(waker) = waker {
                    socket.register_send_waker(waker);
                }
                Handshake::Pending
            }
            // A listening socket here is one whose guest has reset the handshake.
            tcp::State::Listen | tcp::State::Closed => Handshake::Failed,
            _ => Handshake::Done,
        }
    }

    /// Sends the first SYN once more.
    pub(super) fn repeat_syn(&self) {
        let mut core = self.lock();
        if core.socket().state() != tcp::State::SynSent {
            return;
        }
        match &core.first_frame {
            Some(frame) => {
                self.shared
                    .sink
                    .offer(EtherType::Ipv4, frame.len(), |bytes| bytes.copy_from_slice(frame));
            }
            None => self.settle(&mut core),
        }
    }

    /// Runs `act` on the socket, then sends what became sendable.
    pub(super) fn with_socket<R>(&self, act: impl FnOnce(&mut tcp::Socket<'static>, bool) -> R) -> R {
        let mut core = self.lock();
        let dead = core.dead;
        let result = act(core.socket(), dead);
        self.settle(&mut core);
        result
    }

    /// Closes the write half once everything written has been delivered.
    pub(super) fn close(&self) {
        let mut core = self.lock();
        core.closing = true;
        self.settle(&mut core);
    }

    fn die(&self, core: &mut Core) {
        core.dead = true;
        // Wakes whoever waits on the stream.
        core.socket().abort();
        self.finish(core);
    }

    fn finish(&self, core: &mut Core) {
        if !std::mem::replace(&mut core.finished, true) {
            core.permit = None;
            core.first_frame = None;
            self.shared.table().remove(self);
        }
    }

    /// Brings everything outside the socket in line with it.
    fn settle(&self, core: &mut Core) {
        if core.finished {
            return;
        }
        let now = Instant::now();
        if let Some(orphan) = &mut core.orphan {
            let socket = core.sockets.get_mut::<tcp::Socket<'static>>(core.handle);
            let unsent = socket.send_queue();
            if unsent < orphan.unsent {
                *orphan = Orphan {
                    deadline: now + ORPHAN_PATIENCE,
                    unsent,
                };
            }
            if socket.can_recv() || now >= orphan.deadline {
                socket.abort();
            }
        }
        if core.closing && core.socket().send_queue() == 0 {
            core.socket().close();
        }
        let Some(blocked) = self.egress(core) else {
            return self.die(core);
        };
        let state = core.socket().state();
        if blocked {
            if !std::mem::replace(&mut core.blocked, true) {
                self.shared.wait_for_room(self.key);
            }
        } else if matches!(
            state,
            tcp::State::Closed | tcp::State::TimeWait | tcp::State::Listen
        ) {
            // Nothing is left to say. The guest's last acknowledgements may go unanswered: the wire does not
            // lose what was written to it, and what still comes is answered with a reset.
            return self.finish(core);
        }
        self.arm(core, now, blocked);
    }

    /// Sends what the socket has. `Some(true)` when it has more than the sink takes, `None` on a panic.
    fn egress(&self, core: &mut Core) -> Option<bool> {
        let now = self.shared.now();
        let Core {
            iface,
            sockets,
            first_frame,
            capture,
            ..
        } = core;
        let mut budget = EGRESS_BUDGET;
        loop {
            let captured = if *capture { Some(&mut *first_frame) } else { None };
            let mut port = Port {
                sink: &self.shared.sink,
                rx: None,
                capture: captured,
            };
            match fenced(self.key, || iface.poll_egress(now, &mut port, sockets))? {
                PollResult::SocketStateChanged => *capture = false,
                PollResult::None => {
                    // Nothing sent: there was nothing, or no room for it.
                    let pending = iface.poll_at(now, sockets).is_some_and(|at| at <= now);
                    if !pending || !self.shared.sink.has_room() {
                        return Some(pending);
                    }
                }
            }
            budget -= 1;
            if budget == 0 {
                // The timer, armed for now, goes on after the others had their turn.
                return Some(false);
            }
        }
    }

    fn arm(&self, core: &mut Core, now: Instant, blocked: bool) {
        let stack_now = self.shared.now();
        let stack = if blocked {
            None
        } else {
            core.iface.poll_at(stack_now, &core.sockets)
        };
        let mut at = stack.map(|at| {
            let micros = at.total_micros().saturating_sub(stack_now.total_micros());
            now + Duration::from_micros(u64::try_from(micros).unwrap_or(0)).max(TIMER_FLOOR)
        });
        if let Some(orphan) = &core.orphan {
            at = Some(at.map_or(orphan.deadline, |at| at.min(orphan.deadline)));
        }
        // An earlier timer looks again by itself when it goes off.
        if let Some(at) = at
            && core.armed.is_none_or(|armed| at < armed)
        {
            core.armed = Some(at);
            self.shared.timers.arm(at, self.key);
        }
    }
}

impl Core {
    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut::<tcp::Socket<'static>>(self.handle)
    }
}

/// Runs a call into the stack; `None` when it panicked.
fn fenced<R>(key: FlowKey, call: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(call))
        .inspect_err(|_| tracing::warn!(?key, "the TCP stack gave up on a connection's segments"))
        .ok()
}

/// The stack's view of the wire during one call.
struct Port<'a> {
    sink: &'a FrameSink,
    rx: Option<&'a [u8]>,
    capture: Option<&'a mut Option<Vec<u8>>>,
}

impl Device for Port<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sending<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received<'_>, Sending<'_>)> {
        let packet = self.rx.take()?;
        // An answer that finds no room is lost; the guest will ask again.
        let discard = !self.sink.has_room();
        Some((
            Received(packet),
            Sending {
                sink: self.sink,
                discard,
                capture: None,
            },
        ))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sending<'_>> {
        self.sink.has_room().then_some(Sending {
            sink: self.sink,
            discard: false,
            capture: self.capture.as_deref_mut(),
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Sending<'a> {
    sink: &'a FrameSink,
    discard: bool,
    capture: Option<&'a mut Option<Vec<u8>>>,
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        if self.discard {
            return f(&mut vec![0; len]);
        }
        self.sink.push(EtherType::Ipv4, len, |bytes| {
            let result = f(bytes);
            if let Some(capture) = self.capture {
                *capture = Some(bytes.to_vec());
            }
            result
        })
    }
}

/// The address that a connection from the host comes from, as the guest sees it.
pub(super) fn host_side(port: u16) -> SocketAddrV4 {
    const GATEWAY: Ipv4Addr = crate::net::GATEWAY_IP;
    SocketAddrV4::new(GATEWAY, port)
}
