//! Audit log, notification channels, usage.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
#[cfg(feature = "openapi")]
use utoipa::ToSchema;

// The words are token trees: as literals they would be wrapped, and the schema would show the variants instead.
macro_rules! words {
    ($($(#[$meta:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:tt,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(ToSchema))]
        pub enum $name { $($(#[$doc])* #[serde(rename = $word)] $variant,)* }

        impl $name {
            /// All, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The word on the wire and in the database.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// The value of a word.
            #[must_use]
            pub fn parse(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.as_str() == word)
            }
        }
    )*};
}

words! {
    /// Who acted.
    pub enum ActorType {
        /// A person with a session.
        User = "user",
        /// A program with a team's key.
        ApiKey = "api_key",
        /// The platform: its passes, its host agents, and operators at the command line.
        System = "system",
        /// Nobody who could be identified: a failed log-in, a wrong key.
        Anonymous = "anonymous",
    }

    /// What became of an action.
    pub enum AuditOutcome {
        /// It was done, or accepted.
        Success = "success",
        /// The caller may not do it.
        Denied = "denied",
        /// It could not be done.
        Failure = "failure",
        /// The client went away before the answer; it may have been done.
        Unknown = "unknown",
    }

    /// Where a channel leads.
    pub enum ChannelProvider {
        /// Any HTTP endpoint; requests are signed.
        Webhook = "webhook",
        /// An incoming webhook of Slack.
        Slack = "slack",
        /// A webhook of Discord.
        Discord = "discord",
        /// An incoming webhook of Microsoft Teams.
        Teams = "teams",
        /// A webhook of a Google Chat space.
        GoogleChat = "googlechat",
        /// A bot of Telegram.
        Telegram = "telegram",
        /// A room of a Matrix server.
        Matrix = "matrix",
    }

    /// What a channel can tell.
    pub enum ChannelEventKind {
        /// A sandbox was asked for.
        CapsuleCreated = "capsule.created",
        /// A sandbox runs.
        CapsuleRunning = "capsule.running",
        /// A sandbox was paused.
        CapsulePaused = "capsule.paused",
        /// A sandbox was destroyed.
        CapsuleDestroyed = "capsule.destroyed",
        /// A snapshot template is ready.
        SnapshotCreated = "template.snapshot.created",
        /// A snapshot template could not be made; `details.error` says why.
        SnapshotFailed = "template.snapshot.failed",
        /// A snapshot template was deleted.
        SnapshotDeleted = "template.snapshot.deleted",
        /// A host is online.
        HostUp = "host.up",
        /// A host is out of reach.
        HostDown = "host.down",
    }
}

body! {
    /// An entry of the audit log.
    pub struct AuditEntry {
        /// `aud-{uuid}`.
        pub id: String,
        /// The team whose log it is in; absent when no team is concerned.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub team_id: Option<String>,
        /// Who acted.
        pub actor_type: ActorType,
        /// `usr-…`, `key-…`, `host-…`, or `cli` for the command line; absent for passes of the platform and for nobody.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub actor_id: Option<String>,
        /// What was done, for example `sandbox.create`.
        pub action: String,
        /// What it was done to, for example `sandbox`.
        pub resource_type: String,
        /// Its id or name, as far as known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub resource_id: Option<String>,
        /// The answer's HTTP status; absent for what the platform did by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub status: Option<u16>,
        /// What became of it.
        pub outcome: AuditOutcome,
        /// Where the request came from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub source_address: Option<String>,
        /// When.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
    }

    /// A page of the audit log, newest first.
    pub struct AuditPage {
        /// The entries.
        pub entries: Vec<AuditEntry>,
        /// Passed as `cursor`, brings the next page; absent on the last one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub next_cursor: Option<String>,
    }

    /// Request body of `POST /v1/channels`.
    pub struct CreateChannel shows(name, provider, events) hides(config) {
        /// For people; unique in the team.
        pub name: String,
        /// Where it leads.
        pub provider: ChannelProvider,
        /// Slack, discord, teams, googlechat: `webhook_url`; telegram: `bot_token`, `chat_id`; matrix:
        /// `homeserver_url`, `access_token`, `room_id`; webhook: `url` and, if wanted, `secret`.
        pub config: BTreeMap<String, String>,
        /// What it tells.
        pub events: Vec<ChannelEventKind>,
    }

    /// Request body of `PATCH /v1/channels/{id}`; what is absent stays.
    #[derive(Default)]
    #[serde(default)]
    pub struct UpdateChannel {
        /// New name.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub name: Option<String>,
        /// New choice of events.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub events: Option<Vec<ChannelEventKind>>,
    }

    /// Request body of `PUT /v1/channels/{id}/config`: replaces the whole configuration.
    pub struct ReplaceChannelConfig shows() hides(config) {
        /// As in `POST /v1/channels`. A webhook without `secret` gets a new one.
        pub config: BTreeMap<String, String>,
    }

    /// Request body of `POST /v1/channels/test`: an existing channel, or one to be.
    #[derive(Default)]
    #[serde(default)]
    pub struct TestChannel shows(channel_id, provider) hides(config) {
        /// A channel of the team.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub channel_id: Option<String>,
        /// Where it would lead; together with `config`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub provider: Option<ChannelProvider>,
        /// As in `POST /v1/channels`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub config: Option<BTreeMap<String, String>>,
    }

    /// Answer to `POST /v1/channels/test`.
    pub struct ChannelTested {
        /// Whether the other side took the message.
        pub delivered: bool,
        /// Why not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub error: Option<String>,
    }

    /// A notification channel.
    pub struct Channel
        shows(id, team_id, name, provider, config, events, created_at, updated_at, delivered_at, failed_at, last_error)
        hides(secret)
    {
        /// `chn-{uuid}`.
        pub id: String,
        /// The team that it tells about.
        pub team_id: String,
        /// For people.
        pub name: String,
        /// Where it leads.
        pub provider: ChannelProvider,
        /// The configuration with secrets masked.
        pub config: BTreeMap<String, String>,
        /// What it tells.
        pub events: Vec<ChannelEventKind>,
        /// The key that signs a webhook's requests: shown once, when it was made up here.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub secret: Option<String>,
        /// When it was made.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub created_at: Timestamp,
        /// When it last changed.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub updated_at: Timestamp,
        /// When a message last arrived.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
        pub delivered_at: Option<Timestamp>,
        /// When an attempt last failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
        pub failed_at: Option<Timestamp>,
        /// Why it did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub last_error: Option<String>,
    }

    /// Answer to `GET /v1/sandboxes/stats`.
    pub struct Stats {
        /// The range asked for.
        pub range: String,
        /// Now.
        pub current: StatsNow,
        /// The largest values of the last 30 days.
        pub peaks: StatsPeaks,
        /// The range in equal steps, oldest first.
        pub series: StatsSeries,
    }

    /// What a team's running sandboxes hold.
    pub struct StatsNow {
        /// Sandboxes.
        pub running_count: u64,
        /// Virtual CPUs.
        pub vcpus_reserved: u64,
        /// MiB.
        pub memory_mb_reserved: u64,
        /// When this was so.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub sampled_at: Timestamp,
    }

    /// Largest values, each by itself.
    pub struct StatsPeaks {
        /// Sandboxes.
        pub running_count: u64,
        /// Virtual CPUs.
        pub vcpus: u64,
        /// MiB.
        pub memory_mb: u64,
    }

    /// Parallel lists: an entry of each per step, the largest value within the step.
    pub struct StatsSeries {
        /// Where each step begins, RFC 3339.
        pub labels: Vec<String>,
        /// Sandboxes.
        pub running: Vec<u64>,
        /// Virtual CPUs.
        pub vcpus: Vec<u64>,
        /// MiB.
        pub memory_mb: Vec<u64>,
    }

    /// Answer to `GET /v1/sandboxes/usage`.
    pub struct Usage {
        /// First day, `YYYY-MM-DD`, UTC.
        pub from: String,
        /// Last day.
        pub to: String,
        /// A point per day, oldest first.
        pub points: Vec<UsagePoint>,
    }

    /// A day's use.
    pub struct UsagePoint {
        /// `YYYY-MM-DD`, UTC.
        pub date: String,
        /// Minutes times virtual CPUs while sandboxes ran.
        pub cpu_minutes: f64,
        /// Minutes times MiB while sandboxes ran.
        pub ram_mb_minutes: f64,
    }
}
