//! Reads and writes a guest's memory through the VMM process that maps it.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::PAGE;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// A process's private mapping of a memory image.
#[derive(Debug)]
pub(crate) struct MappedMemory {
    process: Pid,
    memory: File,
    pagemap: File,
    start: u64,
    pages: u64,
}

impl MappedMemory {
    /// Finds the mapping of `image` (`size` bytes) in process `pid`. The caller must hold the process
    /// (its child, or a verified pid) so that the pid cannot be another's.
    pub(crate) fn of_process(pid: u32, image: &Path, size: u64) -> io::Result<Self> {
        let inode = std::fs::metadata(image)?.ino();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        // The kernel may split a mapping; parts that touch are put together again. A file of another file system can have
        // the same inode number (and the device that is shown is not always the file's), but not the same length too.
        let mut mappings: Vec<(u64, u64)> = Vec::new();
        for line in maps.lines() {
            let mut fields = line.split_ascii_whitespace();
            let (Some(range), Some(_), Some(offset), Some(_), Some(ino)) = (
                fields.next(),
                fields.next(),
                fields.next(),
                fields.next(),
                fields.next(),
            ) else {
                continue;
            };
            let Some((from, to)) = range.split_once('-') else {
                continue;
            };
            let (Ok(from), Ok(to), Ok(offset)) = (
                u64::from_str_radix(from, 16),
                u64::from_str_radix(to, 16),
                u64::from_str_radix(offset, 16),
            ) else {
                continue;
            };
            if ino.parse() != Ok(inode) {
                continue;
            }
            match mappings.last_mut() {
                _ if offset == 0 => mappings.push((from, to)),
                Some((start, end)) if from == *end && offset == *end - *start => *end = to,
                _ => {}
            }
        }
        let whole = mappings
            .iter()
            .find(|(start, end)| size > 0 && end - start == size);
        let Some(&(start, _)) = whole else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the process does not map the memory image whole",
            ));
        };
        let process = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(Self {
            process: Pid::from_raw(process),
            memory: File::options()
                .read(true)
                .write(true)
                .open(format!("/proc/{pid}/mem"))?,
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            start,
            pages: size / PAGE as u64,
        })
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.pages
    }

    /// Ranges (first page, pages) that the process has changed, in order.
    pub(crate) fn changed_pages(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut entries = vec![0u8; 8 * 8192];
        let mut page = 0;
        while page < self.pages {
            let count = (self.pages - page).min(8192);
            let bytes = &mut entries[..8 * count as usize];
            self.pagemap
                .read_exact_at(bytes, (self.start / PAGE as u64 + page) * 8)?;
            for (index, entry) in bytes.chunks_exact(8).enumerate() {
                let entry = entry
                    .iter()
                    .rev()
                    .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
                if entry & (PRESENT | SWAPPED) == 0 || entry & FILE_OR_SHARED != 0 {
                    continue;
                }
                let number = page + index as u64;
                match ranges.last_mut() {
                    Some((first, length)) if *first + *length == number => *length += 1,
                    _ => ranges.push((number, 1)),
                }
            }
            page += count;
        }
        Ok(ranges)
    }

    pub(crate) fn read_pages(&self, first: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = self.start + first * PAGE as u64;
        let remote = RemoteIoVec {
            base: start as usize,
            len: bytes.len(),
        };
        // Twice as fast as the file, and refused in some containers, which leave the file alone.
        match process_vm_readv(self.process, &mut [IoSliceMut::new(bytes)], &[remote]) {
            Ok(read) if read == bytes.len() => Ok(()),
            _ => self.memory.read_exact_at(bytes, start),
        }
    }

    pub(crate) fn write_pages(&self, first: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, self.start + first * PAGE as u64)
    }
}
