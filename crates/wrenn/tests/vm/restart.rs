//! The server ends, in order or not; a VM ends by itself. No sandbox is lost.

use std::time::Duration;

use rustix::process::Signal;
use wrenn_client::{Error, Exec, SandboxHandle, SandboxStatus};
use wrenn_testkit::platform::{Platform, eventually, output, signal};

use crate::WRENN;

const LIMIT: Duration = Duration::from_secs(60);

/// What stays the same as long as a guest is the same: its boot, and a process with its start time.
async fn identity(sandbox: &SandboxHandle, pid: u32) -> String {
    output(
        sandbox,
        &format!("cat /proc/sys/kernel/random/boot_id; cut -d' ' -f22 /proc/{pid}/stat"),
    )
    .await
}

async fn sleeper(sandbox: &SandboxHandle) -> u32 {
    let command = Exec {
        cmd: "/bin/sleep".into(),
        args: vec!["100000".into()],
        tag: Some("sleeper".into()),
        ..Exec::default()
    };
    sandbox.exec_background(&command).await.expect("background").pid
}

async fn wait_status(sandbox: &SandboxHandle, wanted: SandboxStatus) {
    eventually(&format!("{} is {wanted}", sandbox.id()), LIMIT, async || {
        (sandbox.get().await.ok()?.status == wanted).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sandboxes_outlive_the_server() {
    let mut platform = Platform::start(WRENN).await;
    let (running, paused, doomed) = (
        platform.sandbox().await,
        platform.sandbox().await,
        platform.sandbox().await,
    );
    let pid = sleeper(&running).await;
    let before = identity(&running, pid).await;
    output(&paused, "echo kept > /dev/shm/kept").await;
    paused.pause_and_wait(LIMIT).await.expect("pause");
    output(&doomed, "echo last words > /dev/ttyS0").await;
    eventually("the console can be read while it runs", LIMIT, async || {
        let console = doomed.console().await.ok()?;
        console.contains("last words").then_some(())
    })
    .await;

    // A VM that is killed: its record tells, with the console's last lines; it can be destroyed.
    signal(platform.vm_of(doomed.id()).expect("its process"), Signal::KILL);
    wait_status(&doomed, SandboxStatus::Error).await;
    let failure = doomed.get().await.expect("its record").error.expect("a failure");
    assert!(failure.message.contains("ended unexpectedly"), "{failure:?}");
    assert!(
        failure
            .console
            .as_deref()
            .unwrap_or_default()
            .contains("last words"),
        "{failure:?}"
    );
    let refused = doomed
        .exec(&Exec {
            cmd: "true".into(),
            ..Exec::default()
        })
        .await;
    assert!(matches!(refused, Err(Error::InvalidState(_))), "{refused:?}");
    assert!(matches!(doomed.resume().await, Err(Error::InvalidState(_))));

    // The server is killed: VMs run on and are found again, and a VM that ended meanwhile is told of.
    let lost = platform.sandbox().await;
    let vm = platform.vm_of(running.id()).expect("its process");
    platform.kill();
    signal(platform.vm_of(lost.id()).expect("its process"), Signal::KILL);
    platform.restart().await;
    wait_status(&running, SandboxStatus::Running).await;
    assert_eq!(platform.vm_of(running.id()), Some(vm), "it is the same process");
    assert_eq!(identity(&running, pid).await, before);
    assert_eq!(
        running
            .processes()
            .await
            .expect("processes")
            .iter()
            .map(|process| process.pid)
            .collect::<Vec<_>>(),
        [pid]
    );
    wait_status(&lost, SandboxStatus::Error).await;
    wait_status(&paused, SandboxStatus::Paused).await;
    wait_status(&doomed, SandboxStatus::Error).await;
    paused
        .resume_and_wait(LIMIT)
        .await
        .expect("resume after the restart");
    assert_eq!(output(&paused, "cat /dev/shm/kept").await, "kept");
    for gone in [&doomed, &lost, &paused] {
        gone.destroy_and_wait().await.expect("destroy");
    }

    // An adopted one is a full sandbox: pause, resume, and the next orderly end pauses it with its memory.
    running.pause_and_wait(LIMIT).await.expect("pause an adopted one");
    running.resume_and_wait(LIMIT).await.expect("resume it");
    assert_eq!(identity(&running, pid).await, before);
    let status = platform.terminate().await;
    assert!(status.success(), "{status}");
    assert!(platform.vm_of(running.id()).is_none(), "it was paused at the end");
    platform.restart().await;
    wait_status(&running, SandboxStatus::Paused).await;
    running
        .resume_and_wait(LIMIT)
        .await
        .expect("resume after an orderly end");
    assert_eq!(identity(&running, pid).await, before);
    running.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}

/// Killed in the middle of whatever it does, the server leaves nothing half-made behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_while_it_works_cleans_up() {
    let mut platform = Platform::start(WRENN).await;
    let steady = platform.sandbox().await;
    let pid = sleeper(&steady).await;
    let before = identity(&steady, pid).await;

    // During a create.
    let record = platform
        .client()
        .sandboxes()
        .create(&Default::default())
        .await
        .expect("create");
    let dir = platform.data_dir().join("sandboxes").join(&record.id);
    eventually("the create is under way", LIMIT, async || {
        dir.exists().then_some(())
    })
    .await;
    platform.kill();
    platform.restart().await;
    let begun = platform.client().sandbox(&record.id);
    let settled = begun.wait_settled(LIMIT).await.expect("it settles");
    match settled.status {
        // Taken up again, or finished before the end.
        SandboxStatus::Running => assert_eq!(output(&begun, "echo $((6*7))").await, "42"),
        SandboxStatus::Error => assert!(platform.vm_of(&record.id).is_none()),
        other => panic!("{other}"),
    }
    begun.destroy_and_wait().await.expect("destroy");

    // During a pause.
    output(&steady, "head -c 40000000 /dev/urandom > /dev/shm/ballast").await;
    steady.pause().await.expect("pause");
    platform.kill();
    platform.restart().await;
    let settled = steady.wait_settled(LIMIT).await.expect("it settles");
    if settled.status == SandboxStatus::Paused {
        steady.resume_and_wait(LIMIT).await.expect("resume");
    }
    assert_eq!(identity(&steady, pid).await, before);

    // During a resume.
    steady.pause_and_wait(LIMIT).await.expect("pause");
    steady.resume().await.expect("resume");
    platform.kill();
    platform.restart().await;
    let settled = steady.wait_settled(LIMIT).await.expect("it settles");
    if settled.status == SandboxStatus::Paused {
        steady.resume_and_wait(LIMIT).await.expect("resume");
    }
    assert_eq!(identity(&steady, pid).await, before);
    assert_eq!(output(&steady, "stat -c %s /dev/shm/ballast").await, "40000000");
    steady.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}

/// A journal that the agent cannot read costs nobody a file: the sandbox is shown with what is wrong, until its owner
/// or an operator has decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_cannot_be_read_costs_no_file() {
    let mut platform = Platform::start(WRENN).await;
    let (paused, running) = (platform.sandbox().await, platform.sandbox().await);
    output(&paused, "echo kept > /dev/shm/kept").await;
    paused.pause_and_wait(LIMIT).await.expect("pause");
    platform.kill();
    let sandboxes = platform.data_dir().join("sandboxes");
    let folder = |sandbox: &SandboxHandle| sandboxes.join(sandbox.id());
    let journal = folder(&paused).join("sandbox.json");
    let whole = std::fs::read(&journal).expect("its journal");
    for sandbox in [&paused, &running] {
        std::fs::write(folder(sandbox).join("sandbox.json"), "{").expect("damaged");
    }
    platform.restart().await;
    for sandbox in [&paused, &running] {
        wait_status(sandbox, SandboxStatus::Error).await;
        let failure = sandbox.get().await.expect("its record").error.expect("a failure");
        assert!(failure.message.contains("journal"), "{failure:?}");
        assert!(folder(sandbox).join("vm/disk.qcow2").exists(), "its disk is kept");
    }
    // Destroyed, one of them takes its machine along, which no journal names.
    running.destroy_and_wait().await.expect("destroy");
    assert_eq!(platform.vm_of(running.id()), None);

    // Put right by hand, the other is as it was.
    platform.kill();
    std::fs::write(&journal, whole).expect("mended");
    platform.restart().await;
    eventually("its host knows it as paused again", LIMIT, async || {
        platform.log().contains("\"paused\":1,").then_some(())
    })
    .await;
    paused.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}

/// Asked a second time to end, it leaves at once, whatever its sandboxes are at; they are found at the next start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asked_twice_to_end_it_leaves_at_once() {
    let mut platform = Platform::start(WRENN).await;
    let sandbox = platform.sandbox().await;
    let pid = sleeper(&sandbox).await;
    let before = identity(&sandbox, pid).await;
    let vm = platform.vm_of(sandbox.id()).expect("its process");
    // The kernel hangs up on a child that stands still when its parent ends, so it must not be one.
    platform.kill();
    platform.restart().await;
    wait_status(&sandbox, SandboxStatus::Running).await;
    // A machine that stands still cannot be paused.
    signal(vm, Signal::STOP);
    signal(platform.pid(), Signal::INT);
    eventually("it says what it waits for", LIMIT, async || {
        platform
            .log()
            .contains("Pausing running sandboxes, memory kept: 0 of 1.")
            .then_some(())
    })
    .await;
    let status = platform.terminate().await;
    assert!(!status.success(), "{status}");
    assert!(platform.log().contains("left at once"), "{}", platform.log());
    signal(vm, Signal::CONT);
    platform.restart().await;
    wait_status(&sandbox, SandboxStatus::Running).await;
    assert_eq!(platform.vm_of(sandbox.id()), Some(vm), "it is the same process");
    assert_eq!(identity(&sandbox, pid).await, before);
    sandbox.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}

/// Ended in order while the template's machine boots, and while a machine is prepared ahead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_end_leaves_nothing() {
    Platform::interrupted_at(WRENN, "booting the virtual machine once").await;
    Platform::interrupted_at(WRENN, "Template 'minimal' is ready").await;
}

/// The first key is in the database as a hash only: a start that fails after it was made must have kept it.
#[test]
fn a_first_start_that_fails_keeps_its_key() {
    use std::os::unix::fs::PermissionsExt as _;
    let scratch = wrenn_testkit::platform::scratch();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = taken.local_addr().expect("its address").to_string();
    let start = || {
        let started = std::process::Command::new(WRENN)
            .args(["up", "--listen", "127.0.0.1:0", "--agent-listen", &address])
            .env("WRENN_DIR", scratch.path().join("data"))
            .env("WRENN_CACHE_DIR", wrenn_testkit::platform::cache_dir())
            .env_remove("DATABASE_URL")
            .current_dir(scratch.path())
            .output()
            .expect("the program starts");
        let said = String::from_utf8_lossy(&started.stderr).into_owned();
        assert!(!started.status.success() && said.contains(&address), "{said}");
        let file = scratch.path().join("data/local.env");
        let mode = std::fs::metadata(&file).expect("local.env").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&file).expect("local.env");
        let key = text.lines().find_map(|line| line.strip_prefix("WRENN_API_KEY="));
        key.expect("a key").to_owned()
    };
    let key = start();
    assert!(key.starts_with("wrn_"), "{key}");
    assert_eq!(start(), key, "a second start has the same");
}
