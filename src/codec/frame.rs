//! Frames: up to 1 MiB of raw bytes, each compressed on its own.
//!
//! Pure. Encoder and decoder keep their zstd context from frame to frame, because making one costs more
//! than compressing a small frame. A frame says nothing about itself; whoever refers to it knows its
//! lengths, compression and digest ([`FrameFacts`]), and nothing is believed before they agree.

use bytes::Bytes;
use zstd::bulk;
use zstd::stream::raw::DParameter;

use super::compress::{Compression, Compressor, clamp_level, zstd_parameters};
use super::decoder::{Decoder, Error, Expected};
use super::digest::Digest;

/// The most raw bytes one frame may hold.
pub const MAX_FRAME_LENGTH: usize = 1 << 20;

/// A frame ready to be stored.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    pub stored: Bytes,
    pub raw_length: u32,
    pub compression: Compression,
    /// Of the raw bytes.
    pub digest: Digest,
}

/// What is known about a frame before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameFacts {
    pub stored_length: u32,
    pub raw_length: u32,
    pub compression: Compression,
    pub digest: Digest,
}

/// Compresses frames, one after the other. One per thread.
pub struct FrameEncoder {
    method: Method,
    scratch: Vec<u8>,
}

enum Method {
    None,
    /// These two keep nothing from frame to frame.
    Whole(Compression, i32),
    Zstd(Box<bulk::Compressor<'static>>),
}

impl FrameEncoder {
    /// `level` is zstd's, where 0 stands for its default, 3, or lzma's preset, 0 to 9.
    ///
    /// # Panics
    /// Without memory for a zstd context.
    pub fn new(compression: Compression, level: i32) -> Self {
        let method = match compression {
            Compression::None => Method::None,
            Compression::Snappy | Compression::Lzma => Method::Whole(compression, level),
            Compression::Zstd => {
                let mut compressor =
                    bulk::Compressor::new(clamp_level(level)).expect("a clamped level is a valid parameter");
                for parameter in zstd_parameters(clamp_level(level)) {
                    compressor.set_parameter(parameter).expect("a fresh context takes parameters");
                }
                Method::Zstd(Box::new(compressor))
            }
        };
        Self { method, scratch: Vec::new() }
    }

    /// Makes one frame of `raw`. What does not get smaller is stored as it is.
    ///
    /// # Panics
    /// When `raw` is longer than [`MAX_FRAME_LENGTH`].
    pub fn encode(&mut self, raw: &[u8]) -> EncodedFrame {
        assert!(raw.len() <= MAX_FRAME_LENGTH, "a frame holds at most 1 MiB");
        self.scratch.clear();
        let compression = match &mut self.method {
            Method::None => Compression::None,
            Method::Whole(compression, level) => {
                let mut compressor = Compressor::new(*compression, *level, Some(raw.len() as u64));
                compressor.push(raw, &mut self.scratch);
                compressor.finish(&mut self.scratch);
                *compression
            }
            Method::Zstd(compressor) => {
                self.scratch.reserve(zstd::zstd_safe::compress_bound(raw.len()));
                compressor
                    .compress_to_buffer(raw, &mut self.scratch)
                    .expect("the bound leaves room for the worst case");
                Compression::Zstd
            }
        };
        let (stored, compression) = if compression == Compression::None || self.scratch.len() >= raw.len() {
            (raw, Compression::None)
        } else {
            (&self.scratch[..], compression)
        };
        EncodedFrame {
            // A copy of the right size, because frames wait in queues that count their bytes.
            stored: Bytes::copy_from_slice(stored),
            raw_length: u32::try_from(raw.len()).expect("1 MiB fits"),
            compression,
            digest: Digest::of(raw),
        }
    }
}

impl EncodedFrame {
    /// What a reader has to know.
    ///
    /// # Panics
    /// For a frame larger than any encoder makes.
    pub fn facts(&self) -> FrameFacts {
        FrameFacts {
            stored_length: u32::try_from(self.stored.len()).expect("no frame is stored larger than 1 MiB"),
            raw_length: self.raw_length,
            compression: self.compression,
            digest: self.digest,
        }
    }
}

/// Decompresses and verifies frames, one after the other. One per thread.
pub struct FrameDecoder {
    zstd: bulk::Decompressor<'static>,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameDecoder {
    /// # Panics
    /// Without memory for a zstd context.
    pub fn new() -> Self {
        let mut zstd = bulk::Decompressor::new().expect("memory for a zstd context");
        // No frame needs a window above its own length; 2^20 bytes is that length.
        zstd.set_parameter(DParameter::WindowLogMax(20)).expect("a fresh context takes parameters");
        Self { zstd }
    }

    /// Replaces the content of `raw` by the frame's raw bytes. On an error `raw` is empty.
    ///
    /// Never writes more than the announced raw length, whatever the stored bytes would unfold to.
    pub fn decode(
        &mut self,
        frame: impl Into<FrameFacts>,
        stored: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), Error> {
        raw.clear();
        let result = self.decode_unchecked(&frame.into(), stored, raw);
        if result.is_err() {
            raw.clear();
        }
        result
    }

    fn decode_unchecked(
        &mut self,
        frame: &FrameFacts,
        stored: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), Error> {
        let (expected, limit) = (u64::from(frame.raw_length), MAX_FRAME_LENGTH as u64);
        if expected > limit {
            return Err(Error::Length { expected: limit, actual: expected });
        }
        if stored.len() as u64 != u64::from(frame.stored_length) {
            return Err(Error::Truncated(frame.compression));
        }
        let length = frame.raw_length as usize;
        match frame.compression {
            Compression::None => {
                if stored.len() != length {
                    return Err(Error::Length { expected, actual: stored.len() as u64 });
                }
                raw.extend_from_slice(stored);
            }
            Compression::Zstd => {
                // Not into `raw` itself: its capacity may be larger than the frame, and it is the
                // capacity that bounds the output.
                raw.resize(length, 0);
                let written = self.zstd.decompress_to_buffer(stored, &mut raw[..]).map_err(|error| {
                    Error::Corrupt { compression: Compression::Zstd, reason: error.to_string() }
                })?;
                raw.truncate(written);
            }
            Compression::Snappy | Compression::Lzma => {
                let mut decoder =
                    Decoder::new(frame.compression, Expected { length: Some(expected), digest: None });
                let mut input = stored;
                while !input.is_empty() || decoder.has_more() {
                    decoder.push(&mut input, MAX_FRAME_LENGTH, raw)?;
                }
                decoder.finish()?;
            }
        }
        if raw.len() != length {
            return Err(Error::Length { expected, actual: raw.len() as u64 });
        }
        let actual = Digest::of(raw);
        if actual == frame.digest { Ok(()) } else { Err(Error::Content { expected: frame.digest, actual }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut output = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut output);
        output
    }

    #[test]
    fn a_full_frame_round_trips_with_every_compression() {
        let mut decoder = FrameDecoder::new();
        let mut raw = Vec::new();
        for compression in Compression::ALL {
            let mut encoder = FrameEncoder::new(compression, 3);
            for content in [vec![b'x'; MAX_FRAME_LENGTH], b"abc".repeat(100_000), Vec::new(), vec![1; 4096]] {
                let frame = encoder.encode(&content);
                assert!(frame.stored.len() <= content.len());
                decoder.decode(frame.facts(), &frame.stored, &mut raw).unwrap();
                assert!(raw == content, "{compression}");
            }
        }
    }

    #[test]
    fn what_does_not_compress_is_stored_as_it_is() {
        let content = noise(100_000);
        let frame = FrameEncoder::new(Compression::Zstd, 3).encode(&content);
        assert_eq!(frame.compression, Compression::None);
        assert_eq!(&frame.stored[..], &content[..]);
    }

    #[test]
    fn a_frame_that_unfolds_further_than_announced_is_refused() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        let facts = FrameFacts {
            stored_length: u32::try_from(bomb.len()).unwrap(),
            raw_length: 1000,
            compression: Compression::Zstd,
            digest: Digest::of(b""),
        };
        let mut raw = Vec::with_capacity(128 << 20);
        assert!(FrameDecoder::new().decode(facts, &bomb, &mut raw).is_err());
        let greedy = FrameFacts { raw_length: u32::MAX, ..facts };
        let mut raw = Vec::new();
        assert!(FrameDecoder::new().decode(greedy, &bomb, &mut raw).is_err());
        assert_eq!(raw.capacity(), 0, "nothing is set aside for a frame that cannot be");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_change_to_a_frame_goes_unseen(
            content in prop::collection::vec(0..4_u8, 1..3000),
            bit: prop::sample::Index,
            cut: prop::sample::Index,
            compression in prop::sample::select(&Compression::ALL[1..]),
        ) {
            let frame = FrameEncoder::new(compression, 1).encode(&content);
            let mut decoder = FrameDecoder::new();
            let mut raw = Vec::new();
            let mut damaged = frame.stored.to_vec();
            let bit = bit.index(damaged.len() * 8);
            damaged[bit / 8] ^= 1 << (bit % 8);
            if decoder.decode(frame.facts(), &damaged, &mut raw).is_ok() {
                prop_assert_eq!(&raw, &content);
            }
            let cut = cut.index(frame.stored.len());
            prop_assert!(decoder.decode(frame.facts(), &frame.stored[..cut], &mut raw).is_err());
            prop_assert!(raw.is_empty());
            // The context is still good after a failure.
            decoder.decode(frame.facts(), &frame.stored, &mut raw).unwrap();
            prop_assert_eq!(raw, content);
        }
    }
}
