//! How long to wait before trying again. Pure: the seed of the jitter is an argument.
//!
//! Full jitter (a uniform draw from nothing up to the ceiling) rather than a fixed delay, so that
//! many agents which lost the same storage at the same moment do not return to it at the same moment.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// How often and how long to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Ceiling of the first delay; it doubles each time.
    pub first: Duration,
    /// The ceiling never grows above this.
    pub max: Duration,
    /// Stop when this long has passed since the first try; `None` tries for ever.
    pub give_up_after: Option<Duration>,
}

impl RetryPolicy {
    /// For work that must succeed some day: from 100 ms to 15 s, for ever.
    pub const PERSISTENT: Self =
        Self { first: Duration::from_millis(100), max: Duration::from_secs(15), give_up_after: None };

    /// For a command that somebody waits for: the same delays, one minute in all.
    pub const INTERACTIVE: Self = Self { give_up_after: Some(Duration::from_mins(1)), ..Self::PERSISTENT };
}

/// The delays of one series of tries; never ends.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    ceiling: Duration,
    max: Duration,
    jitter: SmallRng,
}

impl Backoff {
    pub fn new(policy: &RetryPolicy, seed: u64) -> Self {
        let ceiling = policy.first.min(policy.max);
        Self { first: ceiling, ceiling, max: policy.max, jitter: SmallRng::seed_from_u64(seed) }
    }

    /// Starts again from the shortest delay, after something has worked.
    pub fn reset(&mut self) {
        self.ceiling = self.first;
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let delay = self.jitter.random_range(Duration::ZERO..=self.ceiling);
        self.ceiling = self.ceiling.saturating_mul(2).min(self.max);
        Some(delay)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ceilings_double_and_stop_at_the_maximum() {
        let policy =
            RetryPolicy { first: Duration::from_secs(1), max: Duration::from_secs(5), give_up_after: None };
        let mut backoff = Backoff::new(&policy, 7);
        let mut ceilings = Vec::new();
        for _ in 0..5 {
            ceilings.push(backoff.ceiling.as_secs());
            backoff.next();
        }
        assert_eq!(ceilings, [1, 2, 4, 5, 5]);
        backoff.reset();
        assert_eq!(backoff.ceiling, Duration::from_secs(1));
    }

    proptest! {
        #[test]
        fn no_delay_is_above_its_ceiling(first in 0u64..100_000, max in 0u64..100_000, seed: u64) {
            let policy = RetryPolicy {
                first: Duration::from_millis(first),
                max: Duration::from_millis(max),
                give_up_after: None,
            };
            let mut ceiling = policy.first.min(policy.max);
            for delay in Backoff::new(&policy, seed).take(40) {
                prop_assert!(delay <= ceiling, "{delay:?} > {ceiling:?}");
                ceiling = (ceiling * 2).min(policy.max);
            }
        }

        #[test]
        fn the_jitter_spreads_over_the_whole_range(seed: u64) {
            let policy = RetryPolicy { first: Duration::from_secs(1), max: Duration::from_secs(1), give_up_after: None };
            let delays: Vec<_> = Backoff::new(&policy, seed).take(200).collect();
            prop_assert!(delays.iter().any(|d| *d < Duration::from_millis(250)));
            prop_assert!(delays.iter().any(|d| *d > Duration::from_millis(750)));
        }
    }
}
