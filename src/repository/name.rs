//! The one owner of keys: every object we ever store has an [`ObjectName`], and only this file turns one
//! into a key or back.
//!
//! Pure. Keys are relative to the site's prefix, so a name is the same in every bucket. WAL lies where
//! PGHoard has it; nothing in a format of our own lies under `basebackup/`, which would disturb PGHoard's
//! listing.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::pghoard_name::{PghoardFolder, PghoardName};
use crate::postgres::{SegmentName, WalFileName};

/// The name of a stored object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectName {
    /// `xlog/<segment>` (also `.partial` and `.backup`), `timeline/<timeline>.history`
    Wal(WalFileName),
    /// `xlog_partial/<segment>/<start>-<end>`: bytes [start, end) of an unfinished segment. A key whose
    /// range is empty is no name.
    Piece { segment: SegmentName, start: u32, end: u32 },
    /// `backup/<name>/<part>`
    Backup { backup: BackupName, part: BackupPart },
    /// Part of a base backup in one of PGHoard's formats: `basebackup/<name>`, `basebackup_chunk/<name>`…
    Pghoard { folder: PghoardFolder, name: PghoardName },
}

/// One object of a base backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackupPart {
    /// Written first: a backup is under way, or was interrupted.
    Started,
    /// Written last: the backup exists.
    Record,
    /// The file list.
    Files,
    Pack(u32),
}

/// A part of the repository that can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Folder {
    /// Whole and partial segments and backup history files
    Segments,
    /// Timeline history files
    Histories,
    /// All pieces
    Pieces,
    PiecesOf(SegmentName),
    /// All parts of all backups
    Backups,
    BackupParts(BackupName),
    Pghoard(PghoardFolder),
    /// The chunks or bundles of the PGHoard backup of this base name
    PghoardParts(PghoardFolder, PghoardName),
}

const SEGMENTS: &str = "xlog";
const HISTORIES: &str = "timeline";
const PIECES: &str = "xlog_partial";
const BACKUPS: &str = "backup";

impl ObjectName {
    /// The key below the site's prefix.
    pub fn to_key(&self) -> String {
        match self {
            Self::Wal(file @ WalFileName::History(_)) => format!("{HISTORIES}/{file}"),
            Self::Wal(file) => format!("{SEGMENTS}/{file}"),
            Self::Piece { segment, start, end } => format!("{PIECES}/{segment}/{start:08X}-{end:08X}"),
            Self::Backup { backup, part } => match part {
                BackupPart::Started => format!("{BACKUPS}/{backup}/started"),
                BackupPart::Record => format!("{BACKUPS}/{backup}/record"),
                BackupPart::Files => format!("{BACKUPS}/{backup}/files"),
                BackupPart::Pack(number) => format!("{BACKUPS}/{backup}/pack/{number:06}"),
            },
            Self::Pghoard { folder, name } => format!("{}/{name}", folder.to_key()),
        }
    }

    /// The name whose key this is; none for every other text.
    pub fn from_key(key: &str) -> Option<Self> {
        let (folder, rest) = key.split_once('/')?;
        let name = match folder {
            SEGMENTS | HISTORIES => Self::Wal(rest.parse().ok()?),
            PIECES => {
                let (segment, range) = rest.split_once('/')?;
                let (start, end) = range.split_once('-')?;
                let number = |digits| u32::from_str_radix(digits, 16).ok();
                let (start, end) = (number(start)?, number(end)?);
                (start < end).then_some(Self::Piece { segment: segment.parse().ok()?, start, end })?
            }
            BACKUPS => {
                let (backup, part) = rest.split_once('/')?;
                let part = match part {
                    "started" => BackupPart::Started,
                    "record" => BackupPart::Record,
                    "files" => BackupPart::Files,
                    pack => BackupPart::Pack(pack.strip_prefix("pack/")?.parse().ok()?),
                };
                Self::Backup { backup: backup.parse().ok()?, part }
            }
            _ => {
                let folder = PghoardFolder::ALL.into_iter().find(|known| known.to_key() == folder)?;
                Self::Pghoard { folder, name: rest.parse().ok()? }
            }
        };
        // One key per name: no other spelling of a number, no history file among the segments.
        (name.to_key() == key).then_some(name)
    }

    /// The segment's object.
    pub const fn segment(segment: SegmentName) -> Self {
        Self::Wal(WalFileName::Segment(segment))
    }

    pub const fn record(backup: BackupName) -> Self {
        Self::Backup { backup, part: BackupPart::Record }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_key())
    }
}

impl Folder {
    /// The key that all of its objects begin with, without the slash at its end.
    pub fn to_key(&self) -> String {
        match self {
            Self::Segments => SEGMENTS.to_owned(),
            Self::Histories => HISTORIES.to_owned(),
            Self::Pieces => PIECES.to_owned(),
            Self::PiecesOf(segment) => format!("{PIECES}/{segment}"),
            Self::Backups => BACKUPS.to_owned(),
            Self::BackupParts(backup) => format!("{BACKUPS}/{backup}"),
            Self::Pghoard(folder) => folder.to_key().to_owned(),
            Self::PghoardParts(folder, base) => format!("{}/{base}", folder.to_key()),
        }
    }
}

/// The name of a base backup: when it was begun, in UTC, as `YYYYMMDDThhmmssZ`. Sorts by time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupName(Timestamp);

const BACKUP_NAME_FORMAT: &str = "%Y%m%dT%H%M%SZ";

impl BackupName {
    /// Drops the fraction of the second. A time before 1970, which only a broken clock gives, becomes 1970.
    ///
    /// # Panics
    /// Never: a time without its fraction is a time.
    pub fn from_timestamp(time: Timestamp) -> Self {
        Self(Timestamp::from_second(time.as_second().max(0)).expect("a time without its fraction is a time"))
    }

    pub const fn timestamp(self) -> Timestamp {
        self.0
    }
}

impl fmt::Display for BackupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.to_zoned(TimeZone::UTC).strftime(BACKUP_NAME_FORMAT).fmt(f)
    }
}

impl fmt::Debug for BackupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not the name of a backup.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the name of a backup such as `20261121T093000Z`")]
pub struct ParseBackupNameError(String);

impl FromStr for BackupName {
    type Err = ParseBackupNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        jiff::civil::DateTime::strptime(BACKUP_NAME_FORMAT, text)
            .ok()
            .and_then(|time| time.to_zoned(TimeZone::UTC).ok())
            .map(|time| Self::from_timestamp(time.timestamp()))
            // Whatever else the parser accepts has another spelling.
            .filter(|name| name.to_string() == text)
            .ok_or_else(|| ParseBackupNameError(text.to_owned()))
    }
}

impl Serialize for BackupName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BackupName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{Lsn, SegmentSize, TimelineId};
    use proptest::prelude::*;

    fn segment() -> impl Strategy<Value = SegmentName> {
        (1_u32..5, 0_u64..1 << 40, 20_u32..=30).prop_map(|(timeline, lsn, size)| {
            let size = SegmentSize::try_from(1_u64 << size).unwrap();
            size.segment_at(TimelineId::new(timeline).unwrap(), Lsn::new(lsn))
        })
    }

    fn name() -> impl Strategy<Value = ObjectName> {
        let backup = || {
            (0_i64..253_402_200_000)
                .prop_map(|second| BackupName::from_timestamp(Timestamp::from_second(second).unwrap()))
        };
        let part = prop_oneof![
            Just(BackupPart::Started),
            Just(BackupPart::Record),
            Just(BackupPart::Files),
            any::<u32>().prop_map(BackupPart::Pack),
            (0..3_u32).prop_map(BackupPart::Pack),
        ];
        prop_oneof![
            segment().prop_map(ObjectName::segment),
            segment().prop_map(|segment| ObjectName::Wal(WalFileName::Partial(segment))),
            (segment(), any::<u32>())
                .prop_map(|(segment, offset)| ObjectName::Wal(WalFileName::BackupLabel(segment, offset))),
            (1_u32..)
                .prop_map(|number| ObjectName::Wal(WalFileName::History(TimelineId::new(number).unwrap()))),
            (segment(), 0..1_u32 << 30, 1..=1_u32 << 30).prop_map(|(segment, start, length)| {
                ObjectName::Piece { segment, start, end: start.saturating_add(length) }
            }),
            (backup(), part).prop_map(|(backup, part)| ObjectName::Backup { backup, part }),
            (prop::sample::select(&PghoardFolder::ALL[..]), "[0-9a-z_-]{1,20}(/[0-9a-z_.-]{1,10}x)?")
                .prop_map(|(folder, name)| ObjectName::Pghoard { folder, name: name.parse().unwrap() }),
        ]
    }

    #[test]
    fn keys_are_those_of_the_format() {
        let backup: BackupName = "20261121T093000Z".parse().unwrap();
        let segment: SegmentName = "000000010000000A000000FF".parse().unwrap();
        let keys = [
            (ObjectName::segment(segment), "xlog/000000010000000A000000FF"),
            (ObjectName::Wal("00000002.history".parse().unwrap()), "timeline/00000002.history"),
            (
                ObjectName::Piece { segment, start: 0, end: 0x1A_2000 },
                "xlog_partial/000000010000000A000000FF/00000000-001A2000",
            ),
            (ObjectName::record(backup), "backup/20261121T093000Z/record"),
            (ObjectName::Backup { backup, part: BackupPart::Pack(7) }, "backup/20261121T093000Z/pack/000007"),
        ];
        for (name, key) in keys {
            assert_eq!(name.to_key(), key);
            assert_eq!(ObjectName::from_key(key), Some(name));
        }
    }

    #[test]
    fn no_other_text_is_a_key() {
        for key in [
            "",
            "/",
            "xlog",
            "xlog/",
            "/xlog/000000010000000000000001",
            "xlog/000000010000000000000001/",
            "xlog//000000010000000000000001",
            "xlog/00000002.history",
            "timeline/000000010000000000000001",
            "xlog/00000001000000000000000a",
            "xlog/../xlog/000000010000000000000001",
            "xlog/000000010000000000000001.metadata",
            "xlog_partial/000000010000000000000001/0-1",
            "xlog_partial/000000010000000000000001/00000000-0000000a",
            "xlog_partial/000000010000000000000001/00000001-00000001",
            "xlog_partial/000000010000000000000001/+0000000-00000001",
            "xlog_partial/000000010000000000000001/00000000-00000001-",
            "backup/20261121T093000Z",
            "backup/20261121T093000Z/",
            "backup/20261121T093000Z/pack/7",
            "backup/20261121T093000Z/pack/+00007",
            "backup/20261121T093000Z/pack/0000007",
            "backup/20261121T093060Z/record",
            "backup/20261132T093000Z/record",
            "backup/2026-11-21T09:30:00Z/record",
            "backup/ 20261121T093000Z/record",
            "basebackup/",
            "basebackup_chunk/a//b",
            "basebackup_other/a",
        ] {
            assert_eq!(ObjectName::from_key(key), None, "{key}");
        }
    }

    #[test]
    fn a_backup_is_named_by_its_second() {
        let time: Timestamp = "2026-11-21T09:30:00.999999Z".parse().unwrap();
        let name = BackupName::from_timestamp(time);
        assert_eq!(name.to_string(), "20261121T093000Z");
        assert_eq!(name.timestamp().as_second(), time.as_second());
        assert_eq!(BackupName::from_timestamp(Timestamp::MIN).to_string(), "19700101T000000Z");
        assert_eq!(BackupName::from_timestamp(Timestamp::MAX).to_string(), "99991230T220000Z");
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"20261121T093000Z\"");
    }

    proptest! {
        #[test]
        fn a_name_and_its_key_are_inverse(name in name()) {
            prop_assert_eq!(ObjectName::from_key(&name.to_key()), Some(name));
        }

        #[test]
        fn no_two_names_share_a_key(one in name(), other in name()) {
            prop_assert_eq!(one == other, one.to_key() == other.to_key());
        }

        #[test]
        fn a_key_is_the_key_of_its_name(key in "(xlog|timeline|xlog_partial|backup)/[0-9A-Fa-f]{8}[0-9A-FTZ./-]{0,20}") {
            if let Some(name) = ObjectName::from_key(&key) {
                prop_assert_eq!(name.to_key(), key);
            }
        }

        #[test]
        fn segments_of_a_timeline_sort_by_position(one: u64, other: u64, exponent in 20_u32..=30) {
            let size = SegmentSize::try_from(1_u64 << exponent).unwrap();
            let name = |lsn| ObjectName::segment(size.segment_at(TimelineId::FIRST, Lsn::new(lsn)));
            let by_position = size.floor(Lsn::new(one)).cmp(&size.floor(Lsn::new(other)));
            prop_assert_eq!(name(one).to_key().cmp(&name(other).to_key()), by_position);
        }

        #[test]
        fn backups_sort_by_time(one in 0..253_402_200_000_i64, other in 0..253_402_200_000_i64) {
            let name = |second| BackupName::from_timestamp(Timestamp::from_second(second).unwrap());
            prop_assert_eq!(name(one).to_string().cmp(&name(other).to_string()), one.cmp(&other));
            prop_assert_eq!(name(one).cmp(&name(other)), one.cmp(&other));
        }

        #[test]
        fn a_name_lies_in_its_folder(name in name()) {
            let folder = match name {
                ObjectName::Wal(WalFileName::History(_)) => Folder::Histories,
                ObjectName::Wal(_) => Folder::Segments,
                ObjectName::Piece { segment, .. } => Folder::PiecesOf(segment),
                ObjectName::Backup { backup, .. } => Folder::BackupParts(backup),
                ObjectName::Pghoard { folder, .. } => Folder::Pghoard(folder),
            };
            let prefix = format!("{}/", folder.to_key());
            prop_assert!(name.to_key().starts_with(&prefix));
        }
    }
}
