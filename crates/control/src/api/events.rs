//! The stream of state changes, as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event as Message, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use tokio::time::Instant;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use wrenn_proto::rest::{self, ErrorBody, EventResource, StreamEvent};

use super::convert;
use super::error::ApiResult;
use super::extract::Caller;
use crate::domain::event::{EventActor, StateEvent};
use crate::domain::{Principal, Sandbox, now, timestamp};
use crate::events::Subscription;
use crate::service::Services;
use crate::service::events::POLL;
use crate::{Error, ErrorCode};

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new().routes(routes!(stream))
}

/// Follow what happens to the team's sandboxes and snapshots, as server-sent events.
///
/// Each message has an `id`; a client that comes back sends the last one it saw in `Last-Event-ID` and misses nothing
/// of the last day. Whoever was away for longer than what is kept, or knows another life of the database, is told so: the
/// first message (`connected`) then has `missed` in its `metadata`, and the state is to be read afresh. A message may come
/// twice. The stream ends when the server does: come back then.
#[utoipa::path(get, path = "/v1/events/stream", tag = "events", security(("api_key" = []), ("session" = [])),
    params(("Last-Event-ID" = Option<String>, Header, description = "The last `id` that was seen")), responses(
    (status = 200, body = StreamEvent, content_type = "text/event-stream", description = "The `data` of each message"),
    (status = 400, body = ErrorBody, description = "`invalid_request`: not an id of this stream"),
    (status = 401, body = ErrorBody, description = "`unauthorized`"),
    (status = 503, body = ErrorBody, description = "`database_unavailable`")))]
pub(crate) async fn stream(
    State(services): State<Services>,
    Caller(caller): Caller,
    headers: HeaderMap,
) -> ApiResult<Response> {
    // From before the place is read: what happens between the two is not missed.
    let changes = services.bus.subscribe();
    let last = headers
        .get("last-event-id")
        .map(|last| {
            last.to_str()
                .ok()
                .and_then(|text| text.trim().parse::<i64>().ok())
                .filter(|seq| *seq >= 0)
                .ok_or_else(|| Error::invalid("Last-Event-ID must be the id of a message of this stream"))
        })
        .transpose()?;
    let (after, missed) = services.events_from(last).await?;
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let keepalive = services.config.timings.stream_keepalive;
    let follower = Follower {
        key: text("x-api-key"),
        bearer: super::extract::bearer(&headers).map(str::to_owned),
        caller,
        after,
        changes,
        page: VecDeque::from([connected(after, missed)]),
        keepalive,
        silent_until: Instant::now() + keepalive,
        recheck_at: Instant::now() + services.config.timings.recheck,
        services,
    };
    // The next message is made when the connection has taken the last one: a slow reader holds one page.
    let messages = stream::unfold(follower, |mut follower| async move {
        let message = follower.next().await?;
        Some((Ok::<_, Infallible>(message), follower))
    });
    let no_buffer = [
        (header::CACHE_CONTROL, "no-cache"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((no_buffer, Sse::new(messages)).into_response())
}

/// One client's place in its team's events.
struct Follower {
    services: Services,
    caller: Principal,
    key: Option<String>,
    bearer: Option<String>,
    after: i64,
    changes: Subscription,
    page: VecDeque<Message>,
    keepalive: Duration,
    silent_until: Instant,
    recheck_at: Instant,
}

impl Follower {
    /// The next message; `None` ends the stream.
    async fn next(&mut self) -> Option<Message> {
        loop {
            // Before anything is told, however much there is: a key that was deleted since is not listened with.
            if Instant::now() >= self.recheck_at {
                self.recheck_at = Instant::now() + self.services.config.timings.recheck;
                let credential = (self.key.as_deref(), self.bearer.as_deref());
                if self
                    .services
                    .reauthenticate(credential, self.caller)
                    .await
                    .is_err()
                {
                    return None;
                }
            }
            if let Some(message) = self.page.pop_front() {
                self.silent_until = Instant::now() + self.keepalive;
                return Some(message);
            }
            match self.services.events_after(self.caller, self.after).await {
                Ok(events) if events.is_empty() => {}
                Ok(events) => {
                    self.after = events.last().map_or(self.after, |(event, _)| event.seq);
                    self.page.extend(events.into_iter().map(message));
                    continue;
                }
                // The client comes back with its last id.
                Err(error) if error.code != ErrorCode::DatabaseUnavailable => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "a stream of events failed"
                    );
                    return None;
                }
                Err(_) => {}
            }
            tokio::select! {
                () = self.changes.team_told(self.caller.team) => {}
                // Another instance may have ordered them without this one hearing of it.
                () = tokio::time::sleep(POLL) => {}
                () = self.services.tasks.closing().cancelled() => return None,
            }
            if Instant::now() >= self.silent_until {
                self.silent_until = Instant::now() + self.keepalive;
                return Some(Message::default().comment("keepalive"));
            }
        }
    }
}

/// The first message: the client knows that nothing after it is missed, and from where to come back.
fn connected(after: i64, missed: bool) -> Message {
    let missed = missed.then(|| ("missed".to_owned(), "true".to_owned()));
    let event = StreamEvent {
        event: "connected".to_owned(),
        outcome: None,
        resource: None,
        actor: None,
        metadata: missed.into_iter().collect(),
        error: None,
        sandbox: None,
        timestamp: timestamp(now()),
    };
    encode(after, &event)
}

fn message((event, sandbox): (StateEvent, Option<Sandbox>)) -> Message {
    let StateEvent {
        seq,
        team: _,
        kind,
        outcome,
        resource,
        payload,
        actor,
        at,
    } = event;
    let crate::domain::event::EventPayload {
        from,
        to,
        name,
        error,
    } = payload;
    let metadata = [
        ("from", from.map(|status| status.as_str().to_owned())),
        ("to", to.map(|status| status.as_str().to_owned())),
        ("name", name),
    ];
    let event = StreamEvent {
        event: kind.as_str().to_owned(),
        outcome: outcome.map(|outcome| outcome.as_str().to_owned()),
        resource: Some(EventResource {
            id: resource,
            kind: kind.resource_type().to_owned(),
        }),
        actor: actor.map(|EventActor { kind, id, name }| rest::EventActor { kind, id, name }),
        metadata: metadata
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect(),
        error,
        sandbox: sandbox.map(convert::sandbox),
        timestamp: timestamp(at),
    };
    encode(seq, &event)
}

fn encode(seq: i64, event: &StreamEvent) -> Message {
    // JSON text holds no line breaks, which is all that a message's data may not hold.
    let data = serde_json::to_string(event).unwrap_or_default();
    Message::default()
        .id(seq.to_string())
        .event(&event.event)
        .data(data)
}
