//! The SDK against a stand-in of the platform: request shapes, errors, retries, streams.

mod stub;

use std::time::Duration;

use futures::StreamExt;
use stub::{KEY, Stub};
use wrenn_client::{
    Client, CreateSandbox, Error, Exec, ExecEvent, ExecOptions, PtyEvent, PtyOptions, SandboxHandle,
    SandboxStatus, TemplateKind, TemplateStatus,
};

const LIMIT: Duration = Duration::from_secs(20);

async fn platform() -> (Stub, Client) {
    let stub = Stub::start().await;
    let client = Client::new(&stub.url, KEY).unwrap();
    (stub, client)
}

async fn sandbox() -> (Stub, SandboxHandle) {
    let (stub, client) = platform().await;
    let id = stub.sandbox();
    (stub, client.sandbox(id))
}

fn shell(script: &str) -> ExecOptions {
    ExecOptions {
        cmd: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        ..ExecOptions::default()
    }
}

/// Standard output, standard error and exit code of a command.
async fn collect(stream: &mut wrenn_client::ExecStream) -> (Vec<u8>, Vec<u8>, i32) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match stream.next().await.unwrap().expect("an exit") {
            ExecEvent::Stdout(data) => out.extend_from_slice(&data),
            ExecEvent::Stderr(data) => err.extend_from_slice(&data),
            ExecEvent::Exited { code } => return (out, err, code),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_sandbox_lives_and_dies() {
    let (stub, client) = platform().await;
    let wanted = CreateSandbox {
        memory_mb: Some(1024),
        ..CreateSandbox::default()
    };
    let sandbox = client.sandboxes().create_running(&wanted).await.unwrap();
    assert_eq!(sandbox.get().await.unwrap().memory_mb, 1024);
    assert_eq!(client.sandboxes().list().await.unwrap().len(), 1);
    assert_eq!(
        sandbox.pause_and_wait(LIMIT).await.unwrap().status,
        SandboxStatus::Paused
    );
    assert!(matches!(sandbox.pause().await, Err(Error::InvalidState(_))));
    assert_eq!(
        sandbox.resume_and_wait(LIMIT).await.unwrap().status,
        SandboxStatus::Running
    );
    sandbox.ping().await.unwrap();
    sandbox.destroy_and_wait().await.unwrap();
    assert_eq!(stub.status(sandbox.id()), "stopped");
    assert_eq!(client.health().await.unwrap().version, "9.9.9");
}

#[tokio::test]
async fn refusals_are_told_apart() {
    let (stub, client) = platform().await;
    let create = async |template: &str| {
        let wanted = CreateSandbox {
            template: Some(template.into()),
            ..CreateSandbox::default()
        };
        client.sandboxes().create_running(&wanted).await.unwrap_err()
    };
    let full = create("full").await;
    assert!(matches!(&full, Error::NoCapacity(refusal) if refusal.status == 503));
    assert_eq!(full.code(), "no_capacity");
    assert!(create("missing").await.is_not_found());
    let Error::SandboxFailed {
        status,
        message,
        console,
        ..
    } = create("broken").await
    else {
        panic!()
    };
    assert_eq!(
        (status, message.as_deref()),
        (SandboxStatus::Error, Some("the VM died"))
    );
    assert!(console.unwrap().contains("Kernel panic"));

    let stranger = Client::new(&stub.url, "wrn_other").unwrap();
    assert!(matches!(
        stranger.sandboxes().list().await,
        Err(Error::Unauthorized(_))
    ));
    assert!(client.sandbox("sb-none").get().await.unwrap_err().is_not_found());
    // Also before a WebSocket opens.
    let refused = client
        .sandbox("sb-none")
        .exec_stream(&shell("true"))
        .await
        .unwrap_err();
    assert!(refused.is_not_found());
}

#[tokio::test]
async fn only_what_is_safe_is_tried_again() {
    let (stub, client) = platform().await;
    stub.fail_next(503, "host_unavailable");
    stub.fail_next(502, "agent_error");
    client.sandboxes().list().await.unwrap();
    assert_eq!(stub.count("GET /v1/sandboxes"), 3);

    stub.fail_next(503, "no_capacity");
    assert!(matches!(
        client.sandboxes().create(&CreateSandbox::default()).await,
        Err(Error::NoCapacity(_))
    ));
    assert_eq!(stub.count("POST /v1/sandboxes"), 1);

    stub.fail_next(404, "not_found");
    assert!(client.sandboxes().list().await.is_err());
    assert_eq!(stub.count("GET /v1/sandboxes"), 4);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_transport_error() {
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let error = Client::new(&url, KEY)
        .unwrap()
        .sandboxes()
        .list()
        .await
        .unwrap_err();
    assert!(matches!(&error, Error::Transport { .. }), "{error:?}");
    assert!(error.to_string().contains(&url));
    assert!(matches!(Client::new("ftp://x", KEY), Err(Error::Config(_))));
    assert!(matches!(Client::new("http://x", "a\nb"), Err(Error::Config(_))));
}

#[tokio::test]
async fn streams_keep_every_byte_and_the_exit_code() {
    let (stub, sandbox) = sandbox().await;
    let mut options = shell("read go; printf 'a\\377\\000b'; printf oops >&2; exit 7");
    options.stdin = true;
    let mut stream = sandbox.exec_stream(&options).await.unwrap();
    // The server's ping comes before the start, so its answer is on the way before the input is.
    assert!(matches!(
        stream.next().await.unwrap(),
        Some(ExecEvent::Started { .. })
    ));
    stream.stdin().write(b"go\n").await.unwrap();
    assert_eq!(
        collect(&mut stream).await,
        (b"a\xff\0b".to_vec(), b"oops".to_vec(), 7)
    );
    assert_eq!(stream.next().await.unwrap(), None);
    assert_eq!(stub.count("FRAME pong"), 1);
}

#[tokio::test]
async fn standard_input_reaches_the_command() {
    let (_stub, sandbox) = sandbox().await;
    let options = ExecOptions {
        cmd: "cat".into(),
        stdin: true,
        ..ExecOptions::default()
    };
    let mut stream = sandbox.exec_stream(&options).await.unwrap();
    let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let input = stream.stdin();
    let both = async { tokio::join!(collect(&mut stream), input.copy_from(sent.as_slice())) };
    let (received, copied) = tokio::time::timeout(LIMIT, both)
        .await
        .expect("input and output to flow side by side");
    copied.unwrap();
    assert_eq!(received, (sent, Vec::new(), 0));
}

#[tokio::test]
async fn a_command_can_be_killed_and_cannot_start_wrongly() {
    let (stub, sandbox) = sandbox().await;
    let mut stream = sandbox.exec_stream(&shell("exec sleep 600")).await.unwrap();
    assert!(matches!(
        stream.next().await.unwrap(),
        Some(ExecEvent::Started { .. })
    ));
    stream.control().kill().await.unwrap();
    assert_eq!(collect(&mut stream).await.2, -1);
    assert_eq!(stub.count("FRAME stop"), 1);

    let options = ExecOptions {
        cmd: "/no/such/program".into(),
        ..ExecOptions::default()
    };
    let mut stream = sandbox.exec_stream(&options).await.unwrap();
    assert!(matches!(stream.next().await, Err(Error::InvalidRequest(_))));

    let mut followed = sandbox.process_stream("web").await.unwrap();
    assert_eq!(
        collect(&mut followed).await,
        (b"listening\xff\n".to_vec(), Vec::new(), 3)
    );
    assert!(sandbox.process_stream("gone").await.unwrap_err().is_not_found());
    assert_eq!(sandbox.processes().await.unwrap()[0].tag, "web");
    sandbox.kill_process("web").await.unwrap();
}

#[tokio::test]
async fn plain_exec_and_background() {
    let (_stub, sandbox) = sandbox().await;
    let command = Exec {
        cmd: "echo".into(),
        args: vec!["hi".into()],
        ..Exec::default()
    };
    let result = sandbox.exec(&command).await.unwrap();
    assert_eq!((result.stdout.as_str(), result.exit_code), ("hi\n", 0));
    let started = sandbox
        .exec_background(&Exec {
            tag: Some("srv".into()),
            ..command
        })
        .await
        .unwrap();
    assert_eq!((started.tag.as_str(), started.pid), ("srv", 7));
}

#[tokio::test]
async fn terminals_take_both_dialects() {
    let (stub, sandbox) = sandbox().await;
    let mut pty = sandbox
        .pty(&PtyOptions {
            cols: 100,
            rows: 30,
            ..PtyOptions::default()
        })
        .await
        .unwrap();
    assert_eq!((pty.tag(), pty.pid()), ("pty-1", 9));
    let writer = pty.writer();
    writer.resize(120, 40).await.unwrap();
    writer.write(b"hi\nexit 5\n").await.unwrap();
    let mut screen = Vec::new();
    let code = loop {
        match pty.next().await.unwrap().expect("an exit") {
            PtyEvent::Output(data) => screen.extend_from_slice(&data),
            PtyEvent::Exited { code } => break code,
            _ => {}
        }
    };
    let screen = String::from_utf8(screen).unwrap();
    assert_eq!(code, 5);
    assert!(
        screen.contains("\"/bin/bash\" 100x30") && screen.contains("HI\n"),
        "{screen}"
    );
    assert!(screen.contains("\"cols\":120"), "{screen}");
    assert_eq!(
        stub.count("FRAME {\"cols\":120,\"rows\":40,\"type\":\"resize\"}"),
        1
    );

    let mut back = sandbox.pty_connect("pty-1").await.unwrap();
    assert_eq!(
        back.next().await.unwrap(),
        Some(PtyEvent::Output("back at \"pty-1\"\r\n".into()))
    );
}

#[tokio::test]
async fn files_go_both_ways_whole() {
    let (stub, sandbox) = sandbox().await;
    let files = sandbox.files();
    files.write("/d/é x.bin", vec![0u8, 255, 10]).await.unwrap();
    assert_eq!(&files.read("/d/é x.bin").await.unwrap()[..], [0, 255, 10]);

    let big: Vec<u8> = (0..3_000_000u32).map(|i| (i % 253) as u8).collect();
    for size in [Some(big.len() as u64), None] {
        files
            .upload_from("/big", std::io::Cursor::new(big.clone()), size)
            .await
            .unwrap();
        assert_eq!(std::fs::read(stub.root.join("big")).unwrap(), big);
    }
    let mut back = Vec::new();
    assert_eq!(files.download("/big", &mut back).await.unwrap(), big.len() as u64);
    assert_eq!(back, big);

    assert!(files.read("/none").await.unwrap_err().is_not_found());
    assert!(matches!(files.read("/d").await, Err(Error::InvalidRequest(_))));
    assert_eq!(files.list("/", 1).await.unwrap().len(), 2);
    assert_eq!(files.mkdir("/new/deep").await.unwrap().name, "deep");
    assert!(matches!(files.mkdir("/new/deep").await, Err(Error::Conflict(_))));
    files.remove("/new").await.unwrap();
    assert!(files.list("/new", 1).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn files_are_those_of_the_user_that_was_named() {
    let (stub, sandbox) = sandbox().await;
    let files = sandbox.files().as_user("root");
    files.write("keys/a", "x").await.unwrap();
    assert_eq!(std::fs::read(stub.root.join("home/root/keys/a")).unwrap(), b"x");
    assert_eq!(files.read("keys/a").await.unwrap(), "x");
    assert_eq!(files.list("keys", 1).await.unwrap().len(), 1);
    files.mkdir("made").await.unwrap();
    assert!(stub.root.join("home/root/made").is_dir());
    files.remove("made").await.unwrap();
    assert!(!stub.root.join("home/root/made").exists());
    // Without one, none is sent.
    let before = stub.count("AS ");
    sandbox.files().list("/", 1).await.unwrap();
    assert_eq!(stub.count("AS "), before);
    let error = sandbox
        .files()
        .as_user("nobody-here")
        .read("x")
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::InvalidRequest(_)) && error.to_string().contains("user"),
        "{error}"
    );
}

#[tokio::test]
async fn a_transfer_that_breaks_is_an_error_and_not_a_short_file() {
    let (_stub, sandbox) = sandbox().await;
    let mut chunks = Box::pin(sandbox.files().read_stream("/cut").await.unwrap().into_stream());
    let mut last = None;
    while let Some(chunk) = chunks.next().await {
        last = Some(chunk);
    }
    assert!(matches!(last, Some(Err(Error::Transport { .. }))));

    struct Broken;
    impl tokio::io::AsyncRead for Broken {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Err(std::io::Error::other("the disk is on fire")))
        }
    }
    let error = sandbox
        .files()
        .upload_from("/x", Broken, Some(10))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Io { source, .. } if source.to_string().contains("on fire")),
        "{error:?}"
    );
}

#[tokio::test]
async fn snapshots_are_made_listed_and_deleted() {
    let (stub, sandbox) = sandbox().await;
    let client = Client::new(&stub.url, KEY).unwrap();
    let snapshots = client.snapshots();
    let made = snapshots
        .create_ready(sandbox.id(), Some("mine"), false)
        .await
        .unwrap();
    assert_eq!((made.name.as_str(), made.status), ("mine", TemplateStatus::Ready));
    assert!(matches!(
        snapshots.create(sandbox.id(), Some("mine"), false).await,
        Err(Error::Conflict(_))
    ));
    snapshots.create(sandbox.id(), Some("mine"), true).await.unwrap();
    assert_eq!(stub.count("POST /v1/snapshots?overwrite=true"), 1);
    assert!(
        snapshots
            .list(Some(TemplateKind::Base))
            .await
            .unwrap()
            .iter()
            .all(|t| t.kind == TemplateKind::Base)
    );
    snapshots.delete("mine").await.unwrap();
    assert!(snapshots.delete("mine").await.unwrap_err().is_not_found());
}
