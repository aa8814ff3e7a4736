//! What a team uses: now, over a range, at most, and per day.

use jiff::civil::Date;

use super::{Services, validate};
use crate::domain::{Millis, TeamId, now};
use crate::store::{DAY, Held};
use crate::{Error, Result};

const SECOND: Millis = 1000;
const MINUTE: Millis = 60 * SECOND;
const HOUR: Millis = 60 * MINUTE;

/// Widths of samples, and how long each is kept: what a chart of a range needs, and no more.
const WIDTHS: [(Millis, Millis); 3] = [(10 * SECOND, 2 * HOUR), (5 * MINUTE, 2 * DAY), (HOUR, 32 * DAY)];
/// How far peaks look back.
const PEAKS: Millis = 30 * DAY;
/// Most days in one answer.
const MAX_DAYS: i64 = 366;
/// Most teams in one page of a day's use.
const MAX_TEAMS: u32 = 1000;
/// Days in an answer when nothing is said.
const DAYS: i64 = 30;

/// A range of a chart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Its word: `5m`, `1h`, `6h`, `24h` or `30d`.
    pub word: &'static str,
    length: Millis,
    step: Millis,
    /// The samples it is drawn from.
    width: Millis,
}

const RANGES: [Range; 5] = [
    range("5m", 5 * MINUTE, 10 * SECOND, 10 * SECOND),
    range("1h", HOUR, MINUTE, 10 * SECOND),
    range("6h", 6 * HOUR, 5 * MINUTE, 5 * MINUTE),
    range("24h", DAY, 15 * MINUTE, 5 * MINUTE),
    range("30d", 30 * DAY, 6 * HOUR, HOUR),
];

const fn range(word: &'static str, length: Millis, step: Millis, width: Millis) -> Range {
    Range {
        word,
        length,
        step,
        width,
    }
}

impl Range {
    /// The range of a word; an hour when nothing is said.
    ///
    /// # Errors
    /// There is no such range.
    pub fn parse(word: Option<&str>) -> Result<Self> {
        let word = word.unwrap_or("1h");
        RANGES
            .into_iter()
            .find(|range| range.word == word)
            .ok_or_else(|| Error::invalid("range must be one of 5m, 1h, 6h, 24h, 30d"))
    }

    fn steps(self) -> i64 {
        self.length / self.step
    }

    /// Where the first step begins: the last one is the step that contains `now`.
    fn start(self, now: Millis) -> Millis {
        now.div_euclid(self.step) * self.step - (self.steps() - 1) * self.step
    }
}

/// A team's chart.
#[derive(Debug, Clone)]
pub struct TeamStats {
    /// What is held now.
    pub current: Held,
    /// When that is.
    pub at: Millis,
    /// The most of each within 30 days.
    pub peaks: Held,
    /// When each step begins, and its largest values.
    pub series: Vec<(Millis, Held)>,
}

/// A day's use.
#[derive(Debug, Clone, Copy)]
pub struct DayUse {
    /// The day, in UTC.
    pub date: Date,
    /// vCPUs held, times milliseconds.
    pub cpu_ms: i64,
    /// MiB held, times milliseconds.
    pub ram_mb_ms: i64,
}

impl Services {
    /// Samples all teams.
    pub(crate) async fn sample_pass(&self, at: Millis) -> Result<()> {
        for (width, _) in WIDTHS {
            self.store.metrics_sample(at, width).await?;
        }
        Ok(())
    }

    /// Adds running times up to a moment to the days' usage. It happens every minute; once it has been done for a moment,
    /// days that end before it do not change any more. Repeating it is harmless.
    pub async fn usage_pass(&self, until: Millis) -> Result<()> {
        self.store.usage_accrue(until).await?;
        Ok(())
    }

    pub(super) async fn metrics_prune(&self, now: Millis) -> Result<()> {
        for (width, keep) in WIDTHS {
            self.store.metrics_prune(width, now - keep).await?;
        }
        Ok(())
    }

    /// A team's chart over a range.
    pub async fn team_stats(&self, team: TeamId, range: Range) -> Result<TeamStats> {
        let now = now();
        let current = self.store.held_now(team).await?;
        let start = range.start(now);
        let mut series: Vec<(Millis, Held)> = (0..range.steps())
            .map(|step| (start + step * range.step, Held::default()))
            .collect();
        for step in self
            .store
            .held_steps(team, range.width, start, range.step)
            .await?
        {
            let entry = usize::try_from(step.step).ok().and_then(|at| series.get_mut(at));
            if let Some((_, held)) = entry {
                *held = Held {
                    running_count: step.running_count,
                    vcpus: step.vcpus,
                    memory_mb: step.memory_mb,
                };
            }
        }
        // The step under way may have no sample yet.
        if let Some((_, held)) = series.last_mut() {
            *held = largest(*held, current);
        }
        let (hour, _) = WIDTHS[2];
        let mut peaks = current;
        for step in self.store.held_steps(team, hour, now - PEAKS, PEAKS * 2).await? {
            peaks = largest(
                peaks,
                Held {
                    running_count: step.running_count,
                    vcpus: step.vcpus,
                    memory_mb: step.memory_mb,
                },
            );
        }
        Ok(TeamStats {
            current,
            at: now,
            peaks,
            series,
        })
    }

    /// What the teams used on a day (UTC), ordered by team, with the use up to now of a day under way: those after
    /// `after`, at most `limit`. Teams without use are left out.
    pub async fn usage_of_day(
        &self,
        date: Date,
        after: Option<TeamId>,
        limit: u32,
    ) -> Result<Vec<(TeamId, DayUse)>> {
        validate::within("limit", limit, 1, MAX_TEAMS)?;
        let rows = self
            .store
            .usage_of_day(days_since_epoch(date), after, limit.into())
            .await?;
        Ok(rows
            .into_iter()
            .map(|row| {
                let used = DayUse {
                    date,
                    cpu_ms: row.cpu_ms,
                    ram_mb_ms: row.ram_mb_ms,
                };
                (TeamId(row.team_id), used)
            })
            .collect())
    }

    /// A team's use per day, with a point for every day.
    pub async fn team_usage(
        &self,
        team: TeamId,
        from: Option<&str>,
        to: Option<&str>,
    ) -> Result<Vec<DayUse>> {
        let to = match to {
            Some(to) => day("to", to)?,
            None => now().div_euclid(DAY),
        };
        let from = match from {
            Some(from) => day("from", from)?,
            None => to - (DAYS - 1),
        };
        if from > to || to - from >= MAX_DAYS {
            return Err(Error::invalid(format!(
                "from must not be after to, and both at most {MAX_DAYS} days apart"
            )));
        }
        let mut points: Vec<DayUse> = (from..=to)
            .map(|day| DayUse {
                date: date(day),
                cpu_ms: 0,
                ram_mb_ms: 0,
            })
            .collect();
        for used in self.store.usage_days(team, from, to).await? {
            let point = usize::try_from(used.day - from)
                .ok()
                .and_then(|at| points.get_mut(at));
            if let Some(point) = point {
                point.cpu_ms = used.cpu_ms;
                point.ram_mb_ms = used.ram_mb_ms;
            }
        }
        Ok(points)
    }
}

fn largest(one: Held, other: Held) -> Held {
    Held {
        running_count: one.running_count.max(other.running_count),
        vcpus: one.vcpus.max(other.vcpus),
        memory_mb: one.memory_mb.max(other.memory_mb),
    }
}

/// A day in a query, `YYYY-MM-DD`, or the day of a time; days since the epoch.
fn day(field: &str, text: &str) -> Result<i64> {
    let bad = || Error::invalid(format!("{field} must be a day such as 2026-01-31"));
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time.as_millisecond().div_euclid(DAY));
    }
    let date: Date = text.parse().map_err(|_| bad())?;
    Ok(days_since_epoch(date))
}

fn days_since_epoch(date: Date) -> i64 {
    let epoch = jiff::civil::date(1970, 1, 1);
    date.duration_since(epoch).as_hours() / 24
}

fn date(day: i64) -> Date {
    crate::domain::timestamp(day.saturating_mul(DAY))
        .to_zoned(jiff::tz::TimeZone::UTC)
        .date()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_are_bounded_and_drawn_from_samples_that_are_still_kept() {
        for range in RANGES {
            assert!((20..=120).contains(&range.steps()), "{}", range.word);
            assert_eq!(range.step % range.width, 0, "{}", range.word);
            let (_, kept) = WIDTHS
                .into_iter()
                .find(|(width, _)| *width == range.width)
                .expect("a width that is sampled");
            assert!(kept > range.length, "{}", range.word);
            let now = 1_700_000_123_456;
            let start = range.start(now);
            assert!(start + range.length > now && start + range.length - range.step <= now);
        }
        assert!(Range::parse(Some("2h")).is_err());
    }

    #[test]
    fn days_survive_a_round_trip() {
        for text in ["1970-01-01", "2024-02-29", "2026-12-31"] {
            assert_eq!(date(day("from", text).expect("a day")).to_string(), text);
        }
        assert_eq!(
            day("to", "2024-02-29T23:59:59Z").expect("a time"),
            day("to", "2024-02-29").expect("a day")
        );
        assert!(day("to", "yesterday").is_err());
        assert!(day("to", "9999-99-99").is_err());
    }
}
