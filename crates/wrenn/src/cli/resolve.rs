//! Which sandbox a person means: ids are long, so a unique beginning or end will do.

use wrenn_client::{Sandbox, SandboxHandle};
use wrenn_proto::id::SandboxId;

use super::Context;
use super::error::CliError;

/// Shorter pieces of an id are too easily hit by accident.
const MIN_PIECE: usize = 4;

impl Context {
    /// The sandbox of an id, or of a unique beginning or end of one. A full id costs no request.
    pub(super) async fn sandbox(&self, text: &str) -> Result<SandboxHandle, CliError> {
        if text.is_empty() {
            return Err(CliError::Usage("the sandbox's id is empty".to_owned()));
        }
        if text.parse::<SandboxId>().is_ok() {
            return Ok(self.client.sandbox(text));
        }
        let records = self.client.sandboxes().list().await?;
        match find(text, &records) {
            Found::One(id) => Ok(self.client.sandbox(id)),
            // The server says best that it does not exist.
            Found::None => Ok(self.client.sandbox(text)),
            Found::Many(count) => Err(CliError::Usage(format!(
                "'{text}' could be any of {count} sandboxes; give more of the id (`wrenn sandbox ls`)"
            ))),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Found<'a> {
    One(&'a str),
    None,
    Many(usize),
}

fn find<'a>(text: &str, records: &'a [Sandbox]) -> Found<'a> {
    if let Some(exact) = records.iter().find(|record| record.id == text) {
        return Found::One(&exact.id);
    }
    let piece = text.strip_prefix(SandboxId::PREFIX).unwrap_or(text);
    if piece.len() < MIN_PIECE {
        return Found::None;
    }
    let hits: Vec<&str> = records
        .iter()
        .map(|record| record.id.as_str())
        .filter(|id| {
            let bare = id.strip_prefix(SandboxId::PREFIX).unwrap_or(id);
            bare.starts_with(piece) || bare.ends_with(piece)
        })
        .collect();
    match hits.as_slice() {
        [] => Found::None,
        [one] => Found::One(one),
        many => Found::Many(many.len()),
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use wrenn_client::SandboxStatus;

    use super::*;

    fn record(id: &str) -> Sandbox {
        Sandbox {
            id: id.to_owned(),
            status: SandboxStatus::Running,
            template: "minimal".to_owned(),
            vcpus: 1,
            memory_mb: 512,
            disk_size_mb: 20_480,
            timeout_sec: 0,
            host_id: None,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: None,
            last_active_at: None,
            last_updated: Timestamp::UNIX_EPOCH,
            metadata: Default::default(),
            error: None,
        }
    }

    #[test]
    fn a_unique_beginning_or_end_names_a_sandbox() {
        let records = [
            record("sb-0198aaaa-0000-7000-8000-00000000beef"),
            record("sb-0198aaab-0000-7000-8000-00000000cafe"),
        ];
        assert_eq!(find("beef", &records), Found::One(&records[0].id));
        assert_eq!(find("sb-0198aaab", &records), Found::One(&records[1].id));
        assert_eq!(find("0198", &records), Found::Many(2));
        assert_eq!(find("fe", &records), Found::None);
        assert_eq!(find("dead", &records), Found::None);
    }
}
