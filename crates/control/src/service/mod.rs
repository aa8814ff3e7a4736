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
pub(crate) mod hosts;
pub(crate) mod idempotency;
pub(crate) mod keys;
mod leader;
pub(crate) mod monitor;
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
    pub(crate) fn new(config: ControlConfig, store: Store) -> Result<Self> {
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
                secret,
                config,
                store,
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
                pool: Pool::new(),
                scheduler: Scheduler::default(),
                driven: Mutex::default(),
                poke: tokio::sync::Notify::new(),
            }),
        })
    }

    /// A sandbox of the caller's team.
    pub async fn sandbox(&self, principal: Principal, id: &str) -> Result<Sandbox> {
        let missing = || Error::not_found("sandbox", id);
        let parsed: SandboxId = id.parse().map_err(|_| missing())?;
        self.store
            .sandbox_of_team(principal.team, parsed)
            .await?
            .ok_or_else(missing)
    }

    /// A running sandbox of the caller's team, and its host's client.
    pub(crate) async fn running(
        &self,
        principal: Principal,
        id: &str,
        verb: &str,
    ) -> Result<(Sandbox, Client)> {
        let sandbox = self.sandbox(principal, id).await?;
        if sandbox.status != SandboxStatus::Running {
            return Err(Error::wrong_status(verb, sandbox.status));
        }
        let client = self.client_of(&sandbox).await?;
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
        let host = self
            .store
            .host(host)
            .await?
            .ok_or_else(|| Error::new(ErrorCode::HostUnavailable, "the sandbox's host is gone"))?;
        self.pool.client(&host)
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
