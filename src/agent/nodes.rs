//! Finding the server to work with among a site's nodes.

use tracing::debug;

use crate::config::{NodeConfig, SiteConfig};
use crate::postgres::{self, Connection, Mode, Network, SegmentName, SegmentSize, SlotName};

/// A connection to one of the nodes.
pub struct Connected<'a> {
    pub connection: Connection,
    pub standby: bool,
    pub node: &'a NodeConfig,
}

#[derive(Debug, thiserror::Error)]
pub enum NodesError {
    #[error("the site has no `nodes` to connect to")]
    None,
    #[error(transparent)]
    Server(#[from] postgres::Error),
    #[error(transparent)]
    Slot(#[from] postgres::SlotNameError),
}

impl NodesError {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::None => Some("name the server in `nodes`, or in PGHOST and its companions".to_owned()),
            Self::Server(error) => error.hint(),
            Self::Slot(_) => None,
        }
    }

    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Server(error) if error.is_transient())
    }
}

/// Connects to the primary among the site's nodes. When all nodes that answer are standbys, the first
/// of them is taken: archiving from a standby is better than not archiving.
pub async fn connect(site: &SiteConfig) -> Result<Connected<'_>, NodesError> {
    let mut standby = None;
    let mut failure = None;
    for node in &site.nodes {
        match connect_node(node).await {
            Ok(connected) if !connected.standby => return Ok(connected),
            Ok(connected) => {
                debug!(node = connected.connection.place(), "is a standby");
                standby.get_or_insert(connected);
            }
            Err(error) => {
                debug!(%error, "node cannot be used");
                failure.get_or_insert(error);
            }
        }
    }
    match (standby, failure) {
        (Some(connected), _) => Ok(connected),
        (None, Some(error)) => Err(error),
        (None, None) => Err(NodesError::None),
    }
}

async fn connect_node(node: &NodeConfig) -> Result<Connected<'_>, NodesError> {
    let mut connection = Connection::open(&Network, &node.connection, Mode::Physical).await?;
    let standby = connection.is_standby().await?;
    Ok(Connected { connection, standby, node })
}

/// The segment that the site's server writes now, and the size of its segments.
pub async fn current_segment(site: &SiteConfig) -> Result<(SegmentName, SegmentSize), NodesError> {
    let mut connected = connect(site).await?;
    let size = connected.connection.identity().await?.segment_size;
    let position = connected.connection.identify_system().await?;
    Ok((size.segment_at(position.timeline, position.flush_lsn), size))
}

/// The slot to stream from on this node.
pub fn slot_name(site: &SiteConfig, node: &NodeConfig) -> Result<SlotName, NodesError> {
    Ok(node.slot.as_deref().unwrap_or(&site.slot).parse()?)
}
