//! Pushes metrics to a Prometheus Pushgateway.
//!
//! Shell. The gateway keeps what it was told last, so each push carries everything; nothing is queued, and
//! a gateway that is slow or away holds nobody up.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::metrics::{Metrics, Sample, Tags, exposition};

const ROUND: Duration = Duration::from_secs(5);
/// For one push, and in all for the last one when the program stops.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A Pushgateway and the names under which it keeps us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushTarget {
    /// Without a slash at its end.
    pub endpoint: String,
    pub job: String,
    /// `None`: each site's figures under the site's name, the rest under the host's, as PGHoard does.
    pub instance: Option<String>,
    pub tags: Tags,
    pub host: String,
}

/// Pushes whenever something has changed, until cancelled.
///
/// # Errors
/// None: a gateway that is away is no reason to stop backing up.
pub async fn push_metrics(
    metrics: Metrics,
    target: PushTarget,
    cancel: CancellationToken,
) -> Result<(), std::convert::Infallible> {
    let client = match reqwest::Client::builder().timeout(TIMEOUT).build() {
        Ok(client) => client,
        Err(error) => {
            tracing::warn!(%error, "metrics cannot be pushed");
            cancel.cancelled().await;
            return Ok(());
        }
    };
    let mut rounds = interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut pushed, mut failing, mut stopping) = (0, false, false);
    while !stopping {
        tokio::select! { biased;
            () = cancel.cancelled() => stopping = true,
            _ = rounds.tick() => {}
        }
        let updates = metrics.updates();
        if updates == pushed {
            continue;
        }
        let push = async {
            for (path, body) in bodies(&metrics.samples(), &target) {
                let response = client.post(format!("{}{path}", target.endpoint)).body(body).send().await?;
                response.error_for_status()?;
            }
            Ok::<_, reqwest::Error>(())
        };
        match timeout(TIMEOUT, push).await {
            Ok(Ok(())) => {
                pushed = updates;
                failing = false;
            }
            failed => {
                let error = match failed {
                    // The address may hold a password.
                    Ok(Err(error)) => error.without_url().to_string(),
                    _ => format!("no answer within {TIMEOUT:?}"),
                };
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error, "metrics cannot be pushed; tried again quietly");
                }
            }
        }
    }
    Ok(())
}

/// What to post where.
fn bodies(samples: &[Sample], target: &PushTarget) -> Vec<(String, String)> {
    let mut groups: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        let instance = target.instance.as_deref();
        let instance = instance.or_else(|| sample.label("site")).unwrap_or(&target.host);
        groups.entry(instance).or_default().push(sample);
    }
    groups
        .into_iter()
        .map(|(instance, samples)| {
            let path = format!("/metrics/job/{}/instance/{}", encoded(&target.job), encoded(instance));
            (path, exposition(samples, &target.tags))
        })
        .collect()
}

/// Percent-encoded for one part of a path.
fn encoded(text: &str) -> String {
    let mut part = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            part.push(char::from(byte));
        } else {
            let _ = write!(part, "%{byte:02X}");
        }
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::metrics::{Kind, Metric};

    const LAG: Metric = Metric { name: "lag", kind: Kind::Gauge, help: "Lag." };
    const INFO: Metric = Metric { name: "info", kind: Kind::Gauge, help: "Info." };

    fn target(instance: Option<&str>) -> PushTarget {
        PushTarget {
            endpoint: "http://gateway:9091".to_owned(),
            job: "pg hoard".to_owned(),
            instance: instance.map(str::to_owned),
            tags: Tags::new(),
            host: "db1".to_owned(),
        }
    }

    #[test]
    fn a_site_is_an_instance_unless_one_is_named() {
        let metrics = Metrics::default();
        metrics.set(&LAG, &[("site", "a/b")], 1.0);
        metrics.set(&INFO, &[], 1.0);
        let paths = |instance| -> Vec<String> {
            bodies(&metrics.samples(), &target(instance)).into_iter().map(|(path, _)| path).collect()
        };
        assert_eq!(
            paths(None),
            ["/metrics/job/pg%20hoard/instance/a%2Fb", "/metrics/job/pg%20hoard/instance/db1"]
        );
        assert_eq!(paths(Some("one")), ["/metrics/job/pg%20hoard/instance/one"]);
        let (_, body) = &bodies(&metrics.samples(), &target(Some("one")))[0];
        assert!(body.contains("info 1\n") && body.contains("lag{site=\"a/b\"} 1\n"), "{body}");
    }
}
