//! Where a file may be written on this machine.
//!
//! Shell. PGHoard's clients name a path and expect the file there; a path is accepted only when, with every
//! link followed, it lies in the site's own data directory or in that data directory's WAL directory.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::postgres::WalFileName;

/// Why a path is not written to, or a file not read.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("this site has no `pg_data_directory`, so files are neither written nor read on this machine")]
    NoDataDirectory,
    #[error("directory of `{path}` cannot be found: {source}")]
    NoDirectory { path: PathBuf, source: io::Error },
    #[error("`{0}` is not below the site's `pg_data_directory`")]
    Outside(PathBuf),
    // PGHoard's answer, and what it means.
    #[error("N/A: `{0}` is not in the server's WAL directory, or not a regular file")]
    NoSuchFile(WalFileName),
    #[error("cannot read `{path}`: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
}

/// The server's WAL directory: `pg_xlog` before PostgreSQL 10, and then only where it is there.
pub fn wal_directory(data_directory: &Path) -> PathBuf {
    let current = data_directory.join("pg_wal");
    let former = data_directory.join("pg_xlog");
    if !current.exists() && former.exists() { former } else { current }
}

/// The path to write to when a client asks for `path`.
pub fn resolve(data_directory: Option<&Path>, path: &Path) -> Result<PathBuf, TargetError> {
    let data_directory = data_directory.ok_or(TargetError::NoDataDirectory)?;
    let outside = || TargetError::Outside(path.to_owned());
    // A path that ends in `..` has no file name; one that has it in between is resolved here.
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(outside()) };
    let parent =
        parent.canonicalize().map_err(|source| TargetError::NoDirectory { path: path.to_owned(), source })?;
    let allowed = [data_directory.to_owned(), wal_directory(data_directory)];
    let allowed = allowed.iter().filter_map(|directory| directory.canonicalize().ok());
    if allowed.into_iter().any(|directory| parent.starts_with(directory)) {
        Ok(parent.join(name))
    } else {
        Err(outside())
    }
}

/// Opens `file` in the server's WAL directory; gives its length too. Links are not followed.
pub fn open_wal_file(data_directory: Option<&Path>, file: WalFileName) -> Result<(File, u64), TargetError> {
    let data_directory = data_directory.ok_or(TargetError::NoDataDirectory)?;
    let path = wal_directory(data_directory).join(file.to_string());
    // Without O_NONBLOCK, opening a FIFO would wait for its other end.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).expect("open flags are a small number");
    let opened = File::options().read(true).custom_flags(flags).open(&path);
    let opened = opened.and_then(|opened| opened.metadata().map(|metadata| (opened, metadata)));
    match opened {
        Ok((opened, metadata)) if metadata.is_file() => Ok((opened, metadata.len())),
        Ok(_) => Err(TargetError::NoSuchFile(file)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) =>
        {
            Err(TargetError::NoSuchFile(file))
        }
        Err(source) => Err(TargetError::Unreadable { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_the_data_directory_and_its_own_wal_directory_are_written_to() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        let (data, wal, other) = (base.join("data"), base.join("wal"), base.join("other"));
        for directory in [&data, &wal, &other] {
            fs::create_dir(directory).unwrap();
        }
        symlink(&wal, data.join("pg_wal")).unwrap();
        symlink(&other, data.join("link")).unwrap();
        let resolve = |path: &Path| resolve(Some(&data), path);
        assert_eq!(resolve(&data.join("pg_wal/RECOVERYXLOG")).unwrap(), wal.join("RECOVERYXLOG"));
        assert_eq!(resolve(&data.join("pg_wal/../x")).unwrap_err().to_string(), {
            format!("`{}` is not below the site's `pg_data_directory`", data.join("pg_wal/../x").display())
        });
        assert_eq!(resolve(&data.join("x")).unwrap(), data.join("x"));
        for path in [other.join("x"), data.join("link/x"), data.join("../other/x"), data.join("..")] {
            assert!(matches!(resolve(&path), Err(TargetError::Outside(_))), "{}", path.display());
        }
        let missing = data.join("missing/x");
        assert!(matches!(resolve(&missing), Err(TargetError::NoDirectory { .. })));
        assert!(matches!(super::resolve(None, &data.join("x")), Err(TargetError::NoDataDirectory)));
    }

    #[test]
    fn only_a_regular_file_is_read() {
        let base = tempfile::tempdir().unwrap();
        let wal = base.path().join("pg_wal");
        fs::create_dir(&wal).unwrap();
        let file: WalFileName = "00000002.history".parse().unwrap();
        let open = || open_wal_file(Some(base.path()), file);
        assert!(matches!(open(), Err(TargetError::NoSuchFile(_))));
        fs::write(wal.join("real"), b"1").unwrap();
        symlink(wal.join("real"), wal.join("00000002.history")).unwrap();
        assert!(matches!(open(), Err(TargetError::NoSuchFile(_))));
        fs::remove_file(wal.join("00000002.history")).unwrap();
        fs::create_dir(wal.join("00000002.history")).unwrap();
        assert!(matches!(open(), Err(TargetError::NoSuchFile(_))));
        fs::remove_dir(wal.join("00000002.history")).unwrap();
        fs::write(wal.join("00000002.history"), b"text").unwrap();
        assert_eq!(open().unwrap().1, 4);
    }
}
