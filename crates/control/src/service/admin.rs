//! What platform admins see and do across teams.

use super::{Services, validate};
use crate::domain::{Actor, Session, TeamId, Template, TemplateId, UserId};
use crate::store::admin::{AdminTeamRow, AdminUserRow, Standing};
use crate::{Error, ErrorCode, Result};

/// A page of a listing that says how much there is in all.
#[derive(Debug)]
pub(crate) struct Page<T> {
    pub(crate) items: Vec<T>,
    pub(crate) total: u64,
    /// Whether there is more behind it.
    pub(crate) more: bool,
}

impl<T> Page<T> {
    /// From one item more than a page holds.
    fn cut((mut items, total): (Vec<T>, u64), limit: u64) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let more = items.len() > limit;
        items.truncate(limit);
        Self { items, total, more }
    }
}

impl Services {
    /// All live teams, newest first.
    pub(crate) async fn admin_teams(
        &self,
        limit: Option<u32>,
        before: Option<&str>,
    ) -> Result<Page<AdminTeamRow>> {
        let page = validate::page(limit, before)?;
        let found = self.store.admin_teams(page.limit + 1, page.before).await?;
        Ok(Page::cut(found, page.limit))
    }

    /// Lets a team bring hosts of its own, or not.
    pub async fn set_byoc(&self, admin: &Session, id: &str, byoc: bool) -> Result<()> {
        let missing = || Error::not_found("team", id);
        let team: TeamId = id.parse().map_err(|_| missing())?;
        if !self.store.team_set_byoc(team, byoc).await? {
            return Err(missing());
        }
        tracing::info!(admin = %admin.user, %team, byoc, "a platform admin changed whether a team may bring hosts");
        Ok(())
    }

    /// All users, newest first.
    pub(crate) async fn admin_users(
        &self,
        limit: Option<u32>,
        before: Option<&str>,
    ) -> Result<Page<AdminUserRow>> {
        let page = validate::page(limit, before)?;
        let found = self.store.admin_users(page.limit + 1, page.before).await?;
        Ok(Page::cut(found, page.limit))
    }

    /// Lets a user log in, or ends their sessions and keeps them out. Keys of teams that have no other owner in use stop
    /// working with it, and work again when an owner is back; what runs in such a team runs on.
    pub async fn set_active(&self, admin: &Session, id: &str, active: bool) -> Result<()> {
        let missing = || Error::not_found("user", id);
        let user: UserId = id.parse().map_err(|_| missing())?;
        match self.store.user_set_active(user, active).await? {
            Standing::Changed => {
                self.known_keys.forget_all();
                tracing::info!(admin = %admin.user, %user, active, "a platform admin changed whether a user may log in");
                Ok(())
            }
            Standing::Missing => Err(missing()),
            Standing::LastAdmin => Err(Error::new(
                ErrorCode::Conflict,
                "the platform would be without an active admin; make or activate another one first",
            )),
        }
    }

    /// The templates of all teams, newest first, with their teams' names.
    pub(crate) async fn admin_templates(
        &self,
        limit: Option<u32>,
        before: Option<&str>,
    ) -> Result<Page<(Template, String)>> {
        let page = validate::page(limit, before)?;
        let found = self.store.admin_templates(page.limit + 1, page.before).await?;
        Ok(Page::cut(found, page.limit))
    }

    /// Removes any team's template, by id or by name: the platform's, or the only one of that name.
    pub async fn admin_delete_template(&self, admin: &Session, name: &str) -> Result<()> {
        let missing = || Error::not_found("template", name);
        if name.len() > 300 || name.contains('\0') {
            return Err(missing());
        }
        let template = if let Ok(id) = name.parse::<TemplateId>() {
            self.store.template(id).await?.ok_or_else(missing)?
        } else {
            let mut named = self.store.templates_named(name, 2).await?.into_iter();
            let first = named.next().ok_or_else(missing)?;
            if first.team != TeamId::PLATFORM && named.next().is_some() {
                return Err(Error::new(
                    ErrorCode::Conflict,
                    format!("several teams have a template named '{name}'; name it by its id"),
                ));
            }
            first
        };
        if template.id == TemplateId::MINIMAL {
            return Err(Error::new(
                ErrorCode::Forbidden,
                "the built-in template cannot be deleted",
            ));
        }
        let (id, team) = (template.id, template.team);
        self.remove_template(template, Actor::User(admin.user)).await?;
        tracing::info!(admin = %admin.user, template = %id, %team, "a platform admin deleted a template");
        Ok(())
    }
}
