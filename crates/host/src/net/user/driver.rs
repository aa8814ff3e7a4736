//! The task behind a link: it reads the guest's frames, gives each to whom it concerns, and keeps time.
//!
//! A second task writes frames out. Dials, UDP flows and name queries are tasks of a set that ends with the
//! driver. The work per read is bounded by the read buffer, and nothing done for a frame waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use smoltcp::wire::Icmpv4DstUnreachable;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::dns;
use super::flow::{Flow, FlowKey};
use super::link::FrameReader;
use super::packet::{self, FromGuest, Rejected, ResetOf};
use super::ping;
use super::shared::{Shared, Slot};
use super::stats::bump;
use super::tcp_out::{self, Target, Wanted};
use super::udp::{UdpFlows, UdpKey};
use super::{LinkEnd, LinkError};
use crate::net::policy::{HostAddrs, Verdict, decide};
use crate::net::{DNS_IP, GATEWAY_IP};

/// Timers served before the driver looks at anything else.
const TIMER_BUDGET: usize = 256;
/// Pings on their way at one time.
const MAX_PINGS: usize = 32;

/// Which task of the set has ended.
#[derive(Debug)]
pub(super) enum TaskEnd {
    Udp(UdpKey),
    Other,
}

struct Driver {
    shared: Arc<Shared>,
    tasks: JoinSet<TaskEnd>,
    udp: UdpFlows,
    dns_places: Arc<Semaphore>,
    ping_places: Arc<Semaphore>,
    /// Flows that got segments in the present batch of frames.
    dirty: Vec<Arc<Flow>>,
}

/// Serves the link until it ends.
pub(super) async fn run<S>(shared: Arc<Shared>, stream: S) -> LinkEnd
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut from, to) = tokio::io::split(stream);
    let mut writer = {
        let shared = Arc::clone(&shared);
        JoinSet::from_iter([async move { shared.sink.write_to(to, &shared.counters).await }])
    };
    let dns_places = Arc::new(Semaphore::new(shared.config.limits.dns_queries));
    let mut driver = Driver {
        shared,
        tasks: JoinSet::new(),
        udp: UdpFlows::default(),
        dns_places,
        ping_places: Arc::new(Semaphore::new(MAX_PINGS)),
        dirty: Vec::new(),
    };
    let closes = Closes(Arc::clone(&driver.shared));
    let end = driver.serve(&mut from, &mut writer).await;
    drop(closes);
    driver.tasks.shutdown().await;
    writer.shutdown().await;
    tracing::debug!(?end, "a guest's link ended");
    end
}

/// Closes everything that went over the link when it ends, and if by a panic: nobody may wait for it for ever.
struct Closes(Arc<Shared>);

impl Drop for Closes {
    fn drop(&mut self) {
        self.0.cancel.cancel();
        let left = self.0.table().close();
        for flow in left {
            flow.cut();
        }
    }
}

impl Driver {
    async fn serve<R>(&mut self, from: &mut R, writer: &mut JoinSet<std::io::Error>) -> LinkEnd
    where
        R: AsyncRead + Unpin,
    {
        let shared = Arc::clone(&self.shared);
        let mut reader = FrameReader::new();
        loop {
            let next_timer = shared.timers.next();
            tokio::select! {
                () = shared.cancel.cancelled() => return LinkEnd::Shutdown,
                read = reader.fill(from) => match read {
                    Ok(0) => return LinkEnd::PeerClosed,
                    Ok(_) => {
                        if let Err(error) = self.take_frames(&mut reader) {
                            return LinkEnd::Failed(error);
                        }
                    }
                    Err(error) => return LinkEnd::Failed(LinkError::Read(error)),
                },
                written = writer.join_next() => return match written {
                    Some(Ok(error)) => LinkEnd::Failed(LinkError::Write(error)),
                    Some(Err(_)) | None => LinkEnd::Failed(LinkError::WriterGone),
                },
                () = shared.sink.drained.notified() => self.serve_blocked(),
                () = shared.timers.sooner.notified() => {}
                () = shared.policy_changed.notified() => self.apply_policy(),
                () = sleep_until(next_timer) => self.serve_timers(),
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => self.task_ended(ended),
            }
        }
    }

    fn task_ended(&mut self, ended: Result<TaskEnd, tokio::task::JoinError>) {
        match ended {
            Ok(TaskEnd::Udp(key)) => self.udp.ended(key),
            Ok(TaskEnd::Other) => {}
            Err(error) => tracing::error!(%error, "a task of a guest's link failed"),
        }
    }

    fn flow(&self, key: &FlowKey) -> Option<Arc<Flow>> {
        match self.shared.table().get(key) {
            Some(Slot::Open(flow)) => Some(Arc::clone(flow)),
            _ => None,
        }
    }

    fn serve_timers(&mut self) {
        let now = Instant::now();
        for _ in 0..TIMER_BUDGET {
            let Some((at, key)) = self.shared.timers.pop_due(now) else {
                return;
            };
            if let Some(flow) = self.flow(&key) {
                flow.on_timer(at);
            }
        }
    }

    fn serve_blocked(&mut self) {
        for key in self.shared.take_blocked() {
            if let Some(flow) = self.flow(&key) {
                flow.on_room();
            }
        }
    }

    /// Cuts what a new policy does not allow any more.
    fn apply_policy(&mut self) {
        let policy = self.shared.policy();
        let host = HostAddrs::recent();
        let allowed = |ip| {
            host.as_ref()
                .is_ok_and(|host| decide(ip, &policy, host) == Verdict::Allow)
        };
        let flows = self.shared.table().flows();
        for flow in flows {
            let remote = *flow.key.remote.ip();
            let keep = if remote == DNS_IP {
                policy.allows_dns()
            } else {
                allowed(remote)
            };
            if flow.outbound && !keep {
                flow.abort();
            }
        }
        self.udp.retain(|dst| allowed(*dst.ip()));
    }

    fn take_frames(&mut self, reader: &mut FrameReader) -> Result<(), LinkError> {
        let shared = Arc::clone(&self.shared);
        let (mut frames, mut bytes) = (0u64, 0u64);
        let taken = loop {
            match reader.next_frame() {
                Ok(Some(frame)) => {
                    frames += 1;
                    bytes += frame.len() as u64;
                    match packet::parse(frame) {
                        Ok(packet) => self.take_packet(packet),
                        Err(Rejected::Malformed) => bump(&shared.counters.dropped_malformed),
                        Err(Rejected::Spoofed) => bump(&shared.counters.dropped_spoofed),
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(LinkError::OversizeFrame { len: error.len }),
            }
        };
        shared
            .counters
            .frames_from_guest
            .fetch_add(frames, Ordering::Relaxed);
        shared
            .counters
            .bytes_from_guest
            .fetch_add(bytes, Ordering::Relaxed);
        // One acknowledgement answers all segments that came together.
        for flow in self.dirty.drain(..) {
            flow.service();
        }
        taken
    }

    fn take_packet(&mut self, packet: FromGuest<'_>) {
        let shared = Arc::clone(&self.shared);
        let sent = match packet {
            FromGuest::ArpQuestion { target } => packet::answer_arp(&shared.sink, target),
            FromGuest::Tcp { packet, dst, segment } => {
                self.take_segment(packet, dst, &segment);
                true
            }
            FromGuest::Udp {
                packet,
                src_port,
                dst,
                payload,
            } => self.take_datagram(packet, src_port, dst, payload),
            FromGuest::Ping {
                dst,
                ident,
                seq_no,
                data,
            } => self.take_ping(dst, ident, seq_no, data),
            FromGuest::Ignored => true,
        };
        if !sent {
            bump(&shared.counters.dropped_overload);
        }
    }

    fn take_segment(
        &mut self,
        packet: &[u8],
        dst: std::net::Ipv4Addr,
        segment: &smoltcp::wire::TcpPacket<&[u8]>,
    ) {
        let key = FlowKey {
            guest_port: segment.src_port(),
            remote: std::net::SocketAddrV4::new(dst, segment.dst_port()),
        };
        let slot = self.shared.table().get(&key).cloned();
        match slot {
            Some(Slot::Open(flow)) => {
                if flow.ingress(packet) {
                    self.dirty.push(flow);
                }
            }
            Some(Slot::Dialing(_)) => {
                // The SYN again, most likely; it is answered when the dial is.
                if segment.rst() {
                    self.shared.table().end_dial(&key, None);
                }
            }
            None => {
                let Some(reset) = ResetOf::segment(dst, segment) else {
                    return;
                };
                if segment.syn() && !segment.ack() && !segment.fin() {
                    self.open(key, packet, segment, reset);
                } else {
                    // A connection of an earlier life of this guest, or one that has ended.
                    reset.send(&self.shared.sink);
                }
            }
        }
    }

    fn open(
        &mut self,
        key: FlowKey,
        packet: &[u8],
        segment: &smoltcp::wire::TcpPacket<&[u8]>,
        reset: ResetOf,
    ) {
        let shared = &self.shared;
        let dst = *key.remote.ip();
        let (src_addr, dst_addr) = (crate::net::GUEST_IP.into(), dst.into());
        if !segment.verify_checksum(&src_addr, &dst_addr) {
            return bump(&shared.counters.dropped_malformed);
        }
        let target = if dst == DNS_IP && key.remote.port() == dns::PORT && shared.policy().allows_dns() {
            Target::Resolver
        } else if shared.verdict(dst) == Verdict::Allow {
            Target::Internet(key.remote)
        } else {
            reset.send(&shared.sink);
            return;
        };
        let Ok(permit) = Arc::clone(&shared.outbound_places).try_acquire_owned() else {
            // The guest's kernel tries again on its own.
            return bump(&shared.counters.dropped_overload);
        };
        let Some(attempt) = shared.table().begin_dial(key) else {
            return;
        };
        let wanted = Wanted {
            key,
            attempt,
            target,
            syn: packet.to_vec(),
            reset,
            permit,
        };
        let shared = Arc::clone(shared);
        self.tasks.spawn(async move {
            tcp_out::serve(shared, wanted).await;
            TaskEnd::Other
        });
    }

    /// False when the datagram found no room.
    fn take_datagram(
        &mut self,
        packet: &[u8],
        guest_port: u16,
        dst: std::net::SocketAddrV4,
        payload: &[u8],
    ) -> bool {
        let shared = &self.shared;
        if *dst.ip() == DNS_IP && dst.port() == dns::PORT {
            if !shared.policy().allows_dns() {
                bump(&shared.counters.denied);
                dns::fail(shared, guest_port, payload, dns::Failure::Refused);
                return true;
            }
            let Ok(permit) = Arc::clone(&self.dns_places).try_acquire_owned() else {
                return false;
            };
            let (shared, query) = (Arc::clone(shared), payload.to_vec());
            self.tasks.spawn(async move {
                dns::forward(&shared, guest_port, query).await;
                drop(permit);
                TaskEnd::Other
            });
            return true;
        }
        if *dst.ip() == GATEWAY_IP || *dst.ip() == DNS_IP {
            return packet::unreachable(&shared.sink, Icmpv4DstUnreachable::PortUnreachable, packet);
        }
        // Nobody is told about multicast and broadcast chatter, as on any network.
        if dst.ip().is_multicast() || dst.ip().is_broadcast() {
            return true;
        }
        if shared.verdict(*dst.ip()) != Verdict::Allow {
            return packet::unreachable(&shared.sink, Icmpv4DstUnreachable::CommProhibited, packet);
        }
        self.udp.send(
            shared,
            &mut self.tasks,
            UdpKey { guest_port, dst },
            packet,
            payload.len(),
        );
        true
    }

    /// False when the ping found no room.
    fn take_ping(&mut self, dst: std::net::Ipv4Addr, ident: u16, seq_no: u16, data: &[u8]) -> bool {
        let shared = &self.shared;
        if dst == GATEWAY_IP || dst == DNS_IP {
            return packet::pong(&shared.sink, dst, ident, seq_no, data);
        }
        if shared.verdict(dst) != Verdict::Allow {
            return true;
        }
        let Ok(permit) = Arc::clone(&self.ping_places).try_acquire_owned() else {
            return false;
        };
        let (shared, data) = (Arc::clone(shared), data.to_vec());
        self.tasks.spawn(async move {
            ping::forward(&shared, dst, ident, seq_no, data).await;
            drop(permit);
            TaskEnd::Other
        });
        true
    }
}

/// Waits until then, or for ever.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
