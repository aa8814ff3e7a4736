//! `wrenn doctor`: whether this machine has what the platform needs, and what to do where it has not.
//!
//! The same checks run at the start of `wrenn up`, so they are quick: the accelerator's verdict is remembered, and
//! what takes time runs side by side. Nothing here changes the machine, but for the remembered verdict.

mod checks;
mod machine;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;
use wrenn_host::vmm::Accelerator;

use super::UpArgs;

/// What the checks look at.
#[derive(Debug, Clone)]
pub(crate) struct DoctorInput {
    /// Holds everything that must last.
    pub(crate) data_dir: PathBuf,
    /// Holds what can be made again.
    pub(crate) cache_dir: PathBuf,
    /// Where the API is, or is to be, served.
    pub(crate) listen: SocketAddr,
    /// The accelerator that was asked for; `None` lets the probe decide.
    pub(crate) accelerator: Option<Accelerator>,
    /// Certificates for the guests of the built-in template, when not Debian's own.
    pub(crate) guest_ca_bundle: Option<PathBuf>,
    /// A server is about to start: one that runs already is in its way.
    pub(crate) starting: bool,
    /// Probe the accelerator anew rather than believe what is remembered.
    pub(crate) fresh_probe: bool,
}

impl DoctorInput {
    /// For a person who asks: everything is looked at anew.
    pub(crate) fn new(args: &UpArgs) -> Self {
        Self {
            data_dir: args.dirs.data_dir(),
            cache_dir: args.dirs.cache_dir(),
            listen: args.control.listen,
            accelerator: args.host.accel.fixed(),
            guest_ca_bundle: args.host.ca_bundle(),
            starting: false,
            fresh_probe: true,
        }
    }

    /// For a server that is about to start, quickly.
    pub(crate) fn starting(args: &UpArgs) -> Self {
        Self {
            starting: true,
            fresh_probe: false,
            ..Self::new(args)
        }
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// As it should be.
    Ok,
    /// It works, but less well than it could.
    Warn,
    /// Something that is needed is missing.
    Fail,
}

/// One prerequisite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// Stable, for scripts.
    pub(crate) name: &'static str,
    pub(crate) status: Status,
    /// What was found, for people.
    pub(crate) value: String,
    /// What to do about it.
    pub(crate) remedy: Option<String>,
    /// The platform cannot work this way.
    pub(crate) blocking: bool,
}

impl Check {
    fn ok(name: &'static str, value: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            value: value.into(),
            remedy: None,
            blocking: false,
        }
    }

    fn warn(name: &'static str, value: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            remedy: Some(remedy.into()),
            ..Self::ok(name, value)
        }
    }

    fn fail(name: &'static str, value: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, value, remedy)
        }
    }

    fn blocking(name: &'static str, value: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            blocking: true,
            ..Self::fail(name, value, remedy)
        }
    }
}

/// All checks, and what a host agent needs of them.
#[derive(Debug, Clone)]
pub(crate) struct Diagnosis {
    pub(crate) checks: Vec<Check>,
    /// How guests will run: what was asked for, or the probe's verdict.
    pub(crate) accelerator: Accelerator,
}

impl Diagnosis {
    /// The checks on account of which nothing can work.
    pub(crate) fn blocking(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.blocking)
    }

    /// Whether nothing stands in the way.
    pub(crate) fn works(&self) -> bool {
        self.blocking().next().is_none()
    }
}

/// Runs all checks. Blocks for some tenths of a second at most: from asynchronous code call it on a blocking thread.
pub(crate) fn run(input: &DoctorInput) -> Diagnosis {
    std::thread::scope(|scope| {
        let probe = scope.spawn(|| machine::probe(input));
        let qemu = scope.spawn(checks::qemu);
        let port = scope.spawn(|| checks::port(input.listen, input.starting));
        let mut checks = Vec::new();
        let made = machine::Made::look(input);
        let host = machine::Host::look();
        let rest = [
            checks::cgroup(host.root),
            checks::data_dir(&input.data_dir),
            checks::disk(&input.data_dir, made.template),
            checks::memory(&host.meminfo),
            checks::authorities(input.guest_ca_bundle.as_deref()),
            checks::tools(&made),
            checks::user_namespaces(&host, &made),
            checks::kernel(&made),
            checks::rootfs(&made),
            checks::clock(),
        ];
        // A thread that panics would be a fault of ours; the report then lacks its line, and TCG works everywhere.
        let accelerator = match probe.join() {
            Ok(report) => {
                let (check, accelerator) = checks::accelerator(report, input.accelerator);
                checks.push(check);
                accelerator
            }
            Err(_) => input.accelerator.unwrap_or(Accelerator::Tcg),
        };
        checks.extend(qemu.join().into_iter().flatten());
        checks.extend(rest.into_iter().flatten());
        checks.extend(port.join());
        Diagnosis { checks, accelerator }
    })
}

/// `wrenn doctor`: prints the report. The exit code is 1 when a blocking check fails.
pub(crate) fn main(input: &DoctorInput, json: bool) -> ExitCode {
    use std::io::IsTerminal as _;
    let diagnosis = run(input);
    let text = if json {
        let report = serde_json::json!({
            "ok": diagnosis.works(),
            "accelerator": diagnosis.accelerator,
            "checks": diagnosis.checks,
        });
        format!("{report:#}\n")
    } else {
        let colour = std::io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        table(&diagnosis.checks, colour)
    };
    let printed = crate::cli::print_bytes(text.as_bytes());
    if diagnosis.works() {
        printed
    } else {
        ExitCode::FAILURE
    }
}

/// The checks for people: a line each, its remedy below it, and a summary.
pub(crate) fn table(checks: &[Check], colour: bool) -> String {
    let paint = |code: &str, text: &str| match colour {
        true => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
        false => text.to_owned(),
    };
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let status = match check.status {
            Status::Ok => paint("32", "ok  "),
            Status::Warn => paint("33", "warn"),
            Status::Fail => paint("31", "FAIL"),
        };
        // Values may hold names of files: what a terminal would obey is taken out.
        let value: String = check.value.chars().filter(|c| !c.is_control()).collect();
        let _ = writeln!(text, "{status}  {:width$}  {value}", check.name);
        if let Some(remedy) = &check.remedy {
            let _ = writeln!(
                text,
                "      {:width$}  {}",
                "",
                paint("2", &format!("→ {remedy}"))
            );
        }
    }
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    let blocking = checks.iter().filter(|check| check.blocking).count();
    let _ = match (blocking, count(Status::Fail), count(Status::Warn)) {
        (0, 0, 0) => writeln!(text, "\nAll is well."),
        (0, fails, warnings) => {
            writeln!(
                text,
                "\nIt works; {} could be better.",
                plural(fails + warnings, "thing")
            )
        }
        (blocking, ..) => writeln!(text, "\nIt cannot work until {} mended.", are(blocking)),
    };
    text
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("{count} {noun}")
    } else {
        format!("{count} {noun}s")
    }
}

fn are(count: usize) -> String {
    format!(
        "{} {}",
        plural(count, "failure"),
        if count == 1 { "is" } else { "are" }
    )
}

#[cfg(test)]
mod tests;
