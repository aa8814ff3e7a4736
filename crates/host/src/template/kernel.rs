//! The guest kernel: Debian's cloud kernel package, fetched and unpacked but never installed.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::mirror::{Apt, DebianMirror};
use super::{Progress, initramfs};
use crate::error::{HostError, IoContext as _, Result};
use crate::layout::Layout;
use crate::offload::{blocking, remove_folder};

/// An unpacked kernel: `vmlinux` (uncompressed, with a PVH entry) and the drivers of the guest's devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// For example `6.1.0-44-cloud-amd64`.
    pub version: String,
    dir: PathBuf,
}

impl Kernel {
    pub(super) fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    pub(super) fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }

    /// The newest kernel that is unpacked already.
    fn newest(layout: &Layout) -> Option<Self> {
        let mut versions: Vec<String> = std::fs::read_dir(layout.kernels())
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .collect();
        versions.sort_by_key(|version| {
            version
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|part| part.parse::<u64>().ok())
                .collect::<Vec<_>>()
        });
        let version = versions.pop()?;
        Some(Self {
            dir: layout.kernels().join(&version),
            version,
        })
    }

    /// Finds an unpacked kernel, or fetches one: the newest that the machine's own package sources have, or a mirror
    /// for `suite`.
    pub(super) async fn ensure(
        layout: &Layout,
        mirror: Option<&DebianMirror>,
        suite: &str,
        progress: &Progress,
    ) -> Result<Self> {
        if let Some(kernel) = Self::newest(layout) {
            return Ok(kernel);
        }
        progress.step(2, "fetching Debian's cloud kernel package");
        let work = layout
            .kernels()
            .join(format!(".fetch-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir_all(&work).at("create", &work)?;
        let outcome = async {
            let apt = Apt::prepare(mirror, suite, &work).await?;
            Self::fetch(layout, &apt, &work, progress).await
        }
        .await;
        let _ = remove_folder(&work).await;
        outcome
    }

    async fn fetch(layout: &Layout, apt: &Apt, work: &Path, progress: &Progress) -> Result<Self> {
        let meta = match std::env::consts::ARCH {
            "aarch64" => "linux-image-cloud-arm64",
            _ => "linux-image-cloud-amd64",
        };
        let depends = run(
            "apt-cache",
            apt.command("apt-cache").args(["depends", "--important", meta]),
        )
        .await?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .map(|rest| format!("linux-image-{rest}"))
            .ok_or_else(|| HostError::Program {
                program: "apt-cache",
                detail: format!("no kernel behind the package {meta}; run 'apt-get update' first"),
            })?;
        let version = package.trim_start_matches("linux-image-");
        run(
            "apt-get",
            apt.command("apt-get")
                .args(["download", "-q", &package])
                .current_dir(work),
        )
        .await?;
        let deb = std::fs::read_dir(work)
            .at("list", work)?
            .filter_map(std::result::Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .ok_or_else(|| HostError::Program {
                program: "apt-get",
                detail: format!("it fetched no package file for {package}"),
            })?;
        progress.step(6, format!("unpacking kernel {version}"));
        let tree = work.join("tree");
        run(
            "dpkg-deb",
            Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree),
        )
        .await?;
        let ready = work.join("ready");
        let modules = ready.join("modules");
        std::fs::create_dir_all(&modules).at("create", &modules)?;
        let boot = tree.join(format!("boot/vmlinuz-{version}"));
        let (unpacked, of) = (ready.clone(), version.to_owned());
        // Seconds of work in a debug build.
        blocking(move || {
            let image = std::fs::read(&boot).at("read", &boot)?;
            let vmlinux = extract_vmlinux(&image).map_err(|detail| HostError::Program {
                program: "kernel package",
                detail,
            })?;
            let target = unpacked.join("vmlinux");
            std::fs::write(&target, vmlinux).at("write", &target)?;
            let root = [tree.join("lib/modules"), tree.join("usr/lib/modules")]
                .into_iter()
                .map(|root| root.join(&of))
                .find(|root| root.is_dir())
                .unwrap_or(tree);
            for (name, bytes) in initramfs::read_modules(&root)? {
                let target = modules.join(format!("{name}.ko"));
                std::fs::write(&target, bytes).at("write", &target)?;
            }
            Ok(())
        })
        .await?;
        let dir = layout.kernels().join(version);
        match std::fs::rename(&ready, &dir) {
            // Another agent on this machine was faster; its work is as good.
            Err(_) if dir.join("vmlinux").is_file() => {}
            result => result.at("move into place", &dir)?,
        }
        Ok(Self {
            version: version.to_owned(),
            dir,
        })
    }
}

/// Where programs that build templates are looked for: `PATH`, and the system's folders that an ordinary user's lacks.
#[must_use]
pub fn tool_path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

/// Runs a program to its end and returns its output; on failure its last words.
pub(crate) async fn run(program: &'static str, command: &mut Command) -> Result<String> {
    let mut child = Group::spawn(
        program,
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    )?;
    let (mut stdout, mut stderr) = (child.inner.stdout.take(), child.inner.stderr.take());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let read = async {
        // What cannot be read is not worth more than the exit status.
        let _ = tokio::join!(read_all(&mut stdout, &mut out), read_all(&mut stderr, &mut err));
    };
    let ((), status) = tokio::join!(read, child.wait());
    if status?.success() {
        return Ok(String::from_utf8_lossy(&out).into_owned());
    }
    let said = String::from_utf8_lossy(&err);
    Err(HostError::Program {
        program,
        detail: crate::vmm::qemu::tail(said.trim(), 1500).to_owned(),
    })
}

async fn read_all(
    from: &mut Option<impl tokio::io::AsyncRead + Unpin>,
    into: &mut Vec<u8>,
) -> std::io::Result<()> {
    match from {
        Some(from) => tokio::io::AsyncReadExt::read_to_end(from, into).await.map(drop),
        None => Ok(()),
    }
}

/// A program with all that it starts: dropped before its end, the whole group is killed, so that a build which is
/// given up leaves nothing behind.
pub(super) struct Group {
    pub(super) inner: tokio::process::Child,
    program: &'static str,
    leader: Option<rustix::process::Pid>,
}

impl Group {
    pub(super) fn spawn(program: &'static str, command: &mut Command) -> Result<Self> {
        let inner = command
            .env("LC_ALL", "C")
            .env("PATH", tool_path())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| HostError::Program {
                program,
                detail: format!("cannot run it: {error}; is it installed?"),
            })?;
        let leader = inner
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(rustix::process::Pid::from_raw);
        Ok(Self {
            inner,
            program,
            leader,
        })
    }

    /// Waits for its end.
    pub(super) async fn wait(&mut self) -> Result<std::process::ExitStatus> {
        let status = self.inner.wait().await.map_err(|error| HostError::Program {
            program: self.program,
            detail: error.to_string(),
        })?;
        // From now on the number may be another's.
        self.leader = None;
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.leader {
            let _ = rustix::process::kill_process_group(leader, rustix::process::Signal::KILL);
        }
    }
}

/// Gets the uncompressed kernel out of a bzImage.
/// Source: the kernel's `Documentation/arch/x86/boot.rst` (`setup_sects`, `payload_offset`, `payload_length`).
fn extract_vmlinux(image: &[u8]) -> std::result::Result<Vec<u8>, String> {
    if image.starts_with(b"\x7fELF") {
        return Ok(image.to_vec());
    }
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).ok_or("the kernel image is cut off")?;
        Ok::<_, String>(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("not a Linux kernel image".to_owned());
    }
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let payload = image
        .get(start..start.saturating_add(word(0x24c)?))
        .ok_or("the kernel image's payload is cut off")?;
    let vmlinux = decompress(payload)?;
    if vmlinux.starts_with(b"\x7fELF") {
        Ok(vmlinux)
    } else {
        Err("the kernel's payload is no ELF file".to_owned())
    }
}

/// Undoes whichever compression the first bytes name; plain bytes pass.
pub(super) fn decompress(bytes: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let mut out = Vec::new();
    match bytes {
        [0x1f, 0x8b, ..] => {
            flate2::read::GzDecoder::new(bytes)
                .read_to_end(&mut out)
                .map_err(|error| format!("gzip: {error}"))?;
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            ruzstd::decoding::StreamingDecoder::new(bytes)
                .map_err(|error| format!("zstd: {error}"))?
                .read_to_end(&mut out)
                .map_err(|error| format!("zstd: {error}"))?;
        }
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            lzma_rs::xz_decompress(&mut &*bytes, &mut out).map_err(|error| format!("xz: {error:?}"))?;
        }
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => lz4_legacy(rest, &mut out)?,
        _ => out.extend_from_slice(bytes),
    }
    Ok(out)
}

/// LZ4's "legacy" frame, which kernels use: blocks of at most 8 MiB, each behind its compressed length.
fn lz4_legacy(mut rest: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), String> {
    const BLOCK: usize = 8 << 20;
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        // The kernel appends the uncompressed length, which is no block.
        if length == 0 || length > tail.len() {
            break;
        }
        let (block, next) = tail.split_at(length);
        out.extend(lz4_flex::block::decompress(block, BLOCK).map_err(|error| format!("lz4: {error}"))?);
        rest = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn a_program_given_up_takes_what_it_started_along() {
        let mut group = Group::spawn(
            "sh",
            Command::new("sh")
                .args(["-c", "sleep 1000 & echo $!; wait"])
                .stdout(Stdio::piped()),
        )
        .unwrap();
        let stdout = group.inner.stdout.take().unwrap();
        let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(stdout));
        let pid = lines.next_line().await.unwrap().unwrap().parse().unwrap();
        let mut grandchild = crate::vmm::process::VmmProcess::find(pid).unwrap();
        drop(group);
        grandchild.exited().await;
    }

    #[test]
    fn every_compression_of_kernels_and_modules_is_undone() {
        let plain: Vec<u8> = (0..100_000u32).flat_map(|n| (n % 251).to_le_bytes()).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        assert!(decompress(&gzip.finish().unwrap()).unwrap() == plain);
        let mut xz = Vec::new();
        lzma_rs::xz_compress(&mut &*plain, &mut xz).unwrap();
        assert!(decompress(&xz).unwrap() == plain);
        let zstd = ruzstd::encoding::compress_to_vec(&*plain, ruzstd::encoding::CompressionLevel::Fastest);
        assert!(decompress(&zstd).unwrap() == plain);
        let block = lz4_flex::block::compress(&plain);
        let lz4 = [
            &[0x02, 0x21, 0x4c, 0x18],
            &(block.len() as u32).to_le_bytes()[..],
            &block,
        ]
        .concat();
        assert!(decompress(&lz4).unwrap() == plain);
        assert!(decompress(b"plain").unwrap() == b"plain");
    }

    #[test]
    fn damaged_images_are_refused() {
        assert!(extract_vmlinux(b"").is_err());
        assert!(extract_vmlinux(&[0; 4096]).is_err());
        let mut image = vec![0; 0x300];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x250].fill(0xff);
        assert!(extract_vmlinux(&image).is_err());
    }
}
