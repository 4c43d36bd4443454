//! The keys of a site and the hash beside its WAL: from text to what works. Pure.

use super::error::Problem;
use super::indirect::member_place;
use super::raw::RawSite;
use crate::codec::{HashAlgorithm, KeyError, KeyId, KeyPart, KeyRing};

/// PGHoard's hashes that this program does not have. What is written names its algorithm, so that another
/// one does no harm.
pub const OTHER_HASHES: &[&str] =
    &["md5", "blake2b", "blake2s", "sha3_224", "sha3_256", "sha3_384", "sha3_512"];

/// The algorithm of this name; none for one of [`OTHER_HASHES`].
pub fn hash_algorithm(name: &str) -> Result<Option<HashAlgorithm>, Problem> {
    match HashAlgorithm::of_name(name) {
        Some(algorithm) => Ok(Some(algorithm)),
        None if OTHER_HASHES.contains(&name) => Ok(None),
        None => Err(Problem::new("hash_algorithm", format!("expected the name of a hash, found `{name}`"))),
    }
}

/// Reads the site's keys. Problems come with places inside the site, and never with key material.
pub fn key_ring(site: &RawSite) -> Result<KeyRing, Vec<Problem>> {
    let mut ring = KeyRing::default();
    let mut problems = Vec::new();
    let mut problem = |place: &str, error: &KeyError| {
        let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
        problems.push(Problem::new(place, format!("{error}{hint}")));
    };
    for (name, pair) in site.encryption_keys.iter().flatten() {
        let place = member_place("encryption_keys", name);
        let added =
            KeyId::new(name).and_then(|id| ring.add(&id, pair.public.as_deref(), pair.private.as_ref()));
        if let Err(error) = added {
            let place = match &error {
                KeyError::Unreadable { part: KeyPart::Public, .. } => member_place(&place, "public"),
                KeyError::Unreadable { part: KeyPart::Private, .. } => member_place(&place, "private"),
                _ => place,
            };
            problem(&place, &error);
        }
    }
    if let Some(name) = &site.encryption_key_id
        && let Err(error) = KeyId::new(name).and_then(|id| ring.write_with(id))
    {
        problem("encryption_key_id", &error);
    }
    if problems.is_empty() { Ok(ring) } else { Err(problems) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::NewKeyPair;
    use serde_json::json;

    fn read(site: serde_json::Value) -> Result<KeyRing, Vec<Problem>> {
        key_ring(&serde_json::from_value(site).unwrap())
    }

    #[test]
    fn a_host_that_only_writes_needs_the_public_part_only() {
        let pair = NewKeyPair::generate();
        let ring = read(json!({
            "encryption_key_id": "k1",
            "encryption_keys": {"k1": {"public": pair.public}, "old": {"private": pair.private.reveal()}},
        }));
        let ring = ring.unwrap();
        assert_eq!(ring.writing().unwrap().id().as_str(), "k1");
        assert!(ring.private(&KeyId::new("k1").unwrap()).is_err());
        assert!(ring.private(&KeyId::new("old").unwrap()).is_ok());
        assert!(read(json!({})).unwrap().writing().is_none());
    }

    #[test]
    fn a_key_that_cannot_be_used_is_a_problem_that_shows_nothing_of_it() {
        let pair = NewKeyPair::generate();
        for (site, place) in [
            (json!({"encryption_key_id": "k1"}), "encryption_key_id"),
            (
                json!({"encryption_key_id": "k1", "encryption_keys": {"k1": {"private": pair.private.reveal()}}}),
                "encryption_key_id",
            ),
            (json!({"encryption_keys": {"k1": {"private": "MIIhunter2"}}}), "encryption_keys.k1.private"),
            (
                json!({"encryption_keys": {"k1": {"public": pair.private.reveal()}}}),
                "encryption_keys.k1.public",
            ),
            (
                json!({"encryption_keys": {
                    "k1": {"public": pair.public, "private": NewKeyPair::generate().private.reveal()}
                }}),
                "encryption_keys.k1",
            ),
        ] {
            let problems = read(site).unwrap_err();
            assert_eq!(problems[0].place, place);
            assert!(
                !problems[0].why.contains("MII") && problems[0].why.contains("k1"),
                "{}",
                problems[0].why
            );
        }
    }

    #[test]
    fn hashes_are_pythons() {
        assert_eq!(hash_algorithm("sha256").unwrap(), Some(HashAlgorithm::Sha256));
        assert_eq!(hash_algorithm("md5").unwrap(), None);
        assert_eq!(hash_algorithm("sha257").unwrap_err().place, "hash_algorithm");
    }
}
