//! The wire: Ethernet frames over a byte stream, each after its length in four big-endian bytes.
//!
//! Inwards, [`FrameReader`] cuts frames out of one fixed buffer. Outwards, every producer appends whole
//! frames to one shared [`FrameSink`], and a single task writes what has gathered with one call. The sink
//! is bounded: TCP flows wait for room (their data stays in their own bounded buffers), everything else is
//! dropped, as it would be on a full wire.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::stats::Counters;
use crate::net::{GATEWAY_MAC, GUEST_MAC};

/// Bytes of the length before each frame.
const PREFIX_LEN: usize = 4;
/// Bytes of an Ethernet header.
pub(super) const ETHERNET_LEN: usize = 14;
/// The longest frame that QEMU can send. A longer one means that the stream is out of step.
pub(super) const MAX_FRAME: usize = 4096 + 65536;
/// Room for one frame of any size, and for many of the usual size in one read.
const READ_BUFFER: usize = 192 * 1024;
/// Bytes that may wait for the writer.
const SINK_CAPACITY: usize = 192 * 1024;

/// The peer announced a frame that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {len} bytes was announced, more than the {MAX_FRAME} that a link carries")]
pub(super) struct OversizeFrame {
    /// The announced length.
    pub(super) len: usize,
}

/// The first frame in `bytes`, or `None` while it is incomplete.
fn first_frame(bytes: &[u8]) -> Result<Option<&[u8]>, OversizeFrame> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_LEN>() else {
        return Ok(None);
    };
    let len = u32::from_be_bytes(*prefix) as usize;
    if len > MAX_FRAME {
        return Err(OversizeFrame { len });
    }
    Ok(rest.get(..len))
}

/// Cuts frames out of the bytes read from the peer.
pub(super) struct FrameReader {
    buffer: Box<[u8]>,
    /// The bytes of `buffer` that were read and not yet returned as frames.
    start: usize,
    end: usize,
}

impl FrameReader {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; READ_BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// Reads once. `Ok(0)` is the end of the stream. Cancelling it loses nothing.
    pub(super) async fn fill<R: AsyncRead + Unpin>(&mut self, from: &mut R) -> io::Result<usize> {
        // What is left is at most a part of one frame, and is moved only when it stands in the way.
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let read = from.read(&mut self.buffer[self.end..]).await?;
        self.end += read;
        Ok(read)
    }

    /// The next whole frame among the bytes read so far.
    pub(super) fn next_frame(&mut self) -> Result<Option<&[u8]>, OversizeFrame> {
        let Some(frame) = first_frame(&self.buffer[self.start..self.end])? else {
            return Ok(None);
        };
        self.start += PREFIX_LEN + frame.len();
        Ok(Some(frame))
    }
}

/// Frames on their way to the guest.
pub(super) struct FrameSink {
    state: Mutex<SinkState>,
    /// Told when the sink is no longer empty.
    filled: Notify,
    /// Told when a sink that turned someone away has room again.
    pub(super) drained: Notify,
}

#[derive(Default)]
struct SinkState {
    bytes: Vec<u8>,
    frames: u64,
    /// Somebody found the sink full since it was last emptied.
    turned_away: bool,
}

/// What an outgoing frame carries.
#[derive(Clone, Copy)]
pub(super) enum EtherType {
    Ipv4,
    Arp,
}

impl EtherType {
    fn to_bytes(self) -> [u8; 2] {
        match self {
            Self::Ipv4 => [0x08, 0x00],
            Self::Arp => [0x08, 0x06],
        }
    }
}

impl FrameSink {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            filled: Notify::new(),
            drained: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, SinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether another frame fits. Who is told `false` can wait for [`Self::drained`].
    pub(super) fn has_room(&self) -> bool {
        let mut state = self.lock();
        let room = state.bytes.len() < SINK_CAPACITY;
        state.turned_away |= !room;
        room
    }

    /// Appends a frame with a payload of `len` bytes, which `fill` writes.
    pub(super) fn push<R>(&self, kind: EtherType, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut state = self.lock();
        self.append(&mut state, kind, len, fill)
    }

    /// Like [`Self::push`] when there is room; otherwise the frame is lost.
    pub(super) fn offer(&self, kind: EtherType, len: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        let mut state = self.lock();
        if state.bytes.len() >= SINK_CAPACITY {
            return false;
        }
        self.append(&mut state, kind, len, fill);
        true
    }

    fn append<R>(
        &self,
        state: &mut SinkState,
        kind: EtherType,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let was_empty = state.bytes.is_empty();
        let prefix = u32::try_from(ETHERNET_LEN + len)
            .unwrap_or(u32::MAX)
            .to_be_bytes();
        state.bytes.extend_from_slice(&prefix);
        state.bytes.extend_from_slice(&GUEST_MAC);
        state.bytes.extend_from_slice(&GATEWAY_MAC);
        state.bytes.extend_from_slice(&kind.to_bytes());
        let payload = state.bytes.len();
        state.bytes.resize(payload + len, 0);
        state.frames += 1;
        let result = fill(&mut state.bytes[payload..]);
        if was_empty {
            self.filled.notify_one();
        }
        result
    }

    /// Waits for frames and moves them all into `out`, which must be empty.
    async fn take(&self, out: &mut Vec<u8>) -> u64 {
        loop {
            {
                let mut state = self.lock();
                if !state.bytes.is_empty() {
                    std::mem::swap(&mut state.bytes, out);
                    if std::mem::take(&mut state.turned_away) {
                        self.drained.notify_one();
                    }
                    return std::mem::take(&mut state.frames);
                }
            }
            self.filled.notified().await;
        }
    }

    /// Writes what gathers in the sink until the peer takes no more.
    pub(super) async fn write_to<W: AsyncWrite + Unpin>(&self, mut to: W, counters: &Counters) -> io::Error {
        let mut out = Vec::new();
        loop {
            let frames = self.take(&mut out).await;
            if let Err(error) = to.write_all(&out).await {
                return error;
            }
            if let Err(error) = to.flush().await {
                return error;
            }
            counters.frames_to_guest.fetch_add(frames, Ordering::Relaxed);
            counters
                .bytes_to_guest
                .fetch_add(out.len() as u64, Ordering::Relaxed);
            out.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.extend_from_slice(&u32::try_from(frame.len()).expect("a short frame").to_be_bytes());
            bytes.extend_from_slice(frame);
        }
        bytes
    }

    /// A stream that hands out its bytes in pieces of the given sizes.
    struct Pieces(Vec<Vec<u8>>);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buf: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<io::Result<()>> {
            if let Some(first) = self.0.first_mut() {
                let take = first.len().min(buf.remaining());
                buf.put_slice(&first[..take]);
                first.drain(..take);
                if first.is_empty() {
                    self.0.remove(0);
                }
            }
            std::task::Poll::Ready(Ok(()))
        }
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 1..20),
            cuts in proptest::collection::vec(1usize..5000, 1..40),
        ) {
            let bytes = encode(&frames);
            let mut pieces = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, tail) = rest.split_at((*cut).min(rest.len()));
                pieces.push(piece.to_vec());
                rest = tail;
            }
            let got = futures::executor::block_on(async {
                let (mut from, mut reader, mut got) = (Pieces(pieces), FrameReader::new(), Vec::new());
                while reader.fill(&mut from).await.expect("reading from memory") > 0 {
                    while let Some(frame) = reader.next_frame().expect("only short frames") {
                        got.push(frame.to_vec());
                    }
                }
                got
            });
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            match first_frame(&bytes) {
                Ok(Some(frame)) => prop_assert_eq!(frame, &bytes[PREFIX_LEN..PREFIX_LEN + frame.len()]),
                Ok(None) => {}
                Err(OversizeFrame { len }) => prop_assert!(len > MAX_FRAME),
            }
        }
    }
}
