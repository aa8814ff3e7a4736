//! Finds out whether hardware virtualisation works here, rather than merely being offered.
//!
//! A `/dev/kvm` that opens and creates VMs may still be a slow and incomplete emulation, on which a kernel never
//! finishes booting. So a tiny guest proves itself: a counted loop in 64-bit mode against a time budget, then the
//! instructions on the FPU's state at which such emulations give up.
//!
//! The guest runs in a child process (this program again, called with [`CHILD_COMMAND`]), because entering a guest
//! may never return. The child writes a line of JSON to its standard output for each event; the parent reads
//! until the last one, the end of the output, or the time allowed, and then kills the child in any case.
//!
//! Every doubt ends in [`Accelerator::Tcg`], which works everywhere.

mod cache;
mod guest;
#[expect(
    unsafe_code,
    reason = "handing memory to the kernel as a guest's has no safe form"
)]
mod kvm;

use std::io::{self, Read as _, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal};
use serde::{Deserialize, Serialize};

use super::Accelerator;

pub use cache::{probe_cached, probe_fresh};

/// Hidden command of the `wrenn` program that has to call [`probe_here`].
pub const CHILD_COMMAND: &str = "__probe-kvm";

/// The device.
const DEVICE: &str = "/dev/kvm";
/// Rounds of the counted loop: three instructions each, so about a millisecond on a processor.
const ROUNDS: u32 = 1_000_000;
/// Rounds of a first run, after which even a slow emulation gets to the FPU instructions that it may lack.
const FIRST_ROUNDS: u32 = 10_000;
/// Time within which loop and FPU instructions must be done. Generous: a busy host may share its processor among many.
const BUDGET: Duration = Duration::from_millis(60);
/// How long the child may take from its start to its end.
const PATIENCE: Duration = Duration::from_millis(400);
/// How long a killed child is waited for.
const REAP: Duration = Duration::from_millis(100);
/// Most output that is read from the child.
const OUTPUT_LIMIT: usize = 16 << 10;

/// Result of the probe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// How guests should run.
    pub verdict: Accelerator,
    /// Why, in a sentence for people, with the figure.
    pub detail: String,
    /// How long the tiny guest took: to its end when that was reached, otherwise until it was given up.
    /// Absent when none was started.
    pub millis: Option<f64>,
    /// What a person can do to get hardware virtualisation, where something can be done.
    pub remedy: Option<String>,
}

impl ProbeReport {
    fn unusable(detail: impl Into<String>, millis: Option<f64>, remedy: Option<&str>) -> Self {
        Self {
            verdict: Accelerator::Tcg,
            detail: detail.into(),
            millis,
            remedy: remedy.map(str::to_owned),
        }
    }
}

/// Whole microseconds: a figure of few digits is the same after its way through JSON.
fn in_millis(took: Duration) -> f64 {
    f64::from(u32::try_from(took.as_micros()).unwrap_or(u32::MAX)) / 1e3
}

/// What the child tells, a line each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    /// The guest is about to run.
    Started,
    /// The loop's sum is right.
    Loop { rounds: u32, millis: f64 },
    /// The guest came to its end, so long after its loop of all rounds.
    Finished { millis: f64 },
    /// It did not.
    Failed { reason: String },
}

/// Runs the tiny guest in this process and writes what happens to `out`. May never return: only for the child.
///
/// # Errors
/// When `out` cannot be written.
pub fn probe_here(out: &mut impl Write) -> io::Result<()> {
    // Should the parent die, or the guest spin, this process must not stay.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let _ = rustix::process::setrlimit(
        Resource::Cpu,
        Rlimit {
            current: Some(2),
            maximum: Some(2),
        },
    );
    tell(out, &Event::Started)?;
    for rounds in [FIRST_ROUNDS, ROUNDS] {
        let mut written = Ok(());
        let outcome = kvm::run(rounds, |milestone| {
            let millis = in_millis;
            let event = match milestone {
                kvm::Milestone::Loop(took) => Event::Loop {
                    rounds,
                    millis: millis(took),
                },
                kvm::Milestone::Fpu(took) if rounds == ROUNDS => Event::Finished { millis: millis(took) },
                kvm::Milestone::Fpu(_) => return,
            };
            if written.is_ok() {
                written = tell(out, &event);
            }
        });
        written?;
        if let Err(reason) = outcome {
            return tell(out, &Event::Failed { reason });
        }
    }
    Ok(())
}

fn tell(out: &mut impl Write, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event).map_err(io::Error::other)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// What can be said without running a guest: `Some` when the device is missing or closed to this user.
fn without_a_guest(device: &Path) -> Option<ProbeReport> {
    let error = std::fs::File::options()
        .read(true)
        .write(true)
        .open(device)
        .err()?;
    let device = device.display();
    Some(match error.kind() {
        io::ErrorKind::NotFound => ProbeReport::unusable(
            format!("{device} does not exist: this machine offers no hardware virtualisation"),
            None,
            Some(
                "on a physical machine enable virtualisation (VT-x or AMD-V) in the firmware; \
                 on a virtual one enable nested virtualisation at its provider",
            ),
        ),
        io::ErrorKind::PermissionDenied => ProbeReport::unusable(
            format!("{device} may not be opened by this user"),
            None,
            Some("sudo usermod -aG kvm \"$USER\", then log in again"),
        ),
        _ => ProbeReport::unusable(format!("{device} cannot be opened: {error}"), None, None),
    })
}

/// Runs the tiny guest in a child process. `program` is `wrenn` itself, usually `std::env::current_exe()`.
///
/// Returns within about half a second, whatever the device does.
#[must_use]
pub fn probe_in_child(program: &Path) -> ProbeReport {
    if let Some(report) = without_a_guest(Path::new(DEVICE)) {
        return report;
    }
    run_child(Command::new(program).arg(CHILD_COMMAND)).report
}

/// A report, and whether it comes from a guest that had its chance (and may be remembered).
struct Outcome {
    report: ProbeReport,
    lasting: bool,
}

fn run_child(command: &mut Command) -> Outcome {
    let started = Instant::now();
    let deadline = started + PATIENCE;
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            let report = ProbeReport::unusable(format!("the probe cannot be started: {error}"), None, None);
            return Outcome {
                report,
                lasting: false,
            };
        }
    };
    let output = read_until(&mut child, deadline);
    // A child that ended by itself is dead already; the signal cannot reach another as it is not reaped yet.
    let _ = child.kill();
    reap(child);
    judge(&output, started.elapsed())
}

/// Collects the child's output until its last event, its end, or the deadline.
fn read_until(child: &mut Child, deadline: Instant) -> Vec<u8> {
    let mut output = Vec::new();
    let Some(mut stdout) = child.stdout.take() else {
        return output;
    };
    let mut buffer = [0; 1024];
    while output.len() < OUTPUT_LIMIT && !events(&output).iter().any(Event::is_last) {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            break;
        };
        match wait_readable(&stdout, left) {
            Ok(true) => {}
            Ok(false) => break,
            Err(Errno::INTR) => continue,
            Err(_) => break,
        }
        match stdout.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => output.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    output
}

fn wait_readable(fd: &impl std::os::fd::AsFd, timeout: Duration) -> Result<bool, Errno> {
    let timeout = Timespec::try_from(timeout).map_err(|_| Errno::INVAL)?;
    Ok(poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout))? > 0)
}

/// Waits for a killed child, but not for one that the kernel does not let go of; a thread takes that over.
fn reap(mut child: Child) {
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
    if let Some(pidfd) = pidfd {
        let deadline = Instant::now() + REAP;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match wait_readable(&pidfd, left) {
                Err(Errno::INTR) => {}
                _ => break,
            }
        }
    }
    if !matches!(child.try_wait(), Ok(Some(_))) {
        let _ = std::thread::Builder::new()
            .name("probe-reaper".to_owned())
            .spawn(move || child.wait());
    }
}

impl Event {
    fn is_last(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed { .. })
    }
}

/// The whole lines of the child's output. What is no event (or not yet a whole line) counts for nothing.
fn events(output: &[u8]) -> Vec<Event> {
    let whole = output
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    output[..whole]
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

/// Decides, from what the child said and how long it was there.
fn judge(output: &[u8], elapsed: Duration) -> Outcome {
    const SLOW: &str = "a software emulation rather than hardware virtualisation";
    let elapsed = in_millis(elapsed);
    let budget = BUDGET.as_secs_f64() * 1e3;
    let mut started = false;
    let mut counted = None;
    let mut end = None;
    for event in events(output) {
        match event {
            Event::Started => started = true,
            Event::Loop { rounds, millis } => counted = Some((rounds, millis)),
            Event::Finished { .. } | Event::Failed { .. } => {
                end = Some(event);
                break;
            }
        }
    }
    let figure = counted.map_or_else(String::new, |(rounds, millis)| {
        format!("; a counted loop of {rounds} rounds took {millis:.1} ms")
    });
    let report = match end {
        Some(Event::Finished { millis }) => {
            let total = millis + counted.map_or(f64::NAN, |(_, millis)| millis);
            // Asked this way round, a figure that is not a number fails too.
            let whole = counted.is_some_and(|(rounds, _)| rounds == ROUNDS);
            if whole && (0.0..=budget).contains(&total) {
                let detail = format!(
                    "hardware virtualisation works: the probe's guest took {total:.1} ms (at most {budget} ms)"
                );
                ProbeReport {
                    verdict: Accelerator::Kvm,
                    detail,
                    millis: Some(total),
                    remedy: None,
                }
            } else {
                let detail =
                    format!("/dev/kvm is too slow{figure}, at most {budget} ms are allowed; it is {SLOW}");
                ProbeReport::unusable(detail, Some(elapsed), None)
            }
        }
        Some(Event::Failed { reason }) => {
            let reason: String = reason.chars().filter(|c| !c.is_control()).take(300).collect();
            ProbeReport::unusable(
                format!("/dev/kvm is unusable: {reason}{figure}"),
                Some(elapsed),
                None,
            )
        }
        _ if started => ProbeReport::unusable(
            format!(
                "/dev/kvm is unusable: the probe's guest was not done after {elapsed:.0} ms{figure}; it is {SLOW}"
            ),
            Some(elapsed),
            None,
        ),
        // Not the device's fault, so nothing to remember.
        _ => {
            let report = ProbeReport::unusable("the probe of /dev/kvm gave no answer", Some(elapsed), None);
            return Outcome {
                report,
                lasting: false,
            };
        }
    };
    Outcome {
        report,
        lasting: true,
    }
}

#[cfg(test)]
mod tests;
