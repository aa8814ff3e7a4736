//! The worker: turns the use of days that have ended into charges, which later changes of plans and prices leave alone.

use wrenn_control::Result;
use wrenn_control::domain::{Millis, timestamp};
use wrenn_control::jiff::civil::{Date, date};
use wrenn_control::jiff::tz::TimeZone;
use wrenn_control::jiff::{Span, ToSpan as _};
use wrenn_control::services::Services;

use crate::table;

/// How many days the first pass on a database goes back.
const FIRST_DAYS: i64 = 31;
/// Teams that are charged at once.
const PAGE: u32 = 500;

/// The number of a day since the epoch, as it is stored.
pub(crate) fn number(day: Date) -> i64 {
    day.duration_since(date(1970, 1, 1)).as_hours() / 24
}

/// The day of a moment, in UTC.
pub(crate) fn day_of(at: Millis) -> Date {
    timestamp(at).to_zoned(TimeZone::UTC).date()
}

/// Closes all days that ended before the day of `now`, oldest first. A pass that is cut short is repeated by the next
/// one from the day at which it was; two at once write the same.
///
/// # Errors
/// The database failed.
pub async fn days_before(services: &Services, now: Millis) -> Result<()> {
    // After this, the use of days that have ended is final.
    services.usage_pass(now).await?;
    let db = services.database();
    let today = day_of(now);
    let first = table::last_closed(db)
        .await?
        .map_or_else(|| number(today) - FIRST_DAYS, |last| last + 1);
    let epoch = date(1970, 1, 1);
    for day in first..number(today) {
        let span: Span = day.days();
        let date = epoch.saturating_add(span);
        let mut after = None;
        loop {
            let used = services.usage_of_day(date, after, PAGE).await?;
            table::charge(db, day, &used).await?;
            match used.last() {
                Some((team, _)) if used.len() == PAGE as usize => after = Some(*team),
                _ => break,
            }
        }
        table::closed(db, day, now).await?;
    }
    Ok(())
}
