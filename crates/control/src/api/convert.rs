//! From the services' types to the wire's. Each conversion takes its source apart, so that a new field
//! stops the build here.

use base64::Engine as _;
use wrenn_proto::{hostagent, rest};

use crate::domain::around::{AuditEntry, Channel};
use crate::domain::{Failure, Sandbox, SandboxId, SandboxStatus, TeamId, Template, timestamp};
use crate::service::channels::ShownChannel;
use crate::service::processes::ExecOutcome;
use crate::service::usage::{DayUse, TeamStats};

pub(crate) fn sandbox(sandbox: Sandbox) -> rest::Sandbox {
    let Sandbox {
        id,
        team: _,
        host,
        template: _,
        template_team: _,
        template_name,
        status,
        previous: _,
        generation: _,
        snapshot: _,
        vcpus,
        memory_mb,
        disk_size_mb,
        timeout_sec,
        metadata,
        envs: _,
        failure,
        created_at,
        started_at,
        last_active_at,
        updated_at,
        status_at: _,
        actor: _,
    } = sandbox;
    rest::Sandbox {
        id: id.to_string(),
        status,
        template: template_name,
        vcpus,
        memory_mb,
        disk_size_mb,
        timeout_sec,
        host_id: host.map(|host| host.to_string()),
        created_at: timestamp(created_at),
        started_at: started_at.map(timestamp),
        last_active_at: last_active_at.map(timestamp),
        last_updated: timestamp(updated_at),
        metadata,
        error: failure.filter(|_| status == SandboxStatus::Error).map(
            |Failure {
                 code: _,
                 message,
                 console,
                 generation: _,
             }| rest::SandboxFailure { message, console },
        ),
    }
}

pub(crate) fn template(template: Template) -> rest::Template {
    let Template {
        id,
        team,
        name,
        kind,
        status,
        detail: _,
        progress_pct: _,
        vcpus,
        memory_mb,
        disk_size_mb,
        size_bytes,
        created_at,
    } = template;
    rest::Template {
        id: id.to_string(),
        name,
        kind,
        status,
        vcpus,
        memory_mb,
        disk_size_mb,
        size_bytes,
        platform: team == TeamId::PLATFORM,
        created_at: timestamp(created_at),
    }
}

pub(crate) fn audit_page(entries: Vec<AuditEntry>, next_cursor: Option<String>) -> rest::AuditPage {
    let entry = |entry: AuditEntry| {
        let AuditEntry {
            id,
            team,
            actor,
            action,
            resource_type,
            resource_id,
            status,
            outcome,
            source,
            at,
        } = entry;
        rest::AuditEntry {
            id: id.to_string(),
            team_id: team.map(|team| team.to_string()),
            actor_type: actor.kind,
            actor_id: actor.id,
            action,
            resource_type,
            resource_id,
            status,
            outcome,
            source_address: source.map(|source| source.to_string()),
            created_at: timestamp(at),
        }
    };
    rest::AuditPage {
        entries: entries.into_iter().map(entry).collect(),
        next_cursor,
    }
}

pub(crate) fn channel(shown: ShownChannel) -> rest::Channel {
    let ShownChannel {
        channel,
        config,
        secret,
    } = shown;
    let Channel {
        id,
        team,
        name,
        provider,
        sealed: _,
        events,
        created_by: _,
        created_at,
        updated_at,
        delivered_at,
        failed_at,
        last_error,
    } = channel;
    rest::Channel {
        id: id.to_string(),
        team_id: team.to_string(),
        name,
        provider,
        config,
        events,
        secret,
        created_at: timestamp(created_at),
        updated_at: timestamp(updated_at),
        delivered_at: delivered_at.map(timestamp),
        failed_at: failed_at.map(timestamp),
        last_error,
    }
}

pub(crate) fn stats(range: &str, stats: TeamStats) -> rest::Stats {
    let TeamStats {
        current,
        at,
        peaks,
        series,
    } = stats;
    let count = |value: i64| u64::try_from(value).unwrap_or_default();
    rest::Stats {
        range: range.to_owned(),
        current: rest::StatsNow {
            running_count: count(current.running_count),
            vcpus_reserved: count(current.vcpus),
            memory_mb_reserved: count(current.memory_mb),
            sampled_at: timestamp(at),
        },
        peaks: rest::StatsPeaks {
            running_count: count(peaks.running_count),
            vcpus: count(peaks.vcpus),
            memory_mb: count(peaks.memory_mb),
        },
        series: rest::StatsSeries {
            labels: series.iter().map(|(at, _)| timestamp(*at).to_string()).collect(),
            running: series.iter().map(|(_, held)| count(held.running_count)).collect(),
            vcpus: series.iter().map(|(_, held)| count(held.vcpus)).collect(),
            memory_mb: series.iter().map(|(_, held)| count(held.memory_mb)).collect(),
        },
    }
}

pub(crate) fn usage(points: &[DayUse]) -> rest::Usage {
    const MINUTE: f64 = 60_000.0;
    let date = |point: Option<&DayUse>| point.map(|point| point.date.to_string()).unwrap_or_default();
    rest::Usage {
        from: date(points.first()),
        to: date(points.last()),
        points: points
            .iter()
            .map(
                |DayUse {
                     date,
                     cpu_ms,
                     ram_mb_ms,
                 }| rest::UsagePoint {
                    date: date.to_string(),
                    cpu_minutes: *cpu_ms as f64 / MINUTE,
                    ram_mb_minutes: *ram_mb_ms as f64 / MINUTE,
                },
            )
            .collect(),
    }
}

pub(crate) fn entry(entry: hostagent::FileEntry) -> rest::FileEntry {
    use hostagent::EntryType;
    rest::FileEntry {
        name: entry.name,
        path: entry.path,
        kind: match entry.r#type.as_known() {
            Some(EntryType::ENTRY_TYPE_DIRECTORY) => rest::FileKind::Directory,
            Some(EntryType::ENTRY_TYPE_SYMLINK) => rest::FileKind::Symlink,
            Some(EntryType::ENTRY_TYPE_FILE | EntryType::ENTRY_TYPE_UNSPECIFIED) | None => {
                rest::FileKind::File
            }
        },
        size: entry.size,
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        modified_at: entry.modified_at,
        symlink_target: entry.symlink_target,
    }
}

pub(crate) fn exec(
    sandbox: SandboxId,
    cmd: String,
    outcome: ExecOutcome,
) -> Result<rest::ExecResult, rest::ExecStarted> {
    let sandbox_id = sandbox.to_string();
    match outcome {
        ExecOutcome::Started { pid, tag } => Err(rest::ExecStarted {
            sandbox_id,
            cmd,
            pid,
            tag,
        }),
        ExecOutcome::Ended {
            stdout,
            stderr,
            exit_code,
            duration_ms,
            truncated,
        } => {
            let (stdout, stderr, encoding) = texts(stdout, stderr, truncated);
            Ok(rest::ExecResult {
                sandbox_id,
                cmd,
                stdout,
                stderr,
                exit_code,
                duration_ms,
                encoding,
                truncated,
            })
        }
    }
}

/// Both streams as text, or both as base64 when either is not UTF-8. A cut in the middle of a character
/// is the limit's doing, not the program's, and drops that character.
fn texts(stdout: Vec<u8>, stderr: Vec<u8>, truncated: bool) -> (String, String, String) {
    let text = |bytes: Vec<u8>| match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) if truncated && error.utf8_error().error_len().is_none() => {
            let valid = error.utf8_error().valid_up_to();
            let mut bytes = error.into_bytes();
            bytes.truncate(valid);
            String::from_utf8(bytes).map_err(|error| error.into_bytes())
        }
        Err(error) => Err(error.into_bytes()),
    };
    let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    match (text(stdout), text(stderr)) {
        (Ok(stdout), Ok(stderr)) => (stdout, stderr, "utf-8".to_owned()),
        (stdout, stderr) => {
            let bytes = |text: Result<String, Vec<u8>>| text.map_or_else(|bytes| bytes, String::into_bytes);
            (
                encode(&bytes(stdout)),
                encode(&bytes(stderr)),
                "base64".to_owned(),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_text_or_base64_for_both() {
        let (out, err, encoding) = texts(b"hi".to_vec(), b"\xff".to_vec(), false);
        assert_eq!(
            (out.as_str(), err.as_str(), encoding.as_str()),
            ("aGk=", "/w==", "base64")
        );
        let (out, _, encoding) = texts("hé".as_bytes().to_vec(), Vec::new(), false);
        assert_eq!((out.as_str(), encoding.as_str()), ("hé", "utf-8"));
    }

    #[test]
    fn a_character_cut_by_the_limit_is_dropped() {
        let (out, _, encoding) = texts(b"h\xc3".to_vec(), Vec::new(), true);
        assert_eq!((out.as_str(), encoding.as_str()), ("h", "utf-8"));
        let (_, _, encoding) = texts(b"h\xc3".to_vec(), Vec::new(), false);
        assert_eq!(encoding, "base64");
    }
}
