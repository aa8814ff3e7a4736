//! Accounts over real HTTP: sign-up, sessions, passwords, mails, limits, providers, and what is never logged.

mod common;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use base64::Engine as _;
use common::{CHEAP, DEADLINE, Running, answer, code, message, start};
use sea_orm::{ConnectionTrait, Database, DatabaseConnection, Statement};
use serde_json::{Value, json};
use sha2::Digest as _;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use wrenn_control::config::{Allowance, OAuthProvider, PasswordCost, SmtpConfig};
use wrenn_control::{ControlConfig, Secret};

const PASSWORD: &str = "correct horse battery";

/// A control plane without hosts.
struct Place {
    running: Running,
    http: reqwest::Client,
    config: ControlConfig,
    // Last, so that they outlive what uses them.
    postgres: Option<wrenn_testkit::servers::Postgres>,
    dir: tempfile::TempDir,
}

impl Place {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut ControlConfig)) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = ControlConfig::new(dir.path());
        config.timings.monitor_interval = Duration::from_secs(3600);
        config.timings.mail_retry = Duration::from_millis(1);
        config.password_cost = CHEAP;
        let postgres = common::postgres();
        config.database_url = postgres.as_ref().map(wrenn_testkit::servers::Postgres::url);
        config.secret = Some(wrenn_control::MasterSecret::generate().expect("randomness"));
        change(&mut config);
        let running = start(config.clone()).await;
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(DEADLINE)
            .build()
            .expect("a client");
        Self {
            running,
            http,
            config,
            postgres,
            dir,
        }
    }

    async fn restart(self, change: impl FnOnce(&mut ControlConfig)) -> Self {
        let Self {
            running,
            http,
            mut config,
            postgres,
            dir,
        } = self;
        running.stop().await;
        change(&mut config);
        let running = start(config.clone()).await;
        Self {
            running,
            http,
            config,
            postgres,
            dir,
        }
    }

    fn request(&self, method: &str, path: &str, token: Option<&str>) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let request = self.http.request(method, format!("{}{path}", self.running.url));
        match token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        answer(self.request("POST", path, None).json(&body)).await
    }

    async fn as_user(&self, token: &str, method: &str, path: &str, body: Value) -> (u16, Value) {
        answer(self.request(method, path, Some(token)).json(&body)).await
    }

    /// Signs up and returns the session.
    async fn person(&self, email: &str) -> Value {
        let body = json!({"email": email, "password": PASSWORD, "name": "Ada"});
        let (status, body) = self.post("/v1/auth/signup", body).await;
        assert_eq!(status, 201, "{body}");
        body
    }

    async fn login(&self, email: &str, password: &str) -> (u16, Value) {
        let body = json!({"email": email, "password": password});
        self.post("/v1/auth/login", body).await
    }

    /// The status with which a session is answered.
    async fn me(&self, token: &str) -> u16 {
        answer(self.request("GET", "/v1/me", Some(token))).await.0
    }

    /// The database itself.
    async fn database(&self) -> DatabaseConnection {
        let url = match &self.config.database_url {
            Some(url) => url.clone(),
            None => format!("sqlite://{}/control.db", self.dir.path().display()),
        };
        Database::connect(url).await.expect("the database")
    }

    async fn sql(&self, sql: &str) {
        let db = self.database().await;
        db.execute_unprepared(sql).await.expect("a statement");
        db.close().await.expect("closed");
    }

    /// The newest entry of an action in the platform's log, which an admin that is made for this reads.
    async fn noted(&self, action: &str) -> Value {
        let control = &self.running.control;
        let email = "auditor@example.com";
        let made = control
            .create_platform_admin(email, None, &Secret::new(PASSWORD))
            .await;
        let admin = match made {
            Ok(admin) => admin,
            Err(_) => control
                .grant_platform_admin(email)
                .await
                .expect("no failure")
                .expect("made before"),
        };
        let token = control.issue_session(admin, None).await.expect("a session");
        let path = format!("/v1/admin/audit-logs?action={action}&limit=1");
        let (status, mut page) = answer(self.request("GET", &path, Some(&token))).await;
        assert_eq!(status, 200, "{page}");
        page["entries"][0].take()
    }

    /// How the database's SQL writes an id of the API.
    fn uuid(&self, id: &str) -> String {
        let (_, uuid) = id.split_once('-').expect("a prefix");
        match self.config.database_url {
            Some(_) => format!("'{uuid}'"),
            None => format!("X'{}'", uuid.replace('-', "")),
        }
    }

    async fn count(&self, table: &str) -> i64 {
        let db = self.database().await;
        let statement = Statement::from_string(
            db.get_database_backend(),
            format!("SELECT COUNT(*) AS rows FROM {table}"),
        );
        let row = db
            .query_one_raw(statement)
            .await
            .expect("an answer")
            .expect("a row");
        let count = row.try_get("", "rows").expect("a number");
        db.close().await.expect("closed");
        count
    }
}

fn text<'a>(body: &'a Value, field: &str) -> &'a str {
    body[field]
        .as_str()
        .unwrap_or_else(|| panic!("no {field}: {body}"))
}

// ---- mail

/// A mail server that keeps what it gets.
#[derive(Clone, Default)]
struct MailSink {
    mails: Arc<Mutex<Vec<(String, String)>>>,
    refuse: Arc<Mutex<u32>>,
    arrived: Arc<tokio::sync::Notify>,
}

impl MailSink {
    async fn start(config: &mut ControlConfig) -> Self {
        let sink = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        config.smtp = Some(SmtpConfig {
            url: format!("smtp://{}", listener.local_addr().expect("bound")),
            from: "Wrenn <wrenn@example.com>".into(),
        });
        config.public_url = Some("https://wrenn.example.com/".into());
        let serving = sink.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().converse(stream));
            }
        });
        sink
    }

    async fn converse(self, stream: tokio::net::TcpStream) {
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        writer.write_all(b"220 sink\r\n").await.expect("greeted");
        let mut to = String::new();
        while let Ok(Some(line)) = lines.next_line().await {
            let reply: &[u8] = match line.split([' ', ':']).next().unwrap_or_default() {
                "EHLO" => b"250 sink\r\n",
                "MAIL" => {
                    let refused = {
                        let mut refuse = self.refuse.lock().expect("not poisoned");
                        let refused = *refuse > 0;
                        *refuse = refuse.saturating_sub(1);
                        refused
                    };
                    if refused { b"451 later\r\n" } else { b"250 ok\r\n" }
                }
                "RCPT" => {
                    to = line.clone();
                    b"250 ok\r\n"
                }
                "DATA" => {
                    writer.write_all(b"354 go\r\n").await.expect("answered");
                    let mut text = String::new();
                    while let Ok(Some(line)) = lines.next_line().await {
                        if line == "." {
                            break;
                        }
                        text.push_str(&line);
                        text.push('\n');
                    }
                    // Quoted-printable, as far as mails of plain ASCII need it.
                    let text = text.replace("=\n", "").replace("=3D", "=");
                    self.mails.lock().expect("not poisoned").push((to.clone(), text));
                    self.arrived.notify_waiters();
                    b"250 ok\r\n"
                }
                "QUIT" => b"221 bye\r\n",
                _ => b"250 ok\r\n",
            };
            if writer.write_all(reply).await.is_err() {
                return;
            }
        }
    }

    /// Waits for the `nth` mail (from 1) to an address and returns the token in it.
    async fn token(&self, to: &str, nth: usize) -> String {
        let search = || {
            let mails = self.mails.lock().expect("not poisoned");
            let mut found = mails.iter().filter(|(rcpt, _)| rcpt.contains(to));
            found.nth(nth - 1).map(|(_, text)| {
                let token = text.split("#token=").nth(1).expect("a link");
                token.split_whitespace().next().expect("a token").to_owned()
            })
        };
        let wait = async {
            loop {
                let arrived = self.arrived.notified();
                tokio::pin!(arrived);
                arrived.as_mut().enable();
                if let Some(token) = search() {
                    return token;
                }
                arrived.await;
            }
        };
        tokio::time::timeout(DEADLINE, wait)
            .await
            .expect("a mail arrives")
    }

    fn count(&self) -> usize {
        self.mails.lock().expect("not poisoned").len()
    }
}

// ---- logs

/// Everything that this process logs, at every level of detail.
fn logs() -> &'static Mutex<Vec<u8>> {
    static LOGS: OnceLock<Mutex<Vec<u8>>> = OnceLock::new();
    LOGS.get_or_init(|| {
        struct Sink;
        impl std::io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                logs().lock().expect("not poisoned").extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::new("trace"))
            .with_ansi(false)
            .with_writer(|| Sink)
            .init();
        Mutex::default()
    })
}

fn logged() -> String {
    String::from_utf8_lossy(&logs().lock().expect("not poisoned")).into_owned()
}

// ---- sign-up and login

#[tokio::test]
async fn people_sign_up_and_log_in() {
    let place = Place::new().await;
    let new = place.person(" Ada@Example.COM").await;
    assert_eq!(
        (text(&new, "email"), text(&new, "name"), text(&new, "status")),
        ("ada@example.com", "Ada", "active")
    );
    let token = text(&new, "token");
    assert_eq!(
        place.as_user(token, "GET", "/v1/me", json!({})).await,
        (
            200,
            json!({"name": "Ada", "email": "ada@example.com", "has_password": true, "providers": []})
        )
    );
    // The session opens the team's things.
    assert_eq!(
        place.as_user(token, "GET", "/v1/sandboxes", json!({})).await.0,
        200
    );

    let (status, session) = place.login("ADA@example.com ", PASSWORD).await;
    assert_eq!(status, 200, "{session}");
    let fields: Vec<&str> = session
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(fields, ["email", "name", "team_id", "token", "user_id"]);
    assert_eq!(
        (&session["user_id"], &session["team_id"]),
        (&new["user_id"], &new["team_id"])
    );

    // Wrong and unknown look alike.
    let wrong = place.login("ada@example.com", "incorrect horse").await;
    let unknown = place.login("eve@example.com", PASSWORD).await;
    assert_eq!(wrong, unknown);
    assert_eq!((wrong.0, code(&wrong.1)), (401, "unauthorized"));
    for email in ["", "a\u{0}b@c.d", &"x".repeat(100_000)] {
        assert_eq!(place.login(email, PASSWORD).await.0, 401);
    }
    let body = json!({"email": "ADA@EXAMPLE.com", "password": PASSWORD, "name": "Other"});
    let (status, body) = place.post("/v1/auth/signup", body).await;
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    place.running.stop().await;
}

#[tokio::test]
async fn bad_sign_ups_name_the_field() {
    let place = Place::new().await;
    for (field, value) in [
        ("email", json!("nobody")),
        ("email", json!("a@b.c\r\nBcc: all@b.c")),
        ("email", json!(format!("{}@example.com", "a".repeat(300)))),
        ("password", json!("1234567")),
        ("password", json!("x".repeat(2000))),
        ("password", json!(123_456_789)),
        ("name", json!(" ")),
        ("name", json!("x".repeat(101))),
        ("name", json!("a\u{0}b")),
    ] {
        let mut body = json!({"email": "ada@example.com", "password": PASSWORD, "name": "Ada"});
        body[field] = value.clone();
        let (status, body) = place.post("/v1/auth/signup", body).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{value}");
        assert!(message(&body).contains(field), "{body}");
        assert!(!message(&body).contains("123456789"), "{body}");
    }
    place.running.stop().await;
}

#[tokio::test]
async fn of_many_sign_ups_with_one_address_one_succeeds() {
    let place = Place::new().await;
    let tries = (0..8).map(|n| {
        let email = if n % 2 == 0 {
            "ada@example.com"
        } else {
            "ADA@example.com"
        };
        place.post(
            "/v1/auth/signup",
            json!({"email": email, "password": PASSWORD, "name": format!("Ada {n}")}),
        )
    });
    let mut statuses: Vec<u16> = futures::future::join_all(tries)
        .await
        .into_iter()
        .map(|(status, _)| status)
        .collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409, 409, 409, 409, 409, 409]);
    // Nothing is left of those that failed: the platform's own team and the winner's.
    assert_eq!((place.count("users").await, place.count("teams").await), (1, 2));
    assert_eq!(place.count("users_teams").await, 1);
    place.running.stop().await;
}

#[tokio::test]
async fn a_hash_follows_the_parameters() {
    let place = Place::new().await;
    place.person("ada@example.com").await;
    let place = place
        .restart(|config| {
            config.password_cost = PasswordCost {
                memory_kib: 128,
                passes: 2,
            };
        })
        .await;
    let hash = async || {
        let db = place.database().await;
        let sql = "SELECT password_hash FROM users WHERE email = 'ada@example.com'";
        let statement = Statement::from_string(db.get_database_backend(), sql);
        let row = db
            .query_one_raw(statement)
            .await
            .expect("an answer")
            .expect("a row");
        row.try_get::<String>("", "password_hash").expect("a hash")
    };
    let before = hash().await;
    assert!(before.contains("$m=64,t=1,p=1$"), "{before}");
    assert_eq!(place.login("ada@example.com", "wrong horse").await.0, 401);
    assert_eq!(hash().await, before);
    let (status, session) = place.login("ada@example.com", PASSWORD).await;
    assert_eq!(status, 200);
    assert!(hash().await.contains("$m=128,t=2,p=1$"));
    assert_eq!(
        place.me(text(&session, "token")).await,
        200,
        "the session goes on"
    );
    assert_eq!(place.login("ada@example.com", PASSWORD).await.0, 200);
    place.running.stop().await;
}

#[tokio::test]
async fn a_session_starts_in_the_default_team_else_in_the_first_that_is_active() {
    let place = Place::new().await;
    let ada = place.person("ada@example.com").await;
    let bob = place.person("bob@example.com").await;
    let (own, other) = (text(&ada, "team_id"), text(&bob, "team_id"));
    let switch = json!({"team_id": other});
    let (status, body) = place
        .as_user(
            text(&ada, "token"),
            "POST",
            "/v1/auth/switch-team",
            switch.clone(),
        )
        .await;
    assert_eq!((status, code(&body)), (404, "not_found"), "not a member yet");

    let member = format!(
        "INSERT INTO users_teams (user_id, team_id, role, is_default, created_at) VALUES ({}, {}, 'member', FALSE, 1)",
        place.uuid(text(&ada, "user_id")),
        place.uuid(other)
    );
    place.sql(&member).await;
    place
        .sql("UPDATE users SET name = 'Ada L.' WHERE email = 'ada@example.com'")
        .await;
    let (status, switched) = place
        .as_user(text(&ada, "token"), "POST", "/v1/auth/switch-team", switch)
        .await;
    assert_eq!(status, 200, "{switched}");
    assert_eq!(
        (text(&switched, "team_id"), text(&switched, "name")),
        (other, "Ada L.")
    );
    assert_eq!(place.me(text(&switched, "token")).await, 200);
    for bad in ["", "team-x", "team-00000000-0000-0000-0000-000000000001"] {
        let body = json!({"team_id": bad});
        let (status, _) = place
            .as_user(text(&ada, "token"), "POST", "/v1/auth/switch-team", body)
            .await;
        assert_eq!(status, 404, "{bad}");
    }

    let login = async || place.login("ada@example.com", PASSWORD).await.1;
    assert_eq!(
        text(&login().await, "team_id"),
        own,
        "the default one, though newer"
    );
    place
        .sql(&format!(
            "UPDATE teams SET deleted_at = 1 WHERE id = {}",
            place.uuid(own)
        ))
        .await;
    assert_eq!(
        text(&login().await, "team_id"),
        other,
        "deleted teams do not count"
    );
    place
        .sql(&format!(
            "UPDATE teams SET deleted_at = 1 WHERE id = {}",
            place.uuid(other)
        ))
        .await;
    let session = login().await;
    assert_eq!(session["team_id"], Value::Null);
    let token = text(&session, "token");
    assert_eq!(place.me(token).await, 200);
    let (status, body) = place.as_user(token, "POST", "/v1/sandboxes", json!({})).await;
    assert_eq!((status, code(&body)), (403, "forbidden"), "{body}");
    assert!(message(&body).contains("team"), "{body}");
    place.running.stop().await;
}

// ---- names and passwords

#[tokio::test]
async fn people_change_their_names() {
    let place = Place::new().await;
    let ada = place.person("ada@example.com").await;
    let token = text(&ada, "token");
    let (status, me) = place
        .as_user(token, "PATCH", "/v1/me", json!({"name": " Ada Lovelace "}))
        .await;
    assert_eq!((status, text(&me, "name")), (200, "Ada Lovelace"));
    let (status, me) = place.as_user(token, "PATCH", "/v1/me", json!({})).await;
    assert_eq!((status, text(&me, "name")), (200, "Ada Lovelace"));
    assert_eq!(
        place
            .as_user(token, "PATCH", "/v1/me", json!({"name": ""}))
            .await
            .0,
        400
    );
    assert_eq!(answer(place.request("GET", "/v1/me", None)).await.0, 401);
    place.running.stop().await;
}

#[tokio::test]
async fn a_new_password_ends_all_other_sessions() {
    let place = Place::new().await;
    let ada = place.person("ada@example.com").await;
    let (here, there) = (
        text(&ada, "token").to_owned(),
        text(&place.login("ada@example.com", PASSWORD).await.1, "token").to_owned(),
    );
    let change = async |token: &str, body: Value| place.as_user(token, "POST", "/v1/me/password", body).await;
    let new = "a better password";
    for (body, status) in [
        (json!({"new_password": new}), 400),
        (
            json!({"current_password": PASSWORD, "new_password": "short"}),
            400,
        ),
        (
            json!({"current_password": PASSWORD, "new_password": new, "confirm_password": "another one"}),
            400,
        ),
        (
            json!({"current_password": "wrong horse", "new_password": new}),
            403,
        ),
    ] {
        assert_eq!(change(&here, body.clone()).await.0, status, "{body}");
    }
    let body = json!({"current_password": PASSWORD, "new_password": new, "confirm_password": new});
    let (status, session) = change(&here, body).await;
    assert_eq!(status, 200, "{session}");
    assert_eq!(session["team_id"], ada["team_id"]);
    assert_eq!(place.me(text(&session, "token")).await, 200);
    assert_eq!((place.me(&here).await, place.me(&there).await), (401, 401));
    assert_eq!(place.login("ada@example.com", PASSWORD).await.0, 401);
    assert_eq!(place.login("ada@example.com", new).await.0, 200);

    // Of two changes at once by one session, one wins and ends the other.
    let token = text(&session, "token");
    let one = json!({"current_password": new, "new_password": "password number 1"});
    let two = json!({"current_password": new, "new_password": "password number 2"});
    let (one, two) = futures::join!(change(token, one), change(token, two));
    let mut statuses = [one.0, two.0];
    statuses.sort_unstable();
    assert!(
        // Serial by chance, the second finds its session ended or the password changed.
        statuses == [200, 401] || statuses == [200, 403],
        "{one:?} {two:?}"
    );
    place.running.stop().await;
}

// ---- mails

#[tokio::test]
async fn with_a_mail_server_accounts_wait_for_their_link() {
    let mut config = ControlConfig::new("/nowhere");
    let sink = MailSink::start(&mut config).await;
    // The server does not take the first two attempts.
    *sink.refuse.lock().expect("not poisoned") = 2;
    let place = Place::with(|own| {
        own.smtp = config.smtp;
        own.public_url = config.public_url;
    })
    .await;
    let new = place.person("ada@example.com").await;
    assert_eq!((text(&new, "status"), new.get("token")), ("inactive", None));
    let first = sink.token("ada@example.com", 1).await;
    {
        let mails = sink.mails.lock().expect("not poisoned");
        assert!(
            mails[0].1.contains("https://wrenn.example.com/activate#token="),
            "{}",
            mails[0].1
        );
        assert!(mails[0].1.contains("wrenn@example.com"));
    }
    assert_eq!(place.login("ada@example.com", "wrong horse").await.0, 401);
    let (status, body) = place.login("ada@example.com", PASSWORD).await;
    assert_eq!((status, code(&body)), (403, "forbidden"), "{body}");
    assert!(message(&body).contains("not active"), "{body}");
    // A login sends another link; both are good until one is used.
    let second = sink.token("ada@example.com", 2).await;
    assert_ne!(first, second);
    let activate = async |token: &str| place.post("/v1/auth/activate", json!({"token": token})).await;
    assert_eq!(activate("nonsense").await.0, 400);
    let (one, two) = futures::join!(activate(&second), activate(&second));
    let mut statuses = [one.0, two.0];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 400], "one token, one activation");
    let session = if one.0 == 200 { one.1 } else { two.1 };
    assert_eq!(place.me(text(&session, "token")).await, 200);
    assert_eq!(activate(&first).await.0, 400, "void with the other");
    assert_eq!(place.login("ada@example.com", PASSWORD).await.0, 200);
    place.running.stop().await;
}

#[tokio::test]
async fn a_reset_works_once_and_tells_nothing() {
    let mut config = ControlConfig::new("/nowhere");
    let sink = MailSink::start(&mut config).await;
    let place = Place::with(|own| own.smtp = config.smtp).await;
    place.person("ada@example.com").await;
    let activation = sink.token("ada@example.com", 1).await;
    let (_, session) = place
        .post("/v1/auth/activate", json!({"token": activation}))
        .await;
    let reset = async |email: &str| place.post("/v1/me/password/reset", json!({"email": email})).await;
    let unknown = reset("eve@example.com").await;
    let known = reset("ADA@example.com").await;
    assert_eq!(unknown, known);
    assert_eq!(known.0, 202);
    let token = sink.token("ada@example.com", 2).await;
    assert_eq!(sink.count(), 2, "nothing went to the unknown address");

    let confirm = async |token: &str, password: &str| {
        let body = json!({"token": token, "new_password": password});
        place.post("/v1/me/password/reset/confirm", body).await.0
    };
    assert_eq!(confirm(&token, "short").await, 400);
    assert_eq!(confirm("nonsense", "a better password").await, 400);
    assert_eq!(
        confirm(&activation, "a better password").await,
        400,
        "for another purpose"
    );
    let tries = (0..6).map(|n| {
        let password = format!("password number {n}");
        let token = &token;
        async move { (confirm(token, &password).await, password) }
    });
    let outcomes = futures::future::join_all(tries).await;
    let winners: Vec<&String> = outcomes
        .iter()
        .filter(|(status, _)| *status == 204)
        .map(|(_, password)| password)
        .collect();
    assert_eq!(winners.len(), 1, "{outcomes:?}");
    assert!(outcomes.iter().all(|(status, _)| [204, 400].contains(status)));
    assert_eq!(place.me(text(&session, "token")).await, 401, "sessions ended");
    assert_eq!(place.login("ada@example.com", PASSWORD).await.0, 401);
    assert_eq!(place.login("ada@example.com", winners[0]).await.0, 200);

    // What ran out does not work, and goes with the next pass.
    reset("ada@example.com").await;
    let token = sink.token("ada@example.com", 3).await;
    place.sql("UPDATE email_tokens SET expires_at = 1").await;
    assert_eq!(confirm(&token, "a better password").await, 400);
    assert!(place.count("email_tokens").await > 0);
    place.running.control.reconcile().await.expect("a pass");
    assert_eq!(place.count("email_tokens").await, 0);
    place.running.stop().await;
}

#[tokio::test]
async fn a_reset_opens_an_account_that_was_never_activated_but_not_a_closed_one() {
    let mut config = ControlConfig::new("/nowhere");
    let sink = MailSink::start(&mut config).await;
    let place = Place::with(|own| own.smtp = config.smtp).await;
    // Somebody else signed up with Ada's address; the address's owner takes the account over.
    place.person("ada@example.com").await;
    let foreign = sink.token("ada@example.com", 1).await;
    let reset = json!({"email": "ada@example.com"});
    assert_eq!(place.post("/v1/me/password/reset", reset.clone()).await.0, 202);
    let token = sink.token("ada@example.com", 2).await;
    let body = json!({"token": token, "new_password": "a better password"});
    assert_eq!(place.post("/v1/me/password/reset/confirm", body).await.0, 204);
    assert_eq!(place.login("ada@example.com", PASSWORD).await.0, 401);
    assert_eq!(place.login("ada@example.com", "a better password").await.0, 200);
    let (status, _) = place.post("/v1/auth/activate", json!({"token": foreign})).await;
    assert_eq!(status, 400);

    // A link that is under way does not open an account that an admin closes.
    place.post("/v1/me/password/reset", reset).await;
    let token = sink.token("ada@example.com", 3).await;
    place.sql("UPDATE users SET status = 'disabled'").await;
    let body = json!({"token": token, "new_password": "yet another password"});
    assert_eq!(place.post("/v1/me/password/reset/confirm", body).await.0, 400);
    let (status, body) = place.login("ada@example.com", "a better password").await;
    assert_eq!((status, code(&body)), (403, "forbidden"), "{body}");
    assert!(message(&body).contains("deactivated"), "{body}");
    place.running.stop().await;
}

#[tokio::test]
async fn without_a_mail_server_links_go_to_the_log_of_a_laptop() {
    logs();
    // A server's log is read by others: no link, unless its owner said so.
    let server = Place::new().await;
    server.person("server@example.com").await;
    let ask = json!({"email": "server@example.com"});
    assert_eq!(server.post("/v1/me/password/reset", ask).await.0, 202);
    server.running.stop().await;

    let place = Place::with(|own| own.log_links = true).await;
    place.person("laptop@example.com").await;
    place
        .post("/v1/me/password/reset", json!({"email": "laptop@example.com"}))
        .await;
    let search = async {
        loop {
            let logged = logged();
            let line = logged.lines().find(|line| line.contains("laptop@example.com"));
            if let Some(token) = line.and_then(|line| line.split("#token=").nth(1)) {
                return token[..64].to_owned();
            }
            tokio::task::yield_now().await;
        }
    };
    let token = tokio::time::timeout(DEADLINE, search).await.expect("a link");
    let told = |line: &str| line.contains("server@example.com") && line.contains("#token=");
    assert!(!logged().lines().any(told));
    let body = json!({"token": token, "new_password": "a better password"});
    assert_eq!(place.post("/v1/me/password/reset/confirm", body).await.0, 204);
    assert_eq!(
        place.login("laptop@example.com", "a better password").await.0,
        200
    );
    place.running.stop().await;
}

#[tokio::test]
async fn passwords_and_tokens_are_never_logged() {
    logs();
    let mut config = ControlConfig::new("/nowhere");
    let sink = MailSink::start(&mut config).await;
    let place = Place::with(|own| own.smtp = config.smtp).await;
    let secrets = [
        "unlogged first password",
        "unlogged second password",
        "98765432101",
    ];
    let body = json!({"email": "log@example.com", "password": secrets[0], "name": "Log"});
    assert_eq!(place.post("/v1/auth/signup", body.clone()).await.0, 201);
    assert_eq!(place.post("/v1/auth/signup", body).await.0, 409);
    let activation = sink.token("log@example.com", 1).await;
    place
        .post("/v1/auth/activate", json!({"token": activation}))
        .await;
    let (_, session) = place.login("log@example.com", secrets[0]).await;
    let (status, key) = place
        .as_user(
            text(&session, "token"),
            "POST",
            "/v1/api-keys",
            json!({"name": "k"}),
        )
        .await;
    assert_eq!(status, 201, "{key}");
    let id = text(&key, "id");
    let key = text(&key, "key");
    for (presented, wanted) in [(key.to_owned(), 200), (format!("{key}0"), 401)] {
        let request = place
            .request("GET", "/v1/sandboxes", None)
            .header("x-api-key", presented);
        assert_eq!(answer(request).await.0, wanted);
    }
    let path = format!("/v1/api-keys/{id}");
    assert_eq!(
        place
            .as_user(text(&session, "token"), "DELETE", &path, json!({}))
            .await
            .0,
        204
    );
    place
        .post(
            "/v1/auth/login",
            json!({"email": "log@example.com", "password": 98_765_432_101_u64}),
        )
        .await;
    place
        .post("/v1/me/password/reset", json!({"email": "log@example.com"}))
        .await;
    let reset = sink.token("log@example.com", 2).await;
    let body = json!({"token": reset, "new_password": secrets[1]});
    place.post("/v1/me/password/reset/confirm", body.clone()).await;
    place.post("/v1/me/password/reset/confirm", body).await;
    let database = place.database().await;
    // What waits for the audit log is written.
    place.running.stop().await;
    let backend = database.get_database_backend();
    let entries = database
        .query_all_raw(sea_orm::Statement::from_string(
            backend,
            "SELECT * FROM audit_logs",
        ))
        .await
        .expect("rows");
    assert!(entries.len() >= 5, "{}", entries.len());
    let audited: Vec<String> = entries
        .iter()
        .flat_map(|row| {
            row.column_names()
                .into_iter()
                .filter_map(|column| row.try_get::<Option<String>>("", &column).ok().flatten())
        })
        .collect();
    assert!(audited.iter().any(|text| text == "account.reset"), "{audited:?}");
    // Other libraries' finest detail may show bytes on a socket; ours shows none, at no level.
    let logged = logged();
    let ours: Vec<&str> = logged
        .lines()
        .filter(|line| line.contains("wrenn_control"))
        .collect();
    assert!(!ours.is_empty());
    for secret in secrets
        .iter()
        .copied()
        .chain([activation.as_str(), &reset, text(&session, "token"), key])
    {
        assert!(!ours.iter().any(|line| line.contains(secret)), "{secret}");
        assert!(!audited.iter().any(|text| text.contains(secret)), "{secret}");
    }
    // At the levels that a server runs with, nobody logs one.
    for line in logged.lines().filter(|line| !line.contains("TRACE")) {
        assert!(!secrets.iter().any(|secret| line.contains(secret)), "{line}");
        assert!(
            !line.contains(&reset) && !line.contains(&activation) && !line.contains(key),
            "{line}"
        );
    }
}

// ---- limits

fn retry_after(response: &reqwest::Response) -> u64 {
    response.headers()["retry-after"]
        .to_str()
        .expect("text")
        .parse()
        .expect("seconds")
}

#[tokio::test]
async fn logins_are_limited_by_account_and_by_address() {
    let place = Place::with(|config| {
        config.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
        config.attempts.login_account_address = Allowance::per_minutes(3, 15);
        config.attempts.login_account = Allowance::per_minutes(6, 15);
        config.attempts.login_address = Allowance::per_minutes(5, 15);
        config.attempts.sign_up_address = Allowance::per_minutes(2, 60);
        config.attempts.reset_address = Allowance::per_minutes(2, 60);
        config.attempts.mail_account = Allowance::per_minutes(1, 60);
    })
    .await;
    place.person("ada@example.com").await;
    let login = async |from: &str, email: &str, password: &str| {
        let body = json!({"email": email, "password": password});
        place
            .request("POST", "/v1/auth/login", None)
            .header("x-forwarded-for", from)
            .json(&body)
            .send()
            .await
            .expect("an answer")
    };
    // Many at once do not slip through together.
    let tries = (0..8).map(|_| login("192.0.2.1", "ada@example.com", "wrong horse"));
    let responses = futures::future::join_all(tries).await;
    let refused: Vec<_> = responses
        .iter()
        .filter(|response| response.status() == 429)
        .collect();
    assert_eq!(refused.len(), 5);
    assert!((1..=900).contains(&retry_after(refused[0])));
    let response = login("192.0.2.1", "ada@example.com", PASSWORD).await;
    assert_eq!(response.status(), 429, "the right password too");
    let body: Value = response.json().await.expect("a body");
    assert_eq!(code(&body), "rate_limited");
    // The owner, elsewhere, gets in; and a success gives back what that place had used up.
    let from = "1.2.3.4, 198.51.100.7";
    assert_eq!(login(from, "ada@example.com", "wrong").await.status(), 401);
    assert_eq!(
        login("198.51.100.7", "ada@example.com", PASSWORD).await.status(),
        200
    );
    // From everywhere together an account has its limit (six: three, two, and this one).
    assert_eq!(
        login("198.51.100.8", "ada@example.com", PASSWORD).await.status(),
        200
    );
    assert_eq!(
        login("198.51.100.9", "ada@example.com", PASSWORD).await.status(),
        429
    );
    // One address, many accounts.
    for n in 0..5 {
        let email = format!("nobody{n}@example.com");
        assert_eq!(login("2001:db8::1", &email, PASSWORD).await.status(), 401);
    }
    assert_eq!(
        login("2001:db8::2", "nobody5@example.com", PASSWORD)
            .await
            .status(),
        429,
        "one customer's network"
    );

    let from = |path: &str, address: &str, body: Value| {
        place
            .request("POST", path, None)
            .header("x-forwarded-for", address)
            .json(&body)
    };
    for (n, expected) in [(1, 201), (2, 201), (3, 429)] {
        let body = json!({"email": format!("new{n}@example.com"), "password": PASSWORD, "name": "N"});
        assert_eq!(
            answer(from("/v1/auth/signup", "192.0.2.50", body)).await.0,
            expected
        );
    }
    let reset = "/v1/me/password/reset";
    // The mails to one address are limited alike, whether or not it has an account.
    for email in ["ada@example.com", "eve@example.com"] {
        for (address, expected) in [("192.0.2.60", 202), ("192.0.2.61", 429)] {
            let body = json!({"email": email});
            assert_eq!(answer(from(reset, address, body)).await.0, expected, "{email}");
        }
    }
    let body = json!({"email": "bob@example.com"});
    assert_eq!(answer(from(reset, "192.0.2.60", body)).await.0, 429);

    // Windows end, and what is over is removed.
    place.sql("UPDATE rate_limits SET window_ends_at = 1").await;
    assert_eq!(
        login("192.0.2.1", "ada@example.com", PASSWORD).await.status(),
        200
    );
    place.running.control.reconcile().await.expect("a pass");
    assert!(place.count("rate_limits").await <= 2);
    place.running.stop().await;
}

#[tokio::test]
async fn who_is_no_trusted_proxy_cannot_choose_their_address() {
    let place = Place::with(|config| {
        config.attempts.login_address = Allowance::per_minutes(2, 15);
    })
    .await;
    for (n, expected) in [(1, 401), (2, 401), (3, 429)] {
        let body = json!({"email": format!("nobody{n}@example.com"), "password": PASSWORD});
        let request = place
            .request("POST", "/v1/auth/login", None)
            .header("x-forwarded-for", format!("192.0.2.{n}"))
            .json(&body);
        assert_eq!(answer(request).await.0, expected);
    }
    place.running.stop().await;
}

#[tokio::test]
async fn a_router_without_a_socket_serves_accounts_too() {
    use tower::ServiceExt as _;
    let place = Place::with(|config| {
        config.attempts.login_address = Allowance::per_minutes(1, 15);
    })
    .await;
    for expected in [401, 429] {
        let body = json!({"email": format!("a{expected}@example.com"), "password": PASSWORD});
        let request = http::Request::post("/v1/auth/login")
            .header("x-forwarded-for", "192.0.2.1")
            .body(axum::body::Body::from(body.to_string()))
            .expect("a request");
        let response = place.running.control.router().oneshot(request).await;
        assert_eq!(response.expect("an answer").status(), expected);
    }
    place.running.stop().await;
}

// ---- providers

/// What the fake provider knows of one code.
#[derive(Clone)]
struct Consent {
    challenge: String,
    redirect: String,
    id: u64,
    emails: Value,
}

/// A provider that speaks GitHub's dialect.
#[derive(Clone, Default)]
struct FakeGitHub {
    codes: Arc<Mutex<HashMap<String, Consent>>>,
    tokens: Arc<Mutex<HashMap<String, Consent>>>,
    broken: Arc<std::sync::atomic::AtomicBool>,
}

impl FakeGitHub {
    async fn start(config: &mut ControlConfig) -> Self {
        use axum::extract::State;
        use axum::http::{HeaderMap, StatusCode};
        use axum::routing::{get, post};
        let fake = Self::default();
        let user = |fake: &Self, headers: &HeaderMap| {
            let token = headers["authorization"].to_str().expect("text");
            let token = token.strip_prefix("Bearer ").expect("a bearer");
            fake.tokens.lock().expect("not poisoned").get(token).cloned()
        };
        let router = axum::Router::new()
            .route(
                "/token",
                post(async |State(fake): State<Self>, body: String| {
                    let form: HashMap<String, String> = url::form_urlencoded::parse(body.as_bytes())
                        .into_owned()
                        .collect();
                    if fake.broken.load(std::sync::atomic::Ordering::Relaxed) {
                        return Err(StatusCode::BAD_GATEWAY);
                    }
                    assert_eq!(form["client_id"], "client");
                    assert_eq!(form["client_secret"], "provider secret");
                    // Codes are good once.
                    let consent = fake.codes.lock().expect("not poisoned").remove(&form["code"]);
                    let proof = base64::engine::general_purpose::URL_SAFE_NO_PAD
                        .encode(sha2::Sha256::digest(&form["code_verifier"]));
                    let good = consent.filter(|consent| {
                        consent.challenge == proof && consent.redirect == form["redirect_uri"]
                    });
                    let Some(consent) = good else {
                        return Ok(axum::Json(json!({"error": "bad_verification_code"})));
                    };
                    let token = format!("gho_{}", consent.id);
                    fake.tokens
                        .lock()
                        .expect("not poisoned")
                        .insert(token.clone(), consent);
                    Ok(axum::Json(json!({"access_token": token, "token_type": "bearer"})))
                }),
            )
            .route(
                "/user",
                get(move |State(fake): State<Self>, headers: HeaderMap| async move {
                    let consent = user(&fake, &headers).ok_or(StatusCode::UNAUTHORIZED)?;
                    Ok::<_, StatusCode>(axum::Json(
                        json!({"id": consent.id, "login": "octo", "name": "Octo Cat"}),
                    ))
                }),
            )
            .route(
                "/emails",
                get(move |State(fake): State<Self>, headers: HeaderMap| async move {
                    let consent = user(&fake, &headers).ok_or(StatusCode::UNAUTHORIZED)?;
                    Ok::<_, StatusCode>(axum::Json(consent.emails))
                }),
            )
            .with_state(fake.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        tokio::spawn(async move { axum::serve(listener, router).await });
        config.oauth = vec![OAuthProvider {
            authorize_url: format!("{url}/authorize"),
            token_url: format!("{url}/token"),
            user_url: format!("{url}/user"),
            emails_url: format!("{url}/emails"),
            ..OAuthProvider::github("client", "provider secret")
        }];
        config.public_url = Some("https://wrenn.example.com/api".into());
        fake
    }

    /// A person consents on the page of a URL; returns the query with which the browser comes back.
    fn consent(&self, url: &str, id: u64, emails: Value) -> String {
        let url = url::Url::parse(url).expect("a URL");
        let query: HashMap<String, String> = url.query_pairs().into_owned().collect();
        assert_eq!(query["client_id"], "client");
        assert_eq!(query["code_challenge_method"], "S256");
        assert_eq!(
            query["redirect_uri"],
            "https://wrenn.example.com/api/v1/auth/oauth/github/callback"
        );
        let mut codes = self.codes.lock().expect("not poisoned");
        let code = format!("code-{id}-{}", query["code_challenge"]);
        codes.insert(
            code.clone(),
            Consent {
                challenge: query["code_challenge"].clone(),
                redirect: query["redirect_uri"].clone(),
                id,
                emails,
            },
        );
        url::form_urlencoded::Serializer::new(String::new())
            .append_pair("code", &code)
            .append_pair("state", &query["state"])
            .finish()
    }
}

fn verified(email: &str) -> Value {
    json!([
        {"email": "unverified@example.com", "primary": false, "verified": false},
        {"email": email, "primary": true, "verified": true},
    ])
}

impl Place {
    async fn with_github(smtp: Option<SmtpConfig>) -> (Self, FakeGitHub) {
        let mut config = ControlConfig::new("/nowhere");
        let fake = FakeGitHub::start(&mut config).await;
        let place = Self::with(|own| {
            own.oauth = config.oauth;
            own.public_url = config.public_url;
            own.smtp = smtp;
        })
        .await;
        (place, fake)
    }

    /// Begins a login; returns the provider's URL and the cookie.
    async fn depart(&self, token: Option<&str>) -> (String, String) {
        let path = match token {
            Some(_) => "/v1/me/providers/github/connect",
            None => "/v1/auth/oauth/github",
        };
        let response = self
            .request("GET", path, token)
            .header("accept", "application/json")
            .send()
            .await
            .expect("an answer");
        assert_eq!(response.status(), 200);
        let cookie = response.headers()["set-cookie"]
            .to_str()
            .expect("text")
            .to_owned();
        for part in [
            "HttpOnly",
            "SameSite=Lax",
            "; Secure",
            "Max-Age=600",
            "Path=/api/v1/auth/oauth/github;",
        ] {
            assert!(cookie.contains(part), "{cookie}");
        }
        let body: Value = response.json().await.expect("a body");
        let cookie = cookie.split(';').next().expect("a pair").to_owned();
        (text(&body, "url").to_owned(), cookie)
    }

    async fn arrive(&self, query: &str, cookie: &str) -> (u16, Value) {
        let request = self
            .request("GET", &format!("/v1/auth/oauth/github/callback?{query}"), None)
            .header("accept", "application/json")
            .header("cookie", format!("other=1; {cookie}"));
        answer(request).await
    }

    async fn by_github(&self, fake: &FakeGitHub, id: u64, emails: Value) -> (u16, Value) {
        let (url, cookie) = self.depart(None).await;
        self.arrive(&fake.consent(&url, id, emails), &cookie).await
    }
}

#[tokio::test]
async fn people_come_in_through_a_provider() {
    let (place, fake) = Place::with_github(None).await;
    let (status, session) = place.by_github(&fake, 7, verified("Octo@Example.com")).await;
    assert_eq!(status, 200, "{session}");
    assert_eq!(
        (text(&session, "email"), text(&session, "name")),
        ("octo@example.com", "Octo Cat")
    );
    assert!(session["team_id"].is_string());
    let token = text(&session, "token");
    assert_eq!(
        place.as_user(token, "GET", "/v1/me", json!({})).await.1,
        json!({"name": "Octo Cat", "email": "octo@example.com", "has_password": false, "providers": ["github"]})
    );
    assert_eq!(
        place.login("octo@example.com", PASSWORD).await.0,
        401,
        "there is no password"
    );
    // The same person again, with another address: the provider's id decides.
    let (status, again) = place.by_github(&fake, 7, verified("new@example.com")).await;
    assert_eq!((status, &again["user_id"]), (200, &session["user_id"]));

    // The last way to log in stays, until there is a password.
    let (status, body) = place
        .as_user(token, "DELETE", "/v1/me/providers/github", json!({}))
        .await;
    assert_eq!((status, code(&body)), (409, "conflict"), "{body}");
    let body = json!({"new_password": PASSWORD});
    let (status, session) = place.as_user(token, "POST", "/v1/me/password", body).await;
    assert_eq!(status, 200, "{session}");
    let token = text(&session, "token");
    for expected in [204, 404] {
        let (status, _) = place
            .as_user(token, "DELETE", "/v1/me/providers/github", json!({}))
            .await;
        assert_eq!(status, expected);
    }
    assert_eq!(place.login("octo@example.com", PASSWORD).await.0, 200);
    place.running.stop().await;
}

#[tokio::test]
async fn a_browser_is_sent_there_and_back() {
    let (place, fake) = Place::with_github(None).await;
    let response = place
        .request("GET", "/v1/auth/oauth/github", None)
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.status(), 303);
    let url = response.headers()["location"].to_str().expect("text");
    let cookie = response.headers()["set-cookie"].to_str().expect("text");
    let query = fake.consent(url, 7, verified("octo@example.com"));
    let back = async |query: &str| {
        let response = place
            .request("GET", &format!("/v1/auth/oauth/github/callback?{query}"), None)
            .header("accept", "text/html,application/xhtml+xml,*/*;q=0.8")
            .header("cookie", cookie.split(';').next().expect("a pair"))
            .send()
            .await
            .expect("an answer");
        assert_eq!(response.status(), 303);
        response.headers()["location"].to_str().expect("text").to_owned()
    };
    let target = back(&query).await;
    let (page, fragment) = target.split_once('#').expect("a fragment");
    assert_eq!(page, "https://wrenn.example.com/api/login");
    let fields: HashMap<String, String> = url::form_urlencoded::parse(fragment.as_bytes())
        .into_owned()
        .collect();
    assert_eq!(fields["email"], "octo@example.com");
    assert_eq!(place.me(&fields["token"]).await, 200);
    // A person who says no comes back too.
    let target = back("error=access_denied&state=x").await;
    assert!(target.contains("/login#error=forbidden"), "{target}");
    assert_eq!(
        answer(place.request("GET", "/v1/auth/oauth/gitlab", None))
            .await
            .0,
        404
    );
    place.running.stop().await;
}

#[tokio::test]
async fn a_callback_belongs_to_the_browser_that_began() {
    let (place, fake) = Place::with_github(None).await;
    let (url, cookie) = place.depart(None).await;
    let (_, foreign) = place.depart(None).await;
    let consent = || fake.consent(&url, 7, verified("octo@example.com"));
    for cookie in [foreign.as_str(), "none=1", "wrenn_oauth="] {
        let (status, body) = place.arrive(&consent(), cookie).await;
        assert_eq!((status, code(&body)), (400, "invalid_request"), "{body}");
    }
    for query in [
        "",
        "code=x",
        "state=x",
        "code=x&state=v1:00",
        "code=x&state=v1:zz",
    ] {
        assert_eq!(place.arrive(query, &cookie).await.0, 400, "{query}");
    }
    let query = consent();
    let (code_part, state_part) = query.split_once('&').expect("two parts");
    // A state that was changed by a character.
    let flipped = match state_part.strip_suffix('0') {
        Some(rest) => format!("{rest}1"),
        None => format!("{}0", &state_part[..state_part.len() - 1]),
    };
    assert_eq!(
        place.arrive(&format!("{code_part}&{flipped}"), &cookie).await.0,
        400
    );
    assert_eq!(
        place.arrive(&format!("code=guess&{state_part}"), &cookie).await.0,
        400
    );
    fake.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    let (status, body) = place.arrive(&query, &cookie).await;
    assert_eq!((status, code(&body)), (502, "provider_error"), "{body}");
    fake.broken.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(place.arrive(&query, &cookie).await.0, 200);
    assert_eq!(place.arrive(&query, &cookie).await.0, 400, "a code is good once");
    place.running.stop().await;
}

#[tokio::test]
async fn an_account_is_linked_only_when_its_address_is_proved() {
    let mut config = ControlConfig::new("/nowhere");
    let sink = MailSink::start(&mut config).await;
    let (place, fake) = Place::with_github(config.smtp).await;
    // Proved by a link: the same person.
    let ada = place.person("ada@example.com").await;
    let token = sink.token("ada@example.com", 1).await;
    place.post("/v1/auth/activate", json!({"token": token})).await;
    let unverified = json!([{"email": "ada@example.com", "primary": true, "verified": false}]);
    assert_eq!(
        place.by_github(&fake, 1, unverified).await.0,
        403,
        "the provider has not verified it"
    );
    let (status, session) = place.by_github(&fake, 1, verified("ada@example.com")).await;
    assert_eq!((status, &session["user_id"]), (200, &ada["user_id"]));
    assert_eq!(
        place.login("ada@example.com", PASSWORD).await.0,
        200,
        "the password stays"
    );
    let (status, body) = place.by_github(&fake, 2, verified("ada@example.com")).await;
    assert_eq!(
        (status, code(&body)),
        (409, "conflict"),
        "connected with another user: {body}"
    );

    // Never activated: it goes to the address's owner, without the password of whoever signed up.
    let bob = place.person("bob@example.com").await;
    let stale = sink.token("bob@example.com", 1).await;
    let (status, session) = place.by_github(&fake, 3, verified("bob@example.com")).await;
    assert_eq!((status, &session["user_id"]), (200, &bob["user_id"]));
    assert_eq!(place.login("bob@example.com", PASSWORD).await.0, 401);
    assert_eq!(
        place.post("/v1/auth/activate", json!({"token": stale})).await.0,
        400
    );

    // In use, and nobody knows whose the address is: an operator's account, or one without a mail server.
    let control = &place.running.control;
    control
        .create_platform_admin("root@example.com", None, &Secret::new(PASSWORD))
        .await
        .expect("an admin");
    assert_eq!(
        place.by_github(&fake, 4, verified("root@example.com")).await.0,
        409
    );
    // Closed stays closed.
    place
        .sql("UPDATE users SET status = 'disabled' WHERE email = 'ada@example.com'")
        .await;
    assert_eq!(
        place.by_github(&fake, 1, verified("ada@example.com")).await.0,
        403
    );
    place.running.stop().await;
}

#[tokio::test]
async fn people_connect_their_accounts_themselves() {
    let (place, fake) = Place::with_github(None).await;
    let ada = place.person("ada@example.com").await;
    let token = text(&ada, "token");
    // Without a mail server nothing is proved, so the provider alone does not open the account …
    assert_eq!(
        place.by_github(&fake, 7, verified("ada@example.com")).await.0,
        409
    );
    // … but whoever is logged in connects it; twice is no failure.
    for _ in 0..2 {
        let (url, cookie) = place.depart(Some(token)).await;
        let query = fake.consent(&url, 7, verified("else@example.com"));
        assert_eq!(place.arrive(&query, "none=1").await.0, 400, "another browser");
        assert_eq!(place.arrive(&query, &cookie).await.0, 204);
    }
    let (status, session) = place.by_github(&fake, 7, verified("else@example.com")).await;
    assert_eq!((status, &session["user_id"]), (200, &ada["user_id"]));
    // Another account cannot have the same user of the provider.
    let bob = place.person("bob@example.com").await;
    let (url, cookie) = place.depart(Some(text(&bob, "token"))).await;
    let query = fake.consent(&url, 7, verified("else@example.com"));
    assert_eq!(place.arrive(&query, &cookie).await.0, 409);
    // A session that has ended meanwhile connects nothing.
    let (url, cookie) = place.depart(Some(text(&bob, "token"))).await;
    let body = json!({"current_password": PASSWORD, "new_password": "a better password"});
    assert_eq!(
        place
            .as_user(text(&bob, "token"), "POST", "/v1/me/password", body)
            .await
            .0,
        200
    );
    let query = fake.consent(&url, 8, verified("else@example.com"));
    assert_eq!(place.arrive(&query, &cookie).await.0, 401);
    assert_eq!(
        answer(place.request("GET", "/v1/me/providers/github/connect", None))
            .await
            .0,
        401
    );
    place.running.stop().await;
}

#[tokio::test]
async fn one_person_in_two_tabs_becomes_one_account() {
    let (place, fake) = Place::with_github(None).await;
    let tabs = (0..4).map(|_| place.by_github(&fake, 7, verified("octo@example.com")));
    let outcomes = futures::future::join_all(tabs).await;
    assert!(
        outcomes
            .iter()
            .all(|(status, body)| *status == 200 && body["user_id"] == outcomes[0].1["user_id"]),
        "{outcomes:?}"
    );
    assert_eq!(
        (place.count("users").await, place.count("oauth_identities").await),
        (1, 1)
    );
    place.running.stop().await;
}

#[tokio::test]
async fn of_the_last_two_ways_to_log_in_one_stays() {
    let mut config = ControlConfig::new("/nowhere");
    let fake = FakeGitHub::start(&mut config).await;
    let place = Place::with(|own| {
        own.oauth = config.oauth;
        own.public_url = config.public_url;
    })
    .await;
    let (_, session) = place.by_github(&fake, 7, verified("octo@example.com")).await;
    let token = text(&session, "token");
    let id = place.uuid("x-00000000-0000-0000-0000-000000000001");
    place
        .sql(&format!(
            "INSERT INTO oauth_identities (id, user_id, provider, subject, email, created_at)
             SELECT {id}, id, 'other', '1', email, 1 FROM users"
        ))
        .await;
    let remove = async |provider: &str| {
        let path = format!("/v1/me/providers/{provider}");
        place.as_user(token, "DELETE", &path, json!({})).await.0
    };
    let (one, two) = futures::join!(remove("github"), remove("other"));
    let mut statuses = [one, two];
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 409]);
    assert_eq!(place.count("oauth_identities").await, 1);
    place.running.stop().await;
}

// ---- pages

#[tokio::test]
async fn links_and_logins_lead_to_pages_that_run_nothing_foreign() {
    let (with, _) = Place::with_github(None).await;
    let without = Place::new().await;
    for (place, providers) in [(&with, "github"), (&without, "")] {
        for path in ["/login", "/signup", "/activate", "/reset-password", "/settings"] {
            let page = place.request("GET", path, None).send().await.expect("an answer");
            assert_eq!(page.status(), 200, "{path}");
            let header = |name: &str| page.headers()[name].to_str().expect("text").to_owned();
            assert!(header("content-type").starts_with("text/html"), "{path}");
            assert_eq!(header("referrer-policy"), "no-referrer");
            let policy = header("content-security-policy");
            for part in [
                "default-src 'none'",
                "script-src 'sha256-",
                "frame-ancestors 'none'",
                "form-action 'none'",
            ] {
                assert!(policy.contains(part), "{policy}");
            }
            assert!(!policy.contains("unsafe"), "{policy}");
            let html = page.text().await.expect("a page");
            assert!(
                html.contains(&format!("data-providers=\"{providers}\"")),
                "{path}"
            );
            // What the policy allows is what the page has.
            let script = html.split("<script>").nth(1).expect("a script");
            let script = script.split("</script>").next().expect("its end");
            let hash = base64::engine::general_purpose::STANDARD.encode(sha2::Sha256::digest(script));
            assert!(policy.contains(&format!("'sha256-{hash}'")), "{path}: {policy}");
        }
    }
    with.running.stop().await;
    without.running.stop().await;
}

// ---- what the audit log knows of it

/// Who acted, on what, with what outcome.
fn facts(entry: &Value) -> [&Value; 4] {
    ["actor_type", "actor_id", "resource_id", "outcome"].map(|field| &entry[field])
}

#[tokio::test]
async fn the_log_says_who_came_in_and_how() {
    let mut config = ControlConfig::new("/nowhere");
    let sink = MailSink::start(&mut config).await;
    let (place, fake) = Place::with_github(config.smtp).await;
    let (system, success, denied) = (json!("system"), json!("success"), json!("denied"));
    let (user, nobody) = (json!("user"), json!("anonymous"));
    let ada = &place.person("ada@example.com").await["user_id"];
    assert_eq!(
        facts(&place.noted("account.signup").await),
        [&user, ada, ada, &success]
    );
    let token = sink.token("ada@example.com", 1).await;
    let mail = place.noted("account.activation_mail").await;
    assert_eq!(facts(&mail), [&system, &Value::Null, ada, &success]);
    let (status, session) = place.post("/v1/auth/activate", json!({"token": token})).await;
    assert_eq!(status, 200, "{session}");
    let entry = place.noted("account.activate").await;
    assert_eq!(facts(&entry), [&user, ada, ada, &success]);
    assert_eq!(entry["team_id"], session["team_id"]);

    // Whose account a stranger tries is for admins to see; an address that nobody has is not.
    place.login("ada@example.com", "wrong password").await;
    let entry = place.noted("account.login").await;
    assert_eq!(facts(&entry), [&nobody, &Value::Null, ada, &denied]);
    place.login("hunter2@example.com", "wrong password").await;
    let entry = place.noted("account.login").await;
    assert_eq!(facts(&entry), [&nobody, &Value::Null, &Value::Null, &denied]);

    place
        .post("/v1/me/password/reset", json!({"email": "ada@example.com"}))
        .await;
    let token = sink.token("ada@example.com", 2).await;
    let mail = place.noted("account.reset_mail").await;
    assert_eq!(facts(&mail), [&system, &Value::Null, ada, &success]);
    let body = json!({"token": token, "new_password": "a better password"});
    assert_eq!(place.post("/v1/me/password/reset/confirm", body).await.0, 204);
    assert_eq!(
        facts(&place.noted("account.reset").await),
        [&user, ada, ada, &success]
    );

    // Through a provider, as a program and as a browser, whose answer is a redirect.
    let (_, session) = place.login("ada@example.com", "a better password").await;
    let (url, cookie) = place.depart(Some(text(&session, "token"))).await;
    let query = fake.consent(&url, 7, verified("else@example.com"));
    assert_eq!(place.arrive(&query, &cookie).await.0, 204);
    assert_eq!(
        facts(&place.noted("account.connect").await),
        [&user, ada, ada, &success]
    );
    let (url, cookie) = place.depart(None).await;
    let query = fake.consent(&url, 7, verified("else@example.com"));
    for (query, expected) in [
        (query.as_str(), [&user, ada, ada, &success]),
        (
            "error=access_denied&state=x",
            [&nobody, &Value::Null, &Value::Null, &denied],
        ),
    ] {
        let path = format!("/v1/auth/oauth/github/callback?{query}");
        let response = place
            .request("GET", &path, None)
            .header("accept", "text/html")
            .header("cookie", &cookie)
            .send()
            .await
            .expect("an answer");
        assert_eq!(response.status(), 303);
        assert_eq!(facts(&place.noted("account.oauth_login").await), expected);
    }
    place.running.stop().await;
}

// ---- operators

#[tokio::test]
async fn operators_make_admins_and_set_passwords() {
    let place = Place::new().await;
    let control = &place.running.control;
    control
        .bootstrap()
        .await
        .expect("no failure")
        .expect("the first start");
    assert_eq!(place.login("admin@localhost", PASSWORD).await.0, 401);
    assert!(
        control
            .set_password("admin@localhost", &Secret::new("short"))
            .await
            .is_err()
    );
    assert!(
        control
            .set_password("eve@example.com", &Secret::new(PASSWORD))
            .await
            .is_err()
    );
    control
        .set_password("Admin@localhost", &Secret::new(PASSWORD))
        .await
        .expect("set");
    let (status, session) = place.login("admin@localhost", PASSWORD).await;
    assert_eq!(status, 200, "{session}");
    let token = text(&session, "token");
    control
        .set_password("admin@localhost", &Secret::new("a better password"))
        .await
        .expect("set");
    assert_eq!(place.me(token).await, 401, "sessions ended");

    control
        .create_platform_admin("root@example.com", Some("Root"), &Secret::new(PASSWORD))
        .await
        .expect("created");
    assert_eq!(place.login("root@example.com", PASSWORD).await.0, 200);
    let again = control
        .create_platform_admin("ROOT@example.com", None, &Secret::new(PASSWORD))
        .await;
    assert_eq!(again.expect_err("taken").code, wrenn_control::ErrorCode::Conflict);
    let ada = place.person("ada@example.com").await;
    let granted = control
        .grant_platform_admin("Ada@example.com")
        .await
        .expect("no failure");
    assert_eq!(granted.expect("an account").to_string(), text(&ada, "user_id"));
    assert_eq!(
        control
            .grant_platform_admin("eve@example.com")
            .await
            .expect("no failure"),
        None
    );
    let host = control.issue_host_token(None).await.expect("a token").host_id;
    for (action, resource) in [
        ("host.issue_token", Some(host.to_string())),
        ("admin.user_password", None),
        ("admin.user_create", None),
        ("admin.user_promote", None),
    ] {
        let entry = place.noted(action).await;
        assert_eq!(
            (&entry["actor_type"], &entry["actor_id"]),
            (&json!("system"), &json!("cli")),
            "{action}: {entry}"
        );
        assert!(entry["resource_id"].is_string(), "{entry}");
        if let Some(resource) = resource {
            assert_eq!(entry["resource_id"], resource);
        }
    }
    place.running.stop().await;
}
