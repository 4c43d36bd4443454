//! What can end a base backup, by what is to be done about it.

use crate::codec::TarError;
use crate::postgres::ManifestError;
use crate::{catalog, postgres, repository};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Server(#[from] postgres::Error),
    #[error(transparent)]
    Repository(#[from] repository::Error),
    #[error(transparent)]
    FileList(#[from] catalog::FileListObjectError),
    #[error(transparent)]
    Path(#[from] catalog::FileListError),
    #[error("the server sent an archive that cannot be read")]
    Tar(#[from] TarError),
    #[error("the server's `backup_label` cannot be read")]
    Label(#[from] postgres::ParseBackupLabelError),
    #[error("the backup is not what the server read")]
    Manifest(#[from] ManifestError),
    #[error("the WAL up to {0}, which the backup needs, could not be archived: {1}")]
    Wal(postgres::Lsn, String),
    #[error("the backup was taken for abandoned and swept while it was still running")]
    Swept,
    #[error("interrupted")]
    Cancelled,
    /// A state that the code rules out; named so that it is reported instead of causing harm.
    #[error("internal error: {0}")]
    Bug(&'static str),
}

impl Error {
    /// What the operator can do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Server(error) => error.hint(),
            Self::Repository(error) => error.hint(),
            Self::Wal(..) => {
                Some("run `pgkeep run` beside the server, or look at `pgkeep status`".to_owned())
            }
            _ => None,
        }
    }
}
