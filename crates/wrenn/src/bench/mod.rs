//! `wrenn bench`: what the platform costs, beside what it costs at the very least.
//!
//! The bench starts a platform of its own ([`platform`]), uses it through the public API like any client, and takes
//! the floors ([`floor`], [`guest`]) in the same run, sample by sample in turns, so that a machine that slows down or
//! is shared slows both sides alike. The median of a row against the median of its floor is the overhead of the
//! platform; the absolute figures are the machine's.

mod create;
mod floor;
mod guest;
mod platform;
mod processes;
mod report;
mod running;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use floor::Recipe;
use platform::{Place, Platform};
use report::{Machine, Row, Series, Unit};
use wrenn_client::Error;

/// Until a started platform takes creates.
const HOST_LIMIT: Duration = Duration::from_secs(30);

/// `wrenn bench`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// Few samples: shows that all works, rather than what it costs
    #[arg(long)]
    quick: bool,
    /// Also build the root file system from nothing, which takes minutes and the internet
    #[arg(long)]
    cold: bool,
    /// Where the raw samples go
    #[arg(long, value_name = "FILE", default_value = "bench-results.json")]
    json_out: PathBuf,
    /// Holds the bench's platform while it runs; some 3 GiB [default: the system's folder for temporary files]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Holds kernel and root file system; shared with other platforms of this user
    #[arg(long, env = "WRENN_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

/// How many samples each row gets.
#[derive(Debug, Clone, Copy)]
struct Counts {
    starts: usize,
    creates: usize,
    execs: usize,
    pauses: usize,
    snapshots: usize,
    transfers: usize,
    crowds: usize,
}

const FULL: Counts = Counts {
    starts: 5,
    creates: 12,
    // A machine whose speed changes several times a second needs as many to have a steady median.
    execs: 200,
    pauses: 5,
    snapshots: 5,
    transfers: 4,
    crowds: 3,
};
const QUICK: Counts = Counts {
    starts: 1,
    creates: 2,
    execs: 5,
    pauses: 1,
    snapshots: 1,
    transfers: 1,
    crowds: 1,
};

struct Bench {
    counts: Counts,
    work: tempfile::TempDir,
    platform: Option<Platform>,
    rows: Vec<Row>,
    accelerator: String,
}

/// Runs the bench.
pub(crate) fn main(args: &BenchArgs, json: bool) -> ExitCode {
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(args, json)));
    match outcome {
        Ok(code) => code,
        Err(error) => {
            crate::server::report(json, &error.context("the bench"));
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &BenchArgs, json: bool) -> anyhow::Result<ExitCode> {
    if cfg!(debug_assertions) {
        eprintln!("wrenn bench: this is a debug build; its figures mean nothing (use `make bench`)");
    }
    let started = Instant::now();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut bench = Bench::new(args)?;
    let outcome = tokio::select! {
        outcome = bench.measure(args) => Some(outcome),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    if outcome.is_none() {
        eprintln!("wrenn bench: interrupted; removing what it started");
    }
    if let Some(platform) = bench.platform.take() {
        if let Some(Err(_)) = &outcome {
            // Its folder goes with the bench.
            eprintln!("The platform's last words:\n{}", platform.last_words());
        }
        platform.stop().await?;
    }
    match outcome {
        None => return Ok(ExitCode::from(130)),
        Some(outcome) => outcome?,
    }
    let results = report::json(
        &machine(&bench.accelerator),
        args.quick,
        started.elapsed(),
        &bench.rows,
    );
    let text = serde_json::to_string_pretty(&results)?;
    std::fs::write(&args.json_out, &text)
        .with_context(|| format!("cannot write {}", args.json_out.display()))?;
    if json {
        println!("{text}");
    } else {
        println!("{}", report::table(&bench.rows));
        eprintln!(
            "{:.0} s. Raw samples: {}",
            started.elapsed().as_secs_f32(),
            args.json_out.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

impl Bench {
    fn new(args: &BenchArgs) -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let mut builder = tempfile::Builder::new();
        // The virtual machines' own users pass through it to their images.
        builder
            .prefix("wrenn-bench-")
            .permissions(std::fs::Permissions::from_mode(0o711));
        let work = match &args.work_dir {
            Some(dir) => builder.tempdir_in(std::path::absolute(dir)?),
            None => builder.tempdir(),
        }
        .context("cannot create a folder for the bench's platform")?;
        // The address of a socket has 108 bytes, and the floor's are some levels further down.
        if work.path().as_os_str().len() > 70 {
            bail!(
                "the path {} is too long for sockets; choose a shorter --work-dir",
                work.path().display()
            );
        }
        Ok(Self {
            counts: if args.quick { QUICK } else { FULL },
            work,
            platform: None,
            rows: Vec::new(),
            accelerator: String::new(),
        })
    }

    async fn measure(&mut self, args: &BenchArgs) -> anyhow::Result<()> {
        if args.cold {
            say("building the root file system from nothing");
            let place = self.place("cold", Some(self.work.path().join("cold-cache")));
            let platform = self.platform.insert(Platform::spawn(&place, Some(0))?);
            let mut series = Series::new("first start, nothing cached: spawn → template ready");
            let started = platform.started();
            series.time(platform.ready().await?.duration_since(started));
            self.add(Unit::Millis, series, []);
            self.stop().await?;
            std::fs::remove_dir_all(&place.data)?;
        }
        let place = self.place("data", args.cache_dir.clone());
        let work = self.work.path().to_path_buf();
        self.first_start(&place).await?;

        let recipe = self.recipe().await?;
        say("creates with no machine kept ready");
        let rows = create::creates(
            up(&mut self.platform)?,
            &recipe,
            self.counts.creates,
            "no warm VM",
        )
        .await?;
        self.rows.extend(rows);
        say("memory");
        let rows = create::memory(up(&mut self.platform)?, &recipe, args.quick).await?;
        self.rows.extend(rows);
        self.stop().await?;

        self.second_starts(&place).await?;
        say("creates");
        let rows = create::creates(up(&mut self.platform)?, &recipe, self.counts.creates, "default").await?;
        self.rows.extend(rows);
        say("ten creates at once");
        let rows = create::crowd(up(&mut self.platform)?, &recipe, self.counts.crowds).await?;
        self.rows.extend(rows);

        let bench = running::Running::start(up(&mut self.platform)?, &recipe, &work).await?;
        say("commands");
        self.rows.extend(bench.execs(self.counts.execs).await?);
        say("files");
        self.rows.extend(bench.transfers(self.counts.transfers).await?);
        say("snapshots");
        self.rows.extend(bench.snapshots(self.counts.snapshots).await?);
        bench.end().await?;
        for mib in [64, 256] {
            say(&format!("pause and resume with {mib} MiB"));
            let rows =
                running::pauses(up(&mut self.platform)?, &recipe, &work, mib, self.counts.pauses).await?;
            self.rows.extend(rows);
        }
        self.stop().await
    }

    fn place(&self, name: &str, cache: Option<PathBuf>) -> Place {
        Place {
            data: self.work.path().join(name),
            cache,
            log: self.work.path().join(format!("{name}.log")),
        }
    }

    async fn stop(&mut self) -> anyhow::Result<()> {
        match self.platform.take() {
            Some(platform) => platform.stop().await,
            None => Ok(()),
        }
    }

    fn add(&mut self, unit: Unit, product: Series, floors: impl IntoIterator<Item = Series>) {
        self.rows.push(Row::new(unit, product, floors));
    }

    /// The first start in an empty folder builds the template; its floor is one boot of the same machine.
    async fn first_start(&mut self, place: &Place) -> anyhow::Result<()> {
        say("first start: building the template");
        let floor_dir = self.work.path().join("boot");
        let platform = self.platform.insert(Platform::spawn(place, Some(0))?);
        let started = platform.started();
        let booting = platform.heard("booting the virtual machine").await?;
        let mut vmm = None;
        while vmm.is_none() && booting.elapsed() < Duration::from_secs(30) {
            vmm = processes::vmms_below(&place.data.join("tmp")).pop();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let vmm = vmm.context("the machine that becomes the template does not appear")?;
        let base = std::fs::read_dir(place.data.join("images/base"))?
            .flatten()
            .next()
            .context("there is no root file system")?;
        let boot = Recipe::booting(&vmm, &floor_dir, &base.path()).await?;
        let booted = platform.heard("warming up").await?;
        let ready = platform.ready().await?;

        let before = Instant::now();
        let bare = boot.start().await?;
        bare.guest.wait_healthy().await?;
        let floor = before.elapsed();
        bare.end().await?;
        std::fs::remove_dir_all(&floor_dir)?;

        let floor = || {
            let mut series = Series::new("bare QEMU: boot → agent answers");
            series.time(floor);
            series
        };
        let one = |name: &str, took| {
            let mut series = Series::new(name);
            series.time(took);
            series
        };
        let whole = one(
            "first start, root file system cached: spawn → template ready",
            ready - started,
        );
        self.add(Unit::Millis, whole, []);
        let boot = one("template: boot → agent answers", booted - booting);
        self.add(Unit::Millis, boot, [floor()]);
        let build = one("template: boot, warm up, freeze", ready - booting);
        self.add(Unit::Millis, build, [floor()]);
        Ok(())
    }

    /// How to start bare machines like those of sandboxes.
    async fn recipe(&mut self) -> anyhow::Result<Recipe> {
        let dir = self.work.path().join("floor");
        let platform = up(&mut self.platform)?;
        let sandbox = platform
            .client()
            .await?
            .sandboxes()
            .create_running(&platform::usual_sandbox())
            .await?;
        let vmm = platform
            .sandbox_vmms()
            .pop()
            .context("a sandbox without a machine")?;
        let recipe = Recipe::restoring(&vmm, &dir).await?;
        let words = vmm.command_line().unwrap_or_default();
        let accelerator = words
            .iter()
            .position(|word| word == "-accel")
            .and_then(|at| words.get(at + 1));
        self.accelerator = accelerator.cloned().unwrap_or_default();
        sandbox.destroy_and_wait().await?;
        Ok(recipe)
    }

    /// Starts in a folder that has its template already. The last one stays up.
    async fn second_starts(&mut self, place: &Place) -> anyhow::Result<()> {
        say("second starts");
        let mut health = Series::new("second start: spawn → /health");
        let mut ready = Series::new("second start: spawn → template ready");
        let mut first = Series::new("second start: spawn → first sandbox running");
        let mut floor = Series::new("fork + exec: wrenn --version");
        let executable = std::env::current_exe()?;
        for _ in 0..self.counts.starts {
            self.stop().await?;
            let before = Instant::now();
            let status = tokio::process::Command::new(&executable)
                .arg("--version")
                .stdout(std::process::Stdio::null())
                .status()
                .await?;
            if !status.success() {
                bail!("`wrenn --version` failed");
            }
            floor.time(before.elapsed());
            let platform = self.platform.insert(Platform::spawn(place, None)?);
            let started = platform.started();
            health.time(platform.healthy().await? - started);
            ready.time(platform.ready().await? - started);
            let sandboxes = platform.client().await?.sandboxes();
            // The template is on record before the host has reported for duty; the time until then counts.
            while let Err(error) = sandboxes.create_running(&platform::usual_sandbox()).await {
                if !matches!(error, Error::NoCapacity(_) | Error::HostUnavailable(_))
                    || started.elapsed() > HOST_LIMIT
                {
                    return Err(error.into());
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            first.time(started.elapsed());
        }
        up(&mut self.platform)?.clear().await?;
        self.add(Unit::Millis, health, [floor]);
        self.add(Unit::Millis, ready, []);
        self.add(Unit::Millis, first, []);
        Ok(())
    }
}

fn up(platform: &mut Option<Platform>) -> anyhow::Result<&mut Platform> {
    platform.as_mut().context("the platform is not running")
}

fn say(what: &str) {
    eprintln!("bench: {what}");
}

fn machine(accelerator: &str) -> Machine {
    let line = |path: &str, name: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    let memory_kib: u64 = line("/proc/meminfo", "MemTotal")
        .trim_end_matches(" kB")
        .parse()
        .unwrap_or(0);
    let qemu = std::process::Command::new("qemu-system-x86_64")
        .arg("--version")
        .output();
    Machine {
        cpus: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        cpu: line("/proc/cpuinfo", "model name"),
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        memory_mib: memory_kib / 1024,
        qemu: qemu
            .map(|output| {
                String::from_utf8_lossy(&output.stdout)
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            })
            .unwrap_or_default(),
        accelerator: accelerator.to_owned(),
    }
}
