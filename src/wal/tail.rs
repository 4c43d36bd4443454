//! The pieces of the unfinished segment.
//!
//! Pure. Every flush stores the newest bytes of the unfinished segment as a piece. A new piece swallows
//! those before it that are no larger than itself, so the sizes fall off geometrically: a segment keeps
//! about as many pieces as its length has doublings, and each byte is stored as often at most.

use crate::catalog::{Piece, join_pieces};

/// The pieces of one segment that are stored and needed, without hole from the segment's start.
#[derive(Debug, Default)]
pub struct Tail {
    pieces: Vec<Piece>,
}

impl Tail {
    /// Takes over what an earlier run left: overlapping pieces are fine, what lies beyond a hole is not
    /// counted as stored.
    pub fn resume(found: &[Piece]) -> Self {
        Self { pieces: join_pieces(found, 0).steps.into_iter().map(|step| step.piece).collect() }
    }

    /// Up to where the segment's bytes are stored.
    pub fn end(&self) -> u32 {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    /// The piece to store so that everything up to `received` is stored, if anything is missing.
    /// `available` is the first byte still at hand: a piece cannot begin before it.
    pub fn next_piece(&self, received: u32, available: u32) -> Option<Piece> {
        if received <= self.end() {
            return None;
        }
        let mut piece = Piece { start: self.end(), end: received };
        for earlier in self.pieces.iter().rev() {
            if earlier.length() > piece.length() || earlier.start < available {
                break;
            }
            piece.start = earlier.start;
        }
        Some(piece)
    }

    /// Takes note that `piece` is stored; returns the pieces it makes superfluous.
    pub fn stored(&mut self, piece: Piece) -> Vec<Piece> {
        let keep = self.pieces.partition_point(|earlier| earlier.start < piece.start);
        let swallowed = self.pieces.split_off(keep);
        self.pieces.push(piece);
        swallowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_stay_few_and_without_a_hole(
            steps in prop::collection::vec(1_u32..40_000, 1..300),
            window in prop_oneof![Just(u32::MAX), 1_u32..2_000_000],
        ) {
            let mut tail = Tail::default();
            let (mut received, mut written) = (0_u32, 0_u64);
            for step in steps {
                received += step;
                let available = received.saturating_sub(window.max(step));
                let piece = tail.next_piece(received, available).unwrap();
                prop_assert!(piece.start >= available.min(tail.end()));
                written += u64::from(piece.length());
                tail.stored(piece);
                prop_assert_eq!(tail.next_piece(received, available), None);
                prop_assert_eq!(Tail::resume(&tail.pieces).end(), received);
            }
            if window == u32::MAX {
                let doublings = u64::from(received.ilog2()) + 1;
                prop_assert!(tail.pieces.len() as u64 <= doublings, "{} pieces", tail.pieces.len());
                prop_assert!(written <= u64::from(received) * (doublings + 1));
            }
        }
    }

    #[test]
    fn resumes_up_to_the_first_hole() {
        let piece = |start, end| Piece { start, end };
        let tail = Tail::resume(&[piece(30, 40), piece(0, 10), piece(5, 20), piece(0, 12)]);
        assert_eq!(tail.end(), 20);
        assert_eq!(Tail::resume(&[piece(1, 10)]).end(), 0);
    }
}
