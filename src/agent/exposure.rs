//! How old the oldest WAL is that storage does not have: what a recovery would lose if the server were gone
//! now. Pure.

use std::collections::VecDeque;

use jiff::Timestamp;

use crate::postgres::Lsn;

/// Marks kept: with one a second at first, and thinned out when full, they reach back for as long as need
/// be at a precision of a hundredth.
const MOST_MARKS: usize = 256;

/// When the server was seen at which position, as far as storage has not got there.
#[derive(Clone, Debug, Default)]
pub struct Exposure {
    marks: VecDeque<(Timestamp, Lsn)>,
    /// When all was last known to be stored.
    safe: Option<Timestamp>,
}

impl Exposure {
    /// Notes how things stand at `now`. `server` is `None` while nothing is heard of the server: it may write
    /// all the same.
    pub fn note(&mut self, now: Timestamp, server: Option<Lsn>, stored: Lsn) {
        while self.marks.front().is_some_and(|(_, position)| *position <= stored) {
            self.marks.pop_front();
        }
        let Some(server) = server else { return };
        if server <= stored {
            self.safe = Some(now);
            return;
        }
        if self.marks.back().is_none_or(|(_, position)| *position < server) {
            self.marks.push_back((now, server));
        }
        if self.marks.len() > MOST_MARKS {
            let mut number = 0;
            self.marks.retain(|_| {
                number += 1;
                number % 2 == 1
            });
        }
    }

    /// Seconds; 0 while everything is stored and the server is heard of.
    pub fn seconds(&self, now: Timestamp, connected: bool) -> f64 {
        let oldest = self.marks.front().map(|(seen, _)| *seen);
        // Nobody knows what a server writes that is not heard of.
        let unheard = if connected { None } else { self.safe };
        let since = oldest.into_iter().chain(unheard).min();
        since.map_or(0.0, |since| now.duration_since(since).as_secs_f64().max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn age(exposure: &Exposure, second: i64, connected: bool) -> u32 {
        // Whole seconds go in, so whole seconds come out.
        format!("{:.0}", exposure.seconds(at(second), connected)).parse().unwrap()
    }

    #[test]
    fn the_age_is_that_of_the_oldest_position_not_stored() {
        let mut exposure = Exposure::default();
        exposure.note(at(0), Some(Lsn::new(10)), Lsn::new(10));
        assert_eq!(age(&exposure, 0, true), 0);
        exposure.note(at(1), Some(Lsn::new(20)), Lsn::new(10));
        exposure.note(at(2), Some(Lsn::new(30)), Lsn::new(10));
        assert_eq!(age(&exposure, 5, true), 4);
        exposure.note(at(5), Some(Lsn::new(30)), Lsn::new(20));
        assert_eq!(age(&exposure, 5, true), 3);
        exposure.note(at(6), Some(Lsn::new(30)), Lsn::new(30));
        assert_eq!(age(&exposure, 6, true), 0);
    }

    #[test]
    fn a_server_that_is_not_heard_of_may_write() {
        let mut exposure = Exposure::default();
        exposure.note(at(10), Some(Lsn::new(10)), Lsn::new(10));
        exposure.note(at(20), None, Lsn::new(10));
        assert_eq!(age(&exposure, 20, false), 10);
    }

    #[test]
    fn a_long_outage_keeps_its_beginning_in_bounded_memory() {
        let mut exposure = Exposure::default();
        for second in 1..5_000_i64 {
            exposure.note(at(second), Some(Lsn::new(u64::try_from(second).unwrap() * 10)), Lsn::new(5));
        }
        assert!(exposure.marks.len() <= MOST_MARKS);
        assert_eq!(age(&exposure, 5_000, true), 4_999);
    }
}
