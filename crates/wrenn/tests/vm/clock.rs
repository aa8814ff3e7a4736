//! Sandboxes that nobody uses pause by themselves.

use std::time::{Duration, Instant};

use wrenn_client::{CreateSandbox, Error, Exec, SandboxHandle, SandboxStatus};
use wrenn_testkit::platform::{Platform, eventually, output};

use crate::WRENN;

const LIMIT: Duration = Duration::from_secs(30);

async fn status(sandbox: &SandboxHandle) -> SandboxStatus {
    sandbox.get().await.expect("its record").status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_sandboxes_pause_and_used_ones_do_not() {
    let platform = Platform::start(WRENN).await;
    let wanted = CreateSandbox {
        timeout_sec: Some(3),
        ..CreateSandbox::default()
    };
    let sandbox = platform.sandbox_from(&wanted).await;
    output(&sandbox, "echo kept > /dev/shm/kept").await;
    let used = Instant::now();
    eventually("it pauses by itself", LIMIT, async || {
        (status(&sandbox).await == SandboxStatus::Paused).then_some(())
    })
    .await;
    assert!(
        used.elapsed() > Duration::from_secs(2),
        "it paused after {:?}",
        used.elapsed()
    );
    let refused = sandbox
        .exec(&Exec {
            cmd: "true".into(),
            ..Exec::default()
        })
        .await;
    let Err(Error::InvalidState(refusal)) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(refusal.status, 409);
    assert!(
        refusal.message.contains("paused"),
        "the message names the status: {}",
        refusal.message
    );
    assert!(matches!(sandbox.ping().await, Err(Error::InvalidState(_))));

    sandbox.resume_and_wait(LIMIT).await.expect("resume");
    assert_eq!(output(&sandbox, "cat /dev/shm/kept").await, "kept");
    // Pings keep it going for longer than its time; so does a command that runs for longer.
    let start = Instant::now();
    eventually("pings go on for a while", LIMIT, async || {
        sandbox.ping().await.expect("ping");
        (start.elapsed() > Duration::from_secs(5)).then_some(())
    })
    .await;
    assert_eq!(status(&sandbox).await, SandboxStatus::Running);
    output(&sandbox, "sleep 5").await;
    assert_eq!(status(&sandbox).await, SandboxStatus::Running);
    eventually("it pauses again", LIMIT, async || {
        (status(&sandbox).await == SandboxStatus::Paused).then_some(())
    })
    .await;
    sandbox.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}
