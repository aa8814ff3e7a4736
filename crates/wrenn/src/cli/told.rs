//! What goes to standard error beside progress: errors, and warnings of what went wrong without stopping a command.
//! Under `--json` each is one line, `{"error":{…}}` or `{"warning":{…}}`, and what only helps people is left out.

use serde_json::{Value, json};

/// Tells of a failure that ends a command, in the form of the API's errors.
pub(crate) fn error_line(code: &str, message: &str) -> Value {
    json!({ "error": { "code": code, "message": message } })
}

/// Tells of something that went wrong and does not stop the command.
pub(crate) fn warn(json: bool, message: &str, help: Option<&str>) {
    eprintln!("{}", warning(json, message, help));
}

fn warning(json: bool, message: &str, help: Option<&str>) -> String {
    if json {
        let mut line = json!({ "warning": { "message": message } });
        if let Some(help) = help {
            line["warning"]["help"] = help.into();
        }
        return line.to_string();
    }
    match help {
        Some(help) => format!("warning: {message}\n  help: {help}"),
        None => format!("warning: {message}"),
    }
}

/// A hint for people.
pub(crate) fn hint(json: bool, text: &str) {
    if !json {
        eprintln!("{text}");
    }
}

/// Whether the arguments, which could not be parsed, ask for JSON.
pub(crate) fn wants_json(args: impl IntoIterator<Item = std::ffi::OsString>) -> bool {
    args.into_iter()
        .take_while(|arg| arg != "--")
        .any(|arg| arg == "--json")
}

/// Leaves out what an error would repeat of a URL that could not be parsed: it may hold a password.
pub(crate) fn without_password(mut error: clap::Error) -> clap::Error {
    use clap::error::{ContextKind, ContextValue};
    if let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue)
        && let Some((user, place)) = value.rsplit_once('@')
        && user.contains(':')
    {
        let shown = format!("****@{place}");
        error.insert(ContextKind::InvalidValue, ContextValue::String(shown));
    }
    error
}

/// A command line that is wrong, as `--json` tells it: the parser's first paragraph says why, the others help.
pub(crate) fn usage_line(error: &clap::Error) -> Value {
    let text = error.render().to_string();
    // Without a subcommand the parser shows the whole help instead of a message.
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let mut line = error_line("usage", "the command line ends where more is needed");
        line["error"]["help"] = "--help lists what can follow".into();
        return line;
    }
    let (message, help) = text.split_once("\n\n").unwrap_or((&text, ""));
    let mut line = error_line("usage", message.trim().trim_start_matches("error: "));
    if !help.trim().is_empty() {
        line["error"]["help"] = help.trim().into();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_lines_of_json_where_json_is_wanted() {
        assert_eq!(warning(false, "no \"x\"", None), "warning: no \"x\"");
        assert_eq!(warning(false, "no", Some("do")), "warning: no\n  help: do");
        let line: Value = serde_json::from_str(&warning(true, "no\n\"x\"", Some("do"))).unwrap();
        assert_eq!(line, json!({"warning": {"message": "no\n\"x\"", "help": "do"}}));
    }

    #[test]
    fn a_commands_own_json_is_none_of_ours() {
        let wants = |args: &[&str]| wants_json(args.iter().map(Into::into));
        assert!(wants(&["sandbox", "--json", "get"]) && !wants(&["run", "--", "jq", "--json"]));
    }
}
