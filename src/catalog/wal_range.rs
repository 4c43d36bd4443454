//! Which WAL the repository holds: contiguous stretches per timeline, and the gaps between them.
//!
//! Pure. A stretch begins at a segment's start and ends where the first byte is missing: at the end of
//! a whole segment, or within the next one as far as its pieces join from its start. Only the ends of
//! stretches are kept, so an archive of a million segments costs as much as one of ten.

use std::collections::BTreeMap;
use std::fmt;

use super::pieces::{Piece, join_pieces};
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Whole segments `first` to `last`, both included, on one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct SegmentRange {
    pub first: SegmentName,
    pub last: SegmentName,
}

impl SegmentRange {
    /// How many segments that is.
    pub fn count(self, size: SegmentSize) -> u64 {
        size.start(self.last).bytes_since(size.start(self.first)) / size.bytes() + 1
    }

    /// The segments that hold the bytes [`from`, `to`); none when that is empty.
    pub fn holding(size: SegmentSize, timeline: TimelineId, from: Lsn, to: Lsn) -> Option<Self> {
        (from < to).then(|| Self {
            first: size.segment_at(timeline, from),
            last: size.segment_at(timeline, Lsn::new(to.get() - 1)),
        })
    }
}

impl fmt::Display for SegmentRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "`{}`", self.first)
        } else {
            write!(f, "`{}` to `{}`", self.first, self.last)
        }
    }
}

/// WAL that is needed and not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", list_ranges(.segments))]
pub struct Missing {
    /// Ascending, never empty.
    pub segments: Vec<SegmentRange>,
}

/// How many ranges a message names before it only counts the rest: more would hide the message.
const RANGES_IN_MESSAGE: usize = 8;

/// `a`, `b` to `c` and 3 more.
pub fn list_ranges(ranges: &[SegmentRange]) -> String {
    let named: Vec<String> = ranges.iter().take(RANGES_IN_MESSAGE).map(ToString::to_string).collect();
    match ranges.len() - named.len() {
        0 => named.join(", "),
        more => format!("{} and {more} more ranges", named.join(", ")),
    }
}

/// Contiguous bytes [`start`, `end`) of one timeline; `start` is the start of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stretch {
    pub start: Lsn,
    pub end: Lsn,
}

/// The WAL of one site, by timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalCoverage {
    segment_size: SegmentSize,
    /// Stretches by start; they neither overlap nor touch.
    stretches: BTreeMap<TimelineId, BTreeMap<Lsn, Lsn>>,
    pieces: BTreeMap<SegmentName, Vec<Piece>>,
    impossible: u64,
}

/// Collects a listing into a [`WalCoverage`]. The order of names does not matter.
#[derive(Clone, Debug)]
pub struct WalCoverageBuilder {
    coverage: WalCoverage,
}

impl WalCoverageBuilder {
    pub const fn new(segment_size: SegmentSize) -> Self {
        Self {
            coverage: WalCoverage {
                segment_size,
                stretches: BTreeMap::new(),
                pieces: BTreeMap::new(),
                impossible: 0,
            },
        }
    }

    /// Adds a whole segment.
    pub fn segment(&mut self, segment: SegmentName) {
        match bounds(self.coverage.segment_size, segment) {
            Some(stretch) => self.add(segment.timeline(), stretch),
            None => self.coverage.impossible += 1,
        }
    }

    /// Adds a piece of a partial segment.
    pub fn piece(&mut self, segment: SegmentName, piece: Piece) {
        let size = self.coverage.segment_size;
        let fits = piece.start < piece.end && u64::from(piece.end) <= size.bytes();
        if fits && bounds(size, segment).is_some() {
            self.coverage.pieces.entry(segment).or_default().push(piece);
        } else {
            self.coverage.impossible += 1;
        }
    }

    pub fn finish(mut self) -> WalCoverage {
        let joined: Vec<_> = self
            .coverage
            .pieces
            .iter()
            .map(|(segment, pieces)| (*segment, join_pieces(pieces, 0).end))
            .filter(|(_, end)| *end > 0)
            .collect();
        for (segment, end) in joined {
            let start = self.coverage.segment_size.start(segment);
            self.add(segment.timeline(), Stretch { start, end: start.advance(end.into()) });
        }
        self.coverage
    }

    /// Joins `new` with the stretches that it overlaps or touches.
    fn add(&mut self, timeline: TimelineId, new: Stretch) {
        let stretches = self.coverage.stretches.entry(timeline).or_default();
        let Stretch { mut start, mut end } = new;
        // Stretches are disjoint, so ends ascend with starts: walk back from the last that begins in reach.
        while let Some((&other_start, &other_end)) = stretches.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            stretches.remove(&other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        stretches.insert(start, end);
    }
}

/// The bytes of `segment`, unless a cluster with segments of this size cannot have such a name.
fn bounds(size: SegmentSize, segment: SegmentName) -> Option<Stretch> {
    let start = size.admits(segment).then(|| size.start(segment))?;
    let end = Lsn::new(start.get().checked_add(size.bytes())?);
    Some(Stretch { start, end })
}

impl WalCoverage {
    pub const fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    /// Names in the listing that no cluster with this segment size has; they are not counted as WAL.
    pub const fn impossible_name_count(&self) -> u64 {
        self.impossible
    }

    /// The timelines of which there is any WAL, ascending.
    pub fn timelines(&self) -> impl DoubleEndedIterator<Item = TimelineId> {
        self.stretches.keys().copied()
    }

    /// What there is of `timeline`, ascending.
    pub fn stretches(&self, timeline: TimelineId) -> impl DoubleEndedIterator<Item = Stretch> {
        self.stretches
            .get(&timeline)
            .into_iter()
            .flat_map(|stretches| stretches.iter().map(|(&start, &end)| Stretch { start, end }))
    }

    /// The stretch that holds the byte at `lsn`.
    pub fn stretch_at(&self, timeline: TimelineId, lsn: Lsn) -> Option<Stretch> {
        let (&start, &end) = self.stretches.get(&timeline)?.range(..=lsn).next_back()?;
        (lsn < end).then_some(Stretch { start, end })
    }

    /// Whole segments of `timeline` that follow each other, ascending.
    pub fn ranges(&self, timeline: TimelineId) -> Vec<SegmentRange> {
        self.stretches(timeline)
            .filter_map(|stretch| {
                let whole = self.segment_size.floor(stretch.end);
                SegmentRange::holding(self.segment_size, timeline, stretch.start, whole)
            })
            .collect()
    }

    /// Segments missing between the first and the last of `timeline`, ascending; a segment that is only
    /// there in part is missing when others follow it.
    pub fn gaps(&self, timeline: TimelineId) -> Vec<SegmentRange> {
        let ends = self.stretches(timeline).map(|stretch| stretch.end);
        let starts = self.stretches(timeline).skip(1).map(|stretch| stretch.start);
        ends.zip(starts)
            .filter_map(|(end, start)| SegmentRange::holding(self.segment_size, timeline, end, start))
            .collect()
    }

    /// The byte after the last one of `timeline`, pieces included.
    pub fn end_of(&self, timeline: TimelineId) -> Option<Lsn> {
        self.stretches(timeline).next_back().map(|stretch| stretch.end)
    }

    /// Whether every byte of [`from`, `to`) on `timeline` is there; else the segments that are not.
    pub fn covers(&self, timeline: TimelineId, from: Lsn, to: Lsn) -> Result<(), Missing> {
        let mut segments = Vec::new();
        let mut next = from;
        while next < to {
            if let Some(stretch) = self.stretch_at(timeline, next) {
                next = stretch.end;
                continue;
            }
            let hole_end = self
                .stretches
                .get(&timeline)
                .and_then(|stretches| stretches.range(next..).next())
                .map_or(to, |(&start, _)| start.min(to));
            segments.extend(SegmentRange::holding(self.segment_size, timeline, next, hole_end));
            next = hole_end;
        }
        if segments.is_empty() { Ok(()) } else { Err(Missing { segments }) }
    }

    /// The pieces of `segment` as listed, not joined.
    pub fn pieces_of(&self, segment: SegmentName) -> &[Piece] {
        self.pieces.get(&segment).map_or(&[], Vec::as_slice)
    }

    /// How many segments of `timeline` there are whole, or in part from their start, below `before`.
    pub fn segment_count_below(&self, timeline: TimelineId, before: Lsn) -> u64 {
        self.stretches(timeline)
            .filter_map(|stretch| {
                SegmentRange::holding(self.segment_size, timeline, stretch.start, stretch.end.min(before))
            })
            .map(|range| range.count(self.segment_size))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;
    const T1: TimelineId = TimelineId::FIRST;

    fn segment(number: u64) -> SegmentName {
        SIZE.segment_at(T1, Lsn::new(number * SIZE.bytes()))
    }

    fn at(number: u64, offset: u64) -> Lsn {
        Lsn::new(number * SIZE.bytes() + offset)
    }

    fn coverage(segments: &[u64], pieces: &[(u64, u32, u32)]) -> WalCoverage {
        let mut builder = WalCoverageBuilder::new(SIZE);
        for &number in segments {
            builder.segment(segment(number));
        }
        for &(number, start, end) in pieces {
            builder.piece(segment(number), Piece { start, end });
        }
        builder.finish()
    }

    fn range(first: u64, last: u64) -> SegmentRange {
        SegmentRange { first: segment(first), last: segment(last) }
    }

    #[test]
    fn whole_segments_form_ranges_with_gaps_between() {
        let coverage = coverage(&[1, 2, 3, 6, 255, 256], &[]);
        assert_eq!(coverage.ranges(T1), [range(1, 3), range(6, 6), range(255, 256)]);
        assert_eq!(coverage.gaps(T1), [range(4, 5), range(7, 254)]);
        assert_eq!(coverage.end_of(T1), Some(at(257, 0)));
        assert_eq!(coverage.end_of(TimelineId::new(2).unwrap()), None);
        assert_eq!(range(7, 254).count(SIZE), 248);
    }

    #[test]
    fn pieces_extend_the_archive_as_far_as_they_join() {
        let coverage = coverage(&[1], &[(2, 0, 100), (2, 100, 300), (2, 400, 500)]);
        assert_eq!(coverage.end_of(T1), Some(at(2, 300)));
        assert_eq!(coverage.ranges(T1), [range(1, 1)]);
        assert!(coverage.gaps(T1).is_empty());
        assert_eq!(coverage.pieces_of(segment(2)).len(), 3);
        assert_eq!(coverage.covers(T1, at(1, 7), at(2, 300)), Ok(()));
        assert_eq!(coverage.covers(T1, at(1, 7), at(2, 301)), Err(Missing { segments: vec![range(2, 2)] }));
    }

    #[test]
    fn pieces_that_fill_their_segment_count_as_whole() {
        let all = u32::try_from(SIZE.bytes()).unwrap();
        let coverage = coverage(&[1], &[(2, 0, all), (3, 0, 10)]);
        assert_eq!(coverage.ranges(T1), [range(1, 2)]);
        assert_eq!(coverage.end_of(T1), Some(at(3, 10)));
    }

    #[test]
    fn a_part_followed_by_a_whole_segment_is_a_gap() {
        let coverage = coverage(&[1, 3], &[(2, 0, 10)]);
        assert_eq!(coverage.gaps(T1), [range(2, 2)]);
    }

    #[test]
    fn names_every_missing_stretch() {
        let coverage = coverage(&[2, 5], &[]);
        assert_eq!(
            coverage.covers(T1, at(1, 5), at(8, 1)).unwrap_err().segments,
            [range(1, 1), range(3, 4), range(6, 8)]
        );
        assert_eq!(coverage.covers(T1, at(9, 0), at(9, 0)), Ok(()));
    }

    #[test]
    fn impossible_names_are_counted_and_skipped() {
        let mut builder = WalCoverageBuilder::new(SIZE);
        builder.segment("0000000100000000FFFFFFFF".parse().unwrap());
        builder.segment("00000001FFFFFFFF000000FF".parse().unwrap());
        builder.piece(segment(1), Piece { start: 0, end: u32::MAX });
        builder.piece(segment(1), Piece { start: 5, end: 5 });
        let coverage = builder.finish();
        assert_eq!(coverage.impossible_name_count(), 4);
        assert_eq!(coverage.timelines().count(), 0);
    }

    #[test]
    fn a_long_list_of_ranges_is_cut_short() {
        let ranges: Vec<_> = (0..20).map(|number| range(number * 2, number * 2)).collect();
        assert!(list_ranges(&ranges).ends_with("`00000001000000000000000E` and 12 more ranges"));
    }

    #[test]
    fn counts_segments_below_a_position() {
        let coverage = coverage(&[1, 2, 5, 6], &[(7, 0, 9)]);
        assert_eq!(coverage.segment_count_below(T1, at(6, 0)), 3);
        assert_eq!(coverage.segment_count_below(T1, at(99, 0)), 5);
    }

    proptest! {
        /// Against a set of segment numbers, in any order and with repetitions.
        #[test]
        fn coverage_agrees_with_a_set(
            numbers in proptest::collection::vec(0_u64..40, 0..60), from in 0_u64..40, length in 0_u64..20
        ) {
            let set: std::collections::BTreeSet<u64> = numbers.iter().copied().collect();
            let coverage = coverage(&numbers, &[]);
            let listed: Vec<u64> = coverage
                .ranges(T1)
                .iter()
                .flat_map(|range| SIZE.start(range.first).get() / SIZE.bytes()
                    ..=SIZE.start(range.last).get() / SIZE.bytes())
                .collect();
            prop_assert_eq!(listed, set.iter().copied().collect::<Vec<_>>());
            let missing = (from..from + length).filter(|number| !set.contains(number)).count() as u64;
            let named: u64 = match coverage.covers(T1, at(from, 0), at(from + length, 0)) {
                Ok(()) => 0,
                Err(missing) => missing.segments.iter().map(|range| range.count(SIZE)).sum(),
            };
            prop_assert_eq!(named, missing);
            let inner = set.first().map_or(0, |first| set.last().unwrap() - first + 1 - set.len() as u64);
            prop_assert_eq!(coverage.gaps(T1).iter().map(|range| range.count(SIZE)).sum::<u64>(), inner);
            prop_assert_eq!(coverage.segment_count_below(T1, at(100, 0)), set.len() as u64);
        }
    }
}
