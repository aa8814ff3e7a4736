//! Signals that ask a command to stop. Once listened for, they no longer end the process by
//! themselves, so that it can clean up first.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::CliError;

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// Ctrl-C.
    Int,
    /// SIGTERM.
    Term,
    /// The terminal went away.
    Hangup,
}

impl Interrupt {
    /// As shells report it: 128 and the signal's number.
    pub(super) fn exit_code(self) -> u8 {
        match self {
            Self::Hangup => 129,
            Self::Int => 130,
            Self::Term => 143,
        }
    }
}

impl std::fmt::Display for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Int => "Ctrl-C",
            Self::Term => "SIGTERM",
            Self::Hangup => "SIGHUP",
        })
    }
}

/// The signals, listened for from [`Signals::listen`] on.
#[derive(Debug)]
pub(super) struct Signals {
    int: Signal,
    term: Signal,
    hangup: Signal,
}

impl Signals {
    pub(super) fn listen() -> Result<Self, CliError> {
        let on = |kind| signal(kind).map_err(|source| CliError::local("cannot listen for signals", source));
        Ok(Self {
            int: on(SignalKind::interrupt())?,
            term: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
        })
    }

    /// The next one. Cancel-safe.
    pub(super) async fn recv(&mut self) -> Interrupt {
        tokio::select! {
            Some(()) = self.int.recv() => Interrupt::Int,
            Some(()) = self.term.recv() => Interrupt::Term,
            Some(()) = self.hangup.recv() => Interrupt::Hangup,
            // Signal streams do not end while the runtime lives.
            else => std::future::pending().await,
        }
    }
}
