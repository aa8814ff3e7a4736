//! Watching directories.
//!
//! One inotify instance per watcher. A recursive watcher holds a kernel watch on every directory below its own
//! and adds more as directories appear. Between a directory's creation and its watch, things may happen in it
//! unseen, so a directory that appears is also read, and what it holds already is reported as created.
//!
//! Events are pulled from the kernel in three situations: by the watcher's own task, when a client polls, and by
//! [`Watchers::sync`] after each of the agent's own changes. The last one is why a client that creates a
//! directory and then writes into it through the agent never misses the second event.
//!
//! A directory may hold any number of others, and a file system may be slow: all that looks into one runs off the one
//! thread that serves.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Duration, Instant};
use wrenn_proto::filesystem::{EventType, FilesystemEvent};

use super::entry::describe;
use crate::logging::log;
use crate::state::lock;
use crate::unsafe_calls::watch_fd;
use crate::users::Names;

/// Events kept for a client that does not fetch them; the kernel's own queue holds as many.
const MAX_PENDING: usize = 16_384;
/// Reads of the kernel's queue at a time; together they are as much as it holds.
const MAX_READS: usize = 64;
/// Watchers at a time; each may hold many kernel watches.
const MAX_WATCHERS: usize = 256;
/// A watcher that is polled lives on for this long after its last poll: its client may never say that it is done.
const POLLED_LIFE: Duration = Duration::from_secs(3600);
/// Directories per watcher.
const MAX_DIRECTORIES: usize = 65_536;

/// What a watcher reports.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WatchOptions {
    pub(crate) recursive: bool,
    pub(crate) include_entry: bool,
}

/// A watch on one directory, with or without what is below it.
pub(crate) struct Watcher {
    state: Mutex<WatchState>,
    /// Told when events are pending.
    arrived: Notify,
    task: Mutex<Option<AbortHandle>>,
    _place: OwnedSemaphorePermit,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // The task holds a copy of the descriptor, and with it one of the kernel's few inotify instances.
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

struct WatchState {
    inotify: Inotify,
    root: PathBuf,
    options: WatchOptions,
    directories: HashMap<WatchDescriptor, PathBuf>,
    pending: VecDeque<FilesystemEvent>,
    /// Entries reported because they were found in a new directory; the kernel may report them once more.
    found: HashSet<PathBuf>,
    /// Read at most once for a batch of events.
    names: Option<Names>,
}

/// What a round of reading left in the kernel's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    Empty,
    Filled,
}

impl Watcher {
    /// Starts watching; everything that happens after this returns is reported.
    fn new(root: &Path, options: WatchOptions, place: OwnedSemaphorePermit) -> io::Result<Self> {
        let mut state = WatchState {
            inotify: Inotify::init()?,
            root: root.to_owned(),
            options,
            directories: HashMap::new(),
            pending: VecDeque::new(),
            found: HashSet::new(),
            names: None,
        };
        state.add(root)?;
        if options.recursive {
            state.cover(root, false);
        }
        Ok(Self {
            state: Mutex::new(state),
            arrived: Notify::new(),
            task: Mutex::default(),
            _place: place,
        })
    }

    /// Takes what has happened since the last call.
    pub(crate) async fn take(self: &Arc<Self>) -> Vec<FilesystemEvent> {
        let watcher = Arc::clone(self);
        let taken = tokio::task::spawn_blocking(move || {
            let mut state = lock(&watcher.state);
            state.drain();
            state.pending.drain(..).collect()
        });
        // It fails only while the agent ends.
        taken.await.unwrap_or_default()
    }

    /// Waits until [`Watcher::take`] has something to give.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    fn pull(&self) -> Queue {
        let mut state = lock(&self.state);
        let queue = state.drain();
        if !state.pending.is_empty() {
            self.arrived.notify_one();
        }
        queue
    }
}

impl WatchState {
    fn add(&mut self, dir: &Path) -> io::Result<()> {
        if self.directories.len() >= MAX_DIRECTORIES {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let mut mask = WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::ATTRIB
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::ONLYDIR;
        if dir == self.root {
            mask |= WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        } else {
            // Links to directories are not followed: they may lead anywhere, or in circles.
            mask |= WatchMask::DONT_FOLLOW;
        }
        // A directory that was moved keeps its descriptor, so this also corrects its path.
        let descriptor = self.inotify.watches().add(dir, mask)?;
        self.directories.insert(descriptor, dir.to_owned());
        Ok(())
    }

    /// Adds watches on all directories below `dir`, and reports what is in there when it is new.
    fn cover(&mut self, dir: &Path, report: bool) {
        let mut open = vec![dir.to_owned()];
        while let Some(dir) = open.pop() {
            let Ok(children) = std::fs::read_dir(&dir) else {
                continue;
            };
            for child in children.flatten() {
                let path = child.path();
                let is_dir = child.file_type().is_ok_and(|kind| kind.is_dir());
                if is_dir && let Err(error) = self.add(&path) {
                    if error.kind() != io::ErrorKind::NotFound {
                        log!("watch {}: {error}", path.display());
                    }
                    continue;
                }
                if report && self.found.insert(path.clone()) {
                    self.push(&path, EventType::EVENT_TYPE_CREATE);
                }
                if is_dir {
                    open.push(path);
                }
            }
        }
    }

    /// Moves events from the kernel's queue to the pending ones: all of them, unless they come faster than they
    /// can be moved.
    fn drain(&mut self) -> Queue {
        let mut buffer = [0u8; 16 * 1024];
        self.names = None;
        for _ in 0..MAX_READS {
            let events: Vec<_> = match self.inotify.read_events(&mut buffer) {
                Ok(events) => events.map(|event| event.to_owned()).collect(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Usually "would block": all has been read. Whatever happened before new directories were read
                // has been in the queue just emptied.
                Err(_) => {
                    self.found.clear();
                    return Queue::Empty;
                }
            };
            for event in events {
                self.handle(&event.wd, event.mask, event.name.as_deref().map(Path::new));
            }
        }
        Queue::Filled
    }

    fn handle(&mut self, descriptor: &WatchDescriptor, mask: EventMask, name: Option<&Path>) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            log!("watch {}: events were lost", self.root.display());
            if self.options.recursive {
                self.cover(&self.root.clone(), false);
            }
            return;
        }
        if mask.contains(EventMask::IGNORED) {
            self.directories.remove(descriptor);
            return;
        }
        let Some(dir) = self.directories.get(descriptor).cloned() else {
            return;
        };
        let Some(name) = name else {
            // About the directory itself. Its parent's watch reports the same, except for the root's.
            if mask.contains(EventMask::DELETE_SELF) {
                self.push(&dir, EventType::EVENT_TYPE_REMOVE);
            } else if mask.contains(EventMask::MOVE_SELF) {
                self.push(&dir, EventType::EVENT_TYPE_RENAME);
            }
            return;
        };
        let path = dir.join(name);
        let is_dir = mask.contains(EventMask::ISDIR);
        if mask.contains(EventMask::CREATE) {
            // Covered first, so that the directory's contents follow its own event.
            if !self.found.remove(&path) {
                self.push(&path, EventType::EVENT_TYPE_CREATE);
            }
            if is_dir {
                self.appeared(&path, true);
            }
        } else if mask.contains(EventMask::MOVED_TO) {
            self.push(&path, EventType::EVENT_TYPE_CREATE);
            if is_dir {
                self.appeared(&path, false);
            }
        } else if mask.contains(EventMask::MOVED_FROM) {
            self.found.remove(&path);
            if is_dir {
                self.forget(&path);
            }
            self.push(&path, EventType::EVENT_TYPE_RENAME);
        } else if mask.contains(EventMask::DELETE) {
            self.found.remove(&path);
            self.push(&path, EventType::EVENT_TYPE_REMOVE);
        } else if mask.contains(EventMask::MODIFY) {
            self.push(&path, EventType::EVENT_TYPE_WRITE);
        } else if mask.contains(EventMask::ATTRIB) {
            self.push(&path, EventType::EVENT_TYPE_CHMOD);
        }
    }

    fn appeared(&mut self, dir: &Path, report: bool) {
        if !self.options.recursive {
            return;
        }
        match self.add(dir) {
            Ok(()) => self.cover(dir, report),
            // Gone again already.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log!("watch {}: {error}", dir.display()),
        }
    }

    /// A directory was moved away: what happens in it no longer belongs to this watcher.
    fn forget(&mut self, dir: &Path) {
        let gone: Vec<WatchDescriptor> = self
            .directories
            .iter()
            .filter(|(_, path)| path.starts_with(dir))
            .map(|(descriptor, _)| descriptor.clone())
            .collect();
        for descriptor in gone {
            self.directories.remove(&descriptor);
            // It may have been deleted in the meantime.
            let _ = self.inotify.watches().remove(descriptor);
        }
    }

    fn push(&mut self, path: &Path, kind: EventType) {
        let name = match path.strip_prefix(&self.root) {
            Ok(name) if name.as_os_str().is_empty() => ".".to_owned(),
            Ok(name) => name.to_string_lossy().into_owned(),
            Err(_) => return,
        };
        let described = matches!(
            kind,
            EventType::EVENT_TYPE_CREATE | EventType::EVENT_TYPE_WRITE | EventType::EVENT_TYPE_CHMOD
        );
        // The entry may be gone again by now; the event stands all the same.
        let entry = (self.options.include_entry && described)
            .then(|| describe(path, &Names::load()).ok())
            .flatten();
        if self.pending.len() >= MAX_PENDING {
            self.pending.pop_front();
        }
        self.pending.push_back(FilesystemEvent {
            name,
            r#type: kind.into(),
            entry: entry.map_or_else(Default::default, Into::into),
            ..Default::default()
        });
    }
}

/// Why a watch cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    #[error("too many watchers: at most {MAX_WATCHERS} at a time")]
    TooMany,
    #[error("cannot watch")]
    Io(#[from] io::Error),
}

/// All watchers of the agent: those behind streams, and those that clients poll by id.
pub(crate) struct Watchers {
    places: Arc<Semaphore>,
    all: Mutex<Vec<Weak<Watcher>>>,
    /// With the time of their last poll.
    polled: Mutex<HashMap<String, (Arc<Watcher>, Instant)>>,
}

impl Default for Watchers {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(MAX_WATCHERS)),
            all: Mutex::default(),
            polled: Mutex::default(),
        }
    }
}

impl Watchers {
    /// Starts a watcher that lives as long as the caller holds it.
    pub(crate) async fn watch(
        &self,
        root: PathBuf,
        options: WatchOptions,
    ) -> Result<Arc<Watcher>, WatchError> {
        lock(&self.polled).retain(|_, (_, polled_at)| polled_at.elapsed() < POLLED_LIFE);
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_| WatchError::TooMany)?;
        let made = tokio::task::spawn_blocking(move || Watcher::new(&root, options, place));
        let watcher = Arc::new(made.await.map_err(io::Error::other)??);
        let readiness = lock(&watcher.state).inotify.as_fd().try_clone_to_owned()?;
        let task = tokio::spawn(follow(Arc::downgrade(&watcher), watch_fd(readiness)?)).abort_handle();
        *lock(&watcher.task) = Some(task);
        let mut all = lock(&self.all);
        all.retain(|watcher| watcher.strong_count() > 0);
        all.push(Arc::downgrade(&watcher));
        Ok(watcher)
    }

    /// Keeps a watcher under an id for polling.
    pub(crate) fn keep(&self, watcher: Arc<Watcher>) -> io::Result<String> {
        let id = random_id()?;
        lock(&self.polled).insert(id.clone(), (watcher, Instant::now()));
        Ok(id)
    }

    pub(crate) fn polled(&self, id: &str) -> Option<Arc<Watcher>> {
        let mut polled = lock(&self.polled);
        let (watcher, polled_at) = polled.get_mut(id)?;
        *polled_at = Instant::now();
        Some(Arc::clone(watcher))
    }

    /// False when there is none of this id.
    pub(crate) fn remove(&self, id: &str) -> bool {
        lock(&self.polled).remove(id).is_some()
    }

    /// Brings every watcher up to date with what the agent itself has just changed.
    pub(crate) async fn sync(&self) {
        let all = self.live();
        if !all.is_empty() {
            let _ = tokio::task::spawn_blocking(move || pull(all)).await;
        }
    }

    /// The same on a thread for such work.
    pub(crate) fn sync_here(&self) {
        pull(self.live());
    }

    fn live(&self) -> Vec<Arc<Watcher>> {
        lock(&self.all).iter().filter_map(Weak::upgrade).collect()
    }
}

fn pull(watchers: Vec<Arc<Watcher>>) {
    for watcher in watchers {
        watcher.pull();
    }
}

/// Pulls events as they come, so that new directories are covered soon and the kernel's queue stays short.
async fn follow(watcher: Weak<Watcher>, readiness: AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut guard) = readiness.readable().await else {
            return;
        };
        // Cleared before the queue is emptied, so that what comes during that wakes this task again.
        guard.clear_ready();
        loop {
            let Some(watcher) = watcher.upgrade() else { return };
            let queue = tokio::task::spawn_blocking(move || watcher.pull()).await;
            // Filled: somebody writes without pause.
            match queue {
                Ok(Queue::Filled) => {}
                Ok(Queue::Empty) => break,
                Err(_) => return,
            }
        }
    }
}

fn random_id() -> io::Result<String> {
    let mut bytes = [0u8; 12];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
