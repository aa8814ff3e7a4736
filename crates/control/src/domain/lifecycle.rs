//! The sandbox's state machine, without IO: who may change a status, when, and to what.
//!
//! ```text
//!             ┌────────┐ placed ┌──────────┐ done
//!   create ──▶│pending │───────▶│ starting │──────┐
//!             └────────┘        └──────────┘      ▼
//!        ┌─────────┐  pause   ┌─────────┐     ┌─────────┐◀─┐ done
//!        │ paused  │◀──done───│ pausing │◀────│ running │──┼───▶ snapshotting
//!        └─────────┘          └─────────┘     └─────────┘  │
//!            │  ▲ ttl expired on the host ────────┘   ▲    │
//!            │  └──────────── snapshotting            │    │
//!            └──── resume ──▶ resuming ───────────────┘    │
//!
//!   destroy: from everything but `stopped` to `stopping`, then `stopped` (final)
//!   host silent: running, paused and what is under way become `missing`; its return restores them
//!   a VM that died, a create that failed: `error`; destroy leads out, and its own host, asked, that has it after all
//! ```
//!
//! Two parties change a status. **Decisions** ([`decide`]) are the control plane's: each increments the
//! generation, which travels with the RPC. **Reports** ([`apply_report`]) are the host's: each carries the
//! generation under which the host acted, and an unasked one that is older than the record's is stale,
//! because a newer decision is already on its way to the host. Everything here is a pure function, so the
//! properties (nothing leaves `stopped`, generations never fall, stale reports never act) are tested
//! on random histories rather than argued.

use super::SandboxStatus as Status;

/// What a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Save memory and disk and free the host.
    Pause,
    /// Go on from the saved state.
    Resume,
    /// Make a template from it.
    Snapshot,
    /// End it for good.
    Destroy,
}

impl Request {
    /// The verb for messages.
    #[must_use]
    pub fn verb(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
            Self::Destroy => "destroy",
        }
    }
}

/// What to do about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Move to this status with the next generation, if the status is still what it was.
    Begin {
        /// The transient status.
        to: Status,
        /// What to return to afterwards, for operations that come back.
        previous: Option<Status>,
    },
    /// The wish is fulfilled or being fulfilled: nothing to do.
    Nothing,
}

/// The request makes no sense in this status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied {
    /// What was asked.
    pub request: Request,
    /// The status that forbids it.
    pub status: Status,
}

/// Decides about a request by the status alone.
///
/// # Errors
/// [`Denied`] names the status.
pub fn decide(status: Status, request: Request) -> Result<Action, Denied> {
    let begin = |to| Ok(Action::Begin { to, previous: None });
    let denied = Err(Denied { request, status });
    match (request, status) {
        (Request::Pause, Status::Running) => begin(Status::Pausing),
        (Request::Resume, Status::Paused | Status::Hibernated) => begin(Status::Resuming),
        (Request::Snapshot, Status::Running | Status::Paused) => Ok(Action::Begin {
            to: Status::Snapshotting,
            previous: Some(status),
        }),
        // Destroying twice is what a client does whose first answer was lost.
        (Request::Destroy, Status::Stopping | Status::Stopped) => Ok(Action::Nothing),
        (Request::Destroy, _) => begin(Status::Stopping),
        (Request::Pause | Request::Resume | Request::Snapshot, _) => denied,
    }
}

/// What a host says about a sandbox it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostState {
    /// Something is under way there.
    Busy,
    /// Its VM runs.
    Running,
    /// Saved.
    Paused,
    /// Dead.
    Error,
}

/// What to do about a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Move to this status, if record and generation are still the same.
    Become(Status),
    /// The record says so already, or the report says nothing definite.
    Agrees,
    /// Older than the newest decision.
    Stale,
    /// The record is past caring about reports.
    Ignored,
}

/// Where a report comes from, which decides what it may prove about an operation under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Sent by the host on its own: may cross with an RPC of ours, so it can only confirm
    /// that an operation reached its goal or that the VM is dead.
    Event,
    /// The answer to a question asked after the record was read and after any operation's RPC had
    /// ended: the last word, even under an older generation (then the newer decision never arrived).
    /// The caller applies it only if the record is still as it was read.
    Answer,
}

/// Decides about a host's report.
#[must_use]
pub fn apply_report(
    status: Status,
    generation: u64,
    state: HostState,
    reported: u64,
    source: Source,
) -> Verdict {
    if source == Source::Event && reported < generation {
        return Verdict::Stale;
    }
    let settled = match state {
        HostState::Busy => return Verdict::Agrees,
        HostState::Running => Status::Running,
        HostState::Paused => Status::Paused,
        HostState::Error => Status::Error,
    };
    match status {
        Status::Stopping | Status::Stopped | Status::Pending => Verdict::Ignored,
        // The host is the truth about what it has: a folder that could not be read was mended there, a disk is mounted
        // again. News on the way may be older than what was found out since, so only an answer counts.
        Status::Error if settled == Status::Error => Verdict::Agrees,
        Status::Error => match source {
            Source::Answer => Verdict::Become(settled),
            Source::Event => Verdict::Ignored,
        },
        Status::Running | Status::Paused | Status::Hibernated | Status::Missing => {
            if settled == status || (status == Status::Hibernated && settled == Status::Paused) {
                Verdict::Agrees
            } else {
                Verdict::Become(settled)
            }
        }
        Status::Starting | Status::Resuming | Status::Pausing | Status::Snapshotting => {
            let goal = goal(status);
            if source == Source::Answer || settled == Status::Error || goal == Some(settled) {
                Verdict::Become(settled)
            } else {
                Verdict::Agrees
            }
        }
    }
}

/// Where an operation under way leads when it succeeds. A snapshot has none of its own: it returns.
#[must_use]
pub fn goal(status: Status) -> Option<Status> {
    match status {
        Status::Pending | Status::Starting | Status::Resuming => Some(Status::Running),
        Status::Pausing => Some(Status::Paused),
        Status::Stopping => Some(Status::Stopped),
        Status::Running
        | Status::Paused
        | Status::Snapshotting
        | Status::Hibernated
        | Status::Stopped
        | Status::Missing
        | Status::Error => None,
    }
}

/// The statuses that a silent host turns into `missing`.
///
/// `stopping` stays: the wish to destroy outlives the silence. So do `pending` and `starting`: there is
/// nothing yet that could be missed, and the start is tried again, elsewhere if need be.
pub const GO_MISSING: [Status; 5] = [
    Status::Running,
    Status::Pausing,
    Status::Paused,
    Status::Snapshotting,
    Status::Resuming,
];

/// Whether a status may follow another at all, whoever asks.
#[must_use]
pub fn legal(from: Status, to: Status) -> bool {
    match (from, to) {
        (Status::Stopped, _) | (_, Status::Pending) => false,
        (Status::Stopping, to) => to == Status::Stopped,
        (_, Status::Stopping) => true,
        (_, Status::Stopped) => false,
        (_, Status::Error) => true,
        (Status::Error, to) => matches!(to, Status::Running | Status::Paused),
        (Status::Pending, to) => to == Status::Starting,
        (from, Status::Missing) => GO_MISSING.contains(&from),
        (_, Status::Starting) => false,
        (from, Status::Pausing) => from == Status::Running,
        (from, Status::Resuming) => matches!(from, Status::Paused | Status::Hibernated),
        (from, Status::Snapshotting) => matches!(from, Status::Running | Status::Paused),
        (from, Status::Hibernated) => from == Status::Paused,
        (from, to @ (Status::Running | Status::Paused)) => from != to,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything that can happen to a record.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        Place,
        Ask(Request),
        Report(HostState, u64, Source),
        Silence,
        Done,
        Fail,
    }

    #[derive(Debug, Clone, Copy)]
    struct Record {
        status: Status,
        previous: Option<Status>,
        generation: u64,
    }

    impl Record {
        /// Plays one step as the service does; returns whether anything changed.
        fn play(&mut self, step: Step) -> bool {
            let before = self.status;
            match step {
                Step::Place => {
                    if self.status == Status::Pending {
                        self.status = Status::Starting;
                        self.generation += 1;
                    }
                }
                Step::Ask(request) => {
                    if let Ok(Action::Begin { to, previous }) = decide(self.status, request) {
                        self.status = to;
                        self.previous = previous;
                        self.generation += 1;
                    }
                }
                Step::Report(state, lag, source) => {
                    let reported = self.generation.saturating_sub(lag);
                    if let Verdict::Become(to) =
                        apply_report(self.status, self.generation, state, reported, source)
                    {
                        self.status = to;
                    }
                }
                Step::Silence => {
                    if GO_MISSING.contains(&self.status) {
                        self.status = Status::Missing;
                    }
                }
                Step::Done => {
                    if self.status == Status::Snapshotting {
                        self.status = self.previous.unwrap_or(Status::Running);
                    } else if self.status != Status::Pending
                        && let Some(goal) = goal(self.status)
                    {
                        self.status = goal;
                    }
                }
                Step::Fail => {
                    if matches!(self.status, Status::Pending | Status::Starting) {
                        self.status = Status::Error;
                    }
                }
            }
            self.status != before
        }
    }

    fn step() -> impl Strategy<Value = Step> {
        let request = prop_oneof![
            Just(Request::Pause),
            Just(Request::Resume),
            Just(Request::Snapshot),
            Just(Request::Destroy)
        ];
        let state = prop_oneof![
            Just(HostState::Busy),
            Just(HostState::Running),
            Just(HostState::Paused),
            Just(HostState::Error)
        ];
        let source = prop_oneof![Just(Source::Event), Just(Source::Answer)];
        prop_oneof![
            3 => Just(Step::Place),
            4 => request.prop_map(Step::Ask),
            4 => (state, 0..3u64, source).prop_map(|(state, lag, source)| Step::Report(state, lag, source)),
            1 => Just(Step::Silence),
            5 => Just(Step::Done),
            1 => Just(Step::Fail),
        ]
    }

    proptest! {
        #[test]
        fn histories_keep_the_invariants(steps in proptest::collection::vec(step(), 1..60)) {
            let mut record = Record { status: Status::Pending, previous: None, generation: 0 };
            for step in steps {
                let before = record;
                let changed = record.play(step);
                prop_assert!(record.generation >= before.generation);
                if changed {
                    prop_assert!(legal(before.status, record.status), "{:?} → {:?} by {step:?}", before.status, record.status);
                }
                if before.status == Status::Stopped {
                    prop_assert!(!changed);
                }
                // A new decision is the only thing that starts an operation.
                if changed && record.status.is_transient() {
                    prop_assert!(record.generation > before.generation);
                }
                if let Step::Report(_, lag, Source::Event) = step && lag > 0 && before.generation >= lag {
                    prop_assert!(!changed, "a stale report acted");
                }
            }
            // Whatever happened, destroy leads out.
            record.play(Step::Ask(Request::Destroy));
            record.play(Step::Done);
            prop_assert_eq!(record.status, Status::Stopped);
        }
    }

    #[test]
    fn events_do_not_undo_an_operation_under_way() {
        // The host paused a sandbox by itself while our resume (same generation) is on its way.
        let verdict = apply_report(Status::Resuming, 4, HostState::Paused, 4, Source::Event);
        assert_eq!(verdict, Verdict::Agrees);
        let verdict = apply_report(Status::Resuming, 4, HostState::Paused, 4, Source::Answer);
        assert_eq!(verdict, Verdict::Become(Status::Paused));
    }

    #[test]
    fn every_denial_names_the_status() {
        for status in Status::ALL {
            for request in [Request::Pause, Request::Resume, Request::Snapshot] {
                if let Err(denied) = decide(status, request) {
                    assert_eq!(denied, Denied { request, status });
                }
            }
            assert!(
                decide(status, Request::Destroy).is_ok(),
                "destroy works from {status}"
            );
        }
    }
}
