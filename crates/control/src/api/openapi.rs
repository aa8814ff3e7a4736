//! The OpenAPI document, generated from the handlers.

use axum::http::Method;
use utoipa::OpenApi as _;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::schema::{Object, Type};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, OpenApi, Ref, RefOr, Required, ResponseBuilder};

/// Where sandboxes are, and their other name, which Wrenn's SDKs use; the handlers are the same.
pub(super) const SANDBOXES: &str = "/v1/sandboxes";
pub(super) const CAPSULES: &str = "/v1/capsules";
/// The header under which a create happens once.
const KEY: &str = "Idempotency-Key";

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
        (name = "hosts", description = "Hosts: how people manage them, and what their agents call"),
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

/// Adds what follows from an operation's path, credentials and body, and so needs no mention at each handler: the
/// answers of extractors, of hosts that are called, and of the database; the key under which a create happens once; and
/// the sandboxes' other name.
pub(super) fn complete(mut document: OpenApi) -> OpenApi {
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations(item) {
            complete_operation(path, &method, operation);
        }
    }
    let twins: Vec<_> = document
        .paths
        .paths
        .iter()
        .filter_map(|(path, item)| {
            let rest = path.strip_prefix(SANDBOXES)?;
            let mut twin = item.clone();
            for (_, operation) in operations(&mut twin) {
                operation.operation_id = operation.operation_id.as_ref().map(|id| format!("capsules_{id}"));
            }
            Some((format!("{CAPSULES}{rest}"), twin))
        })
        .collect();
    document.paths.paths.extend(twins);
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (Method, &mut Operation)> {
    let PathItem {
        get,
        put,
        post,
        delete,
        patch,
        ..
    } = item;
    [
        (Method::GET, get),
        (Method::PUT, put),
        (Method::POST, post),
        (Method::DELETE, delete),
        (Method::PATCH, patch),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

fn complete_operation(path: &str, method: &Method, operation: &mut Operation) {
    let asks_for = |scheme: &str| {
        let asked = operation.security.as_deref().unwrap_or_default();
        // A requirement shows its scheme's name in the document only.
        asked.iter().any(|requirement| {
            serde_json::to_value(requirement).is_ok_and(|shown| shown.get(scheme).is_some())
        })
    };
    let keyed = asks_for("api_key");
    let known = keyed || asks_for("session") || asks_for("host_token");
    let body = operation.request_body.is_some();
    let input = body || operation.parameters.is_some();
    let host = calls_host(path, method);
    let once = super::audit::takes_key(method, path);
    let answers = [
        (
            input,
            "400",
            "`invalid_request`: a value is malformed or out of range",
        ),
        (known, "401", "`unauthorized`"),
        (
            keyed,
            "403",
            "`forbidden`: a session of a person in no active team",
        ),
        (host, "403", "`forbidden`: the guest denied it"),
        (
            once,
            "409",
            "`conflict`: the `Idempotency-Key` was used for another request, or its request is under way",
        ),
        (body, "413", "`payload_too_large`"),
        (true, "500", "`internal_error`"),
        (host, "502", "`agent_error`: the host or the guest failed"),
        (
            host,
            "503",
            "`no_capacity`, `host_unavailable`: the host has no room, or cannot be reached",
        ),
        (
            true,
            "503",
            "`database_unavailable`: the database does not answer; `Retry-After` says when to try again",
        ),
        (
            host,
            "504",
            "`timeout`: the host or the guest took longer than allowed",
        ),
    ];
    for (applies, status, words) in answers {
        if applies {
            describe(operation, status, words);
        }
    }
    let has_key = operation.parameters.iter().flatten().any(
        |parameter| matches!(parameter, RefOr::T(parameter) if parameter.name.eq_ignore_ascii_case(KEY)),
    );
    if once && !has_key {
        let key = ParameterBuilder::new()
            .name(KEY)
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some("Repeated under one key within a day, it happens once"))
            .schema(Some(Object::with_type(Type::String)))
            .build();
        operation.parameters.get_or_insert_default().push(RefOr::T(key));
    }
}

/// Whether an operation goes on to a host: what it does to one sandbox, and what makes or removes files there. Reading
/// a record calls nobody.
fn calls_host(path: &str, method: &Method) -> bool {
    let reads = *method == Method::GET;
    for base in [SANDBOXES, "/v1/admin/capsules"] {
        match path.strip_prefix(base) {
            Some("" | "/{id}") => return !reads,
            Some(rest) if rest.starts_with("/{id}/") => return true,
            _ => {}
        }
    }
    path.starts_with("/v1/snapshots") && !reads || path.starts_with("/v1/admin/templates/")
}

/// Adds an answer, or its words to those that the handler has for the status already.
fn describe(operation: &mut Operation, status: &str, words: &str) {
    let responses = &mut operation.responses.responses;
    match responses.get_mut(status) {
        None => {
            let body = Content::new(Some(Ref::from_schema_name("ErrorBody")));
            let response = ResponseBuilder::new()
                .description(words)
                .content("application/json", body)
                .build();
            responses.insert(status.to_owned(), response.into());
        }
        Some(RefOr::T(response)) => {
            let code = words.split(':').next().unwrap_or(words);
            // The handler knows better what a code means here.
            if !response.description.contains(code) {
                response.description = format!("{}; {words}", response.description);
            }
        }
        Some(RefOr::Ref(_)) => {}
    }
}

/// The OpenAPI document as YAML, as committed in `openapi.yaml` and served at `/openapi.yaml`.
///
/// # Errors
/// The document cannot be written as YAML (a fault of the program).
pub fn openapi_yaml() -> crate::Result<String> {
    document().to_yaml().map_err(crate::Error::internal)
}

/// The same as JSON, as served at `/openapi.json`.
///
/// # Errors
/// The document cannot be written as JSON (a fault of the program).
pub fn openapi_json() -> crate::Result<String> {
    document().to_json().map_err(crate::Error::internal)
}
