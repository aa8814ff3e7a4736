//! TCP in both directions, against real servers.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;

use super::sim::{eventually, within};
use super::{ConnectError, SERVER, World};
use crate::net::{DNS_IP, EgressPolicy, GATEWAY_IP, HostAddrs};

const BULK: usize = 32 * 1024 * 1024;

/// Bytes that look random and can be made again from the seed.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

async fn send_pattern(mut to: impl AsyncWrite + Unpin, seed: u64, len: usize) {
    let mut pattern = Pattern(seed);
    let mut buffer = vec![0; 64 * 1024];
    for _ in 0..len / buffer.len() {
        pattern.fill(&mut buffer);
        to.write_all(&buffer).await.expect("the peer takes the data");
    }
    to.shutdown().await.expect("the write half closes");
}

/// Reads to the end and compares.
async fn expect_pattern(mut from: impl AsyncRead + Unpin, seed: u64, len: usize) {
    let mut pattern = Pattern(seed);
    let (mut buffer, mut expected) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    for at in 0..len / buffer.len() {
        from.read_exact(&mut buffer)
            .await
            .expect("the peer sends the data");
        pattern.fill(&mut expected);
        assert!(buffer == expected, "the data differs in block {at}");
    }
    assert_eq!(from.read(&mut buffer).await.expect("an orderly end"), 0);
}

async fn server(world: &World) -> TcpListener {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    world
        .internet
        .route_tcp(SERVER, listener.local_addr().expect("an address"));
    listener
}

/// Sends a lot both ways at once over the two ends of a connection.
async fn exchange(
    here: impl AsyncRead + AsyncWrite + Unpin,
    there: impl AsyncRead + AsyncWrite + Unpin,
) -> Duration {
    let (here_read, here_write) = tokio::io::split(here);
    let (there_read, there_write) = tokio::io::split(there);
    let started = Instant::now();
    within(async {
        tokio::join!(
            send_pattern(here_write, 1, BULK),
            expect_pattern(there_read, 1, BULK),
            send_pattern(there_write, 2, BULK),
            expect_pattern(here_read, 2, BULK),
        )
    })
    .await;
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_data_from_the_guest_to_the_internet_and_back() {
    let world = World::new();
    let listener = server(&world).await;
    let client = world.guest.connect(SERVER).await.expect("a connection");
    let (outside, _) = within(listener.accept()).await.expect("dialled");
    exchange(client, outside).await;
    eventually(|| world.net.stats().tcp_open == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_data_from_the_host_into_the_guest_and_back() {
    let world = World::new();
    let inside = world.guest.listen(49983);
    let stream = world.net.connect(49983).await.expect("the guest listens");
    within(inside.established()).await.expect("accepted");
    exchange(stream, inside).await;
    eventually(|| world.net.stats().tcp_open == 0).await;
}

#[tokio::test]
async fn either_side_can_close_its_half_first() {
    let world = World::new();
    let listener = server(&world).await;
    for guest_first in [true, false] {
        let mut client = world.guest.connect(SERVER).await.expect("a connection");
        let (mut outside, _) = within(listener.accept()).await.expect("dialled");
        let mut got = Vec::new();
        if guest_first {
            client.write_all(b"question").await.expect("sent");
            client.shutdown().await.expect("half closed");
            within(outside.read_to_end(&mut got))
                .await
                .expect("an orderly end");
            assert_eq!(got, b"question");
            got.clear();
            outside
                .write_all(b"answer")
                .await
                .expect("the other half is open");
            drop(outside);
            within(client.read_to_end(&mut got))
                .await
                .expect("an orderly end");
            assert_eq!(got, b"answer");
        } else {
            outside.write_all(b"greeting").await.expect("sent");
            outside.shutdown().await.expect("half closed");
            within(client.read_to_end(&mut got))
                .await
                .expect("an orderly end");
            assert_eq!(got, b"greeting");
            got.clear();
            client.write_all(b"reply").await.expect("the other half is open");
            client.shutdown().await.expect("half closed");
            within(outside.read_to_end(&mut got))
                .await
                .expect("an orderly end");
            assert_eq!(got, b"reply");
        }
    }
    eventually(|| world.net.stats().tcp_open == 0).await;
}

#[tokio::test]
async fn a_refusal_reaches_the_guest_as_one() {
    let world = World::new();
    let listener = server(&world).await;
    drop(listener);
    let error = world.guest.connect(SERVER).await.err().expect("nothing listens");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(world.net.stats().tcp_unreachable, 1);
    assert_eq!(world.net.stats().tcp_from_guest, 0);
}

#[tokio::test]
async fn forbidden_destinations_are_refused_and_never_dialled() {
    let world = World::with(|config| {
        // Even the widest policy does not open these.
        config.policy.allow_private = true;
        config.policy.allow = vec!["0.0.0.0/0".parse().expect("a network")];
    });
    let own: Vec<Ipv4Addr> = {
        let addrs = HostAddrs::read().expect("the system tells its addresses");
        nix::ifaddrs::getifaddrs()
            .expect("the system tells its addresses")
            .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
            .filter(|ip| addrs.contains(*ip))
            .collect()
    };
    assert!(!own.is_empty());
    let special = [
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::new(127, 0, 0, 53),
        Ipv4Addr::new(169, 254, 169, 254),
        Ipv4Addr::new(240, 0, 0, 1),
        Ipv4Addr::new(0, 0, 0, 1),
    ];
    let special_count = special.len();
    for ip in special.into_iter().chain(own.iter().copied()) {
        let error = world
            .guest
            .connect(SocketAddrV4::new(ip, 80))
            .await
            .err()
            .expect("forbidden");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{ip}");
    }
    for ip in [GATEWAY_IP, DNS_IP] {
        let error = world
            .guest
            .connect(SocketAddrV4::new(ip, 80))
            .await
            .err()
            .expect("forbidden");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{ip}");
    }
    assert_eq!(world.internet.dialled.load(Ordering::SeqCst), 0);
    assert_eq!(world.net.stats().denied, (special_count + own.len() + 2) as u64);
}

#[tokio::test]
async fn a_tighter_policy_cuts_what_is_open() {
    let world = World::new();
    let listener = server(&world).await;
    let mut client = world.guest.connect(SERVER).await.expect("a connection");
    let (mut outside, _) = within(listener.accept()).await.expect("dialled");
    let inside = world.guest.listen(7);
    let mut kept = world.net.connect(7).await.expect("the guest listens");
    within(inside.established()).await.expect("accepted");

    world.net.set_policy(EgressPolicy::sealed());
    let error = within(client.read(&mut [0; 8])).await.expect_err("cut");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(within(outside.read(&mut [0; 8])).await, Err(_) | Ok(0)));
    assert!(world.guest.connect(SERVER).await.is_err());
    // The host's own connections are not the guest's egress.
    kept.write_all(b"x").await.expect("still open");

    world.net.set_policy(EgressPolicy::default());
    world.guest.connect(SERVER).await.expect("open again");
}

#[tokio::test]
async fn a_reset_passes_through_in_both_directions() {
    let world = World::new();
    let listener = server(&world).await;
    let mut client = world.guest.connect(SERVER).await.expect("a connection");
    let (outside, _) = within(listener.accept()).await.expect("dialled");
    outside.set_zero_linger().expect("a live socket");
    drop(outside);
    let error = within(client.read(&mut [0; 8])).await.expect_err("reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    let client = world.guest.connect(SERVER).await.expect("a connection");
    let (mut outside, _) = within(listener.accept()).await.expect("dialled");
    client.abort();
    let error = within(outside.read(&mut [0; 8])).await.expect_err("reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    let inside = world.guest.listen(7);
    let mut stream = world.net.connect(7).await.expect("the guest listens");
    within(inside.established()).await.expect("accepted");
    inside.abort();
    let error = within(stream.read(&mut [0; 8])).await.expect_err("reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    eventually(|| world.net.stats().tcp_open == 0).await;
}

#[tokio::test]
async fn a_closed_port_of_the_guest_refuses() {
    let world = World::new();
    let error = within(world.net.connect(4)).await.expect_err("nothing listens");
    assert!(matches!(error, ConnectError::Refused { port: 4 }));
}

#[tokio::test]
async fn a_dropped_stream_still_delivers_what_was_written() {
    let world = World::new();
    let mut inside = world.guest.listen(7);
    let mut stream = world.net.connect(7).await.expect("the guest listens");
    let data = vec![7; 200_000];
    within(stream.write_all(&data))
        .await
        .expect("room in the buffers");
    drop(stream);
    within(inside.established()).await.expect("accepted");
    let mut got = Vec::new();
    within(inside.read_to_end(&mut got))
        .await
        .expect("an orderly end");
    assert_eq!(got, data);
    drop(inside);
    eventually(|| world.net.stats().tcp_open == 0).await;
}

#[tokio::test]
async fn a_reader_that_waits_holds_the_writer_back() {
    let world = World::new();
    let mut inside = world.guest.listen(7);
    let mut stream = world.net.connect(7).await.expect("the guest listens");
    within(inside.established()).await.expect("accepted");
    let block = vec![9; 64 * 1024];
    let mut sent = 0;
    // Until the buffers of both stacks are full. The wait only decides how soon "no more" is believed.
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(300), stream.write(&block)).await {
        sent += written.expect("the connection is up");
        assert!(sent < 4 * 1024 * 1024, "nothing holds the writer back");
    }
    let mut got = vec![0; sent];
    within(inside.read_exact(&mut got))
        .await
        .expect("all of it arrives");
    within(stream.write_all(&block))
        .await
        .expect("and there is room again");
}

/// Once both sides have closed their halves while much is still to be delivered, a window that closes and
/// opens again must not cost a probe timer each time.
#[tokio::test]
async fn a_slow_reader_gets_the_rest_after_both_have_closed() {
    const LEN: usize = 1024 * 1024;
    let world = World::new();
    let listener = server(&world).await;
    let mut client = world.guest.connect(SERVER).await.expect("a connection");
    let (mut outside, _) = within(listener.accept()).await.expect("dialled");
    client.shutdown().await.expect("half closed");
    assert_eq!(
        within(outside.read(&mut [0; 8])).await.expect("an orderly end"),
        0
    );
    let sender = tokio::spawn(async move {
        outside.write_all(&vec![3; LEN]).await.expect("sent");
        drop(outside);
    });
    let started = Instant::now();
    let (mut got, mut buffer) = (0, vec![0; 100_000]);
    loop {
        // Long enough for the window to fill.
        tokio::time::sleep(Duration::from_millis(5)).await;
        match within(client.read(&mut buffer)).await.expect("an orderly end") {
            0 => break,
            count => got += count,
        }
    }
    assert_eq!(got, LEN);
    within(sender).await.expect("no panic");
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn the_number_of_connections_is_bounded_and_places_come_back() {
    let world = World::with(|config| {
        config.limits.tcp_from_guest = 40;
        config.limits.tcp_to_guest = 1;
    });
    let listener = server(&world).await;
    let mut open = Vec::new();
    for _ in 0..40 {
        let client = world.guest.connect(SERVER).await.expect("a connection");
        open.push((client, within(listener.accept()).await.expect("dialled").0));
    }
    assert_eq!(world.net.stats().tcp_open, 40);
    let extra = world.guest.begin_connect(SERVER);
    eventually(|| world.net.stats().dropped_overload > 0).await;
    assert_eq!(world.net.stats().tcp_from_guest, 40);
    // All carry data, and the host still gets in.
    for (client, outside) in &mut open {
        client.write_all(b"ping").await.expect("sent");
        let mut got = [0; 4];
        within(outside.read_exact(&mut got)).await.expect("received");
        assert_eq!(&got, b"ping");
    }
    let inside = world.guest.listen(7);
    let stream = within(world.net.connect(7)).await.expect("the guest listens");
    within(inside.established()).await.expect("accepted");
    assert!(matches!(world.net.connect(7).await, Err(ConnectError::TooMany)));
    drop(stream);
    // A place is given back, and the guest's kernel, which kept trying, gets it.
    drop(open.pop());
    within(extra.established()).await.expect("a connection");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_round_trips_do_not_wait_for_timers() {
    let world = World::new();
    let mut inside = world.guest.listen(7);
    let mut stream = world.net.connect(7).await.expect("the guest listens");
    within(inside.established()).await.expect("accepted");
    const ROUNDS: u32 = 300;
    let echo = tokio::spawn(async move {
        let mut buffer = [0; 64];
        for _ in 0..ROUNDS {
            inside.read_exact(&mut buffer).await.expect("a request");
            inside.write_all(&buffer).await.expect("an answer");
        }
        inside
    });
    let started = Instant::now();
    let mut buffer = [5; 64];
    within(async {
        for _ in 0..ROUNDS {
            stream.write_all(&buffer).await.expect("a request");
            stream.read_exact(&mut buffer).await.expect("an answer");
        }
    })
    .await;
    let each = started.elapsed() / ROUNDS;
    // A delayed acknowledgement would make it 10 to 40 ms; a busy test machine stays well below.
    assert!(each < Duration::from_millis(8), "{each:?} for a round trip");
    drop(echo.await.expect("no panic"));
}

/// Prints what the link can carry: `cargo test --release -p wrenn-host throughput -- --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn throughput() {
    let world = World::new();
    let inside = world.guest.listen(7);
    let stream = world.net.connect(7).await.expect("the guest listens");
    within(inside.established()).await.expect("accepted");
    let took = exchange(stream, inside).await;
    let rate = (2 * BULK) as f64 / took.as_secs_f64() / 1e6;
    println!("{rate:.0} MB/s in both directions together, with the simulated guest on the same CPUs");
    assert!(rate > 1.0);
}
