//! The keys of an encrypted backup: wrapped in its record, and opened for a restore.
//!
//! Pure. A record names one key for each backup whose packs it uses, each wrapped for the RSA key that was
//! configured when that backup was taken. Nothing but a restore needs one opened.

use std::collections::BTreeMap;

use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::backup::BackupRecord;
use crate::codec::{EnvelopeError, KeyError, KeyId, KeyRing, OpeningKey, PublicKey, SealingKey};
use crate::repository::BackupName;

/// One backup's key, as it stands in records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    /// The backup whose packs it opens.
    pub backup: BackupName,
    /// The RSA key that opens it.
    pub key_id: String,
    #[serde(with = "base64_text")]
    pub wrapped: Vec<u8>,
}

/// Why an encrypted backup cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupKeyError {
    #[error("backup `{backup}` is encrypted: {source}")]
    Key { backup: BackupName, source: KeyError },
    #[error("backup `{backup}` is encrypted: {source}")]
    Refused { backup: BackupName, source: EnvelopeError },
    #[error("record of backup `{0}` is not the one that was stored with its key")]
    Altered(BackupName),
}

impl BackupKeyError {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Key { source, .. } => source.hint(),
            Self::Refused { .. } => {
                Some("restore with the private part of the key that the backup was taken with".to_owned())
            }
            Self::Altered(_) => Some(
                "somebody has changed it; restore another backup, and look who can write there".to_owned(),
            ),
        }
    }
}

/// Part of everything that is sealed with the key of `backup`.
fn context(backup: BackupName) -> Vec<u8> {
    format!("pgkeep backup {backup}").into_bytes()
}

/// Makes the key of a new backup.
pub fn new_backup_key(backup: BackupName, key: &PublicKey) -> SealingKey {
    SealingKey::generate(key, &context(backup))
}

impl WrappedKey {
    /// What the record of `backup` says of its own key.
    pub fn of(backup: BackupName, key: &PublicKey, sealing: &SealingKey) -> Self {
        Self { backup, key_id: key.id().to_string(), wrapped: sealing.wrapped().to_vec() }
    }

    fn open(&self, ring: &KeyRing) -> Result<OpeningKey, BackupKeyError> {
        let of_key = |source| BackupKeyError::Key { backup: self.backup, source };
        let id = KeyId::new(&self.key_id).map_err(of_key)?;
        let private = ring.private(&id).map_err(of_key)?;
        OpeningKey::unwrap(private, &self.wrapped, &context(self.backup))
            .map_err(|source| BackupKeyError::Refused { backup: self.backup, source })
    }
}

/// The opened keys that a restore of one backup needs; none for packs that are not encrypted.
#[derive(Clone, Debug, Default)]
pub struct BackupKeys(BTreeMap<BackupName, OpeningKey>);

impl BackupKeys {
    /// Opens every key of `record` with those of `ring`, and makes sure that the record is the one that was
    /// stored with its own key.
    pub fn open(record: &BackupRecord, ring: &KeyRing) -> Result<Self, BackupKeyError> {
        let keys = record.keys.iter().map(|key| Ok((key.backup, key.open(ring)?)));
        let keys = Self(keys.collect::<Result<_, _>>()?);
        if let Some(own) = keys.of(record.name) {
            let proven = record.proof.is_some_and(|proof| own.verify(&proof.content(), &proof.code).is_ok());
            if !proven {
                return Err(BackupKeyError::Altered(record.name));
            }
        }
        Ok(keys)
    }

    /// The key of the packs and the file list that `backup` wrote.
    pub fn of(&self, backup: BackupName) -> Option<&OpeningKey> {
        self.0.get(&backup)
    }
}

mod base64_text {
    use base64::Engine as _;

    use super::{BASE64, Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        BASE64.decode(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::super::backup::example;
    use super::*;
    use crate::codec::NewKeyPair;
    use crate::postgres::Lsn;

    fn ring(id: &str, pair: &NewKeyPair, private: bool) -> KeyRing {
        let mut ring = KeyRing::default();
        let id = KeyId::new(id).unwrap();
        ring.add(&id, Some(&pair.public), private.then_some(&pair.private)).unwrap();
        ring.write_with(id).unwrap();
        ring
    }

    #[test]
    fn a_record_is_read_by_everybody_and_opened_by_the_owner_of_its_key() {
        let pair = NewKeyPair::generate();
        let (host, owner) = (ring("k1", &pair, false), ring("k1", &pair, true));
        let mut record = example::record("2026-11-21T10:00:00Z", Lsn::new(0x200_0028), Lsn::new(0x300_0000));
        let public = host.writing().unwrap();
        let sealing = new_backup_key(record.name, public);
        record.format = 2;
        record.keys = vec![WrappedKey::of(record.name, public, &sealing)];
        let json = record.encode_proven(&sealing);
        let read = BackupRecord::decode(record.name, &json).unwrap();
        assert_eq!(read.keys, record.keys);
        assert_eq!(read.key_id(), Some("k1"));
        assert!(BackupKeys::open(&read, &owner).unwrap().of(read.name).is_some());

        let missing = BackupKeys::open(&read, &host).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "backup `20261121T100000Z` is encrypted: the private part of the encryption key `k1` is not configured"
        );
        let other = ring("k1", &NewKeyPair::generate(), true);
        let refused = BackupKeys::open(&read, &other).unwrap_err();
        assert!(refused.to_string().contains("`k1` does not open it"), "{refused}");

        // Any change of a value, and a proof that is gone.
        let text = String::from_utf8(json.clone()).unwrap();
        let altered = text.replace("\"stop_lsn\":\"0/3000000\"", "\"stop_lsn\":\"0/3000001\"");
        assert_ne!(altered, text);
        let altered = BackupRecord::decode(record.name, altered.as_bytes()).unwrap();
        assert_eq!(BackupKeys::open(&altered, &owner).unwrap_err(), BackupKeyError::Altered(record.name));
        let (line, _) = text.split_once('\n').unwrap();
        assert!(BackupRecord::decode(record.name, line.as_bytes()).is_err());
    }
}
