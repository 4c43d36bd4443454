//! The sites that a site was moved from.

use tracing::warn;

use crate::config::{Config, SiteConfig};
use crate::repository::{Repository, Settings};
use crate::storage::{self, Access};

/// Opens what `moved_from` of `site` names. `settings` are those of `site`; each opens its own objects with
/// its own keys.
pub async fn open_former(
    config: &Config,
    site: &SiteConfig,
    settings: &Settings,
    access: Access,
) -> Result<Vec<Repository>, storage::Error> {
    let mut opened = Vec::with_capacity(site.moved_from.len());
    for name in &site.moved_from {
        let Some(former) = config.sites.iter().find(|other| other.name == *name) else {
            warn!(site = site.name, moved_from = name, "a site that is not configured cannot be read");
            continue;
        };
        let store = storage::open(&former.storage, access).await?;
        let settings = Settings { keys: former.keys.clone(), ..settings.clone() };
        opened.push(Repository::new(store, &former.prefix, settings));
    }
    Ok(opened)
}
