//! Teams, members, API keys, user search, and the platform admin's view of them.

use utoipa_axum::router::OpenApiRouter;

use crate::service::Services;

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
}
