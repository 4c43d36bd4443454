//! Tries again after transient failures, until it works, is hopeless, or is told to stop.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::backoff::{Backoff, RetryPolicy};

/// Why [`retry`] came back without a result.
#[derive(Debug, thiserror::Error)]
pub enum Stopped<E> {
    /// The caller's token was cancelled before anything worked.
    #[error("stopped before it succeeded")]
    Cancelled,
    /// Not transient, or transient for longer than the policy allows.
    #[error(transparent)]
    Failed(E),
}

/// Runs `attempt` until it succeeds.
///
/// `is_transient` decides whether a failure may pass. Each failure that is tried again is logged here,
/// once, with `what` (a constant phrase such as `store WAL segment`); the last one is returned and not logged.
pub async fn retry<T, E, F, Fut>(
    what: &'static str,
    policy: &RetryPolicy,
    cancel: &CancellationToken,
    is_transient: impl Fn(&E) -> bool,
    mut attempt: F,
) -> Result<T, Stopped<E>>
where
    E: Display,
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, E>>,
{
    let started = Instant::now();
    let mut backoff = Backoff::new(policy, rand::random());
    let mut number = 1_u32;
    loop {
        let error = tokio::select! { biased;
            () = cancel.cancelled() => return Err(Stopped::Cancelled),
            result = attempt() => match result {
                Ok(value) => return Ok(value),
                Err(error) => error,
            },
        };
        let delay = backoff.next().unwrap_or(Duration::ZERO);
        let too_late = policy.give_up_after.is_some_and(|limit| started.elapsed() + delay > limit);
        if too_late || !is_transient(&error) {
            return Err(Stopped::Failed(error));
        }
        tracing::warn!(what, attempt = number, ?delay, %error, "failed, will try again");
        tokio::select! { biased;
            () = cancel.cancelled() => return Err(Stopped::Cancelled),
            () = sleep(delay) => {}
        }
        number = number.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const POLICY: RetryPolicy = RetryPolicy {
        first: Duration::from_secs(1),
        max: Duration::from_secs(8),
        give_up_after: Some(Duration::from_mins(1)),
    };

    /// Fails with `error` until it has been called `failures` times.
    async fn run(failures: u32, error: &'static str) -> (Result<u32, Stopped<&'static str>>, u32) {
        let calls = Cell::new(0);
        let result = retry(
            "test",
            &POLICY,
            &CancellationToken::new(),
            |error| *error == "transient",
            || async {
                calls.set(calls.get() + 1);
                if calls.get() <= failures { Err(error) } else { Ok(calls.get()) }
            },
        )
        .await;
        (result, calls.get())
    }

    #[tokio::test(start_paused = true)]
    async fn tries_again_while_the_failure_is_transient() {
        assert!(matches!(run(3, "transient").await, (Ok(4), 4)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_permanent_failure_is_final_at_once() {
        assert!(matches!(run(3, "permanent").await, (Err(Stopped::Failed("permanent")), 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_in_time_with_the_last_failure() {
        let started = Instant::now();
        let (result, calls) = run(u32::MAX, "transient").await;
        assert!(matches!(result, Err(Stopped::Failed("transient"))));
        assert!(calls > 5, "{calls}");
        assert!(started.elapsed() <= Duration::from_mins(1));
    }

    #[tokio::test(start_paused = true)]
    async fn cancelling_ends_the_waiting_and_the_attempt() {
        let cancel = CancellationToken::new();
        let child = cancel.clone();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            retry(
                "test",
                &RetryPolicy::PERSISTENT,
                &child,
                |_: &&str| true,
                || async {
                    std::future::pending::<()>().await;
                    Err::<(), _>("never")
                },
            )
            .await
        });
        sleep(Duration::from_secs(1)).await;
        cancel.cancel();
        assert!(matches!(tasks.join_next().await.unwrap().unwrap(), Err(Stopped::Cancelled)));
    }
}
