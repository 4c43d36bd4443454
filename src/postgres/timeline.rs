//! Timelines and their history files.
//!
//! Pure. A timeline history file lists the ancestors of one timeline, oldest first, each with the LSN
//! at which it was left; with it one can say which timeline holds a given position.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::lsn::Lsn;

/// A timeline number, never zero. Prints as a plain number; file names use eight hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct TimelineId(std::num::NonZeroU32);

impl TimelineId {
    /// The timeline every cluster begins with, the only one without a history file.
    pub const FIRST: Self = Self(std::num::NonZeroU32::MIN);

    pub const fn new(number: u32) -> Option<Self> {
        match std::num::NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<TimelineId> for u32 {
    fn from(timeline: TimelineId) -> Self {
        timeline.get()
    }
}

impl TryFrom<u32> for TimelineId {
    type Error = ParseTimelineError;

    fn try_from(number: u32) -> Result<Self, Self::Error> {
        Self::new(number).ok_or_else(|| ParseTimelineError(number.to_string()))
    }
}

impl FromStr for TimelineId {
    type Err = ParseTimelineError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().ok().and_then(Self::new).ok_or_else(|| ParseTimelineError(text.to_owned()))
    }
}

/// A text that is not a timeline number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a timeline (a number from 1)")]
pub struct ParseTimelineError(String);

/// One line of a history file: `timeline` was left at `end` (the switch point).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ancestor {
    pub timeline: TimelineId,
    pub end: Lsn,
}

/// The ancestry of one timeline, as its history file tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    ancestors: Vec<Ancestor>,
}

/// A history file that PostgreSQL would not have written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseHistoryError {
    #[error("line {0} is not `<timeline> <LSN> <reason>`")]
    Syntax(usize),
    #[error("line {0}: timelines and switch points must ascend and stay below the file's own timeline")]
    Order(usize),
    #[error("not UTF-8 text")]
    Encoding,
    #[error("no ancestor is listed, but only timeline 1 has none")]
    Empty,
}

impl TimelineHistory {
    /// The history of a timeline without ancestors (timeline 1).
    pub const fn root(timeline: TimelineId) -> Self {
        Self { timeline, ancestors: Vec::new() }
    }

    /// Reads the text of `<timeline>.history`. Blank lines and `#` comments are skipped, as
    /// `readTimeLineHistory` in the server's `timeline.c` does.
    pub fn parse(timeline: TimelineId, text: &[u8]) -> Result<Self, ParseHistoryError> {
        let text = std::str::from_utf8(text).map_err(|_| ParseHistoryError::Encoding)?;
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut fields = line.split_whitespace();
            let ancestor = fields
                .next()
                .and_then(|field| field.parse().ok())
                .zip(fields.next().and_then(|field| field.parse().ok()))
                .map(|(timeline, end)| Ancestor { timeline, end })
                .ok_or(ParseHistoryError::Syntax(index + 1))?;
            let ascends = ancestors
                .last()
                .is_none_or(|last| last.timeline < ancestor.timeline && last.end <= ancestor.end);
            if !ascends || ancestor.timeline >= timeline {
                return Err(ParseHistoryError::Order(index + 1));
            }
            ancestors.push(ancestor);
        }
        if ancestors.is_empty() && timeline != TimelineId::FIRST {
            return Err(ParseHistoryError::Empty);
        }
        Ok(Self { timeline, ancestors })
    }

    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Oldest first.
    pub fn ancestors(&self) -> &[Ancestor] {
        &self.ancestors
    }

    /// Where this timeline was entered: the switch point of its parent, `0/0` for timeline 1.
    pub fn start(&self) -> Lsn {
        self.ancestors.last().map_or(Lsn::ZERO, |parent| parent.end)
    }

    /// The timeline that holds the byte at `lsn` on this path.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.ancestors
            .iter()
            .find(|ancestor| lsn < ancestor.end)
            .map_or(self.timeline, |ancestor| ancestor.timeline)
    }

    /// Whether recovery along this path can pass (`timeline`, `lsn`): everything before `lsn` on
    /// `timeline` is then part of this history.
    pub fn contains(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        if timeline == self.timeline {
            return true;
        }
        self.ancestors.iter().any(|ancestor| ancestor.timeline == timeline && lsn <= ancestor.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    const TEXT: &str =
        "1\t0/13029C78\tno recovery target specified\n\n# note\n2\t1/0\tbefore 2026-11-21 10:00:00\n";

    #[test]
    fn says_which_timeline_holds_a_position() {
        let history = TimelineHistory::parse(tli(3), TEXT.as_bytes()).unwrap();
        assert_eq!(history.timeline_at(Lsn::new(0x1302_9C77)), tli(1));
        assert_eq!(history.timeline_at(Lsn::new(0x1302_9C78)), tli(2));
        assert_eq!(history.timeline_at(Lsn::new(1 << 32)), tli(3));
        assert_eq!(history.start(), Lsn::new(1 << 32));
    }

    #[test]
    fn contains_an_ancestor_up_to_its_switch_point_only() {
        let history = TimelineHistory::parse(tli(3), TEXT.as_bytes()).unwrap();
        assert!(history.contains(tli(1), Lsn::new(0x1302_9C78)));
        assert!(!history.contains(tli(1), Lsn::new(0x1302_9C79)));
        assert!(history.contains(tli(3), Lsn::new(u64::MAX)));
        assert!(!history.contains(tli(4), Lsn::ZERO));
    }

    #[test]
    fn refuses_a_history_out_of_order() {
        for text in ["2\t0/1\tx\n1\t0/2\tx\n", "3\t0/1\tx\n", "1\t0/2\tx\n2\t0/1\tx\n"] {
            assert!(matches!(
                TimelineHistory::parse(tli(3), text.as_bytes()),
                Err(ParseHistoryError::Order(_))
            ));
        }
        assert_eq!(TimelineHistory::parse(tli(2), b"x\n"), Err(ParseHistoryError::Syntax(1)));
        assert_eq!(TimelineHistory::parse(tli(2), b""), Err(ParseHistoryError::Empty));
    }
}
