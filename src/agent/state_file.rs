//! The state file: what `/status` says, on disk, for monitoring that reads PGHoard's.

use std::io::Write;
use std::path::Path;

use serde_json::Value;

use crate::config::StateFile;

/// The longest state that is read back: one of PGHoard's with a thousand backups is about a tenth of this.
const LONGEST: u64 = 16 << 20;

/// What an earlier run wrote; `Null` when there is nothing to read.
pub fn read(file: &StateFile) -> Value {
    let read = || {
        let length = std::fs::metadata(&file.path).ok()?.len();
        (length <= LONGEST).then(|| std::fs::read(&file.path).ok())?
    };
    read().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or(Value::Null)
}

/// Whether it is to be written: always when asked for, at PGHoard's own place when that is there.
pub fn is_wanted(file: &StateFile) -> bool {
    file.configured || file.path.parent().is_some_and(Path::is_dir)
}

/// Replaces the file; readers see the old state or the new one, never half of one.
pub fn write(path: &Path, state: &str) -> std::io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let staged = path.with_file_name(name);
    let mut file = std::fs::File::create(&staged)?;
    file.write_all(state.as_bytes())?;
    drop(file);
    std::fs::rename(&staged, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile { path: folder.path().join("new/state.json"), configured: true };
        assert_eq!(read(&file), Value::Null);
        write(&file.path, "{\"a\": 1}").unwrap();
        write(&file.path, "{\"a\": 2}").unwrap();
        assert_eq!(read(&file)["a"], 2);
        assert_eq!(std::fs::read_dir(folder.path().join("new")).unwrap().count(), 1, "nothing is left over");
        write(&file.path, "{").unwrap();
        assert_eq!(read(&file), Value::Null);
        assert!(!is_wanted(&StateFile { path: "/nowhere/at/all/state.json".into(), configured: false }));
    }
}
