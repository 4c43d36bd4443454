//! One backup, opened: what it consists of, and whether it can be restored at all.

use std::sync::Arc;

use super::part_stream::{Layout, PartStream, TarFacts};
use crate::catalog::{
    Content, DeltaFile, EmbeddedFile, EntryPath, PghoardBackup, PghoardControl, PghoardDelta, PghoardError,
    PghoardFormat, PghoardTablespace, read_control,
};
use crate::codec::{TarEvent, TarStream};
use crate::postgres::BackupLabel;
use crate::repository::{ObjectName, PghoardFolder, Repository};

/// Files that lie in the manifest are given out so many at a time; each has at most 150 bytes.
const EMBEDDED_BATCH: usize = 256;

/// The longest backup label or tablespace map that is looked at.
const MAX_HEAD_LENGTH: usize = 1 << 20;

/// A backup whose control object, or whose archive's head, has been read and understood.
#[derive(Clone, Debug)]
pub struct Source {
    repository: Repository,
    backup: PghoardBackup,
    label: BackupLabel,
    control: Option<Arc<PghoardControl>>,
    tablespaces: Arc<[PghoardTablespace]>,
}

/// Something of a backup that can be read on its own, beside others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The object of the backup itself: its archive, or its control files.
    Archive,
    /// A chunk or bundle, by its place in the list.
    Chunk(usize),
    /// A delta file, by its place in the manifest.
    DeltaFile(usize),
    /// Directories, and files whose content is in the manifest.
    Manifest,
}

impl Source {
    /// Opens `backup`. Refuses one that lacks tablespaces it had.
    pub async fn open(repository: &Repository, backup: &PghoardBackup) -> Result<Self, PghoardError> {
        let repository = repository.of(backup.former).clone();
        let (label, control, tablespaces) = if backup.format.has_control() {
            let (control, label) = read_control(&repository, backup).await?;
            let tablespaces = control.tablespaces.clone();
            (label, Some(Arc::new(control)), tablespaces)
        } else {
            (read_head(&repository, backup).await?, None, backup.tablespaces.clone())
        };
        Ok(Self { repository, backup: backup.clone(), label, control, tablespaces: tablespaces.into() })
    }

    pub const fn backup(&self) -> &PghoardBackup {
        &self.backup
    }

    /// Where recovery begins.
    pub const fn label(&self) -> &BackupLabel {
        &self.label
    }

    pub fn tablespaces(&self) -> &[PghoardTablespace] {
        &self.tablespaces
    }

    /// All that has to be read, in an order that keeps several readers busy: large things first.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts = vec![Part::Archive];
        if let Some(control) = &self.control {
            parts.extend((0..control.chunks.len()).map(Part::Chunk));
        }
        if let Some(delta) = self.delta() {
            parts.extend((0..delta.files.len()).map(Part::DeltaFile));
            parts.push(Part::Manifest);
        }
        parts
    }

    /// Begins to read a part.
    pub async fn read(&self, part: Part) -> Result<PartStream, PghoardError> {
        match (part, &self.control) {
            (Part::Chunk(number), Some(control)) => {
                let chunk = &control.chunks[number];
                self.expect_stored_length(chunk.object, chunk.stored_length).await?;
                let reader = self.repository.read(chunk.object).await?;
                let facts = TarFacts {
                    object: chunk.object,
                    layout: if control.delta.is_some() { Layout::Relative } else { Layout::Pgdata },
                    tablespaces: Arc::clone(&self.tablespaces),
                    plaintext_length: Some(chunk.plaintext_length),
                    modes_are_real: true,
                    control: Some((Arc::clone(control), number)),
                };
                Ok(PartStream::tar(reader, facts))
            }
            (Part::DeltaFile(number), Some(control)) => {
                let Some(file) = control.delta.as_ref().and_then(|delta| delta.files.get(number)) else {
                    return Ok(PartStream::ready(Vec::new()));
                };
                self.delta_file(file).await
            }
            (Part::Manifest, _) => {
                Ok(PartStream::ready(self.delta().map(manifest_contents).unwrap_or_default()))
            }
            (Part::Archive | Part::Chunk(_) | Part::DeltaFile(_), _) => {
                let object = object_of(&self.backup);
                let facts = TarFacts {
                    object,
                    layout: if self.backup.format == PghoardFormat::Raw {
                        Layout::Raw
                    } else {
                        Layout::Pgdata
                    },
                    tablespaces: Arc::clone(&self.tablespaces),
                    plaintext_length: None,
                    modes_are_real: self.control.is_none(),
                    control: None,
                };
                Ok(PartStream::tar(self.repository.read(object).await?, facts))
            }
        }
    }

    /// Checks what only the whole of a delta backup shows: that every bundled file is in some bundle's list.
    pub fn check(&self) -> Result<(), PghoardError> {
        let (Some(control), Some(delta)) = (&self.control, self.delta()) else { return Ok(()) };
        let mut listed = crate::catalog::NameSet::default();
        for chunk in &control.chunks {
            listed.absorb(&chunk.members);
        }
        listed.settle();
        if listed.includes(&delta.bundled) {
            return Ok(());
        }
        let why = "its manifest has files that none of its bundles holds".to_owned();
        Err(PghoardError::Damaged { object: object_of(&self.backup), why })
    }

    fn delta(&self) -> Option<&PghoardDelta> {
        self.control.as_ref()?.delta.as_ref()
    }

    async fn delta_file(&self, file: &DeltaFile) -> Result<PartStream, PghoardError> {
        let object = file.digest.object();
        let reader = self.repository.read(object).await?;
        let begin = Content::File { path: file.path.clone(), mode: 0o600, modified: file.modified };
        Ok(PartStream::delta_file(reader, begin, file.digest))
    }

    async fn expect_stored_length(&self, object: ObjectName, expected: u64) -> Result<(), PghoardError> {
        let actual = self.repository.describe(object).await?.stored_length;
        if actual == expected {
            return Ok(());
        }
        let why = format!("it has {actual} bytes, and the backup's list says {expected}");
        Err(PghoardError::Damaged { object, why })
    }
}

fn object_of(backup: &PghoardBackup) -> ObjectName {
    ObjectName::Pghoard { folder: PghoardFolder::Backups, name: backup.id.name() }
}

fn manifest_contents(delta: &PghoardDelta) -> Vec<Vec<Content>> {
    let directories =
        delta.directories.iter().map(|path| Content::Directory { path: path.clone(), mode: 0o700 });
    let mut batches = vec![directories.collect::<Vec<_>>()];
    batches.extend(delta.embedded.chunks(EMBEDDED_BATCH).map(|files| {
        files
            .iter()
            .flat_map(|EmbeddedFile { path, content, modified }| {
                let begin = Content::File { path: path.clone(), mode: 0o600, modified: *modified };
                [begin, Content::Data(content.clone().into()), Content::EndOfFile]
            })
            .collect()
    }));
    batches
}

/// Reads the beginning of an archive: the backup label, and the tablespace map that follows it, if any.
async fn read_head(repository: &Repository, backup: &PghoardBackup) -> Result<BackupLabel, PghoardError> {
    let object = object_of(backup);
    let damaged = |why: String| PghoardError::Damaged { object, why };
    let mut reader = repository.read(object).await?;
    let (mut tar, mut events, mut current) = (TarStream::default(), Vec::new(), None);
    let (mut label, mut map) = (Vec::new(), Vec::new());
    // The server sends both before everything else; PGHoard's first chunked format has them anywhere.
    let stop_early = backup.format == PghoardFormat::Raw;
    'archive: while let Some(chunk) = reader.next().await? {
        tar.push(chunk, &mut events).map_err(|error| damaged(error.to_string()))?;
        for event in events.drain(..) {
            match event {
                TarEvent::Entry(entry) => {
                    let name = entry.path.strip_prefix(b"pgdata/").unwrap_or(&entry.path);
                    let head =
                        [&b"backup_label"[..], b"tablespace_map"].into_iter().find(|head| *head == name);
                    if head.is_none() && stop_early && !label.is_empty() {
                        break 'archive;
                    }
                    current = head;
                }
                TarEvent::Data(data) => {
                    let text = match current {
                        Some(b"backup_label") => &mut label,
                        Some(_) => &mut map,
                        None => continue,
                    };
                    if text.len() + data.len() > MAX_HEAD_LENGTH {
                        return Err(damaged("its backup label is longer than any server's".to_owned()));
                    }
                    text.extend_from_slice(&data);
                }
                TarEvent::EndOfFile => {}
            }
        }
    }
    if stop_early && !map.trim_ascii().is_empty() {
        let lost = String::from_utf8_lossy(&map).trim().replace('\n', ", ");
        return Err(damaged(format!(
            "it lacks the tablespaces that the server had: {lost}; PGHoard stores only the main one in this mode"
        )));
    }
    let label = BackupLabel::parse(&label).map_err(|error| damaged(error.to_string()))?;
    // Old versions guessed the segment of a piped backup.
    let is_guess = !backup.metadata.contains_key("basebackup-mode");
    if label.start_segment != backup.start_segment && !is_guess {
        let (own, other) = (backup.start_segment, label.start_segment);
        return Err(damaged(format!("it begins in segment `{other}`, its metadata says `{own}`")));
    }
    Ok(label)
}

/// The path below the data directory at which the files of tablespace `oid` stand in a stream.
pub(super) fn tablespace_path(oid: u32, rest: &[u8]) -> Vec<u8> {
    let mut path = format!("pg_tblspc/{oid}").into_bytes();
    if !rest.is_empty() {
        path.push(b'/');
        path.extend_from_slice(rest);
    }
    path
}

pub(super) fn entry_path(object: ObjectName, path: Vec<u8>) -> Result<EntryPath, PghoardError> {
    EntryPath::new(path).map_err(|error| PghoardError::Damaged { object, why: error.to_string() })
}
