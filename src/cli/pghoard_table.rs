//! PGHoard's table of base backups.
//!
//! Pure.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use super::pghoard::python_text;

const MEBIBYTE: u64 = 1 << 20;

/// One base backup.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub name: String,
    pub size: u64,
    pub metadata: Map<String, Value>,
}

impl Row {
    /// A row from what `GET /<site>/basebackup` lists; `None` when it has no name.
    pub fn of_json(item: &Value) -> Option<Self> {
        Some(Self {
            name: item["name"].as_str()?.to_owned(),
            size: item["size"].as_u64().unwrap_or(0),
            metadata: item["metadata"].as_object().cloned().unwrap_or_default(),
        })
    }

    fn number(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key)? {
            Value::String(text) => text.parse().ok(),
            value => value.as_u64(),
        }
    }

    fn start_time(&self) -> String {
        let Some(text) = self.metadata.get("start-time").and_then(Value::as_str) else {
            return "n/a".to_owned();
        };
        let zoned = text.parse::<Timestamp>().ok();
        // Without a zone it is UTC.
        let time =
            zoned.or_else(|| Some(text.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp()));
        time.map_or_else(|| text.to_owned(), |time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
    }

    fn sizes(&self) -> (String, String) {
        let stored = self.number("total-size-enc").unwrap_or(self.size);
        let plain = self.number("total-size-plain").or_else(|| self.number("original-file-size"));
        let plain = plain.filter(|size| *size > 0);
        let megabytes = |size: u64| format!("{} MB", size / MEBIBYTE);
        (megabytes(stored), plain.map_or_else(|| "n/a".to_owned(), megabytes))
    }
}

/// The table under its caption, without the last line's end.
pub fn table(caption: &str, mut rows: Vec<Row>, verbose: bool) -> String {
    rows.sort_by(|one, other| one.name.cmp(&other.name));
    let mut text = format!("{caption} \n\n");
    line(&mut text, ["Basebackup", "Backup size", "Orig size", "Start time"]);
    text.push('\n');
    line(
        &mut text,
        ["-".repeat(40), "-".repeat(11), "-".repeat(11), "-".repeat(20)].each_ref().map(String::as_str),
    );
    for row in &rows {
        let (stored, plain) = row.sizes();
        text.push('\n');
        line(&mut text, [&row.name, &stored, &plain, &row.start_time()]);
        if verbose {
            let others = row.metadata.iter().filter(|(key, _)| *key != "start-time");
            let others: Vec<String> =
                others.map(|(key, value)| format!("{}: {}", python_text(key), python_value(value))).collect();
            write!(text, "\n    metadata: {{{}}}", others.join(", ")).expect("a String takes any text");
        }
    }
    text
}

fn line(text: &mut String, [name, stored, plain, time]: [&str; 4]) {
    write!(text, "{name:40}  {stored:>11}  {plain:>11}  {time:20}").expect("a String takes any text");
}

fn python_value(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::String(text) => python_text(text),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn looks_like_pghoards() {
        let items = [
            json!({ "name": "default/basebackup/2026-11-21_01-38_0", "size": 3 << 20, "metadata": {
                "start-time": "2026-11-21T02:38:21+01:00", "original-file-size": "41943040" } }),
            json!({ "name": "default/basebackup/2026-11-20_01-39_0.00000000.pghoard", "size": 4000, "metadata": {
                "start-time": "2026-11-20T01:39:25", "total-size-enc": "5242880", "total-size-plain": "0" } }),
        ];
        let rows: Vec<Row> = items.iter().map(|item| Row::of_json(item).unwrap()).collect();
        let expected = "\
Available 'default' basebackups: \n
Basebackup                                Backup size    Orig size  Start time          \n\
----------------------------------------  -----------  -----------  --------------------\n\
default/basebackup/2026-11-20_01-39_0.00000000.pghoard         5 MB          n/a  2026-11-20T01:39:25Z\n\
default/basebackup/2026-11-21_01-38_0            3 MB        40 MB  2026-11-21T01:38:21Z";
        assert_eq!(table("Available 'default' basebackups:", rows.clone(), false), expected);
        let verbose = table("x", rows, true);
        assert!(verbose.ends_with("\n    metadata: {'original-file-size': '41943040'}"), "{verbose}");
    }
}
