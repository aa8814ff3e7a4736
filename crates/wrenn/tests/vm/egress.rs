//! What a guest reaches: other machines; and what it cannot: the host and what belongs to it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use wrenn_client::SandboxHandle;
use wrenn_testkit::platform::{Platform, eventually, output};

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

/// Another machine, as far as a network can tell: a network namespace with a web server.
struct Elsewhere {
    name: String,
    server: Child,
}

impl Elsewhere {
    const ADDRESS: &str = "10.213.97.2";

    fn start(files: &std::path::Path) -> Self {
        let name = format!("wrenn-test-{}", std::process::id());
        let link = format!("wt{}", std::process::id());
        let ip = |args: &str| {
            let done = Command::new("ip").args(args.split(' ')).output().expect("ip");
            assert!(done.status.success(), "ip {args}: {done:?}");
        };
        ip(&format!("netns add {name}"));
        ip(&format!("link add {link} type veth peer name eth0 netns {name}"));
        ip(&format!("address add 10.213.97.1/30 dev {link}"));
        ip(&format!("link set {link} up"));
        ip(&format!("-n {name} address add {}/30 dev eth0", Self::ADDRESS));
        ip(&format!("-n {name} link set eth0 up"));
        let server = Command::new("ip")
            .args([
                "netns",
                "exec",
                &name,
                "python3",
                "-m",
                "http.server",
                "8080",
                "--directory",
            ])
            .arg(files)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a server");
        Self { name, server }
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        // Its end of the link goes with it, and so does ours.
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_reach_other_machines() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: a network of its own cannot be made, so there is nothing here to reach");
        return;
    }
    let platform = Platform::start_with(WRENN, &[("WRENN_EGRESS_ALLOW_PRIVATE", "true")]).await;
    let sandbox = platform.sandbox().await;
    let files = platform.scratch_dir().join("elsewhere");
    std::fs::create_dir(&files).expect("a folder");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
    std::fs::write(files.join("page"), &content).expect("a page");
    let elsewhere = Elsewhere::start(&files);
    let url = format!("http://{}:8080/page", Elsewhere::ADDRESS);
    let fetched = eventually("the guest fetches a page", Duration::from_secs(30), async || {
        let said = output(&sandbox, &format!("curl -sS {url} | sha256sum || true")).await;
        let sum = said.split_whitespace().next()?.to_owned();
        let whole = output(&sandbox, &format!("curl -s {url} | wc -c || true")).await;
        (whole.trim() == content.len().to_string()).then_some(sum)
    })
    .await;
    std::fs::write(platform.scratch_dir().join("page"), &content).expect("a copy");
    let expected = Command::new("sha256sum")
        .arg(platform.scratch_dir().join("page"))
        .output()
        .expect("sha256sum");
    assert!(String::from_utf8_lossy(&expected.stdout).starts_with(&fetched));
    let namespace = format!("/run/netns/{}", elsewhere.name);
    drop(elsewhere);
    assert!(!std::path::Path::new(&namespace).exists());
    sandbox.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}
