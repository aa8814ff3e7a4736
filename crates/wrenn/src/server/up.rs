//! Starting and ending the servers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use wrenn_control::{Bootstrap, ControlPlane, ErrorCode};
use wrenn_host::vmm::{Accelerator, VmIds, probe_cached};
use wrenn_host::{BuildState, HostAgent, HostConfig};

use super::config::ExitChoice;
use super::config::{ControlArgs, DirArgs, HostArgs};
use super::doctor::{self, DoctorInput};
use super::{ControlPlaneArgs, HostAgentArgs, UpArgs};

/// User and group ids of VM processes under a root agent: far from those of people and packages.
const VM_IDS: VmIds = VmIds {
    gid: 900_000,
    first_uid: 900_000,
    first_template_gid: 1_000_000,
};

/// The whole platform in one process; the two halves speak as they would over a network.
pub(super) async fn up(args: UpArgs, json: bool) -> anyhow::Result<()> {
    let started = Instant::now();
    let data_dir = args.dirs.data_dir();
    prepare(&data_dir)?;
    let input = DoctorInput::starting(&args);
    let diagnosis = tokio::task::spawn_blocking(move || doctor::run(&input)).await?;
    if !diagnosis.works() {
        eprint!("{}", doctor::table(&diagnosis.checks, false));
        bail!("this machine cannot run Wrenn yet: see the failed checks and their remedies above");
    }
    let listeners = listen(args.control.listen).await?;
    let address = listeners[0].local_addr()?;
    let url = base_url(address);

    let mut config = args.control.control_config(&data_dir)?;
    config.log_links = true;
    let control = open(config).await?;
    let first = bootstrap(&control, &data_dir, &url).await?;
    // The host keeps its identity, and so its sandboxes; one that this database does not know becomes a new one.
    let known = wrenn_host::registered_host(&data_dir)?.and_then(|host| host.parse().ok());
    let token = match control.issue_host_token(known).await {
        Err(error) if known.is_some() && error.code == ErrorCode::NotFound => {
            control.issue_host_token(None).await
        }
        issued => issued,
    }?;

    let mut signals = Signals::listen()?;
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let serving = tokio::spawn(control.run(listeners, async move { stopped.cancelled().await }));
    let accelerator = args.host.accel.fixed().unwrap_or(diagnosis.accelerator);
    let host_config = host_config(
        &args.dirs,
        &args.host,
        accelerator,
        url.clone(),
        Some(token.token),
    );
    let begun = tokio::select! {
        begun = HostAgent::start(host_config) => begun.context("cannot start the host agent"),
        // Machines that were found again so far run on.
        () = signals.next() => Err(anyhow::anyhow!("ended while the host agent was starting")),
    };
    let agent = match begun {
        Ok(agent) => agent,
        Err(error) => {
            stop.cancel();
            let _ = serving.await;
            return Err(error);
        }
    };
    if json {
        print_place(&url, &data_dir, first.as_ref());
    } else {
        announce(&url, &data_dir, first.as_ref(), started.elapsed());
    }
    let ready = tokio::spawn(show_build(agent.template_progress(), agent.template_ready_told()));

    tokio::pin!(serving);
    let failed = tokio::select! {
        () = signals.next() => None,
        outcome = &mut serving => Some(outcome),
    };
    ready.abort();
    eprintln!();
    let leave = async {
        agent
            .shutdown(args.on_exit.into(), |done, running| match (args.on_exit, running) {
                (_, 0) => {}
                (ExitChoice::Keep, _) => eprintln!("{running} sandboxes run on; the next start finds them."),
                (ExitChoice::Pause, _) => {
                    eprintln!("Pausing running sandboxes, memory kept: {done} of {running}. Press Ctrl-C again to leave at once.");
                }
            })
            .await;
        stop.cancel();
        if failed.is_none() {
            let _ = (&mut serving).await;
        }
    };
    tokio::select! {
        () = leave => {}
        () = signals.next() => bail!("left at once; sandboxes that were not paused yet run on and are found at the next start"),
    }
    match failed {
        Some(Ok(Ok(()))) | None => Ok(()),
        Some(Ok(Err(error))) => Err(error).context("the control plane ended"),
        Some(Err(error)) => Err(error).context("the control plane ended"),
    }
}

/// The control plane alone.
pub(super) async fn control_plane(args: ControlPlaneArgs, json: bool) -> anyhow::Result<()> {
    let data_dir = args.dirs.data_dir();
    prepare(&data_dir)?;
    let control = open_control(&data_dir, &args.control).await?;
    if args.issue_host_token {
        let first = bootstrap(&control, &data_dir, &base_url(args.control.listen)).await?;
        if let (Some(first), false) = (&first, json) {
            show_first_key(&data_dir, first);
        }
        let issued = control.issue_host_token(args.host).await?;
        if json {
            crate::cli::print_json(&serde_json::json!({
                "host_id": issued.host_id,
                "token": issued.token,
                "api_key": first.map(|first| first.api_key),
            }));
        } else {
            crate::cli::print_bytes(format!("{}\n", issued.token).as_bytes());
        }
        control.stop().await;
        return Ok(());
    }
    let listeners = listen(args.control.listen).await?;
    let url = base_url(listeners[0].local_addr()?);
    let first = bootstrap(&control, &data_dir, &url).await?;
    if json {
        print_place(&url, &data_dir, first.as_ref());
    } else {
        if let Some(first) = &first {
            show_first_key(&data_dir, first);
        }
        eprintln!("Serving {url}");
    }
    let mut signals = Signals::listen()?;
    control
        .run(listeners, async move { signals.next().await })
        .await
        .context("the control plane ended")
}

/// A host of a control plane elsewhere.
pub(super) async fn host_agent(args: HostAgentArgs) -> anyhow::Result<()> {
    prepare(&args.dirs.data_dir())?;
    let mut signals = Signals::listen()?;
    let accelerator = match args.host.accel.fixed() {
        Some(accelerator) => accelerator,
        None => {
            let (cache, program) = (args.dirs.cache_dir(), std::env::current_exe()?);
            let report = tokio::task::spawn_blocking(move || probe_cached(&cache, &program)).await?;
            tracing::info!(
                accelerator = report.verdict.as_str(),
                detail = report.detail,
                "accelerator probed"
            );
            report.verdict
        }
    };
    let config = host_config(
        &args.dirs,
        &args.host,
        accelerator,
        args.control_plane,
        args.token.map(|token| token.reveal().to_owned()),
    );
    let agent = tokio::select! {
        begun = HostAgent::start(config) => begun.context("cannot start the host agent")?,
        () = signals.next() => bail!("ended while the host agent was starting"),
    };
    tracing::info!(address = %agent.address(), "the host agent serves");
    let ready = tokio::spawn(show_build(agent.template_progress(), agent.template_ready_told()));
    signals.next().await;
    ready.abort();
    tokio::select! {
        () = agent.shutdown(args.on_exit.into(), |done, running| tracing::info!(done, running, "dealing with running sandboxes")) => Ok(()),
        () = signals.next() => bail!("left at once; running sandboxes run on and are found at the next start"),
    }
}

pub(super) async fn open_control(data_dir: &Path, args: &ControlArgs) -> anyhow::Result<ControlPlane> {
    open(args.control_config(data_dir)?).await
}

async fn open(config: wrenn_control::ControlConfig) -> anyhow::Result<ControlPlane> {
    ControlPlane::builder(config)
        .build()
        .await
        .context("cannot start the control plane")
}

fn host_config(
    dirs: &DirArgs,
    host: &HostArgs,
    accelerator: Accelerator,
    control_plane: String,
    token: Option<String>,
) -> HostConfig {
    HostConfig {
        data_dir: dirs.data_dir(),
        cache_dir: dirs.cache_dir(),
        listen: host.agent_listen,
        advertise: host.agent_url.clone(),
        control_plane,
        registration_token: token,
        accelerator,
        egress: host.egress(),
        capacity: host.capacity(),
        guest_ca_bundle: host.ca_bundle(),
        debian_mirror: host.debian_mirror.clone(),
        vm_ids: VM_IDS,
        pool: host.pool,
        fault: None,
    }
}

pub(super) fn prepare(data_dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
    // The machines' users read images that are made here, whatever the shell's mask is; secrets have modes of their own.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    // VM processes pass through it to the images that they may read.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(data_dir)
        .with_context(|| {
            format!(
                "cannot create the data directory {}; choose another with --data-dir",
                data_dir.display()
            )
        })?;
    let owner = std::fs::metadata(data_dir)?.uid();
    let me = rustix::process::geteuid().as_raw();
    if owner != me {
        bail!(
            "the data directory {} belongs to user {owner}, not to this one ({me}); choose another with --data-dir",
            data_dir.display()
        );
    }
    Ok(())
}

/// Opens the API's port, on both loopback addresses when one is asked for.
async fn listen(address: SocketAddr) -> anyhow::Result<Vec<TcpListener>> {
    let bind = |address: SocketAddr| async move {
        TcpListener::bind(address).await.with_context(|| {
            format!("cannot listen on {address}; is another server there? Choose another with --listen")
        })
    };
    let first = bind(address).await?;
    let port = first.local_addr()?.port();
    let mut listeners = vec![first];
    let other = match address.ip() {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        _ => None,
    };
    if let Some(other) = other {
        match bind(SocketAddr::new(other, port)).await {
            Ok(listener) => listeners.push(listener),
            // A machine without the other protocol is no worse for it; another server there is somebody's surprise.
            Err(error) => {
                let taken = error
                    .downcast_ref::<std::io::Error>()
                    .is_some_and(|error| error.kind() == std::io::ErrorKind::AddrInUse);
                if taken {
                    tracing::warn!("{error:#}; clients that go there do not reach this one");
                } else {
                    tracing::debug!("{error:#}");
                }
            }
        }
    }
    Ok(listeners)
}

fn base_url(address: SocketAddr) -> String {
    match address.ip() {
        ip if ip.is_unspecified() => format!("http://127.0.0.1:{}", address.port()),
        _ => format!("http://{address}"),
    }
}

/// Makes the first account, if there is none. Its key is written down at once: the database has its hash only, so a start
/// that fails further on must not take it along.
async fn bootstrap(control: &ControlPlane, data_dir: &Path, url: &str) -> anyhow::Result<Option<Bootstrap>> {
    let first = control.bootstrap().await?;
    match &first {
        Some(first) => write_local_env(data_dir, url, &first.api_key)?,
        None => renew_local_env(data_dir, url)?,
    }
    Ok(first)
}

/// What a program that starts a server has to know; the key only at the first start, and in the file after it.
fn print_place(url: &str, data_dir: &Path, first: Option<&Bootstrap>) {
    crate::cli::print_json(&serde_json::json!({
        "url": url,
        "local_env": data_dir.join("local.env"),
        "api_key": first.map(|first| &first.api_key),
    }));
}

fn show_first_key(data_dir: &Path, first: &Bootstrap) {
    eprintln!(
        "First API key, shown this once (also in {}): {}",
        data_dir.join("local.env").display(),
        first.api_key
    );
}

/// Keeps the first key where the command line and scripts on this machine find it.
fn write_local_env(data_dir: &Path, url: &str, api_key: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = data_dir.join("local.env");
    let partial = data_dir.join("local.env.new");
    let write = || {
        // A file of an earlier attempt may have another mode.
        let _ = std::fs::remove_file(&partial);
        let mut file = std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)?;
        writeln!(file, "WRENN_API_KEY={api_key}\nWRENN_BASE_URL={url}")?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The address may be another than at the first start; the key is the same.
fn renew_local_env(data_dir: &Path, url: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(data_dir.join("local.env")).unwrap_or_default();
    match text.lines().find_map(|line| line.strip_prefix("WRENN_API_KEY=")) {
        Some(key) if !text.contains(&format!("WRENN_BASE_URL={url}\n")) => {
            write_local_env(data_dir, url, key)
        }
        _ => Ok(()),
    }
}

fn announce(url: &str, data_dir: &Path, first: Option<&Bootstrap>, took: Duration) {
    eprintln!(
        "\nWrenn serves {url} (after {:.1} s).  API: {url}/docs  Try it: {url}/test",
        took.as_secs_f32()
    );
    let env = data_dir.join("local.env");
    let Some(first) = first else {
        eprintln!("API key: see {}. Ctrl-C ends it.\n", env.display());
        return;
    };
    let key = &first.api_key;
    let program =
        std::env::current_exe().map_or_else(|_| "wrenn".to_owned(), |path| path.display().to_string());
    let custom = if std::env::var_os("WRENN_DIR").is_some() || DirArgs::defaults().data_dir() != data_dir {
        format!("WRENN_DIR={} ", data_dir.display())
    } else {
        String::new()
    };
    println!(
        "\
API key (shown this once; kept in {env}):
  {key}

Try it once the template is ready:
  curl -sS -X POST -H 'X-API-Key: {key}' -H 'Content-Type: application/json' -d '{{\"timeout_sec\":600}}' '{url}/v1/sandboxes?wait=60'
  {custom}{program} run -- python3 -c 'print(6 * 7)'
  python3 -c \"import json,urllib.request as r; call=lambda p,b: json.load(r.urlopen(r.Request('{url}/v1/sandboxes'+p,json.dumps(b).encode(),{{'X-API-Key':'{key}','Content-Type':'application/json'}}))); s=call('?wait=60',{{'timeout_sec':600}}); print(call('/'+s['id']+'/exec',{{'cmd':'uname','args':['-a']}})['stdout'])\"
",
        env = env.display(),
    );
}

/// Shows how the built-in template comes along, until it is ready, and the control plane knows so, or has failed.
async fn show_build(
    mut progress: tokio::sync::watch::Receiver<BuildState>,
    mut ready_told: tokio::sync::watch::Receiver<bool>,
) {
    let bar = ProgressBar::new(100);
    if let Ok(style) =
        ProgressStyle::with_template("{spinner} template 'minimal' [{bar:30}] {pos}% {msg} ({elapsed})")
    {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let plain = bar.is_hidden();
    loop {
        let state = progress.borrow_and_update().clone();
        match state {
            BuildState::Building { percent, step } => {
                bar.set_position(u64::from(percent));
                if plain {
                    eprintln!("template 'minimal': {percent}% {step}");
                }
                bar.set_message(step);
            }
            BuildState::Ready { size_bytes } => {
                if ready_told.wait_for(|told| *told).await.is_err() {
                    return;
                }
                bar.finish_and_clear();
                eprintln!("Template 'minimal' is ready ({} MiB).", size_bytes >> 20);
                return;
            }
            BuildState::Failed(why) => {
                bar.finish_and_clear();
                eprintln!(
                    "Template 'minimal' could not be made: {why}\nMend the cause and start again; finished steps are kept."
                );
                return;
            }
        }
        if progress.changed().await.is_err() {
            return;
        }
    }
}

/// Ctrl-C, SIGTERM and SIGHUP.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
