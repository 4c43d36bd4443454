//! `pgkeep status`: what can be restored, what is missing, how archiving stands.

use serde_json::{Value, json};

use super::agent_client::Agent;
use super::list::pghoard_json;
use super::runtime::load_catalog;
use super::{Context, render};
use crate::catalog::{BackupId, Catalog, Window, list_ranges};
use crate::config::HttpConfig;

pub const EXAMPLES: &str = "\
Reads the archive itself, and asks the agent on this host if there is one.

Examples:
  pgkeep status
  pgkeep status --json";

pub fn run(context: &Context) -> anyhow::Result<()> {
    let config = context.start()?;
    let site = context.site(&config)?;
    let catalog = load_catalog(&config, site)?;
    let agent = agent_status(&config.http, &site.name);
    if context.json() {
        let latest = match catalog.known().last().map(|backup| &backup.name) {
            Some(BackupId::Pghoard(id)) => {
                catalog.pghoard.iter().find(|backup| backup.id == *id).map(pghoard_json)
            }
            _ => catalog.backups.last().map(|record| json!(record)),
        };
        let problems: Vec<_> = catalog.damaged.iter().map(|damaged| damaged.reason.clone()).collect();
        return render::json(&json!({
            "site": site.name,
            "agent": agent,
            "backups": catalog.backups.len() + catalog.pghoard.len(),
            "latest_backup": latest,
            "damaged_backups": problems,
            "unfinished_backups": catalog.unfinished.iter().map(|backup| backup.name.to_string()).collect::<Vec<_>>(),
            "system_identifier": catalog.identity().map(|identity| identity.system_identifier.to_string()),
            "timelines": catalog.windows().iter().map(window_json).collect::<Vec<_>>(),
            "gaps": gaps(&catalog),
        }));
    }
    let agent_text = agent.as_ref().map_or_else(|| "not running, or not at this host".to_owned(), agent_line);
    render::line(format_args!("agent     {agent_text}"))?;
    let known = catalog.known();
    let newest = known.last().map_or_else(
        || "none".to_owned(),
        |backup| format!("{} of {}", backup.name, render::time(backup.stop_time)),
    );
    render::line(format_args!("backups   {}, newest: {newest}", known.len()))?;
    let rows: Vec<_> = catalog.windows().iter().map(window_row).collect();
    render::table(["timeline", "restorable from", "to", "about", "gaps"], &rows)?;
    for damaged in &catalog.damaged {
        render::line(format_args!("damaged   {}: {}", damaged.name, damaged.reason))?;
    }
    Ok(())
}

/// What an agent on this host says of the site; none when there is none.
fn agent_status(http: &HttpConfig, site: &str) -> Option<Value> {
    let url = format!("http://127.0.0.1:{}", http.port);
    let credentials = http.credentials.as_ref().map(|known| (known.username.clone(), known.password.clone()));
    let status = Agent::parse(&url, credentials).ok()?.status();
    match status {
        Ok(status) => status["sites"].get(site).cloned(),
        Err(error) => {
            tracing::debug!(%error, "no agent");
            None
        }
    }
}

/// What the agent says of the site, in one line.
fn agent_line(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let archiving = &status["archiving"];
    let mut line = text(&archiving["state"]);
    if let Some(server) = status["server"]["place"].as_str() {
        line = format!("{line} from {server}");
    }
    if let Some(stored) = archiving["stored_lsn"].as_str() {
        let lag = render::size(archiving["lag_bytes"].as_u64().unwrap_or_default());
        line = format!("{line}, stored up to {stored}, {lag} behind");
    }
    if status["backup"]["running"] == json!(true) {
        line.push_str(", a base backup is running");
    }
    if let Some(error) = archiving["last_error"]["message"].as_str() {
        line = format!("{line}; last error: {error}");
    }
    line
}

fn window_row(window: &Window) -> [String; 5] {
    let earliest = match &window.earliest {
        Some(start) => format!("{} ({})", start.lsn, render::time(start.time)),
        None => "no backup reaches it".to_owned(),
    };
    let about = window.latest_time.map(render::time).unwrap_or_default();
    let gaps = if window.gaps.is_empty() { "none".to_owned() } else { list_ranges(&window.gaps) };
    [window.timeline.to_string(), earliest, window.latest.to_string(), about, gaps]
}

fn window_json(window: &Window) -> Value {
    json!({
        "timeline": window.timeline,
        "earliest": window.earliest.as_ref().map(|start| json!({
            "backup": start.backup.to_string(), "lsn": start.lsn, "time": start.time,
        })),
        "latest_lsn": window.latest,
        "latest_time": window.latest_time,
        "gaps": window.gaps.iter().map(|range| list_ranges(&[*range])).collect::<Vec<_>>(),
        "history_problem": window.history_problem,
    })
}

fn gaps(catalog: &Catalog) -> Vec<Value> {
    catalog
        .windows()
        .iter()
        .flat_map(|window| {
            let timeline = window.timeline;
            window
                .gaps
                .iter()
                .map(move |range| json!({ "timeline": timeline, "missing": list_ranges(&[*range]) }))
        })
        .collect()
}
