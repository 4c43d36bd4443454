//! Segments for the tests of this room.

use crate::postgres::{SegmentName, SegmentSize, TimelineId, WAL_PAGE_BYTES};

/// Small, so that tests are quick.
pub static SIZE: std::sync::LazyLock<SegmentSize> =
    std::sync::LazyLock::new(|| SegmentSize::try_from(1 << 20).unwrap());

/// Segment `number` of timeline 1.
pub fn segment(number: u64) -> SegmentName {
    SIZE.segment_at(TimelineId::FIRST, crate::postgres::Lsn::new(number * SIZE.bytes()))
}

/// A segment as PostgreSQL 15 begins it, then bytes that do not repeat.
pub fn segment_bytes(segment: SegmentName) -> Vec<u8> {
    let start = SIZE.start(segment).get();
    let words =
        (0..SIZE.bytes() / 8).map(|word| (start / 8 + word).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 13);
    let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &0xD110_u16.to_le_bytes());
    put(2, &2_u16.to_le_bytes());
    put(4, &segment.timeline().get().to_le_bytes());
    put(8, &start.to_le_bytes());
    put(16, &[0; 8]);
    put(24, &7_300_000_000_000_000_001_u64.to_le_bytes());
    put(32, &u32::try_from(SIZE.bytes()).unwrap().to_le_bytes());
    put(36, &u32::try_from(WAL_PAGE_BYTES).unwrap().to_le_bytes());
    bytes
}
