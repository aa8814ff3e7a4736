//! GitHub, and whatever speaks its dialect (GitHub Enterprise).

use std::time::Duration;

use futures::future::BoxFuture;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use url::Url;

use super::oauth::{Identity, Provider};
use crate::config::OAuthProvider;
use crate::{Error, ErrorCode, Result};

/// Limit of one request.
const PATIENCE: Duration = Duration::from_secs(15);
/// Largest answer that is read.
const MAX_ANSWER: usize = 1 << 20;
/// Addresses that GitHub makes up for its users; they get no mail.
const NO_MAIL: &str = "@users.noreply.github.com";

/// A registered application.
pub(super) struct GitHub {
    config: OAuthProvider,
    authorize: Url,
    http: reqwest::Client,
}

#[derive(Deserialize)]
struct Token {
    access_token: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct User {
    id: u64,
    login: String,
    name: Option<String>,
}

#[derive(Deserialize)]
struct Email {
    email: String,
    primary: bool,
    verified: bool,
}

impl GitHub {
    pub(super) fn new(config: &OAuthProvider) -> Result<Self> {
        let parse = |what: &str, text: &str| {
            Url::parse(text)
                .ok()
                .filter(|url| matches!(url.scheme(), "http" | "https"))
                .ok_or_else(|| {
                    Error::invalid(format!(
                        "the {what} URL of the login provider {} is not an http(s) URL",
                        config.name
                    ))
                })
        };
        let authorize = parse("authorize", &config.authorize_url)?;
        parse("token", &config.token_url)?;
        parse("user", &config.user_url)?;
        parse("emails", &config.emails_url)?;
        let http = reqwest::Client::builder()
            .timeout(PATIENCE)
            // The requests carry secrets; they go where the configuration says and nowhere else.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("wrenn/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(Error::internal)?;
        Ok(Self {
            config: config.clone(),
            authorize,
            http,
        })
    }

    async fn exchange(&self, code: &str, verifier: &str, redirect: &str) -> Result<String> {
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "authorization_code")
            .append_pair("client_id", &self.config.client_id)
            .append_pair("client_secret", &self.config.client_secret)
            .append_pair("code", code)
            .append_pair("redirect_uri", redirect)
            .append_pair("code_verifier", verifier)
            .finish();
        let request = self
            .http
            .post(&self.config.token_url)
            .header(http::header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form);
        let answer: Token = self.ask(request).await?;
        match answer {
            Token {
                access_token: Some(token),
                error: None,
            } if !token.is_empty() => Ok(token),
            Token { error, .. } => {
                // The provider's word is for the log: what it says of the application is not the visitor's.
                tracing::debug!(
                    provider = self.config.name,
                    error = error.map(|error| error.chars().take(100).collect::<String>()),
                    "a code was not accepted"
                );
                Err(Error::invalid(format!(
                    "{} does not accept this login's code; begin again",
                    self.config.name
                )))
            }
        }
    }

    async fn ask<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T> {
        let failed = |why: String| {
            let name = &self.config.name;
            let mut error = Error::new(
                ErrorCode::ProviderError,
                format!("the login provider {name} does not answer as it should; try again later"),
            );
            error.cause = Some(why.into());
            error
        };
        let mut response = request
            .header(http::header::ACCEPT, "application/json")
            .send()
            .await
            .map_err(|error| failed(error.without_url().to_string()))?;
        let status = response.status();
        if !status.is_success() {
            return Err(failed(format!("status {status}")));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| failed(error.without_url().to_string()))?
        {
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(failed("the answer is too long".to_owned()));
            }
            body.extend_from_slice(&chunk);
        }
        // The parser's message may repeat a value, and one of the values is a token.
        serde_json::from_slice(&body)
            .map_err(|error| failed(format!("the answer has another form ({:?})", error.classify())))
    }
}

impl Provider for GitHub {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn authorize_url(&self, state: &str, challenge: &str, redirect: &str) -> Result<Url> {
        let mut url = self.authorize.clone();
        url.query_pairs_mut()
            .append_pair("response_type", "code")
            .append_pair("client_id", &self.config.client_id)
            .append_pair("redirect_uri", redirect)
            .append_pair("scope", "read:user user:email")
            .append_pair("state", state)
            .append_pair("code_challenge", challenge)
            .append_pair("code_challenge_method", "S256");
        Ok(url)
    }

    fn identify<'a>(
        &'a self,
        code: &'a str,
        verifier: &'a str,
        redirect: &'a str,
    ) -> BoxFuture<'a, Result<Identity>> {
        Box::pin(async move {
            let token = self.exchange(code, verifier, redirect).await?;
            let user: User = self
                .ask(self.http.get(&self.config.user_url).bearer_auth(&token))
                .await?;
            let emails: Vec<Email> = self
                .ask(self.http.get(&self.config.emails_url).bearer_auth(&token))
                .await?;
            Ok(identity(user, emails))
        })
    }
}

fn identity(user: User, emails: Vec<Email>) -> Identity {
    let User { id, login, name } = user;
    let mut verified: Vec<Email> = emails
        .into_iter()
        .filter(|email| email.verified && !email.email.to_lowercase().ends_with(NO_MAIL))
        .collect();
    verified.sort_by_key(|email| !email.primary);
    Identity {
        subject: id.to_string(),
        name: name.filter(|name| !name.trim().is_empty()).unwrap_or(login),
        verified_email: verified.into_iter().next().map(|email| email.email),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(emails: &[(&str, bool, bool)]) -> Option<String> {
        let emails = emails
            .iter()
            .map(|&(email, primary, verified)| Email {
                email: email.to_owned(),
                primary,
                verified,
            })
            .collect();
        let user = User {
            id: 7,
            login: "ada".into(),
            name: Some(" ".into()),
        };
        let identity = identity(user, emails);
        assert_eq!((identity.subject.as_str(), identity.name.as_str()), ("7", "ada"));
        identity.verified_email
    }

    #[test]
    fn only_verified_addresses_count_and_the_primary_one_first() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("a@b.c", true, false)]), None);
        assert_eq!(
            of(&[("a@b.c", false, true), ("d@e.f", true, true)]).as_deref(),
            Some("d@e.f")
        );
        assert_eq!(
            of(&[("a@b.c", true, false), ("d@e.f", false, true)]).as_deref(),
            Some("d@e.f")
        );
        assert_eq!(of(&[("7+ada@users.noreply.github.com", true, true)]), None);
    }
}
