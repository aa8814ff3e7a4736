//! A sandbox's recent use of its machine, kept in memory.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use wrenn_proto::guest::Metrics;
use wrenn_proto::hostagent::MetricsPoint;

/// A day at one sample every 15 s.
const KEEP: usize = 24 * 60 * 4;

/// The samples, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Samples(Mutex<VecDeque<MetricsPoint>>);

impl Samples {
    /// Keeps what a guest says of itself, within what can be true.
    pub(crate) fn push(&self, metrics: &Metrics) {
        let mut points = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if points.len() == KEEP {
            points.pop_front();
        }
        points.push_back(MetricsPoint {
            timestamp_ms: super::activity::now_ms(),
            cpu_pct: if metrics.cpu_used_pct.is_finite() {
                metrics.cpu_used_pct.clamp(0.0, 100.0)
            } else {
                0.0
            },
            mem_bytes: metrics.mem_used,
            disk_bytes: metrics.disk_used,
            ..Default::default()
        });
    }

    pub(crate) fn newest(&self) -> Option<MetricsPoint> {
        let points = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        points.back().cloned()
    }

    pub(crate) fn since(&self, since_ms: i64) -> Vec<MetricsPoint> {
        let points = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        points
            .iter()
            .filter(|point| point.timestamp_ms >= since_ms)
            .cloned()
            .collect()
    }
}
