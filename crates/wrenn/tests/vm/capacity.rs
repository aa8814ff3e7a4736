//! What does not fit is refused before anything starts.

use std::time::Duration;

use wrenn_client::{CreateSandbox, Error};
use wrenn_testkit::platform::{Platform, names, output};

use crate::WRENN;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_fit_is_refused_before_it_starts() {
    let platform = Platform::start_with(WRENN, &[("WRENN_MEMORY_MB", "700")]).await;
    let sandboxes = platform.client().sandboxes();
    let first = platform.sandbox().await;
    let refused = sandboxes.create_running(&CreateSandbox::default()).await;
    match &refused {
        Err(Error::NoCapacity(refusal)) => assert_eq!(refusal.status, 503),
        // The host has the last word, when the control plane has not yet heard how little it has left.
        Err(Error::SandboxFailed {
            message: Some(message),
            ..
        }) => assert!(message.contains("MiB"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        names(&platform.data_dir().join("sandboxes"))
            .into_iter()
            .collect::<Vec<_>>(),
        [first.id()]
    );
    for failed in sandboxes.list().await.expect("list") {
        if failed.id != first.id() {
            platform
                .client()
                .sandbox(failed.id)
                .destroy_and_wait()
                .await
                .expect("destroy");
        }
    }

    // Out of bounds: the field and its bounds are named.
    let shapes = [
        (
            "vcpus",
            CreateSandbox {
                vcpus: Some(0),
                ..CreateSandbox::default()
            },
        ),
        (
            "vcpus",
            CreateSandbox {
                vcpus: Some(10_000),
                ..CreateSandbox::default()
            },
        ),
        (
            "memory_mb",
            CreateSandbox {
                memory_mb: Some(16),
                ..CreateSandbox::default()
            },
        ),
        (
            "memory_mb",
            CreateSandbox {
                memory_mb: Some(u32::MAX),
                ..CreateSandbox::default()
            },
        ),
        (
            "disk_size_mb",
            CreateSandbox {
                disk_size_mb: Some(100),
                ..CreateSandbox::default()
            },
        ),
        (
            "disk_size_mb",
            CreateSandbox {
                disk_size_mb: Some(u32::MAX),
                ..CreateSandbox::default()
            },
        ),
        (
            "timeout_sec",
            CreateSandbox {
                timeout_sec: Some(u32::MAX),
                ..CreateSandbox::default()
            },
        ),
    ];
    for (field, shape) in shapes {
        let refused = sandboxes.create(&shape).await;
        let Err(Error::InvalidRequest(refusal)) = refused else {
            panic!("{field}: {refused:?}")
        };
        assert_eq!(refusal.status, 400);
        assert!(
            refusal.message.contains(field) && refusal.message.contains("between"),
            "{}",
            refusal.message
        );
    }
    let unknown = sandboxes
        .create(&CreateSandbox {
            template: Some("no-such".into()),
            ..CreateSandbox::default()
        })
        .await;
    assert!(matches!(unknown, Err(Error::NotFound(_))), "{unknown:?}");

    // A paused one gives its memory back, and gets it again only when it is there.
    first.pause_and_wait(LIMIT).await.expect("pause");
    let small = CreateSandbox {
        vcpus: Some(2),
        memory_mb: Some(256),
        ..CreateSandbox::default()
    };
    let odd = platform.sandbox_from(&small).await;
    assert_eq!(output(&odd, "nproc").await, "2");
    let total: u64 = output(&odd, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")
        .await
        .parse()
        .expect("a number");
    assert!((180 << 10..256 << 10).contains(&total), "{total} kB");
    let refused = first.resume_and_wait(LIMIT).await;
    assert!(
        matches!(refused, Err(Error::NoCapacity(_) | Error::SandboxFailed { .. })),
        "{refused:?}"
    );
    assert_eq!(
        first.get().await.expect("its record").status,
        wrenn_client::SandboxStatus::Paused
    );
    odd.destroy_and_wait().await.expect("destroy");
    first
        .resume_and_wait(LIMIT)
        .await
        .expect("resume once there is room");
    first.destroy_and_wait().await.expect("destroy");

    // A larger disk is there at once.
    let large = CreateSandbox {
        disk_size_mb: Some(40_960),
        ..CreateSandbox::default()
    };
    let sandbox = platform.sandbox_from(&large).await;
    let gib: u64 = output(&sandbox, "df --output=size -BG / | tail -1 | tr -dc 0-9")
        .await
        .parse()
        .expect("a number");
    assert!(gib > 30, "{gib} GiB");
    sandbox.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}
