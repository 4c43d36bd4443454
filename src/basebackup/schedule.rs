//! Is a base backup due?
//!
//! Pure. PGHoard's rules, so that its configuration means the same here: an interval counted from the
//! last backup, or a time of day in UTC repeated at the interval.

use jiff::{SignedDuration, Timestamp, tz::TimeZone};

/// When base backups are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// `basebackup_interval_hours`; none takes backups on request only.
    pub interval: Option<SignedDuration>,
    /// `basebackup_hour` and `basebackup_minute`, UTC.
    pub at: Option<(u8, u8)>,
}

impl Schedule {
    /// Whether a backup is due at `now`, the last one having begun at `last`.
    pub fn is_due(&self, last: Option<Timestamp>, now: Timestamp) -> bool {
        let Some(interval) = self.interval else { return false };
        let Some(last) = last else { return true };
        match self.at {
            None => now.duration_since(last) >= interval,
            Some(at) => {
                let (Some(present), Some(previous)) =
                    (normalized(at, interval, now), normalized(at, interval, last))
                else {
                    return false;
                };
                // The half interval keeps a backup made by hand shortly before from being repeated,
                // and one that ran late from pushing the next one out.
                present != previous && now.duration_since(last) >= interval / 2
            }
        }
    }
}

/// The newest scheduled time not after `time`: hour and minute of the day before, plus whole intervals.
fn normalized(at: (u8, u8), interval: SignedDuration, time: Timestamp) -> Option<Timestamp> {
    let (hour, minute) = (i8::try_from(at.0).ok()?, i8::try_from(at.1).ok()?);
    let day = time.to_zoned(TimeZone::UTC);
    let day = day.with().hour(hour).minute(minute).second(0).subsec_nanosecond(0).build().ok()?;
    let mut scheduled = day.timestamp();
    if scheduled > time {
        scheduled = scheduled.checked_sub(SignedDuration::from_hours(24)).ok()?;
    }
    if interval <= SignedDuration::ZERO {
        return Some(scheduled);
    }
    let since = time.duration_since(scheduled);
    let whole = since.as_secs() / interval.as_secs().max(1);
    scheduled.checked_add(interval.checked_mul(i32::try_from(whole).ok()?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        format!("2026-11-{text}Z").parse().unwrap()
    }

    fn every(hours: i64, at: Option<(u8, u8)>) -> Schedule {
        Schedule { interval: Some(SignedDuration::from_hours(hours)), at }
    }

    #[test]
    fn is_due_when_there_is_none_unless_switched_off() {
        let now = time("21T10:00:00");
        assert!(every(24, None).is_due(None, now));
        assert!(every(24, Some((3, 0))).is_due(None, now));
        assert!(!Schedule { interval: None, at: None }.is_due(None, now));
    }

    #[test]
    fn an_interval_counts_from_the_last_start() {
        let schedule = every(24, None);
        assert!(!schedule.is_due(Some(time("20T10:00:01")), time("21T10:00:00")));
        assert!(schedule.is_due(Some(time("20T10:00:00")), time("21T10:00:00")));
    }

    #[test]
    fn a_time_of_day_is_kept_however_late_the_last_one_was() {
        let schedule = every(24, Some((3, 30)));
        assert!(!schedule.is_due(Some(time("20T04:10:00")), time("21T03:29:59")));
        assert!(schedule.is_due(Some(time("20T04:10:00")), time("21T03:30:00")));
        assert!(!schedule.is_due(Some(time("21T03:30:05")), time("21T23:00:00")));
        // A backup by hand shortly before its time stands for the scheduled one.
        assert!(!schedule.is_due(Some(time("21T03:00:00")), time("21T03:30:00")));
    }

    #[test]
    fn shorter_intervals_repeat_from_the_time_of_day() {
        let schedule = every(6, Some((3, 0)));
        assert!(schedule.is_due(Some(time("21T03:00:00")), time("21T09:00:00")));
        assert!(!schedule.is_due(Some(time("21T03:00:00")), time("21T08:59:00")));
        assert!(schedule.is_due(Some(time("20T21:00:00")), time("21T03:00:00")));
    }
}
