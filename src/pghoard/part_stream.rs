//! A part of a backup as a stream of files, checked while it passes.

use std::collections::VecDeque;
use std::sync::Arc;

use blake2::{Blake2s256, Digest as _};
use bytes::Bytes;

use super::source::{entry_path, tablespace_path};
use crate::catalog::{CONTROL_MEMBER, Content, FileDigest, PghoardControl, PghoardError, PghoardTablespace};
use crate::codec::{TarEntry, TarEvent, TarKind, TarStream};
use crate::postgres::ManifestCheck;
use crate::repository::{ObjectName, ObjectReader};

/// How the names in an archive relate to the data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// They are relative to it.
    Raw,
    /// As in `Raw`, without a manifest of the server's.
    Relative,
    /// `pgdata/…` and `tablespaces/NAME/…`
    Pgdata,
}

/// What is known of an archive beforehand.
pub(super) struct TarFacts {
    pub object: ObjectName,
    pub layout: Layout,
    pub tablespaces: Arc<[PghoardTablespace]>,
    /// Bytes of the archive.
    pub plaintext_length: Option<u64>,
    /// Whether the modes are those on the server; PGHoard writes the files in control objects with others.
    pub modes_are_real: bool,
    /// The control object and the number of this chunk in it.
    pub control: Option<(Arc<PghoardControl>, usize)>,
}

/// Gives out the files of a part. An error may come after files that were whole; only the end without one
/// says that all of them are right.
pub struct PartStream(Kind);

enum Kind {
    Ready(VecDeque<Vec<Content>>),
    DeltaFile(Box<DeltaFileStream>),
    Tar(Box<TarPart>),
}

impl PartStream {
    pub(super) fn ready(batches: Vec<Vec<Content>>) -> Self {
        Self(Kind::Ready(batches.into()))
    }

    pub(super) fn delta_file(reader: ObjectReader, begin: Content, digest: FileDigest) -> Self {
        let hasher = Blake2s256::new();
        Self(Kind::DeltaFile(Box::new(DeltaFileStream {
            reader,
            begin: Some(begin),
            digest,
            hasher,
            over: false,
        })))
    }

    pub(super) fn tar(reader: ObjectReader, facts: TarFacts) -> Self {
        let smallest =
            facts.control.as_ref().and_then(|(control, _)| control.digests.values().min().copied());
        Self(Kind::Tar(Box::new(TarPart {
            reader,
            smallest_digested: smallest,
            manifest: (facts.layout == Layout::Raw).then(Manifest::default),
            facts,
            tar: TarStream::default(),
            events: Vec::new(),
            plaintext_length: 0,
            current: Current::Nothing,
            over: false,
        })))
    }

    /// The next files and parts of files; none at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Content>>, PghoardError> {
        match &mut self.0 {
            Kind::Ready(batches) => Ok(batches.pop_front()),
            Kind::DeltaFile(stream) => stream.next().await,
            Kind::Tar(part) => part.next().await,
        }
    }
}

struct DeltaFileStream {
    reader: ObjectReader,
    begin: Option<Content>,
    digest: FileDigest,
    hasher: Blake2s256,
    over: bool,
}

impl DeltaFileStream {
    async fn next(&mut self) -> Result<Option<Vec<Content>>, PghoardError> {
        if self.over {
            return Ok(None);
        }
        let mut contents: Vec<Content> = self.begin.take().into_iter().collect();
        if let Some(chunk) = self.reader.next().await? {
            self.hasher.update(&chunk);
            contents.push(Content::Data(chunk));
            return Ok(Some(contents));
        }
        self.over = true;
        let actual = FileDigest::new(std::mem::take(&mut self.hasher).finalize().into());
        if actual != self.digest {
            let why = format!("its content has the digest {actual}");
            return Err(PghoardError::Damaged { object: self.digest.object(), why });
        }
        contents.push(Content::EndOfFile);
        Ok(Some(contents))
    }
}

/// The member whose data comes next.
enum Current {
    /// None, or one that is of no use to a restore.
    Nothing,
    File {
        /// As in the archive.
        name: Vec<u8>,
        size: u64,
        digest: Option<Box<Blake2s256>>,
        crc32c: u32,
    },
    ServerManifest,
}

/// What the server's manifest at the end of an archive is compared with.
#[derive(Default)]
struct Manifest {
    check: ManifestCheck,
    seen: bool,
}

struct TarPart {
    reader: ObjectReader,
    facts: TarFacts,
    tar: TarStream,
    events: Vec<TarEvent>,
    plaintext_length: u64,
    /// Files of this size and more have their digest in the control object.
    smallest_digested: Option<u64>,
    manifest: Option<Manifest>,
    current: Current,
    over: bool,
}

impl TarPart {
    async fn next(&mut self) -> Result<Option<Vec<Content>>, PghoardError> {
        let mut contents = Vec::new();
        while contents.is_empty() {
            if self.over {
                return Ok(None);
            }
            let Some(chunk) = self.reader.next().await? else {
                self.finish()?;
                return Ok(None);
            };
            self.plaintext_length += chunk.len() as u64;
            let mut events = std::mem::take(&mut self.events);
            self.tar.push(chunk, &mut events).map_err(|error| self.damaged(error.to_string()))?;
            for event in events.drain(..) {
                self.event(event, &mut contents)?;
            }
            self.events = events;
        }
        Ok(Some(contents))
    }

    fn event(&mut self, event: TarEvent, contents: &mut Vec<Content>) -> Result<(), PghoardError> {
        match event {
            TarEvent::Entry(entry) => self.entry(entry, contents),
            TarEvent::Data(data) => {
                self.data(&data)?;
                if !matches!(self.current, Current::Nothing) {
                    contents.push(Content::Data(data));
                }
                Ok(())
            }
            TarEvent::EndOfFile => {
                let ended = std::mem::replace(&mut self.current, Current::Nothing);
                if matches!(ended, Current::Nothing) {
                    return Ok(());
                }
                self.end_of_file(ended)?;
                contents.push(Content::EndOfFile);
                Ok(())
            }
        }
    }

    fn entry(&mut self, entry: TarEntry, contents: &mut Vec<Content>) -> Result<(), PghoardError> {
        let TarEntry { path: name, kind, mode, modified } = entry;
        if let Some((control, number)) = &self.facts.control
            && !control.chunks[*number].members.contains(&name)
        {
            let name = String::from_utf8_lossy(&name).into_owned();
            return Err(self.damaged(format!("it holds `{name}`, which the backup's list does not name")));
        }
        self.current = Current::Nothing;
        let Some(path) = self.place(&name)? else { return Ok(()) };
        let path = entry_path(self.facts.object, path)?;
        match kind {
            TarKind::Directory => contents.push(Content::Directory { path, mode }),
            TarKind::Symlink { target } => contents.push(Content::Symlink { path, target }),
            TarKind::File { size } => {
                let is_manifest = self.manifest.is_some() && name == b"backup_manifest";
                self.current = if is_manifest {
                    Current::ServerManifest
                } else {
                    let digest = self.smallest_digested.is_some_and(|smallest| size >= smallest);
                    let digest = digest.then(|| Box::new(Blake2s256::new()));
                    Current::File { name, size, digest, crc32c: 0 }
                };
                let mode = if self.facts.modes_are_real { mode } else { 0o600 };
                contents.push(Content::File { path, mode, modified });
            }
        }
        Ok(())
    }

    fn data(&mut self, data: &Bytes) -> Result<(), PghoardError> {
        match (&mut self.current, &mut self.manifest) {
            (Current::ServerManifest, Some(manifest)) => {
                manifest.seen = true;
                let read = manifest.check.manifest(data);
                read.map_err(|error| self.damaged(error.to_string()))?;
            }
            (Current::File { digest, crc32c, .. }, manifest) => {
                if let Some(digest) = digest {
                    digest.update(data);
                }
                if manifest.is_some() {
                    *crc32c = crc32c::crc32c_append(*crc32c, data);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn end_of_file(&mut self, ended: Current) -> Result<(), PghoardError> {
        let Current::File { name, size, digest, crc32c } = ended else { return Ok(()) };
        if let Some(manifest) = &mut self.manifest {
            manifest.check.file(&name, size, crc32c);
        }
        if let (Some(digest), Some((control, _))) = (digest, &self.facts.control) {
            let digest = FileDigest::new(digest.finalize().into());
            if control.digests.get(&digest) != Some(&size) {
                let name = String::from_utf8_lossy(&name).into_owned();
                return Err(self.damaged(format!("`{name}` in it is not what PGHoard read from the server")));
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), PghoardError> {
        self.over = true;
        std::mem::take(&mut self.tar).finish().map_err(|error| self.damaged(error.to_string()))?;
        if let Some(expected) = self.facts.plaintext_length
            && expected != self.plaintext_length
        {
            let actual = self.plaintext_length;
            return Err(
                self.damaged(format!("its archive has {actual} bytes, the backup's list says {expected}"))
            );
        }
        match self.manifest.take() {
            Some(Manifest { check, seen: true }) => {
                check.finish().map_err(|error| self.damaged(error.to_string()))
            }
            _ => Ok(()),
        }
    }

    /// The path below the data directory; none for what is no part of it.
    fn place(&self, name: &[u8]) -> Result<Option<Vec<u8>>, PghoardError> {
        if self.facts.layout != Layout::Pgdata {
            return Ok(Some(name.to_vec()));
        }
        if let Some(path) = name.strip_prefix(b"pgdata/") {
            return Ok(Some(path.to_vec()));
        }
        if name == b"pgdata" || name == b"tablespaces" || name == CONTROL_MEMBER || name == b".manifest.json"
        {
            return Ok(None);
        }
        let inside = name.strip_prefix(b"tablespaces/").and_then(|rest| {
            self.facts.tablespaces.iter().find_map(|tablespace| {
                let rest = rest.strip_prefix(tablespace.name.as_bytes())?;
                match rest.strip_prefix(b"/") {
                    Some(below) => Some(tablespace_path(tablespace.oid, below)),
                    None if rest.is_empty() => Some(tablespace_path(tablespace.oid, b"")),
                    None => None,
                }
            })
        });
        if inside.is_some() {
            return Ok(inside);
        }
        let name = String::from_utf8_lossy(name);
        Err(self.damaged(format!("`{name}` in it belongs neither to the data directory nor to a tablespace")))
    }

    fn damaged(&self, why: String) -> PghoardError {
        PghoardError::Damaged { object: self.facts.object, why }
    }
}
