//! Decompression behind push and finish.
//!
//! Pure. Output is bounded on every call, and so is the memory for what a compressor may refer back to.

use liblzma::stream::{Action, CONCATENATED, Status, Stream};
use zstd::stream::raw::{InBuffer, Operation, OutBuffer};

use super::compress::{Compression, SNAPPY_STREAM_HEADER, XZ_MAGIC, ZSTD_MAGIC};
use super::decoder::Error;

/// One run of a decompressor over the stored bytes of one object.
pub(super) enum Decompressor {
    None,
    Snappy(Box<SnappyDecoder>),
    Lzma(Box<XzDecoder>),
    Zstd(Box<ZstdDecoder>),
    /// The first bytes, of which it cannot be told yet what they are.
    Undecided(Vec<u8>),
}

impl Decompressor {
    /// Without a compression, the first bytes decide.
    pub(super) fn new(compression: Option<Compression>) -> Self {
        match compression {
            Some(Compression::None) => Self::None,
            Some(Compression::Snappy) => Self::Snappy(Box::default()),
            Some(Compression::Lzma) => Self::Lzma(Box::new(XzDecoder::new())),
            Some(Compression::Zstd) => Self::Zstd(Box::new(ZstdDecoder::new())),
            None => Self::Undecided(Vec::new()),
        }
    }

    /// Takes stored bytes from `input` and appends about `room` bytes of plaintext at most.
    pub(super) fn push(
        &mut self,
        input: &mut &[u8],
        room: usize,
        plaintext: &mut Vec<u8>,
    ) -> Result<(), Error> {
        match self {
            Self::None => {
                let (now, later) = input.split_at(room.min(input.len()));
                plaintext.extend_from_slice(now);
                *input = later;
                Ok(())
            }
            Self::Snappy(decoder) => decoder.push(input, room, plaintext),
            Self::Lzma(decoder) => decoder.push(input, room, plaintext),
            Self::Zstd(decoder) => decoder.push(input, room, plaintext),
            Self::Undecided(start) => {
                while let Some((first, rest)) = input.split_first()
                    && beginning_of(start).is_some()
                {
                    start.push(*first);
                    *input = rest;
                }
                if !start.is_empty() && beginning_of(start).is_none() {
                    let start = std::mem::take(start);
                    *self = Self::new(Some(Compression::detect(&start)));
                    // They are too few to fill any room.
                    self.push(&mut &start[..], room.max(start.len()), plaintext)?;
                    let left = room.saturating_sub(start.len());
                    return if left > 0 { self.push(input, left, plaintext) } else { Ok(()) };
                }
                Ok(())
            }
        }
    }

    /// Whether plaintext may be waiting although all input has been taken.
    pub(super) fn has_more(&self) -> bool {
        match self {
            Self::Lzma(decoder) => decoder.has_more,
            Self::Zstd(decoder) => decoder.has_more,
            _ => false,
        }
    }

    /// Whether what came so far can be the whole.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        match self {
            Self::None => Ok(()),
            Self::Snappy(decoder) => decoder.finish(),
            Self::Lzma(decoder) => decoder.finish(),
            Self::Zstd(decoder) => decoder.finish(),
            Self::Undecided(start) => match beginning_of(start) {
                Some(compression) if !start.is_empty() => Err(Error::Truncated(compression)),
                _ => Ok(()),
            },
        }
    }
}

/// The compression whose mark begins with `start`, but is longer.
fn beginning_of(start: &[u8]) -> Option<Compression> {
    let marks = [
        (Compression::Zstd, &ZSTD_MAGIC[..]),
        (Compression::Lzma, &XZ_MAGIC[..]),
        (Compression::Snappy, &SNAPPY_STREAM_HEADER[..]),
    ];
    marks
        .into_iter()
        .find(|(_, mark)| mark.len() > start.len() && mark.starts_with(start))
        .map(|(compression, _)| compression)
}

/// What a reader sets aside for an xz dictionary: enough for `xz -9`, whose dictionary has 64 MiB, and
/// the decoder's own state. The format allows 4 GiB, which no PGHoard ever wrote.
const XZ_MEMORY: u64 = 72 << 20;

/// Any number of `.xz` streams, one after the other, with the padding that may lie between.
pub(super) struct XzDecoder {
    stream: Stream,
    has_more: bool,
}

impl XzDecoder {
    fn new() -> Self {
        // Without CONCATENATED the decoder ends at the first stream's end and says that all is well.
        let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED).expect("memory for an xz decoder");
        Self { stream, has_more: false }
    }

    fn push(&mut self, input: &mut &[u8], room: usize, plaintext: &mut Vec<u8>) -> Result<(), Error> {
        let start = plaintext.len();
        while (!input.is_empty() || self.has_more) && plaintext.len() - start < room {
            let (position, before) = (plaintext.len(), self.stream.total_in());
            plaintext.reserve((room - (position - start)).min(128 << 10));
            self.stream.process_vec(input, plaintext, Action::Run).map_err(xz_error)?;
            self.has_more = plaintext.len() == plaintext.capacity();
            let taken = usize::try_from(self.stream.total_in() - before).expect("it is part of a slice");
            *input = &input[taken..];
            if taken == 0 && plaintext.len() == position {
                break;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Error> {
        let mut beyond = [0];
        let status = self.stream.process(&[], &mut beyond, Action::Finish);
        match status.map_err(xz_error)? {
            Status::StreamEnd => Ok(()),
            _ => Err(Error::Truncated(Compression::Lzma)),
        }
    }
}

fn xz_error(error: liblzma::stream::Error) -> Error {
    let reason = match error {
        liblzma::stream::Error::MemLimit => {
            return Error::Dictionary { compression: Compression::Lzma, limit: 64 << 20 };
        }
        liblzma::stream::Error::Format => "it does not begin like an xz stream".to_owned(),
        liblzma::stream::Error::Options => "it uses options that are not supported".to_owned(),
        error => error.to_string(),
    };
    Error::Corrupt { compression: Compression::Lzma, reason }
}

/// Any number of zstd frames, one after the other.
pub(super) struct ZstdDecoder {
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
pub(super) struct SnappyDecoder {
    raw: snap::raw::Decoder,
    /// A chunk that has not arrived as a whole yet, header included.
    chunk: Vec<u8>,
    /// Bytes of padding or of a skippable chunk still to be dropped.
    skip: usize,
    started: bool,
}

const SNAPPY_HEADER_LENGTH: usize = 4;
const SNAPPY_CHECKSUM_LENGTH: usize = 4;
pub(super) const SNAPPY_MAX_PLAIN: usize = 64 << 10;
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
