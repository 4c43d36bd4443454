//! What every command starts from: the global options and, when it asks for it, the configuration.

use anyhow::Context as _;

use super::GlobalOptions;
use crate::agent;
use crate::config::{Config, Loaded, SiteConfig, Source, Warning};
use crate::observe::{LogFormat, LogLevel, init_log, set_log_level};
use crate::repository::{Repository, Settings};
use crate::runtime::variable;
use crate::storage::{self, Access};

/// The global options, resolved on demand: `wal-fetch` must not pay for a configuration it does not need.
#[derive(Debug)]
pub struct Context {
    options: GlobalOptions,
}

impl Context {
    pub(super) fn new(options: GlobalOptions) -> Self {
        Self { options }
    }

    /// Whether output is JSON rather than text.
    pub fn json(&self) -> bool {
        self.options.json
    }

    /// Where the configuration comes from, for those who load it again later.
    pub fn source(&self) -> anyhow::Result<Source> {
        Ok(Source::find(self.options.config.as_deref(), &variable)?)
    }

    /// Loads the configuration, with its warnings still to be told.
    pub fn load(&self) -> anyhow::Result<Loaded> {
        Ok(Config::load(&self.source()?, &variable)?)
    }

    /// Loads the configuration, starts the log as it says and logs the warnings.
    pub fn start(&self) -> anyhow::Result<Config> {
        let Loaded { config, warnings } = self.load()?;
        self.start_log(config.log_level)?;
        tell(&warnings);
        Ok(config)
    }

    /// Changes the level of the log as a configuration read again says, unless it is given otherwise.
    pub fn log_level_changed(&self, configured: Option<LogLevel>) {
        if self.options.log_level.is_none() && variable("PGKEEP_LOG").is_none() {
            set_log_level(configured.unwrap_or_default());
        }
    }

    /// Starts the log: the flag goes before `PGKEEP_LOG`, and that before the configuration.
    pub fn start_log(&self, configured: Option<LogLevel>) -> anyhow::Result<()> {
        let flag = self.options.log_level.map(|level| level.to_string());
        let filter = flag
            .or_else(|| variable("PGKEEP_LOG"))
            .unwrap_or_else(|| configured.unwrap_or_default().to_string());
        init_log(&filter, LogFormat::from(self.options.log_format)).context("cannot start the log")
    }

    /// What `--site` or `PGKEEP_SITE` says.
    pub fn site_name(&self) -> Option<String> {
        self.options.site.clone().or_else(|| variable("PGKEEP_SITE"))
    }

    /// The site that `--site` or `PGKEEP_SITE` names, or the only one.
    pub fn site<'a>(&self, config: &'a Config) -> anyhow::Result<&'a SiteConfig> {
        Ok(config.site(self.site_name().as_deref())?)
    }

    /// Opens the storage of a site.
    pub async fn repository(
        &self,
        config: &Config,
        site: &SiteConfig,
        access: Access,
    ) -> anyhow::Result<Repository> {
        let settings = Settings {
            compression: config.compression,
            level: config.compression_level,
            hash_algorithm: config.hash_algorithm,
            keys: site.keys.clone(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            ..Settings::default()
        };
        let store = storage::open(&site.storage, access).await?;
        let former = agent::open_former(config, site, &settings, access).await?;
        Ok(Repository::continuing(store, &site.prefix, settings, former))
    }
}

/// Logs what a configuration's author should know.
pub fn tell(warnings: &[Warning]) {
    for warning in warnings {
        if matches!(warning, Warning::WithoutEffect { .. }) {
            tracing::info!("configuration: {warning}");
        } else {
            tracing::warn!("configuration: {warning}");
        }
    }
}
