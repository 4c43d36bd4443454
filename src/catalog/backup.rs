//! The backup record: the small object whose presence makes a base backup exist.
//!
//! Pure. It is stored last, after the backup's data and after the WAL up to its end, and read by
//! everything that lists, prunes or restores. JSON, with a `format` number: readers skip keys they do not
//! know and refuse a higher format, so that an older program never prunes what it does not understand.
//!
//! The record of an encrypted backup has format 2 and is in clear text, too: listing and pruning need no
//! private key. It holds the wrapped keys, and a second line that proves the first to the owner of the key.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::backup_keys::WrappedKey;
use crate::codec::{Digest, SealingKey};
use crate::postgres::{Lsn, SegmentSize, TimelineId};
use crate::repository::{BackupName, Stored};

/// The format of a backup that is not encrypted.
pub const RECORD_FORMAT: u32 = 1;

/// The format of an encrypted one, and the highest that is read.
pub const ENCRYPTED_RECORD_FORMAT: u32 = 2;

/// Everything that list, prune and a restore plan want to know about one base backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRecord {
    pub format: u32,
    pub name: BackupName,
    /// The cluster's identity; text in JSON, because 64 bits are more than many JSON readers keep.
    #[serde(with = "number_as_text")]
    pub system_identifier: u64,
    /// As `server_version_num`: 180004 is 18.4.
    pub server_version_num: u32,
    /// Bytes.
    pub segment_size: SegmentSize,
    /// The timeline on which the backup began.
    pub timeline: TimelineId,
    /// Recovery begins here: the start WAL location of the backup label.
    pub start_lsn: Lsn,
    /// The backup is consistent from here on.
    pub stop_lsn: Lsn,
    /// Differs from `timeline` only when a standby followed a promotion meanwhile.
    pub stop_timeline: TimelineId,
    pub start_time: Timestamp,
    /// Not before the moment at which the server reached `stop_lsn`.
    pub stop_time: Timestamp,
    /// The user's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    pub backup_from: BackupFrom,
    /// Where the agent that took it ran.
    pub host: String,
    pub pgkeep_version: String,
    /// Bytes of all files but PostgreSQL's `backup_manifest`.
    pub plaintext_bytes: u64,
    /// Bytes this backup added to the repository: its own packs and its file list.
    pub stored_bytes: u64,
    /// Entries of kind file, but for `backup_manifest`.
    pub file_count: u64,
    #[serde(default)]
    pub tablespaces: Vec<TablespaceRecord>,
    /// Every pack that a restore reads, of this backup or an earlier one.
    pub packs: Vec<PackUse>,
    /// The file list object.
    pub files: FileListRecord,
    /// Of PostgreSQL's `backup_manifest`, when the server made one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest_digest: Option<Digest>,
    /// What the server said about page checksums that failed; none means it found nothing wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum_failures: Option<String>,
    /// Of the encrypted backups whose packs this one uses, itself among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<WrappedKey>,
    /// What stands behind the record of an encrypted backup.
    #[serde(skip)]
    pub proof: Option<RecordProof>,
}

/// The proof that the owner of a backup's key wrote its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordProof {
    /// Of the record's line, as it was read.
    digest: Digest,
    pub(super) code: [u8; 32],
}

impl RecordProof {
    /// What is proven.
    pub(super) const fn content(&self) -> [u8; 32] {
        *self.digest.as_bytes()
    }
}

/// The second line of an encrypted backup's record.
#[derive(Serialize, Deserialize)]
struct ProofLine {
    /// HMAC-SHA-256 of the first line's BLAKE3 digest; as a digest it is printed.
    proof: Digest,
}

/// The role of the server that was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupFrom {
    Primary,
    Standby,
}

/// A tablespace other than `pg_default` and `pg_global`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceRecord {
    pub oid: u32,
    /// The directory on the origin.
    pub location: String,
    pub plaintext_bytes: u64,
}

/// A pack that a backup refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PackUse {
    /// The backup that wrote it.
    pub backup: BackupName,
    pub number: u32,
    /// Bytes.
    pub stored_length: u64,
}

/// What the file list object must turn out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileListRecord {
    pub plaintext_length: u64,
    pub stored_length: u64,
    /// Of the plaintext.
    pub digest: Digest,
}

impl From<&Stored> for FileListRecord {
    fn from(stored: &Stored) -> Self {
        Self {
            plaintext_length: stored.plaintext_length,
            stored_length: stored.stored_length,
            digest: stored.digest,
        }
    }
}

/// A record that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("record has format {0}, this version of pgkeep reads up to {ENCRYPTED_RECORD_FORMAT}")]
    NewerFormat(u32),
    #[error("record is not what pgkeep writes")]
    Syntax(#[from] serde_json::Error),
    #[error("record belongs to backup `{0}`")]
    OtherBackup(BackupName),
    #[error("record contradicts itself: {0}")]
    Inconsistent(&'static str),
}

impl RecordError {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NewerFormat(_) => Some("upgrade pgkeep on this host".to_owned()),
            _ => None,
        }
    }
}

impl BackupRecord {
    /// The record's plaintext: one line of JSON.
    #[expect(clippy::missing_panics_doc, reason = "no value of a record is beyond JSON")]
    pub fn encode(&self) -> Vec<u8> {
        let mut json =
            serde_json::to_vec(self).expect("a record has no map keys or numbers JSON cannot hold");
        json.push(b'\n');
        json
    }

    /// The plaintext of an encrypted backup's record: the same, and its proof on a second line.
    #[expect(clippy::missing_panics_doc, reason = "no value of a record is beyond JSON")]
    pub fn encode_proven(&self, key: &SealingKey) -> Vec<u8> {
        let mut json = self.encode();
        let line = &json[..json.len() - 1];
        let proof = Digest::new(key.prove(Digest::of(line).as_bytes()));
        serde_json::to_writer(&mut json, &ProofLine { proof }).expect("a digest is text");
        json.push(b'\n');
        json
    }

    /// Reads the record stored for the backup called `name`.
    pub fn decode(name: BackupName, json: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let line_end = json.iter().position(|byte| *byte == b'\n').unwrap_or(json.len());
        let (json, rest) = json.split_at(line_end);
        let Format { format } = serde_json::from_slice(json)?;
        if format > ENCRYPTED_RECORD_FORMAT {
            return Err(RecordError::NewerFormat(format));
        }
        let mut record: Self = serde_json::from_slice(json)?;
        if format == ENCRYPTED_RECORD_FORMAT {
            let ProofLine { proof } = serde_json::from_slice(rest)?;
            record.proof = Some(RecordProof { digest: Digest::of(json), code: *proof.as_bytes() });
        }
        if record.key_id().is_some() != (format == ENCRYPTED_RECORD_FORMAT) {
            return Err(RecordError::Inconsistent("its format and its keys do not go together"));
        }
        if record.name != name {
            return Err(RecordError::OtherBackup(record.name));
        }
        if record.stop_lsn < record.start_lsn || record.start_lsn.is_zero() {
            return Err(RecordError::Inconsistent("stop LSN lies before start LSN"));
        }
        if record.stop_timeline < record.timeline {
            return Err(RecordError::Inconsistent("stop timeline lies before start timeline"));
        }
        if record.packs.iter().any(|pack| pack.backup > name) {
            return Err(RecordError::Inconsistent("it uses a pack of a later backup"));
        }
        Ok(record)
    }

    /// The RSA key that opens the backup; none when it is not encrypted.
    pub fn key_id(&self) -> Option<&str> {
        self.keys.iter().find(|key| key.backup == self.name).map(|key| key.key_id.as_str())
    }

    /// Whether the server found pages with wrong checksums in what it sent.
    pub const fn is_suspect(&self) -> bool {
        self.checksum_failures.is_some()
    }
}

mod number_as_text {
    use serde::{Deserialize, Deserializer, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    pub fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Records for the tests of every room that plans with them.
#[cfg(test)]
pub(crate) mod example {
    use super::*;

    /// A clean backup of timeline 1, named and timed after `start`, one minute long.
    pub fn record(start: &str, start_lsn: Lsn, stop_lsn: Lsn) -> BackupRecord {
        let start_time: Timestamp = start.parse().unwrap();
        let name = BackupName::from_timestamp(start_time);
        BackupRecord {
            format: RECORD_FORMAT,
            name,
            system_identifier: 7_412_345_678_901_234_567,
            server_version_num: 180_004,
            segment_size: SegmentSize::DEFAULT,
            timeline: TimelineId::FIRST,
            start_lsn,
            stop_lsn,
            stop_timeline: TimelineId::FIRST,
            start_time,
            stop_time: start_time + jiff::SignedDuration::from_mins(1),
            note: None,
            backup_from: BackupFrom::Primary,
            host: "db1".to_owned(),
            pgkeep_version: "0.1.0".to_owned(),
            plaintext_bytes: 1000,
            stored_bytes: 100,
            file_count: 3,
            tablespaces: Vec::new(),
            packs: vec![PackUse { backup: name, number: 0, stored_length: 90 }],
            files: FileListRecord { plaintext_length: 30, stored_length: 10, digest: Digest::of(b"") },
            manifest_digest: None,
            checksum_failures: None,
            keys: Vec::new(),
            proof: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> BackupRecord {
        example::record("2026-11-21T10:00:00Z", Lsn::new(0x200_0028), Lsn::new(0x300_0000))
    }

    #[test]
    fn decodes_what_it_encodes() {
        let mut record = record();
        record.note = Some("before \"the\" migration".to_owned());
        record.checksum_failures = Some("3 total checksum verification failures".to_owned());
        record.manifest_digest = Some(Digest::of(b"m"));
        record.tablespaces.push(TablespaceRecord {
            oid: 16385,
            location: "/mnt/fast".to_owned(),
            plaintext_bytes: 5,
        });
        let json = record.encode();
        assert_eq!(BackupRecord::decode(record.name, &json).unwrap(), record);
        assert!(String::from_utf8(json).unwrap().contains("\"system_identifier\":\"7412345678901234567\""));
    }

    #[test]
    fn the_written_form_stays_as_it_is() {
        insta::assert_snapshot!(String::from_utf8(record().encode()).unwrap(), @r#"{"format":1,"name":"20261121T100000Z","system_identifier":"7412345678901234567","server_version_num":180004,"segment_size":16777216,"timeline":1,"start_lsn":"0/2000028","stop_lsn":"0/3000000","stop_timeline":1,"start_time":"2026-11-21T10:00:00Z","stop_time":"2026-11-21T10:01:00Z","backup_from":"primary","host":"db1","pgkeep_version":"0.1.0","plaintext_bytes":1000,"stored_bytes":100,"file_count":3,"tablespaces":[],"packs":[{"backup":"20261121T100000Z","number":0,"stored_length":90}],"files":{"plaintext_length":30,"stored_length":10,"digest":"af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"}}"#);
    }

    fn edited(edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) -> Vec<u8> {
        let mut json: serde_json::Value = serde_json::from_slice(&record().encode()).unwrap();
        edit(json.as_object_mut().unwrap());
        serde_json::to_vec(&json).unwrap()
    }

    #[test]
    fn skips_keys_it_does_not_know() {
        let json = edited(|json| {
            json.insert("label".to_owned(), "x".into());
        });
        assert_eq!(BackupRecord::decode(record().name, &json).unwrap(), record());
    }

    #[test]
    fn refuses_a_newer_format_before_it_looks_at_the_rest() {
        let error = BackupRecord::decode(record().name, b"{\"format\": 3, \"name\": 7}").unwrap_err();
        assert!(matches!(error, RecordError::NewerFormat(3)));
        assert!(error.hint().is_some());
    }

    #[test]
    fn refuses_a_record_that_cannot_be_true() {
        let name = record().name;
        let other = BackupName::from_timestamp("2020-01-01T00:00:00Z".parse().unwrap());
        assert!(matches!(BackupRecord::decode(other, &record().encode()), Err(RecordError::OtherBackup(_))));
        let json = edited(|json| {
            json.insert("stop_lsn".to_owned(), "0/1".into());
        });
        assert!(matches!(BackupRecord::decode(name, &json), Err(RecordError::Inconsistent(_))));
        let json = edited(|json| {
            json["packs"][0]["backup"] = "20991231T000000Z".into();
        });
        assert!(matches!(BackupRecord::decode(name, &json), Err(RecordError::Inconsistent(_))));
        for json in [&b""[..], b"{}", b"[]", b"{\"format\":1}", &record().encode()[..100]] {
            assert!(matches!(BackupRecord::decode(name, json), Err(RecordError::Syntax(_))));
        }
    }
}
