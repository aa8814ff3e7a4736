//! The audit log: entries are collected in memory, written in batches, and read in pages.
//!
//! A request never waits for the log and never fails because of it. What is collected is bounded; when the
//! database is away for so long that it overflows, the newest entries are dropped, counted and logged.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::{Services, validate};
use crate::domain::around::{ActorType, AuditEntry};
use crate::domain::{AuditId, Millis};
use crate::store::AuditFilter;
use crate::{Error, Result};

/// Most entries that wait to be written.
const MAX_WAITING: usize = 20_000;
/// Entries in one insert.
const BATCH: usize = 500;
/// Entries that start a write before its time.
const FILLING: usize = BATCH / 2;
/// Entries a minute that nobody identified may cause: a flood of wrong keys must not fill the database.
const MAX_ANONYMOUS: u32 = 600;
/// Longest text in an entry, characters.
const MAX_TEXT: usize = 200;
/// Most entries of a page.
pub(crate) const MAX_PAGE: u32 = 500;
/// Entries of a page when nothing is said.
const PAGE: u32 = 100;

/// Entries on their way to the database.
#[derive(Default)]
pub(super) struct Buffer {
    waiting: Mutex<Waiting>,
    filling: Notify,
    /// Held while a batch is written: entries leave the queue in order, and only once they are stored.
    writing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Waiting {
    entries: VecDeque<AuditEntry>,
    minute: Millis,
    anonymous: u32,
}

impl Buffer {
    /// Notified when there is enough for a write.
    pub(super) fn filling(&self) -> &Notify {
        &self.filling
    }

    /// Takes an entry, unless there are too many.
    fn push(&self, entry: AuditEntry) -> std::result::Result<(), &'static str> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if entry.actor.kind == ActorType::Anonymous {
            let minute = entry.at.div_euclid(60_000);
            if waiting.minute != minute {
                waiting.minute = minute;
                waiting.anonymous = 0;
            }
            if waiting.anonymous >= MAX_ANONYMOUS {
                return Err("anonymous");
            }
            waiting.anonymous += 1;
        }
        if waiting.entries.len() >= MAX_WAITING {
            return Err("full");
        }
        waiting.entries.push_back(entry);
        if waiting.entries.len() >= FILLING {
            self.filling.notify_one();
        }
        Ok(())
    }

    fn head(&self) -> Vec<AuditEntry> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.entries.iter().take(BATCH).cloned().collect()
    }

    fn written(&self, count: usize) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = count.min(waiting.entries.len());
        waiting.entries.drain(..count);
    }
}

/// Which part of the log to read.
#[derive(Debug, Clone, Default)]
pub struct ListAudit {
    /// Which ones.
    pub filter: AuditFilter,
    /// Where the previous page ended.
    pub cursor: Option<String>,
    /// At most this many, 1 to 500; 100 when absent.
    pub limit: Option<u32>,
}

impl Services {
    /// Notes an action. Returns at once and never fails.
    pub fn audit(&self, mut entry: AuditEntry) {
        entry.resource_id = entry.resource_id.as_deref().map(clean);
        entry.action = clean(&entry.action);
        if let Err(reason) = self.around.audit.push(entry) {
            metrics::counter!("wrenn_audit_dropped_total", "reason" => reason).increment(1);
            if reason == "full" {
                tracing::error!("an audit entry was dropped: the database does not take them fast enough");
            }
        }
    }

    /// Writes all that waits.
    pub(crate) async fn audit_flush(&self) -> Result<()> {
        let buffer = &self.around.audit;
        let _writing = buffer.writing.lock().await;
        loop {
            let batch = buffer.head();
            if batch.is_empty() {
                return Ok(());
            }
            // Cut short between the two, the batch is written again, which changes nothing.
            self.store.audit_insert(&batch).await?;
            buffer.written(batch.len());
        }
    }

    /// The last write, before the database closes.
    pub(crate) async fn audit_finish(&self) {
        let flushed = tokio::time::timeout(
            self.config.timings.shutdown_grace.max(Duration::from_secs(1)),
            self.audit_flush(),
        );
        match flushed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "the last audit entries could not be written"
            ),
            Err(_) => tracing::error!("the last audit entries could not be written in time"),
        }
    }

    /// A page of the log, newest first, and the cursor of the next one.
    pub async fn audit_list(&self, list: ListAudit) -> Result<(Vec<AuditEntry>, Option<String>)> {
        let ListAudit {
            mut filter,
            cursor,
            limit,
        } = list;
        let limit = limit.unwrap_or(PAGE);
        validate::within("limit", limit, 1, MAX_PAGE)?;
        filter.limit = u64::from(limit) + 1;
        filter.before = cursor.as_deref().map(parse_cursor).transpose()?;
        // Whoever did something through this process finds it in the log at once.
        self.audit_flush().await?;
        let mut entries = self.store.audit_page(filter).await?;
        let more = entries.len() > limit as usize;
        entries.truncate(limit as usize);
        let next = entries.last().filter(|_| more).map(cursor_after);
        Ok((entries, next))
    }
}

/// What another wrote, as it can be stored: PostgreSQL's text cannot hold NUL.
fn clean(text: &str) -> String {
    text.chars().filter(|char| *char != '\0').take(MAX_TEXT).collect()
}

fn cursor_after(entry: &AuditEntry) -> String {
    format!("{}.{}", entry.at, entry.id.0.simple())
}

fn parse_cursor(cursor: &str) -> Result<(Millis, AuditId)> {
    cursor
        .split_once('.')
        .and_then(|(at, id)| Some((at.parse().ok()?, AuditId(uuid::Uuid::try_parse(id).ok()?))))
        .ok_or_else(|| Error::invalid("cursor must be the next_cursor of an earlier page"))
}

/// A moment in a query: RFC 3339.
pub(crate) fn moment(field: &str, text: Option<&str>) -> Result<Option<Millis>> {
    text.map(|text| {
        text.parse::<jiff::Timestamp>()
            .map(jiff::Timestamp::as_millisecond)
            .map_err(|_| Error::invalid(format!("{field} must be a time such as 2026-01-31T12:00:00Z")))
    })
    .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::around::AuditActor;

    #[test]
    fn what_waits_is_bounded_and_nobody_fills_it_anonymously() {
        let buffer = Buffer::default();
        let mut entry = AuditEntry::system(None, "a.b", "c", "d");
        entry.actor = AuditActor::ANONYMOUS;
        for _ in 0..MAX_ANONYMOUS {
            assert_eq!(buffer.push(entry.clone()), Ok(()));
        }
        assert_eq!(buffer.push(entry.clone()), Err("anonymous"));
        entry.at += 60_000;
        assert_eq!(buffer.push(entry.clone()), Ok(()));
        entry.actor = AuditActor::SYSTEM;
        while buffer.push(entry.clone()).is_ok() {}
        assert_eq!(buffer.push(entry), Err("full"));
        assert_eq!(buffer.head().len(), BATCH);
        buffer.written(MAX_WAITING + 1);
        assert!(buffer.head().is_empty());
    }

    #[test]
    fn a_cursor_survives_and_garbage_is_refused() {
        let entry = AuditEntry::system(None, "a.b", "c", "d");
        assert_eq!(
            parse_cursor(&cursor_after(&entry)).expect("its own"),
            (entry.at, entry.id)
        );
        for text in ["", ".", "1.", "x.y", "1.2", "1700000000000"] {
            assert!(parse_cursor(text).is_err(), "{text}");
        }
    }
}
