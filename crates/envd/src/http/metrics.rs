//! `GET /metrics`: what the guest uses of what it has.

use std::fs;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use wrenn_proto::guest::Metrics;

use crate::state::{Agent, lock};

/// Jiffies since boot, from the first line of `/proc/stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CpuSample {
    total: u64,
    idle: u64,
}

impl CpuSample {
    fn parse(stat: &str) -> Option<Self> {
        let numbers = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        // Guest time (fields nine and ten) is contained in user time already.
        let numbers: Vec<u64> = numbers
            .split_ascii_whitespace()
            .take(8)
            .filter_map(|n| n.parse().ok())
            .collect();
        let idle = numbers.get(3)?.saturating_add(*numbers.get(4)?);
        Some(Self {
            total: numbers.iter().fold(0, |sum: u64, n| sum.saturating_add(*n)),
            idle,
        })
    }

    /// Percent of the time since `earlier` that was not idle.
    fn used_since(self, earlier: Self) -> f64 {
        let total = self.total.saturating_sub(earlier.total);
        let idle = self.idle.saturating_sub(earlier.idle).min(total);
        if total == 0 {
            0.0
        } else {
            100.0 * (total - idle) as f64 / total as f64
        }
    }
}

pub(crate) async fn metrics(State(agent): State<Arc<Agent>>) -> Json<Metrics> {
    let cpu_used_pct =
        CpuSample::parse(&fs::read_to_string("/proc/stat").unwrap_or_default()).map_or(0.0, |now| {
            let earlier = std::mem::replace(&mut *lock(&agent.cpu), now);
            (now.used_since(earlier) * 100.0).round() / 100.0
        });
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mem = |key| meminfo(&memory, key);
    let mem_total = mem("MemTotal:");
    let mem_cache = mem("Cached:") + mem("Buffers:") + mem("SReclaimable:");
    let (disk_total, disk_used) = rustix::fs::statvfs("/").map_or((0, 0), |disk| {
        let total = disk.f_blocks.saturating_mul(disk.f_frsize);
        (
            total,
            total.saturating_sub(disk.f_bfree.saturating_mul(disk.f_frsize)),
        )
    });
    Json(Metrics {
        ts: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX)),
        cpu_count: std::thread::available_parallelism()
            .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
        cpu_used_pct,
        mem_total,
        mem_used: mem_total.saturating_sub(mem("MemAvailable:")),
        mem_cache,
        disk_used,
        disk_total,
    })
}

/// A value of `/proc/meminfo`, in bytes.
fn meminfo(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_share_is_over_the_interval() {
        let earlier = CpuSample::parse("cpu  100 0 50 800 50 0 0 0 7 7\ncpu0 1 2 3").expect("well formed");
        assert_eq!(
            earlier,
            CpuSample {
                total: 1000,
                idle: 850
            }
        );
        let now = CpuSample {
            total: 1100,
            idle: 925,
        };
        assert!((now.used_since(earlier) - 25.0).abs() < 1e-9);
        assert!(
            earlier.used_since(now).abs() < 1e-9,
            "a clock that went back gives nothing"
        );
        assert_eq!(CpuSample::parse("cpu 1 2"), None);
    }

    #[test]
    fn memory_values_are_bytes() {
        assert_eq!(
            meminfo("MemTotal:     100 kB\nMemFree: 5 kB\n", "MemFree:"),
            5 * 1024
        );
        assert_eq!(meminfo("MemTotal:     100 kB\n", "Other:"), 0);
    }
}
