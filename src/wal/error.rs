//! What can end archiving, by what is to be done about it.

use std::time::Duration;

use super::assembler::StreamGap;
use super::start::Refusal;
use crate::{postgres, repository};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Server(#[from] postgres::Error),
    #[error(transparent)]
    Repository(#[from] repository::Error),
    #[error("the server sent WAL out of order")]
    Gap(#[from] StreamGap),
    #[error("the server sent WAL that is not what it should be")]
    Page(#[from] postgres::WalPageError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("this site holds the archive of system {archive}, but the server is system {server}")]
    OtherSystem { archive: u64, server: u64 },
    #[error("this site's WAL segments are {archive} bytes, the server's {server}")]
    OtherSegmentSize { archive: u64, server: u64 },
    #[error("storage took no data for {0:?}; the connection was let go so that the server is not held up")]
    StorageStalled(Duration),
    #[error("the timeline history file of timeline {0} is missing on the server")]
    NoHistory(crate::postgres::TimelineId),
    #[error("the timeline history file of timeline {timeline} cannot be read")]
    History {
        timeline: crate::postgres::TimelineId,
        #[source]
        source: postgres::ParseHistoryError,
    },
    /// A state that the code rules out; named so that it is reported instead of causing harm.
    #[error("internal error: {0}")]
    Bug(&'static str),
}

impl Error {
    /// Whether it may pass without anybody's help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Server(error) => error.is_transient(),
            Self::Repository(error) => error.is_transient(),
            // A server that is behind may be a standby that catches up.
            Self::StorageStalled(_) | Self::Refused(Refusal::Behind { .. }) | Self::Gap(_) | Self::Bug(_) => {
                true
            }
            _ => false,
        }
    }

    /// What the operator can do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Server(error) => error.hint(),
            Self::Repository(error) => error.hint(),
            Self::OtherSystem { .. } => Some(
                "use another site name or prefix for the new cluster, or point the site at the server it belongs to"
                    .to_owned(),
            ),
            Self::Refused(_) => Some(
                "point this site at the present primary; if this server was restored on purpose, promote it to a \
                 new timeline or give it a site of its own"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}
