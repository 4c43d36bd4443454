//! WAL files that lie ready in the WAL directory: fetched ahead, by PGHoard or by us.
//!
//! Shell. `NAME.pghoard.prefetch` is a whole segment that PGHoard's clients take by renaming it, without
//! asking anybody. One that nobody has taken is taken here when its name is asked for, after a check: of
//! its header and length, and of its content where the archive has a digest of it. What cannot be taken is
//! removed; so is what an earlier process left half done.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::codec::Digest;
use crate::postgres::{Expected, LONG_HEADER_BYTES, TimelineHistory, WalFileName, check_segment_start};
use crate::repository::{ObjectName, Repository};

/// A file that is whole.
const READY: &str = ".pghoard.prefetch";
/// PGHoard's, under way.
const UNFINISHED: &str = ".pghoard.tmp";
/// Ours, under way: the end of the names that [`NewFile`](super::NewFile) gives.
const OWN_UNFINISHED: &str = ".tmp";
/// A file that nobody has taken for this long belongs to a recovery that is over.
const FORGOTTEN: Duration = Duration::from_hours(1);
/// A history file is below this; more is not one.
const LONGEST_HISTORY: u64 = 1 << 20;

/// Where `file` lies ready, should it.
pub fn ready_path(directory: &Path, file: WalFileName) -> PathBuf {
    directory.join(format!("{file}{READY}"))
}

/// Whether a regular file lies there; links are none.
pub fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_file())
}

/// Checks the file that lies ready at `path` against its name and, when that is known, its digest.
pub fn check(
    path: &Path,
    file: WalFileName,
    expected: &Expected,
    digest: Option<Digest>,
) -> Result<(), String> {
    let mut content = File::open(path).map_err(|error| error.to_string())?;
    let length = content.metadata().map_err(|error| error.to_string())?.len();
    match file {
        WalFileName::Segment(segment) => {
            let mut start = Vec::with_capacity(LONG_HEADER_BYTES);
            let read = (&mut content).take(LONG_HEADER_BYTES as u64).read_to_end(&mut start);
            read.map_err(|error| error.to_string())?;
            let header = check_segment_start(&start, segment, expected).map_err(|error| error.to_string())?;
            if header.segment_size.bytes() != length {
                return Err(format!("{length} bytes where {} belong", header.segment_size.bytes()));
            }
        }
        WalFileName::History(timeline) => {
            let mut text = Vec::new();
            let read = (&mut content).take(LONGEST_HISTORY).read_to_end(&mut text);
            read.map_err(|error| error.to_string())?;
            TimelineHistory::parse(timeline, &text).map_err(|error| error.to_string())?;
        }
        WalFileName::Partial(_) | WalFileName::BackupLabel(..) => {
            return Err("nothing of this kind is fetched ahead".to_owned());
        }
    }
    match digest {
        Some(digest) if digest_of(path).map_err(|error| error.to_string())? != digest => {
            Err("its content is not what the archive has".to_owned())
        }
        _ => Ok(()),
    }
}

/// Gives `file` the name `target` if it lies ready in `directory` and is right; its length then. What lies
/// there and is not right is removed.
pub async fn take_ready(
    directory: &Path,
    file: WalFileName,
    expected: &Expected,
    repository: &Repository,
    target: &Path,
) -> Option<u64> {
    let path = ready_path(directory, file);
    if !is_there(&path) {
        return None;
    }
    // Storage that does not answer is no reason to leave it: that is when it is worth most.
    let stored = repository.head(ObjectName::Wal(file)).await.ok();
    let digest = stored.and_then(|stored| stored.metadata.digest);
    let (expected, target) = (*expected, target.to_owned());
    let taken = tokio::task::spawn_blocking(move || {
        if let Err(reason) = check(&path, file, &expected, digest) {
            remove(&path, &reason);
            return None;
        }
        let length = path.metadata().ok()?.len();
        match take(&path, &target) {
            Ok(()) => Some(length),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "file fetched ahead not taken");
                None
            }
        }
    });
    taken.await.ok().flatten()
}

/// As `take_ready`, without a word from the archive: for a client that finds it there itself. What is not right
/// is left for the server to judge.
pub fn take_unasked(directory: &Path, file: WalFileName, target: &Path) -> bool {
    let path = ready_path(directory, file);
    is_there(&path) && check(&path, file, &Expected::default(), None).is_ok() && take(&path, target).is_ok()
}

fn digest_of(path: &Path) -> io::Result<Digest> {
    // One segment at most; read at once it would be 16 MiB and more.
    let mut hasher = crate::codec::Hasher::new();
    let mut content = File::open(path)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        match content.read(&mut buffer)? {
            0 => return Ok(hasher.digest()),
            count => hasher.update(&buffer[..count]),
        }
    }
}

/// Gives the checked file at `path` the name `target`; both are on disk when this returns.
pub fn take(path: &Path, target: &Path) -> io::Result<()> {
    File::open(path)?.sync_data()?;
    fs::rename(path, target)?;
    for directory in [target.parent(), path.parent()].into_iter().flatten() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

/// Removes what no client will ask for: files under way when their process ended, and ones that have lain
/// there for too long.
pub fn clean(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let unfinished = name.ends_with(UNFINISHED)
            || (name.contains(READY) && name.contains(".pgkeep.") && name.ends_with(OWN_UNFINISHED));
        let forgotten = name.ends_with(READY)
            && entry.metadata().and_then(|metadata| metadata.modified()).is_ok_and(is_forgotten);
        if unfinished || forgotten {
            remove(&entry.path(), "nobody will ask for it");
        }
    }
}

fn is_forgotten(modified: SystemTime) -> bool {
    modified.elapsed().is_ok_and(|age| age > FORGOTTEN)
}

pub fn remove(path: &Path, reason: &str) {
    match fs::remove_file(path) {
        Ok(()) => tracing::info!(path = %path.display(), reason, "file fetched ahead removed"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "file fetched ahead not removed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::sample::{segment, segment_bytes};

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_taken_for_what_it_is_only() {
        let directory = tempfile::tempdir().unwrap();
        let file = WalFileName::Segment(segment(3));
        let path = ready_path(directory.path(), file);
        assert!(!is_there(&path));
        let good = segment_bytes(segment(3));
        let expected = Expected::default();
        fs::write(&path, &good).unwrap();
        assert!(is_there(&path));
        check(&path, file, &expected, None).unwrap();
        check(&path, file, &expected, Some(Digest::of(&good))).unwrap();
        check(&path, file, &expected, Some(Digest::of(b"other"))).unwrap_err();
        let stranger = Expected { system_identifier: Some(1), ..Expected::default() };
        check(&path, file, &stranger, None).unwrap_err();
        for bad in
            [segment_bytes(segment(4)), good[..good.len() - 1].to_vec(), vec![0; good.len()], Vec::new()]
        {
            fs::write(&path, bad).unwrap();
            check(&path, file, &expected, None).unwrap_err();
        }
        fs::write(&path, &good).unwrap();
        take(&path, &directory.path().join("RECOVERYXLOG")).unwrap();
        assert_eq!(names(directory.path()), ["RECOVERYXLOG"]);
    }

    #[test]
    fn what_nobody_will_ask_for_goes_and_the_rest_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let name = segment(3).to_string();
        let stay = [name.clone(), format!("{name}.pghoard.prefetch"), "archive.tmp".to_owned()];
        let go = [
            format!("{name}.ab12.pghoard.tmp"),
            format!("{name}.pghoard.prefetch.pgkeep.7.1.tmp"),
            "000000010000000000000001.pghoard.prefetch".to_owned(),
        ];
        for file in stay.iter().chain(&go) {
            fs::write(path(file), b"x").unwrap();
        }
        for file in [&go[2], &name] {
            let file = File::options().write(true).open(path(file)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        clean(directory.path());
        let mut stay = stay.to_vec();
        stay.sort();
        assert_eq!(names(directory.path()), stay);
    }
}
