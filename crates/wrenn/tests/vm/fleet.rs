//! Control plane and host agent as processes of their own: either may end at any moment without the other.

use std::time::Duration;

use wrenn_client::{CreateSandbox, Exec, SandboxHandle, SandboxStatus, TemplateStatus};
use wrenn_testkit::platform::{Platform, eventually, output};

use crate::WRENN;

const LIMIT: Duration = Duration::from_secs(120);

/// What stays the same as long as a guest is the same.
async fn boot(sandbox: &SandboxHandle) -> String {
    output(sandbox, "cat /proc/sys/kernel/random/boot_id /dev/shm/kept").await
}

async fn settles(sandbox: &SandboxHandle, wanted: SandboxStatus) {
    eventually(&format!("{} is {wanted}", sandbox.id()), LIMIT, async || {
        let record = sandbox.get().await.ok()?;
        assert_ne!(record.status, SandboxStatus::Error, "{record:?}");
        (record.status == wanted).then_some(())
    })
    .await;
}

/// Waits until a pause has begun to write memory, or is over.
async fn pausing(platform: &Platform, sandbox: &SandboxHandle) {
    let folder = platform.data_dir().join("sandboxes").join(sandbox.id());
    eventually("its memory is being written", LIMIT, async || {
        let writes = ["memory.diff.new", "memory.diff"];
        writes.iter().any(|name| folder.join(name).exists()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_half_may_end_at_any_moment() {
    let mut platform = Platform::start_apart(WRENN).await;

    // The control plane, while a host makes a machine of a size that it has no image of. What it asks for again is the
    // create that is under way.
    let unusual = CreateSandbox {
        memory_mb: Some(384),
        ..CreateSandbox::default()
    };
    let sandboxes = platform.client().sandboxes();
    let record = sandboxes.create(&unusual).await.expect("create");
    // A second one of that size waits for the same image.
    let other = sandboxes.create(&unusual).await.expect("create");
    eventually("its image is being made", LIMIT, async || {
        let made = |name: &String| name.starts_with("build-");
        wrenn_testkit::platform::names(&platform.data_dir().join("tmp"))
            .iter()
            .any(made)
            .then_some(())
    })
    .await;
    platform.kill();
    platform.restart().await;
    let (sandbox, other) = (
        platform.client().sandbox(&record.id),
        platform.client().sandbox(&other.id),
    );
    settles(&sandbox, SandboxStatus::Running).await;
    settles(&other, SandboxStatus::Running).await;
    let images = platform.data_dir().join("images/teams");
    let shaped = walk(&images, "1x384-");
    assert_eq!(shaped, 1, "one image serves both");
    other.destroy_and_wait().await.expect("destroy");
    output(
        &sandbox,
        "head -c 120000000 /dev/urandom > /dev/shm/ballast; echo kept > /dev/shm/kept",
    )
    .await;
    let before = boot(&sandbox).await;

    // During a pause, during a resume, during a snapshot.
    sandbox.pause().await.expect("pause");
    pausing(&platform, &sandbox).await;
    platform.kill();
    platform.restart().await;
    settles(&sandbox, SandboxStatus::Paused).await;
    sandbox.resume().await.expect("resume");
    eventually("its machine is there", LIMIT, async || {
        platform.vm_of(sandbox.id())
    })
    .await;
    platform.kill();
    platform.restart().await;
    settles(&sandbox, SandboxStatus::Running).await;
    assert_eq!(boot(&sandbox).await, before);
    let snapshots = platform.client().snapshots();
    let template = snapshots
        .create(sandbox.id(), Some("taken"), false)
        .await
        .expect("accepted");
    platform.kill();
    platform.restart().await;
    settles(&sandbox, SandboxStatus::Running).await;
    eventually("the snapshot is ready", LIMIT, async || {
        let list = snapshots.list(None).await.ok()?;
        let found = list.into_iter().find(|found| found.id == template.id)?;
        (found.status == TemplateStatus::Ready).then_some(())
    })
    .await;
    assert_eq!(boot(&sandbox).await, before);

    // The host agent, while it pauses and while it resumes.
    sandbox.pause().await.expect("pause");
    pausing(&platform, &sandbox).await;
    platform.crash_agent();
    eventually("it is at rest", LIMIT, async || {
        let status = sandbox.get().await.ok()?.status;
        assert_ne!(status, SandboxStatus::Error);
        match status {
            SandboxStatus::Running => sandbox.pause().await.err().map(drop),
            SandboxStatus::Paused => Some(()),
            _ => None,
        }
    })
    .await;
    settles(&sandbox, SandboxStatus::Paused).await;
    sandbox.resume().await.expect("resume");
    eventually("its machine is there", LIMIT, async || {
        platform.vm_of(sandbox.id())
    })
    .await;
    platform.crash_agent();
    eventually("it runs", LIMIT, async || {
        let record = sandbox.get().await.ok()?;
        assert_ne!(record.status, SandboxStatus::Error, "{record:?}");
        match record.status {
            // Nothing of it had run yet.
            SandboxStatus::Paused => sandbox.resume().await.err().map(drop),
            SandboxStatus::Running => {
                let echo = Exec {
                    cmd: "true".into(),
                    ..Exec::default()
                };
                sandbox.exec(&echo).await.ok().map(drop)
            }
            _ => None,
        }
    })
    .await;
    assert_eq!(boot(&sandbox).await, before);

    // The control plane, right after it has accepted an end.
    sandbox.destroy().await.expect("accepted");
    platform.kill();
    platform.restart().await;
    eventually("its machine is gone", LIMIT, async || {
        platform.vm_of(sandbox.id()).is_none().then_some(())
    })
    .await;
    eventually("its record is closed", LIMIT, async || {
        let list = sandboxes.list().await.ok()?;
        list.iter().all(|record| record.id != sandbox.id()).then_some(())
    })
    .await;
    snapshots.delete("taken").await.expect("deleted");
    platform.finish().await;
}

/// Folders below `dir`, at any depth, whose names begin so.
fn walk(dir: &std::path::Path, prefix: &str) -> usize {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| {
            let here = entry.file_name().to_string_lossy().starts_with(prefix);
            usize::from(here) + walk(&entry.path(), prefix)
        })
        .sum()
}
