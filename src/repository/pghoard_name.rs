//! The names of PGHoard's base backups and of what belongs to them.
//!
//! Pure. PGHoard makes names like `2026-11-21_09-30_0`, and `2018-11-21_0` before 2018, but whatever lies
//! under `basebackup/` is a backup to it; so a name here is a short text, and only what could not be a key is
//! refused.

use std::fmt;
use std::str::FromStr;

/// A folder that PGHoard keeps base backups in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PghoardFolder {
    /// Raw backups, and the control objects of the others.
    Backups,
    /// Chunks of `local-tar` backups, by the backup's base name.
    Chunks,
    /// Files of delta backups, by the BLAKE2s of their content.
    DeltaFiles,
    /// Bundles of small files of delta backups, by the backup's base name.
    DeltaChunks,
    /// Requests to keep a backup.
    Preservations,
}

impl PghoardFolder {
    pub const ALL: [Self; 5] =
        [Self::Backups, Self::Chunks, Self::DeltaFiles, Self::DeltaChunks, Self::Preservations];

    pub const fn to_key(self) -> &'static str {
        match self {
            Self::Backups => "basebackup",
            Self::Chunks => "basebackup_chunk",
            Self::DeltaFiles => "basebackup_delta",
            Self::DeltaChunks => "basebackup_delta_chunk",
            Self::Preservations => "preservation_request",
        }
    }
}

/// Bytes of the longest name. PGHoard's longest is that of a preservation request, 70 bytes or so.
const MAX_LENGTH: usize = 78;

/// The part of a key below its folder. A small value rather than a `String`, so that names of objects stay
/// cheap to copy.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PghoardName {
    length: u8,
    text: [u8; MAX_LENGTH],
}

impl PghoardName {
    /// The name as a text.
    ///
    /// # Panics
    /// Never: it was made of one.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.text[..usize::from(self.length)]).expect("it was made of a text")
    }

    /// What the chunks of a backup have in their names: the name up to its first dot.
    pub fn base(&self) -> &str {
        let text = self.as_str();
        text.split_once('.').map_or(text, |(base, _)| base)
    }
}

/// A text that is no name below one of PGHoard's folders.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the name of an object that PGHoard makes")]
pub struct ParsePghoardNameError(String);

impl FromStr for PghoardName {
    type Err = ParsePghoardNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = !text.is_empty()
            && text.len() <= MAX_LENGTH
            && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
            && text.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !fits {
            return Err(ParsePghoardNameError(text.to_owned()));
        }
        let mut name = Self { length: u8::try_from(text.len()).unwrap_or_default(), text: [0; MAX_LENGTH] };
        name.text[..text.len()].copy_from_slice(text.as_bytes());
        Ok(name)
    }
}

impl Ord for PghoardName {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.as_str().cmp(other.as_str())
    }
}

impl PartialOrd for PghoardName {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for PghoardName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for PghoardName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_every_name_that_pghoard_makes() {
        for text in [
            "2026-11-21_09-30_0",
            "2016-11-21_0",
            "2026-11-21_09-30_0.00000000.pghoard",
            "2026-11-21_09-30_0/2026-11-21_09-30_0.00000001.pghoard",
            "2026-11-21_09-30_0.00000000.pghoard_2099-01-01 00:00:00.123456+00:00",
            "69217a3079908094e11121d042354a7c1f55b6482ca1a51e1b250dfd1ed0eef9",
        ] {
            assert_eq!(text.parse::<PghoardName>().unwrap().to_string(), text);
        }
        let name: PghoardName = "2026-11-21_09-30_0.00000000.pghoard".parse().unwrap();
        assert_eq!(name.base(), "2026-11-21_09-30_0");
        assert_eq!("2016-11-21_0".parse::<PghoardName>().unwrap().base(), "2016-11-21_0");
    }

    #[test]
    fn refuses_what_leads_out_of_its_folder_or_is_no_key() {
        let long = "x".repeat(MAX_LENGTH + 1);
        for text in ["", "/a", "a/", "a//b", "..", "a/../b", "a/.", "a\nb", "\u{e9}", &long] {
            assert!(text.parse::<PghoardName>().is_err(), "{text}");
        }
    }
}
