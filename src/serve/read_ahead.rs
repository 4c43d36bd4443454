//! Fetches the segments that a recovery will ask for next.
//!
//! Shell around [`Window`]. They go into the WAL directory as `NAME.pghoard.prefetch`, verified and on
//! disk before they have that name, because PGHoard's clients take such a file without asking. What
//! nobody takes is removed after a while.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::fetch::{FetchError, fetch};
use super::place::write_file;
use super::prefetched;
use super::window::Window;
use crate::postgres::{Expected, SegmentName, SegmentSize, WalFileName};
use crate::repository::{ObjectName, Repository};

/// Segments fetched ahead at a time, each with a decoder: two keep a network busy while one is written.
const AT_ONCE: usize = 2;
/// Most segments that may lie ready, whatever the configuration says: 1 GiB of the usual size.
const MOST_READY: usize = 64;
/// How often to look whether a client has taken a file.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// A recovery that has taken nothing for so long is over, or waits for something else.
const PATIENCE: Duration = Duration::from_mins(2);

/// A segment that a client of this machine has got.
#[derive(Clone)]
pub struct Asked {
    pub segment: SegmentName,
    pub size: SegmentSize,
    /// The server's WAL directory.
    pub directory: PathBuf,
    /// Where the segment came from.
    pub repository: Repository,
    pub expected: Expected,
}

/// What is fetched ahead for one site.
pub struct ReadAhead {
    depth: usize,
    asked: watch::Sender<Option<Asked>>,
    /// Being fetched now.
    under_way: watch::Sender<BTreeSet<SegmentName>>,
}

impl ReadAhead {
    /// Keeps up to `depth` segments ready.
    pub fn new(depth: usize) -> Self {
        Self {
            depth: depth.min(MOST_READY),
            asked: watch::Sender::new(None),
            under_way: watch::Sender::new(BTreeSet::new()),
        }
    }

    /// Notes that a client got a segment and will want the next ones.
    pub fn follow(&self, asked: Asked) {
        if self.depth > 0 {
            self.asked.send_replace(Some(asked));
        }
    }

    /// Waits while `segment` is being fetched ahead.
    pub async fn settled(&self, segment: SegmentName) {
        // The sender lives as long as we do, so this ends in no other way.
        let _ = self.under_way.subscribe().wait_for(|under_way| !under_way.contains(&segment)).await;
    }

    /// Fetches ahead until cancelled.
    pub async fn run(&self, cancel: CancellationToken) {
        let mut asked = self.asked.subscribe();
        while tokio::select! { biased;
            () = cancel.cancelled() => false,
            changed = asked.changed() => changed.is_ok(),
        } {
            self.accompany(&mut asked, &cancel).await;
        }
    }

    /// Stays ahead of one recovery until it takes nothing any more.
    async fn accompany(&self, asked: &mut watch::Receiver<Option<Asked>>, cancel: &CancellationToken) {
        let Some(mut latest) = asked.borrow_and_update().clone() else { return };
        let mut window = Window::new(latest.size, self.depth);
        window.asked(latest.segment);
        let mut fetches = JoinSet::new();
        let mut active = Instant::now();
        while active.elapsed() < PATIENCE || !fetches.is_empty() {
            while fetches.len() < AT_ONCE
                && let Some(segment) = window.start_next()
            {
                self.under_way.send_modify(|under_way| _ = under_way.insert(segment));
                fetches.spawn(fetch_ahead(latest.clone(), segment));
            }
            tokio::select! { biased;
                () = cancel.cancelled() => {
                    // What lies ready is whole, and a recovery may still be at it.
                    fetches.shutdown().await;
                    self.under_way.send_modify(BTreeSet::clear);
                    return;
                }
                changed = asked.changed() => {
                    let Some(next) = changed.ok().and_then(|()| asked.borrow_and_update().clone()) else { return };
                    active = Instant::now();
                    if next.size != latest.size || next.directory != latest.directory {
                        remove_all(&latest.directory, window.ready());
                        window = Window::new(next.size, self.depth);
                    }
                    latest = next;
                    let useless = window.asked(latest.segment);
                    remove_all(&latest.directory, &useless);
                }
                Some(fetched) = fetches.join_next(), if !fetches.is_empty() => {
                    let Ok((segment, fetched)) = fetched else { return };
                    self.under_way.send_modify(|under_way| _ = under_way.remove(&segment));
                    match fetched {
                        Ok(true) => window.fetched(segment),
                        Ok(false) => window.missing(segment),
                        Err(error) => {
                            tracing::debug!(%segment, error, "segment not fetched ahead");
                            window.missing(segment);
                        }
                    }
                }
                () = sleep(LOOK_INTERVAL) => {}
            }
            let taken: Vec<SegmentName> = window
                .ready()
                .iter()
                .copied()
                .filter(|ready| !prefetched::is_there(&path_of(&latest.directory, *ready)))
                .collect();
            for segment in taken {
                active = Instant::now();
                window.taken(segment);
            }
        }
        remove_all(&latest.directory, window.ready());
    }
}

fn path_of(directory: &Path, segment: SegmentName) -> PathBuf {
    prefetched::ready_path(directory, WalFileName::Segment(segment))
}

fn remove_all<'a>(directory: &Path, segments: impl IntoIterator<Item = &'a SegmentName>) {
    for segment in segments {
        prefetched::remove(&path_of(directory, *segment), "the recovery went another way, or is over");
    }
}

/// Whether `segment` lies ready now; `false` when the archive does not have it.
async fn fetch_ahead(asked: Asked, segment: SegmentName) -> (SegmentName, Result<bool, String>) {
    let Asked { directory, repository, expected, .. } = asked;
    let fetched = async {
        // What is there in pieces only may still grow; it is fetched when it is asked for.
        match repository.head(ObjectName::segment(segment)).await {
            Ok(_) => {}
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error.to_string()),
        }
        match fetch(&repository, &expected, WalFileName::Segment(segment)).await {
            Ok(fetched) => {
                write_file(fetched, path_of(&directory, segment)).await.map_err(|error| error.to_string())?;
                Ok(true)
            }
            Err(FetchError::NotFound(_)) => Ok(false),
            Err(FetchError::Unknown(error)) => Err(error.to_string()),
        }
    };
    let result = Box::pin(fetched).await;
    (segment, result)
}
