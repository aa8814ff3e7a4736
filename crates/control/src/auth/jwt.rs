//! Sessions as signed tokens (JWT, HS256). A token says who and in which team; name and role are hints for clients.
//! Whoever acts on one reads the database first.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use serde::{Deserialize, Serialize};

use super::secrets::MasterSecret;
use crate::domain::{Role, TeamId, UserId, now};
use crate::{Error, ErrorCode, Result};

/// Life of a session: 7 days.
const LIFE_SECONDS: i64 = 7 * 24 * 3600;
const ISSUER: &str = "wrenn";

/// What a session token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// The user.
    pub(crate) sub: UserId,
    /// The team the session works in.
    pub(crate) team: Option<TeamId>,
    /// The user's name; a hint.
    pub(crate) name: String,
    /// The user's role in the team; a hint.
    pub(crate) role: Option<String>,
    /// The user's `session_version` when the session began: raising it ends all sessions.
    pub(crate) ver: i32,
    iss: String,
    iat: i64,
    exp: i64,
}

/// Signs and checks sessions.
#[derive(Clone)]
pub(crate) struct Sessions {
    signing: EncodingKey,
    checking: DecodingKey,
}

impl Sessions {
    pub(crate) fn new(secret: &MasterSecret) -> Self {
        let key = secret.derive("session");
        Self {
            signing: EncodingKey::from_secret(&key),
            checking: DecodingKey::from_secret(&key),
        }
    }

    /// A token for a user who has proved who they are.
    pub(crate) fn issue(
        &self,
        user: UserId,
        name: &str,
        version: i32,
        team: Option<(TeamId, Role)>,
    ) -> Result<String> {
        let iat = now() / 1000;
        let claims = Claims {
            sub: user,
            team: team.map(|(team, _)| team),
            name: name.to_owned(),
            role: team.map(|(_, role)| role.as_str().to_owned()),
            ver: version,
            iss: ISSUER.to_owned(),
            iat,
            exp: iat + LIFE_SECONDS,
        };
        encode(&Header::new(Algorithm::HS256), &claims, &self.signing).map_err(Error::internal)
    }

    /// What a token says, if this installation signed it and it has not run out.
    pub(crate) fn check(&self, token: &str) -> Result<Claims> {
        let mut rules = Validation::new(Algorithm::HS256);
        rules.set_issuer(&[ISSUER]);
        rules.set_required_spec_claims(&["exp", "iss", "sub"]);
        rules.leeway = 0;
        decode(token, &self.checking, &rules)
            .map(|checked| checked.claims)
            .map_err(|_| {
                Error::new(
                    ErrorCode::Unauthorized,
                    "the session is not valid or has ended; log in again",
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sessions() -> Sessions {
        Sessions::new(&MasterSecret::generate().expect("randomness"))
    }

    #[test]
    fn a_session_is_good_where_it_was_signed() {
        let (here, elsewhere) = (sessions(), sessions());
        let (user, team) = (UserId::new(), TeamId::new());
        let token = here
            .issue(user, "Ada", 3, Some((team, Role::Owner)))
            .expect("a token");
        let claims = here.check(&token).expect("its own");
        assert_eq!((claims.sub, claims.team, claims.ver), (user, Some(team), 3));
        assert_eq!(
            elsewhere.check(&token).expect_err("another's").code,
            ErrorCode::Unauthorized
        );
    }

    #[test]
    fn forged_and_old_tokens_are_refused() {
        let here = sessions();
        let token = here.issue(UserId::new(), "Ada", 0, None).expect("a token");
        let claims = here.check(&token).expect("its own");
        let old = Claims {
            exp: claims.iat - 1,
            ..claims.clone()
        };
        let old = encode(&Header::new(Algorithm::HS256), &old, &here.signing).expect("a token");
        assert!(here.check(&old).is_err());
        // The part in the middle exchanged, the signature kept; and an unsigned token.
        let parts: Vec<&str> = token.split('.').collect();
        let other = here.issue(UserId::new(), "Eve", 0, None).expect("a token");
        let body = other.split('.').nth(1).expect("three parts");
        assert!(here.check(&format!("{}.{body}.{}", parts[0], parts[2])).is_err());
        // {"alg":"none","typ":"JWT"}
        assert!(
            here.check(&format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}."))
                .is_err()
        );
        assert!(here.check("").is_err());
    }
}
