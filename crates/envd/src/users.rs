//! The guest's accounts, read from `/etc/passwd` and `/etc/group` by hand.
//!
//! The binary is static, so the C library's name service is not there. The files belong to the guest: they are
//! looked at for each request, read when they changed, and bounded in size.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use crate::state::lock;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// More than any sane account file holds.
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// Accounts that are remembered; requests name one or two.
const REMEMBERED: usize = 16;
/// Files change unseen within one tick of the clock that stamps them, so younger ones are not relied on.
const SETTLED: Duration = Duration::from_secs(1);

/// Accounts as they were found.
struct Found {
    /// How both files looked.
    stamps: [Stamp; 2],
    users: HashMap<String, User>,
}

/// What changes with a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds of the last change, which no program can set.
    changed: (i64, i64),
}

impl Stamp {
    /// `None` for a file that is not there, or has changed just now.
    fn of(path: &Path, now: SystemTime) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        let changed = (found.ctime(), found.ctime_nsec());
        let seconds = Duration::from_secs(u64::try_from(changed.0).ok()?);
        let age = now.duration_since(SystemTime::UNIX_EPOCH + seconds).ok()?;
        (age > SETTLED).then_some(Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            changed,
        })
    }
}

/// An account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All groups, the primary one first.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: PathBuf,
    pub(crate) shell: String,
}

/// Whom a process runs as.
#[derive(Debug, Clone)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

impl User {
    /// Finds an account by its name.
    pub(crate) fn lookup(name: &str) -> Option<Self> {
        /// The accounts found last.
        static FOUND: Mutex<Option<Found>> = Mutex::new(None);
        let files = [PASSWD, GROUP].map(Path::new);
        Self::lookup_in(&mut lock(&FOUND), files, name, SystemTime::now())
    }

    fn lookup_in(
        found: &mut Option<Found>,
        [passwd, group]: [&Path; 2],
        name: &str,
        now: SystemTime,
    ) -> Option<Self> {
        let stamps = Stamp::of(passwd, now).zip(Stamp::of(group, now));
        let stamps = stamps.map(|(passwd, group)| [passwd, group]);
        if let (Some(stamps), Some(found)) = (&stamps, &*found)
            && *stamps == found.stamps
            && let Some(user) = found.users.get(name)
        {
            return Some(user.clone());
        }
        let user = find_user(&read(passwd), &read(group), name)?;
        if let Some(stamps) = stamps {
            let found = found.get_or_insert_with(|| Found {
                stamps,
                users: HashMap::new(),
            });
            if found.stamps != stamps || found.users.len() >= REMEMBERED {
                found.users.clear();
            }
            found.stamps = stamps;
            found.users.insert(name.to_owned(), user.clone());
        }
        Some(user)
    }

    fn has_the_agents_groups(&self) -> bool {
        let agents = rustix::process::getgroups().unwrap_or_default();
        rustix::process::getegid().as_raw() == self.gid
            && agents
                .iter()
                .map(|group| group.as_raw())
                .eq(self.groups.iter().copied())
    }

    /// The credentials a process of this user runs with, `None` when the agent runs with just these, or may not
    /// change them.
    pub(crate) fn credentials(&self) -> Option<Credentials> {
        let own = rustix::process::geteuid();
        let same = own.as_raw() == self.uid && (!own.is_root() || self.has_the_agents_groups());
        (!same).then(|| Credentials {
            uid: self.uid,
            gid: self.gid,
            groups: self.groups.clone(),
        })
    }
}

/// Names of users and groups by number.
#[derive(Debug, Default)]
pub(crate) struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    /// Reads both files once, for a request that describes many entries.
    pub(crate) fn load() -> Self {
        Self {
            users: names_by_id(&read(Path::new(PASSWD))),
            groups: names_by_id(&read(Path::new(GROUP))),
        }
    }

    /// The user's name, or its number where the guest has none.
    pub(crate) fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// The group's name, or its number where the guest has none.
    pub(crate) fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

fn read(path: &Path) -> String {
    // Room for the usual file: without it, it is read in many small pieces.
    let mut text = Vec::with_capacity(8 * 1024);
    if let Ok(file) = File::open(path) {
        let _ = file.take(MAX_FILE).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// `name:x:id:…`, the shape both files share. The first entry of an id wins, as in the C library.
fn names_by_id(text: &str) -> HashMap<u32, String> {
    let mut names = HashMap::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if let (Some(name), Some(_), Some(id)) = (fields.next(), fields.next(), fields.next())
            && let Ok(id) = id.parse()
        {
            names.entry(id).or_insert_with(|| name.to_owned());
        }
    }
    names
}

fn find_user(passwd: &str, group: &str, name: &str) -> Option<User> {
    if name.is_empty() {
        return None;
    }
    let fields: Vec<&str> = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name))?;
    let [_, _, uid, gid, _, home, shell] = fields[..] else {
        return None;
    };
    let gid = gid.parse().ok()?;
    let mut groups = vec![gid];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [_, _, id, members] = fields[..]
            && members.split(',').any(|member| member == name)
            && let Ok(id) = id.parse()
            && !groups.contains(&id)
        {
            groups.push(id);
        }
    }
    Some(User {
        name: name.to_owned(),
        uid: uid.parse().ok()?,
        gid,
        groups,
        home: PathBuf::from(if home.is_empty() { "/" } else { home }),
        shell: if shell.is_empty() {
            "/bin/sh".to_owned()
        } else {
            shell.to_owned()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCOUNTS: &str = "root:x:0:0:root:/root:/bin/bash\nbroken line\nuser:x:1000:1000:,,,:/home/user:\n";
    const GROUPS: &str =
        "root:x:0:\nsudo:x:27:other,user\nuser:x:1000:\nvideo:x:44:user\nlike:x:45:username\n";

    #[test]
    fn a_user_has_its_primary_and_supplementary_groups() {
        let user = find_user(ACCOUNTS, GROUPS, "user").expect("the account exists");
        assert_eq!(user.groups, [1000, 27, 44]);
        assert_eq!(user.home, PathBuf::from("/home/user"));
        assert_eq!(user.shell, "/bin/sh");
    }

    #[test]
    fn unknown_and_malformed_accounts_are_absent() {
        assert_eq!(find_user(ACCOUNTS, GROUPS, "nobody"), None);
        assert_eq!(find_user(ACCOUNTS, GROUPS, ""), None);
        assert_eq!(find_user(ACCOUNTS, GROUPS, "broken line"), None);
        assert_eq!(find_user("x:x:notanumber:0::/:/bin/sh", GROUPS, "x"), None);
    }

    #[test]
    fn accounts_are_remembered_until_their_files_change() {
        let dir = tempfile::tempdir().expect("a folder");
        let (passwd, group) = (dir.path().join("passwd"), dir.path().join("group"));
        fs::write(&passwd, ACCOUNTS).expect("written");
        fs::write(&group, GROUPS).expect("written");
        let mut found = None;
        let mut home = |age: Duration| {
            let now = SystemTime::now() + age;
            let user =
                User::lookup_in(&mut found, [&passwd, &group], "user", now).expect("the account exists");
            let remembered = found
                .as_ref()
                .is_some_and(|found| found.users.contains_key("user"));
            (user.home, remembered)
        };
        // Files that have just been written may change again and look the same.
        assert_eq!(home(Duration::ZERO), ("/home/user".into(), false));
        let later = Duration::from_secs(60);
        assert_eq!(home(later), ("/home/user".into(), true));
        assert_eq!(home(later), ("/home/user".into(), true));
        // As `usermod` does it, and of the same length.
        let new = dir.path().join("new");
        fs::write(&new, ACCOUNTS.replace("/home/user", "/srv/userx")).expect("written");
        fs::rename(&new, &passwd).expect("renamed");
        assert_eq!(home(later).0, PathBuf::from("/srv/userx"));
        fs::remove_file(&passwd).expect("removed");
        let now = SystemTime::now() + later;
        assert_eq!(User::lookup_in(&mut found, [&passwd, &group], "user", now), None);
    }

    #[test]
    fn names_fall_back_to_numbers() {
        let names = Names {
            users: names_by_id(ACCOUNTS),
            groups: names_by_id(GROUPS),
        };
        assert_eq!(names.user(1000), "user");
        assert_eq!(names.group(27), "sudo");
        assert_eq!(names.user(4242), "4242");
    }
}
