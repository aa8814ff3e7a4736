//! Progress on standard error, and only there where a terminal shows it.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Context;

impl Context {
    fn target(&self) -> ProgressDrawTarget {
        // Draws nothing by itself when standard error is no terminal.
        if self.progress {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        }
    }

    /// Something of unknown length. Gone from the screen when dropped.
    pub(super) fn spinner(&self, message: impl Into<String>) -> Progress {
        let bar = ProgressBar::with_draw_target(None, self.target());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}") {
            bar.set_style(style);
        }
        bar.set_message(message.into());
        bar.enable_steady_tick(Duration::from_millis(120));
        Progress(bar)
    }

    /// Bytes on their way; without a length, as many as there are.
    pub(super) fn transfer(&self, length: Option<u64>, message: impl Into<String>) -> Progress {
        let bar = ProgressBar::with_draw_target(length, self.target());
        let template = match length {
            Some(_) => {
                "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta:.dim}"
            }
            None => "{spinner} {msg} {binary_bytes} {binary_bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(message.into());
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress(bar)
    }
}

/// A bar or spinner, cleared when dropped.
pub(super) struct Progress(ProgressBar);

impl Progress {
    pub(super) fn bar(&self) -> &ProgressBar {
        &self.0
    }

    /// Writes a line above the bar.
    pub(super) fn note(&self, text: &str) {
        self.0.suspend(|| eprintln!("{text}"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
