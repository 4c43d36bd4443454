//! Where recovery is to stop, and how PostgreSQL is told.
//!
//! Pure. One target at most, a timeline, and what to do on arrival: the same choices, names and meanings
//! as PostgreSQL's `recovery_target*` settings.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;

use crate::postgres::{Lsn, TimelineId};

/// The point at which replay stops.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RecoveryTarget {
    /// The end of the archive.
    #[default]
    Latest,
    /// As soon as the backup is consistent: its own end.
    Immediate,
    /// After the record that begins at this position, or the first one after it.
    Lsn(Lsn),
    /// After the last transaction that ended at or before this time. Microseconds are exact.
    Time(Timestamp),
    /// At a restore point made with `pg_create_restore_point`.
    Name(String),
    /// After this transaction ended.
    Xid(u64),
}

/// The timeline that recovery follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetTimeline {
    /// The newest one in the archive that PostgreSQL finds from the backup's own.
    #[default]
    Latest,
    /// The one on which the backup was taken.
    Current,
    Number(TimelineId),
}

/// What PostgreSQL does when it has reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetAction {
    Pause,
    Promote,
    Shutdown,
}

/// A text that does not say where to stop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseTargetError {
    #[error("`{0}` is not a time")]
    Time(String),
    #[error("time `{0}` does not say its time zone")]
    TimeZone(String),
    #[error("time `{0}` is finer than the microseconds PostgreSQL keeps")]
    TimePrecision(String),
    #[error("`{0}` is not a transaction id (a number from 3)")]
    Xid(String),
    #[error("restore point name `{0}` must have 1 to 63 bytes and no control characters")]
    Name(String),
    #[error("`{0}` is not a target timeline (`latest`, `current` or a number)")]
    Timeline(String),
    #[error("`{0}` is not a target action (`pause`, `promote` or `shutdown`)")]
    Action(String),
}

impl ParseTargetError {
    /// What to type instead.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Time(_) => {
                Some("write it as `2026-11-21 10:00:00+00` or `2026-11-21T10:00:00.123456Z`".to_owned())
            }
            Self::TimeZone(text) => {
                Some(format!("append an offset: `{text}+00` if this is UTC, `{text}+02` if two hours ahead"))
            }
            _ => None,
        }
    }
}

impl RecoveryTarget {
    /// Reads a time such as `2026-11-21T10:00:00Z`, `2026-11-21 10:00:00.123+02` or `2026-11-21 10:00 UTC`.
    /// A time without a zone is refused: guessing it would stop recovery hours off.
    pub fn parse_time(text: &str) -> Result<Self, ParseTargetError> {
        let text = text.trim();
        let mut compact = text.to_owned();
        for zone in [" UTC", " GMT", " utc", " Z", "UTC", "z"] {
            if let Some(rest) = compact.strip_suffix(zone) {
                compact = format!("{}Z", rest.trim_end());
                break;
            }
        }
        // PostgreSQL and people put a blank before the offset; ISO 8601 knows none.
        for sign in ['+', '-'] {
            compact = compact.replace(&format!(" {sign}"), &sign.to_string());
        }
        match compact.parse::<Timestamp>() {
            Ok(time) if time.subsec_nanosecond() % 1000 == 0 => Ok(Self::Time(time)),
            Ok(_) => Err(ParseTargetError::TimePrecision(text.to_owned())),
            Err(_) if compact.parse::<jiff::civil::DateTime>().is_ok() => {
                Err(ParseTargetError::TimeZone(text.to_owned()))
            }
            Err(_) => Err(ParseTargetError::Time(text.to_owned())),
        }
    }

    /// Reads a transaction id, with or without its epoch in the upper half.
    pub fn parse_xid(text: &str) -> Result<Self, ParseTargetError> {
        // 0 to 2 are PostgreSQL's own (`FirstNormalTransactionId` is 3).
        match text.trim().parse::<u64>() {
            Ok(xid) if xid & 0xFFFF_FFFF >= 3 => Ok(Self::Xid(xid)),
            _ => Err(ParseTargetError::Xid(text.to_owned())),
        }
    }

    /// Reads the name of a restore point.
    pub fn parse_name(text: &str) -> Result<Self, ParseTargetError> {
        // `MAXFNAMELEN` is 64 with the final NUL.
        if text.is_empty() || text.len() > 63 || text.chars().any(char::is_control) {
            return Err(ParseTargetError::Name(text.to_owned()));
        }
        Ok(Self::Name(text.to_owned()))
    }
}

impl fmt::Display for RecoveryTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => write!(f, "end of the archive"),
            Self::Immediate => write!(f, "end of the backup"),
            Self::Lsn(lsn) => write!(f, "LSN `{lsn}`"),
            Self::Time(time) => write!(f, "time `{}`", server_time(*time)),
            Self::Name(name) => write!(f, "restore point `{name}`"),
            Self::Xid(xid) => write!(f, "transaction `{xid}`"),
        }
    }
}

impl FromStr for TargetTimeline {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "latest" => Ok(Self::Latest),
            "current" => Ok(Self::Current),
            number => {
                number.parse().map(Self::Number).map_err(|_| ParseTargetError::Timeline(text.to_owned()))
            }
        }
    }
}

impl fmt::Display for TargetTimeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Current => f.write_str("current"),
            Self::Number(timeline) => timeline.fmt(f),
        }
    }
}

impl FromStr for TargetAction {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "pause" => Ok(Self::Pause),
            "promote" => Ok(Self::Promote),
            "shutdown" => Ok(Self::Shutdown),
            _ => Err(ParseTargetError::Action(text.to_owned())),
        }
    }
}

impl fmt::Display for TargetAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        })
    }
}

/// A time as PostgreSQL reads it back exactly, whatever its `DateStyle` and `TimeZone`.
fn server_time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string()
}

/// One line of `postgresql.auto.conf`, without its newline.
pub fn setting_line(name: &str, value: &str) -> String {
    format!("{name} = {}", quote_setting(value))
}

/// A value in quotes as the server's configuration file reader takes them (`guc-file.l`): quotes are
/// doubled, backslashes are escapes, and a quoted value cannot run over the end of a line.
///
/// A NUL cannot be written there and is left out; no setting can hold one.
pub fn quote_setting(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('\'');
    for character in value.chars() {
        match character {
            '\'' => quoted.push_str("''"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\0' => {}
            other => quoted.push(other),
        }
    }
    quoted.push('\'');
    quoted
}

/// The lines that tell PostgreSQL this target. The action is written only where there is a target, since
/// PostgreSQL promotes at the end of the archive in any case. `recovery_target_inclusive` keeps its default.
pub fn target_settings(
    target: &RecoveryTarget,
    timeline: TargetTimeline,
    action: Option<TargetAction>,
) -> Vec<String> {
    let stop = match target {
        RecoveryTarget::Latest => None,
        RecoveryTarget::Immediate => Some(("recovery_target", "immediate".to_owned())),
        RecoveryTarget::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
        RecoveryTarget::Time(time) => Some(("recovery_target_time", server_time(*time))),
        RecoveryTarget::Name(name) => Some(("recovery_target_name", name.clone())),
        RecoveryTarget::Xid(xid) => Some(("recovery_target_xid", xid.to_string())),
    };
    let mut lines = Vec::new();
    if let Some((name, value)) = &stop {
        lines.push(setting_line(name, value));
    }
    lines.push(setting_line("recovery_target_timeline", &timeline.to_string()));
    if let (Some(_), Some(action)) = (stop, action) {
        lines.push(setting_line("recovery_target_action", &action.to_string()));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn time(text: &str) -> RecoveryTarget {
        RecoveryTarget::Time(text.parse().unwrap())
    }

    #[test]
    fn reads_times_as_people_and_programs_write_them() {
        for (text, same) in [
            ("2026-11-21T10:00:00Z", "2026-11-21T10:00:00Z"),
            ("2026-11-21 10:00:00Z", "2026-11-21T10:00:00Z"),
            ("2026-11-21 10:00:00+00", "2026-11-21T10:00:00Z"),
            ("2026-11-21 10:00:00.123456+00", "2026-11-21T10:00:00.123456Z"),
            ("2026-11-21 10:00:00.5 +02:00", "2026-11-21T08:00:00.5Z"),
            ("2026-11-21 10:00:00-0330", "2026-11-21T13:30:00Z"),
            ("2026-11-21 10:00:00 UTC", "2026-11-21T10:00:00Z"),
            ("2026-11-21 10:00 UTC", "2026-11-21T10:00:00Z"),
            (" 2026-11-21T10:00:00.000001z ", "2026-11-21T10:00:00.000001Z"),
        ] {
            assert_eq!(RecoveryTarget::parse_time(text), Ok(time(same)), "{text}");
        }
    }

    #[test]
    fn a_time_without_a_zone_is_refused_with_a_way_out() {
        for text in ["2026-11-21 10:00:00", "2026-11-21T10:00:00.123"] {
            let error = RecoveryTarget::parse_time(text).unwrap_err();
            assert_eq!(error, ParseTargetError::TimeZone(text.to_owned()));
            assert!(error.hint().unwrap().contains(&format!("`{text}+00`")));
        }
    }

    #[test]
    fn refuses_what_is_not_a_target() {
        for text in ["", "yesterday", "2026-13-01 00:00:00Z", "10:00"] {
            assert!(matches!(RecoveryTarget::parse_time(text), Err(ParseTargetError::Time(_))), "{text}");
        }
        assert!(matches!(
            RecoveryTarget::parse_time("2026-11-21T10:00:00.1234567Z"),
            Err(ParseTargetError::TimePrecision(_))
        ));
        for text in ["", "0", "2", "-3", "4294967296", "x"] {
            assert!(RecoveryTarget::parse_xid(text).is_err(), "{text}");
        }
        assert_eq!(RecoveryTarget::parse_xid("4294967299"), Ok(RecoveryTarget::Xid(4_294_967_299)));
        assert!(RecoveryTarget::parse_name("").is_err());
        assert!(RecoveryTarget::parse_name(&"x".repeat(64)).is_err());
        assert!(RecoveryTarget::parse_name("a\nb").is_err());
        assert!("newest".parse::<TargetTimeline>().is_err());
        assert!("0".parse::<TargetTimeline>().is_err());
        assert!("stop".parse::<TargetAction>().is_err());
    }

    #[test]
    fn writes_the_settings_of_each_target() {
        let lines = |target: &RecoveryTarget| {
            target_settings(target, TargetTimeline::Latest, Some(TargetAction::Promote)).join("\n")
        };
        let rest = "\nrecovery_target_timeline = 'latest'\nrecovery_target_action = 'promote'";
        assert_eq!(lines(&RecoveryTarget::Latest), "recovery_target_timeline = 'latest'");
        assert_eq!(lines(&RecoveryTarget::Immediate), format!("recovery_target = 'immediate'{rest}"));
        assert_eq!(
            lines(&RecoveryTarget::Lsn(Lsn::new(0x16_B374_D848))),
            format!("recovery_target_lsn = '16/B374D848'{rest}")
        );
        assert_eq!(
            lines(&time("2026-11-21T10:00:00.000001Z")),
            format!("recovery_target_time = '2026-11-21 10:00:00.000001+00'{rest}")
        );
        assert_eq!(
            lines(&RecoveryTarget::Name("it's a \\ name".to_owned())),
            format!("recovery_target_name = 'it''s a \\\\ name'{rest}")
        );
        assert_eq!(lines(&RecoveryTarget::Xid(777)), format!("recovery_target_xid = '777'{rest}"));
        let three = TargetTimeline::Number(TimelineId::new(3).unwrap());
        assert_eq!(
            target_settings(&RecoveryTarget::Immediate, three, None),
            ["recovery_target = 'immediate'", "recovery_target_timeline = '3'"]
        );
    }

    /// The server's `GUC_scanstr`, as far as it concerns what we write.
    fn server_reads(quoted: &str) -> String {
        let inner = quoted.strip_prefix('\'').unwrap().strip_suffix('\'').unwrap();
        let mut text = String::new();
        let mut characters = inner.chars();
        while let Some(character) = characters.next() {
            match character {
                '\'' => {
                    assert_eq!(characters.next(), Some('\''), "a lone quote ends the value");
                    text.push('\'');
                }
                '\\' => match characters.next().unwrap() {
                    'n' => text.push('\n'),
                    'r' => text.push('\r'),
                    other => text.push(other),
                },
                other => text.push(other),
            }
        }
        text
    }

    proptest! {
        #[test]
        fn a_quoted_value_reads_back_and_stays_on_its_line(value in "[^\0]*") {
            let quoted = quote_setting(&value);
            prop_assert!(!quoted.contains('\n') && !quoted.contains('\r'));
            prop_assert_eq!(server_reads(&quoted), value);
        }

        #[test]
        fn a_time_survives_the_way_through_the_settings(micros in 0_i64..253_402_200_000_000_000) {
            let time = Timestamp::from_microsecond(micros).unwrap();
            prop_assert_eq!(RecoveryTarget::parse_time(&server_time(time)), Ok(RecoveryTarget::Time(time)));
        }
    }
}
