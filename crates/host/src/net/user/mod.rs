//! The user-mode network of one guest: gateway, NAT and name server in one task.
//!
//! QEMU hands every frame of the guest's NIC to a Unix socket; [`UserNet::start`] takes the other end of it.
//!
//! ```text
//!  guest NIC ── net.sock ── driver ──┬── TCP from the guest: policy → dial → flow ⇄ TcpStream
//!                  ▲                 ├── UDP from the guest: policy → one socket per flow
//!                  │                 ├── names (10.0.2.3:53) → the host's resolvers
//!               FrameSink            ├── ARP, ping, resets for what nobody knows
//!                  ▲                 │
//!                  └───── flows ◄────┴── UserNet::connect: TCP from the host into the guest
//! ```
//!
//! There is no listening port and no address on the host: the guest can reach exactly what this process
//! dials for it, and the host reaches the guest through [`UserNet::connect`] only.
//!
//! **Snapshots.** A link has no state worth saving. When the VM pauses, the link is dropped; when it resumes,
//! a new one starts. Connections that the restored guest still believes in are answered with a reset on
//! their next segment, and new ones into the guest start from random ports and sequence numbers, so they
//! do not meet the ghosts of the old ones.
//!
//! **Not carried:** IPv6, IP fragments sent by the guest, multicast and broadcast, protocols other than TCP,
//! UDP and ICMP echo. These are dropped.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout_at};

mod dial;
mod dns;
mod driver;
mod flow;
mod link;
mod packet;
mod ping;
mod shared;
mod stats;
mod stream;
mod tcp_out;
mod udp;

#[cfg(test)]
pub(crate) mod tests;

use flow::{Flow, FlowKey, Handshake, Opening};
use shared::Shared;
use stats::bump;

pub use dial::{Dialer, HostDialer};
pub use stats::NetStats;
pub use stream::GuestStream;

use super::policy::EgressPolicy;

/// When the first SYN into the guest is repeated. A guest that has just been resumed may have lost it.
const SYN_REPEATS: [Duration; 8] = [
    Duration::from_millis(20),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1600),
    Duration::from_millis(3000),
];
/// The lowest port from which connections into the guest come.
const FIRST_EPHEMERAL: u16 = 20_000;
/// Random ports tried before giving up; the first is free in practice.
const PORT_ATTEMPTS: usize = 32;

/// Bounds of one link.
#[derive(Clone, Debug)]
pub struct Limits {
    /// TCP connections that the guest may have open.
    pub tcp_from_guest: usize,
    /// TCP connections that the host may have open into the guest.
    pub tcp_to_guest: usize,
    /// UDP flows that the guest may have.
    pub udp_from_guest: usize,
    /// Name queries on their way at one time.
    pub dns_queries: usize,
    /// How long a destination may take to answer a connection that the guest wants.
    pub dial_timeout: Duration,
    /// How long [`UserNet::connect`] waits for the guest.
    pub connect_timeout: Duration,
    /// How long a UDP flow may be silent.
    pub udp_idle: Duration,
    /// Bytes of a TCP connection's buffer towards the guest. From the guest, 64 KiB are the most.
    pub buffer: usize,
    /// Bytes of that buffer while there are many connections.
    pub crowded_buffer: usize,
    /// How many connections are many.
    pub crowd: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tcp_from_guest: 1024,
            tcp_to_guest: 256,
            udp_from_guest: 512,
            dns_queries: 64,
            dial_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            udp_idle: Duration::from_secs(60),
            buffer: 256 * 1024,
            crowded_buffer: 64 * 1024,
            crowd: 64,
        }
    }
}

impl Limits {
    /// The size of the buffers of a connection that comes to `open` others.
    fn buffer_for(&self, open: u64) -> usize {
        if open < self.crowd {
            self.buffer
        } else {
            self.crowded_buffer
        }
    }
}

/// What a link is started with.
#[derive(Clone)]
pub struct UserNetConfig {
    /// What the guest may reach.
    pub policy: EgressPolicy,
    /// Where name queries go.
    pub resolvers: Vec<SocketAddr>,
    /// How connections are made on the host.
    pub dialer: Arc<dyn Dialer>,
    /// Bounds.
    pub limits: Limits,
}

impl UserNetConfig {
    /// The host's resolvers and network, and the usual bounds.
    #[must_use]
    pub fn new(policy: EgressPolicy) -> Self {
        Self {
            policy,
            resolvers: dns::system_resolvers(),
            dialer: Arc::new(HostDialer),
            limits: Limits::default(),
        }
    }
}

/// Why a connection into the guest failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The guest answered that nothing listens on the port.
    #[error("nothing listens on port {port} of the guest")]
    Refused {
        /// The port.
        port: u16,
    },
    /// The guest did not answer in time.
    #[error("the guest did not answer on port {port} in time")]
    TimedOut {
        /// The port.
        port: u16,
    },
    /// Too many connections into the guest are open.
    #[error("too many connections into the guest are open")]
    TooMany,
    /// The link has ended.
    #[error("the link to the guest has ended")]
    LinkDown,
}

/// What broke a link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer announced a frame longer than any link carries, so the stream is out of step.
    #[error("the peer announced a frame of {len} bytes")]
    OversizeFrame {
        /// The announced length.
        len: usize,
    },
    /// The socket could not be read.
    #[error("the link could not be read")]
    Read(#[source] io::Error),
    /// The socket could not be written.
    #[error("the link could not be written")]
    Write(#[source] io::Error),
    /// The writing task ended by itself.
    #[error("the link's writer ended")]
    WriterGone,
}

/// How a link ended.
#[derive(Debug)]
pub enum LinkEnd {
    /// [`UserNet::shutdown`] was called, or the last handle dropped.
    Shutdown,
    /// The VM closed its side.
    PeerClosed,
    /// The link broke.
    Failed(LinkError),
}

/// The task behind a link. Dropping it does not end the link.
#[derive(Debug)]
pub struct LinkTask(JoinHandle<LinkEnd>);

impl LinkTask {
    /// Waits for the link to end. Everything that it had opened is closed by then. Cancelling is safe.
    pub async fn ended(&mut self) -> LinkEnd {
        match (&mut self.0).await {
            Ok(end) => end,
            Err(error) => {
                tracing::error!(%error, "the task of a guest's link failed");
                LinkEnd::Failed(LinkError::WriterGone)
            }
        }
    }
}

/// A handle to a guest's network. The link ends when the last one is dropped.
#[derive(Clone)]
pub struct UserNet {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.cancel.cancel();
    }
}

impl UserNet {
    /// Serves the guest at the other end of `stream`. Must be called within a Tokio runtime.
    pub fn start<S>(stream: S, config: UserNetConfig) -> (Self, LinkTask)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let shared = Arc::new(Shared::new(config));
        let task = tokio::spawn(driver::run(Arc::clone(&shared), stream));
        (
            Self {
                handle: Arc::new(Handle { shared }),
            },
            LinkTask(task),
        )
    }

    /// Connects to a port of the guest, within the configured time.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self, port: u16) -> Result<GuestStream, ConnectError> {
        self.connect_within(port, self.handle.shared.config.limits.connect_timeout)
            .await
    }

    /// Connects to a port of the guest, within the given time.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect_within(&self, port: u16, patience: Duration) -> Result<GuestStream, ConnectError> {
        let started = Instant::now();
        let guest = self.begin_connect(port)?;
        let mut repeats = SYN_REPEATS.iter().map(|after| started + *after);
        let mut repeat_at = repeats.next();
        let handshake = async {
            loop {
                tokio::select! {
                    ended = guest.handshake() => return ended,
                    () = sleep_until(repeat_at.unwrap_or(started)), if repeat_at.is_some() => {
                        guest.flow().repeat_syn();
                        repeat_at = repeats.next();
                    }
                }
            }
        };
        match timeout_at(started + patience, handshake).await {
            Ok(Handshake::Done) => Ok(guest),
            Ok(_) if self.handle.shared.cancel.is_cancelled() => Err(ConnectError::LinkDown),
            Ok(_) => Err(ConnectError::Refused { port }),
            Err(_) => Err(ConnectError::TimedOut { port }),
        }
    }

    fn begin_connect(&self, port: u16) -> Result<GuestStream, ConnectError> {
        let shared = &self.handle.shared;
        if port == 0 {
            return Err(ConnectError::Refused { port });
        }
        if shared.cancel.is_cancelled() {
            return Err(ConnectError::LinkDown);
        }
        let mut permit = Some(
            Arc::clone(&shared.inbound_places)
                .try_acquire_owned()
                .map_err(|_| ConnectError::TooMany)?,
        );
        for _ in 0..PORT_ATTEMPTS {
            let key = FlowKey {
                guest_port: port,
                remote: flow::host_side(random_port()),
            };
            if shared.table().contains(&key) {
                continue;
            }
            let Some(permit) = permit.take() else { break };
            let flow = Flow::new(
                key,
                &Opening::Connect,
                shared.config.limits.buffer,
                permit,
                Arc::clone(shared),
            )
            .ok_or(ConnectError::Refused { port })?;
            let flow = Arc::new(flow);
            if !shared.table().insert(&flow, None) {
                return Err(ConnectError::LinkDown);
            }
            bump(&shared.counters.tcp_to_guest);
            let guest = GuestStream::new(Arc::clone(&flow));
            flow.service();
            return Ok(guest);
        }
        Err(ConnectError::TooMany)
    }

    /// Changes what the guest may reach. What is open and not allowed any more is cut.
    pub fn set_policy(&self, policy: EgressPolicy) {
        self.handle.shared.set_policy(policy);
    }

    /// What the link has carried and refused so far.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        let open = self.handle.shared.table().open_count();
        self.handle.shared.counters.snapshot(open)
    }

    /// Ends the link. [`LinkTask::ended`] tells when everything is closed.
    pub fn shutdown(&self) {
        self.handle.shared.cancel.cancel();
    }
}

impl std::fmt::Debug for UserNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserNet")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for UserNetConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserNetConfig")
            .field("policy", &self.policy)
            .field("resolvers", &self.resolvers)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// A number that the guest cannot guess.
fn random_u64() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The system's source does not fail once it is up; the fallback is seeded from it at process start.
    getrandom::u64().unwrap_or_else(|_| std::hash::RandomState::new().build_hasher().finish())
}

fn random_port() -> u16 {
    let span = u64::from(u16::MAX - FIRST_EPHEMERAL);
    FIRST_EPHEMERAL + u16::try_from(random_u64() % span).unwrap_or(0)
}
