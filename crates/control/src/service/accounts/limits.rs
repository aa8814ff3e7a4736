//! What slows guessing and flooding down.
//!
//! An attempt is counted before it is made, so that many at once cannot slip through together. The narrowest count
//! comes first, and an attempt that it refuses is not counted by the wider ones: a stranger at one address cannot use
//! up what an account may be tried from everywhere.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::Services;
use crate::auth;
use crate::config::Allowance;
use crate::domain::{UserId, now};
use crate::{Error, Result};

impl Services {
    /// Counts a login; refuses it when there were too many.
    pub(super) async fn admit_login(&self, from: Option<IpAddr>, email: &str) -> Result<()> {
        let limits = &self.config.attempts;
        let what = "logins";
        self.attempt(what, &pair(from, email), limits.login_account_address)
            .await?;
        self.attempt(what, &format!("login:{}", place(from)), limits.login_address)
            .await?;
        self.attempt(what, &everywhere(email), limits.login_account).await
    }

    /// A login succeeded: its account's owner need not count their typing errors.
    pub(super) async fn forgive_login(&self, from: Option<IpAddr>, email: &str) -> Result<()> {
        Ok(self.store.rate_limit_clear(&pair(from, email)).await?)
    }

    /// The account's owner has proved who they are by mail, or an operator has.
    pub(super) async fn forgive_account(&self, from: Option<IpAddr>, email: &str) -> Result<()> {
        self.forgive_login(from, email).await?;
        Ok(self.store.rate_limit_clear(&everywhere(email)).await?)
    }

    /// Counts a login through a provider.
    pub(super) async fn admit_oauth(&self, from: Option<IpAddr>) -> Result<()> {
        let bucket = format!("login:{}", place(from));
        self.attempt("logins", &bucket, self.config.attempts.login_address)
            .await
    }

    /// Counts a sign-up.
    pub(super) async fn admit_sign_up(&self, from: Option<IpAddr>) -> Result<()> {
        let bucket = format!("signup:{}", place(from));
        self.attempt("sign-ups", &bucket, self.config.attempts.sign_up_address)
            .await
    }

    /// Counts a request or an attempt to reset a password.
    pub(super) async fn admit_reset(&self, from: Option<IpAddr>) -> Result<()> {
        let bucket = format!("reset:{}", place(from));
        self.attempt("password resets", &bucket, self.config.attempts.reset_address)
            .await
    }

    /// Counts a mail to an address, whether or not it has an account.
    pub(super) async fn admit_mail(&self, email: &str) -> Result<()> {
        let bucket = format!("mail:{}", account(email));
        self.attempt(
            "mails to this address",
            &bucket,
            self.config.attempts.mail_account,
        )
        .await
    }

    /// Counts a search for people.
    pub(in crate::service) async fn admit_search(&self, user: UserId) -> Result<()> {
        let bucket = format!("search:{user}");
        self.attempt("searches", &bucket, self.config.attempts.search_user)
            .await
    }

    async fn attempt(&self, what: &str, bucket: &str, allowance: Allowance) -> Result<()> {
        let window = i64::try_from(allowance.window.as_millis()).unwrap_or(i64::MAX / 2);
        let hits = self.store.rate_limit_hit(bucket, window).await?;
        if hits.count <= allowance.attempts {
            return Ok(());
        }
        metrics::counter!("wrenn_rate_limited_total").increment(1);
        let left = u64::try_from(hits.ends_at - now()).unwrap_or_default();
        // Rounded up, so that whoever waits as told is not refused again.
        Err(Error::rate_limited(
            what,
            Duration::from_secs(left.div_ceil(1000)),
        ))
    }
}

fn pair(from: Option<IpAddr>, email: &str) -> String {
    format!("login:{}:{}", account(email), place(from))
}

fn everywhere(email: &str) -> String {
    format!("login:{}", account(email))
}

/// An account in a bucket's name: of bounded length, and no list of addresses for whoever reads the table.
fn account(email: &str) -> String {
    let mut hash = auth::hash(email);
    hash.truncate(32);
    hash
}

/// A source address in a bucket's name.
fn place(from: Option<IpAddr>) -> String {
    match from {
        None => "unknown".to_owned(),
        Some(IpAddr::V4(address)) => address.to_string(),
        // One customer has a whole /64.
        Some(IpAddr::V6(address)) => {
            let net = u128::from(address) & (u128::MAX << 64);
            Ipv6Addr::from(net).to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_by_customer_and_name_no_account() {
        let place = |text: &str| super::place(text.parse().ok());
        assert_eq!(place("192.0.2.1"), "192.0.2.1");
        assert_eq!(place("2001:db8:1:2:3::4"), place("2001:db8:1:2:ffff::1"));
        assert_ne!(place("2001:db8:1:2::"), place("2001:db8:1:3::"));
        assert!(!pair(None, "ada@example.com").contains("ada"));
        assert_ne!(everywhere("a@b.c"), everywhere("a@b.d"));
    }
}
