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
        Progress { bar, json: self.json }
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
        Progress { bar, json: self.json }
    }
}

/// A bar or spinner, cleared when dropped.
pub(super) struct Progress {
    bar: ProgressBar,
    json: bool,
}

impl Progress {
    pub(super) fn bar(&self) -> &ProgressBar {
        &self.bar
    }

    /// Warns above the bar.
    pub(super) fn warn(&self, message: &str) {
        self.bar.suspend(|| super::told::warn(self.json, message, None));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
