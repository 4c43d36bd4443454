//! `{"env": "NAME"}` and `{"file": "/path"}` in the place of any text.
//!
//! They are replaced in the JSON before it is typed, so that every key takes them without knowing.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::error::Problem;
use crate::runtime::Lookup;

/// The most a secret's file may hold. A key or token is far smaller; a mistaken path may not be.
const FILE_LIMIT: u64 = 64 * 1024;

/// Puts the values in. Returns the places that were filled: what stands there may be secret and is not
/// repeated in messages. A relative path starts at `base`.
pub fn resolve(document: &mut Value, base: &Path, env: Lookup) -> Result<BTreeSet<String>, Vec<Problem>> {
    let mut walk = Walk { base, env, filled: BTreeSet::new(), problems: Vec::new() };
    walk.visit(document, "");
    if walk.problems.is_empty() { Ok(walk.filled) } else { Err(walk.problems) }
}

struct Walk<'a> {
    base: &'a Path,
    env: Lookup<'a>,
    filled: BTreeSet<String>,
    problems: Vec<Problem>,
}

impl Walk<'_> {
    fn visit(&mut self, value: &mut Value, place: &str) {
        match value {
            Value::Object(members) => {
                if let Some(source) = Indirection::of(members) {
                    match self.read(&source) {
                        Ok(text) => {
                            self.filled.insert(place.to_owned());
                            *value = Value::String(text);
                        }
                        Err(why) => self.problems.push(Problem::new(place, why)),
                    }
                    return;
                }
                for (key, member) in members {
                    self.visit(member, &member_place(place, key));
                }
            }
            Value::Array(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.visit(item, &format!("{place}[{index}]"));
                }
            }
            _ => {}
        }
    }

    fn read(&self, source: &Indirection) -> Result<String, String> {
        match source {
            Indirection::Variable(name) => {
                (self.env)(name).ok_or_else(|| format!("environment variable `{name}` is not set"))
            }
            Indirection::File(path) => {
                let full = self.base.join(path);
                let failed =
                    |why: &dyn std::fmt::Display| format!("cannot read file `{}`: {why}", full.display());
                let length = std::fs::metadata(&full).map_err(|error| failed(&error))?.len();
                if length > FILE_LIMIT {
                    return Err(failed(&format_args!("{length} bytes are too many for a secret")));
                }
                let text = std::fs::read_to_string(&full).map_err(|error| failed(&error))?;
                let line = text.strip_suffix('\n').unwrap_or(&text);
                Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
            }
        }
    }
}

enum Indirection {
    Variable(String),
    File(String),
}

impl Indirection {
    /// Only an object with this one key and a text: anything else keeps its own meaning.
    fn of(members: &Map<String, Value>) -> Option<Self> {
        let (key, value) = members.iter().next().filter(|_| members.len() == 1)?;
        let text = value.as_str()?.to_owned();
        match key.as_str() {
            "env" => Some(Self::Variable(text)),
            "file" => Some(Self::File(text)),
            _ => None,
        }
    }
}

/// The place of a member, written as `serde_path_to_error` writes it.
pub fn member_place(place: &str, key: &str) -> String {
    if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn env(name: &str) -> Option<String> {
        (name == "KEY").then(|| "hunter2".to_owned())
    }

    #[test]
    fn variables_and_files_take_the_place_of_text() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "line one\nline two\n").unwrap();
        let mut document = json!({"a": [{"env": "KEY"}, 1], "b": {"c": {"file": "token"}}, "env": "KEY"});
        let filled = resolve(&mut document, folder.path(), &env).unwrap();
        assert_eq!(document, json!({"a": ["hunter2", 1], "b": {"c": "line one\nline two"}, "env": "KEY"}));
        assert_eq!(Vec::from_iter(filled), ["a[0]", "b.c"]);
    }

    #[test]
    fn what_cannot_be_read_is_named_with_its_place() {
        let mut document = json!({"a": {"env": "OTHER"}, "b": [{"file": "/nowhere/token"}]});
        let problems = resolve(&mut document, Path::new("/"), &env).unwrap_err();
        assert_eq!(problems[0].to_string(), "a: environment variable `OTHER` is not set");
        assert!(problems[1].to_string().starts_with("b[0]: cannot read file `/nowhere/token`: "));
    }
}
