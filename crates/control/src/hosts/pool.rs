//! One RPC client per host, made when it is first needed and made anew when the host's address or
//! token changes. Connections underneath are pooled and opened on use.
//!
//! The token of an agent's RPCs is stored sealed: whoever reads the database cannot command the hosts. Rows from before
//! that have it as it is; they are sealed when their agent next exchanges its own tokens.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use connectrpc::client::{ClientConfig, HttpClient};
use wrenn_proto::hostagent::HostAgentClient;

use crate::auth::secrets::MasterSecret;
use crate::domain::{Host, HostId};
use crate::{Error, ErrorCode, Result};

/// A client of one host.
pub(crate) type Client = HostAgentClient<HttpClient>;

/// Largest answer that is read: two streams of collected output at their limit, and some.
const MAX_MESSAGE: usize = 40 << 20;

/// The clients.
pub(crate) struct Pool {
    secret: MasterSecret,
    http: HttpClient,
    clients: Mutex<HashMap<HostId, Entry>>,
}

struct Entry {
    address: String,
    /// As stored.
    rpc_token: String,
    client: Client,
}

impl Pool {
    pub(crate) fn new(secret: MasterSecret) -> Self {
        let http = HttpClient::builder()
            .connect_timeout(Duration::from_secs(5))
            .plaintext();
        Self {
            secret,
            http,
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
        let token = open_token(&self.secret, host)?;
        let mut authorization =
            http::HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| unusable())?;
        authorization.set_sensitive(true);
        let config = ClientConfig::new(uri)
            .with_default_max_message_size(MAX_MESSAGE)
            .with_default_header(http::header::AUTHORIZATION, authorization);
        let client = Client::new(self.http.clone(), config);
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
