//! PGHoard's pages about base backups: which there are, and the wish for another.

use hyper::{Response, StatusCode};
use serde_json::json;

use super::listing::{BackupEntry, pghoard_json};
use super::route::Refusal;
use super::server::{Body, Site, empty_answer, full};
use crate::catalog::Catalog;

/// All backups of the site whose record can be read.
pub async fn list(site: &Site) -> Result<Response<Body>, Refusal> {
    let repository = site.archive()?;
    let catalog = Catalog::load_backups(&repository)
        .await
        .map_err(|error| Refusal { status: StatusCode::SERVICE_UNAVAILABLE, reason: error.to_string() })?;
    let entries = BackupEntry::all(&site.prefix, &site.name, &catalog);
    let entries: Vec<_> = entries.iter().map(BackupEntry::to_json).collect();
    let text = pghoard_json(&json!({ "basebackups": entries }));
    Ok(full(StatusCode::OK, "application/json", text))
}

/// Answers at once; the backup is taken by the agent.
pub fn request(site: &Site) -> Result<Response<Body>, Refusal> {
    match (site.request_backup)() {
        Ok(()) => {
            tracing::info!(site = site.name, "base backup requested");
            Ok(empty_answer(StatusCode::CREATED))
        }
        Err(reason) => Err(Refusal { status: StatusCode::SERVICE_UNAVAILABLE, reason }),
    }
}
