//! Accounts: sign-up, sessions, a person's own data.

use std::fmt;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};

#[cfg(feature = "openapi")]
use utoipa::ToSchema;

/// A password or token on its way: text on the wire, and nothing at all in logs.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself, for whoever has to send or check it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        // The usual refusal of a value of another type repeats the value, and a password that somebody sent as a
        // number would be in an error message.
        impl Visitor<'_> for Text {
            type Value = Secret;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Secret, E> {
                Ok(Secret::new(text))
            }

            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Secret, E> {
                Ok(Secret(text))
            }

            fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<Secret, E> {
                Err(E::custom("expected a string, not a boolean"))
            }

            fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<Secret, E> {
                Err(E::custom("expected a string, not a number"))
            }

            fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<Secret, E> {
                Err(E::custom("expected a string, not a number"))
            }

            fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<Secret, E> {
                Err(E::custom("expected a string, not a number"))
            }
        }

        // Asked for a string, the parser would refuse other types by itself, in its own words.
        deserializer.deserialize_any(Text)
    }
}

body! {
    /// Request body of `POST /v1/auth/signup`.
    pub struct SignUp {
        /// The address; upper and lower case do not matter.
        #[cfg_attr(feature = "openapi", schema(max_length = 254))]
        pub email: String,
        /// At least 8 characters.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = Password, min_length = 8))]
        pub password: Secret,
        /// What others see.
        #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 100))]
        pub name: String,
    }

    /// A new account. With a mail server configured it has to be activated first, and there is no token.
    pub struct SignedUp {
        /// A session, when the account can be used at once.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
        pub token: Option<Secret>,
        /// The user's id.
        pub user_id: String,
        /// Their first team.
        pub team_id: String,
        /// The address as it is stored: lower case.
        pub email: String,
        /// The name.
        pub name: String,
        /// `active`, or `inactive` until the link in the mail was followed.
        pub status: String,
    }

    /// Request body of `POST /v1/auth/login`.
    pub struct LogIn {
        /// The address; upper and lower case do not matter.
        pub email: String,
        /// The password.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = Password))]
        pub password: Secret,
    }

    /// A session that has just begun.
    pub struct LoggedIn {
        /// Goes into `Authorization: Bearer …`; good for 7 days.
        #[cfg_attr(feature = "openapi", schema(value_type = String))]
        pub token: Secret,
        /// The user's id.
        pub user_id: String,
        /// The team that the session works in; `null` when the user is in none.
        pub team_id: Option<String>,
        /// The user's address.
        pub email: String,
        /// The user's name.
        pub name: String,
    }

    /// Request body of `POST /v1/auth/activate`.
    pub struct Activate {
        /// The token from the mail; used up by the call.
        #[cfg_attr(feature = "openapi", schema(value_type = String))]
        pub token: Secret,
    }

    /// Request body of `POST /v1/auth/switch-team`.
    pub struct SwitchTeam {
        /// `team-{uuid}`
        pub team_id: String,
    }

    /// The caller's own account.
    pub struct Me {
        /// What others see.
        pub name: String,
        /// The address.
        pub email: String,
        /// Whether there is a password; without one the login goes through a provider.
        pub has_password: bool,
        /// Providers that the account is connected with.
        pub providers: Vec<String>,
    }

    /// Request body of `PATCH /v1/me`.
    #[derive(Default)]
    #[serde(default)]
    pub struct UpdateMe {
        /// The new name; unchanged when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(min_length = 1, max_length = 100))]
        pub name: Option<String>,
    }

    /// Request body of `POST /v1/me/password`.
    pub struct ChangePassword {
        /// The password so far; needed when there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = Password))]
        pub current_password: Option<Secret>,
        /// At least 8 characters.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = Password, min_length = 8))]
        pub new_password: Secret,
        /// The same again, against typing errors.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = Password))]
        pub confirm_password: Option<Secret>,
    }

    /// Request body of `POST /v1/me/password/reset`.
    pub struct ResetPassword {
        /// The account's address.
        pub email: String,
    }

    /// Request body of `POST /v1/me/password/reset/confirm`.
    pub struct ConfirmReset {
        /// The token from the mail; used up by the call.
        #[cfg_attr(feature = "openapi", schema(value_type = String))]
        pub token: Secret,
        /// At least 8 characters.
        #[cfg_attr(feature = "openapi", schema(value_type = String, format = Password, min_length = 8))]
        pub new_password: Secret,
    }

    /// Where a browser goes to log in with a provider.
    pub struct ProviderUrl {
        /// The provider's page. It belongs to the cookie that came with this answer.
        #[cfg_attr(feature = "openapi", schema(value_type = String))]
        pub url: Secret,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every body in which a secret can travel.
    #[test]
    fn no_body_shows_its_secrets() {
        use std::fmt::Debug;

        use serde::de::DeserializeOwned;
        use serde_json::{Value, json};

        use crate::rest;

        fn shown<T: Debug + DeserializeOwned>(body: Value) -> String {
            assert!(body.to_string().contains("hunter2"), "{body}");
            format!("{:#?}", serde_json::from_value::<T>(body).expect("a body"))
        }
        let marked = json!({"HOME": "/root", "PASSWORD": "hunter2"});
        let time = "2026-01-01T00:00:00Z";
        let channel = json!({"name": "c", "provider": "slack", "config": marked, "events": []});
        let texts = [
            shown::<SignUp>(json!({"email": "a@b.c", "password": "hunter2", "name": "A"})),
            shown::<SignedUp>(
                json!({"token": "hunter2", "user_id": "u", "team_id": "t", "email": "a@b.c",
                "name": "A", "status": "active"}),
            ),
            shown::<LogIn>(json!({"email": "a@b.c", "password": "hunter2"})),
            shown::<LoggedIn>(
                json!({"token": "hunter2", "user_id": "u", "team_id": null, "email": "a@b.c",
                "name": "A"}),
            ),
            shown::<Activate>(json!({"token": "hunter2"})),
            shown::<ChangePassword>(json!({"current_password": "hunter2", "new_password": "hunter2",
                "confirm_password": "hunter2"})),
            shown::<ConfirmReset>(json!({"token": "hunter2", "new_password": "hunter2"})),
            shown::<ProviderUrl>(json!({"url": "https://example.com/?state=hunter2"})),
            shown::<rest::CreateSandbox>(json!({"template": "minimal", "envs": marked})),
            shown::<rest::Exec>(json!({"cmd": "env", "envs": marked})),
            shown::<rest::ClientFrame>(json!({"type": "start", "cmd": "env", "envs": marked})),
            shown::<rest::ClientFrame>(json!({"type": "input", "data": "hunter2"})),
            shown::<rest::RegisterHost>(json!({"token": "hunter2", "arch": "x86_64", "cpu_cores": 1,
                "memory_mb": 1, "disk_gb": 1, "address": "http://h:1"})),
            shown::<rest::RegisteredHost>(json!({"host_id": "h", "token": "hunter2",
                "refresh_token": "hunter2", "rpc_token": "hunter2"})),
            shown::<rest::RefreshHostToken>(json!({"refresh_token": "hunter2"})),
            shown::<rest::HostTokens>(json!({"token": "hunter2", "refresh_token": "hunter2"})),
            shown::<rest::ApiKey>(
                json!({"id": "k", "team_id": "t", "name": "n", "key_prefix": "wrn_",
                "created_at": time, "key": "hunter2"}),
            ),
            shown::<rest::CreateChannel>(channel),
            shown::<rest::ReplaceChannelConfig>(json!({"config": marked})),
            shown::<rest::TestChannel>(json!({"provider": "slack", "config": marked})),
            shown::<rest::Channel>(
                json!({"id": "c", "team_id": "t", "name": "n", "provider": "webhook",
                "config": {}, "events": [], "secret": "hunter2", "created_at": time, "updated_at": time}),
            ),
        ];
        for text in texts {
            assert!(!text.contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn secrets_are_text_on_the_wire_and_nothing_in_logs() {
        let body: LogIn =
            serde_json::from_str(r#"{"email":"a@b.c","password":"correct horse"}"#).expect("a body");
        assert_eq!(body.password.reveal(), "correct horse");
        assert!(!format!("{body:?}").contains("horse"));
        assert!(
            serde_json::to_string(&body)
                .expect("text")
                .contains("correct horse")
        );
        for wrong in ["12345678", "12.25", "-12345678", "true", "[12345678]"] {
            let error = serde_json::from_str::<Secret>(wrong).expect_err("not a string");
            assert!(
                !error.to_string().contains("12") && !error.to_string().contains("true"),
                "{error}"
            );
        }
    }
}
