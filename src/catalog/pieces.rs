//! The pieces of an unfinished segment, and how they join.
//!
//! Pure. Pieces may overlap, because small ones are merged into larger ones that are stored before the
//! small ones go. What lies beyond a hole is not used: recovery must end at the hole.

use std::collections::VecDeque;

/// A stored piece: bytes [`start`, `end`) of its segment, counted from the segment's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Piece {
    pub start: u32,
    pub end: u32,
}

impl Piece {
    pub const fn length(self) -> u32 {
        self.end.saturating_sub(self.start)
    }
}

/// Read `piece` and leave out its first `skip` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub piece: Piece,
    pub skip: u32,
}

/// How to read on from an offset, in as few pieces as possible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    pub steps: VecDeque<Step>,
    /// Where the bytes joined end.
    pub end: u32,
    /// Whether there are pieces beyond `end`, behind a hole.
    pub hole: bool,
}

/// Joins `pieces` from offset `from` as far as there is no hole.
pub fn join_pieces(pieces: &[Piece], from: u32) -> Join {
    let mut pieces = pieces.to_vec();
    pieces.sort_unstable();
    let mut steps = VecDeque::new();
    let mut end = from;
    let mut rest = pieces.as_slice();
    loop {
        let reachable = rest.partition_point(|piece| piece.start <= end);
        let Some(best) =
            rest[..reachable].iter().max_by_key(|piece| piece.end).filter(|piece| piece.end > end)
        else {
            return Join { steps, end, hole: reachable < rest.len() };
        };
        steps.push_back(Step { piece: *best, skip: end - best.start });
        end = best.end;
        rest = &rest[reachable..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces(pairs: &[(u32, u32)]) -> Vec<Piece> {
        pairs.iter().map(|&(start, end)| Piece { start, end }).collect()
    }

    #[test]
    fn prefers_a_merged_piece_to_the_small_ones_within_it() {
        let joined = join_pieces(&pieces(&[(0, 10), (10, 20), (0, 20), (20, 25)]), 0);
        let steps: Vec<_> =
            joined.steps.iter().map(|step| (step.piece.start, step.piece.end, step.skip)).collect();
        assert_eq!(steps, [(0, 20, 0), (20, 25, 0)]);
        assert_eq!((joined.end, joined.hole), (25, false));
    }

    #[test]
    fn stops_at_a_hole_and_says_so() {
        let joined = join_pieces(&pieces(&[(0, 10), (11, 20)]), 0);
        assert_eq!((joined.end, joined.hole, joined.steps.len()), (10, true, 1));
        let joined = join_pieces(&pieces(&[(5, 10)]), 0);
        assert_eq!((joined.end, joined.hole, joined.steps.len()), (0, true, 0));
        assert_eq!(join_pieces(&[], 7), Join { steps: VecDeque::new(), end: 7, hole: false });
    }

    proptest! {
        #[test]
        fn covers_what_a_bitmap_covers(
            pairs in prop::collection::vec((0_u32..60, 1_u32..30), 0..12),
            from in 0_u32..40,
        ) {
            let pieces: Vec<Piece> =
                pairs.iter().map(|&(start, length)| Piece { start, end: start + length }).collect();
            let covered = |at: u32| pieces.iter().any(|piece| piece.start <= at && at < piece.end);
            let end = (from..=u32::MAX).find(|&at| !covered(at)).unwrap();
            let joined = join_pieces(&pieces, from);
            prop_assert_eq!(joined.end, end);
            prop_assert_eq!(joined.hole, (end..100).any(covered));
            let mut at = from;
            for step in &joined.steps {
                prop_assert!(pieces.contains(&step.piece));
                prop_assert_eq!(step.piece.start + step.skip, at);
                prop_assert!(step.piece.end > at, "every step brings something");
                at = step.piece.end;
            }
            prop_assert_eq!(at, end);
        }
    }
}
