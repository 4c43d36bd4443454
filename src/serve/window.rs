//! Which segments to fetch ahead of a recovery.
//!
//! Pure. Recovery reads segments in order, so the ones after the last that was asked for come next: at most
//! `depth` of them, on the same timeline, until one does not exist. A reader that goes backwards
//! (`pg_rewind`) gets nothing fetched ahead.

use std::collections::BTreeSet;

use crate::postgres::{SegmentName, SegmentSize};

/// What has been fetched ahead, what is under way, and what comes next.
#[derive(Debug)]
pub struct Window {
    size: SegmentSize,
    depth: usize,
    asked: Option<SegmentName>,
    /// To be fetched next; none when there is no telling, or nothing more.
    next: Option<SegmentName>,
    under_way: BTreeSet<SegmentName>,
    ready: BTreeSet<SegmentName>,
}

impl Window {
    pub const fn new(size: SegmentSize, depth: usize) -> Self {
        Self { size, depth, asked: None, next: None, under_way: BTreeSet::new(), ready: BTreeSet::new() }
    }

    /// `segment` was asked for and is there. Returns what lies ready and will not be asked for.
    pub fn asked(&mut self, segment: SegmentName) -> Vec<SegmentName> {
        let backwards =
            self.asked.is_some_and(|last| last.timeline() == segment.timeline() && segment < last);
        self.asked = Some(segment);
        let follows = self.size.next(segment);
        let until = self
            .next
            .or_else(|| self.under_way.iter().chain(&self.ready).max().map(|last| self.size.next(*last)));
        let on_its_way = !backwards
            && until.is_some_and(|until| until.timeline() == segment.timeline() && follows <= until)
            && !(self.ready.is_empty() && self.under_way.is_empty());
        if !on_its_way {
            // The first question, one from elsewhere, or one past an end that may have moved since.
            self.next = (!backwards).then_some(follows);
        }
        let useless = |ready: &SegmentName| !on_its_way || *ready <= segment;
        let dropped: Vec<SegmentName> = self.ready.iter().copied().filter(useless).collect();
        for segment in &dropped {
            self.ready.remove(segment);
        }
        dropped
    }

    /// The next segment to fetch, from now on under way.
    pub fn start_next(&mut self) -> Option<SegmentName> {
        if self.ready.len() + self.under_way.len() >= self.depth {
            return None;
        }
        let next = self.next?;
        self.next = Some(self.size.next(next));
        self.under_way.insert(next);
        Some(next)
    }

    /// `segment` lies ready now.
    pub fn fetched(&mut self, segment: SegmentName) {
        self.under_way.remove(&segment);
        self.ready.insert(segment);
    }

    /// `segment` cannot be had; neither can what follows, until somebody asks again.
    pub fn missing(&mut self, segment: SegmentName) {
        self.under_way.remove(&segment);
        self.next = None;
    }

    /// A client has taken `segment`.
    pub fn taken(&mut self, segment: SegmentName) {
        self.ready.remove(&segment);
    }

    pub const fn ready(&self) -> &BTreeSet<SegmentName> {
        &self.ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Lsn, TimelineId};
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn segment(number: u64) -> SegmentName {
        SIZE.segment_at(TimelineId::FIRST, Lsn::new(number * SIZE.bytes()))
    }

    fn start_all(window: &mut Window) -> Vec<SegmentName> {
        std::iter::from_fn(|| window.start_next()).collect()
    }

    #[test]
    fn keeps_a_few_segments_ahead_of_a_reader() {
        let mut window = Window::new(SIZE, 3);
        assert_eq!(start_all(&mut window), []);
        assert_eq!(window.asked(segment(254)), []);
        // The segment after FF is in the next log file.
        assert_eq!(start_all(&mut window), [segment(255), segment(256), segment(257)]);
        assert_eq!(segment(256).to_string(), "000000010000000100000000");
        for number in 255..258 {
            window.fetched(segment(number));
        }
        assert_eq!(start_all(&mut window), []);
        window.taken(segment(255));
        assert_eq!(start_all(&mut window), [segment(258)]);
        // Asked through the server, 256 has been taken; 255, had it still been there, would be useless.
        assert_eq!(window.asked(segment(256)), [segment(256)]);
        assert_eq!(start_all(&mut window), [segment(259)]);
    }

    #[test]
    fn stops_where_the_archive_ends_and_begins_again_when_asked() {
        let mut window = Window::new(SIZE, 2);
        window.asked(segment(1));
        assert_eq!(start_all(&mut window), [segment(2), segment(3)]);
        window.missing(segment(3));
        window.fetched(segment(2));
        assert_eq!(start_all(&mut window), []);
        window.taken(segment(2));
        assert_eq!(start_all(&mut window), []);
        assert_eq!(window.asked(segment(3)), []);
        assert_eq!(start_all(&mut window), [segment(4), segment(5)]);
    }

    #[test]
    fn a_reader_that_jumps_leaves_nothing_behind() {
        let mut window = Window::new(SIZE, 2);
        window.asked(segment(1));
        for segment in start_all(&mut window) {
            window.fetched(segment);
        }
        assert_eq!(window.asked(segment(7)), [segment(2), segment(3)]);
        assert_eq!(start_all(&mut window), [segment(8), segment(9)]);
        window.fetched(segment(8));
        window.fetched(segment(9));
        assert_eq!(window.asked(segment(6)), [segment(8), segment(9)], "backwards");
        assert_eq!(start_all(&mut window), []);
        let child = segment(7).on(TimelineId::new(2).unwrap());
        assert_eq!(window.asked(child), []);
        assert_eq!(start_all(&mut window)[0].timeline(), child.timeline());
    }

    proptest! {
        #[test]
        fn never_more_than_its_depth_and_never_what_was_asked_for(
            steps in prop::collection::vec((0_u8..4, 0_u64..20), 0..80), depth in 0_usize..5,
        ) {
            let mut window = Window::new(SIZE, depth);
            let mut flying: Vec<SegmentName> = Vec::new();
            for (what, number) in steps {
                match what {
                    0 => {
                        window.asked(segment(number));
                        prop_assert!(!window.ready().iter().any(|ready| *ready <= segment(number)));
                    }
                    1 => flying.extend(window.start_next()),
                    2 => if let Some(segment) = flying.pop() { window.fetched(segment) },
                    _ => if let Some(segment) = flying.pop() { window.missing(segment) },
                }
                prop_assert!(window.ready().len() + flying.len() <= depth);
            }
        }
    }
}
