//! Paths as clients write them.

use std::path::{Component, Path, PathBuf};

use crate::users::User;

/// Makes a client's path absolute and clean: `~` is the user's home, relative paths start from the default
/// working directory or else from the home, an empty path is that directory itself.
///
/// `..` is resolved by the text of the path, so that the answer's prefix is what the client expects. A path may
/// lead anywhere in the guest: the file system is the guest's own.
pub(crate) fn resolve(path: &str, user: &User, workdir: Option<&str>) -> Result<PathBuf, String> {
    if path.contains('\0') {
        return Err("the path contains a zero byte".to_owned());
    }
    let start = || match workdir.filter(|dir| !dir.is_empty()) {
        Some("~") => user.home.clone(),
        Some(dir) => match dir.strip_prefix("~/") {
            Some(rest) => user.home.join(rest),
            None => user.home.join(dir),
        },
        None => user.home.clone(),
    };
    let full = if path == "~" {
        user.home.clone()
    } else if let Some(rest) = path.strip_prefix("~/") {
        user.home.join(rest.trim_start_matches('/'))
    } else if path.starts_with('/') {
        PathBuf::from(path)
    } else {
        start().join(path)
    };
    Ok(clean(&full))
}

fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> User {
        User {
            name: "user".into(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            home: "/home/user".into(),
            shell: "/bin/bash".into(),
        }
    }

    #[test]
    fn where_paths_lead() {
        let cases = [
            ("", None, "/home/user"),
            (".", None, "/home/user"),
            ("a/b", None, "/home/user/a/b"),
            ("a/b", Some("/work"), "/work/a/b"),
            ("a", Some("~/code"), "/home/user/code/a"),
            ("a", Some("code"), "/home/user/code/a"),
            ("", Some("/work"), "/work"),
            ("~", Some("/work"), "/home/user"),
            ("~/x", Some("/work"), "/home/user/x"),
            ("~//etc", None, "/home/user/etc"),
            ("~other", None, "/home/user/~other"),
            ("/etc//passwd/", None, "/etc/passwd"),
            ("/a/./b/../c", None, "/a/c"),
            ("../../../../etc", None, "/etc"),
            ("/..", None, "/"),
        ];
        for (path, workdir, expected) in cases {
            assert_eq!(
                resolve(path, &user(), workdir),
                Ok(PathBuf::from(expected)),
                "{path:?} from {workdir:?}"
            );
        }
        assert!(resolve("a\0b", &user(), None).is_err());
    }
}
