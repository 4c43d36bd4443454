//! Alert files: PGHoard's way to tell a monitoring system that somebody has to look.
//!
//! They have PGHoard's names and content, and are left for the operator to remove.

use std::path::{Path, PathBuf};

use tracing::{error, warn};

use crate::postgres;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alert {
    /// The server refuses the password.
    Authentication,
    /// The server cannot be reached, or refuses for another reason.
    Configuration,
    /// Storage has failed too often in a row.
    UploadRetries,
    /// The server is of another major version than it should be.
    VersionMismatch,
    /// The server's version is not supported.
    VersionUnsupported,
}

impl Alert {
    const fn file_name(self) -> &'static str {
        match self {
            Self::Authentication => "authentication_error",
            Self::Configuration => "configuration_error",
            Self::UploadRetries => "upload_retries_warning",
            Self::VersionMismatch => "version_mismatch_error",
            Self::VersionUnsupported => "version_unsupported_error",
        }
    }

    /// What an error of the server, met while connecting, is worth. `None` for what comes later.
    pub fn of(error: &postgres::Error) -> Option<Self> {
        use postgres::Error;
        match error {
            Error::Password { .. } | Error::Auth { .. } => Some(Self::Authentication),
            Error::TooOld { .. } => Some(Self::VersionUnsupported),
            Error::ConnInfo(_)
            | Error::Unreachable { .. }
            | Error::ConnectTimeout { .. }
            | Error::TlsRefused { .. }
            | Error::Tls { .. }
            | Error::NoPgHba { .. }
            | Error::NotReplicationRole { .. }
            | Error::Refused { .. }
            | Error::OtherSession { .. } => Some(Self::Configuration),
            _ => None,
        }
    }
}

/// The directory of alert files, if there is one.
#[derive(Clone, Debug, Default)]
pub struct Alerts(Option<PathBuf>);

impl Alerts {
    pub fn new(directory: Option<PathBuf>) -> Self {
        Self(directory)
    }

    /// Makes the file. That this fails must not stop what is still going on.
    pub async fn raise(&self, alert: Alert) {
        let Some(directory) = self.0.clone() else { return };
        let path = directory.join(alert.file_name());
        let written = tokio::task::spawn_blocking(move || raise(&path).map_err(|error| (path, error))).await;
        match written {
            Ok(Ok(true)) => warn!(file = alert.file_name(), "raised an alert"),
            Ok(Ok(false)) => {}
            Ok(Err((path, error))) => error!(path = %path.display(), %error, "cannot raise an alert"),
            Err(error) => error!(%error, "cannot raise an alert"),
        }
    }
}

/// False when it is raised already.
fn raise(path: &Path) -> std::io::Result<bool> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let news = !path.exists();
    std::fs::write(path, "alert")?;
    Ok(news)
}

/// The major version that `PG_VERSION` in a data directory says.
pub fn major_of(data_directory: &Path) -> Option<u32> {
    std::fs::read_to_string(data_directory.join("PG_VERSION")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_is_a_file_with_pghoards_name_and_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("alerts").join(Alert::Authentication.file_name());
        assert!(raise(&path).unwrap());
        assert!(!raise(&path).unwrap());
        assert_eq!(
            std::fs::read_to_string(folder.path().join("alerts/authentication_error")).unwrap(),
            "alert"
        );
    }
}
