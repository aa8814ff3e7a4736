//! Programs in a sandbox: collected, streamed, in the background, in terminals.

use std::time::Duration;

use sha2::{Digest as _, Sha256};
use wrenn_client::{
    Error, Exec, ExecEvent, ExecOptions, ExecStream, Pty, PtyEvent, PtyOptions, SandboxHandle,
};
use wrenn_testkit::platform::{Platform, eventually, output, shell};

use crate::WRENN;

const LIMIT: Duration = Duration::from_secs(60);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bash(script: &str) -> ExecOptions {
    ExecOptions {
        cmd: "/bin/bash".into(),
        args: vec!["-c".into(), script.into()],
        ..ExecOptions::default()
    }
}

/// Output, errors and exit code of a stream, read to its end.
async fn drain(stream: &mut ExecStream) -> (Vec<u8>, Vec<u8>, i32) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match stream.next().await.expect("the stream goes on") {
            Some(ExecEvent::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
            Some(ExecEvent::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
            Some(ExecEvent::Exited { code }) => return (stdout, stderr, code),
            Some(_) => {}
            None => panic!("the stream ended without an exit"),
        }
    }
}

async fn collected(sandbox: &SandboxHandle) {
    let result = shell(sandbox, "echo out; echo err >&2; exit 7").await;
    assert_eq!(
        (result.stdout.as_str(), result.stderr.as_str(), result.exit_code),
        ("out\n", "err\n", 7)
    );
    assert_eq!(result.encoding, "utf-8");
    assert_eq!(shell(sandbox, "kill -9 $$").await.exit_code, -1);
    let bytes = shell(sandbox, r"printf '\377\000'").await;
    assert_eq!(
        (bytes.encoding.as_str(), bytes.stdout.as_str()),
        ("base64", "/wA=")
    );

    let missing = sandbox
        .exec(&Exec {
            cmd: "/no/such/program".into(),
            ..Exec::default()
        })
        .await;
    assert!(
        matches!(missing, Err(Error::InvalidRequest(_) | Error::NotFound(_))),
        "{missing:?}"
    );
    let nowhere = sandbox
        .exec(&Exec {
            cmd: "true".into(),
            cwd: Some("/no/such/place".into()),
            ..Exec::default()
        })
        .await;
    assert!(matches!(nowhere, Err(Error::InvalidRequest(_))), "{nowhere:?}");
    let nobody = sandbox
        .exec(&Exec {
            cmd: "true".into(),
            user: Some("nobody-such".into()),
            ..Exec::default()
        })
        .await;
    assert!(matches!(nobody, Err(Error::InvalidRequest(_))), "{nobody:?}");
    let user = Exec {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), "id -un; pwd; sudo -n id -un".into()],
        user: Some("user".into()),
        ..Exec::default()
    };
    assert_eq!(
        sandbox.exec(&user).await.expect("exec as a user").stdout,
        "user\n/home/user\nroot\n"
    );

    // What outlasts its time is killed with all that it started.
    let slow = Exec {
        cmd: "/bin/bash".into(),
        args: vec!["-c".into(), "sleep 4711 & sleep 4712".into()],
        timeout_sec: Some(1),
        ..Exec::default()
    };
    let late = sandbox.exec(&slow).await;
    assert!(matches!(late, Err(Error::Timeout(_))), "{late:?}");
    eventually("the group of a late command is gone", LIMIT, async || {
        (shell(sandbox, "pgrep -f 'sleep 471[12]'").await.exit_code == 1).then_some(())
    })
    .await;
}

async fn streamed(sandbox: &SandboxHandle) {
    // Ten megabytes, byte for byte.
    let mut stream = sandbox
        .exec_stream(&bash(
            "head -c 10485760 /dev/urandom | tee /root/noise; echo done >&2; exit 3",
        ))
        .await
        .expect("exec stream");
    let (stdout, stderr, code) = drain(&mut stream).await;
    assert_eq!(
        (stdout.len(), stderr.as_slice(), code),
        (10 << 20, b"done\n".as_slice(), 3)
    );
    let expected = output(sandbox, "sha256sum < /root/noise | cut -d' ' -f1; rm /root/noise").await;
    assert_eq!(hex(&Sha256::digest(&stdout)), expected);
    assert!(stream.next().await.expect("after the end").is_none());

    // Standard input, with its end.
    let options = ExecOptions {
        stdin: true,
        ..bash("tr a-z A-Z; echo end")
    };
    let mut stream = sandbox.exec_stream(&options).await.expect("exec stream");
    let input = stream.stdin();
    input.write(b"some words\n").await.expect("input");
    input.write(b"more words\n").await.expect("input");
    input.close().await.expect("end of input");
    assert_eq!(
        drain(&mut stream).await,
        (b"SOME WORDS\nMORE WORDS\nend\n".to_vec(), Vec::new(), 0)
    );

    // Killed from outside, with its children.
    let mut stream = sandbox
        .exec_stream(&bash("sleep 4713 & echo up; wait"))
        .await
        .expect("exec stream");
    let control = stream.control();
    loop {
        match stream.next().await.expect("its beginning") {
            Some(ExecEvent::Stdout(text)) => break assert_eq!(text, "up\n"),
            Some(_) => {}
            None => panic!("it ended early"),
        }
    }
    control.kill().await.expect("kill");
    assert_eq!(drain(&mut stream).await.2, -1);
    eventually("its child is gone", LIMIT, async || {
        (shell(sandbox, "pgrep -f 'sleep 4713'").await.exit_code == 1).then_some(())
    })
    .await;

    let mut stream = sandbox
        .exec_stream(&ExecOptions {
            cmd: "/no/such/program".into(),
            ..ExecOptions::default()
        })
        .await
        .expect("a stream");
    let refused = stream.next().await;
    assert!(
        matches!(refused, Err(Error::InvalidRequest(_) | Error::NotFound(_))),
        "{refused:?}"
    );
}

async fn background(sandbox: &SandboxHandle) {
    let command = Exec {
        cmd: "/bin/bash".into(),
        args: vec![
            "-c".into(),
            "echo begun; while ! test -e /tmp/go; do sleep 0.05; done; echo over; sleep 4714".into(),
        ],
        tag: Some("worker".into()),
        ..Exec::default()
    };
    let started = sandbox.exec_background(&command).await.expect("background");
    let listed = sandbox.processes().await.expect("processes");
    assert_eq!(
        listed
            .iter()
            .map(|process| (process.tag.as_str(), process.pid))
            .collect::<Vec<_>>(),
        [("worker", started.pid)]
    );

    // Somebody else follows it by its tag.
    let mut stream = sandbox.process_stream("worker").await.expect("a process stream");
    loop {
        if let Some(ExecEvent::Started { .. }) = stream.next().await.expect("its beginning") {
            break;
        }
    }
    output(sandbox, "touch /tmp/go").await;
    let mut seen = Vec::new();
    while !seen.ends_with(b"over\n") {
        match stream.next().await.expect("its output") {
            Some(ExecEvent::Stdout(bytes)) => seen.extend_from_slice(&bytes),
            other => panic!("{other:?}"),
        }
    }
    sandbox.kill_process("worker").await.expect("kill by tag");
    assert_eq!(drain(&mut stream).await.2, -1);
    assert!(matches!(
        sandbox.kill_process("worker").await,
        Err(Error::NotFound(_))
    ));
    assert!(sandbox.processes().await.expect("processes").is_empty());
}

/// Reads a terminal until its output since the call contains a text.
async fn until(terminal: &mut Pty, text: &str) -> String {
    let mut seen = String::new();
    let read = async {
        while !seen.contains(text) {
            match terminal.next().await.expect("the terminal goes on") {
                Some(PtyEvent::Output(bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} before '{text}'"),
            }
        }
    };
    let outcome = tokio::time::timeout(LIMIT, read).await;
    assert!(outcome.is_ok(), "no '{text}' in the terminal: {seen:?}");
    seen
}

async fn terminals(sandbox: &SandboxHandle) {
    let mut terminal = sandbox.pty(&PtyOptions::default()).await.expect("a terminal");
    let (tag, pid) = (terminal.tag().to_owned(), terminal.pid());
    let writer = terminal.writer();
    // What is typed is echoed: what is waited for must not be in it.
    writer.write(b"stty size; tty\n").await.expect("typing");
    until(&mut terminal, "24 80").await;
    until(&mut terminal, "/dev/pts/").await;
    writer.resize(132, 43).await.expect("resize");
    writer.write(b"stty size\n").await.expect("typing");
    until(&mut terminal, "43 132").await;
    // Control characters are signals.
    writer.write(b"sleep 4715; echo code-$?\n").await.expect("typing");
    eventually("the sleep runs", LIMIT, async || {
        (shell(sandbox, "pgrep -x sleep").await.exit_code == 0).then_some(())
    })
    .await;
    writer.write(b"\x03echo after-$((40+2))\n").await.expect("typing");
    until(&mut terminal, "after-42").await;
    drop(terminal);

    // It lives on without a reader, and is found again by its tag.
    assert!(
        sandbox
            .processes()
            .await
            .expect("processes")
            .iter()
            .any(|process| process.tag == tag && process.pid == pid)
    );
    let mut terminal = sandbox.pty_connect(&tag).await.expect("the terminal again");
    assert_eq!(terminal.pid(), pid);
    let writer = terminal.writer();
    writer
        .write(b"echo again-$((6*7)); stty size\n")
        .await
        .expect("typing");
    until(&mut terminal, "again-42").await;
    until(&mut terminal, "43 132").await;
    writer.write(b"exit 7\n").await.expect("typing");
    loop {
        match terminal.next().await.expect("its end") {
            Some(PtyEvent::Exited { code }) => break assert_eq!(code, 7),
            Some(_) => {}
            None => panic!("no exit"),
        }
    }
    // Who comes late hears how it ended, as long as that is remembered.
    match sandbox.pty_connect(&tag).await {
        Err(Error::NotFound(_)) => {}
        Ok(mut late) => loop {
            match late.next().await.expect("its end") {
                Some(PtyEvent::Exited { code }) => break assert_eq!(code, 7),
                Some(_) => {}
                None => panic!("no exit"),
            }
        },
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_run_stream_and_end() {
    let platform = Platform::start(WRENN).await;
    let sandbox = platform.sandbox().await;
    collected(&sandbox).await;
    streamed(&sandbox).await;
    background(&sandbox).await;
    terminals(&sandbox).await;
    sandbox.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}
