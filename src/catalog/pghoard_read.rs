//! Finding PGHoard's backups, and reading their control objects.

use std::collections::BTreeMap;

use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;

use super::known::BackupId;
use super::load::{PARALLEL_READS, readable};
use super::pghoard_backup::{PghoardBackup, PghoardId, preservation};
use super::pghoard_control::{CONTROL_MEMBER, PghoardControl};
use super::snapshot::DamagedBackup;
use crate::codec::{TarEvent, TarStream};
use crate::postgres::BackupLabel;
use crate::repository::{Described, Error, Folder, ObjectName, PghoardFolder, PghoardName, Repository};

/// The longest JSON that is read: that of a delta backup of about two million files.
const MAX_CONTROL_LENGTH: usize = 512 << 20;

/// Why one of PGHoard's objects was not understood.
#[derive(Debug, thiserror::Error)]
pub enum PghoardError {
    #[error(transparent)]
    Repository(#[from] Error),
    #[error("object `{object}` is damaged: {why}")]
    Damaged { object: ObjectName, why: String },
}

impl PghoardError {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Repository(error) => error.hint(),
            Self::Damaged { .. } => None,
        }
    }
}

/// All of PGHoard's backups of the site and of those it was moved from, and what looks like one and is none.
pub(super) async fn load_pghoard(
    repository: &Repository,
) -> Result<(Vec<PghoardBackup>, Vec<DamagedBackup>), Error> {
    let (mut backups, mut damaged) = (Vec::new(), Vec::new());
    let sites = std::iter::once((None, repository))
        .chain(repository.former().iter().enumerate().map(|(number, site)| (Some(number), site)));
    for (former, site) in sites {
        let requests = preservations(site).await?;
        for (name, described) in describe_all(site, PghoardFolder::Backups).await? {
            let id = PghoardId::new(site.site_prefix(), name);
            let Described { stored_length, last_modified, metadata } = described;
            match PghoardBackup::from_metadata(id.clone(), metadata, stored_length, last_modified) {
                Ok(backup) => backups.push(PghoardBackup {
                    former,
                    preserved_until: requests.get(name.as_str()).copied(),
                    ..backup
                }),
                Err(reason) => damaged.push(DamagedBackup { name: BackupId::Pghoard(id), reason }),
            }
        }
    }
    backups.sort_by(|one, other| (one.start_time, &one.id).cmp(&(other.start_time, &other.id)));
    Ok((backups, damaged))
}

/// Until when each backup is to be kept, by the name of its object; of several requests the latest counts.
async fn preservations(site: &Repository) -> Result<BTreeMap<String, Timestamp>, Error> {
    let mut latest: BTreeMap<String, Timestamp> = BTreeMap::new();
    for (name, described) in describe_all(site, PghoardFolder::Preservations).await? {
        if let Some((backup, until)) = preservation(name, &described.metadata) {
            let kept = latest.entry(backup).or_insert(until);
            *kept = until.max(*kept);
        } else {
            tracing::warn!(request = %name, "a request to preserve a backup cannot be read");
        }
    }
    Ok(latest)
}

async fn describe_all(
    site: &Repository,
    folder: PghoardFolder,
) -> Result<Vec<(PghoardName, Described)>, Error> {
    let names: Vec<PghoardName> = site
        .list(Folder::Pghoard(folder), None)
        .await?
        .into_iter()
        .filter_map(|listed| match listed.name {
            // PGHoard does not look into folders below.
            ObjectName::Pghoard { name, .. } if !name.as_str().contains('/') => Some(name),
            _ => None,
        })
        .collect();
    let described: Vec<Option<(PghoardName, Described)>> = stream::iter(names)
        .map(|name| async move {
            match readable(site.describe(ObjectName::Pghoard { folder, name }).await)? {
                Some(Ok(described)) => Ok::<_, Error>(Some((name, described))),
                Some(Err(_)) | None => Ok(None),
            }
        })
        .buffered(PARALLEL_READS)
        .try_collect()
        .await?;
    Ok(described.into_iter().flatten().collect())
}

/// Reads the control object of `backup`, to its end, and checks that it belongs to it.
pub async fn read_control(
    repository: &Repository,
    backup: &PghoardBackup,
) -> Result<(PghoardControl, BackupLabel), PghoardError> {
    let name = backup.id.name();
    let object = ObjectName::Pghoard { folder: PghoardFolder::Backups, name };
    let damaged = |why: String| PghoardError::Damaged { object, why };
    let mut reader = repository.read(object).await?;
    let (mut tar, mut events) = (TarStream::default(), Vec::new());
    let (mut json, mut label, mut member) = (Vec::new(), Vec::new(), Member::Other);
    while let Some(chunk) = reader.next().await? {
        tar.push(chunk, &mut events).map_err(|error| damaged(error.to_string()))?;
        for event in events.drain(..) {
            match (event, member) {
                (TarEvent::Entry(entry), _) => {
                    member = match entry.path.as_slice() {
                        CONTROL_MEMBER => Member::Json,
                        b"pgdata/backup_label" => Member::Label,
                        _ => Member::Other,
                    };
                }
                (TarEvent::Data(data), Member::Json) => {
                    if json.len() + data.len() > MAX_CONTROL_LENGTH {
                        return Err(damaged("its list of files is longer than any backup's".to_owned()));
                    }
                    json.extend_from_slice(&data);
                }
                (TarEvent::Data(data), Member::Label) => {
                    label.extend_from_slice(&data[..data.len().min(64 << 10)]);
                }
                (TarEvent::Data(_) | TarEvent::EndOfFile, _) => {}
            }
        }
    }
    tar.finish().map_err(|error| damaged(error.to_string()))?;
    let control = PghoardControl::parse(name, &json).map_err(damaged)?;
    let label = BackupLabel::parse(&label).map_err(|error| damaged(error.to_string()))?;
    let starts = [Some(label.start_segment), control.start_segment];
    if let Some(other) = starts.into_iter().flatten().find(|start| *start != backup.start_segment) {
        let own = backup.start_segment;
        return Err(damaged(format!("it begins in segment `{other}`, its metadata says `{own}`")));
    }
    if backup.format.is_delta() != control.delta.is_some() {
        return Err(damaged(format!("it is not of the format `{}`", backup.format)));
    }
    Ok((control, label))
}

#[derive(Clone, Copy)]
enum Member {
    Json,
    Label,
    Other,
}
