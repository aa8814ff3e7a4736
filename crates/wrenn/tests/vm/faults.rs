//! Every step of an operation is broken in turn: the operation fails with its reason, nothing is left behind, and
//! the next one works.
//!
//! Control plane and host agent run in the test's own process here, for the agent's fault hook is not reachable from
//! outside.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use wrenn_client::{Client, CreateSandbox, Error, SandboxHandle, SandboxStatus};
use wrenn_control::{ControlConfig, ControlPlane};
use wrenn_host::net::EgressPolicy;
use wrenn_host::vmm::{Accelerator, VmIds};
use wrenn_host::{BuildState, Capacity, HostAgent, HostConfig, OnExit, Step};
use wrenn_testkit::platform::{
    EmptyGroups, assert_no_vm_below, cache_dir, eventually, names, output, scratch, vm_processes,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Which step fails at the moment, and how often it did.
#[derive(Clone, Default)]
struct Faults(Arc<Mutex<(Option<Step>, u32)>>);

impl Faults {
    fn at(&self, step: Option<Step>) {
        *self.0.lock().expect("no panic") = (step, 0);
    }

    fn hits(&self) -> u32 {
        self.0.lock().expect("no panic").1
    }

    fn check(&self, step: Step) -> Result<(), String> {
        let mut state = self.0.lock().expect("no panic");
        if state.0 == Some(step) {
            state.1 += 1;
            return Err("broken by a test".to_owned());
        }
        Ok(())
    }
}

struct Inside {
    _scratch: tempfile::TempDir,
    data: PathBuf,
    agent: HostAgent,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<wrenn_control::Result<()>>,
    client: Client,
    groups: EmptyGroups,
}

impl Inside {
    async fn start(faults: &Faults) -> Self {
        let scratch = scratch();
        let groups = EmptyGroups::now();
        let data = scratch.path().join("data");
        std::fs::create_dir(&data).expect("a data directory");
        std::fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o711))
            .expect("its mode");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a listener");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let control = ControlPlane::builder(ControlConfig::new(&data))
            .build()
            .await
            .expect("a control plane");
        let key = control
            .bootstrap()
            .await
            .expect("bootstrap")
            .expect("the first start")
            .api_key;
        let token = control.issue_host_token(None).await.expect("a host token").token;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let serving = tokio::spawn(control.run(vec![listener], async move { stopped.cancelled().await }));
        let hook = faults.clone();
        let agent = HostAgent::start(HostConfig {
            data_dir: data.clone(),
            cache_dir: cache_dir(),
            listen: "127.0.0.1:0".parse().expect("an address"),
            advertise: None,
            control_plane: url.clone(),
            registration_token: Some(token),
            accelerator: Accelerator::Tcg,
            egress: EgressPolicy::default(),
            capacity: Capacity {
                memory_mb: 2048,
                min_free_memory_mb: 64,
                min_free_disk_mb: 64,
                max_vms: 3,
            },
            guest_ca_bundle: ca_bundle(),
            debian_mirror: None,
            vm_ids: VmIds {
                gid: 900_000,
                first_uid: 900_000,
                first_template_gid: 1_000_000,
            },
            // A machine that waits for its sandbox has some steps behind it: here each create goes all the way.
            pool: 0,
            fault: Some(Arc::new(move |step| hook.check(step))),
        })
        .await
        .expect("a host agent");
        let mut progress = agent.template_progress();
        let ready = progress.wait_for(|state| match state {
            BuildState::Ready { .. } => true,
            BuildState::Failed(why) => panic!("the template failed: {why}"),
            BuildState::Building { .. } => false,
        });
        tokio::time::timeout(Duration::from_secs(600), ready)
            .await
            .expect("in time")
            .expect("the agent runs");
        let client = Client::new(url, key).expect("a client");
        let inside = Self {
            _scratch: scratch,
            data,
            agent,
            stop,
            serving,
            client,
            groups,
        };
        // The control plane hears of the template with a heartbeat.
        let first = eventually("the control plane knows the template", LIMIT, async || {
            inside
                .client
                .sandboxes()
                .create_running(&CreateSandbox::default())
                .await
                .ok()
        })
        .await;
        first.destroy_and_wait().await.expect("destroy");
        inside
    }

    async fn create(&self) -> Result<SandboxHandle, Error> {
        self.client
            .sandboxes()
            .create_running(&CreateSandbox::default())
            .await
    }

    fn folder(&self, name: &str) -> BTreeSet<String> {
        names(&self.data.join(name))
    }

    async fn finish(self) {
        self.agent.shutdown(OnExit::Pause, |_, _| {}).await;
        self.stop.cancel();
        self.serving.await.expect("no panic").expect("an orderly end");
        assert_no_vm_below(&self.data).await;
        EmptyGroups::none_since(&self.groups).await;
        assert_eq!(names(&self.data.join("tmp")), BTreeSet::new());
    }
}

/// The bundle that the program chooses by itself, so that this platform shares the cached root filesystem with all
/// others.
fn ca_bundle() -> Option<PathBuf> {
    let added = names(Path::new("/usr/local/share/ca-certificates"));
    let bundle = PathBuf::from("/etc/ssl/certs/ca-certificates.crt");
    (added.iter().any(|name| name.ends_with(".crt")) && bundle.is_file()).then_some(bundle)
}

/// The VM of one sandbox.
fn vms(data: &Path, sandbox: &SandboxHandle) -> usize {
    vm_processes(&data.join("sandboxes").join(sandbox.id())).len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_step_of_a_create_can_fail() {
    let faults = Faults::default();
    let inside = Inside::start(&faults).await;
    let groups = EmptyGroups::now();
    // More often than there are places for VMs, so that one that is not given back is missed.
    for step in Step::CREATE {
        faults.at(Some(step));
        let outcome = inside.create().await;
        let Err(Error::SandboxFailed {
            id, status, message, ..
        }) = outcome
        else {
            panic!("{step:?}: {outcome:?}")
        };
        assert_eq!(status, SandboxStatus::Error, "{step:?}");
        assert!(faults.hits() > 0, "{step:?} was never reached");
        let message = message.unwrap_or_default();
        assert!(message.contains("broken by a test"), "{step:?}: {message}");
        faults.at(None);
        assert_eq!(inside.folder("sandboxes"), BTreeSet::new(), "{step:?}");
        assert_eq!(inside.folder("tmp"), BTreeSet::new(), "{step:?}");
        assert_no_vm_below(&inside.data.join("sandboxes")).await;
        inside
            .client
            .sandbox(id)
            .destroy_and_wait()
            .await
            .expect("a failed one can be destroyed");
    }
    EmptyGroups::none_since(&groups).await;
    let all = futures::future::join_all((0..3).map(|_| inside.create())).await;
    for sandbox in all {
        let sandbox = sandbox.expect("every place is free again");
        assert_eq!(output(&sandbox, "echo $((6*7))").await, "42");
        sandbox.destroy_and_wait().await.expect("destroy");
    }
    inside.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pause_resume_and_snapshot_can_fail_at_every_step() {
    let faults = Faults::default();
    let inside = Inside::start(&faults).await;
    let sandbox = inside.create().await.expect("create");
    output(&sandbox, "echo kept > /dev/shm/kept").await;
    let boot = output(&sandbox, "cat /proc/sys/kernel/random/boot_id").await;
    let same = async || {
        assert_eq!(
            output(&sandbox, "cat /dev/shm/kept /proc/sys/kernel/random/boot_id").await,
            format!("kept\n{boot}")
        );
    };

    // After a failed pause the guest goes on.
    for step in [Step::Save, Step::SaveFinish] {
        faults.at(Some(step));
        let outcome = sandbox.pause_and_wait(LIMIT).await;
        assert!(
            matches!(&outcome, Err(Error::Agent(refusal)) if refusal.message.contains("broken by a test")),
            "{step:?}: {outcome:?}"
        );
        faults.at(None);
        assert_eq!(
            sandbox.get().await.expect("its record").status,
            SandboxStatus::Running,
            "{step:?}"
        );
        same().await;
    }

    // After a failed snapshot too, and there is no template.
    for step in [Step::Save, Step::SnapshotFinish] {
        faults.at(Some(step));
        let outcome = inside
            .client
            .snapshots()
            .create_ready(sandbox.id(), Some("half"), false)
            .await;
        assert!(outcome.is_err(), "{step:?}: {outcome:?}");
        faults.at(None);
        eventually("the sandbox settles", LIMIT, async || {
            (sandbox.get().await.ok()?.status == SandboxStatus::Running).then_some(())
        })
        .await;
        same().await;
        let templates = inside.client.snapshots().list(None).await.expect("list");
        assert!(
            templates.iter().all(|template| template.name != "half"),
            "{step:?}: {templates:?}"
        );
        assert_eq!(inside.folder("tmp"), BTreeSet::new(), "{step:?}");
    }

    // After a failed resume it is still paused, and the next one works.
    for step in [Step::Launch, Step::Restore, Step::Run] {
        sandbox.pause_and_wait(LIMIT).await.expect("pause");
        faults.at(Some(step));
        let outcome = sandbox.resume_and_wait(LIMIT).await;
        assert!(
            matches!(&outcome, Err(Error::Agent(refusal)) if refusal.message.contains("broken by a test")),
            "{step:?}: {outcome:?}"
        );
        assert!(faults.hits() > 0, "{step:?} was never reached");
        faults.at(None);
        assert_eq!(
            sandbox.get().await.expect("its record").status,
            SandboxStatus::Paused,
            "{step:?}"
        );
        assert_eq!(vms(&inside.data, &sandbox), 0, "{step:?}");
        sandbox.resume_and_wait(LIMIT).await.expect("the next resume");
        same().await;
    }

    // A snapshot of a paused one that fails leaves it paused.
    sandbox.pause_and_wait(LIMIT).await.expect("pause");
    faults.at(Some(Step::SnapshotFinish));
    let outcome = inside
        .client
        .snapshots()
        .create_ready(sandbox.id(), Some("half"), false)
        .await;
    assert!(outcome.is_err(), "{outcome:?}");
    faults.at(None);
    eventually("the sandbox settles", LIMIT, async || {
        (sandbox.get().await.ok()?.status == SandboxStatus::Paused).then_some(())
    })
    .await;
    inside
        .client
        .snapshots()
        .create_ready(sandbox.id(), Some("whole"), false)
        .await
        .expect("the next snapshot");
    sandbox.resume_and_wait(LIMIT).await.expect("resume");
    same().await;
    sandbox.destroy_and_wait().await.expect("destroy");
    inside.client.snapshots().delete("whole").await.expect("delete");
    inside.finish().await;
}
