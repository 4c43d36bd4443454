//! Tasks with an owner.
//!
//! Every task has a name, a token from its parent and somebody who waits for it. Tasks here are loops
//! that run until they are cancelled: one that ends on its own, even with `Ok`, is reported, because a
//! WAL receiver that has quietly stopped is the worst kind of failure. Dropping the group aborts what
//! is left, so no task outlives its owner.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::future::Future;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Any error a task may end with.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// How a task ended that nobody had asked to.
#[derive(Debug, thiserror::Error)]
pub enum TaskEnd {
    #[error("task `{name}` ended although nothing asked it to")]
    Returned { name: String },
    #[error("task `{name}` failed")]
    Failed { name: String, source: BoxError },
    #[error("task `{name}` panicked: {message}")]
    Panicked { name: String, message: String },
}

/// The tasks of one owner.
#[derive(Debug)]
pub struct TaskGroup {
    cancel: CancellationToken,
    tasks: JoinSet<Result<(), BoxError>>,
    names: HashMap<Id, String>,
}

impl TaskGroup {
    /// A group that also stops when `parent` is cancelled.
    pub fn new(parent: &CancellationToken) -> Self {
        Self { cancel: parent.child_token(), tasks: JoinSet::new(), names: HashMap::new() }
    }

    /// The token that every task of this group was given.
    pub fn token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Starts a task that runs until the token it is given is cancelled.
    pub fn spawn<F, Fut, E>(&mut self, name: impl Into<String>, task: F)
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let future = task(self.cancel.clone());
        let handle = self.tasks.spawn(async move { future.await.map_err(Into::into) });
        self.names.insert(handle.id(), name.into());
    }

    /// Waits for a task to end that was not asked to; for ever while all is well or the group is being
    /// cancelled. Safe to use as a branch of `select!`.
    pub async fn unexpected_end(&mut self) -> TaskEnd {
        loop {
            match self.tasks.join_next_with_id().await {
                Some(joined) => {
                    let end = self.end_of(joined);
                    if let Some(end) = end.filter(|_| !self.cancel.is_cancelled()) {
                        return end;
                    }
                }
                None => std::future::pending().await,
            }
        }
    }

    /// Cancels all tasks and waits up to `grace` for them. What has not ended by then is aborted and
    /// named in the result; failures on the way out are logged, since nobody is left to act on them.
    pub async fn drain(mut self, grace: Duration) -> Vec<String> {
        self.cancel.cancel();
        let all_ended = timeout(grace, async {
            while let Some(joined) = self.tasks.join_next_with_id().await {
                match self.end_of(joined) {
                    Some(TaskEnd::Returned { .. }) | None => {}
                    Some(end) => tracing::warn!(error = %with_causes(&end), "task failed while stopping"),
                }
            }
        });
        if all_ended.await.is_ok() {
            return Vec::new();
        }
        self.tasks.shutdown().await;
        let mut unfinished: Vec<String> = self.names.into_values().collect();
        unfinished.sort_unstable();
        unfinished
    }

    /// `None` for a task that was aborted.
    fn end_of(&mut self, joined: Result<(Id, Result<(), BoxError>), JoinError>) -> Option<TaskEnd> {
        let id = match &joined {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let name = self.names.remove(&id).unwrap_or_default();
        match joined {
            Ok((_, Ok(()))) => Some(TaskEnd::Returned { name }),
            Ok((_, Err(source))) => Some(TaskEnd::Failed { name, source }),
            Err(error) => {
                let payload = error.try_into_panic().ok()?;
                Some(TaskEnd::Panicked { name, message: panic_message(payload.as_ref()) })
            }
        }
    }
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    type End = Result<(), BoxError>;

    async fn until_cancelled(token: CancellationToken) -> End {
        token.cancelled().await;
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_by_itself_is_reported_with_its_name() {
        let mut group = TaskGroup::new(&CancellationToken::new());
        group.spawn("receiver", until_cancelled);
        group.spawn("status", |_| async { Ok::<_, BoxError>(()) });
        assert_eq!(
            group.unexpected_end().await.to_string(),
            "task `status` ended although nothing asked it to"
        );
        group.spawn("uploads", |_| async { Err("disk full") });
        let end = group.unexpected_end().await;
        assert_eq!(with_causes(&end), "task `uploads` failed: disk full");
        group.spawn("loop", |_| async { panic!("index 3") as End });
        assert_eq!(group.unexpected_end().await.to_string(), "task `loop` panicked: index 3");
        assert!(group.drain(Duration::from_secs(1)).await.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_was_asked_for_is_no_news() {
        let parent = CancellationToken::new();
        let mut group = TaskGroup::new(&parent);
        group.spawn("receiver", until_cancelled);
        parent.cancel();
        let nothing = timeout(Duration::from_secs(5), group.unexpected_end()).await;
        assert!(nothing.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn draining_aborts_and_names_what_does_not_end() {
        let mut group = TaskGroup::new(&CancellationToken::new());
        group.spawn("receiver", until_cancelled);
        group.spawn("stuck", |_| std::future::pending::<End>());
        assert_eq!(group.drain(Duration::from_secs(10)).await, ["stuck"]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_task_outlives_its_group() {
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let mut group = TaskGroup::new(&CancellationToken::new());
        group.spawn("holder", |_| async move {
            let _held = sender;
            std::future::pending::<End>().await
        });
        tokio::task::yield_now().await;
        drop(group);
        assert!(receiver.await.is_err(), "the sender is dropped with its task");
    }
}
