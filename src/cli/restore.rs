//! `pgkeep restore`: a data directory that PostgreSQL can start on.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use futures_util::stream;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::exit::{Exit, Failure};
use super::runtime::{block_on, interruptible};
use super::{Context, allocator, render};
use crate::agent::Site;
use crate::catalog::{Backup, BackupChoice, BackupId, BackupRecord, Catalog};
use crate::config::{Config, SiteConfig};
use crate::observe::Progress;
use crate::pghoard;
use crate::postgres::Lsn;
use crate::restore::{
    self, Found, Recovery, RecoveryTarget, RestorePlan, TablespaceTarget, TargetAction, TargetTimeline, Work,
};
use crate::runtime::{Clock, SystemClock};
use crate::storage::Access;

#[expect(clippy::struct_excessive_bools, reason = "each is an option of its own")]
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RestoreArgs {
    /// Directory to restore into; it must be empty or not exist
    #[arg(long, value_name = "DIR")]
    target_dir: PathBuf,
    /// Backup to restore, as `pgkeep list` shows it; without it the newest that can reach the target
    #[arg(long, value_name = "NAME", default_value = "latest")]
    backup: BackupChoice,
    #[command(flatten)]
    target: TargetArgs,
    /// Timeline to follow: `latest`, `current` or a number
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    target_timeline: TargetTimeline,
    /// What PostgreSQL does when it has reached the target
    #[arg(long, value_name = "ACTION", default_value = "promote")]
    target_action: Action,
    /// Stay a standby: follow the archive, and the primary if one is named
    #[arg(long)]
    standby: bool,
    /// Connection string of the primary that the standby follows
    #[arg(long, value_name = "CONNINFO", requires = "standby")]
    primary_conninfo: Option<String>,
    /// Put a tablespace elsewhere; OLD is its former directory, its OID, or with PGHoard's backups its name
    #[arg(long, value_name = "OLD=NEW")]
    tablespace: Vec<String>,
    /// Do not wait until everything is on disk: faster, for a copy that a power cut may cost
    #[arg(long)]
    no_sync: bool,
    /// Show the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Succeed without doing anything when the target is a data directory already
    #[arg(long)]
    if_empty: bool,
    /// Succeed without doing anything when the archive holds no backup
    #[arg(long)]
    if_backup_exists: bool,
}

#[expect(clippy::struct_field_names, reason = "the fields are the names of the options")]
#[derive(Debug, Args)]
#[group(multiple = false)]
struct TargetArgs {
    /// Recover up to this time, with its zone: '2026-11-21 10:00:00+00'
    #[arg(long, value_name = "TIME")]
    target_time: Option<String>,
    /// Recover up to this LSN
    #[arg(long, value_name = "LSN")]
    target_lsn: Option<Lsn>,
    /// Recover up to and including this transaction
    #[arg(long, value_name = "XID")]
    target_xid: Option<String>,
    /// Recover up to this restore point
    #[arg(long, value_name = "NAME")]
    target_name: Option<String>,
    /// Recover only as far as the backup itself needs
    #[arg(long)]
    target_immediate: bool,
}

impl TargetArgs {
    fn target(&self) -> anyhow::Result<RecoveryTarget> {
        let parsed = match self {
            Self { target_time: Some(time), .. } => RecoveryTarget::parse_time(time),
            Self { target_lsn: Some(lsn), .. } => Ok(RecoveryTarget::Lsn(*lsn)),
            Self { target_xid: Some(xid), .. } => RecoveryTarget::parse_xid(xid),
            Self { target_name: Some(name), .. } => RecoveryTarget::parse_name(name),
            Self { target_immediate: true, .. } => Ok(RecoveryTarget::Immediate),
            _ => Ok(RecoveryTarget::Latest),
        };
        parsed.map_err(|error| {
            let failure = Failure::new(Exit::Configuration, error.to_string());
            match error.hint() {
                Some(hint) => failure.with_hint(hint),
                None => failure,
            }
            .into()
        })
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Action {
    Promote,
    Pause,
    Shutdown,
}

impl From<Action> for TargetAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Promote => Self::Promote,
            Action::Pause => Self::Pause,
            Action::Shutdown => Self::Shutdown,
        }
    }
}

const EXAMPLES: &str = "\
Start PostgreSQL on the directory afterwards: it fetches the WAL it needs by
itself. Run this as the user that PostgreSQL runs as.

Examples:
  pgkeep restore --target-dir /var/lib/postgresql/17/main
  pgkeep restore --target-dir /tmp/before --target-time '2026-11-21 10:00:00+00' --dry-run
  pgkeep restore --target-dir \"$PGDATA\" --if-empty --if-backup-exists     (init container)
  pgkeep restore --target-dir /data --standby --primary-conninfo 'host=db1 user=replicator'";

pub fn run(args: &RestoreArgs, context: &Context) -> anyhow::Result<()> {
    allocator::settle();
    let target = args.target.target()?;
    let config = context.start()?;
    let site = context.site(&config)?;
    let directory =
        std::path::absolute(&args.target_dir).context("the target directory has no absolute path")?;
    let found = restore::look_at(&directory)?;
    match found {
        Found::Empty | Found::Unfinished => {}
        Found::DataDirectory if args.if_empty => {
            return said(context, "nothing to do", "the target is a data directory already");
        }
        _ if args.dry_run => {}
        Found::DataDirectory | Found::Other => return Err(restore::Error::NotEmpty(directory).into()),
    }
    block_on(config.parallelism, Box::pin(restore(args, context, &config, site, directory, &target)))?
}

fn said(context: &Context, outcome: &str, reason: &str) -> anyhow::Result<()> {
    if context.json() {
        return render::json(&json!({ "outcome": outcome, "reason": reason }));
    }
    render::line(format_args!("{outcome}: {reason}"))
}

async fn restore(
    args: &RestoreArgs,
    context: &Context,
    config: &Config,
    site_config: &SiteConfig,
    directory: PathBuf,
    target: &RecoveryTarget,
) -> anyhow::Result<()> {
    let cancel = CancellationToken::new();
    let site = Site::open(config, site_config, Access::Read).await?;
    let catalog = Catalog::load(&site.repository).await?;
    if args.if_backup_exists && catalog.has_no_backup() {
        return said(context, "nothing to do", "the archive holds no backup");
    }
    let decided = Decided::on(&site, &catalog, &args.backup, target, args.target_timeline).await?;
    let plan = &decided.plan;
    let tablespaces =
        tablespace_targets(&plan.backup.name, &decided.tablespaces(), &args.tablespace, &directory)?;
    let recovery = recovery(args, config, site_config, plan)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    if args.dry_run {
        return show(context, plan, &directory, &tablespaces, &recovery);
    }
    let progress = Progress::start(format!("restore of {}", plan.backup.name));
    let order = Order { directory: &directory, tablespaces, recovery: &recovery, durable: !args.no_sync };
    let restored =
        Box::pin(interruptible(&cancel, decided.carry_out(&site, order, &progress, &cancel))).await;
    progress.finish();
    restored?;
    let reach = reach_text(plan);
    if context.json() {
        return render::json(&as_json(plan, &directory, "restored"));
    }
    render::line(format_args!(
        "restored backup {} into {}; PostgreSQL will recover {reach} when it is started there",
        plan.backup.name,
        directory.display()
    ))
}

/// A restore that is decided: which backup, which way, and where its files come from.
pub struct Decided<'a> {
    pub plan: RestorePlan,
    origin: Origin<'a>,
}

/// Where a restore goes, and how the server recovers there.
pub struct Order<'a> {
    pub directory: &'a Path,
    pub tablespaces: Vec<TablespaceTarget>,
    pub recovery: &'a Recovery,
    /// Flush everything to disk before the restore counts as done.
    pub durable: bool,
}

impl<'a> Decided<'a> {
    /// Decides, and looks at everything that can be known before the first byte is written.
    pub async fn on(
        site: &Site,
        catalog: &'a Catalog,
        wanted: &BackupChoice,
        target: &RecoveryTarget,
        timeline: TargetTimeline,
    ) -> anyhow::Result<Decided<'a>> {
        let now = SystemClock.now();
        let mut plan = restore::plan(catalog, wanted, target, timeline, now)?;
        let origin = Origin::open(site, catalog, &plan.backup.name).await?;
        if let Origin::Pghoard(source) = &origin
            && source.label().start_segment != source.backup().start_segment
        {
            // The metadata's segment was a guess; the one in the backup label counts.
            let mut corrected = catalog.clone();
            let found = corrected.pghoard.iter_mut().find(|backup| backup.id == source.backup().id);
            if let Some(backup) = found {
                backup.start_segment = source.label().start_segment;
            }
            let chosen = BackupChoice::Pghoard(plan.backup.name.to_string());
            plan = restore::plan(&corrected, &chosen, target, timeline, now)?;
        }
        Ok(Self { plan, origin })
    }

    pub fn tablespaces(&self) -> Vec<Tablespace> {
        self.origin.tablespaces()
    }

    /// The server's version, when it is known beforehand: 180004 is 18.4.
    pub fn server_version_num(&self) -> Option<u32> {
        match &self.origin {
            Origin::Own(record) => Some(record.server_version_num),
            Origin::Pghoard(source) => source.backup().server_version_num,
        }
    }

    /// Restores, up to the moment from which PostgreSQL can start.
    pub async fn carry_out(
        &self,
        site: &Site,
        order: Order<'_>,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> anyhow::Result<()> {
        let work = Work {
            directory: order.directory.to_owned(),
            tablespaces: order.tablespaces,
            parallelism: site.parallelism,
            durable: order.durable,
        };
        self.origin.restore(site, &self.plan.backup, &work, progress, cancel).await?;
        order.recovery.write(order.directory)?;
        Ok(restore::finish(order.directory)?)
    }
}

/// Where the files of a backup come from.
enum Origin<'a> {
    Own(&'a BackupRecord),
    Pghoard(Box<pghoard::Source>),
}

/// A tablespace of either kind of backup.
pub struct Tablespace {
    pub oid: u32,
    /// Known of PGHoard's backups only.
    pub name: Option<String>,
    /// Its former directory.
    pub location: String,
}

impl Tablespace {
    pub fn describe(&self) -> String {
        let name = self.name.as_ref().map(|name| format!("`{name}` ")).unwrap_or_default();
        format!("{name}{} ({})", self.location, self.oid)
    }
}

impl<'a> Origin<'a> {
    /// Finds the backup, and looks at everything that can be known of it before the first byte is written.
    async fn open(site: &Site, catalog: &'a Catalog, name: &BackupId) -> anyhow::Result<Origin<'a>> {
        let found = match name {
            BackupId::Own(name) => {
                catalog.backups.iter().find(|record| record.name == *name).map(Origin::Own)
            }
            BackupId::Pghoard(id) => match catalog.pghoard.iter().find(|backup| backup.id == *id) {
                Some(backup) => {
                    let source = pghoard::Source::open(&site.repository, backup).await;
                    let source = source.and_then(|source| source.check().map(|()| source));
                    Some(Origin::Pghoard(Box::new(source.map_err(restore::Error::from)?)))
                }
                None => None,
            },
        };
        found.context("the plan is for a backup that the catalog does not have")
    }

    fn tablespaces(&self) -> Vec<Tablespace> {
        match self {
            Self::Own(record) => record
                .tablespaces
                .iter()
                .map(|known| Tablespace { oid: known.oid, name: None, location: known.location.clone() })
                .collect(),
            Self::Pghoard(source) => source
                .tablespaces()
                .iter()
                .map(|known| Tablespace {
                    oid: known.oid,
                    name: Some(known.name.clone()),
                    location: known.location.clone(),
                })
                .collect(),
        }
    }

    async fn restore(
        &self,
        site: &Site,
        backup: &Backup,
        work: &Work,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<(), restore::Error> {
        let source = match self {
            Self::Own(record) => {
                return restore::restore_files(&site.repository, record, work, progress, cancel).await;
            }
            Self::Pghoard(source) => source,
        };
        progress.set_total(backup.plaintext_bytes.unwrap_or_default());
        let open = |part| {
            let source = source.clone();
            Box::pin(stream::try_unfold(None, move |stream: Option<pghoard::PartStream>| {
                let source = source.clone();
                async move {
                    let mut stream = match stream {
                        Some(stream) => stream,
                        None => source.read(part).await?,
                    };
                    Ok(stream.next().await?.map(|contents| (contents, Some(stream))))
                }
            }))
        };
        restore::restore_contents(&backup.name.to_string(), source.parts(), open, work, progress, cancel)
            .await
    }
}

/// Where each tablespace outside the data directory goes, checked before anything is written.
fn tablespace_targets(
    backup: &BackupId,
    tablespaces: &[Tablespace],
    mappings: &[String],
    directory: &Path,
) -> anyhow::Result<Vec<TablespaceTarget>> {
    let mut mappings: Vec<(&str, PathBuf)> = mappings
        .iter()
        .map(|mapping| {
            let (old, new) =
                mapping.split_once('=').ok_or_else(|| usage(format!("`{mapping}` is not OLD=NEW")))?;
            anyhow::Ok((old.trim_end_matches('/'), std::path::absolute(new)?))
        })
        .collect::<Result<_, _>>()?;
    let mut targets: Vec<TablespaceTarget> = Vec::new();
    // An in-place tablespace has a relative location and lies inside the data directory.
    for tablespace in tablespaces.iter().filter(|tablespace| tablespace.location.starts_with('/')) {
        let oid = tablespace.oid.to_string();
        let mapped = mappings.iter().position(|(old, _)| {
            *old == oid
                || *old == tablespace.location.trim_end_matches('/')
                || tablespace.name.as_deref() == Some(*old)
        });
        let target = match mapped {
            Some(at) => mappings.swap_remove(at).1,
            None => PathBuf::from(&tablespace.location),
        };
        if target.starts_with(directory) || targets.iter().any(|other| target.starts_with(&other.directory)) {
            return Err(usage(format!(
                "tablespace {oid} cannot go to `{}`, which lies inside another target",
                target.display()
            )));
        }
        if !restore::may_fill(directory, &target)? {
            let failure = Failure::new(
                Exit::TargetNotEmpty,
                format!(
                    "`{}`, where tablespace {oid} would go, is not empty; nothing was changed",
                    target.display()
                ),
            );
            let hint = format!("name another directory: --tablespace {}=NEW", tablespace.location);
            return Err(failure.with_hint(hint).into());
        }
        targets.push(TablespaceTarget { oid: tablespace.oid, directory: target });
    }
    match mappings.first() {
        Some((old, _)) => {
            let known: Vec<_> = tablespaces.iter().map(Tablespace::describe).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            Err(usage(format!("backup {backup} has no tablespace `{old}`; it has: {known}")))
        }
        None => Ok(targets),
    }
}

fn usage(message: String) -> anyhow::Error {
    Failure::new(Exit::Configuration, message).into()
}

fn recovery(
    args: &RestoreArgs,
    config: &Config,
    site: &SiteConfig,
    plan: &RestorePlan,
) -> anyhow::Result<Recovery> {
    let program = std::env::current_exe().context("cannot find out where this program lies")?;
    let mut arguments = vec!["--site".to_owned(), site.name.clone()];
    if let Some(source) = &config.source {
        arguments.extend(["--config".to_owned(), source.display().to_string()]);
    }
    let url = format!("http://127.0.0.1:{}", config.http.port);
    if config.http.port != 16000 {
        arguments.extend(["--url".to_owned(), url]);
    }
    let mut settings =
        restore::target_settings(&plan.target, plan.target_timeline, Some(args.target_action.into()));
    if let Some(conninfo) = &args.primary_conninfo {
        settings.push(restore::setting_line("primary_conninfo", conninfo));
    }
    let restore_command = restore::restore_command(&program, &arguments);
    Ok(Recovery { standby: args.standby, restore_command, settings })
}

fn reach_text(plan: &RestorePlan) -> String {
    let time = plan.reach.time.map(|time| format!(" (about {time})")).unwrap_or_default();
    match plan.reach.lsn {
        Some(lsn) => format!("to {lsn} on timeline {}{time}", plan.reach.timeline),
        None => format!("to {} on timeline {}{time}", plan.target, plan.reach.timeline),
    }
}

fn as_json(plan: &RestorePlan, directory: &Path, outcome: &str) -> serde_json::Value {
    json!({
        "outcome": outcome,
        "backup": plan.backup.name.to_string(),
        "target_directory": directory.display().to_string(),
        "target": plan.target.to_string(),
        "timeline": plan.timeline,
        "reach": {
            "timeline": plan.reach.timeline,
            "lsn": plan.reach.lsn,
            "time": plan.reach.time,
        },
        "wal_segments": plan.wal_segment_count,
        "plaintext_bytes": plan.backup.plaintext_bytes,
        "warnings": plan.warnings,
    })
}

fn show(
    context: &Context,
    plan: &RestorePlan,
    directory: &Path,
    tablespaces: &[TablespaceTarget],
    recovery: &Recovery,
) -> anyhow::Result<()> {
    if context.json() {
        return render::json(&as_json(plan, directory, "planned"));
    }
    let backup = &plan.backup;
    render::line(format_args!(
        "backup {} of {} ({}) into {}",
        backup.name,
        backup.stop_time,
        backup.plaintext_bytes.map_or_else(|| "size not known".to_owned(), render::size),
        directory.display()
    ))?;
    for target in tablespaces {
        render::line(format_args!("tablespace {} into {}", target.oid, target.directory.display()))?;
    }
    render::line(format_args!(
        "recovery {} reading {} WAL segments, all of them there",
        reach_text(plan),
        plan.wal_segment_count
    ))?;
    render::line(format_args!(
        "settings appended to postgresql.auto.conf:{}",
        recovery.lines("").replace('\n', "\n  ")
    ))?;
    render::line("nothing was changed (--dry-run)")
}
