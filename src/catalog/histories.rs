//! The timeline history files of a site, and the way recovery takes through them.
//!
//! Pure. PostgreSQL chooses the latest timeline by asking for one history file after the other and
//! stops at the first number that is missing, so a hole in the archive makes it settle for an older
//! timeline without a word, and a stray file leads it onto a dead branch. Both are found here.

use std::collections::BTreeMap;

use super::wal_range::{Missing, SegmentRange, WalCoverage};
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// Every history file of a site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histories {
    files: BTreeMap<TimelineId, Result<TimelineHistory, String>>,
}

/// Why the ancestry of a timeline is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    #[error("history file of timeline {0} is not in the archive")]
    Missing(TimelineId),
    #[error("history file of timeline {timeline} is damaged: {reason}")]
    Damaged { timeline: TimelineId, reason: String },
}

impl Histories {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a history file: what it says, or why it cannot be read.
    pub fn insert(&mut self, timeline: TimelineId, history: Result<TimelineHistory, String>) {
        self.files.insert(timeline, history);
    }

    /// Adds those of a site that this one was moved from; its own go before.
    pub fn absorb(&mut self, former: Self) {
        for (timeline, history) in former.files {
            self.files.entry(timeline).or_insert(history);
        }
    }

    /// The ancestry of `timeline`. Timeline 1 needs no file.
    pub fn history(&self, timeline: TimelineId) -> Result<TimelineHistory, HistoryError> {
        match self.files.get(&timeline) {
            Some(Ok(history)) => Ok(history.clone()),
            Some(Err(reason)) => Err(HistoryError::Damaged { timeline, reason: reason.clone() }),
            None if timeline == TimelineId::FIRST => Ok(TimelineHistory::root(timeline)),
            None => Err(HistoryError::Missing(timeline)),
        }
    }

    /// The timelines that have a history file, ascending.
    pub fn timelines(&self) -> impl DoubleEndedIterator<Item = TimelineId> {
        self.files.keys().copied()
    }

    /// History files that cannot be read, and why.
    pub fn damaged(&self) -> impl Iterator<Item = (TimelineId, &str)> {
        self.files
            .iter()
            .filter_map(|(timeline, history)| Some((*timeline, history.as_ref().err()?.as_str())))
    }

    /// The timeline that PostgreSQL takes for `recovery_target_timeline = latest` when its backup is on
    /// `from`: the last before the first missing number (`findNewestTimeLine` in the server's `timeline.c`).
    pub fn latest_from(&self, from: TimelineId) -> TimelineId {
        let mut latest = from;
        while let Some(next) = latest.get().checked_add(1).and_then(TimelineId::new) {
            if !self.files.contains_key(&next) {
                break;
            }
            latest = next;
        }
        latest
    }

    /// Numbers above 1 and below the highest one for which there is no history file, as inclusive ranges.
    /// `latest` stops in front of each.
    pub fn holes(&self) -> Vec<(TimelineId, TimelineId)> {
        let numbers = std::iter::once(1).chain(self.files.keys().map(|timeline| timeline.get()));
        let after = self.files.keys().map(|timeline| timeline.get());
        numbers
            .zip(after)
            .filter(|(before, after)| before + 1 < *after)
            .filter_map(|(before, after)| Some((TimelineId::new(before + 1)?, TimelineId::new(after - 1)?)))
            .collect()
    }

    /// Timelines that `latest` would follow from `from` although they do not come from it: PostgreSQL then
    /// refuses to start (`requested timeline is not a child of this server's history`).
    pub fn strays_from(&self, from: TimelineId, lsn: Lsn) -> Vec<TimelineId> {
        self.files
            .iter()
            .filter(|(timeline, _)| **timeline > from)
            .filter(|(_, history)| history.as_ref().is_ok_and(|history| !history.contains(from, lsn)))
            .map(|(timeline, _)| *timeline)
            .collect()
    }
}

/// One timeline of a path: recovery reads [`begin`, `end`) there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    pub timeline: TimelineId,
    pub begin: Lsn,
    /// The switch point to the next leg; none on the last.
    pub end: Option<Lsn>,
}

/// The way through the archive to one timeline: its ancestors, oldest first, and itself.
///
/// The segment that holds a switch point is read from the newer timeline, as the server does
/// (`XLogFileReadAnyTLI` tries the newest first and skips those that begin in a later segment), and from
/// the older one only when the newer has no WAL at all yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryPath {
    legs: Vec<Leg>,
}

impl RecoveryPath {
    pub fn new(history: &TimelineHistory) -> Self {
        let mut begin = Lsn::ZERO;
        let mut legs = Vec::with_capacity(history.ancestors().len() + 1);
        for ancestor in history.ancestors() {
            legs.push(Leg { timeline: ancestor.timeline, begin, end: Some(ancestor.end) });
            begin = ancestor.end;
        }
        legs.push(Leg { timeline: history.timeline(), begin, end: None });
        Self { legs }
    }

    /// Oldest first, never empty.
    pub fn legs(&self) -> &[Leg] {
        &self.legs
    }

    /// The timeline that the path leads to.
    pub fn timeline(&self) -> TimelineId {
        self.last().timeline
    }

    fn last(&self) -> Leg {
        *self.legs.last().expect("a path has at least its own timeline")
    }

    /// The timeline that the byte at `lsn` belongs to.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.legs.iter().find(|leg| leg.end.is_none_or(|end| lsn < end)).unwrap_or(&self.last()).timeline
    }

    /// The segment in which recovery first looks for the byte at `lsn`.
    pub fn segment_at(&self, size: SegmentSize, lsn: Lsn) -> SegmentName {
        let start = size.floor(lsn);
        let leg =
            self.legs.iter().rfind(|leg| size.floor(leg.begin) <= start).unwrap_or(&self.last()).timeline;
        size.segment_at(leg, lsn)
    }

    /// How far the archive reaches on this path, holes aside: the end of the newest timeline of which there
    /// is WAL. None when there is none on any.
    pub fn end(&self, coverage: &WalCoverage) -> Option<(TimelineId, Lsn)> {
        self.legs.iter().rev().find_map(|leg| {
            let end = coverage.end_of(leg.timeline)?;
            let end = leg.end.map_or(end, |switch| end.min(switch));
            (end > leg.begin).then_some((leg.timeline, end))
        })
    }

    /// Whether all WAL from the start of the segment that holds `from` up to `to` is there; else the
    /// segments that are not.
    pub fn check(&self, coverage: &WalCoverage, from: Lsn, to: Lsn) -> Result<(), Missing> {
        let mut segments: Vec<SegmentRange> = Vec::new();
        for stretch in self.stretches(coverage, from, to) {
            if let Err(missing) = coverage.covers(stretch.timeline, stretch.from, stretch.to) {
                segments.extend(missing.segments);
            }
        }
        if segments.is_empty() { Ok(()) } else { Err(Missing { segments }) }
    }

    /// What recovery reads from the start of the segment that holds `from` up to `to`: which bytes from which
    /// timeline, in order.
    pub fn stretches(&self, coverage: &WalCoverage, from: Lsn, to: Lsn) -> Vec<PathStretch> {
        let size = coverage.segment_size();
        let mut stretches = Vec::new();
        let mut next = size.floor(from);
        for (index, leg) in self.legs.iter().enumerate() {
            let end = match leg.end {
                None => to,
                Some(switch) => {
                    let newer_has_none = self.legs[index + 1..]
                        .iter()
                        .all(|newer| coverage.end_of(newer.timeline).is_none_or(|end| end <= newer.begin));
                    if newer_has_none && to <= switch { to } else { size.floor(switch).min(to) }
                }
            };
            if next < end {
                stretches.push(PathStretch { timeline: leg.timeline, from: next, to: end });
                next = end;
            }
        }
        stretches
    }
}

/// Bytes [`from`, `to`) that recovery reads from the files of `timeline`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathStretch {
    pub timeline: TimelineId,
    pub from: Lsn,
    pub to: Lsn,
}

#[cfg(test)]
mod tests {
    use super::super::pieces::Piece;
    use super::super::wal_range::WalCoverageBuilder;
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn at(number: u64, offset: u64) -> Lsn {
        Lsn::new(number * SIZE.bytes() + offset)
    }

    fn segment(timeline: u32, number: u64) -> SegmentName {
        SIZE.segment_at(tli(timeline), at(number, 0))
    }

    fn history(timeline: u32, text: &str) -> Result<TimelineHistory, String> {
        TimelineHistory::parse(tli(timeline), text.as_bytes()).map_err(|error| error.to_string())
    }

    fn histories(files: &[(u32, &str)]) -> Histories {
        let mut histories = Histories::new();
        for (number, text) in files {
            histories.insert(tli(*number), history(*number, text));
        }
        histories
    }

    fn coverage(segments: &[(u32, u64)], pieces: &[(u32, u64, u32)]) -> WalCoverage {
        let mut builder = WalCoverageBuilder::new(SIZE);
        for &(timeline, number) in segments {
            builder.segment(segment(timeline, number));
        }
        for &(timeline, number, end) in pieces {
            builder.piece(segment(timeline, number), Piece { start: 0, end });
        }
        builder.finish()
    }

    #[test]
    fn latest_stops_at_the_first_missing_number() {
        let histories = histories(&[(2, "1\t0/1\tx"), (3, "1\t0/1\tx"), (5, "1\t0/1\tx")]);
        assert_eq!(histories.latest_from(tli(1)), tli(3));
        assert_eq!(histories.latest_from(tli(3)), tli(3));
        assert_eq!(histories.latest_from(tli(4)), tli(5));
        assert_eq!(histories.holes(), [(tli(4), tli(4))]);
        assert_eq!(Histories::new().latest_from(tli(7)), tli(7));
        assert_eq!(Histories::new().latest_from(tli(u32::MAX)), tli(u32::MAX));
    }

    #[test]
    fn a_hole_below_the_first_file_counts() {
        assert_eq!(histories(&[(4, "1\t0/1\tx")]).holes(), [(tli(2), tli(3))]);
        assert!(histories(&[(2, "1\t0/1\tx")]).holes().is_empty());
    }

    #[test]
    fn a_branch_that_left_before_the_backup_is_a_stray() {
        let histories = histories(&[(2, "1\t1/0\tx"), (3, "1\t0/5\tx")]);
        assert_eq!(histories.strays_from(tli(1), Lsn::new(0x10)), [tli(3)]);
        assert_eq!(histories.strays_from(tli(2), Lsn::new(1 << 33)), [tli(3)]);
    }

    #[test]
    fn damaged_and_missing_files_are_told_apart() {
        let histories = histories(&[(2, "nonsense")]);
        assert!(matches!(histories.history(tli(2)), Err(HistoryError::Damaged { .. })));
        assert!(matches!(histories.history(tli(3)), Err(HistoryError::Missing(_))));
        assert_eq!(histories.history(tli(1)).unwrap(), TimelineHistory::root(tli(1)));
        assert_eq!(histories.damaged().count(), 1);
    }

    fn path(text: &str, timeline: u32) -> RecoveryPath {
        RecoveryPath::new(&history(timeline, text).unwrap())
    }

    #[test]
    fn the_segment_of_a_switch_point_is_read_from_the_newer_timeline() {
        let path = path("1\t0/3000100\tx\n2\t0/5000000\tx", 3);
        assert_eq!(path.segment_at(SIZE, at(2, 9)), segment(1, 2));
        assert_eq!(path.segment_at(SIZE, at(3, 0)), segment(2, 3));
        assert_eq!(path.segment_at(SIZE, at(5, 0)), segment(3, 5));
        assert_eq!(path.timeline_at(at(3, 0xFF)), tli(1));
        assert_eq!(path.timeline_at(at(3, 0x100)), tli(2));

        let whole = coverage(&[(1, 1), (1, 2), (2, 3), (2, 4), (3, 5)], &[(3, 6, 77)]);
        assert_eq!(path.end(&whole), Some((tli(3), at(6, 77))));
        assert_eq!(path.check(&whole, at(1, 5), at(6, 77)), Ok(()));
        let read: Vec<_> = path.stretches(&whole, at(1, 5), at(6, 77));
        assert_eq!(
            read,
            [
                PathStretch { timeline: tli(1), from: at(1, 0), to: at(3, 0) },
                PathStretch { timeline: tli(2), from: at(3, 0), to: at(5, 0) },
                PathStretch { timeline: tli(3), from: at(5, 0), to: at(6, 77) },
            ]
        );
    }

    #[test]
    fn the_old_timelines_copy_of_that_segment_is_no_substitute() {
        let path = path("1\t0/3000100\tx", 2);
        let coverage = coverage(&[(1, 2), (1, 3), (2, 4)], &[]);
        let missing = path.check(&coverage, at(2, 0), at(5, 0)).unwrap_err();
        assert_eq!(missing.segments, [SegmentRange { first: segment(2, 3), last: segment(2, 3) }]);
    }

    #[test]
    fn two_switches_in_one_segment_are_read_from_the_newest() {
        let path = path("1\t0/3000100\tx\n2\t0/3000200\tx", 3);
        let coverage = coverage(&[(1, 2), (3, 3)], &[]);
        assert_eq!(path.segment_at(SIZE, at(3, 0x150)), segment(3, 3));
        assert_eq!(path.check(&coverage, at(2, 0), at(4, 0)), Ok(()));
    }

    #[test]
    fn right_after_a_promotion_the_old_tail_is_the_end_up_to_the_switch() {
        let path = path("1\t0/3000100\tx", 2);
        let before = coverage(&[(1, 2)], &[(1, 3, 0x80)]);
        assert_eq!(path.end(&before), Some((tli(1), at(3, 0x80))));
        assert_eq!(path.check(&before, at(2, 0), at(3, 0x80)), Ok(()));
        let beyond = coverage(&[(1, 2), (1, 3), (1, 4)], &[]);
        assert_eq!(path.end(&beyond), Some((tli(1), at(3, 0x100))));
        assert_eq!(path.check(&beyond, at(2, 0), at(3, 0x100)), Ok(()));
        let nothing = coverage(&[], &[]);
        assert_eq!(path.end(&nothing), None);
    }
}
