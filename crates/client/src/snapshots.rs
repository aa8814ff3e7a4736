//! Templates: those of the platform, and those made from sandboxes (snapshots).

use std::time::{Duration, Instant};

use reqwest::Method;
use wrenn_proto::rest::{CreateSnapshot, Template, TemplateKind, TemplateStatus};

use crate::client::{CALL_TIMEOUT, Client, Retry};
use crate::error::{Error, Result};

/// Saving memory and disk of a large sandbox on a slow disk takes minutes.
const CREATE_TIMEOUT: Duration = Duration::from_secs(600);
/// There is no long poll for templates.
const POLL: Duration = Duration::from_millis(300);

/// Snapshots and templates of a team.
///
/// ```no_run
/// use wrenn_client::{Client, CreateSandbox};
///
/// # async fn example(client: Client) -> Result<(), wrenn_client::Error> {
/// let prepared = client.sandboxes().create_running(&CreateSandbox::default()).await?;
/// client.snapshots().create_ready(prepared.id(), Some("prepared"), false).await?;
/// let copy = CreateSandbox { template: Some("prepared".into()), ..CreateSandbox::default() };
/// let sandbox = client.sandboxes().create_running(&copy).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Snapshots {
    client: Client,
}

impl Snapshots {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Makes a template from a running or paused sandbox, which goes on afterwards as before. The
    /// template may still be `building` when this returns.
    ///
    /// # Errors
    /// [`Error::Conflict`] when the name is taken and `overwrite` is false; [`Error::InvalidState`].
    pub async fn create(&self, sandbox_id: &str, name: Option<&str>, overwrite: bool) -> Result<Template> {
        let body = CreateSnapshot {
            sandbox_id: sandbox_id.to_owned(),
            name: name.map(str::to_owned),
        };
        let mut request = self
            .client
            .post(&["v1", "snapshots"], &body)
            .timeout(CREATE_TIMEOUT);
        if overwrite {
            request = request.query(&[("overwrite", "true")]);
        }
        self.client.json(request, Retry::Unsent).await
    }

    /// As [`Self::create`], and waits until the template is ready.
    ///
    /// # Errors
    /// As [`Self::create`]; [`Error::TemplateFailed`]; [`Error::WaitTimeout`].
    pub async fn create_ready(
        &self,
        sandbox_id: &str,
        name: Option<&str>,
        overwrite: bool,
    ) -> Result<Template> {
        let mut template = self.create(sandbox_id, name, overwrite).await?;
        let start = Instant::now();
        loop {
            match template.status {
                TemplateStatus::Ready => return Ok(template),
                TemplateStatus::Failed => return Err(Error::TemplateFailed { name: template.name }),
                TemplateStatus::Building if start.elapsed() > CREATE_TIMEOUT => {
                    return Err(Error::WaitTimeout {
                        what: format!("snapshot {}", template.name),
                        after: CREATE_TIMEOUT,
                    });
                }
                TemplateStatus::Building => tokio::time::sleep(POLL).await,
            }
            template = match self
                .list(None)
                .await?
                .into_iter()
                .find(|other| other.id == template.id)
            {
                Some(now) => now,
                None => return Err(Error::TemplateFailed { name: template.name }),
            };
        }
    }

    /// The templates that the team can use, or only those of one kind.
    ///
    /// ```no_run
    /// use wrenn_client::TemplateKind;
    ///
    /// # async fn example(client: wrenn_client::Client) -> Result<(), wrenn_client::Error> {
    /// let own = client.snapshots().list(Some(TemplateKind::Snapshot)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Unauthorized`], [`Error::Transport`].
    pub async fn list(&self, kind: Option<TemplateKind>) -> Result<Vec<Template>> {
        let mut request = self
            .client
            .request(Method::GET, &["v1", "snapshots"])
            .timeout(CALL_TIMEOUT);
        if let Some(kind) = kind {
            request = request.query(&[("type", kind)]);
        }
        self.client.json(request, Retry::Reads).await
    }

    /// Deletes a snapshot by name or id.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] while sandboxes made from it exist; [`Error::Forbidden`]
    /// for the platform's templates.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let request = self
            .client
            .request(Method::DELETE, &["v1", "snapshots", name])
            .timeout(CALL_TIMEOUT);
        self.client.send(request, Retry::Unsent).await.map(drop)
    }
}
