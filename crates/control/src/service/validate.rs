//! Bounds of what clients may ask for. Every refusal names the field and its bounds.

use std::collections::BTreeMap;

use crate::config::Limits;
use crate::domain::{Template, TemplateKind};
use crate::{Error, Result};

/// Longest inactivity timeout: 30 days.
pub(crate) const MAX_TIMEOUT_SEC: u32 = 30 * 24 * 3600;
/// Most labels of a sandbox.
const MAX_METADATA_PAIRS: usize = 64;
/// All labels together, bytes.
const MAX_METADATA_BYTES: usize = 16 * 1024;
/// All variables together, bytes.
const MAX_ENV_BYTES: usize = 128 * 1024;
/// Longest path that is passed on.
const MAX_PATH: usize = 4096;

/// The sizes of a new sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) vcpus: u32,
    pub(crate) memory_mb: u32,
    pub(crate) disk_size_mb: u32,
}

/// Chooses the sizes of a sandbox: what was asked for, else the template's.
///
/// A snapshot's memory image fixes its sizes, so asking for others cannot be granted.
pub(crate) fn sizes(
    template: &Template,
    vcpus: Option<u32>,
    memory_mb: Option<u32>,
    disk_size_mb: Option<u32>,
    limits: &Limits,
) -> Result<Sizes> {
    let sizes = Sizes {
        vcpus: vcpus.unwrap_or(template.vcpus),
        memory_mb: memory_mb.unwrap_or(template.memory_mb),
        disk_size_mb: disk_size_mb.unwrap_or(template.disk_size_mb),
    };
    if template.kind == TemplateKind::Snapshot {
        for (field, asked, fixed) in [
            ("vcpus", sizes.vcpus, template.vcpus),
            ("memory_mb", sizes.memory_mb, template.memory_mb),
            ("disk_size_mb", sizes.disk_size_mb, template.disk_size_mb),
        ] {
            if asked != fixed {
                return Err(Error::invalid(format!(
                    "{field} of the snapshot template '{}' is {fixed} and cannot be changed to {asked}; leave it out",
                    template.name
                )));
            }
        }
        return Ok(sizes);
    }
    within("vcpus", sizes.vcpus, 1, limits.max_vcpus)?;
    within("memory_mb", sizes.memory_mb, 128, limits.max_memory_mb)?;
    within(
        "disk_size_mb",
        sizes.disk_size_mb,
        template.disk_size_mb,
        limits.max_disk_size_mb,
    )?;
    Ok(sizes)
}

/// A number within its bounds.
pub(crate) fn within(field: &str, value: u32, least: u32, most: u32) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{field} must be between {least} and {most}, not {value}"
    )))
}

/// Labels.
pub(crate) fn metadata(metadata: &BTreeMap<String, String>) -> Result<()> {
    if metadata.len() > MAX_METADATA_PAIRS {
        return Err(Error::invalid(format!(
            "metadata must have at most {MAX_METADATA_PAIRS} pairs, not {}",
            metadata.len()
        )));
    }
    if metadata.keys().any(String::is_empty) {
        return Err(Error::invalid("metadata must not have an empty key"));
    }
    if pairs_size(metadata) > MAX_METADATA_BYTES {
        return Err(Error::invalid(format!(
            "metadata must be at most {MAX_METADATA_BYTES} bytes in all"
        )));
    }
    // PostgreSQL's text cannot hold it.
    if metadata
        .iter()
        .any(|(key, value)| key.contains('\0') || value.contains('\0'))
    {
        return Err(Error::invalid("metadata must not contain a NUL character"));
    }
    Ok(())
}

/// Environment variables.
pub(crate) fn envs(envs: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in envs {
        let mut bytes = name.bytes();
        let starts = bytes
            .next()
            .is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
        if !starts || !bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') || name.len() > 256 {
            let shown: String = name.chars().take(64).collect();
            return Err(Error::invalid(format!(
                "envs: '{shown}' is not a variable name (letters, digits and _, not starting with a digit)"
            )));
        }
        if value.contains('\0') {
            return Err(Error::invalid(format!(
                "envs: the value of {name} contains a NUL character"
            )));
        }
    }
    if pairs_size(envs) > MAX_ENV_BYTES {
        return Err(Error::invalid(format!(
            "envs must be at most {MAX_ENV_BYTES} bytes in all"
        )));
    }
    Ok(())
}

fn pairs_size(pairs: &BTreeMap<String, String>) -> usize {
    pairs.iter().map(|(key, value)| key.len() + value.len()).sum()
}

/// A path inside a guest. The guest resolves it; here it only has to be a path.
pub(crate) fn path(path: &str) -> Result<()> {
    if path.is_empty() {
        return Err(Error::invalid("path must not be empty"));
    }
    if path.len() > MAX_PATH {
        return Err(Error::invalid(format!("path must be at most {MAX_PATH} bytes")));
    }
    if path.contains('\0') {
        return Err(Error::invalid("path must not contain a NUL character"));
    }
    Ok(())
}

/// A short name inside a guest (a user, a tag); an empty one counts as absent.
pub(crate) fn word(field: &str, word: Option<String>) -> Result<Option<String>> {
    match word.filter(|word| !word.is_empty()) {
        Some(word) if word.len() > 256 || word.contains(['\0', '/', '\n']) => Err(Error::invalid(format!(
            "{field} must be a word of at most 256 bytes"
        ))),
        word => Ok(word),
    }
}

/// Most items in one page of a listing.
const MAX_PAGE: u32 = 1000;
/// Items in a page when the client names no number.
const DEFAULT_PAGE: u32 = 100;

/// A part of a listing that goes by id, newest first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageOf<Id> {
    pub(crate) limit: u64,
    /// Only what is older than this one.
    pub(crate) before: Option<Id>,
}

/// Which part of a listing to return.
pub(crate) fn page<Id>(limit: Option<u32>, before: Option<&str>) -> Result<PageOf<Id>>
where
    Id: std::str::FromStr<Err = wrenn_proto::id::InvalidId>,
{
    let limit = limit.unwrap_or(DEFAULT_PAGE);
    within("limit", limit, 1, MAX_PAGE)?;
    let before = before
        .map(|before| {
            before
                .parse()
                .map_err(|error| Error::invalid(format!("before: {error}")))
        })
        .transpose()?;
    Ok(PageOf {
        limit: limit.into(),
        before,
    })
}

/// A template's name as clients may choose it.
pub(crate) fn template_name(name: &str) -> Result<()> {
    let good = (1..=128).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte))
        && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
        // Ids and names share a namespace in requests.
        && !name.starts_with("tpl-");
    if good {
        return Ok(());
    }
    Err(Error::invalid(
        "name must be 1 to 128 lower-case letters, digits, '-', '_' or '.', start with a letter or digit, \
         and not start with 'tpl-'",
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{TeamId, TemplateId, TemplateStatus};

    fn template(kind: TemplateKind) -> Template {
        Template {
            id: TemplateId::new(),
            team: TeamId::PLATFORM,
            name: "t".into(),
            kind,
            status: TemplateStatus::Ready,
            detail: String::new(),
            progress_pct: 100,
            vcpus: 2,
            memory_mb: 512,
            disk_size_mb: 1024,
            size_bytes: 0,
            created_at: 0,
        }
    }

    #[test]
    fn absent_sizes_are_the_templates() {
        let got = sizes(
            &template(TemplateKind::Base),
            None,
            None,
            None,
            &Limits::default(),
        )
        .expect("valid");
        assert_eq!(
            got,
            Sizes {
                vcpus: 2,
                memory_mb: 512,
                disk_size_mb: 1024
            }
        );
    }

    #[test]
    fn a_snapshots_sizes_are_fixed_and_named() {
        let error = sizes(
            &template(TemplateKind::Snapshot),
            None,
            Some(1024),
            None,
            &Limits::default(),
        );
        let message = error.expect_err("refused").message;
        assert!(
            message.contains("memory_mb") && message.contains("512"),
            "{message}"
        );
    }

    proptest! {
        #[test]
        fn sizes_are_granted_exactly_within_the_bounds(vcpus in 0u32..64, memory in 0u32..200_000, disk in 0u32..2_000_000) {
            let granted = sizes(&template(TemplateKind::Base), Some(vcpus), Some(memory), Some(disk), &Limits::default());
            let within = (1..=32).contains(&vcpus) && (128..=131_072).contains(&memory) && (1024..=1_048_576).contains(&disk);
            prop_assert_eq!(granted.is_ok(), within);
        }

        #[test]
        fn no_name_panics(name in "\\PC{0,40}") {
            let _ = template_name(&name);
            let _ = path(&name);
            let _ = envs(&BTreeMap::from([(name.clone(), name.clone())]));
            let _ = metadata(&BTreeMap::from([(name.clone(), name)]));
        }
    }
}
