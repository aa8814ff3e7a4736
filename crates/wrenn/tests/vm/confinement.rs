//! What a VM's process could reach if somebody escaped from the guest into it.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use wrenn_client::{Client, CreateSandbox, SandboxHandle};
use wrenn_testkit::platform::{Platform, names, output};

use super::WRENN;

const LIMIT: Duration = Duration::from_secs(60);

/// A client of a team that has just come into being.
async fn another_team(platform: &Platform) -> Client {
    let base = platform.client().base_url().trim_end_matches('/').to_owned();
    let http = reqwest::Client::new();
    let post = async |path: &str, token: &str, body: Value| -> Value {
        let answer = http
            .post(format!("{base}{path}"))
            .bearer_auth(token)
            .json(&body)
            .send();
        let answer = answer.await.expect("an answer");
        assert!(answer.status().is_success(), "{path}: {}", answer.status());
        answer.json().await.expect("JSON")
    };
    let someone = json!({"email": "other@example.com", "password": "correct horse", "name": "Other"});
    let session = post("/v1/auth/signup", "", someone).await;
    let session = session["token"].as_str().expect("a session");
    let key = post("/v1/api-keys", session, json!({"name": "theirs"})).await;
    Client::new(base, key["key"].as_str().expect("a key")).expect("a client")
}

/// A sandbox of a template of this team's own, and that template's folder.
async fn own_template(client: &Client, data: &Path, secret: &str) -> (SandboxHandle, PathBuf) {
    let before = templates(data);
    let sandboxes = client.sandboxes();
    let first = sandboxes
        .create_running(&CreateSandbox::default())
        .await
        .expect("a sandbox");
    output(&first, &format!("echo {secret} > /root/secret")).await;
    let made = client
        .snapshots()
        .create_ready(first.id(), Some("own"), false)
        .await;
    made.expect("a snapshot");
    first.destroy_and_wait().await.expect("destroyed");
    let from = CreateSandbox {
        template: Some("own".to_owned()),
        ..CreateSandbox::default()
    };
    let sandbox = sandboxes
        .create_running(&from)
        .await
        .expect("a sandbox of the template");
    assert_eq!(output(&sandbox, "cat /root/secret").await, secret);
    let new: Vec<PathBuf> = templates(data).difference(&before).cloned().collect();
    assert_eq!(new.len(), 1, "{new:?}");
    (sandbox, new[0].join("image"))
}

fn templates(data: &Path) -> BTreeSet<PathBuf> {
    let teams = data.join("images/teams");
    let of = |team: &String| {
        let team = teams.join(team);
        names(&team).into_iter().map(move |template| team.join(template))
    };
    names(&teams).iter().flat_map(of).collect()
}

/// The ids that a process has: user, group, and the groups beside that.
fn ids(pid: u32) -> (u32, u32, Vec<u32>) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let numbers = |field: &str| -> Vec<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let line = line.expect("the field").split_whitespace();
        line.map(|number| number.parse().expect("a number")).collect()
    };
    (numbers("Uid:")[0], numbers("Gid:")[0], numbers("Groups:"))
}

/// Whether somebody with the ids of process `pid` can read a file.
fn can_read(pid: u32, path: &Path) -> bool {
    let (user, group, groups) = ids(pid);
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={group}")]);
    if groups.is_empty() {
        command.arg("--clear-groups");
    } else {
        let groups: Vec<String> = groups.iter().map(u32::to_string).collect();
        command.arg(format!("--groups={}", groups.join(",")));
    }
    let read = command.args(["--no-new-privs", "head", "-c1"]).arg(path).output();
    read.expect("setpriv").status.success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vms_process_reads_the_images_it_stands_on_and_no_others() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: virtual machines are this user's processes, and nothing tells them apart");
        return;
    }
    let platform = Platform::start(WRENN).await;
    let data = platform.data_dir();
    let theirs = another_team(&platform).await;
    let (ours, our_image) = own_template(platform.client(), &data, "ours").await;
    let (other, other_image) = own_template(&theirs, &data, "theirs").await;
    let plain = platform.sandbox().await;
    let vm = |sandbox: &SandboxHandle| platform.vm_of(sandbox.id()).expect("it runs");

    let groups = [&our_image, &other_image].map(|image| std::fs::metadata(image).expect("there").gid());
    assert!(groups[0] != groups[1], "{groups:?}");
    assert_eq!(ids(vm(&ours)).2, [groups[0]]);
    assert_eq!(ids(vm(&other)).2, [groups[1]]);
    assert!(ids(vm(&plain)).2.is_empty());
    assert!(!groups.contains(&ids(vm(&plain)).1));
    for file in ["memory.img", "disk.qcow2"] {
        let (our_file, other_file) = (our_image.join(file), other_image.join(file));
        for (sandbox, reads) in [
            (&ours, [true, false]),
            (&other, [false, true]),
            (&plain, [false, false]),
        ] {
            let seen = [&our_file, &other_file].map(|file| can_read(vm(sandbox), file));
            assert_eq!(seen, reads, "{file}");
        }
    }

    // A template of that one stands on both, and its machine works from memory and both disks; so does a resumed one.
    let snapshots = platform.client().snapshots();
    let made = snapshots.create_ready(ours.id(), Some("above"), false).await;
    made.expect("a snapshot");
    let from = CreateSandbox {
        template: Some("above".to_owned()),
        ..CreateSandbox::default()
    };
    let above = platform.sandbox_from(&from).await;
    assert_eq!(output(&above, "cat /root/secret").await, "ours");
    let both = ids(vm(&above)).2;
    assert!(
        both.len() == 2 && both.contains(&groups[0]) && !both.contains(&groups[1]),
        "{both:?}"
    );
    above.pause_and_wait(LIMIT).await.expect("paused");
    above.resume_and_wait(LIMIT).await.expect("resumed");
    assert_eq!(ids(vm(&above)).2, both);
    assert_eq!(
        output(
            &above,
            "cat /root/secret; sha256sum /bin/true >/dev/null; echo read"
        )
        .await,
        "ours\nread"
    );
    other.destroy_and_wait().await.expect("destroyed");
    platform.finish().await;
}
