//! Boots a root filesystem once and freezes the result into an image.

use std::path::Path;
use std::time::Duration;

use wrenn_proto::guest::cmdline;
use wrenn_proto::hostagent::ProcessSpec;

use super::store::{Image, Manifest};
use super::{ENVD, Kernel, Progress, initramfs};
use crate::disk::{BackingFormat, create_overlay};
use crate::error::{HostError, IoContext as _, Result};
use crate::guest::GuestClient;
use crate::layout::{ImageDir, VmDir};
use crate::net;
use crate::offload::{blocking, remove_folder};
use crate::vmm::qemu::{BootSource, LaunchSpec, Qemu};
use crate::vmm::{Accelerator, Shape};

/// Software emulation on a busy machine is slow; a kernel that hangs is slower.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// What each new sandbox runs first anyway: run once here, its code is in the image's page cache.
const WARM_UP: [&[&str]; 4] = [
    &["/bin/bash", "-l", "-c", "true"],
    &["/bin/sh", "-c", "echo warm; ls /; cat /etc/hostname"],
    &["/usr/bin/python3", "-c", "import json, os, subprocess, csv"],
    &["/bin/sync"],
];

/// Files in the VM's folder.
const MEMORY: &str = "memory.img";
const INITRAMFS: &str = "initramfs.cpio";
const KERNEL: &str = "vmlinux";

/// Settings of the guest's kernel that depend on what executes it. The programs of a guest are one user's, who may
/// become root in it: what keeps sandboxes apart is the machine around the kernel, not the kernel.
pub(super) fn kernel_settings(accelerator: Accelerator) -> &'static str {
    match accelerator {
        // An emulated processor does not speculate, so precautions against that only cost. Zeroing memory twice, and keeping
        // a second account of who waits for what at each switch, are among the slowest things it does; so is an interrupt for
        // each frame that was sent, which the driver can do without.
        Accelerator::Tcg => "mitigations=off init_on_alloc=0 psi=0 virtio_net.napi_tx=0",
        Accelerator::Kvm => "",
    }
}

pub(super) struct BootPlan<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) rootfs: &'a Path,
    pub(super) shape: Shape,
    pub(super) disk_mb: u32,
    pub(super) slot: u32,
    /// An empty folder that becomes the image. The VM works in a folder in it, as a sandbox's does.
    pub(super) work: &'a Path,
    pub(super) default_user: &'a str,
}

/// Boots, waits for the agent, freezes. On success `work` is a complete image.
pub(super) async fn freeze(qemu: &Qemu, plan: &BootPlan<'_>, progress: &Progress) -> Result<()> {
    let dir = VmDir::create(plan.work.join("boot"))?;
    let image = ImageDir::new(plan.work.to_path_buf());
    create_overlay(
        &dir.disk(),
        u64::from(plan.disk_mb) << 20,
        plan.rootfs,
        BackingFormat::Raw,
    )?;
    let place = |name: &str| dir.work().join(name);
    let memory = place(MEMORY);
    std::fs::File::create(&memory)
        .and_then(|file| file.set_len(u64::from(plan.shape.memory_mb) << 20))
        .at("create", &memory)?;
    let (initrd, vmlinux) = (place(INITRAMFS), place(KERNEL));
    let kernel = plan.kernel.clone();
    blocking(move || {
        let archive = initramfs::build(ENVD, &initramfs::read_modules(&kernel.modules())?);
        std::fs::write(&initrd, archive).at("write", &initrd)?;
        // The cache may be in a place that only the agent can enter, such as root's home.
        std::fs::copy(kernel.vmlinux(), &vmlinux)
            .map(drop)
            .at("copy the kernel to", &vmlinux)
    })
    .await?;
    let cmdline = format!(
        "console=ttyS0 quiet loglevel=4 reboot=t panic=-1 random.trust_cpu=on tsc=reliable {} {}=/dev/vda {}={}/{} {}={} {}={}",
        kernel_settings(qemu.platform().accelerator),
        cmdline::ROOT,
        cmdline::IP,
        net::GUEST_IP,
        net::GUEST_PREFIX_LEN,
        cmdline::GATEWAY,
        net::GATEWAY_IP,
        cmdline::DNS,
        net::DNS_IP,
    );
    let name = plan
        .work
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let spec = LaunchSpec {
        dir: &dir,
        name: &name,
        slot: plan.slot,
        shape: plan.shape,
        disk_mb: plan.disk_mb,
        memory: Path::new(MEMORY),
        // The root filesystem is everybody's.
        groups: Vec::new(),
        boot: Some(BootSource {
            kernel: Path::new(KERNEL),
            initramfs: Path::new(INITRAMFS),
            cmdline: &cmdline,
        }),
    };
    progress.step(75, "booting the virtual machine once");
    let mut vm = qemu.launch(&spec).await?.booted();
    let outcome = {
        let console = crate::manager::console::Console::attach(&dir).await;
        let run = settle(&mut vm, &dir, plan, progress);
        match run.await {
            Ok(()) => Ok(()),
            Err(error) => Err(HostError::Vmm(format!(
                "the template's first boot failed: {error}. The console's last lines: {}",
                console.tail()
            ))),
        }
    };
    vm.kill().await;
    outcome?;
    for (from, to) in [
        (memory, image.memory()),
        (dir.disk(), image.disk()),
        (place(VmDir::STATE), image.state()),
    ] {
        std::fs::rename(from, &to).at("move into place", &to)?;
    }
    remove_folder(dir.path()).await.at("remove", dir.path())?;
    Image::seal(
        &image,
        qemu,
        qemu.vm_ids.map(|ids| ids.gid),
        Manifest {
            platform: qemu.platform(),
            shape: plan.shape,
            disk_mb: plan.disk_mb,
            state_sha256: String::new(),
            token: String::new(),
            default_user: plan.default_user.to_owned(),
            kernel: plan.kernel.version.clone(),
            parent: None,
        },
    )
}

async fn settle(
    vm: &mut crate::vmm::qemu::Vm,
    dir: &VmDir,
    plan: &BootPlan<'_>,
    progress: &Progress,
) -> Result<()> {
    let (net, _task) = crate::manager::link(dir, net::EgressPolicy::default()).await?;
    let guest = GuestClient::new(&net, "");
    tokio::select! {
        healthy = guest.wait_healthy(BOOT_LIMIT) => healthy?,
        exit = vm.exited() => return Err(HostError::Vmm(format!("QEMU ended ({exit})"))),
    }
    guest
        .init(&wrenn_proto::guest::InitRequest {
            timestamp: Some(jiff::Timestamp::now().to_string()),
            default_user: Some(plan.default_user.to_owned()),
            ..Default::default()
        })
        .await?;
    progress.step(90, "warming up");
    for command in WARM_UP {
        let [cmd, args @ ..] = command else { continue };
        let spec = ProcessSpec {
            cmd: (*cmd).to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            user: Some("root".to_owned()),
            ..Default::default()
        };
        guest.collect(spec, Some(Duration::from_secs(60)), 0).await?;
    }
    progress.step(96, "freezing it");
    vm.stop().await?;
    vm.save_state(VmDir::STATE).await
}
