//! What the agent knows about its sandbox, and the handles its services share.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use wrenn_proto::guest::InitRequest;

use crate::files::watch::Watchers;
use crate::freezer::Freezer;
use crate::http::metrics::CpuSample;
use crate::logging::log;
use crate::process::table::ProcessTable;
use crate::users::User;

/// User of processes and files when neither the request nor `/init` names one.
const DEFAULT_USER: &str = "user";
const STATE_FILE: &str = "agent.json";

/// Locks a mutex; a panic elsewhere must not take this request down too.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `/init` set. It outlives the agent process, but not the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    #[serde(default)]
    pub(crate) env_vars: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) access_token: Option<String>,
    #[serde(default)]
    pub(crate) default_user: Option<String>,
    #[serde(default)]
    pub(crate) default_workdir: Option<String>,
}

impl Settings {
    /// Takes over what the request carries and keeps the rest.
    pub(crate) fn apply(&mut self, request: &InitRequest) {
        if let Some(env_vars) = &request.env_vars {
            self.env_vars.clone_from(env_vars);
        }
        // Absent and empty mean the same to the clients: leave it as it is.
        let set = |field: &mut Option<String>, value: &Option<String>| {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                *field = Some(value.clone());
            }
        };
        set(&mut self.access_token, &request.access_token);
        set(&mut self.default_user, &request.default_user);
        set(&mut self.default_workdir, &request.default_workdir);
    }
}

/// The agent: shared by all services, cheap to clone as an [`Arc`].
pub(crate) struct Agent {
    settings: Mutex<Arc<Settings>>,
    state_dir: Option<PathBuf>,
    pub(crate) processes: Arc<ProcessTable>,
    pub(crate) watchers: Watchers,
    /// `None` outside of a guest, and in one without control groups.
    pub(crate) freezer: Option<Arc<Freezer>>,
    pub(crate) cpu: Mutex<CpuSample>,
}

impl Agent {
    /// Loads what an earlier run of the agent left in `state_dir`.
    pub(crate) fn new(state_dir: Option<PathBuf>) -> Self {
        let settings = state_dir.as_deref().and_then(load).unwrap_or_default();
        Self {
            settings: Mutex::new(Arc::new(settings)),
            state_dir,
            processes: Arc::default(),
            watchers: Watchers::default(),
            freezer: None,
            cpu: Mutex::default(),
        }
    }

    /// The settings as they are now.
    pub(crate) fn settings(&self) -> Arc<Settings> {
        lock(&self.settings).clone()
    }

    /// Applies a request of `/init` and stores the result.
    pub(crate) fn update(&self, request: &InitRequest) -> io::Result<()> {
        let settings = {
            let mut settings = lock(&self.settings);
            Arc::make_mut(&mut settings).apply(request);
            settings.clone()
        };
        match &self.state_dir {
            Some(dir) => store(dir, &settings),
            None => Ok(()),
        }
    }

    /// The account a request acts as; `Err` holds the name that no account has.
    pub(crate) fn resolve_user(&self, requested: Option<&str>) -> Result<User, String> {
        let settings = self.settings();
        let name = requested
            .filter(|name| !name.is_empty())
            .or(settings.default_user.as_deref())
            .unwrap_or(DEFAULT_USER);
        User::lookup(name).ok_or_else(|| name.to_owned())
    }
}

fn load(dir: &Path) -> Option<Settings> {
    let text = match fs::read(dir.join(STATE_FILE)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            log!("state: {error}");
            return None;
        }
    };
    serde_json::from_slice(&text)
        .map_err(|error| log!("state: {error}"))
        .ok()
}

/// Replaces the file in one step, so that a crash leaves the old or the new one.
fn store(dir: &Path, settings: &Settings) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let temporary = dir.join(".agent.json.new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(&serde_json::to_vec(settings)?)?;
    fs::rename(&temporary, dir.join(STATE_FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_leaves_out_stays() {
        let mut settings = Settings {
            access_token: Some("one".into()),
            ..Settings::default()
        };
        settings.apply(&InitRequest {
            env_vars: Some(BTreeMap::from([("A".into(), "1".into())])),
            access_token: Some(String::new()),
            ..InitRequest::default()
        });
        assert_eq!(settings.access_token.as_deref(), Some("one"));
        settings.apply(&InitRequest {
            env_vars: Some(BTreeMap::new()),
            ..InitRequest::default()
        });
        assert!(
            settings.env_vars.is_empty(),
            "a sent set replaces the previous one"
        );
    }

    #[test]
    fn a_restarted_agent_finds_its_settings() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let agent = Agent::new(Some(dir.path().to_owned()));
        let request = InitRequest {
            access_token: Some("secret".into()),
            ..InitRequest::default()
        };
        agent.update(&request).expect("the state is stored");
        let mode = fs::metadata(dir.path().join(STATE_FILE))
            .expect("the file is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            Agent::new(Some(dir.path().to_owned()))
                .settings()
                .access_token
                .as_deref(),
            Some("secret")
        );
    }
}
