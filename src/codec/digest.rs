//! The digest of our own data, and the hashes that PGHoard keeps beside WAL.
//!
//! Pure. Ours is BLAKE3, because SHA-256 without instructions of its own is slower than the compressor
//! behind it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A BLAKE3 digest of plaintext: 32 bytes, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not a digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a BLAKE3 digest (64 hex digits)")]
pub struct ParseDigestError(String);

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseDigestError(text.to_owned());
        // `from_hex` takes upper case as well; signs and blanks it refuses.
        blake3::Hash::from_hex(text).map(|hash| Self(*hash.as_bytes())).map_err(|_| error())
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The algorithms of PGHoard's `hash_algorithm` that this program knows, under their Python names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashAlgorithm {
    #[default]
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl HashAlgorithm {
    const ALL: [Self; 5] = [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// The algorithm of this name; none when it is not known.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    fn implementation(self) -> &'static aws_lc_rs::digest::Algorithm {
        use aws_lc_rs::digest;
        match self {
            // Against accidents, not against attackers: what it protects, the envelope protects better.
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha224 => &digest::SHA224,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        }
    }
}

/// A hash together with its algorithm.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NamedHash {
    algorithm: HashAlgorithm,
    /// The longest has 64 bytes; behind a shorter one are zeros.
    bytes: [u8; 64],
}

impl NamedHash {
    /// Reads what PGHoard's metadata says; none when it cannot be understood.
    pub fn parse(algorithm: &str, hex: &str) -> Option<Self> {
        let algorithm = HashAlgorithm::of_name(algorithm)?;
        let is_hex = hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        if hex.len() != algorithm.implementation().output_len() * 2 || !is_hex {
            return None;
        }
        let mut bytes = [0; 64];
        for (at, byte) in bytes.iter_mut().enumerate().take(hex.len() / 2) {
            *byte = u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).ok()?;
        }
        Some(Self { algorithm, bytes })
    }

    pub const fn algorithm(self) -> HashAlgorithm {
        self.algorithm
    }
}

/// The hash in lower-case hex.
impl fmt::Display for NamedHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = self.algorithm.implementation().output_len();
        self.bytes[..length].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for NamedHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{self}", self.algorithm.name())
    }
}

/// Hashes bytes as they pass, in the way of PGHoard.
pub struct NamedHasher {
    algorithm: HashAlgorithm,
    context: aws_lc_rs::digest::Context,
}

impl NamedHasher {
    pub fn new(algorithm: HashAlgorithm) -> Self {
        Self { algorithm, context: aws_lc_rs::digest::Context::new(algorithm.implementation()) }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    pub fn finish(self) -> NamedHash {
        let digest = self.context.finish();
        let mut bytes = [0; 64];
        bytes[..digest.as_ref().len()].copy_from_slice(digest.as_ref());
        NamedHash { algorithm: self.algorithm, bytes }
    }
}

/// Counts and hashes bytes as they pass.
#[derive(Clone, Debug)]
pub struct Hasher {
    hash: blake3::Hasher,
    length: u64,
}

impl Hasher {
    #[expect(clippy::new_without_default, reason = "a hasher is begun, not defaulted")]
    pub fn new() -> Self {
        Self { hash: blake3::Hasher::new(), length: 0 }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
    }

    /// Bytes seen so far.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The digest of everything seen so far.
    pub fn digest(&self) -> Digest {
        Digest(*self.hash.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn is_the_published_value_for_no_input() {
        // First line of BLAKE3's published test vectors.
        let text = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(Digest::of(b"").to_string(), text);
        assert_eq!(serde_json::to_string(&Digest::of(b"")).unwrap(), format!("\"{text}\""));
    }

    #[test]
    fn a_named_hash_is_the_published_value_and_reads_back() {
        // `echo -n abc | sha1sum` and its relatives.
        for (name, hex) in [
            ("sha1", "a9993e364706816aba3e25717850c26c9cd0d89d"),
            ("sha256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ] {
            let mut hasher = NamedHasher::new(HashAlgorithm::of_name(name).unwrap());
            hasher.update(b"a");
            hasher.update(b"bc");
            let hash = hasher.finish();
            assert_eq!(hash.to_string(), hex);
            assert_eq!(NamedHash::parse(name, &hex.to_uppercase()), Some(hash));
        }
        for (name, hex) in
            [("md5", "00"), ("sha1", "a9"), ("sha1", &"+f".repeat(20)), ("sha1", &"é".repeat(20))]
        {
            assert_eq!(NamedHash::parse(name, hex), None, "{name} {hex}");
        }
    }

    #[test]
    fn refuses_other_texts() {
        for text in ["", "af13", &"g".repeat(64), &"é".repeat(32), &"a".repeat(65)] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parses_what_it_prints(bytes: [u8; 32]) {
            let digest = Digest::new(bytes);
            prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        }

        #[test]
        fn does_not_depend_on_chunks(bytes: Vec<u8>, cut: prop::sample::Index) {
            let (head, tail) = bytes.split_at(cut.index(bytes.len() + 1));
            let mut hasher = Hasher::new();
            hasher.update(head);
            hasher.update(tail);
            prop_assert_eq!(hasher.digest(), Digest::of(&bytes));
            prop_assert_eq!(hasher.length(), bytes.len() as u64);
        }
    }
}
