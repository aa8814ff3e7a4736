//! Pages for people who have no dashboard: where links in mails lead, where a login elsewhere comes back to, and the
//! little that is needed around these. One file for all; its script looks at the path, and calls the API's JSON routes.

use std::sync::LazyLock;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

use crate::service::Services;

const PAGE: &str = include_str!("../../assets/account.html");
/// Where the page names the ways to log in elsewhere.
const PROVIDERS: &str = "{providers}";

/// The paths that mails and callbacks name, and those that the page links to.
pub(super) const PATHS: [&str; 5] = ["/login", "/signup", "/activate", "/reset-password", "/settings"];

/// Runs the page's own script and style, by their hashes, and nothing else; nobody may frame it.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash_of("script"),
        hash_of("style"),
    )
});

/// The hash of an element's text, as a policy names it.
fn hash_of(element: &str) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let text = PAGE
        .split_once(&open)
        .and_then(|(_, rest)| rest.split_once(&close))
        .map_or("", |(text, _)| text);
    STANDARD.encode(Sha256::digest(text))
}

pub(super) fn routes() -> Router<Services> {
    PATHS
        .into_iter()
        .fold(Router::new(), |router, path| router.route(path, get(page)))
}

async fn page(State(services): State<Services>) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 4] = [
        (header::CONTENT_SECURITY_POLICY, &POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        // What it offers follows the settings.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    let html = PAGE.replace(PROVIDERS, &services.provider_names().join(" "));
    (headers, Html(html)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_brings_all_that_it_needs() {
        for element in ["script", "style"] {
            assert_eq!(PAGE.matches(&format!("<{element}>")).count(), 1, "{element}");
            assert_ne!(hash_of(element), STANDARD.encode(Sha256::digest("")), "{element}");
        }
        assert_eq!(PAGE.matches(PROVIDERS).count(), 1);
        // Nothing that the policy would refuse.
        for refused in [
            "<script src",
            "<link rel=\"stylesheet",
            " style=",
            " onclick=",
            "http://",
            "https://",
        ] {
            let svg = PAGE
                .replace("http://www.w3.org/2000/svg", "")
                .replace("http%3A", "");
            assert!(!svg.contains(refused), "{refused}");
        }
    }
}
