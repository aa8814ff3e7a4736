//! What a sandbox uses of its machine over time.

use super::Millis;

/// What a sandbox used within a step of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricPoint {
    /// When the step begins.
    pub at: Millis,
    /// CPU, 0 to 100 over all vCPUs; the mean.
    pub cpu_pct: f64,
    /// Memory; the most.
    pub mem_bytes: u64,
    /// Disk; the most.
    pub disk_bytes: u64,
}

impl MetricPoint {
    /// What a host said, within what can be true: the guest made the figures, and neither JSON nor a mean has a use for
    /// what is no number.
    pub(crate) fn new(at: Millis, cpu_pct: f64, mem_bytes: u64, disk_bytes: u64) -> Self {
        Self {
            at,
            cpu_pct: if cpu_pct.is_finite() {
                cpu_pct.clamp(0.0, 100.0)
            } else {
                0.0
            },
            mem_bytes,
            disk_bytes,
        }
    }
}

/// The beginning of the step of a width that a moment is in.
pub(crate) fn step(at: Millis, width: Millis) -> Millis {
    at - at.rem_euclid(width)
}

/// Puts points together to one for each step of a width, oldest first.
pub(crate) fn merge(points: impl IntoIterator<Item = MetricPoint>, width: Millis) -> Vec<MetricPoint> {
    let mut steps = std::collections::BTreeMap::<Millis, (MetricPoint, u32)>::new();
    for point in points {
        let at = step(point.at, width);
        let (merged, count) = steps.entry(at).or_insert((MetricPoint::new(at, 0.0, 0, 0), 0));
        *count += 1;
        merged.cpu_pct += (point.cpu_pct - merged.cpu_pct) / f64::from(*count);
        merged.mem_bytes = merged.mem_bytes.max(point.mem_bytes);
        merged.disk_bytes = merged.disk_bytes.max(point.disk_bytes);
    }
    steps.into_values().map(|(point, _)| point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_the_mean_of_the_cpu_and_the_most_of_the_rest() {
        let points = [
            MetricPoint::new(31_000, 9.0, 1, 1),
            MetricPoint::new(16_000, f64::NAN, 5, 2),
            MetricPoint::new(29_999, 300.0, 3, 4),
        ];
        assert_eq!(
            merge(points, 15_000),
            [
                MetricPoint::new(15_000, 50.0, 5, 4),
                MetricPoint::new(30_000, 9.0, 1, 1)
            ]
        );
    }
}
