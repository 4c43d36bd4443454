//! The async runtime of those commands that need one.

use std::future::Future;

use anyhow::Context as _;

/// Runs `future` to its end. Two threads move bytes; compression, hashing and file work are done by at most
/// `parallelism` blocking threads and some more for short file operations.
pub fn block_on<F: Future>(parallelism: usize, future: F) -> anyhow::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(parallelism + 8)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    Ok(runtime.block_on(future))
}
