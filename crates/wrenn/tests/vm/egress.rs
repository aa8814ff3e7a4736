//! What a guest cannot reach: the host and what belongs to it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use wrenn_client::SandboxHandle;
use wrenn_testkit::platform::{Platform, output};

use crate::WRENN;

/// Tries to connect from inside, and tells how that ended.
async fn attempt(sandbox: &SandboxHandle, address: &str, port: u16) -> String {
    let script = format!(
        "import socket\ntry:\n    socket.create_connection(('{address}', {port}), timeout=5).close()\n    print('connected')\n\
         except OSError as error:\n    print(type(error).__name__, error.errno)\n"
    );
    output(sandbox, &format!("python3 - <<'PYTHON'\n{script}PYTHON")).await
}

/// The host's own address on the network, if it has one besides loopback. Nothing is sent.
fn own_address() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V4(address) if !address.ip().is_loopback() => Some(*address.ip()),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_cannot_reach_the_host() {
    // Private networks are allowed here, so that nothing but the rule about the host refuses.
    let platform = Platform::start_with(WRENN, &[("WRENN_EGRESS_ALLOW_PRIVATE", "true")]).await;
    let sandbox = platform.sandbox().await;
    let listener = TcpListener::bind("0.0.0.0:0").expect("a listener");
    let port = listener.local_addr().expect("its address").port();
    listener.set_nonblocking(true).expect("nonblocking");
    // The network is up: what follows is not refused for want of a route.
    let route = output(&sandbox, "ip -4 route show default").await;
    assert!(route.contains("via 10.0.2.2 dev eth0"), "{route}");

    let mut targets = vec![
        "10.0.2.2".to_owned(),
        "10.0.2.3".to_owned(),
        "169.254.169.254".to_owned(),
        "127.0.0.1".to_owned(),
    ];
    targets.extend(own_address().map(|address| address.to_string()));
    let api: u16 = platform
        .client()
        .base_url()
        .rsplit(':')
        .next()
        .and_then(|port| port.parse().ok())
        .expect("a port");
    for target in &targets {
        for port in [port, api] {
            let outcome = attempt(&sandbox, target, port).await;
            assert_ne!(outcome, "connected", "the guest reaches {target}:{port}");
        }
    }
    assert_ne!(attempt(&sandbox, "169.254.169.254", 80).await, "connected");
    let taken = listener.accept();
    assert!(
        matches!(&taken, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
        "{taken:?}"
    );
    sandbox.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}
