//! Signals for a whole session.
//!
//! A process group would not do: an interactive shell gives every job a group of its own, and a kill of the
//! shell has to end its jobs too. What all of them share is the session that the first process leads. (A
//! process that starts a session of its own has left on purpose: that is how daemons are made.)

use std::fs;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// New processes may appear while the session is walked; a session that still grows after so many rounds of
/// SIGKILL is a fork bomb, which the next kill meets again.
const ROUNDS: usize = 5;

/// Sends the signal to all of the session that `leader` leads. The caller guarantees that the leader has not
/// been reaped, so that the numbers still mean what they meant.
pub(super) fn signal(leader: Pid, signal: Signal) {
    let _ = kill_process_group(leader, signal);
    let rounds = if signal == Signal::KILL { ROUNDS } else { 1 };
    for _ in 0..rounds {
        let members = members(leader);
        if members.is_empty() {
            return;
        }
        for member in members {
            let _ = kill_process(member, signal);
        }
    }
}

/// Members of the session outside the leader's own group, which has had the signal already.
fn members(leader: Pid) -> Vec<Pid> {
    let leader = leader.as_raw_nonzero().get();
    let mut members = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        if let Some((state, group, session)) = parse_stat(&stat)
            && session == leader
            && group != leader
            && !matches!(state, 'Z' | 'X')
            && let Some(pid) = Pid::from_raw(pid)
        {
            members.push(pid);
        }
    }
    members
}

/// State, process group and session of `/proc/PID/stat`. The command's name, in brackets, may hold anything.
fn parse_stat(stat: &str) -> Option<(char, i32, i32)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let group = fields.nth(1)?.parse().ok()?;
    let session = fields.next()?.parse().ok()?;
    Some((state, group, session))
}

#[cfg(test)]
mod tests {
    use super::parse_stat;

    #[test]
    fn names_with_brackets_and_spaces() {
        assert_eq!(parse_stat("12 (a) b) (c) S 1 34 56 0 -1"), Some(('S', 34, 56)));
        assert_eq!(parse_stat("12 (a"), None);
        assert_eq!(parse_stat("12 (a) S 1"), None);
    }
}
