//! Compression behind push and finish.
//!
//! Pure. The formats are PGHoard's: the Snappy *framing format*, `.xz` with CRC-64, and standard zstd
//! frames, ours with their content checksum switched on so that an object shows damage by itself.

use std::fmt;
use std::io::Write;
use std::str::FromStr;

use liblzma::stream::{Action, Check, Filters, LzmaOptions, Status, Stream};
use serde::{Deserialize, Serialize};
use zstd::stream::raw::{CParameter, InBuffer, OutBuffer};
use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{CCtx, compress_bound};

/// How an object or a frame is compressed. The names are those of PGHoard's configuration and metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    None,
    Snappy,
    /// LZMA2 in the `.xz` container.
    Lzma,
    #[default]
    Zstd,
}

impl Compression {
    pub const ALL: [Self; 4] = [Self::None, Self::Snappy, Self::Lzma, Self::Zstd];

    /// How many bytes [`Compression::detect`] looks at.
    pub const DECIDING: usize = SNAPPY_STREAM_HEADER.len();

    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Snappy => "snappy",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
        }
    }

    /// What the first bytes of an object say about its compression, for objects whose metadata is lost.
    /// [`Compression::DECIDING`] bytes decide; with fewer a snappy stream is not recognised.
    pub fn detect(start: &[u8]) -> Self {
        if start.starts_with(&ZSTD_MAGIC) {
            Self::Zstd
        } else if start.starts_with(&SNAPPY_STREAM_HEADER) {
            Self::Snappy
        } else if start.starts_with(&XZ_MAGIC) {
            Self::Lzma
        } else {
            Self::None
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of a compression that pgkeep does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a known compression (`none`, `snappy`, `lzma`, `zstd`)")]
pub struct ParseCompressionError(String);

impl FromStr for Compression {
    type Err = ParseCompressionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::None),
            "snappy" => Ok(Self::Snappy),
            "lzma" => Ok(Self::Lzma),
            "zstd" => Ok(Self::Zstd),
            other => Err(ParseCompressionError(other.to_owned())),
        }
    }
}

pub(super) const ZSTD_MAGIC: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];
pub(super) const XZ_MAGIC: [u8; 6] = *b"\xFD7zXZ\0";
pub(super) const SNAPPY_STREAM_HEADER: [u8; 10] = *b"\xFF\x06\x00\x00sNaPpY";

/// One run of a compressor: everything pushed becomes one zstd frame, one `.xz` stream or one
/// snappy stream.
pub(super) enum Compressor {
    None,
    // Writing to a `Vec` cannot fail, which is what the expectations below rest on.
    Snappy(Box<snap::write::FrameEncoder<Vec<u8>>>),
    Lzma(Box<Stream>),
    Zstd(Box<ZstdFrame>),
}

/// A zstd frame in the making.
pub(super) struct ZstdFrame {
    context: CCtx<'static>,
    /// Bytes still to come, where their number was announced. With the last of them the frame ends.
    left: Option<u64>,
    ended: bool,
}

/// The default level, also written 0.
const LEVEL_3: i32 = 3;

/// What is set besides the level.
///
/// Level 3 gets smaller tables than the library gives it: they stay in a core's own cache, which makes it a
/// fifth faster for one percent of the ratio (measured on heap files and on object code; on pgbench data
/// the ratio even improved).
pub(super) fn zstd_parameters(level: i32) -> Vec<CParameter> {
    // A block just short of the largest is never split. Looking for places to split took 5 to 20 % of the
    // time and made heap files, indexes and WAL larger, not smaller (zstd 1.5.7); object code lost 1 %.
    let mut parameters = vec![CParameter::MaxBlockSize(127 << 10)];
    if matches!(level, 0 | LEVEL_3) {
        parameters.extend([CParameter::HashLog(15), CParameter::ChainLog(14)]);
    }
    parameters
}

impl Compressor {
    /// `level` is zstd's, where 0 is the library's default, 3, or the preset of lzma, where 0 is the
    /// fastest; snappy ignores it.
    /// `length`, when given, must be the exact length of the input: a small object then costs a small
    /// window instead of the two megabytes that level 3 takes for an unknown length.
    pub(super) fn new(compression: Compression, level: i32, length: Option<u64>) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Snappy => Self::Snappy(Box::new(snap::write::FrameEncoder::new(Vec::new()))),
            Compression::Lzma => Self::Lzma(Box::new(xz_encoder(level))),
            Compression::Zstd => Self::Zstd(Box::new(ZstdFrame::new(clamp_level(level), length))),
        }
    }

    pub(super) fn push(&mut self, plaintext: &[u8], stored: &mut Vec<u8>) {
        match self {
            Self::None => stored.extend_from_slice(plaintext),
            Self::Snappy(encoder) => {
                encoder.write_all(plaintext).expect("a vector takes every write");
                stored.append(encoder.get_mut());
            }
            Self::Lzma(encoder) => {
                let mut input = plaintext;
                while !input.is_empty() {
                    let before = encoder.total_in();
                    stored.reserve(XZ_ROOM);
                    encoder.process_vec(input, stored, Action::Run).expect("an encoder refuses no input");
                    let taken = encoder.total_in() - before;
                    input = &input[usize::try_from(taken).expect("it is part of a slice")..];
                }
            }
            Self::Zstd(frame) => frame.push(plaintext, stored),
        }
    }

    /// # Panics
    /// When the length announced to [`Compressor::new`] was not that of the input.
    pub(super) fn finish(self, stored: &mut Vec<u8>) {
        match self {
            Self::None => {}
            Self::Snappy(encoder) => {
                stored.append(&mut encoder.into_inner().expect("a vector takes every write"));
            }
            Self::Lzma(mut encoder) => loop {
                stored.reserve(XZ_ROOM);
                let status = encoder.process_vec(&[], stored, Action::Finish);
                if status.expect("an encoder can always end") == Status::StreamEnd {
                    break;
                }
            },
            Self::Zstd(frame) => frame.finish(stored),
        }
    }
}

/// Room for one turn of the xz encoder, which writes when it has a chunk of up to 64 KiB.
const XZ_ROOM: usize = 64 << 10;

/// The largest dictionary that is written. Presets above 1 would take up to 64 MiB of it, which costs the
/// encoder 674 MiB; with this every preset stays below 13 MiB, and a WAL segment hardly repeats itself over
/// larger distances.
const XZ_DICTIONARY: u32 = 1 << 20;

fn xz_encoder(level: i32) -> Stream {
    let preset = u32::try_from(level.clamp(0, 9)).expect("it is not negative");
    let mut options = LzmaOptions::new_preset(preset).expect("0 to 9 are presets");
    // Only preset 0 has a smaller one of its own, 256 KiB.
    if preset > 0 {
        options.dict_size(XZ_DICTIONARY);
    }
    Stream::new_stream_encoder(Filters::new().lzma2(&options), Check::Crc64)
        .expect("memory for an xz encoder")
}

impl ZstdFrame {
    fn new(level: i32, length: Option<u64>) -> Self {
        let mut context = CCtx::create();
        for parameter in [CParameter::CompressionLevel(level), CParameter::ChecksumFlag(true)]
            .into_iter()
            .chain(zstd_parameters(level))
        {
            context.set_parameter(parameter).expect("a fresh context takes parameters");
        }
        context.set_pledged_src_size(length).expect("a fresh context takes a length");
        Self { context, left: length, ended: false }
    }

    fn push(&mut self, plaintext: &[u8], stored: &mut Vec<u8>) {
        let length = plaintext.len() as u64;
        let is_first = self.context.get_frame_progression().ingested == 0;
        let is_last = self.left == Some(length);
        self.left = self.left.map(|left| left.checked_sub(length).expect("no more than was announced"));
        if is_last {
            if is_first {
                // All at once, and with room for the worst case, nothing is copied into the context's own
                // window, and matches are looked for in one piece of memory, which is a fifth faster.
                stored.reserve(compress_bound(plaintext.len()));
            }
            self.end(plaintext, stored);
            return;
        }
        let mut input = InBuffer::around(plaintext);
        while input.pos() < plaintext.len() {
            self.turn(&mut input, stored, ZSTD_EndDirective::ZSTD_e_continue);
        }
    }

    fn finish(mut self, stored: &mut Vec<u8>) {
        if !self.ended {
            self.end(&[], stored);
        }
    }

    fn end(&mut self, plaintext: &[u8], stored: &mut Vec<u8>) {
        let mut input = InBuffer::around(plaintext);
        while self.turn(&mut input, stored, ZSTD_EndDirective::ZSTD_e_end) > 0 {}
        self.ended = true;
    }

    /// Returns how many bytes are known to be left to write.
    fn turn(
        &mut self,
        input: &mut InBuffer<'_>,
        stored: &mut Vec<u8>,
        directive: ZSTD_EndDirective,
    ) -> usize {
        with_room(stored, |output| self.context.compress_stream2(output, input, directive))
            .expect("a compressor refuses no input, and is fed as much as was announced")
    }
}

pub(super) fn clamp_level(level: i32) -> i32 {
    let range = zstd::compression_level_range();
    level.clamp(*range.start(), *range.end())
}

/// Lets `step` append to `bytes`, whose spare capacity bounds what it may write.
fn with_room<T>(bytes: &mut Vec<u8>, step: impl FnOnce(&mut OutBuffer<'_, Vec<u8>>) -> T) -> T {
    let length = bytes.len();
    // zstd flushes blocks of up to 128 KiB; less room only means another turn of the caller's loop.
    bytes.reserve(32 << 10);
    step(&mut OutBuffer::around_pos(bytes, length))
}
