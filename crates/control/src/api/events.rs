//! The stream of state changes.

use utoipa_axum::router::OpenApiRouter;

use crate::service::Services;

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
}
