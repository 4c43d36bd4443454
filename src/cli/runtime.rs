//! The async runtime of those commands that need one.

use std::future::Future;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

use crate::agent::Site;
use crate::catalog::Catalog;
use crate::config::{Config, SiteConfig};
use crate::runtime::shutdown_signal;
use crate::storage::Access;

/// Runs `future`, a single piece of work, to its end. One thread moves bytes; compression, hashing and file
/// work are done by at most `parallelism` blocking threads and some more for short file operations. With
/// more threads every message of a server would wake one of them for the other: a base backup then took
/// seven times the context switches and a tenth more of the processor.
pub fn block_on<F: Future>(parallelism: usize, future: F) -> anyhow::Result<F::Output> {
    run(tokio::runtime::Builder::new_current_thread(), parallelism, future)
}

/// As [`block_on`], for the agent: two threads move bytes, so that no site and no client waits for another.
pub fn block_on_many<F: Future>(parallelism: usize, future: F) -> anyhow::Result<F::Output> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2);
    run(builder, parallelism, future)
}

fn run<F: Future>(
    mut builder: tokio::runtime::Builder,
    parallelism: usize,
    future: F,
) -> anyhow::Result<F::Output> {
    let runtime = builder
        .max_blocking_threads(parallelism + 8)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    Ok(runtime.block_on(future))
}

/// Runs `work` to its end; a signal to stop cancels it first, and it then has the time it takes to tidy up.
pub async fn interruptible<F: Future>(cancel: &CancellationToken, work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    tokio::select! { biased;
        output = &mut work => return output,
        signal = shutdown_signal() => match signal {
            Ok(signal) => tracing::info!(?signal, "stopping"),
            Err(error) => {
                // Without handlers a signal ends the process at once, which loses nothing either.
                tracing::warn!(%error, "signals cannot be received");
                return work.await;
            }
        },
    }
    cancel.cancel();
    work.await
}

/// What the site's archive holds, for the commands that only look.
pub fn load_catalog(config: &Config, site: &SiteConfig) -> anyhow::Result<Catalog> {
    block_on(config.parallelism, async {
        let site = Site::open(config, site, Access::Read).await?;
        Ok(Catalog::load(&site.repository).await?)
    })?
}
