//! Key pairs by name: the public part locks, the private part opens.
//!
//! Pure. The texts are PGHoard's: RSA, PEM, `SubjectPublicKeyInfo` for the public part and PKCS#8 for the
//! private one; PKCS#1 (`BEGIN RSA …`), which its library takes as well, is wrapped into those. No message
//! of this file shows anything of a key but its name and size.

use std::collections::BTreeMap;
use std::fmt;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{
    KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey,
    PrivateDecryptingKey, PublicEncryptingKey,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::secret::Secret;

/// The name of a key pair, stored with every object that was encrypted for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(String);

impl KeyId {
    /// A name that every store keeps as it is: printable ASCII, with no blank at its ends.
    pub fn new(text: &str) -> Result<Self, KeyError> {
        let printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
        if text.is_empty() || !printable || text.trim() != text {
            return Err(KeyError::Name(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One half of a key pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyPart {
    Public,
    Private,
}

impl fmt::Display for KeyPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "public",
            Self::Private => "private",
        })
    }
}

/// What is wrong with the keys at hand. Every message names the key and shows none of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("`{0}` cannot name a key (printable ASCII, no blank at either end)")]
    Name(String),
    #[error("the {part} part of the encryption key `{id}` is not configured")]
    Missing { id: KeyId, part: KeyPart },
    #[error("the {part} part of the encryption key `{id}` cannot be used: {why}")]
    Unreadable { id: KeyId, part: KeyPart, why: String },
    #[error("the public and the private part of the encryption key `{0}` are no pair")]
    NoPair(KeyId),
}

impl KeyError {
    /// The next step for the operator.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { id, part } => {
                Some(format!("add it to the site's `encryption_keys` as `{id}`: {{\"{part}\": …}}"))
            }
            Self::Unreadable { part: KeyPart::Public, .. } => {
                Some("it is the PEM text between BEGIN PUBLIC KEY and END PUBLIC KEY".to_owned())
            }
            Self::Unreadable { part: KeyPart::Private, .. } => {
                Some("it is the PEM text between BEGIN PRIVATE KEY and END PRIVATE KEY".to_owned())
            }
            Self::Name(_) | Self::NoPair(_) => None,
        }
    }
}

/// Locks: what a backup host needs.
#[derive(Clone)]
pub struct PublicKey {
    id: KeyId,
    key: PublicEncryptingKey,
}

impl PublicKey {
    /// Reads PEM text.
    pub fn from_pem(id: &KeyId, pem: &str) -> Result<Self, KeyError> {
        let unreadable =
            |why: &str| KeyError::Unreadable { id: id.clone(), part: KeyPart::Public, why: why.to_owned() };
        let der = match read_pem(pem).map_err(unreadable)? {
            ("PUBLIC KEY", der) => der,
            ("RSA PUBLIC KEY", der) => {
                let bits = [&[0][..], &der].concat();
                der_value(0x30, &[RSA_ALGORITHM, &der_value(0x03, &bits)].concat())
            }
            (label, _) if label.contains("PRIVATE") => return Err(unreadable("it is a private key")),
            _ => return Err(unreadable("it is no PEM public key")),
        };
        let key = PublicEncryptingKey::from_der(&der)
            .map_err(|_| unreadable("it is no RSA key of 2048 to 8192 bits"))?;
        Ok(Self { id: id.clone(), key })
    }

    pub const fn id(&self) -> &KeyId {
        &self.id
    }

    /// Bits of the modulus.
    pub fn bits(&self) -> usize {
        self.key.key_size_bits()
    }

    /// PGHoard's way of wrapping: OAEP with SHA-1, no label.
    ///
    /// # Panics
    /// For more than a 2048-bit key can take, 214 bytes.
    pub(super) fn wrap(&self, secret: &[u8]) -> Vec<u8> {
        self.encrypt(&OAEP_SHA1_MGF1SHA1, secret, None)
    }

    /// Our own way: OAEP with SHA-256; `label` must be the same when it is opened.
    pub(super) fn wrap_labelled(&self, secret: &[u8], label: &[u8]) -> Vec<u8> {
        self.encrypt(&OAEP_SHA256_MGF1SHA256, secret, Some(label))
    }

    fn encrypt(
        &self,
        algorithm: &'static aws_lc_rs::rsa::OaepAlgorithm,
        secret: &[u8],
        label: Option<&[u8]>,
    ) -> Vec<u8> {
        let mut wrapped = vec![0; self.key.key_size_bytes()];
        let key = OaepPublicEncryptingKey::new(self.key.clone()).expect("a validated key");
        key.encrypt(algorithm, secret, &mut wrapped, label).expect("a short secret and room for the result");
        wrapped
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublicKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Opens: what a restore needs.
#[derive(Clone)]
pub struct PrivateKey {
    id: KeyId,
    key: PrivateDecryptingKey,
}

impl PrivateKey {
    /// Reads PEM text.
    pub fn from_pem(id: &KeyId, pem: &Secret) -> Result<Self, KeyError> {
        let unreadable =
            |why: &str| KeyError::Unreadable { id: id.clone(), part: KeyPart::Private, why: why.to_owned() };
        let der = match read_pem(pem.reveal()).map_err(unreadable)? {
            ("PRIVATE KEY", der) => der,
            ("RSA PRIVATE KEY", _) if pem.reveal().contains("Proc-Type:") => {
                return Err(unreadable("it is protected by a passphrase"));
            }
            ("RSA PRIVATE KEY", der) => {
                let version = der_value(0x02, &[0]);
                der_value(0x30, &[&version, RSA_ALGORITHM, &der_value(0x04, &der)].concat())
            }
            ("ENCRYPTED PRIVATE KEY", _) => return Err(unreadable("it is protected by a passphrase")),
            (label, _) if label.contains("PUBLIC") => return Err(unreadable("it is a public key")),
            _ => return Err(unreadable("it is no PEM private key")),
        };
        let key = PrivateDecryptingKey::from_pkcs8(&der)
            .map_err(|_| unreadable("it is no RSA key of 2048 to 8192 bits"))?;
        Ok(Self { id: id.clone(), key })
    }

    pub const fn id(&self) -> &KeyId {
        &self.id
    }

    /// Bytes of everything that is wrapped for this key.
    pub(super) fn wrapped_length(&self) -> usize {
        self.key.key_size_bytes()
    }

    /// The mirror of [`PublicKey::wrap`]; nothing when this key does not open it.
    pub(super) fn unwrap(&self, wrapped: &[u8]) -> Option<Vec<u8>> {
        self.decrypt(&OAEP_SHA1_MGF1SHA1, wrapped, None)
    }

    /// The mirror of [`PublicKey::wrap_labelled`]; nothing when this key does not open it, or the label is
    /// another.
    pub(super) fn unwrap_labelled(&self, wrapped: &[u8], label: &[u8]) -> Option<Vec<u8>> {
        self.decrypt(&OAEP_SHA256_MGF1SHA256, wrapped, Some(label))
    }

    fn decrypt(
        &self,
        algorithm: &'static aws_lc_rs::rsa::OaepAlgorithm,
        wrapped: &[u8],
        label: Option<&[u8]>,
    ) -> Option<Vec<u8>> {
        let mut secret = vec![0; self.key.key_size_bytes()];
        let key = OaepPrivateDecryptingKey::new(self.key.clone()).ok()?;
        let length = key.decrypt(algorithm, wrapped, &mut secret, label).ok()?.len();
        secret.truncate(length);
        Some(secret)
    }

    fn belongs_to(&self, public: &PublicKey) -> bool {
        let of = |key: &PublicEncryptingKey| {
            let der: Option<PublicKeyX509Der<'static>> = key.as_der().ok();
            der.map(|der| der.as_ref().to_vec())
        };
        of(&self.key.public_key()) == of(&public.key)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// All keys of a site, and which of them is written with. Without one, nothing is encrypted.
#[derive(Clone, Debug, Default)]
pub struct KeyRing {
    public: BTreeMap<KeyId, PublicKey>,
    private: BTreeMap<KeyId, PrivateKey>,
    writing: Option<KeyId>,
}

impl KeyRing {
    /// Adds the parts that are known of one key. Two parts must be a pair.
    pub fn add(
        &mut self,
        id: &KeyId,
        public: Option<&str>,
        private: Option<&Secret>,
    ) -> Result<(), KeyError> {
        let public = public.map(|pem| PublicKey::from_pem(id, pem)).transpose()?;
        let private = private.map(|pem| PrivateKey::from_pem(id, pem)).transpose()?;
        if let (Some(public), Some(private)) = (&public, &private)
            && !private.belongs_to(public)
        {
            return Err(KeyError::NoPair(id.clone()));
        }
        self.public.extend(public.map(|key| (id.clone(), key)));
        self.private.extend(private.map(|key| (id.clone(), key)));
        Ok(())
    }

    /// Has everything written from now on encrypted for `id`, whose public part must be there.
    pub fn write_with(&mut self, id: KeyId) -> Result<(), KeyError> {
        if !self.public.contains_key(&id) {
            return Err(KeyError::Missing { id, part: KeyPart::Public });
        }
        self.writing = Some(id);
        Ok(())
    }

    /// The key to write with.
    pub fn writing(&self) -> Option<&PublicKey> {
        self.writing.as_ref().and_then(|id| self.public.get(id))
    }

    /// The private part of a key that an object names.
    pub fn private(&self, id: &KeyId) -> Result<&PrivateKey, KeyError> {
        self.private.get(id).ok_or_else(|| KeyError::Missing { id: id.clone(), part: KeyPart::Private })
    }

    /// All public parts.
    pub fn publics(&self) -> impl Iterator<Item = &PublicKey> {
        self.public.values()
    }

    /// All private parts, for an object whose key's name is lost.
    pub fn privates(&self) -> impl Iterator<Item = &PrivateKey> {
        self.private.values()
    }
}

/// A new key pair as PEM text.
#[derive(Clone, Debug)]
pub struct NewKeyPair {
    pub public: String,
    pub private: Secret,
}

impl NewKeyPair {
    /// Makes an RSA key pair of 3072 bits, which takes a moment.
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub fn generate() -> Self {
        Self::of_size(KeySize::Rsa3072)
    }

    /// Makes a key pair of another length: 2048, 3072, 4096 or 8192 bits.
    ///
    /// # Panics
    /// As [`Self::generate`].
    pub fn of_bits(bits: u32) -> Option<Self> {
        let size = match bits {
            2048 => KeySize::Rsa2048,
            3072 => KeySize::Rsa3072,
            4096 => KeySize::Rsa4096,
            8192 => KeySize::Rsa8192,
            _ => return None,
        };
        Some(Self::of_size(size))
    }

    fn of_size(size: KeySize) -> Self {
        let key = PrivateDecryptingKey::generate(size).expect("randomness and memory");
        let private: Pkcs8V1Der<'static> = key.as_der().expect("a new key can be written");
        let public: PublicKeyX509Der<'static> = key.public_key().as_der().expect("a new key can be written");
        Self {
            public: write_pem("PUBLIC KEY", public.as_ref()),
            private: Secret::new(write_pem("PRIVATE KEY", private.as_ref())),
        }
    }
}

fn write_pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for start in (0..text.len()).step_by(64) {
        pem.push_str(&text[start..text.len().min(start + 64)]);
        pem.push('\n');
    }
    pem + "-----END " + label + "-----\n"
}

/// The label and the content of the first block.
fn read_pem(text: &str) -> Result<(&str, Vec<u8>), &'static str> {
    const NO_PEM: &str = "it is no PEM text";
    let (_, rest) = text.split_once("-----BEGIN ").ok_or(NO_PEM)?;
    let (label, rest) = rest.split_once("-----").ok_or(NO_PEM)?;
    let (body, rest) = rest.split_once("-----END ").ok_or("its PEM text has no end")?;
    if !rest.starts_with(label) {
        return Err(NO_PEM);
    }
    let compact: String = body.split_ascii_whitespace().collect();
    match STANDARD.decode(compact) {
        Ok(der) => Ok((label, der)),
        // Older protected keys have header lines, which tell more than the base64 they spoil.
        Err(_) if body.contains("Proc-Type:") => Ok((label, Vec::new())),
        Err(_) => Err("its PEM text is not base64"),
    }
}

/// `AlgorithmIdentifier` of `rsaEncryption` (RFC 8017, appendix A.1).
const RSA_ALGORITHM: &[u8] =
    &[0x30, 0x0D, 0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x01, 0x05, 0x00];

/// One value of the Distinguished Encoding Rules.
fn der_value(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut value = vec![tag];
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    if content.len() >= 0x80 {
        value.push(0x80 | significant.len().to_le_bytes()[0]);
    }
    // Of no content the length is one zero byte.
    value.extend_from_slice(if significant.is_empty() { &[0] } else { significant });
    value.extend_from_slice(content);
    value
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::OnceLock;

    pub fn key_id(text: &str) -> KeyId {
        KeyId::new(text).unwrap()
    }

    /// One pair for all tests, since making one takes its time without optimisation.
    pub fn pair() -> &'static NewKeyPair {
        static PAIR: OnceLock<NewKeyPair> = OnceLock::new();
        PAIR.get_or_init(NewKeyPair::generate)
    }

    pub fn ring() -> KeyRing {
        let mut ring = KeyRing::default();
        ring.add(&key_id("main"), Some(&pair().public), Some(&pair().private)).unwrap();
        ring.write_with(key_id("main")).unwrap();
        ring
    }

    #[test]
    fn a_new_pair_is_readable_and_a_pair() {
        let ring = ring();
        let public = ring.writing().unwrap();
        assert_eq!(public.bits(), 3072);
        let private = ring.private(&key_id("main")).unwrap();
        assert_eq!(private.unwrap(&public.wrap(b"secret")).unwrap(), b"secret");
        assert_eq!(private.unwrap_labelled(&public.wrap_labelled(b"s", b"one"), b"one").unwrap(), b"s");
        assert_eq!(private.unwrap_labelled(&public.wrap_labelled(b"s", b"one"), b"two"), None);
        assert!(pair().public.starts_with("-----BEGIN PUBLIC KEY-----\nMII"));
        assert!(pair().private.reveal().ends_with("\n-----END PRIVATE KEY-----\n"));
    }

    #[test]
    fn the_older_form_of_a_key_is_read() {
        let inner = |pem: &str, skip: usize| read_pem(pem).unwrap().1[skip..].to_vec();
        // Both outer values have two length bytes: SEQUENCE 4, INTEGER 3, algorithm 15, then the content's
        // own head: 4 of an octet string, 5 of a bit string.
        let private = write_pem("RSA PRIVATE KEY", &inner(pair().private.reveal(), 4 + 3 + 15 + 4));
        let public = write_pem("RSA PUBLIC KEY", &inner(&pair().public, 4 + 15 + 5));
        let mut ring = KeyRing::default();
        ring.add(&key_id("old"), Some(&public), Some(&Secret::new(private))).unwrap();
        let mut mixed = KeyRing::default();
        mixed.add(&key_id("old"), Some(&public), Some(&pair().private)).unwrap();
    }

    #[test]
    fn what_is_no_key_is_refused_by_name_and_without_its_text() {
        let id = key_id("k1");
        let protected = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIC\n-----END ENCRYPTED PRIVATE KEY-----";
        let legacy = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIC\n-----END RSA PRIVATE \
                      KEY-----";
        let private = pair().private.reveal();
        let cut = &private[..private.len() / 2];
        for (pem, word) in [
            ("hunter2", "no PEM text"),
            (&pair().public[..], "it is a public key"),
            (protected, "passphrase"),
            (legacy, "passphrase"),
            (cut, "no end"),
            ("-----BEGIN PRIVATE KEY-----\nMIIC\n-----END PRIVATE KEY-----", "no RSA key"),
            ("-----BEGIN PRIVATE KEY-----\n!hunter2\n-----END PRIVATE KEY-----", "not base64"),
        ] {
            let error = PrivateKey::from_pem(&id, &Secret::new(pem.to_owned())).unwrap_err();
            let text = format!("{error} {error:?} {}", error.hint().unwrap());
            assert!(text.contains("`k1`") && text.contains(word), "{text}");
            assert!(!text.contains("hunter2") && !text.contains("MII"), "{text}");
        }
        for pem in ["", private, "-----BEGIN PUBLIC KEY-----\nMIIC\n-----END PUBLIC KEY-----"] {
            assert!(matches!(PublicKey::from_pem(&id, pem), Err(KeyError::Unreadable { .. })));
        }
    }

    #[test]
    fn parts_that_are_no_pair_are_refused() {
        let other = NewKeyPair::generate();
        let mut ring = KeyRing::default();
        let error = ring.add(&key_id("k1"), Some(&other.public), Some(&pair().private)).unwrap_err();
        assert_eq!(error, KeyError::NoPair(key_id("k1")));
        assert!(ring.privates().next().is_none());
    }

    #[test]
    fn a_missing_part_is_named() {
        let mut ring = KeyRing::default();
        ring.add(&key_id("k1"), Some(&pair().public), None).unwrap();
        let missing = ring.private(&key_id("k1")).unwrap_err();
        assert_eq!(missing.to_string(), "the private part of the encryption key `k1` is not configured");
        let missing = ring.write_with(key_id("k2")).unwrap_err();
        assert_eq!(missing, KeyError::Missing { id: key_id("k2"), part: KeyPart::Public });
        assert!(ring.writing().is_none());
    }

    #[test]
    fn names_of_keys_survive_every_store() {
        for text in ["", " k", "k ", "schlüssel", "a\nb"] {
            assert!(KeyId::new(text).is_err(), "{text}");
        }
        assert!(KeyId::new("my key.2016/1").is_ok());
    }

    #[test]
    fn nothing_shows_a_key() {
        let text = format!("{:?} {:?}", ring(), pair());
        assert!(!text.contains("PRIVATE KEY") && text.contains("main"), "{text}");
    }
}
