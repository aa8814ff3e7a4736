//! Wrenn's control plane: the public API, the business logic behind it, and the database.
//!
//! ```text
//!  api/ (HTTP)  ──▶  service/ (decisions)  ──▶  store/ (SQL)
//!                        │   ▲
//!                        ▼   │
//!                     hosts/ (RPC)   events/ (what changed)
//! ```
//!
//! Handlers never touch the database, services never touch HTTP types, and nothing here depends on the
//! host agent's code: the two meet in `wrenn-proto`. [`ControlPlane`] puts the parts together.
#![forbid(unsafe_code)]

mod api;
mod auth;
pub mod config;
pub mod domain;
pub mod error;
mod events;
pub mod extension;
mod hosts;
mod mail;
mod outbound;
mod serve;
mod service;
pub mod services;
mod store;
mod tasks;

use std::future::Future;
use std::sync::Arc;

use tokio::net::TcpListener;

pub use api::{openapi_json, openapi_yaml};
pub use auth::secrets::MasterSecret;
pub use config::ControlConfig;
pub use error::{Error, ErrorCode, Result};
pub use service::Services;
pub use service::bootstrap::{Bootstrap, HostToken};
pub use service::events::RelayPass;
pub use service::monitor::MonitorPass;
pub use wrenn_proto::rest::Secret;
pub use {axum, jiff, sea_orm, sea_orm_migration, utoipa, utoipa_axum};

use domain::{HostId, TeamId, UserId};
use extension::{Extension, Extensions};

/// Builds a [`ControlPlane`].
#[derive(Debug)]
#[must_use = "nothing happens until it is built"]
pub struct ControlPlaneBuilder {
    config: ControlConfig,
    extensions: Extensions,
}

impl ControlPlaneBuilder {
    /// Adds an extension; middleware of later ones is further out.
    pub fn extension(mut self, extension: impl Extension) -> Self {
        self.extensions.add(extension);
        self
    }

    /// Opens the database, brings its schema up to date, and takes up what an earlier process left
    /// unfinished.
    ///
    /// # Errors
    /// The database cannot be opened or migrated, or an extension's name is unusable.
    pub async fn build(self) -> Result<ControlPlane> {
        let Self { config, extensions } = self;
        extensions.check()?;
        let store = open_store(&config, &extensions).await?;
        let services = Services::new(config, store, extensions.clone())?;
        Ok(ControlPlane { services, extensions })
    }
}

/// A step of a database's schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationState {
    /// Its name; names are in the order of application.
    pub name: String,
    /// Whether the database has it.
    pub applied: bool,
    /// Whether this program has it; a newer one made it otherwise.
    pub known: bool,
}

async fn open_store(config: &ControlConfig, extensions: &Extensions) -> Result<store::Store> {
    if config.database_url.is_some() && config.secret.is_none() {
        return Err(Error::invalid(
            "with PostgreSQL the installation's secret key has to be given, the same for all control planes: set \
             WRENN_SECRET_KEY to the output of `openssl rand -hex 32`, and keep it",
        ));
    }
    store::Store::open(
        config.database_url.as_deref(),
        &config.data_dir,
        config.database,
        extensions,
    )
    .await
    .map_err(unopened)
}

/// The operator who starts a program reads its errors, unlike a client.
fn unopened(cause: sea_orm::DbErr) -> Error {
    let message = match &cause {
        sea_orm::DbErr::Migration(told) => told.clone(),
        other if store::is_unavailable(other) => format!("the database cannot be reached: {other}"),
        other => format!("the database cannot be used: {other}"),
    };
    Error {
        message,
        ..Error::from(cause)
    }
}

/// A control plane. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct ControlPlane {
    services: Services,
    extensions: Extensions,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane")
            .field("config", &self.services.config)
            .finish_non_exhaustive()
    }
}

impl ControlPlane {
    /// Brings a database's schema up to date without serving; returns where it stands then. Extensions' tables are
    /// left alone: a program with extensions migrates them when it starts.
    ///
    /// # Errors
    /// The database cannot be opened or migrated, or is newer than this program.
    pub async fn migrate(config: &ControlConfig) -> Result<Vec<MigrationState>> {
        open_store(config, &Extensions::default()).await?.close().await?;
        Self::migration_status(config).await
    }

    /// Where a database's schema stands: every migration that this program knows, oldest first, then those that it
    /// does not know. Changes nothing.
    ///
    /// # Errors
    /// The database cannot be opened.
    pub async fn migration_status(config: &ControlConfig) -> Result<Vec<MigrationState>> {
        let store::Schema { known, unknown } =
            store::Store::schema(config.database_url.as_deref(), &config.data_dir)
                .await
                .map_err(unopened)?;
        let known = known.into_iter().map(|(name, applied)| MigrationState {
            name,
            applied,
            known: true,
        });
        let unknown = unknown.into_iter().map(|name| MigrationState {
            name,
            applied: true,
            known: false,
        });
        Ok(known.chain(unknown).collect())
    }

    /// Starts with a configuration.
    pub fn builder(config: ControlConfig) -> ControlPlaneBuilder {
        ControlPlaneBuilder {
            config,
            extensions: Extensions::default(),
        }
    }

    /// On an empty database: creates an admin, a team and an API key, whose secret is returned this
    /// once. `None` on every later start.
    ///
    /// # Errors
    /// The database failed.
    pub async fn bootstrap(&self) -> Result<Option<Bootstrap>> {
        self.services.bootstrap().await
    }

    /// Creates a further team with an API key, and returns the key's secret.
    ///
    /// # Errors
    /// The database failed.
    pub async fn create_team(&self, name: &str) -> Result<(TeamId, String)> {
        self.services.create_team(name).await
    }

    /// Makes the account of an address a platform admin; `None` when there is no such account.
    ///
    /// # Errors
    /// The database failed.
    pub async fn grant_platform_admin(&self, email: &str) -> Result<Option<UserId>> {
        self.services.grant_platform_admin(email).await
    }

    /// Creates a platform admin with a team of their own; without a name, the address gives one.
    ///
    /// # Errors
    /// The address, the name or the password is not acceptable, there is such an account, or the database failed.
    pub async fn create_platform_admin(
        &self,
        email: &str,
        name: Option<&str>,
        password: &Secret,
    ) -> Result<UserId> {
        self.services.create_platform_admin(email, name, password).await
    }

    /// Sets an account's password, and ends its sessions.
    ///
    /// # Errors
    /// There is no such account, it is deactivated, the password is not acceptable, or the database failed.
    pub async fn set_password(&self, email: &str, password: &Secret) -> Result<UserId> {
        self.services.set_password(email, password).await
    }

    /// A one-time token (good for an hour) with which a host agent registers: as a new host, or again
    /// as the given one, which keeps its sandboxes.
    ///
    /// # Errors
    /// There is no such host, or the database failed.
    pub async fn issue_host_token(&self, host: Option<HostId>) -> Result<HostToken> {
        self.services.issue_host_token(host).await
    }

    /// Points a template alias at a platform template, so that clients can use either name.
    ///
    /// # Errors
    /// A name is malformed, or the database failed.
    pub async fn set_template_alias(&self, alias: &str, template: &str) -> Result<()> {
        self.services.set_template_alias(alias, template).await
    }

    /// Runs one pass of the monitor now: silent hosts, lost operations, orphans.
    ///
    /// # Errors
    /// The database failed.
    pub async fn reconcile(&self) -> Result<MonitorPass> {
        self.services.monitor_pass().await
    }

    /// Tells now what happened and was not told yet; returns how much that was.
    ///
    /// # Errors
    /// The database failed, or Redis is away.
    pub async fn relay(&self) -> Result<RelayPass> {
        self.services.relay_pass().await
    }

    /// Removes events now that streams need not come back to any more; returns how many.
    ///
    /// # Errors
    /// The database failed.
    pub async fn prune_events(&self) -> Result<u64> {
        self.services.prune_events().await
    }

    /// Renews this instance's leases now; returns whether the background passes are its own.
    ///
    /// # Errors
    /// The database failed.
    pub async fn renew_leases(&self) -> Result<bool> {
        self.services.lease_pass().await
    }

    /// Creates an active user with a default team of their own, whose name is theirs; without a password hash (Argon2's
    /// text form) they cannot log in with a password. For operators and tests: people sign up.
    ///
    /// # Errors
    /// The address is taken, or the database failed.
    pub async fn create_user(&self, email: &str, name: &str, password_hash: Option<&str>) -> Result<UserId> {
        self.services.create_user(email, name, password_hash).await
    }

    /// A session token for a user in a team, or in the one that they work in by default. For operators and tests: people
    /// log in.
    ///
    /// # Errors
    /// There is no such user, they are not in the team, or the database failed.
    pub async fn issue_session(&self, user: UserId, team: Option<TeamId>) -> Result<String> {
        self.services.issue_session(user, team).await
    }

    /// Takes up all deletions of teams that are not finished; returns how many still are not, for example because a host
    /// is away.
    ///
    /// # Errors
    /// The database failed.
    pub async fn deletion_pass(&self) -> Result<usize> {
        self.services.deletion_pass().await
    }

    /// Deletes the accounts whose grace is over for good; returns how many.
    ///
    /// # Errors
    /// The database failed.
    pub async fn hard_delete_pass(&self) -> Result<u64> {
        self.services.hard_delete_pass().await
    }

    /// Writes down when keys were last used, which otherwise happens every few seconds.
    ///
    /// # Errors
    /// The database failed.
    pub async fn write_key_uses(&self) -> Result<()> {
        self.services.write_key_uses().await
    }

    /// Tells a team's channels of an event; they hear of it in the background. Repeating it is harmless.
    ///
    /// # Errors
    /// The database failed.
    pub async fn notify(&self, event: &domain::around::ChannelEvent) -> Result<()> {
        self.services.channels_on_event(event).await
    }

    /// Tries now to deliver the messages to channels that are due; returns how many were tried.
    ///
    /// # Errors
    /// The database failed.
    pub async fn deliver_notifications(&self) -> Result<usize> {
        self.services.deliver_pass().await
    }

    /// Samples now what each team's running sandboxes hold, as of the given time.
    ///
    /// # Errors
    /// The database failed.
    pub async fn sample_metrics(&self, at: domain::Millis) -> Result<()> {
        self.services.sample_pass(at).await
    }

    /// Asks all hosts now what their sandboxes use, as of the given time.
    ///
    /// # Errors
    /// The database failed.
    pub async fn collect_sandbox_metrics(&self, at: domain::Millis) -> Result<()> {
        self.services.sandbox_metrics_pass(at).await
    }

    /// Adds running times up to the given moment to the days' usage.
    ///
    /// # Errors
    /// The database failed.
    pub async fn accrue_usage(&self, until: domain::Millis) -> Result<()> {
        self.services.usage_pass(until).await
    }

    /// Removes what is too old at the given time: audit entries, samples, messages that ended, kept answers.
    ///
    /// # Errors
    /// The database failed.
    pub async fn prune(&self, now: domain::Millis) -> Result<()> {
        self.services.prune_pass(now).await
    }

    /// The HTTP API.
    pub fn router(&self) -> axum::Router {
        api::router(self.services.clone(), &self.extensions)
    }

    /// The business logic, as extensions get it.
    #[must_use]
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Starts the background work: operations that an earlier process left unfinished, and the monitor.
    /// [`ControlPlane::run`] does this by itself.
    ///
    /// # Errors
    /// The database failed.
    pub async fn start_background(&self) -> Result<()> {
        self.services.take_up_unfinished().await?;
        self.services.start_leadership().await;
        self.services.start_monitor();
        self.services.start_events();
        self.services.start_pruning();
        self.services.start_housekeeping();
        self.services.start_around();
        self.extensions.start_workers(&self.services);
        Ok(())
    }

    /// Serves on all listeners until `shutdown` resolves, then ends in order: listeners, open
    /// connections and background work within the grace, the database last.
    ///
    /// # Errors
    /// The database failed at the start, or a listener failed.
    pub async fn run(
        self,
        listeners: Vec<TcpListener>,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        self.start_background().await?;
        let config = &self.services.config;
        if config.smtp.is_none() && !config.log_links {
            tracing::warn!("no mail server is set (WRENN_SMTP_URL): links for lost passwords go nowhere");
        }
        let closing = self.services.tasks.closing().clone();
        let grace = self.services.config.timings.shutdown_grace;
        // Describing and assembling the API is work; the listeners share one.
        let router = self.router();
        let mut servers = tokio::task::JoinSet::new();
        let places = Arc::new(tokio::sync::Semaphore::new(
            self.services.config.limits.max_connections,
        ));
        for listener in listeners {
            servers.spawn(serve::serve(
                listener,
                router.clone(),
                self.services.config.timings.connection_idle,
                Arc::clone(&places),
                closing.clone(),
            ));
        }
        let mut failed = None;
        tokio::pin!(shutdown);
        tokio::select! {
            () = &mut shutdown => {}
            Some(ended) = servers.join_next() => {
                failed = Some(ended.map_or_else(Error::internal, |()| Error::internal("a listener ended by itself")));
            }
        }
        closing.cancel();
        let drained =
            tokio::time::timeout(grace, async { while servers.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            tracing::warn!("connections were still open at the end of the grace and are cut");
            servers.shutdown().await;
        }
        self.stop().await;
        failed.map_or(Ok(()), Err)
    }

    /// Ends the background work and closes the database. [`ControlPlane::run`] does this by itself.
    pub async fn stop(&self) {
        self.services
            .tasks
            .shut_down(self.services.config.timings.shutdown_grace)
            .await;
        self.services.audit_finish().await;
        if let Err(error) = self.services.write_key_uses().await {
            tracing::warn!(%error, "the last uses of keys were not written down");
        }
        self.services.resign().await;
        self.services.leave_stream().await;
        if let Err(error) = self.services.store.clone().close().await {
            tracing::warn!(%error, "the database did not close cleanly");
        }
    }
}
