//! Results on standard output: JSON, or tables for people.

use std::io::Write as _;
use std::process::ExitCode;

use comfy_table::presets;
use comfy_table::{ContentArrangement, Table};
use indicatif::BinaryBytes;
use jiff::Timestamp;
use serde::Serialize;

use super::Context;
use super::error::CliError;

/// Prints a result as JSON, indented.
pub(super) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| CliError::local("cannot print the result as JSON", error.into()))?;
    line(&text)
}

/// Prints a line of data.
pub(super) fn line(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .map_err(CliError::output)
}

/// Prints what was done to each of several things, and fails with the last failure after telling the others.
pub(super) fn done(context: &Context, outcomes: Vec<Result<String, CliError>>) -> Result<ExitCode, CliError> {
    let mut done = Vec::new();
    let mut failure: Option<CliError> = None;
    for outcome in outcomes {
        match outcome {
            Ok(name) => done.push(name),
            Err(error) => {
                if let Some(earlier) = failure.replace(error) {
                    earlier.report(context.json);
                }
            }
        }
    }
    if context.json {
        json(&done)?;
    } else {
        for name in &done {
            line(name)?;
        }
    }
    failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// Prints a table with a head.
pub(super) fn table<const N: usize>(
    head: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Result<(), CliError> {
    let mut table = bare();
    table.set_header(head.map(str::to_uppercase));
    table.add_rows(rows.into_iter().map(|row| row.map(|cell| printable(&cell))));
    print(&table)
}

/// Prints names and values, one a line.
pub(super) fn record(rows: impl IntoIterator<Item = (&'static str, String)>) -> Result<(), CliError> {
    let mut table = bare();
    table.add_rows(
        rows.into_iter()
            .map(|(name, value)| [format!("{name}:"), printable(&value)]),
    );
    print(&table)
}

fn bare() -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn print(table: &Table) -> Result<(), CliError> {
    let text: Vec<String> = table
        .lines()
        .map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned())
        .collect();
    line(&text.join("\n"))
}

/// How long ago, in its largest unit.
pub(super) fn age(at: Timestamp) -> String {
    let seconds = Timestamp::now().duration_since(at).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

/// Bytes for people.
pub(super) fn bytes(size: u64) -> String {
    BinaryBytes(size).to_string()
}

/// A text from a guest or a server, with control characters made visible: it must not drive the
/// user's terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let (shown, escaped) = if c.is_control() && c != '\t' && c != '\n' {
                (None, Some(c.escape_default()))
            } else {
                (Some(c), None)
            };
            shown.into_iter().chain(escaped.into_iter().flatten())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}é\tc"), "a\\u{1b}[2Jb\\u{9b}é\tc");
    }
}
