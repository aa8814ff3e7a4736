//! Standard input, read by a thread of its own: reading it cannot be cancelled, and a thread of the
//! runtime that waits for it would hold up the end of the process.

use bytes::Bytes;
use tokio::sync::mpsc;

const CHUNK: usize = 32 << 10;

/// Starts reading; the channel ends with the input.
pub(super) fn read() -> mpsc::Receiver<Bytes> {
    // Little is read ahead: what the command does not take stays for whoever reads next.
    let (sender, receiver) = mpsc::channel(2);
    std::thread::spawn(move || {
        use std::io::Read as _;
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(read) => {
                    if sender
                        .blocking_send(Bytes::copy_from_slice(&buffer[..read]))
                        .is_err()
                    {
                        return;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // An input that breaks ends, as it would for the command on this machine.
                Err(_) => return,
            }
        }
    });
    receiver
}
