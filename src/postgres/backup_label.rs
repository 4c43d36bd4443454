//! `backup_label`, the small file at the head of a base backup.
//!
//! Pure. It tells recovery where to begin, and is kept byte for byte; this only reads it.
//!
//! Source: `build_backup_content` in the server's `xlogbackup.c`.

use super::lsn::Lsn;
use super::segment::SegmentName;
use super::timeline::TimelineId;

/// What `backup_label` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where replay begins: the redo position of the checkpoint.
    pub start_lsn: Lsn,
    /// The segment that holds `start_lsn`.
    pub start_segment: SegmentName,
    pub checkpoint_lsn: Lsn,
    pub source: BackupSource,
    /// As the server wrote it, in its own time zone.
    pub start_time: String,
    /// The user's text.
    pub label: String,
    pub start_timeline: TimelineId,
    /// An incremental base backup (17 and later) needs its parent, which began here.
    pub incremental_from: Option<(Lsn, TimelineId)>,
}

/// `BACKUP FROM`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSource {
    Primary,
    Standby,
}

/// A text that is no `backup_label`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseBackupLabelError {
    #[error("backup label lacks its line `{0}`")]
    Missing(&'static str),
    #[error("backup label's line `{0}` cannot be read")]
    Malformed(&'static str),
}

impl BackupLabel {
    pub fn parse(text: &[u8]) -> Result<Self, ParseBackupLabelError> {
        use ParseBackupLabelError::{Malformed, Missing};
        let text = String::from_utf8_lossy(text);
        let optional =
            |name: &'static str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let line = |name: &'static str| optional(name).ok_or(Missing(name));
        let start = line("START WAL LOCATION")?;
        let (start_lsn, start_segment) = start
            .split_once(" (file ")
            .and_then(|(lsn, file)| Some((lsn.parse().ok()?, file.strip_suffix(')')?.parse().ok()?)))
            .ok_or(Malformed("START WAL LOCATION"))?;
        let incremental_from = match (optional("INCREMENTAL FROM LSN"), optional("INCREMENTAL FROM TLI")) {
            (None, None) => None,
            (lsn, timeline) => Some(
                lsn.and_then(|lsn| lsn.parse().ok())
                    .zip(timeline.and_then(|timeline| timeline.parse().ok()))
                    .ok_or(Malformed("INCREMENTAL FROM LSN"))?,
            ),
        };
        Ok(Self {
            start_lsn,
            start_segment,
            checkpoint_lsn: line("CHECKPOINT LOCATION")?
                .parse()
                .map_err(|_| Malformed("CHECKPOINT LOCATION"))?,
            source: match line("BACKUP FROM")? {
                // "master" up to 13.
                "primary" | "master" => BackupSource::Primary,
                "standby" => BackupSource::Standby,
                _ => return Err(Malformed("BACKUP FROM")),
            },
            start_time: line("START TIME")?.to_owned(),
            label: line("LABEL")?.to_owned(),
            start_timeline: line("START TIMELINE")?.parse().map_err(|_| Malformed("START TIMELINE"))?,
            incremental_from,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\n\
        BACKUP METHOD: streamed\n\
        BACKUP FROM: primary\n\
        START TIME: 2026-11-21 10:00:00 UTC\n\
        LABEL: nightly: LABEL: x\n\
        START TIMELINE: 1\n";

    #[test]
    fn reads_what_the_server_writes() {
        let label = BackupLabel::parse(TEXT.as_bytes()).unwrap();
        assert_eq!(label.start_lsn, Lsn::new(0x0200_0028));
        assert_eq!(label.start_segment.to_string(), "000000010000000000000002");
        assert_eq!(label.checkpoint_lsn, Lsn::new(0x0200_0060));
        assert_eq!(label.source, BackupSource::Primary);
        assert_eq!(label.label, "nightly: LABEL: x");
        assert_eq!(label.incremental_from, None);
        let incremental = format!("{TEXT}INCREMENTAL FROM LSN: 0/10\nINCREMENTAL FROM TLI: 1\n");
        let label = BackupLabel::parse(incremental.as_bytes()).unwrap();
        assert_eq!(label.incremental_from, Some((Lsn::new(16), TimelineId::FIRST)));
    }

    #[test]
    fn names_the_line_that_is_wrong() {
        for (from, to, error) in [
            ("CHECKPOINT LOCATION", "X", ParseBackupLabelError::Missing("CHECKPOINT LOCATION")),
            ("(file ", "(f ", ParseBackupLabelError::Malformed("START WAL LOCATION")),
            ("TIMELINE: 1", "TIMELINE: 0", ParseBackupLabelError::Malformed("START TIMELINE")),
        ] {
            assert_eq!(BackupLabel::parse(TEXT.replace(from, to).as_bytes()), Err(error));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = BackupLabel::parse(&bytes);
        }
    }
}
