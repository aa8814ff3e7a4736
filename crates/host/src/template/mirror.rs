//! Where Debian's packages come from: the machine's own settings, or a mirror that was named.
//!
//! The mirror serves the builds alone. Guests keep Debian's own addresses: a mirror is often in a private network, which
//! they do not reach, and its URL may hold a password, which is none of theirs.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio::process::Command;

use super::kernel::run;
use crate::error::{IoContext as _, Result};

/// Debian's keys, as its package `debian-archive-keyring` installs them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The mirror's entry in a tree that is being built, by which it is found and taken out again.
const ENTRY: &str = "wrenn-mirror.list";

/// The URL of a Debian archive: the folder in which `dists` and `pool` are.
#[derive(Clone, PartialEq, Eq)]
pub struct DebianMirror(String);

impl std::fmt::Debug for DebianMirror {
    /// Its URL may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DebianMirror(…)")
    }
}

impl FromStr for DebianMirror {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wanted = "must be the http:// or https:// URL of a Debian archive (the folder that holds `dists`), such as \
                      https://deb.debian.org/debian";
        let url = text.trim_end_matches('/');
        let place = url
            .strip_prefix("https://")
            .or_else(|| url.strip_prefix("http://"))
            .ok_or(wanted)?;
        let host = place.split('/').next().unwrap_or_default();
        if host.is_empty() || host.ends_with('@') {
            return Err(format!("names no machine; it {wanted}"));
        }
        // A line of sources.list has no way to quote, and apt asks for paths below the URL.
        if let Some(bad) = url
            .chars()
            .find(|c| !c.is_ascii_graphic() || "?#\"'\\".contains(*c))
        {
            return Err(format!("must not contain {bad:?}; it {wanted}"));
        }
        Ok(Self(url.to_owned()))
    }
}

impl DebianMirror {
    /// The URL with what it may hold of secrets.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Where security updates are beside an archive, as Debian's own servers have it; a mirror need not.
    fn security(&self) -> Option<String> {
        let (_, place) = self.0.split_once("://")?;
        place.contains('/').then(|| format!("{}-security", self.0))
    }

    fn sources(&self, suite: &str, keyring: Option<&str>, security: Option<&str>) -> String {
        let options = keyring
            .map(|path| format!("[signed-by={path}] "))
            .unwrap_or_default();
        let mut lines = format!(
            "deb {options}{url} {suite} main\ndeb {options}{url} {suite}-updates main\n",
            url = self.0
        );
        if let Some(url) = security {
            lines.push_str(&format!("deb {options}{url} {suite}-security main\n"));
        }
        lines
    }
}

/// apt, asked for packages of a suite: with the machine's settings, or with those of a mirror in a folder of its own.
#[derive(Debug)]
pub(super) struct Apt {
    options: Vec<String>,
    /// What names the mirror, for other programs.
    pub(super) sources: Option<PathBuf>,
}

impl Apt {
    /// Reads a mirror's lists into the folder `work`, so that what is wrong with it is said by name. Without a mirror
    /// the machine's lists have to do.
    pub(super) async fn prepare(mirror: Option<&DebianMirror>, suite: &str, work: &Path) -> Result<Self> {
        let mut apt = Self {
            options: Vec::new(),
            sources: None,
        };
        let Some(mirror) = mirror else {
            return Ok(apt);
        };
        let (state, cache, sources) = (work.join("state"), work.join("cache"), work.join(ENTRY));
        for dir in [state.join("lists/partial"), cache.join("archives/partial")] {
            std::fs::create_dir_all(&dir).at("create", &dir)?;
        }
        let set = |name: &str, path: &Path| ["-o".to_owned(), format!("{name}={}", path.display())];
        apt.options = [
            set("Dir::Etc::SourceList", &sources),
            set("Dir::Etc::SourceParts", Path::new("/dev/null")),
            set("Dir::State", &state),
            set("Dir::Cache", &cache),
        ]
        .concat();
        let keyring = Path::new(KEYRING).is_file().then_some(KEYRING);
        let security = mirror.security();
        let mut outcome = apt
            .update(mirror.sources(suite, keyring, security.as_deref()), &sources)
            .await;
        if outcome.is_err() && security.is_some() {
            outcome = apt.update(mirror.sources(suite, keyring, None), &sources).await;
            if outcome.is_ok() {
                tracing::warn!(
                    "the Debian mirror has no folder with '-security' beside it: the template gets the security \
                     updates of the release's last revision"
                );
            }
        }
        outcome?;
        apt.sources = Some(sources);
        Ok(apt)
    }

    async fn update(&self, lines: String, sources: &Path) -> Result<()> {
        crate::layout::write_secret(sources, lines.as_bytes())?;
        run(
            "apt-get update with the Debian mirror (WRENN_DEBIAN_MIRROR)",
            self.command("apt-get").args(["update", "-q", "--error-on=any"]),
        )
        .await
        .map(drop)
    }

    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// Runs in the shell outside the tree, whose path is `$1`, after a build from a mirror: the guest gets what a build
/// from Debian's own servers leaves.
pub(super) fn forget(suite: &str) -> String {
    format!(
        "set -eu; rm -f \"$1/etc/apt/sources.list.d/\"*{ENTRY}; printf '%s\\n' \
         'deb http://deb.debian.org/debian {suite} main' \
         'deb http://deb.debian.org/debian {suite}-updates main' \
         'deb http://security.debian.org/debian-security {suite}-security main' > \"$1/etc/apt/sources.list\""
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_archive_is_refused_with_what_one_is() {
        for url in [
            "https://deb.debian.org/debian",
            "http://u:p@[fd00::1]:3142/debian",
            "http://mirror",
        ] {
            assert_eq!(url.parse::<DebianMirror>().unwrap().reveal(), url);
            assert_eq!(format!("{url}/").parse::<DebianMirror>().unwrap().reveal(), url);
        }
        for bad in [
            "",
            "deb.debian.org/debian",
            "ftp://deb.debian.org/debian",
            "http://",
            "https:///debian",
            "http://user:secret@",
            "http://mirror/a b",
            "http://mirror/a\nb",
            "http://mirror/debian?x",
            "http://mirror/'$(id)'",
        ] {
            let why = bad.parse::<DebianMirror>().unwrap_err();
            assert!(
                why.contains("https://deb.debian.org/debian") && !why.contains("secret"),
                "{bad}: {why}"
            );
        }
        let mirror: DebianMirror = "http://user:secret@mirror/debian".parse().unwrap();
        assert!(!format!("{mirror:?}").contains("secret"));
    }

    #[test]
    fn a_mirrors_sources_are_those_of_a_release() {
        let mirror: DebianMirror = "http://mirror/debian/".parse().unwrap();
        let security = mirror.security();
        assert_eq!(
            mirror.sources("bookworm", Some("/keys.gpg"), security.as_deref()),
            "deb [signed-by=/keys.gpg] http://mirror/debian bookworm main\n\
             deb [signed-by=/keys.gpg] http://mirror/debian bookworm-updates main\n\
             deb [signed-by=/keys.gpg] http://mirror/debian-security bookworm-security main\n"
        );
        assert!(!mirror.sources("bookworm", None, None).contains("security"));
        // Nothing but a machine has no name that could be made longer.
        assert_eq!("http://mirror".parse::<DebianMirror>().unwrap().security(), None);
    }
}
