//! Wall-clock time as a seam. Monotonic time is tokio's, which tests pause.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};

/// Tells the time of day.
pub trait Clock: fmt::Debug + Send + Sync {
    fn now(&self) -> Timestamp;
}

/// The host's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that asks the host's clock")]
    fn now(&self) -> Timestamp {
        // Milliseconds: what is finer means nothing between machines, and reads badly.
        Timestamp::from_millisecond(Timestamp::now().as_millisecond()).expect("rounding keeps it in range")
    }
}

/// A clock that stands still until it is moved. Clones show the same time.
#[derive(Debug, Clone)]
pub struct ManualClock(Arc<Mutex<Timestamp>>);

impl ManualClock {
    pub fn at(time: Timestamp) -> Self {
        Self(Arc::new(Mutex::new(time)))
    }

    pub fn set(&self, time: Timestamp) {
        // A timestamp is whole at any moment, so a panic elsewhere cannot have left half of one.
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = time;
    }

    /// Moves the clock, backwards too; it stops at the ends of what a timestamp can hold.
    pub fn advance(&self, by: SignedDuration) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now = now.saturating_add(by).unwrap_or(*now);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told_and_for_all_its_clones() {
        let clock = ManualClock::at(Timestamp::UNIX_EPOCH);
        let seen: &dyn Clock = &clock.clone();
        assert_eq!(seen.now(), Timestamp::UNIX_EPOCH);
        clock.advance(SignedDuration::from_hours(24));
        assert_eq!(seen.now(), "1970-01-02T00:00:00Z".parse().unwrap());
        clock.set("2026-01-01T00:00:00Z".parse().unwrap());
        assert_eq!(seen.now(), "2026-01-01T00:00:00Z".parse().unwrap());
    }
}
