//! Collected runs, on a connection as the host makes it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use buffa::Message as _;
use serde_json::json;
use wrenn_proto::guest::{MAX_RUN_MESSAGE, RUN_PROTOCOL};
use wrenn_proto::process::__buffa::oneof::process_event::Event;
use wrenn_proto::process::__buffa::oneof::process_event::data_event::Output;
use wrenn_proto::process::ProcessConfig;
use wrenn_proto::run::__buffa::oneof::run_event::Event as RunEventKind;
use wrenn_proto::run::{RunEvent, RunRequest};

use crate::harness::{Agent, PATIENCE, by_pid, current_user, is_alive, until};

/// A connection for runs.
pub struct Runs(TcpStream);

/// What came of a run.
#[derive(Debug, Default)]
pub struct Run {
    pub pid: u64,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: Option<i32>,
    pub status: String,
    pub refused: Option<(String, String)>,
}

impl Runs {
    pub async fn open(agent: &Agent) -> Self {
        let (status, runs) = Self::ask(agent, agent.token.as_deref()).await;
        assert!(status.contains(" 101 "), "{status}");
        runs
    }

    /// The answer's first line too, whatever it says.
    async fn ask(agent: &Agent, token: Option<&str>) -> (String, Self) {
        let mut stream = TcpStream::connect(("127.0.0.1", agent.port)).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let token = token.map_or_else(String::new, |token| format!("X-Access-Token: {token}\r\n"));
        let head = format!(
            "GET /run HTTP/1.1\r\nHost: guest\r\nConnection: upgrade\r\nUpgrade: {RUN_PROTOCOL}\r\n{token}\r\n"
        );
        stream.write_all(head.as_bytes()).expect("asked");
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("an answer");
            answer.push(byte[0]);
        }
        let answer = String::from_utf8(answer).expect("text");
        (answer.lines().next().unwrap_or_default().to_owned(), Self(stream))
    }

    pub fn send(&mut self, request: &RunRequest) {
        let message = request.encode_to_vec();
        let length = u32::try_from(message.len()).expect("short").to_le_bytes();
        self.0.write_all(&[&length[..], &message].concat()).expect("sent");
    }

    fn event(&mut self) -> std::io::Result<RunEventKind> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let mut message = vec![0; u32::from_le_bytes(length) as usize];
        self.0.read_exact(&mut message)?;
        let event = RunEvent::decode_from_slice(&message).expect("an event");
        Ok(event.event.expect("of a kind"))
    }

    /// Reads events until one of them satisfies the condition or is the last.
    fn read_until(&mut self, run: &mut Run, done: impl Fn(&Run) -> bool) {
        while run.exit_code.is_none() && run.refused.is_none() && !done(run) {
            match self.event().expect("the connection lives") {
                RunEventKind::Process(event) => match event.event.expect("an event") {
                    Event::Start(start) => run.pid = start.pid.into(),
                    Event::Data(data) => match data.output.expect("output") {
                        Output::Stdout(bytes) => run.stdout.extend(bytes),
                        Output::Stderr(bytes) => run.stderr.extend(bytes),
                        Output::Pty(_) => panic!("there is no terminal"),
                    },
                    Event::End(end) => {
                        run.exit_code = Some(end.exit_code);
                        run.status = end.status;
                    }
                    Event::Keepalive(_) => {}
                },
                RunEventKind::Refused(refused) => run.refused = Some((refused.code, refused.message)),
            }
        }
    }

    pub fn finish(&mut self) -> Run {
        let mut run = Run::default();
        self.read_until(&mut run, |_| false);
        run
    }

    pub fn run(&mut self, request: &RunRequest) -> Run {
        self.send(request);
        self.finish()
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }
}

/// A request for a shell command.
pub fn shell(script: &str) -> RunRequest {
    RunRequest {
        process: ProcessConfig {
            cmd: "sh".to_owned(),
            args: vec!["-c".to_owned(), script.to_owned()],
            ..Default::default()
        }
        .into(),
        tag: "tagged".to_owned(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_run_after_run() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    let first = runs.run(&shell("cat; echo out; echo err >&2; exit 3"));
    assert_eq!(
        (&first.stdout[..], &first.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(
        (first.exit_code, first.status.as_str()),
        (Some(3), "exit status 3")
    );
    let second = runs.run(&shell("kill -9 $$"));
    assert_eq!(
        (second.exit_code, second.status.as_str()),
        (Some(-1), "signal: killed")
    );
    assert_ne!(first.pid, second.pid);
    assert_eq!(agent.pids().await, Vec::<u64>::new());

    let mut request = shell("echo $ONE; pwd; id -un");
    let process = request.process.get_or_insert_default();
    process.envs.insert("ONE".to_owned(), "1".to_owned());
    process.cwd = Some("/".to_owned());
    request.user = Some(current_user());
    let run = runs.run(&request);
    assert_eq!(
        String::from_utf8_lossy(&run.stdout),
        format!("1\n/\n{}\n", current_user())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_is_refused_and_the_next_one_runs() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    let mut refused = |change: fn(&mut RunRequest)| {
        let mut request = shell("true");
        change(&mut request);
        let (code, message) = runs.run(&request).refused.expect("it is refused");
        assert_eq!(runs.run(&shell("true")).exit_code, Some(0));
        format!("{code}: {message}")
    };
    assert_eq!(
        refused(|request| request.user = Some("no-such-user".to_owned())),
        "unauthenticated: invalid username: 'no-such-user'"
    );
    assert_eq!(
        refused(|request| request.process.get_or_insert_default().cwd = Some("/no/such".to_owned())),
        "invalid_argument: cwd '/no/such' does not exist"
    );
    let answer =
        refused(|request| request.process.get_or_insert_default().cmd = "no-such-program".to_owned());
    assert!(
        answer.starts_with("invalid_argument: error starting process 'no-such-program':"),
        "{answer}"
    );
    assert_eq!(
        refused(|request| request.process = Default::default()),
        "invalid_argument: process is missing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn much_output_arrives_whole_on_both_streams() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    let run = runs.run(&shell(
        "head -c 9000001 /dev/zero & head -c 3000001 /dev/zero >&2; wait",
    ));
    assert_eq!((run.stdout.len(), run.stderr.len()), (9_000_001, 3_000_001));
    assert_eq!(run.exit_code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_limit_ends_the_whole_session() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    let mut request = shell("sleep 1000 & echo $!; wait");
    request.limit_ms = 300;
    let run = runs.run(&request);
    assert_eq!(run.refused.expect("no end").0, "deadline_exceeded");
    let child: u64 = String::from_utf8_lossy(&run.stdout)
        .trim()
        .parse()
        .expect("a pid");
    until("what it started is gone", async || {
        (!is_alive(child)).then_some(())
    })
    .await;
    assert!(!is_alive(run.pid));
    assert_eq!(runs.run(&shell("true")).exit_code, Some(0));
}

/// First events wait for one another only for a moment, and the process is one like all others meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_seen_followed_and_killed_by_others() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    runs.send(&shell(
        "mkfifo fifo; echo first; read line < fifo; echo $line; read line < fifo",
    ));
    let mut run = Run::default();
    runs.read_until(&mut run, |run| !run.stdout.is_empty());
    assert_eq!(agent.pids().await, [run.pid]);
    let select = json!({ "process": { "tag": "tagged" } });
    let mut follower = agent.stream("process.Process/Connect", select, &[]).await;
    assert_eq!(follower.pid().await, run.pid);
    std::fs::write(agent.path("fifo"), "second\n").expect("written");
    let seen = follower
        .output_until("the line", |seen| seen.ends_with(b"\n"))
        .await;
    assert_eq!(seen, b"second\n");
    let kill = json!({ "process": by_pid(run.pid), "signal": "SIGNAL_SIGKILL" });
    agent.ok("process.Process/SendSignal", kill).await;
    assert_eq!(follower.finish().await.end["status"], "signal: killed");
    runs.read_until(&mut run, |_| false);
    assert_eq!(
        (&run.stdout[..], run.status.as_str()),
        (&b"first\nsecond\n"[..], "signal: killed")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_stops_reading_does_not_hold_the_time_limit_up() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    let mut request = shell("mkfifo fifo; echo ready; read line < fifo; yes");
    request.limit_ms = 3000;
    runs.send(&request);
    let mut run = Run::default();
    runs.read_until(&mut run, |run| !run.stdout.is_empty());
    let select = json!({ "process": { "tag": "tagged" } });
    let mut follower = agent.stream("process.Process/Connect", select, &[]).await;
    assert_eq!(follower.pid().await, run.pid);
    std::fs::write(agent.path("fifo"), "go\n").expect("written");
    runs.read_until(&mut run, |_| false);
    assert_eq!(run.refused.expect("no end").0, "deadline_exceeded");
    assert!(!is_alive(run.pid));
    drop(follower);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_holds_the_output_open_is_not_waited_for_and_lives() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    let script =
        "mkfifo go end; (read line < go; echo much; echo more; touch done; read line < end) & echo $!";
    let run = runs.run(&shell(script));
    assert_eq!(run.exit_code, Some(0));
    let child: u64 = String::from_utf8_lossy(&run.stdout)
        .trim()
        .parse()
        .expect("a pid");
    std::fs::write(agent.path("go"), "go\n").expect("written");
    // A closed pipe would have ended it at its first word.
    until("it has written", async || {
        agent.path("done").exists().then_some(())
    })
    .await;
    assert!(is_alive(child));
    std::fs::write(agent.path("end"), "end\n").expect("written");
    until("it is gone", async || (!is_alive(child)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_outlives_a_caller_that_leaves() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    runs.send(&shell(
        "mkfifo fifo; echo ready; read line < fifo; yes | head -c 200000; touch done",
    ));
    let mut run = Run::default();
    runs.read_until(&mut run, |run| !run.stdout.is_empty());
    drop(runs);
    std::fs::write(agent.path("fifo"), "go\n").expect("written");
    until("it has ended in its own time", async || {
        agent.path("done").exists().then_some(())
    })
    .await;
    until("it has left the table", async || {
        agent.pids().await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_token_opens_a_connection_and_a_new_one_closes_it() {
    let mut agent = Agent::start().await;
    let mut before = Runs::open(&agent).await;
    let set = json!({ "accessToken": "secret" });
    let answer = agent.post("/init").json(&set).send().await.expect("init");
    assert_eq!(answer.status(), 204);
    before.send(&shell("touch done"));
    assert!(before.is_closed());
    assert!(!agent.path("done").exists());

    let (status, _) = Runs::ask(&agent, None).await;
    assert!(status.contains(" 401 "), "{status}");
    agent.token = Some("secret".to_owned());
    assert_eq!(Runs::open(&agent).await.run(&shell("true")).exit_code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_something_else_is_sent_away() {
    let agent = Agent::start().await;
    let answer = agent.get("/run").send().await.expect("an answer");
    assert_eq!(answer.status(), 426);
    for (length, message) in [
        (u32::try_from(MAX_RUN_MESSAGE).expect("short") + 1, &b""[..]),
        (4, &b"\xff\xff\xff\xff"[..]),
    ] {
        let mut runs = Runs::open(&agent).await;
        runs.0
            .write_all(&[&length.to_le_bytes(), message].concat())
            .expect("sent");
        assert!(runs.is_closed());
    }
    // A message that does not end holds nothing but its own connection.
    let mut half = Runs::open(&agent).await;
    half.0.write_all(&[9, 0, 0, 0, 1]).expect("sent");
    half.0
        .set_read_timeout(Some(Duration::from_millis(50)))
        .expect("a time limit");
    assert_eq!(Runs::open(&agent).await.run(&shell("true")).exit_code, Some(0));
}
