//! The third role: serving HTTP and Connect RPC.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use wrenn_proto::guest::ENVD_PORT;

use crate::boot::in_guest;
use crate::freezer::Freezer;
use crate::http;
use crate::logging::log;
use crate::state::Agent;
use crate::unsafe_calls::yield_to_programs;

/// Threads for calls that block (files on disk); each costs a stack only while it lives.
const BLOCKING_THREADS: usize = 8;

/// The command line of `envd serve`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    port: u16,
    listen: Option<SocketAddr>,
    port_file: Option<PathBuf>,
    state_dir: Option<PathBuf>,
}

impl Options {
    /// Parses the arguments after `serve`.
    pub(crate) fn parse(args: &[OsString]) -> Result<Self, String> {
        let mut options = Self {
            port: ENVD_PORT,
            listen: None,
            port_file: None,
            state_dir: None,
        };
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            let flag = flag.to_string_lossy();
            let mut value = || args.next().ok_or_else(|| format!("{flag} needs a value"));
            match &*flag {
                "--port" => options.port = parse(&flag, value()?)?,
                "--listen" => options.listen = Some(parse(&flag, value()?)?),
                "--port-file" => options.port_file = Some(value()?.into()),
                "--state-dir" => options.state_dir = Some(value()?.into()),
                _ => return Err(format!("unknown option {flag}")),
            }
        }
        Ok(options)
    }
}

fn parse<T: std::str::FromStr>(flag: &str, value: &OsString) -> Result<T, String> {
    let value = value.to_string_lossy();
    value
        .parse()
        .map_err(|_| format!("{flag}: {value:?} is not valid"))
}

/// Serves until the process is killed.
pub(crate) fn run(options: Options) -> ExitCode {
    // What processes of the usual user inherit, so that their starts need not change it.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    if rustix::process::geteuid().is_root() {
        let _ = rustix::thread::set_thread_groups(&[rustix::process::Gid::ROOT]);
    }
    yield_to_programs();
    // One thread: the agent waits far more than it computes, and it sits in the memory of every guest.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(512 * 1024)
        .build();
    match runtime.and_then(|runtime| runtime.block_on(serve(options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log!("serve: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: Options) -> io::Result<()> {
    let listener = listen(&options).await?;
    let address = listener.local_addr()?;
    let mut agent = Agent::new(options.state_dir);
    if in_guest() {
        match Freezer::join() {
            Ok(freezer) => agent.freezer = Some(Arc::new(freezer)),
            Err(error) => log!("programs cannot be held still for copies of this guest: {error}"),
        }
    }
    let agent = Arc::new(agent);
    let app = http::router(agent);
    log!("listening on {address}");
    if let Some(file) = options.port_file {
        // Renamed into place, so that whoever waits for the file finds it whole.
        let temporary = file.with_extension("new");
        fs::write(&temporary, address.port().to_string())?;
        fs::rename(&temporary, &file)?;
    }
    axum::serve(listener.tap_io(tune), app).await
}

/// Both address families through one socket where the kernel has IPv6, else IPv4.
async fn listen(options: &Options) -> io::Result<TcpListener> {
    if let Some(address) = options.listen {
        return TcpListener::bind(address).await;
    }
    let any = |address: IpAddr| SocketAddr::new(address, options.port);
    match TcpListener::bind(any(Ipv6Addr::UNSPECIFIED.into())).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind(any(Ipv4Addr::UNSPECIFIED.into())).await,
    }
}

/// Output events are small and wanted at once; a peer that vanished without a word (the host was restarted, the
/// guest was restored from a snapshot) must not hold a process's output back for ever.
fn tune(stream: &mut TcpStream) {
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| Ok(sockopt::set_socket_keepalive(&*stream, true)?))
        .and_then(|()| Ok(sockopt::set_tcp_keepidle(&*stream, Duration::from_secs(30))?))
        .and_then(|()| Ok(sockopt::set_tcp_keepintvl(&*stream, Duration::from_secs(10))?))
        .and_then(|()| Ok(sockopt::set_tcp_keepcnt(&*stream, 3)?));
    if let Err(error) = tuned {
        log!("socket options: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Options, String> {
        Options::parse(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn options() {
        let options = parse_words(&["--port", "0", "--state-dir", "/run/x"]).expect("valid");
        assert_eq!((options.port, options.state_dir), (0, Some("/run/x".into())));
        assert_eq!(parse_words(&[]).expect("valid").port, ENVD_PORT);
        assert!(parse_words(&["--port"]).is_err());
        assert!(parse_words(&["--port", "70000"]).is_err());
        assert!(parse_words(&["--what"]).is_err());
    }
}
