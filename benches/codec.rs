//! Throughput of everything that touches each byte: `cargo bench --bench codec`.

use divan::Bencher;
use divan::counter::BytesCount;
use pgkeep::codec::{
    Compression, Decoder, Digest, Encoder, Expected, FrameDecoder, FrameEncoder, HashAlgorithm, KeyId,
    KeyRing, NewKeyPair, OpeningKey, SealingKey,
};

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

fn ring() -> KeyRing {
    let (pair, id) = (NewKeyPair::generate(), KeyId::new("main").expect("a name"));
    let mut ring = KeyRing::default();
    ring.add(&id, Some(&pair.public), Some(&pair.private)).expect("a pair");
    ring.write_with(id).expect("it is there");
    ring
}

const ENCODINGS: [(Compression, i32); 6] = [
    (Compression::None, 0),
    (Compression::Snappy, 0),
    (Compression::Lzma, 0),
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

#[divan::bench(args = Compression::ALL)]
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

#[divan::bench(args = Compression::ALL)]
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

/// What a segment of WAL gets: PGHoard's hash and envelope beside the compression.
#[divan::bench(args = [(false, false), (true, false), (false, true), (true, true)])]
fn wal_encoder(bencher: Bencher, (hashed, encrypted): (bool, bool)) {
    let (plaintext, ring) = (like_wal(), ring());
    let mut stored = Vec::with_capacity(LENGTH);
    bencher.counter(BytesCount::new(LENGTH)).bench_local(|| {
        let mut encoder = Encoder::new(Compression::Zstd, 3);
        if hashed {
            encoder = encoder.hashed(HashAlgorithm::Sha1);
        }
        if encrypted {
            encoder = encoder.encrypted(ring.writing().expect("a key"));
        }
        stored.clear();
        for chunk in plaintext.chunks(512 << 10) {
            encoder.push(chunk, &mut stored);
        }
        encoder.finish(&mut stored)
    });
}

#[divan::bench(args = [false, true])]
fn wal_decoder(bencher: Bencher, encrypted: bool) {
    let (plaintext, ring) = (like_wal(), ring());
    let mut encoder = Encoder::new(Compression::Zstd, 3);
    if encrypted {
        encoder = encoder.encrypted(ring.writing().expect("a key"));
    }
    let (mut stored, mut read) = (Vec::new(), Vec::with_capacity(1 << 20));
    encoder.push(&plaintext, &mut stored);
    encoder.finish(&mut stored);
    bencher.counter(BytesCount::new(LENGTH)).bench_local(|| {
        let mut decoder = Decoder::new(Compression::Zstd, Expected::default());
        if encrypted {
            decoder = decoder.encrypted(ring.privates());
        }
        let mut input = &stored[..];
        while !input.is_empty() || decoder.has_more() {
            read.clear();
            decoder.push(&mut input, 512 << 10, &mut read).expect("it is what was encoded");
        }
        decoder.finish().expect("it is whole")
    });
}

/// The frames of a base backup: compressed only, and sealed as well.
#[divan::bench(args = [false, true])]
fn backup_frames(bencher: Bencher, sealed: bool) {
    let (plaintext, ring) = (like_wal(), ring());
    let mut sealing = SealingKey::generate(ring.writing().expect("a key"), b"bench");
    let mut sealer = sealing.pack(1);
    let mut encoder = FrameEncoder::new(Compression::Zstd, 3);
    bencher.counter(BytesCount::new(LENGTH)).bench_local(|| {
        let mut stored = 0;
        for raw in plaintext.chunks(1 << 20) {
            let frame = encoder.encode(raw);
            stored += if sealed { sealer.seal(&frame.stored).len() } else { frame.stored.len() };
        }
        stored
    });
}

#[divan::bench(args = [false, true])]
fn restore_frames(bencher: Bencher, sealed: bool) {
    let ring = ring();
    let mut sealing = SealingKey::generate(ring.writing().expect("a key"), b"bench");
    let private = ring.privates().next().expect("a key");
    let opening = OpeningKey::unwrap(private, sealing.wrapped(), b"bench").expect("the right key");
    let mut sealer = sealing.pack(1);
    let mut encoder = FrameEncoder::new(Compression::Zstd, 3);
    let mut offset = 0;
    let frames: Vec<_> = like_wal()
        .chunks(1 << 20)
        .map(|raw| {
            let frame = encoder.encode(raw);
            let bytes = sealer.seal(&frame.stored);
            offset += bytes.len() as u64;
            (offset - bytes.len() as u64, bytes, frame)
        })
        .collect();
    let (mut decoder, mut opened, mut raw) = (FrameDecoder::new(), Vec::new(), Vec::new());
    bencher.counter(BytesCount::new(LENGTH)).bench_local(|| {
        for (offset, bytes, frame) in &frames {
            if sealed {
                opening.open_frame(1, *offset, bytes, &mut opened).expect("it is what was sealed");
                decoder.decode(frame.facts(), &opened, &mut raw).expect("it is what was encoded");
            } else {
                decoder.decode(frame.facts(), &frame.stored, &mut raw).expect("it is what was encoded");
            }
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
