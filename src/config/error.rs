//! What can be wrong with a configuration, and where. Pure.

use std::fmt;
use std::path::PathBuf;

/// Something that keeps a configuration from being used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// As in `backup_sites.main.nodes[0].port`, or the name of an environment variable.
    pub place: String,
    pub why: String,
}

impl Problem {
    pub fn new(place: impl Into<String>, why: impl Into<String>) -> Self {
        Self { place: place.into(), why: why.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.place.is_empty() { f.write_str(&self.why) } else { write!(f, "{}: {}", self.place, self.why) }
    }
}

/// Something that a person should look at although the configuration works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// No such key; `advice` names what may have been meant.
    UnknownKey { place: String, advice: Option<String> },
    /// It will not do what its author probably expects.
    Doubtful { place: String, why: String },
    /// A key of PGHoard that changes nothing here.
    WithoutEffect { place: String, why: &'static str },
}

impl Warning {
    /// Whether `config check` fails for it.
    pub fn fails_check(&self) -> bool {
        matches!(self, Self::UnknownKey { .. } | Self::Doubtful { .. })
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { place, advice: None } => write!(f, "{place}: unknown key"),
            Self::UnknownKey { place, advice: Some(advice) } => {
                write!(f, "{place}: unknown key; {advice}")
            }
            Self::Doubtful { place, why } => write!(f, "{place}: {why}"),
            Self::WithoutEffect { place, why } => write!(f, "{place}: without effect; {why}"),
        }
    }
}

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no configuration")]
    Missing,
    #[error("cannot read configuration file `{}`", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{origin}: line {line}, column {column}: {why}")]
    Syntax { origin: String, line: usize, column: usize, why: String },
    /// Never empty.
    #[error("{}", one_a_line(problems))]
    Invalid { problems: Vec<String> },
    #[error("no site `{name}` in the configuration, which has {known}")]
    NoSuchSite { name: String, known: String },
    #[error("the configuration has several sites: {known}")]
    SiteNotNamed { known: String },
    #[error("the configuration has no sites")]
    NoSites,
}

fn one_a_line(problems: &[String]) -> String {
    problems.join("\n")
}

impl Error {
    /// Problems found in `origin` (a file, or nothing for the environment).
    pub(super) fn invalid(origin: Option<&str>, problems: impl IntoIterator<Item = Problem>) -> Self {
        let shown = |problem: Problem| match origin {
            Some(origin) => format!("{origin}: {problem}"),
            None => problem.to_string(),
        };
        Self::Invalid { problems: problems.into_iter().map(shown).collect() }
    }

    /// What the operator can do next.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Missing => {
                "give a file with `--config FILE` or `PGKEEP_CONFIG`, or set `PGKEEP_STORAGE` to a place \
                 such as `s3://bucket/prefix` or `file:///var/backups/pg`"
            }
            Self::Invalid { .. } => "`pgkeep config schema` prints every key and what it takes",
            Self::NoSuchSite { .. } | Self::SiteNotNamed { .. } => "name one of them with `--site NAME`",
            Self::NoSites => "add one under `backup_sites`; `config-examples/minimal.json` shows how",
            Self::Read { .. } | Self::Syntax { .. } => return None,
        };
        Some(hint.to_owned())
    }
}

/// serde's message in the words of this program: `expected a port number, found "x"`.
///
/// `hide` leaves out the value found, for places that may hold a secret.
pub(super) fn reworded(message: &str, hide: bool) -> String {
    let types = ["invalid type: ", "invalid value: "];
    if let Some(rest) = types.iter().find_map(|prefix| message.strip_prefix(prefix))
        && let Some((found, expected)) = rest.rsplit_once(", expected ")
    {
        let found = found.strip_prefix("string ").unwrap_or(found);
        // `Option` and friends are our words, not the reader's.
        let expected = expected.strip_prefix("option of ").unwrap_or(expected);
        return found_instead(expected, found, hide);
    }
    if let Some((found, expected)) =
        message.strip_prefix("unknown variant ").and_then(|rest| rest.split_once(", expected "))
    {
        let expected = expected.replace("one of ", "");
        return found_instead(&expected, &found.replace('`', "\""), hide);
    }
    if hide { "not valid (the value is not shown, it may be secret)".to_owned() } else { message.to_owned() }
}

fn found_instead(expected: &str, found: &str, hide: bool) -> String {
    let expected = match expected {
        "a boolean" => "true or false",
        "u8" | "u16" | "u32" | "i32" => "a whole number in range",
        "f64" => "a number",
        "a map" => "an object",
        "a sequence" => "an array",
        structure if structure.starts_with("struct ") => "an object",
        "a borrowed string" | "a string" | "path string" => "text",
        other => other,
    };
    let found = if hide { "a value that is not shown" } else { found };
    format!("expected {expected}, found {found}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serde_messages_become_ours() {
        for (message, ours) in [
            (r#"invalid value: string "x", expected a port number"#, r#"expected a port number, found "x""#),
            ("invalid type: integer `5`, expected a boolean", "expected true or false, found integer `5`"),
            (
                "unknown variant `lzma`, expected `snappy` or `zstd`",
                "expected `snappy` or `zstd`, found \"lzma\"",
            ),
            ("something else", "something else"),
        ] {
            assert_eq!(reworded(message, false), ours);
        }
    }

    #[test]
    fn a_hidden_value_appears_nowhere() {
        for message in [
            r#"invalid value: string "hunter2", expected a port number"#,
            "unknown variant `hunter2`, expected `a` or `b`",
            "odd message about hunter2",
        ] {
            assert!(!reworded(message, true).contains("hunter2"));
        }
    }
}
