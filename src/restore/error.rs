//! What can end a restore, by what is to be done about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::{catalog, repository};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{0}` is not empty; nothing was changed")]
    NotEmpty(PathBuf),
    #[error("{0}")]
    Tablespace(String),
    #[error("{0}")]
    Damaged(String),
    #[error(transparent)]
    Repository(#[from] repository::Error),
    #[error(transparent)]
    Keys(#[from] catalog::BackupKeyError),
    #[error(transparent)]
    Pghoard(#[from] catalog::PghoardError),
    #[error(transparent)]
    FileList(#[from] catalog::FileListObjectError),
    #[error("cannot {action} `{path}`")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("interrupted; the target directory holds an unfinished restore, which the next one replaces")]
    Cancelled,
    /// A state that the code rules out; named so that it is reported instead of causing harm.
    #[error("internal error: {0}")]
    Bug(&'static str),
}

impl Error {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// What the operator can do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotEmpty(path) => Some(format!(
                "move `{}` away, or name another directory; with `--if-empty` an existing data directory is left alone",
                path.display()
            )),
            Self::Repository(error) => error.hint(),
            Self::Keys(error) => error.hint(),
            Self::Pghoard(error) => error.hint(),
            Self::Io { path, source, .. } if source.kind() == io::ErrorKind::StorageFull => Some(format!(
                "make room on the file system of `{}` and run the same command again",
                path.display()
            )),
            Self::Damaged(_) => Some("restore an earlier backup: `pgkeep list` shows them".to_owned()),
            _ => None,
        }
    }
}
