//! The last safety net: on a timer and on a poke, reads everything afresh and puts right what is not.
//!
//! - A host that fell silent becomes unreachable, and what lived there `missing`.
//! - Each host that answers is asked what it has: records follow its answer, what is `missing` (or an `error`) comes
//!   back, and what no record wants is destroyed after a grace ([`stray`]).
//! - An operation that nobody drives (its process died, its host did not answer) is driven again.
//! - Templates that are to go are removed from their hosts.

use std::collections::{HashMap, HashSet};

use futures::StreamExt as _;
use wrenn_proto::hostagent;

use super::Services;
use super::drive::{lost, millis};
use crate::Result;
use crate::config::Timings;
use crate::domain::around::AuditEntry;
use crate::domain::lifecycle::{GO_MISSING, Source, Verdict, apply_report};
use crate::domain::{Host, HostStatus, Millis, Sandbox, SandboxId, SandboxStatus, now};
use crate::events::Event;
use crate::hosts::rpc;
use crate::store::{Change, Outcome};
use crate::tasks::TaskKind;

/// Hosts that a pass asks at the same time: one that does not answer holds up few others, and many hosts make no burst.
const AT_ONCE: usize = 16;

/// What one pass did, for operators and tests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MonitorPass {
    /// Hosts that fell silent.
    pub hosts_lost: usize,
    /// Sandboxes that became `missing`.
    pub sandboxes_missing: usize,
    /// Records that followed their host's answer.
    pub sandboxes_corrected: usize,
    /// Sandboxes destroyed that no record knew.
    pub orphans_destroyed: usize,
    /// Operations taken up again.
    pub operations_resumed: usize,
    /// Hosts that did not answer.
    pub hosts_unanswered: usize,
}

impl MonitorPass {
    fn add(&mut self, part: Self) {
        let Self {
            hosts_lost,
            sandboxes_missing,
            sandboxes_corrected,
            orphans_destroyed,
            operations_resumed,
            hosts_unanswered,
        } = part;
        self.hosts_lost += hosts_lost;
        self.sandboxes_missing += sandboxes_missing;
        self.sandboxes_corrected += sandboxes_corrected;
        self.orphans_destroyed += orphans_destroyed;
        self.operations_resumed += operations_resumed;
        self.hosts_unanswered += hosts_unanswered;
    }
}

impl Services {
    /// Runs passes until shutdown.
    pub(crate) fn start_monitor(&self) {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Monitor, async move {
            let mut changes = services.bus.subscribe();
            loop {
                tokio::select! {
                    () = tokio::time::sleep(services.config.timings.monitor_interval) => {}
                    () = services.poke.notified() => {}
                    () = changes.poked() => {}
                }
                if services.leads() {
                    services.monitor_pass_logged().await;
                }
            }
        });
    }

    async fn monitor_pass_logged(&self) {
        match self.monitor_pass().await {
            Ok(pass) => tracing::debug!(?pass, "monitor pass"),
            Err(error) => {
                metrics::counter!("wrenn_monitor_failures_total").increment(1);
                tracing::error!(error = &error as &dyn std::error::Error, "a monitor pass failed");
            }
        }
    }

    /// One pass.
    pub(crate) async fn monitor_pass(&self) -> Result<MonitorPass> {
        let mut pass = MonitorPass::default();
        let silence = millis(self.config.timings.host_silence);
        for host in self.store.hosts_fall_silent(now() - silence).await? {
            tracing::warn!(%host, "a host fell silent");
            self.bus.publish(Event::Outbox);
            self.audit(AuditEntry::system(None, "host.unreachable", "host", host));
            pass.hosts_lost += 1;
        }
        // Also hosts that fell silent in an earlier pass that did not get further.
        for host in self.store.hosts_in(HostStatus::Unreachable).await? {
            for (id, team) in self.store.sandboxes_go_missing(host.id, &GO_MISSING).await? {
                self.bus.publish(Event::Sandbox(id));
                self.audit(AuditEntry::system(Some(team), "sandbox.missing", "sandbox", id));
                pass.sandboxes_missing += 1;
            }
        }
        let mut hosts = self.store.hosts_in(HostStatus::Online).await?;
        hosts.extend(self.store.hosts_in(HostStatus::Draining).await?);
        let mut compared = futures::stream::iter(hosts)
            .map(|host| self.compare_host(host))
            .buffer_unordered(AT_ONCE);
        while let Some(part) = compared.next().await {
            pass.add(part);
        }
        drop(compared);
        for sandbox in self
            .store
            .sandboxes_in_transit(now() - millis(self.config.timings.transient_age))
            .await?
        {
            pass.operations_resumed += 1;
            self.drive(sandbox.id);
        }
        let unfinished = now() - millis(self.config.timings.transient_age);
        for (template, team) in self.store.templates_abandon(unfinished).await? {
            self.audit(AuditEntry::system(
                Some(team),
                "template.abandon",
                "template",
                template,
            ));
        }
        self.accounts_pass().await?;
        futures::stream::iter(self.store.templates_deleting().await?)
            .for_each_concurrent(AT_ONCE, |(id, team)| async move {
                if let Err(error) = self.remove_template_files(id, team, None).await {
                    tracing::debug!(template = %id, %error, "a template's files stay for now");
                }
            })
            .await;
        metrics::counter!("wrenn_monitor_passes_total").increment(1);
        metrics::counter!("wrenn_orphans_destroyed_total").increment(pass.orphans_destroyed as u64);
        metrics::counter!("wrenn_sandboxes_corrected_total").increment(pass.sandboxes_corrected as u64);
        Ok(pass)
    }

    /// Compares one host; its trouble is not the others'.
    async fn compare_host(&self, host: Host) -> MonitorPass {
        let mut pass = MonitorPass::default();
        if let Err(error) = self.reconcile_host(&host, &mut pass).await {
            metrics::counter!("wrenn_monitor_failures_total").increment(1);
            tracing::error!(host = %host.id, error = &error as &dyn std::error::Error, "a host was not compared");
        }
        pass
    }

    /// Makes the records follow what a host has.
    async fn reconcile_host(&self, host: &Host, pass: &mut MonitorPass) -> Result<()> {
        // Read before asking: an answer may only correct a record that has not changed since.
        let settled = [
            SandboxStatus::Running,
            SandboxStatus::Paused,
            SandboxStatus::Missing,
            SandboxStatus::Error,
        ];
        let records = self.store.sandboxes_on_host(host.id, &settled).await?;
        let client = self.pool.client(host)?;
        let answer = match client
            .list_sandboxes_with_options(hostagent::ListSandboxesRequest::default(), self.short())
            .await
        {
            Ok(answer) => answer.into_owned(),
            Err(error) => {
                tracing::warn!(host = %host.id, %error, "a host does not answer");
                pass.hosts_unanswered += 1;
                return Ok(());
            }
        };
        let reports: HashMap<_, _> = answer
            .sandboxes
            .iter()
            .map(rpc::Report::read)
            .filter_map(|report| report.id.map(|id| (id, report)))
            .collect();
        for record in &records {
            self.follow(record, reports.get(&record.id), pass).await;
        }
        // What has a record that belongs here is no orphan; only the few others are looked up.
        let at_home: HashSet<_> = records.iter().map(|record| record.id).collect();
        for (&id, report) in reports.iter().filter(|(id, _)| !at_home.contains(id)) {
            let record = self.store.sandbox(id).await?;
            match stray(
                record.as_ref(),
                host,
                report,
                self.noticed(id),
                &self.config.timings,
            ) {
                Stray::Leave => continue,
                Stray::Home => {
                    let Some(record) = record else { continue };
                    if self.store.sandbox_rehome(&record, host.id).await? != Outcome::Updated {
                        continue;
                    }
                    tracing::warn!(sandbox = %id, from = ?record.host, to = %host.id, "a missing sandbox is on another host");
                    let record = Sandbox {
                        host: Some(host.id),
                        ..record
                    };
                    self.follow(&record, Some(report), pass).await;
                    continue;
                }
                Stray::Destroy => {}
            }
            let team = record.as_ref().map(|record| record.team);
            let generation = record
                .map_or(report.generation, |record| record.generation)
                .max(report.generation);
            let request = hostagent::DestroySandboxRequest {
                sandbox_id: id.to_string(),
                generation: generation.saturating_add(1),
                ..Default::default()
            };
            match client.destroy_sandbox_with_options(request, self.short()).await {
                Ok(_) => {
                    self.strangers().remove(&id);
                    pass.orphans_destroyed += 1;
                    self.audit(AuditEntry::system(team, "sandbox.destroy_orphan", "sandbox", id));
                }
                Err(error) => tracing::warn!(sandbox = %id, %error, "an orphan stays for now"),
            }
        }
        Ok(())
    }

    /// Makes one record follow its host's answer. A failure is this record's alone.
    async fn follow(&self, record: &Sandbox, report: Option<&rpc::Report>, pass: &mut MonitorPass) {
        match self.correct(record, report).await {
            Ok(false) => {}
            Ok(true) => {
                self.audit(AuditEntry::system(
                    Some(record.team),
                    "sandbox.reconcile",
                    "sandbox",
                    record.id,
                ));
                pass.sandboxes_corrected += 1;
            }
            Err(error) => {
                metrics::counter!("wrenn_monitor_failures_total").increment(1);
                tracing::error!(sandbox = %record.id, error = &error as &dyn std::error::Error, "a record does not follow its host");
            }
        }
    }

    fn strangers(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Millis>> {
        self.strangers
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Since when this instance knows of a stray.
    fn noticed(&self, id: SandboxId) -> Millis {
        *self.strangers().entry(id).or_insert_with(now)
    }

    /// Makes one record follow its host's answer; returns whether it changed.
    async fn correct(&self, record: &Sandbox, report: Option<&rpc::Report>) -> Result<bool> {
        let change = match report {
            // It is known to be lost.
            None if record.status == SandboxStatus::Error => return Ok(false),
            None => Change::to(SandboxStatus::Error).failure(Some(lost(record.generation))),
            Some(report) => {
                let verdict = apply_report(
                    record.status,
                    record.generation,
                    report.state,
                    report.generation,
                    Source::Answer,
                );
                let Verdict::Become(status) = verdict else {
                    return Ok(false);
                };
                Change::to(status).failure(report.failure(record.generation))
            }
        };
        let outcome = self.settle(record, change).await?;
        Ok(outcome == Outcome::Updated)
    }
}

/// What is to be done about a sandbox that its host has and that is not recorded there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stray {
    Leave,
    /// Its record goes to where it is.
    Home,
    Destroy,
}

/// Destroys only what is certainly nobody's: a record says that it ended, or that a later decision has it elsewhere.
/// A sandbox whose recorded host is silent is found, not lost: its host came back under another identity. And one that
/// no record knows may be what a restored database has forgotten; somebody gets a day to notice. Young ones are left
/// alone, since their record may be on its way.
fn stray(
    record: Option<&Sandbox>,
    host: &Host,
    report: &rpc::Report,
    noticed: Millis,
    timings: &Timings,
) -> Stray {
    let old = |since: Millis, grace| now().saturating_sub(since) >= millis(grace);
    let Some(record) = record else {
        return if old(noticed, timings.stranger_grace) {
            Stray::Destroy
        } else {
            tracing::warn!(sandbox = ?report.id, host = %host.id, "a host has a sandbox that no record knows");
            Stray::Leave
        };
    };
    let elsewhere = record.host != Some(host.id);
    let overtaken = elsewhere && record.generation > report.generation;
    if record.status == SandboxStatus::Stopped || overtaken {
        let since = report.created_at_ms.max(record.status_at);
        return if old(since, timings.orphan_grace) {
            Stray::Destroy
        } else {
            Stray::Leave
        };
    }
    // A team's own host gets no sandbox of another team by saying that it has it.
    if elsewhere && record.status == SandboxStatus::Missing && host.owner.serves(record.team) {
        Stray::Home
    } else {
        Stray::Leave
    }
}
