//! Exit statuses, and which error means which. The one place where either is decided.

use std::error::Error as StdError;
use std::ffi::OsString;
use std::process::ExitCode;

use super::agent_client::AgentError;
use crate::agent::{self, SiteError};
use crate::catalog::{BackupKeyError, FileListObjectError, PghoardError};
use crate::config;
use crate::observe::LogError;
use crate::postgres::{self, WalFileName};
use crate::serve::{ArchiveError, FetchError, Unknown};
use crate::{basebackup, repository, restore, storage, wal};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Success = 0,
    /// Anything that has no status of its own.
    Failure = 1,
    /// Wrong usage or configuration.
    Configuration = 2,
    NoSuchBackup = 3,
    TargetNotEmpty = 4,
    OutsideRecoveryWindow = 5,
    StorageUnreachable = 6,
    CorruptData = 7,
    WalMissing = 8,
    /// `wal-fetch` could not find out. Above 125, at which PostgreSQL stops instead of ending recovery
    /// (`RestoreArchivedFile` in xlogarchive.c).
    Unknown = 200,
}

impl Exit {
    const fn of_plan(error: &restore::PlanError) -> Self {
        match error.exit_code() {
            3 => Self::NoSuchBackup,
            5 => Self::OutsideRecoveryWindow,
            7 => Self::CorruptData,
            8 => Self::WalMissing,
            _ => Self::Failure,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that knows its exit status and the operator's next step; for those a command finds itself.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    exit: Exit,
    message: String,
    hint: Option<String>,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None }
    }

    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// What an error of one of our rooms means to whoever runs the program.
struct Meaning {
    exit: Exit,
    hint: Option<String>,
}

/// Everything known about an error: what a command itself said goes first, then its causes from the
/// outermost in.
fn meanings_of(error: &anyhow::Error) -> impl Iterator<Item = Meaning> {
    // Asked of the whole error, as this also finds a `Failure` that was added as context.
    let failure = error.downcast_ref::<Failure>();
    let said = failure.map(|failure| Meaning { exit: failure.exit, hint: failure.hint.clone() });
    said.into_iter().chain(error.chain().filter_map(meaning_of))
}

/// Knows every error type of the rooms below that has a status or a hint of its own. Those that only pass
/// another error on are taken apart here, because the error inside is then not in the chain.
fn meaning_of(cause: &(dyn StdError + 'static)) -> Option<Meaning> {
    let meaning = |exit, hint| Some(Meaning { exit, hint });
    if let Some(error) = cause.downcast_ref::<config::Error>() {
        return meaning(Exit::Configuration, error.hint());
    }
    if let Some(error) = cause.downcast_ref::<postgres::Error>() {
        return meaning(Exit::Failure, error.hint());
    }
    if let Some(error) = cause.downcast_ref::<FetchError>() {
        return meaning(Exit::Unknown, error.hint());
    }
    if let Some(error) = cause.downcast_ref::<Unknown>() {
        return meaning(Exit::Unknown, error.hint());
    }
    if let Some(error) = cause.downcast_ref::<ArchiveError>() {
        return meaning(Exit::Failure, error.hint());
    }
    if cause.is::<LogError>() {
        return meaning(Exit::Configuration, None);
    }
    if let Some(error) = cause.downcast_ref::<storage::Error>() {
        return meaning(exit_of_storage(error), error.hint());
    }
    if let Some(SiteError::Storage(error)) = cause.downcast_ref::<SiteError>() {
        return meaning(exit_of_storage(error), error.hint());
    }
    if let Some(error) = cause.downcast_ref::<repository::Error>() {
        return meaning(exit_of_repository(error), error.hint());
    }
    if let Some(error) = cause.downcast_ref::<restore::PlanError>() {
        return meaning(Exit::of_plan(error), error.hint());
    }
    if let Some(error) = cause.downcast_ref::<restore::Error>() {
        let exit = match error {
            restore::Error::NotEmpty(_) => Exit::TargetNotEmpty,
            // A pack or file list that is gone is damage to the backup that its record promises.
            restore::Error::Damaged(_)
            | restore::Error::Repository(repository::Error::NotFound(_))
            | restore::Error::FileList(FileListObjectError::Repository(repository::Error::NotFound(_)))
            | restore::Error::Pghoard(PghoardError::Repository(repository::Error::NotFound(_))) => {
                Exit::CorruptData
            }
            restore::Error::Repository(error)
            | restore::Error::FileList(FileListObjectError::Repository(error))
            | restore::Error::Pghoard(PghoardError::Repository(error)) => exit_of_repository(error),
            restore::Error::FileList(_)
            | restore::Error::Pghoard(_)
            | restore::Error::Keys(BackupKeyError::Altered(_)) => Exit::CorruptData,
            // The right key belongs into the configuration.
            restore::Error::Keys(_) => Exit::Configuration,
            _ => Exit::Failure,
        };
        return meaning(exit, error.hint());
    }
    if let Some(error) = cause.downcast_ref::<agent::BackupError>() {
        let exit = match error {
            agent::BackupError::Repository(error)
            | agent::BackupError::Backup(basebackup::Error::Repository(error))
            | agent::BackupError::Wal(wal::Error::Repository(error)) => exit_of_repository(error),
            _ => Exit::Failure,
        };
        return meaning(exit, error.hint());
    }
    if let Some(error) = cause.downcast_ref::<AgentError>() {
        return meaning(Exit::Failure, error.hint());
    }
    if let Some(error) = cause.downcast_ref::<agent::Error>() {
        return match error {
            // What is wrong with the site follows in the chain.
            agent::Error::Site { .. } => None,
            _ => meaning(Exit::Failure, error.hint()),
        };
    }
    None
}

/// Whether these arguments are those of a `restore_command`, rightly written or not. It must not exit with
/// 1 to 125 by mistake: PostgreSQL takes that for the end of the archive and promotes.
pub fn is_restore_command(arguments: &[OsString]) -> bool {
    let is = |name: &str| arguments.iter().any(|argument| argument == name);
    // `pgkeep wal-fecth 000000010000000000000003 pg_wal/RECOVERYXLOG` names a file that PostgreSQL wants.
    let names_a_file = arguments.iter().filter_map(|argument| argument.to_str());
    let names_a_file = names_a_file.map(str::parse::<WalFileName>).any(|name| name.is_ok());
    is("wal-fetch") || (names_a_file && !is("wal-push"))
}

/// The exit status for arguments that are not understood.
pub fn of_wrong_usage(arguments: &[OsString]) -> Exit {
    if is_restore_command(arguments) {
        Exit::Unknown
    } else if arguments.iter().any(|argument| argument == "wal-push") {
        Exit::Failure
    } else {
        Exit::Configuration
    }
}

fn exit_of_repository(error: &repository::Error) -> Exit {
    use repository::Error;
    match error {
        Error::Damaged { .. } => Exit::CorruptData,
        // The key belongs into the configuration.
        Error::Locked { .. } => Exit::Configuration,
        Error::Transient { cause, .. } | Error::Permanent { cause, .. } => exit_of_storage(cause),
        // What a missing object means depends on which one it is; the command knows and says so.
        Error::NotFound(_) | Error::Conflict { .. } | Error::TooLarge { .. } | Error::Unsupported { .. } => {
            Exit::Failure
        }
    }
}

fn exit_of_storage(error: &storage::Error) -> Exit {
    match error {
        storage::Error::Misconfigured { .. } => Exit::Configuration,
        _ => Exit::StorageUnreachable,
    }
}

/// The exit status for an error.
pub fn status_of(error: &anyhow::Error) -> Exit {
    meanings_of(error).next().map_or(Exit::Failure, |meaning| meaning.exit)
}

/// The next steps an error offers.
pub fn hints_of(error: &anyhow::Error) -> Vec<String> {
    let mut hints: Vec<String> = meanings_of(error).filter_map(|meaning| meaning.hint).collect();
    // An error may pass on the hint of its cause, which is in the chain, too.
    hints.dedup();
    hints
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn what_a_command_says_goes_before_what_the_cause_is() {
        let plain = anyhow::anyhow!("odd");
        assert_eq!(status_of(&plain), Exit::Failure);
        let failure = Failure::new(Exit::WalMissing, "segment missing").with_hint("archive it");
        let error = Err::<(), _>(failure).context("cannot restore").unwrap_err();
        assert_eq!(status_of(&error), Exit::WalMissing);
        assert_eq!(hints_of(&error), ["archive it"]);
        let error =
            anyhow::Error::from(config::Error::NoSites).context(Failure::new(Exit::Unknown, "unknown"));
        assert_eq!(status_of(&error), Exit::Unknown);
    }

    #[test]
    fn a_misspelt_restore_command_is_unknown_and_not_the_end_of_wal() {
        let status = |line: &str| of_wrong_usage(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert_eq!(status("pgkeep wal-fetch"), Exit::Unknown);
        assert_eq!(status("pgkeep wal-fetch --uri http://x 00000002.history x"), Exit::Unknown);
        assert_eq!(status("pgkeep walfetch 000000010000000000000003 pg_wal/RECOVERYXLOG"), Exit::Unknown);
        assert_eq!(status("pgkeep wal-push"), Exit::Failure);
        assert_eq!(status("pgkeep wal-push --x 000000010000000000000003"), Exit::Failure);
        assert_eq!(status("pgkeep config chekc"), Exit::Configuration);
    }

    #[test]
    fn an_unusable_configuration_is_status_2_with_a_hint() {
        let error = anyhow::Error::from(config::Error::Missing);
        assert_eq!(status_of(&error), Exit::Configuration);
        assert!(hints_of(&error)[0].contains("PGKEEP_STORAGE"));
    }
}
