//! Where streaming starts.
//!
//! Pure. The bucket and the slot are the only state: the archive says how far it reaches, the server
//! says what it is and where it stands, and this decides from where to stream, or why not to.

use crate::postgres::{Lsn, SegmentSize, TimelineHistory, TimelineId};

/// The newest end of the archive: where its newest timeline ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArchiveEnd {
    pub timeline: TimelineId,
    /// The end of the last whole segment.
    pub whole: Lsn,
    /// The end of the pieces after it; equal to `whole` when there are none.
    pub stored: Lsn,
}

/// What the server says of itself.
#[derive(Clone, Debug)]
pub struct ServerState<'a> {
    /// The history of the server's present timeline.
    pub history: &'a TimelineHistory,
    /// `IDENTIFY_SYSTEM`'s flush position.
    pub flush: Lsn,
    /// `restart_lsn` of the slot, where it could be read.
    pub slot: Option<Lsn>,
}

/// Where to stream from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    pub timeline: TimelineId,
    /// A segment start.
    pub lsn: Lsn,
    /// Everything on this timeline from `lsn` to here is stored already.
    pub stored: Lsn,
    /// The archive holds WAL beyond the point where the server's history left that timeline.
    pub diverged: bool,
}

/// Why this server's WAL must not go into this archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "the archive ends at {archive} on timeline {timeline}, but the server has WAL only up to {server}: \
         it has lost WAL, or is a copy or a standby that lags behind"
    )]
    Behind { timeline: TimelineId, archive: Lsn, server: Lsn },
    #[error(
        "the archive is on timeline {archive}, the server on timeline {server}: \
         another server was promoted meanwhile, and this one is not its successor"
    )]
    OldTimeline { archive: TimelineId, server: TimelineId },
}

/// Decides where to stream from. `archive` is `None` when the archive holds no WAL.
pub fn choose(
    archive: Option<ArchiveEnd>,
    server: &ServerState<'_>,
    size: SegmentSize,
) -> Result<Start, Refusal> {
    let present = server.history.timeline();
    let Some(archive) = archive else {
        let from =
            server.slot.filter(|slot| !slot.is_zero() && *slot <= server.flush).unwrap_or(server.flush);
        // A segment that begins before a fork is read on the timeline that holds its start, so that
        // the old timeline's part is archived as well.
        let lsn = size.floor(from);
        let timeline = server.history.timeline_at(lsn);
        return Ok(Start { timeline, lsn, stored: lsn, diverged: false });
    };
    let continued =
        |timeline| Ok(Start { timeline, lsn: archive.whole, stored: archive.stored, diverged: false });
    if archive.timeline == present {
        if archive.stored > server.flush {
            let (timeline, archive) = (present, archive.stored);
            return Err(Refusal::Behind { timeline, archive, server: server.flush });
        }
        return continued(present);
    }
    if archive.timeline > present {
        return Err(Refusal::OldTimeline { archive: archive.timeline, server: present });
    }
    let Some(left) = server.history.ancestors().iter().find(|ancestor| ancestor.timeline == archive.timeline)
    else {
        // The archive's newest timeline is no ancestor: begin the server's own where it forked off.
        let lsn = size.floor(server.history.start());
        return Ok(Start { timeline: present, lsn, stored: lsn, diverged: true });
    };
    if archive.stored <= left.end {
        return continued(archive.timeline);
    }
    // The archive ran past the switch point (at least within the segment): go on with the child.
    let lsn = size.floor(left.end);
    let timeline = server.history.timeline_at(left.end);
    Ok(Start { timeline, lsn, stored: lsn, diverged: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn lsn(text: &str) -> Lsn {
        text.parse().unwrap()
    }

    fn end(timeline: u32, whole: &str, stored: &str) -> ArchiveEnd {
        ArchiveEnd { timeline: tli(timeline), whole: lsn(whole), stored: lsn(stored) }
    }

    fn server<'a>(history: &'a TimelineHistory, flush: &str, slot: Option<&str>) -> ServerState<'a> {
        ServerState { history, flush: lsn(flush), slot: slot.map(lsn) }
    }

    fn second() -> TimelineHistory {
        TimelineHistory::parse(tli(2), b"1\t0/5500000\tx\n").unwrap()
    }

    #[test]
    fn an_empty_archive_starts_at_the_slot_else_at_the_server() {
        let root = TimelineHistory::root(tli(1));
        let start = |slot| choose(None, &server(&root, "0/7123456", slot), SIZE).unwrap().lsn;
        assert_eq!(start(Some("0/5000028")), lsn("0/5000000"));
        assert_eq!(start(None), lsn("0/7000000"));
        assert_eq!(start(Some("0/0")), lsn("0/7000000"));
    }

    #[test]
    fn an_empty_archive_begins_before_the_fork_on_the_parent() {
        let start = choose(None, &server(&second(), "0/5600000", None), SIZE).unwrap();
        assert_eq!((start.timeline, start.lsn), (tli(1), lsn("0/5000000")));
    }

    #[test]
    fn goes_on_where_the_archive_ends() {
        let root = TimelineHistory::root(tli(1));
        let start =
            choose(Some(end(1, "0/5000000", "0/5000100")), &server(&root, "0/7000000", None), SIZE).unwrap();
        assert_eq!((start.lsn, start.stored), (lsn("0/5000000"), lsn("0/5000100")));
    }

    #[test]
    fn finishes_the_parent_before_the_child() {
        let start =
            choose(Some(end(1, "0/4000000", "0/4000100")), &server(&second(), "0/7000000", None), SIZE)
                .unwrap();
        assert_eq!((start.timeline, start.lsn, start.diverged), (tli(1), lsn("0/4000000"), false));
    }

    #[test]
    fn an_archive_past_the_switch_point_goes_on_with_the_child() {
        let start =
            choose(Some(end(1, "0/6000000", "0/6000000")), &server(&second(), "0/7000000", None), SIZE)
                .unwrap();
        assert_eq!((start.timeline, start.lsn, start.diverged), (tli(2), lsn("0/5000000"), true));
    }

    #[test]
    fn refuses_a_server_that_is_behind_or_left_behind() {
        let root = TimelineHistory::root(tli(1));
        let behind = choose(Some(end(1, "0/5000000", "0/5000200")), &server(&root, "0/5000100", None), SIZE);
        assert!(matches!(behind, Err(Refusal::Behind { .. })));
        let old = choose(Some(end(2, "0/5000000", "0/5000000")), &server(&root, "0/7000000", None), SIZE);
        assert!(matches!(old, Err(Refusal::OldTimeline { .. })));
    }
}
