//! The guest's accounts, read from `/etc/passwd` and `/etc/group` by hand.
//!
//! The binary is static, so the C library's name service is not there. The files belong to the guest: they are
//! read afresh for each request and bounded in size.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

/// More than any sane account file holds.
const MAX_FILE: u64 = 4 * 1024 * 1024;

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
        find_user(&read("/etc/passwd"), &read("/etc/group"), name)
    }

    /// The credentials a process of this user runs with, `None` when the agent is that user already and may
    /// not change them.
    pub(crate) fn credentials(&self) -> Option<Credentials> {
        let own = rustix::process::geteuid();
        (own.is_root() || own.as_raw() != self.uid).then(|| Credentials {
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
            users: names_by_id(&read("/etc/passwd")),
            groups: names_by_id(&read("/etc/group")),
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

fn read(path: &str) -> String {
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

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken line\nuser:x:1000:1000:,,,:/home/user:\n";
    const GROUP: &str =
        "root:x:0:\nsudo:x:27:other,user\nuser:x:1000:\nvideo:x:44:user\nlike:x:45:username\n";

    #[test]
    fn a_user_has_its_primary_and_supplementary_groups() {
        let user = find_user(PASSWD, GROUP, "user").expect("the account exists");
        assert_eq!(user.groups, [1000, 27, 44]);
        assert_eq!(user.home, PathBuf::from("/home/user"));
        assert_eq!(user.shell, "/bin/sh");
    }

    #[test]
    fn unknown_and_malformed_accounts_are_absent() {
        assert_eq!(find_user(PASSWD, GROUP, "nobody"), None);
        assert_eq!(find_user(PASSWD, GROUP, ""), None);
        assert_eq!(find_user(PASSWD, GROUP, "broken line"), None);
        assert_eq!(find_user("x:x:notanumber:0::/:/bin/sh", GROUP, "x"), None);
    }

    #[test]
    fn names_fall_back_to_numbers() {
        let names = Names {
            users: names_by_id(PASSWD),
            groups: names_by_id(GROUP),
        };
        assert_eq!(names.user(1000), "user");
        assert_eq!(names.group(27), "sudo");
        assert_eq!(names.user(4242), "4242");
    }
}
