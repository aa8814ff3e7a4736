//! Datagrams and name queries.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use super::sim::{eventually, within};
use super::{SERVER, World};
use crate::net::{DNS_IP, EgressPolicy};

const NAME_SERVER: SocketAddrV4 = SocketAddrV4::new(DNS_IP, 53);

async fn loopback() -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port")
}

/// A query for nothing in particular.
fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend_from_slice(&[0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'x', 0, 0, 1, 0, 1]);
    query
}

#[tokio::test]
async fn datagrams_are_echoed_and_flows_end_when_idle() {
    let world = World::with(|config| config.limits.udp_idle = Duration::from_millis(200));
    let server = loopback().await;
    world
        .internet
        .route_udp(SERVER, server.local_addr().expect("an address"));
    let client = world.guest.udp(5000);
    for round in 0..20u8 {
        let data = vec![round; 1 + usize::from(round) * 70];
        client.send_to(&data, SERVER);
        let mut buffer = [0; 2000];
        let (len, from) = within(server.recv_from(&mut buffer)).await.expect("a datagram");
        server.send_to(&buffer[..len], from).await.expect("echoed");
        assert_eq!(client.recv().await, data);
    }
    assert_eq!(world.net.stats().udp_from_guest, 1, "one flow carries them all");
    // After a silence, the same pair is a new flow, which shows that the old one was given up.
    within(async {
        loop {
            tokio::time::sleep(Duration::from_millis(250)).await;
            client.send_to(b"again", SERVER);
            within(server.recv_from(&mut [0; 16])).await.expect("a datagram");
            if world.net.stats().udp_from_guest > 1 {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn forbidden_datagrams_go_nowhere() {
    let world = World::new();
    let client = world.guest.udp(5000);
    for ip in [
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::new(169, 254, 169, 254),
        Ipv4Addr::new(192, 168, 0, 1),
    ] {
        client.send_to(b"psst", SocketAddrV4::new(ip, 53));
    }
    eventually(|| world.net.stats().denied == 3).await;
    assert_eq!(world.internet.dialled.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn the_number_of_udp_flows_is_bounded() {
    let world = World::with(|config| config.limits.udp_from_guest = 4);
    let server = loopback().await;
    world
        .internet
        .route_udp(SERVER, server.local_addr().expect("an address"));
    let clients: Vec<_> = (0..6).map(|index| world.guest.udp(5000 + index)).collect();
    for client in &clients {
        client.send_to(b"x", SERVER);
    }
    eventually(|| world.net.stats().dropped_overload == 2).await;
    assert_eq!(world.net.stats().udp_from_guest, 4);
    // Once the four have been silent for a while, a fifth takes the place of one of them.
    within(async {
        while world.net.stats().udp_from_guest == 4 {
            clients[5].send_to(b"x", SERVER);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn names_are_asked_of_the_hosts_resolvers() {
    let resolver = loopback().await;
    let addr = resolver.local_addr().expect("an address");
    // The first resolver is dead, so the second is asked; both on loopback, where guests may not go.
    let dead = loopback().await.local_addr().expect("an address");
    let world = World::with(|config| config.resolvers = vec![dead, addr]);
    let client = world.guest.udp(5353);
    client.send_to(&query(77), NAME_SERVER);
    let mut buffer = [0; 512];
    let (len, from) = within(resolver.recv_from(&mut buffer)).await.expect("a query");
    assert_eq!(buffer[..len], query(77));
    // An answer to another query is not taken for this one.
    resolver.send_to(&query(78), from).await.expect("sent");
    let mut answer = query(77);
    answer[2] |= 0x80;
    resolver.send_to(&answer, from).await.expect("sent");
    assert_eq!(client.recv().await, answer);
    assert_eq!(world.net.stats().dns_queries, 1);
    assert_eq!(world.internet.dialled.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn names_are_asked_over_tcp_too() {
    let resolver = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let addr = resolver.local_addr().expect("an address");
    let world = World::with(|config| config.resolvers = vec![addr]);
    let mut client = world.guest.connect(NAME_SERVER).await.expect("a connection");
    let (mut server, _) = within(resolver.accept()).await.expect("forwarded");
    client.write_all(b"long question").await.expect("sent");
    let mut got = [0; 13];
    within(server.read_exact(&mut got)).await.expect("received");
    assert_eq!(&got, b"long question");
}

#[tokio::test]
async fn a_sealed_guest_resolves_nothing() {
    let resolver = loopback().await;
    let addr = resolver.local_addr().expect("an address");
    let world = World::with(|config| {
        config.policy = EgressPolicy::sealed();
        config.resolvers = vec![addr];
    });
    let client = world.guest.udp(5353);
    client.send_to(&query(1), NAME_SERVER);
    let answer = client.recv().await;
    assert_eq!(answer[3] & 0x0f, 5, "refused");
    assert!(world.guest.connect(NAME_SERVER).await.is_err());
    assert_eq!(world.net.stats().dns_queries, 0);
}

#[tokio::test]
async fn without_a_resolver_the_guest_is_told_at_once() {
    let world = World::new();
    let client = world.guest.udp(5353);
    client.send_to(&query(9), NAME_SERVER);
    let answer = client.recv().await;
    assert_eq!(
        (answer[0], answer[1], answer[2] & 0x80, answer[3] & 0x0f),
        (0, 9, 0x80, 2)
    );
}
