//! Tells a statsd server, by UDP, what has changed.
//!
//! Shell. Nothing is queued: what changes between two rounds is told in the second one, so a server that is
//! away costs nothing, and gets the counters' growth when the address works again.

use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::metrics::{Metrics, StatsdFormat, StatsdLines, Tags};

/// As often as a person could tell the difference.
const ROUND: Duration = Duration::from_secs(1);

/// Where a statsd server listens and what it understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatsdTarget {
    pub host: String,
    pub port: u16,
    pub format: StatsdFormat,
    pub tags: Tags,
}

/// Tells `target` everything until cancelled.
///
/// # Errors
/// None: a server that cannot be told is no reason to stop backing up.
pub async fn tell_statsd(
    metrics: Metrics,
    target: StatsdTarget,
    cancel: CancellationToken,
) -> Result<(), std::convert::Infallible> {
    let mut socket = StatsdSocket::new(&target.host, target.port);
    let mut lines = StatsdLines::default();
    let mut rounds = interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = false;
    while !stopping {
        tokio::select! { biased;
            () = cancel.cancelled() => stopping = true,
            _ = rounds.tick() => {}
        }
        for line in lines.next(metrics.samples(), target.format, &target.tags) {
            socket.send(&line).await;
        }
    }
    Ok(())
}

/// A socket to a server that may be away and may move.
#[derive(Debug)]
pub struct StatsdSocket {
    host: String,
    port: u16,
    socket: Option<UdpSocket>,
    told: bool,
}

impl StatsdSocket {
    pub fn new(host: &str, port: u16) -> Self {
        Self { host: host.to_owned(), port, socket: None, told: false }
    }

    /// Sends one line in a datagram of its own, as every statsd server takes it.
    pub async fn send(&mut self, line: &str) {
        if self.socket.is_none() {
            self.socket = match connected(&self.host, self.port).await {
                Ok(socket) => Some(socket),
                Err(error) => {
                    if !std::mem::replace(&mut self.told, true) {
                        tracing::warn!(host = self.host, port = self.port, %error, "the statsd server cannot be told anything");
                    }
                    return;
                }
            };
            self.told = false;
        }
        if let Some(socket) = &self.socket
            && socket.send(line.as_bytes()).await.is_err()
        {
            // Nobody listens there now; it may have moved.
            self.socket = None;
        }
    }
}

async fn connected(host: &str, port: u16) -> std::io::Result<UdpSocket> {
    let mut failure = std::io::ErrorKind::NotFound.into();
    for address in tokio::net::lookup_host((host, port)).await? {
        let any: std::net::IpAddr = if address.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        let bound = async {
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(address).await?;
            Ok(socket)
        };
        match bound.await {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}
