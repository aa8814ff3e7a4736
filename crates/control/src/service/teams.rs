//! Teams and their members, and the search for people to add.

use super::bootstrap::new_slug;
use super::{Services, validate};
use crate::domain::membership::{MemberChange, Refused};
use crate::domain::team::{Member, Team};
use crate::domain::{Role, Session, TeamId, UserId};
use crate::store::{self, Outcome};
use crate::{Error, ErrorCode, Result};

/// Longest name of a team, characters.
const MAX_NAME: usize = 64;
/// Shortest prefix that is searched for, characters.
const LEAST_PREFIX: usize = 3;
/// Longest address.
const MAX_EMAIL: usize = 254;
/// Most people that a search finds.
const MOST_FOUND: u64 = 10;
/// Slugs that are tried for a new team. 48 random bits collide once in a while only.
const SLUG_TRIES: usize = 8;

/// The team was deleted while something was being added to it.
pub(super) fn team_gone() -> Error {
    Error::new(ErrorCode::NotFound, "the team has been deleted")
}

/// A team's name as people may choose it, trimmed.
pub(super) fn team_name(name: &str) -> Result<&str> {
    let name = name.trim();
    let allowed = |char: char| char.is_alphanumeric() || " -_@'".contains(char);
    if (1..=MAX_NAME).contains(&name.chars().count()) && name.chars().all(allowed) {
        return Ok(name);
    }
    Err(Error::invalid(format!(
        "name must be 1 to {MAX_NAME} letters, digits, spaces, hyphens, underscores, @ and apostrophes"
    )))
}

/// An address in the form in which it is stored.
fn email(email: &str) -> Result<String> {
    let email = email.trim().to_lowercase();
    if email.is_empty() || email.len() > MAX_EMAIL || email.contains('\0') {
        return Err(Error::invalid(format!(
            "email must be an address of at most {MAX_EMAIL} bytes"
        )));
    }
    Ok(email)
}

fn team_id(id: &str) -> Result<TeamId> {
    id.parse().map_err(|_| Error::not_found("team", id))
}

/// A refusal in words.
pub(super) fn refused(refused: Refused, team: &str, member: &str) -> Error {
    match refused {
        // Whoever is not in a team does not learn whether it exists.
        Refused::NotInTeam => Error::not_found("team", team),
        Refused::NoSuchMember => Error::not_found("member", member),
        Refused::NeedsAdmin => Error::new(
            ErrorCode::Forbidden,
            "only admins and owners of the team may do this",
        ),
        Refused::NeedsOwner => Error::new(
            ErrorCode::Forbidden,
            "only an owner of the team may do this; admins cannot change owners or make them",
        ),
        Refused::AlreadyMember => Error::new(ErrorCode::Conflict, "they are in the team already"),
        Refused::LastOwner => Error::new(
            ErrorCode::Conflict,
            "the team would be without an owner; make somebody else an owner first, or delete the team",
        ),
    }
}

/// Repeats a creation with another slug while the last one is taken.
async fn with_slug<T, F>(mut slugs: impl FnMut() -> Result<String>, create: impl Fn(String) -> F) -> Result<T>
where
    F: Future<Output = std::result::Result<T, sea_orm::DbErr>>,
{
    let mut tries = 1;
    loop {
        match create(slugs()?).await {
            Err(error) if store::is_duplicate(&error) && tries < SLUG_TRIES => tries += 1,
            created => return Ok(created?),
        }
    }
}

impl Services {
    /// Creates a team that the user owns.
    pub async fn team_create(&self, session: &Session, name: &str) -> Result<Team> {
        let name = team_name(name)?;
        let (slug, created) = with_slug(new_slug, async |slug: String| {
            let created = self.store.team_create(name, &slug, session.user).await?;
            Ok((slug, created))
        })
        .await?;
        let (id, created_at) = created
            .ok_or_else(|| Error::new(ErrorCode::Unauthorized, "the session has ended; log in again"))?;
        Ok(Team {
            id,
            name: name.to_owned(),
            slug,
            created_at,
            role: Role::Owner,
        })
    }

    /// The teams that the user is in, newest first.
    pub async fn list_teams(
        &self,
        session: &Session,
        limit: Option<u32>,
        before: Option<&str>,
    ) -> Result<Vec<Team>> {
        let page = validate::page(limit, before)?;
        Ok(self
            .store
            .teams_of_user(session.user, page.limit, page.before)
            .await?)
    }

    /// A team that the user is in.
    pub async fn team(&self, session: &Session, id: &str) -> Result<Team> {
        self.store
            .team_of_user(team_id(id)?, session.user)
            .await?
            .ok_or_else(|| Error::not_found("team", id))
    }

    /// Renames a team; admins and owners may.
    pub async fn rename_team(&self, session: &Session, id: &str, name: &str) -> Result<Team> {
        let team = team_id(id)?;
        let name = team_name(name)?;
        match self
            .store
            .team_rename(team, name, session.user, Role::Admin)
            .await?
        {
            Outcome::Updated => self.team(session, id).await,
            Outcome::Stale => Err(refused(Refused::NeedsAdmin, id, "")),
            Outcome::Missing => Err(Error::not_found("team", id)),
        }
    }

    /// The members of a team that the user is in.
    pub async fn list_members(
        &self,
        session: &Session,
        id: &str,
        limit: Option<u32>,
        before: Option<&str>,
    ) -> Result<Vec<Member>> {
        let page = validate::page(limit, before)?;
        self.team(session, id).await?;
        Ok(self
            .store
            .team_members(team_id(id)?, page.limit, page.before)
            .await?)
    }

    /// Adds somebody who has an account to a team, as a member.
    pub async fn add_member(&self, session: &Session, id: &str, address: &str) -> Result<Member> {
        let team = team_id(id)?;
        // Before the address is looked up: only those who may add people learn who has an account here.
        let own = self.team(session, id).await?;
        if own.role < Role::Admin {
            return Err(refused(Refused::NeedsAdmin, id, ""));
        }
        let address = email(address)?;
        let user = self
            .store
            .active_user_by_email(&address)
            .await?
            .ok_or_else(|| Error::not_found("user", &address))?;
        self.change_member(session, team, user, MemberChange::Add, &address)
            .await?;
        self.store
            .team_member(team, user)
            .await?
            .ok_or_else(|| Error::not_found("member", &address))
    }

    /// Gives a member another role.
    pub async fn set_role(&self, session: &Session, id: &str, member: &str, role: Role) -> Result<Member> {
        let (team, user) = (team_id(id)?, self.member_id(session, id, member).await?);
        self.change_member(session, team, user, MemberChange::SetRole(role), member)
            .await?;
        self.store
            .team_member(team, user)
            .await?
            .ok_or_else(|| Error::not_found("member", member))
    }

    /// Removes a member.
    pub async fn remove_member(&self, session: &Session, id: &str, member: &str) -> Result<()> {
        let (team, user) = (team_id(id)?, self.member_id(session, id, member).await?);
        self.change_member(session, team, user, MemberChange::Remove, member)
            .await
    }

    /// The user goes.
    pub async fn leave_team(&self, session: &Session, id: &str) -> Result<()> {
        self.change_member(session, team_id(id)?, session.user, MemberChange::Leave, "")
            .await
    }

    /// Reads a member's id; what is none names nobody in a team that the caller may know of.
    async fn member_id(&self, session: &Session, team: &str, member: &str) -> Result<UserId> {
        match member.parse() {
            Ok(user) => Ok(user),
            Err(_) => {
                self.team(session, team).await?;
                Err(Error::not_found("member", member))
            }
        }
    }

    async fn change_member(
        &self,
        session: &Session,
        team: TeamId,
        user: UserId,
        change: MemberChange,
        named: &str,
    ) -> Result<()> {
        self.store
            .member_change(team, session.user, user, change)
            .await?
            .map_err(|why| refused(why, &team.to_string(), named))
    }

    /// Active users whose address begins so.
    pub async fn search_users(&self, session: &Session, prefix: &str) -> Result<Vec<(UserId, String)>> {
        let prefix = prefix.trim().to_lowercase();
        if prefix.chars().count() < LEAST_PREFIX || prefix.len() > MAX_EMAIL || prefix.contains('\0') {
            return Err(Error::invalid(format!(
                "email must be the first {LEAST_PREFIX} characters of an address or more, at most {MAX_EMAIL} bytes"
            )));
        }
        self.admit_search(session.user).await?;
        Ok(self.store.users_by_email_prefix(&prefix, MOST_FOUND).await?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::Store;

    #[test]
    fn names_are_what_people_call_their_teams() {
        for good in [
            "a",
            "Ada's team",
            "R&D".replace('&', " ").as_str(),
            "ops_2 @home",
            "Équipe-7",
            "团队",
        ] {
            assert_eq!(team_name(good).expect("good"), good);
        }
        assert_eq!(team_name("  x  ").expect("trimmed"), "x");
        for bad in ["", "   ", "a/b", "a<b>", "a\nb", "a\0", "💥", &"x".repeat(65)] {
            assert!(team_name(bad).is_err(), "{bad:?}");
        }
        assert!(team_name(&"é".repeat(64)).is_ok());
    }

    proptest! {
        #[test]
        fn no_name_panics_and_what_is_taken_is_trimmed(name in "\\PC{0,80}") {
            if let Ok(taken) = team_name(&name) {
                prop_assert_eq!(taken, taken.trim());
            }
        }
    }

    #[test]
    fn slugs_have_the_published_form() {
        let slug = new_slug().expect("randomness");
        let (left, right) = slug.split_once('-').expect("a hyphen");
        for half in [left, right] {
            assert!(
                half.len() == 6 && half.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "{slug}"
            );
        }
    }

    #[tokio::test]
    async fn a_taken_slug_is_exchanged_for_another_also_when_its_team_is_gone() {
        let (_dir, store, owner) = Store::scratch("aaaaaa-aaaaaa").await;
        let (gone, _) = store
            .team_create("Gone", "bbbbbb-bbbbbb", owner)
            .await
            .expect("a database")
            .expect("a team");
        store
            .team_mark_deleted(gone, None)
            .await
            .expect("a database")
            .expect("marked");
        let mut slugs = ["aaaaaa-aaaaaa", "bbbbbb-bbbbbb", "cccccc-cccccc"].into_iter();
        let next = || Ok(slugs.next().expect("enough").to_owned());
        with_slug(next, async |slug: String| {
            store.team_create("New", &slug, owner).await
        })
        .await
        .expect("a third slug")
        .expect("a team");
        assert!(slugs.next().is_none());
        store.close().await.expect("closed");
    }

    #[tokio::test]
    async fn of_many_that_draw_the_same_slug_at_once_each_gets_its_own() {
        let (_dir, store, owner) = Store::scratch("aaaaaa-aaaaaa").await;
        let created = futures::future::join_all((0..8).map(|number| {
            let store = &store;
            async move {
                let mut slugs = vec![format!("cccccc-00000{number}"), "bbbbbb-bbbbbb".to_owned()];
                let next = || Ok(slugs.pop().expect("enough"));
                with_slug(next, async |slug: String| {
                    let created = store.team_create("New", &slug, owner).await?;
                    Ok((slug, created.is_some()))
                })
                .await
                .expect("a slug")
            }
        }))
        .await;
        assert!(created.iter().all(|(_, created)| *created), "{created:?}");
        let first = created.iter().filter(|(slug, _)| slug == "bbbbbb-bbbbbb");
        assert_eq!(first.count(), 1, "{created:?}");
        store.close().await.expect("closed");
    }
}
