//! The arguments of `cp`: where something is, and how its name is joined to a directory.

use std::path::PathBuf;
use std::str::FromStr;

/// A source or a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A path on this machine.
    Local(PathBuf),
    /// A path in a sandbox.
    Remote { sandbox: String, path: String },
    /// Standard input or output.
    Standard,
}

impl FromStr for Place {
    type Err = String;

    /// `SANDBOX:PATH` names a sandbox when nothing before the first `:` looks like a path; write
    /// `./a:b` for a local file with a colon in its name.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            _ if text == "-" => Ok(Self::Standard),
            _ if text.is_empty() => Err("the path is empty".to_owned()),
            Some(("", _)) => Err("the sandbox before ':' is missing (write ./:… for a file)".to_owned()),
            Some((sandbox, path)) if !sandbox.contains('/') && !sandbox.starts_with('.') => {
                // The home directory, which relative paths start from.
                let path = if path.is_empty() { "." } else { path };
                Ok(Self::Remote {
                    sandbox: sandbox.to_owned(),
                    path: path.to_owned(),
                })
            }
            Some(_) | None => Ok(Self::Local(PathBuf::from(text))),
        }
    }
}

/// Whether a path says that it is a directory.
pub(super) fn says_directory(path: &str) -> bool {
    matches!(path.rsplit('/').next(), Some("" | "." | ".."))
}

/// Whether a source means a directory's contents rather than the directory.
pub(super) fn says_contents(path: &str) -> bool {
    path == "." || path.ends_with("/.")
}

/// The last part of a path, if that is a name.
pub(super) fn base_name(path: &str) -> Option<&str> {
    path.trim_end_matches('/')
        .rsplit('/')
        .next()
        .filter(|name| is_name(name))
}

/// Whether this is one plain name, which cannot lead out of the directory that it is joined to.
pub(super) fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

/// A name in a directory of a sandbox.
pub(super) fn join(directory: &str, name: &str) -> String {
    match directory {
        "." => name.to_owned(),
        directory if directory.ends_with('/') => format!("{directory}{name}"),
        directory => format!("{directory}/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn remote(sandbox: &str, path: &str) -> Place {
        Place::Remote {
            sandbox: sandbox.to_owned(),
            path: path.to_owned(),
        }
    }

    #[test]
    fn places_are_told_apart() {
        assert_eq!("-".parse(), Ok(Place::Standard));
        assert_eq!("sb-1:/tmp/x".parse(), Ok(remote("sb-1", "/tmp/x")));
        assert_eq!("beef:a:b".parse(), Ok(remote("beef", "a:b")));
        assert_eq!("sb-1:".parse(), Ok(remote("sb-1", ".")));
        assert_eq!("./a:b".parse(), Ok(Place::Local("./a:b".into())));
        assert_eq!("/a:b".parse(), Ok(Place::Local("/a:b".into())));
        assert_eq!("plain".parse(), Ok(Place::Local("plain".into())));
        assert!(":x".parse::<Place>().is_err());
        assert!("".parse::<Place>().is_err());
    }

    #[test]
    fn names_and_directories() {
        assert!(says_directory("a/") && says_directory("/") && says_directory(".") && says_directory("a/.."));
        assert!(!says_directory("a") && !says_directory("a/b.") && !says_directory("..."));
        assert!(says_contents("a/.") && says_contents(".") && !says_contents("a.") && !says_contents("a/.."));
        assert_eq!(base_name("/a/b//"), Some("b"));
        assert_eq!(base_name("/"), None);
        assert_eq!(base_name("a/.."), None);
    }

    proptest! {
        #[test]
        fn a_sandbox_and_a_path_come_back_apart(sandbox in "[a-z0-9][a-z0-9-]{0,20}", path in "\\PC{1,30}") {
            prop_assert_eq!(format!("{sandbox}:{path}").parse(), Ok(remote(&sandbox, &path)));
        }

        #[test]
        fn every_local_path_can_be_written(path in "\\PC{0,30}") {
            let text = format!("./{path}");
            prop_assert_eq!(text.parse(), Ok(Place::Local(PathBuf::from(&text))));
        }

        #[test]
        fn a_name_never_leads_out(name in "[./a\\x00]{0,6}") {
            if is_name(&name) {
                let joined = std::path::Path::new("/root").join(&name);
                prop_assert_eq!(joined.parent(), Some(std::path::Path::new("/root")));
            }
        }

        #[test]
        fn what_is_joined_has_its_name(directory in "[a-z/]{1,10}", name in "[a-z]{1,5}") {
            let joined = join(&directory, &name);
            prop_assert_eq!(base_name(&joined), Some(name.as_str()));
        }
    }
}
