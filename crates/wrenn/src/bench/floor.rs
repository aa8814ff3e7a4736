//! The floor: QEMU alone, without anything that the platform adds.
//!
//! A bare virtual machine is started from the same image and with the same options as the platform's own: they are
//! read from the command line of a machine that the platform runs, so that both sides always measure the same
//! QEMU. Only the network differs: QEMU's own user-mode stack forwards a port to the guest agent.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use wrenn_proto::guest::ENVD_PORT;

use super::guest::BareGuest;
use super::processes::Vmm;

const LIMIT: Duration = Duration::from_secs(60);
const DISK: &str = "disk.qcow2";
const QMP: &str = "qmp.sock";
const INCOMING: &str = "incoming.sock";

/// All that is needed to start bare machines.
#[derive(Debug)]
pub(super) struct Recipe {
    args: Vec<String>,
    work: PathBuf,
    /// An overlay without any data, copied for each machine.
    overlay: PathBuf,
    /// Device state, when the machines are restored rather than booted.
    state: Option<PathBuf>,
    /// Memory image of the machines.
    memory: PathBuf,
    count: AtomicU32,
}

impl Recipe {
    /// Machines like `vmm`, restored from the image that it was restored from.
    pub(super) async fn restoring(vmm: &Vmm, work: &Path) -> anyhow::Result<Self> {
        let args = vmm.command_line().context("the platform's machine has ended")?;
        let memory = option(&args, "mem-path=").context("the platform's machine has no memory file")?;
        let image = memory
            .parent()
            .context("the memory file has no folder")?
            .to_path_buf();
        std::fs::create_dir_all(work)?;
        let overlay = work.join("empty.qcow2");
        make_overlay(&overlay, &image.join(DISK), "qcow2").await?;
        Ok(Self {
            args,
            work: work.to_path_buf(),
            overlay,
            state: Some(image.join("state.bin")),
            memory,
            count: AtomicU32::new(0),
        })
    }

    /// A machine that boots like `vmm`, which is booting right now.
    pub(super) async fn booting(vmm: &Vmm, work: &Path, rootfs: &Path) -> anyhow::Result<Self> {
        let mut args = vmm.command_line().context("the platform's machine has ended")?;
        std::fs::create_dir_all(work)?;
        // The platform removes its files once the template is made; a second name keeps them.
        let memory = work.join("memory.img");
        let theirs = option(&args, "mem-path=").context("the platform's machine has no memory file")?;
        // It names its files as they are called in the folder where it works.
        let size = std::fs::metadata(vmm.dir.join(&theirs))?.len();
        std::fs::File::create(&memory)?.set_len(size)?;
        for at in 1..args.len() {
            if let flag @ ("-kernel" | "-initrd") = args[at - 1].as_str() {
                let kept = work.join(flag.trim_start_matches('-'));
                std::fs::hard_link(vmm.dir.join(&args[at]), &kept)
                    .context("cannot keep what the machine boots")?;
                args[at] = kept.display().to_string();
            } else {
                args[at] = args[at].replace(&theirs.display().to_string(), &memory.display().to_string());
            }
        }
        let overlay = work.join("empty.qcow2");
        make_overlay(&overlay, rootfs, "raw").await?;
        Ok(Self {
            args,
            work: work.to_path_buf(),
            overlay,
            state: None,
            memory,
            count: AtomicU32::new(0),
        })
    }

    /// The memory image that restored machines share.
    pub(super) fn memory(&self) -> &Path {
        &self.memory
    }

    /// Starts a machine and lets its guest run; the guest may not answer yet.
    pub(super) async fn start(&self) -> anyhow::Result<BareVm> {
        let dir = self
            .work
            .join(self.count.fetch_add(1, Ordering::Relaxed).to_string());
        std::fs::create_dir(&dir)?;
        std::fs::copy(&self.overlay, dir.join(DISK))?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let net = format!(
            "user,id=net0,hostfwd=tcp:127.0.0.1:{port}-{}:{ENVD_PORT}",
            wrenn_host::net::GUEST_IP
        );
        let (program, args) = self.args.split_first().context("an empty command line")?;
        let mut command = Command::new(program);
        let mut is_netdev = false;
        for arg in args {
            command.arg(if is_netdev { &net } else { arg });
            is_netdev = arg == "-netdev";
        }
        let log = std::fs::File::create(dir.join("qemu.log"))?;
        let child = command
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start QEMU")?;
        let mut vm = BareVm {
            guest: BareGuest::new(port)?,
            child,
            qmp: None,
            dir,
        };
        if let Err(error) = vm.run(self.state.as_deref()).await {
            let said = std::fs::read_to_string(vm.dir.join("qemu.log")).unwrap_or_default();
            return Err(error.context(format!("a bare QEMU does not start: {}", said.trim())));
        }
        Ok(vm)
    }
}

/// A machine that belongs to the bench alone. Dropping it ends it.
#[derive(Debug)]
pub(super) struct BareVm {
    pub(super) guest: BareGuest,
    child: Child,
    qmp: Option<Qmp>,
    dir: PathBuf,
}

impl BareVm {
    async fn run(&mut self, state: Option<&Path>) -> anyhow::Result<()> {
        let mut qmp = Qmp::open(&self.dir.join(QMP), &mut self.child).await?;
        if let Some(state) = state {
            qmp.execute("migrate-incoming", json!({ "uri": format!("unix:{INCOMING}") }))
                .await?;
            let mut stream = UnixStream::connect(self.dir.join(INCOMING)).await?;
            stream.write_all(&std::fs::read(state)?).await?;
            drop(stream);
            let deadline = Instant::now() + LIMIT;
            loop {
                let answer = qmp.execute("query-status", json!({})).await?;
                match answer.get("status").and_then(Value::as_str) {
                    Some("inmigrate") if Instant::now() < deadline => {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    Some("paused" | "prelaunch") => break,
                    other => bail!("restoring ended in status {other:?}"),
                }
            }
            qmp.execute("cont", json!({})).await?;
        }
        self.qmp = Some(qmp);
        Ok(())
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Stops the guest and writes its device state.
    pub(super) async fn freeze(&mut self) -> anyhow::Result<()> {
        let qmp = self.qmp.as_mut().context("the machine was never started")?;
        qmp.execute("stop", json!({})).await?;
        let file = json!({ "filename": "frozen.bin", "live": true });
        qmp.execute("xen-save-devices-state", file).await?;
        Ok(())
    }

    /// Ends the machine and removes its files.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        self.child.kill().await?;
        Ok(std::fs::remove_dir_all(&self.dir)?)
    }
}

/// QEMU's control socket.
#[derive(Debug)]
struct Qmp {
    lines: Lines<BufReader<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
}

impl Qmp {
    async fn open(path: &Path, child: &mut Child) -> anyhow::Result<Self> {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => {}
            }
            if let Some(status) = child.try_wait()? {
                bail!("it ended ({status})");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            lines: BufReader::new(reader).lines(),
            writer,
        };
        qmp.line().await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    async fn line(&mut self) -> anyhow::Result<Value> {
        let line = tokio::time::timeout(LIMIT, self.lines.next_line())
            .await
            .context("QEMU does not answer")??;
        Ok(serde_json::from_str(&line.context("QEMU ended")?)?)
    }

    async fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let message = json!({ "execute": command, "arguments": arguments }).to_string();
        self.writer.write_all(message.as_bytes()).await?;
        loop {
            let mut answer = self.line().await?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused '{command}': {error}");
            }
            // Events come in between.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}

/// The value of `name=` in one of the options' comma-separated parts.
fn option(args: &[String], name: &str) -> Option<PathBuf> {
    args.iter()
        .flat_map(|arg| arg.split(','))
        .find_map(|part| part.strip_prefix(name))
        .map(PathBuf::from)
}

async fn make_overlay(overlay: &Path, backing: &Path, format: &str) -> anyhow::Result<()> {
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
        .args([backing, overlay])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .context("cannot run qemu-img")?;
    if !status.success() {
        bail!("qemu-img could not make an overlay of {}", backing.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_inside_arguments() {
        let args = ["-object", "memory-backend-file,id=ram0,mem-path=/a/b,share=off"].map(str::to_owned);
        assert_eq!(option(&args, "mem-path="), Some(PathBuf::from("/a/b")));
        assert_eq!(option(&args, "file.filename="), None);
    }
}
