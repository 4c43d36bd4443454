//! The metadata of an object as it is, for objects of other programs.

use std::collections::BTreeMap;

use jiff::Timestamp;
use object_store::{Attribute, GetOptions};

use super::error::Error;
use super::name::ObjectName;
use super::repository::{Repository, timestamp};

/// What the store tells about an object, all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    pub stored_length: u64,
    pub last_modified: Timestamp,
    /// Keys in lower case and with hyphens, whatever the store made of them. A leading underscore stays.
    pub metadata: BTreeMap<String, String>,
}

impl Repository {
    /// Asks for an object without reading it.
    pub async fn describe(&self, name: ObjectName) -> Result<Described, Error> {
        let result = self.get_opts(name, GetOptions { head: true, ..GetOptions::default() }).await?;
        let metadata = result
            .attributes
            .iter()
            .filter_map(|(attribute, value)| match attribute {
                Attribute::Metadata(key) => Some((as_written(key), value.to_string())),
                _ => None,
            })
            .collect();
        Ok(Described { stored_length: result.meta.size, last_modified: timestamp(&result.meta), metadata })
    }
}

fn as_written(key: &str) -> String {
    let key = key.to_ascii_lowercase();
    match key.strip_prefix('_') {
        Some(rest) => format!("_{}", rest.replace('_', "-")),
        None => key.replace('_', "-"),
    }
}
