//! Settings of accounts: mail, providers, and what slows guessing down.

use std::time::Duration;

/// A mail server.
#[derive(Clone)]
pub struct SmtpConfig {
    /// `smtps://user:password@host:465`, `smtp://user:password@host:587?tls=required` or, on a trusted network,
    /// `smtp://host:25`.
    pub url: String,
    /// The sender: `Wrenn <wrenn@example.com>`.
    pub from: String,
}

impl std::fmt::Debug for SmtpConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL holds a password.
        f.debug_struct("SmtpConfig")
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

/// An application registered with an OAuth provider.
#[derive(Clone)]
pub struct OAuthProvider {
    /// The provider's name in routes: `github`.
    pub name: String,
    /// The application's id.
    pub client_id: String,
    /// The application's secret.
    pub client_secret: String,
    /// Where people consent.
    pub authorize_url: String,
    /// Where a code becomes a token.
    pub token_url: String,
    /// Who the token belongs to.
    pub user_url: String,
    /// Their addresses, and which of them the provider has verified.
    pub emails_url: String,
}

impl OAuthProvider {
    /// github.com; change the URLs for GitHub Enterprise.
    #[must_use]
    pub fn github(client_id: impl Into<String>, client_secret: impl Into<String>) -> Self {
        Self {
            name: "github".to_owned(),
            client_id: client_id.into(),
            client_secret: client_secret.into(),
            authorize_url: "https://github.com/login/oauth/authorize".to_owned(),
            token_url: "https://github.com/login/oauth/access_token".to_owned(),
            user_url: "https://api.github.com/user".to_owned(),
            emails_url: "https://api.github.com/user/emails".to_owned(),
        }
    }
}

impl std::fmt::Debug for OAuthProvider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OAuthProvider")
            .field("name", &self.name)
            .field("client_id", &self.client_id)
            .field("authorize_url", &self.authorize_url)
            .finish_non_exhaustive()
    }
}

/// How much work a password is (Argon2id with one lane).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PasswordCost {
    /// Memory of one hash, KiB.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub passes: u32,
}

impl Default for PasswordCost {
    fn default() -> Self {
        // The smallest that OWASP's cheat sheet recommends for a server that must also answer: some 30 ms of one core.
        Self {
            memory_kib: 19 * 1024,
            passes: 2,
        }
    }
}

/// How often something may be tried within a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Attempts.
    pub attempts: u32,
    /// Begins with the first of them.
    pub window: Duration,
}

impl Allowance {
    /// So many attempts in so many minutes.
    #[must_use]
    pub const fn per_minutes(attempts: u32, minutes: u64) -> Self {
        Self {
            attempts,
            window: Duration::from_secs(minutes * 60),
        }
    }
}

/// What slows guessing and flooding down. Addresses of IPv6 count by their /64, which one customer holds.
#[derive(Debug, Clone)]
pub struct AttemptLimits {
    /// Logins from one address, whatever the account.
    pub login_address: Allowance,
    /// Logins to one account from one address.
    pub login_account_address: Allowance,
    /// Logins to one account from anywhere. It is wide, since strangers who exhaust it lock the owner out.
    pub login_account: Allowance,
    /// New accounts from one address.
    pub sign_up_address: Allowance,
    /// Password resets asked for from one address, and tokens tried there.
    pub reset_address: Allowance,
    /// Mails with links to one account.
    pub mail_account: Allowance,
    /// Searches for people by one user: enough for typing, too few to list everybody.
    pub search_user: Allowance,
}

impl Default for AttemptLimits {
    fn default() -> Self {
        Self {
            login_address: Allowance::per_minutes(200, 15),
            login_account_address: Allowance::per_minutes(10, 15),
            login_account: Allowance::per_minutes(100, 15),
            sign_up_address: Allowance::per_minutes(60, 60),
            reset_address: Allowance::per_minutes(30, 60),
            mail_account: Allowance::per_minutes(5, 60),
            search_user: Allowance::per_minutes(300, 15),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_in_debug() {
        let smtp = SmtpConfig {
            url: "smtp://u:hunter2@h".into(),
            from: "a@b.c".into(),
        };
        let provider = OAuthProvider::github("id", "hunter2");
        let text = format!("{smtp:?} {provider:?}");
        assert!(!text.contains("hunter2") && text.contains("github"), "{text}");
    }
}
