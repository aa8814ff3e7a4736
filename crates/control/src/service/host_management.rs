//! Hosts as people manage them: who sees which, who may change them, and how one goes.
//!
//! A host is the platform's (`regular`) or a team's own (`byoc`). Platform admins manage all; of a team's own, its admins
//! and owners do, and its members see them. What somebody may not see does not exist for them.
//!
//! A deletion marks the host first: from then on nothing is placed there. [`Services::remove_host`] does the rest, can be
//! repeated, and is taken up by the housekeeping; what is on the host ends through the lifecycle's own decisions.

use futures::StreamExt as _;
use wrenn_proto::rest::{CreateHost, HostType};

use super::bootstrap::HostTokenFor;
use super::deletion::AT_ONCE;
use super::{Services, validate};
use crate::domain::{Host, HostDeletion, HostId, HostOwner, Role, SandboxId, SandboxStatus, Session, TeamId};
use crate::events::Event;
use crate::store::{MAX_TAGS, Tagged};
use crate::tasks::TaskKind;
use crate::{Error, ErrorCode, Result};

/// Longest provider, zone and tag, characters.
const MAX_WORD: usize = 64;
/// Snapshots that a refusal names.
const NAMED: usize = 5;

/// A host with the token with which its agent registers.
#[derive(Clone)]
pub struct NewHostToken {
    /// The host.
    pub host: Host,
    /// The secret; used up by the registration.
    pub token: String,
}

impl std::fmt::Debug for NewHostToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewHostToken")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

impl Services {
    /// Creates a host that waits for its agent.
    pub async fn create_host(&self, session: &Session, body: CreateHost) -> Result<NewHostToken> {
        let CreateHost {
            kind,
            team_id,
            provider,
            availability_zone,
        } = body;
        let owner = self.owner_of_new(session, kind, team_id.as_deref()).await?;
        let provider = word("provider", provider.as_deref())?;
        let availability_zone = word("availability_zone", availability_zone.as_deref())?;
        let new = HostTokenFor::New {
            owner,
            provider,
            availability_zone,
        };
        self.token_and_host(session, new).await
    }

    /// A new registration token of a host; those before it end.
    pub async fn new_host_token(&self, session: &Session, id: &str) -> Result<NewHostToken> {
        let host = self.managed_host(session, id).await?;
        self.token_and_host(session, HostTokenFor::Known(host.id)).await
    }

    async fn token_and_host(&self, session: &Session, whose: HostTokenFor<'_>) -> Result<NewHostToken> {
        let issued = self.registration_token(whose, Some(session.user)).await?;
        let host = self
            .store
            .host(issued.host_id)
            .await?
            .ok_or_else(|| Error::not_found("host", issued.host_id))?;
        Ok(NewHostToken {
            host,
            token: issued.token,
        })
    }

    /// Whose a new host will be, if the caller may bring it.
    async fn owner_of_new(
        &self,
        session: &Session,
        kind: HostType,
        team_id: Option<&str>,
    ) -> Result<HostOwner> {
        let forbidden = |message: &str| Error::new(ErrorCode::Forbidden, message);
        match kind {
            HostType::Regular if !session.platform_admin => Err(forbidden(
                "only platform admins may add regular hosts; a team's own are of type byoc",
            )),
            HostType::Regular if team_id.is_some() => Err(Error::invalid(
                "team_id must be absent for a regular host, which serves all teams; a team's own is of type byoc",
            )),
            HostType::Regular => Ok(HostOwner::Platform),
            HostType::Byoc => {
                let team = match team_id {
                    Some(id) => id.parse().map_err(|_| Error::not_found("team", id))?,
                    None => session.in_team()?.0,
                };
                let missing = || Error::not_found("team", team);
                match self.rights_in(session, team).await? {
                    Rights::None => return Err(missing()),
                    Rights::Sees => return Err(needs_admin()),
                    Rights::Manages => {}
                }
                if !self.store.team_byoc(team).await?.ok_or_else(missing)? {
                    return Err(forbidden(
                        "this team may not bring hosts of its own; a platform admin can let it, with \
                         PUT /v1/admin/teams/{id}/byoc",
                    ));
                }
                Ok(HostOwner::Team(team))
            }
        }
    }

    async fn rights_in(&self, session: &Session, team: TeamId) -> Result<Rights> {
        if session.platform_admin {
            return Ok(Rights::Manages);
        }
        let role = self
            .store
            .team_of_user(team, session.user)
            .await?
            .map(|team| team.role);
        Ok(match role {
            None => Rights::None,
            Some(Role::Member) => Rights::Sees,
            Some(Role::Admin | Role::Owner) => Rights::Manages,
        })
    }

    /// What the caller sees, newest first: platform admins all hosts, others those of the session's team.
    pub async fn list_hosts(
        &self,
        session: &Session,
        limit: Option<u32>,
        before: Option<&str>,
    ) -> Result<Vec<Host>> {
        let page = validate::page(limit, before)?;
        let team = match session.platform_admin {
            true => None,
            false => Some(session.in_team()?.0),
        };
        Ok(self.store.hosts_page(team, page.limit, page.before).await?)
    }

    /// A host that the caller sees.
    pub async fn seen_host(&self, session: &Session, id: &str) -> Result<Host> {
        self.host_with_rights(session, id).await.map(|(host, _)| host)
    }

    /// A host that the caller may change.
    async fn managed_host(&self, session: &Session, id: &str) -> Result<Host> {
        match self.host_with_rights(session, id).await? {
            (host, Rights::Manages) => Ok(host),
            _ => Err(needs_admin()),
        }
    }

    async fn host_with_rights(&self, session: &Session, id: &str) -> Result<(Host, Rights)> {
        let missing = || Error::not_found("host", id);
        let parsed: HostId = id.parse().map_err(|_| missing())?;
        let host = self
            .store
            .host(parsed)
            .await?
            .filter(|host| host.deletion.is_none())
            .ok_or_else(missing)?;
        let rights = match host.owner {
            HostOwner::Team(team) => self.rights_in(session, team).await?,
            HostOwner::Platform if session.platform_admin => Rights::Manages,
            HostOwner::Platform => Rights::None,
        };
        match rights {
            Rights::None => Err(missing()),
            rights => Ok((host, rights)),
        }
    }

    /// A host, and the sandboxes that would go with it.
    pub async fn host_delete_preview(&self, session: &Session, id: &str) -> Result<(Host, Vec<SandboxId>)> {
        let host = self.seen_host(session, id).await?;
        let sandboxes = self.all_left_on(host.id).await?;
        Ok((host, sandboxes))
    }

    async fn all_left_on(&self, host: HostId) -> Result<Vec<SandboxId>> {
        let mut all = Vec::new();
        loop {
            let page = self.store.sandboxes_left_on(host, all.last().copied()).await?;
            if page.is_empty() {
                return Ok(all);
            }
            all.extend(page);
        }
    }

    /// Deletes a host. Without `force` it must have nothing that would be lost.
    pub async fn delete_host(&self, session: &Session, id: &str, force: bool) -> Result<()> {
        let host = self.managed_host(session, id).await?;
        if force {
            if !self.give_up_host(host.id).await? {
                return Err(Error::not_found("host", id));
            }
        } else {
            self.refuse_if_used(host.id).await?;
            if !self
                .store
                .host_mark_deleted(host.id, HostDeletion::Emptying)
                .await?
            {
                return Err(Error::not_found("host", id));
            }
            // What was placed there before the mark is seen now; what comes later sees the mark, and goes elsewhere. One
            // that is being written just now sees neither: its start is turned away by the mark.
            if let Err(used) = self.refuse_if_used(host.id).await {
                self.store.host_unmark(host.id).await?;
                return Err(used);
            }
            self.store.host_disown(host.id).await?;
        }
        tracing::info!(host = %host.id, user = %session.user, force, "a host was deleted");
        self.start_host_removal(host.id);
        Ok(())
    }

    /// Fails if something would be lost with a host.
    async fn refuse_if_used(&self, host: HostId) -> Result<()> {
        let sandboxes = self.all_left_on(host).await?;
        if !sandboxes.is_empty() {
            return Err(Error {
                sandboxes: sandboxes.clone(),
                ..Error::new(
                    ErrorCode::HostHasSandboxes,
                    format!(
                        "{} sandboxes are on this host; destroy them first, or pass force=true to destroy them with it",
                        sandboxes.len()
                    ),
                )
            });
        }
        let snapshots = self.store.snapshots_only_on(host).await?;
        if !snapshots.is_empty() {
            let named: Vec<_> = snapshots.iter().take(NAMED).map(String::as_str).collect();
            return Err(Error::new(
                ErrorCode::Conflict,
                format!(
                    "{} snapshots are on this host alone ({}{}); delete them first, or pass force=true to lose them",
                    snapshots.len(),
                    named.join(", "),
                    if snapshots.len() > NAMED { ", …" } else { "" }
                ),
            ));
        }
        Ok(())
    }

    /// Marks a host that goes with everything on it, and ends its tokens. `false` when there is none, or it is marked.
    pub(super) async fn give_up_host(&self, id: HostId) -> Result<bool> {
        let marked = self.store.host_mark_deleted(id, HostDeletion::Destroying).await?;
        if marked {
            self.store.host_disown(id).await?;
        }
        Ok(marked)
    }

    /// Removes a marked host in the background.
    pub(super) fn start_host_removal(&self, id: HostId) {
        let services = self.clone();
        self.tasks.spawn(TaskKind::Housekeeping, async move {
            services.remove_host_logged(id).await;
        });
    }

    pub(super) async fn remove_host_logged(&self, id: HostId) {
        match self.remove_host(id).await {
            Ok(true) => tracing::info!(host = %id, "a deleted host is gone"),
            Ok(false) => tracing::info!(host = %id, "a deleted host still has sandboxes"),
            Err(error) => {
                tracing::error!(host = %id, error = &error as &dyn std::error::Error, "removing a host failed; it will be repeated");
            }
        }
    }

    /// Empties a marked host and removes it. Returns whether it is gone.
    async fn remove_host(&self, id: HostId) -> Result<bool> {
        let Some(host) = self.store.host(id).await? else {
            return Ok(true);
        };
        let left = self.all_left_on(id).await?;
        match host.deletion {
            None => return Ok(false),
            Some(HostDeletion::Emptying) => {
                for &sandbox in &left {
                    let lives = self
                        .store
                        .sandbox(sandbox)
                        .await?
                        .is_some_and(|sandbox| lives_there(sandbox.status));
                    if lives {
                        // The process that marked the host died before it saw this one; nobody was told of a deletion.
                        self.store.host_unmark(id).await?;
                        return Ok(false);
                    }
                }
                self.store.host_disown(id).await?;
            }
            Some(HostDeletion::Destroying) => {
                self.store.host_disown(id).await?;
                for &sandbox in &left {
                    self.destroy_unasked(sandbox).await?;
                }
            }
        }
        futures::stream::iter(left)
            .for_each_concurrent(AT_ONCE, |sandbox| self.drive_to_rest(sandbox))
            .await;
        if !self.store.sandboxes_left_on(id, None).await?.is_empty() {
            return Ok(false);
        }
        for template in self.store.snapshots_lost_with(id).await? {
            self.store
                .template_forget(template, None, Some("its host was deleted"))
                .await?;
        }
        let gone = self.store.host_remove(&host).await?;
        self.bus.publish(Event::Outbox);
        Ok(gone)
    }

    /// A host's tags, in order.
    pub async fn host_tags(&self, session: &Session, id: &str) -> Result<Vec<String>> {
        let host = self.seen_host(session, id).await?;
        Ok(self.store.host_tags(host.id).await?)
    }

    /// Adds a tag to a host; one that it has already is no fault.
    pub async fn add_host_tag(&self, session: &Session, id: &str, tag: &str) -> Result<()> {
        let host = self.managed_host(session, id).await?;
        let good = (1..=MAX_WORD).contains(&tag.len())
            && tag
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:=".contains(&byte));
        if !good {
            return Err(Error::invalid(format!(
                "tag must be 1 to {MAX_WORD} letters, digits, '-', '_', '.', ':' or '='"
            )));
        }
        match self.store.host_tag_add(host.id, tag).await? {
            Tagged::Done => Ok(()),
            Tagged::TooMany => Err(Error::new(
                ErrorCode::Conflict,
                format!("a host has at most {MAX_TAGS} tags; remove one first"),
            )),
            Tagged::Missing => Err(Error::not_found("host", id)),
        }
    }

    /// Takes a tag from a host.
    pub async fn remove_host_tag(&self, session: &Session, id: &str, tag: &str) -> Result<()> {
        let host = self.managed_host(session, id).await?;
        match self.store.host_tag_remove(host.id, tag).await? {
            true => Ok(()),
            false => Err(Error::not_found("tag", tag)),
        }
    }
}

/// What somebody may do with a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    /// It does not exist for them.
    None,
    Sees,
    Manages,
}

fn needs_admin() -> Error {
    Error::new(
        ErrorCode::Forbidden,
        "only admins and owners of the team manage its hosts",
    )
}

/// Whether a sandbox is something that its host has. What is only being placed goes elsewhere as soon as it is driven.
fn lives_there(status: SandboxStatus) -> bool {
    !matches!(
        status,
        SandboxStatus::Pending
            | SandboxStatus::Starting
            | SandboxStatus::Error
            | SandboxStatus::Stopping
            | SandboxStatus::Stopped
    )
}

/// A word in a label of a host; an empty one counts as absent.
fn word<'a>(field: &str, word: Option<&'a str>) -> Result<Option<&'a str>> {
    let Some(word) = word.map(str::trim).filter(|word| !word.is_empty()) else {
        return Ok(None);
    };
    if word.chars().count() > MAX_WORD || word.chars().any(char::is_control) {
        return Err(Error::invalid(format!(
            "{field} must be at most {MAX_WORD} printable characters"
        )));
    }
    Ok(Some(word))
}
