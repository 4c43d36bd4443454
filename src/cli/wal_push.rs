//! `pgkeep wal-push`: one WAL file from `archive_command`.
//!
//! Exit 0 permits PostgreSQL to delete its own copy, so it is given only for what storage has confirmed.
//! Everything else is 1: PostgreSQL keeps the file and comes again (above 125 its archiver would die).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use futures_util::stream;

use super::agent_client::{AgentError, Given};
use super::wal_fetch::AgentOptions;
use super::{Context, Exit, Failure};
use crate::postgres::{Expected, WalFileName};
use crate::serve::archive;
use crate::storage::Access;

const CHUNK_BYTES: usize = 256 << 10;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct WalPushArgs {
    /// The WAL file (`%p`); its name decides what it is
    #[arg(value_name = "PATH")]
    path: PathBuf,
    #[command(flatten)]
    agent: AgentOptions,
}

const EXAMPLES: &str = "\
Example, in postgresql.conf:
  archive_command = 'pgkeep wal-push %p'

Gives the file to the agent; with a configuration, to storage itself where no
agent takes it. An agent that wants a password takes PGKEEP_HTTP_USERNAME and
PGKEEP_HTTP_PASSWORD from the environment.

Exit status:
  0  stored, or stored before with the same content
  1  not stored: PostgreSQL keeps the file and comes again";

pub fn run(args: &WalPushArgs, context: &Context) -> anyhow::Result<()> {
    push(args, context).map_err(|error| {
        // Whatever the cause would mean elsewhere, here it is 1.
        let text = format!("cannot archive `{}`", args.path.display());
        error.context(Failure::new(Exit::Failure, text))
    })
}

fn push(args: &WalPushArgs, context: &Context) -> anyhow::Result<()> {
    let name = args.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let file: WalFileName = name.parse()?;
    let agent = args.agent.agent()?;
    let site = context.site_name().unwrap_or_else(|| "-".to_owned());
    let (mut content, length) = open(&args.path)?;
    let given = agent.store(&site, file, length, &mut content).with_context(|| cannot_read(&args.path))?;
    match given {
        Ok(Given::Stored | Given::AlreadyStored) => Ok(()),
        Ok(Given::Conflict(reason)) => Err(Failure::new(Exit::Failure, format!("REFUSED: {reason}")).into()),
        // It has looked at the file and does not want it; storage would not either.
        Err(error @ AgentError::Refused { .. }) => Err(error.into()),
        Err(error) if context.source().is_ok() => {
            store(context, file, &args.path).with_context(|| error.to_string())
        }
        Err(error) => Err(error.into()),
    }
}

fn open(path: &Path) -> anyhow::Result<(File, u64)> {
    let content = File::open(path).with_context(|| cannot_read(path))?;
    let metadata = content.metadata().with_context(|| cannot_read(path))?;
    anyhow::ensure!(metadata.is_file(), "`{}` is not a regular file", path.display());
    Ok((content, metadata.len()))
}

fn cannot_read(path: &Path) -> String {
    format!("cannot read `{}`", path.display())
}

/// Without an agent.
fn store(context: &Context, file: WalFileName, path: &Path) -> anyhow::Result<()> {
    let config = context.load()?.config;
    let site = context.site(&config)?;
    let (content, length) = open(path)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let repository = context.repository(&config, site, Access::Write).await?;
        // Where conditions are dropped without a word, looking first must take their place.
        repository.store().probe_conditional_put().await?;
        let stored =
            archive(&repository, &Expected::default(), file, length, Box::pin(chunks(content))).await;
        match stored {
            Ok(_) => Ok(()),
            Err(error) if error.is_conflict() => Err(error).context("REFUSED"),
            Err(error) => Err(error.into()),
        }
    })
}

/// The file's bytes. Nothing else waits on this thread, so the reads may block it.
fn chunks(content: File) -> impl futures_util::Stream<Item = io::Result<Bytes>> {
    stream::unfold(content, |mut content| async {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        match (&mut content).take(CHUNK_BYTES as u64).read_to_end(&mut chunk) {
            Ok(0) => None,
            Ok(_) => Some((Ok(chunk.into()), content)),
            Err(error) => Some((Err(error), content)),
        }
    })
}
