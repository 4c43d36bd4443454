//! `pghoard_archive_sync`: stores what a failover left unarchived, and checks that the archive is whole.
//!
//! Asks the agent on this machine for everything, as PGHoard's does. An answer that says neither "there" nor
//! "not there" ends it: nothing is concluded from an outage.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use aws_lc_rs::digest;
use clap::Parser;
use serde_json::Value;

use super::pghoard::{context, fatal, parse, python_text};
use super::pghoard_client::{Answer, Hoard};
use super::render;
use super::runtime::block_on;
use crate::agent;
use crate::config::{Config, SiteConfig};
use crate::postgres::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use crate::runtime::variable;
use crate::serve::wal_directory;

/// Sync local WAL files to the remote archive.
#[derive(Debug, Parser)]
#[command(name = "pghoard_archive_sync", version, infer_long_args = true)]
struct Options {
    /// Enable debug logging
    #[arg(short = 'D', long)]
    debug: bool,
    /// Site
    #[arg(long)]
    site: Option<String>,
    #[arg(help = "Configuration file [env: PGHOARD_CONFIG]")]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Maximum number of files for which to validate hash in addition to basic existence check
    #[arg(long, default_value_t = 100, allow_negative_numbers = true)]
    max_hash_checks: i64,
    /// Do not verify archive integrity
    #[arg(long)]
    no_verify: bool,
    /// Request a new base backup if verification fails
    #[arg(long)]
    create_new_backup_on_failure: bool,
}

pub fn run(arguments: &[OsString]) -> ExitCode {
    let options: Options = match parse(arguments) {
        Ok(options) => options,
        Err(status) => return status,
    };
    if options.config.is_none() && variable("PGHOARD_CONFIG").is_none() {
        render::line("pghoard: config file path must be given with --config or via env PGHOARD_CONFIG").ok();
        return ExitCode::FAILURE;
    }
    fatal(sync(&options), "SyncError")
}

fn sync(options: &Options) -> anyhow::Result<()> {
    let context = context(options.config.clone(), options.site.clone(), options.debug);
    let config = context.start()?;
    let site = context.site(&config)?;
    let sync = Sync { hoard: Hoard::of(&config.http)?, site };
    let (current, size) = current_segment(&config, site)?;
    let required = sync.first_required_segment()?;
    sync.upload_missing(current, required, options.max_hash_checks)?;
    if options.no_verify {
        return Ok(());
    }
    let required = required.ok_or_else(|| anyhow!("No basebackups found"))?;
    sync.verify(current, required, size, options.create_new_backup_on_failure)
}

/// The segment that the server writes now.
fn current_segment(config: &Config, site: &SiteConfig) -> anyhow::Result<(SegmentName, SegmentSize)> {
    block_on(config.parallelism, agent::current_segment(site))?.context("the server's position is not known")
}

struct Sync<'a> {
    hoard: Hoard,
    site: &'a SiteConfig,
}

impl Sync<'_> {
    fn ask(&self, method: &str, rest: &[&str]) -> anyhow::Result<Answer> {
        let path: Vec<&str> = [self.site.name.as_str()].iter().chain(rest).copied().collect();
        let fields = if method == "PUT" { "content-length: 0\r\n" } else { "" };
        Ok(self.hoard.ask(method, &path, fields)?)
    }

    /// The agent's word on a file; `None` when it does not exist.
    fn head(&self, file: &str) -> anyhow::Result<Option<Answer>> {
        let answer = self.ask("HEAD", &["archive", file])?;
        match answer.head.status {
            200 => Ok(Some(answer)),
            404 if answer.says_missing() => Ok(None),
            status => bail!("whether {} is archived is not known: HTTP status {status}", python_text(file)),
        }
    }

    /// Where the newest base backup begins.
    fn first_required_segment(&self) -> anyhow::Result<Option<SegmentName>> {
        let answer = self.ask("GET", &["basebackup"])?;
        if answer.head.status != 200 {
            bail!("Error looking up basebackups: HTTP status {}", answer.head.status);
        }
        let listing: Value =
            serde_json::from_slice(&answer.body).context("the list of base backups is not JSON")?;
        let backups = listing["basebackups"].as_array().map(Vec::as_slice).unwrap_or_default();
        let newest = backups.iter().max_by_key(|backup| backup["metadata"]["start-time"].as_str());
        let Some(newest) = newest else {
            tracing::error!("Unable to find any basebackups");
            return Ok(None);
        };
        let segment = newest["metadata"]["start-wal-segment"].as_str();
        let segment =
            segment.ok_or_else(|| anyhow!("the newest base backup does not tell where it begins"))?;
        Ok(Some(segment.parse().context("the newest base backup begins at an odd place")?))
    }

    fn upload_missing(
        &self,
        current: SegmentName,
        required: Option<SegmentName>,
        most_hashes: i64,
    ) -> anyhow::Result<()> {
        let data_directory = self.site.data_directory.as_deref();
        let data_directory = data_directory.ok_or_else(|| anyhow!("the site has no `pg_data_directory`"))?;
        let directory = wal_directory(data_directory);
        let mut wanted = Vec::new();
        let mut checks = Checks { left: most_hashes, without_hash: 0 };
        for file in files_to_check(&directory, current, required)? {
            let name = file.to_string();
            let kind = kind_of(file);
            let Some(stored) = self.head(&name)? else {
                tracing::info!("{kind} file {} needs to be archived", python_text(&name));
                wanted.push(name);
                continue;
            };
            if checks.asks_for_another_upload(kind, &name, &directory, &stored)? {
                wanted.push(name);
            }
        }
        // Oldest first, so that what comes after an interruption still looks missing.
        wanted.sort();
        for name in wanted {
            let kind = if name.ends_with(".history") { "TIMELINE" } else { "WAL" };
            let answer = self.ask("PUT", &["archive", &name])?;
            match answer.head.status {
                201 => tracing::info!("{kind} file {} archived", python_text(&name)),
                status => {
                    let reason = String::from_utf8_lossy(&answer.body);
                    tracing::error!(
                        "{kind} file {} archival failed with status code {status}: {}",
                        python_text(&name),
                        reason.trim()
                    );
                }
            }
        }
        Ok(())
    }

    /// Walks back from the current segment to the first one that is needed.
    fn verify(
        &self,
        current: SegmentName,
        required: SegmentName,
        size: SegmentSize,
        new_backup_on_failure: bool,
    ) -> anyhow::Result<()> {
        let (from, to) = (python_text(&current.to_string()), python_text(&required.to_string()));
        tracing::info!("Verifying archive integrity from {from} to {to}");
        let mut segment = current;
        let mut count = 0;
        while let Some(before) = previous(segment, size) {
            let Some(found) = self.on_some_timeline(before)? else {
                let text = format!(
                    "xlog file {before} missing, integrity check from {current} to {required} failed"
                );
                if !new_backup_on_failure {
                    bail!(text);
                }
                tracing::error!("Requesting new basebackup: {text}");
                return self.request_backup();
            };
            tracing::info!("xlog file {} correctly archived", python_text(&found.to_string()));
            count += 1;
            segment = found;
            if segment.on(required.timeline()) == required {
                tracing::info!("Found all required WAL files: {count}");
                return Ok(());
            }
        }
        bail!("integrity check from {current} to {required} came to the beginning of WAL");
    }

    /// The segment on its own timeline, or on the newest of its ancestors that has it.
    fn on_some_timeline(&self, segment: SegmentName) -> anyhow::Result<Option<SegmentName>> {
        for timeline in (1..=segment.timeline().get()).rev().filter_map(TimelineId::new) {
            let candidate = segment.on(timeline);
            if self.head(&candidate.to_string())?.is_some() {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    fn request_backup(&self) -> anyhow::Result<()> {
        let answer = self.ask("PUT", &["archive", "basebackup"])?;
        if answer.head.status != 201 {
            bail!("Request for a new backup for site: {} failed", python_text(&self.site.name));
        }
        tracing::info!("Requested a new backup for site: {} successfully", python_text(&self.site.name));
        Ok(())
    }
}

/// How many hashes have been compared, and how many were not there.
struct Checks {
    /// Negative: no limit.
    left: i64,
    without_hash: u32,
}

impl Checks {
    /// Compares a stored file with ours, as far as there is something to compare.
    fn asks_for_another_upload(
        &mut self,
        kind: &str,
        name: &str,
        directory: &Path,
        stored: &Answer,
    ) -> anyhow::Result<bool> {
        let shown = python_text(name);
        let hash = stored.field("metadata-hash").zip(stored.field("metadata-hash-algorithm"));
        let Some((theirs, algorithm)) = hash.filter(|_| kind == "WAL") else {
            if kind == "WAL" {
                self.without_hash += 1;
            }
            if kind == "WAL" && self.without_hash == 1 {
                // It may be the last segment of a dead primary; the agent compares the content itself.
                tracing::info!("{kind} file {shown} already archived but no hash is available, reuploading");
                return Ok(true);
            }
            tracing::info!("{kind} file {shown} already archived");
            return Ok(false);
        };
        let Some(algorithm) = algorithm_of(algorithm).filter(|_| self.left != 0) else {
            tracing::info!("{kind} file {shown} already archived");
            return Ok(false);
        };
        self.left -= 1;
        let ours = match hash_of(&directory.join(name), algorithm) {
            Ok(ours) => ours,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!("{kind} file {shown} already archived (file deleted before getting hash)");
                return Ok(false);
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {shown}")),
        };
        if theirs.trim().eq_ignore_ascii_case(&ours) {
            tracing::info!("{kind} file {shown} already archived and has valid hash");
            return Ok(false);
        }
        tracing::warn!(
            "{kind} file {shown} already archived but existing hash '{theirs}' differs from our hash '{ours}', reuploading"
        );
        Ok(true)
    }
}

const fn kind_of(file: WalFileName) -> &'static str {
    if matches!(file, WalFileName::History(_)) { "TIMELINE" } else { "WAL" }
}

/// History files first, then segments from the newest closed one down to the first that is needed.
fn files_to_check(
    directory: &Path,
    current: SegmentName,
    required: Option<SegmentName>,
) -> anyhow::Result<Vec<WalFileName>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read `{}`", directory.display()))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().to_str().map(str::to_owned));
    let mut files: Vec<WalFileName> = names.filter_map(|name| name.parse().ok()).collect();
    files.retain(|file| match file {
        WalFileName::History(_) => true,
        WalFileName::Segment(segment) => {
            *segment < current && required.is_none_or(|required| *segment >= required)
        }
        WalFileName::Partial(_) | WalFileName::BackupLabel(..) => false,
    });
    files.sort_by_key(|file| {
        let is_history = matches!(file, WalFileName::History(_));
        std::cmp::Reverse((is_history, file.to_string()))
    });
    Ok(files)
}

/// The segment before on the same timeline; none before the first.
fn previous(segment: SegmentName, size: SegmentSize) -> Option<SegmentName> {
    let start = size.start(segment).get().checked_sub(size.bytes()).filter(|start| *start > 0)?;
    Some(size.segment_at(segment.timeline(), Lsn::new(start)))
}

/// By Python's name; `None` for one that is not made here.
fn algorithm_of(name: &str) -> Option<&'static digest::Algorithm> {
    match name.to_ascii_lowercase().as_str() {
        "sha1" => Some(&digest::SHA1_FOR_LEGACY_USE_ONLY),
        "sha224" => Some(&digest::SHA224),
        "sha256" => Some(&digest::SHA256),
        "sha384" => Some(&digest::SHA384),
        "sha512" => Some(&digest::SHA512),
        _ => None,
    }
}

fn hash_of(path: &Path, algorithm: &'static digest::Algorithm) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut context = digest::Context::new(algorithm);
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => context.update(&buffer[..count]),
        }
    }
    let digits = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>();
    Ok(digits.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histories_come_first_and_only_what_is_closed_and_needed() {
        let directory = tempfile::tempdir().unwrap();
        for name in [
            "000000010000000000000001",
            "000000010000000000000002",
            "000000010000000000000003",
            "000000010000000000000004",
            "000000010000000000000005",
            "00000002.history",
            "archive_status",
            "000000010000000000000003.partial",
        ] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let segment = |name: &str| name.parse::<SegmentName>().unwrap();
        let files = files_to_check(
            directory.path(),
            segment("000000010000000000000004"),
            Some(segment("000000010000000000000002")),
        );
        let names: Vec<_> = files.unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["00000002.history", "000000010000000000000003", "000000010000000000000002"]);
    }

    #[test]
    fn the_segment_before_crosses_the_log_and_ends_at_the_first() {
        let before = |name: &str| {
            previous(name.parse().unwrap(), SegmentSize::DEFAULT).map(|segment| segment.to_string())
        };
        assert_eq!(before("000000020000000100000000").unwrap(), "0000000200000000000000FF");
        assert_eq!(before("000000010000000000000001"), None);
    }

    #[test]
    fn hashes_are_pythons() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"abc").unwrap();
        let of = |name| hash_of(file.path(), algorithm_of(name).unwrap()).unwrap();
        assert_eq!(of("sha1"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert!(of("SHA256").starts_with("ba7816bf"));
        assert!(algorithm_of("blake3").is_none());
    }
}
