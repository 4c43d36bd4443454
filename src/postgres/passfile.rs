//! libpq's password file (`~/.pgpass`).
//!
//! Pure: the file is a text.

use super::conninfo::{DEFAULT_SOCKET_DIRECTORIES, Host};
use crate::secret::Secret;

/// Finds a password in the text of a password file (`~/.pgpass`): the first line whose host, port,
/// database and user each match or are `*`. A replication connection's database is `replication`; a
/// Unix socket in a default directory goes by `localhost`.
pub fn password_for(passfile: &str, host: &Host, database: &str, user: &str) -> Option<Secret> {
    let is_default_socket =
        host.address.is_none() && DEFAULT_SOCKET_DIRECTORIES.contains(&host.name.trim_end_matches('/'));
    let address = host.address.map(|address| address.to_string()).unwrap_or_default();
    let name = match host.name.as_str() {
        "" => address.as_str(),
        _ if is_default_socket => "localhost",
        name => name,
    };
    let port = host.port.to_string();
    passfile.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut rest = line.trim_end_matches('\r');
        for wanted in [name, &port, database, user] {
            let (field, after) = passfile_field(rest);
            // An escaped star is a star, not a wildcard, hence the look at the text itself.
            let is_wildcard = rest.starts_with("*:");
            if !is_wildcard && field != wanted {
                return None;
            }
            rest = after?;
        }
        // The password ends at the next colon that is not escaped, as with libpq.
        let (password, _) = passfile_field(rest);
        (!password.is_empty()).then(|| Secret::new(password))
    })
}

/// One field of a password file's line, unescaped, and what follows its colon if there is one.
fn passfile_field(text: &str) -> (String, Option<&str>) {
    let mut field = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => field.extend(chars.next().map(|(_, escaped)| escaped)),
            ':' => return (field, Some(&text[at + 1..])),
            c => field.push(c),
        }
    }
    (field, None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lookup(passfile: &str, host: &str, database: &str, user: &str) -> Option<String> {
        let host = Host { name: host.to_owned(), address: None, port: 5432 };
        password_for(passfile, &host, database, user).map(|secret| secret.reveal().clone())
    }

    #[test]
    fn the_first_matching_line_of_a_password_file_counts() {
        let file = "# note\n\
            db1:5432:postgres:backup:not for replication\n\
            db1:5433:*:backup:other port\n\
            db1:5432:replication:backup:a\\:b\\\\c\n\
            db1:5432:*:backup:second\n\
            \\*:*:*:*:star\n\
            localhost:*:*:*:local\n\
            \n\
            short:line\n";
        assert_eq!(lookup(file, "db1", "replication", "backup").unwrap(), "a:b\\c");
        assert_eq!(lookup(file, "db1", "postgres", "backup").unwrap(), "not for replication");
        assert_eq!(lookup(file, "*", "x", "y").unwrap(), "star");
        assert_eq!(lookup(file, "/var/run/postgresql", "x", "y").unwrap(), "local");
        assert_eq!(lookup(file, "db2", "replication", "backup"), None);
        assert_eq!(lookup("*:*:*:*:", "db2", "replication", "backup"), None);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = lookup(&text, "h", "d", "u");
        }
    }
}
