//! The file list of a backup: what a restore writes, and where in the packs each byte lies.
//!
//! Pure. The plaintext of `backup/<name>/files` is one JSON object per line, in the order in which the
//! server sent the files:
//!
//! ```text
//! {"format":1,"backup":"20261121T100000Z"}
//! {"path":"base","type":"directory","mode":"0700"}
//! {"path":"base/5/1259","type":"file","mode":"0600","size":114688,"mtime":1795255200,"crc32c":"0a1b2c3d",
//!  "extents":[[0,4096,20311,114688,"zstd","<64 hex digits>"]]}
//! {"path":"pg_tblspc/16384","type":"link","mode":"0777","target":"/mnt/fast"}
//! {"end":true,"entries":3}
//! ```
//!
//! (each entry on one line). The last line counts the entries, so that a list that was cut shows.
//!
//! * `path` is relative to the data directory, with `/` between components; files of a tablespace are
//!   `pg_tblspc/<oid>/…`. A name that is not UTF-8 stands, in base64, under `path64` instead; so does a
//!   link's `target` under `target64`.
//! * `mode` is octal. `mtime` is in seconds since 1970 UTC. `crc32c` covers the whole file, eight hex digits.
//! * `extents` cover the file's bytes exactly, in order. Each is an array of
//!   `[pack, offset, stored_length, raw_length, compression, digest]`: `stored_length` bytes at `offset` in
//!   the pack, which decompress to `raw_length` bytes with that BLAKE3 digest. `pack` is the number of one
//!   of this backup's own packs, or `"<backup>/<number>"` for one of an earlier backup. Where only a part of
//!   a frame belongs to the file, two more numbers follow: `skip`, the bytes of the raw frame before that
//!   part, and `take`, its length.
//!
//! A list is hostile until proven otherwise: paths that could lead out of the target directory and extents
//! that do not add up are refused here, before anything is done with them.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::{self, SeqAccess, Visitor};
use serde::ser::SerializeTuple;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::codec::{Compression, Digest, MAX_FRAME_LENGTH};
use crate::repository::{BackupName, FrameRef, PackId};

/// The format this program writes, and the highest it reads.
pub const FILE_LIST_FORMAT: u32 = 1;

/// The longest line that is read or written. An extent takes about 110 bytes, so this is one file of
/// 150 GiB; PostgreSQL's own end at 1 GiB (120 KB here). It bounds what a damaged list can make us hold.
pub const MAX_LINE_LENGTH: usize = 16 << 20;

/// As `PATH_MAX` on Linux, without its final NUL.
const MAX_PATH_LENGTH: usize = 4095;

/// One file, directory or link of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    pub path: EntryPath,
    /// Permission bits.
    pub mode: u32,
    pub kind: EntryKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    File {
        /// Bytes.
        size: u64,
        /// Seconds since 1970 UTC.
        mtime: i64,
        /// Of the whole file.
        crc32c: u32,
        /// In file order; they cover exactly `size` bytes.
        extents: Vec<Extent>,
    },
    Directory,
    Symlink {
        target: Vec<u8>,
    },
}

/// Bytes of a file: `take` bytes from `skip` on in the raw bytes of `frame`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub frame: FrameRef,
    pub skip: u32,
    pub take: u32,
}

/// A path below the data directory: relative, and made of plain names only.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryPath(Vec<u8>);

impl EntryPath {
    /// Takes a path as the server sends it; bytes, because file names need not be text.
    pub fn new(path: impl Into<Vec<u8>>) -> Result<Self, FileListError> {
        let path = Self(path.into());
        let refuse = |reason| Err(FileListError::Path { path: path.to_string(), reason });
        if path.0.is_empty() {
            return refuse("it is empty");
        }
        if path.0.len() > MAX_PATH_LENGTH {
            return refuse("it is too long");
        }
        if path.0.contains(&0) {
            return refuse("it contains a NUL");
        }
        if path.0.starts_with(b"/") {
            return refuse("it is absolute");
        }
        for component in path.components() {
            match component {
                b"" => return refuse("it has an empty component"),
                b"." | b".." => return refuse("it has a component `.` or `..`"),
                _ => {}
            }
        }
        Ok(path)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The names from the data directory down; at least one.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/')
    }
}

/// What is not UTF-8 shows as `�`.
impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.0).escape_debug().fmt(f)
    }
}

impl fmt::Debug for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A file list that cannot be written or believed.
#[derive(Debug, thiserror::Error)]
pub enum FileListError {
    #[error("file list has format {0}, this version of pgkeep reads up to {FILE_LIST_FORMAT}")]
    NewerFormat(u32),
    #[error("file list belongs to backup `{0}`")]
    OtherBackup(BackupName),
    #[error("line {line} of the file list is not what pgkeep writes")]
    Syntax { line: u64, source: serde_json::Error },
    #[error("line {line} of the file list: {reason}")]
    Line { line: u64, reason: &'static str },
    #[error("path `{path}` is refused: {reason}")]
    Path { path: String, reason: &'static str },
    #[error("extents of `{path}` are refused: {reason}")]
    Extents { path: String, reason: &'static str },
    #[error("link `{path}` is refused: its target is empty or contains a NUL")]
    Target { path: String },
    #[error("line of `{path}` would be longer than {MAX_LINE_LENGTH} bytes")]
    TooLong { path: String },
    #[error("file list ends after {entries} entries without its last line")]
    Truncated { entries: u64 },
    #[error("file list has {found} entries and announces {announced}")]
    Count { found: u64, announced: u64 },
}

impl FileEntry {
    /// Whether a restore could write this entry: link targets that can be made, extents that add up.
    pub fn validate(&self) -> Result<(), FileListError> {
        match &self.kind {
            EntryKind::Symlink { target } if target.is_empty() || target.contains(&0) => {
                Err(FileListError::Target { path: self.path.to_string() })
            }
            EntryKind::Directory | EntryKind::Symlink { .. } => Ok(()),
            EntryKind::File { size, extents, .. } => check_extents(*size, extents)
                .map_err(|reason| FileListError::Extents { path: self.path.to_string(), reason }),
        }
    }
}

fn check_extents(size: u64, extents: &[Extent]) -> Result<(), &'static str> {
    let mut covered = 0_u64;
    for extent in extents {
        let frame = &extent.frame;
        if frame.raw_length as usize > MAX_FRAME_LENGTH {
            return Err("a frame is larger than 1 MiB");
        }
        if frame.stored_length == 0 || frame.offset.checked_add(frame.stored_length.into()).is_none() {
            return Err("a frame lies nowhere in its pack");
        }
        if extent.take == 0 {
            return Err("an extent is empty");
        }
        if u64::from(extent.skip) + u64::from(extent.take) > u64::from(frame.raw_length) {
            return Err("an extent reaches over the end of its frame");
        }
        covered += u64::from(extent.take);
    }
    if covered == size { Ok(()) } else { Err("they do not add up to the file's size") }
}

// The lines as JSON.

#[derive(Serialize, Deserialize)]
struct HeaderLine {
    format: u32,
    backup: BackupName,
}

#[derive(Serialize, Deserialize)]
struct EndLine {
    end: bool,
    entries: u64,
}

#[derive(Serialize, Deserialize)]
struct EntryLine {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path64: Option<String>,
    #[serde(rename = "type")]
    kind: KindLine,
    mode: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtime: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crc32c: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    extents: Option<Vec<ExtentLine>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target64: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum KindLine {
    File,
    Directory,
    Link,
}

struct ExtentLine {
    /// None for the backup's own packs.
    backup: Option<BackupName>,
    number: u32,
    offset: u64,
    stored_length: u32,
    raw_length: u32,
    compression: Compression,
    digest: Digest,
    part: Option<(u32, u32)>,
}

impl Serialize for ExtentLine {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(if self.part.is_some() { 8 } else { 6 })?;
        match self.backup {
            None => tuple.serialize_element(&self.number)?,
            Some(backup) => tuple.serialize_element(&format_args!("{backup}/{}", self.number))?,
        }
        tuple.serialize_element(&self.offset)?;
        tuple.serialize_element(&self.stored_length)?;
        tuple.serialize_element(&self.raw_length)?;
        tuple.serialize_element(&self.compression)?;
        tuple.serialize_element(&self.digest)?;
        if let Some((skip, take)) = self.part {
            tuple.serialize_element(&skip)?;
            tuple.serialize_element(&take)?;
        }
        tuple.end()
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PackLine {
    Own(u32),
    Other(String),
}

impl<'de> Deserialize<'de> for ExtentLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Extents;
        impl<'de> Visitor<'de> for Extents {
            type Value = ExtentLine;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an extent of six or eight elements")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<ExtentLine, A::Error> {
                fn next<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
                    elements: &mut A,
                ) -> Result<T, A::Error> {
                    elements.next_element()?.ok_or_else(|| de::Error::custom("an extent is cut short"))
                }
                let (backup, number) = match next(&mut elements)? {
                    PackLine::Own(number) => (None, number),
                    PackLine::Other(text) => text
                        .split_once('/')
                        .and_then(|(backup, number)| Some((Some(backup.parse().ok()?), number.parse().ok()?)))
                        .ok_or_else(|| de::Error::custom("a pack is not `<backup>/<number>`"))?,
                };
                let mut extent = ExtentLine {
                    backup,
                    number,
                    offset: next(&mut elements)?,
                    stored_length: next(&mut elements)?,
                    raw_length: next(&mut elements)?,
                    compression: next(&mut elements)?,
                    digest: next(&mut elements)?,
                    part: None,
                };
                if let Some(skip) = elements.next_element()? {
                    extent.part = Some((skip, next(&mut elements)?));
                }
                if elements.next_element::<de::IgnoredAny>()?.is_some() {
                    return Err(de::Error::custom("an extent has more than eight elements"));
                }
                Ok(extent)
            }
        }
        deserializer.deserialize_seq(Extents)
    }
}

/// Text under one key, or bytes that are no text under the other.
fn text_or_base64(bytes: &[u8]) -> (Option<String>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (None, Some(BASE64.encode(bytes))),
    }
}

fn bytes_of(text: Option<String>, base64: Option<String>) -> Result<Vec<u8>, &'static str> {
    match (text, base64) {
        (Some(text), None) => Ok(text.into_bytes()),
        (None, Some(base64)) => BASE64.decode(base64).map_err(|_| "a name is not base64"),
        _ => Err("a name must be given once, as text or as base64"),
    }
}

/// Writes the lines of a file list.
#[derive(Debug)]
pub struct FileListEncoder {
    backup: BackupName,
    entries: u64,
}

impl FileListEncoder {
    /// Begins the list of `backup` and appends its first line to `lines`.
    pub fn new(backup: BackupName, lines: &mut Vec<u8>) -> Self {
        push_line(&HeaderLine { format: FILE_LIST_FORMAT, backup }, lines);
        Self { backup, entries: 0 }
    }

    /// Appends the line of `entry` to `lines`; on an error they stay as they were.
    pub fn entry(&mut self, entry: &FileEntry, lines: &mut Vec<u8>) -> Result<(), FileListError> {
        entry.validate()?;
        let (path, path64) = text_or_base64(entry.path.as_bytes());
        let mut line = EntryLine {
            path,
            path64,
            kind: KindLine::Directory,
            mode: format!("{:04o}", entry.mode),
            size: None,
            mtime: None,
            crc32c: None,
            extents: None,
            target: None,
            target64: None,
        };
        match &entry.kind {
            EntryKind::Directory => {}
            EntryKind::Symlink { target } => {
                line.kind = KindLine::Link;
                (line.target, line.target64) = text_or_base64(target);
            }
            EntryKind::File { size, mtime, crc32c, extents } => {
                line.kind = KindLine::File;
                line.size = Some(*size);
                line.mtime = Some(*mtime);
                line.crc32c = Some(format!("{crc32c:08x}"));
                line.extents = Some(extents.iter().map(|extent| self.extent_line(extent)).collect());
            }
        }
        let start = lines.len();
        push_line(&line, lines);
        if lines.len() - start > MAX_LINE_LENGTH {
            lines.truncate(start);
            return Err(FileListError::TooLong { path: entry.path.to_string() });
        }
        self.entries += 1;
        Ok(())
    }

    /// Appends the last line to `lines`.
    pub fn finish(self, lines: &mut Vec<u8>) {
        push_line(&EndLine { end: true, entries: self.entries }, lines);
    }

    fn extent_line(&self, extent: &Extent) -> ExtentLine {
        let Extent { frame, skip, take } = *extent;
        ExtentLine {
            backup: (frame.pack.backup != self.backup).then_some(frame.pack.backup),
            number: frame.pack.number,
            offset: frame.offset,
            stored_length: frame.stored_length,
            raw_length: frame.raw_length,
            compression: frame.compression,
            digest: frame.digest,
            part: (skip != 0 || take != frame.raw_length).then_some((skip, take)),
        }
    }
}

fn push_line(line: &impl Serialize, lines: &mut Vec<u8>) {
    serde_json::to_writer(&mut *lines, line).expect("a line has nothing JSON cannot hold");
    lines.push(b'\n');
}

/// Reads the lines of a file list, in whatever chunks they come.
#[derive(Debug)]
pub struct FileListDecoder {
    backup: BackupName,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were taken as lines.
    taken: usize,
    /// Bytes of `buffer` known to hold no further line end.
    searched: usize,
    line: u64,
    entries: u64,
    ended: bool,
}

impl FileListDecoder {
    /// Expects the list of `backup`.
    pub const fn new(backup: BackupName) -> Self {
        Self { backup, buffer: Vec::new(), taken: 0, searched: 0, line: 0, entries: 0, ended: false }
    }

    /// Takes the next bytes of the list.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.searched -= self.taken;
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next entry of what was pushed; none when more bytes are needed.
    pub fn next_entry(&mut self) -> Result<Option<FileEntry>, FileListError> {
        loop {
            let Some(found) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.buffer.len();
                if self.searched - self.taken > MAX_LINE_LENGTH {
                    return Err(FileListError::Line { line: self.line + 1, reason: "it is too long" });
                }
                return Ok(None);
            };
            let line = self.taken..self.searched + found;
            self.taken = line.end + 1;
            self.searched = self.taken;
            self.line += 1;
            if let Some(entry) = self.read_line(line)? {
                return Ok(Some(entry));
            }
        }
    }

    /// Confirms that the list is whole, and counts its entries.
    pub fn finish(self) -> Result<u64, FileListError> {
        if self.ended && self.taken == self.buffer.len() {
            Ok(self.entries)
        } else if self.ended {
            Err(FileListError::Line { line: self.line + 1, reason: "it comes after the last line" })
        } else {
            Err(FileListError::Truncated { entries: self.entries })
        }
    }

    fn read_line(&mut self, line: std::ops::Range<usize>) -> Result<Option<FileEntry>, FileListError> {
        let json = &self.buffer[line];
        let number = self.line;
        let syntax = |source| FileListError::Syntax { line: number, source };
        if self.ended {
            return Err(FileListError::Line { line: number, reason: "it comes after the last line" });
        }
        if number == 1 {
            let header: HeaderLine = serde_json::from_slice(json).map_err(syntax)?;
            return if header.format > FILE_LIST_FORMAT {
                Err(FileListError::NewerFormat(header.format))
            } else if header.backup != self.backup {
                Err(FileListError::OtherBackup(header.backup))
            } else {
                Ok(None)
            };
        }
        // The encoder writes keys in a fixed order, so the last line tells itself apart by its first key.
        if json.starts_with(b"{\"end\"") {
            let end: EndLine = serde_json::from_slice(json).map_err(syntax)?;
            if end.entries != self.entries {
                return Err(FileListError::Count { found: self.entries, announced: end.entries });
            }
            self.ended = true;
            return Ok(None);
        }
        let entry: EntryLine = serde_json::from_slice(json).map_err(syntax)?;
        let entry = entry.into_entry(self.backup, number)?;
        self.entries += 1;
        Ok(Some(entry))
    }
}

impl EntryLine {
    fn into_entry(self, backup: BackupName, line: u64) -> Result<FileEntry, FileListError> {
        let refuse = |reason| FileListError::Line { line, reason };
        let path = EntryPath::new(bytes_of(self.path, self.path64).map_err(refuse)?)?;
        let mode = u32::from_str_radix(&self.mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o7777 && !self.mode.starts_with('+'))
            .ok_or_else(|| refuse("`mode` is not an octal permission"))?;
        let kind = match self.kind {
            KindLine::Directory => EntryKind::Directory,
            KindLine::Link => {
                EntryKind::Symlink { target: bytes_of(self.target, self.target64).map_err(refuse)? }
            }
            KindLine::File => EntryKind::File {
                size: self.size.ok_or_else(|| refuse("`size` is missing"))?,
                mtime: self.mtime.ok_or_else(|| refuse("`mtime` is missing"))?,
                crc32c: self
                    .crc32c
                    .filter(|hex| hex.len() == 8 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
                    .and_then(|hex| u32::from_str_radix(&hex, 16).ok())
                    .ok_or_else(|| refuse("`crc32c` is not eight hex digits"))?,
                extents: self
                    .extents
                    .ok_or_else(|| refuse("`extents` are missing"))?
                    .into_iter()
                    .map(|extent| extent.into_extent(backup))
                    .collect(),
            },
        };
        let entry = FileEntry { path, mode, kind };
        entry.validate()?;
        Ok(entry)
    }
}

impl ExtentLine {
    fn into_extent(self, backup: BackupName) -> Extent {
        let (skip, take) = self.part.unwrap_or((0, self.raw_length));
        Extent {
            frame: FrameRef {
                pack: PackId { backup: self.backup.unwrap_or(backup), number: self.number },
                offset: self.offset,
                stored_length: self.stored_length,
                raw_length: self.raw_length,
                compression: self.compression,
                digest: self.digest,
            },
            skip,
            take,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backup() -> BackupName {
        "20261121T100000Z".parse().unwrap()
    }

    fn frame(number: u32, raw_length: u32) -> FrameRef {
        FrameRef {
            pack: PackId { backup: backup(), number },
            offset: 4096,
            stored_length: 77,
            raw_length,
            compression: Compression::Zstd,
            digest: Digest::of(&number.to_le_bytes()),
        }
    }

    fn file(path: &[u8], size: u64, extents: Vec<Extent>) -> FileEntry {
        FileEntry {
            path: EntryPath::new(path).unwrap(),
            mode: 0o600,
            kind: EntryKind::File { size, mtime: 1_795_255_200, crc32c: 0xA_1B2C, extents },
        }
    }

    fn examples() -> Vec<FileEntry> {
        let earlier = PackId { backup: "20261120T100000Z".parse().unwrap(), number: 9 };
        vec![
            FileEntry { path: EntryPath::new("base").unwrap(), mode: 0o700, kind: EntryKind::Directory },
            file(b"empty", 0, Vec::new()),
            file(
                b"base/5/1259",
                150,
                vec![
                    Extent { frame: frame(0, 100), skip: 0, take: 100 },
                    Extent { frame: FrameRef { pack: earlier, ..frame(9, 100) }, skip: 40, take: 50 },
                ],
            ),
            file(b"odd \xFF\n\"name\\", 7, vec![Extent { frame: frame(1, 7), skip: 0, take: 7 }]),
            FileEntry {
                path: EntryPath::new("pg_tblspc/16384").unwrap(),
                mode: 0o777,
                kind: EntryKind::Symlink { target: b"/mnt/fast".to_vec() },
            },
            FileEntry {
                path: EntryPath::new("pg_tblspc/16385").unwrap(),
                mode: 0o777,
                kind: EntryKind::Symlink { target: b"/mnt/\xFE".to_vec() },
            },
        ]
    }

    fn encode(entries: &[FileEntry]) -> Vec<u8> {
        let mut lines = Vec::new();
        let mut encoder = FileListEncoder::new(backup(), &mut lines);
        for entry in entries {
            encoder.entry(entry, &mut lines).unwrap();
        }
        encoder.finish(&mut lines);
        lines
    }

    fn decode<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<FileEntry>, FileListError> {
        let mut decoder = FileListDecoder::new(backup());
        let mut entries = Vec::new();
        for chunk in chunks {
            decoder.push(chunk);
            while let Some(entry) = decoder.next_entry()? {
                entries.push(entry);
            }
        }
        assert_eq!(decoder.finish()?, entries.len() as u64);
        Ok(entries)
    }

    #[test]
    fn the_written_form_stays_as_it_is() {
        insta::assert_snapshot!(String::from_utf8(encode(&examples())).unwrap(), @r#"
        {"format":1,"backup":"20261121T100000Z"}
        {"path":"base","type":"directory","mode":"0700"}
        {"path":"empty","type":"file","mode":"0600","size":0,"mtime":1795255200,"crc32c":"000a1b2c","extents":[]}
        {"path":"base/5/1259","type":"file","mode":"0600","size":150,"mtime":1795255200,"crc32c":"000a1b2c","extents":[[0,4096,77,100,"zstd","ec2bd03bf86b935fa34d71ad7ebb049f1f10f87d343e521511d8f9e6625620cd"],["20261120T100000Z/9",4096,77,100,"zstd","f57b151e8a6dfbc520c29ccc134c8f0b5357cdd96058ecd185f0787f480b07a6",40,50]]}
        {"path64":"b2RkIP8KIm5hbWVc","type":"file","mode":"0600","size":7,"mtime":1795255200,"crc32c":"000a1b2c","extents":[[1,4096,77,7,"zstd","c610e85212d0697cb161d4ba431ba603f273feee7dcb7927c9ff5d74ae6cbfa3"]]}
        {"path":"pg_tblspc/16384","type":"link","mode":"0777","target":"/mnt/fast"}
        {"path":"pg_tblspc/16385","type":"link","mode":"0777","target64":"L21udC/+"}
        {"end":true,"entries":6}
        "#);
    }

    #[test]
    fn a_list_cut_anywhere_is_not_whole() {
        let lines = encode(&examples());
        for end in 0..lines.len() {
            assert!(decode([&lines[..end]]).is_err(), "cut at {end}");
        }
        let more = [&lines[..], b"{}"].concat();
        assert!(matches!(decode([&more[..]]), Err(FileListError::Line { .. })));
        let more = [&lines[..], b"{}\n"].concat();
        assert!(matches!(decode([&more[..]]), Err(FileListError::Line { .. })));
    }

    #[test]
    fn a_missing_line_shows() {
        let text = String::from_utf8(encode(&examples())).unwrap();
        let without_second: String =
            text.split_inclusive('\n').enumerate().filter(|(i, _)| *i != 2).map(|(_, l)| l).collect();
        assert!(matches!(
            decode([without_second.as_bytes()]),
            Err(FileListError::Count { found: 5, announced: 6 })
        ));
    }

    #[test]
    fn refuses_a_list_of_another_backup_or_a_newer_format() {
        let other = b"{\"format\":1,\"backup\":\"20200101T000000Z\"}\n";
        assert!(matches!(decode([&other[..]]), Err(FileListError::OtherBackup(_))));
        let newer = b"{\"format\":2,\"backup\":\"20261121T100000Z\"}\n";
        assert!(matches!(decode([&newer[..]]), Err(FileListError::NewerFormat(2))));
    }

    #[test]
    fn refuses_paths_that_lead_elsewhere() {
        for path in ["", "/etc/passwd", "..", "a/../b", "a//b", "a/", "./a", "a/.", "a\0b", "base/..", "//"] {
            assert!(matches!(EntryPath::new(path), Err(FileListError::Path { .. })), "{path:?}");
            let line = format!(
                "{{\"format\":1,\"backup\":\"20261121T100000Z\"}}\n{{\"path\":{},\"type\":\"directory\",\"mode\":\"0700\"}}\n",
                serde_json::to_string(path).unwrap()
            );
            assert!(matches!(decode([line.as_bytes()]), Err(FileListError::Path { .. })), "{path:?}");
        }
        assert!(EntryPath::new(vec![b'x'; 5000]).is_err());
        for path in ["..a", "a..", "...", "base/5/PG_VERSION", "-", "a b"] {
            assert!(EntryPath::new(path).is_ok(), "{path}");
        }
    }

    #[test]
    fn refuses_extents_that_do_not_add_up() {
        let whole = Extent { frame: frame(0, 100), skip: 0, take: 100 };
        let too_large = u32::try_from(MAX_FRAME_LENGTH).unwrap() + 1;
        for (size, extents) in [
            (99, vec![whole]),
            (101, vec![whole]),
            (1, vec![]),
            (101, vec![Extent { take: 101, ..whole }]),
            (100, vec![Extent { skip: 1, ..whole }]),
            (100, vec![whole, Extent { take: 0, ..whole }]),
            (u64::from(u32::MAX), vec![Extent { skip: 1, take: u32::MAX, ..whole }]),
            (100, vec![Extent { frame: FrameRef { stored_length: 0, ..whole.frame }, ..whole }]),
            (100, vec![Extent { frame: FrameRef { offset: u64::MAX, ..whole.frame }, ..whole }]),
            (100, vec![Extent { frame: frame(0, too_large), ..whole }]),
        ] {
            let entry = file(b"x", size, extents);
            let mut lines = Vec::new();
            let mut encoder = FileListEncoder::new(backup(), &mut lines);
            let before = lines.len();
            assert!(
                matches!(encoder.entry(&entry, &mut lines), Err(FileListError::Extents { .. })),
                "{entry:?}"
            );
            assert_eq!(lines.len(), before);
        }
    }

    #[test]
    fn a_line_without_end_does_not_fill_the_memory() {
        let mut decoder = FileListDecoder::new(backup());
        decoder.push(&vec![b' '; MAX_LINE_LENGTH + 1]);
        assert!(matches!(decoder.next_entry(), Err(FileListError::Line { .. })));
    }

    #[test]
    fn a_gibibyte_takes_about_120_kilobytes() {
        let extent = Extent { frame: frame(123, 1 << 20), skip: 0, take: 1 << 20 };
        let entry = file(b"base/16384/16385", 1 << 30, vec![extent; 1024]);
        let length = encode(&[entry]).len();
        assert!((90_000..130_000).contains(&length), "{length}");
    }

    prop_compose! {
        fn any_extent()(
            own: bool, number: u32, offset in 0..u64::MAX / 2, stored_length in 1_u32.., raw in 1_u32..=1 << 20,
            skip: prop::sample::Index, take: prop::sample::Index, digest: [u8; 32], zstd: bool, whole: bool,
        ) -> Extent {
            let (skip, take) = if whole { (0, raw) } else {
                let skip = u32::try_from(skip.index(raw as usize)).unwrap();
                (skip, u32::try_from(take.index((raw - skip) as usize)).unwrap() + 1)
            };
            let name = if own { "20261121T100000Z" } else { "20261101T000000Z" };
            Extent {
                frame: FrameRef {
                    pack: PackId { backup: name.parse().unwrap(), number }, offset, stored_length,
                    raw_length: raw,
                    compression: if zstd { Compression::Zstd } else { Compression::None },
                    digest: Digest::new(digest),
                },
                skip, take,
            }
        }
    }

    fn any_entry() -> impl Strategy<Value = FileEntry> {
        let path = prop::collection::vec(prop::collection::vec(1_u8.., 1..6), 1..4)
            .prop_map(|components| components.join(&b'/'))
            .prop_filter_map("a plain path", |path| EntryPath::new(path).ok());
        let kind = prop_oneof![
            Just(EntryKind::Directory),
            prop::collection::vec(1_u8.., 1..9).prop_map(|target| EntryKind::Symlink { target }),
            (prop::collection::vec(any_extent(), 0..5), any::<i64>(), any::<u32>()).prop_map(
                |(extents, mtime, crc32c)| EntryKind::File {
                    size: extents.iter().map(|extent| u64::from(extent.take)).sum(),
                    mtime,
                    crc32c,
                    extents,
                }
            ),
        ];
        (path, 0_u32..=0o7777, kind).prop_map(|(path, mode, kind)| FileEntry { path, mode, kind })
    }

    proptest! {
        #[test]
        fn a_list_reads_back_in_chunks_of_any_size(
            entries in prop::collection::vec(any_entry(), 0..8), chunk in 1_usize..300
        ) {
            let lines = encode(&entries);
            prop_assert_eq!(decode(lines.chunks(chunk)).unwrap(), entries);
        }

        #[test]
        fn damage_is_an_error_or_a_valid_entry_but_never_a_panic(
            position: prop::sample::Index, byte: u8, chunk in 1_usize..300
        ) {
            let mut lines = encode(&examples());
            let position = position.index(lines.len());
            lines[position] = byte;
            if let Ok(entries) = decode(lines.chunks(chunk)) {
                prop_assert!(entries.iter().all(|entry| entry.validate().is_ok()));
            }
        }
    }
}
