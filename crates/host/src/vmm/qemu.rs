//! QEMU: the command line, and the steps by which a VM is booted, saved and restored.
//!
//! Memory is a file. A template boots with the file mapped *shared*, so that the file is the memory; a clone maps
//! it *privately*, so that its pages are copy-on-write against the page cache. Hence device state is all that
//! has to be saved (`xen-save-devices-state`: despite its name it is in every build and writes the state of all
//! devices without RAM, some 60 KB) and all that has to be loaded (`migrate-incoming`).
//! `migration.send-configuration=off` makes both ends agree on that stream's header. A restored VM needs no
//! kernel on its command line: what the kernel image once put into memory is in the memory file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use serde_json::json;
use tokio::net::UnixStream;

use super::folder;
use super::limits::{Limits, MemoryCgroup};
use super::process::VmmProcess;
use super::qmp::Qmp;
use super::{Accelerator, Platform, Shape};
use crate::error::{HostError, IoContext as _, Result};
use crate::layout::VmDir;
use crate::memory::MappedMemory;
use crate::net;

/// The QEMU that this host has.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The program.
    pub binary: PathBuf,
    /// Major, minor, micro.
    pub version: (u32, u32, u32),
    /// How it will run guests.
    pub accelerator: Accelerator,
    /// Host CPU model, part of the platform under KVM.
    pub host_cpu: String,
    /// Where per-VM memory groups are made.
    pub cgroup: MemoryCgroup,
    /// When the agent runs as root: the ids of VM processes and images.
    pub vm_ids: Option<VmIds>,
}

/// User and group ids for VM processes; they need no entry in the host's user database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmIds {
    /// Group of all VM processes. It may read the images of the built-in template, in which there is nothing of anybody.
    pub gid: u32,
    /// User id of slot 0.
    pub first_uid: u32,
    /// The first of the groups that may read the images of one template each; up to [`Self::TEMPLATES`] follow.
    pub first_template_gid: u32,
}

impl VmIds {
    /// Templates that have a group of their own at one time.
    pub const TEMPLATES: u32 = 1_000_000;

    /// The groups of templates.
    pub(crate) fn template_gids(self) -> std::ops::Range<u32> {
        self.first_template_gid..self.first_template_gid.saturating_add(Self::TEMPLATES)
    }
}

/// Kernel and command line of a VM that boots.
#[derive(Debug)]
pub(crate) struct BootSource<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) cmdline: &'a str,
}

/// What a VM is started with.
#[derive(Debug)]
pub(crate) struct LaunchSpec<'a> {
    pub(crate) dir: &'a VmDir,
    /// Also the name of its memory group.
    pub(crate) name: &'a str,
    pub(crate) slot: u32,
    pub(crate) shape: Shape,
    pub(crate) disk_mb: u32,
    pub(crate) memory: &'a Path,
    /// Groups by which the process may read the images that the VM stands on.
    pub(crate) groups: Vec<u32>,
    /// Present: boot, with the memory file shared. Absent: wait for a device state, with the memory file private.
    pub(crate) boot: Option<BootSource<'a>>,
}

impl LaunchSpec<'_> {
    fn limits(&self) -> Limits {
        Limits {
            memory_mb: self.shape.memory_mb,
            disk_mb: self.disk_mb,
        }
    }
}

impl Qemu {
    /// Finds QEMU and its version.
    ///
    /// # Errors
    /// When it is missing, too old, or does not tell its version.
    pub fn find(accelerator: Accelerator, cgroup: MemoryCgroup, vm_ids: Option<VmIds>) -> Result<Self> {
        let binary = PathBuf::from("qemu-system-x86_64");
        let program = "qemu-system-x86_64";
        let output = Command::new(&binary)
            .arg("--version")
            .output()
            .map_err(|error| HostError::Program {
                program,
                detail: format!("cannot run it ({error}); install the package qemu-system-x86"),
            })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = parse_version(&text).ok_or_else(|| HostError::Program {
            program,
            detail: format!(
                "it does not tell its version: {}",
                text.lines().next().unwrap_or("no output")
            ),
        })?;
        if version < (7, 2, 0) {
            return Err(HostError::Program {
                program,
                detail: format!(
                    "version {}.{}.{} is too old; 7.2 or newer is needed",
                    version.0, version.1, version.2
                ),
            });
        }
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let host_cpu = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
            .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned());
        Ok(Self {
            binary,
            version,
            accelerator,
            host_cpu,
            cgroup,
            vm_ids,
        })
    }

    /// What memory images made here depend on.
    #[must_use]
    pub fn platform(&self) -> Platform {
        let (major, minor, micro) = self.version;
        Platform {
            vmm: "qemu".to_owned(),
            version: format!("{major}.{minor}.{micro}"),
            accelerator: self.accelerator,
            cpu: match self.accelerator {
                Accelerator::Tcg => "max".to_owned(),
                Accelerator::Kvm => format!("host: {}", self.host_cpu),
            },
            // A fixed version of the machine, which later releases keep: paused sandboxes survive an upgrade of QEMU.
            // ACPI and HPET: without them a guest finds one processor, and may find no timer to calibrate its clock by.
            machine: "pc-i440fx-7.2,acpi=on,hpet=on".to_owned(),
        }
    }

    /// The processor as QEMU is asked for it. What it says of itself may change between versions of this agent, what
    /// it can execute may not ([`Self::platform`]).
    pub(crate) fn cpu_model(&self) -> &'static str {
        match self.accelerator {
            // Kernel and C library copy byte by byte on a processor that calls this fast, and each byte is a round of
            // the emulation; without the promise they copy words. Uploads take little more than half the time.
            Accelerator::Tcg => "max,-erms,-fsrm",
            Accelerator::Kvm => "host,migratable=on",
        }
    }

    /// From 8.2 on a private mapping's file can be opened read-only.
    pub(crate) fn maps_read_only(&self) -> bool {
        self.version >= (8, 2, 0)
    }

    fn command(&self, spec: &LaunchSpec<'_>) -> Command {
        let booting = spec.boot.is_some();
        let platform = self.platform();
        let mut groups = spec.groups.clone();
        if self.accelerator == Accelerator::Kvm {
            // The device belongs to a group of its own on most systems.
            groups.push(kvm_group());
        }
        let mut command = self.confined(spec.slot, &groups);
        command
            .args(self.cgroup.resource_limits(spec.limits()))
            .arg(&self.binary);
        let mut arg = |flag: &str, value: String| {
            command.arg(flag).arg(value);
        };
        arg(
            "-machine",
            format!("{},memory-backend=ram0,suppress-vmdesc=on", platform.machine),
        );
        match self.accelerator {
            // The translation cache is the largest part of an idle VM's private memory.
            Accelerator::Tcg => {
                arg("-accel", "tcg,thread=multi,tb-size=64".to_owned());
            }
            Accelerator::Kvm => arg("-accel", "kvm".to_owned()),
        }
        arg("-cpu", self.cpu_model().to_owned());
        arg("-smp", spec.shape.vcpus.to_string());
        arg("-m", format!("{}M", spec.shape.memory_mb));
        let sharing = match (booting, self.maps_read_only()) {
            (true, _) => "share=on",
            (false, true) => "share=off,readonly=on,rom=off",
            (false, false) => "share=off",
        };
        arg(
            "-object",
            format!(
                "memory-backend-file,id=ram0,size={}M,mem-path={},{sharing}",
                spec.shape.memory_mb,
                escape(&spec.memory.to_string_lossy())
            ),
        );
        arg("-bios", "qboot.rom".to_owned());
        arg("-display", "none".to_owned());
        // A chatty guest writes into a socket that the agent reads, never into a file that grows.
        arg(
            "-chardev",
            format!("socket,id=con0,path={},server=on,wait=off", VmDir::CONSOLE),
        );
        arg("-serial", "chardev:con0".to_owned());
        arg(
            "-blockdev",
            format!(
                "driver=qcow2,node-name=disk0,discard=unmap,detect-zeroes=unmap,\
                 file.driver=file,file.filename={},file.discard=unmap,file.locking=off",
                VmDir::DISK
            ),
        );
        // A full host disk must reach the guest as an error; the default would stop the VM behind everybody's back.
        arg(
            "-device",
            "virtio-blk-pci,drive=disk0,romfile=,werror=report,rerror=report".to_owned(),
        );
        arg(
            "-netdev",
            format!("stream,id=net0,server=on,addr.type=unix,addr.path={}", VmDir::NET),
        );
        arg(
            "-device",
            format!(
                "virtio-net-pci,netdev=net0,mac={},romfile=",
                net::GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":")
            ),
        );
        arg("-qmp", format!("unix:{},server=on,wait=off", VmDir::QMP));
        arg("-global", "migration.send-configuration=off".to_owned());
        // No switch has to learn where the guest is.
        arg("-global", "migration.announce-rounds=0".to_owned());
        arg(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned(),
        );
        match &spec.boot {
            Some(boot) => {
                arg("-kernel", boot.kernel.to_string_lossy().into_owned());
                arg("-initrd", boot.initramfs.to_string_lossy().into_owned());
                arg("-append", boot.cmdline.to_owned());
            }
            None => {
                arg("-incoming", "defer".to_owned());
                command.arg("-S");
            }
        }
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.current_dir(spec.dir.work());
        command
    }

    /// The begin of a command that runs as the user of a place, in these groups beside that of all VMs; the program and
    /// its limits follow. Each part sets something on itself and becomes the program behind it.
    fn confined(&self, slot: u32, groups: &[u32]) -> Command {
        let Some(ids) = self.vm_ids else {
            return Command::new("prlimit");
        };
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={}", ids.first_uid + slot))
            .arg(format!("--regid={}", ids.gid));
        if groups.is_empty() {
            command.arg("--clear-groups");
        } else {
            let groups: Vec<String> = groups.iter().map(u32::to_string).collect();
            command.arg(format!("--groups={}", groups.join(",")));
        }
        command.args(["--no-new-privs", "prlimit"]);
        command
    }

    /// Puts a disk, alone in a VM's folder, on another backing disk, so that those between are no longer needed. A disk is
    /// its guest's work, so this runs with no more rights than the VM had.
    pub(crate) async fn rebase(
        &self,
        dir: &VmDir,
        slot: u32,
        groups: &[u32],
        backing: &Path,
        disk_mb: u32,
    ) -> Result<()> {
        if let Some(ids) = self.vm_ids {
            folder::hand_over(&dir.work(), ids.first_uid + slot, ids.gid)?;
        }
        let mut command = self.confined(slot, groups);
        command
            .args([
                "--core=0",
                &format!("--fsize={}", (u64::from(disk_mb) << 20) * 5 / 4),
            ])
            .args(["qemu-img", "rebase", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(backing)
            .arg(VmDir::DISK)
            .current_dir(dir.work());
        let outcome = crate::template::run("qemu-img", &mut command.into()).await;
        folder::take_back(&dir.work())?;
        outcome.map(drop)
    }

    /// Starts the process and greets it; nothing runs in the guest yet, unless it boots.
    ///
    /// # Errors
    /// After an error nothing is left but the directory's files.
    pub(crate) async fn launch(&self, spec: &LaunchSpec<'_>) -> Result<Launched> {
        if let Some(ids) = self.vm_ids {
            folder::hand_over(&spec.dir.work(), ids.first_uid + spec.slot, ids.gid)?;
        }
        let log = spec.dir.vmm_log();
        let stderr = std::fs::File::create(&log).at("create a log", &log)?;
        let mut command = self.command(spec);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let process = VmmProcess::spawn(&mut command)?;
        let mut launched = Launched {
            vm: Vm {
                process,
                qmp: None,
                group: Group {
                    cgroup: self.cgroup.clone(),
                    name: spec.name.to_owned(),
                },
            },
            shape: spec.shape,
        };
        let outcome = match self
            .cgroup
            .confine(spec.name, launched.vm.process.pid(), spec.limits())
        {
            Ok(()) => launched.greet(spec.dir).await,
            Err(error) => Err(HostError::Vmm(format!(
                "cannot limit the memory of the VM's process: {error}"
            ))),
        };
        match outcome {
            Ok(()) => Ok(launched),
            Err(error) => Err(launched.vm.explain(spec.dir, error).await),
        }
    }

    /// Takes over a VM that an earlier agent started.
    pub(crate) async fn adopt(&self, name: &str, id: super::process::ProcessId, dir: &VmDir) -> Option<Vm> {
        let process = VmmProcess::adopt(id)?;
        let mut vm = Vm {
            process,
            qmp: None,
            group: Group {
                cgroup: self.cgroup.clone(),
                name: name.to_owned(),
            },
        };
        match connect_control(&mut vm.process, dir).await {
            Ok(qmp) => {
                vm.qmp = Some(qmp);
                Some(vm)
            }
            Err(error) => {
                tracing::warn!(vm = name, %error, "a VM found running does not answer; killing it");
                vm.kill().await;
                None
            }
        }
    }
}

/// A process that is up with its memory mapped. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Launched {
    vm: Vm,
    shape: Shape,
}

impl Launched {
    async fn greet(&mut self, dir: &VmDir) -> Result<()> {
        self.vm.qmp = Some(connect_control(&mut self.vm.process, dir).await?);
        Ok(())
    }

    /// The process's private view of the memory image it was started with.
    pub(crate) fn memory(&self, image: &Path) -> Result<MappedMemory> {
        self.vm.memory(image, self.shape)
    }

    /// For a VM that boots: it runs already.
    pub(crate) fn booted(self) -> Vm {
        self.vm
    }

    /// Loads the device state; the guest is stopped at the instruction where it was saved.
    pub(crate) async fn load(mut self, dir: &VmDir, state: &Path) -> Result<Vm> {
        match self.vm.load(dir, state).await {
            Ok(()) => Ok(self.vm),
            Err(error) => Err(self.vm.explain(dir, error).await),
        }
    }
}

/// A VM with all its devices. Dropping it ends it, unless it is to outlive the agent.
#[derive(Debug)]
pub(crate) struct Vm {
    process: VmmProcess,
    qmp: Option<Qmp>,
    group: Group,
}

/// A VM's memory group; removed with the VM. A field after the process, since it can be removed only after that.
#[derive(Debug)]
struct Group {
    cgroup: MemoryCgroup,
    name: String,
}

impl Drop for Group {
    fn drop(&mut self) {
        // Refused, and rightly so, while a process that outlives the agent is in it.
        self.cgroup.remove(&self.name);
    }
}

impl Vm {
    fn qmp(&mut self) -> Result<&mut Qmp> {
        self.qmp
            .as_mut()
            .ok_or_else(|| HostError::Vmm("its control socket is gone".to_owned()))
    }

    /// Name of its memory group.
    pub(crate) fn name(&self) -> &str {
        &self.group.name
    }

    /// From now on it is in the journal, and goes on when the agent ends.
    pub(crate) fn outlive_agent(&mut self) {
        self.process.outlive_agent();
    }

    pub(crate) fn process_id(&self) -> super::process::ProcessId {
        self.process.id()
    }

    async fn load(&mut self, dir: &VmDir, state: &Path) -> Result<()> {
        // Through a socket rather than QEMU's `file:`, which releases before 8.2 lack; and so QEMU needs no access
        // to the template's folder for it.
        let bytes = std::fs::read(state).at("read", state)?;
        self.qmp()?
            .execute(
                "migrate-incoming",
                json!({ "uri": format!("unix:{}", VmDir::INCOMING) }),
            )
            .await?;
        let mut stream = connect_in(dir, VmDir::INCOMING)
            .await
            .map_err(|error| HostError::Vmm(format!("QEMU does not take its device state: {error}")))?;
        // A failure to write shows in the status below, with QEMU's reason in its log.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, &bytes).await;
        drop(stream);
        let started = Instant::now();
        loop {
            let status = self.status().await?;
            match status.as_str() {
                "inmigrate" if started.elapsed() < Duration::from_secs(60) => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                "paused" | "prelaunch" => break,
                other => {
                    return Err(HostError::Vmm(format!(
                        "loading the device state ended in status '{other}'"
                    )));
                }
            }
        }
        // QEMU removes the socket itself, some versions only after a while.
        let _ = std::fs::remove_file(dir.work().join(VmDir::INCOMING));
        Ok(())
    }

    async fn status(&mut self) -> Result<String> {
        let answer = self.qmp()?.execute("query-status", json!({})).await?;
        Ok(answer
            .get("status")
            .and_then(|status| status.as_str())
            .unwrap_or_default()
            .to_owned())
    }

    /// Waits until QEMU has taken the connection to its network socket that was just made. Before that its end of the
    /// wire is half open, and a packet of the guest ends the process (seen with 10.0: it writes to a channel that is
    /// not there yet).
    pub(crate) async fn wire_taken(&mut self) -> Result<()> {
        self.qmp()?.event("NETDEV_STREAM_CONNECTED").await
    }

    /// Ends a VM over `error`, and adds how its process ended and what it said.
    pub(crate) async fn explain(mut self, dir: &VmDir, error: HostError) -> HostError {
        // One that lost its control socket is about to end by itself; its own reason is worth a moment.
        let ended = tokio::time::timeout(Duration::from_millis(500), self.exited())
            .await
            .ok();
        self.kill().await;
        let ended = ended.map(|exit| format!("; QEMU ended with {exit}"));
        let said = match last_words(dir).as_str() {
            "" => None,
            said => Some(format!("; QEMU said: {said}")),
        };
        match (ended, said) {
            (None, None) => error,
            (ended, said) => HostError::Vmm(format!(
                "{error}{}{}",
                ended.unwrap_or_default(),
                said.unwrap_or_default()
            )),
        }
    }

    /// Lets the guest run.
    pub(crate) async fn cont(&mut self) -> Result<()> {
        self.qmp()?.execute("cont", json!({})).await.map(drop)
    }

    /// Lets a guest go on that was stopped for a moment, over a new control connection if need be.
    ///
    /// # Errors
    /// When it stands still for good.
    pub(crate) async fn go_on(&mut self, dir: &VmDir) -> Result<()> {
        let mut outcome = self.cont().await;
        for _ in 0..2 {
            if outcome.is_ok() {
                break;
            }
            // QEMU takes a new connection once the old one is closed.
            self.qmp = None;
            outcome = match connect_control(&mut self.process, dir).await {
                Ok(qmp) => {
                    self.qmp = Some(qmp);
                    self.cont().await
                }
                Err(error) => Err(error),
            };
        }
        outcome
    }

    /// Stops the guest between two instructions, after its disk writes in flight.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        self.qmp()?.execute("stop", json!({})).await.map(drop)
    }

    /// Whether the guest runs (an adopted VM may have been stopped in the middle of something).
    pub(crate) async fn is_running(&mut self) -> Result<bool> {
        Ok(self.status().await? == "running")
    }

    /// Writes the device state of a stopped guest into its own directory under `file`.
    pub(crate) async fn save_state(&mut self, file: &str) -> Result<()> {
        self.qmp()?
            .execute(
                "xen-save-devices-state",
                json!({ "filename": file, "live": true }),
            )
            .await
            .map(drop)
    }

    /// Grows the guest's disk; the guest learns of it at once.
    pub(crate) async fn resize_disk(&mut self, bytes: u64) -> Result<()> {
        self.qmp()?
            .execute("block_resize", json!({ "node-name": "disk0", "size": bytes }))
            .await
            .map(drop)
    }

    /// The process's view of the image it was started with.
    pub(crate) fn memory(&self, image: &Path, shape: Shape) -> Result<MappedMemory> {
        MappedMemory::of_process(self.process.pid(), image, u64::from(shape.memory_mb) << 20)
            .at("find the memory mapping of", image)
    }

    /// Waits for the end of the process.
    pub(crate) async fn exited(&mut self) -> super::process::Exit {
        self.process.exited().await
    }

    /// Ends the process, also one that would outlive the agent; the disk is left as the guest left it.
    pub(crate) async fn kill(mut self) {
        self.process.kill().await;
    }
}

/// Connects to a socket in a VM's directory, whatever the length of the directory's path.
pub(crate) async fn connect_in(dir: &VmDir, socket: &str) -> std::io::Result<UnixStream> {
    use std::os::fd::AsRawFd as _;
    // A socket address holds 108 bytes; the descriptor's name under /proc is short.
    let directory = rustix::fs::open(
        dir.work(),
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    UnixStream::connect(format!("/proc/self/fd/{}/{socket}", directory.as_raw_fd())).await
}

async fn connect_control(process: &mut VmmProcess, dir: &VmDir) -> Result<Qmp> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let stream = loop {
        match connect_in(dir, VmDir::QMP).await {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => {
                return Err(HostError::Vmm(format!(
                    "QEMU's control socket does not appear: {error}"
                )));
            }
            Err(_) => {}
        }
        tokio::select! {
            exit = process.exited() => return Err(HostError::Vmm(format!("QEMU ended at its start ({exit})"))),
            () = tokio::time::sleep(Duration::from_millis(2)) => {}
        }
    };
    Qmp::handshake(stream).await
}

fn kvm_group() -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/dev/kvm").map_or(0, |meta| meta.gid())
}

/// A comma ends an option's value unless doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let version = text.split_once("version ")?.1;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((
        numbers.next()?.ok()?,
        numbers.next()?.ok()?,
        numbers.next()?.unwrap_or(0),
    ))
}

/// What QEMU said last on stderr. Its log may be long: a guest has ways to make it complain.
pub(crate) fn last_words(dir: &VmDir) -> String {
    use std::os::unix::fs::FileExt as _;
    const KEEP: usize = 600;
    let read = || {
        let file = std::fs::File::open(dir.vmm_log())?;
        let length = file.metadata()?.len();
        let start = length.saturating_sub(KEEP as u64 + 4);
        let mut bytes = vec![0; usize::try_from(length - start).unwrap_or(0)];
        file.read_exact_at(&mut bytes, start)?;
        Ok::<_, std::io::Error>(bytes)
    };
    let bytes = read().unwrap_or_default();
    tail(String::from_utf8_lossy(&bytes).trim(), KEEP).to_owned()
}

/// The last `limit` bytes, from a character's start on.
pub(crate) fn tail(text: &str, limit: usize) -> &str {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(
            parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"),
            Some((10, 0, 2))
        );
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian)"),
            Some((7, 2, 22))
        );
        assert_eq!(parse_version("nonsense"), None);
    }

    #[test]
    fn tails_start_at_characters() {
        assert_eq!(tail("aé", 1), "");
        assert_eq!(tail("aé", 2), "é");
        assert_eq!(tail("aé", 9), "aé");
    }
}
