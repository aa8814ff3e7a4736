//! The OpenAPI document, generated from the handlers.

use utoipa::OpenApi as _;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, OpenApi, Ref, RefOr, Response, ResponseBuilder};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Wrenn",
        version = "1",
        description = "Sandboxes: microVMs for untrusted code. `/v1/capsules` is another name of \
                       `/v1/sandboxes` with the same operations. Every error has the body \
                       `{\"error\":{\"code\",\"message\"}}`; the codes are stable.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    modifiers(&Schemes),
    tags(
        (name = "sandboxes", description = "Life of sandboxes"),
        (name = "processes", description = "Programs in a sandbox"),
        (name = "files", description = "Files in a sandbox"),
        (name = "templates", description = "What sandboxes start from"),
        (name = "accounts", description = "People: sign-up, sessions, their own data"),
        (name = "teams", description = "Teams, members and API keys"),
        (name = "events", description = "State changes as they happen"),
        (name = "channels", description = "Where state changes are told: webhooks and chats"),
        (name = "audit", description = "Who did what"),
        (name = "admin", description = "What platform admins see and do"),
        (name = "hosts", description = "What host agents call"),
        (name = "service", description = "The server itself"),
    )
)]
struct Document;

struct Schemes;

impl utoipa::Modify for Schemes {
    fn modify(&self, document: &mut OpenApi) {
        let components = document.components.get_or_insert_with(Default::default);
        components.add_security_scheme(
            "api_key",
            SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description(
                "X-API-Key",
                "A team's key, `wrn_…`; also accepted as `Authorization: Bearer wrn_…`",
            ))),
        );
        components.add_security_scheme(
            "session",
            SecurityScheme::Http(
                HttpBuilder::new()
                    .scheme(HttpAuthScheme::Bearer)
                    .bearer_format("JWT")
                    .description(Some("A person's session, from `POST /v1/auth/login`"))
                    .build(),
            ),
        );
        components.add_security_scheme(
            "host_token",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        );
    }
}

pub(super) fn base() -> OpenApi {
    Document::openapi()
}

/// The document of the whole API.
pub(super) fn document() -> OpenApi {
    let mut document = super::documented().into_openapi();
    for (path, item) in &mut document.paths.paths {
        if !path.starts_with("/v1/") {
            continue;
        }
        let operations = [
            &mut item.get,
            &mut item.put,
            &mut item.post,
            &mut item.delete,
            &mut item.patch,
        ];
        for operation in operations.into_iter().flatten() {
            // Whatever is asked, the database may be away; said here rather than at every handler.
            operation
                .responses
                .responses
                .entry("503".to_owned())
                .or_insert_with(database_unavailable);
        }
    }
    document
}

fn database_unavailable() -> RefOr<Response> {
    let body = Content::new(Some(Ref::from_schema_name("ErrorBody")));
    ResponseBuilder::new()
        .description("`database_unavailable`")
        .content("application/json", body)
        .build()
        .into()
}

/// The OpenAPI document as YAML, as committed in `openapi.yaml` and served at `/openapi.yaml`.
///
/// # Errors
/// The document cannot be written as YAML (a fault of the program).
pub fn openapi_yaml() -> crate::Result<String> {
    document().to_yaml().map_err(crate::Error::internal)
}
