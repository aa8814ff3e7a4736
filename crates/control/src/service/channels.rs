//! Notification channels: what a team's admins set up, and which events go where.

use std::collections::BTreeMap;

use url::{Host, Url};
use wrenn_proto::rest::{ChannelTested, CreateChannel, TestChannel, UpdateChannel};

use super::{Services, validate};
use crate::auth;
use crate::domain::around::{Channel, ChannelEvent, ChannelEventKind, ChannelProvider};
use crate::domain::{ChannelId, Role, Session, TeamId, now};
use crate::store::{self, Outcome};
use crate::{Error, ErrorCode, Result};

/// A channel's configuration in the clear.
pub(crate) type ChannelConfig = BTreeMap<String, String>;

/// Most channels of a team.
const MAX_CHANNELS: u64 = 50;
/// Longest name, characters.
const MAX_NAME: usize = 100;
/// Longest value in a configuration, bytes.
const MAX_VALUE: usize = 2048;

/// A field of a provider's configuration.
struct Field {
    name: &'static str,
    kind: FieldKind,
    required: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FieldKind {
    /// An address whose path is a secret.
    SecretUrl,
    /// An address that anybody may know.
    Url,
    /// A secret.
    Secret,
    /// Part of a path of Telegram's API: a secret of a known form.
    BotToken,
    /// A name.
    Plain,
}

const fn field(name: &'static str, kind: FieldKind) -> Field {
    Field {
        name,
        kind,
        required: true,
    }
}

fn fields(provider: ChannelProvider) -> &'static [Field] {
    const HOOK: &[Field] = &[field("webhook_url", FieldKind::SecretUrl)];
    const TELEGRAM: &[Field] = &[
        field("bot_token", FieldKind::BotToken),
        field("chat_id", FieldKind::Plain),
    ];
    const MATRIX: &[Field] = &[
        field("homeserver_url", FieldKind::Url),
        field("access_token", FieldKind::Secret),
        field("room_id", FieldKind::Plain),
    ];
    const WEBHOOK: &[Field] = &[
        field("url", FieldKind::SecretUrl),
        Field {
            required: false,
            ..field("secret", FieldKind::Secret)
        },
    ];
    match provider {
        ChannelProvider::Slack
        | ChannelProvider::Discord
        | ChannelProvider::Teams
        | ChannelProvider::GoogleChat => HOOK,
        ChannelProvider::Telegram => TELEGRAM,
        ChannelProvider::Matrix => MATRIX,
        ChannelProvider::Webhook => WEBHOOK,
    }
}

/// A channel with its configuration masked; `secret` only right after it was made up.
pub struct ShownChannel {
    /// The channel.
    pub channel: Channel,
    /// Its configuration, secrets masked.
    pub config: ChannelConfig,
    /// What it signs with; only in the answer that made it.
    pub secret: Option<String>,
}

wrenn_proto::discreet_debug!(ShownChannel shows(channel, config) hides(secret));

impl Services {
    /// Adds a channel.
    pub async fn create_channel(&self, session: &Session, body: CreateChannel) -> Result<ShownChannel> {
        let team = managed(session)?;
        let CreateChannel {
            name,
            provider,
            config,
            events,
        } = body;
        let name = channel_name(&name)?;
        let events = chosen(events)?;
        let (config, secret) = self.checked(provider, config)?;
        if self.store.channel_count(team).await? >= MAX_CHANNELS {
            return Err(Error::new(
                ErrorCode::Conflict,
                format!("the team has {MAX_CHANNELS} channels already; delete one first"),
            ));
        }
        let id = ChannelId::new();
        let now = now();
        let channel = Channel {
            id,
            team,
            name,
            provider,
            sealed: self.seal_channel(id, &config)?,
            events,
            created_by: Some(session.user),
            created_at: now,
            updated_at: now,
            delivered_at: None,
            failed_at: None,
            last_error: None,
        };
        self.store
            .channel_insert(&channel)
            .await
            .map_err(|error| taken(error, &channel.name))?;
        Ok(ShownChannel {
            config: masked(provider, &config),
            channel,
            secret,
        })
    }

    /// A team's channels, by name.
    pub async fn list_channels(
        &self,
        session: &Session,
        after: Option<&str>,
        limit: Option<u32>,
    ) -> Result<Vec<ShownChannel>> {
        let (team, _) = session.in_team()?;
        let limit = limit.unwrap_or(100);
        validate::within("limit", limit, 1, 100)?;
        if after.is_some_and(|after| after.contains('\0')) {
            return Err(Error::invalid("after must not contain a NUL character"));
        }
        let channels = self.store.channels_of_team(team, after, limit.into()).await?;
        Ok(channels.into_iter().map(|channel| self.shown(channel)).collect())
    }

    /// One channel.
    pub async fn get_channel(&self, session: &Session, id: &str) -> Result<ShownChannel> {
        let (team, _) = session.in_team()?;
        let channel = self.channel(team, id).await?;
        Ok(self.shown(channel))
    }

    /// Changes a channel's name and events.
    pub async fn update_channel(
        &self,
        session: &Session,
        id: &str,
        body: UpdateChannel,
    ) -> Result<ShownChannel> {
        let team = managed(session)?;
        let UpdateChannel { name, events } = body;
        let name = name.as_deref().map(channel_name).transpose()?;
        let events = events.map(chosen).transpose()?;
        for _ in 0..16 {
            let channel = self.channel(team, id).await?;
            let name = name.as_deref().unwrap_or(&channel.name);
            let events = events.as_deref().unwrap_or(&channel.events);
            let outcome = self
                .store
                .channel_update(&channel, name, events, now())
                .await
                .map_err(|error| taken(error, name))?;
            if let Some(done) = self.changed(team, id, outcome).await? {
                return Ok(done);
            }
        }
        Err(busy())
    }

    /// Replaces a channel's configuration.
    pub async fn reconfigure_channel(
        &self,
        session: &Session,
        id: &str,
        config: ChannelConfig,
    ) -> Result<ShownChannel> {
        let team = managed(session)?;
        for _ in 0..16 {
            let channel = self.channel(team, id).await?;
            let (config, secret) = self.checked(channel.provider, config.clone())?;
            let sealed = self.seal_channel(channel.id, &config)?;
            let outcome = self.store.channel_reconfigure(&channel, &sealed, now()).await?;
            if let Some(done) = self.changed(team, id, outcome).await? {
                return Ok(ShownChannel { secret, ..done });
            }
        }
        Err(busy())
    }

    async fn changed(&self, team: TeamId, id: &str, outcome: Outcome) -> Result<Option<ShownChannel>> {
        match outcome {
            Outcome::Updated => Ok(Some(self.shown(self.channel(team, id).await?))),
            Outcome::Stale => Ok(None),
            Outcome::Missing => Err(Error::not_found("channel", id)),
        }
    }

    /// Removes a channel; what was on its way to it is dropped.
    pub async fn delete_channel(&self, session: &Session, id: &str) -> Result<()> {
        let team = managed(session)?;
        let missing = || Error::not_found("channel", id);
        let parsed = id.parse().map_err(|_| missing())?;
        match self.store.channel_delete(team, parsed).await? {
            Outcome::Updated => Ok(()),
            Outcome::Stale | Outcome::Missing => Err(missing()),
        }
    }

    /// Sends a test message now.
    pub async fn test_channel(&self, session: &Session, body: TestChannel) -> Result<ChannelTested> {
        let team = managed(session)?;
        let TestChannel {
            channel_id,
            provider,
            config,
        } = body;
        let (id, provider, config) = match (channel_id, provider, config) {
            (Some(id), None, None) => {
                let channel = self.channel(team, &id).await?;
                let config = self.open_channel(&channel)?;
                (channel.id, channel.provider, config)
            }
            (None, Some(provider), Some(config)) => {
                (ChannelId::new(), provider, self.checked(provider, config)?.0)
            }
            _ => {
                return Err(Error::invalid(
                    "give either channel_id, or provider and config, to say what to test",
                ));
            }
        };
        let error = self.send_test(team, id, provider, &config).await.err();
        Ok(ChannelTested {
            delivered: error.is_none(),
            error,
        })
    }

    /// Puts an event on its way to the channels of its team that want it. Told twice, it is sent once.
    pub async fn channels_on_event(&self, event: &ChannelEvent) -> Result<()> {
        let channels = self
            .store
            .channels_of_team(event.team, None, MAX_CHANNELS * 2)
            .await?;
        let text = super::deliver::event_json(event)?;
        let mut some = false;
        for channel in channels
            .into_iter()
            .filter(|channel| channel.events.contains(&event.kind))
        {
            let put = self
                .store
                .deliveries_insert(&[channel.id], event.id, &text, now())
                .await;
            match put {
                Ok(()) => some = true,
                // Deleted in this moment; then nobody waits for it.
                Err(_)
                    if self
                        .store
                        .channel_of_team(event.team, channel.id)
                        .await?
                        .is_none() => {}
                Err(error) => return Err(error.into()),
            }
        }
        if some {
            self.around.deliver.notify_one();
        }
        Ok(())
    }

    async fn channel(&self, team: TeamId, id: &str) -> Result<Channel> {
        let missing = || Error::not_found("channel", id);
        let parsed: ChannelId = id.parse().map_err(|_| missing())?;
        self.store
            .channel_of_team(team, parsed)
            .await?
            .ok_or_else(missing)
    }

    /// A channel whose configuration cannot be opened (it was sealed under another secret) is shown without it: its owner
    /// can give it a new one, or delete it.
    fn shown(&self, channel: Channel) -> ShownChannel {
        let config = self.open_channel(&channel).unwrap_or_else(|error| {
            tracing::error!(
                channel = %channel.id,
                error = &error as &dyn std::error::Error,
                "a channel's configuration cannot be opened"
            );
            ChannelConfig::default()
        });
        ShownChannel {
            config: masked(channel.provider, &config),
            channel,
            secret: None,
        }
    }

    fn seal_channel(&self, id: ChannelId, config: &ChannelConfig) -> Result<String> {
        let plain = serde_json::to_vec(config).map_err(Error::internal)?;
        self.secret.seal(&id.to_string(), &plain)
    }

    pub(super) fn open_channel(&self, channel: &Channel) -> Result<ChannelConfig> {
        let plain = self.secret.open(&channel.id.to_string(), &channel.sealed)?;
        serde_json::from_slice(&plain).map_err(|_| Error::internal("a channel's configuration is damaged"))
    }

    /// A configuration with exactly its provider's fields, and the secret that was made up, if one was.
    fn checked(
        &self,
        provider: ChannelProvider,
        mut config: ChannelConfig,
    ) -> Result<(ChannelConfig, Option<String>)> {
        let fields = fields(provider);
        let word = provider.as_str();
        if let Some(unknown) = config
            .keys()
            .find(|key| fields.iter().all(|field| field.name != key.as_str()))
        {
            let unknown: String = unknown.chars().take(64).collect();
            let known: Vec<_> = fields.iter().map(|field| field.name).collect();
            return Err(Error::invalid(format!(
                "config: '{unknown}' is not a field of {word}; it has {}",
                known.join(", ")
            )));
        }
        // An empty secret would sign nothing.
        if config.get("secret").is_some_and(String::is_empty) {
            config.remove("secret");
        }
        for field in fields {
            let Some(value) = config.get(field.name) else {
                if field.required {
                    return Err(Error::invalid(format!(
                        "config: {} is required for {word}",
                        field.name
                    )));
                }
                continue;
            };
            self.check_value(field, value)
                .map_err(|reason| Error::invalid(format!("config: {} {reason}", field.name)))?;
        }
        let mut made = None;
        if provider == ChannelProvider::Webhook && !config.contains_key("secret") {
            let secret = auth::random_secret("whsec_", 32)?;
            config.insert("secret".to_owned(), secret.clone());
            made = Some(secret);
        }
        Ok((config, made))
    }

    fn check_value(&self, field: &Field, value: &str) -> std::result::Result<(), String> {
        if value.is_empty() || value.len() > MAX_VALUE || value.chars().any(char::is_control) {
            return Err(format!(
                "must be 1 to {MAX_VALUE} bytes without control characters"
            ));
        }
        match field.kind {
            FieldKind::SecretUrl | FieldKind::Url => {
                let url = Url::parse(value).map_err(|_| "must be an absolute URL".to_owned())?;
                self.permitted(&url)
            }
            FieldKind::BotToken => {
                let good = value
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b":_-".contains(&byte));
                good.then_some(())
                    .ok_or_else(|| "must be a token from BotFather, such as 123456:ABC…".to_owned())
            }
            FieldKind::Secret => value
                .bytes()
                .all(|byte| byte.is_ascii_graphic())
                .then_some(())
                .ok_or_else(|| "must be printable ASCII without spaces".to_owned()),
            FieldKind::Plain => Ok(()),
        }
    }

    /// Whether messages may go to an address, as far as the address itself tells; names are resolved, and
    /// their addresses checked, when a message is sent.
    pub(super) fn permitted(&self, url: &Url) -> std::result::Result<(), String> {
        let private = self.config.around.allow_private_webhooks;
        match url.scheme() {
            "https" => {}
            "http" if private => {}
            _ => return Err("must be an https URL".to_owned()),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("must not contain a user name or password".to_owned());
        }
        let address = match url.host() {
            None => return Err("must name a host".to_owned()),
            Some(Host::Domain(_)) => return Ok(()),
            Some(Host::Ipv4(address)) => address.into(),
            Some(Host::Ipv6(address)) => address.into(),
        };
        if private || crate::outbound::is_public(address) {
            return Ok(());
        }
        Err("must not lead to a private address".to_owned())
    }
}

/// The team whose channels the caller may change.
fn managed(session: &Session) -> Result<TeamId> {
    match session.in_team()? {
        (team, Role::Owner | Role::Admin) => Ok(team),
        (_, Role::Member) => Err(Error::new(
            ErrorCode::Forbidden,
            "only owners and admins of the team may manage its channels",
        )),
    }
}

fn channel_name(name: &str) -> Result<String> {
    let name = name.trim();
    let good = (1..=MAX_NAME).contains(&name.chars().count()) && !name.chars().any(char::is_control);
    good.then(|| name.to_owned()).ok_or_else(|| {
        Error::invalid(format!(
            "name must be 1 to {MAX_NAME} characters without control characters"
        ))
    })
}

fn chosen(mut events: Vec<ChannelEventKind>) -> Result<Vec<ChannelEventKind>> {
    events.sort_unstable();
    events.dedup();
    if events.is_empty() {
        return Err(Error::invalid("events must name at least one event"));
    }
    Ok(events)
}

fn taken(error: sea_orm::DbErr, name: &str) -> Error {
    if store::is_duplicate(&error) {
        return Error::new(
            ErrorCode::Conflict,
            format!("a channel named '{name}' exists already; choose another name"),
        );
    }
    error.into()
}

fn busy() -> Error {
    Error::new(ErrorCode::Conflict, "the channel keeps changing; try again")
}

/// A configuration as it may be shown.
fn masked(provider: ChannelProvider, config: &ChannelConfig) -> ChannelConfig {
    let mut shown = ChannelConfig::new();
    for field in fields(provider) {
        let Some(value) = config.get(field.name) else {
            continue;
        };
        let value = match field.kind {
            FieldKind::Plain | FieldKind::Url => value.clone(),
            FieldKind::SecretUrl => Url::parse(value).map_or_else(
                |_| "••••".to_owned(),
                |url| format!("{}/••••", url.origin().ascii_serialization()),
            ),
            FieldKind::Secret | FieldKind::BotToken => {
                let tail = value.len().checked_sub(4).and_then(|at| value.get(at..));
                // A short secret has no part to spare.
                match tail.filter(|_| value.len() >= 20) {
                    Some(tail) => format!("••••{tail}"),
                    None => "••••".to_owned(),
                }
            }
        };
        shown.insert(field.name.to_owned(), value);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_shown() {
        let secret = "s3cr3t-value-that-is-long-enough";
        for &provider in ChannelProvider::ALL {
            let config: ChannelConfig = fields(provider)
                .iter()
                .map(|field| {
                    let value = match field.kind {
                        FieldKind::SecretUrl => format!("https://example.com/{secret}?key={secret}"),
                        FieldKind::Url => "https://example.com".to_owned(),
                        FieldKind::Secret | FieldKind::BotToken => secret.to_owned(),
                        FieldKind::Plain => "room".to_owned(),
                    };
                    (field.name.to_owned(), value)
                })
                .collect();
            let shown = masked(provider, &config);
            assert_eq!(shown.len(), config.len());
            assert!(!format!("{shown:?}").contains("s3cr3t"), "{shown:?}");
        }
        let short = ChannelConfig::from([("secret".to_owned(), "abcdefgh".to_owned())]);
        assert_eq!(masked(ChannelProvider::Webhook, &short)["secret"], "••••");
    }
}
