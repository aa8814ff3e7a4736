//! Deletions: of teams with everything that is theirs, and of accounts.
//!
//! Whoever asks (an owner, a platform admin, the deletion of an account), the team is marked first and then goes through
//! [`Services::purge_team`], which can be repeated: its caller starts it at once, and the housekeeping takes up what an
//! earlier process or an absent host left. Marking and adding exclude each other in the database, so nothing joins a
//! team that is marked.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use futures::StreamExt as _;

use super::Services;
use super::drive::millis;
use super::teams::refused;
use crate::domain::around::AuditEntry;
use crate::domain::lifecycle::{Action, Request, decide};
use crate::domain::membership::Refused;
use crate::domain::{SandboxId, Session, TeamId, UserId, now};
use crate::store::deletion::AccountDeletion;
use crate::store::{Change, Outcome};
use crate::tasks::TaskKind;
use crate::{Error, ErrorCode, Result};

/// Sandboxes of one team that are destroyed at the same time.
pub(super) const AT_ONCE: usize = 64;

/// Teams that a task of this process empties at the moment.
#[derive(Debug, Default)]
pub(crate) struct Purging(Mutex<HashSet<TeamId>>);

/// Lets others take a team up when the task that empties it ends, however it ends.
struct Claim<'a>(&'a Purging, TeamId);

impl Purging {
    fn claim(&self, team: TeamId) -> Option<Claim<'_>> {
        let mut teams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Made only when it is granted: a claim that is dropped gives the team free.
        teams.insert(team).then(|| Claim(self, team))
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let Self(purging, team) = self;
        purging
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(team);
    }
}

impl Services {
    /// An owner deletes their team.
    pub async fn delete_team(&self, session: &Session, id: &str) -> Result<()> {
        let team = id.parse().map_err(|_| Error::not_found("team", id))?;
        self.take_down(team, Some(session.user), id).await
    }

    /// A platform admin deletes a team.
    pub async fn admin_delete_team(&self, admin: &Session, id: &str) -> Result<()> {
        let team = id.parse().map_err(|_| Error::not_found("team", id))?;
        if team == TeamId::PLATFORM {
            return Err(Error::new(
                ErrorCode::Forbidden,
                "the platform's own team cannot be deleted",
            ));
        }
        self.take_down(team, None, id).await?;
        tracing::info!(admin = %admin.user, %team, "a platform admin deleted a team");
        Ok(())
    }

    async fn take_down(&self, team: TeamId, owner: Option<UserId>, id: &str) -> Result<()> {
        self.store
            .team_mark_deleted(team, owner)
            .await?
            .map_err(|why: Refused| refused(why, id, ""))?;
        self.start_purge(team);
        Ok(())
    }

    /// A user deletes their account. Teams that they alone own go with it.
    pub(crate) async fn delete_account(&self, session: &Session) -> Result<()> {
        match self.store.account_mark_deleted(session.user).await? {
            AccountDeletion::Deleted(teams) => {
                tracing::info!(user = %session.user, teams = teams.len(), "an account was deleted");
                for team in teams {
                    // Asked for was the account's deletion; the teams' logs say what it meant for them.
                    self.audit(AuditEntry::system(Some(team), "team.delete", "team", team));
                    self.start_purge(team);
                }
                Ok(())
            }
            AccountDeletion::Missing => Err(Error::new(
                ErrorCode::Unauthorized,
                "the session has ended; log in again",
            )),
            AccountDeletion::LastAdmin => Err(Error::new(
                ErrorCode::Conflict,
                "the platform would be without an admin; make somebody else one first",
            )),
            AccountDeletion::Busy => Err(Error::new(
                ErrorCode::Conflict,
                "your teams keep changing; try again",
            )),
        }
    }

    /// Empties a team that is marked, in the background. Its keys end here at once.
    fn start_purge(&self, team: TeamId) {
        self.known_keys.forget_team(team);
        let services = self.clone();
        self.tasks.spawn(TaskKind::Housekeeping, async move {
            services.purge_logged(team).await;
        });
    }

    async fn purge_logged(&self, team: TeamId) {
        match self.purge_team(team).await {
            Ok(true) => tracing::info!(%team, "a deleted team is gone with everything that was its own"),
            Ok(false) => tracing::info!(%team, "parts of a deleted team remain for now"),
            Err(error) => {
                tracing::error!(%team, error = &error as &dyn std::error::Error, "emptying a deleted team failed; it will be repeated");
            }
        }
    }

    /// Removes everything of a team that is marked as deleted. Returns whether all is gone: what is on a host that is away, or
    /// under another task's hands, is left to the next time.
    ///
    /// Files of templates in the making are removed only after the sandboxes are gone, since a host ends a snapshot
    /// under way before it destroys the sandbox; so no file comes after its removal.
    async fn purge_team(&self, team: TeamId) -> Result<bool> {
        let Some(_claim) = self.purging.claim(team) else {
            return Ok(false);
        };
        self.store.team_purge_rows(team).await?;
        self.known_keys.forget_team(team);
        // Its own hosts go with it; they are asked to destroy what they have before.
        let hosts = self.store.hosts_of_team(team).await?;
        for &host in &hosts {
            self.give_up_host(host).await?;
        }
        let mut left = Vec::new();
        let mut after = None;
        loop {
            let page = self.store.sandboxes_left(team, after).await?;
            let Some(last) = page.last() else { break };
            after = Some(*last);
            for id in page {
                if self.destroy_unasked(id).await? {
                    self.audit(AuditEntry::system(Some(team), "sandbox.destroy", "sandbox", id));
                }
                left.push(id);
            }
        }
        self.hide_templates(team, false).await?;
        futures::stream::iter(left)
            .for_each_concurrent(AT_ONCE, |id| self.drive_to_rest(id))
            .await;
        if self.store.sandboxes_left(team, None).await?.is_empty() {
            self.hide_templates(team, true).await?;
        }
        for template in self.store.team_templates_hidden(team).await? {
            if let Err(error) = self.remove_template_files(template, team, None).await {
                tracing::debug!(%template, %error, "a template's files stay for now");
            }
        }
        for host in hosts {
            self.remove_host_logged(host).await;
        }
        // What was written meanwhile: samples and usage of the sandboxes that were still there.
        self.store.team_purge_rows(team).await?;
        Ok(self.store.team_purged(team).await?)
    }

    async fn hide_templates(&self, team: TeamId, building: bool) -> Result<()> {
        for template in self.store.team_templates_hide(team, building).await? {
            self.audit(AuditEntry::system(
                Some(team),
                "template.delete",
                "template",
                template,
            ));
        }
        Ok(())
    }

    /// Decides that a sandbox ends, whatever its status. Returns whether it was this that decided it.
    pub(super) async fn destroy_unasked(&self, id: SandboxId) -> Result<bool> {
        // Losing the race against another change means deciding again on what that change left.
        for _ in 0..16 {
            let Some(sandbox) = self.store.sandbox(id).await? else {
                return Ok(false);
            };
            let Action::Begin { to, previous } = decide(sandbox.status, Request::Destroy)? else {
                return Ok(false);
            };
            let change = Change::decide(to, None).previous(previous);
            match self.settle(&sandbox, change).await? {
                Outcome::Updated => return Ok(true),
                Outcome::Missing => return Ok(false),
                Outcome::Stale => {}
            }
        }
        Err(Error::new(
            ErrorCode::Conflict,
            "the sandbox keeps changing; try again",
        ))
    }

    /// Takes up all deletions of teams and hosts that are not finished. Returns how many still are not.
    pub(crate) async fn deletion_pass(&self) -> Result<usize> {
        let teams = self.store.teams_purging().await?;
        futures::future::join_all(teams.into_iter().map(|team| self.purge_logged(team))).await;
        let hosts = self.store.hosts_deleting().await?;
        futures::future::join_all(hosts.iter().map(|host| self.remove_host_logged(host.id))).await;
        Ok(self.store.teams_purging().await?.len() + self.store.hosts_deleting().await?.len())
    }

    /// Deletes the rows of accounts whose grace is over. Returns how many.
    pub(crate) async fn hard_delete_pass(&self) -> Result<u64> {
        let grace = millis(self.config.timings.account_grace);
        let mut deleted = 0;
        loop {
            let page = self.store.accounts_hard_delete(now() - grace).await?;
            if page.is_empty() {
                break;
            }
            for user in page {
                deleted += 1;
                self.audit(AuditEntry::system(None, "account.hard_delete", "user", user));
            }
        }
        if deleted > 0 {
            tracing::info!(accounts = deleted, "accounts whose grace was over are gone");
        }
        Ok(deleted)
    }

    /// Runs the housekeeping until shutdown, beginning now: unfinished deletions of teams and hosts, and accounts whose grace is over where
    /// the leader is, last uses of keys (which each instance collects) everywhere.
    pub(crate) fn start_housekeeping(&self) {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Housekeeping, async move {
            loop {
                services.housekeep().await;
                tokio::select! {
                    () = tokio::time::sleep(services.config.timings.housekeeping_interval) => {}
                    // What the last leader left is taken up at once.
                    () = services.leadership.gained.notified() => {}
                }
            }
        });
    }

    async fn housekeep(&self) {
        if self.leads() {
            match self.store.teams_purging().await {
                // A task each: a host that does not answer holds up its own team only.
                Ok(teams) => teams.into_iter().for_each(|team| self.start_purge(team)),
                Err(error) => failed("finding unfinished deletions", &error.into()),
            }
            match self.store.hosts_deleting().await {
                Ok(hosts) => hosts.iter().for_each(|host| self.start_host_removal(host.id)),
                Err(error) => failed("finding hosts that are to go", &error.into()),
            }
            if let Err(error) = self.hard_delete_pass().await {
                failed("deleting old accounts", &error);
            }
        }
        if let Err(error) = self.write_key_uses().await {
            failed("writing down the use of keys", &error);
        }
    }
}

fn failed(what: &str, error: &Error) {
    metrics::counter!("wrenn_housekeeping_failures_total").increment(1);
    tracing::error!(error = error as &dyn std::error::Error, "{what} failed");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_task_empties_a_team_at_a_time() {
        let (purging, team) = (Purging::default(), TeamId::new());
        let first = purging.claim(team);
        assert!(first.is_some() && purging.claim(TeamId::new()).is_some());
        assert!(purging.claim(team).is_none());
        assert!(purging.claim(team).is_none(), "a refusal gives nothing free");
        drop(first);
        assert!(purging.claim(team).is_some());
    }
}
