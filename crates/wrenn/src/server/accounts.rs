//! Settings of accounts: mail, login providers, and which proxies are believed.

use clap::Args;
use ipnet::IpNet;
use wrenn_control::config::{OAuthProvider, SmtpConfig};
use wrenn_control::{ControlConfig, Secret};

use super::config::masked;

/// How people come in.
#[derive(Debug, Clone, Args)]
pub(crate) struct AccountArgs {
    /// Mail server for activation and password links: `smtps://user:password@host:465`, or
    /// `smtp://user:password@host:587?tls=required`; without one, accounts are active at once and links go to the log
    #[arg(
        long,
        env = "WRENN_SMTP_URL",
        value_name = "URL",
        hide_env_values = true,
        value_parser = secret,
        requires = "mail_from",
        help_heading = "Accounts"
    )]
    pub(crate) smtp_url: Option<Secret>,
    /// Sender of mails, for example `Wrenn <wrenn@example.com>`
    #[arg(
        long,
        env = "WRENN_MAIL_FROM",
        value_name = "ADDRESS",
        help_heading = "Accounts"
    )]
    pub(crate) mail_from: Option<String>,
    /// Id of an OAuth application at GitHub, to let people log in with it
    #[arg(
        long,
        env = "WRENN_GITHUB_CLIENT_ID",
        value_name = "ID",
        requires = "github_client_secret",
        help_heading = "Accounts"
    )]
    pub(crate) github_client_id: Option<String>,
    /// The application's secret
    #[arg(
        long,
        env = "WRENN_GITHUB_CLIENT_SECRET",
        value_name = "SECRET",
        hide_env_values = true,
        value_parser = secret,
        help_heading = "Accounts"
    )]
    pub(crate) github_client_secret: Option<Secret>,
    /// Base URL of a GitHub Enterprise server [default: github.com]
    #[arg(long, env = "WRENN_GITHUB_URL", value_name = "URL", help_heading = "Accounts")]
    pub(crate) github_url: Option<String>,
    /// Networks of reverse proxies whose `X-Forwarded-For` is believed, for example `10.0.0.0/8,::1/128`
    #[arg(
        long,
        env = "WRENN_TRUSTED_PROXIES",
        value_name = "CIDR,…",
        value_delimiter = ',',
        value_parser = network,
        help_heading = "Accounts"
    )]
    pub(crate) trusted_proxies: Vec<IpNet>,
}

impl AccountArgs {
    /// Puts the settings into a control plane's configuration.
    pub(crate) fn apply(&self, config: &mut ControlConfig) {
        let Self {
            smtp_url,
            mail_from,
            github_client_id,
            github_client_secret,
            github_url,
            trusted_proxies,
        } = self;
        if let (Some(url), Some(from)) = (smtp_url, mail_from) {
            config.smtp = Some(SmtpConfig {
                url: url.reveal().to_owned(),
                from: from.clone(),
            });
        }
        if let (Some(id), Some(secret)) = (github_client_id, github_client_secret) {
            let mut github = OAuthProvider::github(id, secret.reveal());
            if let Some(base) = github_url {
                let base = base.trim_end_matches('/');
                github.authorize_url = format!("{base}/login/oauth/authorize");
                github.token_url = format!("{base}/login/oauth/access_token");
                github.user_url = format!("{base}/api/v3/user");
                github.emails_url = format!("{base}/api/v3/user/emails");
            }
            config.oauth.push(github);
        }
        config.trusted_proxies.clone_from(trusted_proxies);
    }

    /// The settings as `wrenn config` shows them.
    pub(crate) fn rows(&self) -> Vec<(&'static str, String)> {
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "none".to_owned());
        let hidden = |secret: &Option<Secret>| or_none(secret.as_ref().map(|_| "****".to_owned()));
        let proxies: Vec<String> = self.trusted_proxies.iter().map(IpNet::to_string).collect();
        vec![
            (
                "WRENN_SMTP_URL",
                self.smtp_url.as_ref().map_or_else(
                    || "none: links go to the log".to_owned(),
                    |url| masked(url.reveal()),
                ),
            ),
            ("WRENN_MAIL_FROM", or_none(self.mail_from.clone())),
            ("WRENN_GITHUB_CLIENT_ID", or_none(self.github_client_id.clone())),
            ("WRENN_GITHUB_CLIENT_SECRET", hidden(&self.github_client_secret)),
            (
                "WRENN_GITHUB_URL",
                self.github_url
                    .clone()
                    .unwrap_or_else(|| "https://github.com".to_owned()),
            ),
            (
                "WRENN_TRUSTED_PROXIES",
                or_none((!proxies.is_empty()).then(|| proxies.join(","))),
            ),
        ]
    }
}

/// A flag or variable that is not to be seen in logs.
pub(crate) fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret::new(text))
}

/// A network, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let text = text.trim();
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
        .map_err(|_| format!("'{text}' is no network such as 10.0.0.0/8, and no address"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        accounts: AccountArgs,
    }

    #[test]
    fn settings_reach_the_control_plane_and_secrets_nobody_else() {
        let cli = Cli::try_parse_from([
            "wrenn",
            "--smtp-url=smtps://mailer:hunter2@mail.example.com",
            "--mail-from=Wrenn <wrenn@example.com>",
            "--github-client-id=id",
            "--github-client-secret=hunter3",
            "--github-url=https://ghe.example.com/",
            "--trusted-proxies=10.0.0.0/8,::1",
        ])
        .expect("good flags");
        let mut config = ControlConfig::new("/nowhere");
        cli.accounts.apply(&mut config);
        assert!(
            config
                .smtp
                .as_ref()
                .is_some_and(|smtp| smtp.url.contains("hunter2"))
        );
        assert_eq!(config.oauth[0].user_url, "https://ghe.example.com/api/v3/user");
        assert_eq!(config.trusted_proxies.len(), 2);
        let shown = format!("{cli:?} {config:?} {:?}", cli.accounts.rows());
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(shown.contains("smtps://mailer:****@mail.example.com"), "{shown}");
    }

    #[test]
    fn half_a_setting_is_refused() {
        for args in [
            ["wrenn", "--smtp-url=smtp://h"],
            ["wrenn", "--github-client-id=id"],
            ["wrenn", "--trusted-proxies=everywhere"],
        ] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
    }
}
