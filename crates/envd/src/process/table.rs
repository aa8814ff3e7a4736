//! The running processes, the recently ended ones, and the fan-out of their output.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rustix::process::{Pid, Signal};
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use wrenn_proto::process::{ProcessConfig, ProcessInfo};

use super::session;
use super::spawn::{AsyncPipe, Input};
use crate::state::lock;

/// Ended processes that late subscribers can still ask for.
const KEPT_EXITS: usize = 64;
const EXIT_LIFETIME: Duration = Duration::from_secs(300);
/// Chunks between a process and one subscriber: together with the chunk size it bounds what a stalled client
/// costs.
const QUEUE: usize = 4;

/// Where a chunk of output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Stdout,
    Stderr,
    Terminal,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
}

/// What a subscriber gets.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Start(u32),
    Data(Source, Bytes),
    End(Exit),
}

/// How a request names a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selector {
    Pid(u32),
    Tag(String),
}

/// A process that has been started and whose end has not been announced yet.
pub(crate) struct Process {
    pub(crate) pid: Pid,
    pub(crate) config: ProcessConfig,
    pub(crate) tag: Option<String>,
    pub(crate) input: tokio::sync::Mutex<Input>,
    /// The agent's end of the terminal, which can be resized while input waits.
    pub(crate) terminal: Option<Arc<AsyncPipe>>,
    subscribers: Mutex<Vec<mpsc::Sender<Event>>>,
    /// `None` while the process runs. Its pid may be signalled only with this lock held and the value `None`,
    /// because the kernel gives the pid away again once the process is reaped.
    exit: Mutex<Option<Exit>>,
    ended: watch::Sender<bool>,
}

impl Process {
    pub(crate) fn new(pid: Pid, config: ProcessConfig, tag: Option<String>, input: Input) -> Self {
        let terminal = match &input {
            Input::Terminal(terminal) => Some(terminal.clone()),
            Input::Closed | Input::Pipe(_) => None,
        };
        Self {
            pid,
            config,
            tag,
            terminal,
            input: tokio::sync::Mutex::new(input),
            subscribers: Mutex::default(),
            exit: Mutex::default(),
            ended: watch::Sender::new(false),
        }
    }

    /// The pid as it goes over the wire.
    pub(crate) fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    fn info(&self) -> ProcessInfo {
        ProcessInfo {
            config: self.config.clone().into(),
            pid: self.id(),
            tag: self.tag.clone(),
            ..Default::default()
        }
    }

    fn is_running(&self) -> bool {
        lock(&self.exit).is_none()
    }

    /// A receiver that turns `true` when the process has been reaped.
    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Signals the process and all of its session; false when it has ended already.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        let exit = lock(&self.exit);
        if exit.is_some() {
            return false;
        }
        session::signal(self.pid, signal);
        true
    }

    /// Reaps the process if it has ended.
    pub(super) fn reap(&self) -> Option<Exit> {
        let mut exit = lock(&self.exit);
        if exit.is_none() {
            let status = rustix::process::waitpid(Some(self.pid), rustix::process::WaitOptions::NOHANG);
            *exit = match status {
                Ok(None) => None,
                Ok(Some((_, status))) => Some(match status.terminating_signal() {
                    Some(signal) => Exit::Signal(signal),
                    None => Exit::Code(status.exit_status().unwrap_or(-1)),
                }),
                // Somebody else reaped it, which nothing here does; its end is certain, its status lost.
                Err(_) => Some(Exit::Code(-1)),
            };
        }
        if exit.is_some() {
            self.ended.send_replace(true);
        }
        *exit
    }

    /// Hands a chunk to all subscribers, waiting for those whose queues are full.
    pub(super) async fn publish(&self, event: Event) {
        let subscribers = lock(&self.subscribers).clone();
        let mut gone = false;
        for subscriber in &subscribers {
            gone |= subscriber.send(event.clone()).await.is_err();
        }
        if gone {
            lock(&self.subscribers).retain(|subscriber| !subscriber.is_closed());
        }
    }

    /// The same from a thread outside of the runtime, for no longer than until then: who does not read must not keep the
    /// process from its time limit.
    pub(super) fn publish_from_outside(&self, event: &Event, runtime: &Handle, until: Option<Instant>) {
        let subscribers = lock(&self.subscribers).clone();
        for subscriber in &subscribers {
            if let Err(TrySendError::Full(event)) = subscriber.try_send(event.clone()) {
                let sent = subscriber.send(event);
                // Whoever has left is forgotten with the process.
                let _ = runtime.block_on(async {
                    match until {
                        Some(until) => timeout_at(until, sent).await.unwrap_or(Ok(())),
                        None => sent.await,
                    }
                });
            }
        }
    }

    /// A queue of this process's events from now on, with its start in front.
    pub(super) fn subscribe(&self) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        // The queue is empty, so there is room.
        let _ = sender.try_send(Event::Start(self.id()));
        lock(&self.subscribers).push(sender);
        receiver
    }
}

struct EndedProcess {
    pid: u32,
    tag: Option<String>,
    exit: Exit,
    at: Instant,
}

#[derive(Default)]
struct Tables {
    running: HashMap<u32, Arc<Process>>,
    /// Oldest first.
    ended: VecDeque<EndedProcess>,
}

/// All processes the agent has started.
#[derive(Default)]
pub(crate) struct ProcessTable(Mutex<Tables>);

impl ProcessTable {
    pub(super) fn insert(&self, process: &Arc<Process>) {
        lock(&self.0).running.insert(process.id(), process.clone());
    }

    /// The processes that run now, by pid.
    pub(crate) fn list(&self) -> Vec<ProcessInfo> {
        let tables = lock(&self.0);
        let mut list: Vec<ProcessInfo> = tables
            .running
            .values()
            .filter(|process| process.is_running())
            .map(|process| process.info())
            .collect();
        list.sort_by_key(|info| info.pid);
        list
    }

    /// The process that the selector names, if it still runs. Of several with the same tag, the newest.
    pub(crate) fn find(&self, selector: &Selector) -> Option<Arc<Process>> {
        self.find_announced(selector)
            .filter(|process| process.is_running())
    }

    fn find_announced(&self, selector: &Selector) -> Option<Arc<Process>> {
        let tables = lock(&self.0);
        find_in(&tables, selector)
    }

    /// The events of a running process from now on, or start and end of one that ended a short while ago.
    pub(crate) fn connect(&self, selector: &Selector) -> Option<mpsc::Receiver<Event>> {
        // One lock for both looks: an end is announced under it, so none is missed in between.
        let mut tables = lock(&self.0);
        if let Some(process) = find_in(&tables, selector) {
            return Some(process.subscribe());
        }
        forget_old(&mut tables.ended);
        let ended = tables.ended.iter().rev().find(|ended| match selector {
            Selector::Pid(pid) => ended.pid == *pid,
            Selector::Tag(tag) => ended.tag.as_deref() == Some(tag),
        })?;
        let (sender, receiver) = mpsc::channel(2);
        let _ = sender.try_send(Event::Start(ended.pid));
        let _ = sender.try_send(Event::End(ended.exit));
        Some(receiver)
    }

    /// Moves a process from the running to the ended ones and announces its end.
    pub(super) async fn finish(&self, process: &Process, exit: Exit) {
        let subscribers = self.retire(process, exit);
        futures::future::join_all(
            subscribers
                .iter()
                .map(|subscriber| subscriber.send(Event::End(exit))),
        )
        .await;
    }

    /// The same from a thread of its own; a task takes over where somebody has to be waited for.
    pub(super) fn finish_elsewhere(&self, process: &Process, exit: Exit) {
        for subscriber in self.retire(process, exit) {
            tokio::spawn(async move { subscriber.send(Event::End(exit)).await });
        }
    }

    /// Moves a process to the ended ones; returns who has to be told.
    fn retire(&self, process: &Process, exit: Exit) -> Vec<mpsc::Sender<Event>> {
        let mut tables = lock(&self.0);
        // The kernel may have given its number away already, to one that runs.
        let same = |other: &Arc<Process>| std::ptr::eq(Arc::as_ptr(other), process);
        if tables.running.get(&process.id()).is_some_and(same) {
            tables.running.remove(&process.id());
        }
        tables.ended.push_back(EndedProcess {
            pid: process.id(),
            tag: process.tag.clone(),
            exit,
            at: Instant::now(),
        });
        forget_old(&mut tables.ended);
        std::mem::take(&mut *lock(&process.subscribers))
    }
}

fn find_in(tables: &Tables, selector: &Selector) -> Option<Arc<Process>> {
    match selector {
        Selector::Pid(pid) => tables.running.get(pid).cloned(),
        Selector::Tag(tag) => tables
            .running
            .values()
            .filter(|process| process.tag.as_deref() == Some(tag))
            // A running one before one whose last output is still being delivered.
            .max_by_key(|process| (process.is_running(), process.id()))
            .cloned(),
    }
}

fn forget_old(ended: &mut VecDeque<EndedProcess>) {
    while ended.len() > KEPT_EXITS
        || ended
            .front()
            .is_some_and(|first| first.at.elapsed() > EXIT_LIFETIME)
    {
        ended.pop_front();
    }
}
