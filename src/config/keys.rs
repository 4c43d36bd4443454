//! Every key there is: the JSON Schema, and what in a file is not in it. Pure.
//!
//! The schema comes from [`RawConfig`], so the checker, the published schema and the parser cannot
//! disagree.

use schemars::schema_for;
use serde_json::{Map, Value, json};

use super::error::{Problem, Warning};
use super::indirect::member_place;
use super::raw::RawConfig;

/// Where a key stands, as the pointer to its object in the schema.
const TOP: &str = "";
const COMPRESSION: &str = "/$defs/RawCompression";
const SITE: &str = "/$defs/RawSite";
const STORAGE: &str = "/$defs/RawObjectStorage";

/// PGHoard's keys that are taken and change nothing, each with the reason.
const WITHOUT_EFFECT: &[(&str, &str, &str)] = &[
    (TOP, "$schema", "it is for editors"),
    (TOP, "active", "PGHoard reads it per site only, too"),
    (TOP, "deleter_event_get_timeout", "there is no deletion queue to poll"),
    (TOP, "pg_basebackup_path", "no such program is used"),
    (TOP, "pg_receivexlog_path", "no such program is used"),
    (TOP, "restore_process_count", "`parallelism` decides"),
    (TOP, "tar_executable", "no such program is used"),
    (TOP, "transfer", "`parallelism` decides"),
    (SITE, "basebackup_chunk_size", "packs have one size"),
    (SITE, "basebackup_chunks_in_progress", "nothing is kept on local disk"),
    (SITE, "basebackup_compression_threads", "`parallelism` decides"),
    (SITE, "basebackup_delta_mode_chunk_size", "packs have one size"),
    (SITE, "basebackup_delta_mode_max_retries", "a failed backup is tried again with growing delays"),
    (SITE, "basebackup_delta_mode_min_delta_file_size", "small files always share frames"),
    (SITE, "basebackup_mode", "base backups always come over the replication protocol"),
    (SITE, "basebackup_threads", "`parallelism` decides"),
    (SITE, "pg_basebackup_path", "no such program is used"),
    (SITE, "pg_bin_directory", "no programs of PostgreSQL are used"),
    (SITE, "pg_receivexlog", "nothing is kept on local disk"),
    (SITE, "pg_receivexlog_path", "no such program is used"),
    (SITE, "pg_xlog_directory", "PGHoard has ignored it since 1.6"),
    (SITE, "stream_compression", "compression always happens while streaming"),
    (STORAGE, "min_multipart_chunk_size", "parts have one size"),
    (STORAGE, "segment_size", "parts have one size"),
    (STORAGE, "account_key", FOREIGN),
    (STORAGE, "account_name", FOREIGN),
    (STORAGE, "auth_url", FOREIGN),
    (STORAGE, "auth_version", FOREIGN),
    (STORAGE, "azure_cloud", FOREIGN),
    (STORAGE, "container_name", FOREIGN),
    (STORAGE, "credential_file", FOREIGN),
    (STORAGE, "credentials", FOREIGN),
    (STORAGE, "endpoint_type", FOREIGN),
    (STORAGE, "key", FOREIGN),
    (STORAGE, "password", FOREIGN),
    (STORAGE, "private_key", FOREIGN),
    (STORAGE, "project_domain_id", FOREIGN),
    (STORAGE, "project_domain_name", FOREIGN),
    (STORAGE, "project_id", FOREIGN),
    (STORAGE, "project_name", FOREIGN),
    (STORAGE, "region_name", FOREIGN),
    (STORAGE, "sas_token", FOREIGN),
    (STORAGE, "server", FOREIGN),
    (STORAGE, "service_type", FOREIGN),
    (STORAGE, "tenant_id", FOREIGN),
    (STORAGE, "tenant_name", FOREIGN),
    (STORAGE, "user", FOREIGN),
    (STORAGE, "user_domain_id", FOREIGN),
    (STORAGE, "user_domain_name", FOREIGN),
    (STORAGE, "user_id", FOREIGN),
    (STORAGE, "username", FOREIGN),
];

/// Why keys of stores that this version refuses are passed over.
const FOREIGN: &str = "it belongs to a storage type that this version does not have";

/// The JSON Schema of the configuration file.
pub fn json_schema() -> Value {
    let mut schema = checked_schema();
    let definitions = schema.pointer_mut("/$defs").and_then(Value::as_object_mut);
    for definition in definitions.into_iter().flat_map(Map::values_mut) {
        allow_indirection(definition);
    }
    allow_indirection(&mut schema);
    schema["$defs"]["Indirection"] = json!({
        "description": "A text that is read from an environment variable or a file (one trailing newline is removed).",
        "type": "object",
        "properties": { "env": { "type": "string" }, "file": { "type": "string" } },
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": false,
    });
    schema
}

/// The schema of a file whose indirections are resolved.
fn checked_schema() -> Value {
    let mut schema = schema_for!(RawConfig).to_value();
    for (place, key, why) in WITHOUT_EFFECT {
        if let Some(object) = schema.pointer_mut(place) {
            let description = format!("Accepted without effect: {why}.");
            object["properties"][*key] = json!({ "description": description, "deprecated": true });
        }
    }
    schema
}

/// Lets an indirection stand for every text below.
fn allow_indirection(schema: &mut Value) {
    let Some(members) = schema.as_object_mut() else { return };
    for keyword in ["properties", "items", "additionalProperties", "anyOf"] {
        match members.get_mut(keyword) {
            Some(Value::Object(one)) if keyword != "properties" => {
                let mut inner = Value::Object(std::mem::take(one));
                allow_indirection(&mut inner);
                members[keyword] = inner;
            }
            Some(Value::Object(many)) => many.values_mut().for_each(allow_indirection),
            Some(Value::Array(many)) => many.iter_mut().for_each(allow_indirection),
            _ => {}
        }
    }
    let is_choice = members.contains_key("oneOf");
    let is_text = match members.get("type") {
        Some(Value::String(one)) => one == "string",
        Some(Value::Array(many)) => many.iter().any(|one| one == "string"),
        _ => is_choice,
    };
    if is_text {
        let description = members.remove("description");
        let plain = std::mem::take(members);
        members.insert("anyOf".to_owned(), json!([plain, { "$ref": "#/$defs/Indirection" }]));
        members.extend(description.map(|text| ("description".to_owned(), text)));
    }
}

/// Looks for keys that are unknown or without effect.
pub fn examine(document: &Value) -> (Vec<Warning>, Vec<Problem>) {
    let schema = checked_schema();
    let mut walk = Walk { root: &schema, warnings: Vec::new(), problems: Vec::new() };
    walk.visit(document, &schema, TOP, "");
    (walk.warnings, walk.problems)
}

struct Walk<'a> {
    root: &'a Value,
    warnings: Vec<Warning>,
    problems: Vec<Problem>,
}

impl<'a> Walk<'a> {
    /// `pointer` is where `schema` lies in the root, when it is one of the objects with a table entry.
    fn visit(&mut self, value: &Value, schema: &'a Value, pointer: &str, place: &str) {
        let (schema, pointer) = self.dereference(schema, pointer);
        match value {
            Value::Object(members) => {
                for (key, member) in members {
                    self.visit_member(key, member, schema, pointer, place);
                }
            }
            // Without this serde would fill the object's keys from the array, in order.
            Value::Array(_) if schema["type"] == "object" => {
                self.problems.push(Problem::new(place, "expected an object, found an array"));
            }
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.visit(item, &schema["items"], "-", &format!("{place}[{index}]"));
                }
            }
            _ => {}
        }
    }

    fn visit_member(&mut self, key: &str, member: &Value, schema: &'a Value, pointer: &str, place: &str) {
        let at = member_place(place, key);
        let entry = |table: &[(&str, &str, &'static str)]| {
            table.iter().find(|(place, name, _)| *place == pointer && *name == key).map(|(_, _, why)| *why)
        };
        if let Some(why) = entry(WITHOUT_EFFECT) {
            self.warnings.push(Warning::WithoutEffect { place: at, why });
        } else if let Some(known) = schema["properties"].get(key) {
            self.visit(member, known, "-", &at);
        } else if schema["additionalProperties"].is_object() {
            self.visit(member, &schema["additionalProperties"], "-", &at);
        } else if schema["additionalProperties"] == false {
            let properties = schema["properties"].as_object();
            let advice = nearest(key, properties.into_iter().flat_map(Map::keys).map(String::as_str))
                .map(|known| format!("did you mean `{known}`?"))
                .or_else(|| self.other_place(key));
            self.warnings.push(Warning::UnknownKey { place: at, advice });
        }
    }

    /// Follows `$ref`, and the alternative that is not null of an optional object.
    fn dereference<'p>(&self, schema: &'a Value, pointer: &'p str) -> (&'a Value, &'p str)
    where
        'a: 'p,
    {
        let alternatives = schema["anyOf"].as_array().into_iter().flatten();
        let schema = alternatives.into_iter().find(|one| one.get("$ref").is_some()).unwrap_or(schema);
        match schema["$ref"].as_str().and_then(|target| target.strip_prefix('#')) {
            Some(target) => (self.root.pointer(target).unwrap_or(&Value::Null), target),
            None => (schema, pointer),
        }
    }

    /// Where a key that is unknown here would be known.
    fn other_place(&self, key: &str) -> Option<String> {
        let places = [
            (TOP, "the top level"),
            (SITE, "a site"),
            (STORAGE, "`object_storage`"),
            (COMPRESSION, "`compression`"),
        ];
        let known =
            |pointer: &str| self.root.pointer(pointer).is_some_and(|s| s["properties"].get(key).is_some());
        let (_, name) = places.into_iter().find(|(pointer, _)| known(pointer))?;
        Some(format!("it belongs in {name}"))
    }
}

/// The known key most like `key`, if any is like it at all.
pub fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (distance, nearest) = known.map(|known| (edit_distance(key, known), known)).min()?;
    (distance <= key.len().div_ceil(4)).then_some(nearest)
}

/// Letters to insert, delete, replace or swap with their neighbour to get from `a` to `b`
/// (optimal string alignment).
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn warnings(document: &Value) -> Vec<String> {
        examine(document).0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_the_nearest_known_one() {
        let document = json!({
            "http_prot": 1,
            "backup_sites": {"main": {
                "nodes": [{"host": "db", "pasword": "x"}],
                "object_storage": {"storage_type": "local", "direktory": "/x", "zzz": 1},
                "http_port": 1,
            }},
        });
        assert_eq!(
            warnings(&document),
            [
                "backup_sites.main.http_port: unknown key; it belongs in the top level",
                "backup_sites.main.nodes[0].pasword: unknown key; did you mean `password`?",
                "backup_sites.main.object_storage.direktory: unknown key; did you mean `directory`?",
                "backup_sites.main.object_storage.zzz: unknown key",
                "http_prot: unknown key; did you mean `http_port`?",
            ]
        );
    }

    #[test]
    fn keys_without_effect_are_told_but_do_not_fail_a_check() {
        let document =
            json!({"transfer": {"thread_count": 5}, "backup_sites": {"a": {"basebackup_mode": "delta"}}});
        let (warnings, problems) = examine(&document);
        assert_eq!(warnings.len(), 2);
        assert!(warnings.iter().all(|warning| !warning.fails_check()), "{warnings:?}");
        assert!(problems.is_empty());
    }

    #[test]
    fn every_table_entry_stands_where_the_schema_has_an_object_and_hides_no_key() {
        let schema = schema_for!(RawConfig).to_value();
        for (place, key, _) in WITHOUT_EFFECT {
            let object = schema.pointer(place).unwrap_or_else(|| panic!("no {place}"));
            assert_eq!(object["additionalProperties"], false, "{place}");
            assert!(
                object["properties"].get(key).is_none(),
                "`{key}` is read, and said to be without effect"
            );
        }
    }

    #[test]
    fn swapped_letters_count_once() {
        assert_eq!(edit_distance("prot", "port"), 1);
        assert_eq!(edit_distance("", "abc"), 3);
    }

    proptest! {
        #[test]
        fn distance_is_a_distance(a in "[a-c]{0,6}", b in "[a-c]{0,6}") {
            let distance = edit_distance(&a, &b);
            prop_assert_eq!(distance, edit_distance(&b, &a));
            prop_assert_eq!(distance == 0, a == b);
            prop_assert!(distance <= a.len().max(b.len()));
        }
    }
}
