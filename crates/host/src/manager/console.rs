//! The guest's serial console: its last lines, for whoever asks, and for the case that the VM dies.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt as _;
use tokio_util::task::AbortOnDropHandle;

use crate::layout::VmDir;
use crate::vmm::qemu::connect_in;

/// Bytes kept. A guest may write without end; nothing else of it is stored.
const KEEP: usize = 8 << 10;

/// The last bytes of a console. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<u8>>>);

/// Reads a VM's console for as long as it lives.
#[derive(Debug)]
pub(crate) struct Console {
    kept: Tail,
    _reader: Option<AbortOnDropHandle<()>>,
}

impl Console {
    /// Connects to the console of a VM that is up. A console that cannot be read costs the VM nothing.
    pub(crate) async fn attach(dir: &VmDir) -> Self {
        let kept = Tail::default();
        let reader = match connect_in(dir, VmDir::CONSOLE).await {
            Ok(mut stream) => {
                let kept = kept.clone();
                Some(AbortOnDropHandle::new(tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                        kept.push(&buffer[..count]);
                    }
                })))
            }
            Err(error) => {
                tracing::warn!(dir = %dir.path().display(), %error, "cannot read a guest's console");
                None
            }
        };
        Self {
            kept,
            _reader: reader,
        }
    }

    /// What is kept of it, now and later.
    pub(crate) fn kept(&self) -> Tail {
        self.kept.clone()
    }

    /// The last lines as text.
    pub(crate) fn tail(&self) -> String {
        self.kept.text()
    }
}

impl Tail {
    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEEP);
        kept.drain(..excess);
    }

    /// The last lines as text, with control characters other than line ends left out.
    pub(crate) fn text(&self) -> String {
        let kept: Vec<u8> = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .copied()
            .collect();
        String::from_utf8_lossy(&kept)
            .chars()
            .filter(|c| *c == '\n' || !c.is_control())
            .collect::<String>()
            .trim()
            .to_owned()
    }
}
