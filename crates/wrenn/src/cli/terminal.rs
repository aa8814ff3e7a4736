//! This side's terminal: its size, its raw mode, and the way out of it.

use std::io::{IsTerminal as _, stderr, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::error::CliError;

/// The size of the terminal that is looked at, as columns and rows.
pub(super) fn size() -> Option<(u32, u32)> {
    [
        tcgetwinsize(stdout()),
        tcgetwinsize(stdin()),
        tcgetwinsize(stderr()),
    ]
    .into_iter()
    .flatten()
    .map(|size| (u32::from(size.ws_col), u32::from(size.ws_row)))
    .find(|(cols, rows)| *cols > 0 && *rows > 0)
}

/// Whether keys can be read from a person.
pub(super) fn is_interactive() -> bool {
    stdin().is_terminal()
}

/// Raw mode, as long as this lives: every key goes to the sandbox. Dropping it, also while a panic
/// unwinds, brings the terminal back to what it was.
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Enters raw mode; `None` when standard input is no terminal.
    pub(super) fn enter() -> Result<Option<Self>, CliError> {
        if !is_interactive() {
            return Ok(None);
        }
        let failed =
            |errno: rustix::io::Errno| CliError::local("cannot put the terminal into raw mode", errno.into());
        let before = tcgetattr(stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        let guard = Self { before };
        tcsetattr(stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Some(guard))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing is left to try when the terminal itself is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Finds `~.` at the beginning of a line in what is typed, as ssh does: the way out when the other
/// end does not answer. `~~` types one `~`.
#[derive(Debug)]
pub(super) struct Escape {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    LineStart,
    Within,
    Tilde,
}

impl Escape {
    pub(super) fn new() -> Self {
        Self {
            state: State::LineStart,
        }
    }

    /// What of the typed bytes goes to the sandbox, and whether the user wants out.
    pub(super) fn feed(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut through = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            match (self.state, byte) {
                (State::LineStart, b'~') => {
                    self.state = State::Tilde;
                    continue;
                }
                (State::Tilde, b'.') => return (through, true),
                (State::Tilde, b'~') => {}
                // It was no escape after all.
                (State::Tilde, _) => through.push(b'~'),
                (State::LineStart | State::Within, _) => {}
            }
            through.push(byte);
            self.state = if matches!(byte, b'\r' | b'\n') {
                State::LineStart
            } else {
                State::Within
            };
        }
        (through, false)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tilde_dot_leaves_only_at_the_beginning_of_a_line() {
        assert_eq!(Escape::new().feed(b"ls\r~."), (b"ls\r".to_vec(), true));
        assert_eq!(Escape::new().feed(b"a~.b"), (b"a~.b".to_vec(), false));
        assert_eq!(Escape::new().feed(b"~~."), (b"~.".to_vec(), false));
        assert_eq!(Escape::new().feed(b"~/bin"), (b"~/bin".to_vec(), false));
    }

    proptest! {
        #[test]
        fn how_input_is_cut_into_pieces_makes_no_difference(
            typed in prop::collection::vec(prop::sample::select(b"~.a\r".to_vec()), 0..24),
            cut in 0usize..24,
        ) {
            let whole = Escape::new().feed(&typed);
            let (first, second) = typed.split_at(cut.min(typed.len()));
            let mut escape = Escape::new();
            let (mut through, mut out) = escape.feed(first);
            if !out {
                let rest = escape.feed(second);
                through.extend(rest.0);
                out = rest.1;
            }
            prop_assert_eq!((through, out), whole);
        }

        #[test]
        fn without_tildes_everything_goes_through(typed in prop::collection::vec(0u8..126, 0..64)) {
            prop_assert_eq!(Escape::new().feed(&typed), (typed, false));
        }
    }
}
