//! Connection strings: made from keywords, and shown without their passwords. Pure.
//!
//! What a connection string *means* is the business of `postgres`; here it is only written correctly.

use super::keys::nearest;
use crate::postgres::{ConnInfo, ConnInfoError};

/// Every keyword libpq 18 knows, from its documentation (section 32.1.2).
pub const KEYWORDS: &[&str] = &[
    "application_name",
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "dbname",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "load_balance_hosts",
    "max_protocol_version",
    "min_protocol_version",
    "options",
    "passfile",
    "password",
    "port",
    "replication",
    "require_auth",
    "requirepeer",
    "scram_client_key",
    "scram_server_key",
    "service",
    "sslcert",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslkey",
    "sslkeylogfile",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
    "sslsni",
    "target_session_attrs",
    "tcp_user_timeout",
    "user",
];

/// Writes keywords as a libpq connection string: every value in quotes, `'` and `\` escaped.
pub fn conninfo<'a>(keywords: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (keyword, value) in keywords {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(keyword);
        text.push_str("='");
        for c in value.chars() {
            if matches!(c, '\'' | '\\') {
                text.push('\\');
            }
            text.push(c);
        }
        text.push('\'');
    }
    text
}

/// The connection string with `***` for every password in it. What cannot be understood is not shown at
/// all, since the password might be anywhere in it.
pub fn without_passwords(conninfo: &str) -> String {
    if conninfo.starts_with("postgres://") || conninfo.starts_with("postgresql://") {
        return uri_without_passwords(conninfo);
    }
    match keywords_of(conninfo) {
        Some(keywords) => {
            let shown = keywords.iter().map(|(keyword, value)| {
                (keyword.as_str(), if is_secret_keyword(keyword) { "***" } else { value.as_str() })
            });
            self::conninfo(shown)
        }
        None => "***".to_owned(),
    }
}

fn is_secret_keyword(keyword: &str) -> bool {
    keyword.contains("password") || keyword.starts_with("scram_")
}

/// By hand rather than with a URL parser: libpq takes what such a parser refuses (several hosts, a
/// percent-encoded socket directory).
fn uri_without_passwords(uri: &str) -> String {
    let (base, query) = uri.split_once('?').map_or((uri, None), |(base, query)| (base, Some(query)));
    let (scheme, rest) = base.split_once("://").unwrap_or(("", base));
    // The last `@`, as a password that should have been percent-encoded may hold one, too.
    let mut shown = match rest.rsplit_once('@') {
        Some((userinfo, hosts)) => match userinfo.split_once(':') {
            Some((user, _)) => format!("{scheme}://{user}:***@{hosts}"),
            None => format!("{scheme}://{userinfo}@{hosts}"),
        },
        None => format!("{scheme}://{rest}"),
    };
    for (i, parameter) in query.into_iter().flat_map(|query| query.split('&')).enumerate() {
        shown.push(if i == 0 { '?' } else { '&' });
        match parameter.split_once('=') {
            // An encoded keyword could spell `password`.
            Some((keyword, _)) if is_secret_keyword(keyword) || keyword.contains('%') => {
                shown.push_str(keyword);
                shown.push_str("=***");
            }
            _ => shown.push_str(parameter),
        }
    }
    shown
}

/// `keyword = value` pairs by libpq's rules: quotes around values with spaces, backslash escapes.
fn keywords_of(conninfo: &str) -> Option<Vec<(String, String)>> {
    let mut keywords = Vec::new();
    let mut rest = conninfo.trim_start();
    while !rest.is_empty() {
        let (keyword, after) = rest.split_once('=')?;
        let keyword = keyword.trim_end();
        if keyword.is_empty() || keyword.contains(char::is_whitespace) {
            return None;
        }
        let (value, after) = value_of(after.trim_start())?;
        keywords.push((keyword.to_owned(), value));
        rest = after.trim_start();
    }
    Some(keywords)
}

/// The value at the start of `text`, and what follows it; `None` when a quote is not closed.
fn value_of(text: &str) -> Option<(String, &str)> {
    let (quoted, body) = text.strip_prefix('\'').map_or((false, text), |body| (true, body));
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Some((value, &body[at + 1..])),
            c if !quoted && c.is_whitespace() => return Some((value, &body[at..])),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

/// A replication slot name made from a site's name: lower-case letters, digits and underscores, at most 63.
pub fn default_slot(site: &str) -> String {
    let legal = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    "pgkeep_".chars().chain(site.chars().map(legal)).take(SLOT_NAME_MAX).collect()
}

/// The parsed string, or what is wrong with it without repeating any of it that could be a password: where
/// quotes are missing, a piece of one may look like a keyword.
pub fn parsed(conninfo: &str) -> Result<ConnInfo, String> {
    conninfo.parse().map_err(|error| match error {
        ConnInfoError::NoEquals(_) => {
            "a keyword without `=` in the connection string; values with spaces need quotes".to_owned()
        }
        ConnInfoError::UnknownKeyword(keyword) => match nearest(&keyword, KEYWORDS.iter().copied()) {
            Some(known) => format!("unknown connection parameter; did you mean `{known}`?"),
            None => "unknown connection parameter".to_owned(),
        },
        other => other.to_string(),
    })
}

/// `NAMEDATALEN` - 1.
const SLOT_NAME_MAX: usize = 63;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::postgres::SlotName;

    #[test]
    fn keywords_are_quoted_for_libpq() {
        assert_eq!(
            conninfo([("host", "db 1"), ("password", r"a'b\c"), ("user", "")]),
            r"host='db 1' password='a\'b\\c' user=''"
        );
    }

    #[test]
    fn passwords_are_not_shown_in_any_form() {
        for (conninfo, shown) in [
            ("host=db password=hunter2 user=u", "host='db' password='***' user='u'"),
            ("password = 'hunter2 \\' hunter2' host=db", "password='***' host='db'"),
            ("sslpassword=hunter2", "sslpassword='***'"),
            ("postgres://u:hunter2@db:1/x", "postgres://u:***@db:1/x"),
            ("postgresql://u:hunter2@hunter2@db", "postgresql://u:***@db"),
            ("postgresql://db/x?user=u&password=hunter2", "postgresql://db/x?user=u&password=***"),
            ("postgresql://db/x?p%61ssword=hunter2", "postgresql://db/x?p%61ssword=***"),
            ("postgres://u@a:1,b:2/x?sslmode=require", "postgres://u@a:1,b:2/x?sslmode=require"),
            ("password='hunter2", "***"),
            ("hunter2", "***"),
            ("", ""),
        ] {
            assert_eq!(without_passwords(conninfo), shown);
        }
    }

    #[test]
    fn a_slot_name_is_made_legal() {
        assert_eq!(default_slot("Main-DB.1"), "pgkeep_main_db_1");
        assert_eq!(default_slot(&"x".repeat(100)).len(), 63);
    }

    #[test]
    fn what_is_wrong_with_a_connection_string_is_said_without_repeating_it() {
        for (conninfo, expected) in [
            ("password=my hunter2", "quotes"),
            ("password=my hunter2=x", "unknown connection parameter"),
            ("host=db pasword=hunter2", "did you mean `password`?"),
        ] {
            let why = parsed(conninfo).unwrap_err();
            assert!(why.contains(expected) && !why.contains("hunter2"), "{why}");
        }
    }

    proptest! {
        #[test]
        fn written_keywords_read_back(values in proptest::collection::vec(".{0,20}", 0..5)) {
            let pairs: Vec<_> = KEYWORDS.iter().copied().zip(values.iter().map(String::as_str)).collect();
            let read = keywords_of(&conninfo(pairs.iter().copied())).unwrap();
            prop_assert!(read.iter().map(|(k, v)| (k.as_str(), v.as_str())).eq(pairs));
        }

        #[test]
        fn no_password_survives(user in "[a-z]{1,8}", password in "[0-9!#$%^*]{8,12}") {
            let keywords = conninfo([("user", user.as_str()), ("password", password.as_str())]);
            prop_assert!(!without_passwords(&keywords).contains(&password));
            let uri = format!("postgres://{user}:{password}@db/x?application_name=a");
            prop_assert!(!without_passwords(&uri).contains(&password));
        }

        #[test]
        fn every_default_slot_is_legal(site in ".{0,80}") {
            prop_assert!(default_slot(&site).parse::<SlotName>().is_ok());
        }
    }
}
