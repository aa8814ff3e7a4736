//! What happened, as clients, channels and other instances hear of it.

use serde::{Deserialize, Serialize};

use super::around::{ActorType, ChannelEvent, ChannelEventKind};
use super::{Actor, Millis, SandboxStatus, TeamId};

/// The first half of the ids under which channels tell events; the second is the event's place.
const CHANNEL_IDS: u64 = 0x0077_7265_6e6e_6576;

/// What happened. The words are those of the stream (`GET /v1/events/stream`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum EventKind {
    /// A create ended.
    #[serde(rename = "capsule.create")]
    SandboxCreate,
    /// A pause ended.
    #[serde(rename = "capsule.pause")]
    SandboxPause,
    /// A resume ended.
    #[serde(rename = "capsule.resume")]
    SandboxResume,
    /// A destroy ended.
    #[serde(rename = "capsule.destroy")]
    SandboxDestroy,
    /// Any other change of a sandbox's status.
    #[serde(rename = "capsule.state.changed")]
    SandboxChanged,
    /// A snapshot is ready, or failed.
    #[serde(rename = "template.snapshot.create")]
    SnapshotCreate,
    /// A snapshot is deleted.
    #[serde(rename = "template.snapshot.delete")]
    SnapshotDelete,
    /// A host is there (again).
    #[serde(rename = "host.up")]
    HostUp,
    /// A host fell silent.
    #[serde(rename = "host.down")]
    HostDown,
}

impl EventKind {
    /// All that this version knows.
    pub(crate) const ALL: [Self; 9] = [
        Self::SandboxCreate,
        Self::SandboxPause,
        Self::SandboxResume,
        Self::SandboxDestroy,
        Self::SandboxChanged,
        Self::SnapshotCreate,
        Self::SnapshotDelete,
        Self::HostUp,
        Self::HostDown,
    ];

    /// The word on the wire and in the database.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::SandboxCreate => "capsule.create",
            Self::SandboxPause => "capsule.pause",
            Self::SandboxResume => "capsule.resume",
            Self::SandboxDestroy => "capsule.destroy",
            Self::SandboxChanged => "capsule.state.changed",
            Self::SnapshotCreate => "template.snapshot.create",
            Self::SnapshotDelete => "template.snapshot.delete",
            Self::HostUp => "host.up",
            Self::HostDown => "host.down",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

    /// The words that this version knows. A newer one that shares the database may write others.
    pub(crate) fn words() -> impl Iterator<Item = &'static str> {
        Self::ALL.into_iter().map(Self::as_str)
    }

    /// What the event is about.
    pub(crate) fn resource_type(self) -> &'static str {
        match self {
            Self::SandboxCreate
            | Self::SandboxPause
            | Self::SandboxResume
            | Self::SandboxDestroy
            | Self::SandboxChanged => "sandbox",
            Self::SnapshotCreate | Self::SnapshotDelete => "snapshot",
            Self::HostUp | Self::HostDown => "host",
        }
    }
}

/// How an action ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EventOutcome {
    Success,
    Error,
}

impl EventOutcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Error => "error",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        [Self::Success, Self::Error]
            .into_iter()
            .find(|outcome| outcome.as_str() == word)
    }
}

/// The part of an event that only its readers understand. Small, and without secrets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventPayload {
    /// A sandbox's status before.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "known_status"
    )]
    pub(crate) from: Option<SandboxStatus>,
    /// A sandbox's status after.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "known_status"
    )]
    pub(crate) to: Option<SandboxStatus>,
    /// A snapshot's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// A status, if this version knows it.
fn known_status<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<SandboxStatus>, D::Error> {
    let word = Option::<String>::deserialize(from)?;
    Ok(word.and_then(|word| word.parse().ok()))
}

/// Who caused an event, as its readers see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventActor {
    #[serde(rename = "type")]
    pub(crate) kind: ActorType,
    /// Its id with its prefix; the platform has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    /// The name that it had then, or else the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
}

/// An event before it has its place in the order.
#[derive(Debug, Clone)]
pub(crate) struct NewEvent {
    /// Whose it is; the platform's for its hosts.
    pub(crate) team: TeamId,
    pub(crate) kind: EventKind,
    pub(crate) outcome: Option<EventOutcome>,
    /// The resource's id in its prefixed form.
    pub(crate) resource: String,
    pub(crate) payload: EventPayload,
    /// Whose doing it is; the platform's own when absent.
    pub(crate) actor: Option<Actor>,
}

impl NewEvent {
    /// A sandbox's change of status. `decided` is who made the newest decision about it.
    pub(crate) fn sandbox(
        team: TeamId,
        sandbox: super::SandboxId,
        decided: Option<Actor>,
        from: Option<SandboxStatus>,
        to: SandboxStatus,
        failure: Option<&str>,
    ) -> Self {
        let (kind, outcome) = sandbox_event(from, to);
        Self {
            team,
            kind,
            outcome,
            actor: decided.filter(|_| is_decided(from, to)),
            resource: sandbox.to_string(),
            payload: EventPayload {
                from,
                to: Some(to),
                name: None,
                error: failure.map(str::to_owned),
            },
        }
    }
}

/// An event as its readers see it. It may come more than once: `seq` tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StateEvent {
    /// The place in the order of events; rises, and is never given twice.
    pub(crate) seq: i64,
    /// Whose it is; the platform's for its hosts.
    pub(crate) team: TeamId,
    pub(crate) kind: EventKind,
    pub(crate) outcome: Option<EventOutcome>,
    /// The resource's id in its prefixed form.
    pub(crate) resource: String,
    pub(crate) payload: EventPayload,
    /// Who caused it; unknown in events of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) actor: Option<EventActor>,
    /// When it happened.
    pub(crate) at: Millis,
}

impl StateEvent {
    /// The event as notification channels tell it, if they do. Told again, it has the same id.
    pub(crate) fn notification(&self) -> Option<ChannelEvent> {
        let kind = match self.kind {
            EventKind::SandboxCreate
            | EventKind::SandboxPause
            | EventKind::SandboxResume
            | EventKind::SandboxDestroy
            | EventKind::SandboxChanged => match self.payload.to? {
                SandboxStatus::Pending => ChannelEventKind::CapsuleCreated,
                // Back from a snapshot or from being out of reach is no news of this kind.
                SandboxStatus::Running if self.kind != EventKind::SandboxChanged => {
                    ChannelEventKind::CapsuleRunning
                }
                SandboxStatus::Paused => ChannelEventKind::CapsulePaused,
                SandboxStatus::Stopped => ChannelEventKind::CapsuleDestroyed,
                _ => return None,
            },
            EventKind::SnapshotCreate => match self.outcome? {
                EventOutcome::Success => ChannelEventKind::SnapshotCreated,
                EventOutcome::Error => ChannelEventKind::SnapshotFailed,
            },
            EventKind::SnapshotDelete => ChannelEventKind::SnapshotDeleted,
            EventKind::HostUp => ChannelEventKind::HostUp,
            EventKind::HostDown => ChannelEventKind::HostDown,
        };
        let mut details = serde_json::to_value(&self.payload).unwrap_or_default();
        if let (Some(details), Some(actor)) = (details.as_object_mut(), &self.actor) {
            let actor = serde_json::to_value(actor).unwrap_or_default();
            details.insert("actor".to_owned(), actor);
        }
        Some(ChannelEvent {
            // Places are unique in an installation, and a channel hears of one installation.
            id: uuid::Uuid::from_u64_pair(CHANNEL_IDS, self.seq.unsigned_abs()),
            team: self.team,
            kind,
            resource_type: self.kind.resource_type().to_owned(),
            resource_id: self.resource.clone(),
            at: self.at,
            details,
        })
    }
}

/// Whether a change is somebody's decision or the end of what it began, rather than something that befell a sandbox at rest
/// (its host paused it, or lost it) or took its host away in the middle of an operation.
fn is_decided(from: Option<SandboxStatus>, to: SandboxStatus) -> bool {
    to != SandboxStatus::Missing && (to.is_transient() || from.is_none_or(SandboxStatus::is_transient))
}

/// Which action a change of status ends, and how.
fn sandbox_event(from: Option<SandboxStatus>, to: SandboxStatus) -> (EventKind, Option<EventOutcome>) {
    use SandboxStatus as S;
    let (kind, success) = match (from, to) {
        (Some(S::Pending | S::Starting), S::Running) => (EventKind::SandboxCreate, true),
        (Some(S::Pending | S::Starting), S::Error) => (EventKind::SandboxCreate, false),
        (Some(S::Pausing), S::Paused) => (EventKind::SandboxPause, true),
        // Paused by its host for want of use.
        (Some(S::Running), S::Paused) => (EventKind::SandboxPause, true),
        (Some(S::Pausing), S::Running | S::Error) => (EventKind::SandboxPause, false),
        (Some(S::Resuming), S::Running) => (EventKind::SandboxResume, true),
        (Some(S::Resuming), S::Paused | S::Error) => (EventKind::SandboxResume, false),
        (_, S::Stopped) => (EventKind::SandboxDestroy, true),
        _ => return (EventKind::SandboxChanged, None),
    };
    let outcome = if success {
        EventOutcome::Success
    } else {
        EventOutcome::Error
    };
    (kind, Some(outcome))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_same_in_the_database_and_on_the_wire() {
        for kind in EventKind::ALL {
            assert_eq!(
                serde_json::to_value(kind).expect("a word"),
                serde_json::json!(kind.as_str())
            );
            assert_eq!(EventKind::parse(kind.as_str()), Some(kind));
        }
    }

    #[test]
    fn what_befalls_a_sandbox_at_rest_is_nobody_s_doing() {
        use SandboxStatus as S;
        for (from, to) in [
            (S::Running, S::Pausing),
            (S::Pausing, S::Paused),
            (S::Pausing, S::Running),
            (S::Starting, S::Error),
            (S::Missing, S::Stopping),
        ] {
            assert!(is_decided(Some(from), to), "{from} to {to}");
        }
        for (from, to) in [
            (S::Running, S::Paused),
            (S::Running, S::Error),
            (S::Pausing, S::Missing),
            (S::Missing, S::Running),
        ] {
            assert!(!is_decided(Some(from), to), "{from} to {to}");
        }
        assert!(is_decided(None, S::Pending));
    }

    #[test]
    fn words_of_a_newer_version_are_left_out() {
        let payload = r#"{"from": "running", "to": "elsewhere", "speed": 3}"#;
        let payload: EventPayload = serde_json::from_str(payload).expect("a payload");
        assert_eq!((payload.from, payload.to), (Some(SandboxStatus::Running), None));
    }

    #[test]
    fn a_change_tells_which_action_it_ends() {
        use SandboxStatus as S;
        let told = |from, to| sandbox_event(Some(from), to);
        assert_eq!(
            told(S::Starting, S::Running),
            (EventKind::SandboxCreate, Some(EventOutcome::Success))
        );
        assert_eq!(
            told(S::Pausing, S::Running),
            (EventKind::SandboxPause, Some(EventOutcome::Error))
        );
        assert_eq!(
            told(S::Stopping, S::Stopped),
            (EventKind::SandboxDestroy, Some(EventOutcome::Success))
        );
        assert_eq!(told(S::Running, S::Missing), (EventKind::SandboxChanged, None));
        assert_eq!(sandbox_event(None, S::Pending), (EventKind::SandboxChanged, None));
    }
}
