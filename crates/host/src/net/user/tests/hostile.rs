//! Guests that do not play by the rules, frame by frame.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr,
    TcpSeqNumber, UdpPacket, UdpRepr,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use super::SERVER;
use super::sim::{RawGuest, TestInternet, config, eventually, wire, within};
use crate::net::user::{LinkEnd, LinkError, LinkTask, UserNet, UserNetConfig};
use crate::net::{DNS_IP, GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_MAC, MTU};

struct Rig {
    guest: RawGuest,
    net: UserNet,
    task: LinkTask,
    internet: Arc<TestInternet>,
}

fn rig() -> Rig {
    rig_with(|_| {})
}

fn rig_with(change: impl FnOnce(&mut UserNetConfig)) -> Rig {
    let internet = Arc::new(TestInternet::default());
    let mut config = config(&internet);
    change(&mut config);
    let (host, guest) = wire();
    let (net, task) = UserNet::start(host, config);
    Rig {
        guest: RawGuest(guest),
        net,
        task,
        internet,
    }
}

fn ethernet(src: [u8; 6], kind: EthernetProtocol, len: usize, fill: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut frame = vec![0; 14 + len];
    EthernetRepr {
        src_addr: EthernetAddress(src),
        dst_addr: EthernetAddress(GATEWAY_MAC),
        ethertype: kind,
    }
    .emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    fill(&mut frame[14..]);
    frame
}

fn ipv4(
    src: Ipv4Addr,
    dst: Ipv4Addr,
    next_header: IpProtocol,
    len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let repr = Ipv4Repr {
        src_addr: src,
        dst_addr: dst,
        next_header,
        payload_len: len,
        hop_limit: 64,
    };
    ethernet(GUEST_MAC, EthernetProtocol::Ipv4, 20 + len, |bytes| {
        repr.emit(
            &mut Ipv4Packet::new_unchecked(&mut *bytes),
            &ChecksumCapabilities::default(),
        );
        fill(&mut bytes[20..]);
    })
}

fn segment(repr: &TcpRepr<'_>, dst: Ipv4Addr) -> Vec<u8> {
    ipv4(GUEST_IP, dst, IpProtocol::Tcp, repr.buffer_len(), |bytes| {
        let (src, dst) = (IpAddress::Ipv4(GUEST_IP), IpAddress::Ipv4(dst));
        repr.emit(
            &mut TcpPacket::new_unchecked(bytes),
            &src,
            &dst,
            &ChecksumCapabilities::default(),
        );
    })
}

fn tcp(control: TcpControl, seq: i32, ack: Option<i32>, payload: &[u8]) -> TcpRepr<'_> {
    TcpRepr {
        src_port: 4321,
        dst_port: SERVER.port(),
        control,
        seq_number: TcpSeqNumber(seq),
        ack_number: ack.map(TcpSeqNumber),
        window_len: 64000,
        window_scale: (control == TcpControl::Syn).then_some(4),
        max_seg_size: (control == TcpControl::Syn).then_some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    }
}

fn datagram(dst: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let udp = UdpRepr {
        src_port: 999,
        dst_port: dst.port(),
    };
    ipv4(GUEST_IP, *dst.ip(), IpProtocol::Udp, 8 + payload.len(), |bytes| {
        udp.emit(
            &mut UdpPacket::new_unchecked(bytes),
            &IpAddress::Ipv4(GUEST_IP),
            &IpAddress::Ipv4(*dst.ip()),
            payload.len(),
            |body| body.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
    })
}

fn arp(src_mac: [u8; 6], src: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(src_mac),
        source_protocol_addr: src,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    ethernet(src_mac, EthernetProtocol::Arp, repr.buffer_len(), |bytes| {
        repr.emit(&mut ArpPacket::new_unchecked(bytes));
    })
}

/// Asks for the gateway's address and skips whatever else comes before the answer.
async fn expect_alive(guest: &mut RawGuest) {
    guest.send(&arp(GUEST_MAC, GUEST_IP, GATEWAY_IP)).await;
    loop {
        let frame = guest.recv().await;
        if EthernetFrame::new_unchecked(&frame[..]).ethertype() == EthernetProtocol::Arp {
            break;
        }
    }
}

/// Reads the TCP segment in a frame, checking its checksums.
fn read_tcp(frame: &[u8]) -> (Ipv4Addr, TcpRepr<'_>) {
    let ethernet = EthernetFrame::new_checked(frame).expect("an Ethernet frame");
    assert_eq!(ethernet.dst_addr(), EthernetAddress(GUEST_MAC));
    assert_eq!(ethernet.src_addr(), EthernetAddress(GATEWAY_MAC));
    let ip = Ipv4Packet::new_checked(&frame[14..]).expect("an IP packet");
    let header = Ipv4Repr::parse(&ip, &ChecksumCapabilities::default()).expect("a sound header");
    assert_eq!((header.dst_addr, header.next_header), (GUEST_IP, IpProtocol::Tcp));
    let segment = TcpPacket::new_checked(&frame[34..14 + usize::from(ip.total_len())]).expect("a segment");
    let (src, dst) = (IpAddress::Ipv4(header.src_addr), IpAddress::Ipv4(GUEST_IP));
    let repr =
        TcpRepr::parse(&segment, &src, &dst, &ChecksumCapabilities::default()).expect("a sound segment");
    (header.src_addr, repr)
}

/// Reads the ICMP message in a frame, checking its checksums.
fn read_icmp(frame: &[u8]) -> (u8, u8, Ipv4Addr, Vec<u8>) {
    let ip = Ipv4Packet::new_checked(&frame[14..]).expect("an IP packet");
    assert!(ip.verify_checksum());
    assert_eq!((ip.dst_addr(), ip.next_header()), (GUEST_IP, IpProtocol::Icmp));
    let icmp = Icmpv4Packet::new_checked(ip.payload()).expect("an ICMP message");
    assert!(icmp.verify_checksum());
    (
        icmp.msg_type().into(),
        icmp.msg_code(),
        ip.src_addr(),
        icmp.data().to_vec(),
    )
}

#[tokio::test]
async fn arp_is_answered_for_the_gateway_and_the_name_server_only() {
    let mut rig = rig();
    rig.guest
        .send(&arp(GUEST_MAC, GUEST_IP, Ipv4Addr::new(10, 0, 2, 77)))
        .await;
    rig.guest
        .send(&arp(GUEST_MAC, Ipv4Addr::UNSPECIFIED, GATEWAY_IP))
        .await;
    for target in [GATEWAY_IP, DNS_IP] {
        rig.guest.send(&arp(GUEST_MAC, GUEST_IP, target)).await;
        let frame = rig.guest.recv().await;
        let answer = ArpRepr::parse(&ArpPacket::new_checked(&frame[14..]).expect("ARP")).expect("ARP");
        let ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            ..
        } = answer
        else {
            panic!("not an answer")
        };
        assert_eq!(operation, ArpOperation::Reply);
        assert_eq!(source_hardware_addr, EthernetAddress(GATEWAY_MAC));
        assert_eq!(source_protocol_addr, target);
    }
}

#[tokio::test]
async fn the_gateway_answers_pings_and_no_other_private_host_does() {
    let mut rig = rig();
    let ping = |dst, data: &'static [u8]| {
        let repr = Icmpv4Repr::EchoRequest {
            ident: 3,
            seq_no: 4,
            data,
        };
        ipv4(GUEST_IP, dst, IpProtocol::Icmp, repr.buffer_len(), |bytes| {
            repr.emit(
                &mut Icmpv4Packet::new_unchecked(bytes),
                &ChecksumCapabilities::default(),
            );
        })
    };
    rig.guest.send(&ping(Ipv4Addr::LOCALHOST, b"host")).await;
    rig.guest.send(&ping(GATEWAY_IP, b"hello")).await;
    let frame = rig.guest.recv().await;
    let (kind, _, from, data) = read_icmp(&frame);
    assert_eq!((kind, from, &data[..]), (0, GATEWAY_IP, &b"hello"[..]));
}

#[tokio::test]
async fn sources_other_than_the_guest_are_dropped() {
    let mut rig = rig();
    rig.guest
        .send(&arp([2, 0, 0, 0, 0, 1], GUEST_IP, GATEWAY_IP))
        .await;
    rig.guest
        .send(&arp(GUEST_MAC, Ipv4Addr::new(10, 0, 2, 16), GATEWAY_IP))
        .await;
    let syn = tcp(TcpControl::Syn, 1, None, b"");
    let mut forged = segment(&syn, *SERVER.ip());
    forged[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    rig.guest.send(&forged).await;
    let forged = ipv4(
        Ipv4Addr::new(10, 0, 2, 16),
        *SERVER.ip(),
        IpProtocol::Tcp,
        syn.buffer_len(),
        |bytes| {
            let (src, dst) = (
                IpAddress::Ipv4(Ipv4Addr::new(10, 0, 2, 16)),
                IpAddress::Ipv4(*SERVER.ip()),
            );
            syn.emit(
                &mut TcpPacket::new_unchecked(bytes),
                &src,
                &dst,
                &ChecksumCapabilities::default(),
            );
        },
    );
    rig.guest.send(&forged).await;
    eventually(|| rig.net.stats().dropped_spoofed == 4).await;
    assert_eq!(rig.internet.dialled.load(std::sync::atomic::Ordering::SeqCst), 0);
    expect_alive(&mut rig.guest).await;
}

#[tokio::test]
async fn segments_of_unknown_connections_are_answered_with_a_reset() {
    let mut rig = rig();
    rig.guest
        .send(&segment(
            &tcp(TcpControl::None, 100, Some(777), b"old data"),
            *SERVER.ip(),
        ))
        .await;
    let frame = rig.guest.recv().await;
    let (from, reset) = read_tcp(&frame);
    assert_eq!(from, *SERVER.ip());
    assert_eq!((reset.src_port, reset.dst_port), (SERVER.port(), 4321));
    // The guest believes a reset that stands where its own acknowledgement says.
    assert_eq!(
        (reset.control, reset.seq_number),
        (TcpControl::Rst, TcpSeqNumber(777))
    );
    // A reset is not answered, so the next frame is the answer to the question after it.
    rig.guest
        .send(&segment(&tcp(TcpControl::Rst, 100, Some(777), b""), *SERVER.ip()))
        .await;
    expect_alive(&mut rig.guest).await;
}

#[tokio::test]
async fn a_denied_datagram_is_answered_with_admin_prohibited() {
    let mut rig = rig();
    let frame = datagram(SocketAddrV4::new(Ipv4Addr::new(192, 168, 7, 7), 123), b"data");
    rig.guest.send(&frame).await;
    let answer = rig.guest.recv().await;
    let (kind, code, from, quoted) = read_icmp(&answer);
    assert_eq!((kind, code, from), (3, 13, GATEWAY_IP));
    // The quoted addresses and ports are what the guest finds its socket by.
    assert_eq!(quoted[12..28], frame[26..42]);
}

#[tokio::test]
async fn a_closed_udp_port_is_answered_with_icmp() {
    let mut rig = rig();
    let closed = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .expect("a port")
        .local_addr()
        .expect("an address");
    rig.internet.route_udp(SERVER, closed);
    for _ in 0..3 {
        rig.guest.send(&datagram(SERVER, b"anybody?")).await;
        let answer = rig.guest.recv().await;
        let (kind, code, ..) = read_icmp(&answer);
        assert_eq!((kind, code), (3, 3));
    }
}

#[tokio::test]
async fn an_unreachable_destination_is_answered_with_icmp() {
    let mut rig = rig();
    rig.guest
        .send(&segment(&tcp(TcpControl::Syn, 5, None, b""), *SERVER.ip()))
        .await;
    let answer = rig.guest.recv().await;
    let (kind, code, ..) = read_icmp(&answer);
    assert_eq!((kind, code), (3, 1));
}

#[tokio::test]
async fn a_long_answer_arrives_in_fragments() {
    let resolver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let addr = resolver.local_addr().expect("an address");
    let mut rig = rig_with(|config| config.resolvers = vec![addr]);
    rig.guest
        .send(&datagram(SocketAddrV4::new(DNS_IP, 53), &[9; 30]))
        .await;
    let (_, from) = within(resolver.recv_from(&mut [0; 64])).await.expect("a query");
    let answer: Vec<u8> = (0..4000u32).map(|at| if at < 2 { 9 } else { at as u8 }).collect();
    resolver.send_to(&answer, from).await.expect("sent");
    let mut whole = Vec::new();
    loop {
        let frame = rig.guest.recv().await;
        assert!(frame.len() <= 14 + MTU);
        let ip = Ipv4Packet::new_checked(&frame[14..]).expect("an IP packet");
        assert!(ip.verify_checksum());
        assert_eq!(usize::from(ip.frag_offset()), whole.len());
        whole.extend_from_slice(ip.payload());
        if !ip.more_frags() {
            break;
        }
    }
    let udp = UdpPacket::new_checked(&whole[..]).expect("a datagram");
    assert!(udp.verify_checksum(&IpAddress::Ipv4(DNS_IP), &IpAddress::Ipv4(GUEST_IP)));
    assert_eq!(
        (udp.src_port(), udp.dst_port(), udp.payload()),
        (53, 999, &answer[..])
    );
}

#[tokio::test]
async fn an_impossible_length_ends_the_link() {
    let mut rig = rig();
    rig.guest
        .0
        .write_all(&u32::MAX.to_be_bytes())
        .await
        .expect("sent");
    let end = within(rig.task.ended()).await;
    assert!(
        matches!(end, LinkEnd::Failed(LinkError::OversizeFrame { len }) if len == u32::MAX as usize),
        "{end:?}"
    );
    assert_eq!(
        within(rig.guest.0.read(&mut [0; 8]))
            .await
            .expect("an orderly end"),
        0
    );
}

#[tokio::test]
async fn a_lost_syn_is_repeated_soon_and_each_attempt_starts_elsewhere() {
    let mut rig = rig();
    let mut starts = Vec::new();
    for _ in 0..3 {
        let net = rig.net.clone();
        let connecting = tokio::spawn(async move { net.connect(49983).await });
        let started = std::time::Instant::now();
        let frame = rig.guest.recv().await;
        let (from, first) = read_tcp(&frame);
        assert_eq!(
            (from, first.dst_port, first.control),
            (GATEWAY_IP, 49983, TcpControl::Syn)
        );
        let frame = rig.guest.recv().await;
        let (_, second) = read_tcp(&frame);
        assert_eq!(first, second);
        // The stack alone would wait for a second.
        assert!(
            started.elapsed() < std::time::Duration::from_millis(900),
            "{:?}",
            started.elapsed()
        );
        starts.push((first.src_port, first.seq_number.0));
        let mut refusal = tcp(TcpControl::Rst, 0, Some(first.seq_number.0.wrapping_add(1)), b"");
        (refusal.src_port, refusal.dst_port) = (49983, first.src_port);
        rig.guest.send(&segment(&refusal, GATEWAY_IP)).await;
        within(connecting).await.expect("no panic").expect_err("refused");
        expect_alive(&mut rig.guest).await;
    }
    starts.sort_unstable();
    starts.dedup();
    assert_eq!(starts.len(), 3, "ports and sequence numbers are random");
}

#[tokio::test]
async fn a_guest_that_reads_nothing_costs_a_bounded_amount() {
    let mut rig = rig();
    // Each asks for an answer, and none of the answers is read.
    let question = arp(GUEST_MAC, GUEST_IP, GATEWAY_IP);
    for _ in 0..60_000 {
        rig.guest.send(&question).await;
    }
    eventually(|| rig.net.stats().frames_from_guest == 60_000).await;
    let stats = rig.net.stats();
    assert!(stats.dropped_overload > 0, "{stats:?}");
    assert!(stats.bytes_to_guest < 1024 * 1024, "{stats:?}");
    expect_alive(&mut rig.guest).await;
}

#[tokio::test]
async fn a_guest_that_hangs_up_while_its_destination_is_dialled_leaves_nothing() {
    let mut rig = rig();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    rig.internet
        .route_tcp(SERVER, listener.local_addr().expect("an address"));
    rig.guest
        .send(&segment(&tcp(TcpControl::Syn, 5, None, b""), *SERVER.ip()))
        .await;
    rig.guest
        .send(&segment(&tcp(TcpControl::Rst, 6, None, b""), *SERVER.ip()))
        .await;
    let (mut outside, _) = within(listener.accept()).await.expect("dialled");
    assert!(matches!(within(outside.read(&mut [0; 8])).await, Ok(0) | Err(_)));
    eventually(|| rig.net.stats().tcp_open == 0).await;
}

/// A segment of an open connection with one thing or everything wrong with it.
#[derive(Clone, Debug)]
struct Wild {
    control: TcpControl,
    seq: i32,
    ack: Option<i32>,
    window: u16,
    payload: Vec<u8>,
}

fn wild() -> impl Strategy<Value = Wild> {
    let control = prop_oneof![
        4 => Just(TcpControl::None),
        2 => Just(TcpControl::Psh),
        1 => Just(TcpControl::Fin),
        1 => Just(TcpControl::Syn),
        1 => Just(TcpControl::Rst),
    ];
    // Near where the connection stands, at the far ends of the sequence space, and anywhere.
    let offset = || {
        prop_oneof![
            4 => -3000i32..3000,
            1 => Just(i32::MAX),
            1 => Just(i32::MIN),
            1 => (i32::MAX - 70_000)..i32::MAX,
            1 => i32::MIN..(i32::MIN + 70_000),
            1 => any::<i32>(),
        ]
    };
    (
        control,
        offset(),
        proptest::option::weighted(0.9, offset()),
        any::<u16>(),
        0usize..1460,
    )
        .prop_map(|(control, seq, ack, window, len)| Wild {
            control,
            seq,
            ack,
            window,
            payload: vec![0xA5; len],
        })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn garbage_does_not_disturb_the_link(
        frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..2000), 1..30),
        from_guest in any::<bool>(),
    ) {
        runtime().block_on(async {
            let mut rig = rig();
            for mut frame in frames {
                if from_guest && frame.len() >= 34 {
                    frame[..6].copy_from_slice(&GATEWAY_MAC);
                    frame[6..12].copy_from_slice(&GUEST_MAC);
                    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
                    frame[26..30].copy_from_slice(&GUEST_IP.octets());
                    let len = u16::try_from(frame.len() - 14).expect("a short frame");
                    frame[16..18].copy_from_slice(&len.to_be_bytes());
                    frame[20..22].copy_from_slice(&[0, 0]);
                    Ipv4Packet::new_unchecked(&mut frame[14..34]).fill_checksum();
                }
                rig.guest.send(&frame).await;
            }
            expect_alive(&mut rig.guest).await;
        });
    }

    #[test]
    fn wild_segments_do_not_disturb_the_link(segments in proptest::collection::vec(wild(), 1..40)) {
        runtime().block_on(async {
            let mut rig = rig();
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
            rig.internet.route_tcp(SERVER, listener.local_addr().expect("an address"));
            rig.guest.send(&segment(&tcp(TcpControl::Syn, 1000, None, b""), *SERVER.ip())).await;
            let frame = rig.guest.recv().await;
            let (_, syn_ack) = read_tcp(&frame);
            assert_eq!((syn_ack.control, syn_ack.ack_number), (TcpControl::Syn, Some(TcpSeqNumber(1001))));
            let base = syn_ack.seq_number.0.wrapping_add(1);
            rig.guest.send(&segment(&tcp(TcpControl::None, 1001, Some(base), b""), *SERVER.ip())).await;
            let (mut outside, _) = within(listener.accept()).await.expect("dialled");
            // Something in flight, so that acknowledgements have something to lie about.
            outside.write_all(&[1; 9000]).await.expect("sent");
            for wild in &segments {
                let seq = 1001i32.wrapping_add(wild.seq);
                let ack = wild.ack.map(|ack| base.wrapping_add(ack));
                let mut repr = tcp(wild.control, seq, ack, &wild.payload);
                repr.window_len = wild.window;
                rig.guest.send(&segment(&repr, *SERVER.ip())).await;
            }
            expect_alive(&mut rig.guest).await;
            rig.net.shutdown();
            within(rig.task.ended()).await;
            assert_eq!(rig.net.stats().tcp_open, 0);
        });
    }
}
