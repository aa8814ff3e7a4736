//! A guest without a VM: the peer of the link under test, once with a TCP/IP stack of its own and once raw.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::net::user::{Dialer, UserNetConfig};
use crate::net::{EgressPolicy, GATEWAY_IP, GUEST_IP, GUEST_MAC, GUEST_PREFIX_LEN, MTU};

/// How long anything in these tests may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Waits for `what`, and fails the test when it does not come.
pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what)
        .await
        .expect("it happens before the deadline")
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(mut condition: impl FnMut() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// Sends guests to servers on loopback in the place of the internet.
#[derive(Default)]
pub(crate) struct TestInternet {
    tcp: Mutex<HashMap<SocketAddrV4, SocketAddr>>,
    udp: Mutex<HashMap<SocketAddrV4, SocketAddr>>,
    /// How often something was dialled.
    pub(crate) dialled: AtomicUsize,
}

impl TestInternet {
    pub(crate) fn route_tcp(&self, from: SocketAddrV4, to: SocketAddr) {
        self.tcp.lock().expect("lock").insert(from, to);
    }

    pub(crate) fn route_udp(&self, from: SocketAddrV4, to: SocketAddr) {
        self.udp.lock().expect("lock").insert(from, to);
    }
}

impl Dialer for TestInternet {
    fn tcp(&self, dst: SocketAddrV4) -> BoxFuture<'static, io::Result<TcpStream>> {
        self.dialled.fetch_add(1, Ordering::SeqCst);
        let to = self.tcp.lock().expect("lock").get(&dst).copied();
        Box::pin(async move { TcpStream::connect(to.ok_or(io::ErrorKind::HostUnreachable)?).await })
    }

    fn udp(&self, dst: SocketAddrV4) -> BoxFuture<'static, io::Result<UdpSocket>> {
        self.dialled.fetch_add(1, Ordering::SeqCst);
        let to = self.udp.lock().expect("lock").get(&dst).copied();
        Box::pin(async move {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            socket.connect(to.ok_or(io::ErrorKind::HostUnreachable)?).await?;
            Ok(socket)
        })
    }
}

/// A configuration that reaches the test's internet and no resolver.
pub(crate) fn config(internet: &Arc<TestInternet>) -> UserNetConfig {
    let mut config = UserNetConfig::new(EgressPolicy::default());
    config.resolvers = Vec::new();
    config.dialer = Arc::clone(internet) as Arc<dyn Dialer>;
    config
}

/// The two ends of a wire.
pub(crate) fn wire() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("a socket pair")
}

/// The raw end of a wire.
pub(crate) struct RawGuest(pub(crate) UnixStream);

impl RawGuest {
    pub(crate) async fn send(&mut self, frame: &[u8]) {
        let mut bytes = u32::try_from(frame.len())
            .expect("a short frame")
            .to_be_bytes()
            .to_vec();
        bytes.extend_from_slice(frame);
        within(self.0.write_all(&bytes))
            .await
            .expect("the link takes frames");
    }

    pub(crate) async fn recv(&mut self) -> Vec<u8> {
        within(async {
            let len = self.0.read_u32().await.expect("a frame's length");
            let mut frame = vec![0; len as usize];
            self.0.read_exact(&mut frame).await.expect("a frame");
            frame
        })
        .await
    }
}

/// A guest with a TCP/IP stack.
pub(crate) struct SimGuest {
    inner: Arc<Inner>,
    task: AbortHandle,
}

struct Inner {
    stack: Mutex<Stack>,
    kick: Notify,
    epoch: Instant,
}

struct Stack {
    iface: Interface,
    sockets: SocketSet<'static>,
    wire: Queues,
    next_port: u16,
}

#[derive(Default)]
struct Queues {
    rx: VecDeque<Vec<u8>>,
    tx: Vec<u8>,
}

/// Bytes of frames that one poll of the simulated guest may produce.
const TX_LIMIT: usize = 256 * 1024;

impl Device for Queues {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.rx.pop_front()?;
        Some((Rx(frame), Tx(&mut self.tx)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Tx<'_>> {
        (self.tx.len() < TX_LIMIT).then_some(Tx(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU + 14;
        capabilities
    }
}

struct Rx(Vec<u8>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Tx<'a>(&'a mut Vec<u8>);

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0
            .extend_from_slice(&u32::try_from(len).expect("a short frame").to_be_bytes());
        let at = self.0.len();
        self.0.resize(at + len, 0);
        f(&mut self.0[at..])
    }
}

impl SimGuest {
    pub(crate) fn start(stream: UnixStream) -> Self {
        let mut wire = Queues::default();
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC)));
        config.random_seed = 42;
        let mut iface = Interface::new(config, &mut wire, smoltcp::time::Instant::from_micros(1));
        iface.update_ip_addrs(|addrs| {
            addrs
                .push(IpCidr::new(IpAddress::Ipv4(GUEST_IP), GUEST_PREFIX_LEN))
                .expect("room for an address");
        });
        iface
            .routes_mut()
            .add_default_ipv4_route(GATEWAY_IP)
            .expect("room for a route");
        let stack = Stack {
            iface,
            sockets: SocketSet::new(Vec::new()),
            wire,
            next_port: 40_000,
        };
        let inner = Arc::new(Inner {
            stack: Mutex::new(stack),
            kick: Notify::new(),
            epoch: Instant::now(),
        });
        let task = tokio::spawn(run(Arc::clone(&inner), stream)).abort_handle();
        Self { inner, task }
    }

    fn tcp_socket() -> tcp::Socket<'static> {
        // The largest window that needs no scaling; see the flows of the link for why.
        let receive = tcp::SocketBuffer::new(vec![0; 65535]);
        let mut socket = tcp::Socket::new(receive, tcp::SocketBuffer::new(vec![0; 256 * 1024]));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket
    }

    /// Starts a connection without waiting for it.
    pub(crate) fn begin_connect(&self, dst: SocketAddrV4) -> SimStream {
        let mut stack = self.inner.lock();
        let port = stack.next_port;
        stack.next_port += 1;
        let Stack { iface, sockets, .. } = &mut *stack;
        let handle = sockets.add(Self::tcp_socket());
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        let remote = IpEndpoint::new(IpAddress::Ipv4(*dst.ip()), dst.port());
        socket
            .connect(iface.context(), remote, port)
            .expect("a fresh socket");
        self.inner.kick.notify_one();
        SimStream {
            inner: Arc::clone(&self.inner),
            handle,
        }
    }

    pub(crate) async fn connect(&self, dst: SocketAddrV4) -> io::Result<SimStream> {
        let stream = self.begin_connect(dst);
        within(stream.established()).await?;
        Ok(stream)
    }

    /// Opens a socket that accepts one connection.
    pub(crate) fn listen(&self, port: u16) -> SimStream {
        let mut stack = self.inner.lock();
        let handle = stack.sockets.add(Self::tcp_socket());
        stack
            .sockets
            .get_mut::<tcp::Socket<'_>>(handle)
            .listen(port)
            .expect("a fresh socket");
        SimStream {
            inner: Arc::clone(&self.inner),
            handle,
        }
    }

    pub(crate) fn udp(&self, port: u16) -> SimUdp {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 128 * 1024]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).expect("a fresh socket");
        let handle = self.inner.lock().sockets.add(socket);
        SimUdp {
            inner: Arc::clone(&self.inner),
            handle,
        }
    }
}

impl Drop for SimGuest {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().expect("lock")
    }

    fn now(&self) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros(
            i64::try_from(self.epoch.elapsed().as_micros()).expect("a short test") + 1,
        )
    }
}

async fn run(inner: Arc<Inner>, stream: UnixStream) {
    let (mut from, mut to) = stream.into_split();
    let mut bytes: Vec<u8> = Vec::with_capacity(512 * 1024);
    loop {
        let (out, wait) = {
            let mut stack = inner.lock();
            let now = inner.now();
            let Stack {
                iface, sockets, wire, ..
            } = &mut *stack;
            iface.poll(now, wire, sockets);
            (std::mem::take(&mut wire.tx), iface.poll_delay(now, sockets))
        };
        if !out.is_empty() && to.write_all(&out).await.is_err() {
            return;
        }
        let wait = wait.map_or(Duration::from_secs(1), |wait| {
            Duration::from_micros(wait.total_micros())
        });
        tokio::select! {
            read = from.read_buf(&mut bytes) => {
                if !matches!(read, Ok(1..)) {
                    return;
                }
                let mut stack = inner.lock();
                let mut at = 0;
                while let Some(prefix) = bytes.get(at..at + 4) {
                    let len = u32::from_be_bytes(prefix.try_into().expect("four bytes")) as usize;
                    let Some(frame) = bytes.get(at + 4..at + 4 + len) else { break };
                    stack.wire.rx.push_back(frame.to_vec());
                    at += 4 + len;
                }
                bytes.drain(..at);
            }
            () = inner.kick.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// A TCP socket of the simulated guest.
pub(crate) struct SimStream {
    inner: Arc<Inner>,
    handle: SocketHandle,
}

impl SimStream {
    fn with<R>(&self, act: impl FnOnce(&mut tcp::Socket<'static>) -> R) -> R {
        let result = act(self.inner.lock().sockets.get_mut(self.handle));
        self.inner.kick.notify_one();
        result
    }

    pub(crate) async fn established(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            self.with(|socket| match socket.state() {
                tcp::State::SynSent | tcp::State::SynReceived | tcp::State::Listen => {
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                }
                tcp::State::Closed => Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
                _ => Poll::Ready(Ok(())),
            })
        })
        .await
    }

    pub(crate) fn abort(&self) {
        self.with(tcp::Socket::abort);
    }
}

impl AsyncRead for SimStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| match socket.recv_slice(buf.initialize_unfilled()) {
            Ok(0) => {
                socket.register_recv_waker(cx.waker());
                Poll::Pending
            }
            Ok(count) => {
                buf.advance(count);
                Poll::Ready(Ok(()))
            }
            Err(tcp::RecvError::Finished) => Poll::Ready(Ok(())),
            Err(tcp::RecvError::InvalidState) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        })
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|socket| match socket.send_slice(buf) {
            Ok(0) => {
                socket.register_send_waker(cx.waker());
                Poll::Pending
            }
            Ok(count) => Poll::Ready(Ok(count)),
            Err(_) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| {
            // As the flows of the link do, and for the same reason.
            if socket.may_send() && socket.send_queue() > 0 {
                socket.register_send_waker(cx.waker());
                return Poll::Pending;
            }
            socket.close();
            Poll::Ready(Ok(()))
        })
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.with(tcp::Socket::close);
    }
}

/// A UDP socket of the simulated guest.
pub(crate) struct SimUdp {
    inner: Arc<Inner>,
    handle: SocketHandle,
}

impl SimUdp {
    fn with<R>(&self, act: impl FnOnce(&mut udp::Socket<'static>) -> R) -> R {
        let result = act(self.inner.lock().sockets.get_mut(self.handle));
        self.inner.kick.notify_one();
        result
    }

    pub(crate) fn send_to(&self, data: &[u8], dst: SocketAddrV4) {
        let to = IpEndpoint::new(IpAddress::Ipv4(*dst.ip()), dst.port());
        self.with(|socket| socket.send_slice(data, to))
            .expect("room for a datagram");
    }

    pub(crate) async fn recv(&self) -> Vec<u8> {
        within(std::future::poll_fn(|cx| {
            self.with(|socket| match socket.recv() {
                Ok((data, _)) => Poll::Ready(data.to_vec()),
                Err(_) => {
                    socket.register_recv_waker(cx.waker());
                    Poll::Pending
                }
            })
        }))
        .await
    }
}
