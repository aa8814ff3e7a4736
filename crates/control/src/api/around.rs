//! Audit log, notification channels, stats and usage.

use utoipa_axum::router::OpenApiRouter;

use crate::service::Services;

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
}
