//! PGHoard's requests to keep a backup while somebody restores it.
//!
//! An empty object below `preservation_request/`, which every pruner honours, PGHoard's too. A request that
//! cannot be stored is told and is no reason not to restore, as with PGHoard.

use bytes::Bytes;
use jiff::Timestamp;

use crate::catalog::BackupId;
use crate::repository::{Facts, ObjectName, PghoardFolder, Repository};

/// Asks for `backup` to be kept until then; gives what takes the request back.
pub async fn request(repository: &Repository, backup: &BackupId, until: Timestamp) -> Option<ObjectName> {
    // The last part of its key.
    let backup = backup.to_string();
    let backup = backup.rsplit('/').next().unwrap_or_default();
    let until = python_time(until);
    let Ok(name) = format!("{backup}_{until}").parse() else { return None };
    let name = ObjectName::Pghoard { folder: PghoardFolder::Preservations, name };
    match repository.put(name, Bytes::new(), Facts::default()).await {
        Ok(_) => Some(name),
        Err(error) => {
            tracing::error!(%error, "Could not request backup preservation");
            None
        }
    }
}

/// Takes a request back.
pub async fn cancel(repository: &Repository, request: ObjectName) {
    if let Err(error) = repository.delete([request]).await {
        tracing::error!(%error, "Could not cancel backup preservation");
    }
}

/// As Python prints a time of UTC: without a fraction when there is none.
fn python_time(time: Timestamp) -> String {
    let micros = time.subsec_nanosecond() / 1000;
    let format = if micros == 0 { "%Y-%m-%d %H:%M:%S+00:00" } else { "%Y-%m-%d %H:%M:%S.%6f+00:00" };
    time.strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_pythons() {
        assert_eq!(python_time("2099-01-01T00:00:00Z".parse().unwrap()), "2099-01-01 00:00:00+00:00");
        assert_eq!(
            python_time("2099-01-01T00:00:00.5Z".parse().unwrap()),
            "2099-01-01 00:00:00.500000+00:00"
        );
    }
}
