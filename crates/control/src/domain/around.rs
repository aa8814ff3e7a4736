//! What is kept and told about what happens: the audit log's entries, and the events of channels.

use std::net::IpAddr;

pub use wrenn_proto::rest::{ActorType, AuditOutcome, ChannelEventKind, ChannelProvider};

use super::{Actor, AuditId, ChannelId, Millis, TeamId, UserId};

/// Who acted, as the audit log keeps it: the id is text, since it outlives what it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditActor {
    /// What kind of actor.
    pub kind: ActorType,
    /// Its id, with its prefix.
    pub id: Option<String>,
}

impl AuditActor {
    /// The platform's own passes.
    pub const SYSTEM: Self = Self {
        kind: ActorType::System,
        id: None,
    };
    /// An operator at the command line, who needs no account.
    #[must_use]
    pub fn cli() -> Self {
        Self {
            kind: ActorType::System,
            id: Some("cli".to_owned()),
        }
    }

    /// Somebody who could not be identified.
    pub const ANONYMOUS: Self = Self {
        kind: ActorType::Anonymous,
        id: None,
    };
}

impl Actor {
    /// The actor of a type and an id as they are stored; absent for what is none of a team's actors.
    pub(crate) fn parse(kind: &str, id: &str) -> Option<Self> {
        match ActorType::parse(kind)? {
            ActorType::User => id.parse().ok().map(Self::User),
            ActorType::ApiKey => id.parse().ok().map(Self::Key),
            ActorType::System | ActorType::Anonymous => None,
        }
    }
}

impl From<Option<Actor>> for AuditActor {
    fn from(actor: Option<Actor>) -> Self {
        actor.map_or(Self::SYSTEM, Self::from)
    }
}

impl From<Actor> for AuditActor {
    fn from(actor: Actor) -> Self {
        match actor {
            Actor::User(user) => Self {
                kind: ActorType::User,
                id: Some(user.to_string()),
            },
            Actor::Key(key) => Self {
                kind: ActorType::ApiKey,
                id: Some(key.to_string()),
            },
        }
    }
}

/// An entry of the audit log: facts about an action, never its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    /// Its id; also orders entries of one millisecond.
    pub id: AuditId,
    /// The team whose log it belongs to.
    pub team: Option<TeamId>,
    /// Who.
    pub actor: AuditActor,
    /// What, for example `sandbox.create`.
    pub action: String,
    /// To what kind of thing.
    pub resource_type: String,
    /// To which one, as far as known.
    pub resource_id: Option<String>,
    /// The answer's HTTP status.
    pub status: Option<u16>,
    /// What became of it.
    pub outcome: AuditOutcome,
    /// Where the request came from.
    pub source: Option<IpAddr>,
    /// When.
    pub at: Millis,
}

impl AuditEntry {
    /// Something that the platform did by itself.
    #[must_use]
    pub fn system(
        team: Option<TeamId>,
        action: &str,
        resource_type: &str,
        resource_id: impl std::fmt::Display,
    ) -> Self {
        Self {
            id: AuditId::new(),
            team,
            actor: AuditActor::SYSTEM,
            action: action.to_owned(),
            resource_type: resource_type.to_owned(),
            resource_id: Some(resource_id.to_string()),
            status: None,
            outcome: AuditOutcome::Success,
            source: None,
            at: super::now(),
        }
    }

    /// Something that an operator did at the command line, on the database itself.
    #[must_use]
    pub fn cli(action: &str, resource_type: &str, resource_id: impl std::fmt::Display) -> Self {
        Self {
            actor: AuditActor::cli(),
            ..Self::system(None, action, resource_type, resource_id)
        }
    }
}

/// Something that channels may tell.
#[derive(Debug, Clone, PartialEq)]
pub struct ChannelEvent {
    /// The event's own id: told again under the same id, it is not sent again.
    pub id: uuid::Uuid,
    /// The team whose channels tell it; the platform team for hosts.
    pub team: TeamId,
    /// What happened.
    pub kind: ChannelEventKind,
    /// To what kind of thing: `sandbox`, `template`, `host`.
    pub resource_type: String,
    /// To which one, with its prefix.
    pub resource_id: String,
    /// When.
    pub at: Millis,
    /// More about it, for webhooks; no secrets.
    pub details: serde_json::Value,
}

/// A notification channel as stored; its configuration is sealed.
#[derive(Clone, PartialEq, Eq)]
pub struct Channel {
    /// Its id.
    pub id: ChannelId,
    /// The team it tells about.
    pub team: TeamId,
    /// For people.
    pub name: String,
    /// Where it leads.
    pub provider: ChannelProvider,
    /// Its configuration, sealed under its id.
    pub sealed: String,
    /// What it tells.
    pub events: Vec<ChannelEventKind>,
    /// Who made it, if they are still there.
    pub created_by: Option<UserId>,
    /// When it was made.
    pub created_at: Millis,
    /// When it last changed.
    pub updated_at: Millis,
    /// When a message last arrived.
    pub delivered_at: Option<Millis>,
    /// When an attempt last failed.
    pub failed_at: Option<Millis>,
    /// Why it did.
    pub last_error: Option<String>,
}

wrenn_proto::discreet_debug!(Channel
    shows(
        id, team, name, provider, events, created_by, created_at, updated_at, delivered_at, failed_at, last_error,
    )
    hides(sealed));
