//! Pruning what PGHoard stored.
//!
//! The object that makes a backup exist goes first, then what belongs to it alone, which listings find
//! without a key. Files of delta backups are shared: which of them still count only the manifests tell, so
//! with one that cannot be read none of them goes.

use std::collections::BTreeSet;

use futures_util::TryStreamExt;
use jiff::Timestamp;

use super::apply::PruneReport;
use super::policy::{RetentionPlan, RetentionPolicy, Verdict, plan};
use crate::catalog::{BackupId, Catalog, FileDigest, PghoardBackup, PghoardError, PghoardId, read_control};
use crate::repository::{Error, Folder, ObjectName, PghoardFolder, PghoardName, Repository};

/// Plans as [`plan`] does, and asks the manifests of PGHoard's delta backups which of their files go.
pub async fn survey(
    repository: &Repository,
    catalog: &mut Catalog,
    policy: &RetentionPolicy,
    now: Timestamp,
) -> Result<RetentionPlan, Error> {
    let mut planned = plan(catalog, policy, now);
    // A backup that turns out to stay may let others go that a plan before did not name, but never the
    // reverse; so this ends.
    loop {
        let mut held = false;
        let dropped: Vec<PghoardId> = planned.dropped().filter_map(pghoard_id).cloned().collect();
        let mut gone = BTreeSet::new();
        for backup in catalog.pghoard.iter_mut().filter(|backup| backup.format.is_delta()) {
            if !dropped.contains(&backup.id) {
                continue;
            }
            match digests(repository, backup).await? {
                Ok(digests) => gone.extend(digests.into_iter().map(|digest| (backup.former, digest))),
                Err(why) => {
                    backup.held = Some(format!("which files go with it cannot be read: {why}"));
                    held = true;
                }
            }
        }
        if held {
            planned = plan(catalog, policy, now);
            continue;
        }
        if gone.is_empty() {
            return Ok(planned);
        }
        for backup in catalog.pghoard.iter().filter(|backup| backup.format.is_delta()) {
            if dropped.contains(&backup.id) {
                continue;
            }
            match digests(repository, backup).await? {
                Ok(digests) => {
                    for digest in digests {
                        gone.remove(&(backup.former, digest));
                    }
                }
                Err(why) => {
                    planned.notes.push(format!(
                        "no delta file goes, because those that backup `{}` needs cannot be read: {why}",
                        backup.id
                    ));
                    return Ok(planned);
                }
            }
        }
        planned.delta_files = gone.into_iter().collect();
        return Ok(planned);
    }
}

const fn pghoard_id(backup: &BackupId) -> Option<&PghoardId> {
    match backup {
        BackupId::Own(_) => None,
        BackupId::Pghoard(id) => Some(id),
    }
}

/// The delta files of a backup, or why they are not known; only a store that does not answer is an error.
async fn digests(
    repository: &Repository,
    backup: &PghoardBackup,
) -> Result<Result<Vec<FileDigest>, String>, Error> {
    match read_control(repository.of(backup.former), backup).await {
        Ok((control, _)) => Ok(Ok(control.delta_files().collect())),
        Err(PghoardError::Repository(error)) if error.is_transient() => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}

/// Deletes the PGHoard backups that `plan` drops, and the delta files it names.
pub(super) async fn remove_pghoard(
    repository: &Repository,
    plan: &RetentionPlan,
) -> Result<PruneReport, Error> {
    let mut report = PruneReport::default();
    let is_dropped = |id: &PghoardId| {
        plan.backups.iter().any(|made| made.verdict == Verdict::Drop && pghoard_id(&made.backup) == Some(id))
    };
    if plan.dropped().find_map(pghoard_id).is_none() && plan.delta_files.is_empty() {
        return Ok(report);
    }
    let catalog = Catalog::load_backups(repository).await?;
    let dropped: Vec<&PghoardBackup> =
        catalog.pghoard.iter().filter(|backup| is_dropped(&backup.id)).collect();
    for backup in &dropped {
        let site = repository.of(backup.former);
        let name = backup.id.name();
        site.delete([ObjectName::Pghoard { folder: PghoardFolder::Backups, name }]).await?;
        report.backup_count += 1;
        report.object_count += 1;
        report.stored_bytes += backup.object_length;
    }
    for backup in &dropped {
        let site = repository.of(backup.former);
        let name = backup.id.name();
        if let Ok(base) = name.base().parse::<PghoardName>() {
            for folder in [PghoardFolder::Chunks, PghoardFolder::DeltaChunks] {
                empty(site, Folder::PghoardParts(folder, base), |_| true, &mut report).await?;
            }
        }
        let asks = |request: &PghoardName| {
            request.as_str().strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with('_'))
        };
        empty(site, Folder::Pghoard(PghoardFolder::Preservations), asks, &mut report).await?;
    }
    for (former, digest) in &plan.delta_files {
        report.object_count += repository.of(*former).delete([digest.object()]).await?;
    }
    Ok(report)
}

/// Deletes those objects of a folder whose name `goes`.
async fn empty(
    site: &Repository,
    folder: Folder,
    goes: impl Fn(&PghoardName) -> bool,
    report: &mut PruneReport,
) -> Result<(), Error> {
    let mut objects = site.list_stream(folder, None);
    while let Some(listed) = objects.try_next().await? {
        let ObjectName::Pghoard { name, .. } = listed.name else { continue };
        if goes(&name) {
            site.delete([listed.name]).await?;
            report.object_count += 1;
            report.stored_bytes += listed.stored_length;
        }
    }
    Ok(())
}
