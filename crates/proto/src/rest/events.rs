//! State changes as clients and channels hear of them.

use super::*;

body! {
    /// One state event: the data of a message on `GET /v1/events/stream`. The words of `event` are those that the
    /// Wrenn SDK accepts.
    pub struct StreamEvent {
        /// `connected` (the first message), `capsule.create`, `capsule.pause`, `capsule.resume`, `capsule.destroy`,
        /// `capsule.state.changed`, `template.snapshot.create` (ready, or failed: `outcome` and `error` say),
        /// `template.snapshot.delete`, `host.up` or `host.down`.
        pub event: String,
        /// How an action ended: `success` or `error`; absent for what is no action.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub outcome: Option<String>,
        /// What it is about.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub resource: Option<EventResource>,
        /// Who caused it; absent in the first message.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub actor: Option<EventActor>,
        /// More about it: `from` and `to` (a sandbox's statuses), `name` (a snapshot's), `missed` (in the first message:
        /// what came after the last id that was seen is no longer kept).
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        pub metadata: BTreeMap<String, String>,
        /// Why it failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub error: Option<String>,
        /// The sandbox as it is when the message is sent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub sandbox: Option<Sandbox>,
        /// When it happened.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
        pub timestamp: Timestamp,
    }

    /// Who caused an event: whoever asked for what it is the end of, or the platform by itself.
    pub struct EventActor {
        /// What kind of actor.
        #[serde(rename = "type")]
        pub kind: ActorType,
        /// The user's or the key's id; the platform has none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub id: Option<String>,
        /// The name that it had then, or else its address.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub name: Option<String>,
    }

    /// What an event is about.
    pub struct EventResource {
        /// Its id.
        pub id: String,
        /// `sandbox`, `snapshot` or `host`.
        #[serde(rename = "type")]
        pub kind: String,
    }
}
