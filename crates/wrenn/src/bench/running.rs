//! Sandboxes that run: commands, files, snapshots, pause and resume.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use futures::StreamExt as _;
use rustix::fs::SeekFrom;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use wrenn_client::{Client, Exec, SandboxHandle, TemplateStatus};

use super::create::echo;
use super::floor::{BareVm, Recipe};
use super::platform::{Platform, usual_sandbox};
use super::report::{Row, Series, Unit};

const MIB: usize = 1 << 20;
const TRANSFER: usize = 64 * MIB;
const FILE: &str = "/tmp/bench.bin";
const LIMIT: Duration = Duration::from_secs(120);
/// Commands in a row, from outside or by the guest's own loop, …
const LOOP: usize = 5;
/// … after so many that are not counted.
const WARM_UP: usize = 2;
/// Starts the command as cheaply as a guest can, and prints each round's nanoseconds.
const FORK_LOOP: &str = "
import os, sys, time
for i in range(int(sys.argv[1])):
    if len(sys.argv) > 2: time.sleep(float(sys.argv[2]))
    t = time.perf_counter_ns()
    a, b = os.pipe()
    p = os.posix_spawn('/bin/sh', ['sh', '-c', 'echo hi'], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, b, 1)])
    os.close(b)
    assert os.read(a, 64) == b'hi\\n'
    os.close(a)
    os.waitpid(p, 0)
    print(time.perf_counter_ns() - t)
";
/// Between two calls from outside a guest is idle for about so long, in seconds: its next start finds cold caches and a
/// sleeping processor.
const IDLE: &str = "0.002";
/// Fills memory with what no page shares with another, tells, and holds it.
const HOLD: &str = "
import os, sys, time
mib = int(sys.argv[1])
data = bytearray(mib << 20)
for at in range(0, mib << 20, 1 << 20): data[at:at + (1 << 20)] = os.urandom(1 << 20)
open('/tmp/holds', 'w').close()
while True: time.sleep(3600)
";

/// One sandbox and one bare machine, side by side.
pub(super) struct Running<'a> {
    platform: &'a Platform,
    recipe: &'a Recipe,
    work: PathBuf,
    client: Client,
    sandbox: SandboxHandle,
    bare: BareVm,
}

impl<'a> Running<'a> {
    pub(super) async fn start(
        platform: &'a mut Platform,
        recipe: &'a Recipe,
        work: &Path,
    ) -> anyhow::Result<Self> {
        let client = platform.client().await?;
        let sandbox = client.sandboxes().create_running(&usual_sandbox()).await?;
        let bare = recipe.start().await?;
        bare.guest.wait_healthy().await?;
        bare.guest.init().await?;
        Ok(Self {
            platform,
            recipe,
            work: work.to_path_buf(),
            client,
            sandbox,
            bare,
        })
    }

    pub(super) async fn end(self) -> anyhow::Result<()> {
        self.sandbox.destroy_and_wait().await?;
        self.bare.end().await
    }

    /// Round trips of a small command, once all that takes part is warm.
    pub(super) async fn execs(&self, count: usize) -> anyhow::Result<Vec<Row>> {
        let mut product = Series::new("exec round trip, `sh -c 'echo hi'`");
        let mut inside = Series::new("fork + exec inside the guest, one after the other");
        let mut idle = Series::new("fork + exec inside the guest, each after 2 ms of idleness");
        let mut direct = Series::new("bare QEMU: agent called directly");
        self.platform.rest().await;
        // Each in turn for a few rounds, like the loops inside the guest: what one leaves in the processor's caches is the
        // next one's only at the begin, which is not measured.
        while product.samples.len() < count {
            for round in 0..WARM_UP + LOOP {
                let before = Instant::now();
                self.sandbox.exec(&echo()).await?;
                if round >= WARM_UP {
                    product.time(before.elapsed());
                }
            }
            for round in 0..WARM_UP + LOOP {
                let before = Instant::now();
                let times = self.bare.guest.exec("sh", &["-c", "echo hi"]).await?;
                if round >= WARM_UP {
                    direct.time(times.end - before);
                }
            }
            for took in self.fork_loop(None).await? {
                inside.time(took);
            }
            for took in self.fork_loop(Some(IDLE)).await? {
                idle.time(took);
            }
        }
        Ok(vec![Row::new(Unit::Millis, product, [inside, idle, direct])])
    }

    async fn fork_loop(&self, pause: Option<&str>) -> anyhow::Result<Vec<Duration>> {
        let rounds = (LOOP + WARM_UP).to_string();
        let arguments: Vec<&str> = std::iter::once(&*rounds).chain(pause).collect();
        let result = self.sandbox.exec(&python(FORK_LOOP, &arguments)).await?;
        let lines: Vec<u64> = result.stdout.lines().map(str::parse).collect::<Result<_, _>>()?;
        ensure!(
            lines.len() == LOOP + WARM_UP,
            "the guest's loop failed: {}",
            result.stderr
        );
        Ok(lines[WARM_UP..]
            .iter()
            .map(|nanos| Duration::from_nanos(*nanos))
            .collect())
    }

    /// Files up and down.
    pub(super) async fn transfers(&self, count: usize) -> anyhow::Result<Vec<Row>> {
        let mut up = Series::new("64 MiB up (files/stream/write)");
        let mut down = Series::new("64 MiB down (files/stream/read)");
        let mut socket = Series::new("loopback socket");
        let mut direct_up = Series::new("bare QEMU: agent called directly, QEMU's network");
        let mut direct_down = direct_up.clone();
        let content = Bytes::from(random_bytes(TRANSFER)?);
        let files = self.sandbox.files();
        for _ in 0..count {
            let before = Instant::now();
            files.write(FILE, content.clone()).await?;
            up.time(before.elapsed());
            let before = Instant::now();
            self.bare.guest.put(FILE, content.clone()).await?;
            direct_up.time(before.elapsed());
            socket.time(socket_copy(content.clone()).await?);

            let before = Instant::now();
            let mut stream = std::pin::pin!(files.read_stream(FILE).await?.into_stream());
            let mut length = 0;
            while let Some(chunk) = stream.next().await {
                length += chunk?.len();
            }
            down.time(before.elapsed());
            ensure!(length == TRANSFER, "{length} bytes came back");
            let before = Instant::now();
            let length = self.bare.guest.get(FILE).await?;
            direct_down.time(before.elapsed());
            ensure!(length == TRANSFER, "{length} bytes came back");
        }
        Ok(vec![
            Row::new(Unit::Millis, up, [socket.clone(), direct_up]),
            Row::new(Unit::Millis, down, [socket, direct_down]),
        ])
    }

    /// Templates made of a running sandbox.
    pub(super) async fn snapshots(&self, count: usize) -> anyhow::Result<Vec<Row>> {
        let mut product = Series::new("snapshot of a running sandbox → ready");
        let mut floor = Series::new("copy of memory image and disk overlay");
        let vmm = self
            .platform
            .sandbox_vmms()
            .pop()
            .context("the sandbox's machine is gone")?;
        let snapshots = self.client.snapshots();
        for _ in 0..count {
            self.platform.rest().await;
            let before = Instant::now();
            let mut template = snapshots.create(self.sandbox.id(), Some("bench"), false).await?;
            while template.status == TemplateStatus::Building && before.elapsed() < LIMIT {
                tokio::time::sleep(Duration::from_millis(10)).await;
                let found = snapshots
                    .list(None)
                    .await?
                    .into_iter()
                    .find(|other| other.id == template.id);
                template = found.context("a snapshot is gone")?;
            }
            product.time(before.elapsed());
            ensure!(template.status == TemplateStatus::Ready, "a snapshot failed");
            self.client.sandbox(self.sandbox.id()).wait_settled(LIMIT).await?;
            snapshots.delete("bench").await?;

            self.platform.rest().await;
            let (memory, disk) = (self.recipe.memory().to_path_buf(), vmm.dir.join("disk.qcow2"));
            let work = self.work.clone();
            let took = tokio::task::spawn_blocking(move || {
                let before = Instant::now();
                let copies = [(memory, work.join("copy.img")), (disk, work.join("copy.qcow2"))];
                for (from, to) in &copies {
                    copy_data(from, to)?;
                }
                let took = before.elapsed();
                for (_, to) in copies {
                    std::fs::remove_file(to)?;
                }
                std::io::Result::Ok(took)
            })
            .await??;
            floor.time(took);
        }
        Ok(vec![Row::new(Unit::Millis, product, [floor])])
    }
}

/// Pause and resume of a sandbox in which a process holds `mib` MiB of random bytes.
pub(super) async fn pauses(
    platform: &mut Platform,
    recipe: &Recipe,
    work: &Path,
    mib: usize,
    count: usize,
) -> anyhow::Result<Vec<Row>> {
    let mut pause = Series::new(format!("pause, {mib} MiB touched"));
    let mut resume = Series::new(format!("resume, {mib} MiB touched"));
    let mut floor_pause = Series::new(format!("bare QEMU: stop, save state, write {mib} MiB"));
    let mut floor_resume = Series::new(format!("bare QEMU: read {mib} MiB, restore → agent answers"));
    let content = Bytes::from(random_bytes(mib * MIB)?);
    let file = work.join("memory.bin");

    let sandbox = platform
        .client()
        .await?
        .sandboxes()
        .create_running(&usual_sandbox())
        .await?;
    sandbox
        .exec_background(&python(HOLD, &[&mib.to_string()]))
        .await?;
    let wait = Exec {
        cmd: "sh".to_owned(),
        args: vec![
            "-c".to_owned(),
            "until [ -e /tmp/holds ]; do sleep 0.2; done".to_owned(),
        ],
        timeout_sec: Some(100),
        ..Exec::default()
    };
    let result = sandbox.exec(&wait).await?;
    if result.exit_code != 0 {
        bail!("the guest could not fill its memory: {}", result.stderr);
    }
    let mut bare = recipe.start().await?;
    bare.guest.wait_healthy().await?;
    for _ in 0..count {
        platform.rest().await;
        let before = Instant::now();
        sandbox.pause_and_wait(LIMIT).await?;
        pause.time(before.elapsed());

        platform.rest().await;
        let before = Instant::now();
        bare.freeze().await?;
        let (path, bytes) = (file.clone(), content.clone());
        tokio::task::spawn_blocking(move || File::create(path)?.write_all(&bytes)).await??;
        floor_pause.time(before.elapsed());
        bare.end().await?;

        platform.rest().await;
        let before = Instant::now();
        sandbox.resume_and_wait(LIMIT).await?;
        resume.time(before.elapsed());

        platform.rest().await;
        let before = Instant::now();
        let (path, length) = (file.clone(), content.len());
        tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            File::open(path)?.read_exact(&mut bytes)
        })
        .await??;
        bare = recipe.start().await?;
        bare.guest.wait_healthy().await?;
        floor_resume.time(before.elapsed());
        std::fs::remove_file(&file)?;
    }
    bare.end().await?;
    sandbox.destroy_and_wait().await?;
    Ok(vec![
        Row::new(Unit::Millis, pause, [floor_pause]),
        Row::new(Unit::Millis, resume, [floor_resume]),
    ])
}

fn python(program: &str, arguments: &[&str]) -> Exec {
    Exec {
        cmd: "python3".to_owned(),
        args: ["-c", program]
            .iter()
            .chain(arguments)
            .map(|&word| word.to_owned())
            .collect(),
        timeout_sec: Some(60),
        ..Exec::default()
    }
}

fn random_bytes(length: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Sends bytes from one end of a local connection to the other.
async fn socket_copy(content: Bytes) -> anyhow::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut sender = TcpStream::connect(listener.local_addr()?).await?;
    let (mut receiver, _) = listener.accept().await?;
    let length = content.len();
    let before = Instant::now();
    let sending = tokio::spawn(async move {
        sender.write_all(&content).await?;
        sender.shutdown().await
    });
    let mut buffer = vec![0; 256 << 10];
    let mut received = 0;
    loop {
        match receiver.read(&mut buffer).await? {
            0 => break,
            count => received += count,
        }
    }
    sending.await??;
    ensure!(received == length, "{received} bytes arrived");
    Ok(before.elapsed())
}

/// Copies the parts of a file that hold data.
fn copy_data(from: &Path, to: &Path) -> std::io::Result<()> {
    let source = File::open(from)?;
    let target = File::create(to)?;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; MIB];
    let mut at = 0;
    while at < length {
        // The error for "no more data" is the only one that an open file gives here.
        let Ok(start) = rustix::fs::seek(&source, SeekFrom::Data(at)) else {
            break;
        };
        at = rustix::fs::seek(&source, SeekFrom::Hole(start))?;
        let mut place = start;
        while place < at {
            let part = usize::try_from(at - place).map_or(MIB, |left| left.min(MIB));
            source.read_exact_at(&mut buffer[..part], place)?;
            target.write_all_at(&buffer[..part], place)?;
            place += part as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_equal_and_keep_their_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(b"data", 3 << 20).unwrap();
        copy_data(&from, &to).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        use std::os::unix::fs::MetadataExt as _;
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 4 << 20);
    }
}
