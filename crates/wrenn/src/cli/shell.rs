//! `wrenn sandbox shell` (and `exec --tty`): a terminal in a sandbox, connected to this one.
//!
//! Output is shown by the main loop; a task of its own types and resizes, so that a sandbox that does
//! not read its input cannot keep its output from being shown, or a signal from being heeded. On every
//! way out the terminal is restored before anything else is said.

use std::process::ExitCode;

use clap::Args;
use tokio::io::AsyncWriteExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use wrenn_client::{ExecOptions, Pty, PtyEvent, PtyOptions, PtyWriter, SandboxHandle};

use super::command::Ending;
use super::error::CliError;
use super::signals::Signals;
use super::terminal::{self, Escape, RawMode};
use super::{Context, stdin, values};

/// The size of a terminal that nobody looks at.
const UNSEEN: (u32, u32) = (80, 24);
/// End of input, as a person types it.
const CTRL_D: &[u8] = b"\x04";

#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    /// The sandbox: its id, or a unique beginning or end of it
    sandbox: String,
    /// User to be
    #[arg(short, long)]
    user: Option<String>,
    /// Directory to start in
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// Set an environment variable; NAME alone takes its value from here
    #[arg(short, long = "env", value_name = "NAME[=VALUE]", value_parser = values::env)]
    envs: Vec<(String, String)>,
    /// Come back to a terminal that was left with `~.`
    #[arg(long, value_name = "TAG", conflicts_with_all = ["user", "cwd", "envs", "command"])]
    connect: Option<String>,
    /// What to run instead of a login shell
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(super) async fn main(context: &Context, args: ShellArgs) -> Result<ExitCode, CliError> {
    refuse_json(context)?;
    let mut signals = Signals::listen()?;
    let sandbox = context.sandbox(&args.sandbox).await?;
    if let Some(tag) = &args.connect {
        let pty = tokio::select! {
            pty = sandbox.pty_connect(tag) => pty?,
            interrupt = signals.recv() => return Err(CliError::Interrupted(interrupt)),
        };
        return attach(&sandbox, pty, None, &mut signals).await;
    }
    let mut command = args.command.into_iter();
    let options = match command.next() {
        Some(cmd) => ExecOptions {
            cmd,
            args: command.collect(),
            ..ExecOptions::default()
        },
        None => {
            let PtyOptions { cmd, args, .. } = PtyOptions::default();
            ExecOptions {
                cmd,
                args,
                ..ExecOptions::default()
            }
        }
    };
    let options = ExecOptions {
        envs: args.envs.into_iter().collect(),
        cwd: args.cwd,
        user: args.user,
        ..options
    };
    start(&sandbox, options, &mut signals).await
}

/// What a terminal shows cannot be JSON. The parser cannot refuse it, as it does not see a global flag that stands before
/// the subcommand.
pub(super) fn refuse_json(context: &Context) -> Result<(), CliError> {
    if context.json {
        return Err(CliError::Usage(
            "a terminal is no JSON: leave --json out, or use `wrenn sandbox exec --json` without a terminal"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Starts a command in a terminal and connects it to this one.
pub(super) async fn start(
    sandbox: &SandboxHandle,
    options: ExecOptions,
    signals: &mut Signals,
) -> Result<ExitCode, CliError> {
    let (cols, rows) = terminal::size().unwrap_or(UNSEEN);
    let mut envs = options.envs;
    let term = std::env::var("TERM")
        .ok()
        .filter(|term| !term.is_empty() && terminal::is_interactive());
    envs.entry("TERM".to_owned())
        .or_insert_with(|| term.unwrap_or_else(|| "xterm-256color".to_owned()));
    let options = PtyOptions {
        cmd: options.cmd,
        args: options.args,
        cols,
        rows,
        envs,
        cwd: options.cwd,
        user: options.user,
    };
    let pty = tokio::select! {
        pty = sandbox.pty(&options) => pty?,
        interrupt = signals.recv() => return Err(CliError::Interrupted(interrupt)),
    };
    attach(sandbox, pty, Some((cols, rows)), signals).await
}

/// Why the connection to a terminal ended.
enum Left {
    Ended(Ending),
    /// The user typed `~.`.
    Detached,
}

/// Connects this terminal to one in a sandbox, which has been told this size.
async fn attach(
    sandbox: &SandboxHandle,
    mut pty: Pty,
    told: Option<(u32, u32)>,
    signals: &mut Signals,
) -> Result<ExitCode, CliError> {
    let raw = RawMode::enter()?;
    let (detach, detached) = oneshot::channel();
    let typing = tokio::spawn(type_and_resize(pty.writer(), raw.is_some(), told, detach));
    let left = tokio::select! {
        code = show(&mut pty) => code.map(|code| Left::Ended(Ending::Exited(code))),
        Ok(()) = detached => Ok(Left::Detached),
        interrupt = signals.recv() => Ok(Left::Ended(Ending::Interrupted(interrupt))),
    };
    typing.abort();
    drop(raw);
    match left? {
        Left::Ended(ending) => {
            if matches!(ending, Ending::Interrupted(_)) {
                // As closing a terminal's window does.
                let _ = tokio::time::timeout(std::time::Duration::from_secs(2), pty.writer().kill()).await;
            }
            Ok(ExitCode::from(ending.exit_code()))
        }
        Left::Detached => {
            eprintln!(
                "\nleft the terminal running; `wrenn sandbox shell {} --connect {}` comes back to it",
                sandbox.id(),
                pty.tag()
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Shows output until the program ends.
async fn show(pty: &mut Pty) -> Result<i32, CliError> {
    let mut stdout = tokio::io::stdout();
    loop {
        match pty.next().await? {
            Some(PtyEvent::Output(data)) => {
                stdout.write_all(&data).await.map_err(CliError::output)?;
                stdout.flush().await.map_err(CliError::output)?;
            }
            Some(PtyEvent::Exited { code }) => return Ok(code),
            Some(_) => {}
            None => return Ok(0),
        }
    }
}

/// Passes on keys and sizes. Ends when the connection is gone, or with `~.`.
async fn type_and_resize(
    writer: PtyWriter,
    interactive: bool,
    told: Option<(u32, u32)>,
    detach: oneshot::Sender<()>,
) {
    let Ok(mut resized) = signal(SignalKind::window_change()) else {
        return;
    };
    // It may have changed before the signal was listened for, or be another terminal than the last.
    if let Some((cols, rows)) = terminal::size().filter(|size| told != Some(*size))
        && writer.resize(cols, rows).await.is_err()
    {
        return;
    }
    let mut keys = stdin::read();
    let mut typing = true;
    let mut escape = Escape::new();
    loop {
        let sent = tokio::select! {
            typed = keys.recv(), if typing => match typed {
                Some(data) if interactive => {
                    let (through, out) = escape.feed(&data);
                    let sent = writer.write(&through).await;
                    if out {
                        // The other side listens unless it is ending anyway.
                        let _ = detach.send(());
                        return;
                    }
                    sent
                }
                Some(data) => writer.write(&data).await,
                None => {
                    typing = false;
                    writer.write(CTRL_D).await
                }
            },
            Some(()) = resized.recv() => match terminal::size() {
                Some((cols, rows)) => writer.resize(cols, rows).await,
                None => Ok(()),
            },
        };
        if sent.is_err() {
            // The main loop learns the same from the other direction, and says so.
            return;
        }
    }
}
