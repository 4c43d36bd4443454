//! What is stored with an object: PGHoard's keys, so that either program reads the other's WAL, and our
//! digest.
//!
//! Pure. All of it may be missing. Values are ASCII, because other values make an object unreadable on some
//! stores. S3 gives keys back in lower case and others exchange `-` for `_`, so they are read without
//! regard to either.

use object_store::{Attribute, Attributes};

use crate::codec::{Compression, Digest, Expected, KeyId, NamedHash};

const COMPRESSION_ALGORITHM: &str = "compression-algorithm";
const COMPRESSION_LEVEL: &str = "compression-level";
const ORIGINAL_FILE_SIZE: &str = "original-file-size";
const PG_VERSION: &str = "pg-version";
const HOST: &str = "host";
const PRESERVE_BACKUP: &str = "preserve-backup";
const PRESERVE_UNTIL: &str = "preserve-until";
const ENCRYPTION_KEY_ID: &str = "encryption-key-id";
const HASH: &str = "hash";
/// SHA-256 of the stored bytes, which PGHoard's local store keeps. Its key is `_hash`.
const STORED_HASH: &str = "-hash";
const HASH_ALGORITHM: &str = "hash-algorithm";
const CONTENT_LENGTH: &str = "content-length";
/// Ours: BLAKE3 of the plaintext.
const DIGEST: &str = "pgkeep-blake3";
/// Ours, on what is sealed with its backup's own key.
const SEAL: &str = "pgkeep-seal";
const SEAL_ALGORITHM: &str = "aes-256-gcm";
/// Ours, on encrypted WAL: what a host without the private key has to know of its content.
const SUMMARY: &str = "pgkeep-summary";

/// How the metadata says an object is encoded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StoredAs {
    /// There is no metadata; the object's first bytes must tell.
    #[default]
    Undeclared,
    Declared(Compression),
    /// A compression that this version cannot undo, in words.
    Unsupported(String),
}

/// An object's metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectMetadata {
    pub stored_as: StoredAs,
    /// Set for what is in PGHoard's envelope.
    pub key: Option<KeyId>,
    /// Set for what is sealed with its backup's own key, which is in the backup's record.
    pub is_sealed: bool,
    pub compression_level: Option<i32>,
    /// Bytes of plaintext. Not known for objects that were streamed.
    pub plaintext_length: Option<u64>,
    /// As `server_version_num` has it, `150020`.
    pub pg_version: Option<u32>,
    /// The writer's host name.
    pub host: Option<String>,
    /// Of the plaintext, as PGHoard has it beside WAL.
    pub hash: Option<NamedHash>,
    /// Of the bytes as they are stored; PGHoard's local store has it.
    pub stored_hash: Option<NamedHash>,
    /// Bytes as they are stored.
    pub stored_length: Option<u64>,
    /// Of the plaintext. Not known for objects that were streamed, nor for PGHoard's.
    pub digest: Option<Digest>,
    /// See `summary.rs`.
    pub summary: Option<String>,
    /// Of a request to keep a backup: which one, and until when.
    pub preserve: Option<(String, String)>,
}

impl ObjectMetadata {
    /// Keys and values, as they are stored.
    pub fn to_pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = Vec::new();
        // PGHoard leaves the key out for what is not compressed.
        if let StoredAs::Declared(compression) = self.stored_as
            && compression != Compression::None
        {
            pairs.push((COMPRESSION_ALGORITHM, compression.to_string()));
            pairs.extend(self.compression_level.map(|level| (COMPRESSION_LEVEL, level.to_string())));
        }
        pairs.extend(self.key.as_ref().map(|key| (ENCRYPTION_KEY_ID, key.to_string())));
        pairs.extend(self.is_sealed.then(|| (SEAL, SEAL_ALGORITHM.to_owned())));
        pairs.extend(self.plaintext_length.map(|length| (ORIGINAL_FILE_SIZE, length.to_string())));
        pairs.extend(self.pg_version.map(|version| (PG_VERSION, version.to_string())));
        pairs.extend(self.host.as_deref().map(|host| (HOST, to_ascii(host))));
        if let Some(hash) = self.hash {
            pairs.push((HASH, hash.to_string()));
            pairs.push((HASH_ALGORITHM, hash.algorithm().name().to_owned()));
        }
        pairs.extend(self.stored_length.map(|length| ("Content-Length", length.to_string())));
        if let Some((backup, until)) = &self.preserve {
            pairs.push((PRESERVE_BACKUP, to_ascii(backup)));
            pairs.push((PRESERVE_UNTIL, until.clone()));
        }
        pairs.extend(self.digest.map(|digest| (DIGEST, digest.to_string())));
        pairs.extend(self.summary.clone().map(|summary| (SUMMARY, summary)));
        pairs
    }

    /// Reads what is there. Unknown keys, and values that do not parse, are passed over: an object is
    /// checked against what it says of itself as far as that can be understood.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut metadata = Self::default();
        let (mut any, mut algorithm, mut key_id) = (false, None, None);
        let (mut hash, mut hash_algorithm, mut preserve) = (None, None, (None, None));
        for (key, value) in pairs {
            any = true;
            match key.to_ascii_lowercase().replace('_', "-").as_str() {
                COMPRESSION_ALGORITHM if !value.is_empty() => algorithm = Some(value),
                ENCRYPTION_KEY_ID if !value.is_empty() => key_id = Some(value),
                COMPRESSION_LEVEL => metadata.compression_level = value.parse().ok(),
                ORIGINAL_FILE_SIZE => metadata.plaintext_length = value.parse().ok(),
                PG_VERSION => metadata.pg_version = value.parse().ok(),
                HOST => metadata.host = Some(value.to_owned()),
                PRESERVE_BACKUP => preserve.0 = Some(value.to_owned()),
                PRESERVE_UNTIL => preserve.1 = Some(value.to_owned()),
                HASH => hash = Some(value),
                STORED_HASH => metadata.stored_hash = NamedHash::parse("sha256", value),
                HASH_ALGORITHM => hash_algorithm = Some(value),
                CONTENT_LENGTH => metadata.stored_length = value.parse().ok(),
                DIGEST => metadata.digest = value.parse().ok(),
                SEAL => metadata.is_sealed = true,
                SUMMARY => metadata.summary = Some(value.to_owned()),
                _ => {}
            }
        }
        metadata.preserve = preserve.0.zip(preserve.1);
        metadata.hash = hash.zip(hash_algorithm).and_then(|(hex, name)| NamedHash::parse(name, hex));
        metadata.stored_as = match algorithm {
            Some(name) => name.parse().map_or_else(
                |_| StoredAs::Unsupported(format!("its compression `{name}` is not supported")),
                StoredAs::Declared,
            ),
            None if any => StoredAs::Declared(Compression::None),
            None => StoredAs::Undeclared,
        };
        match key_id.map(KeyId::new) {
            Some(Ok(key)) => metadata.key = Some(key),
            Some(Err(error)) => metadata.stored_as = StoredAs::Unsupported(error.to_string()),
            None => {}
        }
        metadata
    }

    pub(super) fn to_attributes(&self) -> Attributes {
        let pairs = self.to_pairs().into_iter();
        pairs.map(|(key, value)| (Attribute::Metadata(key.into()), value)).collect()
    }

    pub(super) fn from_attributes(attributes: &Attributes) -> Self {
        Self::from_pairs(attributes.iter().filter_map(|(attribute, value)| match attribute {
            Attribute::Metadata(key) => Some((key.as_ref(), value.as_ref())),
            _ => None,
        }))
    }

    pub(super) const fn expected(&self) -> Expected {
        Expected { length: self.plaintext_length, digest: self.digest }
    }
}

fn to_ascii(text: &str) -> String {
    text.chars().map(|letter| if letter.is_ascii_graphic() { letter } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_pghoard_writes() {
        let metadata = ObjectMetadata::from_pairs([
            ("pg-version", "150020"),
            ("compression-algorithm", "snappy"),
            ("compression-level", "0"),
            ("original-file-size", "16777216"),
            ("host", "db1"),
            ("hash", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
            ("hash-algorithm", "sha1"),
            ("encryption-key-id", "k 1"),
            ("Content-Length", "123"),
            ("_hash", "0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f"),
        ]);
        let expected = ObjectMetadata {
            stored_as: StoredAs::Declared(Compression::Snappy),
            compression_level: Some(0),
            plaintext_length: Some(16 << 20),
            pg_version: Some(150_020),
            host: Some("db1".to_owned()),
            hash: NamedHash::parse("sha1", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
            key: Some(KeyId::new("k 1").unwrap()),
            is_sealed: false,
            stored_hash: NamedHash::parse("sha256", &"0f".repeat(32)),
            stored_length: Some(123),
            digest: None,
            summary: None,
            preserve: None,
        };
        assert!(expected.hash.is_some());
        assert_eq!(metadata, expected);
    }

    #[test]
    fn tells_what_it_cannot_undo() {
        let of = |pairs: &[(&'static str, &'static str)]| {
            ObjectMetadata::from_pairs(pairs.iter().copied()).stored_as
        };
        assert_eq!(of(&[]), StoredAs::Undeclared);
        assert_eq!(of(&[("host", "x")]), StoredAs::Declared(Compression::None));
        assert_eq!(of(&[("compression-algorithm", "lzma")]), StoredAs::Declared(Compression::Lzma));
        assert!(matches!(of(&[("compression-algorithm", "lz4")]), StoredAs::Unsupported(_)));
        assert!(matches!(of(&[("encryption-key-id", "ü")]), StoredAs::Unsupported(_)));
    }

    #[test]
    fn values_are_ascii() {
        let metadata = ObjectMetadata { host: Some("bücher\n1".to_owned()), ..ObjectMetadata::default() };
        assert_eq!(metadata.to_pairs(), [("host", "b?cher?1".to_owned())]);
    }

    proptest! {
        #[test]
        fn survives_what_stores_do_to_keys(
            compression in prop::sample::select(&Compression::ALL[1..]),
            key in prop::option::of("[!-~]([ -~]{0,20}[!-~])?"),
            hash in prop::option::of("[0-9a-f]{40}"),
            stored in prop::option::of(any::<u64>()),
            summary in prop::option::of("[!-~]{1,20}"),
            level in prop::option::of(any::<i32>()),
            length in prop::option::of(any::<u64>()),
            version in prop::option::of(any::<u32>()),
            host in prop::option::of("[!-~]{1,20}"),
            digest in prop::option::of(any::<[u8; 32]>()),
            sealed: bool,
            upper: bool,
            underscore: bool,
        ) {
            let metadata = ObjectMetadata {
                stored_as: StoredAs::Declared(compression),
                compression_level: level,
                plaintext_length: length,
                pg_version: version,
                host,
                digest: digest.map(Digest::new),
                key: key.map(|key| KeyId::new(&key).unwrap()),
                is_sealed: sealed,
                hash: hash.map(|hash| NamedHash::parse("sha1", &hash).unwrap()),
                stored_hash: None,
                stored_length: stored,
                summary,
                preserve: Some(("b_0".to_owned(), "2099-01-01 00:00:00+00:00".to_owned())),
            };
            let mangled: Vec<_> = metadata
                .to_pairs()
                .into_iter()
                .map(|(key, value)| {
                    let key = if upper { key.to_uppercase() } else { key.to_owned() };
                    (if underscore { key.replace('-', "_") } else { key }, value)
                })
                .collect();
            let read = ObjectMetadata::from_pairs(mangled.iter().map(|(key, value)| (&key[..], &value[..])));
            prop_assert_eq!(read, metadata);
        }
    }
}
