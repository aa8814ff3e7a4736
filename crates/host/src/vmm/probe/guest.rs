//! The tiny guest of the probe: its memory image, built here byte by byte so that it can be tested without KVM.
//!
//! ```text
//! 0x1000 PML4 ─▶ 0x2000 PDPT ─▶ 0x3000 PD: one 2 MiB page at 0, identity mapped
//! 0x4000 GDT: null, 64-bit code, data
//! 0x5000 code        0x6000 data (FPU state, the operand of cmpxchg16b)
//! ```
//!
//! The code has two stages. Each ends by writing 32 bits to its port; afterwards the guest halts. There is no
//! interrupt table: whatever goes wrong inside is a triple fault, which the host sees as a shutdown.

/// Size of the guest's memory.
pub(super) const MEMORY: usize = 64 << 10;
pub(super) const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
pub(super) const GDT: u64 = 0x4000;
/// Limit of the GDT's three entries.
pub(super) const GDT_LIMIT: u16 = 3 * 8 - 1;
pub(super) const CODE_SELECTOR: u16 = 8;
pub(super) const DATA_SELECTOR: u16 = 16;
pub(super) const CODE: u64 = 0x5000;
const FPU_AREA: u32 = 0x6000;
const PAIR: u32 = 0x7000;
pub(super) const STACK_TOP: u64 = 0x9000;

/// Where the first stage reports its sum.
pub(super) const LOOP_PORT: u16 = 0x5e1;
/// Where the second stage reports [`MAGIC`].
pub(super) const FPU_PORT: u16 = 0x5e2;
/// What the second stage reports.
pub(super) const MAGIC: u32 = 0x5772_656e;
/// Added in each round of the loop; odd, so that every number of rounds has another sum.
const STEP: u8 = 3;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// What the guest does; both features as the processor has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) rounds: u32,
    /// `xsave`/`xrstor` rather than `fxsave`/`fxrstor`; needs `CR4.OSXSAVE`.
    pub(super) xsave: bool,
    /// Also `lock cmpxchg16b`.
    pub(super) cmpxchg16b: bool,
}

impl Program {
    /// What the loop's stage reports when every round was run.
    pub(super) fn sum(&self) -> u32 {
        self.rounds.wrapping_mul(u32::from(STEP))
    }

    fn code(&self) -> Vec<u8> {
        let mut code = Vec::with_capacity(128);
        // Stage 1: mov ecx, rounds; xor eax, eax; again: add eax, STEP; dec ecx; jnz again
        code.push(0xb9);
        code.extend(self.rounds.to_le_bytes());
        code.extend([0x31, 0xc0, 0x83, 0xc0, STEP, 0xff, 0xc9, 0x75, 0xf9]);
        out(&mut code, LOOP_PORT);

        // Stage 2. An operand at an absolute 32-bit address is a SIB byte of 0x25.
        if self.xsave {
            // xor ecx, ecx; mov eax, 3; xor edx, edx; xsetbv: x87 and SSE state. The pair is also the mask below.
            code.extend([0x31, 0xc9, 0xb8, 3, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x01, 0xd1]);
        }
        // xsave64 or fxsave64; xrstor64 or fxrstor64
        let (save, restore) = if self.xsave { (0x24, 0x2c) } else { (0x04, 0x0c) };
        for operation in [save, restore] {
            code.extend([0x48, 0x0f, 0xae, operation, 0x25]);
            code.extend(FPU_AREA.to_le_bytes());
        }
        if self.cmpxchg16b {
            // xor eax, eax; xor edx, edx; mov ebx, 1; mov ecx, 2; lock cmpxchg16b [PAIR]; jz +2; ud2
            code.extend([0x31, 0xc0, 0x31, 0xd2, 0xbb, 1, 0, 0, 0, 0xb9, 2, 0, 0, 0]);
            code.extend([0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25]);
            code.extend(PAIR.to_le_bytes());
            code.extend([0x74, 0x02, 0x0f, 0x0b]);
        }
        // mov eax, MAGIC
        code.push(0xb8);
        code.extend(MAGIC.to_le_bytes());
        out(&mut code, FPU_PORT);
        // hlt; jmp to it
        code.extend([0xf4, 0xeb, 0xfd]);
        code
    }

    /// Writes tables and code into the guest's zeroed memory.
    pub(super) fn load(&self, memory: &mut [u8]) {
        let mut put = |at: u64, bytes: &[u8]| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let Some(place) = memory.get_mut(at..at.saturating_add(bytes.len())) {
                place.copy_from_slice(bytes);
            }
        };
        put(PML4, &(PDPT | PRESENT_WRITABLE).to_le_bytes());
        put(PDPT, &(PAGE_DIRECTORY | PRESENT_WRITABLE).to_le_bytes());
        put(PAGE_DIRECTORY, &(PRESENT_WRITABLE | LARGE_PAGE).to_le_bytes());
        put(GDT + u64::from(CODE_SELECTOR), &CODE_DESCRIPTOR.to_le_bytes());
        put(GDT + u64::from(DATA_SELECTOR), &DATA_DESCRIPTOR.to_le_bytes());
        put(CODE, &self.code());
    }
}

/// mov dx, port; out dx, eax
fn out(code: &mut Vec<u8>, port: u16) {
    code.extend([0x66, 0xba]);
    code.extend(port.to_le_bytes());
    code.push(0xef);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(xsave: bool, cmpxchg16b: bool) -> Program {
        Program {
            rounds: 1_000_000,
            xsave,
            cmpxchg16b,
        }
    }

    fn contains(code: &[u8], bytes: &[u8]) -> bool {
        code.windows(bytes.len()).any(|window| window == bytes)
    }

    #[test]
    fn the_code_follows_the_processors_features() {
        let plain = program(false, false).code();
        assert!(
            contains(&plain, &[0x48, 0x0f, 0xae, 0x04, 0x25])
                && contains(&plain, &[0x48, 0x0f, 0xae, 0x0c, 0x25])
        );
        assert!(!contains(&plain, &[0x0f, 0x01, 0xd1]) && !contains(&plain, &[0xf0, 0x48, 0x0f, 0xc7]));
        let full = program(true, true).code();
        assert!(
            contains(&full, &[0x48, 0x0f, 0xae, 0x24, 0x25])
                && contains(&full, &[0x48, 0x0f, 0xae, 0x2c, 0x25])
        );
        assert!(
            contains(&full, &[0x0f, 0x01, 0xd1]) && contains(&full, &[0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25])
        );
        assert!(full.ends_with(&[0xf4, 0xeb, 0xfd]));
    }

    /// The jump of the loop goes back to the addition, whatever stands before it.
    #[test]
    fn the_loop_jumps_to_its_own_start() {
        let code = program(false, false).code();
        let jump = code.windows(2).position(|window| window == [0x75, 0xf9]).unwrap();
        let target = jump + 2 - 7;
        assert_eq!(&code[target..target + 3], &[0x83, 0xc0, STEP]);
        assert_eq!(program(false, false).sum(), 3_000_000);
    }

    #[test]
    fn tables_and_code_lie_where_the_registers_point() {
        let mut memory = vec![0; MEMORY];
        let program = program(true, true);
        program.load(&mut memory);
        let word = |at: u64| u64::from_le_bytes(memory[at as usize..][..8].try_into().unwrap());
        // A walk of the tables for address 0 ends at the large page.
        let pdpt = word(PML4) & !0xfff;
        let directory = word(pdpt) & !0xfff;
        assert_eq!(word(directory) & (LARGE_PAGE | 1), LARGE_PAGE | 1);
        assert_eq!(word(directory) & !0xfff, 0);
        assert_eq!(word(GDT), 0);
        let code = program.code();
        assert_eq!(&memory[CODE as usize..][..code.len()], &code[..]);
        assert!(CODE as usize + code.len() <= FPU_AREA as usize);
        // The FPU area must be zero (a valid xsave header) and aligned to 64 bytes, the pair to 16.
        assert!(FPU_AREA.is_multiple_of(64) && PAIR.is_multiple_of(16));
        assert!(memory[FPU_AREA as usize..].iter().all(|byte| *byte == 0));
    }
}
