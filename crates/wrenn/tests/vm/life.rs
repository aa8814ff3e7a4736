//! A sandbox's life from end to end, and the sandboxes that are made of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use wrenn_client::{CreateSandbox, Error, Exec, FileKind, SandboxHandle, TemplateKind};
use wrenn_testkit::platform::{Platform, eventually, names, output};

use crate::WRENN;

const LIMIT: Duration = Duration::from_secs(60);

/// Counts in memory, ten times a second.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count.new; \
                       mv /dev/shm/count.new /dev/shm/count; sleep 0.1; done";

async fn start_counter(sandbox: &SandboxHandle) -> u32 {
    let command = Exec {
        cmd: "/bin/bash".into(),
        args: vec!["-c".into(), COUNTER.into()],
        tag: Some("counter".into()),
        ..Exec::default()
    };
    let started = sandbox
        .exec_background(&command)
        .await
        .expect("the counter starts");
    assert_eq!(started.tag, "counter");
    beyond(sandbox, 3).await;
    started.pid
}

async fn count(sandbox: &SandboxHandle) -> u64 {
    let text = output(sandbox, "cat /dev/shm/count").await;
    text.parse().unwrap_or_else(|_| panic!("'{text}' is no number"))
}

/// Waits until the counter has passed a number, and returns where it is.
async fn beyond(sandbox: &SandboxHandle, number: u64) -> u64 {
    eventually("the counter goes on", Duration::from_secs(30), async || {
        let text = output(sandbox, "cat /dev/shm/count 2>/dev/null || echo 0").await;
        text.parse().ok().filter(|now| *now > number)
    })
    .await
}

/// Whether the guest believes in the host's time.
async fn assert_clock(sandbox: &SandboxHandle) {
    let now = || {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("after 1970")
            .as_secs_f64()
    };
    let before = now();
    let guest: f64 = output(sandbox, "date +%s.%N").await.parse().expect("a number");
    assert!(
        guest > before - 2.0 && guest < now() + 2.0,
        "the guest's clock is {guest}, the host's {before}"
    );
}

async fn boot_id(sandbox: &SandboxHandle) -> String {
    output(sandbox, "cat /proc/sys/kernel/random/boot_id").await
}

/// Everything by which two sandboxes must differ.
async fn identity(sandbox: &SandboxHandle) -> Vec<String> {
    let script = "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; \
                  python3 -c 'import random, uuid; print(random.getrandbits(64)); print(uuid.uuid4())'";
    let lines: Vec<String> = output(sandbox, script).await.lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 5, "{lines:?}");
    lines
}

/// The token of a sandbox's guest agent, from the host's journal.
fn token(platform: &Platform, sandbox: &SandboxHandle) -> String {
    let path = platform
        .data_dir()
        .join("sandboxes")
        .join(sandbox.id())
        .join("sandbox.json");
    let journal: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path).expect("a journal")).expect("JSON");
    journal["token"].as_str().expect("a token").to_owned()
}

/// Folders below `root` named like the id without its prefix.
fn folders_named(root: &Path, id: &str) -> Vec<PathBuf> {
    let uuid = id.trim_start_matches("tpl-");
    let teams = root.join("images/teams");
    names(&teams)
        .iter()
        .map(|team| teams.join(team).join(uuid))
        .filter(|path| path.exists())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_works_pauses_and_goes_on() {
    let platform = Platform::start(WRENN).await;
    let envs = [("GREETING".to_owned(), "good day".to_owned())].into();
    let wanted = CreateSandbox {
        envs: Some(envs),
        ..CreateSandbox::default()
    };
    let sandbox = platform.sandbox_from(&wanted).await;
    assert_eq!(output(&sandbox, "echo $GREETING").await, "good day");
    assert_clock(&sandbox).await;

    // Files.
    let files = sandbox.files();
    files.write("notes/today.txt", "first\n").await.expect("write");
    assert_eq!(files.read("notes/today.txt").await.expect("read"), "first\n");
    let made = files.mkdir("notes/old").await.expect("mkdir");
    assert_eq!(made.kind, FileKind::Directory);
    assert!(matches!(files.mkdir("notes/old").await, Err(Error::Conflict(_))));
    let listed: Vec<String> = files
        .list("notes", 1)
        .await
        .expect("list")
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    assert_eq!(listed, ["old", "today.txt"]);
    files.write("notes/empty", "").await.expect("write nothing");
    assert_eq!(files.read("notes/empty").await.expect("read nothing"), "");
    files.remove("notes").await.expect("remove");
    assert!(matches!(files.list("notes", 1).await, Err(Error::NotFound(_))));
    assert!(matches!(
        files.read("notes/today.txt").await,
        Err(Error::NotFound(_))
    ));

    // A pause and a resume: memory, processes and the boot are the same, the clock is right.
    let pid = start_counter(&sandbox).await;
    output(&sandbox, "echo kept > /dev/shm/kept; echo on-disk > /root/kept").await;
    let boot = boot_id(&sandbox).await;
    let reached = count(&sandbox).await;
    sandbox.pause_and_wait(LIMIT).await.expect("pause");
    let paused_at = Instant::now();
    assert!(
        platform.vm_of(sandbox.id()).is_none(),
        "a paused sandbox has no process"
    );
    assert!(matches!(sandbox.processes().await, Err(Error::InvalidState(_))));
    assert!(matches!(
        files.read("/root/kept").await,
        Err(Error::InvalidState(_))
    ));
    assert!(matches!(
        sandbox.pause().await,
        Ok(_) | Err(Error::InvalidState(_))
    ));
    eventually(
        "so much time passes that a stopped clock shows",
        LIMIT,
        async || (paused_at.elapsed() > Duration::from_secs(4)).then_some(()),
    )
    .await;
    sandbox.resume_and_wait(LIMIT).await.expect("resume");
    assert_clock(&sandbox).await;
    assert_eq!(boot_id(&sandbox).await, boot);
    assert_eq!(
        output(&sandbox, "cat /dev/shm/kept /root/kept").await,
        "kept\non-disk"
    );
    let processes = sandbox.processes().await.expect("processes");
    assert_eq!(
        processes
            .iter()
            .map(|process| (process.pid, process.tag.as_str()))
            .collect::<Vec<_>>(),
        [(pid, "counter")]
    );
    assert!(
        beyond(&sandbox, reached).await > reached,
        "the counter went on from where it was"
    );
    assert_eq!(output(&sandbox, "echo $GREETING").await, "good day");

    // Destroyed from each state, nothing is left of it on the disk.
    sandbox.destroy_and_wait().await.expect("destroy while it runs");
    let other = platform.sandbox().await;
    other.pause_and_wait(LIMIT).await.expect("pause");
    other
        .destroy_and_wait()
        .await
        .expect("destroy while it is paused");
    assert_eq!(names(&platform.data_dir().join("sandboxes")), BTreeSet::new());
    assert!(matches!(
        other
            .exec(&Exec {
                cmd: "true".into(),
                ..Exec::default()
            })
            .await,
        Err(Error::InvalidState(_) | Error::NotFound(_))
    ));
    assert!(matches!(
        platform
            .client()
            .sandboxes()
            .get("sb-0198c0de-0000-7000-8000-000000000000")
            .await,
        Err(Error::NotFound(_))
    ));
    platform.finish().await;
}

/// Writes down, hundreds of times a second, who it is, what time it is, and what comes out of the kernel's generator.
const DIARY: &str = "
import os, time
with open('/dev/shm/diary', 'w', buffering=1) as diary:
    while True:
        name = open('/etc/machine-id').read().strip()
        print(name, os.uname().nodename, time.time_ns(), os.urandom(8).hex(), file=diary)
        time.sleep(0.001)
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_of_a_copy_run_only_as_the_copy() {
    let platform = Platform::start(WRENN).await;
    let source = platform.sandbox().await;
    let command = Exec {
        cmd: "python3".into(),
        args: vec!["-c".into(), DIARY.into()],
        ..Exec::default()
    };
    source.exec_background(&command).await.expect("it starts");
    let longer_than = async |sandbox: &SandboxHandle, lines: usize| -> Vec<String> {
        eventually("the diary goes on", LIMIT, async || {
            let text = output(sandbox, "head -n -1 /dev/shm/diary 2>/dev/null || true").await;
            let read: Vec<String> = text.lines().map(str::to_owned).collect();
            (read.len() > lines).then_some(read)
        })
        .await
    };
    longer_than(&source, 20).await;
    let snapshots = platform.client().snapshots();
    snapshots
        .create_ready(source.id(), Some("running"), false)
        .await
        .expect("a snapshot of a running sandbox");
    // The second one of a pause's own files, which the source goes on from as well.
    let before = longer_than(&source, 20).await.len();
    source.pause_and_wait(LIMIT).await.expect("pause");
    snapshots
        .create_ready(source.id(), Some("paused"), false)
        .await
        .expect("a snapshot of a paused sandbox");
    source.resume_and_wait(LIMIT).await.expect("resume");
    let original = longer_than(&source, before + 20).await;
    let original_id = output(&source, "cat /etc/machine-id").await;
    for template in ["running", "paused"] {
        let wanted = CreateSandbox {
            template: Some(template.to_owned()),
            ..CreateSandbox::default()
        };
        let copy = platform.sandbox_from(&wanted).await;
        let id = output(&copy, "cat /etc/machine-id").await;
        assert_ne!(id, original_id);
        let common = |lines: &[String]| lines.iter().zip(&original).take_while(|(a, b)| a == b).count();
        let written = eventually("the copy writes on", LIMIT, async || {
            let lines = longer_than(&copy, 20).await;
            (lines.len() > common(&lines) + 20).then_some(lines)
        })
        .await;
        let shared = common(&written);
        assert!(
            shared > 0,
            "a copy of '{template}' remembers what its source wrote"
        );
        let name = output(&copy, "hostname").await;
        // One line may be half written when the program is held: what it read before that, it has. Each after it is
        // asked for by the copy.
        for line in &written[shared + 1..] {
            assert!(
                line.starts_with(&format!("{id} {name} ")),
                "a program of a copy of '{template}' ran as another: {line}; its own is {id} {name}"
            );
        }
        copy.destroy_and_wait().await.expect("destroy");
    }
    for name in ["running", "paused"] {
        snapshots.delete(name).await.expect("delete");
    }
    source.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_multiply_a_sandbox() {
    let platform = Platform::start(WRENN).await;
    let source = platform.sandbox().await;
    let pid = start_counter(&source).await;
    output(
        &source,
        "echo prepared > /root/prepared; echo prepared > /dev/shm/prepared",
    )
    .await;
    let reached = count(&source).await;
    let live = platform
        .client()
        .snapshots()
        .create_ready(source.id(), Some("live"), false)
        .await
        .expect("snapshot");
    assert_eq!(live.kind, TemplateKind::Snapshot);
    assert!(matches!(
        platform
            .client()
            .snapshots()
            .create(source.id(), Some("live"), false)
            .await,
        Err(Error::Conflict(_))
    ));
    // The source was not disturbed.
    let still: Vec<u32> = source
        .processes()
        .await
        .expect("processes")
        .iter()
        .map(|process| process.pid)
        .collect();
    assert_eq!(still, [pid]);
    beyond(&source, reached).await;

    // Two of it at once, with its memory, each for itself.
    let from = |name: &str| CreateSandbox {
        template: Some(name.to_owned()),
        ..CreateSandbox::default()
    };
    let wanted = from("live");
    let (one, two) = tokio::join!(platform.sandbox_from(&wanted), platform.sandbox_from(&wanted));
    for copy in [&one, &two] {
        assert_eq!(
            output(copy, "cat /root/prepared /dev/shm/prepared").await,
            "prepared\nprepared"
        );
        assert!(beyond(copy, reached).await > reached);
        assert_clock(copy).await;
        output(copy, &format!("kill -0 {pid}")).await;
    }
    output(&one, "echo one > /root/mine; echo one > /dev/shm/mine; sync").await;
    output(&two, "test ! -e /root/mine -a ! -e /dev/shm/mine").await;
    output(&two, "echo two > /root/mine; sync").await;
    assert_eq!(output(&one, "cat /root/mine").await, "one");
    output(&source, "test ! -e /root/mine").await;
    let (first, second, original) = (
        identity(&one).await,
        identity(&two).await,
        identity(&source).await,
    );
    for (index, value) in first.iter().enumerate() {
        let all = BTreeSet::from([value, &second[index], &original[index]]);
        assert_eq!(all.len(), 3, "two sandboxes share {all:?}");
    }
    let tokens: BTreeSet<String> = [&one, &two, &source]
        .map(|sandbox| token(&platform, sandbox))
        .into();
    assert_eq!(tokens.len(), 3, "each has a token of its own");

    // A copy is a sandbox like any other.
    let before = count(&one).await;
    one.pause_and_wait(LIMIT).await.expect("pause a copy");
    one.resume_and_wait(LIMIT).await.expect("resume a copy");
    beyond(&one, before).await;
    assert_eq!(output(&one, "cat /root/mine").await, "one");

    // Of a paused one too, which stays paused; and a copy of a copy.
    one.pause_and_wait(LIMIT).await.expect("pause");
    let cold = platform
        .client()
        .snapshots()
        .create_ready(one.id(), Some("cold"), false)
        .await
        .expect("snapshot of a paused one");
    assert_eq!(
        one.get().await.expect("its record").status,
        wrenn_client::SandboxStatus::Paused
    );
    let third = platform.sandbox_from(&from("cold")).await;
    assert_eq!(output(&third, "cat /root/mine /dev/shm/mine").await, "one\none");
    assert_clock(&third).await;

    // A snapshot goes when nothing needs it, and not before.
    assert!(matches!(
        platform.client().snapshots().delete("minimal").await,
        Err(Error::Forbidden(_) | Error::NotFound(_))
    ));
    for sandbox in [&source, &one, &two, &third] {
        sandbox.destroy_and_wait().await.expect("destroy");
    }
    for template in [&cold, &live] {
        assert_eq!(folders_named(&platform.data_dir(), &template.id).len(), 1);
        platform
            .client()
            .snapshots()
            .delete(&template.name)
            .await
            .expect("delete");
        eventually("its files are removed", Duration::from_secs(10), async || {
            folders_named(&platform.data_dir(), &template.id)
                .is_empty()
                .then_some(())
        })
        .await;
    }
    let gone = platform.client().sandboxes().create(&from("live")).await;
    assert!(matches!(gone, Err(Error::NotFound(_))), "{gone:?}");
    assert_eq!(names(&platform.data_dir().join("sandboxes")), BTreeSet::new());
    platform.finish().await;
}

/// Each sandbox from a snapshot of the one before: their disks do not pile up, and nothing is lost on the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_of_snapshots_do_not_pile_up() {
    const GENERATIONS: usize = 11;
    let from = |name: &str| CreateSandbox {
        template: Some(name.to_owned()),
        ..CreateSandbox::default()
    };
    let platform = Platform::start(WRENN).await;
    let mut sandbox = platform.sandbox().await;
    let mut templates = Vec::new();
    for number in 0..GENERATIONS {
        output(
            &sandbox,
            &format!(
                "echo {number} > /root/{number}; echo {number} > /root/last; rm -f /root/{}; sync",
                number + 100
            ),
        )
        .await;
        output(
            &sandbox,
            &format!("head -c 300000 /dev/urandom > /root/{}", number + 101),
        )
        .await;
        let name = format!("generation-{number}");
        let template = platform
            .client()
            .snapshots()
            .create_ready(sandbox.id(), Some(&name), false)
            .await
            .expect("a snapshot");
        sandbox.destroy_and_wait().await.expect("destroy");
        sandbox = platform.sandbox_from(&from(&name)).await;
        templates.push(template);
    }
    let kept = output(
        &sandbox,
        "cd /root; cat last; ls | grep -v last | sort -n | tr '\\n' ' '",
    )
    .await;
    let expected: String = (0..GENERATIONS)
        .map(|number| format!("{number} "))
        .chain([format!("{} ", GENERATIONS + 100)])
        .collect();
    assert_eq!(kept.trim(), format!("{}\n{}", GENERATIONS - 1, expected.trim()));
    // How many disks lie below the last one.
    let images = platform.data_dir().join("images");
    let manifest = |folder: &std::path::Path| -> serde_json::Value {
        let text = std::fs::read(folder.join("manifest.json")).expect("a manifest");
        serde_json::from_slice(&text).expect("JSON")
    };
    let last = templates.last().expect("one");
    let mut folder = folders_named(&platform.data_dir(), &last.id)
        .first()
        .expect("its folder")
        .join("image");
    let mut depth = 0;
    while let Some(parent) = manifest(&folder)["parent"].as_str() {
        folder = images.join(parent);
        depth += 1;
    }
    assert!((1..=8).contains(&depth), "{depth} disks lie below it");
    sandbox.destroy_and_wait().await.expect("destroy");
    for template in &templates {
        platform
            .client()
            .snapshots()
            .delete(&template.name)
            .await
            .expect("delete");
    }
    for template in &templates {
        eventually("its files are removed", Duration::from_secs(20), async || {
            folders_named(&platform.data_dir(), &template.id)
                .is_empty()
                .then_some(())
        })
        .await;
    }
    platform.finish().await;
}
