//! `pghoard_restore`: lists base backups and restores one, with PGHoard's options.
//!
//! The restore is that of `pgkeep restore`; what differs is how it is asked for and the `restore_command` that
//! it leaves behind, which is PGHoard's.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::pghoard::{context, fatal, parse, python_text};
use super::pghoard_client::Hoard;
use super::pghoard_table::{Row, table};
use super::restore::{Decided, Order, Tablespace};
use super::runtime::{block_on, interruptible};
use super::{Context, allocator, render};
use crate::agent::Site;
use crate::catalog::{BackupChoice, BackupId, Catalog};
use crate::config::{Config, SiteConfig};
use crate::observe::Progress;
use crate::restore::{
    self, Found, Recovery, RecoveryTarget, RestorePlan, TablespaceTarget, TargetAction, TargetTimeline,
};
use crate::secret::Secret;
use crate::serve::BackupEntry;
use crate::storage::Access;

/// As often as PGHoard writes it.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// List and restore base backups.
#[derive(Debug, Parser)]
#[command(name = "pghoard_restore", version, infer_long_args = true, disable_help_subcommand = true)]
struct Options {
    /// Enable debug logging
    #[arg(short = 'D', long, global = true)]
    debug: bool,
    /// Filename for status output JSON
    #[arg(long, value_name = "FILE", global = true)]
    status_output_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List base backups from an object store
    ListBasebackups(ListOptions),
    /// List available base backups from a HTTP source
    ListBasebackupsHttp(HttpOptions),
    /// Download a base backup from an object store
    GetBasebackup(Box<GetOptions>),
}

#[derive(Debug, Args)]
struct ListOptions {
    /// Verbose output
    #[arg(short, long)]
    verbose: bool,
    #[arg(help = "Configuration file [env: PGHOARD_CONFIG]")]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Site
    #[arg(long)]
    site: Option<String>,
}

#[derive(Debug, Args)]
struct HttpOptions {
    /// Repository host
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Repository port
    #[arg(long, default_value_t = 16000)]
    port: u16,
    /// Repository user name
    #[arg(long)]
    username: Option<String>,
    /// Repository password
    #[arg(long)]
    password: Option<String>,
    /// Verbose output
    #[arg(short, long)]
    verbose: bool,
    /// Accepted for its own sake
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Site
    #[arg(long)]
    site: String,
}

#[expect(clippy::struct_excessive_bools, reason = "each is an option of PGHoard's")]
#[derive(Debug, Args)]
struct GetOptions {
    #[command(flatten)]
    list: ListOptions,
    /// Restore target data directory
    #[arg(long, value_name = "DIR")]
    target_dir: PathBuf,
    /// Base backup, as the list names it
    #[arg(long, value_name = "NAME", default_value = "latest")]
    basebackup: String,
    /// Overwrite existing target directory
    #[arg(long)]
    overwrite: bool,
    /// Map the given tablespace (name, OID or former directory) to an existing empty directory
    #[arg(long, value_name = "NAME=DIRECTORY")]
    tablespace_dir: Vec<String>,
    /// Existing directory below which tablespaces go whose own directory does not exist
    #[arg(long, value_name = "DIR")]
    tablespace_base_dir: Option<PathBuf>,
    #[arg(help = "PostgreSQL primary_conninfo")]
    #[arg(long, value_name = "CONNINFO", default_value = "")]
    primary_conninfo: String,
    #[arg(help = "PostgreSQL recovery_end_command")]
    #[arg(long, value_name = "COMMAND")]
    recovery_end_command: Option<String>,
    #[arg(help = "PostgreSQL recovery_target_action")]
    #[arg(long)]
    recovery_target_action: Option<Action>,
    #[arg(help = "PostgreSQL recovery_target_name")]
    #[arg(long, value_name = "RESTOREPOINT")]
    recovery_target_name: Option<String>,
    #[arg(help = "PostgreSQL recovery_target_time")]
    #[arg(long, value_name = "ISO_TIMESTAMP")]
    recovery_target_time: Option<String>,
    #[arg(help = "PostgreSQL recovery_target_xid")]
    #[arg(long, value_name = "XID")]
    recovery_target_xid: Option<String>,
    /// Restore the database to a PostgreSQL primary
    #[arg(long, visible_alias = "restore-to-master")]
    restore_to_primary: bool,
    /// Request the backup to be preserved until that date
    #[arg(long, value_name = "ISO_TIMESTAMP")]
    preserve_until: Option<String>,
    /// Cancel the preservation request if the backup was successfully restored (default)
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "no_cancel_preserve_on_success")]
    cancel_preserve_on_success: bool,
    /// Don't cancel the preservation request if the backup was successfully restored
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "cancel_preserve_on_success")]
    no_cancel_preserve_on_success: bool,
    #[arg(help = "The program that the restored server's restore_command names")]
    #[arg(long, value_name = "PROGRAM", default_value = "pghoard_postgres_command")]
    pghoard_postgres_command_bin: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Action {
    Pause,
    Promote,
    Shutdown,
}

pub fn run(arguments: &[OsString]) -> ExitCode {
    let options: Options = match parse(arguments) {
        Ok(options) => options,
        Err(status) => return status,
    };
    let debug = options.debug;
    let result = match options.command {
        None => {
            render::line(Options::command().render_help()).ok();
            return ExitCode::FAILURE;
        }
        Some(Command::ListBasebackupsHttp(http)) => list_http(http),
        Some(Command::ListBasebackups(list)) => {
            let verbose = list.verbose;
            list_stored(&context(list.config, list.site, debug), verbose)
        }
        Some(Command::GetBasebackup(get)) => {
            get_basebackup(&get, options.status_output_file.as_deref(), debug)
        }
    };
    fatal(result, "RestoreError")
}

fn list_stored(context: &Context, verbose: bool) -> anyhow::Result<()> {
    let config = context.start()?;
    let site = context.site(&config)?;
    let catalog = block_on(config.parallelism, async {
        let opened = Site::open(&config, site, Access::Read).await?;
        anyhow::Ok(Catalog::load_backups(&opened.repository).await?)
    })??;
    for damaged in &catalog.damaged {
        tracing::warn!(backup = %damaged.name, reason = damaged.reason, "this backup's record cannot be used");
    }
    let rows = rows(site, &catalog);
    let caption = format!("Available {} basebackups:", python_text(&site.name));
    render::line(table(&caption, rows, verbose))
}

fn list_http(options: HttpOptions) -> anyhow::Result<()> {
    let credentials = options.username.zip(options.password.map(Secret::new));
    let hoard = Hoard::at(&options.host, options.port, credentials)?;
    let answer = hoard.ask("GET", &[&options.site, "basebackup"], "")?;
    if answer.head.status != 200 {
        let reason = String::from_utf8_lossy(&answer.body);
        bail!("HTTP status {}: {}", answer.head.status, reason.trim());
    }
    let listing: Value = serde_json::from_slice(&answer.body).context("the server's list is not JSON")?;
    let items =
        listing["basebackups"].as_array().ok_or_else(|| anyhow!("the server's answer has no list"))?;
    let rows = items
        .iter()
        .map(|item| Row::of_json(item).ok_or_else(|| anyhow!("a backup in the list has no name")));
    let rows = rows.collect::<anyhow::Result<Vec<Row>>>()?;
    let caption = format!("Available {} basebackups:", python_text(&options.site));
    render::line(table(&caption, rows, options.verbose))
}

fn rows(site: &SiteConfig, catalog: &Catalog) -> Vec<Row> {
    let entries = BackupEntry::all(&site.prefix, &site.name, catalog).into_iter();
    entries.map(|entry| Row { name: entry.name, size: entry.size, metadata: entry.metadata }).collect()
}

/// The full key of a backup, as the list has it.
fn full_name(site: &SiteConfig, catalog: &Catalog, name: &BackupId) -> String {
    let own = catalog.backups.iter().find(|record| name.own() == Some(record.name));
    own.map_or_else(|| name.to_string(), |record| BackupEntry::of(&site.prefix, &site.name, record).name)
}

impl GetOptions {
    fn target(&self) -> anyhow::Result<RecoveryTarget> {
        let targets = (&self.recovery_target_name, &self.recovery_target_time, &self.recovery_target_xid);
        match targets {
            (None, None, None) => Ok(RecoveryTarget::Latest),
            (Some(name), None, None) => Ok(RecoveryTarget::parse_name(name)?),
            (None, Some(time), None) => Ok(RecoveryTarget::Time(parse_time(time, "recovery_target_time")?)),
            (None, None, Some(xid)) => Ok(RecoveryTarget::parse_xid(xid)?),
            _ => bail!(
                "Specify at most one of recovery_target_name, recovery_target_time or recovery_target_xid"
            ),
        }
    }

    /// A backup by its full key, as the list has it, or by the last part of that.
    fn choice(&self) -> anyhow::Result<BackupChoice> {
        let last = self.basebackup.rsplit('/').next().unwrap_or_default();
        if let Ok(own) = last.parse() {
            return Ok(BackupChoice::Named(own));
        }
        self.basebackup.parse().map_err(|_| {
            anyhow!("No applicable basebackup found, exiting: there is no {}", python_text(&self.basebackup))
        })
    }

    fn action(&self) -> Option<TargetAction> {
        self.recovery_target_action.map(|action| match action {
            Action::Pause => TargetAction::Pause,
            Action::Promote => TargetAction::Promote,
            Action::Shutdown => TargetAction::Shutdown,
        })
    }
}

/// A time as PGHoard takes it: without a zone it is UTC.
fn parse_time(text: &str, option: &str) -> anyhow::Result<Timestamp> {
    let utc = format!("{}Z", text.trim());
    match RecoveryTarget::parse_time(text)
        .or_else(|error| RecoveryTarget::parse_time(&utc).map_err(|_| error))
    {
        Ok(RecoveryTarget::Time(time)) => Ok(time),
        Ok(_) => bail!("{option} {} is no time", python_text(text)),
        Err(error) => bail!("{option} {}: {error}", python_text(text)),
    }
}

fn get_basebackup(options: &GetOptions, status_file: Option<&Path>, debug: bool) -> anyhow::Result<()> {
    allocator::settle();
    let target = options.target()?;
    let choice = options.choice()?;
    let preserve_until = options.preserve_until.as_deref().map(|time| parse_time(time, "preserve_until"));
    let preserve_until = preserve_until.transpose()?;
    let context = context(options.list.config.clone(), options.list.site.clone(), debug);
    let config = context.start()?;
    let site = context.site(&config)?;
    let directory =
        std::path::absolute(&options.target_dir).context("the target directory has no absolute path")?;
    let in_use = matches!(restore::look_at(&directory)?, Found::DataDirectory | Found::Other);
    if in_use && !options.overwrite {
        bail!(
            "$PGDATA target directory {} exists, is not empty and --overwrite not specified, aborting.",
            python_text(&options.target_dir.display().to_string())
        );
    }
    let asked = Asked { options, config: &config, site, directory, in_use, status_file };
    block_on(config.parallelism, Box::pin(asked.restore(&choice, &target, preserve_until)))?
}

/// One restore, as it was asked for.
struct Asked<'a> {
    options: &'a GetOptions,
    config: &'a Config,
    site: &'a SiteConfig,
    directory: PathBuf,
    /// The target holds something that has to go first.
    in_use: bool,
    status_file: Option<&'a Path>,
}

impl Asked<'_> {
    async fn restore(
        &self,
        choice: &BackupChoice,
        target: &RecoveryTarget,
        preserve_until: Option<Timestamp>,
    ) -> anyhow::Result<()> {
        let access = if preserve_until.is_some() { Access::Write } else { Access::Read };
        let opened = Site::open(self.config, self.site, access).await?;
        let catalog = Catalog::load(&opened.repository).await?;
        let decided = Decided::on(&opened, &catalog, choice, target, TargetTimeline::Latest).await?;
        let plan = &decided.plan;
        self.show_choice(&catalog, choice, plan)?;
        for warning in &plan.warnings {
            tracing::warn!("{warning}");
        }
        let tablespaces = self.tablespaces(&decided)?;
        let preservation = match preserve_until {
            Some(until) => {
                super::pghoard_preserve::request(&opened.repository, &plan.backup.name, until).await
            }
            None => None,
        };
        if self.in_use {
            remove_contents(&self.directory)?;
        }
        self.carry_out(&opened, &decided, tablespaces).await?;
        if let Some(preservation) = preservation
            && !self.options.no_cancel_preserve_on_success
        {
            super::pghoard_preserve::cancel(&opened.repository, preservation).await;
        }
        let shown = self.options.target_dir.display();
        render::line("Basebackup restoration complete.")?;
        render::line(format_args!("You can start PostgreSQL by running pg_ctl -D {shown} start"))?;
        render::line("On systemd based systems you can run systemctl start postgresql")?;
        render::line("On SYSV Init based systems you can run /etc/init.d/postgresql start")
    }

    fn show_choice(
        &self,
        catalog: &Catalog,
        choice: &BackupChoice,
        plan: &RestorePlan,
    ) -> anyhow::Result<()> {
        if *choice == BackupChoice::Latest {
            let too_late: Vec<String> = catalog
                .known()
                .iter()
                .filter(|backup| match &plan.target {
                    RecoveryTarget::Time(time) => backup.stop_time > *time,
                    _ => false,
                })
                .map(|backup| full_name(self.site, catalog, &backup.name))
                .collect();
            let mut rows = rows(self.site, catalog);
            rows.retain(|row| !too_late.contains(&row.name));
            let plural = if rows.len() == 1 { "" } else { "s" };
            let caption = format!("Found {} applicable basebackup{plural}", rows.len());
            render::line(table(&caption, rows, true))?;
        }
        let name = full_name(self.site, catalog, &plan.backup.name);
        render::line(format_args!("\nSelecting {} for restore", python_text(&name)))
    }

    /// Restores, and tells in the status file how far it is.
    async fn carry_out(
        &self,
        opened: &Site,
        decided: &Decided<'_>,
        tablespaces: Vec<TablespaceTarget>,
    ) -> anyhow::Result<()> {
        let plan = &decided.plan;
        let recovery = self.recovery(decided);
        let cancel = CancellationToken::new();
        let progress = Progress::start(format!("restore of {}", plan.backup.name));
        let order = Order { directory: &self.directory, tablespaces, recovery: &recovery, durable: true };
        let restored = interruptible(&cancel, decided.carry_out(opened, order, &progress, &cancel));
        let total = plan.backup.plaintext_bytes.unwrap_or_default();
        let result = match self.status_file {
            None => restored.await,
            Some(path) => {
                let told = async {
                    loop {
                        write_status(path, progress.done(), total);
                        tokio::time::sleep(STATUS_INTERVAL).await;
                    }
                };
                tokio::select! { biased;
                    result = restored => result,
                    () = told => Ok(()),
                }
            }
        };
        progress.finish();
        result?;
        if let Some(path) = self.status_file {
            write_status(path, total, total);
        }
        Ok(())
    }

    fn recovery(&self, decided: &Decided<'_>) -> Recovery {
        let (options, plan) = (self.options, &decided.plan);
        let standby = !options.restore_to_primary;
        let mut settings = restore::target_settings(&plan.target, plan.target_timeline, options.action());
        // 12 gave it another name, and 16 no longer has it.
        let trigger = match decided.server_version_num().map(|version| version / 10_000) {
            Some(..12) => Some("trigger_file"),
            Some(12..16) => Some("promote_trigger_file"),
            _ => None,
        };
        settings.extend(trigger.map(|name| restore::setting_line(name, "trigger_file")));
        if !options.primary_conninfo.is_empty() {
            settings.push(restore::setting_line("primary_conninfo", &options.primary_conninfo));
        }
        if let Some(command) = &options.recovery_end_command {
            settings.push(restore::setting_line("recovery_end_command", command));
        }
        Recovery { standby, restore_command: self.restore_command(), settings }
    }

    /// PGHoard's own line.
    fn restore_command(&self) -> String {
        let port = self.config.http.port.to_string();
        let program = self.options.pghoard_postgres_command_bin.display().to_string();
        let mut words = vec![program.as_str(), "--mode", "restore", "--port", &port];
        words.extend(["--site", self.site.name.as_str()]);
        let mut words: Vec<String> = words.into_iter().map(literal_word).collect();
        words.extend(["--output", "%p", "--xlog", "%f"].map(str::to_owned));
        if let Some(credentials) = &self.config.http.credentials {
            words.extend(["--username".to_owned(), literal_word(&credentials.username)]);
            words.extend(["--password".to_owned(), literal_word(credentials.password.reveal())]);
        }
        words.join(" ")
    }

    /// PGHoard's rules: what is mapped goes there; the rest goes where it was, if that is there; else below the
    /// base directory. All of it must be there, and empty.
    fn tablespaces(&self, decided: &Decided<'_>) -> anyhow::Result<Vec<TablespaceTarget>> {
        let known = decided.tablespaces();
        let mut mappings = self
            .options
            .tablespace_dir
            .iter()
            .map(|mapping| {
                let (name, directory) = mapping
                    .split_once('=')
                    .ok_or_else(|| anyhow!("Invalid tablespace mapping {}", python_text(mapping)))?;
                Ok((name.trim_end_matches('/'), PathBuf::from(directory)))
            })
            .collect::<anyhow::Result<Vec<(&str, PathBuf)>>>()?;
        let base = self.options.tablespace_base_dir.as_deref();
        if let Some(base) = base.filter(|base| !base.exists()) {
            let base = python_text(&base.display().to_string());
            bail!("Tablespace base directory {base} does not exist, aborting.");
        }
        let mut targets: Vec<TablespaceTarget> = Vec::new();
        // An in-place tablespace has a relative location and lies inside the data directory.
        for tablespace in known.iter().filter(|tablespace| tablespace.location.starts_with('/')) {
            let oid = tablespace.oid.to_string();
            let location = tablespace.location.trim_end_matches('/');
            let last = location.rsplit('/').next().unwrap_or_default();
            // The name is not known of every backup; its directory often has it.
            let name = tablespace.name.as_deref().unwrap_or(last);
            let answers_to = [name, oid.as_str(), location];
            let mapped = mappings.iter().position(|(name, _)| answers_to.contains(name));
            let mut directory =
                mapped.map_or_else(|| PathBuf::from(location), |at| mappings.swap_remove(at).1);
            if let Some(base) = base.filter(|_| !directory.exists()) {
                directory = base.join(&oid);
                fs::create_dir_all(&directory)
                    .with_context(|| format!("cannot make `{}`", directory.display()))?;
            }
            let shown = python_text(&directory.display().to_string());
            let name = python_text(name);
            if !directory.is_dir() {
                bail!("Tablespace {name} target directory {shown} does not exist, aborting.");
            }
            let directory = directory.canonicalize()?;
            if !restore::may_fill(&self.directory, &directory)? {
                bail!("Tablespace {name} target directory {shown} exists but is not empty, aborting.");
            }
            if directory.starts_with(&self.directory)
                || targets.iter().any(|other| directory.starts_with(&other.directory))
            {
                bail!("Tablespace {name} target directory {shown} lies inside another target, aborting.");
            }
            render::line(format_args!("Using existing empty directory {shown} for tablespace {name}"))?;
            targets.push(TablespaceTarget { oid: tablespace.oid, directory });
        }
        if mappings.is_empty() {
            return Ok(targets);
        }
        let mut names: Vec<String> = mappings.iter().map(|(name, _)| python_text(name)).collect();
        names.sort();
        let places: Vec<String> = known.iter().map(Tablespace::describe).collect();
        bail!(
            "Tablespace mapping for [{}] was requested, but the tablespaces are not present in the backup, which has: {}",
            names.join(", "),
            if places.is_empty() { "none".to_owned() } else { places.join(", ") }
        )
    }
}

/// One word of the command, whatever it contains; PostgreSQL makes one percent sign of two.
fn literal_word(word: &str) -> String {
    restore::shell_word(word).replace('%', "%%")
}

/// Empties the target. The directory itself stays: it may be a mount point.
fn remove_contents(directory: &Path) -> anyhow::Result<()> {
    let failed = |path: &Path| format!("cannot remove `{}`", path.display());
    for entry in fs::read_dir(directory).with_context(|| failed(directory))? {
        let entry = entry.with_context(|| failed(directory))?;
        let path = entry.path();
        if entry.file_name() == "lost+found" {
            continue;
        }
        let kind = entry.file_type().with_context(|| failed(&path))?;
        let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| failed(&path))?;
    }
    Ok(())
}

/// A status that cannot be written is no reason to give a restore up.
fn write_status(path: &Path, done: u64, total: u64) {
    #[expect(clippy::cast_precision_loss, reason = "a fraction for people")]
    let fraction = if total == 0 { 1.0 } else { done.min(total) as f64 / total as f64 };
    let status = json!({ "progress_percent": fraction, "downloaded_bytes": done, "total_bytes": total });
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let written = fs::write(&temporary, status.to_string()).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        tracing::debug!(%error, path = %path.display(), "status not written");
    }
}
