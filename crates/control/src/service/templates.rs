//! Templates: finding them for a create, making them from sandboxes, removing them.

use std::time::Duration;

use connectrpc::ErrorCode as Rpc;
use wrenn_proto::rest::CreateSnapshot;

use super::{Services, validate};
use crate::auth;
use crate::domain::lifecycle::{Request, decide};
use crate::domain::{
    Actor, Principal, SandboxStatus, TeamId, Template, TemplateId, TemplateKind, TemplateStatus, now,
};
use crate::hosts::rpc;
use crate::store;
use crate::{Error, ErrorCode, Result};

/// The template of a create that names none.
const DEFAULT_TEMPLATE: &str = "minimal";

impl Services {
    /// The template that a create names: by id, or by name among the team's own, the platform's and the
    /// aliases, in this order. It has to be ready.
    pub(super) async fn template_for_create(
        &self,
        principal: Principal,
        name: Option<&str>,
    ) -> Result<Template> {
        let name = name.filter(|name| !name.is_empty()).unwrap_or(DEFAULT_TEMPLATE);
        let template = self
            .find_template(principal, name)
            .await?
            .ok_or_else(|| Error::not_found("template", name))?;
        match template.status {
            TemplateStatus::Ready => Ok(template),
            TemplateStatus::Building => Err(Error::new(
                ErrorCode::InvalidState,
                format!(
                    "template '{}' is still building ({} %{}{}); try again when it is ready",
                    template.name,
                    template.progress_pct,
                    if template.detail.is_empty() { "" } else { ": " },
                    template.detail
                ),
            )),
            TemplateStatus::Failed => Err(Error::new(
                ErrorCode::InvalidState,
                format!(
                    "template '{}' could not be built: {}",
                    template.name, template.detail
                ),
            )),
        }
    }

    async fn find_template(&self, principal: Principal, name: &str) -> Result<Option<Template>> {
        if name.len() > 300 || name.contains('\0') {
            return Ok(None);
        }
        if let Ok(id) = name.parse::<TemplateId>() {
            return Ok(self.store.template_visible(principal.team, id).await?);
        }
        if let Some(template) = self.store.template_meant(principal.team, name).await? {
            return Ok(Some(template));
        }
        match self.store.template_alias(name).await? {
            Some(name) => Ok(self.store.template_by_name(TeamId::PLATFORM, &name).await?),
            None => Ok(None),
        }
    }

    /// What the team sees.
    pub async fn list_templates(
        &self,
        principal: Principal,
        kind: Option<TemplateKind>,
    ) -> Result<Vec<Template>> {
        Ok(self.store.templates_visible(principal.team, kind).await?)
    }

    /// Makes a template from a sandbox and waits for it. Still building when the time is up.
    pub async fn create_snapshot(
        &self,
        principal: Principal,
        body: CreateSnapshot,
        overwrite: bool,
        wait: Duration,
    ) -> Result<Template> {
        let CreateSnapshot { sandbox_id, name } = body;
        let name = match name.filter(|name| !name.is_empty()) {
            Some(name) => {
                validate::template_name(&name)?;
                name
            }
            None => auth::random_secret("snap-", 6)?,
        };
        let sandbox = self.sandbox(principal, &sandbox_id).await?;
        decide(sandbox.status, Request::Snapshot)?;
        let replaces = match self.store.template_by_name(principal.team, &name).await? {
            Some(_) if !overwrite => return Err(taken(&name)),
            Some(old) if old.status == TemplateStatus::Building => {
                return Err(Error::new(
                    ErrorCode::Conflict,
                    format!("a template named '{name}' is being made"),
                ));
            }
            Some(old) => Some(old.id),
            None => None,
        };
        let template = Template {
            id: TemplateId::new(),
            team: principal.team,
            name: name.clone(),
            kind: TemplateKind::Snapshot,
            status: TemplateStatus::Building,
            detail: format!("made from {}", sandbox.id),
            progress_pct: 0,
            vcpus: sandbox.vcpus,
            memory_mb: sandbox.memory_mb,
            disk_size_mb: sandbox.disk_size_mb,
            size_bytes: 0,
            created_at: now(),
        };
        let inserted = self
            .store
            .template_insert(&template, replaces)
            .await
            .map_err(|error| {
                if store::is_duplicate(&error) {
                    taken(&name)
                } else {
                    error.into()
                }
            })?;
        if !inserted {
            return Err(super::teams::team_gone());
        }
        if let Some(host) = sandbox.host {
            self.store.template_holder_add(template.id, host).await?;
        }
        let accepted = match self
            .request_with(principal, &sandbox_id, Request::Snapshot, Some(template.id))
            .await
        {
            Ok(accepted) => accepted,
            Err(error) => {
                self.store.template_forget(template.id, None, None).await?;
                return Err(error);
            }
        };
        let settled = self.outcome(accepted, wait).await?;
        match self.store.template(template.id).await? {
            Some(template) => Ok(template),
            None if settled.status == SandboxStatus::Error => Err(Error::new(
                ErrorCode::AgentError,
                settled
                    .failure
                    .map_or_else(|| "the snapshot failed".to_owned(), |failure| failure.message),
            )),
            None => Err(Error::new(
                ErrorCode::Conflict,
                "the snapshot was given up, because its sandbox changed",
            )),
        }
    }

    /// Removes a team's template by name or id.
    pub async fn delete_snapshot(&self, principal: Principal, name: &str) -> Result<()> {
        let missing = || Error::not_found("template", name);
        let template = self.find_template(principal, name).await?.ok_or_else(missing)?;
        if template.team != principal.team {
            return Err(Error::new(
                ErrorCode::Forbidden,
                format!(
                    "template '{}' belongs to the platform and cannot be deleted",
                    template.name
                ),
            ));
        }
        self.remove_template(template, principal.actor).await
    }

    /// Removes a template, whoever owns it.
    pub(super) async fn remove_template(&self, template: Template, actor: Actor) -> Result<()> {
        if template.status == TemplateStatus::Building {
            return Err(Error::new(
                ErrorCode::InvalidState,
                format!("template '{}' is still building", template.name),
            ));
        }
        match self
            .remove_template_files(template.id, template.team, Some(actor))
            .await
        {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.code, Rpc::FailedPrecondition) => {
                let users = self.store.sandboxes_from_template(template.id).await?;
                Err(Error::new(
                    ErrorCode::Conflict,
                    format!(
                        "template '{}' is still used by {users} sandboxes; destroy them first",
                        template.name
                    ),
                ))
            }
            // Its host is away: hidden at once, removed when the host is back.
            Err(error) if rpc::is_ambiguous(&error) => {
                self.store
                    .template_mark_deleting(template.id, &template.name, Some(actor), None)
                    .await?;
                self.poke();
                Ok(())
            }
            Err(error) => Err(rpc::error(error)),
        }
    }

    /// Points an alias at a platform template.
    pub async fn set_template_alias(&self, alias: &str, template: &str) -> Result<()> {
        validate::template_name(alias)?;
        validate::template_name(template)?;
        Ok(self.store.template_alias_set(alias, template).await?)
    }
}

fn taken(name: &str) -> Error {
    Error::new(
        ErrorCode::Conflict,
        format!("a template named '{name}' exists already; choose another name or pass overwrite=true"),
    )
}
