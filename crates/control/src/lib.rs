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
mod hosts;
mod service;
mod store;
mod tasks;

use std::future::{Future, IntoFuture};

use tokio::net::TcpListener;

pub use api::openapi_yaml;
pub use auth::secrets::MasterSecret;
pub use config::ControlConfig;
pub use error::{Error, ErrorCode, Result};
pub use service::bootstrap::{Bootstrap, HostToken};
pub use service::monitor::MonitorPass;

use domain::{HostId, TeamId};
use service::Services;

/// Builds a [`ControlPlane`].
#[derive(Debug)]
pub struct ControlPlaneBuilder {
    config: ControlConfig,
}

impl ControlPlaneBuilder {
    /// Opens the database, brings its schema up to date, and takes up what an earlier process left
    /// unfinished.
    ///
    /// # Errors
    /// The database cannot be opened or migrated.
    pub async fn build(self) -> Result<ControlPlane> {
        let Self { config } = self;
        let store = store::Store::open(config.database_url.as_deref(), &config.data_dir).await?;
        let services = Services::new(config, store)?;
        Ok(ControlPlane { services })
    }
}

/// A control plane. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct ControlPlane {
    services: Services,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane")
            .field("config", &self.services.config)
            .finish_non_exhaustive()
    }
}

impl ControlPlane {
    /// Starts with a configuration.
    #[must_use]
    pub fn builder(config: ControlConfig) -> ControlPlaneBuilder {
        ControlPlaneBuilder { config }
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
        api::router(self.services.clone())
    }

    /// Starts the background work: operations that an earlier process left unfinished, and the monitor.
    /// [`ControlPlane::run`] does this by itself.
    ///
    /// # Errors
    /// The database failed.
    pub async fn start_background(&self) -> Result<()> {
        self.services.take_up_unfinished().await?;
        self.services.start_monitor();
        self.services.start_around();
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
        let closing = self.services.tasks.closing().clone();
        let grace = self.services.config.timings.shutdown_grace;
        let mut servers = tokio::task::JoinSet::new();
        for listener in listeners {
            let signal = closing.clone().cancelled_owned();
            let router = self.router();
            servers.spawn(
                axum::serve(listener, router)
                    .with_graceful_shutdown(signal)
                    .into_future(),
            );
        }
        let mut failed = None;
        tokio::pin!(shutdown);
        tokio::select! {
            () = &mut shutdown => {}
            Some(ended) = servers.join_next() => {
                failed = Some(ended.map_or_else(Error::internal, |served| {
                    served.map_or_else(Error::internal, |()| Error::internal("a listener ended by itself"))
                }));
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
        if let Err(error) = self.services.store.clone().close().await {
            tracing::warn!(%error, "the database did not close cleanly");
        }
    }
}
