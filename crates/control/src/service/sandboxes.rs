//! A sandbox's life as its owner steers it: requests are decided here, and carried out by `drive`.

use std::time::Duration;

use wrenn_proto::hostagent;
use wrenn_proto::rest::CreateSandbox;

use super::{Services, validate};
use crate::domain::lifecycle::{Action, Request, decide};
use crate::domain::{Millis, Principal, Sandbox, SandboxId, SandboxStatus, TemplateId, now};
use crate::events::Event;
use crate::hosts::{Needs, rpc};
use crate::store::{Change, Guard, Inserted, Outcome, SandboxFilter};
use crate::{Error, ErrorCode, Result};

/// Most sandboxes in one listing.
pub(crate) const MAX_LIST: u32 = 1000;
/// Longest long poll.
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(300);
/// How often use is written down at most, in milliseconds.
const ACTIVE_RESOLUTION: Millis = 10_000;

/// Which sandboxes to list.
#[derive(Debug, Clone, Default)]
pub struct ListSandboxes {
    /// Only those in one of these; in any when empty.
    pub statuses: Vec<SandboxStatus>,
    /// Those that ended as well.
    pub all: bool,
    /// At most this many, 1 to 1000; 1000 when absent.
    pub limit: Option<u32>,
    /// Only what is older than this one: the last id of the previous page.
    pub before: Option<String>,
}

/// What a request came to.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// The record, with the decision in it.
    pub sandbox: Sandbox,
    /// The decision's number: a failure with this number belongs to this request.
    pub generation: u64,
}

impl Services {
    /// Accepts a new sandbox: checks everything that can be checked, reserves the record, and lets the
    /// rest happen in the background.
    pub async fn create_sandbox(&self, principal: Principal, body: CreateSandbox) -> Result<Accepted> {
        let CreateSandbox {
            template,
            vcpus,
            memory_mb,
            timeout_sec,
            disk_size_mb,
            metadata,
            envs,
        } = body;
        let metadata = metadata.unwrap_or_default();
        let envs = envs.unwrap_or_default();
        let timeout_sec = timeout_sec.unwrap_or_default();
        validate::within("timeout_sec", timeout_sec, 0, validate::MAX_TIMEOUT_SEC)?;
        validate::metadata(&metadata)?;
        validate::envs(&envs)?;
        let template = self.template_for_create(principal, template.as_deref()).await?;
        let sizes = validate::sizes(&template, vcpus, memory_mb, disk_size_mb, &self.config.limits)?;
        let needs = Needs {
            team: principal.team,
            template: template.id,
            vcpus: sizes.vcpus,
            memory_mb: sizes.memory_mb,
        };
        let now = now();
        let mut sandbox = Sandbox {
            id: SandboxId::new(),
            team: principal.team,
            host: None,
            template: template.id,
            template_team: template.team,
            template_name: template.name,
            status: SandboxStatus::Pending,
            previous: None,
            generation: 0,
            snapshot: None,
            vcpus: sizes.vcpus,
            memory_mb: sizes.memory_mb,
            disk_size_mb: sizes.disk_size_mb,
            timeout_sec,
            metadata,
            envs,
            failure: None,
            created_at: now,
            started_at: None,
            last_active_at: None,
            updated_at: now,
            status_at: now,
            actor: Some(principal.actor),
        };
        let mut gone = Vec::new();
        loop {
            let host = self
                .scheduler
                .place(&self.store, &self.config.placement, needs, &gone)
                .await?;
            sandbox.host = Some(host);
            match self.store.sandbox_insert(&sandbox).await? {
                Inserted::Yes => break,
                Inserted::TeamGone => return Err(super::teams::team_gone()),
                Inserted::HostGone => gone.push(host),
            }
        }
        self.bus.publish(Event::Sandbox(sandbox.id));
        self.drive_decided(sandbox.id, sandbox.generation, sandbox.status);
        Ok(Accepted {
            generation: sandbox.generation,
            sandbox,
        })
    }

    /// A team's sandboxes, newest first.
    pub async fn list_sandboxes(&self, principal: Principal, list: ListSandboxes) -> Result<Vec<Sandbox>> {
        let ListSandboxes {
            statuses,
            all,
            limit,
            before,
        } = list;
        let limit = limit.unwrap_or(MAX_LIST);
        validate::within("limit", limit, 1, MAX_LIST)?;
        let before = before
            .map(|before| {
                before
                    .parse::<SandboxId>()
                    .map_err(|error| Error::invalid(format!("before: {error}")))
            })
            .transpose()?;
        let filter = SandboxFilter {
            statuses,
            all,
            limit: limit.into(),
            before,
        };
        Ok(self.store.sandboxes_of_team(principal.team, filter).await?)
    }

    /// Accepts a change of a sandbox's life.
    pub async fn request(&self, principal: Principal, id: &str, request: Request) -> Result<Accepted> {
        self.request_with(principal, id, request, None).await
    }

    /// The same, with the template that a snapshot is to become.
    pub(super) async fn request_with(
        &self,
        principal: Principal,
        id: &str,
        request: Request,
        snapshot: Option<TemplateId>,
    ) -> Result<Accepted> {
        // Losing the race against another change means deciding again on what that change left.
        for _ in 0..16 {
            let sandbox = self.sandbox(principal, id).await?;
            let (to, previous) = match decide(sandbox.status, request)? {
                Action::Nothing => {
                    return Ok(Accepted {
                        generation: sandbox.generation,
                        sandbox,
                    });
                }
                Action::Begin { to, previous } => (to, previous),
            };
            let mut change = Change::decide(to, Some(principal.actor)).previous(previous);
            if let Some(template) = snapshot {
                change = change.snapshot(template);
            }
            match self
                .store
                .sandbox_change(sandbox.id, Guard::from(&sandbox), change)
                .await?
            {
                Outcome::Updated => {
                    self.bus.publish(Event::Sandbox(sandbox.id));
                    let generation = sandbox.generation + 1;
                    self.drive_decided(sandbox.id, generation, to);
                    let now = now();
                    return Ok(Accepted {
                        sandbox: Sandbox {
                            status: to,
                            previous,
                            generation,
                            snapshot,
                            updated_at: now,
                            status_at: now,
                            actor: Some(principal.actor),
                            ..sandbox
                        },
                        generation,
                    });
                }
                Outcome::Stale => {}
                Outcome::Missing => return Err(Error::not_found("sandbox", id)),
            }
        }
        Err(Error::new(
            ErrorCode::Conflict,
            "the sandbox keeps changing; try again",
        ))
    }

    /// Waits until nothing is under way any more, or the time is up, and returns the record as it is then.
    pub async fn wait_settled(&self, sandbox: Sandbox, wait: Duration) -> Result<Sandbox> {
        let id = sandbox.id;
        if !sandbox.status.is_transient() {
            return Ok(sandbox);
        }
        let deadline = tokio::time::Instant::now() + wait.min(MAX_WAIT);
        let mut changes = self.bus.subscribe();
        let mut last = sandbox;
        loop {
            let Some(current) = self.store.sandbox(id).await? else {
                return Ok(last);
            };
            if !current.status.is_transient() || tokio::time::Instant::now() >= deadline {
                return Ok(current);
            }
            last = current;
            tokio::select! {
                () = changes.sandbox_changed(id) => {}
                // Another process may have made the change without this one's bus hearing of it.
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = tokio::time::sleep_until(deadline) => {}
                () = self.tasks.closing().cancelled() => return Ok(last),
            }
        }
    }

    /// What became of a request that was waited for: the record, or the failure that belongs to it.
    pub async fn outcome(&self, accepted: Accepted, wait: Duration) -> Result<Sandbox> {
        let Accepted { sandbox, generation } = accepted;
        let settled = self.wait_settled(sandbox, wait).await?;
        // A sandbox in `error` is an answer of its own: the record says why.
        if let Some(failure) = &settled.failure
            && settled.status != SandboxStatus::Error
            && failure.generation == generation
            && generation > 0
        {
            let code = ErrorCode::parse(&failure.code).unwrap_or(ErrorCode::AgentError);
            return Err(Error::new(code, failure.message.clone()));
        }
        Ok(settled)
    }

    /// Resets the inactivity clock.
    pub async fn ping(&self, principal: Principal, id: &str) -> Result<()> {
        let (sandbox, client) = self.running(principal, id, "ping").await?;
        let request = hostagent::PingSandboxRequest {
            sandbox_id: sandbox.id.to_string(),
            ..Default::default()
        };
        client
            .ping_sandbox_with_options(request, self.short())
            .await
            .map_err(rpc::error)?;
        self.used(sandbox.id, sandbox.last_active_at).await
    }

    /// Notes that a sandbox was used, at most every ten seconds.
    pub(crate) async fn used(&self, id: SandboxId, last_active_at: Option<Millis>) -> Result<()> {
        if last_active_at.is_none_or(|at| now() - at >= ACTIVE_RESOLUTION) {
            self.store.sandbox_touch(id).await?;
            self.places.forget(id);
        }
        Ok(())
    }

    /// The last lines of a sandbox's console.
    pub async fn console(&self, principal: Principal, id: &str) -> Result<String> {
        let sandbox = self.sandbox(principal, id).await?;
        match sandbox.status {
            SandboxStatus::Stopped | SandboxStatus::Stopping => return Err(Error::not_found("sandbox", id)),
            SandboxStatus::Pending => return Ok(String::new()),
            SandboxStatus::Error => {
                let kept = sandbox.failure.and_then(|failure| failure.console);
                return Ok(kept.unwrap_or_default());
            }
            _ => {}
        }
        let request = hostagent::GetSandboxRequest {
            sandbox_id: sandbox.id.to_string(),
            ..Default::default()
        };
        let client = self.client_of(&sandbox).await?;
        match client.get_sandbox_with_options(request, self.short()).await {
            Ok(answer) => {
                let report = answer.into_owned().sandbox.into_option();
                Ok(report.map_or_else(String::new, |report| rpc::text(&report.console_tail)))
            }
            // It has not begun there.
            Err(error) if error.code == connectrpc::ErrorCode::NotFound => Ok(String::new()),
            Err(error) => Err(rpc::error(error)),
        }
    }

    /// Options of a short RPC.
    pub(crate) fn short(&self) -> connectrpc::client::CallOptions {
        connectrpc::client::CallOptions::default().with_timeout(self.config.timings.short_rpc)
    }
}
