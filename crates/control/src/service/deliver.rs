//! Messages on their way to channels.
//!
//! A message is a row that says when it is due. Whoever claims it (a conditional update that moves it to the
//! end of a lease) sends it and writes what came of it; when they die, it is due again after the lease. So a
//! message arrives at least once; receivers tell repetitions by its id.
//!
//! A receiver that does not answer holds what it was sent until the attempt's limit. So a channel and a team have few
//! messages under way at a time, and whatever ends makes room for the next at once: no team waits for another's.
//!
//! Addresses come from people, so they are not trusted: names are resolved here, only public addresses are
//! connected to, and redirects are not followed.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hkdf::hmac::{Hmac, KeyInit, Mac};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use serde_json::{Value, json};
use sha2::Sha256;
use url::Url;
use uuid::Uuid;

use super::Services;
use super::channels::ChannelConfig;
use super::drive::millis;
use crate::domain::around::{Channel, ChannelEvent, ChannelEventKind, ChannelProvider};
use crate::domain::{ChannelId, Millis, TeamId, now, timestamp};
use crate::outbound;
use crate::store::{Delivery, DeliveryEnd};
use crate::{Error, Result};

/// Messages that are read at once.
const BATCH: u64 = 100;
/// Messages that are sent at the same time.
const AT_ONCE: usize = 64;
/// Of these, the most to one channel, and to one team's.
const PER_CHANNEL: usize = 2;
const PER_TEAM: usize = 4;
/// Longest wait between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(3600);

/// Sends messages, to public addresses only unless told otherwise.
#[derive(Debug, Clone)]
pub(crate) struct Sender(reqwest::Client);

/// A message, ready to be sent.
struct Message {
    method: http::Method,
    url: Url,
    headers: Vec<(&'static str, String)>,
    body: String,
}

/// An event as it is stored and as webhooks get it.
pub(super) fn event_json(event: &ChannelEvent) -> Result<String> {
    let ChannelEvent {
        id,
        team,
        kind,
        resource_type,
        resource_id,
        at,
        details,
    } = event;
    serde_json::to_string(&json!({
        "id": id,
        "event": kind.as_str(),
        "team_id": team,
        "resource": { "id": resource_id, "type": resource_type },
        "timestamp": timestamp(*at).to_string(),
        "details": details,
    }))
    .map_err(Error::internal)
}

/// What is being sent at the moment.
#[derive(Debug, Default)]
struct UnderWay {
    messages: HashSet<Uuid>,
    channels: HashMap<ChannelId, usize>,
    teams: HashMap<TeamId, usize>,
}

impl UnderWay {
    /// The channels and teams that have as many as they may.
    fn full(&self) -> (BTreeSet<ChannelId>, BTreeSet<TeamId>) {
        let channels = self.channels.iter().filter(|(_, count)| **count >= PER_CHANNEL);
        let teams = self.teams.iter().filter(|(_, count)| **count >= PER_TEAM);
        (
            channels.map(|(id, _)| *id).collect(),
            teams.map(|(id, _)| *id).collect(),
        )
    }

    /// Notes a message; `false` when it has to wait, or is under way.
    fn begin(&mut self, message: Uuid, channel: &Channel) -> bool {
        let to_channel = self.channels.entry(channel.id).or_default();
        let to_team = self.teams.entry(channel.team).or_default();
        if *to_channel >= PER_CHANNEL || *to_team >= PER_TEAM || !self.messages.insert(message) {
            return false;
        }
        *to_channel += 1;
        *to_team += 1;
        true
    }

    fn end(&mut self, message: Uuid, channel: ChannelId, team: TeamId) {
        fn one_less<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
            if let Entry::Occupied(mut count) = counts.entry(key) {
                *count.get_mut() = count.get().saturating_sub(1);
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        self.messages.remove(&message);
        one_less(&mut self.channels, channel);
        one_less(&mut self.teams, team);
    }
}

impl Services {
    /// Tries the messages that are due now, once each; returns how many were tried.
    pub(crate) async fn deliver_pass(&self) -> Result<usize> {
        self.deliver_until(Some(now())).await
    }

    /// Tries messages as they become due, until none is under way any more or shutdown begins.
    pub(super) async fn deliver_on(&self) -> Result<()> {
        self.deliver_until(None).await.map(drop)
    }

    /// Tries messages that are due at a moment, or whenever there is room for one.
    async fn deliver_until(&self, moment: Option<Millis>) -> Result<usize> {
        let closing = self.tasks.closing();
        let mut under_way = UnderWay::default();
        let mut sending = FuturesUnordered::new();
        let mut count = 0;
        let mut failed = None;
        loop {
            while failed.is_none() && !closing.is_cancelled() && sending.len() < AT_ONCE {
                let (channels, teams) = under_way.full();
                let until = moment.unwrap_or_else(now);
                let due = match self.store.deliveries_due(until, &channels, &teams, BATCH).await {
                    Ok(due) => due,
                    Err(error) => {
                        failed = Some(error.into());
                        break;
                    }
                };
                let before = sending.len();
                for (delivery, channel) in due {
                    // Claimed in a moment; until then it is due for the next reading as well.
                    if sending.len() < AT_ONCE && under_way.begin(delivery.id, &channel) {
                        sending.push(async move {
                            let (id, channel_id, team) = (delivery.id, channel.id, channel.team);
                            (id, channel_id, team, self.deliver(delivery, channel).await)
                        });
                    }
                }
                // A page of one channel's says nothing of the others': it is asked again without that one.
                if sending.len() == before {
                    break;
                }
            }
            if sending.is_empty() {
                return failed.map_or(Ok(count), Err);
            }
            tokio::select! {
                Some((id, channel, team, tried)) = sending.next() => {
                    under_way.end(id, channel, team);
                    match tried {
                        Ok(tried) => count += usize::from(tried),
                        Err(error) => failed = failed.or(Some(error)),
                    }
                }
                () = self.around.deliver.notified(), if moment.is_none() => {}
                () = tokio::time::sleep(self.config.around.delivery_interval), if moment.is_none() => {}
            }
        }
    }

    /// Claims and sends one message; `false` when another had claimed it.
    async fn deliver(&self, due: Delivery, channel: Channel) -> Result<bool> {
        // Longer than an attempt can take: nobody else sends it meanwhile.
        let lease = self.config.around.delivery_timeout * 2 + Duration::from_secs(10);
        let Some(claimed) = self.store.delivery_claim(&due, now() + millis(lease)).await? else {
            return Ok(false);
        };
        let sent = match self.open_channel(&channel) {
            Ok(config) => {
                self.send(
                    channel.provider,
                    &config,
                    claimed.id,
                    claimed.event_id,
                    &claimed.event,
                )
                .await
            }
            Err(error) => Err(error.message),
        };
        let attempts = u32::try_from(claimed.attempts).unwrap_or(u32::MAX);
        let (end, word) = match sent {
            Ok(()) => (DeliveryEnd::Delivered, "delivered"),
            Err(error) if attempts >= self.config.around.delivery_attempts => {
                tracing::warn!(channel = %channel.id, event = %claimed.event_id, error, "a message was given up");
                (DeliveryEnd::GivenUp(error), "given_up")
            }
            Err(error) => {
                let wait = backoff(self.config.around.delivery_backoff, attempts, jitter());
                tracing::debug!(channel = %channel.id, event = %claimed.event_id, error, "a message did not arrive");
                // Later than now in any case: whoever tries what is due now tries it once.
                (DeliveryEnd::Again(now() + wait.max(1), error), "failed")
            }
        };
        metrics::counter!("wrenn_channel_attempts_total", "outcome" => word).increment(1);
        if self.store.delivery_end(&claimed, end, now()).await? != crate::store::Outcome::Updated {
            // The channel is gone, or this took longer than the lease.
            metrics::counter!("wrenn_stale_updates_total", "source" => "delivery").increment(1);
        }
        Ok(true)
    }

    /// Sends a message that says only that it is a test.
    pub(super) async fn send_test(
        &self,
        team: TeamId,
        channel: ChannelId,
        provider: ChannelProvider,
        config: &ChannelConfig,
    ) -> std::result::Result<(), String> {
        let id = Uuid::now_v7();
        let event = json!({
            "id": id,
            "event": "channel.test",
            "team_id": team,
            "resource": { "id": channel, "type": "channel" },
            "timestamp": timestamp(now()).to_string(),
            "details": {},
        });
        self.send(provider, config, id, id, &event.to_string()).await
    }

    /// Sends one message. The reason of a failure names no address and no secret.
    async fn send(
        &self,
        provider: ChannelProvider,
        config: &ChannelConfig,
        delivery: Uuid,
        event_id: Uuid,
        event: &str,
    ) -> std::result::Result<(), String> {
        let Message {
            method,
            url,
            headers,
            body,
        } = self.message(provider, config, delivery, event_id, event)?;
        // An address in place of a name is not resolved, so it is checked here.
        self.permitted(&url)
            .map_err(|reason| format!("the address {reason}"))?;
        let sender = self
            .around
            .sender
            .get_or_init(|| {
                sender(
                    self.config.around.allow_private_webhooks,
                    self.config.around.delivery_timeout,
                )
            })
            .clone()?;
        let mut request = sender
            .0
            .request(method, url)
            .header("content-type", "application/json")
            .body(body);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = request.send().await.map_err(|error| reason(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        Err(if status.is_redirection() {
            format!(
                "it answered with a redirect ({}), which is not followed",
                status.as_u16()
            )
        } else {
            format!("it answered with status {}", status.as_u16())
        })
    }

    fn message(
        &self,
        provider: ChannelProvider,
        config: &ChannelConfig,
        delivery: Uuid,
        event_id: Uuid,
        event: &str,
    ) -> std::result::Result<Message, String> {
        let value = |name: &str| {
            config
                .get(name)
                .map(String::as_str)
                .ok_or_else(|| format!("the configuration has no {name}"))
        };
        let url = |text: &str| Url::parse(text).map_err(|_| "the address is not a URL".to_owned());
        let hook = |body: Value| {
            Ok::<_, String>(Message {
                method: http::Method::POST,
                url: url(value("webhook_url")?)?,
                headers: Vec::new(),
                body: body.to_string(),
            })
        };
        let text = sentence(event);
        match provider {
            ChannelProvider::Slack | ChannelProvider::GoogleChat => hook(json!({ "text": text })),
            // Names in metadata must not call people.
            ChannelProvider::Discord => hook(json!({ "content": text, "allowed_mentions": { "parse": [] } })),
            ChannelProvider::Teams => hook(json!({
                "type": "message",
                "attachments": [{
                    "contentType": "application/vnd.microsoft.card.adaptive",
                    "content": {
                        "type": "AdaptiveCard",
                        "version": "1.4",
                        "body": [{ "type": "TextBlock", "text": text, "wrap": true }],
                    },
                }],
            })),
            ChannelProvider::Telegram => {
                let base = self.config.around.telegram_url.trim_end_matches('/');
                Ok(Message {
                    method: http::Method::POST,
                    url: url(&format!("{base}/bot{}/sendMessage", value("bot_token")?))?,
                    headers: Vec::new(),
                    body: json!({ "chat_id": value("chat_id")?, "text": text }).to_string(),
                })
            }
            ChannelProvider::Matrix => {
                let mut url = url(value("homeserver_url")?)?;
                // The event's id as transaction id: the server drops repetitions.
                url.path_segments_mut()
                    .map_err(|()| "the address is not a URL".to_owned())?
                    .pop_if_empty()
                    .extend(["_matrix", "client", "v3", "rooms", value("room_id")?])
                    .extend(["send", "m.room.message", &event_id.simple().to_string()]);
                Ok(Message {
                    method: http::Method::PUT,
                    url,
                    headers: vec![("authorization", format!("Bearer {}", value("access_token")?))],
                    body: json!({ "msgtype": "m.text", "body": text }).to_string(),
                })
            }
            ChannelProvider::Webhook => {
                let seconds = now().div_euclid(1000);
                Ok(Message {
                    method: http::Method::POST,
                    url: url(value("url")?)?,
                    headers: vec![
                        ("user-agent", format!("wrenn/{}", env!("CARGO_PKG_VERSION"))),
                        ("wrenn-event-id", event_id.to_string()),
                        ("wrenn-delivery-id", delivery.to_string()),
                        ("wrenn-timestamp", seconds.to_string()),
                        (
                            "wrenn-signature",
                            signature(value("secret")?, seconds, event.as_bytes())?,
                        ),
                    ],
                    body: event.to_owned(),
                })
            }
        }
    }
}

/// `v1=` and HMAC-SHA256 over the timestamp, a dot, and the body, in hex.
fn signature(secret: &str, seconds: i64, body: &[u8]) -> std::result::Result<String, String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes())
        .map_err(|_| "the secret cannot be used as a key".to_owned())?;
    mac.update(seconds.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    Ok(format!("v1={}", hex::encode(mac.finalize().into_bytes())))
}

/// An event in one sentence, for chats.
fn sentence(event: &str) -> String {
    let event: Value = serde_json::from_str(event).unwrap_or_default();
    let resource = event["resource"]["id"].as_str().unwrap_or("?");
    let word = event["event"].as_str().unwrap_or_default();
    let what = match ChannelEventKind::parse(word) {
        Some(ChannelEventKind::CapsuleCreated) => "was created",
        Some(ChannelEventKind::CapsuleRunning) => "is running",
        Some(ChannelEventKind::CapsulePaused) => "is paused",
        Some(ChannelEventKind::CapsuleDestroyed) => "was destroyed",
        Some(ChannelEventKind::SnapshotCreated) => "is ready as a template",
        Some(ChannelEventKind::SnapshotFailed) => "could not be made as a template",
        Some(ChannelEventKind::SnapshotDeleted) => "was deleted as a template",
        Some(ChannelEventKind::HostUp) => "is online",
        Some(ChannelEventKind::HostDown) => "cannot be reached",
        None => "is set up: this is a test message",
    };
    format!("Wrenn: {resource} {what} ({word})")
}

/// Why a request failed, without its address: that may hold a token.
fn reason(error: &reqwest::Error) -> String {
    if outbound::was_refused(error) {
        return outbound::Refused.to_string();
    }
    if error.is_timeout() {
        "it did not answer in time"
    } else if error.is_connect() {
        "it could not be reached"
    } else {
        "the connection broke"
    }
    .to_owned()
}

/// The wait after a failed attempt, milliseconds: doubles, with a bound, and between half and all of that, so
/// that what failed together does not come back together.
fn backoff(first: Duration, attempts: u32, jitter: f64) -> Millis {
    let doubled = first.saturating_mul(1u32.checked_shl(attempts.saturating_sub(1)).unwrap_or(u32::MAX));
    millis(
        doubled
            .min(MAX_BACKOFF)
            .mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0),
    )
}

fn jitter() -> f64 {
    let mut byte = [0; 1];
    // Without randomness the waits are merely equal.
    let _ = getrandom::fill(&mut byte);
    f64::from(byte[0]) / 255.0
}

fn sender(allow_private: bool, timeout: Duration) -> std::result::Result<Sender, String> {
    reqwest::Client::builder()
        .dns_resolver(Arc::new(Guard { allow_private }))
        .redirect(reqwest::redirect::Policy::none())
        // A proxy would resolve names by itself, behind the guard's back.
        .no_proxy()
        .https_only(!allow_private)
        .timeout(timeout)
        .build()
        .map(Sender)
        .map_err(|error| {
            tracing::error!(%error, "messages to channels cannot be sent");
            "the server cannot make TLS connections; its log has the cause".to_owned()
        })
}

/// Resolves names and lets only public addresses through: the very ones that are then connected to, so a
/// name that changes its address between check and use gains nothing.
struct Guard {
    allow_private: bool,
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let allowed = outbound::resolve(name.as_str(), 0, allow_private).await?;
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_signature_is_hmac_over_time_and_body() {
        // Computed with `printf '1700000000.{}' | openssl dgst -sha256 -hmac key`.
        assert_eq!(
            signature("key", 1_700_000_000, b"{}").expect("signed"),
            "v1=9d713ed406bb7076d4123f0dc2c39d2df5c654ed4b0cd56b52c8b4c940bd63ae"
        );
    }

    proptest! {
        #[test]
        fn waits_grow_and_are_bounded(first in 0u64..100_000, attempts in 0u32..200, jitter in 0f64..1.0) {
            let first = Duration::from_millis(first);
            let wait = backoff(first, attempts, jitter);
            prop_assert!((0..=millis(MAX_BACKOFF)).contains(&wait));
            prop_assert!(backoff(first, attempts + 1, 1.0) >= backoff(first, attempts, 1.0));
            prop_assert!(backoff(first, attempts, 0.0) * 2 <= backoff(first, attempts, 1.0) + 1);
        }
    }
}
