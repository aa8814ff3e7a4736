//! Large files.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, ReadBuf};
use wrenn_testkit::platform::{Platform, output};

use crate::WRENN;

const SIZE: u64 = 100 << 20;
/// What the server may need in memory beyond what it had, for a file of any size.
const SLACK: u64 = 64 << 20;

/// Bytes that compress badly and repeat late, made as they are read.
struct Noise {
    state: u64,
    left: u64,
}

impl Noise {
    fn new() -> Self {
        Self {
            state: 0x9e37_79b9_7f4a_7c15,
            left: SIZE,
        }
    }

    fn fill(&mut self, most: usize) -> Vec<u8> {
        let count = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(most)
            .min(64 << 10);
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            bytes.extend_from_slice(&self.state.to_le_bytes());
        }
        bytes.truncate(count);
        self.left -= count as u64;
        bytes
    }
}

impl AsyncRead for Noise {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let bytes = self.fill(buffer.remaining());
        buffer.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_megabytes_go_in_and_come_out() {
    let platform = Platform::start(WRENN).await;
    let sandbox = platform.sandbox().await;
    let expected = {
        // The same pieces whatever the reader's buffer is: hashing does not see their borders.
        let (mut noise, mut hash) = (Noise::new(), Sha256::new());
        while noise.left > 0 {
            hash.update(noise.fill(8 << 10));
        }
        hash.finalize()
    };
    let expected: String = expected.iter().map(|byte| format!("{byte:02x}")).collect();

    let before = platform.peak_memory();
    let started = std::time::Instant::now();
    sandbox
        .files()
        .upload_from("/root/noise.bin", Noise::new(), Some(SIZE))
        .await
        .expect("upload");
    eprintln!("up: {:?}", started.elapsed());
    let there = output(
        &sandbox,
        "stat -c %s /root/noise.bin; sha256sum < /root/noise.bin | cut -d' ' -f1",
    )
    .await;
    assert_eq!(there, format!("{SIZE}\n{expected}"));

    let started = std::time::Instant::now();
    let download = sandbox
        .files()
        .read_stream("/root/noise.bin")
        .await
        .expect("download");
    let mut chunks = std::pin::pin!(download.into_stream());
    let (mut hash, mut size) = (Sha256::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.expect("a chunk");
        size += chunk.len() as u64;
        hash.update(&chunk);
    }
    eprintln!("down: {:?}", started.elapsed());
    let got: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!((size, got), (SIZE, expected));
    let grown = platform.peak_memory().saturating_sub(before);
    assert!(grown < SLACK, "the server needed {} MiB for it", grown >> 20);

    sandbox.destroy_and_wait().await.expect("destroy");
    platform.finish().await;
}
