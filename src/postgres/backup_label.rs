//! The two small files at the head of a base backup.
//!
//! Pure. `backup_label` tells recovery where to begin, and is kept byte for byte; this only reads it.
//! `tablespace_map` tells where the tablespaces were.
//!
//! Source: `build_backup_content` and `read_tablespace_map` in the server's `xlogbackup.c` and
//! `xlogrecovery.c`.

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

/// One line of `tablespace_map`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceMapEntry {
    pub oid: u32,
    /// The directory; bytes, because the server does not care about their encoding.
    pub location: Vec<u8>,
}

/// A line of `tablespace_map` that is not `<OID> <directory>`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {0} of the tablespace map is not `<OID> <directory>`")]
pub struct ParseTablespaceMapError(usize);

/// Reads `tablespace_map`. A backslash takes the meaning of a line end or a backslash away.
pub fn parse_tablespace_map(text: &[u8]) -> Result<Vec<TablespaceMapEntry>, ParseTablespaceMapError> {
    let mut entries = Vec::new();
    let mut line = Vec::new();
    let mut bytes = text.iter().copied().chain(std::iter::once(b'\n'));
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => line.extend(bytes.next()),
            b'\n' | b'\r' => {
                if line.is_empty() {
                    continue;
                }
                let entry = entry(&line).ok_or(ParseTablespaceMapError(entries.len() + 1))?;
                entries.push(entry);
                line.clear();
            }
            byte => line.push(byte),
        }
    }
    if line.is_empty() { Ok(entries) } else { Err(ParseTablespaceMapError(entries.len() + 1)) }
}

fn entry(line: &[u8]) -> Option<TablespaceMapEntry> {
    let space = line.iter().position(|&byte| byte == b' ')?;
    let oid = std::str::from_utf8(&line[..space]).ok()?.parse().ok()?;
    let location = line[space + 1..].to_vec();
    (!location.is_empty()).then_some(TablespaceMapEntry { oid, location })
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

    #[test]
    fn a_map_that_ends_in_the_midst_of_an_entry_is_refused() {
        assert!(parse_tablespace_map(b"16385 /a\\").is_err());
        assert!(parse_tablespace_map(b"x /a\n").is_err());
        assert!(parse_tablespace_map(b"1\n").is_err());
        assert_eq!(parse_tablespace_map(b"").unwrap(), []);
    }

    proptest! {
        #[test]
        fn any_directory_survives_the_map(
            entries in prop::collection::vec((any::<u32>(), prop::collection::vec(1_u8.., 1..20)), 0..5),
        ) {
            let mut text = Vec::new();
            for (oid, location) in &entries {
                text.extend(format!("{oid} ").bytes());
                for &byte in location {
                    if matches!(byte, b'\n' | b'\r' | b'\\') {
                        text.push(b'\\');
                    }
                    text.push(byte);
                }
                text.push(b'\n');
            }
            let read = parse_tablespace_map(&text).unwrap();
            let read: Vec<_> = read.into_iter().map(|entry| (entry.oid, entry.location)).collect();
            prop_assert_eq!(read, entries);
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = parse_tablespace_map(&bytes);
            let _ = BackupLabel::parse(&bytes);
        }
    }
}
