//! The steps that take a sandbox's VM from one state to the next, each with its undo.
//!
//! **Saving** writes beside what is there and renames at the end; until the journal says "paused" the guest can
//! simply go on. **Resuming** is free of consequences until the guest runs its first instruction: the journal says
//! "running" right before that, because from there on the disk moves away from the saved memory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use wrenn_proto::guest::InitRequest;
use wrenn_proto::id::{SandboxId, TeamId, TemplateId};

use super::console::Console;
use super::journal::{Phase, Record};
use super::slots::Slot;
use super::{Shared, Step};
use crate::disk::{BackingFormat, copy_open, copy_sparse, create_overlay};
use crate::error::{HostError, IoContext as _, Result};
use crate::guest::GuestClient;
use crate::layout::{ImageDir, VmDir};
use crate::memory::{self, FlatImage, Saved};
use crate::net::{EgressPolicy, LinkTask, UserNet};
use crate::offload::{blocking, remove_folder};
use crate::template::Image;
use crate::template::store::Manifest;
use crate::vmm::folder;
use crate::vmm::qemu::{LaunchSpec, Vm};

/// What a running sandbox holds. Dropping it leaves the VM running.
pub(crate) struct Running {
    pub(crate) vm: Vm,
    pub(crate) guest: GuestClient,
    pub(crate) console: Console,
    pub(crate) image: Image,
    /// Its number is the VM's as long as this lives.
    _slot: Slot,
    pub(crate) wire: Wire,
    /// Why its guest, which was stopped for a moment, could not be let go on.
    pub(crate) stuck: Option<String>,
}

impl Running {
    /// Ends the VM. Its number is free once it is gone.
    pub(crate) async fn end(self) {
        self.vm.kill().await;
    }

    /// Ends a moment for which the guest was stopped. Its clock stood still with it.
    async fn go_on(&mut self, shared: &Shared, dir: &VmDir, id: SandboxId) -> Result<()> {
        match self.vm.go_on(dir).await {
            Ok(()) => {
                let guest = self.guest.clone();
                shared
                    .tasks
                    .spawn(async move { tell_time(&guest, id, Duration::from_secs(5)).await });
                Ok(())
            }
            Err(error) => {
                self.stuck = Some(error.to_string());
                Err(error)
            }
        }
    }
}

/// The host's end of a VM's network.
pub(crate) struct Wire {
    net: UserNet,
    /// `None` while it is broken.
    task: Option<LinkTask>,
}

/// A broken wire is connected again this often.
const RECONNECT: Duration = Duration::from_secs(1);

impl Wire {
    /// Waits until the wire has to be connected (again). Safe to drop and call again.
    pub(crate) async fn broken(&mut self) {
        match &mut self.task {
            Some(task) => {
                let end = task.ended().await;
                self.task = None;
                tracing::warn!(?end, "a guest's network ended");
            }
            None => tokio::time::sleep(RECONNECT).await,
        }
    }
}

/// Connects the host to a VM that is up: console and network.
async fn attach(shared: &Shared, dir: &VmDir) -> Result<(Console, Wire)> {
    let console = Console::attach(dir).await;
    Ok((console, wire(shared, dir).await?))
}

async fn wire(shared: &Shared, dir: &VmDir) -> Result<Wire> {
    let (net, task) = link(dir, shared.policy.clone()).await?;
    let task = Some(task);
    Ok(Wire { net, task })
}

/// Connects a running sandbox's network again. What went over the old connection is lost.
pub(crate) async fn reconnect(
    shared: &Shared,
    dir: &VmDir,
    record: &Record,
    running: &mut Running,
) -> Result<()> {
    running.wire = wire(shared, dir).await?;
    running.guest = GuestClient::new(&running.wire.net, &record.token);
    Ok(())
}

/// Connects the host to a VM that has not run since its process started.
async fn attach_first(shared: &Shared, dir: &VmDir, vm: &mut Vm) -> Result<(Console, Wire)> {
    let attached = attach(shared, dir).await?;
    vm.wire_taken().await?;
    Ok(attached)
}

/// Connects to the guest end of a VM's wire and serves it.
pub(crate) async fn link(dir: &VmDir, policy: EgressPolicy) -> Result<(UserNet, LinkTask)> {
    let stream = crate::vmm::qemu::connect_in(dir, VmDir::NET)
        .await
        .map_err(|error| HostError::Vmm(format!("its network socket does not answer: {error}")))?;
    Ok(UserNet::start(stream, crate::net::UserNetConfig::new(policy)))
}

/// A VM with its memory and devices restored, its guest standing still, and all that the host holds of it.
/// Dropping it ends the VM.
pub(crate) struct Restored {
    vm: Vm,
    console: Console,
    image: Image,
    slot: Slot,
    wire: Wire,
}

/// Creates a sandbox's VM from an image, in the folder `dir` that the caller made and removes on failure.
pub(crate) async fn create(
    shared: &Arc<Shared>,
    dir: &VmDir,
    record: &mut Record,
    image: Image,
) -> Result<Running> {
    shared.step(Step::Journal)?;
    record.phase = Phase::Starting;
    record.write(dir)?;
    let restored = restore(shared, dir, image, record.disk_mb).await?;
    greet(shared, dir, record, restored).await
}

/// Brings up a VM from an image, up to but without its first instruction, with a disk that may grow to `disk_mb`.
/// On failure only files are left in `dir`.
pub(crate) async fn restore(shared: &Shared, dir: &VmDir, image: Image, disk_mb: u32) -> Result<Restored> {
    shared.step(Step::Slot)?;
    let slot = shared.slots.take()?;
    shared.step(Step::Disk)?;
    let bytes = u64::from(image.manifest.disk_mb) << 20;
    create_overlay(&dir.disk(), bytes, &image.dir.disk(), BackingFormat::Qcow2)?;
    shared.step(Step::Launch)?;
    let launched = shared
        .qemu
        .launch(&launch_spec(shared, dir, disk_mb, &image, &slot)?)
        .await?;
    shared.step(Step::Restore)?;
    let mut vm = launched.load(dir, &image.dir.state()).await?;
    shared.step(Step::Network)?;
    let (console, wire) = attach_first(shared, dir, &mut vm).await?;
    Ok(Restored {
        vm,
        console,
        image,
        slot,
        wire,
    })
}

/// Makes a restored VM the sandbox of `record`, whose folder is `dir` by now. On failure the VM is gone.
pub(crate) async fn greet(
    shared: &Shared,
    dir: &VmDir,
    record: &mut Record,
    restored: Restored,
) -> Result<Running> {
    let Restored {
        mut vm,
        console,
        image,
        slot,
        wire,
    } = restored;
    let grow = record.disk_mb > image.manifest.disk_mb;
    shared.step(Step::Run)?;
    vm.cont().await?;
    if grow {
        // Not before it runs: until then QEMU takes the disk for another process's.
        vm.resize_disk(u64::from(record.disk_mb) << 20).await?;
    }
    shared.step(Step::Greet)?;
    // The restored agent still believes in the token with which it was frozen.
    let frozen = GuestClient::new(&wire.net, &image.manifest.token);
    let entropy: [u8; 256] = random()?;
    let machine_id: [u8; 16] = random()?;
    let request = InitRequest {
        timestamp: Some(jiff::Timestamp::now().to_string()),
        env_vars: Some(record.envs.clone()),
        access_token: Some(record.token.clone()),
        hostname: Some(hostname(record)),
        machine_id: Some(hex::encode(machine_id)),
        entropy: Some(base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            entropy,
        )),
        default_user: Some(image.manifest.default_user.clone()),
        grow_root: grow,
        ..Default::default()
    };
    tokio::select! {
        outcome = frozen.init(&request) => outcome?,
        exit = vm.exited() => {
            return Err(HostError::Vmm(format!("it ended at its start ({exit}): {}", console.tail())));
        }
    }
    shared.step(Step::Finish)?;
    record.phase = running_phase(&vm, &slot);
    record.write(dir)?;
    vm.outlive_agent();
    let guest = GuestClient::new(&wire.net, &record.token);
    Ok(Running {
        vm,
        guest,
        console,
        image,
        _slot: slot,
        wire,
        stuck: None,
    })
}

fn running_phase(vm: &Vm, slot: &Slot) -> Phase {
    Phase::Running {
        process: vm.process_id(),
        slot: slot.number(),
        vm: vm.name().to_owned(),
    }
}

impl Restored {
    /// Lets the guest do once what every sandbox does first, then stops it again: under emulation the first run of any
    /// code costs many times the second.
    pub(crate) async fn warm_up(&mut self) -> Result<()> {
        self.vm.cont().await?;
        let guest = GuestClient::new(&self.wire.net, &self.image.manifest.token);
        let warm = async {
            guest.wait_healthy(Duration::from_secs(60)).await?;
            for (command, args) in [("/bin/true", &[][..]), ("/bin/sh", &["-c", "echo warm"])] {
                let spec = wrenn_proto::hostagent::ProcessSpec {
                    cmd: command.to_owned(),
                    args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                    ..Default::default()
                };
                guest.collect(spec, Some(Duration::from_secs(60)), 0).await?;
            }
            Ok(())
        };
        tokio::select! {
            outcome = warm => outcome?,
            exit = self.vm.exited() => {
                return Err(HostError::Vmm(format!("it ended while warming up ({exit}): {}", self.console.tail())));
            }
        }
        self.vm.stop().await
    }
}

fn launch_spec<'a>(
    shared: &Shared,
    dir: &'a VmDir,
    disk_mb: u32,
    image: &'a Image,
    slot: &Slot,
) -> Result<LaunchSpec<'a>> {
    Ok(LaunchSpec {
        name: dir
            .path()
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("vm"),
        dir,
        slot: slot.number(),
        shape: image.manifest.shape,
        disk_mb,
        memory: image.memory_path(),
        groups: shared.templates.groups(image)?,
        boot: None,
    })
}

/// `sandbox-` and the last digits of the id: unique, and short enough for a prompt.
fn hostname(record: &Record) -> String {
    let digits = record.id.0.simple().to_string();
    format!("sandbox-{}", &digits[digits.len() - 8..])
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| HostError::Vmm(format!("the host has no random bytes: {error}")))?;
    Ok(bytes)
}

/// Finds the VM of a sandbox again after the agent was away.
pub(crate) async fn adopt(
    shared: &Shared,
    dir: &VmDir,
    record: &Record,
    process: crate::vmm::process::ProcessId,
    name: &str,
    slot: Slot,
) -> Result<Running> {
    let image = shared.templates.image_at(&record.image)?;
    let mut vm = shared.qemu.adopt(name, process, dir).await.ok_or_else(|| {
        HostError::Vmm("the virtual machine ended while the host agent was away".to_owned())
    })?;
    for leftover in [dir.partial_state(), dir.partial_memory()] {
        let _ = std::fs::remove_file(leftover);
    }
    let attached = async {
        let attached = attach(shared, dir).await?;
        // It may have been stopped in the middle of a pause or snapshot that nobody was told of, …
        if !vm.is_running().await? {
            vm.go_on(dir).await?;
        }
        Ok(attached)
    }
    .await;
    match attached {
        Ok((console, wire)) => {
            let guest = GuestClient::new(&wire.net, &record.token);
            // … or its programs held for one.
            let (told, id) = (guest.clone(), record.id);
            shared
                .tasks
                .spawn(async move { tell_time(&told, id, Duration::from_secs(5)).await });
            Ok(Running {
                vm,
                guest,
                console,
                image,
                _slot: slot,
                wire,
                stuck: None,
            })
        }
        Err(error) => {
            vm.kill().await;
            Err(error)
        }
    }
}

/// Saves memory and device state and journals it. On failure the guest goes on.
pub(crate) async fn save(
    shared: &Arc<Shared>,
    dir: &VmDir,
    record: &mut Record,
    running: &mut Running,
) -> Result<Saved> {
    let before = record.phase.clone();
    let outcome = async {
        hold_programs(&running.guest, record.id).await;
        // Part of what is undone: a stop whose answer does not come in time may still happen.
        running.vm.stop().await?;
        shared.step(Step::Save)?;
        let saved = write_state(dir, record, running).await?;
        shared.step(Step::SaveFinish)?;
        folder::take_state(&dir.partial_state(), &dir.state())?;
        let memory = dir.memory_diff();
        std::fs::rename(dir.partial_memory(), &memory).at("move into place", &memory)?;
        record.phase = Phase::Paused;
        record.write(dir)?;
        Ok(saved)
    }
    .await;
    if outcome.is_err() {
        record.phase = before;
        for leftover in [
            dir.partial_state(),
            dir.partial_memory(),
            dir.state(),
            dir.memory_diff(),
        ] {
            let _ = std::fs::remove_file(leftover);
        }
        running.go_on(shared, dir, record.id).await?;
    }
    outcome
}

/// What keeps a paused sandbox, for [`crate::disk::sync`].
pub(crate) fn kept_files(dir: &VmDir) -> Vec<PathBuf> {
    vec![
        dir.disk(),
        dir.state(),
        dir.memory_diff(),
        dir.journal(),
        dir.path().to_path_buf(),
    ]
}

/// Writes a stopped guest's device state and changed memory beside the final names.
async fn write_state(dir: &VmDir, record: &Record, running: &mut Running) -> Result<Saved> {
    running.vm.save_state(VmDir::PARTIAL_STATE).await?;
    let image = running.image.dir.memory();
    let mapped = running.vm.memory(&image, record.shape)?;
    let path = dir.partial_memory();
    blocking(move || memory::save(&mapped, &path).at("save the memory to", &path)).await
}

/// Brings a paused sandbox back. On failure it is as it was, unless its guest had run already.
pub(crate) async fn resume(shared: &Arc<Shared>, dir: &VmDir, record: &mut Record) -> Result<Running> {
    let outcome = bring_back(shared, dir, record).await;
    if outcome.is_err() {
        folder::take_back(&dir.work())?;
    }
    outcome
}

async fn bring_back(shared: &Arc<Shared>, dir: &VmDir, record: &mut Record) -> Result<Running> {
    let image = shared.templates.image_at(&record.image)?;
    shared.check_memory(record.shape, Some(record.id))?;
    let slot = shared.slots.take()?;
    shared.step(Step::Launch)?;
    let launched = shared
        .qemu
        .launch(&launch_spec(shared, dir, record.disk_mb, &image, &slot)?)
        .await?;
    shared.step(Step::Restore)?;
    let mapped = launched.memory(&image.dir.memory())?;
    let diff = dir.memory_diff();
    // Before the device state: devices look into memory while they are loaded.
    blocking(move || memory::apply(&diff, &mapped).at("restore the memory from", &diff)).await?;
    let mut vm = launched.load(dir, &dir.state()).await?;
    let (console, wire) = attach_first(shared, dir, &mut vm).await?;
    shared.step(Step::Run)?;
    // From the next instruction on the saved memory no longer fits the disk.
    record.phase = running_phase(&vm, &slot);
    if let Err(error) = record.write(dir) {
        vm.kill().await;
        record.phase = Phase::Paused;
        record.write(dir)?;
        return Err(error);
    }
    vm.outlive_agent();
    if let Err(error) = vm.cont().await {
        match vm.is_running().await {
            // Only the answer was lost.
            Ok(true) => {}
            Ok(false) => {
                vm.kill().await;
                record.phase = Phase::Paused;
                record.write(dir)?;
                return Err(error);
            }
            Err(_) => {
                vm.kill().await;
                // It may have written to its disk, which the saved memory knows nothing of: together they would be damage.
                record.phase = Phase::Error {
                    message: format!("it could not be resumed, and may have run already: {error}"),
                    console: console.tail(),
                };
                record.write(dir)?;
                return Err(error);
            }
        }
    }
    // Waited for, since the next pause writes files of the same names.
    for saved in [dir.state(), dir.memory_diff()] {
        let _ = tokio::fs::remove_file(saved).await;
    }
    let guest = GuestClient::new(&wire.net, &record.token);
    tell_time(&guest, record.id, Duration::from_secs(20)).await;
    Ok(Running {
        vm,
        guest,
        console,
        image,
        _slot: slot,
        wire,
        stuck: None,
    })
}

/// Makes a template of a sandbox. Returns its size in bytes. A running guest stands still only while its state is
/// written and its disk overlay is copied.
pub(crate) async fn snapshot(
    shared: &Arc<Shared>,
    dir: &VmDir,
    record: &Record,
    running: Option<&mut Running>,
    team: TeamId,
    template: TemplateId,
) -> Result<u64> {
    use std::os::unix::fs::DirBuilderExt as _;
    let target = shared.templates.snapshot_path(team, template);
    if target.exists() {
        // A repeated request; the template is complete, for it is renamed into place.
        return Ok(shared
            .templates
            .image_at(target.strip_prefix(shared.layout.images()).unwrap_or(&target))?
            .size_bytes());
    }
    let base = shared.templates.image_at(&record.image)?;
    let work = shared
        .layout
        .tmp()
        .join(format!("snapshot-{}", uuid::Uuid::new_v4().simple()));
    // Until the parts are protected one by one, the folder protects them.
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&work)
        .at("create", &work)?;
    let image = ImageDir::new(work.clone());
    let outcome = async {
        match running {
            Some(running) => {
                hold_programs(&running.guest, record.id).await;
                let taken = match running.vm.stop().await {
                    Ok(()) => take_parts(shared, dir, record, running, &image).await,
                    Err(error) => Err(error),
                };
                running.go_on(shared, dir, record.id).await?;
                taken?;
            }
            None => {
                let (from, to) = (dir.clone(), image.clone());
                blocking(move || {
                    copy_open(&folder::open_file(&from.disk())?, &to.disk())?;
                    copy_sparse(&from.state(), &to.state())?;
                    copy_sparse(&from.memory_diff(), &to.path().join("memory.diff"))
                })
                .await?;
            }
        }
        shared.step(Step::SnapshotFinish)?;
        let parent = shorten(shared, record, &base, &image).await?;
        let (from, to) = (base.dir.memory(), image.memory());
        let diff = image.path().join("memory.diff");
        blocking(move || {
            copy_sparse(&from, &to)?;
            let flat = std::fs::File::options()
                .read(true)
                .write(true)
                .open(&to)
                .at("open", &to)?;
            memory::apply(&diff, FlatImage(&flat)).at("write memory into", &to)?;
            std::fs::remove_file(&diff).at("remove", &diff)
        })
        .await?;
        let manifest = Manifest {
            platform: shared.qemu.platform(),
            shape: record.shape,
            disk_mb: record.disk_mb,
            state_sha256: String::new(),
            token: record.token.clone(),
            default_user: base.manifest.default_user.clone(),
            kernel: base.manifest.kernel.clone(),
            parent: Some(parent),
        };
        Image::seal(&image, &shared.qemu, shared.templates.take_group()?, manifest)?;
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).at("create", parent)?;
        }
        std::fs::rename(&work, &target).at("move into place", &target)?;
        let sealed = ImageDir::new(target.clone());
        shared.tasks.spawn_blocking(move || {
            crate::disk::sync(&[
                sealed.memory(),
                sealed.disk(),
                sealed.state(),
                sealed.manifest(),
                sealed.path().to_path_buf(),
            ]);
        });
        Ok(crate::disk::allocated_bytes(&target.join("memory.img"))
            + crate::disk::allocated_bytes(&target.join(VmDir::DISK)))
    }
    .await;
    if outcome.is_err() {
        let _ = remove_folder(&work).await;
    }
    outcome
}

/// Disks that may lie above each other: each costs every later start an open file, and every read a look.
const MAX_CHAIN: usize = 8;

/// Puts a new image's disk on the lowest one of its chain when there are many between. Returns the image that it stands
/// on.
async fn shorten(shared: &Shared, record: &Record, base: &Image, image: &ImageDir) -> Result<PathBuf> {
    let chain = shared.templates.chain(&record.image)?;
    let Some(lowest) = chain.last().filter(|_| chain.len() >= MAX_CHAIN) else {
        return Ok(record.image.clone());
    };
    let backing = shared.templates.image_at(lowest)?.dir.disk();
    let slot = shared.slots.take()?;
    let dir = VmDir::create(image.path().join("rebase"))?;
    std::fs::rename(image.disk(), dir.disk()).at("move", image.disk())?;
    shared
        .qemu
        .rebase(
            &dir,
            slot.number(),
            &shared.templates.groups(base)?,
            &backing,
            record.disk_mb,
        )
        .await?;
    let to = image.disk();
    blocking(move || {
        copy_open(&folder::open_file(&dir.disk())?, &to)?;
        std::fs::remove_dir_all(dir.path()).at("remove", dir.path())
    })
    .await?;
    Ok(lowest.clone())
}

/// The part of a snapshot for which the guest must stand still.
async fn take_parts(
    shared: &Shared,
    dir: &VmDir,
    record: &Record,
    running: &mut Running,
    image: &ImageDir,
) -> Result<()> {
    shared.step(Step::Save)?;
    let outcome = write_state(dir, record, running).await;
    let (from, to) = (dir.clone(), image.clone());
    let moved = match outcome {
        Ok(_) => {
            blocking(move || {
                folder::take_state(&from.partial_state(), &to.state())?;
                // A copy would cost time in which the guest stands.
                let diff = to.path().join("memory.diff");
                std::fs::rename(from.partial_memory(), &diff).at("move", &diff)?;
                copy_open(&folder::open_file(&from.disk())?, &to.disk())
            })
            .await
        }
        Err(error) => Err(error),
    };
    if moved.is_err() {
        for leftover in [dir.partial_state(), dir.partial_memory()] {
            let _ = std::fs::remove_file(leftover);
        }
    }
    moved
}

/// Holds a guest's programs still, so that none of them runs in a copy before that has its own names and random numbers,
/// or on a clock that stood still. A guest that has broken its own agent does without.
async fn hold_programs(guest: &GuestClient, id: SandboxId) {
    if let Err(error) = guest.freeze(Duration::from_secs(2)).await {
        tracing::warn!(sandbox = %id, %error, "a guest's programs could not be held still");
    }
}

/// Gives a guest the time after it stood still, and lets its programs go on. One that has broken its own agent is its
/// owner's to repair or destroy: it runs all the same.
async fn tell_time(guest: &GuestClient, id: SandboxId, limit: Duration) {
    let clock = InitRequest {
        timestamp: Some(jiff::Timestamp::now().to_string()),
        ..Default::default()
    };
    match tokio::time::timeout(limit, guest.init(&clock)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(sandbox = %id, %error, "a guest did not take the time"),
        Err(_) => tracing::warn!(sandbox = %id, "a guest's agent does not answer"),
    }
}
