//! What clients are told about a file.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use buffa_types::google::protobuf::Timestamp;
use rustix::fs::{getxattr, listxattr};
use wrenn_proto::filesystem::{EntryInfo, FileType};

use crate::users::Names;

/// Prefix of the extended attributes that hold client metadata.
pub(crate) const XATTR_PREFIX: &str = "user.e2b.";
/// The kernel's bound of one value and of the list of names.
const XATTR_MAX: usize = 64 * 1024;

/// Describes what is at the path. A symbolic link has the type and mode of what it leads to, and names it.
pub(crate) fn describe(path: &Path, names: &Names) -> io::Result<EntryInfo> {
    let own = fs::symlink_metadata(path)?;
    let is_symlink = own.is_symlink();
    let (kind, mode, symlink_target) = if is_symlink {
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let (kind, mode) = match fs::metadata(path) {
            Ok(found) => (file_type(&found), found.mode() & 0o7777),
            Err(_) => (FileType::FILE_TYPE_UNSPECIFIED, 0),
        };
        (kind, mode, Some(target.to_string_lossy().into_owned()))
    } else {
        (file_type(&own), own.mode() & 0o7777, None)
    };
    Ok(EntryInfo {
        name: path
            .file_name()
            .map_or_else(|| "/".into(), |name| name.to_string_lossy().into_owned()),
        r#type: kind.into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        mode,
        permissions: permissions(own.mode()),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: Timestamp {
            seconds: own.mtime(),
            nanos: i32::try_from(own.mtime_nsec()).unwrap_or(0),
            ..Default::default()
        }
        .into(),
        symlink_target,
        // Links cannot carry such attributes, and following them would show another file's.
        metadata: if is_symlink {
            Default::default()
        } else {
            metadata(path).into_iter().collect()
        },
        is_symlink,
        ..Default::default()
    })
}

fn file_type(metadata: &Metadata) -> FileType {
    if metadata.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else if metadata.is_file() {
        FileType::FILE_TYPE_FILE
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    }
}

/// The mode as `ls -l` prints it.
fn permissions(mode: u32) -> String {
    let kind = match mode & 0o170_000 {
        0o040_000 => 'd',
        0o120_000 => 'l',
        0o020_000 => 'c',
        0o060_000 => 'b',
        0o010_000 => 'p',
        0o140_000 => 's',
        _ => '-',
    };
    let mut text = String::with_capacity(10);
    text.push(kind);
    for (shift, special, mark) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        let executable = bits & 1 != 0;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, executable) {
            (true, true) => mark,
            (true, false) => mark.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// The client metadata of a file; empty where there is none or the file system has no attributes.
pub(crate) fn metadata(path: &Path) -> BTreeMap<String, String> {
    // Most files have no attributes at all: this asks for nothing but the size then.
    let Ok(length @ 1..) = rustix::fs::listxattr_query(path) else {
        return BTreeMap::new();
    };
    let mut list = vec![0; length.min(XATTR_MAX)];
    let Ok(length) = listxattr(path, &mut list[..]) else {
        return BTreeMap::new();
    };
    let names = list.get(..length).unwrap_or_default().split(|byte| *byte == 0);
    let mut metadata = BTreeMap::new();
    for name in names.filter_map(|name| std::str::from_utf8(name).ok()) {
        if let Some(key) = name.strip_prefix(XATTR_PREFIX) {
            let mut value = vec![0; XATTR_MAX];
            if let Ok(length) = getxattr(path, name, &mut value[..]) {
                value.truncate(length);
                metadata.insert(key.to_owned(), String::from_utf8_lossy(&value).into_owned());
            }
        }
    }
    metadata
}

#[cfg(test)]
mod tests {
    use super::permissions;

    #[test]
    fn permissions_as_ls_prints_them() {
        for (mode, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o120_777, "lrwxrwxrwx"),
            (0o041_777, "drwxrwxrwt"),
            (0o104_755, "-rwsr-xr-x"),
            (0o102_644, "-rw-r-Sr--"),
            (0o020_620, "crw--w----"),
        ] {
            assert_eq!(permissions(mode), text);
        }
    }
}
