//! A base backup that PGHoard took, as its object's metadata describes it.
//!
//! Pure. Metadata tells the segment in which recovery begins, but not the LSN, and never exactly where the
//! backup ends. So `start_lsn` is the start of that segment, and `stop_lsn` a position that recovery has to
//! pass at least; PostgreSQL itself refuses a target before the real end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;

use crate::postgres::{Lsn, SegmentName, SegmentSize};
use crate::repository::{PghoardFolder, PghoardName};

/// PGHoard knows no other.
pub const PGHOARD_SEGMENT_SIZE: SegmentSize = SegmentSize::DEFAULT;

/// The name of one of PGHoard's backups. Prints as PGHoard prints it: with the prefix of its site.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PghoardId {
    prefix: Arc<str>,
    name: PghoardName,
}

impl PghoardId {
    /// `prefix` is that of the site, without the storage's own.
    pub fn new(prefix: &str, name: PghoardName) -> Self {
        Self { prefix: prefix.trim_matches('/').into(), name }
    }

    pub const fn name(&self) -> PghoardName {
        self.name
    }

    /// Whether a user who types `text` means this one: PGHoard's full name, or what follows `basebackup/`,
    /// or that without its ending.
    pub fn answers_to(&self, text: &str) -> bool {
        let name = text.strip_prefix(&self.folder()).unwrap_or(text);
        name == self.name.as_str() || name == self.name.base()
    }

    fn folder(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        format!("{}{slash}{}/", self.prefix, PghoardFolder::Backups.to_key())
    }
}

impl fmt::Display for PghoardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.folder(), self.name)
    }
}

impl fmt::Debug for PghoardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How the backup is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PghoardFormat {
    /// `pg_basebackup`'s tar archive of the data directory.
    Raw,
    /// One tar archive with `pgdata/` and `tablespaces/NAME/`.
    BbV1,
    /// A control object and chunks.
    BbV2,
    /// A control object, and files by their digest.
    DeltaV1,
    /// A control object, bundles of small files, and large files by their digest.
    DeltaV2,
}

impl PghoardFormat {
    pub const fn is_delta(self) -> bool {
        matches!(self, Self::DeltaV1 | Self::DeltaV2)
    }

    /// Whether a control object tells what else belongs to the backup.
    pub const fn has_control(self) -> bool {
        !matches!(self, Self::Raw | Self::BbV1)
    }

    fn parse(text: Option<&str>) -> Option<Self> {
        Some(match text {
            None | Some("") => Self::Raw,
            Some("pghoard-bb-v1") => Self::BbV1,
            Some("pghoard-bb-v2") => Self::BbV2,
            Some("pghoard-delta-v1") => Self::DeltaV1,
            Some("pghoard-delta-v2") => Self::DeltaV2,
            Some(_) => return None,
        })
    }
}

impl fmt::Display for PghoardFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "tar",
            Self::BbV1 => "pghoard-bb-v1",
            Self::BbV2 => "pghoard-bb-v2",
            Self::DeltaV1 => "pghoard-delta-v1",
            Self::DeltaV2 => "pghoard-delta-v2",
        })
    }
}

/// A tablespace of a PGHoard backup, which knows its name.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PghoardTablespace {
    pub name: String,
    pub oid: u32,
    /// The directory on the origin.
    pub location: String,
}

/// What PGHoard's metadata says of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PghoardBackup {
    pub id: PghoardId,
    /// The site this one was moved from that holds it, counted as in the repository; none for its own.
    pub former: Option<usize>,
    pub format: PghoardFormat,
    /// Recovery begins in this segment.
    pub start_segment: SegmentName,
    /// Recovery needs WAL through this one; not known of raw backups and of those of a standby.
    pub end_segment: Option<SegmentName>,
    pub start_time: Timestamp,
    pub end_time: Option<Timestamp>,
    /// As `server_version_num`.
    pub server_version_num: Option<u32>,
    /// Bytes of the tar archives and files; none when PGHoard did not write it down.
    pub plaintext_bytes: Option<u64>,
    /// Bytes of all objects, as PGHoard counted them.
    pub stored_bytes: u64,
    pub encryption_key_id: Option<String>,
    /// Those of a `pghoard-bb-v1` backup; the control object names the others'.
    pub tablespaces: Vec<PghoardTablespace>,
    /// Until when the latest request wants it kept.
    pub preserved_until: Option<Timestamp>,
    /// Why it cannot be pruned, when somebody found that it cannot.
    pub held: Option<String>,
    /// All of it, with keys in lower case and with hyphens.
    pub metadata: BTreeMap<String, String>,
    /// Bytes of the object itself.
    pub object_length: u64,
    pub last_modified: Timestamp,
}

impl PghoardBackup {
    /// Reads the metadata of the object `id`; the error says what is wrong with it.
    pub fn from_metadata(
        id: PghoardId,
        metadata: BTreeMap<String, String>,
        object_length: u64,
        last_modified: Timestamp,
    ) -> Result<Self, String> {
        let text = |key: &str| metadata.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let required = |key: &str| text(key).ok_or_else(|| format!("its metadata lacks `{key}`"));
        let wrong = |key: &str, value: &str| format!("its `{key}` is `{value}`, which cannot be read");
        let segment = |key: &str, value: &str| value.parse::<SegmentName>().map_err(|_| wrong(key, value));
        let time = |key: &str, value: &str| parse_time(value).ok_or_else(|| wrong(key, value));
        let number = |key: &str| text(key).and_then(|value| value.parse::<u64>().ok());

        if metadata.is_empty() {
            return Err("it has no metadata: its upload is under way, or was cut short".to_owned());
        }
        let format = PghoardFormat::parse(text("format"))
            .ok_or_else(|| format!("its format `{}` is not known", text("format").unwrap_or_default()))?;
        let start = required("start-wal-segment")?;
        let started = required("start-time")?;
        Ok(Self {
            format,
            start_segment: segment("start-wal-segment", start)?,
            end_segment: text("end-wal-segment")
                .map(|value| segment("end-wal-segment", value))
                .transpose()?,
            start_time: time("start-time", started)?,
            end_time: text("end-time").map(|value| time("end-time", value)).transpose()?,
            server_version_num: text("pg-version").and_then(|value| value.parse().ok()),
            plaintext_bytes: number("total-size-plain").or_else(|| number("original-file-size")),
            stored_bytes: number("total-size-enc").unwrap_or(object_length),
            encryption_key_id: text("encryption-key-id").map(str::to_owned),
            tablespaces: if format == PghoardFormat::BbV1 { tablespaces_of(&metadata)? } else { Vec::new() },
            preserved_until: None,
            held: None,
            former: None,
            id,
            metadata,
            object_length,
            last_modified,
        })
    }

    /// Whether the WAL that makes it consistent is in its archive: PGHoard's `standalone_hot_backup`.
    pub fn holds_wal(&self) -> bool {
        self.format == PghoardFormat::Raw
            && self.metadata.get("active-backup-mode").is_some_and(|mode| mode == "standalone_hot_backup")
    }

    /// Recovery begins here at the earliest.
    pub fn start_lsn(&self) -> Lsn {
        PGHOARD_SEGMENT_SIZE.start(self.start_segment)
    }

    /// Recovery has to pass this position at least before the backup is consistent.
    pub fn stop_lsn(&self) -> Lsn {
        self.end_segment.map_or(self.start_lsn(), |segment| {
            // `pg_backup_stop` ends its segment, and PGHoard asks where WAL is only then.
            PGHOARD_SEGMENT_SIZE.start(segment).max(self.start_lsn())
        })
    }

    /// All WAL before this position is needed to make the backup consistent.
    pub fn needed_lsn(&self) -> Lsn {
        let last = self.end_segment.unwrap_or(self.start_segment);
        PGHOARD_SEGMENT_SIZE.end(last).max(PGHOARD_SEGMENT_SIZE.end(self.start_segment))
    }
}

/// PGHoard's times: ISO 8601 with `T` or a space, with or without a zone, which then is UTC.
pub fn parse_time(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    text.parse().ok().or_else(|| format!("{text}+00:00").parse().ok())
}

/// `tablespace-name-OID` and `tablespace-path-OID`.
fn tablespaces_of(metadata: &BTreeMap<String, String>) -> Result<Vec<PghoardTablespace>, String> {
    metadata
        .iter()
        .filter_map(|(key, name)| Some((key.strip_prefix("tablespace-name-")?, name)))
        .map(|(oid, name)| {
            let location = metadata
                .get(&format!("tablespace-path-{oid}"))
                .ok_or_else(|| format!("its metadata names tablespace {oid} without its path"))?;
            let oid = oid.parse().map_err(|_| format!("its metadata has a tablespace `{oid}`"))?;
            Ok(PghoardTablespace { name: name.clone(), oid, location: location.clone() })
        })
        .collect()
}

/// What a request to preserve a backup says: the name of the backup's object, and until when.
pub fn preservation(name: PghoardName, metadata: &BTreeMap<String, String>) -> Option<(String, Timestamp)> {
    let (backup, until) = match (metadata.get("preserve-backup"), metadata.get("preserve-until")) {
        (Some(backup), Some(until)) => (backup.as_str(), until.as_str()),
        // The name says the same.
        _ => name.as_str().rsplit_once('_')?,
    };
    Some((backup.to_owned(), parse_time(until)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> PghoardId {
        PghoardId::new("default", "2026-11-21_11-20_0.00000000.pghoard".parse().unwrap())
    }

    fn metadata(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn read(pairs: &[(&str, &str)]) -> Result<PghoardBackup, String> {
        PghoardBackup::from_metadata(id(), metadata(pairs), 99, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn reads_what_pghoard_writes() {
        let backup = read(&[
            ("compression-algorithm", "zstd"),
            ("format", "pghoard-delta-v2"),
            ("original-file-size", "92160"),
            ("end-time", "2026-11-21 11:20:34.214704+00:00"),
            ("end-wal-segment", "000000010000000000000008"),
            ("pg-version", "170010"),
            ("start-time", "2026-11-21T11:20:09+00:00"),
            ("start-wal-segment", "000000010000000000000004"),
            ("total-size-plain", "6315291"),
            ("total-size-enc", "571522"),
        ])
        .unwrap();
        assert_eq!(backup.format, PghoardFormat::DeltaV2);
        assert_eq!(backup.start_lsn(), Lsn::new(0x0400_0000));
        assert_eq!(backup.stop_lsn(), Lsn::new(0x0800_0000));
        assert_eq!(backup.needed_lsn(), Lsn::new(0x0900_0000));
        assert_eq!(backup.end_time.unwrap().to_string(), "2026-11-21T11:20:34.214704Z");
        assert_eq!((backup.plaintext_bytes, backup.stored_bytes), (Some(6_315_291), 571_522));
        assert_eq!(backup.id.to_string(), "default/basebackup/2026-11-21_11-20_0.00000000.pghoard");
        for name in ["2026-11-21_11-20_0", "2026-11-21_11-20_0.00000000.pghoard"] {
            assert!(backup.id.answers_to(name), "{name}");
            assert!(backup.id.answers_to(&format!("default/basebackup/{name}")), "{name}");
            assert!(!backup.id.answers_to(&format!("other/basebackup/{name}")), "{name}");
        }
        assert!(!backup.id.answers_to("2026-11-21_11-20"));
    }

    #[test]
    fn an_old_backup_has_little_metadata() {
        let backup =
            read(&[("start-wal-segment", "0000000100000000000000FF"), ("start-time", "2016-03-01T10:00:00")])
                .unwrap();
        assert_eq!(backup.format, PghoardFormat::Raw);
        assert_eq!(backup.start_time.to_string(), "2016-03-01T10:00:00Z");
        assert_eq!((backup.stop_lsn(), backup.needed_lsn()), (Lsn::new(0xFF00_0000), Lsn::new(1 << 32)));
        assert_eq!((backup.plaintext_bytes, backup.stored_bytes), (None, 99));
    }

    #[test]
    fn tablespaces_of_the_first_format_are_in_its_metadata() {
        let common = [
            ("format", "pghoard-bb-v1"),
            ("start-wal-segment", "000000010000000000000004"),
            ("start-time", "2016-03-01T10:00:00Z"),
            ("tablespace-name-16385", "fast"),
        ];
        assert!(read(&common).unwrap_err().contains("16385"));
        let mut whole = common.to_vec();
        whole.push(("tablespace-path-16385", "/mnt/fast"));
        let tablespace =
            PghoardTablespace { name: "fast".to_owned(), oid: 16385, location: "/mnt/fast".to_owned() };
        assert_eq!(read(&whole).unwrap().tablespaces, [tablespace]);
    }

    #[test]
    fn says_what_is_wrong() {
        let good =
            [("start-wal-segment", "000000010000000000000004"), ("start-time", "2026-11-21T11:20:09Z")];
        for (key, value, part) in [
            ("start-wal-segment", "x", "`start-wal-segment` is `x`"),
            ("start-time", "yesterday", "`start-time`"),
            ("start-time", "", "lacks `start-time`"),
            ("format", "pghoard-bb-v3", "`pghoard-bb-v3` is not known"),
            ("end-time", "never", "`end-time`"),
        ] {
            let mut pairs = good.to_vec();
            pairs.push((key, value));
            let error = read(&pairs).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(read(&[]).unwrap_err().contains("no metadata"));
    }

    #[test]
    fn a_request_to_preserve_is_read_from_metadata_or_name() {
        let name: PghoardName =
            "2026-11-21_11-20_0.00000000.pghoard_2099-01-01 00:00:00+00:00".parse().unwrap();
        let expected =
            Some(("2026-11-21_11-20_0.00000000.pghoard".to_owned(), "2099-01-01T00:00:00Z".parse().unwrap()));
        assert_eq!(preservation(name, &BTreeMap::new()), expected);
        let pairs = metadata(&[
            ("preserve-backup", "2026-11-21_11-20_0.00000000.pghoard"),
            ("preserve-until", "2099-01-01 00:00:00+00:00"),
        ]);
        assert_eq!(preservation("x".parse().unwrap(), &pairs), expected);
        assert_eq!(preservation("x".parse().unwrap(), &BTreeMap::new()), None);
    }
}
