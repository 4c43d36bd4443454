//! The reading half of the pipeline: decompress, then count and compare.
//!
//! Pure. Output is bounded on every call, so that a few stored bytes which unfold into gigabytes cost
//! no more memory than the caller has room for.

use zstd::stream::raw::{InBuffer, Operation, OutBuffer};

use super::compress::{Compression, SNAPPY_STREAM_HEADER};
use super::digest::{Digest, Hasher};
use super::encoder::Summary;

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
    #[error("the {0} data ends too early")]
    Truncated(Compression),
    #[error("it decodes to {actual} bytes instead of {expected}")]
    Length { expected: u64, actual: u64 },
    #[error("it decodes to more than {expected} bytes")]
    TooLong { expected: u64 },
    #[error("it decodes to other content: digest {actual} instead of {expected}")]
    Content { expected: Digest, actual: Digest },
}

/// Turns the stored bytes of one object, in chunks of any size, back into verified plaintext.
pub struct Decoder {
    hasher: Hasher,
    expected: Expected,
    stored_length: u64,
    decompressor: Decompressor,
}

enum Decompressor {
    None,
    Snappy(Box<SnappyDecoder>),
    Zstd(Box<ZstdDecoder>),
}

impl Decoder {
    pub fn new(compression: Compression, expected: Expected) -> Self {
        let decompressor = match compression {
            Compression::None => Decompressor::None,
            Compression::Snappy => Decompressor::Snappy(Box::default()),
            Compression::Zstd => Decompressor::Zstd(Box::new(ZstdDecoder::new())),
        };
        Self { hasher: Hasher::new(), expected, stored_length: 0, decompressor }
    }

    /// Takes stored bytes from `input`, moving it forward, and appends about `room` bytes of plaintext at
    /// most (a snappy chunk, 64 KiB, may go beyond). Whatever is left in `input` belongs to the next call;
    /// everything that can be decoded so far has been when `input` is empty and less than `room` was
    /// appended.
    pub fn push(&mut self, input: &mut &[u8], room: usize, plaintext: &mut Vec<u8>) -> Result<(), Error> {
        let (before, length) = (plaintext.len(), input.len());
        match &mut self.decompressor {
            Decompressor::None => {
                let (now, later) = input.split_at(room.min(input.len()));
                plaintext.extend_from_slice(now);
                *input = later;
            }
            Decompressor::Snappy(decoder) => decoder.push(input, room, plaintext)?,
            Decompressor::Zstd(decoder) => decoder.push(input, room, plaintext)?,
        }
        self.stored_length += (length - input.len()) as u64;
        self.hasher.update(&plaintext[before..]);
        match self.expected.length {
            Some(expected) if self.hasher.length() > expected => Err(Error::TooLong { expected }),
            _ => Ok(()),
        }
    }

    /// Whether plaintext may be waiting although all input has been taken.
    pub fn has_more(&self) -> bool {
        matches!(&self.decompressor, Decompressor::Zstd(decoder) if decoder.has_more)
    }

    /// Ends the object. Only now is everything that [`Decoder::push`] gave known to be what was stored.
    pub fn finish(self) -> Result<Summary, Error> {
        match &self.decompressor {
            Decompressor::None => {}
            Decompressor::Snappy(decoder) => decoder.finish()?,
            Decompressor::Zstd(decoder) => decoder.finish()?,
        }
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
        Ok(Summary { plaintext_length: actual, stored_length: self.stored_length, digest })
    }
}

/// Any number of zstd frames, one after the other.
struct ZstdDecoder {
    raw: zstd::stream::raw::Decoder<'static>,
    at_frame_end: bool,
    has_more: bool,
}

impl ZstdDecoder {
    fn new() -> Self {
        // The library's own limit on the window, 128 MiB, stays: PGHoard's level is the user's choice and
        // its objects have to be read.
        let raw = zstd::stream::raw::Decoder::new().expect("memory for a zstd context");
        Self { raw, at_frame_end: false, has_more: false }
    }

    fn push(&mut self, input: &mut &[u8], room: usize, plaintext: &mut Vec<u8>) -> Result<(), Error> {
        let start = plaintext.len();
        while (!input.is_empty() || self.has_more) && plaintext.len() - start < room {
            let position = plaintext.len();
            plaintext.reserve((room - (position - start)).min(128 << 10));
            let mut source = InBuffer::around(input);
            let mut output = OutBuffer::around_pos(plaintext, position);
            let hint = self.raw.run(&mut source, &mut output).map_err(|error| Error::Corrupt {
                compression: Compression::Zstd,
                reason: error.to_string(),
            })?;
            self.has_more = hint != 0 && output.pos() == output.capacity();
            let taken = source.pos();
            *input = &input[taken..];
            // Without input and without output nothing moved, and the hint tells of the next frame.
            if taken > 0 || plaintext.len() > position {
                self.at_frame_end = hint == 0;
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), Error> {
        // An empty object is no frame: the compressor writes one even for no input.
        if self.at_frame_end { Ok(()) } else { Err(Error::Truncated(Compression::Zstd)) }
    }
}

/// The Snappy framing format: chunks of at most 64 KiB of plaintext, each with its checksum.
#[derive(Default)]
struct SnappyDecoder {
    raw: snap::raw::Decoder,
    /// A chunk that has not arrived as a whole yet, header included.
    chunk: Vec<u8>,
    /// Bytes of padding or of a skippable chunk still to be dropped.
    skip: usize,
    started: bool,
}

const SNAPPY_HEADER_LENGTH: usize = 4;
const SNAPPY_CHECKSUM_LENGTH: usize = 4;
const SNAPPY_MAX_PLAIN: usize = 64 << 10;
/// The largest body of a data chunk: 64 KiB that do not compress, as snappy's worst case, and the checksum.
const SNAPPY_MAX_BODY: usize = SNAPPY_CHECKSUM_LENGTH + 32 + SNAPPY_MAX_PLAIN + SNAPPY_MAX_PLAIN / 6;

impl SnappyDecoder {
    fn push(&mut self, input: &mut &[u8], room: usize, plaintext: &mut Vec<u8>) -> Result<(), Error> {
        let start = plaintext.len();
        while !input.is_empty() && plaintext.len() - start < room {
            if self.skip > 0 {
                let now = self.skip.min(input.len());
                self.skip -= now;
                *input = &input[now..];
            } else if self.take(input, SNAPPY_HEADER_LENGTH) {
                let length = self.body_length()?;
                if self.take(input, SNAPPY_HEADER_LENGTH + length) {
                    self.decode(plaintext)?;
                    self.chunk.clear();
                }
            }
        }
        Ok(())
    }

    /// Fills the chunk up to `length` bytes; false when `input` has not enough for that.
    fn take(&mut self, input: &mut &[u8], length: usize) -> bool {
        let now = length.saturating_sub(self.chunk.len()).min(input.len());
        self.chunk.extend_from_slice(&input[..now]);
        *input = &input[now..];
        self.chunk.len() >= length
    }

    /// Reads the header of the chunk at hand. What may be skipped has no body, only a count to drop.
    fn body_length(&mut self) -> Result<usize, Error> {
        let length =
            usize::from(self.chunk[1]) | usize::from(self.chunk[2]) << 8 | usize::from(self.chunk[3]) << 16;
        match self.chunk[0] {
            0xFF if length + SNAPPY_HEADER_LENGTH == SNAPPY_STREAM_HEADER.len() => Ok(length),
            _ if !self.started => Err(corrupt("it does not begin with a stream header")),
            0x00 | 0x01 if (SNAPPY_CHECKSUM_LENGTH..=SNAPPY_MAX_BODY).contains(&length) => Ok(length),
            0x80..=0xFE => {
                self.skip = length;
                Ok(0)
            }
            kind => Err(corrupt(&format!("a chunk of type {kind:#04x} has {length} bytes"))),
        }
    }

    fn decode(&mut self, plaintext: &mut Vec<u8>) -> Result<(), Error> {
        let (header, body) = self.chunk.split_at(SNAPPY_HEADER_LENGTH);
        let kind = header[0];
        if kind == 0xFF {
            self.started = true;
            return if self.chunk == SNAPPY_STREAM_HEADER {
                Ok(())
            } else {
                Err(corrupt("bad stream header"))
            };
        }
        if kind >= 0x80 {
            return Ok(());
        }
        let (checksum, data) = body.split_at(SNAPPY_CHECKSUM_LENGTH);
        let start = plaintext.len();
        if kind == 0x00 {
            let length = snap::raw::decompress_len(data).map_err(|error| corrupt(&error.to_string()))?;
            if length > SNAPPY_MAX_PLAIN {
                return Err(corrupt("a chunk is larger than 64 KiB"));
            }
            plaintext.resize(start + length, 0);
            let decoded = self.raw.decompress(data, &mut plaintext[start..]);
            decoded.map_err(|error| corrupt(&error.to_string()))?;
        } else if data.len() > SNAPPY_MAX_PLAIN {
            return Err(corrupt("a chunk is larger than 64 KiB"));
        } else {
            plaintext.extend_from_slice(data);
        }
        // The format's masked CRC-32C: rotated, and moved by a constant.
        let masked = crc32c::crc32c(&plaintext[start..]).rotate_right(15).wrapping_add(0xA282_EAD8);
        if masked.to_le_bytes() != *checksum {
            plaintext.truncate(start);
            return Err(corrupt("a checksum does not match"));
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), Error> {
        // No input at all is what PGHoard's snappy writer makes of an empty file.
        if self.chunk.is_empty() && self.skip == 0 {
            Ok(())
        } else {
            Err(Error::Truncated(Compression::Snappy))
        }
    }
}

fn corrupt(reason: &str) -> Error {
    Error::Corrupt { compression: Compression::Snappy, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Encoder;
    use proptest::prelude::*;

    const ALL: [Compression; 3] = [Compression::None, Compression::Snappy, Compression::Zstd];

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
        let mut decoder = Decoder::new(compression, expected);
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
    }

    #[test]
    fn reads_what_the_reference_encoders_write() {
        let plaintext = sample(200_000);
        let mut snappy = snap::write::FrameEncoder::new(Vec::new());
        std::io::Write::write_all(&mut snappy, &plaintext).unwrap();
        let snappy = snappy.into_inner().unwrap();
        // PGHoard's zstd: no content size, no checksum.
        let zstd = zstd::encode_all(&plaintext[..], 3).unwrap();
        for (compression, stored) in [(Compression::Snappy, snappy), (Compression::Zstd, zstd)] {
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
        let (snappy, _) = encode(Compression::Snappy, plaintext.chunks(777));
        let mut decoded = Vec::new();
        std::io::Read::read_to_end(&mut snap::read::FrameDecoder::new(&snappy[..]), &mut decoded).unwrap();
        assert!(decoded == plaintext);
    }

    #[test]
    fn takes_several_members_padding_and_skippable_chunks() {
        for compression in [Compression::Snappy, Compression::Zstd] {
            let (mut stored, _) = encode(compression, [&b"first "[..]]);
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
        let (stored, _) = encode(Compression::Zstd, std::iter::repeat_n(&vec![0_u8; 1 << 20][..], 64));
        assert!(stored.len() < 64 << 10);
        let expected = Expected { length: Some(1000), digest: None };
        let result = decode(Compression::Zstd, expected, [&stored[..]], 4096);
        assert_eq!(result, Err(Error::TooLong { expected: 1000 }));
    }

    #[test]
    fn rubbish_behind_the_end_is_damage() {
        for compression in [Compression::Snappy, Compression::Zstd] {
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
        for compression in ALL {
            let plaintext = sample(1500);
            let (stored, summary) = encode(compression, [&plaintext[..]]);
            for length in 0..stored.len() {
                assert!(
                    decode(compression, known(&summary), [&stored[..length]], 512).is_err(),
                    "{compression} cut to {length}"
                );
                if compression == Compression::Zstd {
                    let alone = decode(compression, Expected::default(), [&stored[..length]], 512);
                    assert!(alone.is_err(), "a zstd object shows truncation to {length} by itself");
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
                if compression == Compression::Zstd
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
            for compression in ALL {
                let (stored, summary) = encode(compression, plaintext.chunks(write));
                prop_assert_eq!(summary.digest, Digest::of(&plaintext));
                let decoded = decode(compression, known(&summary), stored.chunks(read), room).unwrap();
                prop_assert!(decoded == plaintext);
            }
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
        fn any_rubbish_is_refused_without_panic(bytes: Vec<u8>, stream_header: bool) {
            let mut stored = if stream_header { SNAPPY_STREAM_HEADER.to_vec() } else { Vec::new() };
            stored.extend(bytes);
            for compression in ALL {
                let _ = decode(compression, Expected::default(), [&stored[..]], 1000);
            }
        }
    }
}
