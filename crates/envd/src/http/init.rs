//! `POST /init`: the host turns a restored guest into a sandbox of its own.
//!
//! A guest restored from a snapshot has the clock, the random generator, the names and the token of the guest
//! it was copied from. All of that changes here, before the first user process runs. Steps that need root are
//! skipped with a line in the log when the agent runs without (on a developer's machine).

use std::fs::{self, File};
use std::io::{self, Write};
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use rustix::time::{ClockId, Timespec, clock_settime};
use wrenn_proto::guest::InitRequest;

use super::{Failure, carries_token, constant_time_equal};
use crate::boot::{Cmdline, block_device_sysfs, in_guest};
use crate::logging::log;
use crate::process::spawn::check_environment;
use crate::state::Agent;
use crate::unsafe_calls;

const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Where Debian's `update-ca-certificates`, which writes the bundle anew, looks for local additions.
const CA_LOCAL: &str = "/usr/local/share/ca-certificates/wrenn-host.crt";
/// The kernel's own bound (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;

pub(crate) async fn init(
    State(agent): State<Arc<Agent>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<StatusCode, Failure> {
    // Clients send no body at all when they have nothing to set.
    let request: InitRequest = if body.is_empty() {
        InitRequest::default()
    } else {
        serde_json::from_slice(&body)
            .map_err(|error| Failure::bad_request(format!("malformed body: {error}")))?
    };
    authorize(&agent, &headers, &request)?;
    let outcome = take_over(&agent, request).await;
    // Whatever came of it: the host has come back, and decides about a guest that could not take it.
    if let Some(freezer) = &agent.freezer {
        freezer.thaw();
    }
    outcome.map(|()| StatusCode::NO_CONTENT)
}

/// Makes the request's values the guest's own.
async fn take_over(agent: &Agent, request: InitRequest) -> Result<(), Failure> {
    let prepared = Prepared::check(&request)?;
    agent.update(&request).map_err(|error| {
        log!("state: {error}");
        Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "the settings cannot be stored")
    })?;
    // File system work, so off the thread that serves.
    tokio::task::spawn_blocking(move || apply(&request, prepared))
        .await
        .unwrap_or_else(|_| Err("initialisation failed".to_owned()))
        // The host must know: a guest with its template's random numbers or names is no sandbox of its own.
        .map_err(|failed| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, failed))
}

/// `POST /freeze`: no program runs from the answer on, until the next `/init`.
pub(crate) async fn freeze(State(agent): State<Arc<Agent>>) -> Result<StatusCode, Failure> {
    if let Some(freezer) = &agent.freezer {
        freezer
            .freeze()
            .await
            .map_err(|error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Once a token is set, only who knows it may change anything.
fn authorize(agent: &Agent, headers: &HeaderMap, request: &InitRequest) -> Result<(), Failure> {
    let settings = agent.settings();
    let Some(token) = &settings.access_token else {
        return Ok(());
    };
    let repeated = request
        .access_token
        .as_ref()
        .is_some_and(|sent| constant_time_equal(sent.as_bytes(), token.as_bytes()));
    if repeated || carries_token(headers, token) {
        Ok(())
    } else {
        Err(Failure::unauthorized("a change needs the current access token"))
    }
}

/// The request's values after validation; nothing has happened yet when this fails.
struct Prepared {
    time: Option<Timespec>,
    entropy: Vec<u8>,
}

impl Prepared {
    fn check(request: &InitRequest) -> Result<Self, Failure> {
        let time = request
            .timestamp
            .as_deref()
            .filter(|text| !text.is_empty())
            .map(parse_time)
            .transpose()?;
        let entropy = request.entropy.as_deref().unwrap_or_default();
        let entropy = STANDARD
            .decode(entropy)
            .map_err(|_| Failure::bad_request("entropy is not base64"))?;
        if let Some(name) = &request.hostname
            && !(1..=MAX_HOSTNAME).contains(&name.len())
        {
            return Err(Failure::bad_request(format!(
                "hostname must have 1 to {MAX_HOSTNAME} characters"
            )));
        }
        if request
            .hostname
            .as_ref()
            .is_some_and(|name| !name.bytes().all(is_host_byte))
        {
            return Err(Failure::bad_request(
                "hostname may hold letters, digits, dots and dashes",
            ));
        }
        if let Some(id) = &request.machine_id
            && (id.len() != 32
                || !id
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
        {
            return Err(Failure::bad_request("machineId must be 32 lower-case hex digits"));
        }
        if let Some(env_vars) = &request.env_vars {
            check_environment(env_vars.iter()).map_err(Failure::bad_request)?;
        }
        Ok(Self { time, entropy })
    }
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.'
}

fn parse_time(text: &str) -> Result<Timespec, Failure> {
    let time: Timestamp = text
        .parse()
        .map_err(|_| Failure::bad_request("timestamp is not an RFC 3339 time"))?;
    Ok(Timespec {
        tv_sec: time.as_second(),
        tv_nsec: i64::from(time.subsec_nanosecond()),
    })
}

/// Makes the changes, all that can be made; the error names those that cannot.
fn apply(request: &InitRequest, prepared: Prepared) -> Result<(), String> {
    let wanted = prepared.time.is_some()
        || !prepared.entropy.is_empty()
        || request.hostname.is_some()
        || request.machine_id.is_some()
        || request.ca_bundle.is_some()
        || request.grow_root;
    if !wanted {
        return Ok(());
    }
    // Only as root of a guest: an agent on a developer's machine must not change that machine's clock or names.
    if !in_guest() {
        log!("init: not in a guest, so clock, entropy, names, certificates and disk stay as they are");
        return Ok(());
    }
    let mut failed = Vec::new();
    let mut report = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            log!("init: {what}: {error}");
            failed.push(format!("{what}: {error}"));
        }
    };
    if let Some(time) = prepared.time {
        report(
            "clock",
            clock_settime(ClockId::Realtime, time).map_err(io::Error::from),
        );
    }
    if !prepared.entropy.is_empty() {
        let fed = File::options()
            .write(true)
            .open("/dev/urandom")
            .and_then(|random| unsafe_calls::add_entropy(&random, &prepared.entropy));
        report("entropy", fed);
    }
    if let Some(name) = &request.hostname {
        report("hostname", set_hostname(name));
    }
    if let Some(id) = &request.machine_id {
        report("machine id", fs::write("/etc/machine-id", format!("{id}\n")));
    }
    if let Some(bundle) = request
        .ca_bundle
        .as_deref()
        .filter(|bundle| !bundle.trim().is_empty())
    {
        report("certificates", trust(bundle));
    }
    if request.grow_root {
        report("grow root", grow_root());
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(failed.join("; "))
    }
}

fn set_hostname(name: &str) -> io::Result<()> {
    rustix::system::sethostname(name.as_bytes())?;
    // For programs' convenience: a template may have no such files, or a full disk.
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let written = fs::write("/etc/hostname", format!("{name}\n"))
        .and_then(|()| fs::write("/etc/hosts", hosts_with(&hosts, name)));
    if let Err(error) = written {
        log!("init: the hostname's files: {error}");
    }
    Ok(())
}

/// The file with the guest's own name on the line of 127.0.1.1, as Debian has it.
fn hosts_with(hosts: &str, name: &str) -> String {
    let mut lines: Vec<&str> = hosts
        .lines()
        .filter(|line| line.split_ascii_whitespace().next() != Some("127.0.1.1"))
        .collect();
    if !lines
        .iter()
        .any(|line| line.split_ascii_whitespace().next() == Some("127.0.0.1"))
    {
        lines.insert(0, "127.0.0.1\tlocalhost");
    }
    let own = format!("127.0.1.1\t{name}");
    lines.push(&own);
    lines.join("\n") + "\n"
}

/// Appends what is not in the bundle yet, so that repeating the call changes nothing.
fn trust(pem: &str) -> io::Result<()> {
    let pem = pem.trim();
    let bundle = fs::read_to_string(CA_BUNDLE).unwrap_or_default();
    for file in [CA_LOCAL, CA_BUNDLE] {
        if let Some(dir) = std::path::Path::new(file).parent() {
            fs::create_dir_all(dir)?;
        }
    }
    fs::write(CA_LOCAL, format!("{pem}\n"))?;
    if bundle.contains(pem) {
        return Ok(());
    }
    let mut file = File::options().append(true).create(true).open(CA_BUNDLE)?;
    let gap = if bundle.is_empty() || bundle.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    file.write_all(format!("{gap}{pem}\n").as_bytes())
}

/// Grows the mounted file system to its device's size; ext4 does that online.
fn grow_root() -> io::Result<()> {
    let not_found = |what| io::Error::new(io::ErrorKind::NotFound, what);
    let device = Cmdline::load()
        .root
        .ok_or_else(|| not_found("no root device on the command line"))?;
    let size = block_device_sysfs(&device)
        .ok_or_else(|| not_found("the root device has no name"))?
        .join("size");
    let sectors: u64 = fs::read_to_string(size)?
        .trim()
        .parse()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let file_system = rustix::fs::statvfs("/")?;
    let blocks = sectors / (file_system.f_frsize.max(512) / 512);
    let root = File::open("/")?;
    Ok(rustix::fs::ext4_ioc_resize_fs(&root, blocks)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_names_the_guest_once() {
        let hosts = hosts_with("127.0.0.1 localhost\n127.0.1.1 old\n::1 localhost\n", "new");
        assert_eq!(hosts, "127.0.0.1 localhost\n::1 localhost\n127.0.1.1\tnew\n");
        assert_eq!(hosts_with(&hosts, "new"), hosts);
        assert_eq!(hosts_with("", "a"), "127.0.0.1\tlocalhost\n127.0.1.1\ta\n");
    }

    #[test]
    fn requests_are_checked_before_anything_happens() {
        let check = |request: InitRequest| Prepared::check(&request).is_ok();
        assert!(check(InitRequest {
            timestamp: Some("2026-11-22T18:00:00.5Z".into()),
            ..Default::default()
        }));
        assert!(!check(InitRequest {
            timestamp: Some("yesterday".into()),
            ..Default::default()
        }));
        assert!(!check(InitRequest {
            hostname: Some(String::new()),
            ..Default::default()
        }));
        assert!(!check(InitRequest {
            hostname: Some("a\nb".into()),
            ..Default::default()
        }));
        assert!(!check(InitRequest {
            hostname: Some("a".repeat(65)),
            ..Default::default()
        }));
        assert!(!check(InitRequest {
            machine_id: Some("ABC".into()),
            ..Default::default()
        }));
        assert!(check(InitRequest {
            machine_id: Some("0123456789abcdef".repeat(2)),
            ..Default::default()
        }));
        assert!(!check(InitRequest {
            entropy: Some("***".into()),
            ..Default::default()
        }));
        let env_vars = Some([("A=B".to_owned(), String::new())].into());
        assert!(!check(InitRequest {
            env_vars,
            ..Default::default()
        }));
    }

    #[test]
    fn times_keep_their_fraction() {
        let time = parse_time("1970-01-01T00:00:01.25Z").expect("valid");
        assert_eq!((time.tv_sec, time.tv_nsec), (1, 250_000_000));
    }
}
