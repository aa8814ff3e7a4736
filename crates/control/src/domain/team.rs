//! Teams, their members and their keys, as people see them.

use super::{KeyId, Millis, Role, TeamId, UserId};

/// A team as one of its members sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Team {
    /// Its id.
    pub id: TeamId,
    /// Its name.
    pub name: String,
    /// A short name of its own, which never changes.
    pub slug: String,
    /// The member's role.
    pub role: Role,
    /// When it was made.
    pub created_at: Millis,
}

/// A member of a team.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub user: UserId,
    /// Their name.
    pub name: String,
    /// Their address.
    pub email: String,
    /// As what.
    pub role: Role,
    /// Since when.
    pub joined_at: Millis,
}

/// A team's API key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Its id.
    pub id: KeyId,
    /// Whose things it opens.
    pub team: TeamId,
    /// For people.
    pub name: String,
    /// The beginning of the secret, to tell keys apart.
    pub prefix: String,
    /// When it was made.
    pub created_at: Millis,
    /// When it was last used, a few seconds behind.
    pub last_used: Option<Millis>,
    /// Who made it; absent when their account is gone.
    pub creator_email: Option<String>,
}
