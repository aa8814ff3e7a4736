//! The business logic. The API, the command line's admin calls and the dashboard all go through here.
//!
//! Services know the store, the hosts and the bus; they know nothing of HTTP.

pub(crate) mod access;
pub(crate) mod accounts;
pub(crate) mod admin;
pub(crate) mod around;
pub(crate) mod audit;
pub(crate) mod bootstrap;
pub(crate) mod channels;
pub(crate) mod deletion;
pub(crate) mod deliver;
mod drive;
pub(crate) mod events;
pub(crate) mod files;
mod gauges;
pub(crate) mod host_management;
pub(crate) mod hosts;
pub(crate) mod idempotency;
pub(crate) mod keys;
mod lately;
mod leader;
pub(crate) mod monitor;
mod places;
pub(crate) mod processes;
pub(crate) mod sandbox_metrics;
pub(crate) mod sandboxes;
pub(crate) mod teams;
pub(crate) mod templates;
pub(crate) mod usage;
pub(crate) mod validate;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::auth::jwt::Sessions;
use crate::auth::secrets::MasterSecret;
use crate::config::ControlConfig;
use crate::domain::{HostId, Principal, Sandbox, SandboxId, SandboxStatus};
use crate::events::redis::Link;
use crate::events::{Bus, Event};
use crate::extension::Extensions;
use crate::hosts::{Client, Pool, Scheduler};
use crate::store::Store;
use crate::tasks::Tasks;
use crate::{Error, ErrorCode, Result};

/// The business logic and everything it shares: what the API, the command line and extensions stand on. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    inner: Arc<Inner>,
}

#[doc(hidden)]
pub struct Inner {
    pub(crate) config: ControlConfig,
    pub(crate) store: Store,
    /// Who else hears of events.
    pub(crate) extensions: Extensions,
    /// Seals what is stored and has to be read again.
    pub(crate) secret: MasterSecret,
    pub(crate) sessions: Sessions,
    pub(crate) bus: Bus,
    pub(crate) tasks: Tasks,
    /// The way to the other instances, if there is one.
    link: Option<Link>,
    /// Wake-ups for them, until somebody carries these.
    carry: Mutex<Option<tokio::sync::mpsc::Receiver<Event>>>,
    leadership: leader::Leadership,
    /// Sandboxes that no record knows, and since when this instance has seen them.
    strangers: Mutex<HashMap<SandboxId, crate::domain::Millis>>,
    /// API keys that were looked up lately.
    known_keys: keys::KnownKeys,
    /// Where sandboxes run that were looked up lately.
    places: places::Places,
    /// Deleted teams that are being emptied.
    purging: deletion::Purging,
    accounts: accounts::Accounts,
    pub(crate) around: around::Around,
    /// What the metrics page counted last.
    gauges: gauges::Counted,
    pool: Pool,
    scheduler: Scheduler,
    /// Decisions that a task of this process carries at the moment, and whether they were asked for again since.
    driven: Mutex<HashMap<(SandboxId, u64, SandboxStatus), bool>>,
    /// Starts the monitor's next pass.
    poke: tokio::sync::Notify,
}

impl std::ops::Deref for Services {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl Services {
    pub(crate) fn new(config: ControlConfig, store: Store, extensions: Extensions) -> Result<Self> {
        let secret = match &config.secret {
            Some(secret) => secret.clone(),
            None => crate::config::kept_secret(&config.data_dir)?,
        };
        let instance = uuid::Uuid::new_v4();
        let (link, bus, carry) = match &config.redis_url {
            Some(url) => {
                let (bus, carry) = Bus::carried();
                (Some(Link::new(url, &secret, instance)?), bus, Some(carry))
            }
            None => (None, Bus::in_process(), None),
        };
        let tasks = Tasks::default();
        let accounts = accounts::Accounts::new(&config, &tasks)?;
        Ok(Self {
            inner: Arc::new(Inner {
                accounts,
                sessions: Sessions::new(&secret),
                pool: Pool::new(secret.clone(), config.allow_private_byoc),
                places: places::Places::new(&bus),
                config,
                store,
                extensions,
                bus,
                tasks,
                link,
                carry: Mutex::new(carry),
                leadership: leader::Leadership::new(instance),
                strangers: Mutex::default(),
                known_keys: keys::KnownKeys::default(),
                purging: deletion::Purging::default(),
                around: around::Around::default(),
                gauges: gauges::Counted::default(),
                secret,
                scheduler: Scheduler::default(),
                driven: Mutex::default(),
                poke: tokio::sync::Notify::new(),
            }),
        })
    }

    /// A sandbox of the caller's team.
    pub async fn sandbox(&self, principal: Principal, id: &str) -> Result<Sandbox> {
        self.store
            .sandbox_of_team(principal.team, parse_id(id)?)
            .await?
            .ok_or_else(|| no_sandbox(id))
    }

    /// A running sandbox of the caller's team, and its host's client.
    pub(crate) async fn running(
        &self,
        principal: Principal,
        id: &str,
        verb: &str,
    ) -> Result<(Sandbox, Client)> {
        // In one statement: this stands before each call into a guest.
        let (sandbox, host) = self
            .store
            .sandbox_of_team_with_host(principal.team, parse_id(id)?)
            .await?
            .ok_or_else(|| no_sandbox(id))?;
        if sandbox.status != SandboxStatus::Running {
            return Err(Error::wrong_status(verb, sandbox.status));
        }
        let client = self.pool.client(&host.ok_or_else(host_gone)?)?;
        Ok((sandbox, client))
    }

    /// The client of a sandbox's host.
    pub(crate) async fn client_of(&self, sandbox: &Sandbox) -> Result<Client> {
        let host = sandbox
            .host
            .ok_or_else(|| Error::wrong_status("reach", sandbox.status))?;
        self.client(host).await
    }

    /// The client of a host.
    pub(crate) async fn client(&self, host: HostId) -> Result<Client> {
        self.pool.client(&self.host_of(host).await?)
    }

    /// A sandbox's host.
    async fn host_of(&self, host: HostId) -> Result<crate::domain::Host> {
        self.store.host(host).await?.ok_or_else(host_gone)
    }

    /// Takes up what an earlier process left unfinished.
    pub(crate) async fn take_up_unfinished(&self) -> Result<()> {
        for sandbox in self.store.sandboxes_in_transit(crate::domain::now()).await? {
            tracing::info!(sandbox = %sandbox.id, status = %sandbox.status, "taking up an unfinished operation");
            self.drive(sandbox.id);
        }
        Ok(())
    }

    /// The database, for an extension's own tables. The control plane's tables are its own to write.
    #[must_use]
    pub fn database(&self) -> &sea_orm::DatabaseConnection {
        self.store.database()
    }

    /// All hosts, and what they said of themselves last.
    pub async fn hosts(&self) -> Result<Vec<crate::domain::Host>> {
        Ok(self.store.hosts().await?)
    }

    /// Whether the database answers.
    pub(crate) async fn healthy(&self) -> Result<()> {
        Ok(self.store.ping().await?)
    }

    /// Starts the monitor's next pass now, on the instance where it runs.
    pub(crate) fn poke(&self) {
        self.poke.notify_one();
        if !self.leads() {
            self.bus.publish(Event::Poke);
        }
    }
}

fn no_sandbox(id: &str) -> Error {
    Error::not_found("sandbox", id)
}

/// An id that is none names no sandbox.
fn parse_id(id: &str) -> Result<SandboxId> {
    id.parse().map_err(|_| no_sandbox(id))
}

fn host_gone() -> Error {
    Error::new(ErrorCode::HostUnavailable, "the sandbox's host is gone")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use wrenn_proto::rest::{ChannelProvider, Secret};

    use super::*;
    use crate::config::{OAuthProvider, SmtpConfig};
    use crate::domain::account::{Account, UserStatus};
    use crate::domain::around::Channel;
    use crate::domain::{ChannelId, Host, HostStatus, TeamId, TemplateId, UserId};

    #[test]
    fn what_services_pass_around_shows_no_secrets() {
        let marked = || BTreeMap::from([("PASSWORD".to_owned(), "hunter2".to_owned())]);
        let text = || "hunter2".to_owned();
        let sandbox = Sandbox {
            id: SandboxId::new(),
            team: TeamId::new(),
            host: None,
            template: TemplateId::MINIMAL,
            template_team: TeamId::PLATFORM,
            template_name: "minimal".to_owned(),
            status: SandboxStatus::Pending,
            previous: None,
            generation: 1,
            snapshot: None,
            vcpus: 1,
            memory_mb: 512,
            disk_size_mb: 1024,
            timeout_sec: 0,
            metadata: BTreeMap::new(),
            envs: marked(),
            failure: None,
            created_at: 0,
            started_at: None,
            last_active_at: None,
            updated_at: 0,
            status_at: 0,
            actor: None,
        };
        let channel = Channel {
            id: ChannelId::new(),
            team: TeamId::new(),
            name: "c".to_owned(),
            provider: ChannelProvider::Webhook,
            sealed: text(),
            events: Vec::new(),
            created_by: None,
            created_at: 0,
            updated_at: 0,
            delivered_at: None,
            failed_at: None,
            last_error: None,
        };
        let host = Host {
            id: HostId::new(),
            owner: crate::domain::HostOwner::Platform,
            provider: None,
            availability_zone: None,
            status: HostStatus::Online,
            deletion: None,
            arch: String::new(),
            version: String::new(),
            address: "http://h:1".to_owned(),
            rpc_token: text(),
            cpu_cores: 1,
            memory_mb: 1,
            disk_gb: 1,
            memory_available_mb: 1,
            disk_available_mb: 1,
            last_heartbeat_at: None,
            created_at: 0,
        };
        let account = Account {
            id: UserId::new(),
            email: "a@b.c".to_owned(),
            name: "A".to_owned(),
            status: UserStatus::Active,
            password_hash: Some(text()),
            session_version: 0,
            email_verified: false,
            platform_admin: false,
        };
        let mut config = ControlConfig::new("/data");
        config.database_url = Some("postgres://u:hunter2@h/d".to_owned());
        config.redis_url = Some("redis://:hunter2@h".to_owned());
        config.smtp = Some(SmtpConfig {
            url: "smtp://u:hunter2@h".to_owned(),
            from: "a@b.c".to_owned(),
        });
        config.oauth = vec![OAuthProvider::github("id", "hunter2")];
        let shown = [
            format!("{sandbox:#?}"),
            format!("{channel:#?}"),
            format!("{host:#?}"),
            format!("{account:#?}"),
            format!("{config:#?}"),
            format!(
                "{:#?}",
                processes::Spec {
                    cmd: "env".to_owned(),
                    envs: marked(),
                    ..Default::default()
                }
            ),
            format!(
                "{:#?}",
                channels::ShownChannel {
                    channel,
                    config: BTreeMap::new(),
                    secret: Some(text()),
                }
            ),
            format!(
                "{:#?}",
                idempotency::Begun::Answered(idempotency::KeptAnswer {
                    status: 201,
                    content_type: None,
                    body: Secret::new(text()),
                })
            ),
            format!(
                "{:#?}",
                bootstrap::HostToken {
                    host_id: HostId::new(),
                    token: text(),
                }
            ),
        ];
        for text in shown {
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}
