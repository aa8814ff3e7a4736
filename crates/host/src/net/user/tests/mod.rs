//! The link under test serves a simulated guest; servers on loopback play the internet.

mod hostile;
pub(crate) mod sim;
mod tcp;
mod udp_dns;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use sim::{SimGuest, TestInternet, config, eventually, wire, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ConnectError, LinkEnd, LinkTask, UserNet, UserNetConfig};

/// An address of the internet that nothing in the policy is against.
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(93, 184, 215, 14), 80);

struct World {
    guest: SimGuest,
    net: UserNet,
    task: LinkTask,
    internet: Arc<TestInternet>,
}

impl World {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut UserNetConfig)) -> Self {
        let internet = Arc::new(TestInternet::default());
        let mut config = config(&internet);
        change(&mut config);
        let (host, guest) = wire();
        let (net, task) = UserNet::start(host, config);
        Self {
            guest: SimGuest::start(guest),
            net,
            task,
            internet,
        }
    }
}

#[tokio::test]
async fn the_link_ends_with_its_last_handle() {
    let World {
        guest, net, mut task, ..
    } = World::new();
    let server = guest.listen(7);
    let mut stream = net.connect(7).await.expect("the guest listens");
    within(server.established()).await.expect("accepted");
    let other = net.clone();
    drop(net);
    stream
        .write_all(b"still up")
        .await
        .expect("another handle keeps the link");
    drop(other);
    assert!(matches!(within(task.ended()).await, LinkEnd::Shutdown));
    let error = stream.read(&mut [0; 8]).await.expect_err("the link is gone");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
    let error = stream.write(b"x").await.expect_err("the link is gone");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn shutdown_ends_everything_that_was_open() {
    let World {
        guest,
        net,
        mut task,
        internet,
    } = World::new();
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .expect("a port");
    internet.route_tcp(SERVER, listener.local_addr().expect("an address"));
    let _client = guest.connect(SERVER).await.expect("a connection");
    let (mut outside, _) = within(listener.accept()).await.expect("dialled");
    net.shutdown();
    assert!(matches!(within(task.ended()).await, LinkEnd::Shutdown));
    // Whether by end or by reset: the server's side is closed, not left hanging.
    let _ = within(outside.read(&mut [0; 8])).await;
    assert!(matches!(net.connect(7).await, Err(ConnectError::LinkDown)));
    assert_eq!(net.stats().tcp_open, 0);
}

#[tokio::test]
async fn a_vm_that_goes_away_ends_the_link() {
    let (host, guest) = wire();
    let (_net, mut task) = UserNet::start(host, config(&Arc::default()));
    drop(guest);
    assert!(matches!(within(task.ended()).await, LinkEnd::PeerClosed));
}

#[tokio::test]
async fn a_pending_connect_fails_when_the_link_ends() {
    let (host, guest) = wire();
    let (net, _task) = UserNet::start(host, config(&Arc::default()));
    let connecting = tokio::spawn({
        let net = net.clone();
        async move { net.connect(7).await }
    });
    eventually(|| net.stats().tcp_open == 1).await;
    drop(guest);
    assert!(matches!(
        within(connecting).await.expect("no panic"),
        Err(ConnectError::LinkDown)
    ));
}

#[tokio::test]
async fn a_silent_guest_times_out() {
    let (host, _guest) = wire();
    let (net, _task) = UserNet::start(host, config(&Arc::default()));
    let error = net
        .connect_within(7, Duration::from_millis(30))
        .await
        .expect_err("nobody answers");
    assert!(matches!(error, ConnectError::TimedOut { port: 7 }));
    eventually(|| net.stats().tcp_open == 0).await;
}
