//! WAL segments and the names of WAL files.
//!
//! Pure. The size of a segment is fixed when a cluster is made (`initdb --wal-segsize`) and is never
//! assumed here: a [`SegmentSize`] is the only way from an [`Lsn`] to a [`SegmentName`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::lsn::Lsn;
use super::timeline::TimelineId;

/// `wal_segment_size`: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u32);

/// A number of bytes that cannot be a WAL segment size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a WAL segment size (a power of two from 1MB to 1GB)")]
pub struct SegmentSizeError(String);

impl SegmentSize {
    /// What `initdb` uses unless told otherwise.
    pub const DEFAULT: Self = Self(16 << 20);

    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// Reads the answer to `SHOW wal_segment_size`, such as `16MB` or `1GB`.
    pub fn parse_setting(text: &str) -> Result<Self, SegmentSizeError> {
        let error = || SegmentSizeError(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim() {
            "" | "B" => 1,
            "kB" => 1 << 10,
            "MB" => 1 << 20,
            "GB" => 1 << 30,
            _ => return Err(error()),
        };
        let number: u64 = number.parse().map_err(|_| error())?;
        number.checked_mul(factor).ok_or_else(error)?.try_into()
    }

    /// Bytes from the start of its segment to `lsn`.
    pub const fn offset(self, lsn: Lsn) -> u64 {
        lsn.get() % self.bytes()
    }

    /// The start of the segment that holds the byte at `lsn`.
    pub const fn floor(self, lsn: Lsn) -> Lsn {
        Lsn::new(lsn.get() - self.offset(lsn))
    }

    /// The first segment start at or after `lsn`.
    #[must_use]
    pub fn ceil(self, lsn: Lsn) -> Lsn {
        if self.offset(lsn) == 0 { lsn } else { self.floor(lsn).advance(self.bytes()) }
    }

    /// The segment that holds the byte at `lsn`.
    pub const fn segment_at(self, timeline: TimelineId, lsn: Lsn) -> SegmentName {
        let number = lsn.get() / self.bytes();
        let per_log = (1 << 32) / self.bytes();
        // Both halves fit: the number of a segment is at most 2^64 / 2^20, and the low part is below 2^12.
        #[expect(clippy::cast_possible_truncation)]
        SegmentName { timeline, log: (number / per_log) as u32, part: (number % per_log) as u32 }
    }

    /// The first byte of `segment`.
    pub const fn start(self, segment: SegmentName) -> Lsn {
        Lsn::new(((segment.log as u64) << 32) + segment.part as u64 * self.bytes())
    }

    /// The byte after the last one of `segment`.
    #[must_use]
    pub fn end(self, segment: SegmentName) -> Lsn {
        self.start(segment).advance(self.bytes())
    }

    /// The segment after `segment` on the same timeline.
    #[must_use]
    pub fn next(self, segment: SegmentName) -> SegmentName {
        self.segment_at(segment.timeline, self.end(segment))
    }

    /// Whether a cluster with this segment size can have a segment of this name.
    pub const fn admits(self, segment: SegmentName) -> bool {
        (segment.part as u64) < (1 << 32) / self.bytes()
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = SegmentSizeError;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        match u32::try_from(bytes) {
            Ok(size) if size.is_power_of_two() && (1 << 20..=1 << 30).contains(&size) => Ok(Self(size)),
            _ => Err(SegmentSizeError(bytes.to_string())),
        }
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> Self {
        size.bytes()
    }
}

/// The name of one WAL segment: 24 hex digits. Sorts by timeline, then by position.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    timeline: TimelineId,
    log: u32,
    part: u32,
}

impl SegmentName {
    pub const fn timeline(self) -> TimelineId {
        self.timeline
    }

    /// The segment of the same number on another timeline.
    #[must_use]
    pub const fn on(self, timeline: TimelineId) -> Self {
        Self { timeline, ..self }
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), self.log, self.part)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SegmentName {
    type Err = ParseWalFileNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse()? {
            WalFileName::Segment(segment) => Ok(segment),
            _ => Err(ParseWalFileNameError(text.to_owned())),
        }
    }
}

impl Serialize for SegmentName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SegmentName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Every kind of file PostgreSQL archives or asks for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFileName {
    /// `000000010000000000000001`
    Segment(SegmentName),
    /// `000000010000000000000001.partial`: the unfinished last segment of a timeline that was left.
    Partial(SegmentName),
    /// `000000010000000000000001.00000028.backup`: a backup history file; the number is the backup's
    /// start offset within the segment.
    BackupLabel(SegmentName, u32),
    /// `00000002.history`
    History(TimelineId),
}

/// A name that PostgreSQL never uses for a file in its archive.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the name of a WAL segment, a history file, a partial segment or a backup history file")]
pub struct ParseWalFileNameError(String);

impl FromStr for WalFileName {
    type Err = ParseWalFileNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseWalFileNameError(text.to_owned());
        // PostgreSQL writes these names in upper case only; a lower case one is another file.
        let hex = |digits: Option<&str>| {
            let digits = digits.filter(|digits| {
                digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'))
            })?;
            u32::from_str_radix(digits, 16).ok()
        };
        let timeline = || hex(text.get(..8)).and_then(TimelineId::new);
        if let Some("history") = text.get(8..).and_then(|rest| rest.strip_prefix('.')) {
            return timeline().map(Self::History).ok_or_else(error);
        }
        let segment = || {
            Some(SegmentName {
                timeline: timeline()?,
                log: hex(text.get(8..16))?,
                part: hex(text.get(16..24))?,
            })
        };
        let segment = segment().ok_or_else(error)?;
        match text.get(24..) {
            Some("") => Ok(Self::Segment(segment)),
            Some(".partial") => Ok(Self::Partial(segment)),
            Some(suffix) => suffix
                .strip_suffix(".backup")
                .and_then(|suffix| hex(suffix.strip_prefix('.')))
                .map(|offset| Self::BackupLabel(segment, offset))
                .ok_or_else(error),
            None => Err(error()),
        }
    }
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(segment) => write!(f, "{segment}"),
            Self::Partial(segment) => write!(f, "{segment}.partial"),
            Self::BackupLabel(segment, offset) => write!(f, "{segment}.{offset:08X}.backup"),
            Self::History(timeline) => write!(f, "{:08X}.history", timeline.get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_follow_the_segment_size() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        let name =
            |bytes: u64| SegmentSize::try_from(bytes).unwrap().segment_at(TimelineId::FIRST, lsn).to_string();
        assert_eq!(name(16 << 20), "0000000100000016000000B3");
        assert_eq!(name(1 << 20), "000000010000001600000B37");
        assert_eq!(name(64 << 20), "00000001000000160000002C");
        assert_eq!(name(1 << 30), "000000010000001600000002");
    }

    #[test]
    fn the_segment_after_ff_is_in_the_next_log() {
        let segment: SegmentName = "0000000100000000000000FF".parse().unwrap();
        assert_eq!(SegmentSize::DEFAULT.next(segment).to_string(), "000000010000000100000000");
    }

    #[test]
    fn reads_the_setting_with_its_unit() {
        assert_eq!(SegmentSize::parse_setting("16MB").unwrap(), SegmentSize::DEFAULT);
        assert_eq!(SegmentSize::parse_setting("1GB").unwrap().bytes(), 1 << 30);
        assert_eq!(SegmentSize::parse_setting("16777216").unwrap(), SegmentSize::DEFAULT);
        for text in ["", "MB", "3MB", "2GB", "512kB", "16TB", "99999999999999999GB"] {
            assert!(SegmentSize::parse_setting(text).is_err(), "{text}");
        }
    }

    #[test]
    fn knows_every_name_postgresql_archives_and_no_other() {
        for text in [
            "000000010000000000000001",
            "000000010000000000000001.partial",
            "000000010000000000000001.00000028.backup",
            "00000002.history",
        ] {
            assert_eq!(text.parse::<WalFileName>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "00000000.history",
            "0000000a.history",
            "000000000000000000000001",
            "000000010000000000000001.",
            "000000010000000000000001.backup",
            "../etc/passwd",
            "000000010000000000000001/",
            "00000001000000000000000é",
            "00000001.history.x",
            "+00000010000000000000001",
        ] {
            assert!(text.parse::<WalFileName>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_name_and_its_range_are_inverse(exponent in 20_u32..=30, lsn: u64, timeline in 1_u32..) {
            let size = SegmentSize::try_from(1_u64 << exponent).unwrap();
            let lsn = Lsn::new(lsn >> 1);
            let segment = size.segment_at(TimelineId::new(timeline).unwrap(), lsn);
            prop_assert!(size.start(segment) <= lsn && lsn < size.end(segment));
            prop_assert!(size.admits(segment));
            prop_assert_eq!(segment.to_string().parse::<SegmentName>().unwrap(), segment);
            prop_assert!(segment < size.next(segment) && segment.to_string() < size.next(segment).to_string());
        }
    }
}
