//! Turns a subscription into the event stream of `Start` and `Connect`.

use std::collections::VecDeque;
use std::time::Duration;

use connectrpc::{ConnectError, ServiceStream};
use http::HeaderMap;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wrenn_proto::guest::GATHER_HEADER;
use wrenn_proto::process::__buffa::oneof::process_event::data_event::Output;
use wrenn_proto::process::ProcessEvent;
use wrenn_proto::process::process_event::{DataEvent, EndEvent, KeepAlive, StartEvent};

use super::table::{Event, Exit, Source};

const DEFAULT_KEEPALIVE: Duration = Duration::from_secs(90);
/// The longest that first events are held back.
const MAX_GATHER: Duration = Duration::from_secs(1);
/// The most events that are held back; chunks of output are bounded themselves.
const MAX_GATHERED: usize = 8;

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

/// How long the client lets the first events wait for one another ([`GATHER_HEADER`]).
pub(super) fn gathering(headers: &HeaderMap) -> Option<Duration> {
    let millis = headers.get(GATHER_HEADER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(millis).min(MAX_GATHER))
}

/// The error of a stream whose deadline has passed.
pub(crate) fn deadline_error() -> ConnectError {
    ConnectError::deadline_exceeded("the request's deadline has passed")
}

struct Subscription<R> {
    events: mpsc::Receiver<Event>,
    /// First events that waited for one another.
    gathered: VecDeque<Event>,
    keepalive: Duration,
    deadline: Option<Instant>,
    wrap: fn(ProcessEvent) -> R,
    done: bool,
}

/// The stream ends after the end event, or with an error at the deadline. Returns when the first events have been
/// gathered, so that they travel with the answer's head.
pub(super) async fn event_stream<R: Send + 'static>(
    events: mpsc::Receiver<Event>,
    headers: &HeaderMap,
    deadline: Option<Instant>,
    wrap: fn(ProcessEvent) -> R,
) -> ServiceStream<R> {
    let mut subscription = Subscription {
        events,
        gathered: VecDeque::new(),
        keepalive: keepalive_interval(headers),
        deadline,
        wrap,
        done: false,
    };
    if let Some(wait) = gathering(headers) {
        subscription.gather(wait).await;
    }
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
        // What is there already needs no timers, unless it comes too late.
        let late = |deadline: Instant| deadline <= Instant::now();
        if !self.deadline.is_some_and(late)
            && let Some(event) = self.gathered.pop_front()
        {
            return Some(Ok(self.item(event)));
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
    async fn gather(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        while self.gathered.len() < MAX_GATHERED
            && !matches!(self.gathered.back(), Some(Event::End(_)))
            && let Ok(Some(event)) = tokio::time::timeout_at(until, self.events.recv()).await
        {
            self.gathered.push_back(event);
        }
    }

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

fn encode(event: Event) -> ProcessEvent {
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

    #[tokio::test(start_paused = true)]
    async fn first_events_wait_for_one_another_when_the_client_lets_them() {
        let mut headers = HeaderMap::new();
        headers.insert(GATHER_HEADER, "50".parse().expect("a header value"));
        let (sender, receiver) = mpsc::channel(4);
        sender.send(Event::Start(7)).await.expect("room");
        let begun = Instant::now();
        // Nothing else comes: the wait ends by itself.
        let mut stream = event_stream(receiver, &headers, None, |event| event).await;
        assert_eq!(begun.elapsed(), Duration::from_millis(50));
        assert!(futures::StreamExt::next(&mut stream).await.is_some());
        // Later events are not held back.
        let begun = Instant::now();
        sender
            .send(Event::Data(Source::Stdout, "x".into()))
            .await
            .expect("room");
        assert!(futures::StreamExt::next(&mut stream).await.is_some());
        assert_eq!(begun.elapsed(), Duration::ZERO);

        let (sender, receiver) = mpsc::channel(4);
        for event in [Event::Start(7), Event::End(Exit::Code(0))] {
            sender.send(event).await.expect("room");
        }
        // The end makes it whole: no wait.
        let begun = Instant::now();
        let stream = event_stream(receiver, &headers, None, |event| event).await;
        assert_eq!(futures::StreamExt::collect::<Vec<_>>(stream).await.len(), 2);
        assert_eq!(begun.elapsed(), Duration::ZERO);
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
