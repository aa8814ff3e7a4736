//! The life of sandboxes: create, list, wait, pause, resume, destroy; and commands without a stream.

use std::time::{Duration, Instant};

use reqwest::Method;
use wrenn_proto::rest::{
    Console, CreateSandbox, Exec, ExecResult, ExecStarted, Metrics, Process, ProcessList, Sandbox,
    SandboxStatus,
};

use crate::client::{CALL_TIMEOUT, Client, Retry};
use crate::error::{Error, Result};
use crate::exec::{ExecOptions, ExecStream};
use crate::files::Files;
use crate::pty::{Pty, PtyOptions};

/// Most records that the server puts into one answer.
const PAGE: usize = 1000;
/// How long one long poll lasts; waiting longer takes several.
const POLL: Duration = Duration::from_secs(20);
/// The server kills a foreground command after this many seconds unless told otherwise.
const DEFAULT_EXEC_LIMIT: u64 = 30;
/// How long the calls that wait do so unless a limit is given: a slow host restores in seconds, and a
/// pause writes at most the sandbox's memory to disk.
const DEFAULT_WAIT: Duration = Duration::from_secs(300);

/// The sandboxes of a team.
///
/// ```no_run
/// use wrenn_client::{Client, CreateSandbox};
///
/// # async fn example(client: Client) -> Result<(), wrenn_client::Error> {
/// let wanted = CreateSandbox { memory_mb: Some(1024), timeout_sec: Some(600), ..CreateSandbox::default() };
/// let sandbox = client.sandboxes().create_running(&wanted).await?;
/// for other in client.sandboxes().list().await? {
///     println!("{} {}", other.id, other.status);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Sandboxes {
    client: Client,
}

impl Sandboxes {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Asks for a sandbox and returns at once: it is `pending` or `starting`. Its id can be waited for with
    /// [`SandboxHandle::wait_settled`].
    ///
    /// # Errors
    /// [`Error::InvalidRequest`], [`Error::NotFound`] (no such template), [`Error::NoCapacity`].
    pub async fn create(&self, wanted: &CreateSandbox) -> Result<Sandbox> {
        let request = self
            .client
            .post(&["v1", "sandboxes"], wanted)
            .timeout(CALL_TIMEOUT);
        self.client.json(request, Retry::Unsent).await
    }

    /// Asks for a sandbox and waits until it runs.
    ///
    /// ```no_run
    /// # async fn example(client: wrenn_client::Client) -> Result<(), wrenn_client::Error> {
    /// let sandbox = client.sandboxes().create_running(&Default::default()).await?;
    /// println!("{} runs", sandbox.id());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Self::create`]; [`Error::SandboxFailed`] when it could not start. One that failed is
    /// left for its error to be read.
    pub async fn create_running(&self, wanted: &CreateSandbox) -> Result<SandboxHandle> {
        let sandbox = self.client.sandbox(self.create(wanted).await?.id);
        sandbox.wait_for(SandboxStatus::Running, DEFAULT_WAIT).await?;
        Ok(sandbox)
    }

    /// The team's sandboxes, newest first, without those that are destroyed.
    ///
    /// # Errors
    /// [`Error::Unauthorized`], [`Error::Transport`].
    pub async fn list(&self) -> Result<Vec<Sandbox>> {
        self.pages(false).await
    }

    /// As [`Self::list`], with those that are destroyed, as long as the server remembers them.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn list_all(&self) -> Result<Vec<Sandbox>> {
        self.pages(true).await
    }

    async fn pages(&self, all: bool) -> Result<Vec<Sandbox>> {
        let mut records: Vec<Sandbox> = Vec::new();
        loop {
            let mut request = self
                .client
                .request(Method::GET, &["v1", "sandboxes"])
                .query(&[("limit", PAGE)])
                .timeout(CALL_TIMEOUT);
            if all {
                request = request.query(&[("all", true)]);
            }
            if let Some(last) = records.last() {
                request = request.query(&[("before", &last.id)]);
            }
            let page: Vec<Sandbox> = self.client.json(request, Retry::Reads).await?;
            let full = page.len() >= PAGE;
            // A server without pages would answer the first one for ever.
            let repeats = page.last().map(|record| &record.id) == records.last().map(|record| &record.id);
            if !repeats {
                records.extend(page);
            }
            if repeats || !full {
                return Ok(records);
            }
        }
    }

    /// One sandbox's record.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn get(&self, id: &str) -> Result<Sandbox> {
        self.client.sandbox(id).get().await
    }
}

/// One sandbox. Cheap to clone; holds only its id and the client.
#[derive(Debug, Clone)]
pub struct SandboxHandle {
    client: Client,
    id: String,
}

impl SandboxHandle {
    pub(crate) fn new(client: Client, id: String) -> Self {
        Self { client, id }
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Its id, `sb-{uuid}`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    fn action(&self, name: &str) -> reqwest::RequestBuilder {
        self.client
            .request(Method::POST, &["v1", "sandboxes", &self.id, name])
            .timeout(CALL_TIMEOUT)
    }

    /// Its record now.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn get(&self) -> Result<Sandbox> {
        let request = self
            .client
            .request(Method::GET, &["v1", "sandboxes", &self.id])
            .timeout(CALL_TIMEOUT);
        self.client.json(request, Retry::Reads).await
    }

    /// Waits until no operation is under way on it, and returns its record.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
    /// let record = sandbox.wait_settled(Duration::from_secs(60)).await?;
    /// println!("{}", record.status);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::WaitTimeout`]; [`Error::NotFound`].
    pub async fn wait_settled(&self, limit: Duration) -> Result<Sandbox> {
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            let poll = POLL.min(left);
            let asked = Instant::now();
            let request = self
                .client
                .request(Method::GET, &["v1", "sandboxes", &self.id])
                .query(&[("wait", poll.as_secs().max(1))])
                .timeout(poll + CALL_TIMEOUT);
            let record: Sandbox = self.client.json(request, Retry::Reads).await?;
            if !record.status.is_transient() {
                return Ok(record);
            }
            if left <= poll {
                return Err(Error::WaitTimeout {
                    what: format!("sandbox {} ({})", self.id, record.status),
                    after: limit,
                });
            }
            // A server that does not hold the request is asked at a bearable pace.
            if asked.elapsed() < Duration::from_millis(200) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Waits until it has settled in this status.
    ///
    /// # Errors
    /// [`Error::SandboxFailed`] when it settles in another one; [`Error::WaitTimeout`].
    pub async fn wait_for(&self, wanted: SandboxStatus, limit: Duration) -> Result<Sandbox> {
        settled_as(self.wait_settled(limit).await?, wanted)
    }

    /// Saves its memory and disk and frees the rest; returns at once.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when it does not run.
    pub async fn pause(&self) -> Result<Sandbox> {
        self.client.json(self.action("pause"), Retry::Unsent).await
    }

    /// As [`Self::pause`], and waits until it is paused.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
    /// sandbox.pause_and_wait(Duration::from_secs(60)).await?;
    /// // Days later, its processes go on where they were.
    /// sandbox.resume_and_wait(Duration::from_secs(60)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Self::pause`]; [`Error::Agent`], [`Error::SandboxFailed`], [`Error::WaitTimeout`].
    pub async fn pause_and_wait(&self, limit: Duration) -> Result<Sandbox> {
        self.settle(self.action("pause"), SandboxStatus::Paused, limit)
            .await
    }

    /// Brings it back with its memory as it was; returns at once.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when it is not paused.
    pub async fn resume(&self) -> Result<Sandbox> {
        self.client.json(self.action("resume"), Retry::Unsent).await
    }

    /// As [`Self::resume`], and waits until it runs.
    ///
    /// # Errors
    /// As [`Self::resume`]; [`Error::NoCapacity`] (it stays paused), [`Error::Agent`],
    /// [`Error::SandboxFailed`], [`Error::WaitTimeout`].
    pub async fn resume_and_wait(&self, limit: Duration) -> Result<Sandbox> {
        self.settle(self.action("resume"), SandboxStatus::Running, limit)
            .await
    }

    /// Asks for a change and waits for its end. The request itself waits first, as its answer tells
    /// why a change failed that left the sandbox as it was.
    async fn settle(
        &self,
        request: reqwest::RequestBuilder,
        wanted: SandboxStatus,
        limit: Duration,
    ) -> Result<Sandbox> {
        let start = Instant::now();
        let poll = POLL.min(limit);
        let request = request
            .query(&[("wait", poll.as_secs().max(1))])
            .timeout(poll + CALL_TIMEOUT);
        let record: Sandbox = self.client.json(request, Retry::Unsent).await?;
        if record.status.is_transient() {
            self.wait_for(wanted, limit.saturating_sub(start.elapsed())).await
        } else {
            settled_as(record, wanted)
        }
    }

    /// Puts off its automatic pause.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when it does not run.
    pub async fn ping(&self) -> Result<()> {
        self.client
            .send(self.action("ping"), Retry::Unsent)
            .await
            .map(drop)
    }

    /// Asks for its end and returns at once: its memory, disk and processes are gone for good.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn destroy(&self) -> Result<()> {
        let request = self
            .client
            .request(Method::DELETE, &["v1", "sandboxes", &self.id])
            .timeout(CALL_TIMEOUT);
        self.client.send(request, Retry::Unsent).await.map(drop)
    }

    /// Destroys it and waits until it is gone.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WaitTimeout`].
    pub async fn destroy_and_wait(&self) -> Result<()> {
        self.destroy().await?;
        match self.wait_settled(DEFAULT_WAIT).await {
            Ok(record) if matches!(record.status, SandboxStatus::Stopped | SandboxStatus::Missing) => Ok(()),
            Ok(record) => Err(Error::SandboxFailed {
                id: record.id,
                status: record.status,
                message: record.error.map(|error| error.message),
                console: None,
            }),
            // A server may forget what is gone.
            Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Runs a command and collects its output (at most 16 MiB a stream; see [`Self::exec_stream`] for more).
    ///
    /// ```no_run
    /// use wrenn_client::Exec;
    ///
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
    /// let script = Exec { cmd: "python3".into(), args: vec!["-c".into(), "print(6 * 7)".into()], ..Exec::default() };
    /// assert_eq!(sandbox.exec(&script).await?.stdout, "42\n");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidState`] when it does not run, [`Error::InvalidRequest`] (no such program, user or
    /// directory), [`Error::Agent`]. A command that fails is no error: see [`ExecResult::exit_code`].
    pub async fn exec(&self, command: &Exec) -> Result<ExecResult> {
        let body = Exec {
            background: false,
            ..command.clone()
        };
        let seconds = command
            .timeout_sec
            .filter(|limit| *limit > 0)
            .map_or(DEFAULT_EXEC_LIMIT, u64::from);
        let request = self
            .client
            .post(&["v1", "sandboxes", &self.id, "exec"], &body)
            .timeout(Duration::from_secs(seconds) + CALL_TIMEOUT);
        self.client.json(request, Retry::Unsent).await
    }

    /// Starts a command and leaves it running.
    ///
    /// ```no_run
    /// use wrenn_client::Exec;
    ///
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
    /// let server = Exec { cmd: "python3".into(), args: vec!["-m".into(), "http.server".into()], ..Exec::default() };
    /// let started = sandbox.exec_background(&server).await?;
    /// sandbox.kill_process(&started.tag).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub async fn exec_background(&self, command: &Exec) -> Result<ExecStarted> {
        let body = Exec {
            background: true,
            ..command.clone()
        };
        let request = self
            .client
            .post(&["v1", "sandboxes", &self.id, "exec"], &body)
            .timeout(CALL_TIMEOUT);
        self.client.json(request, Retry::Unsent).await
    }

    /// Runs a command with live output and, if wanted, standard input. See [`ExecStream`].
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::InvalidState`]; what is wrong with the command itself comes with
    /// the first event.
    pub async fn exec_stream(&self, options: &ExecOptions) -> Result<ExecStream> {
        ExecStream::start(self, options).await
    }

    /// Follows the output of a process that runs already, by pid or tag. See [`ExecStream`].
    ///
    /// ```no_run
    /// use wrenn_client::ExecEvent;
    ///
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
    /// let mut output = sandbox.process_stream("web-server").await?;
    /// while let Some(event) = output.next().await? {
    ///     println!("{event:?}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such process.
    pub async fn process_stream(&self, selector: &str) -> Result<ExecStream> {
        ExecStream::follow(self, selector).await
    }

    /// Starts a terminal. See [`Pty`].
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::InvalidState`].
    pub async fn pty(&self, options: &PtyOptions) -> Result<Pty> {
        Pty::start(self, options).await
    }

    /// Attaches to a terminal that runs already, by its tag.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn pty_connect(&self, tag: &str) -> Result<Pty> {
        Pty::connect(self, tag).await
    }

    /// The processes that were started through the API and still run.
    ///
    /// # Errors
    /// [`Error::InvalidState`] when the sandbox does not run.
    pub async fn processes(&self) -> Result<Vec<Process>> {
        let request = self
            .client
            .request(Method::GET, &["v1", "sandboxes", &self.id, "processes"])
            .timeout(CALL_TIMEOUT);
        Ok(self
            .client
            .json::<ProcessList>(request, Retry::Reads)
            .await?
            .processes)
    }

    /// Kills a process and its group, by pid or tag.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such process (any more).
    pub async fn kill_process(&self, selector: &str) -> Result<()> {
        let request = self
            .client
            .request(
                Method::DELETE,
                &["v1", "sandboxes", &self.id, "processes", selector],
            )
            .timeout(CALL_TIMEOUT);
        self.client.send(request, Retry::Unsent).await.map(drop)
    }

    /// Its files.
    #[must_use]
    pub fn files(&self) -> Files {
        Files::new(self.clone())
    }

    /// Its use of processor, memory and disk over a range: `5m 10m 1h 2h 6h 12h 24h`.
    ///
    /// ```no_run
    /// # async fn example(sandbox: wrenn_client::SandboxHandle) -> Result<(), wrenn_client::Error> {
    /// for point in sandbox.metrics("10m").await?.points {
    ///     println!("{:.0} %", point.cpu_pct);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for another range.
    pub async fn metrics(&self, range: &str) -> Result<Metrics> {
        let request = self
            .client
            .request(Method::GET, &["v1", "sandboxes", &self.id, "metrics"])
            .query(&[("range", range)])
            .timeout(CALL_TIMEOUT);
        self.client.json(request, Retry::Reads).await
    }

    /// The last lines of its serial console.
    ///
    /// # Errors
    /// As of any call; [`Error::NotFound`] once it was destroyed.
    pub async fn console(&self) -> Result<String> {
        let request = self
            .client
            .request(Method::GET, &["v1", "sandboxes", &self.id, "console"])
            .timeout(CALL_TIMEOUT);
        let answer: Console = self.client.json(request, Retry::Reads).await?;
        Ok(answer.console)
    }
}

/// The record, if it is in the wanted status.
fn settled_as(record: Sandbox, wanted: SandboxStatus) -> Result<Sandbox> {
    if record.status == wanted {
        return Ok(record);
    }
    let (message, console) = record
        .error
        .map_or((None, None), |error| (Some(error.message), error.console));
    Err(Error::SandboxFailed {
        id: record.id,
        status: record.status,
        message,
        console,
    })
}
