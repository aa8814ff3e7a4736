//! What each sandbox uses of its machine over time.
//!
//! The leader asks every host for the newest sample of all its sandboxes and keeps the answers in the database, so that
//! the history outlives the host agent and is there while a sandbox is paused or out of reach. Only what is newer than
//! the newest point is asked of the host when somebody looks.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use connectrpc::ErrorCode as Rpc;
use connectrpc::client::CallOptions;
use futures::StreamExt as _;
use wrenn_proto::hostagent;

use super::Services;
use crate::domain::metrics::{MetricPoint, merge, step};
use crate::domain::{Host, HostStatus, Millis, Principal, Sandbox, SandboxId, SandboxStatus, now};
use crate::hosts::rpc;
use crate::{Error, Result};

const SECOND: Millis = 1000;
const MINUTE: Millis = 60 * SECOND;
const HOUR: Millis = 60 * MINUTE;

/// Width of the points that come from hosts, which take a sample as often, and how long they are kept.
const NARROW: Millis = 15 * SECOND;
const NARROW_KEEP: Millis = 3 * HOUR;
/// Width of those that they are put together to, and how long these are kept.
const WIDE: Millis = 5 * MINUTE;
const WIDE_KEEP: Millis = 25 * HOUR;
/// Age of a sample that says nothing of now: the guest does not answer, or was paused in between.
const STALE: Millis = MINUTE;
/// Hosts that are asked at once.
const AT_ONCE: usize = 16;
/// Longest wait for a host's answer; the next pass asks again soon.
const PATIENCE: Duration = Duration::from_secs(5);

/// How far back a chart of a sandbox goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricsRange {
    /// Its word, for example `10m`.
    pub word: &'static str,
    length: Millis,
    /// The points that it is drawn from.
    width: Millis,
}

const fn range(word: &'static str, length: Millis, width: Millis) -> MetricsRange {
    MetricsRange { word, length, width }
}

const RANGES: [MetricsRange; 7] = [
    range("5m", 5 * MINUTE, NARROW),
    range("10m", 10 * MINUTE, NARROW),
    range("1h", HOUR, NARROW),
    range("2h", 2 * HOUR, NARROW),
    range("6h", 6 * HOUR, WIDE),
    range("12h", 12 * HOUR, WIDE),
    range("24h", 24 * HOUR, WIDE),
];

impl MetricsRange {
    /// The range of a word; ten minutes when nothing is said.
    ///
    /// # Errors
    /// There is no such range.
    pub fn parse(word: Option<&str>) -> Result<Self> {
        let word = word.unwrap_or("10m");
        RANGES
            .into_iter()
            .find(|range| range.word == word)
            .ok_or_else(|| Error::invalid("range must be one of 5m, 10m, 1h, 2h, 6h, 12h, 24h"))
    }
}

impl Services {
    /// What a sandbox used over a range, oldest first. Without its host's answer, the newest part is missing.
    pub async fn metrics(
        &self,
        principal: Principal,
        id: &str,
        range: MetricsRange,
    ) -> Result<(Sandbox, Vec<MetricPoint>)> {
        let sandbox = self.sandbox(principal, id).await?;
        if matches!(sandbox.status, SandboxStatus::Stopped | SandboxStatus::Stopping) {
            return Err(Error::not_found("sandbox", id));
        }
        let since = now() - range.length;
        let mut points = self.store.sandbox_metrics(sandbox.id, range.width, since).await?;
        let mut edge = points.last().map_or(since, |last| last.at + range.width);
        let mut recent = Vec::new();
        if range.width != NARROW {
            recent = self.store.sandbox_metrics(sandbox.id, NARROW, edge).await?;
            edge = recent.last().map_or(edge, |last| last.at + NARROW);
        }
        recent.extend(self.newest(&sandbox, edge).await);
        points.extend(merge(recent, range.width));
        Ok((sandbox, points))
    }

    /// What a running sandbox used lately, as its host says.
    async fn newest(&self, sandbox: &Sandbox, since: Millis) -> Vec<MetricPoint> {
        let runs = matches!(
            sandbox.status,
            SandboxStatus::Running | SandboxStatus::Pausing | SandboxStatus::Snapshotting
        );
        let now = now();
        if !runs || since > now {
            return Vec::new();
        }
        let request = hostagent::GetMetricsRequest {
            sandbox_id: sandbox.id.to_string(),
            since_ms: since,
            ..Default::default()
        };
        let options = CallOptions::default().with_timeout(PATIENCE);
        let answer = match self.client_of(sandbox).await {
            Ok(client) => client
                .get_metrics_with_options(request, options)
                .await
                .map_err(rpc::error),
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => answer
                .into_owned()
                .points
                .into_iter()
                .filter(|point| (since..=now + NARROW).contains(&point.timestamp_ms))
                .map(|point| {
                    MetricPoint::new(
                        point.timestamp_ms,
                        point.cpu_pct,
                        point.mem_bytes,
                        point.disk_bytes,
                    )
                })
                .collect(),
            Err(error) => {
                tracing::debug!(sandbox = %sandbox.id, %error, "the newest metrics are missing");
                Vec::new()
            }
        }
    }

    /// Asks all hosts what their sandboxes use, as of a moment, and puts older answers together.
    pub(crate) async fn sandbox_metrics_pass(&self, at: Millis) -> Result<()> {
        let mut hosts = self.store.hosts_in(HostStatus::Online).await?;
        hosts.extend(self.store.hosts_in(HostStatus::Draining).await?);
        futures::stream::iter(hosts)
            .for_each_concurrent(AT_ONCE, |host| async move {
                // One host's trouble is not the others', and whether it is there is the monitor's to find out.
                if let Err(error) = self.host_metrics(&host, at).await {
                    metrics::counter!("wrenn_pass_failures_total", "pass" => "sandbox metrics").increment(1);
                    tracing::debug!(host = %host.id, %error, "a host did not say what its sandboxes use");
                }
            })
            .await;
        self.metrics_roll_up(at).await
    }

    async fn host_metrics(&self, host: &Host, at: Millis) -> Result<()> {
        let options = CallOptions::default().with_timeout(PATIENCE);
        let answer = self
            .pool
            .client(host)?
            .list_metrics_with_options(hostagent::ListMetricsRequest::default(), options)
            .await;
        let answer = match answer {
            Ok(answer) => answer.into_owned(),
            // An older agent.
            Err(error) if matches!(error.code, Rpc::Unimplemented) => return Ok(()),
            Err(error) => return Err(rpc::error(error)),
        };
        let mut points = BTreeMap::new();
        for sampled in answer.sandboxes {
            let (Ok(id), Some(point)) = (
                sampled.sandbox_id.parse::<SandboxId>(),
                sampled.newest.as_option(),
            ) else {
                continue;
            };
            let age = answer.now_ms.saturating_sub(point.timestamp_ms);
            if (0..=STALE).contains(&age) {
                let step = step(at - age, NARROW);
                let point = MetricPoint::new(step, point.cpu_pct, point.mem_bytes, point.disk_bytes);
                points.insert(id, point);
            }
        }
        Ok(self.store.sandbox_metrics_add(host.id, NARROW, &points).await?)
    }

    /// Puts the points of the wide steps that are over by now together, beginning where it was done last, here or elsewhere.
    async fn metrics_roll_up(&self, at: Millis) -> Result<()> {
        let until = step(at, WIDE);
        if self.around.rolled_up.load(Ordering::Relaxed) == until {
            return Ok(());
        }
        let newest = self.store.sandbox_metrics_newest(WIDE).await?;
        let kept = step(at - NARROW_KEEP, WIDE);
        let from = newest.map_or(kept, |newest| kept.max(newest + WIDE));
        self.store
            .sandbox_metrics_roll_up((NARROW, WIDE), from, until)
            .await?;
        self.around.rolled_up.store(until, Ordering::Relaxed);
        Ok(())
    }

    pub(super) async fn sandbox_metrics_prune(&self, now: Millis) -> Result<()> {
        for (width, keep) in [(NARROW, NARROW_KEEP), (WIDE, WIDE_KEEP)] {
            self.store.sandbox_metrics_prune(width, now - keep).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_drawn_from_few_points_that_are_still_kept() {
        for range in RANGES {
            let kept = if range.width == NARROW {
                NARROW_KEEP
            } else {
                WIDE_KEEP
            };
            assert!(range.length < kept, "{}", range.word);
            assert!(
                (20..=480).contains(&(range.length / range.width)),
                "{}",
                range.word
            );
        }
        // What is put together is there until it is, also after a while without a leader.
        const { assert!(NARROW_KEEP > 10 * WIDE && WIDE % NARROW == 0) };
        assert!(MetricsRange::parse(Some("1y")).is_err());
    }
}
