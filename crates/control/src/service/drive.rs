//! Carries decisions to hosts: reads a record, does what its transient status calls for, and writes
//! what came of it.
//!
//! Driving needs nothing but the record, and repeating it is harmless (the generation makes the host's
//! side idempotent). So the same function serves the request that made the decision, the monitor that
//! finds an operation nobody drives, and the start after a crash.

use std::collections::hash_map::Entry;

use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode as Rpc};
use wrenn_proto::hostagent;

use super::Services;
use crate::domain::lifecycle::{Source, Verdict, apply_report};
use crate::domain::{Actor, Failure, HostId, Sandbox, SandboxId, SandboxStatus, TemplateId, now};
use crate::events::Event;
use crate::hosts::{Client, Needs, rpc};
use crate::store::{Change, Finish, Guard, Made, Outcome};
use crate::tasks::TaskKind;
use crate::{Error, ErrorCode, Result};

/// How a step of driving ended.
enum Step {
    /// The record changed; look again.
    Again,
    /// This step changed the record, to this decision and status: the next one is here.
    Next(u64, SandboxStatus),
    /// Nothing more to do now.
    Rest,
}

/// Why a snapshot failed that came to its name too late.
const NAME_TAKEN: &str =
    "another template of this name was begun while the snapshot was made; it has the name now";
/// Wait before an operation is tried again that the database did not take.
const DATABASE_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// Most hosts that one start is tried on.
const MAX_PLACEMENTS: usize = 4;

impl Services {
    /// Starts to drive a sandbox, unless a task of this process does so already.
    pub(super) fn drive(&self, id: SandboxId) {
        let services = self.clone();
        self.tasks
            .spawn(TaskKind::Drive, async move { services.drive_to_rest(id).await });
    }

    /// The same right after a decision, which need not be read to be known.
    pub(super) fn drive_decided(&self, id: SandboxId, generation: u64, status: SandboxStatus) {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Drive, async move {
            services.drive_from(id, Some((generation, status))).await;
        });
    }

    /// Drives until the status is settled or the host does not answer.
    pub(super) async fn drive_to_rest(&self, id: SandboxId) {
        self.drive_from(id, None).await;
    }

    async fn drive_from(&self, id: SandboxId, mut decided: Option<(u64, SandboxStatus)>) {
        let mut refused = Vec::new();
        // What the database did not take is done again: a short outage may be over before anybody else has seen it.
        while let Err(error) = self.drive_on(id, &mut refused, decided.take()).await {
            tracing::error!(sandbox = %id, error = &error as &dyn std::error::Error, "an operation failed");
            if error.code != ErrorCode::DatabaseUnavailable {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(DATABASE_PAUSE) => {}
                () = self.tasks.closing().cancelled() => return,
            }
        }
    }

    /// `decided` is what the record was a moment ago, where the caller knows it.
    async fn drive_on(
        &self,
        id: SandboxId,
        refused: &mut Vec<HostId>,
        mut decided: Option<(u64, SandboxStatus)>,
    ) -> Result<()> {
        loop {
            let seen = match decided.take() {
                Some(decided) => decided,
                None => match self.under_way(id).await? {
                    Some(sandbox) => (sandbox.generation, sandbox.status),
                    None => return Ok(()),
                },
            };
            // One task per decision: a newer decision (destroy during create) must not wait for the older.
            let Some(claim) = self.claim(id, seen.0, seen.1) else {
                return Ok(());
            };
            // Whoever had the claim before may have carried the decision out since.
            let Some(sandbox) = self.under_way(id).await? else {
                return Ok(());
            };
            let step = if (sandbox.generation, sandbox.status) == seen {
                self.step(&sandbox, refused).await
            } else {
                Ok(Step::Again)
            };
            let asked_again = claim.end();
            match step? {
                Step::Again => {}
                Step::Next(generation, status) => decided = Some((generation, status)),
                Step::Rest if asked_again => {}
                Step::Rest => return Ok(()),
            }
        }
    }

    /// A record with an operation under way; `None` when there is nothing to drive.
    async fn under_way(&self, id: SandboxId) -> Result<Option<Sandbox>> {
        let sandbox = self.store.sandbox(id).await?;
        Ok(sandbox.filter(|sandbox| sandbox.status.is_transient()))
    }

    async fn step(&self, sandbox: &Sandbox, refused: &mut Vec<HostId>) -> Result<Step> {
        match sandbox.status {
            SandboxStatus::Pending => {
                let change = Change::decide(SandboxStatus::Starting, sandbox.actor);
                Ok(match self.settle(sandbox, change).await? {
                    Outcome::Updated => Step::Next(sandbox.generation + 1, SandboxStatus::Starting),
                    // Somebody decided otherwise, and looking again shows what.
                    Outcome::Stale | Outcome::Missing => Step::Again,
                })
            }
            SandboxStatus::Starting => self.drive_start(sandbox, refused).await,
            SandboxStatus::Pausing => self.drive_pause(sandbox).await,
            SandboxStatus::Resuming => self.drive_resume(sandbox).await,
            SandboxStatus::Snapshotting => self.drive_snapshot(sandbox).await,
            SandboxStatus::Stopping => self.drive_stop(sandbox).await,
            SandboxStatus::Running
            | SandboxStatus::Paused
            | SandboxStatus::Hibernated
            | SandboxStatus::Stopped
            | SandboxStatus::Missing
            | SandboxStatus::Error => Ok(Step::Rest),
        }
    }

    async fn drive_start(&self, sandbox: &Sandbox, refused: &mut Vec<HostId>) -> Result<Step> {
        let request = hostagent::CreateSandboxRequest {
            sandbox_id: sandbox.id.to_string(),
            team_id: sandbox.team.to_string(),
            generation: sandbox.generation,
            template_team_id: sandbox.template_team.to_string(),
            template_id: sandbox.template.to_string(),
            vcpus: sandbox.vcpus,
            memory_mb: sandbox.memory_mb,
            disk_size_mb: sandbox.disk_size_mb,
            timeout_sec: sandbox.timeout_sec,
            envs: sandbox.envs.clone().into_iter().collect(),
            ..Default::default()
        };
        let answer = match self.client_for_start(sandbox).await {
            Ok(client) => client
                .create_sandbox_with_options(request, self.lifecycle())
                .await
                .map(drop),
            Err(error) => Err(ConnectError::unavailable(error.message)),
        };
        let error = match answer {
            Ok(()) => {
                let outcome = self
                    .settle(sandbox, Change::to(SandboxStatus::Running).running())
                    .await?;
                // Destroyed in the meantime: the destroy may have found nothing there yet.
                return Ok(if outcome == Outcome::Updated {
                    Step::Rest
                } else {
                    self.undo_start(sandbox).await
                });
            }
            Err(error) => error,
        };
        // It is there, or on its way to be or to go: the host knows where it stands.
        if matches!(error.code, Rpc::AlreadyExists | Rpc::FailedPrecondition) {
            return self.ask(sandbox, Some(error)).await;
        }
        let another =
            matches!(error.code, Rpc::ResourceExhausted | Rpc::Unavailable) && refused.len() < MAX_PLACEMENTS;
        if another && let Some(host) = sandbox.host {
            refused.push(host);
            let placed = self
                .scheduler
                .place(&self.store, &self.config.placement, Needs::from(sandbox), refused)
                .await;
            if let Ok(host) = placed {
                // A new decision: what the first host may still have under the old one is an orphan there.
                let change = Change::decide(SandboxStatus::Starting, sandbox.actor).host(host);
                let _: Outcome = self.settle(sandbox, change).await?;
                return Ok(Step::Again);
            }
        }
        let age = now().saturating_sub(sandbox.created_at);
        if rpc::is_ambiguous(&error) && age < millis(self.config.timings.start_deadline) {
            tracing::warn!(sandbox = %sandbox.id, %error, "no answer to a start; the monitor will ask again");
            return Ok(Step::Rest);
        }
        let failure = rpc::failure(error, sandbox.generation);
        tracing::warn!(sandbox = %sandbox.id, reason = failure.message, "a sandbox could not start");
        self.finish(sandbox, Change::to(SandboxStatus::Error).failure(Some(failure)))
            .await
    }

    /// A start succeeded that nobody wants any more.
    async fn undo_start(&self, sandbox: &Sandbox) -> Step {
        if let Ok(Some(current)) = self.store.sandbox(sandbox.id).await
            && (current.status == SandboxStatus::Stopped || current.host != sandbox.host)
            && let Ok(client) = self.client_of(sandbox).await
        {
            let request = hostagent::DestroySandboxRequest {
                sandbox_id: sandbox.id.to_string(),
                generation: current.generation,
                ..Default::default()
            };
            if let Err(error) = client
                .destroy_sandbox_with_options(request, self.lifecycle())
                .await
            {
                tracing::warn!(sandbox = %sandbox.id, %error, "an orphan is left to the monitor");
            }
        }
        Step::Again
    }

    async fn drive_pause(&self, sandbox: &Sandbox) -> Result<Step> {
        let client = self.client_of(sandbox).await?;
        let request = hostagent::PauseSandboxRequest {
            sandbox_id: sandbox.id.to_string(),
            generation: sandbox.generation,
            ..Default::default()
        };
        match client.pause_sandbox_with_options(request, self.lifecycle()).await {
            Ok(_) => self.finish(sandbox, Change::to(SandboxStatus::Paused)).await,
            Err(error) => self.ask(sandbox, Some(error)).await,
        }
    }

    async fn drive_resume(&self, sandbox: &Sandbox) -> Result<Step> {
        let client = self.client_of(sandbox).await?;
        let request = hostagent::ResumeSandboxRequest {
            sandbox_id: sandbox.id.to_string(),
            generation: sandbox.generation,
            timeout_sec: sandbox.timeout_sec,
            ..Default::default()
        };
        match client
            .resume_sandbox_with_options(request, self.lifecycle())
            .await
        {
            Ok(_) => {
                self.finish(sandbox, Change::to(SandboxStatus::Running).running())
                    .await
            }
            Err(error) => self.ask(sandbox, Some(error)).await,
        }
    }

    async fn drive_snapshot(&self, sandbox: &Sandbox) -> Result<Step> {
        let back = sandbox.previous.unwrap_or(SandboxStatus::Running);
        let (Some(template), Some(host)) = (sandbox.snapshot, sandbox.host) else {
            return self.finish(sandbox, Change::to(back)).await;
        };
        let client = self.client(host).await?;
        let request = hostagent::CreateSnapshotRequest {
            sandbox_id: sandbox.id.to_string(),
            generation: sandbox.generation,
            team_id: sandbox.team.to_string(),
            template_id: template.to_string(),
            ..Default::default()
        };
        match client
            .create_snapshot_with_options(request, self.lifecycle())
            .await
        {
            Ok(answer) => {
                let answer = answer.into_owned();
                let made = Made {
                    size_bytes: answer.size_bytes,
                    vcpus: answer.vcpus,
                    memory_mb: answer.memory_mb,
                    disk_size_mb: answer.disk_size_mb,
                };
                let mut change = Change::to(back);
                // The template first: a crash between the two repeats the (finished) request.
                match self
                    .store
                    .template_finish(template, host, made, sandbox.actor)
                    .await?
                {
                    Finish::Done | Finish::Gone => {}
                    // Its files are on the host already, so it goes as any other template does.
                    Finish::Taken => {
                        let name = template.to_string();
                        self.store
                            .template_mark_deleting(template, &name, sandbox.actor, Some(NAME_TAKEN))
                            .await?;
                        change = change.failure(Some(Failure {
                            code: ErrorCode::Conflict.as_str().to_owned(),
                            message: NAME_TAKEN.to_owned(),
                            console: None,
                            generation: sandbox.generation,
                        }));
                    }
                }
                let step = self.finish(sandbox, change).await;
                // What it replaced may go now.
                self.poke();
                step
            }
            Err(error) if rpc::is_ambiguous(&error) => self.unanswered(sandbox, &error),
            Err(error) => {
                let why = rpc::failure(error.clone(), sandbox.generation).message;
                self.store
                    .template_forget(template, sandbox.actor, Some(&why))
                    .await?;
                // Whoever follows the events hears of it even if the sandbox's own record stays as it is.
                self.bus.publish(Event::Outbox);
                self.ask(sandbox, Some(error)).await
            }
        }
    }

    /// The client of the host where a sandbox is to start: not one that is being removed, which sends the start elsewhere.
    async fn client_for_start(&self, sandbox: &Sandbox) -> Result<Client> {
        let host = sandbox
            .host
            .ok_or_else(|| Error::wrong_status("start", sandbox.status))?;
        let host = self.host_of(host).await?;
        if host.deletion.is_some() {
            return Err(Error::new(
                ErrorCode::HostUnavailable,
                "the chosen host is being removed",
            ));
        }
        self.pool.client(&host)
    }

    /// The client of the host where a sandbox is to end. `None` where the host has been deleted and is not heard any more:
    /// nobody waits for it.
    async fn client_for_stop(&self, host: HostId) -> Result<Option<Client>> {
        let host = self.host_of(host).await?;
        if host.deletion.is_some() && !host.is_heard() {
            return Ok(None);
        }
        self.pool.client(&host).map(Some)
    }

    async fn drive_stop(&self, sandbox: &Sandbox) -> Result<Step> {
        if let Some(host) = sandbox.host
            && let Some(client) = self.client_for_stop(host).await?
        {
            let request = hostagent::DestroySandboxRequest {
                sandbox_id: sandbox.id.to_string(),
                generation: sandbox.generation,
                ..Default::default()
            };
            match client
                .destroy_sandbox_with_options(request, self.lifecycle())
                .await
            {
                Ok(_) => {}
                Err(error) if matches!(error.code, Rpc::NotFound) => {}
                Err(error) => return self.unanswered(sandbox, &error),
            }
        }
        self.finish(sandbox, Change::to(SandboxStatus::Stopped)).await
    }

    /// An operation's RPC ended without success: the host says where the sandbox stands now.
    async fn ask(&self, sandbox: &Sandbox, error: Option<ConnectError>) -> Result<Step> {
        if let Some(error) = &error
            && rpc::is_ambiguous(error)
        {
            return self.unanswered(sandbox, error);
        }
        let client = self.client_of(sandbox).await?;
        let request = hostagent::GetSandboxRequest {
            sandbox_id: sandbox.id.to_string(),
            ..Default::default()
        };
        let failure = error.map(|error| rpc::failure(error, sandbox.generation));
        let report = match client.get_sandbox_with_options(request, self.short()).await {
            Ok(answer) => {
                let answer = answer.into_owned();
                answer.sandbox.as_option().map(rpc::Report::read)
            }
            Err(error) if matches!(error.code, Rpc::NotFound) => None,
            Err(error) => return self.unanswered(sandbox, &error),
        };
        let Some(report) = report else {
            let failure = failure.unwrap_or_else(|| lost(sandbox.generation));
            return self
                .finish(sandbox, Change::to(SandboxStatus::Error).failure(Some(failure)))
                .await;
        };
        let verdict = apply_report(
            sandbox.status,
            sandbox.generation,
            report.state,
            report.generation,
            Source::Answer,
        );
        if let Verdict::Become(status) = verdict {
            // Reaching the goal after all is no failure.
            let reached = crate::domain::lifecycle::goal(sandbox.status) == Some(status);
            let failure = report
                .failure(sandbox.generation)
                .or(failure.filter(|_| !reached));
            let mut change = Change::to(status).failure(failure);
            if status == SandboxStatus::Running && sandbox.previous != Some(SandboxStatus::Running) {
                change = change.running();
            }
            return self.finish(sandbox, change).await;
        }
        Ok(Step::Rest)
    }

    /// No answer: the status stays as it is, and the monitor takes it up.
    fn unanswered(&self, sandbox: &Sandbox, error: &ConnectError) -> Result<Step> {
        tracing::warn!(sandbox = %sandbox.id, status = %sandbox.status, %error, "no answer; the monitor will ask again");
        Ok(Step::Rest)
    }

    /// Writes an operation's end and rests; when the record is no longer the one that was read, a newer
    /// decision may be waiting.
    async fn finish(&self, sandbox: &Sandbox, change: Change) -> Result<Step> {
        Ok(match self.settle(sandbox, change).await? {
            Outcome::Updated | Outcome::Missing => Step::Rest,
            Outcome::Stale => Step::Again,
        })
    }

    /// Writes an operation's end, if the record is still the one that was read, and tells whoever waits.
    pub(super) async fn settle(&self, sandbox: &Sandbox, change: Change) -> Result<Outcome> {
        let outcome = self
            .store
            .sandbox_change(sandbox.id, Guard::from(sandbox), change)
            .await?;
        match outcome {
            Outcome::Updated => self.bus.publish(Event::Sandbox(sandbox.id)),
            Outcome::Stale | Outcome::Missing => {
                metrics::counter!("wrenn_stale_updates_total", "source" => "operation").increment(1);
            }
        }
        Ok(outcome)
    }

    /// Claims a decision for this task; `None` if another task of this process has it. That one then looks again
    /// before it rests: its call may have failed right before the host came back, which is why it was asked for now.
    fn claim(&self, id: SandboxId, generation: u64, status: SandboxStatus) -> Option<Claim> {
        let key = (id, generation, status);
        let mut driven = self
            .driven
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match driven.entry(key) {
            Entry::Occupied(mut claimed) => {
                claimed.insert(true);
                None
            }
            Entry::Vacant(free) => {
                free.insert(false);
                Some(Claim {
                    services: self.clone(),
                    key: Some(key),
                })
            }
        }
    }

    fn lifecycle(&self) -> CallOptions {
        CallOptions::default().with_timeout(self.config.timings.lifecycle_rpc)
    }

    /// Removes a template's files from its hosts, then its row. What cannot be reached or is still used
    /// stays marked, and the monitor comes back to it.
    pub(super) async fn remove_template_files(
        &self,
        id: TemplateId,
        team: crate::domain::TeamId,
        actor: Option<Actor>,
    ) -> std::result::Result<(), ConnectError> {
        let internal = |error: sea_orm::DbErr| ConnectError::internal(error.to_string());
        for host in self.store.template_holders(id).await.map_err(internal)? {
            let client = self
                .client(host)
                .await
                .map_err(|error| ConnectError::unavailable(error.message))?;
            let request = hostagent::DeleteSnapshotRequest {
                team_id: team.to_string(),
                template_id: id.to_string(),
                ..Default::default()
            };
            match client
                .delete_snapshot_with_options(request, self.lifecycle())
                .await
            {
                Ok(_) => {}
                Err(error) if matches!(error.code, Rpc::NotFound) => {}
                Err(error) => return Err(error),
            }
            self.store
                .template_holder_remove(id, host)
                .await
                .map_err(internal)?;
        }
        self.store
            .template_forget(id, actor, None)
            .await
            .map_err(internal)
    }
}

/// The failure of a sandbox that its host does not know.
pub(super) fn lost(generation: u64) -> Failure {
    Failure {
        code: ErrorCode::AgentError.as_str().to_owned(),
        message: "the sandbox's host no longer has it".to_owned(),
        console: None,
        generation,
    }
}

pub(super) fn millis(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Releases a decision when the task that carries it ends, however it ends.
pub(super) struct Claim {
    services: Services,
    key: Option<(SandboxId, u64, SandboxStatus)>,
}

impl Claim {
    /// Gives it back; returns whether somebody wanted it meanwhile.
    fn end(mut self) -> bool {
        self.give_back()
    }

    fn give_back(&mut self) -> bool {
        let Some(key) = self.key.take() else { return false };
        let mut driven = self
            .services
            .driven
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        driven.remove(&key).unwrap_or_default()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.give_back();
    }
}
