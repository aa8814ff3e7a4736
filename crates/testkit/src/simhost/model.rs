//! What a simulated host has.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::mpsc;
use wrenn_proto::hostagent;
use wrenn_proto::id::SandboxId;

/// A settled state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimState {
    /// Runs.
    Running,
    /// Saved.
    Paused,
    /// Dead.
    Error,
}

/// A sandbox.
#[derive(Debug, Clone)]
pub struct SimSandbox {
    /// Where it is.
    pub state: SimState,
    /// The newest decision it has seen.
    pub generation: u64,
    /// When it was made.
    pub created_at_ms: i64,
    /// What it was made with.
    pub request: hostagent::CreateSandboxRequest,
    /// Files by absolute path.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Directories by absolute path.
    pub dirs: HashSet<String>,
    /// Who made the file or directory with this absolute path.
    pub owners: BTreeMap<String, String>,
    /// What it used of its machine, oldest first.
    pub samples: Vec<hostagent::MetricsPoint>,
}

/// What a process hears.
#[derive(Debug)]
pub(crate) enum ToProcess {
    Input(Vec<u8>),
    Eof,
    Kill,
    Resize(u32, u32),
}

/// A running process.
pub(crate) struct SimProcess {
    pub(crate) sandbox: String,
    pub(crate) tag: String,
    pub(crate) cmd: String,
    pub(crate) args: Vec<String>,
    pub(crate) ears: mpsc::UnboundedSender<ToProcess>,
}

/// Everything on the host.
#[derive(Default)]
pub struct Model {
    /// By id.
    pub sandboxes: HashMap<SandboxId, SimSandbox>,
    /// Template ids whose files are here.
    pub snapshots: HashSet<String>,
    /// Templates that may not be deleted, because sandboxes use them.
    pub used_snapshots: HashSet<String>,
    /// How many chunks of an endless file or output were asked for.
    pub produced: Arc<AtomicU64>,
    pub(crate) processes: HashMap<u32, SimProcess>,
    pub(crate) next_pid: u32,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("sandboxes", &self.sandboxes.keys())
            .finish_non_exhaustive()
    }
}

impl SimSandbox {
    /// A running one that nobody asked for.
    #[must_use]
    pub fn stray(created_at_ms: i64) -> Self {
        Self {
            state: SimState::Running,
            generation: 1,
            created_at_ms,
            request: hostagent::CreateSandboxRequest::default(),
            files: BTreeMap::new(),
            dirs: ["/", "/tmp", "/home/user", "/root"].map(str::to_owned).into(),
            owners: BTreeMap::new(),
            samples: Vec::new(),
        }
    }

    pub(crate) fn wire(&self, id: SandboxId) -> hostagent::Sandbox {
        use hostagent::SandboxState;
        let state = match self.state {
            SimState::Running => SandboxState::SANDBOX_STATE_RUNNING,
            SimState::Paused => SandboxState::SANDBOX_STATE_PAUSED,
            SimState::Error => SandboxState::SANDBOX_STATE_ERROR,
        };
        let dead = self.state == SimState::Error;
        hostagent::Sandbox {
            sandbox_id: id.to_string(),
            team_id: self.request.team_id.clone(),
            state: state.into(),
            generation: self.generation,
            created_at_ms: self.created_at_ms,
            error: if dead {
                "the VM died".to_owned()
            } else {
                String::new()
            },
            console_tail: if dead {
                "kernel panic".to_owned()
            } else {
                "a guest's last words".to_owned()
            },
            ..Default::default()
        }
    }
}
