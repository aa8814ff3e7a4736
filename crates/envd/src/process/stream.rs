//! Turns a subscription into the event stream of `Start` and `Connect`.

use std::time::Duration;

use connectrpc::{ConnectError, ServiceStream};
use http::HeaderMap;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wrenn_proto::process::__buffa::oneof::process_event::data_event::Output;
use wrenn_proto::process::ProcessEvent;
use wrenn_proto::process::process_event::{DataEvent, EndEvent, KeepAlive, StartEvent};

use super::table::{Event, Exit, Source};

const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);

/// How often a silent stream carries a sign of life, in seconds, as the client asks for it.
pub(crate) fn keepalive_interval(headers: &HeaderMap) -> Duration {
    headers
        .get("keepalive-ping-interval")
        .and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok())
        .filter(|seconds| *seconds > 0)
        .map_or(DEFAULT_KEEPALIVE, |seconds| {
            Duration::from_secs(seconds.min(3600))
        })
}

/// The error of a stream whose deadline has passed.
pub(crate) fn deadline_error() -> ConnectError {
    ConnectError::deadline_exceeded("the request's deadline has passed")
}

struct Subscription<R> {
    events: mpsc::Receiver<Event>,
    keepalive: Duration,
    deadline: Option<Instant>,
    wrap: fn(ProcessEvent) -> R,
    done: bool,
}

/// The stream ends after the end event, or with an error at the deadline.
pub(super) fn event_stream<R: Send + 'static>(
    events: mpsc::Receiver<Event>,
    headers: &HeaderMap,
    deadline: Option<Instant>,
    wrap: fn(ProcessEvent) -> R,
) -> ServiceStream<R> {
    let subscription = Subscription {
        events,
        keepalive: keepalive_interval(headers),
        deadline,
        wrap,
        done: false,
    };
    Box::pin(futures::stream::unfold(subscription, async |mut subscription| {
        let item = subscription.next().await?;
        Some((item, subscription))
    }))
}

impl<R> Subscription<R> {
    async fn next(&mut self) -> Option<Result<R, ConnectError>> {
        if self.done {
            return None;
        }
        let (deadline, keepalive) = (self.deadline, self.keepalive);
        let deadline = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // First, so that a process that writes without end does not outrun it.
            () = deadline => {
                self.done = true;
                Some(Err(deadline_error()))
            }
            event = self.events.recv() => Some(Ok(self.item(event?))),
            () = tokio::time::sleep(keepalive) => Some(Ok((self.wrap)(event_of(KeepAlive::default())))),
        }
    }
}

impl<R> Subscription<R> {
    fn item(&mut self, event: Event) -> R {
        self.done = matches!(event, Event::End(_));
        (self.wrap)(encode(event))
    }
}

fn event_of<E>(event: E) -> ProcessEvent
where
    Option<wrenn_proto::process::__buffa::oneof::process_event::Event>: From<E>,
{
    ProcessEvent {
        event: event.into(),
        ..Default::default()
    }
}

pub(super) fn encode(event: Event) -> ProcessEvent {
    match event {
        Event::Start(pid) => event_of(StartEvent {
            pid,
            ..Default::default()
        }),
        Event::Data(source, bytes) => {
            let bytes = Vec::from(bytes);
            let output = match source {
                Source::Stdout => Output::Stdout(bytes),
                Source::Stderr => Output::Stderr(bytes),
                Source::Terminal => Output::Pty(bytes),
            };
            event_of(DataEvent {
                output: Some(output),
                ..Default::default()
            })
        }
        Event::End(exit) => event_of(encode_exit(exit)),
    }
}

fn encode_exit(exit: Exit) -> EndEvent {
    let (exit_code, exited, status) = match exit {
        Exit::Code(code) => (code, true, format!("exit status {code}")),
        Exit::Signal(signal) => (-1, false, format!("signal: {}", signal_name(signal))),
    };
    let error = (exit != Exit::Code(0)).then(|| status.clone());
    EndEvent {
        exit_code,
        exited,
        status,
        error,
        ..Default::default()
    }
}

/// The names clients know from the reference implementation.
fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        24 => "cpu time limit exceeded",
        25 => "file size limit exceeded",
        31 => "bad system call",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_as_clients_read_them() {
        let exit = encode_exit(Exit::Code(3));
        assert_eq!(
            (exit.exit_code, exit.exited, exit.error.as_deref()),
            (3, true, Some("exit status 3"))
        );
        assert_eq!(encode_exit(Exit::Code(0)).error, None);
        let exit = encode_exit(Exit::Signal(9));
        assert_eq!(
            (exit.exit_code, exit.exited, exit.status.as_str()),
            (-1, false, "signal: killed")
        );
    }

    #[test]
    fn the_client_chooses_the_keepalive() {
        let mut headers = HeaderMap::new();
        assert_eq!(keepalive_interval(&headers), DEFAULT_KEEPALIVE);
        for (sent, expected) in [("50", 50), ("0", 90), ("x", 90), ("999999999", 3600)] {
            headers.insert("keepalive-ping-interval", sent.parse().expect("a header value"));
            assert_eq!(keepalive_interval(&headers), Duration::from_secs(expected));
        }
    }
}
