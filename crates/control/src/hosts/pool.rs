//! One RPC client per host, made when it is first needed and made anew when the host's address or
//! token changes. Connections underneath are pooled and opened on use.
//!
//! The address of a team's own host is the team's word: it is connected to only if it is public, unless the operator
//! allows others ([`crate::outbound`]). Those connections have a pool of their own, since the platform's hosts, and the
//! connections that are open to them, may well be at private addresses.
//!
//! The token of an agent's RPCs is stored sealed: whoever reads the database cannot command the hosts. Rows from before
//! that have it as it is; they are sealed when their agent next exchanges its own tokens.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use connectrpc::client::{ClientBody, ClientConfig, ServiceTransport};
use futures::future::BoxFuture;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::TokioExecutor;
use wrenn_proto::hostagent::HostAgentClient;

use crate::auth::secrets::MasterSecret;
use crate::domain::{Host, HostId, HostOwner};
use crate::{Error, ErrorCode, Result, outbound};

/// A client of one host.
pub(crate) type Client = HostAgentClient<Http>;

type Http = ServiceTransport<hyper_util::client::legacy::Client<HttpConnector<Resolver>, ClientBody>>;

/// Largest answer that is read: two streams of collected output at their limit, and some.
const MAX_MESSAGE: usize = 40 << 20;

/// Longest that connecting may take.
const CONNECT: Duration = Duration::from_secs(5);

/// The clients.
pub(crate) struct Pool {
    secret: MasterSecret,
    /// To the platform's hosts.
    platform: Http,
    /// To teams' own.
    teams: Http,
    /// Teams' own hosts may have private addresses.
    allow_private: bool,
    clients: Mutex<HashMap<HostId, Entry>>,
}

struct Entry {
    address: String,
    /// As stored.
    rpc_token: String,
    client: Client,
}

impl Pool {
    pub(crate) fn new(secret: MasterSecret, allow_private: bool) -> Self {
        Self {
            secret,
            platform: transport(true),
            teams: transport(allow_private),
            allow_private,
            clients: Mutex::default(),
        }
    }

    /// The client of a host.
    pub(crate) fn client(&self, host: &Host) -> Result<Client> {
        let mut clients = self
            .clients
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(entry) = clients.get(&host.id)
            && entry.address == host.address
            && entry.rpc_token == host.rpc_token
        {
            return Ok(entry.client.clone());
        }
        let unusable = || {
            Error::new(
                ErrorCode::HostUnavailable,
                "the sandbox's host has no usable address",
            )
        };
        let uri: http::Uri = host.address.parse().map_err(|_| unusable())?;
        if uri.scheme_str() != Some("http") || uri.authority().is_none() {
            return Err(unusable());
        }
        let http = match host.owner {
            HostOwner::Platform => &self.platform,
            HostOwner::Team(_) => {
                // An address in place of a name is not resolved, so it is checked here.
                if !self.allow_private && literal(&uri).is_some_and(|address| !outbound::is_public(address)) {
                    return Err(private());
                }
                &self.teams
            }
        };
        let token = open_token(&self.secret, host)?;
        let mut authorization =
            http::HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| unusable())?;
        authorization.set_sensitive(true);
        let config = ClientConfig::new(uri)
            .with_default_max_message_size(MAX_MESSAGE)
            .with_default_header(http::header::AUTHORIZATION, authorization);
        let client = Client::new(http.clone(), config);
        clients.insert(
            host.id,
            Entry {
                address: host.address.clone(),
                rpc_token: host.rpc_token.clone(),
                client: client.clone(),
            },
        );
        Ok(client)
    }
}

fn transport(allow_private: bool) -> Http {
    let mut connector = HttpConnector::new_with_resolver(Resolver { allow_private });
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
    ServiceTransport::new(client)
}

/// Resolves names, and gives the addresses that may be connected to.
#[derive(Debug, Clone)]
pub(crate) struct Resolver {
    allow_private: bool,
}

impl tower::Service<Name> for Resolver {
    type Response = std::vec::IntoIter<std::net::SocketAddr>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = BoxFuture<'static, std::result::Result<Self::Response, Self::Error>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::result::Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let allow_private = self.allow_private;
        Box::pin(async move {
            let found = outbound::resolve(name.as_str(), 0, allow_private).await?;
            Ok(found.into_iter())
        })
    }
}

/// The address in a URL, where it names one itself: exactly what is then connected to without being resolved.
fn literal(uri: &http::Uri) -> Option<std::net::IpAddr> {
    bare_host(uri).parse().ok()
}

/// A URL's host without the brackets around an IPv6 address.
fn bare_host(uri: &http::Uri) -> &str {
    let host = uri.host().unwrap_or_default();
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

/// What callers hear when a team's own host must not be connected to.
pub(super) fn private() -> Error {
    Error::new(
        ErrorCode::HostUnavailable,
        "the sandbox's host has a private address, which this installation does not call; its operator can allow it with \
         WRENN_BYOC_ALLOW_PRIVATE",
    )
}

/// Fails if the address that a team's own host tells leads to private addresses only. A name that is not found now may be
/// later, and is checked whenever it is connected to.
pub(crate) async fn check_public(address: &http::Uri) -> Result<()> {
    match outbound::resolve(bare_host(address), 0, false).await {
        Err(error) if outbound::was_refused(error.as_ref()) => Err(Error::invalid(
            "address must not lead to a private address; give one that is public, or ask the operator to allow it with \
             WRENN_BYOC_ALLOW_PRIVATE",
        )),
        _ => Ok(()),
    }
}

/// What tokens of agents' RPCs begin with; nothing sealed does.
pub(crate) const TOKEN_PREFIX: &str = "wrp_";

/// The form in which a host's token is stored.
pub(crate) fn seal_token(secret: &MasterSecret, host: HostId, token: &str) -> Result<String> {
    secret.seal(&place(host), token.as_bytes())
}

/// Whether a stored token is from before they were sealed.
pub(crate) fn is_plain(stored: &str) -> bool {
    stored.starts_with(TOKEN_PREFIX)
}

fn open_token(secret: &MasterSecret, host: &Host) -> Result<String> {
    if is_plain(&host.rpc_token) {
        return Ok(host.rpc_token.clone());
    }
    let plain = secret.open(&place(host.id), &host.rpc_token)?;
    String::from_utf8(plain).map_err(Error::internal)
}

/// Ties a token to its host's row.
fn place(host: HostId) -> String {
    format!("rpc-token-{host}")
}
