//! Guests that misbehave harm only themselves.

use std::time::Duration;

use wrenn_client::{
    CreateSandbox, Error, Exec, ExecEvent, ExecOptions, ExecStream, SandboxHandle, SandboxStatus,
    TemplateStatus,
};
use wrenn_testkit::platform::{Platform, eventually, output, shell};

use crate::WRENN;

const LIMIT: Duration = Duration::from_secs(60);

async fn started(stream: &mut ExecStream) -> u32 {
    match stream.next().await.expect("its beginning") {
        Some(ExecEvent::Started { pid }) => pid,
        other => panic!("{other:?}"),
    }
}

/// Bytes that a process has written so far.
async fn written(sandbox: &SandboxHandle, pid: u32) -> u64 {
    output(sandbox, &format!("sed -n 's/^wchar: //p' /proc/{pid}/io"))
        .await
        .parse()
        .expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_guest_harms_only_itself() {
    let platform = Platform::start(WRENN).await;
    let (hostile, neighbour) = tokio::join!(platform.sandbox(), platform.sandbox());

    // A flood that nobody reads stops the program that makes it; nothing of it piles up in the server.
    let before = platform.peak_memory();
    let flood = ExecOptions {
        cmd: "/bin/cat".into(),
        args: vec!["/dev/zero".into()],
        ..ExecOptions::default()
    };
    let mut stream = hostile.exec_stream(&flood).await.expect("a flood");
    let pid = started(&mut stream).await;
    let mut last = 0;
    let amount = eventually("the flood stands still", LIMIT, async || {
        let now = written(&hostile, pid).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let still = now > 0 && now == last;
        last = now;
        still.then_some(now)
    })
    .await;
    assert!(amount < 64 << 20, "{} MiB went somewhere", amount >> 20);
    let grown = platform.peak_memory().saturating_sub(before);
    assert!(
        grown < 64 << 20,
        "the server keeps {} MiB of the flood",
        grown >> 20
    );
    assert_eq!(output(&neighbour, "echo $((6*7))").await, "42");
    stream.control().kill().await.expect("kill");
    while let Some(event) = stream.next().await.expect("its end") {
        if let ExecEvent::Exited { code } = event {
            assert_eq!(code, -1);
        }
    }

    // So many processes that no more can be made: bounded by the guest's own limits.
    let bomb = Exec {
        cmd: "/bin/bash".into(),
        args: vec!["-c".into(), "ulimit -u 400; f() { f | f & }; f; sleep 2".into()],
        user: Some("user".into()),
        timeout_sec: Some(20),
        ..Exec::default()
    };
    let _ = hostile.exec(&bomb).await;
    assert_eq!(output(&neighbour, "echo $((6*7))").await, "42");
    // One signal to all at once: whatever goes through a list is outrun.
    let kill = "import os; os.setuid(1000); os.kill(-1, 9)";
    eventually("the bomb is over", LIMIT, async || {
        let python = Exec {
            cmd: "python3".into(),
            args: vec!["-c".into(), kill.into()],
            ..Exec::default()
        };
        let _ = hostile.exec(&python).await;
        let count = Exec {
            cmd: "pgrep".into(),
            args: vec!["-c".into(), "-u".into(), "user".into()],
            ..Exec::default()
        };
        (hostile.exec(&count).await.ok()?.stdout.trim() == "0").then_some(())
    })
    .await;

    // Its agent is killed: the guest's init starts another.
    let _ = hostile
        .exec(&Exec {
            cmd: "/bin/sh".into(),
            args: vec!["-c".into(), "pkill -9 envd".into()],
            timeout_sec: Some(10),
            ..Exec::default()
        })
        .await;
    assert_eq!(output(&neighbour, "echo $((6*7))").await, "42");
    eventually("the agent is back", LIMIT, async || {
        let result = hostile
            .exec(&Exec {
                cmd: "/bin/echo".into(),
                args: vec!["back".into()],
                ..Exec::default()
            })
            .await
            .ok()?;
        (result.stdout == "back\n").then_some(())
    })
    .await;
    hostile.pause_and_wait(LIMIT).await.expect("it still pauses");
    hostile.resume_and_wait(LIMIT).await.expect("and resumes");

    // Its memory is used up: the guest's kernel ends the culprit.
    let hog = shell(&hostile, "python3 -c 'b = bytearray(2 << 30); print(len(b))'").await;
    assert_ne!(hog.exit_code, 0, "{hog:?}");

    // Its disk is full: refused with the reason, and all is well once there is room again.
    output(
        &hostile,
        "mount -o remount,rw / 2>/dev/null; fallocate -l 15G /fill; fallocate -l 8G /fill2; true",
    )
    .await;
    let full = output(&hostile, "df --output=avail -m / | tail -1").await;
    let left: u64 = full.trim().parse().expect("a number");
    let size = (left + 64) << 20;
    let refused = hostile
        .files()
        .upload_from(
            "/root/large",
            tokio::io::AsyncReadExt::take(tokio::io::repeat(7), size),
            Some(size),
        )
        .await;
    assert!(
        matches!(&refused, Err(Error::Agent(said)) if said.message.contains("space")),
        "{refused:?}"
    );
    output(&hostile, "rm -f /fill /fill2 /root/large").await;
    hostile
        .files()
        .write("/root/small", "fits")
        .await
        .expect("there is room again");

    // It ends itself.
    assert_eq!(output(&neighbour, "echo $((6*7))").await, "42");
    hostile.destroy_and_wait().await.expect("destroy");
    neighbour.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}

/// An agent of the guest's own making, as a snapshot can carry it along: it begins each answer and ends none.
const LIAR: &str = r#"cat > /run/wrenn/liar <<'END'
#!/usr/bin/python3
import socket
listener = socket.socket(socket.AF_INET6)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('::', 49983))
listener.listen(64)
kept = []
while True:
    connection, _ = listener.accept()
    kept.append(connection)
    connection.recv(65536)
    connection.sendall(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n')
END
chmod 755 /run/wrenn/liar
mv /run/wrenn/liar /run/wrenn/envd
kill -9 $(pgrep -x -P 1 envd)"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_that_never_comes_to_run_can_be_destroyed() {
    let platform = Platform::start(WRENN).await;
    let source = platform.sandbox().await;
    let root = Exec {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), LIAR.into()],
        user: Some("root".into()),
        timeout_sec: Some(10),
        ..Exec::default()
    };
    // It takes its own answer's agent away.
    let _ = source.exec(&root).await;
    eventually("the guest's own agent answers", LIMIT, async || {
        let echo = Exec {
            cmd: "/bin/echo".into(),
            timeout_sec: Some(10),
            ..Exec::default()
        };
        source.exec(&echo).await.is_err().then_some(())
    })
    .await;
    let snapshots = platform.client().snapshots();
    let template = snapshots
        .create(source.id(), Some("liar"), false)
        .await
        .expect("accepted");
    eventually("the snapshot is ready", LIMIT, async || {
        let list = snapshots.list(None).await.ok()?;
        let found = list.into_iter().find(|found| found.id == template.id)?;
        (found.status == TemplateStatus::Ready).then_some(())
    })
    .await;

    let wanted = CreateSandbox {
        template: Some("liar".into()),
        ..CreateSandbox::default()
    };
    let record = platform
        .client()
        .sandboxes()
        .create(&wanted)
        .await
        .expect("accepted");
    eventually("its machine runs", LIMIT, async || platform.vm_of(&record.id)).await;
    let stuck = platform.client().sandbox(&record.id);
    assert_eq!(
        stuck.get().await.expect("its record").status,
        SandboxStatus::Starting
    );
    stuck.destroy_and_wait().await.expect("destroyed while it starts");
    assert_eq!(platform.vm_of(&record.id), None, "its machine is gone");

    source.destroy_and_wait().await.expect("destroy");
    snapshots.delete("liar").await.expect("deleted");
    platform.finish().await;
}
