//! How far everything is stored.
//!
//! Pure. Uploads finish in any order; PostgreSQL may only be told of a position below which nothing is
//! missing. The ledger folds the ranges that receipts speak for into that one position.

use std::collections::BTreeMap;

use crate::postgres::Lsn;

/// Folds stored ranges into the position below which everything is stored.
#[derive(Debug)]
pub struct StoredLedger {
    stored: Lsn,
    /// Ranges stored beyond a hole, start → end; none touches `stored`.
    ahead: BTreeMap<Lsn, Lsn>,
}

impl StoredLedger {
    /// Everything below `stored` counts as stored already.
    pub const fn new(stored: Lsn) -> Self {
        Self { stored, ahead: BTreeMap::new() }
    }

    /// The stored LSN: every byte below it is in the repository.
    pub const fn stored(&self) -> Lsn {
        self.stored
    }

    /// Takes note that [`start`, `end`) is stored.
    pub fn record(&mut self, start: Lsn, end: Lsn) {
        let longest = self.ahead.entry(start).or_insert(end);
        *longest = end.max(*longest);
        while let Some(entry) = self.ahead.first_entry()
            && *entry.key() <= self.stored
        {
            self.stored = self.stored.max(entry.remove());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_runs_past_a_hole(mut ranges in prop::collection::vec((0_usize..60, 1_usize..8), 0..40)) {
            let mut ledger = StoredLedger::new(Lsn::new(5));
            let mut stored = [false; 80];
            stored[..5].fill(true);
            for (start, length) in ranges.drain(..) {
                ledger.record(Lsn::new(start as u64), Lsn::new((start + length) as u64));
                stored[start..start + length].fill(true);
                let first_hole = stored.iter().position(|byte| !byte).unwrap() as u64;
                prop_assert_eq!(ledger.stored(), Lsn::new(first_hole));
            }
        }
    }
}
