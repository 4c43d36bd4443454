//! A file that gets its name only when it is whole and on disk.
//!
//! Written under a temporary name in the same directory, so that the last step is a rename within one file
//! system; given up, it leaves nothing behind.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Makes names unique among the threads of one process; the process id does so among processes.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A file in the making. Dropped before [`NewFile::commit`], it is removed.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl NewFile {
    /// Begins the file that will be `target`, readable by its owner only, as PostgreSQL's files are.
    pub fn create(target: &Path) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt;
        let name = target
            .file_name()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the target has no file name"))?;
        if target.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "the target is a directory"));
        }
        loop {
            let mut temporary_name = OsString::from(name);
            let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
            temporary_name.push(format!(".pgkeep.{}.{serial}.tmp", std::process::id()));
            let temporary = target.with_file_name(temporary_name);
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
                Ok(file) => return Ok(Self { file, temporary, target: target.to_owned(), committed: false }),
                // Process ids come round again: a file of our id is one that an earlier process left.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs::remove_file(&temporary)?,
                Err(error) => return Err(error),
            }
        }
    }

    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Brings the bytes to disk, then gives the file its name, then brings the name to disk.
    pub fn commit(mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.rename()?;
        let directory = self.target.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// Gives the file its name and leaves bringing it to disk to whoever takes it from there.
    pub fn commit_unsynced(mut self) -> io::Result<()> {
        self.rename()
    }

    fn rename(&mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.target)?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here; the name says what the file is.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn has_its_name_only_after_commit() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("RECOVERYXLOG");
        let mut file = NewFile::create(&target).unwrap();
        file.write_all(b"WAL").unwrap();
        assert!(!target.exists());
        assert!(names(directory.path())[0].starts_with("RECOVERYXLOG.pgkeep."));
        file.commit().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"WAL");
        assert_eq!(names(directory.path()), ["RECOVERYXLOG"]);
    }

    #[test]
    fn given_up_it_leaves_nothing_and_touches_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("RECOVERYXLOG");
        fs::write(&target, b"old").unwrap();
        let mut file = NewFile::create(&target).unwrap();
        file.write_all(b"new").unwrap();
        drop(file);
        assert_eq!(names(directory.path()), ["RECOVERYXLOG"]);
        assert_eq!(fs::read(&target).unwrap(), b"old");
        assert!(NewFile::create(directory.path()).is_err(), "a directory is not replaced");
        assert!(NewFile::create(&directory.path().join("missing/file")).is_err());
    }
}
