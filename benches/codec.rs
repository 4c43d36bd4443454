//! Throughput of everything that touches each byte: `cargo bench --bench codec`.

use divan::Bencher;
use divan::counter::BytesCount;
use pgkeep::codec::{Compression, Decoder, Digest, Encoder, Expected, FrameDecoder, FrameEncoder};

fn main() {
    divan::main();
}

const LENGTH: usize = 16 << 20;

/// One segment's worth of bytes of which zstd makes about half, as it does of WAL.
fn like_wal() -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = Vec::with_capacity(LENGTH);
    while bytes.len() < LENGTH {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(b"INSERT\0\0 heap tuple \0\0\0");
        bytes.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    }
    bytes.truncate(LENGTH);
    bytes
}

const ENCODINGS: [(Compression, i32); 5] = [
    (Compression::None, 0),
    (Compression::Snappy, 0),
    (Compression::Zstd, -1),
    (Compression::Zstd, 1),
    (Compression::Zstd, 3),
];

fn encode((compression, level): (Compression, i32), plaintext: &[u8]) -> Vec<u8> {
    let mut encoder = Encoder::new(compression, level);
    let mut stored = Vec::with_capacity(LENGTH + LENGTH / 64);
    for chunk in plaintext.chunks(512 << 10) {
        encoder.push(chunk, &mut stored);
    }
    encoder.finish(&mut stored);
    stored
}

#[divan::bench(args = ENCODINGS)]
fn encoder(bencher: Bencher, encoding: (Compression, i32)) {
    let plaintext = like_wal();
    bencher.counter(BytesCount::new(LENGTH)).bench(|| encode(encoding, divan::black_box(&plaintext)));
}

#[divan::bench(args = [Compression::None, Compression::Snappy, Compression::Zstd])]
fn decoder(bencher: Bencher, compression: Compression) {
    let stored = encode((compression, 3), &like_wal());
    let mut plaintext = Vec::with_capacity(1 << 20);
    bencher.counter(BytesCount::new(LENGTH)).bench_local(|| {
        let mut decoder = Decoder::new(compression, Expected::default());
        let mut input = &stored[..];
        while !input.is_empty() || decoder.has_more() {
            plaintext.clear();
            decoder.push(&mut input, 512 << 10, &mut plaintext).expect("it is what was encoded");
        }
        decoder.finish().expect("it is whole")
    });
}

#[divan::bench(args = ENCODINGS)]
fn frame_encoder(bencher: Bencher, (compression, level): (Compression, i32)) {
    let plaintext = like_wal();
    let mut encoder = FrameEncoder::new(compression, level);
    bencher
        .counter(BytesCount::new(LENGTH))
        .bench_local(|| plaintext.chunks(1 << 20).map(|raw| encoder.encode(raw).stored.len()).sum::<usize>());
}

#[divan::bench(args = [Compression::None, Compression::Snappy, Compression::Zstd])]
fn frame_decoder(bencher: Bencher, compression: Compression) {
    let mut encoder = FrameEncoder::new(compression, 3);
    let frames: Vec<_> = like_wal().chunks(1 << 20).map(|raw| encoder.encode(raw)).collect();
    let (mut decoder, mut raw) = (FrameDecoder::new(), Vec::new());
    bencher.counter(BytesCount::new(LENGTH)).bench_local(|| {
        for frame in &frames {
            decoder.decode(frame.facts(), &frame.stored, &mut raw).expect("it is what was encoded");
        }
    });
}

#[divan::bench]
fn blake3(bencher: Bencher) {
    let plaintext = like_wal();
    bencher.counter(BytesCount::new(LENGTH)).bench(|| Digest::of(divan::black_box(&plaintext)));
}

#[divan::bench]
fn crc32c(bencher: Bencher) {
    let plaintext = like_wal();
    bencher.counter(BytesCount::new(LENGTH)).bench(|| crc32c::crc32c(divan::black_box(&plaintext)));
}
