//! The OpenAPI document, generated from the handlers.

use utoipa::OpenApi as _;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, OpenApi, Ref, ResponseBuilder};

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
    complete(super::documented().into_openapi())
}

/// Adds the answers that need no mention at each handler, since extractors and the database give them everywhere.
pub(super) fn complete(mut document: OpenApi) -> OpenApi {
    for item in document.paths.paths.values_mut() {
        let operations = [
            &mut item.get,
            &mut item.put,
            &mut item.post,
            &mut item.delete,
            &mut item.patch,
        ];
        for operation in operations.into_iter().flatten() {
            let takes_input = operation.request_body.is_some() || operation.parameters.is_some();
            let answers = [
                (
                    takes_input,
                    "400",
                    "`invalid_request`: a value is malformed or out of range",
                ),
                (true, "500", "`internal_error`"),
                (
                    true,
                    "503",
                    "The server cannot work at the moment; `Retry-After` says when to try again",
                ),
            ];
            for (applies, status, words) in answers {
                if applies && !operation.responses.responses.contains_key(status) {
                    let body = Content::new(Some(Ref::from_schema_name("ErrorBody")));
                    let response = ResponseBuilder::new()
                        .description(words)
                        .content("application/json", body)
                        .build();
                    operation
                        .responses
                        .responses
                        .insert(status.to_owned(), response.into());
                }
            }
        }
    }
    document
}

/// The OpenAPI document as YAML, as committed in `openapi.yaml` and served at `/openapi.yaml`.
///
/// # Errors
/// The document cannot be written as YAML (a fault of the program).
pub fn openapi_yaml() -> crate::Result<String> {
    document().to_yaml().map_err(crate::Error::internal)
}
