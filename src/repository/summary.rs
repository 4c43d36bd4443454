//! What a host without the private key has to know of encrypted WAL, kept in the object's metadata.
//!
//! Pure. Whose WAL it is and how large its segments are: the long header at the start of a segment. Where
//! timelines fork: the positions of a history file, without the reasons in it. Listing, pruning and
//! archiving need no more, and neither tells anything of the cluster's data.

use std::fmt::Write as _;

use super::name::ObjectName;
use crate::postgres::{LONG_HEADER_BYTES, TimelineHistory, WalFileName};

/// Stores take about 2 KiB of metadata for an object; more than this is left out.
const LIMIT: usize = 1024;

/// The summary of an object that begins with `first`; of a history file that must be all of it.
pub(super) fn of(name: ObjectName, first: &[u8]) -> Option<String> {
    let summary = match name {
        ObjectName::Wal(WalFileName::History(timeline)) => {
            let history = TimelineHistory::parse(timeline, first).ok()?;
            let forks: Vec<_> = history
                .ancestors()
                .iter()
                .map(|ancestor| format!("{}:{}", ancestor.timeline.get(), ancestor.end))
                .collect();
            forks.join(",")
        }
        _ if begins_a_segment(name) => {
            first.get(..LONG_HEADER_BYTES)?.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            })
        }
        _ => return None,
    };
    Some(summary).filter(|summary| !summary.is_empty() && summary.len() <= LIMIT)
}

/// Bytes that a reader of the beginning understands as it does the real ones.
pub(super) fn outline(name: ObjectName, summary: &str) -> Option<Vec<u8>> {
    if let ObjectName::Wal(WalFileName::History(_)) = name {
        let mut text = String::new();
        for fork in summary.split(',') {
            let (timeline, end) = fork.split_once(':')?;
            let _ = writeln!(text, "{timeline}\t{end}\tencrypted");
        }
        return Some(text.into_bytes());
    }
    if !begins_a_segment(name) || summary.len() != LONG_HEADER_BYTES * 2 || !summary.is_ascii() {
        return None;
    }
    (0..LONG_HEADER_BYTES).map(|at| u8::from_str_radix(&summary[at * 2..at * 2 + 2], 16).ok()).collect()
}

const fn begins_a_segment(name: ObjectName) -> bool {
    matches!(
        name,
        ObjectName::Wal(WalFileName::Segment(_) | WalFileName::Partial(_))
            | ObjectName::Piece { start: 0, .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::TimelineId;
    use proptest::prelude::*;

    #[test]
    fn a_history_keeps_its_forks_and_loses_its_reasons() {
        let timeline = TimelineId::new(3).unwrap();
        let name = ObjectName::Wal(WalFileName::History(timeline));
        let text =
            b"1\t0/5000000\tat restore point \"payroll\"\n\n2\tA/6000028\tno recovery target specified\n";
        let summary = of(name, text).unwrap();
        assert_eq!(summary, "1:0/5000000,2:A/6000028");
        let outline = outline(name, &summary).unwrap();
        let of_text = |text| TimelineHistory::parse(timeline, text).unwrap();
        let forks = |history: TimelineHistory| {
            history.ancestors().iter().map(|fork| (fork.timeline, fork.end)).collect::<Vec<_>>()
        };
        assert_eq!(forks(of_text(&outline)), forks(of_text(text)));
        assert_eq!(of(name, b"rubbish"), None);
    }

    proptest! {
        #[test]
        fn a_segment_keeps_its_header(first in prop::collection::vec(any::<u8>(), 0..100)) {
            let segment = "000000010000000A000000FF".parse().unwrap();
            for name in [ObjectName::segment(segment), ObjectName::Piece { segment, start: 0, end: 9 }] {
                let kept = of(name, &first).map(|summary| outline(name, &summary).unwrap());
                prop_assert_eq!(kept.as_deref(), first.get(..LONG_HEADER_BYTES));
            }
            prop_assert_eq!(of(ObjectName::Piece { segment, start: 1, end: 9 }, &first), None);
        }

        #[test]
        fn any_metadata_is_taken_without_panic(summary in ".{0,90}") {
            let segment = ObjectName::segment("000000010000000A000000FF".parse().unwrap());
            let history = ObjectName::Wal("00000003.history".parse().unwrap());
            let _ = (outline(segment, &summary), outline(history, &summary));
        }
    }
}
