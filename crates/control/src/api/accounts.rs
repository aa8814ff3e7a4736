//! Sign-up, login and a person's own account.

use utoipa_axum::router::OpenApiRouter;

use crate::service::Services;

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
}
