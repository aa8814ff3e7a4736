//! Accounts, hosts, templates and sandboxes, and the platform's own rows.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, boolean, integer, pk_uuid, string, string_null, text, text_null, uuid,
    uuid_null,
};
use wrenn_proto::id::{TeamId, TemplateId};

use super::{index, reference, table};

pub(super) struct Initial;

impl MigrationName for Initial {
    fn name(&self) -> &'static str {
        "m0001_initial"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Initial {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in accounts()
            .into_iter()
            .chain(hosts())
            .chain(templates())
            .chain(sandboxes())
        {
            manager.create_table(statement).await?;
        }
        for statement in indexes() {
            manager.create_index(statement).await?;
        }
        platform_rows(manager).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in [
            "sandboxes",
            "template_hosts",
            "template_aliases",
            "templates",
            "host_refresh_tokens",
            "host_tokens",
            "hosts",
            "team_api_keys",
            "users_teams",
            "teams",
            "users",
        ] {
            manager.drop_table(Table::drop().table(name).to_owned()).await?;
        }
        Ok(())
    }
}

fn accounts() -> Vec<TableCreateStatement> {
    vec![
        table("users")
            .col(pk_uuid("id"))
            .col(string("email").unique_key())
            .col(string("name"))
            .col(string_null("password_hash"))
            .col(boolean("is_admin").default(false))
            .col(string("status"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .to_owned(),
        table("teams")
            .col(pk_uuid("id"))
            .col(string("name"))
            .col(string("slug").unique_key())
            .col(big_integer("created_at"))
            .col(big_integer_null("deleted_at"))
            .to_owned(),
        table("users_teams")
            .col(uuid("user_id"))
            .col(uuid("team_id"))
            .col(string("role"))
            .col(boolean("is_default").default(false))
            .col(big_integer("created_at"))
            .primary_key(Index::create().col("user_id").col("team_id"))
            .foreign_key(&mut reference(
                ("users_teams", "user_id"),
                "users",
                ForeignKeyAction::Cascade,
            ))
            .foreign_key(&mut reference(
                ("users_teams", "team_id"),
                "teams",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
        table("team_api_keys")
            .col(pk_uuid("id"))
            .col(uuid("team_id"))
            .col(string("name"))
            .col(string("key_hash").unique_key())
            .col(string("key_prefix"))
            .col(uuid_null("created_by"))
            .col(big_integer("created_at"))
            .col(big_integer_null("last_used"))
            .foreign_key(&mut reference(
                ("team_api_keys", "team_id"),
                "teams",
                ForeignKeyAction::Cascade,
            ))
            .foreign_key(&mut reference(
                ("team_api_keys", "created_by"),
                "users",
                ForeignKeyAction::SetNull,
            ))
            .to_owned(),
    ]
}

fn hosts() -> Vec<TableCreateStatement> {
    vec![
        table("hosts")
            .col(pk_uuid("id"))
            .col(string("status"))
            .col(string("arch"))
            .col(string("address"))
            .col(string("rpc_token"))
            .col(string_null("token_hash").unique_key())
            .col(big_integer_null("token_expires_at"))
            .col(string_null("previous_token_hash"))
            .col(integer("cpu_cores"))
            .col(big_integer("memory_mb"))
            .col(big_integer("disk_gb"))
            .col(big_integer("memory_available_mb"))
            .col(big_integer("disk_available_mb"))
            .col(string("version"))
            .col(uuid_null("created_by"))
            .col(big_integer_null("last_heartbeat_at"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .foreign_key(&mut reference(
                ("hosts", "created_by"),
                "users",
                ForeignKeyAction::SetNull,
            ))
            .to_owned(),
        table("host_tokens")
            .col(pk_uuid("id"))
            .col(uuid("host_id"))
            .col(string("token_hash").unique_key())
            .col(uuid_null("created_by"))
            .col(big_integer("created_at"))
            .col(big_integer("expires_at"))
            .col(big_integer_null("used_at"))
            .foreign_key(&mut reference(
                ("host_tokens", "host_id"),
                "hosts",
                ForeignKeyAction::Cascade,
            ))
            .foreign_key(&mut reference(
                ("host_tokens", "created_by"),
                "users",
                ForeignKeyAction::SetNull,
            ))
            .to_owned(),
        table("host_refresh_tokens")
            .col(pk_uuid("id"))
            .col(uuid("host_id"))
            .col(string("token_hash").unique_key())
            .col(big_integer("created_at"))
            .col(big_integer("expires_at"))
            .col(big_integer_null("revoked_at"))
            .foreign_key(&mut reference(
                ("host_refresh_tokens", "host_id"),
                "hosts",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
    ]
}

fn templates() -> Vec<TableCreateStatement> {
    vec![
        table("templates")
            .col(pk_uuid("id"))
            .col(uuid("team_id"))
            .col(string("name"))
            // A template that will replace another has a provisional name until it is ready.
            .col(string_null("final_name"))
            .col(uuid_null("replaces"))
            .col(string("kind"))
            .col(string("status"))
            .col(text("detail"))
            .col(integer("progress_pct"))
            .col(integer("vcpus"))
            .col(integer("memory_mb"))
            .col(integer("disk_size_mb"))
            .col(big_integer("size_bytes"))
            .col(big_integer("created_at"))
            .col(big_integer("updated_at"))
            .foreign_key(&mut reference(
                ("templates", "team_id"),
                "teams",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
        // Other names of platform templates: data, so that an SDK's default can be pointed anywhere.
        table("template_aliases")
            .col(string("alias").primary_key())
            .col(string("template_name"))
            .to_owned(),
        // Which host holds which template's files.
        table("template_hosts")
            .col(uuid("template_id"))
            .col(uuid("host_id"))
            .col(string("status"))
            .col(text("detail"))
            .col(integer("progress_pct"))
            .col(big_integer("size_bytes"))
            .col(big_integer("updated_at"))
            .primary_key(Index::create().col("template_id").col("host_id"))
            .foreign_key(&mut reference(
                ("template_hosts", "template_id"),
                "templates",
                ForeignKeyAction::Cascade,
            ))
            .foreign_key(&mut reference(
                ("template_hosts", "host_id"),
                "hosts",
                ForeignKeyAction::Cascade,
            ))
            .to_owned(),
    ]
}

fn sandboxes() -> Vec<TableCreateStatement> {
    vec![
        table("sandboxes")
            .col(pk_uuid("id"))
            .col(uuid("team_id"))
            .col(uuid_null("host_id"))
            // No foreign key: a sandbox outlives its template's row.
            .col(uuid("template_id"))
            .col(uuid("template_team_id"))
            .col(string("template_name"))
            .col(string("status"))
            .col(string_null("previous_status"))
            .col(big_integer("generation"))
            .col(uuid_null("snapshot_template_id"))
            .col(integer("vcpus"))
            .col(integer("memory_mb"))
            .col(integer("disk_size_mb"))
            .col(integer("timeout_sec"))
            .col(text("metadata"))
            .col(text("envs"))
            .col(string_null("error_code"))
            .col(text_null("error_message"))
            .col(text_null("error_console"))
            .col(big_integer_null("error_generation"))
            .col(big_integer("created_at"))
            .col(big_integer_null("started_at"))
            .col(big_integer_null("last_active_at"))
            .col(big_integer("updated_at"))
            .col(big_integer("status_at"))
            // Restrict: a team or host goes only after its sandboxes have been destroyed.
            .foreign_key(&mut reference(
                ("sandboxes", "team_id"),
                "teams",
                ForeignKeyAction::Restrict,
            ))
            .foreign_key(&mut reference(
                ("sandboxes", "host_id"),
                "hosts",
                ForeignKeyAction::Restrict,
            ))
            .to_owned(),
    ]
}

fn indexes() -> Vec<IndexCreateStatement> {
    vec![
        index("idx_users_teams_team", "users_teams", &["team_id"], false),
        index("idx_team_api_keys_team", "team_api_keys", &["team_id"], false),
        index("idx_hosts_status", "hosts", &["status"], false),
        index(
            "idx_hosts_previous_token",
            "hosts",
            &["previous_token_hash"],
            false,
        ),
        index("idx_templates_team_name", "templates", &["team_id", "name"], true),
        index("idx_template_hosts_host", "template_hosts", &["host_id"], false),
        index(
            "idx_sandboxes_team_created",
            "sandboxes",
            &["team_id", "created_at"],
            false,
        ),
        index(
            "idx_sandboxes_host_status",
            "sandboxes",
            &["host_id", "status"],
            false,
        ),
        index("idx_sandboxes_status", "sandboxes", &["status"], false),
    ]
}

async fn platform_rows(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    let now = crate::domain::now();
    manager
        .execute(
            Query::insert()
                .into_table("teams")
                .columns(["id", "name", "slug", "created_at"])
                .values_panic([
                    TeamId::PLATFORM.0.into(),
                    "platform".into(),
                    "000000-000000".into(),
                    now.into(),
                ])
                .to_owned(),
        )
        .await?;
    manager
        .execute(
            Query::insert()
                .into_table("templates")
                .columns([
                    "id",
                    "team_id",
                    "name",
                    "kind",
                    "status",
                    "detail",
                    "progress_pct",
                    "vcpus",
                    "memory_mb",
                    "disk_size_mb",
                    "size_bytes",
                    "created_at",
                    "updated_at",
                ])
                .values_panic([
                    TemplateId::MINIMAL.0.into(),
                    TeamId::PLATFORM.0.into(),
                    "minimal".into(),
                    "base".into(),
                    "building".into(),
                    "waiting for a host".into(),
                    0.into(),
                    1.into(),
                    512.into(),
                    20_480.into(),
                    0i64.into(),
                    now.into(),
                    now.into(),
                ])
                .to_owned(),
        )
        .await
}
