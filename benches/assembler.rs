//! What the receiver's own bookkeeping costs: messages into segments, beside a plain copy of the same bytes.
//!
//! `cargo bench --bench assembler`

use bytes::Bytes;
use divan::Bencher;
use divan::counter::BytesCount;
use pgkeep::postgres::{Lsn, SegmentSize, TimelineId};
use pgkeep::wal::{SegmentAssembler, Step};

fn main() {
    divan::main();
}

/// Four segments, so that opening and closing them is part of it.
const STREAM: usize = 64 << 20;

/// XLogData of a server that is far ahead (128 KiB), of a busy one, and of one with small commits.
const MESSAGES: [usize; 3] = [128 << 10, 8 << 10, 200];

#[divan::bench(args = MESSAGES)]
fn assemble(bencher: Bencher<'_, '_>, message: usize) {
    let stream = Bytes::from(vec![7_u8; STREAM]);
    bencher.counter(BytesCount::new(STREAM)).bench_local(|| {
        let mut assembler = SegmentAssembler::new(TimelineId::FIRST, SegmentSize::DEFAULT, Lsn::ZERO);
        let mut steps: Vec<Step> = Vec::new();
        let mut rest = stream.clone();
        while !rest.is_empty() {
            let message = rest.split_to(message.min(rest.len()));
            assembler.push(assembler.received(), message, &mut steps).expect("the stream has no gap");
            steps.clear();
        }
        assembler.received()
    });
}

#[divan::bench(args = MESSAGES)]
fn plain_copy(bencher: Bencher<'_, '_>, message: usize) {
    let stream = vec![7_u8; STREAM];
    bencher.counter(BytesCount::new(STREAM)).bench_local(|| {
        let mut copied = 0;
        for message in stream.chunks(message) {
            copied += divan::black_box(message.to_vec()).len();
        }
        copied
    });
}
