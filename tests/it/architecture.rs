//! Holds the house to its plan: who may know whom, and which files decide without touching the world.
//!
//! The sources are read as text. Comments and literals do not count, so that a doc link may point anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Every room and its level. A room never imports a higher one.
const LEVELS: &[(&str, u32)] = &[
    ("postgres", 0),
    ("codec", 0),
    ("secret", 0),
    ("storage", 1),
    ("runtime", 1),
    ("observe", 1),
    ("repository", 2),
    ("catalog", 3),
    ("wal", 4),
    ("basebackup", 4),
    ("restore", 4),
    ("retention", 4),
    ("verify", 4),
    ("serve", 4),
    ("pghoard", 4),
    ("agent", 5),
    ("config", 5),
    ("cli", 6),
];

/// The rooms of this level never import each other: the agent brings them together.
const INDEPENDENT: u32 = 4;

/// Crates that only some rooms know.
const PRIVATE_CRATES: &[(&str, &[&str])] = &[
    ("object_store", &["storage", "repository"]),
    ("hyper", &["serve"]),
    ("hyper_util", &["serve"]),
    ("clap", &["cli"]),
];

/// What a file that calls itself pure does without, its tests excepted.
const IMPURE: &[&str] = &[
    "async",
    ".await",
    "tracing::",
    "tokio::",
    "std::fs",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "ToSocketAddrs",
    "std::env",
    "std::process",
    "fs::",
    "SystemTime::now",
    "Timestamp::now",
    "Instant::now",
];

/// Names that say nothing.
const EMPTY_NAMES: &[&str] = &["utils", "util", "common", "helpers", "types", "misc"];

/// A file longer than this tells more than one story.
const LINE_LIMIT: usize = 900;

struct Source {
    /// Relative to `src`, with `/`.
    path: String,
    text: String,
}

impl Source {
    /// `wal` for `wal/receiver.rs`, `secret` for `secret.rs`.
    fn room(&self) -> &str {
        self.path.split('/').next().expect("split gives one part at least").trim_end_matches(".rs")
    }

    /// The crate root and the program bring everything together.
    fn is_root(&self) -> bool {
        matches!(self.path.as_str(), "lib.rs" | "main.rs")
    }

    /// A sentence of its module docs is `Pure.`, or begins with `Pure:`.
    fn is_pure(&self) -> bool {
        let docs: Vec<&str> =
            self.text.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim).collect();
        let docs = docs.join(" ");
        docs.match_indices("Pure").any(|(at, word)| {
            let begins = docs[..at].trim_end().is_empty() || docs[..at].trim_end().ends_with(['.', ':']);
            // An empty doc line leaves two blanks: a new paragraph, whatever the last one ended with.
            let ends = docs[at + word.len()..].starts_with(['.', ':', ';', ',']);
            ends && (begins || docs[..at].ends_with("  "))
        })
    }
}

fn level(room: &str) -> Option<u32> {
    LEVELS.iter().find(|(name, _)| *name == room).map(|(_, level)| *level)
}

/// Everything in `source` that the plan forbids, as sentences.
fn violations(source: &Source) -> Vec<String> {
    let code = code_only(&source.text);
    let shipped = without_tests(&code);
    let mut found = Vec::new();
    let mut report = |what: String| found.push(format!("src/{}: {what}", source.path));

    for part in source.path.split('/') {
        if EMPTY_NAMES.contains(&part.trim_end_matches(".rs")) {
            report(format!("`{part}` says nothing about what is inside"));
        }
    }
    let line_count = source.text.lines().count();
    if line_count > LINE_LIMIT {
        report(format!("{line_count} lines; at {LINE_LIMIT} a file tells more than one story"));
    }
    if source.path.split('/').count() > 2 {
        report("the tree has two levels below `src`, never three".to_owned());
    }
    if shipped.contains("super::super::") {
        report("`super::super::`: name another room by `crate::`".to_owned());
    }
    for (name, rooms) in PRIVATE_CRATES {
        if words(&code).any(|(word, _)| word == *name) && !rooms.contains(&source.room()) {
            report(format!("`{name}` belongs to {}/ alone", rooms.join("/ and ")));
        }
    }
    if source.is_pure() {
        for needle in IMPURE.iter().filter(|needle| has(shipped, needle)) {
            report(format!("calls itself pure and has `{needle}`"));
        }
    }
    if source.is_root() {
        return found;
    }
    let Some(own) = level(source.room()) else {
        report(format!("`{}` is not in the table of rooms", source.room()));
        return found;
    };
    for other in imports(&code).iter().filter(|other| *other != source.room()) {
        match level(other) {
            None => report(format!("imports `crate::{other}`, which is not in the table of rooms")),
            Some(theirs) if theirs > own => {
                report(format!("level {own} imports `{other}` of level {theirs}"));
            }
            Some(INDEPENDENT) if own == INDEPENDENT => {
                report(format!("imports its neighbour `{other}`; the agent brings them together"));
            }
            Some(_) => {}
        }
    }
    found
}

/// Rooms of one level may know each other one way, never in a circle: names two that do.
fn circle(sources: &[Source]) -> Option<(String, String)> {
    let mut arrows: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for source in sources.iter().filter(|source| !source.is_root()) {
        let mut imports = imports(&code_only(&source.text));
        imports.remove(source.room());
        arrows.entry(source.room()).or_default().append(&mut imports);
    }
    let reachable = |from: &str| {
        let mut seen = BTreeSet::new();
        let mut next: Vec<&str> = vec![from];
        while let Some(room) = next.pop() {
            for other in arrows.get(room).into_iter().flatten() {
                if seen.insert(other.as_str()) {
                    next.push(other);
                }
            }
        }
        seen
    };
    arrows.keys().find_map(|room| {
        let there = reachable(room);
        let back = there.iter().find(|other| *other != room && reachable(other).contains(room))?;
        Some(((*room).to_owned(), (*back).to_owned()))
    })
}

/// The rooms named by `crate::room` and by `crate::{room, …}`.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        // `$crate::` in a macro and `some_crate::` are something else.
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
            continue;
        }
        let rest = code[at + "crate::".len()..].trim_start();
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0_u32;
            let mut fresh = true;
            for (position, character) in group.char_indices() {
                match character {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => fresh = true,
                    _ if fresh && (character.is_alphabetic() || character == '_') => {
                        found.insert(identifier(&group[position..]));
                        fresh = false;
                    }
                    _ => {}
                }
            }
        } else {
            found.insert(identifier(rest));
        }
    }
    found.remove("");
    found
}

/// What comes before the first module of tests.
fn without_tests(code: &str) -> &str {
    const MARK: &str = "#[cfg(test)]\n";
    let is_module = |item: &str| {
        let item = item.trim_start();
        let item = item
            .strip_prefix("pub")
            .map_or(item, |rest| rest.trim_start_matches("(crate)").trim_start_matches("(super)"));
        item.trim_start().starts_with("mod ")
    };
    let tests = code.match_indices(MARK).find(|(at, mark)| is_module(&code[at + mark.len()..]));
    tests.map_or(code, |(at, _)| &code[..at])
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect()
}

/// Identifiers and where they begin.
fn words(code: &str) -> impl Iterator<Item = (&str, usize)> {
    code.split(|character: char| !character.is_alphanumeric() && character != '_')
        .filter(|word| !word.is_empty())
        .map(|word| (word, word.as_ptr().addr() - code.as_ptr().addr()))
}

/// Whether `needle` is in `code` and not merely the end or the beginning of a longer name.
fn has(code: &str, needle: &str) -> bool {
    let part_of_name = |character: char| character.is_alphanumeric() || character == '_';
    code.match_indices(needle).any(|(at, _)| {
        let glued_before = needle.starts_with(part_of_name) && code[..at].ends_with(part_of_name);
        let glued_after =
            needle.ends_with(part_of_name) && code[at + needle.len()..].starts_with(part_of_name);
        !glued_before && !glued_after
    })
}

/// `text` without comments and without what stands in literals.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) =
            raw_string(rest).filter(|_| !code.ends_with(|c: char| c.is_alphanumeric()))
        {
            length
        } else if character == '"' {
            quoted(rest, '"')
        } else if character == '\'' && is_character_literal(rest) {
            quoted(rest, '\'')
        } else {
            code.push(character);
            rest = &rest[character.len_utf8()..];
            continue;
        };
        rest = &rest[skipped..];
    }
    code
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0_u32;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

/// The length of `r"…"`, `r#"…"#`, `br"…"` at the beginning of `text`.
fn raw_string(text: &str) -> Option<usize> {
    let hashes_and_more = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let body = hashes_and_more.trim_start_matches('#');
    let hashes = hashes_and_more.len() - body.len();
    let body = body.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let opened = text.len() - body.len();
    Some(body.find(&end).map_or(text.len(), |at| opened + at + end.len()))
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// `'x'` and `'\n'`, not the lifetime `'x`.
fn is_character_literal(text: &str) -> bool {
    let mut inside = text.chars().skip(1);
    match inside.next() {
        Some('\\') => true,
        Some(_) => inside.next() == Some('\''),
        None => false,
    }
}

fn sources() -> Vec<Source> {
    fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).expect("read a directory of the sources") {
            let path = entry.expect("read a directory of the sources").path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    paths
        .into_iter()
        .map(|path| Source {
            text: fs::read_to_string(&path).expect("read a source file"),
            path: path.strip_prefix(&root).expect("it lies below").to_string_lossy().into_owned(),
        })
        .collect()
}

#[test]
fn every_room_knows_only_what_it_may() {
    let sources = sources();
    assert!(sources.len() > 20, "only {} source files found", sources.len());
    let found: Vec<String> = sources.iter().flat_map(violations).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
    assert_eq!(circle(&sources), None);
}

#[test]
fn the_plan_names_every_folder() {
    let rooms: BTreeSet<String> = sources().iter().map(|source| source.room().to_owned()).collect();
    for room in rooms.iter().filter(|room| !matches!(room.as_str(), "lib" | "main")) {
        assert!(level(room).is_some(), "src/{room} is not in the table of rooms");
    }
}

#[test]
fn what_the_plan_forbids_is_found() {
    let caught = |path: &str, text: &str, word: &str| {
        let found = violations(&Source { path: path.to_owned(), text: text.to_owned() });
        assert!(
            found.len() == 1 && found[0].contains(word),
            "{path}: {text:?} gives {found:?}, not `{word}`"
        );
    };
    caught("wal/receiver.rs", "use crate::agent::Site;", "level 4 imports `agent` of level 5");
    caught(
        "postgres/lsn.rs",
        "use crate::{\n    codec,\n    wal::{Ledger, assembler},\n};",
        "level 0 imports `wal`",
    );
    caught("catalog/mod.rs", "fn f(x: &crate::restore::Plan) {}", "`restore`");
    caught("wal/receiver.rs", "use crate::basebackup::Due;", "neighbour `basebackup`");
    caught("wal/receiver.rs", "use crate::elsewhere::Due;", "`crate::elsewhere`");
    caught("cellar/mod.rs", "", "`cellar` is not in the table");
    caught("wal/receiver.rs", "use super::super::agent::Site;", "super::super");
    caught("wal/receiver.rs", "use object_store::path::Path;", "`object_store`");
    caught("cli/run.rs", "use hyper::Request;", "`hyper`");
    caught("main.rs", "use clap::Parser;", "`clap`");
    caught("wal/utils.rs", "", "`utils.rs` says nothing");
    caught("wal/deep/receiver.rs", "", "two levels");
    caught("wal/receiver.rs", &"\n".repeat(LINE_LIMIT + 1), "901 lines");
    let pure = "//! Adds.\n//!\n//! Pure. The caller knows the time.\n";
    caught("wal/ledger.rs", "//! Adds two numbers. Pure.\nasync fn f() {}", "`async`");
    caught("wal/ledger.rs", &format!("{pure}async fn f() {{}}"), "`async`");
    caught("wal/ledger.rs", &format!("{pure}fn f() {{ tracing::info!(\"x\") }}"), "`tracing::`");
    caught("wal/ledger.rs", &format!("{pure}fn f() {{ jiff::Timestamp::now(); }}"), "`Timestamp::now`");
}

#[test]
fn what_the_plan_allows_is_left_alone() {
    let pure = "//! Adds.\n//!\n//! Pure: the caller knows the time.\n";
    for (path, text) in [
        ("wal/receiver.rs", "use crate::{postgres::Lsn, repository};\nuse crate::wal::ledger;"),
        (
            "wal/receiver.rs",
            "// crate::agent takes it from here\n/* crate::cli */\nconst A: &str = \"crate::cli\";",
        ),
        (
            "wal/receiver.rs",
            "/// As [`crate::agent`] says.\nconst A: (&str, char) = (r#\"\"crate::cli\"#, '\"');",
        ),
        (
            "wal/receiver.rs",
            "fn f<'a>(x: &'a str) { async {}; }\nmacro_rules! m { () => { $crate::wal::f() } }",
        ),
        ("config/model.rs", "use crate::agent::Site;"),
        ("lib.rs", "pub mod cli;\nuse crate::cli::run;"),
        (
            "wal/ledger.rs",
            &format!(
                "{pure}fn asynchronous() {{ my_fs::read() }} // async\n#[cfg(test)]\nmod tests {{ use std::fs; }}"
            ),
        ),
        ("wal/ledger.rs", "#[cfg(test)]\npub(crate) mod example {\n    use super::super::backup;\n}"),
        ("wal/ledger.rs", "//! Adds.\n//!\n//! Purely as it happens.\nasync fn f() {}"),
    ] {
        let found = violations(&Source { path: path.to_owned(), text: text.to_owned() });
        assert_eq!(found, [""; 0], "{path}: {text}");
    }
}

#[test]
fn a_circle_of_rooms_is_found() {
    let source = |path: &str, text: &str| Source { path: path.to_owned(), text: text.to_owned() };
    let straight =
        [source("agent/mod.rs", "use crate::config::Config;"), source("config/mod.rs", "use crate::secret;")];
    assert_eq!(circle(&straight), None);
    let round =
        [source("agent/mod.rs", "use crate::config::Config;"), source("config/raw.rs", "use crate::agent;")];
    assert_eq!(circle(&round), Some(("agent".to_owned(), "config".to_owned())));
}
