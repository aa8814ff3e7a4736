//! Entity ids: a UUID inside, prefixed text (`sb-…`) at every edge.
//!
//! The prefix tells a reader of a log line what an id names, and keeps an id of one kind from being
//! taken for another. Parsing accepts the prefixed form only, in lower case, and never panics.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
pub use uuid::Uuid;

/// Why a text is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidId {
    /// The kind of entity, for example `sandbox`.
    pub kind: &'static str,
    /// The form that is expected, for example `sb-{uuid}`.
    pub expected: &'static str,
}

impl fmt::Display for InvalidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a {} id: expected {}", self.kind, self.expected)
    }
}

impl std::error::Error for InvalidId {}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The text before the UUID.
            pub const PREFIX: &'static str = $prefix;

            /// A new id, unique and roughly ordered by time.
            #[must_use]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0.as_hyphenated())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = InvalidId { kind: $kind, expected: concat!($prefix, "{uuid}") };
                let uuid = text.strip_prefix($prefix).ok_or(invalid.clone())?;
                // Only the canonical form: one entity, one spelling in logs, paths and caches.
                if uuid.len() != 36 || uuid.bytes().any(|byte| byte.is_ascii_uppercase()) {
                    return Err(invalid);
                }
                Uuid::try_parse(uuid).map(Self).map_err(|_| invalid)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

ids! {
    /// A sandbox.
    SandboxId, "sb-", "sandbox";
    /// A user account.
    UserId, "usr-", "user";
    /// A team.
    TeamId, "team-", "team";
    /// An API key's row (not the secret itself).
    KeyId, "key-", "API key";
    /// A host.
    HostId, "host-", "host";
    /// A template, built or made from a sandbox.
    TemplateId, "tpl-", "template";
    /// A notification channel.
    ChannelId, "chn-", "channel";
    /// An entry of the audit log.
    AuditId, "aud-", "audit entry";
}

impl TeamId {
    /// The platform's own team: its templates are visible to every team.
    pub const PLATFORM: Self = Self(Uuid::nil());
}

impl TemplateId {
    /// The built-in `minimal` template, owned by [`TeamId::PLATFORM`].
    pub const MINIMAL: Self = Self(Uuid::nil());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_a_round_trip() {
        let id = SandboxId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().starts_with("sb-"));
    }

    #[test]
    fn other_kinds_and_spellings_are_refused() {
        let id = SandboxId::new();
        assert!(id.to_string().parse::<TeamId>().is_err());
        assert!(id.to_string().to_uppercase().parse::<SandboxId>().is_err());
        assert!(format!("sb-{}", id.0.simple()).parse::<SandboxId>().is_err());
        assert!("sb-../../etc/passwd".parse::<SandboxId>().is_err());
        assert!("".parse::<SandboxId>().is_err());
    }
}
