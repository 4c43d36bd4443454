//! `pgkeep wal-fetch`: one WAL file for `restore_command`.
//!
//! Its exit status decides whether a recovery ends: 1 says "there is no more WAL" and is given only when
//! storage said so, itself or through an agent; everything that is not known is 200, at which PostgreSQL
//! stops and nothing is lost.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::agent_client::{Agent, AgentError, AgentUrlError, Found};
use super::{Context, Exit, render};
use crate::postgres::{Expected, LONG_HEADER_BYTES, WalFileName, check_segment_start};
use crate::runtime::variable;
use crate::secret::Secret;
use crate::serve::{FetchError, NewFile, fetch};
use crate::storage::Access;

/// Pauses before the second and the third try, where only an agent can tell.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_millis(2500)];

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct WalFetchArgs {
    /// Name of the WAL file (`%f`)
    #[arg(value_name = "FILE")]
    file: String,
    /// Where to write it (`%p`)
    #[arg(value_name = "PATH")]
    path: PathBuf,
    #[command(flatten)]
    agent: AgentOptions,
}

const EXAMPLES: &str = "\
Example, in postgresql.conf:
  restore_command = 'pgkeep wal-fetch %f %p'

Asks the agent; with a configuration, reads storage itself where no agent can
tell. An agent that wants a password takes PGKEEP_HTTP_USERNAME and
PGKEEP_HTTP_PASSWORD from the environment.

Exit status:
  0    fetched
  1    storage says that the file does not exist
  200  unknown: PostgreSQL stops, and nothing is lost";

const DEFAULT_URL: &str = "http://127.0.0.1:16000";
const URL_HELP: &str = "The agent's URL [default: http://127.0.0.1:16000] [env: PGKEEP_URL]";

/// Where the agent is.
#[derive(Debug, Args)]
pub struct AgentOptions {
    #[arg(long, value_name = "URL", help = URL_HELP)]
    url: Option<String>,
}

impl AgentOptions {
    pub fn agent(&self) -> Result<Agent, AgentUrlError> {
        let url = self.url.clone().or_else(|| variable("PGKEEP_URL"));
        let password = variable("PGKEEP_HTTP_PASSWORD").map(Secret::new);
        let credentials = variable("PGKEEP_HTTP_USERNAME").zip(password);
        Agent::parse(url.as_deref().unwrap_or(DEFAULT_URL), credentials)
    }
}

/// What is known about the file.
enum Answer {
    Written,
    DoesNotExist,
}

/// What to do when the agent did not tell.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    AskAgain(Duration),
    AskStorage,
    GiveUp,
}

pub fn run(args: &WalFetchArgs, context: &Context) -> Exit {
    match answer(args, context) {
        Ok(Answer::Written) => Exit::Success,
        Ok(Answer::DoesNotExist) => {
            // A standby asks every few seconds; its log need not tell each time.
            if io::stderr().is_terminal() {
                writeln!(io::stderr(), "`{}` does not exist in the archive", args.file).ok();
            }
            Exit::Failure
        }
        Err(error) => {
            render::error(&error.context(format!("cannot fetch `{}`", args.file)));
            Exit::Unknown
        }
    }
}

fn answer(args: &WalFetchArgs, context: &Context) -> anyhow::Result<Answer> {
    let file: WalFileName = args.file.parse()?;
    let agent = args.agent.agent()?;
    let site = context.site_name().unwrap_or_else(|| "-".to_owned());
    let has_configuration = context.source().is_ok();
    let mut tries = 0;
    loop {
        let error = match ask_agent(&agent, &site, file, &args.path)? {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        match after(&error, tries, has_configuration) {
            Next::AskAgain(pause) => std::thread::sleep(pause),
            Next::AskStorage => {
                return ask_storage(context, file, &args.path).with_context(|| error.to_string());
            }
            Next::GiveUp => return Err(error.into()),
        }
        tries += 1;
    }
}

fn after(error: &AgentError, tries: usize, has_configuration: bool) -> Next {
    let may_pass = match error {
        AgentError::Unreachable { .. } | AgentError::Unavailable { .. } | AgentError::Broken { .. } => true,
        AgentError::Refused { .. } | AgentError::Foreign { .. } | AgentError::Malformed { .. } => false,
    };
    match PAUSES.get(tries) {
        _ if has_configuration => Next::AskStorage,
        Some(pause) if may_pass => Next::AskAgain(*pause),
        _ => Next::GiveUp,
    }
}

/// The outer error is one that no other try would mend.
fn ask_agent(
    agent: &Agent,
    site: &str,
    file: WalFileName,
    path: &Path,
) -> anyhow::Result<Result<Answer, AgentError>> {
    let body = match agent.fetch(site, file) {
        Ok(Found::DoesNotExist) => return Ok(Ok(Answer::DoesNotExist)),
        Ok(Found::Body(body)) => body,
        Err(error) => return Ok(Err(error)),
    };
    let mut incoming = Incoming::create(file, body.length(), path)?;
    match body.copy_to(|chunk| incoming.write(chunk)).with_context(|| cannot_write(path))? {
        Ok(()) => incoming.commit()?,
        Err(error) => return Ok(Err(error)),
    }
    Ok(Ok(Answer::Written))
}

fn ask_storage(context: &Context, file: WalFileName, path: &Path) -> anyhow::Result<Answer> {
    let config = context.load()?.config;
    let site = context.site(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let repository = context.repository(&config, site, Access::Read).await?;
        let mut fetched = match fetch(&repository, &Expected::default(), file).await {
            Ok(fetched) => fetched,
            Err(FetchError::NotFound(_)) => return Ok(Answer::DoesNotExist),
            Err(error) => return Err(error.into()),
        };
        let mut incoming = Incoming::create(file, fetched.length(), path)?;
        while let Some(chunk) = fetched.next().await? {
            incoming.write(&chunk).with_context(|| cannot_write(path))?;
        }
        incoming.commit()?;
        Ok(Answer::Written)
    })
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write `{}`", path.display())
}

/// A file on its way to its name, checked once more where it arrives.
struct Incoming<'a> {
    file: WalFileName,
    length: u64,
    path: &'a Path,
    new_file: NewFile,
    /// As much of its beginning as the check takes.
    start: Vec<u8>,
}

impl<'a> Incoming<'a> {
    fn create(file: WalFileName, length: u64, path: &'a Path) -> anyhow::Result<Self> {
        let new_file = NewFile::create(path).with_context(|| cannot_write(path))?;
        Ok(Self { file, length, path, new_file, start: Vec::with_capacity(LONG_HEADER_BYTES) })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let missing = LONG_HEADER_BYTES - self.start.len();
        self.start.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        self.new_file.write_all(bytes)
    }

    fn commit(self) -> anyhow::Result<()> {
        if let WalFileName::Segment(segment) = self.file {
            let header = check_segment_start(&self.start, segment, &Expected::default())
                .with_context(|| format!("what arrived as `{segment}` is something else"))?;
            anyhow::ensure!(
                header.segment_size.bytes() == self.length,
                "what arrived as `{segment}` has {} bytes, not {}",
                self.length,
                header.segment_size.bytes()
            );
        }
        let committed = if is_synced_by_server(self.path) {
            self.new_file.commit_unsynced()
        } else {
            self.new_file.commit()
        };
        committed.with_context(|| cannot_write(self.path))
    }
}

/// The names PostgreSQL gives for `%p`. It brings such a file to disk itself before it replays it
/// (`durable_rename` in `KeepFileRestoredFromArchive`, xlogarchive.c), and asks for it again after a crash
/// before that. Flushing 16 MiB here would make every segment of a recovery wait for the disk twice.
fn is_synced_by_server(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "RECOVERYXLOG" || name == "RECOVERYHISTORY")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_may_come_back_is_asked_three_times() {
        let address = || "a:1".to_owned();
        let down =
            AgentError::Unreachable { address: address(), source: io::ErrorKind::ConnectionRefused.into() };
        assert_eq!(after(&down, 0, false), Next::AskAgain(PAUSES[0]));
        assert_eq!(after(&down, 1, false), Next::AskAgain(PAUSES[1]));
        assert_eq!(after(&down, 2, false), Next::GiveUp);
        let foreign = AgentError::Foreign { address: address(), server: "nginx".to_owned(), status: 404 };
        assert_eq!(after(&foreign, 0, false), Next::GiveUp);
        for error in [down, foreign] {
            assert_eq!(after(&error, 0, true), Next::AskStorage);
        }
    }
}
