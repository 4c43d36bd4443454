//! Reads tar archives as they arrive: those inside a `BASE_BACKUP` stream, and PGHoard's base backups.
//!
//! Pure. The server writes plain ustar headers: octal sizes, or base-256 from 8 GiB on; names up to 99
//! bytes; files, directories and symbolic links. PGHoard writes PAX extended headers before most members,
//! older versions of it GNU's long names. The stream is treated as hostile: whatever neither would write
//! ends the reading, and a name that leads out of the data directory never passes.

use bytes::{Buf, Bytes, BytesMut};

const BLOCK: usize = 512;

/// Extended headers hold a name or two; one longer than this is damage.
const MAX_EXTENDED: u64 = 64 << 10;

/// What a tar archive announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// Relative, without `.` and `..` components.
    pub path: Vec<u8>,
    pub kind: TarKind,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970.
    pub modified: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarKind {
    File { size: u64 },
    Directory,
    Symlink { target: Vec<u8> },
}

/// What the bytes so far mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarEvent {
    Entry(TarEntry),
    /// Content of the file announced last.
    Data(Bytes),
    /// The file announced last is complete.
    EndOfFile,
}

/// A stream that no PostgreSQL server sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    #[error("the tar header after `{0}` has a wrong checksum")]
    Checksum(String),
    #[error("the tar header after `{after}` has an unreadable {field}")]
    Field { after: String, field: &'static str },
    #[error("`{0}` is of a kind that has no place in a base backup")]
    Kind(String),
    #[error("the path `{0}` leads out of the data directory")]
    Path(String),
    #[error("the archive ends within `{0}`")]
    Truncated(String),
    #[error("bytes follow the end of the archive")]
    Trailing,
}

#[derive(Debug)]
enum State {
    Header,
    Data {
        left: u64,
        padding: usize,
    },
    Padding {
        left: usize,
    },
    /// An extended header, which describes the member after it.
    Extended {
        kind: u8,
        left: usize,
        padding: usize,
        content: Vec<u8>,
    },
    End,
}

/// What extended headers said of the member to come.
#[derive(Debug, Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    modified: Option<i64>,
}

/// Folds the bytes of one archive into events.
#[derive(Debug)]
pub struct TarStream {
    state: State,
    header: BytesMut,
    overrides: Overrides,
    last: String,
}

impl Default for TarStream {
    fn default() -> Self {
        Self {
            state: State::Header,
            header: BytesMut::new(),
            overrides: Overrides::default(),
            last: "the start".to_owned(),
        }
    }
}

impl TarStream {
    /// Takes bytes in, cut anywhere.
    pub fn push(&mut self, mut data: Bytes, events: &mut Vec<TarEvent>) -> Result<(), TarError> {
        while !data.is_empty() {
            match &mut self.state {
                State::Header => {
                    let take = (BLOCK - self.header.len()).min(data.len());
                    self.header.extend_from_slice(&data.split_to(take));
                    if self.header.len() == BLOCK {
                        let header = self.header.split();
                        self.header(&header, events)?;
                    }
                }
                State::Data { left, padding } => {
                    let take = usize::try_from(*left).map_or(data.len(), |left| left.min(data.len()));
                    *left -= take as u64;
                    events.push(TarEvent::Data(data.split_to(take)));
                    if *left == 0 {
                        events.push(TarEvent::EndOfFile);
                        self.state = padded(*padding);
                    }
                }
                State::Padding { left } => {
                    let take = (*left).min(data.len());
                    data.advance(take);
                    *left -= take;
                    self.state = padded(*left);
                }
                State::Extended { kind, left, padding, content } => {
                    let take = (*left).min(data.len());
                    content.extend_from_slice(&data.split_to(take));
                    *left -= take;
                    if *left == 0 {
                        let (kind, padding, content) = (*kind, *padding, std::mem::take(content));
                        self.state = padded(padding);
                        self.extend(kind, &content)?;
                    }
                }
                State::End => {
                    // The second of the two closing blocks, and the filling some writers add.
                    if data.iter().any(|byte| *byte != 0) {
                        return Err(TarError::Trailing);
                    }
                    data.clear();
                }
            }
        }
        Ok(())
    }

    /// The archive ends here; fails when it cannot. PostgreSQL 15 and later send no closing blocks for
    /// the archives of a client backup, older servers do: both are an end between two entries.
    pub fn finish(self) -> Result<(), TarError> {
        match self.state {
            State::Header if self.header.is_empty() && self.overrides.is_none() => Ok(()),
            State::End => Ok(()),
            _ => Err(TarError::Truncated(self.last)),
        }
    }

    fn header(&mut self, header: &[u8], events: &mut Vec<TarEvent>) -> Result<(), TarError> {
        if header.iter().all(|byte| *byte == 0) {
            self.state = State::End;
            return Ok(());
        }
        let after = || self.last.clone();
        let field = |field| TarError::Field { after: self.last.clone(), field };
        let checksum = number(&header[148..156]).ok_or_else(|| field("checksum"))?;
        let sum: u64 = header
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { u64::from(b' ') } else { u64::from(*byte) })
            .sum();
        if sum != checksum {
            return Err(TarError::Checksum(after()));
        }
        let size = number(&header[124..136]).ok_or_else(|| field("size"))?;
        if let kind @ (b'x' | b'g' | b'L' | b'K') = header[156] {
            let left = usize::try_from(size.min(MAX_EXTENDED)).unwrap_or_default();
            if size > MAX_EXTENDED || size == 0 {
                return Err(field("extended header"));
            }
            self.state = State::Extended { kind, left, padding: padding(size), content: Vec::new() };
            return Ok(());
        }
        let mode = number(&header[100..108]).ok_or_else(|| field("mode"))?;
        let modified = number(&header[136..148]).ok_or_else(|| field("modification time"))?;
        let overrides = std::mem::take(&mut self.overrides);
        let path = overrides.path.unwrap_or_else(|| name_of(header));
        let shown = String::from_utf8_lossy(&path).into_owned();
        let size = overrides.size.unwrap_or(size);
        let kind = match header[156] {
            b'0' | 0 => TarKind::File { size },
            b'5' => TarKind::Directory,
            b'2' => TarKind::Symlink {
                target: overrides.link.unwrap_or_else(|| text(&header[157..257]).to_vec()),
            },
            _ => return Err(TarError::Kind(shown)),
        };
        let path = relative(&path).ok_or(TarError::Path(shown.clone()))?;
        self.last = shown;
        self.state = match kind {
            TarKind::File { size } if size > 0 => State::Data { left: size, padding: padding(size) },
            // Links and directories have no content, whatever their size field says.
            _ => State::Header,
        };
        let empty_file = kind == TarKind::File { size: 0 };
        let mode = u32::try_from(mode & 0o7777).unwrap_or(0);
        let modified = overrides.modified.unwrap_or_else(|| i64::try_from(modified).unwrap_or(0));
        events.push(TarEvent::Entry(TarEntry { path, kind, mode, modified }));
        if empty_file {
            events.push(TarEvent::EndOfFile);
        }
        Ok(())
    }

    fn extend(&mut self, kind: u8, content: &[u8]) -> Result<(), TarError> {
        match kind {
            b'L' => self.overrides.path = Some(text(content).to_vec()),
            b'K' => self.overrides.link = Some(text(content).to_vec()),
            b'x' => {
                let field = || TarError::Field { after: self.last.clone(), field: "extended header" };
                let mut rest = content;
                while !rest.is_empty() {
                    let (key, value, later) = record(rest).ok_or_else(field)?;
                    rest = later;
                    let number = || std::str::from_utf8(value).ok();
                    match key {
                        b"path" => self.overrides.path = Some(value.to_vec()),
                        b"linkpath" => self.overrides.link = Some(value.to_vec()),
                        b"size" => {
                            let size = number().and_then(|text| text.parse().ok()).ok_or_else(field)?;
                            self.overrides.size = Some(size);
                        }
                        b"mtime" => {
                            let seconds = number().and_then(|text| text.split('.').next()?.parse().ok());
                            self.overrides.modified = Some(seconds.ok_or_else(field)?);
                        }
                        // Owners and access times, which a restore does not keep.
                        _ => {}
                    }
                }
            }
            // A global header tells of the archive, not of a member.
            _ => {}
        }
        Ok(())
    }
}

impl Overrides {
    const fn is_none(&self) -> bool {
        self.path.is_none() && self.link.is_none() && self.size.is_none() && self.modified.is_none()
    }
}

/// The name in a header. Only ustar has a prefix; GNU's headers hold times at that place.
fn name_of(header: &[u8]) -> Vec<u8> {
    let mut path = Vec::new();
    if header[257..263] == *b"ustar\0" {
        path.extend_from_slice(text(&header[345..500]));
        if !path.is_empty() {
            path.push(b'/');
        }
    }
    path.extend_from_slice(text(&header[..100]));
    path
}

/// The first record of a PAX header, `LENGTH KEY=VALUE\n`, and what follows it.
fn record(content: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = content.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&content[..space]).ok()?.parse().ok()?;
    let (whole, later) = content.split_at_checked(length)?;
    let body = whole.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    Some((&body[..equals], &body[equals + 1..], later))
}

const fn padded(left: usize) -> State {
    if left == 0 { State::Header } else { State::Padding { left } }
}

#[expect(clippy::cast_possible_truncation, reason = "below 512")]
const fn padding(size: u64) -> usize {
    ((BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64) as usize
}

/// The bytes up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Octal text, or base-256 when the first byte has its high bit set.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if *first == 0x80 {
        return rest.iter().try_fold(0_u64, |value, byte| Some(value.checked_mul(256)? | u64::from(*byte)));
    }
    let digits = text(field).trim_ascii();
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = (b'0'..=b'7').contains(digit).then(|| u64::from(digit - b'0'))?;
        value.checked_mul(8)?.checked_add(digit)
    })
}

/// The path without `.` components; none when it is absolute, empty or has `..`.
fn relative(path: &[u8]) -> Option<Vec<u8>> {
    if path.first() == Some(&b'/') {
        return None;
    }
    let mut clean = Vec::with_capacity(path.len());
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return None,
            part => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(part);
            }
        }
    }
    (!clean.is_empty()).then_some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type File = (String, Vec<u8>);

    fn archive(files: &[File]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(1_700_000_000);
            builder.append_data(&mut header, name, content.as_slice()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn read(archive: &[u8], cuts: &[usize]) -> Result<Vec<File>, TarError> {
        let (mut stream, mut events, mut at) = (TarStream::default(), Vec::new(), 0);
        for cut in cuts.iter().chain([&archive.len()]) {
            let end = (at + cut).min(archive.len());
            stream.push(Bytes::copy_from_slice(&archive[at..end]), &mut events)?;
            at = end;
        }
        stream.finish()?;
        let (mut files, mut whole) = (Vec::<File>::new(), true);
        for event in events {
            match event {
                TarEvent::Entry(entry) => {
                    assert!(std::mem::replace(&mut whole, false));
                    files.push((String::from_utf8(entry.path).unwrap(), Vec::new()));
                }
                TarEvent::Data(data) => files.last_mut().unwrap().1.extend_from_slice(&data),
                TarEvent::EndOfFile => whole = true,
            }
        }
        Ok(files)
    }

    proptest! {
        #[test]
        fn reads_what_was_written_however_it_was_cut(
            files in prop::collection::vec(
                ("[a-z0-9_ äö]{1,20}(/[a-z0-9_]{1,20}){0,2}", prop::collection::vec(any::<u8>(), 0..1500)), 0..6),
            cuts in prop::collection::vec(0_usize..900, 0..12),
        ) {
            prop_assert_eq!(read(&archive(&files), &cuts).unwrap(), files);
        }

        #[test]
        fn a_cut_within_a_file_shows(length in 1_usize..3000, cut in 1_usize..3000) {
            let whole = archive(&[("base/1/2".to_owned(), vec![7; length])]);
            let cut = cut.min(BLOCK + length - 1);
            prop_assert!(read(&whole[..cut], &[]).is_err());
        }

        #[test]
        fn garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = read(&garbage, &[]);
        }
    }

    #[test]
    fn reads_sizes_of_8_gib_and_more() {
        let mut field = [0_u8; 12];
        field[0] = 0x80;
        field[4..].copy_from_slice(&(9_u64 << 30).to_be_bytes());
        assert_eq!(number(&field), Some(9 << 30));
        assert_eq!(number(b"00000000010\0"), Some(8));
        assert_eq!(number(b"0000000009x\0"), None);
    }

    #[test]
    fn knows_the_two_names_with_a_dot_and_refuses_ways_out() {
        assert_eq!(relative(b"./pg_wal/archive_status").unwrap(), b"pg_wal/archive_status");
        for path in [&b"/etc/passwd"[..], b"../x", b"a/../../x", b"", b".", b"a/.."] {
            assert_eq!(relative(path), None);
        }
    }

    #[test]
    fn reads_gnus_long_names_and_pax_headers() {
        let long = format!("pgdata/{}/file", "directory/".repeat(30));
        let mut gnu = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(3);
        header.set_mode(0o600);
        gnu.append_data(&mut header, &long, &b"abc"[..]).unwrap();
        let expected = [(long.replace("//", "/"), b"abc".to_vec())];
        assert_eq!(read(&gnu.into_inner().unwrap(), &[100, 600]).unwrap(), expected);

        let mut pax = tar::Builder::new(Vec::new());
        pax.append_pax_extensions([("path", long.as_bytes()), ("mtime", b"1700000000.25"), ("size", b"3")])
            .unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path("short").unwrap();
        header.set_size(3);
        header.set_mode(0o600);
        header.set_cksum();
        pax.append(&header, &b"abc"[..]).unwrap();
        let archive = pax.into_inner().unwrap();
        assert_eq!(read(&archive, &[]).unwrap(), expected);
        let mut events = Vec::new();
        TarStream::default().push(archive.into(), &mut events).unwrap();
        assert!(matches!(&events[0], TarEvent::Entry(entry) if entry.modified == 1_700_000_000));
    }

    #[test]
    fn an_extended_header_that_makes_no_sense_is_refused() {
        for content in [&b"x"[..], b"3 a", b"99 path=x\n", b"9 size=x\n", b"7 path\n", b"5 =\n\n"] {
            let mut header = tar::Header::new_ustar();
            header.set_path("x").unwrap();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            header.set_entry_type(tar::EntryType::XHeader);
            header.set_cksum();
            let mut archive = header.as_bytes().to_vec();
            archive.extend_from_slice(content);
            archive.resize(1024, 0);
            assert!(read(&archive, &[]).is_err(), "{content:?}");
        }
        assert_eq!(record(b"11 path=xy\nrest"), Some((&b"path"[..], &b"xy"[..], &b"rest"[..])));
    }

    #[test]
    fn refuses_devices_and_hard_links() {
        for kind in [tar::EntryType::Link, tar::EntryType::Char, tar::EntryType::Fifo] {
            let mut header = tar::Header::new_ustar();
            header.set_path("x").unwrap();
            header.set_size(0);
            header.set_mode(0o600);
            header.set_mtime(0);
            header.set_entry_type(kind);
            header.set_cksum();
            assert!(matches!(read(header.as_bytes(), &[]), Err(TarError::Kind(_))));
        }
    }
}
