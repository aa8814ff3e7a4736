//! A paused sandbox's memory: the pages that differ from its template's image.
//!
//! A clone maps its template's memory image privately, so the pages it changed are exactly the anonymous
//! ones of that mapping, and `/proc/{pid}/pagemap` tells which (bit 63 present, 62 swapped, 61 file page;
//! source: the kernel's `Documentation/admin-guide/mm/pagemap.rst`). Saving costs what the guest touched, not its RAM size, and
//! the result is always relative to the template, so there are no chains to compact. Restoring writes the
//! pages into the fresh mapping of a stopped VM.
//!
//! File format, little endian: magic, page count of the whole memory (u64), then runs in order of their pages: first
//! page (u64), length in pages (u32), kind (u32: 0 zeros, 1 data) and, for data, the pages. A run of length 0 ends it,
//! so that a file that was cut off is known for one. Runs carry their pages, so that saving reads each page once.

mod pagemap;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;

pub(crate) use pagemap::MappedMemory;

pub(crate) const PAGE: usize = 4096;
const MAGIC: &[u8; 16] = b"wrenn-memdiff-2\n";
/// Pages handled at once: large enough for few system calls, small enough for the cache.
const BATCH: u64 = 256;
/// Batches between the thread that reads and the one that writes.
const BUFFERS: usize = 4;

/// What saving wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Saved {
    /// Pages that differ from the template's.
    pub(crate) pages: u64,
    /// Bytes of the file.
    pub(crate) bytes: u64,
}

/// Writes the changed pages of `memory` (of a stopped VM) to `path`.
pub(crate) fn save(memory: &MappedMemory, path: &Path) -> io::Result<Saved> {
    let changed = memory.changed_pages()?;
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(MAGIC)?;
    out.write_all(&memory.page_count().to_le_bytes())?;
    let mut pages = 0;
    // One thread reads while this one writes: the guest stands still for the longer of the two, not for both.
    std::thread::scope(|scope| {
        let (filled, batches) = mpsc::sync_channel::<(u64, Vec<u8>)>(BUFFERS);
        let (give_back, free) = mpsc::channel();
        for _ in 0..BUFFERS {
            let _ = give_back.send(Vec::new());
        }
        let reader = scope.spawn(|| {
            // Moved in: they end with the thread, and so does the writer's wait for more.
            let (filled, free) = (filled, free);
            for_batches(&changed, |first, count| {
                let mut bytes: Vec<u8> = free.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
                bytes.resize(PAGE * count as usize, 0);
                memory.read_pages(first, &mut bytes)?;
                filled
                    .send((first, bytes))
                    .map_err(|_| io::ErrorKind::BrokenPipe.into())
            })
        });
        for (first, bytes) in batches {
            write_batch(&mut out, first, &bytes)?;
            pages += (bytes.len() / PAGE) as u64;
            let _ = give_back.send(bytes);
        }
        reader
            .join()
            .map_err(|_| io::Error::other("the thread that reads the memory ended"))?
    })?;
    write_run(&mut out, 0, 0, true)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(Saved {
        pages,
        bytes: file.metadata()?.len(),
    })
}

/// Neighbours of one kind, zeros or data, make a run.
fn write_batch(out: &mut impl Write, first: u64, bytes: &[u8]) -> io::Result<()> {
    let mut number = first;
    let mut kinds = bytes.chunks_exact(PAGE).map(is_zero).peekable();
    let mut rest = bytes;
    while let Some(zero) = kinds.next() {
        let mut length = 1;
        while kinds.next_if_eq(&zero).is_some() {
            length += 1;
        }
        let (run, after) = rest.split_at(PAGE * length);
        write_run(out, number, length as u32, zero)?;
        if !zero {
            out.write_all(run)?;
        }
        number += length as u64;
        rest = after;
    }
    Ok(())
}

fn write_run(out: &mut impl Write, first: u64, pages: u32, zero: bool) -> io::Result<()> {
    out.write_all(&first.to_le_bytes())?;
    out.write_all(&pages.to_le_bytes())?;
    out.write_all(&u32::from(!zero).to_le_bytes())
}

/// Where saved pages are written back to.
pub(crate) trait PageSink {
    /// Writes whole pages from page `first` on.
    fn write_pages(&mut self, first: u64, bytes: &[u8]) -> io::Result<()>;
    /// How many pages there are.
    fn page_count(&self) -> u64;
}

impl PageSink for &MappedMemory {
    fn write_pages(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        MappedMemory::write_pages(self, first, bytes)
    }

    fn page_count(&self) -> u64 {
        MappedMemory::page_count(self)
    }
}

/// A flat memory image, as templates have it.
pub(crate) struct FlatImage<'a>(pub(crate) &'a File);

impl PageSink for FlatImage<'_> {
    fn write_pages(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, first * PAGE as u64)
    }

    fn page_count(&self) -> u64 {
        self.0.metadata().map_or(0, |meta| meta.len() / PAGE as u64)
    }
}

/// Writes the pages saved in `path` into `sink`.
pub(crate) fn apply(path: &Path, mut sink: impl PageSink) -> io::Result<()> {
    let invalid = |what: &str| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("saved memory is damaged: {what}"),
        )
    };
    let mut input = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut magic = [0; MAGIC.len()];
    input.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(invalid("wrong magic"));
    }
    let page_count = read_u64(&mut input)?;
    if page_count != sink.page_count() {
        return Err(invalid("it is of a memory of another size"));
    }
    let mut buffer = vec![0u8; PAGE * BATCH as usize];
    let zeros = vec![0u8; PAGE * BATCH as usize];
    // Runs are in order, which also bounds how much a damaged file can make this write.
    let mut written = 0;
    loop {
        let first = read_u64(&mut input)?;
        let mut rest = [0; 8];
        input.read_exact(&mut rest)?;
        let pages = u64::from(u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]));
        let zero = u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]) == 0;
        if pages == 0 {
            return Ok(());
        }
        if first < written {
            return Err(invalid("its pages are out of order"));
        }
        let end = first
            .checked_add(pages)
            .filter(|end| *end <= page_count)
            .ok_or_else(|| invalid("a page lies outside the memory"))?;
        for_batches(&[(first, pages)], |first, count| {
            let length = PAGE * count as usize;
            if zero {
                sink.write_pages(first, &zeros[..length])
            } else {
                input.read_exact(&mut buffer[..length])?;
                sink.write_pages(first, &buffer[..length])
            }
        })?;
        written = end;
    }
}

fn read_u64(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn is_zero(page: &[u8]) -> bool {
    // Comparing with a shifted self lets the compiler use wide loads; the first byte anchors it.
    page.first() == Some(&0) && page[..page.len() - 1] == page[1..]
}

fn for_batches(ranges: &[(u64, u64)], mut each: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    for &(first, count) in ranges {
        let mut done = 0;
        while done < count {
            let batch = (count - done).min(BATCH);
            each(first + done, batch)?;
            done += batch;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    /// Ends with the test, however that ends.
    struct CloneProcess(std::process::Child);

    impl Drop for CloneProcess {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A process that maps a file privately and changes some of its pages, as a clone's QEMU does.
    fn clone_process(image: &Path, writes: &[(u64, u8)]) -> CloneProcess {
        let writes: Vec<String> = writes
            .iter()
            .map(|(page, byte)| format!("({page},{byte})"))
            .collect();
        let script = format!(
            "import mmap,sys\n\
             f=open(sys.argv[1],'r+b')\n\
             m=mmap.mmap(f.fileno(),0,flags=mmap.MAP_PRIVATE)\n\
             for p,b in [{}]: m[p*4096:(p+1)*4096]=bytes([b])*4096\n\
             print('ready',flush=True)\n\
             sys.stdin.read()",
            writes.join(",")
        );
        let mut child = Command::new("python3")
            .args(["-c", &script])
            .arg(image)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
        assert_eq!(line, "ready\n");
        CloneProcess(child)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]
        #[test]
        fn changed_pages_survive_saving_and_restoring(
            writes in proptest::collection::vec((0u64..600, prop_oneof![Just(0u8), any::<u8>()]), 0..40)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let image = dir.path().join("memory.img");
            // The template's own pages are not zero, so a page that became zero must be recorded as well.
            std::fs::write(&image, vec![7u8; 600 * PAGE]).unwrap();
            let child = clone_process(&image, &writes);
            let diff = dir.path().join("diff");
            let memory = MappedMemory::of_process(child.0.id(), &image, 600 * PAGE as u64).unwrap();
            let saved = save(&memory, &diff).unwrap();
            let distinct: std::collections::BTreeSet<u64> = writes.iter().map(|w| w.0).collect();
            prop_assert_eq!(saved.pages, distinct.len() as u64);

            let mut expected = vec![7u8; 600 * PAGE];
            for &(page, byte) in &writes {
                expected[page as usize * PAGE..(page as usize + 1) * PAGE].fill(byte);
            }
            // Into a flat image…
            let flat = File::options().read(true).write(true).open(&image).unwrap();
            apply(&diff, FlatImage(&flat)).unwrap();
            prop_assert!(std::fs::read(&image).unwrap() == expected);
            drop(child);
            // …and into the memory of another process.
            std::fs::write(&image, vec![7u8; 600 * PAGE]).unwrap();
            let other = clone_process(&image, &[]);
            let memory = MappedMemory::of_process(other.0.id(), &image, 600 * PAGE as u64).unwrap();
            apply(&diff, &memory).unwrap();
            let mut seen = vec![0u8; 600 * PAGE];
            memory.read_pages(0, &mut seen).unwrap();
            prop_assert!(seen == expected);
            prop_assert!(std::fs::read(&image).unwrap() == vec![7u8; 600 * PAGE], "the template was written to");
        }

        #[test]
        fn damaged_files_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), good_start: bool) {
            let dir = tempfile::tempdir().unwrap();
            let (diff, image) = (dir.path().join("diff"), dir.path().join("image"));
            let mut content = if good_start { [&MAGIC[..], &4u64.to_le_bytes()].concat() } else { Vec::new() };
            content.extend_from_slice(&bytes);
            std::fs::write(&diff, &content).unwrap();
            std::fs::write(&image, [0u8; 4 * PAGE]).unwrap();
            let flat = File::options().write(true).read(true).open(&image).unwrap();
            // No panic, no write outside the image; an error unless the bytes happen to begin with an end mark.
            let _ = apply(&diff, FlatImage(&flat));
            prop_assert_eq!(flat.metadata().unwrap().len(), 4 * PAGE as u64);
        }
    }
}
