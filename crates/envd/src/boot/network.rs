//! Brings up loopback and `eth0` over netlink.
//!
//! Four kinds of requests with fixed layouts are all a guest needs, so they are built here: a netlink library
//! would be several times the size of the rest of this role.
//!
//! Each request is one datagram: `nlmsghdr` (16 bytes), a fixed body that depends on the type, then attributes
//! (`length`, `type`, value, padded to 4 bytes), all in native byte order. The kernel answers a request that
//! carries `NLM_F_ACK` with an `nlmsgerr` whose first field is 0 or a negated errno.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
};

use super::Cmdline;
use crate::logging::log;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;

/// Configures what the command line names; each failure is logged and survived.
pub(super) fn bring_up(cmdline: &Cmdline) {
    let mut link = match Netlink::open() {
        Ok(link) => link,
        Err(error) => {
            log!("netlink: {error}");
            return;
        }
    };
    report("lo up", interface("lo").and_then(|index| link.set_up(index)));
    if let Some((address, prefix)) = cmdline.address {
        match interface("eth0") {
            Ok(index) => {
                report("eth0 up", link.set_up(index));
                report("eth0 address", link.add_address(index, address, prefix));
                if let Some(gateway) = cmdline.gateway {
                    report("default route", link.add_default_route(index, gateway));
                }
            }
            Err(error) => log!("eth0: {error}"),
        }
    }
    if let Some(server) = cmdline.dns {
        // A template's own file may be a link into a directory that does not exist here.
        let _ = fs::remove_file("/etc/resolv.conf");
        report(
            "resolv.conf",
            fs::write("/etc/resolv.conf", format!("nameserver {server}\n")),
        );
    }
}

fn report(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        log!("{what}: {error}");
    }
}

fn interface(name: &str) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWLINK, 0);
        message.bytes(&[0, 0]).u16(0).u32(index).u32(IFF_UP).u32(IFF_UP);
        self.request(message)
    }

    fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE);
        message.bytes(&[AF_INET, prefix, 0, RT_SCOPE_UNIVERSE]).u32(index);
        message.attribute(IFA_LOCAL, &address.octets());
        message.attribute(IFA_ADDRESS, &address.octets());
        if prefix < 31 {
            message.attribute(IFA_BROADCAST, &broadcast(address, prefix).octets());
        }
        self.request(message)
    }

    fn add_default_route(&mut self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE);
        message
            .bytes(&[
                AF_INET,
                0,
                0,
                0,
                RT_TABLE_MAIN,
                RTPROT_BOOT,
                RT_SCOPE_UNIVERSE,
                RTN_UNICAST,
            ])
            .u32(0);
        message.attribute(RTA_GATEWAY, &gateway.octets());
        message.attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(message)
    }

    fn request(&mut self, message: Message) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = message.finish(self.sequence);
        sendto(
            &self.socket,
            &message,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut answer = [0u8; 1024];
        let (length, _) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
        parse_answer(&answer[..length])
    }
}

/// Reads the acknowledgement of a request.
fn parse_answer(answer: &[u8]) -> io::Result<()> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let kind = answer
        .get(4..6)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_ne_bytes);
    let code = answer
        .get(16..20)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw_os_error(code.saturating_neg()).into()),
        _ => Err(malformed()),
    }
}

fn broadcast(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    let host_bits = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
    Ipv4Addr::from(u32::from(address) | host_bits)
}

/// A request under construction; the length is filled in at the end.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut message = Self(Vec::with_capacity(64));
        message
            .u32(0)
            .u16(kind)
            .u16(NLM_F_REQUEST | NLM_F_ACK | flags)
            .u32(0)
            .u32(0);
        message
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// All values here are 4 bytes long, so no padding is ever due.
    fn attribute(&mut self, kind: u16, value: &[u8; 4]) {
        self.u16(8).u16(kind).bytes(value);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(0);
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcast_addresses() {
        let address = Ipv4Addr::new(10, 0, 2, 15);
        assert_eq!(broadcast(address, 24), Ipv4Addr::new(10, 0, 2, 255));
        assert_eq!(broadcast(address, 0), Ipv4Addr::new(255, 255, 255, 255));
        assert_eq!(broadcast(address, 32), address);
    }

    #[test]
    fn a_message_knows_its_length_and_sequence() {
        let mut message = Message::new(RTM_NEWROUTE, 0);
        message.u32(7);
        message.attribute(RTA_OIF, &[1, 0, 0, 0]);
        let bytes = message.finish(9);
        assert_eq!(bytes.len(), 28);
        assert_eq!(bytes[0..4], 28u32.to_ne_bytes());
        assert_eq!(bytes[8..12], 9u32.to_ne_bytes());
    }

    #[test]
    fn answers_are_errors_unless_they_say_zero() {
        let mut answer = vec![0; 36];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert!(parse_answer(&answer).is_ok());
        answer[16..20].copy_from_slice(&(-17i32).to_ne_bytes());
        assert_eq!(
            parse_answer(&answer).map_err(|error| error.raw_os_error()),
            Err(Some(17))
        );
        assert!(parse_answer(&answer[..10]).is_err());
    }
}
