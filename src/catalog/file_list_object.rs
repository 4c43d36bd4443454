//! The file list as an object: entries in and out of `backup/<name>/files`, a batch of lines at a time.

use bytes::Bytes;

use super::backup::FileListRecord;
use super::file_list::{FileEntry, FileListDecoder, FileListEncoder, FileListError};
use crate::codec::{Hasher, OpeningKey, StreamSealer};
use crate::repository::{
    self, BackupName, BackupPart, Facts, ObjectName, ObjectReader, ObjectWriter, Repository, Stored,
};

/// Bytes of lines that are gathered before they go to the object's writer: enough to keep its worker busy,
/// and a line of a large file is half of it.
const BATCH_LENGTH: usize = 256 << 10;

/// Why a file list was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum FileListObjectError {
    #[error(transparent)]
    Repository(#[from] repository::Error),
    #[error("file list of backup `{backup}`")]
    Content { backup: BackupName, source: FileListError },
    #[error("file list of backup `{backup}` is not the one its record names")]
    OtherList { backup: BackupName },
    #[error("file list of backup `{backup}` was not read to its end")]
    Broken { backup: BackupName },
}

impl FileListObjectError {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Repository(error) => error.hint(),
            Self::Content { source: FileListError::NewerFormat(_), .. } => {
                Some("upgrade pgkeep on this host".to_owned())
            }
            Self::Content { .. } | Self::OtherList { .. } | Self::Broken { .. } => None,
        }
    }
}

const fn list_object(backup: BackupName) -> ObjectName {
    ObjectName::Backup { backup, part: BackupPart::Files }
}

/// Writes a file list entry by entry.
pub struct FileListWriter {
    backup: BackupName,
    encoder: FileListEncoder,
    lines: Vec<u8>,
    object: ObjectWriter,
}

impl FileListWriter {
    /// Begins the list of `backup`, sealed if that is encrypted.
    pub fn new(
        repository: &Repository,
        backup: BackupName,
        facts: Facts,
        sealer: Option<StreamSealer>,
    ) -> Self {
        let mut lines = Vec::with_capacity(BATCH_LENGTH);
        let encoder = FileListEncoder::new(backup, &mut lines);
        let object = match sealer {
            Some(sealer) => repository.sealed_writer(list_object(backup), facts, sealer),
            None => repository.writer(list_object(backup), facts),
        };
        Self { backup, encoder, lines, object }
    }

    /// Adds an entry. Refuses one that no restore could write; the list can go on without it.
    pub async fn add(&mut self, entry: &FileEntry) -> Result<(), FileListObjectError> {
        self.encoder
            .entry(entry, &mut self.lines)
            .map_err(|source| FileListObjectError::Content { backup: self.backup, source })?;
        if self.lines.len() >= BATCH_LENGTH {
            self.flush().await?;
        }
        Ok(())
    }

    /// Seals the list and stores it.
    pub async fn finish(self) -> Result<Stored, FileListObjectError> {
        let Self { encoder, mut lines, mut object, .. } = self;
        encoder.finish(&mut lines);
        object.write(lines.into()).await?;
        Ok(object.finish().await?)
    }

    /// Gives the list up and leaves nothing behind.
    pub async fn abort(self) {
        self.object.abort().await;
    }

    async fn flush(&mut self) -> Result<(), FileListObjectError> {
        let lines = std::mem::replace(&mut self.lines, Vec::with_capacity(BATCH_LENGTH));
        Ok(self.object.write(Bytes::from(lines)).await?)
    }
}

/// Reads a file list entry by entry; holds a chunk of the object and one entry.
pub struct FileListReader {
    backup: BackupName,
    expected: FileListRecord,
    hasher: Hasher,
    /// None at the end and after an error.
    decoder: Option<FileListDecoder>,
    verified: bool,
    object: ObjectReader,
}

impl FileListReader {
    /// Opens the list of `backup`, which its record describes as `expected`, with the backup's key if it is
    /// encrypted.
    pub async fn open(
        repository: &Repository,
        backup: BackupName,
        expected: FileListRecord,
        key: Option<&OpeningKey>,
    ) -> Result<Self, FileListObjectError> {
        let object = match key {
            Some(key) => repository.read_sealed(list_object(backup), key.list()).await?,
            None => repository.read(list_object(backup)).await?,
        };
        let decoder = Some(FileListDecoder::new(backup));
        Ok(Self { backup, expected, hasher: Hasher::new(), decoder, verified: false, object })
    }

    /// The next entry. Each one is valid in itself; that the list is the right one and whole is certain only
    /// once this returned `None`.
    pub async fn next(&mut self) -> Result<Option<FileEntry>, FileListObjectError> {
        let backup = self.backup;
        let refuse = |source| FileListObjectError::Content { backup, source };
        while let Some(mut decoder) = self.decoder.take() {
            if let Some(entry) = decoder.next_entry().map_err(refuse)? {
                self.decoder = Some(decoder);
                return Ok(Some(entry));
            }
            if let Some(chunk) = self.object.next().await? {
                self.hasher.update(&chunk);
                decoder.push(&chunk);
                self.decoder = Some(decoder);
                continue;
            }
            decoder.finish().map_err(refuse)?;
            self.verified = self.hasher.length() == self.expected.plaintext_length
                && self.hasher.digest() == self.expected.digest;
            if !self.verified {
                return Err(FileListObjectError::OtherList { backup });
            }
        }
        // After an error the end must not look like a verified one.
        if self.verified { Ok(None) } else { Err(FileListObjectError::Broken { backup }) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::file_list::{EntryKind, EntryPath};
    use super::*;
    use crate::codec::Digest;
    use crate::repository::Settings;
    use crate::storage::Store;

    fn repository() -> Repository {
        Repository::new(Store::in_memory(), "site", Settings { part_size: 64 << 10, ..Settings::default() })
    }

    fn backup() -> BackupName {
        "20261121T100000Z".parse().unwrap()
    }

    fn directory(number: usize) -> FileEntry {
        let path = EntryPath::new(format!("base/{number}/{}", blake3::hash(&number.to_le_bytes()))).unwrap();
        FileEntry { path, mode: 0o700, kind: EntryKind::Directory }
    }

    async fn write(repository: &Repository, count: usize) -> FileListRecord {
        let mut writer = FileListWriter::new(repository, backup(), Facts::default(), None);
        for number in 0..count {
            writer.add(&directory(number)).await.unwrap();
        }
        FileListRecord::from(&writer.finish().await.unwrap())
    }

    async fn read(repository: &Repository, expected: FileListRecord) -> Result<usize, FileListObjectError> {
        let mut reader = FileListReader::open(repository, backup(), expected, None).await?;
        let mut count = 0;
        while let Some(entry) = reader.next().await? {
            assert_eq!(entry, directory(count));
            count += 1;
        }
        assert!(reader.next().await?.is_none());
        Ok(count)
    }

    #[tokio::test]
    async fn a_list_of_many_batches_reads_back() {
        let repository = repository();
        let expected = write(&repository, 20_000).await;
        assert!(expected.plaintext_length > 4 * BATCH_LENGTH as u64);
        assert_eq!(read(&repository, expected).await.unwrap(), 20_000);
    }

    #[tokio::test]
    async fn an_empty_list_reads_back() {
        let repository = repository();
        let expected = write(&repository, 0).await;
        assert_eq!(read(&repository, expected).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_whole_list_that_the_record_does_not_name_is_refused() {
        let repository = repository();
        let expected = write(&repository, 10).await;
        let other = FileListRecord { digest: Digest::of(b"other"), ..expected };
        assert!(matches!(read(&repository, other).await, Err(FileListObjectError::OtherList { .. })));
    }

    #[tokio::test]
    async fn an_error_never_turns_into_a_verified_end() {
        let repository = repository();
        let expected = write(&repository, 10).await;
        let other = FileListRecord { plaintext_length: 1, ..expected };
        let mut reader = FileListReader::open(&repository, backup(), other, None).await.unwrap();
        for _ in 0..10 {
            assert!(reader.next().await.unwrap().is_some());
        }
        assert!(reader.next().await.is_err());
        assert!(matches!(reader.next().await, Err(FileListObjectError::Broken { .. })));
    }

    #[tokio::test]
    async fn a_missing_list_is_told_as_such() {
        let expected = write(&repository(), 1).await;
        let error = read(&repository(), expected).await.unwrap_err();
        assert!(matches!(error, FileListObjectError::Repository(error) if error.is_not_found()));
    }
}
