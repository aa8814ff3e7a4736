//! Where the server is and with which key: explicit values, the environment, or the file that
//! `wrenn up` leaves on its own machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where `wrenn up` serves when nothing else is said.
pub const DEFAULT_BASE_URL: &str = "http://127.0.0.1:8000";

/// What a client needs to connect.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// The server, for example `http://127.0.0.1:8000`; may have a path.
    pub base_url: String,
    /// An API key, `wrn_…`.
    pub api_key: String,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("base_url", &self.base_url)
            .field("api_key", &"…")
            .finish()
    }
}

impl Settings {
    /// Finds the settings: what is given, else `WRENN_BASE_URL` and `WRENN_API_KEY`, else
    /// `local.env` in the data directory of the platform that runs on this machine.
    ///
    /// The key in `local.env` is used for the server named there and for no other, so that it is
    /// never sent to a stranger.
    ///
    /// ```no_run
    /// let settings = wrenn_client::Settings::discover(None, None)?;
    /// println!("{}", settings.base_url);
    /// # Ok::<(), wrenn_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] when there is no key; the message says how to get one.
    pub fn discover(base_url: Option<String>, api_key: Option<String>) -> Result<Self> {
        let env = |name| {
            std::env::var(name)
                .ok()
                .filter(|value: &String| !value.is_empty())
        };
        let file = data_dir().map(|dir| dir.join("local.env"));
        let local = match &file {
            Some(path) => read_local_env(path)?,
            None => BTreeMap::new(),
        };
        resolve(
            base_url.or_else(|| env("WRENN_BASE_URL")),
            api_key.or_else(|| env("WRENN_API_KEY")),
            &local,
            file.as_deref(),
        )
    }
}

fn resolve(
    base_url: Option<String>,
    api_key: Option<String>,
    local: &BTreeMap<String, String>,
    file: Option<&Path>,
) -> Result<Settings> {
    let local_url = local
        .get("WRENN_BASE_URL")
        .map_or(DEFAULT_BASE_URL, String::as_str);
    let base_url = base_url.unwrap_or_else(|| local_url.to_owned());
    if let Some(api_key) = api_key {
        return Ok(Settings { base_url, api_key });
    }
    let same_server = base_url.trim_end_matches('/') == local_url.trim_end_matches('/');
    match local.get("WRENN_API_KEY") {
        Some(key) if same_server => Ok(Settings {
            base_url,
            api_key: key.clone(),
        }),
        Some(_) => Err(Error::Config(format!(
            "no API key for {base_url}: the key on this machine belongs to {local_url}. \
             Set WRENN_API_KEY (or pass --api-key)."
        ))),
        None => {
            let looked = file.map_or(String::new(), |path| {
                format!(" and there is no {}", path.display())
            });
            Err(Error::Config(format!(
                "no API key: WRENN_API_KEY is not set{looked}. Start a platform on this machine with \
                 `make up` (or `wrenn up`), or set WRENN_BASE_URL and WRENN_API_KEY to use another one."
            )))
        }
    }
}

/// The data directory of a platform on this machine: `WRENN_DIR`, else `/var/lib/wrenn` for root,
/// else `wrenn` in the user's data directory.
///
/// ```
/// let _ = wrenn_client::data_dir();
/// ```
#[must_use]
pub fn data_dir() -> Option<PathBuf> {
    let path = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(dir) = path("WRENN_DIR") {
        return Some(dir);
    }
    if is_root() {
        return Some(PathBuf::from("/var/lib/wrenn"));
    }
    path("XDG_DATA_HOME")
        .or_else(|| path("HOME").map(|home| home.join(".local/share")))
        .map(|dir| dir.join("wrenn"))
}

#[cfg(unix)]
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The owner of this process's own entry in /proc is its effective user; elsewhere nobody is
    // taken for root, as the platform itself runs on Linux only.
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}

fn read_local_env(path: &Path) -> Result<BTreeMap<String, String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(parse_env(&text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        // A platform of another user: its key is not ours to read, which is no error if another is given.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(BTreeMap::new()),
        Err(source) => Err(Error::Io {
            what: format!("cannot read {}", path.display()),
            source,
        }),
    }
}

/// Lines `NAME=value`, with an optional `export` before and optional quotes around the value.
fn parse_env(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let line = line.strip_prefix("export ").unwrap_or(line);
            let (name, value) = line.split_once('=')?;
            let value = value.trim();
            let unquoted = ['"', '\''].into_iter().find_map(|quote| {
                value
                    .strip_prefix(quote)
                    .and_then(|rest| rest.strip_suffix(quote))
            });
            (!name.starts_with('#')).then(|| (name.trim().to_owned(), unquoted.unwrap_or(value).to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> BTreeMap<String, String> {
        parse_env(
            "# made by wrenn up\nexport WRENN_BASE_URL='http://127.0.0.1:9000'\nWRENN_API_KEY=\"wrn_local\"\n",
        )
    }

    #[test]
    fn the_local_file_serves_when_nothing_is_given() {
        let settings = resolve(None, None, &local(), None).unwrap();
        assert_eq!(settings.base_url, "http://127.0.0.1:9000");
        assert_eq!(settings.api_key, "wrn_local");
        assert!(!format!("{settings:?}").contains("wrn_local"));
    }

    #[test]
    fn the_local_key_goes_to_the_local_server_alone() {
        let error = resolve(Some("https://elsewhere.example".into()), None, &local(), None).unwrap_err();
        assert!(error.to_string().contains("WRENN_API_KEY"));
        assert!(resolve(Some("http://127.0.0.1:9000/".into()), None, &local(), None).is_ok());
    }

    #[test]
    fn a_given_key_needs_no_file_and_its_absence_names_the_remedy() {
        let settings = resolve(None, Some("wrn_x".into()), &BTreeMap::new(), None).unwrap();
        assert_eq!(settings.base_url, DEFAULT_BASE_URL);
        let error = resolve(None, None, &BTreeMap::new(), Some(Path::new("/data/local.env"))).unwrap_err();
        assert!(error.to_string().contains("make up") && error.to_string().contains("/data/local.env"));
    }
}
