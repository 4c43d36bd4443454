//! What PostgreSQL needs to recover from a restored backup.
//!
//! The settings are appended to `postgresql.auto.conf`, which keeps what `ALTER SYSTEM` had written there.
//! A recovery target left over from an earlier restore is switched off, because PostgreSQL refuses to
//! start with two.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use super::error::Error;
use super::target::setting_line;

/// Every setting that names a target; at most one of them may be set when the server starts.
const TARGETS: [&str; 5] = [
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
];

/// How the restored server recovers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Stay a standby instead of finishing recovery.
    pub standby: bool,
    pub restore_command: String,
    /// Further lines: target, timeline, action, `primary_conninfo`.
    pub settings: Vec<String>,
}

impl Recovery {
    /// The lines to append to `postgresql.auto.conf`. `present` is the text of the configuration files
    /// as they are.
    pub fn lines(&self, present: &str) -> String {
        let mut lines = vec![String::new(), "# added by pgkeep restore".to_owned()];
        for target in TARGETS {
            let wanted = self.settings.iter().any(|line| mentions(line, target));
            if !wanted && mentions(present, target) {
                lines.push(setting_line(target, ""));
            }
        }
        if !self.standby && mentions(present, "primary_conninfo") {
            // A server that recovers to become a primary must not follow its old one.
            lines.push(setting_line("primary_conninfo", ""));
        }
        lines.push(setting_line("restore_command", &self.restore_command));
        lines.extend(self.settings.iter().cloned());
        lines.push(String::new());
        lines.join("\n")
    }

    /// Appends the settings and leaves the signal file. Servers before 12 get a `recovery.conf` instead.
    pub fn write(&self, directory: &Path) -> Result<(), Error> {
        if major_version(directory).is_some_and(|major| major < 12) {
            return self.write_recovery_conf(directory);
        }
        let auto = directory.join("postgresql.auto.conf");
        let mut present = String::new();
        for path in [&directory.join("postgresql.conf"), &auto] {
            // A configuration kept elsewhere is not ours to read; what is in the auto file suffices.
            present.push_str(
                &fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default(),
            );
            present.push('\n');
        }
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&auto)
            .and_then(|mut file| {
                file.write_all(self.lines(&present).as_bytes())?;
                file.sync_all()
            })
            .map_err(|error| Error::io("write", &auto, error))?;
        let signal = directory.join(if self.standby { "standby.signal" } else { "recovery.signal" });
        fs::write(&signal, []).map_err(|error| Error::io("write", &signal, error))?;
        let other = directory.join(if self.standby { "recovery.signal" } else { "standby.signal" });
        if other.exists() {
            fs::remove_file(&other).map_err(|error| Error::io("remove", &other, error))?;
        }
        super::apply::sync_directory(directory)
    }

    /// The file replaces one that the backup holds, as it describes this recovery and no other.
    fn write_recovery_conf(&self, directory: &Path) -> Result<(), Error> {
        let path = directory.join("recovery.conf");
        let mut lines = self.lines("");
        if self.standby {
            lines.push_str(&setting_line("standby_mode", "on"));
            lines.push('\n');
        }
        fs::File::create(&path)
            .and_then(|mut file| {
                file.write_all(lines.as_bytes())?;
                file.sync_all()
            })
            .map_err(|error| Error::io("write", &path, error))?;
        super::apply::sync_directory(directory)
    }
}

/// What `PG_VERSION` says. Before 10 the major version had two parts, of which the first is 9 at most.
fn major_version(directory: &Path) -> Option<u32> {
    let text = fs::read_to_string(directory.join("PG_VERSION")).ok()?;
    text.trim().split('.').next()?.parse().ok()
}

/// Whether `name` is set anywhere in a configuration text, and not merely part of a longer name.
fn mentions(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        line.trim_start()
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(|next: char| next == '=' || next.is_whitespace()))
    })
}

/// One word for a shell, whatever it contains.
pub fn shell_word(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+:@,=".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The `restore_command` that runs `program` with `arguments`. PostgreSQL replaces `%f` and `%p`, and
/// `%%` by one percent sign.
pub fn restore_command(program: &Path, arguments: &[String]) -> String {
    let mut words = vec![shell_word(&program.to_string_lossy()), "wal-fetch".to_owned()];
    words.extend(arguments.iter().map(|argument| shell_word(argument)));
    let words: Vec<String> = words.iter().map(|word| word.replace('%', "%%")).collect();
    format!("{} \"%f\" \"%p\"", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recovery(settings: Vec<String>) -> Recovery {
        Recovery { standby: false, restore_command: "x".to_owned(), settings }
    }

    #[test]
    fn the_command_survives_shell_and_percent_signs() {
        let command =
            restore_command(Path::new("/opt/it's 100%/pgkeep"), &["--site".to_owned(), "main".to_owned()]);
        assert_eq!(command, r#"'/opt/it'\''s 100%%/pgkeep' wal-fetch --site main "%f" "%p""#);
    }

    #[test]
    fn an_older_target_is_switched_off_and_the_new_one_set() {
        let present =
            "recovery_target_time = 'yesterday'\n  recovery_target_xid='7'\n#recovery_target_lsn = ''\n";
        let lines = recovery(vec![setting_line("recovery_target_time", "today")]).lines(present);
        assert!(lines.contains("recovery_target_xid = ''\n"));
        assert!(lines.contains("recovery_target_time = 'today'\n"));
        assert!(!lines.contains("recovery_target_time = ''"));
        assert!(!lines.contains("recovery_target = ''"));
        assert!(!lines.contains("recovery_target_lsn"));
    }

    #[test]
    fn servers_before_12_get_a_recovery_conf() {
        for (version, is_old) in [("9.6\n", true), ("11\n", true), ("12\n", false), ("18\n", false)] {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join("PG_VERSION"), version).unwrap();
            Recovery { standby: true, ..recovery(Vec::new()) }.write(directory.path()).unwrap();
            assert_eq!(directory.path().join("standby.signal").exists(), !is_old, "{version}");
            assert_eq!(directory.path().join("postgresql.auto.conf").exists(), !is_old, "{version}");
            let conf = fs::read_to_string(directory.path().join("recovery.conf"));
            assert_eq!(conf.is_ok_and(|conf| conf.contains("standby_mode = 'on'\n")), is_old, "{version}");
        }
    }

    #[test]
    fn a_future_primary_stops_following() {
        let present = "primary_conninfo = 'host=old'\n";
        assert!(recovery(Vec::new()).lines(present).contains("primary_conninfo = ''\n"));
        let standby = Recovery { standby: true, ..recovery(Vec::new()) };
        assert!(!standby.lines(present).contains("primary_conninfo"));
    }
}
