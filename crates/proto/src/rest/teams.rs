//! Teams, members, API keys, user search, and what platform admins see of them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;

use super::{TemplateKind, TemplateStatus};

/// A user's place in a team.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum TeamRole {
    /// Uses the team's things.
    Member,
    /// Also renames the team and manages members and keys.
    Admin,
    /// Also manages owners and deletes the team; there is always one.
    Owner,
}

body! {
    /// Request body of `POST /v1/api-keys`.
    pub struct CreateApiKey {
        /// What it is for, 1 to 100 characters.
        pub name: String,
    }

    /// A team's API key.
    pub struct ApiKey
        shows(id, team_id, name, key_prefix, created_at, last_used, creator_email) hides(key)
    {
        /// `key-{uuid}`.
        pub id: String,
        /// The team it acts for.
        pub team_id: String,
        /// What it is for.
        pub name: String,
        /// Its first characters, to tell keys apart.
        pub key_prefix: String,
        /// When it was made.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
        /// When it was last used, exact to some seconds; absent when never.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
        pub last_used: Option<Timestamp>,
        /// Who made it; absent when nobody did, or when the account is gone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub creator_email: Option<String>,
        /// The secret; only in the answer that creates it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub key: Option<String>,
    }

    /// Request body of `POST /v1/teams`.
    pub struct CreateTeam {
        /// 1 to 64 letters, digits, spaces, `-`, `_`, `@` and `'`.
        pub name: String,
    }

    /// Request body of `PATCH /v1/teams/{id}`.
    pub struct RenameTeam {
        /// 1 to 64 letters, digits, spaces, `-`, `_`, `@` and `'`.
        pub name: String,
    }

    /// A team, as one of its members sees it.
    pub struct Team {
        /// `team-{uuid}`.
        pub id: String,
        /// Its name; may change, need not be unique.
        pub name: String,
        /// Its short name `xxxxxx-xxxxxx`; unique, never changes, never used again.
        pub slug: String,
        /// The caller's place in it.
        pub role: TeamRole,
        /// When it was made.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
    }

    /// A member of a team.
    pub struct TeamMember {
        /// `usr-{uuid}`.
        pub user_id: String,
        /// Their name.
        pub name: String,
        /// Their address.
        pub email: String,
        /// Their place in the team.
        pub role: TeamRole,
        /// When they joined.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub joined_at: Timestamp,
    }

    /// Request body of `POST /v1/teams/{id}/members`.
    pub struct AddTeamMember {
        /// The address of somebody who has an account.
        pub email: String,
    }

    /// Request body of `PATCH /v1/teams/{id}/members/{uid}`.
    pub struct ChangeTeamMember {
        /// Their new place.
        pub role: TeamRole,
    }

    /// Somebody who has an account.
    pub struct FoundUser {
        /// `usr-{uuid}`.
        pub user_id: String,
        /// Their address.
        pub email: String,
    }

    /// A team, as a platform admin sees it.
    pub struct AdminTeam {
        /// `team-{uuid}`.
        pub id: String,
        /// Its name.
        pub name: String,
        /// Its short name.
        pub slug: String,
        /// Whether it may bring hosts of its own.
        pub byoc: bool,
        /// How many members it has.
        pub member_count: u64,
        /// When it was made.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
    }

    /// A page of all teams, newest first.
    pub struct AdminTeamList {
        /// The page.
        pub teams: Vec<AdminTeam>,
        /// How many there are in all.
        pub total: u64,
        /// Pass it as `before` for the next page; absent on the last one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub next: Option<String>,
    }

    /// Request body of `PUT /v1/admin/teams/{id}/byoc`.
    pub struct SetTeamByoc {
        /// Whether the team may bring hosts of its own.
        pub byoc: bool,
    }

    /// A user, as a platform admin sees them.
    pub struct AdminUser {
        /// `usr-{uuid}`.
        pub id: String,
        /// Their address.
        pub email: String,
        /// Their name.
        pub name: String,
        /// Whether they can log in.
        pub active: bool,
        /// Whether they administer the platform.
        pub platform_admin: bool,
        /// When they signed up.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
        /// When they last logged in; absent when never.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
        pub last_login_at: Option<Timestamp>,
    }

    /// A page of all users, newest first.
    pub struct AdminUserList {
        /// The page.
        pub users: Vec<AdminUser>,
        /// How many there are in all.
        pub total: u64,
        /// Pass it as `before` for the next page; absent on the last one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub next: Option<String>,
    }

    /// Request body of `PUT /v1/admin/users/{id}/active`.
    pub struct SetUserActive {
        /// Whether they can log in.
        pub active: bool,
    }

    /// A template of any team, as a platform admin sees it.
    pub struct AdminTemplate {
        /// `tpl-{uuid}`.
        pub id: String,
        /// Unique within its team.
        pub name: String,
        /// The team that owns it.
        pub team_id: String,
        /// That team's name.
        pub team_name: String,
        /// How it came to be.
        #[serde(rename = "type")]
        pub kind: TemplateKind,
        /// Whether it can be used.
        pub status: TemplateStatus,
        /// Progress, or why it failed; empty when there is nothing to say.
        pub detail: String,
        /// Virtual CPUs.
        pub vcpus: u32,
        /// Memory in MiB.
        pub memory_mb: u32,
        /// Root disk in MiB.
        pub disk_size_mb: u32,
        /// Bytes on disk.
        pub size_bytes: u64,
        /// Whether every team sees it.
        pub platform: bool,
        /// When it was made.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
    }

    /// A page of all teams' templates, newest first.
    pub struct AdminTemplateList {
        /// The page.
        pub templates: Vec<AdminTemplate>,
        /// How many there are in all.
        pub total: u64,
        /// Pass it as `before` for the next page; absent on the last one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub next: Option<String>,
    }

    /// Request body of `POST /v1/admin/capsules/{id}/snapshot`.
    #[derive(Default)]
    #[serde(default)]
    pub struct SnapshotCapsule {
        /// Name of the new platform template; made up when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub name: Option<String>,
    }
}
