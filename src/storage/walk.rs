//! Listing a directory tree in the order of keys and in bounded memory.
//!
//! A directory gives its names in no order. One with millions of segments is therefore read several times,
//! each time for the next batch of names, instead of once into memory.

use std::collections::BTreeSet;
use std::io;
use std::path::Path as FsPath;

use object_store::ObjectMeta;
use object_store::path::Path;

/// The next files below `root` whose keys start with `prefix` (empty, or a directory's key ending in `/`)
/// and come after `after`, in key order. Fewer than `limit` means that there are no more.
pub(super) fn batch(root: &FsPath, prefix: &str, after: &str, limit: usize) -> io::Result<Vec<ObjectMeta>> {
    let mut found = Vec::new();
    collect(root, prefix, after, limit, &mut found)?;
    Ok(found)
}

fn collect(
    root: &FsPath,
    prefix: &str,
    after: &str,
    limit: usize,
    found: &mut Vec<ObjectMeta>,
) -> io::Result<()> {
    let mut after = after.to_owned();
    loop {
        let (names, complete) = smallest_names(&root.join(prefix), prefix, &after, limit - found.len())?;
        for name in &names {
            let key = format!("{prefix}{name}");
            if name.ends_with('/') {
                collect(root, &key, &after, limit, found)?;
            } else if let Some(meta) = stat(&root.join(&key), &key)? {
                found.push(meta);
            }
            if found.len() == limit {
                return Ok(());
            }
        }
        match names.last() {
            Some(last) if !complete => after = after_all_of(&format!("{prefix}{last}")),
            _ => return Ok(()),
        }
    }
}

/// A text that sorts behind `key` and, when it is a directory's, behind everything in it.
fn after_all_of(key: &str) -> String {
    match key.strip_suffix('/') {
        Some(directory) => format!("{directory}/{}", char::MAX),
        None => key.to_owned(),
    }
}

/// The `limit` smallest names in `directory` that can lead to keys after `after`; whether these are all.
/// The name of a directory ends in `/`, so that names sort as the keys they begin.
fn smallest_names(
    directory: &FsPath,
    prefix: &str,
    after: &str,
    limit: usize,
) -> io::Result<(BTreeSet<String>, bool)> {
    let mut names = BTreeSet::new();
    let mut complete = true;
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        // Deleted since its name was read, or never there.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok((names, true));
        }
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let Ok(mut name) = entry.file_name().into_string() else { continue };
        if is_hidden(&name) {
            continue;
        }
        let kind = entry.file_type()?;
        let is_directory = kind.is_dir()
            || kind.is_symlink() && std::fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir());
        if is_directory {
            name.push('/');
        }
        let key = format!("{prefix}{name}");
        // A directory may begin before `after` and reach beyond it, unless `after` is its very end.
        let relevant =
            key.as_str() > after || is_directory && after.starts_with(&key) && after != after_all_of(&key);
        if relevant {
            names.insert(name);
            if names.len() > limit {
                names.pop_last();
                complete = false;
            }
        }
    }
    Ok((names, complete))
}

fn stat(path: &FsPath, key: &str) -> io::Result<Option<ObjectMeta>> {
    let Ok(location) = Path::parse(key) else { return Ok(None) };
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(Some(ObjectMeta {
            location,
            last_modified: meta.modified()?.into(),
            size: meta.len(),
            e_tag: None,
            version: None,
        })),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Names that are no objects: PGHoard's metadata files and their temporary ones, dot files (the marker and
/// unfinished uploads of ours), and `name#1`, which is how the library calls what it has not published yet.
pub(super) fn is_hidden(name: &str) -> bool {
    is_staged(name) || name.starts_with('.') || name.ends_with(".metadata") || name.contains(".metadata_tmp")
}

/// Names of files that some put of this store has not come to publish.
pub(super) fn is_unpublished(name: &str) -> bool {
    is_staged(name) || name.starts_with('.') && name.contains(".upload-") || name.contains(".metadata_tmp")
}

fn is_staged(name: &str) -> bool {
    name.split_once('#')
        .is_some_and(|(_, suffix)| !suffix.is_empty() && suffix.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(root: &FsPath, prefix: &str, after: &str, limit: usize) -> Vec<String> {
        let mut keys = Vec::new();
        let mut after = after.to_owned();
        loop {
            let batch = batch(root, prefix, &after, limit).unwrap();
            assert!(batch.len() <= limit);
            keys.extend(batch.iter().map(|meta| meta.location.to_string()));
            if batch.len() < limit {
                return keys;
            }
            after.clone_from(keys.last().unwrap());
        }
    }

    fn tree(files: &[String]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
        root
    }

    #[test]
    fn shows_objects_only() {
        let files =
            ["a", "a.metadata", ".pgkeep", "b/.x.upload", "b/c#1", "b/c", "b/c.metadata_tmp1", "b/d#"];
        let root = tree(&files.map(str::to_owned));
        std::fs::create_dir(root.path().join("empty")).unwrap();
        assert_eq!(keys(root.path(), "", "", 1), ["a", "b/c", "b/d#"]);
        assert_eq!(keys(root.path(), "b/", "", 10), ["b/c", "b/d#"]);
        assert_eq!(keys(root.path(), "none/", "", 10), [""; 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_batch_size_gives_every_key_once_and_in_order(
            files in prop::collection::btree_set("([a-c.-]{1,2}x/){0,2}[a-c0.-]{1,2}f", 0..24),
            limit in 1..6_usize,
            start: prop::sample::Index,
        ) {
            let files: Vec<String> = files.into_iter().filter(|file| !file.split('/').any(is_hidden)).collect();
            let root = tree(&files);
            prop_assert_eq!(&keys(root.path(), "", "", limit), &files);
            if !files.is_empty() {
                let start = start.index(files.len());
                prop_assert_eq!(&keys(root.path(), "", &files[start], limit), &files[start + 1..]);
            }
        }
    }
}
