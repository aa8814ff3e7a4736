//! The guest's serial console: its last lines, for the case that the VM dies.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt as _;
use tokio_util::task::AbortOnDropHandle;

use crate::layout::VmDir;
use crate::vmm::qemu::connect_in;

/// Bytes kept. A guest may write without end; nothing else of it is stored.
const KEEP: usize = 8 << 10;

/// Reads a VM's console for as long as it lives.
#[derive(Debug)]
pub(crate) struct Console {
    kept: Arc<Mutex<VecDeque<u8>>>,
    _reader: Option<AbortOnDropHandle<()>>,
}

impl Console {
    /// Connects to the console of a VM that is up. A console that cannot be read costs the VM nothing.
    pub(crate) async fn attach(dir: &VmDir) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let reader = match connect_in(dir, VmDir::CONSOLE).await {
            Ok(mut stream) => {
                let kept = Arc::clone(&kept);
                Some(AbortOnDropHandle::new(tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                        kept.extend(&buffer[..count]);
                        let excess = kept.len().saturating_sub(KEEP);
                        kept.drain(..excess);
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

    /// The last lines as text, with control characters other than line ends left out.
    pub(crate) fn tail(&self) -> String {
        let kept: Vec<u8> = self
            .kept
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
