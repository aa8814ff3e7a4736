//! `/init`, `/health`, `/envs`, `/metrics` and the access token.

use serde_json::{Value, json};

use crate::harness::{Agent, bash, current_user};

const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";

#[tokio::test]
async fn plain_endpoints() {
    let agent = Agent::start().await;
    assert_eq!(
        agent.get("/health").send().await.expect("an answer").status(),
        204
    );
    let metrics: Value = agent
        .get("/metrics")
        .send()
        .await
        .expect("an answer")
        .json()
        .await
        .expect("JSON");
    for key in [
        "ts",
        "cpu_count",
        "mem_total",
        "mem_used",
        "disk_total",
        "disk_used",
    ] {
        assert!(
            metrics[key].as_u64().is_some_and(|value| value > 0),
            "{key}: {metrics}"
        );
    }
    assert!(
        metrics["cpu_used_pct"]
            .as_f64()
            .is_some_and(|value| (0.0..=100.0).contains(&value))
    );
    let envs = json!({ "envVars": { "A": "1" } });
    agent.post("/init").json(&envs).send().await.expect("an answer");
    let envs: Value = agent
        .get("/envs")
        .send()
        .await
        .expect("an answer")
        .json()
        .await
        .expect("JSON");
    assert_eq!(envs, json!({ "A": "1" }));
    // No body at all changes nothing.
    assert_eq!(agent.post("/init").send().await.expect("an answer").status(), 204);
    let envs: Value = agent
        .get("/envs")
        .send()
        .await
        .expect("an answer")
        .json()
        .await
        .expect("JSON");
    assert_eq!(envs, json!({ "A": "1" }));
}

#[tokio::test]
async fn once_set_the_token_is_required() {
    let mut agent = Agent::start().await;
    let set = json!({ "accessToken": TOKEN });
    assert_eq!(
        agent
            .post("/init")
            .json(&set)
            .send()
            .await
            .expect("an answer")
            .status(),
        204
    );
    assert_eq!(
        agent.get("/health").send().await.expect("an answer").status(),
        204
    );
    for path in ["/metrics", "/envs"] {
        let answer = agent.get(path).send().await.expect("an answer");
        assert_eq!(answer.status(), 401, "{path}");
        assert_eq!(answer.json::<Value>().await.expect("JSON")["code"], 401);
    }
    assert_eq!(
        agent.error("process.Process/List", json!({})).await,
        "unauthenticated"
    );
    assert_eq!(
        agent
            .error("filesystem.Filesystem/Stat", json!({ "path": "/" }))
            .await,
        "unauthenticated"
    );
    let start = envelope_request(&agent).await;
    assert_eq!(start, 401);

    // A change needs the current one.
    let change = json!({ "accessToken": "another" });
    assert_eq!(
        agent
            .post("/init")
            .json(&change)
            .send()
            .await
            .expect("an answer")
            .status(),
        401
    );
    assert_eq!(
        agent
            .post("/init")
            .json(&json!({}))
            .send()
            .await
            .expect("an answer")
            .status(),
        401
    );
    assert_eq!(
        agent
            .post("/init")
            .json(&set)
            .send()
            .await
            .expect("an answer")
            .status(),
        204
    );
    agent.token = Some("wrong".into());
    assert_eq!(
        agent
            .post("/init")
            .json(&change)
            .send()
            .await
            .expect("an answer")
            .status(),
        401
    );
    agent.token = Some(TOKEN.into());
    assert_eq!(agent.ok("process.Process/List", json!({})).await, json!({}));
    assert_eq!(
        agent
            .post("/init")
            .json(&change)
            .send()
            .await
            .expect("an answer")
            .status(),
        204
    );
    assert_eq!(
        agent.error("process.Process/List", json!({})).await,
        "unauthenticated"
    );
    agent.token = Some("another".into());
    assert_eq!(agent.ok("process.Process/List", json!({})).await, json!({}));
}

async fn envelope_request(agent: &Agent) -> u16 {
    let body = crate::harness::envelope(&json!({ "process": bash("true") }));
    let request = agent
        .post("/process.Process/Start")
        .header("Content-Type", "application/connect+json")
        .body(body);
    request.send().await.expect("an answer").status().as_u16()
}

#[tokio::test]
async fn a_restarted_agent_knows_what_it_was_told() {
    let agent = Agent::start_bare(tempfile::tempdir().expect("a temporary directory")).await;
    let settings = json!({
        "accessToken": TOKEN, "envVars": { "A": "1" }, "defaultUser": current_user(), "defaultWorkdir": "/tmp",
    });
    assert_eq!(
        agent
            .post("/init")
            .json(&settings)
            .send()
            .await
            .expect("an answer")
            .status(),
        204
    );
    let mut agent = Agent::start_bare(agent.kill()).await;
    assert_eq!(agent.get("/envs").send().await.expect("an answer").status(), 401);
    agent.token = Some(TOKEN.into());
    let outcome = agent.shell("echo $A $PWD $USER").await.finish().await;
    assert_eq!(outcome.stdout(), format!("1 /tmp {}\n", current_user()));
}

#[tokio::test]
async fn malformed_requests_change_nothing() {
    let agent = Agent::start().await;
    let send = async |body: &'static str| {
        agent
            .post("/init")
            .body(body)
            .send()
            .await
            .expect("an answer")
            .status()
            .as_u16()
    };
    for body in [
        "{",
        "\"text\"",
        "{\"timestamp\":\"soon\"}",
        "{\"machineId\":\"x\"}",
        "{\"entropy\":\"*\"}",
        "{\"hostname\":\"a b\"}",
        "{\"envVars\":{\"\":\"\"},\"accessToken\":\"secret\"}",
    ] {
        assert_eq!(send(body).await, 400, "{body}");
    }
    assert_eq!(send("{\"unknown\":1,\"envVars\":null}").await, 204);
    assert_eq!(
        agent.ok("process.Process/List", json!({})).await,
        json!({}),
        "no token has been set"
    );
}

#[tokio::test]
async fn outside_a_guest_the_machine_stays_as_it_is() {
    let agent = Agent::start().await;
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name");
    let year = |answer: &Value| answer["ts"].as_i64().expect("a time") / 31_556_952 + 1970;
    let settings = json!({ "timestamp": "2001-01-01T00:00:00Z", "hostname": "renamed", "growRoot": true });
    assert_eq!(
        agent
            .post("/init")
            .json(&settings)
            .send()
            .await
            .expect("an answer")
            .status(),
        204
    );
    let metrics: Value = agent
        .get("/metrics")
        .send()
        .await
        .expect("an answer")
        .json()
        .await
        .expect("JSON");
    assert!(year(&metrics) > 2020);
    assert_eq!(
        std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name"),
        hostname
    );
}
