//! The way to the other instances: a channel for wake-ups, and a stream with a consumer group for state events.
//!
//! Redis holds nothing that is not in the database too. When it is away, wake-ups are lost (readers poll) and state
//! events wait in the outbox; when it comes back empty, what was on its way is told again from there.

use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use redis::streams::{
    StreamAutoClaimOptions, StreamAutoClaimReply, StreamId, StreamInfoConsumersReply, StreamMaxlen,
    StreamReadOptions, StreamReadReply,
};
use redis::{AsyncCommands as _, AsyncConnectionConfig, Client, RedisError};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{Bus, Event};
use crate::auth::secrets::MasterSecret;
use crate::domain::event::StateEvent;
use crate::{Error, ErrorCode, Result};

/// The consumer group: all control planes together.
const GROUP: &str = "control";
/// The stream's one field.
const FIELD: &str = "event";
/// About how many entries the stream keeps; readers that were away longer are told again from the outbox.
const MAX_ENTRIES: usize = 100_000;
/// Longest wait for an answer or a connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a read waits for news.
const BLOCK: Duration = Duration::from_secs(2);
/// Least silence of a consumer that counts as dead: one that lives asks after each wait.
const SILENCE: Duration = Duration::from_secs(5);
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(500);

/// One installation's part of a Redis.
#[derive(Clone)]
pub(crate) struct Link {
    client: Client,
    commands: ConnectionManager,
    channel: String,
    stream: String,
    consumer: String,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The client's URL may hold a password.
        f.debug_struct("Link")
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

/// An entry of the stream.
pub(crate) struct Entry {
    pub(crate) id: String,
    /// `None`: not one of ours, or from a newer version.
    pub(crate) event: Option<StateEvent>,
}

impl Link {
    /// Does not connect yet: a Redis that is away at the start is like one that goes away later.
    pub(crate) fn new(url: &str, secret: &MasterSecret, instance: Uuid) -> Result<Self> {
        // Two of the libraries bring a provider of cryptography each, so that rustls has no default of its own and
        // would panic at the first `rediss://`. This is the one that `reqwest` takes by itself. Whoever embeds the
        // control plane may have chosen already; then that choice stays, and this fails.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        // The URL is not repeated: it may hold a password.
        let client = Client::open(url).map_err(|error| {
            Error::new(
                ErrorCode::InvalidRequest,
                format!(
                    "REDIS_URL is not usable ({}); it looks like redis://host:6379, or rediss://host:6379 with TLS",
                    error.category()
                ),
            )
        })?;
        if insecure(&client) {
            return Err(Error::new(
                ErrorCode::InvalidRequest,
                "REDIS_URL asks not to check the server's certificate (#insecure), which is not supported; remove \
                 that, and add the authority that signed the certificate to this machine (or name it in SSL_CERT_FILE)",
            ));
        }
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let commands =
            ConnectionManager::new_lazy_with_config(client.clone(), config).map_err(Error::internal)?;
        // Installations that share a Redis do not hear each other.
        let name = hex::encode(&secret.derive("redis")[..6]);
        Ok(Self {
            client,
            commands,
            channel: format!("wrenn:{name}:wake"),
            stream: format!("wrenn:{name}:events"),
            consumer: instance.to_string(),
        })
    }

    /// Carries this instance's wake-ups to the others, for ever.
    pub(crate) async fn carry_out(self, mut wakeups: mpsc::Receiver<Event>) {
        let mut commands = self.commands.clone();
        while let Some(event) = wakeups.recv().await {
            let told: Result<i64, RedisError> = commands
                .publish(&self.channel, format!("{}|{}", self.consumer, event.word()))
                .await;
            if let Err(error) = told {
                tracing::debug!(%error, "a wake-up did not reach the other instances");
            }
        }
    }

    /// Brings the others' wake-ups in, for ever.
    pub(crate) async fn bring_in(self, bus: Bus) {
        loop {
            if let Err(error) = self.listen(&bus).await {
                tracing::debug!(%error, "no wake-ups from other instances for now");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn listen(&self, bus: &Bus) -> Result<(), RedisError> {
        use futures::StreamExt as _;
        let mut subscription = self.client.get_async_pubsub().await?;
        subscription.subscribe(&self.channel).await?;
        // What was said before was not heard.
        bus.publish_here(Event::Outbox);
        let mut messages = subscription.on_message();
        while let Some(message) = messages.next().await {
            let text: String = message.get_payload()?;
            if let Some((from, word)) = text.split_once('|')
                && from != self.consumer
                && let Some(event) = Event::parse(word)
            {
                bus.publish_here(event);
            }
        }
        Ok(())
    }

    /// Appends events to the stream, in order.
    pub(crate) async fn append(&self, events: &[StateEvent]) -> Result<(), RedisError> {
        let mut pipe = redis::pipe();
        for event in events {
            let text = serde_json::to_string(event)
                .map_err(|error| RedisError::from(std::io::Error::other(error)))?;
            pipe.xadd_maxlen(
                &self.stream,
                StreamMaxlen::Approx(MAX_ENTRIES),
                "*",
                &[(FIELD, text)],
            )
            .ignore();
        }
        pipe.query_async(&mut self.commands.clone()).await
    }

    /// A connection for reads that wait, with the group in place.
    pub(crate) async fn reader(&self) -> Result<MultiplexedConnection, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(BLOCK + PATIENCE));
        let mut connection = self
            .client
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        let made: Result<(), RedisError> = connection.xgroup_create_mkstream(&self.stream, GROUP, "0").await;
        match made {
            Err(error) if error.code() != Some("BUSYGROUP") => Err(error),
            _ => Ok(connection),
        }
    }

    /// The next events for this instance; none after a while without any.
    pub(crate) async fn read(
        &self,
        connection: &mut MultiplexedConnection,
    ) -> Result<Vec<Entry>, RedisError> {
        let options = StreamReadOptions::default()
            .group(GROUP, &self.consumer)
            .count(100)
            .block(usize::try_from(BLOCK.as_millis()).unwrap_or(usize::MAX));
        let reply: Option<StreamReadReply> = connection
            .xread_options(&[&self.stream], &[">"], &options)
            .await?;
        let keys = reply.map(|reply| reply.keys).unwrap_or_default();
        Ok(keys.into_iter().flat_map(|key| key.ids).map(entry).collect())
    }

    /// Events that an instance took and did not acknowledge for this long: it died, or failed on them.
    pub(crate) async fn claim(
        &self,
        connection: &mut MultiplexedConnection,
        idle: Duration,
    ) -> Result<Vec<Entry>, RedisError> {
        let reply: StreamAutoClaimReply = connection
            .xautoclaim_options(
                &self.stream,
                GROUP,
                &self.consumer,
                usize::try_from(idle.as_millis()).unwrap_or(usize::MAX),
                "0-0",
                StreamAutoClaimOptions::default().count(100),
            )
            .await?;
        Ok(reply.claimed.into_iter().map(entry).collect())
    }

    /// Removes consumers from the group that have nothing open and did not ask for this long: instances that died. Returns
    /// how many. One that lives after all is in the group again with its next question.
    pub(crate) async fn bury(
        &self,
        connection: &mut MultiplexedConnection,
        silence: Duration,
    ) -> Result<usize, RedisError> {
        let silence = silence.max(SILENCE);
        let group: StreamInfoConsumersReply = connection.xinfo_consumers(&self.stream, GROUP).await?;
        let mut buried = 0;
        for consumer in group.consumers {
            let silent = u128::try_from(consumer.idle).is_ok_and(|idle| idle >= silence.as_millis());
            if silent && consumer.pending == 0 && consumer.name != self.consumer {
                let _: i64 = connection
                    .xgroup_delconsumer(&self.stream, GROUP, &consumer.name)
                    .await?;
                buried += 1;
            }
        }
        Ok(buried)
    }

    /// These need not be told to anybody of the group again.
    pub(crate) async fn acknowledge(
        &self,
        connection: &mut MultiplexedConnection,
        ids: &[String],
    ) -> Result<(), RedisError> {
        connection.xack(&self.stream, GROUP, ids).await
    }

    /// Leaves the group, unless something that this instance took is still open; then others claim it first.
    pub(crate) async fn leave(&self) {
        let mut commands = self.commands.clone();
        let mine = redis::cmd("XPENDING")
            .arg(&self.stream)
            .arg(GROUP)
            .arg("-")
            .arg("+")
            .arg(1)
            .arg(&self.consumer)
            .query_async::<Vec<redis::Value>>(&mut commands)
            .await;
        if mine.is_ok_and(|open| open.is_empty()) {
            let _: Result<i64, RedisError> = commands
                .xgroup_delconsumer(&self.stream, GROUP, &self.consumer)
                .await;
        }
    }
}

/// Whether the URL asks for TLS with anybody. Without this check every connection would fail, in the log only.
fn insecure(client: &Client) -> bool {
    matches!(
        client.get_connection_info().addr(),
        redis::ConnectionAddr::TcpTls { insecure: true, .. }
    )
}

fn entry(entry: StreamId) -> Entry {
    let event = entry
        .get::<String>(FIELD)
        .and_then(|text| serde_json::from_str(&text).ok());
    Entry { id: entry.id, event }
}
