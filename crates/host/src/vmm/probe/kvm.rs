//! Runs the tiny guest on `/dev/kvm`. The one place with unsafe code: handing memory to the kernel as a guest's.
//!
//! `KVM_RUN` may never return (on an emulation that is stuck), so this runs in a process that can be killed.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use memmap2::MmapMut;
use rustix::io::Errno;

use super::guest;

/// Where Intel processors without unrestricted guests keep three pages of KVM's own; any free place below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What the guest achieved, in order.
pub(super) enum Milestone {
    /// The counted loop, after this time.
    Loop(Duration),
    /// The instructions on the FPU's state and what follows them, after this time.
    Fpu(Duration),
}

/// Runs the guest to its end. The caller learns of each stage as it ends.
pub(super) fn run(rounds: u32, mut reached: impl FnMut(Milestone)) -> Result<(), String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {}", reason(error)))?;
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(format!(
            "/dev/kvm speaks version {version} of its interface, not 12"
        ));
    }
    let vm = kvm
        .create_vm()
        .map_err(|error| format!("it cannot create a VM: {}", reason(error)))?;
    // Only some processors need it; where it matters and fails, the run fails with a reason of its own.
    let _ = vm.set_tss_address(TSS_ADDRESS);

    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| format!("it does not tell its processor's features: {}", reason(error)))?;
    let features = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == 1)
        .map_or(0, |entry| entry.ecx);
    let program = guest::Program {
        rounds,
        xsave: features & (1 << 26) != 0,
        cmpxchg16b: features & (1 << 13) != 0,
    };

    let mut memory =
        MmapMut::map_anon(guest::MEMORY).map_err(|error| format!("no memory for the guest: {error}"))?;
    program.load(&mut memory);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: guest::MEMORY as u64,
        userspace_addr: memory.as_mut_ptr() as u64,
    };
    // SAFETY: the region is exactly the private mapping `memory`, page-aligned and of its size. It outlives the
    // guest: nothing runs in the guest but inside `drive` below, and `memory` is dropped after that. While the
    // guest runs, no reference into the mapping exists on this side.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| format!("it does not take the guest's memory: {}", reason(error)))?;

    let mut vcpu = vm
        .create_vcpu(0)
        .map_err(|error| format!("it cannot create a processor: {}", reason(error)))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(|error| format!("it refuses its own features: {}", reason(error)))?;
    enter_long_mode(&vcpu, program.xsave)
        .map_err(|error| format!("it refuses 64-bit mode: {}", reason(error)))?;
    let outcome = drive(&mut vcpu, &program, &mut reached);
    drop(vcpu);
    drop(memory);
    outcome
}

fn enter_long_mode(vcpu: &VcpuFd, xsave: bool) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: guest::CODE_SELECTOR,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: guest::DATA_SELECTOR,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 64-bit TSS: the processor insists on one, though nothing here uses it.
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = guest::GDT;
    sregs.gdt.limit = guest::GDT_LIMIT;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = guest::PML4;
    // PAE, OSFXSR, OSXMMEXCPT; OSXSAVE.
    sregs.cr4 = 0x620 | if xsave { 1 << 18 } else { 0 };
    // Paging, write protection, FPU errors as exceptions, FPU present, protection.
    sregs.cr0 = 0x8001_0033;
    // Long mode, enabled and active.
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = guest::CODE;
    regs.rsp = guest::STACK_TOP;
    // The bit that is always set; interrupts stay off.
    regs.rflags = 2;
    vcpu.set_regs(&regs)
}

#[derive(Clone, Copy)]
enum Stage {
    Loop,
    Fpu,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Loop => "counted loop",
            Self::Fpu => "instructions on the FPU's state",
        }
    }
}

fn drive(
    vcpu: &mut VcpuFd,
    program: &guest::Program,
    reached: &mut impl FnMut(Milestone),
) -> Result<(), String> {
    let mut stage = Stage::Loop;
    let mut started = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let took = started.elapsed();
                let value = data.try_into().map(u32::from_le_bytes).ok();
                match stage {
                    Stage::Loop if port == guest::LOOP_PORT && value == Some(program.sum()) => {
                        reached(Milestone::Loop(took));
                        stage = Stage::Fpu;
                    }
                    Stage::Fpu if port == guest::FPU_PORT && value == Some(guest::MAGIC) => {
                        reached(Milestone::Fpu(took));
                        return Ok(());
                    }
                    Stage::Loop | Stage::Fpu => {
                        return Err(format!("the guest computed wrongly in its {}", stage.name()));
                    }
                }
                started = Instant::now();
            }
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                return Err(format!(
                    "the guest stopped in its {}: {}",
                    stage.name(),
                    name(&exit)
                ));
            }
            Err(error)
                if [Errno::INTR, Errno::AGAIN]
                    .map(Errno::raw_os_error)
                    .contains(&error.errno()) => {}
            Err(error) => {
                return Err(format!(
                    "the guest cannot run its {}: {}",
                    stage.name(),
                    reason(error)
                ));
            }
        }
    }
}

fn name(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::InternalError => "internal error of KVM (an instruction that it cannot emulate)".to_owned(),
        VcpuExit::Shutdown => "the processor raised an exception".to_owned(),
        VcpuExit::FailEntry(code, _) => {
            format!("the processor refused to enter the guest (reason {code:#x})")
        }
        other => format!("{other:?}"),
    }
}

fn reason(error: kvm_ioctls::Error) -> String {
    std::io::Error::from_raw_os_error(error.errno()).to_string()
}
