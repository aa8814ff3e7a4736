//! The tables as rows. Columns are documented in `migration`; meaning lives in `domain`.

/// A column with a secret: a hash, a sealed text, an environment. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq, sea_orm::DeriveValueType)]
pub struct Hidden(pub(crate) String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hidden(…)")
    }
}

impl From<&str> for Hidden {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

macro_rules! table {
    ($module:ident, $name:literal, { $($body:tt)* }) => {
        pub(crate) mod $module {
            use sea_orm::entity::prelude::*;

            #[allow(unused_imports, reason = "not every table has secrets")]
            use super::Hidden;

            #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
            #[sea_orm(table_name = $name)]
            pub struct Model { $($body)* }

            #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
            pub enum Relation {}

            impl ActiveModelBehavior for ActiveModel {}
        }
    };
}

table!(user, "users", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub email: String,
    pub name: String,
    pub password_hash: Option<Hidden>,
    pub is_admin: bool,
    pub status: String,
    pub created_at: i64,
    pub updated_at: i64,
    pub session_version: i32,
    pub deleted_at: Option<i64>,
    pub last_login_at: Option<i64>,
    pub email_verified_at: Option<i64>,
});

table!(oauth_identity, "oauth_identities", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub user_id: Uuid,
    pub provider: String,
    pub subject: String,
    pub email: String,
    pub created_at: i64,
});

table!(email_token, "email_tokens", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub user_id: Uuid,
    pub purpose: String,
    pub token_hash: Hidden,
    pub created_at: i64,
    pub expires_at: i64,
    pub used_at: Option<i64>,
});

table!(rate_limit, "rate_limits", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub bucket: String,
    pub hits: i32,
    pub window_ends_at: i64,
});

table!(team, "teams", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub name: String,
    pub slug: String,
    pub created_at: i64,
    pub deleted_at: Option<i64>,
    pub byoc: bool,
    pub deletion: Option<String>,
    pub members_version: i32,
});

table!(membership, "users_teams", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub user_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    pub team_id: Uuid,
    pub role: String,
    pub is_default: bool,
    pub created_at: i64,
});

table!(api_key, "team_api_keys", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Uuid,
    pub name: String,
    pub key_hash: Hidden,
    pub key_prefix: String,
    pub created_by: Option<Uuid>,
    pub created_at: i64,
    pub last_used: Option<i64>,
});

table!(host, "hosts", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub status: String,
    pub arch: String,
    pub address: String,
    pub rpc_token: Hidden,
    pub token_hash: Option<Hidden>,
    pub token_expires_at: Option<i64>,
    pub previous_token_hash: Option<Hidden>,
    pub cpu_cores: i32,
    pub memory_mb: i64,
    pub disk_gb: i64,
    pub memory_available_mb: i64,
    pub disk_available_mb: i64,
    pub version: String,
    pub created_by: Option<Uuid>,
    pub last_heartbeat_at: Option<i64>,
    pub created_at: i64,
    pub updated_at: i64,
    pub kind: String,
    pub team_id: Option<Uuid>,
    pub provider: Option<String>,
    pub availability_zone: Option<String>,
    pub deletion: Option<String>,
});

table!(host_tag, "host_tags", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub host_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    pub tag: String,
    pub created_at: i64,
});

table!(host_token, "host_tokens", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub host_id: Uuid,
    pub token_hash: Hidden,
    pub created_by: Option<Uuid>,
    pub created_at: i64,
    pub expires_at: i64,
    pub used_at: Option<i64>,
});

table!(host_refresh_token, "host_refresh_tokens", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub host_id: Uuid,
    pub token_hash: Hidden,
    pub created_at: i64,
    pub expires_at: i64,
    pub revoked_at: Option<i64>,
    pub superseded_at: Option<i64>,
});

table!(template, "templates", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Uuid,
    pub name: String,
    pub final_name: Option<String>,
    pub replaces: Option<Uuid>,
    pub kind: String,
    pub status: String,
    pub detail: String,
    pub progress_pct: i32,
    pub vcpus: i32,
    pub memory_mb: i32,
    pub disk_size_mb: i32,
    pub size_bytes: i64,
    pub created_at: i64,
    pub updated_at: i64,
});

table!(template_alias, "template_aliases", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub alias: String,
    pub template_name: String,
});

table!(template_host, "template_hosts", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub template_id: Uuid,
    #[sea_orm(primary_key, auto_increment = false)]
    pub host_id: Uuid,
    pub status: String,
    pub detail: String,
    pub progress_pct: i32,
    pub size_bytes: i64,
    pub updated_at: i64,
});

table!(sandbox, "sandboxes", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Uuid,
    pub host_id: Option<Uuid>,
    pub template_id: Uuid,
    pub template_team_id: Uuid,
    pub template_name: String,
    pub status: String,
    pub previous_status: Option<String>,
    pub generation: i64,
    pub snapshot_template_id: Option<Uuid>,
    pub vcpus: i32,
    pub memory_mb: i32,
    pub disk_size_mb: i32,
    pub timeout_sec: i32,
    pub metadata: String,
    pub envs: Hidden,
    pub error_code: Option<String>,
    pub error_message: Option<String>,
    pub error_console: Option<String>,
    pub error_generation: Option<i64>,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub last_active_at: Option<i64>,
    pub updated_at: i64,
    pub status_at: i64,
    pub actor_type: Option<String>,
    pub actor_id: Option<String>,
});

table!(event, "events", {
    #[sea_orm(primary_key)]
    pub id: i64,
    pub seq: Option<i64>,
    pub team_id: Uuid,
    pub kind: String,
    pub outcome: Option<String>,
    pub resource_type: String,
    pub resource_id: String,
    pub payload: String,
    pub created_at: i64,
    pub published_at: Option<i64>,
    pub consumed_at: Option<i64>,
    pub attempts: i32,
    pub actor_type: Option<String>,
    pub actor_id: Option<String>,
    pub actor_name: Option<String>,
});

table!(event_cursor, "event_cursor", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: i32,
    pub value: i64,
});

table!(lease, "leases", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub name: String,
    pub holder: Uuid,
    pub expires_at: i64,
});

table!(audit_log, "audit_logs", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Option<Uuid>,
    pub actor_type: String,
    pub actor_id: Option<String>,
    pub action: String,
    pub resource_type: String,
    pub resource_id: Option<String>,
    pub status: Option<i32>,
    pub outcome: String,
    pub source_address: Option<String>,
    pub created_at: i64,
});

table!(channel, "channels", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Uuid,
    pub name: String,
    pub provider: String,
    pub config: Hidden,
    pub events: String,
    pub created_by: Option<Uuid>,
    pub created_at: i64,
    pub updated_at: i64,
    pub delivered_at: Option<i64>,
    pub failed_at: Option<i64>,
    pub last_error: Option<String>,
});

table!(channel_delivery, "channel_deliveries", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub channel_id: Uuid,
    pub event_id: Uuid,
    pub event: String,
    pub status: String,
    pub attempts: i32,
    pub next_at: i64,
    pub last_error: Option<String>,
    pub created_at: i64,
});

table!(idempotency_key, "idempotency_keys", {
    #[sea_orm(primary_key, auto_increment = false)]
    pub scope: String,
    pub request_hash: String,
    pub claim: Uuid,
    pub claim_ends_at: i64,
    pub status: Option<i32>,
    pub body: Option<Hidden>,
    pub expires_at: i64,
});

#[cfg(test)]
mod tests {
    use sea_orm::ActiveValue::Set;

    use super::Hidden;

    #[test]
    fn columns_with_secrets_are_not_shown() {
        let marker = || Hidden::from("hunter2");
        let id = uuid::Uuid::nil();
        let rows = [
            format!(
                "{:?}",
                super::user::ActiveModel {
                    password_hash: Set(Some(marker())),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::email_token::ActiveModel {
                    token_hash: Set(marker()),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::api_key::ActiveModel {
                    key_hash: Set(marker()),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::host::ActiveModel {
                    rpc_token: Set(marker()),
                    token_hash: Set(Some(marker())),
                    previous_token_hash: Set(Some(marker())),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::host_token::ActiveModel {
                    token_hash: Set(marker()),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::host_refresh_token::ActiveModel {
                    token_hash: Set(marker()),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::sandbox::ActiveModel {
                    envs: Set(marker()),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::channel::ActiveModel {
                    config: Set(marker()),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                super::idempotency_key::Model {
                    scope: String::new(),
                    request_hash: String::new(),
                    claim: id,
                    claim_ends_at: 0,
                    status: None,
                    body: Some(marker()),
                    expires_at: 0,
                }
            ),
        ];
        for row in rows {
            assert!(row.contains("Hidden(…)") && !row.contains("hunter2"), "{row}");
        }
    }
}
