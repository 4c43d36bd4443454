//! PGHoard's encrypted form of an object.
//!
//! Pure. All of it is given by what PGHoard reads and writes:
//!
//! | offset | bytes | content |
//! |---|---|---|
//! | 0 | 6 | `pghoa1` |
//! | 6 | 2 | K, big-endian |
//! | 8 | K | RSA-OAEP with SHA-1 of 16 bytes AES key, 16 bytes counter block, 32 bytes HMAC key |
//! | 8 + K | n | AES-128-CTR of the content; the counter block counts as one 128-bit number |
//! | 8 + K + n | 32 | HMAC-SHA-256 of these n bytes |
//!
//! No content at all is no envelope either: an empty object. Key and counter are fresh for every object,
//! so no counter block is ever used twice under one key.
//!
//! The code at the end proves that the content is what was locked, and nothing else: whoever has the
//! *public* key can lock other content. Who else may have written an object is for the store's access
//! rights to say, and for the digests kept elsewhere.

use aws_lc_rs::cipher::{
    AES_128, DecryptionContext, EncryptionContext, StreamingDecryptingKey, StreamingEncryptingKey,
    UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::{constant_time, hmac, rand};

use super::keys::{KeyId, PrivateKey, PublicKey};

const MAGIC: &[u8; 6] = b"pghoa1";
/// Of the magic and the length of the wrapped secrets.
const HEAD_LENGTH: usize = 8;
const SECRETS_LENGTH: usize = 64;
const MAC_LENGTH: usize = 32;
/// A piece that is still in the processor's cache when the second of cipher and code sees it.
const STEP: usize = 8 << 10;
/// The cipher asks for room to the end of its block, although it writes as much as it reads.
const BLOCK: usize = 16;

/// Whether an object that starts like this is encrypted, for objects whose metadata is lost.
pub fn is_sealed(start: &[u8]) -> bool {
    start.starts_with(MAGIC)
}

/// An encrypted object that does not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error("it is not encrypted, although it is said to be")]
    NoEnvelope,
    #[error("the encrypted data ends too early")]
    Truncated,
    #[error("{}", refused(.0))]
    Refused(Vec<KeyId>),
    #[error("the encrypted data is not what was stored: its authentication code does not match")]
    Altered,
}

fn refused(keys: &[KeyId]) -> String {
    let names: Vec<_> = keys.iter().map(|key| format!("`{key}`")).collect();
    match names.as_slice() {
        [] => "it is encrypted, and no private key is configured".to_owned(),
        [name] => format!(
            "the private key {name} does not open it: it was encrypted for another key, or it is damaged"
        ),
        names => format!("none of the private keys {} opens it, or it is damaged", names.join(", ")),
    }
}

/// Locks one object, in chunks of any size.
pub struct Sealer(Sealing);

enum Sealing {
    /// The envelope begins with the first byte of content.
    Before(PublicKey),
    Within(Box<(StreamingEncryptingKey, hmac::Context)>),
}

impl Sealer {
    pub fn new(key: &PublicKey) -> Self {
        Self(Sealing::Before(key.clone()))
    }

    /// Takes the next bytes of content; appends to `stored` what is ready.
    pub fn push(&mut self, content: &[u8], stored: &mut Vec<u8>) {
        let start = stored.len();
        stored.extend_from_slice(content);
        self.seal(stored, start);
    }

    /// Takes the next bytes of content, which lie in `stored` from `start` on, and puts what they become in
    /// their place: a whole segment is not copied only to be encrypted.
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub(super) fn seal(&mut self, stored: &mut Vec<u8>, mut start: usize) {
        if stored.len() == start {
            return;
        }
        if let Sealing::Before(key) = &self.0 {
            let mut secrets = [0; SECRETS_LENGTH];
            rand::fill(&mut secrets).expect("the system gives randomness");
            let (sealing, head) = Sealing::begin(key, &secrets);
            self.0 = sealing;
            let head_length = head.len();
            stored.splice(start..start, head);
            start += head_length;
        }
        let Sealing::Within(within) = &mut self.0 else { return };
        let (cipher, mac) = &mut **within;
        let mut sealed = [0; STEP + BLOCK];
        for piece in stored[start..].chunks_mut(STEP) {
            let update = cipher.update(piece, &mut sealed).expect("there is room");
            // CTR is a stream cipher: the lengths are equal.
            piece.copy_from_slice(update.written());
            mac.update(piece);
        }
    }

    /// Appends the rest.
    pub fn finish(self, stored: &mut Vec<u8>) {
        if let Sealing::Within(within) = self.0 {
            stored.extend_from_slice(within.1.sign().as_ref());
        }
    }
}

impl Sealing {
    /// Also returns what stands before the content.
    fn begin(key: &PublicKey, secrets: &[u8; SECRETS_LENGTH]) -> (Self, Vec<u8>) {
        let wrapped = key.wrap(secrets);
        let length = u16::try_from(wrapped.len()).expect("no RSA key has more than 8192 bits");
        let head = [&MAGIC[..], &length.to_be_bytes(), &wrapped].concat();
        let (key, counter, mac) = split(secrets);
        let context = EncryptionContext::Iv128(FixedLength::from(counter));
        let cipher = UnboundCipherKey::new(&AES_128, key)
            .and_then(|key| StreamingEncryptingKey::less_safe_ctr(key, context))
            .expect("16 bytes are an AES-128 key");
        (Self::Within(Box::new((cipher, mac))), head)
    }
}

fn split(secrets: &[u8; SECRETS_LENGTH]) -> (&[u8], &[u8; 16], hmac::Context) {
    let (key, rest) = secrets.split_at(16);
    let (counter, mac) = rest.split_first_chunk().expect("48 bytes have 16 at their start");
    (key, counter, hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, mac)))
}

/// Opens one object, in chunks of any size.
///
/// What it gives out before [`Opener::finish`] says yes is not proven, only well kept apart from the 32
/// bytes at the end, whose place is not known before the end.
pub struct Opener {
    keys: Vec<PrivateKey>,
    state: Opening,
}

enum Opening {
    Head(Vec<u8>),
    Body(Box<Body>),
}

struct Body {
    cipher: StreamingDecryptingKey,
    mac: hmac::Context,
    /// The last bytes so far, at most 32: they may be the authentication code.
    held: Vec<u8>,
}

impl Opener {
    /// `keys` is the one that the object names, or all there are when its metadata is lost.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a PrivateKey>) -> Self {
        Self { keys: keys.into_iter().cloned().collect(), state: Opening::Head(Vec::new()) }
    }

    /// Takes the next stored bytes; appends to `content` what is ready. After an error there is nothing
    /// more to be had.
    pub fn push(&mut self, mut stored: &[u8], content: &mut Vec<u8>) -> Result<(), EnvelopeError> {
        if let Opening::Head(head) = &mut self.state {
            take(head, &mut stored, HEAD_LENGTH);
            let known = head.len().min(MAGIC.len());
            if head[..known] != MAGIC[..known] {
                return Err(EnvelopeError::NoEnvelope);
            }
            let Some(&[high, low]) = head.get(MAGIC.len()..HEAD_LENGTH).and_then(<[u8]>::first_chunk) else {
                return Ok(());
            };
            let length = HEAD_LENGTH + usize::from(u16::from_be_bytes([high, low]));
            take(head, &mut stored, length);
            if head.len() < length {
                return Ok(());
            }
            let body = begin(&self.keys, &head[HEAD_LENGTH..])?;
            self.state = Opening::Body(Box::new(body));
        }
        if let Opening::Body(body) = &mut self.state {
            body.push(stored, content);
        }
        Ok(())
    }

    /// Ends the object. Only now is everything that was given out known to be what was locked.
    ///
    /// An object without a single byte is one whose content was empty; a caller who knows better compares
    /// the length.
    pub fn finish(self) -> Result<(), EnvelopeError> {
        match self.state {
            Opening::Head(head) if head.is_empty() => Ok(()),
            Opening::Head(_) => Err(EnvelopeError::Truncated),
            Opening::Body(body) if body.held.len() < MAC_LENGTH => Err(EnvelopeError::Truncated),
            Opening::Body(body) => {
                constant_time::verify_slices_are_equal(body.mac.sign().as_ref(), &body.held)
                    .map_err(|_| EnvelopeError::Altered)
            }
        }
    }
}

fn begin(keys: &[PrivateKey], wrapped: &[u8]) -> Result<Body, EnvelopeError> {
    let fitting = keys.iter().filter(|key| key.wrapped_length() == wrapped.len());
    let secrets = fitting
        .filter_map(|key| key.unwrap(wrapped))
        .find_map(|secrets| <[u8; SECRETS_LENGTH]>::try_from(secrets).ok())
        .ok_or_else(|| EnvelopeError::Refused(keys.iter().map(|key| key.id().clone()).collect()))?;
    let (key, counter, mac) = split(&secrets);
    let context = DecryptionContext::Iv128(FixedLength::from(counter));
    let cipher = UnboundCipherKey::new(&AES_128, key)
        .and_then(|key| StreamingDecryptingKey::ctr(key, context))
        .expect("16 bytes are an AES-128 key");
    Ok(Body { cipher, mac, held: Vec::with_capacity(MAC_LENGTH) })
}

/// Moves bytes from `from` until `to` has `length` of them.
fn take(to: &mut Vec<u8>, from: &mut &[u8], length: usize) {
    let (now, later) = from.split_at(length.saturating_sub(to.len()).min(from.len()));
    to.extend_from_slice(now);
    *from = later;
}

impl Body {
    fn push(&mut self, stored: &[u8], content: &mut Vec<u8>) {
        let sure = (self.held.len() + stored.len()).saturating_sub(MAC_LENGTH);
        let of_held = sure.min(self.held.len());
        let held: Vec<u8> = self.held.drain(..of_held).collect();
        self.open(&held, content);
        let (now, later) = stored.split_at(sure - of_held);
        self.open(now, content);
        self.held.extend_from_slice(later);
    }

    fn open(&mut self, ciphertext: &[u8], content: &mut Vec<u8>) {
        for piece in ciphertext.chunks(STEP) {
            self.mac.update(piece);
            let start = content.len();
            content.resize(start + piece.len() + BLOCK, 0);
            let update = self.cipher.update(piece, &mut content[start..]).expect("there is room");
            assert_eq!(update.written().len(), piece.len(), "CTR is a stream cipher");
            content.truncate(start + piece.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::tests::{key_id, pair, ring};
    use super::*;
    use crate::codec::NewKeyPair;
    use proptest::prelude::*;

    fn seal<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let ring = ring();
        let mut sealer = Sealer::new(ring.writing().unwrap());
        let mut stored = Vec::new();
        chunks.into_iter().for_each(|chunk| sealer.push(chunk, &mut stored));
        sealer.finish(&mut stored);
        stored
    }

    fn open<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<u8>, EnvelopeError> {
        let mut opener = Opener::new(ring().privates());
        let mut content = Vec::new();
        chunks.into_iter().try_for_each(|chunk| opener.push(chunk, &mut content))?;
        opener.finish().map(|()| content)
    }

    #[test]
    fn the_form_is_pghoards() {
        let stored = seal([&b"content"[..]]);
        assert_eq!(&stored[..8], b"pghoa1\x01\x80");
        assert_eq!(stored.len(), 8 + 384 + 7 + 32);
        assert!(is_sealed(&stored));
        assert_eq!(seal([&b""[..]]), b"");
        assert_eq!(open([]).unwrap(), b"");
        assert_ne!(seal([&b"content"[..]])[392..], stored[392..], "every object has its own key");
    }

    #[test]
    fn the_counter_is_one_number_of_128_bits() {
        // From the AES of another library, block by block: the counter wraps round to zero after the first.
        let mut secrets = [0xFF; SECRETS_LENGTH];
        secrets[..16].copy_from_slice(b"0123456789abcdef");
        let (ring, mut stored) = (ring(), Vec::new());
        let mut sealer = Sealer(Sealing::begin(ring.writing().unwrap(), &secrets).0);
        sealer.push(&[0; 32], &mut stored);
        let expected = "31e27f7c3b91dc3173ef57bf4f693ceb0b9b15da4b44a0f5151dcfc4c01f35d5";
        assert_eq!(format!("{:032x}", u128::from_be_bytes(stored[..16].try_into().unwrap())), expected[..32]);
        assert_eq!(format!("{:032x}", u128::from_be_bytes(stored[16..].try_into().unwrap())), expected[32..]);
    }

    #[test]
    fn a_wrong_key_is_named() {
        let stored = seal([&b"content"[..]]);
        let other = NewKeyPair::generate();
        let key = PrivateKey::from_pem(&key_id("other"), &other.private).unwrap();
        let error = Opener::new([&key]).push(&stored, &mut Vec::new()).unwrap_err();
        assert_eq!(error, EnvelopeError::Refused(vec![key_id("other")]));
        assert!(error.to_string().starts_with("the private key `other` does not open it"), "{error}");
        // With the name of the key lost, every key is tried.
        let right = PrivateKey::from_pem(&key_id("right"), &pair().private).unwrap();
        let mut content = Vec::new();
        let mut opener = Opener::new([&key, &right]);
        opener.push(&stored, &mut content).unwrap();
        opener.finish().unwrap();
        assert_eq!(content, b"content");
    }

    #[test]
    fn no_flipped_byte_and_no_cut_passes() {
        let stored = seal([&b"some content"[..]]);
        for at in 0..stored.len() {
            // Without optimisation each try at the wrapped key takes milliseconds; a third of them will do.
            if (8..392).contains(&at) && at % 3 != 0 {
                continue;
            }
            let mut damaged = stored.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(open([&damaged[..]]).is_err(), "byte {at}");
        }
        for length in 1..stored.len() {
            assert!(open([&stored[..length]]).is_err(), "cut to {length}");
        }
        let mut longer = stored.clone();
        longer.push(0);
        assert_eq!(open([&longer[..]]), Err(EnvelopeError::Altered));
        // The code stripped, the code of another object, the content of another.
        assert_eq!(open([&stored[..stored.len() - 32]]), Err(EnvelopeError::Truncated));
        let other = seal([&b"some content"[..]]);
        let swapped = [&stored[..stored.len() - 32], &other[other.len() - 32..]].concat();
        assert_eq!(open([&swapped[..]]), Err(EnvelopeError::Altered));
        let swapped = [&stored[..392], &other[392..]].concat();
        assert_eq!(open([&swapped[..]]), Err(EnvelopeError::Altered));
        assert_eq!(open([&b"plain text"[..]]), Err(EnvelopeError::NoEnvelope));
    }

    #[test]
    fn opens_at_every_split() {
        let stored = seal([&b"some"[..], b"", b" content"]);
        for cut in 0..=stored.len() {
            let (head, tail) = stored.split_at(cut);
            assert_eq!(open([head, tail]).unwrap(), b"some content", "{cut}");
        }
        for size in [1, 7, 31, 32, 33] {
            assert_eq!(open(stored.chunks(size)).unwrap(), b"some content", "{size}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn round_trips_in_any_chunks(
            content in prop::collection::vec(any::<u8>(), 0..100_000),
            seal_size in 1..40_000_usize,
            open_size in 1..40_000_usize,
        ) {
            let stored = seal(content.chunks(seal_size));
            if !content.is_empty() {
                prop_assert_eq!(stored.len(), 8 + 384 + content.len() + 32);
            }
            prop_assert_eq!(open(stored.chunks(open_size)).unwrap(), content);
        }

        #[test]
        fn no_change_to_what_is_locked_goes_unseen(
            content in prop::collection::vec(any::<u8>(), 1..50_000),
            at: prop::sample::Index,
            change in 1..=255_u8,
            cut: prop::sample::Index,
            size in 1..20_000_usize,
        ) {
            let mut stored = seal([&content[..]]);
            let kept = 1 + cut.index(stored.len() - 1);
            prop_assert!(open(stored[..kept].chunks(size)).is_err());
            let at = at.index(stored.len());
            stored[at] ^= change;
            prop_assert!(open(stored.chunks(size)).is_err());
        }
    }
}
