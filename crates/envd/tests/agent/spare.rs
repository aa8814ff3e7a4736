//! The child that is made ahead of time.

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Agent, children, is_alive, until};
use crate::run::{Run, Runs, shell};

/// What a program finds about itself. What the shell itself is about is read by the shell, without a process: around the
/// making of one it blocks signals.
const LOOK: &str = r#"
    for fd in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19; do
        if [ -e /proc/$$/fd/$fd ]; then echo has $fd; fi
    done
    while read -r line; do
        case $line in SigQ:*) ;; Sig* | Shd* | Seccomp* | NoNewPrivs* | Uid* | Gid* | Groups* | Umask*) echo "$line" ;; esac
    done < /proc/$$/status
    read -r stat < /proc/$$/stat
    set -- $stat
    echo ${18} ${19} ${40} ${41}
    if [ $6 = $$ ]; then echo leads its session; fi
    read -r place < /proc/$$/oom_score_adj
    echo $place
    readlink /proc/$$/fd/0
    pwd
    env
    read -r nothing || echo no input"#;

fn text(run: &Run) -> String {
    assert_eq!(
        (run.exit_code, &run.refused),
        (Some(0), &None),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// The agent's only child, once it waits with nothing else of the agent's open.
async fn spare(agent: &Agent) -> u32 {
    until("there is a spare child", async || {
        let [child] = children(agent.pid())[..] else {
            return None;
        };
        let open = std::fs::read_dir(format!("/proc/{child}/fd")).ok()?.count();
        (open == 3).then_some(child)
    })
    .await
}

async fn reaped(agent: &Agent, child: u32) {
    until("it was reaped", async || {
        (!children(agent.pid()).contains(&child)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_becomes_the_next_program_as_if_it_were_made_for_that() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    assert!(children(agent.pid()).is_empty());
    let usual = text(&runs.run(&shell(LOOK)));
    assert!(usual.contains("\nleads its session\n100\n"), "{usual}");
    // Priority, niceness and policy: what programs have anywhere.
    assert!(usual.contains("\n20 0 0 0\n"), "{usual}");
    // It may have left just before, but not time and again.
    let mut became = 0;
    for _ in 0..50 {
        let child = spare(&agent).await;
        let run = runs.run(&shell(LOOK));
        assert_eq!(text(&run), usual);
        became += u32::from(run.pid == u64::from(child));
        if became == 3 {
            break;
        }
    }
    assert_eq!(became, 3);
    // Whoever is first takes it, the others make their own.
    spare(&agent).await;
    let mut other = Runs::open(&agent).await;
    runs.send(&shell("exec sleep 0.2"));
    let second = other.run(&shell("exit 3"));
    let first = runs.finish();
    assert_eq!((first.exit_code, second.exit_code), (Some(0), Some(3)));
    assert_ne!(first.pid, second.pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_leaves_when_nobody_wants_it() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    runs.run(&shell("true"));
    spare(&agent).await;
    until("it has left", async || {
        children(agent.pid()).is_empty().then_some(())
    })
    .await;
    assert_eq!(runs.run(&shell("exit 3")).exit_code, Some(3));
    spare(&agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_started_leaves_neither_it_nor_its_remains() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    runs.run(&shell("true"));
    let child = spare(&agent).await;
    let mut request = shell("");
    let config = request.process.as_option_mut().expect("it is set");
    config.cmd = "no-such-program".to_owned();
    let (code, message) = runs.run(&request).refused.expect("no such program");
    assert_eq!(code, "invalid_argument");
    assert!(message.contains("no-such-program"), "{message}");
    reaped(&agent, child).await;
    assert_ne!(spare(&agent).await, child);
    assert_eq!(runs.run(&shell("exit 4")).exit_code, Some(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_somebody_killed_or_stopped_is_not_missed() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    runs.run(&shell("true"));
    for signal in [Signal::KILL, Signal::TERM, Signal::STOP] {
        let child = spare(&agent).await;
        let pid = Pid::from_raw(i32::try_from(child).expect("a pid")).expect("a pid");
        // It may have left just before.
        let _ = kill_process(pid, signal);
        // At once, and once it was reaped.
        assert_eq!(runs.run(&shell("exit 5")).exit_code, Some(5));
        reaped(&agent, child).await;
        assert_eq!(runs.run(&shell("exit 6")).exit_code, Some(6));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_the_agent() {
    let agent = Agent::start().await;
    let mut runs = Runs::open(&agent).await;
    runs.run(&shell("true"));
    let child = spare(&agent).await;
    let _dir = agent.kill();
    until("it has ended too", async || {
        (!is_alive(child.into())).then_some(())
    })
    .await;
}
