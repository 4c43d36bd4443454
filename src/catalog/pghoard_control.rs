//! What the control object of one of PGHoard's chunked backups says: chunks, tablespaces, and of a delta
//! backup every file.
//!
//! Pure. The control object is a tar archive with `.pghoard_tar_metadata.json`, `global/pg_control`, the
//! backup label and empty directories. The JSON can name a million files, so what is kept of it is small:
//! of names that only have to be recognised, a hash.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::file_list::EntryPath;
use super::pghoard_backup::PghoardTablespace;
use crate::postgres::SegmentName;
use crate::repository::{ObjectName, PghoardFolder, PghoardName};

/// The member of the control object that holds the JSON.
pub const CONTROL_MEMBER: &[u8] = b".pghoard_tar_metadata.json";

/// The control object of a backup, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PghoardControl {
    pub start_segment: Option<SegmentName>,
    pub end_segment: Option<SegmentName>,
    pub tablespaces: Vec<PghoardTablespace>,
    pub chunks: Vec<PghoardChunk>,
    /// BLAKE2s digests of files, with their sizes, where PGHoard computed them for its statistics.
    pub digests: BTreeMap<FileDigest, u64>,
    /// Of delta backups.
    pub delta: Option<PghoardDelta>,
}

/// A chunk of a `local-tar` backup or a bundle of a delta backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PghoardChunk {
    pub object: ObjectName,
    /// Bytes of the tar archive.
    pub plaintext_length: u64,
    /// Bytes of the object.
    pub stored_length: u64,
    /// The members it may have.
    pub members: NameSet,
}

/// The files of a delta backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PghoardDelta {
    pub directories: Vec<EntryPath>,
    /// Stored as objects of their own.
    pub files: Vec<DeltaFile>,
    /// Held by the manifest itself.
    pub embedded: Vec<EmbeddedFile>,
    /// Those that a bundle must have.
    pub bundled: NameSet,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaFile {
    pub path: EntryPath,
    pub size: u64,
    pub digest: FileDigest,
    /// Seconds since 1970 UTC.
    pub modified: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedFile {
    pub path: EntryPath,
    pub content: Vec<u8>,
    pub modified: i64,
}

/// BLAKE2s-256 of a file's content, as PGHoard names delta files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileDigest([u8; 32]);

impl FileDigest {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn parse(text: &str) -> Option<Self> {
        let lower = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        if text.len() != 64 || !text.as_bytes().iter().all(lower) {
            return None;
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// The object that holds the file.
    ///
    /// # Panics
    /// Never: hex digits are a name.
    pub fn object(self) -> ObjectName {
        let name = self.to_string().parse().expect("hex digits are a name");
        ObjectName::Pghoard { folder: PghoardFolder::DeltaFiles, name }
    }
}

impl fmt::Display for FileDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FileDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A set of names, eight bytes for each. Two names that are mistaken for each other are as likely as a
/// collision of 64 bits of BLAKE3.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameSet(Vec<u64>);

impl NameSet {
    fn hash(name: &[u8]) -> u64 {
        let name = name.strip_suffix(b"/").unwrap_or(name);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&blake3::hash(name).as_bytes()[..8]);
        u64::from_le_bytes(bytes)
    }

    pub fn contains(&self, name: &[u8]) -> bool {
        self.0.binary_search(&Self::hash(name)).is_ok()
    }

    pub fn insert(&mut self, name: &[u8]) {
        self.0.push(Self::hash(name));
    }

    pub fn absorb(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    /// After the last name, before the first question.
    pub fn settle(&mut self) {
        self.0.sort_unstable();
        self.0.dedup();
    }

    /// Whether all of `other` is in this set too.
    pub fn includes(&self, other: &Self) -> bool {
        other.0.iter().all(|hash| self.0.binary_search(hash).is_ok())
    }
}

impl<'de> Deserialize<'de> for NameSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = NameSet;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("names of files")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<NameSet, A::Error> {
                let mut set = NameSet::default();
                while let Some(name) = names.next_element::<std::borrow::Cow<'de, str>>()? {
                    set.insert(name.as_bytes());
                }
                set.settle();
                Ok(set)
            }
        }
        deserializer.deserialize_seq(Names)
    }
}

impl PghoardControl {
    /// Reads the JSON of the backup whose object is called `backup`. The error says what is wrong with it.
    pub fn parse(backup: PghoardName, json: &[u8]) -> Result<Self, String> {
        let raw: Raw = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let segment = |text: Option<String>, key: &str| {
            text.map(|text| text.parse().map_err(|_| format!("its `{key}` is `{text}`"))).transpose()
        };
        let is_delta = raw.manifest.is_some();
        let chunks = raw.chunks.unwrap_or_default();
        let delta = raw.manifest.map(|manifest| delta(manifest.snapshot_result.state)).transpose()?;
        let digests = raw.delta_stats.unwrap_or_default().hashes;
        Ok(Self {
            start_segment: segment(raw.backup_start_wal_segment, "backup_start_wal_segment")?,
            end_segment: segment(raw.backup_end_wal_segment, "backup_end_wal_segment")?,
            tablespaces: raw
                .tablespaces
                .into_iter()
                .map(|(name, at)| PghoardTablespace { name, oid: at.oid, location: at.path })
                .collect(),
            chunks: chunks
                .into_iter()
                .map(|chunk| chunk_of(chunk, backup, is_delta))
                .collect::<Result<_, _>>()?,
            digests: digests
                .into_iter()
                .map(|(digest, size)| {
                    Ok((FileDigest::parse(&digest).ok_or(format!("`{digest}` is no digest"))?, size))
                })
                .collect::<Result<_, String>>()?,
            delta,
        })
    }

    /// The delta files it refers to.
    pub fn delta_files(&self) -> impl Iterator<Item = FileDigest> {
        self.delta.iter().flat_map(|delta| delta.files.iter().map(|file| file.digest))
    }
}

fn chunk_of(chunk: RawChunk, backup: PghoardName, is_delta: bool) -> Result<PghoardChunk, String> {
    let folder = if is_delta { PghoardFolder::DeltaChunks } else { PghoardFolder::Chunks };
    let named = chunk.chunk_filename;
    // A chunk of another backup would restore as well, and make a mixture of two.
    let own = named.strip_prefix(backup.base()).is_some_and(|rest| rest.starts_with('/'));
    let name = named.parse().ok().filter(|_| own).ok_or_else(|| format!("`{named}` is no chunk of it"))?;
    Ok(PghoardChunk {
        object: ObjectName::Pghoard { folder, name },
        plaintext_length: chunk.input_size,
        stored_length: chunk.result_size,
        members: chunk.files,
    })
}

fn delta(state: RawState) -> Result<PghoardDelta, String> {
    let path = |text: &str| EntryPath::new(text).map_err(|error| error.to_string());
    let mut delta = PghoardDelta {
        directories: Vec::new(),
        files: Vec::new(),
        embedded: Vec::new(),
        bundled: NameSet::default(),
    };
    // The first one stands for the data directory itself.
    for directory in state.empty_dirs.iter().filter(|directory| !matches!(directory.as_str(), "." | "")) {
        delta.directories.push(path(directory)?);
    }
    for file in state.files {
        let modified = file.mtime_ns.unwrap_or_default() / 1_000_000_000;
        if !file.hexdigest.is_empty() {
            let digest = FileDigest::parse(&file.hexdigest)
                .ok_or_else(|| format!("`{}` is no digest", file.hexdigest))?;
            let path = path(&file.relative_path)?;
            delta.files.push(DeltaFile { path, size: file.file_size, digest, modified });
        } else if let Some(content) = file.content_b64 {
            let content = BASE64
                .decode(content)
                .ok()
                .filter(|content| content.len() as u64 == file.file_size)
                .ok_or_else(|| {
                    format!("the content of `{}` is not {} bytes long", file.relative_path, file.file_size)
                })?;
            delta.embedded.push(EmbeddedFile { path: path(&file.relative_path)?, content, modified });
        } else if file.should_be_bundled {
            if !file.missing_ok {
                delta.bundled.insert(file.relative_path.as_bytes());
            }
        } else {
            return Err(format!("it does not say where the content of `{}` is", file.relative_path));
        }
    }
    delta.bundled.settle();
    Ok(delta)
}

#[derive(Deserialize)]
struct Raw {
    backup_start_wal_segment: Option<String>,
    backup_end_wal_segment: Option<String>,
    #[serde(default)]
    tablespaces: BTreeMap<String, RawTablespace>,
    chunks: Option<Vec<RawChunk>>,
    delta_stats: Option<RawStats>,
    manifest: Option<RawManifest>,
}

#[derive(Deserialize)]
struct RawTablespace {
    path: String,
    #[serde(deserialize_with = "number_or_text")]
    oid: u32,
}

#[derive(Deserialize)]
struct RawChunk {
    chunk_filename: String,
    input_size: u64,
    result_size: u64,
    #[serde(default)]
    files: NameSet,
}

#[derive(Default, Deserialize)]
struct RawStats {
    #[serde(default)]
    hashes: BTreeMap<String, u64>,
}

#[derive(Deserialize)]
struct RawManifest {
    snapshot_result: RawSnapshot,
}

#[derive(Deserialize)]
struct RawSnapshot {
    state: RawState,
}

#[derive(Deserialize)]
struct RawState {
    empty_dirs: Vec<String>,
    files: Vec<RawFile>,
}

#[derive(Deserialize)]
struct RawFile {
    relative_path: String,
    file_size: u64,
    mtime_ns: Option<i64>,
    #[serde(default)]
    hexdigest: String,
    content_b64: Option<String>,
    #[serde(default)]
    should_be_bundled: bool,
    #[serde(default)]
    missing_ok: bool,
}

fn number_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u32),
        Text(String),
    }
    match Either::deserialize(deserializer)? {
        Either::Number(number) => Ok(number),
        Either::Text(text) => text.parse().map_err(de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "69217a3079908094e11121d042354a7c1f55b6482ca1a51e1b250dfd1ed0eef9";

    fn backup() -> PghoardName {
        "2026-11-21_11-20_0.00000000.pghoard".parse().unwrap()
    }

    fn file(fields: &str) -> String {
        format!(
            r#"{{"backup_start_wal_segment":"000000010000000000000004","tablespaces":{{}},
            "chunks":[{{"chunk_filename":"2026-11-21_11-20_0/2026-11-21_11-20_0.00000001.pghoard",
                       "input_size":20480,"result_size":99,"files":["base/1/2","base"]}}],
            "manifest":{{"start":"x","snapshot_result":{{"files":1,"state":{{"root_globs":["**/*"],
                "empty_dirs":[".","base","pg_wal"],"files":[{{"relative_path":"base/1/3","mtime_ns":1700000000000000001,{fields}}}]}}}}}}}}"#
        )
    }

    fn read(json: &str) -> Result<PghoardControl, String> {
        PghoardControl::parse(backup(), json.as_bytes())
    }

    #[test]
    fn reads_the_three_kinds_of_files() {
        let hashed = read(&file(&format!(
            r#""file_size":7,"stored_file_size":9,"hexdigest":"{HEX}","content_b64":null,"should_be_bundled":false"#
        )))
        .unwrap();
        let delta = hashed.delta.as_ref().unwrap();
        assert_eq!((delta.files[0].size, delta.files[0].modified), (7, 1_700_000_000));
        assert_eq!(delta.files[0].digest.object().to_key(), format!("basebackup_delta/{HEX}"));
        assert_eq!(delta.directories.len(), 2);
        assert!(hashed.chunks[0].members.contains(b"base/"));
        assert!(!hashed.chunks[0].members.contains(b"base/1"));
        assert_eq!(hashed.delta_files().count(), 1);

        let embedded = read(&file(r#""file_size":2,"hexdigest":"","content_b64":"MTc=""#)).unwrap();
        assert_eq!(embedded.delta.unwrap().embedded[0].content, b"17");
        let bundled =
            read(&file(r#""file_size":200,"hexdigest":"","content_b64":null,"should_be_bundled":true"#));
        assert!(bundled.unwrap().delta.unwrap().bundled.contains(b"base/1/3"));
    }

    #[test]
    fn refuses_what_cannot_be_restored() {
        for fields in [
            r#""file_size":3,"hexdigest":"","content_b64":"MTc=""#,
            r#""file_size":3,"hexdigest":"","content_b64":null"#,
            r#""file_size":3,"hexdigest":"../../etc/passwd""#,
        ] {
            assert!(read(&file(fields)).is_err(), "{fields}");
        }
        let good = file(r#""file_size":2,"content_b64":"MTc=""#);
        for (from, to) in [
            ("base/1/3", "../../etc/passwd"),
            ("base/1/3", "/etc/passwd"),
            ("\"pg_wal\"", "\"../x\""),
            ("2026-11-21_11-20_0/", "2026-11-20_11-20_0/"),
            ("2026-11-21_11-20_0/", "2026-11-21_11-20_0/../"),
        ] {
            assert!(read(&good.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn reads_tablespaces_and_statistics() {
        let json = format!(
            r#"{{"tablespaces":{{"fast, one":{{"path":"/mnt/fast","oid":16385}},"b":{{"path":"/b","oid":"16386"}}}},
            "chunks":[],"delta_stats":{{"hashes":{{"{HEX}":100}}}},"host":"x","pghoard_version":"2.7.0"}}"#
        );
        let control = read(&json).unwrap();
        let names: Vec<_> = control.tablespaces.iter().map(|at| (at.name.as_str(), at.oid)).collect();
        assert_eq!(names, [("b", 16386), ("fast, one", 16385)]);
        assert_eq!(control.digests.values().collect::<Vec<_>>(), [&100]);
    }
}
