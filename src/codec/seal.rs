//! Our own encryption of base backups: AES-256-GCM under a key that is made for one backup.
//!
//! Pure. The key is wrapped for the configured RSA key (OAEP with SHA-256, the backup's name as label) and
//! kept in the backup's record; it never lies anywhere unwrapped. Three keys are derived from it
//! (HKDF-SHA-256), one for each use:
//!
//! * **frames**: each frame on its own, its nonce being its place: the pack's number and the frame's offset
//!   in it. A frame therefore opens at its own place only, in its own backup, at its own length.
//! * **list**: a stream in pieces of up to 64 KiB, whose nonces are their numbers and whether they are the
//!   last. Before each stand four bytes, big-endian: its length, and in the highest bit that it is the last.
//! * **record**: an HMAC, which proves that the record is the one that was written with the key.
//!
//! **No nonce comes twice under one key.** The key is fresh from the system's randomness whenever a backup
//! begins, and a program that starts again cannot know an earlier one. Within a run, [`SealingKey`] is not
//! cloned, gives out each pack number once (they must rise), and begins one list; a [`PackSealer`] counts its
//! own offset, which grows with each frame; a [`StreamSealer`] counts its pieces. An upload that is repeated
//! sends the bytes that were sealed once.

use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::{constant_time, hkdf, hmac, rand};

use super::envelope::EnvelopeError;
use super::keys::{PrivateKey, PublicKey};

/// What sealing adds to a frame.
pub const SEAL_LENGTH: usize = 16;

const KEY_LENGTH: usize = 32;

/// The most plaintext in one piece of a stream.
const PIECE: usize = 64 << 10;
const PIECE_HEAD: usize = 4;
const LAST: u32 = 1 << 31;

/// Sealed bytes that do not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not what was sealed, or not at the place it was sealed for")]
pub struct SealError;

/// The three keys of one backup.
struct Keys {
    frames: LessSafeKey,
    list: LessSafeKey,
    record: hmac::Key,
    /// The backup's name; part of everything that is sealed.
    context: Vec<u8>,
}

impl Keys {
    fn derive(secret: &[u8; KEY_LENGTH], context: &[u8]) -> Arc<Self> {
        let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"pgkeep backup").extract(secret);
        let derived = |purpose: &[u8]| {
            let mut key = [0; KEY_LENGTH];
            root.expand(&[purpose], hkdf::HKDF_SHA256)
                .and_then(|key_material| key_material.fill(&mut key))
                .expect("32 bytes are what one round gives");
            key
        };
        let aead = |purpose: &[u8]| {
            let key = UnboundKey::new(&AES_256_GCM, &derived(purpose)).expect("32 bytes are an AES-256 key");
            LessSafeKey::new(key)
        };
        Arc::new(Self {
            frames: aead(b"frames"),
            list: aead(b"list"),
            record: hmac::Key::new(hmac::HMAC_SHA256, &derived(b"record")),
            context: context.to_vec(),
        })
    }

    fn prove(&self, content: &[u8]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.record);
        context.update(content);
        context.sign().as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

fn seal(key: &LessSafeKey, nonce: [u8; NONCE_LEN], context: &[u8], content: &[u8], sealed: &mut Vec<u8>) {
    let start = sealed.len();
    sealed.reserve(content.len() + SEAL_LENGTH);
    sealed.extend_from_slice(content);
    let nonce = Nonce::assume_unique_for_key(nonce);
    let tag = key
        .seal_in_place_separate_tag(nonce, Aad::from(context), &mut sealed[start..])
        .expect("what is sealed is far below the cipher's limit");
    sealed.extend_from_slice(tag.as_ref());
}

fn open(
    key: &LessSafeKey,
    nonce: [u8; NONCE_LEN],
    context: &[u8],
    sealed: &[u8],
    content: &mut Vec<u8>,
) -> Result<(), SealError> {
    let start = content.len();
    content.extend_from_slice(sealed);
    let nonce = Nonce::assume_unique_for_key(nonce);
    let opened = key
        .open_in_place(nonce, Aad::from(context), &mut content[start..])
        .map(|opened| opened.len())
        .map_err(|_| SealError);
    content.truncate(start + *opened.as_ref().unwrap_or(&0));
    opened.map(drop)
}

/// The place of a frame.
fn frame_nonce(pack: u32, offset: u64) -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    nonce[..4].copy_from_slice(&pack.to_be_bytes());
    nonce[4..].copy_from_slice(&offset.to_be_bytes());
    nonce
}

fn piece_nonce(number: u64, is_last: bool) -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    nonce[..8].copy_from_slice(&number.to_be_bytes());
    nonce[NONCE_LEN - 1] = is_last.into();
    nonce
}

/// The key of a backup that is being written. There is one, and it is not cloned.
pub struct SealingKey {
    keys: Arc<Keys>,
    wrapped: Vec<u8>,
    last_pack: Option<u32>,
    list_begun: bool,
}

impl SealingKey {
    /// Makes a fresh key for the backup named by `context`, to be opened by the owner of `key`.
    ///
    /// # Panics
    /// When the system has no randomness to give.
    pub fn generate(key: &PublicKey, context: &[u8]) -> Self {
        let mut secret = [0; KEY_LENGTH];
        rand::fill(&mut secret).expect("the system gives randomness");
        let wrapped = key.wrap_labelled(&secret, context);
        Self { keys: Keys::derive(&secret, context), wrapped, last_pack: None, list_begun: false }
    }

    /// The key as it may be stored: only the private key opens it.
    pub fn wrapped(&self) -> &[u8] {
        &self.wrapped
    }

    /// Begins the pack `number`.
    ///
    /// # Panics
    /// When that number, or a higher one, was begun before: nonces would come twice.
    pub fn pack(&mut self, number: u32) -> PackSealer {
        assert!(self.last_pack.is_none_or(|last| last < number), "each pack is begun once");
        self.last_pack = Some(number);
        PackSealer { keys: Arc::clone(&self.keys), pack: number, offset: 0 }
    }

    /// Begins the file list.
    ///
    /// # Panics
    /// When it was begun before: nonces would come twice.
    pub fn list(&mut self) -> StreamSealer {
        assert!(!self.list_begun, "a backup has one file list");
        self.list_begun = true;
        StreamSealer { keys: Arc::clone(&self.keys), number: 0, piece: Vec::new() }
    }

    /// What proves that the record with this content was written with the key.
    pub fn prove(&self, content: &[u8]) -> [u8; 32] {
        self.keys.prove(content)
    }
}

/// Seals the frames of one pack, in order.
pub struct PackSealer {
    keys: Arc<Keys>,
    pack: u32,
    offset: u64,
}

impl PackSealer {
    /// Seals the next frame, which gets [`SEAL_LENGTH`] bytes longer.
    pub fn seal(&mut self, frame: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::new();
        let nonce = frame_nonce(self.pack, self.offset);
        seal(&self.keys.frames, nonce, &self.keys.context, frame, &mut sealed);
        self.offset += sealed.len() as u64;
        sealed
    }
}

/// Seals a stream, in chunks of any size.
pub struct StreamSealer {
    keys: Arc<Keys>,
    number: u64,
    /// Not sealed before it is known whether it is the last.
    piece: Vec<u8>,
}

impl StreamSealer {
    /// Takes the next bytes of content; appends to `sealed` what is ready.
    pub fn push(&mut self, mut content: &[u8], sealed: &mut Vec<u8>) {
        while !content.is_empty() {
            if self.piece.len() == PIECE {
                self.seal(false, sealed);
            }
            let (now, later) = content.split_at((PIECE - self.piece.len()).min(content.len()));
            self.piece.extend_from_slice(now);
            content = later;
        }
    }

    /// Appends the last piece, which is there even when it is empty.
    pub fn finish(mut self, sealed: &mut Vec<u8>) {
        self.seal(true, sealed);
    }

    fn seal(&mut self, is_last: bool, sealed: &mut Vec<u8>) {
        let length = u32::try_from(self.piece.len()).expect("a piece is short");
        let head = length | if is_last { LAST } else { 0 };
        sealed.extend_from_slice(&head.to_be_bytes());
        seal(&self.keys.list, piece_nonce(self.number, is_last), &self.keys.context, &self.piece, sealed);
        self.number += 1;
        self.piece.clear();
    }
}

/// The key of a backup that is read. Cheap to clone.
#[derive(Clone)]
pub struct OpeningKey(Arc<Keys>);

impl OpeningKey {
    /// Unwraps the key of the backup named by `context`.
    pub fn unwrap(key: &PrivateKey, wrapped: &[u8], context: &[u8]) -> Result<Self, EnvelopeError> {
        key.unwrap_labelled(wrapped, context)
            .and_then(|secret| <[u8; KEY_LENGTH]>::try_from(secret).ok())
            .map(|secret| Self(Keys::derive(&secret, context)))
            .ok_or_else(|| EnvelopeError::Refused(vec![key.id().clone()]))
    }

    /// Replaces the content of `frame` by what the frame at this place holds. On an error it is empty.
    pub fn open_frame(
        &self,
        pack: u32,
        offset: u64,
        sealed: &[u8],
        frame: &mut Vec<u8>,
    ) -> Result<(), SealError> {
        frame.clear();
        open(&self.0.frames, frame_nonce(pack, offset), &self.0.context, sealed, frame)
    }

    /// Begins to open the file list.
    pub fn list(&self) -> StreamOpener {
        StreamOpener { keys: Arc::clone(&self.0), number: 0, piece: Vec::new(), ended: false }
    }

    /// Whether `proof` is that of a record with this content.
    pub fn verify(&self, content: &[u8], proof: &[u8]) -> Result<(), SealError> {
        constant_time::verify_slices_are_equal(&self.0.prove(content), proof).map_err(|_| SealError)
    }
}

impl std::fmt::Debug for OpeningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OpeningKey(***)")
    }
}

/// Opens a stream, in chunks of any size. What it gives out is proven, but for whether more should follow:
/// that [`StreamOpener::finish`] tells.
pub struct StreamOpener {
    keys: Arc<Keys>,
    number: u64,
    /// What has arrived of the next piece, its head included.
    piece: Vec<u8>,
    ended: bool,
}

impl StreamOpener {
    /// Takes the next sealed bytes; appends to `content` what is ready.
    pub fn push(&mut self, mut sealed: &[u8], content: &mut Vec<u8>) -> Result<(), SealError> {
        while !sealed.is_empty() {
            if self.ended {
                return Err(SealError);
            }
            if !self.fill(&mut sealed, PIECE_HEAD) {
                break;
            }
            let head = self.piece.first_chunk().map_or(0, |head| u32::from_be_bytes(*head));
            let (is_last, length) = (head & LAST != 0, (head & !LAST) as usize);
            if length > PIECE {
                return Err(SealError);
            }
            if !self.fill(&mut sealed, PIECE_HEAD + length + SEAL_LENGTH) {
                break;
            }
            let nonce = piece_nonce(self.number, is_last);
            open(&self.keys.list, nonce, &self.keys.context, &self.piece[PIECE_HEAD..], content)?;
            self.number += 1;
            self.ended = is_last;
            self.piece.clear();
        }
        Ok(())
    }

    /// Fills the piece up to `length` bytes; false when `sealed` has not enough for that.
    fn fill(&mut self, sealed: &mut &[u8], length: usize) -> bool {
        let (now, later) = sealed.split_at(length.saturating_sub(self.piece.len()).min(sealed.len()));
        self.piece.extend_from_slice(now);
        *sealed = later;
        self.piece.len() >= length
    }

    /// Ends the stream.
    pub fn finish(self) -> Result<(), SealError> {
        if self.ended { Ok(()) } else { Err(SealError) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::tests::{key_id, pair, ring};
    use super::*;
    use proptest::prelude::*;

    fn keys() -> (SealingKey, OpeningKey) {
        let ring = ring();
        let sealing = SealingKey::generate(ring.writing().unwrap(), b"backup a");
        let private = ring.private(&key_id("main")).unwrap();
        let opening = OpeningKey::unwrap(private, sealing.wrapped(), b"backup a").unwrap();
        (sealing, opening)
    }

    #[test]
    fn a_frame_opens_at_its_own_place_only() {
        let (mut sealing, opening) = keys();
        let (mut one, mut two) = (sealing.pack(1), sealing.pack(2));
        let (first, second) = (one.seal(b"first"), one.seal(b"second"));
        let other = two.seal(b"first");
        assert_eq!(first.len(), 5 + SEAL_LENGTH);
        assert_ne!(first, other, "the same content is sealed differently in another pack");
        let open = |pack, offset, sealed: &[u8]| {
            let mut frame = b"left over".to_vec();
            let result = opening.open_frame(pack, offset, sealed, &mut frame);
            assert!(result.is_ok() || frame.is_empty());
            result.map(|()| frame)
        };
        assert_eq!(open(1, 0, &first).unwrap(), b"first");
        assert_eq!(open(1, first.len() as u64, &second).unwrap(), b"second");
        for (pack, offset, sealed) in
            [(1, 0, &second), (1, first.len() as u64, &first), (2, 0, &first), (1, 0, &other), (1, 1, &first)]
        {
            assert_eq!(open(pack, offset, sealed), Err(SealError));
        }
        let elsewhere = keys().1.open_frame(1, 0, &first, &mut Vec::new());
        assert_eq!(elsewhere, Err(SealError), "another backup's key");
    }

    #[test]
    fn a_key_is_that_of_one_backup_and_one_private_key() {
        let (sealing, _) = keys();
        let private = PrivateKey::from_pem(&key_id("k1"), &pair().private).unwrap();
        assert!(OpeningKey::unwrap(&private, sealing.wrapped(), b"backup b").is_err());
        let mut damaged = sealing.wrapped().to_vec();
        damaged[7] ^= 1;
        let error = OpeningKey::unwrap(&private, &damaged, b"backup a").unwrap_err();
        assert!(error.to_string().contains("`k1`"), "{error}");
        assert!(OpeningKey::unwrap(&private, b"", b"backup a").is_err());
    }

    #[test]
    fn a_record_is_proven_by_the_key() {
        let (sealing, opening) = keys();
        let mut proof = sealing.prove(b"record");
        opening.verify(b"record", &proof).unwrap();
        assert_eq!(opening.verify(b"Record", &proof), Err(SealError));
        proof[31] ^= 1;
        assert_eq!(opening.verify(b"record", &proof), Err(SealError));
        assert_eq!(opening.verify(b"record", b""), Err(SealError));
    }

    #[test]
    #[should_panic(expected = "each pack is begun once")]
    fn no_pack_is_begun_twice() {
        let (mut sealing, _) = keys();
        let _ = (sealing.pack(1), sealing.pack(1));
    }

    #[test]
    #[should_panic(expected = "one file list")]
    fn no_list_is_begun_twice() {
        let (mut sealing, _) = keys();
        let _ = (sealing.list(), sealing.list());
    }

    fn open_stream(key: &OpeningKey, sealed: &[u8], size: usize) -> Result<Vec<u8>, SealError> {
        let mut opener = key.list();
        let mut content = Vec::new();
        sealed.chunks(size).try_for_each(|chunk| opener.push(chunk, &mut content))?;
        opener.finish()?;
        Ok(content)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_stream_round_trips_and_no_change_passes(
            length in prop_oneof![
                0..200_usize,
                PIECE - 2..PIECE + 3,
                2 * PIECE - 2..2 * PIECE + 3,
                100_000..300_000_usize
            ],
            push in 1..100_000_usize,
            take in 1..100_000_usize,
            at: prop::sample::Index,
            bit in 0..8_u8,
            cut: prop::sample::Index,
        ) {
            let content: Vec<u8> = (0..=250).cycle().take(length).collect();
            let (mut sealing, opening) = keys();
            let (mut sealer, mut sealed) = (sealing.list(), Vec::new());
            content.chunks(push).for_each(|chunk| sealer.push(chunk, &mut sealed));
            sealer.finish(&mut sealed);
            let pieces = length.div_ceil(PIECE).max(1);
            prop_assert_eq!(sealed.len(), length + pieces * (SEAL_LENGTH + PIECE_HEAD));
            prop_assert!(open_stream(&opening, &sealed, take).unwrap() == content);

            // Cut anywhere, between two pieces too; and two pieces exchanged.
            prop_assert!(open_stream(&opening, &sealed[..cut.index(sealed.len())], take).is_err());
            let sealed_piece = PIECE_HEAD + PIECE + SEAL_LENGTH;
            let whole = length / PIECE * sealed_piece;
            if whole > 0 && whole < sealed.len() {
                prop_assert!(open_stream(&opening, &sealed[..whole], take).is_err());
            }
            if length > 2 * PIECE {
                let mut swapped = sealed.clone();
                let (one, two) = swapped.split_at_mut(sealed_piece);
                one.swap_with_slice(&mut two[..sealed_piece]);
                prop_assert!(open_stream(&opening, &swapped, take).is_err());
            }
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(open_stream(&opening, &sealed, take).is_err());
        }
    }
}
