//! Input that no route takes: characters that one database stores and the other refuses.

mod common;

use common::{World, code, message};
use serde_json::{Value, json};

/// Every operation of the document: method, path and parameters.
fn operations() -> Vec<(String, String, Vec<Value>)> {
    let text = wrenn_control::openapi_json().expect("a document");
    let document: Value = serde_json::from_str(&text).expect("JSON");
    let paths = document["paths"].as_object().expect("paths");
    let mut operations = Vec::new();
    for (path, item) in paths {
        for (method, operation) in item.as_object().expect("operations") {
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            operations.push((method.to_uppercase(), path.clone(), parameters));
        }
    }
    operations
}

fn names<'a>(parameters: &'a [Value], place: &'a str) -> impl Iterator<Item = &'a str> {
    parameters
        .iter()
        .filter(move |parameter| parameter["in"] == place)
        .filter_map(|parameter| parameter["name"].as_str())
}

struct Asker {
    world: World,
    session: String,
}

impl Asker {
    async fn new() -> Self {
        let world = World::new().await;
        // Who may call everything is refused for the input alone.
        let session = world.session(world.bootstrap.user_id, None).await;
        Self { world, session }
    }

    async fn ask(&self, method: &str, path: &str, agent: bool) -> (u16, Value) {
        let request = match agent {
            true => self
                .world
                .http
                .request(method.parse().expect("a method"), self.world.url(path))
                .bearer_auth(&self.world.host.tokens().token)
                .timeout(common::DEADLINE),
            false => self.world.request(method, path).bearer_auth(&self.session),
        };
        let request = if method == "GET" {
            request
        } else {
            request.json(&json!({}))
        };
        common::answer(request).await
    }
}

/// Routes whose caller is a host.
fn of_agents(path: &str) -> bool {
    path.ends_with("/heartbeat") || path == "/v1/hosts/sandbox-events"
}

#[tokio::test]
async fn a_nul_in_a_path_names_nothing() {
    let asker = Asker::new().await;
    let mut asked = 0;
    for (method, route, parameters) in operations() {
        for name in names(&parameters, "path") {
            for value in ["%00", "a%00b"] {
                let mut path = route.replace(&format!("{{{name}}}"), value);
                for other in names(&parameters, "path") {
                    path = path.replace(&format!("{{{other}}}"), "x");
                }
                let (status, body) = asker.ask(&method, &path, of_agents(&route)).await;
                assert_eq!(
                    (status, code(&body)),
                    (404, "not_found"),
                    "{method} {path}: {body}"
                );
                asked += 1;
            }
        }
    }
    assert!(asked > 100, "{asked}");
    // What only looks like one, since the percent sign is written out, is a name like any other.
    let (status, body) = asker.ask("GET", "/v1/sandboxes/%2500", false).await;
    assert_eq!(status, 404, "{body}");
    assert!(message(&body).contains("sandbox '%00'"), "{body}");
    asker.world.running.stop().await;
}

#[tokio::test]
async fn a_nul_in_a_query_is_refused_by_name() {
    let asker = Asker::new().await;
    let mut asked = 0;
    for (method, route, parameters) in operations() {
        for name in names(&parameters, "query") {
            let path = route
                .split('/')
                .map(|segment| if segment.starts_with('{') { "x" } else { segment })
                .collect::<Vec<_>>()
                .join("/");
            let path = format!("{path}?{name}=%00");
            let (status, body) = asker.ask(&method, &path, of_agents(&route)).await;
            assert_eq!(
                (status, code(&body)),
                (400, "invalid_request"),
                "{method} {path}: {body}"
            );
            assert!(message(&body).contains(&format!("'{name}'")), "{body}");
            asked += 1;
        }
    }
    assert!(asked > 30, "{asked}");
    asker.world.running.stop().await;
}
