//! Who is asking.

use super::Services;
use crate::auth;
use crate::domain::{Actor, Host, Principal, Role, Session, TeamId};
use crate::{Error, ErrorCode, Result};

/// Longest credential that is looked at.
const MAX_CREDENTIAL: usize = 512;
/// Longest session token; it carries a name.
const MAX_TOKEN: usize = 4096;

impl Session {
    /// The session as one who touches a team's things.
    ///
    /// # Errors
    /// The user is in no team at the moment.
    pub fn principal(&self) -> Result<Principal> {
        let (team, _) = self.in_team()?;
        Ok(Principal {
            team,
            actor: Actor::User(self.user),
        })
    }

    /// The team that the session works in, and the user's role there.
    ///
    /// # Errors
    /// There is none at the moment.
    pub fn in_team(&self) -> Result<(TeamId, Role)> {
        self.team.ok_or_else(|| {
            Error::new(
                ErrorCode::Forbidden,
                "you are in no active team; create one, or switch to one with POST /v1/auth/switch-team",
            )
        })
    }
}

impl Services {
    /// The team behind an API key.
    pub async fn authenticate_key(&self, key: Option<&str>) -> Result<Principal> {
        let denied = |message: &str| Error::new(ErrorCode::Unauthorized, message);
        let key = key.ok_or_else(|| denied("an API key is required in the header X-API-Key"))?;
        if key.len() > MAX_CREDENTIAL {
            return Err(denied("the API key is not valid"));
        }
        self.principal_of_key(key)
            .await?
            .ok_or_else(|| denied("the API key is not valid"))
    }

    /// The person behind a session token, as the database knows them now.
    pub async fn authenticate_session(&self, token: Option<&str>) -> Result<Session> {
        let denied = |message: &str| Error::new(ErrorCode::Unauthorized, message);
        let token = token.filter(|token| token.len() <= MAX_TOKEN).ok_or_else(|| {
            denied("log in first: a session token is required as `Authorization: Bearer …`")
        })?;
        let claims = self.sessions.check(token)?;
        let row = self
            .store
            .session(claims.sub, claims.team)
            .await?
            .filter(|row| row.session_version == claims.ver && row.status == "active")
            .ok_or_else(|| denied("the session has ended; log in again"))?;
        let team = row.team_id.zip(row.role.as_deref().and_then(Role::parse));
        Ok(Session {
            user: claims.sub,
            email: row.email,
            name: row.name,
            platform_admin: row.is_admin,
            version: claims.ver,
            team: team.map(|(team, role)| (TeamId(team), role)),
        })
    }

    /// The team behind an API key or a session; keys have a prefix of their own.
    pub async fn authenticate(&self, key: Option<&str>, bearer: Option<&str>) -> Result<Principal> {
        let session = bearer.filter(|token| !token.starts_with(auth::API_KEY_PREFIX));
        match (key, session) {
            (None, Some(token)) => self.authenticate_session(Some(token)).await?.principal(),
            (key, _) => self.authenticate_key(key.or(bearer)).await,
        }
    }

    /// Whether a key or session still stands for whom it stood for. A database that is away for a moment ends nobody's
    /// connection.
    pub(crate) async fn reauthenticate(
        &self,
        (key, bearer): (Option<&str>, Option<&str>),
        before: Principal,
    ) -> Result<()> {
        match self.authenticate(key, bearer).await {
            Ok(now) if now.team == before.team => Ok(()),
            Err(error) if error.code == ErrorCode::DatabaseUnavailable => Ok(()),
            Ok(_) => Err(Error::new(
                ErrorCode::Unauthorized,
                "the credential is another team's now",
            )),
            Err(error) => Err(error),
        }
    }

    /// The platform admin behind a session token.
    pub async fn authenticate_admin(&self, token: Option<&str>) -> Result<Session> {
        let session = self.authenticate_session(token).await?;
        if !session.platform_admin {
            return Err(Error::new(
                ErrorCode::Forbidden,
                "only platform admins may do this",
            ));
        }
        Ok(session)
    }

    /// A platform admin, acting for the platform's own team.
    pub async fn authenticate_platform(&self, token: Option<&str>) -> Result<Principal> {
        let session = self.authenticate_admin(token).await?;
        Ok(Principal {
            team: TeamId::PLATFORM,
            actor: Actor::User(session.user),
        })
    }

    /// The host behind a bearer token.
    pub async fn authenticate_host(&self, token: Option<&str>) -> Result<Host> {
        let denied = || Error::new(ErrorCode::Unauthorized, "a valid host token is required");
        let token = token
            .filter(|token| token.len() <= MAX_CREDENTIAL)
            .ok_or_else(denied)?;
        self.store
            .host_by_token_hash(&auth::hash(token))
            .await?
            .ok_or_else(denied)
    }
}
