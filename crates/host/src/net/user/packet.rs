//! Reading the guest's packets and writing the few that no TCP flow writes: resets, ICMP, UDP, ARP.

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4DstUnreachable,
    Icmpv4Message, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl,
    TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

use super::link::{EtherType, FrameSink};
use crate::net::{DNS_IP, GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_MAC, MTU};

/// Bytes of an IPv4 header without options, the only kind written here.
const IPV4_LEN: usize = 20;
/// Bytes of a UDP header.
const UDP_LEN: usize = 8;
/// Bytes of an ICMP header.
const ICMP_LEN: usize = 8;

/// A packet from the guest, checked as far as the link goes: it has the guest's addresses and is whole.
#[derive(Debug)]
pub(super) enum FromGuest<'a> {
    /// The guest asks who has the gateway's or the name server's address.
    ArpQuestion { target: Ipv4Addr },
    /// A TCP segment; `packet` is the whole IP packet.
    Tcp {
        packet: &'a [u8],
        dst: Ipv4Addr,
        segment: TcpPacket<&'a [u8]>,
    },
    /// A datagram; `packet` is the whole IP packet.
    Udp {
        packet: &'a [u8],
        src_port: u16,
        dst: SocketAddrV4,
        payload: &'a [u8],
    },
    /// An echo request.
    Ping {
        dst: Ipv4Addr,
        ident: u16,
        seq_no: u16,
        data: &'a [u8],
    },
    /// Nothing that the link carries, but nothing wrong either: IPv6, chatter of the guest's kernel.
    Ignored,
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejected {
    /// It is not what it says, or its checksum is wrong.
    Malformed,
    /// Its source is not the guest.
    Spoofed,
}

impl From<smoltcp::wire::Error> for Rejected {
    fn from(_: smoltcp::wire::Error) -> Self {
        Self::Malformed
    }
}

/// Reads a frame.
pub(super) fn parse(frame: &[u8]) -> Result<FromGuest<'_>, Rejected> {
    let ethernet = EthernetFrame::new_checked(frame)?;
    if ethernet.src_addr() != EthernetAddress(GUEST_MAC) {
        return Err(Rejected::Spoofed);
    }
    if ethernet.dst_addr() != EthernetAddress(GATEWAY_MAC) && !ethernet.dst_addr().is_broadcast() {
        return Ok(FromGuest::Ignored);
    }
    let payload = &frame[EthernetFrame::<&[u8]>::header_len()..];
    match ethernet.ethertype() {
        EthernetProtocol::Arp => parse_arp(payload),
        EthernetProtocol::Ipv4 => parse_ipv4(payload),
        _ => Ok(FromGuest::Ignored),
    }
}

fn parse_arp(payload: &[u8]) -> Result<FromGuest<'_>, Rejected> {
    let ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = ArpRepr::parse(&ArpPacket::new_checked(payload)?)?
    else {
        return Ok(FromGuest::Ignored);
    };
    if operation != ArpOperation::Request {
        return Ok(FromGuest::Ignored);
    }
    // A question without a sender is the guest looking whether its own address is free.
    if source_protocol_addr.is_unspecified() {
        return Ok(FromGuest::Ignored);
    }
    if source_hardware_addr != EthernetAddress(GUEST_MAC) || source_protocol_addr != GUEST_IP {
        return Err(Rejected::Spoofed);
    }
    if target_protocol_addr != GATEWAY_IP && target_protocol_addr != DNS_IP {
        return Ok(FromGuest::Ignored);
    }
    Ok(FromGuest::ArpQuestion {
        target: target_protocol_addr,
    })
}

fn parse_ipv4(payload: &[u8]) -> Result<FromGuest<'_>, Rejected> {
    let ip = Ipv4Packet::new_checked(payload)?;
    if ip.version() != 4 || !ip.verify_checksum() {
        return Err(Rejected::Malformed);
    }
    let (src, dst) = (ip.src_addr(), ip.dst_addr());
    if src != GUEST_IP {
        return Err(Rejected::Spoofed);
    }
    // Fragments are not put together: TCP and everything modern avoids them, and their reassembly is a
    // classic place to exhaust. A packet longer than the MTU cannot have come over this wire.
    if ip.more_frags() || ip.frag_offset() != 0 || usize::from(ip.total_len()) > MTU {
        return Err(Rejected::Malformed);
    }
    // Without the padding that short frames have behind the packet.
    let packet = &payload[..usize::from(ip.total_len())];
    let body = &packet[usize::from(ip.header_len())..];
    match ip.next_header() {
        IpProtocol::Tcp => {
            let segment = TcpPacket::new_checked(body)?;
            if segment.src_port() == 0 || segment.dst_port() == 0 {
                return Err(Rejected::Malformed);
            }
            Ok(FromGuest::Tcp { packet, dst, segment })
        }
        IpProtocol::Udp => {
            let datagram = UdpPacket::new_checked(body)?;
            if datagram.src_port() == 0
                || datagram.dst_port() == 0
                || !datagram.verify_checksum(&IpAddress::Ipv4(src), &IpAddress::Ipv4(dst))
            {
                return Err(Rejected::Malformed);
            }
            let (src_port, dst_port, end) = (
                datagram.src_port(),
                datagram.dst_port(),
                usize::from(datagram.len()),
            );
            Ok(FromGuest::Udp {
                packet,
                src_port,
                dst: SocketAddrV4::new(dst, dst_port),
                payload: &body[UDP_LEN..end],
            })
        }
        IpProtocol::Icmp => {
            let icmp = Icmpv4Packet::new_checked(body)?;
            if icmp.msg_type() != Icmpv4Message::EchoRequest {
                return Ok(FromGuest::Ignored);
            }
            if !icmp.verify_checksum() {
                return Err(Rejected::Malformed);
            }
            let (ident, seq_no) = (icmp.echo_ident(), icmp.echo_seq_no());
            Ok(FromGuest::Ping {
                dst,
                ident,
                seq_no,
                data: &body[ICMP_LEN..],
            })
        }
        _ => Ok(FromGuest::Ignored),
    }
}

/// Writes an IP packet from `src` to the guest into the sink; false when it was dropped.
fn offer_ipv4(
    sink: &FrameSink,
    src: Ipv4Addr,
    next_header: IpProtocol,
    payload_len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    let header = Ipv4Repr {
        src_addr: src,
        dst_addr: GUEST_IP,
        next_header,
        payload_len,
        hop_limit: 64,
    };
    sink.offer(EtherType::Ipv4, IPV4_LEN + payload_len, |bytes| {
        header.emit(
            &mut Ipv4Packet::new_unchecked(&mut *bytes),
            &ChecksumCapabilities::default(),
        );
        fill(&mut bytes[IPV4_LEN..]);
    })
}

/// Answers an ARP question: every address but the guest's is the gateway.
pub(super) fn answer_arp(sink: &FrameSink, target: Ipv4Addr) -> bool {
    let answer = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(GATEWAY_MAC),
        source_protocol_addr: target,
        target_hardware_addr: EthernetAddress(GUEST_MAC),
        target_protocol_addr: GUEST_IP,
    };
    sink.offer(EtherType::Arp, answer.buffer_len(), |bytes| {
        answer.emit(&mut ArpPacket::new_unchecked(bytes))
    })
}

/// What a reset needs to know of the segment that it answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct ResetOf {
    guest_port: u16,
    remote: SocketAddrV4,
    seq: TcpSeqNumber,
    /// Sequence space that the segment takes.
    len: usize,
    ack: Option<TcpSeqNumber>,
}

impl ResetOf {
    /// Reads it from a segment to `dst`. A reset itself is never answered.
    pub(super) fn segment(dst: Ipv4Addr, segment: &TcpPacket<&[u8]>) -> Option<Self> {
        if segment.rst() {
            return None;
        }
        Some(Self {
            guest_port: segment.src_port(),
            remote: SocketAddrV4::new(dst, segment.dst_port()),
            seq: segment.seq_number(),
            len: segment.payload().len() + usize::from(segment.syn()) + usize::from(segment.fin()),
            ack: segment.ack().then(|| segment.ack_number()),
        })
    }

    /// Tells the guest that there is no such connection.
    pub(super) fn send(self, sink: &FrameSink) -> bool {
        let reset = TcpRepr {
            src_port: self.remote.port(),
            dst_port: self.guest_port,
            control: TcpControl::Rst,
            // A reset is believed when it stands where the guest's own acknowledgement says, or, for a
            // segment that acknowledged nothing, when it acknowledges that segment.
            seq_number: self.ack.unwrap_or_default(),
            ack_number: if self.ack.is_none() {
                Some(self.seq + self.len)
            } else {
                None
            },
            window_len: 0,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let (src, dst) = (IpAddress::Ipv4(*self.remote.ip()), IpAddress::Ipv4(GUEST_IP));
        offer_ipv4(
            sink,
            *self.remote.ip(),
            IpProtocol::Tcp,
            reset.buffer_len(),
            |bytes| {
                reset.emit(
                    &mut TcpPacket::new_unchecked(bytes),
                    &src,
                    &dst,
                    &ChecksumCapabilities::default(),
                );
            },
        )
    }
}

/// Tells the guest that `packet`, which it sent, did not arrive. The message comes from the gateway.
pub(super) fn unreachable(sink: &FrameSink, reason: Icmpv4DstUnreachable, packet: &[u8]) -> bool {
    let Ok(ip) = Ipv4Packet::new_checked(packet) else {
        return false;
    };
    let Ok(header) = Ipv4Repr::parse(&ip, &ChecksumCapabilities::ignored()) else {
        return false;
    };
    // Eight bytes behind the header are what every stack needs to find the socket.
    let body = ip.payload();
    let message = Icmpv4Repr::DstUnreachable {
        reason,
        header,
        data: &body[..body.len().min(8)],
    };
    offer_ipv4(
        sink,
        GATEWAY_IP,
        IpProtocol::Icmp,
        message.buffer_len(),
        |bytes| {
            message.emit(
                &mut Icmpv4Packet::new_unchecked(bytes),
                &ChecksumCapabilities::default(),
            );
        },
    )
}

/// Answers a ping as `from`.
pub(super) fn pong(sink: &FrameSink, from: Ipv4Addr, ident: u16, seq_no: u16, data: &[u8]) -> bool {
    let data = &data[..data.len().min(MTU - IPV4_LEN - ICMP_LEN)];
    let message = Icmpv4Repr::EchoReply { ident, seq_no, data };
    offer_ipv4(sink, from, IpProtocol::Icmp, message.buffer_len(), |bytes| {
        message.emit(
            &mut Icmpv4Packet::new_unchecked(bytes),
            &ChecksumCapabilities::default(),
        );
    })
}

/// Sends a datagram to the guest, in fragments when it is longer than the MTU. `ident` tells the
/// fragments of one datagram from those of another.
pub(super) fn datagram(
    sink: &FrameSink,
    from: SocketAddrV4,
    guest_port: u16,
    payload: &[u8],
    ident: u16,
) -> bool {
    let total = UDP_LEN + payload.len();
    if total > usize::from(u16::MAX) - IPV4_LEN {
        return false;
    }
    let udp = UdpRepr {
        src_port: from.port(),
        dst_port: guest_port,
    };
    let (src, dst) = (IpAddress::Ipv4(*from.ip()), IpAddress::Ipv4(GUEST_IP));
    let emit = |bytes: &mut [u8]| {
        udp.emit(
            &mut UdpPacket::new_unchecked(bytes),
            &src,
            &dst,
            payload.len(),
            |body| body.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
    };
    if IPV4_LEN + total <= MTU {
        return offer_ipv4(sink, *from.ip(), IpProtocol::Udp, total, emit);
    }
    let mut whole = vec![0; total];
    emit(&mut whole);
    // Offsets count in units of eight bytes, so all fragments but the last are a multiple of that.
    let step = (MTU - IPV4_LEN) / 8 * 8;
    for (index, part) in whole.chunks(step).enumerate() {
        let header = Ipv4Repr {
            src_addr: *from.ip(),
            dst_addr: GUEST_IP,
            next_header: IpProtocol::Udp,
            payload_len: part.len(),
            hop_limit: 64,
        };
        let sent = sink.offer(EtherType::Ipv4, IPV4_LEN + part.len(), |bytes| {
            let mut packet = Ipv4Packet::new_unchecked(&mut *bytes);
            header.emit(&mut packet, &ChecksumCapabilities::default());
            packet.set_dont_frag(false);
            packet.set_ident(ident);
            packet.set_more_frags((index + 1) * step < total);
            packet.set_frag_offset(u16::try_from(index * step).unwrap_or(u16::MAX));
            packet.fill_checksum();
            bytes[IPV4_LEN..].copy_from_slice(part);
        });
        if !sent {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame that gets past the first checks, so that random bytes reach the deeper ones.
    fn plausible() -> impl Strategy<Value = Vec<u8>> {
        (
            prop_oneof![Just(0x0800u16), Just(0x0806u16), any::<u16>()],
            prop_oneof![Just(6u8), Just(17u8), Just(1u8), any::<u8>()],
            proptest::collection::vec(any::<u8>(), 0..120),
            0u16..160,
            any::<bool>(),
        )
            .prop_map(|(ethertype, protocol, body, total_len, honest)| {
                let mut frame = Vec::new();
                frame.extend_from_slice(&GATEWAY_MAC);
                frame.extend_from_slice(&GUEST_MAC);
                frame.extend_from_slice(&ethertype.to_be_bytes());
                let mut header = [0u8; 20];
                header[0] = 0x45;
                let honest_len = u16::try_from(20 + body.len()).unwrap_or(u16::MAX);
                header[2..4].copy_from_slice(&if honest { honest_len } else { total_len }.to_be_bytes());
                header[9] = protocol;
                header[12..16].copy_from_slice(&GUEST_IP.octets());
                header[16..20].copy_from_slice(&[1, 2, 3, 4]);
                Ipv4Packet::new_unchecked(&mut header[..]).fill_checksum();
                frame.extend_from_slice(&header);
                frame.extend_from_slice(&body);
                frame
            })
    }

    proptest! {
        #[test]
        fn no_frame_panics(frame in prop_oneof![plausible(), proptest::collection::vec(any::<u8>(), 0..200)]) {
            let sink = FrameSink::new();
            match parse(&frame) {
                Ok(FromGuest::Tcp { packet, dst, segment }) => {
                    unreachable(&sink, Icmpv4DstUnreachable::HostUnreachable, packet);
                    if let Some(reset) = ResetOf::segment(dst, &segment) {
                        prop_assert!(reset.send(&sink));
                    }
                }
                Ok(FromGuest::Udp { packet, payload, dst, src_port }) => {
                    prop_assert!(unreachable(&sink, Icmpv4DstUnreachable::PortUnreachable, packet));
                    prop_assert!(datagram(&sink, dst, src_port, payload, 1));
                }
                Ok(FromGuest::Ping { dst, ident, seq_no, data }) => {
                    prop_assert!(pong(&sink, dst, ident, seq_no, data));
                }
                _ => {}
            }
        }
    }
}
