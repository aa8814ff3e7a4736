//! Mails: through a mail server where one is configured, else into the log.
//!
//! A mail is sent in the background, so that no request waits for a mail server, or tells by its time whether there
//! was anything to send. A server that does not answer is tried again a few times; after that, or when the process
//! ends, the mail is lost, and its reader asks for another one.

use std::sync::Arc;
use std::time::Duration;

use lettre::message::Mailbox;
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use wrenn_proto::rest::Secret;

use crate::config::SmtpConfig;
use crate::tasks::{TaskKind, Tasks};
use crate::{Error, Result};

/// How often one mail is tried.
const ATTEMPTS: u32 = 5;
/// Connections to the mail server at one time.
const CONNECTIONS: usize = 4;
/// Mails that may wait; more than that is a flood.
const MAX_WAITING: usize = 1000;
/// Limit of one attempt.
const ATTEMPT_TIME: Duration = Duration::from_secs(30);

/// A mail with a link.
pub(crate) struct Mail {
    /// The reader's address.
    pub(crate) to: String,
    /// One line.
    pub(crate) subject: String,
    /// The text above the link.
    pub(crate) text: String,
    /// Carries a token.
    pub(crate) link: Secret,
}

/// Sends mails.
#[derive(Clone)]
pub(crate) struct Mailer {
    way: Way,
    tasks: Tasks,
    /// First pause after a failure; doubles.
    retry: Duration,
    waiting: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

#[derive(Clone)]
enum Way {
    Smtp {
        transport: Box<AsyncSmtpTransport<Tokio1Executor>>,
        from: Mailbox,
    },
    /// A laptop has no mail server; the person at it reads the log.
    Log,
    /// A link is a key to an account, and a server's log is read by others: nobody gets it.
    Nowhere,
}

impl Mailer {
    pub(crate) fn new(
        smtp: Option<&SmtpConfig>,
        log_links: bool,
        tasks: Tasks,
        retry: Duration,
    ) -> Result<Self> {
        let way = match smtp {
            None if log_links => Way::Log,
            None => Way::Nowhere,
            Some(SmtpConfig { url, from }) => Way::Smtp {
                transport: Box::new(
                    AsyncSmtpTransport::<Tokio1Executor>::from_url(url)
                        // The library's own text may repeat the URL, and with it the password.
                        .map_err(|_| {
                            Error::invalid("the SMTP URL must look like smtps://user:password@host:465")
                        })?
                        .timeout(Some(ATTEMPT_TIME))
                        .build(),
                ),
                from: from.parse().map_err(|_| {
                    Error::invalid("the sender of mails must look like `Wrenn <wrenn@example.com>`")
                })?,
            },
        };
        Ok(Self {
            way,
            tasks,
            retry,
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        })
    }

    /// Whether mails reach anybody, so that an address can be proved.
    pub(crate) fn reaches_people(&self) -> bool {
        matches!(self.way, Way::Smtp { .. })
    }

    /// Sends a mail in the background.
    pub(crate) fn send(&self, mail: Mail) {
        let (transport, from) = match &self.way {
            Way::Smtp { transport, from } => (transport.clone(), from.clone()),
            Way::Log => {
                tracing::info!(to = mail.to, link = mail.link.reveal(), "{}", mail.subject);
                return;
            }
            Way::Nowhere => {
                metrics::counter!("wrenn_mails_total", "outcome" => "dropped").increment(1);
                tracing::warn!("a mail is dropped: no mail server is set");
                return;
            }
        };
        let Ok(place) = Arc::clone(&self.waiting).try_acquire_owned() else {
            metrics::counter!("wrenn_mails_total", "outcome" => "dropped").increment(1);
            tracing::warn!("a mail is dropped: too many wait for the mail server");
            return;
        };
        let message = match message(&mail, from) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(%error, "a mail cannot be written");
                return;
            }
        };
        let (connections, closing, retry) = (
            Arc::clone(&self.connections),
            self.tasks.closing().clone(),
            self.retry,
        );
        self.tasks.spawn(TaskKind::Mail, async move {
            let _place = place;
            let outcome = deliver(&transport, message, &connections, &closing, retry).await;
            metrics::counter!("wrenn_mails_total", "outcome" => outcome).increment(1);
        });
    }
}

async fn deliver(
    transport: &AsyncSmtpTransport<Tokio1Executor>,
    message: Message,
    connections: &Semaphore,
    closing: &CancellationToken,
    retry: Duration,
) -> &'static str {
    let mut pause = retry;
    for attempt in 1..=ATTEMPTS {
        let error = {
            let Ok(_connection) = connections.acquire().await else {
                return "lost";
            };
            match tokio::time::timeout(ATTEMPT_TIME, transport.send(message.clone())).await {
                Ok(Ok(_)) => return "sent",
                Ok(Err(error)) if error.is_permanent() => {
                    tracing::warn!(%error, "the mail server refuses a mail");
                    return "refused";
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer in time".to_owned(),
            }
        };
        tracing::warn!(error, attempt, "the mail server did not take a mail");
        if attempt == ATTEMPTS || closing.is_cancelled() {
            break;
        }
        // At the end of the process the rest of the pauses is left out: one more attempt, then it is lost.
        let _ = tokio::time::timeout(pause, closing.cancelled()).await;
        pause = pause.saturating_mul(2);
    }
    "lost"
}

fn message(mail: &Mail, from: Mailbox) -> Result<Message> {
    let to: lettre::Address = mail
        .to
        .parse()
        .map_err(|_| Error::invalid("the address cannot get mail"))?;
    Message::builder()
        .from(from)
        .to(Mailbox::new(None, to))
        .subject(&mail.subject)
        .body(format!(
            "{}\n\n{}\n\nIf you did not ask for this, nothing has to be done.\n",
            mail.text,
            mail.link.reveal()
        ))
        .map_err(|error| Error::internal(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_settings_are_refused_without_their_secrets() {
        let smtp = |url: &str, from: &str| {
            let config = SmtpConfig {
                url: url.into(),
                from: from.into(),
            };
            Mailer::new(Some(&config), false, Tasks::default(), Duration::ZERO)
        };
        assert!(smtp("smtp://u:hunter2@mail.example.com:25", "W <w@example.com>").is_ok());
        for (url, from) in [
            ("http://u:hunter2@h", "w@example.com"),
            ("smtps:hunter2", "w@example.com"),
            ("smtp://h", "nobody"),
        ] {
            let error = smtp(url, from).err().expect("refused");
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        }
    }
}
