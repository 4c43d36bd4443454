//! PostgreSQL's `backup_manifest`: every file of a base backup with its size and checksum.
//!
//! Pure. A database of a million files has a manifest of 200 MB, so it is read as a stream: the JSON goes
//! file by file to a visitor while the manifest's own checksum is computed beside it, and nothing is kept.
//! Whoever needs to look files up holds a [`BackupManifest`], about 80 bytes a file.
//!
//! Source: the chapter "Backup Manifest Format" of PostgreSQL's manual.

use std::fmt;
use std::io::{self, Read};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sha2::{Digest as _, Sha256};

use super::lsn::Lsn;
use super::timeline::TimelineId;

/// How a file's checksum was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum ChecksumAlgorithm {
    #[serde(rename = "CRC32C")]
    Crc32c,
    #[serde(rename = "SHA224")]
    Sha224,
    #[serde(rename = "SHA256")]
    Sha256,
    #[serde(rename = "SHA384")]
    Sha384,
    #[serde(rename = "SHA512")]
    Sha512,
}

/// One file of the backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestFile {
    /// Relative to the data directory; tablespaces are below `pg_tblspc/<OID>/`. Bytes, because names
    /// need not be UTF-8.
    pub path: Vec<u8>,
    pub size: u64,
    pub checksum: Option<Checksum>,
}

/// A file's checksum: for CRC-32C the four bytes as the server had them in memory, least significant
/// first on every supported machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    pub algorithm: ChecksumAlgorithm,
    pub bytes: Vec<u8>,
}

impl Checksum {
    /// Whether this is the CRC-32C `value`.
    pub fn is_crc32c(&self, value: u32) -> bool {
        self.algorithm == ChecksumAlgorithm::Crc32c && self.bytes == value.to_le_bytes()
    }
}

/// WAL that the backup needs, on one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct WalRange {
    #[serde(rename = "Timeline")]
    pub timeline: TimelineId,
    #[serde(rename = "Start-LSN")]
    pub start: Lsn,
    #[serde(rename = "End-LSN")]
    pub end: Lsn,
}

/// Everything in a manifest but the files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ManifestSummary {
    /// 1 up to PostgreSQL 16, 2 from 17 on.
    pub version: u64,
    /// From version 2 on.
    pub system_identifier: Option<u64>,
    /// Several only when a standby changed its timeline during the backup.
    pub wal_ranges: Vec<WalRange>,
    pub file_count: u64,
    /// The manifest's own SHA-256, verified.
    pub checksum: [u8; 32],
}

/// A manifest that cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("backup manifest is not as PostgreSQL writes it")]
    Syntax(#[source] serde_json::Error),
    #[error("backup manifest lacks its `{0}`")]
    Missing(&'static str),
    #[error("backup manifest of version {0} is not known")]
    Version(u64),
    #[error("backup manifest does not fit its own checksum")]
    Checksum,
}

/// Reads a manifest and gives each file to `visit`, then checks the manifest's own checksum.
///
/// What `visit` was given is to be believed only once this has returned without an error.
pub fn read_manifest(
    reader: impl Read,
    visit: impl FnMut(ManifestFile),
) -> Result<ManifestSummary, ManifestError> {
    let mut reader = HashingReader::new(reader);
    let mut json = serde_json::Deserializer::from_reader(io::BufReader::with_capacity(64 << 10, &mut reader));
    let parsed =
        (&mut json).deserialize_map(ManifestVisitor(visit)).and_then(|parsed| json.end().map(|()| parsed));
    let (mut summary, claimed) = parsed.map_err(ManifestError::Syntax)?;
    if !matches!(summary.version, 1 | 2) {
        return Err(ManifestError::Version(summary.version));
    }
    let claimed = claimed.ok_or(ManifestError::Missing("Manifest-Checksum"))?;
    summary.checksum = reader.finish();
    if unhex(&claimed).as_deref() != Some(&summary.checksum[..]) {
        return Err(ManifestError::Checksum);
    }
    Ok(summary)
}

/// Hashes what passes through, except the last line, which holds the checksum of all before it.
struct HashingReader<R> {
    inner: R,
    hash: Sha256,
    /// What may belong to the last line.
    held: Vec<u8>,
}

/// More than the last line ever has: its 64 hex digits and what is around them.
const LAST_LINE_BYTES: usize = 256;

impl<R: Read> HashingReader<R> {
    fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new(), held: Vec::new() }
    }

    fn finish(mut self) -> [u8; 32] {
        let text = self.held.strip_suffix(b"\n").unwrap_or(&self.held);
        let end = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        self.hash.update(&self.held[..end]);
        self.hash.finalize().into()
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.held.extend_from_slice(&buffer[..count]);
        let settled = self.held.len().saturating_sub(LAST_LINE_BYTES);
        self.hash.update(&self.held[..settled]);
        self.held.drain(..settled);
        Ok(count)
    }
}

/// Reads the outermost object.
struct ManifestVisitor<F>(F);

impl<'de, F: FnMut(ManifestFile)> Visitor<'de> for ManifestVisitor<F> {
    type Value = (ManifestSummary, Option<String>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a backup manifest")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut summary = ManifestSummary::default();
        let mut checksum = None;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "PostgreSQL-Backup-Manifest-Version" => summary.version = map.next_value()?,
                "System-Identifier" => summary.system_identifier = Some(map.next_value()?),
                "Files" => summary.file_count = map.next_value_seed(Files(&mut self.0))?,
                "WAL-Ranges" => summary.wal_ranges = map.next_value()?,
                "Manifest-Checksum" => checksum = Some(map.next_value()?),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok((summary, checksum))
    }
}

/// Reads the array of files; gives their number.
struct Files<'a, F>(&'a mut F);

impl<'de, F: FnMut(ManifestFile)> DeserializeSeed<'de> for Files<'_, F> {
    type Value = u64;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u64, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(ManifestFile)> Visitor<'de> for Files<'_, F> {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of files")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut files: A) -> Result<u64, A::Error> {
        let mut count = 0;
        while let Some(file) = files.next_element::<WrittenFile>()? {
            (self.0)(file.read().map_err(serde::de::Error::custom)?);
            count += 1;
        }
        Ok(count)
    }
}

/// A file as the server writes it.
#[derive(Deserialize)]
struct WrittenFile {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<ChecksumAlgorithm>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

impl WrittenFile {
    fn read(self) -> Result<ManifestFile, &'static str> {
        let path = match (self.path, self.encoded_path) {
            (Some(path), None) => path.into_bytes(),
            (None, Some(hex)) => unhex(&hex).ok_or("`Encoded-Path` is not hex")?,
            _ => return Err("a file must have either `Path` or `Encoded-Path`"),
        };
        let checksum = match (self.algorithm, self.checksum) {
            (None, None) => None,
            (Some(algorithm), Some(hex)) => {
                Some(Checksum { algorithm, bytes: unhex(&hex).ok_or("`Checksum` is not hex")? })
            }
            _ => return Err("a file must have both `Checksum` and `Checksum-Algorithm`, or none"),
        };
        Ok(ManifestFile { path, size: self.size, checksum })
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |&[high, low]: &[u8; 2]| u8::try_from(digit(high)? << 4 | digit(low)?).ok();
    rest.is_empty().then(|| pairs.iter().map(byte).collect()).flatten()
}

/// A verified manifest whose files can be looked up by path.
#[derive(Clone, Debug)]
pub struct BackupManifest {
    summary: ManifestSummary,
    /// Sorted by path.
    entries: Vec<Entry>,
    /// Path and checksum of each entry, one after the other.
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    offset: usize,
    size: u64,
    path_length: u16,
    checksum_length: u8,
    algorithm: Option<ChecksumAlgorithm>,
}

impl BackupManifest {
    /// Reads and verifies a whole manifest.
    pub fn read(reader: impl Read) -> Result<Self, ManifestError> {
        let mut entries = Vec::new();
        let mut bytes = Vec::new();
        let mut too_long = false;
        let summary = read_manifest(reader, |file| {
            let checksum = file.checksum.as_ref().map_or(&[][..], |checksum| &checksum.bytes);
            let (Ok(path_length), Ok(checksum_length)) =
                (u16::try_from(file.path.len()), u8::try_from(checksum.len()))
            else {
                too_long = true;
                return;
            };
            entries.push(Entry {
                offset: bytes.len(),
                size: file.size,
                path_length,
                checksum_length,
                algorithm: file.checksum.as_ref().map(|checksum| checksum.algorithm),
            });
            bytes.extend_from_slice(&file.path);
            bytes.extend_from_slice(checksum);
        })?;
        if too_long {
            // Neither PostgreSQL nor the operating system knows such a path, nor SHA such a digest.
            return Err(ManifestError::Syntax(serde::de::Error::custom("a path or checksum is too long")));
        }
        entries.sort_unstable_by(|a, b| path(&bytes, a).cmp(path(&bytes, b)));
        Ok(Self { summary, entries, bytes })
    }

    pub const fn summary(&self) -> &ManifestSummary {
        &self.summary
    }

    pub fn get(&self, wanted: &[u8]) -> Option<ManifestFile> {
        let index = self.entries.binary_search_by(|entry| path(&self.bytes, entry).cmp(wanted)).ok()?;
        Some(self.file(&self.entries[index]))
    }

    /// All files, by path.
    pub fn files(&self) -> impl Iterator<Item = ManifestFile> {
        self.entries.iter().map(|entry| self.file(entry))
    }

    fn file(&self, entry: &Entry) -> ManifestFile {
        let path = path(&self.bytes, entry);
        let checksum = &self.bytes[entry.offset + path.len()..][..usize::from(entry.checksum_length)];
        let checksum = entry.algorithm.map(|algorithm| Checksum { algorithm, bytes: checksum.to_vec() });
        ManifestFile { path: path.to_vec(), size: entry.size, checksum }
    }
}

fn path<'a>(bytes: &'a [u8], entry: &Entry) -> &'a [u8] {
    &bytes[entry.offset..][..usize::from(entry.path_length)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|digit| char::from_digit(digit.into(), 16).unwrap())
            .collect()
    }

    fn line(file: &ManifestFile) -> String {
        let path = match std::str::from_utf8(&file.path) {
            Ok(path) => format!("\"Path\": {}", serde_json::to_string(path).unwrap()),
            Err(_) => format!("\"Encoded-Path\": \"{}\"", hex(&file.path)),
        };
        let checksum = file.checksum.as_ref().map(|Checksum { algorithm, bytes }| {
            let name = format!("{algorithm:?}").to_uppercase();
            format!(", \"Checksum-Algorithm\": \"{name}\", \"Checksum\": \"{}\"", hex(bytes))
        });
        let (size, checksum) = (file.size, checksum.unwrap_or_default());
        format!("{{ {path}, \"Size\": {size}, \"Last-Modified\": \"2026-11-21 10:00:00 GMT\"{checksum} }}")
    }

    /// Writes a manifest as the server does.
    fn manifest(version: u64, files: &[ManifestFile]) -> String {
        let system = if version > 1 { "\"System-Identifier\": 7300000000000000001,\n" } else { "" };
        let files = files.iter().map(line).collect::<Vec<_>>().join(",\n");
        let text = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": {version},\n{system}\"Files\": [\n{files}\n],\n\
             \"WAL-Ranges\": [\n\
             {{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }}\n],\n"
        );
        let checksum = hex(&Sha256::digest(text.as_bytes()));
        text + &format!("\"Manifest-Checksum\": \"{checksum}\"}}\n")
    }

    /// Gives a reader's bytes in small pieces.
    struct Dribble<'a>(&'a [u8], usize);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(buffer.len()).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn arbitrary_file() -> impl Strategy<Value = ManifestFile> {
        let path = prop_oneof![
            "[a-z/\"\\\\é]{1,30}".prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 1..20),
        ];
        let checksum = prop_oneof![
            Just(None),
            any::<[u8; 4]>()
                .prop_map(|crc| Some(Checksum { algorithm: ChecksumAlgorithm::Crc32c, bytes: crc.to_vec() })),
            any::<[u8; 32]>()
                .prop_map(|sha| Some(Checksum { algorithm: ChecksumAlgorithm::Sha256, bytes: sha.to_vec() })),
        ];
        (path, any::<u64>(), checksum).prop_map(|(path, size, checksum)| ManifestFile {
            path,
            size,
            checksum,
        })
    }

    proptest! {
        #[test]
        fn every_file_is_found_again(
            version in 1_u64..=2,
            files in prop::collection::vec(arbitrary_file(), 0..20),
            piece in 1_usize..400,
        ) {
            let text = manifest(version, &files);
            let mut visited = Vec::new();
            let summary = read_manifest(Dribble(text.as_bytes(), piece), |file| visited.push(file)).unwrap();
            prop_assert_eq!(&visited, &files);
            prop_assert_eq!(summary.file_count, files.len() as u64);
            prop_assert_eq!(summary.system_identifier, (version > 1).then_some(7_300_000_000_000_000_001));
            prop_assert_eq!(summary.wal_ranges[0].end, Lsn::new(0x0200_0100));
            let manifest = BackupManifest::read(text.as_bytes()).unwrap();
            prop_assert_eq!(manifest.files().count(), files.len());
            for file in &files {
                let same_path = |other: &&ManifestFile| other.path == file.path;
                if files.iter().filter(same_path).count() == 1 {
                    let found = manifest.get(&file.path);
                    prop_assert_eq!(found.as_ref(), Some(file));
                }
            }
        }

        #[test]
        fn a_changed_byte_is_noticed(at: prop::sample::Index, bit in 0_u32..7) {
            let file = ManifestFile { path: b"base/1/2".to_vec(), size: 8192, checksum: None };
            let mut bytes = manifest(2, &[file]).into_bytes();
            // The final line end is not part of what is protected.
            let at = at.index(bytes.len() - 1);
            let before = bytes[at];
            bytes[at] ^= 1 << bit;
            // Hex digits mean the same in either case.
            prop_assume!(!(before.is_ascii_alphabetic() && bytes[at].eq_ignore_ascii_case(&before)));
            prop_assert!(BackupManifest::read(&bytes[..]).is_err());
        }

        #[test]
        fn any_text_is_refused_without_panic(text in "[\\[\\]{}\":, a-zA-Z0-9-]{0,80}") {
            prop_assert!(BackupManifest::read(text.as_bytes()).is_err());
        }
    }

    #[test]
    fn crc_is_compared_in_memory_order() {
        let checksum = Checksum { algorithm: ChecksumAlgorithm::Crc32c, bytes: vec![4, 3, 2, 1] };
        assert!(checksum.is_crc32c(0x0102_0304));
    }

    #[test]
    fn an_unknown_version_is_refused() {
        assert!(matches!(BackupManifest::read(manifest(3, &[]).as_bytes()), Err(ManifestError::Version(3))));
    }
}
