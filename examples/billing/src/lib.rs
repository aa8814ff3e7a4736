//! Billing as an extension of a Wrenn control plane.
//!
//! It brings everything that an extension can bring: [routes](api), [middleware](gate), a [worker](close),
//! [tables](migration), and an ear for [what happens](Billing), all on the services that the built-in API stands on. Copy it to begin your own.
#![forbid(unsafe_code)]

pub mod api;
pub mod close;
pub mod gate;
pub mod migration;
pub mod price;
mod table;

use std::time::Duration;

use wrenn_control::axum::{self, Router};
use wrenn_control::domain;
use wrenn_control::extension::{Event, EventFuture, Extension, Worker};
use wrenn_control::sea_orm_migration::MigrationTrait;
use wrenn_control::services::Services;
use wrenn_control::utoipa_axum::router::OpenApiRouter;

/// How often the worker looks whether a day has ended.
const EVERY: Duration = Duration::from_secs(15 * 60);

/// The extension.
#[derive(Debug, Clone, Copy, Default)]
pub struct Billing;

impl Extension for Billing {
    fn name(&self) -> &'static str {
        "billing"
    }

    fn migrations(&self) -> Vec<Box<dyn MigrationTrait>> {
        migration::all()
    }

    fn routes(&self) -> OpenApiRouter<Services> {
        api::routes()
    }

    fn wrap(&self, services: &Services, router: Router) -> Router {
        router.layer(axum::middleware::from_fn_with_state(
            services.clone(),
            gate::refuse_suspended,
        ))
    }

    fn on_event<'a>(&'a self, services: &'a Services, event: &'a Event) -> EventFuture<'a> {
        Box::pin(async move {
            if (event.kind, event.outcome) == ("capsule.create", Some("success")) {
                table::started(services.database(), event.seq, event.team, event.at).await?;
            }
            Ok(())
        })
    }

    fn workers(&self) -> Vec<Worker> {
        vec![Worker::new("billing", EVERY, |services| async move {
            close::days_before(&services, domain::now()).await
        })]
    }
}
