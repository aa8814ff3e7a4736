//! What host agents tell: registration, tokens, heartbeats, and changes that happened by themselves.

use wrenn_proto::rest::{
    Heartbeat, HostTokens, RefreshHostToken, RegisterHost, RegisteredHost, SandboxEvent, SandboxFailure,
    SandboxStatus,
};

use super::Services;
use super::drive::millis;
use crate::auth;
use crate::domain::around::AuditEntry;
use crate::domain::lifecycle::{HostState, Source, Verdict, apply_report};
use crate::domain::{Failure, Host, HostId, HostOwner, Millis, SandboxId, TemplateId, now};
use crate::events::Event;
use crate::hosts::pool::{TOKEN_PREFIX, check_public, is_plain, seal_token};
use crate::hosts::rpc;
use crate::store::{Change, HostFacts, HostRefresh, HostRegistration, Outcome};
use crate::{Error, ErrorCode, Result};

/// Life of an agent's bearer token: 7 days.
const TOKEN_LIFE: Millis = 7 * 24 * 3_600_000;
/// Life of its refresh token: 60 days.
const REFRESH_LIFE: Millis = 60 * 24 * 3_600_000;
/// How long a refresh token counts after it was exchanged, should the answer have been lost: an hour, in which a machine
/// has started again.
const REFRESH_GRACE: Millis = 3_600_000;
/// Most templates in a heartbeat, and events in one callback.
const MAX_ITEMS: usize = 10_000;

struct Tokens {
    token: String,
    token_hash: String,
    token_expires_at: Millis,
    refresh: String,
    refresh_hash: String,
    refresh_expires_at: Millis,
}

impl Tokens {
    fn new() -> Result<Self> {
        let token = auth::random_secret("wrt_", 32)?;
        let refresh = auth::random_secret("wrr_", 32)?;
        let now = now();
        Ok(Self {
            token_hash: auth::hash(&token),
            token,
            token_expires_at: now + TOKEN_LIFE,
            refresh_hash: auth::hash(&refresh),
            refresh,
            refresh_expires_at: now + REFRESH_LIFE,
        })
    }
}

impl Services {
    /// An agent presents its one-time token.
    pub(crate) async fn register_host(&self, body: RegisterHost) -> Result<RegisteredHost> {
        let RegisterHost {
            token,
            arch,
            cpu_cores,
            memory_mb,
            disk_gb,
            address,
        } = body;
        let uri = agent_address(&address)?;
        let address = stored(&address);
        if arch.is_empty()
            || arch.len() > 32
            || !arch
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        {
            return Err(Error::invalid("arch must be a word such as x86_64"));
        }
        let one_time = auth::hash(&token);
        // Before the token is used up: a host that gave an address in vain tries again with the same one.
        if let Some(owner) = self.store.host_token_owner(&one_time).await? {
            self.may_call(owner, &uri).await?;
        }
        let tokens = Tokens::new()?;
        let rpc_token = auth::random_secret(TOKEN_PREFIX, 32)?;
        let host = self
            .store
            .host_register(
                &one_time,
                HostRegistration {
                    arch: &arch,
                    cpu_cores,
                    memory_mb,
                    disk_gb,
                    address: &address,
                    rpc_token: &|host| seal_token(&self.secret, host, &rpc_token),
                    token_hash: &tokens.token_hash,
                    token_expires_at: tokens.token_expires_at,
                    refresh_hash: &tokens.refresh_hash,
                    refresh_expires_at: tokens.refresh_expires_at,
                },
            )
            .await?
            .ok_or_else(|| {
                Error::new(
                    ErrorCode::Unauthorized,
                    "the registration token is unknown, used or too old; ask for a new one",
                )
            })?;
        tracing::info!(%host, address, "a host registered");
        self.bus.publish(Event::Outbox);
        Ok(RegisteredHost {
            host_id: host.to_string(),
            token: tokens.token,
            refresh_token: tokens.refresh,
            rpc_token,
        })
    }

    /// An agent exchanges its refresh token.
    pub(crate) async fn refresh_host(&self, body: RefreshHostToken) -> Result<HostTokens> {
        let tokens = Tokens::new()?;
        let host = self
            .store
            .host_refresh(
                &auth::hash(&body.refresh_token),
                HostRefresh {
                    grace: REFRESH_GRACE,
                    token_hash: &tokens.token_hash,
                    token_expires_at: tokens.token_expires_at,
                    refresh_hash: &tokens.refresh_hash,
                    refresh_expires_at: tokens.refresh_expires_at,
                },
            )
            .await?
            .ok_or_else(|| {
                Error::new(
                    ErrorCode::Unauthorized,
                    "the refresh token is unknown, replaced or too old; register the host again with a new token",
                )
            })?;
        // Which agents do every few days. The agent has its new tokens whatever becomes of this.
        if let Err(error) = self.seal_rpc_token(host).await {
            tracing::error!(%host, error = &error as &dyn std::error::Error, "a host's RPC token stays unsealed");
        }
        Ok(HostTokens {
            token: tokens.token,
            refresh_token: tokens.refresh,
        })
    }

    /// Seals a host's RPC token that is stored from before they were.
    async fn seal_rpc_token(&self, id: HostId) -> Result<()> {
        if let Some(host) = self.store.host(id).await?
            && is_plain(&host.rpc_token)
        {
            let sealed = seal_token(&self.secret, id, &host.rpc_token)?;
            // Another form means that the host has registered anew meanwhile, and that one is sealed.
            self.store.host_reseal(id, &host.rpc_token, &sealed).await?;
        }
        Ok(())
    }

    /// An agent is alive.
    pub(crate) async fn heartbeat(&self, host: &Host, body: Heartbeat) -> Result<()> {
        let Heartbeat {
            version,
            address,
            cpu_cores,
            memory_mb,
            memory_available_mb,
            disk_available_mb,
            templates,
        } = body;
        let address = match address {
            Some(address) => {
                // One that may not be called, though it was once allowed, counts as not heard: nothing is placed there.
                self.may_call(host.owner, &agent_address(&address)?).await?;
                Some(stored(&address))
            }
            None => None,
        };
        if templates.len() > MAX_ITEMS {
            return Err(Error::invalid(format!(
                "templates must have at most {MAX_ITEMS} entries"
            )));
        }
        for template in templates {
            let Ok(id) = template.id.parse::<TemplateId>() else {
                continue;
            };
            self.store
                .template_on_host(
                    id,
                    host,
                    template.status,
                    &rpc::text(&template.detail).replace('\0', ""),
                    template.progress_pct,
                    template.size_bytes,
                )
                .await?;
        }
        // Several notes within the silence after which it counts as unreachable.
        let fresh = millis(self.config.timings.host_silence) / 4;
        let version: String = version.chars().filter(|char| *char != '\0').take(100).collect();
        let facts = HostFacts {
            version: &version,
            cpu_cores,
            memory_mb,
            memory_available_mb,
            disk_available_mb,
        };
        let back = self.store.host_heartbeat(host, facts, fresh).await?;
        self.scheduler.heard(host.id, &facts);
        if let Some(address) = address
            && address != host.address
        {
            self.store.host_moved(host.id, &address).await?;
            tracing::info!(host = %host.id, address, "a host's agent has a new address");
            self.poke();
            self.take_up_unfinished_on(host.id).await?;
        }
        if back {
            tracing::info!(host = %host.id, "a host is back");
            self.audit(AuditEntry::system(None, "host.online", "host", host.id));
            self.bus.publish(Event::Outbox);
            self.poke();
            self.take_up_unfinished_on(host.id).await?;
        }
        Ok(())
    }

    /// Fails if the control plane does not call a host at the address that its agent tells.
    async fn may_call(&self, owner: HostOwner, address: &http::Uri) -> Result<()> {
        match owner {
            HostOwner::Team(_) if !self.config.allow_private_byoc => check_public(address).await,
            HostOwner::Team(_) | HostOwner::Platform => Ok(()),
        }
    }

    /// What could not be asked of a host while it was away is asked now, rather than when the monitor finds it old.
    async fn take_up_unfinished_on(&self, host: HostId) -> Result<()> {
        for sandbox in self.store.sandboxes_in_transit(now()).await? {
            if sandbox.host == Some(host) {
                self.drive(sandbox.id);
            }
        }
        Ok(())
    }

    /// Changes that happened on a host by themselves. Those of other hosts' sandboxes, of unknown ones
    /// and stale ones are counted and dropped: the agent need not know more.
    pub(crate) async fn host_events(&self, host: &Host, events: Vec<SandboxEvent>) -> Result<()> {
        if events.len() > MAX_ITEMS {
            return Err(Error::invalid(format!(
                "events must have at most {MAX_ITEMS} entries"
            )));
        }
        for event in events {
            let dropped = |reason: &'static str| {
                metrics::counter!("wrenn_host_events_dropped_total", "reason" => reason).increment(1);
            };
            let Ok(id) = event.sandbox_id.parse::<SandboxId>() else {
                dropped("malformed");
                continue;
            };
            let record = self
                .store
                .sandbox(id)
                .await?
                .filter(|record| record.host == Some(host.id));
            let Some(record) = record else {
                dropped("unknown");
                continue;
            };
            let Some(state) = host_state(event.status) else {
                dropped("malformed");
                continue;
            };
            match apply_report(
                record.status,
                record.generation,
                state,
                event.generation,
                Source::Event,
            ) {
                Verdict::Become(status) => {
                    let failure =
                        (state == HostState::Error).then(|| failure(event.error, record.generation));
                    let mut change = Change::to(status).failure(failure);
                    if status == SandboxStatus::Running {
                        change = change.running();
                    }
                    if self.settle(&record, change).await? == Outcome::Updated {
                        tracing::info!(sandbox = %id, %status, reason = rpc::text(&event.reason), "changed on its host");
                        self.audit(AuditEntry::system(
                            Some(record.team),
                            match status {
                                SandboxStatus::Paused => "sandbox.auto_pause",
                                SandboxStatus::Error => "sandbox.fail",
                                _ => "sandbox.follow_host",
                            },
                            "sandbox",
                            id,
                        ));
                    }
                }
                Verdict::Agrees => {}
                Verdict::Ignored => dropped("ended"),
                Verdict::Stale => dropped("stale"),
            }
        }
        Ok(())
    }
}

fn host_state(status: SandboxStatus) -> Option<HostState> {
    match status {
        SandboxStatus::Running => Some(HostState::Running),
        SandboxStatus::Paused => Some(HostState::Paused),
        SandboxStatus::Error => Some(HostState::Error),
        SandboxStatus::Pending
        | SandboxStatus::Starting
        | SandboxStatus::Pausing
        | SandboxStatus::Snapshotting
        | SandboxStatus::Resuming
        | SandboxStatus::Stopping => Some(HostState::Busy),
        SandboxStatus::Hibernated | SandboxStatus::Stopped | SandboxStatus::Missing => None,
    }
}

fn failure(told: Option<SandboxFailure>, generation: u64) -> Failure {
    let (message, console) = match told {
        Some(SandboxFailure { message, console }) => (rpc::text(&message), console.as_deref().map(rpc::text)),
        None => ("the sandbox's VM died".to_owned(), None),
    };
    Failure {
        code: ErrorCode::AgentError.as_str().to_owned(),
        message,
        console,
        generation,
    }
}

/// An agent's address: where RPCs and later proxied traffic go.
fn agent_address(address: &str) -> Result<http::Uri> {
    let bad = || Error::invalid("address must be a URL such as http://10.0.0.7:8001");
    let uri: http::Uri = address.parse().map_err(|_| bad())?;
    let plain = uri.scheme_str() == Some("http")
        && uri.port_u16().is_some()
        && uri.path() == "/"
        && uri.query().is_none();
    if !plain || address.len() > 300 {
        return Err(bad());
    }
    Ok(uri)
}

/// An agent's address as it is kept.
fn stored(address: &str) -> String {
    address.trim_end_matches('/').to_owned()
}
