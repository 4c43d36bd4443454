//! The reading half of the pipeline: decrypt, decompress, then count and compare.
//!
//! Pure. Output is bounded on every call, so that a few stored bytes which unfold into gigabytes cost
//! no more memory than the caller has room for.

use super::compress::Compression;
use super::decompress::Decompressor;
use super::digest::{Digest, Hasher, NamedHash, NamedHasher};
use super::encoder::Summary;
use super::envelope::{EnvelopeError, Opener};
use super::keys::PrivateKey;
use super::seal::{SealError, StreamOpener};

/// What the decoded bytes must turn out to be, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    pub length: Option<u64>,
    pub digest: Option<Digest>,
}

/// Stored bytes that are not what was stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the {compression} data is corrupt: {reason}")]
    Corrupt { compression: Compression, reason: String },
    #[error("the {compression} data wants a dictionary of more than {} MiB", limit >> 20)]
    Dictionary { compression: Compression, limit: u64 },
    #[error(transparent)]
    Envelope(#[from] EnvelopeError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("the {0} data ends too early")]
    Truncated(Compression),
    #[error("it decodes to {actual} bytes instead of {expected}")]
    Length { expected: u64, actual: u64 },
    #[error("it decodes to more than {expected} bytes")]
    TooLong { expected: u64 },
    #[error("it decodes to other content: digest {actual} instead of {expected}")]
    Content { expected: Digest, actual: Digest },
    #[error("it decodes to other content: {algorithm} {actual} instead of {expected}")]
    Hash { algorithm: &'static str, expected: String, actual: String },
}

/// Turns the stored bytes of one object, in chunks of any size, back into verified plaintext.
pub struct Decoder {
    hasher: Hasher,
    named: Option<(NamedHash, NamedHasher)>,
    expected: Expected,
    stored_length: u64,
    opening: Option<Box<Opening>>,
    decompressor: Decompressor,
}

enum AnyOpener {
    Envelope(Opener),
    Stream(StreamOpener),
}

/// An encrypted object and what has been decrypted of it, but not decompressed.
struct Opening {
    opener: AnyOpener,
    content: Vec<u8>,
    taken: usize,
}

/// Stored bytes per turn of the decryption.
const OPENING_STEP: usize = 64 << 10;

impl Decoder {
    pub fn new(compression: Compression, expected: Expected) -> Self {
        Self::of(Some(compression), expected)
    }

    /// A decoder for an object whose metadata is lost: its first bytes decide how it is compressed.
    pub fn detecting(expected: Expected) -> Self {
        Self::of(None, expected)
    }

    fn of(compression: Option<Compression>, expected: Expected) -> Self {
        let decompressor = Decompressor::new(compression);
        Self { hasher: Hasher::new(), named: None, expected, stored_length: 0, opening: None, decompressor }
    }

    /// Has the stored bytes taken out of PGHoard's envelope: with the key that the object names, or whichever
    /// of all keys opens it. Call it before the first push.
    #[must_use]
    pub fn encrypted<'a>(self, keys: impl IntoIterator<Item = &'a PrivateKey>) -> Self {
        self.with_opener(AnyOpener::Envelope(Opener::new(keys)))
    }

    /// Has the stored bytes opened with a backup's own key. Call it before the first push.
    #[must_use]
    pub fn sealed(self, opener: StreamOpener) -> Self {
        self.with_opener(AnyOpener::Stream(opener))
    }

    fn with_opener(mut self, opener: AnyOpener) -> Self {
        self.opening = Some(Box::new(Opening { opener, content: Vec::new(), taken: 0 }));
        self
    }

    /// Has the plaintext compared with a hash of PGHoard's as well. Call it before the first push.
    #[must_use]
    pub fn hashed(mut self, expected: NamedHash) -> Self {
        self.named = Some((expected, NamedHasher::new(expected.algorithm())));
        self
    }

    /// Takes stored bytes from `input`, moving it forward, and appends about `room` bytes of plaintext at
    /// most (a snappy chunk, 64 KiB, may go beyond). Whatever is left in `input` belongs to the next call;
    /// everything that can be decoded so far has been when `input` is empty and less than `room` was
    /// appended.
    pub fn push(&mut self, input: &mut &[u8], room: usize, plaintext: &mut Vec<u8>) -> Result<(), Error> {
        let (before, length) = (plaintext.len(), input.len());
        match &mut self.opening {
            None => self.decompressor.push(input, room, plaintext)?,
            Some(opening) => opening.push(&mut self.decompressor, input, room, plaintext)?,
        }
        self.stored_length += (length - input.len()) as u64;
        self.hasher.update(&plaintext[before..]);
        if let Some((_, named)) = &mut self.named {
            named.update(&plaintext[before..]);
        }
        match self.expected.length {
            Some(expected) if self.hasher.length() > expected => Err(Error::TooLong { expected }),
            _ => Ok(()),
        }
    }

    /// Whether plaintext may be waiting although all input has been taken.
    pub fn has_more(&self) -> bool {
        self.decompressor.has_more()
            || self.opening.as_ref().is_some_and(|opening| !opening.rest().is_empty())
    }

    /// Ends the object. Only now is everything that [`Decoder::push`] gave known to be what was stored.
    pub fn finish(mut self) -> Result<Summary, Error> {
        if let Some(opening) = self.opening {
            match opening.opener {
                AnyOpener::Envelope(opener) => opener.finish()?,
                AnyOpener::Stream(opener) => opener.finish()?,
            }
        }
        self.decompressor.finish()?;
        let actual = self.hasher.length();
        if let Some(expected) = self.expected.length
            && expected != actual
        {
            return Err(Error::Length { expected, actual });
        }
        let digest = self.hasher.digest();
        if let Some(expected) = self.expected.digest
            && expected != digest
        {
            return Err(Error::Content { expected, actual: digest });
        }
        let hash = match self.named {
            None => None,
            Some((expected, named)) => match named.finish() {
                actual if actual != expected => {
                    let algorithm = expected.algorithm().name();
                    let (expected, actual) = (expected.to_string(), actual.to_string());
                    return Err(Error::Hash { algorithm, expected, actual });
                }
                actual => Some(actual),
            },
        };
        let stored_length = self.stored_length;
        Ok(Summary { plaintext_length: actual, stored_length, digest, hash, stored_digest: None })
    }
}

impl Opening {
    fn rest(&self) -> &[u8] {
        &self.content[self.taken..]
    }

    fn push(
        &mut self,
        decompressor: &mut Decompressor,
        input: &mut &[u8],
        room: usize,
        plaintext: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let start = plaintext.len();
        loop {
            let left = room.saturating_sub(plaintext.len() - start);
            if left == 0 {
                return Ok(());
            }
            let mut rest = &self.content[self.taken..];
            decompressor.push(&mut rest, left, plaintext)?;
            self.taken = self.content.len() - rest.len();
            if plaintext.len() - start >= room || input.is_empty() {
                return Ok(());
            }
            let (now, later) = input.split_at(OPENING_STEP.min(input.len()));
            // The decompressor had room, so it has taken everything.
            self.content.clear();
            self.taken = 0;
            match &mut self.opener {
                AnyOpener::Envelope(opener) => opener.push(now, &mut self.content)?,
                AnyOpener::Stream(opener) => opener.push(now, &mut self.content)?,
            }
            *input = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::compress::SNAPPY_STREAM_HEADER;
    use super::super::decompress::SNAPPY_MAX_PLAIN;
    use super::super::keys::tests::ring;
    use super::*;
    use crate::codec::Encoder;
    use proptest::prelude::*;

    fn encode<'a>(
        compression: Compression,
        chunks: impl IntoIterator<Item = &'a [u8]>,
    ) -> (Vec<u8>, Summary) {
        let mut encoder = Encoder::new(compression, 0);
        let mut stored = Vec::new();
        for chunk in chunks {
            encoder.push(chunk, &mut stored);
        }
        let summary = encoder.finish(&mut stored);
        assert_eq!(summary.stored_length, stored.len() as u64);
        (stored, summary)
    }

    fn decode<'a>(
        compression: Compression,
        expected: Expected,
        chunks: impl IntoIterator<Item = &'a [u8]>,
        room: usize,
    ) -> Result<Vec<u8>, Error> {
        decode_with(Decoder::new(compression, expected), chunks, room)
    }

    fn decode_with<'a>(
        mut decoder: Decoder,
        chunks: impl IntoIterator<Item = &'a [u8]>,
        room: usize,
    ) -> Result<Vec<u8>, Error> {
        let mut plaintext = Vec::new();
        for mut chunk in chunks {
            while !chunk.is_empty() || decoder.has_more() {
                let before = plaintext.len();
                decoder.push(&mut chunk, room, &mut plaintext)?;
                assert!(plaintext.len() - before <= room + SNAPPY_MAX_PLAIN);
            }
        }
        decoder.finish().map(|_| plaintext)
    }

    fn known(summary: &Summary) -> Expected {
        Expected { length: Some(summary.plaintext_length), digest: Some(summary.digest) }
    }

    /// Text that compresses, with some noise in between.
    fn sample(length: usize) -> Vec<u8> {
        let mut state = 7_u64;
        (0..length)
            .map(|at| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if at % 97 < 80 { b"WAL record "[at % 11] } else { state.to_le_bytes()[7] }
            })
            .collect()
    }

    #[test]
    fn empty_input_is_stored_as_pghoard_does() {
        assert_eq!(encode(Compression::Snappy, []).0, b"");
        assert_eq!(decode(Compression::Snappy, Expected::default(), [], 1).unwrap(), b"");
        let (stored, summary) = encode(Compression::Zstd, []);
        assert!(stored.starts_with(&[0x28, 0xB5, 0x2F, 0xFD]));
        assert_eq!(decode(Compression::Zstd, known(&summary), [&stored[..]], 1).unwrap(), b"");
        assert_eq!(
            decode(Compression::Zstd, Expected::default(), [], 1),
            Err(Error::Truncated(Compression::Zstd))
        );
        let (stored, summary) = encode(Compression::Lzma, []);
        assert_eq!(stored.len(), 32);
        assert_eq!(decode(Compression::Lzma, known(&summary), [&stored[..]], 1).unwrap(), b"");
        assert_eq!(
            decode(Compression::Lzma, Expected::default(), [], 1),
            Err(Error::Truncated(Compression::Lzma))
        );
        let ring = ring();
        let encoder = || Encoder::new(Compression::Snappy, 0).encrypted(ring.writing().unwrap());
        let mut stored = Vec::new();
        encoder().finish(&mut stored);
        assert_eq!(stored, b"");
        let decoder = Decoder::new(Compression::Snappy, Expected::default()).encrypted(ring.privates());
        assert_eq!(decode_with(decoder, [], 1).unwrap(), b"");
    }

    #[test]
    fn what_is_not_declared_is_detected() {
        let ring = ring();
        for compression in Compression::ALL {
            for plaintext in [&b""[..], b"(", b"x", b"some text that is longer than any mark"] {
                let mut encoder = Encoder::new(compression, 0).encrypted(ring.writing().unwrap());
                let mut stored = Vec::new();
                encoder.push(plaintext, &mut stored);
                encoder.finish(&mut stored);
                let decoder = Decoder::detecting(Expected::default()).encrypted(ring.privates());
                let decoded = decode_with(decoder, stored.chunks(50), 3);
                // One byte of plain text that a zstd frame could begin with is the price of detection.
                if compression == Compression::None && plaintext == b"(" {
                    assert_eq!(decoded, Err(Error::Truncated(Compression::Zstd)));
                } else {
                    assert_eq!(decoded.unwrap(), plaintext, "{compression}");
                }
                let (stored, _) = encode(compression, [plaintext]);
                for cut in 0..=stored.len().min(12) {
                    let (head, tail) = stored.split_at(cut);
                    let decoded = decode_with(Decoder::detecting(Expected::default()), [head, tail], 3);
                    if plaintext != b"(" {
                        assert_eq!(decoded.unwrap(), plaintext, "{compression} {cut}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_lzma_preset_is_readable() {
        let plaintext = sample(300_000);
        for level in [-1, 0, 1, 6, 9, 100] {
            let mut encoder = Encoder::new(Compression::Lzma, level);
            let mut stored = Vec::new();
            encoder.push(&plaintext, &mut stored);
            let summary = encoder.finish(&mut stored);
            assert!(
                decode(Compression::Lzma, known(&summary), stored.chunks(777), 4096).unwrap() == plaintext
            );
        }
    }

    #[test]
    fn an_absurd_xz_dictionary_is_refused_before_it_is_set_aside() {
        use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
        let xz = |dictionary: u32| {
            let mut options = LzmaOptions::new_preset(0).unwrap();
            options.dict_size(dictionary);
            let stream = Stream::new_stream_encoder(Filters::new().lzma2(&options), Check::Crc64).unwrap();
            let mut writer = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
            std::io::Write::write_all(&mut writer, b"content").unwrap();
            writer.finish().unwrap()
        };
        let of_xz_9 = decode(Compression::Lzma, Expected::default(), [&xz(64 << 20)[..]], 100);
        assert_eq!(of_xz_9.unwrap(), b"content");
        let error = decode(Compression::Lzma, Expected::default(), [&xz(96 << 20)[..]], 100).unwrap_err();
        assert_eq!(error.to_string(), "the lzma data wants a dictionary of more than 64 MiB");
    }

    #[test]
    fn reads_what_the_reference_encoders_write() {
        let plaintext = sample(200_000);
        let mut snappy = snap::write::FrameEncoder::new(Vec::new());
        std::io::Write::write_all(&mut snappy, &plaintext).unwrap();
        let snappy = snappy.into_inner().unwrap();
        // PGHoard's zstd: no content size, no checksum.
        let zstd = zstd::encode_all(&plaintext[..], 3).unwrap();
        let xz = liblzma::encode_all(&plaintext[..], 6).unwrap();
        let all = [(Compression::Snappy, snappy), (Compression::Lzma, xz), (Compression::Zstd, zstd)];
        for (compression, stored) in all {
            let decoded = decode(compression, Expected::default(), stored.chunks(1000), 4096).unwrap();
            assert!(decoded == plaintext, "{compression}");
            assert_eq!(Compression::detect(&stored), compression);
        }
    }

    #[test]
    fn the_reference_decoders_read_what_we_write() {
        let plaintext = sample(300_000);
        let (zstd, _) = encode(Compression::Zstd, plaintext.chunks(777));
        assert!(zstd::decode_all(&zstd[..]).unwrap() == plaintext);
        // Bit 2 of the frame header descriptor is the checksum flag (RFC 8878, section 3.1.1.1.1).
        assert_eq!(zstd[4] & 0b100, 0b100, "the content checksum is on");
        let (xz, _) = encode(Compression::Lzma, plaintext.chunks(777));
        assert!(liblzma::decode_all(&xz[..]).unwrap() == plaintext);
        assert_eq!(xz[7], 4, "the check is CRC-64");
        let (snappy, _) = encode(Compression::Snappy, plaintext.chunks(777));
        let mut decoded = Vec::new();
        std::io::Read::read_to_end(&mut snap::read::FrameDecoder::new(&snappy[..]), &mut decoded).unwrap();
        assert!(decoded == plaintext);
    }

    #[test]
    fn takes_several_members_padding_and_skippable_chunks() {
        for compression in [Compression::Snappy, Compression::Lzma, Compression::Zstd] {
            let (mut stored, _) = encode(compression, [&b"first "[..]]);
            if compression == Compression::Lzma {
                stored.extend_from_slice(&[0; 8]);
            }
            if compression == Compression::Snappy {
                stored.extend_from_slice(b"\xFE\x02\x00\x00\0\0\x81\x03\x00\x00abc");
            }
            stored.extend(encode(compression, [&b"second"[..]]).0);
            for size in 1..stored.len() {
                let decoded = decode(compression, Expected::default(), stored.chunks(size), 3).unwrap();
                assert_eq!(decoded, b"first second");
            }
        }
    }

    #[test]
    fn a_bomb_is_stopped_at_the_expected_length() {
        for compression in [Compression::Lzma, Compression::Zstd] {
            let (stored, _) = encode(compression, std::iter::repeat_n(&vec![0_u8; 1 << 20][..], 64));
            assert!(stored.len() < 64 << 10);
            let expected = Expected { length: Some(1000), digest: None };
            let result = decode(compression, expected, [&stored[..]], 4096);
            assert_eq!(result, Err(Error::TooLong { expected: 1000 }));
        }
    }

    #[test]
    fn rubbish_behind_the_end_is_damage() {
        for compression in [Compression::Snappy, Compression::Lzma, Compression::Zstd] {
            let (mut stored, _) = encode(compression, [&b"content"[..]]);
            stored.push(7);
            assert!(decode(compression, Expected::default(), [&stored[..]], 100).is_err());
        }
    }

    #[test]
    fn reserved_snappy_chunks_are_refused() {
        let (mut stored, _) = encode(Compression::Snappy, [&b"content"[..]]);
        stored.extend_from_slice(b"\x02\x01\x00\x00x");
        assert!(decode(Compression::Snappy, Expected::default(), [&stored[..]], 100).is_err());
        assert!(
            decode(Compression::Snappy, Expected::default(), [&b"\x01\x05\x00\x00abcde"[..]], 100).is_err()
        );
    }

    #[test]
    fn no_truncation_and_no_flipped_bit_passes() {
        for compression in Compression::ALL {
            let plaintext = sample(1500);
            let (stored, summary) = encode(compression, [&plaintext[..]]);
            for length in 0..stored.len() {
                assert!(
                    decode(compression, known(&summary), [&stored[..length]], 512).is_err(),
                    "{compression} cut to {length}"
                );
                if matches!(compression, Compression::Lzma | Compression::Zstd) {
                    let alone = decode(compression, Expected::default(), [&stored[..length]], 512);
                    assert!(alone.is_err(), "a {compression} object shows truncation to {length} by itself");
                }
            }
            for bit in 0..stored.len() * 8 {
                let mut damaged = stored.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                // A bit without meaning may flip unseen; then the content is still the same.
                if let Ok(decoded) = decode(compression, known(&summary), [&damaged[..]], 512) {
                    assert!(decoded == plaintext, "{compression} bit {bit}");
                }
                // Snappy cannot do that: a flipped bit makes a data chunk one that readers have to skip.
                if matches!(compression, Compression::Lzma | Compression::Zstd)
                    && let Ok(decoded) = decode(compression, Expected::default(), [&damaged[..]], 512)
                {
                    assert!(decoded == plaintext, "{compression} bit {bit} without digest");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_chunking_round_trips(
            length in prop_oneof![0..300_usize, 60_000..140_000_usize],
            write in 1..70_000_usize,
            read in 1..70_000_usize,
            room in 1..100_000_usize,
        ) {
            let plaintext = sample(length);
            for compression in Compression::ALL {
                let (stored, summary) = encode(compression, plaintext.chunks(write));
                prop_assert_eq!(summary.digest, Digest::of(&plaintext));
                let decoded = decode(compression, known(&summary), stored.chunks(read), room).unwrap();
                prop_assert!(decoded == plaintext);
            }
        }

        #[test]
        fn encrypted_objects_round_trip_and_no_change_passes(
            length in prop_oneof![1..300_usize, 60_000..140_000_usize],
            write in 1..70_000_usize,
            read in 1..70_000_usize,
            room in 1..100_000_usize,
            compression in prop::sample::select(&Compression::ALL),
            at: prop::sample::Index,
            change in 1..=255_u8,
            cut: prop::sample::Index,
        ) {
            let (plaintext, ring) = (sample(length), ring());
            let mut encoder = Encoder::new(compression, 1).encrypted(ring.writing().unwrap());
            let mut stored = Vec::new();
            plaintext.chunks(write).for_each(|chunk| encoder.push(chunk, &mut stored));
            let summary = encoder.finish(&mut stored);
            prop_assert_eq!(summary.stored_length, stored.len() as u64);
            prop_assert_eq!(summary.digest, Digest::of(&plaintext));
            let decode = |stored: &[u8], expected| {
                let decoder = Decoder::new(compression, expected).encrypted(ring.privates());
                decode_with(decoder, stored.chunks(read), room)
            };
            prop_assert!(decode(&stored, known(&summary)).unwrap() == plaintext);
            // Cut to nothing is an empty object, which only a known length tells from this one.
            let kept = cut.index(stored.len());
            prop_assert!(decode(&stored[..kept], known(&summary)).is_err());
            if kept > 0 {
                prop_assert!(decode(&stored[..kept], Expected::default()).is_err());
            }
            let at = at.index(stored.len());
            stored[at] ^= change;
            prop_assert!(decode(&stored, Expected::default()).is_err());
        }

        #[test]
        fn an_announced_length_changes_nothing_for_the_reader(plaintext: Vec<u8>, cut: prop::sample::Index) {
            let (head, tail) = plaintext.split_at(cut.index(plaintext.len() + 1));
            let mut encoder = Encoder::for_length(Compression::Zstd, 3, plaintext.len() as u64);
            let mut stored = Vec::new();
            encoder.push(head, &mut stored);
            encoder.push(tail, &mut stored);
            let summary = encoder.finish(&mut stored);
            prop_assert_eq!(decode(Compression::Zstd, known(&summary), [&stored[..]], 100).unwrap(), plaintext);
        }

        #[test]
        fn any_rubbish_is_refused_without_panic(
            bytes: Vec<u8>,
            mark in prop::sample::select(vec![&b""[..], &SNAPPY_STREAM_HEADER, b"\xFD7zXZ\0\0\x04", b"pghoa1\x01\x80"]),
        ) {
            let stored = [mark, &bytes[..]].concat();
            let sealed = Decoder::detecting(Expected::default()).encrypted(ring().privates());
            let _ = decode_with(sealed, [&stored[..]], 1000);
            for compression in Compression::ALL {
                let _ = decode(compression, Expected::default(), [&stored[..]], 1000);
            }
        }
    }
}
