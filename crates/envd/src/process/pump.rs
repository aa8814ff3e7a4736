//! Carries one output stream of a process to its subscribers.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::watch;
use tokio::time::Instant;

use super::spawn::AsyncPipe;
use super::table::{Event, Process, Source};

/// Half of a pipe's usual capacity: few events for much output, little memory for many streams.
pub(super) const CHUNK: usize = 32 * 1024;
/// After its end, a process's output is complete when the stream is closed. Background children may hold it
/// open; their output still counts while it comes without a pause of this length …
pub(super) const QUIET: Duration = Duration::from_millis(500);
/// … and for no longer than this in total.
pub(super) const LINGER: Duration = Duration::from_secs(5);

thread_local! {
    /// Where chunks are read into. Most are far smaller, and may wait in queues, so each gets memory of its own size.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(CHUNK));
}

/// Runs until the stream ends. Output that comes after the announced end is read and dropped, so that a
/// background child that writes is not killed by a closed pipe.
pub(super) async fn run(process: &Process, pipe: Arc<AsyncPipe>, source: Source) {
    if deliver(process, &pipe, source).await == Ended::Open {
        // The process is not held: it leaves the table now.
        drain(pipe);
    }
}

/// Reads and drops the rest of a stream.
pub(super) fn drain(pipe: Arc<AsyncPipe>) {
    tokio::spawn(async move { while let Ok(Some(_)) = read(&pipe).await {} });
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Closed,
    /// The process has ended, but something holds the stream open.
    Open,
}

async fn deliver(process: &Process, pipe: &AsyncPipe, source: Source) -> Ended {
    let mut ended = process.ended();
    while !*ended.borrow() {
        let chunk = tokio::select! {
            biased;
            chunk = read(pipe) => chunk,
            _ = wait_until_set(&mut ended) => break,
        };
        match chunk {
            Ok(Some(chunk)) => process.publish(Event::Data(source, chunk)).await,
            _ => return Ended::Closed,
        }
    }
    // What the process itself had written when it ended is delivered however slow the subscribers are.
    let mut owed = rustix::io::ioctl_fionread(pipe.get_ref()).unwrap_or(0);
    let deadline = Instant::now() + LINGER;
    loop {
        if owed == 0 && Instant::now() >= deadline {
            return Ended::Open;
        }
        match tokio::time::timeout(QUIET, read(pipe)).await {
            Ok(Ok(Some(chunk))) => {
                owed = owed.saturating_sub(chunk.len() as u64);
                process.publish(Event::Data(source, chunk)).await;
            }
            Ok(_) => return Ended::Closed,
            Err(_) => return Ended::Open,
        }
    }
}

/// Like `wait_for`, whose result would keep a lock.
async fn wait_until_set(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|set| *set).await;
}

/// The next chunk, or `None` at the end. Cancelling it loses nothing.
async fn read(pipe: &AsyncPipe) -> io::Result<Option<Bytes>> {
    loop {
        let mut guard = pipe.readable().await?;
        let result = guard.try_io(|pipe| {
            BUFFER.with_borrow_mut(|buffer| {
                buffer.clear();
                match rustix::io::read(pipe.get_ref(), rustix::buffer::spare_capacity(buffer)) {
                    Ok(0) => Ok(None),
                    Ok(_) => Ok(Some(Bytes::copy_from_slice(buffer))),
                    // A terminal whose other end is closed everywhere.
                    Err(Errno::IO) => Ok(None),
                    Err(error) => Err(error.into()),
                }
            })
        });
        match result {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}
