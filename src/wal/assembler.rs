//! Turns a stream of `XLogData` into whole WAL segments.
//!
//! Pure. The receiver feeds it what arrives and carries out the steps. A segment is announced as closed
//! only after its last byte, because closing is what in the end permits PostgreSQL to recycle it.

use bytes::{Bytes, BytesMut};

use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineId};

/// Bytes are gathered into pages of this size, so that a trickle of tiny messages does not become a
/// trickle of tiny allocations. Also what the assembler itself may hold outside any memory budget.
pub const PAGE_SIZE: usize = 256 << 10;

/// From this size on a message is handed on as it is, without a copy into a page. The server sends up to
/// 128 KiB at a time when it has that much.
const LARGE_MESSAGE: usize = 64 << 10;

/// Consecutive WAL of one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub start: Lsn,
    pub bytes: Bytes,
}

impl Chunk {
    pub fn end(&self) -> Lsn {
        self.start.advance(self.bytes.len() as u64)
    }
}

/// What to do next with the segment at hand, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Open(SegmentName),
    Append(Chunk),
    /// Every byte of the segment has been appended.
    Close(SegmentName),
}

/// The server sent WAL that does not follow what it sent before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected WAL from {expected}, got {got}")]
pub struct StreamGap {
    pub expected: Lsn,
    pub got: Lsn,
}

/// Folds `XLogData` into steps; one for each run of one timeline.
#[derive(Debug)]
pub struct SegmentAssembler {
    timeline: TimelineId,
    size: SegmentSize,
    received: Lsn,
    page: BytesMut,
    open: bool,
}

impl SegmentAssembler {
    /// Begins at `start`, which must be the start of a segment: a file that lacks its first page
    /// cannot be checked by anyone later.
    ///
    /// # Panics
    /// When `start` lies within a segment.
    pub fn new(timeline: TimelineId, size: SegmentSize, start: Lsn) -> Self {
        assert_eq!(size.offset(start), 0, "streaming starts at a segment start");
        Self { timeline, size, received: start, page: BytesMut::new(), open: false }
    }

    /// The position after the last byte taken in.
    pub const fn received(&self) -> Lsn {
        self.received
    }

    /// The segment that the next byte belongs to.
    pub const fn segment(&self) -> SegmentName {
        self.size.segment_at(self.timeline, self.received)
    }

    /// Takes one message in. A message may cross the end of a segment.
    pub fn push(&mut self, start: Lsn, mut data: Bytes, steps: &mut Vec<Step>) -> Result<(), StreamGap> {
        if start != self.received {
            return Err(StreamGap { expected: self.received, got: start });
        }
        while !data.is_empty() {
            if !self.open {
                self.open = true;
                steps.push(Step::Open(self.segment()));
            }
            let segment = self.segment();
            let left = self.size.end(segment).bytes_since(self.received);
            let to_end = usize::try_from(left).unwrap_or(usize::MAX);
            let take = if data.len() >= LARGE_MESSAGE {
                steps.extend(self.flush().map(Step::Append));
                let bytes = data.split_to(data.len().min(to_end));
                let taken = bytes.len();
                steps.push(Step::Append(Chunk { start: self.received, bytes }));
                taken
            } else {
                if self.page.capacity() == self.page.len() {
                    steps.extend(self.flush().map(Step::Append));
                    self.page = BytesMut::with_capacity(to_end.min(PAGE_SIZE));
                }
                let room = self.page.capacity() - self.page.len();
                let bytes = data.split_to(room.min(data.len()).min(to_end));
                self.page.extend_from_slice(&bytes);
                bytes.len()
            };
            self.received = self.received.advance(take as u64);
            if take as u64 == left {
                steps.extend(self.flush().map(Step::Append));
                steps.push(Step::Close(segment));
                self.page = BytesMut::new();
                self.open = false;
            }
        }
        Ok(())
    }

    /// Hands out what was gathered and not yet appended, without waiting for a full page.
    pub fn flush(&mut self) -> Option<Chunk> {
        let bytes = self.page.split().freeze();
        let start = Lsn::new(self.received.get() - bytes.len() as u64);
        (!bytes.is_empty()).then_some(Chunk { start, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size() -> SegmentSize {
        SegmentSize::try_from(1 << 20).unwrap()
    }

    /// What the steps say was stored, checked for order and contiguity on the way.
    fn replay(start: Lsn, steps: &[Step]) -> (Vec<u8>, usize) {
        let (mut bytes, mut closed, mut at, mut open) = (Vec::new(), 0, start, None);
        for step in steps {
            match step {
                Step::Open(segment) => {
                    assert_eq!(open.replace(*segment), None);
                    assert_eq!(size().start(*segment), at);
                }
                Step::Append(chunk) => {
                    assert!(open.is_some());
                    assert_eq!(chunk.start, at);
                    at = chunk.end();
                    bytes.extend_from_slice(&chunk.bytes);
                }
                Step::Close(segment) => {
                    assert_eq!(open.take(), Some(*segment));
                    assert_eq!(size().end(*segment), at);
                    closed += 1;
                }
            }
        }
        (bytes, closed)
    }

    #[test]
    fn refuses_a_hole_and_a_repetition() {
        let mut assembler = SegmentAssembler::new(TimelineId::FIRST, size(), Lsn::ZERO);
        let mut steps = Vec::new();
        assembler.push(Lsn::ZERO, Bytes::from_static(&[1; 10]), &mut steps).unwrap();
        for got in [Lsn::new(9), Lsn::new(11)] {
            let gap = StreamGap { expected: Lsn::new(10), got };
            assert_eq!(assembler.push(got, Bytes::from_static(&[1]), &mut steps), Err(gap));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn segments_are_the_stream_however_it_was_cut(
            first in 0_u64..5,
            cuts in prop::collection::vec((1_usize..400_000, any::<bool>()), 1..20),
        ) {
            let start = Lsn::new(first << 20);
            let mut assembler = SegmentAssembler::new(TimelineId::FIRST, size(), start);
            let (mut steps, mut sent) = (Vec::new(), Vec::new());
            for (length, flush) in cuts {
                let message: Vec<u8> = (1..=u8::MAX).cycle().skip(sent.len() % 251).take(length).collect();
                sent.extend_from_slice(&message);
                assembler.push(assembler.received(), message.into(), &mut steps).unwrap();
                if flush {
                    steps.extend(assembler.flush().map(Step::Append));
                }
            }
            prop_assert_eq!(assembler.received(), start.advance(sent.len() as u64));
            steps.extend(assembler.flush().map(Step::Append));
            let (bytes, closed) = replay(start, &steps);
            prop_assert_eq!(closed, sent.len() >> 20);
            prop_assert!(bytes == sent);
        }
    }
}
