//! Extensions: what a program of one's own adds to a control plane without changing it.
//!
//! An extension brings routes, middleware around all routes, background workers, and tables with migrations of their
//! own, and hears what happens ([`Extension::on_event`]). All of them get [`Services`], which the built-in API itself
//! stands on: they authenticate with the same
//! extractors, act through the same business logic, and appear in the same OpenAPI document. The types of the methods
//! are in [`services`](crate::services); the libraries whose types are in the trait are re-exported at the crate's root.
//! `examples/billing` is one, and is tested with everything else.

use std::collections::HashSet;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use sea_orm_migration::MigrationTrait;
use utoipa_axum::router::OpenApiRouter;

pub use crate::api::{
    ApiError, ApiResult, Body, Caller, ClientAddress, Params, PlatformAdmin, Segments, Signed,
};
use crate::domain::event::{EventOutcome, StateEvent};
use crate::domain::{Millis, SandboxStatus, TeamId};
use crate::service::Services;
use crate::tasks::TaskKind;
use crate::{Error, Result};

/// How often an instance that does not lead looks whether it does by now.
const FOLLOWER_LOOK: Duration = Duration::from_secs(1);

/// What a program adds to its control plane. Everything but the name may be left out.
pub trait Extension: Send + Sync + 'static {
    /// Names it in logs and in the database: lower-case letters, digits and underscores, at most 40. It must never
    /// change, since the record of its migrations is kept under it.
    fn name(&self) -> &'static str;

    /// Its tables, oldest migration first. They run when the program starts, after the control plane's own and under the
    /// same lock; `wrenn migrate` does not know them. Their record is apart from the control plane's, so that neither
    /// minds the other's versions. Table names should begin with the extension's name.
    fn migrations(&self) -> Vec<Box<dyn MigrationTrait>> {
        Vec::new()
    }

    /// Its routes, described for the OpenAPI document, and asked for again when that is written. A path that exists
    /// already is a fault of the program: the start ends with a panic of the router, before anything is served.
    fn routes(&self) -> OpenApiRouter<Services> {
        OpenApiRouter::new()
    }

    /// Wraps the whole API, its own routes and other extensions' included; the last extension is outermost. What it
    /// refuses is in the audit log and in the metrics as other refusals are, provided that it adds layers to the router it
    /// gets ([`axum::Router::layer`]) rather than another router around it.
    fn wrap(&self, services: &Services, router: axum::Router) -> axum::Router {
        let _ = services;
        router
    }

    /// Hears of every state change of the installation, on whichever control plane takes the event in. The same event
    /// may come again (after a failure, a crash, or an outage of Redis), by its [`Event::seq`], and rarely out of order:
    /// handling it must be harmless when repeated. A failure, a panic, or [`EVENT_TIME`] without an answer brings the
    /// event back later, up to twenty times; what the platform itself does with an event is done before, and waits for
    /// no extension.
    fn on_event<'a>(&'a self, services: &'a Services, event: &'a Event) -> EventFuture<'a> {
        let _ = (services, event);
        Box::pin(std::future::ready(Ok(())))
    }

    /// Its background work.
    fn workers(&self) -> Vec<Worker> {
        Vec::new()
    }
}

/// What handling an event is.
pub type EventFuture<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// How long an extension may take over one event; others wait behind it.
pub const EVENT_TIME: Duration = Duration::from_secs(10);

/// Something that happened, in the words of `GET /v1/events/stream`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The place in the order of events: rises, and is never given twice in an installation.
    pub seq: i64,
    /// Whose it is; the platform team's for hosts.
    pub team: TeamId,
    /// `capsule.create`, `capsule.pause`, `host.up`, …
    pub kind: &'static str,
    /// How an action ended: `success` or `error`; absent for what is no action.
    pub outcome: Option<&'static str>,
    /// `sandbox`, `snapshot` or `host`.
    pub resource_type: &'static str,
    /// Its id.
    pub resource_id: String,
    /// A sandbox's status before.
    pub from: Option<SandboxStatus>,
    /// A sandbox's status from then on.
    pub to: Option<SandboxStatus>,
    /// When it happened.
    pub at: Millis,
}

impl From<&StateEvent> for Event {
    fn from(event: &StateEvent) -> Self {
        Self {
            seq: event.seq,
            team: event.team,
            kind: event.kind.as_str(),
            outcome: event.outcome.map(EventOutcome::as_str),
            resource_type: event.kind.resource_type(),
            resource_id: event.resource.clone(),
            from: event.payload.from,
            to: event.payload.to,
            at: event.at,
        }
    }
}

type Pass = dyn Fn(Services) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> + Send + Sync;

/// Work that is done again and again, by one control plane of the installation at a time.
#[derive(Clone)]
pub struct Worker {
    name: &'static str,
    every: Duration,
    pass: Arc<Pass>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.name)
            .field("every", &self.every)
            .finish_non_exhaustive()
    }
}

impl Worker {
    /// A worker whose `pass` runs at the start and then `every` so often. A pass that fails is logged and counted, and
    /// tried again at its next time; it should read everything afresh and be harmless when repeated.
    pub fn new<F>(
        name: &'static str,
        every: Duration,
        pass: impl Fn(Services) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        Self {
            name,
            every,
            pass: Arc::new(move |services| Box::pin(pass(services))),
        }
    }

    /// Runs one pass now; tests step a worker with it.
    ///
    /// # Errors
    /// What the pass says.
    pub async fn run_once(&self, services: &Services) -> Result<()> {
        (self.pass)(services.clone()).await
    }
}

/// The extensions of one control plane, in the order in which they were added.
#[derive(Clone, Default)]
pub(crate) struct Extensions(Vec<Arc<dyn Extension>>);

impl std::fmt::Debug for Extensions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|extension| extension.name()))
            .finish()
    }
}

impl Extensions {
    pub(crate) fn add(&mut self, extension: impl Extension) {
        self.0.push(Arc::new(extension));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &dyn Extension> {
        self.0.iter().map(|extension| &**extension)
    }

    /// Tells all of them of an event; the first failure is the answer.
    pub(crate) async fn tell(&self, services: &Services, event: &StateEvent) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let event = Event::from(event);
        let mut told = Ok(());
        for extension in self.iter() {
            let handled = AssertUnwindSafe(extension.on_event(services, &event)).catch_unwind();
            let handled = match tokio::time::timeout(EVENT_TIME, handled).await {
                Ok(Ok(handled)) => handled,
                Ok(Err(_)) => Err(Error::internal("it panicked")),
                Err(_) => Err(Error::internal("it took too long")),
            };
            if let Err(error) = handled {
                tracing::warn!(
                    extension = extension.name(),
                    seq = event.seq,
                    error = &error as &dyn std::error::Error,
                    "an extension did not take an event in"
                );
                told = told.and(Err(error));
            }
        }
        told
    }

    /// Names become parts of table names, so they are looked at before anything is done under them.
    pub(crate) fn check(&self) -> Result<()> {
        let mut seen = HashSet::new();
        for name in self.iter().map(Extension::name) {
            let fits = (1..=40).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
            if !fits {
                return Err(Error::invalid(format!(
                    "the extension's name '{name}' must be 1 to 40 lower-case letters, digits and underscores"
                )));
            }
            if !seen.insert(name) {
                return Err(Error::invalid(format!("two extensions are named '{name}'")));
            }
        }
        Ok(())
    }

    pub(crate) fn start_workers(&self, services: &Services) {
        for worker in self.iter().flat_map(Extension::workers) {
            let services = services.clone();
            services.clone().tasks.spawn(TaskKind::Extension, async move {
                loop {
                    if !services.leads() {
                        tokio::time::sleep(FOLLOWER_LOOK).await;
                        continue;
                    }
                    if let Err(error) = worker.run_once(&services).await {
                        metrics::counter!("wrenn_worker_failures_total", "worker" => worker.name)
                            .increment(1);
                        tracing::error!(
                            worker = worker.name,
                            error = &error as &dyn std::error::Error,
                            "a pass of an extension's worker failed"
                        );
                    }
                    tokio::time::sleep(worker.every).await;
                }
            });
        }
    }
}
