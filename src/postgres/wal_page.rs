//! Headers of WAL pages: is this segment what its name says?
//!
//! Pure. Every 8 KiB page of WAL begins with its own address, so that a segment of another cluster, a
//! recycled file's old tail or a shifted stream is seen without reading a single record.
//!
//! Source: `src/include/access/xlog_internal.h` (`XLogPageHeaderData`, `XLogLongPageHeaderData`). The
//! fields are in the server's native byte order; only little-endian servers are supported.

use super::lsn::Lsn;
use super::segment::{SegmentName, SegmentSize};

/// `XLOG_BLCKSZ`: bytes of one WAL page in every packaged server.
pub const WAL_PAGE_BYTES: usize = 8192;

/// Bytes of the first page's header, which any check of a segment's start needs.
pub const LONG_HEADER_BYTES: usize = 40;

const SHORT_HEADER_BYTES: usize = 24;
const FLAG_LONG: u16 = 2;

/// `xlp_magic` of each major version, read off live servers (13 to 18) and the sources.
const MAGIC: [(u16, u32); 9] = [
    (0xD098, 11),
    (0xD101, 12),
    (0xD106, 13),
    (0xD10D, 14),
    (0xD110, 15),
    (0xD113, 16),
    (0xD116, 17),
    (0xD118, 18),
    (0xD121, 19),
];

/// The header every WAL page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    pub magic: u16,
    pub flags: u16,
    /// Timeline of the page's first record: on the first pages after a switch still the parent's.
    pub timeline: u32,
    /// Where the page begins.
    pub address: Lsn,
    /// Bytes of a record begun on an earlier page that are still to come.
    pub remaining: u32,
    /// What only the first page of a segment carries.
    pub long: Option<LongFields>,
}

/// The part of the header that only the first page of a segment carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongFields {
    pub system_identifier: u64,
    pub segment_bytes: u32,
    pub page_bytes: u32,
}

impl PageHeader {
    /// Reads a header. `None` when `page` is too short for it; nothing is checked.
    pub fn parse(page: &[u8]) -> Option<Self> {
        let flags = u16_at(page, 2)?;
        let long = if flags & FLAG_LONG == 0 {
            None
        } else {
            Some(LongFields {
                system_identifier: u64_at(page, 24)?,
                segment_bytes: u32_at(page, 32)?,
                page_bytes: u32_at(page, 36)?,
            })
        };
        if page.len() < SHORT_HEADER_BYTES {
            return None;
        }
        Some(Self {
            magic: u16_at(page, 0)?,
            flags,
            timeline: u32_at(page, 4)?,
            address: Lsn::new(u64_at(page, 8)?),
            remaining: u32_at(page, 16)?,
            long,
        })
    }

    /// The major version of the server that wrote the page, if known.
    pub fn major(&self) -> Option<u32> {
        MAGIC.iter().find(|(magic, _)| *magic == self.magic).map(|(_, major)| *major)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// What a segment must agree with; `None` where nothing is known yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    pub system_identifier: Option<u64>,
    pub segment_size: Option<SegmentSize>,
}

/// What the first page of a segment says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongHeader {
    pub magic: u16,
    /// PostgreSQL's major version.
    pub major: u32,
    pub system_identifier: u64,
    pub segment_size: SegmentSize,
    /// Of the first record; the parent's when the segment holds a switch point.
    pub timeline: u32,
}

/// Bytes that are not the WAL they are said to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalPageError {
    #[error("only {0} bytes, too short for a WAL page header")]
    Short(usize),
    #[error("`{0:04X}` is not the magic number of a WAL page of a known PostgreSQL version")]
    Magic(u16),
    #[error("the first page lacks the header that begins a WAL segment")]
    NotASegmentStart,
    #[error("`{0}` bytes is not a possible WAL segment size")]
    ImpossibleSegmentSize(u32),
    #[error("WAL pages of {0} bytes are not supported")]
    PageBytes(u32),
    #[error("written by a cluster with segments of {found} bytes, but {expected} bytes are expected")]
    SegmentSize { expected: u64, found: u64 },
    #[error("belongs to system identifier {found}, not to {expected}")]
    SystemIdentifier { expected: u64, found: u64 },
    #[error("the page that should begin at {expected} says it begins at {found}")]
    Address { expected: Lsn, found: Lsn },
    #[error("written on timeline {found}, later than timeline {segment} of the segment's name")]
    Timeline { segment: u32, found: u32 },
    #[error("the page at {at} has magic number `{found:04X}`, the first one has `{expected:04X}`")]
    MixedMagic { at: Lsn, expected: u16, found: u16 },
}

/// Checks the first bytes of a segment (at least [`LONG_HEADER_BYTES`]) against its name and what is
/// known of its cluster.
pub fn check_segment_start(
    first_bytes: &[u8],
    segment: SegmentName,
    expected: &Expected,
) -> Result<LongHeader, WalPageError> {
    let header = PageHeader::parse(first_bytes).ok_or(WalPageError::Short(first_bytes.len()))?;
    let major = header.major().ok_or(WalPageError::Magic(header.magic))?;
    let long = header.long.ok_or(WalPageError::NotASegmentStart)?;
    let segment_size = SegmentSize::try_from(u64::from(long.segment_bytes))
        .map_err(|_| WalPageError::ImpossibleSegmentSize(long.segment_bytes))?;
    if usize::try_from(long.page_bytes) != Ok(WAL_PAGE_BYTES) {
        return Err(WalPageError::PageBytes(long.page_bytes));
    }
    if let Some(expected) = expected.system_identifier
        && expected != long.system_identifier
    {
        return Err(WalPageError::SystemIdentifier { expected, found: long.system_identifier });
    }
    if let Some(expected) = expected.segment_size
        && expected != segment_size
    {
        return Err(WalPageError::SegmentSize { expected: expected.bytes(), found: segment_size.bytes() });
    }
    let start = segment_size.start(segment);
    if header.address != start || !segment_size.admits(segment) {
        return Err(WalPageError::Address { expected: start, found: header.address });
    }
    if header.timeline > segment.timeline().get() {
        return Err(WalPageError::Timeline { segment: segment.timeline().get(), found: header.timeline });
    }
    Ok(LongHeader {
        magic: header.magic,
        major,
        system_identifier: long.system_identifier,
        segment_size,
        timeline: header.timeline,
    })
}

/// Whether a range may end in pages that were never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// Every page must have a header: the range comes from the stream.
    Written,
    /// All-zero pages may follow the last written one: a partial segment, or one that a switch cut short.
    MayBeZero,
}

/// Checks the header of every page that begins within `bytes`, which begin at `start` (anywhere within
/// a page): addresses step by one page and the magic number stays the same.
///
/// # Errors
/// Names the first page that does not fit.
pub fn check_pages(bytes: &[u8], start: Lsn, tail: Tail) -> Result<(), WalPageError> {
    let page_bytes = WAL_PAGE_BYTES as u64;
    let mut offset = (page_bytes - start.get() % page_bytes) % page_bytes;
    let mut magic = None;
    // A header cut off by the end of the range is left to the next range.
    while let Some(rest) = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..))
        && let Some((found, address)) = u16_at(rest, 0).zip(u64_at(rest, 8))
        && rest.len() >= SHORT_HEADER_BYTES
    {
        let at = Lsn::new(start.get().wrapping_add(offset));
        if found == 0 && tail == Tail::MayBeZero && is_zero(rest) {
            return Ok(());
        }
        let expected = *magic.get_or_insert(found);
        if found != expected {
            return Err(WalPageError::MixedMagic { at, expected, found });
        }
        if !MAGIC.iter().any(|(magic, _)| *magic == found) {
            return Err(WalPageError::Magic(found));
        }
        if Lsn::new(address) != at {
            return Err(WalPageError::Address { expected: at, found: Lsn::new(address) });
        }
        offset += page_bytes;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    // By words, which the compiler turns into vector instructions; a plain `all` goes byte by byte.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::TimelineId;
    use proptest::prelude::*;

    const SYSTEM: u64 = 7_300_000_000_000_000_001;

    /// Pages of WAL as PostgreSQL 15 writes them, bodies filled with `body`.
    fn pages(start: Lsn, count: usize, size: SegmentSize, body: u8) -> Vec<u8> {
        let mut out = Vec::new();
        for index in 0..count {
            let at = start.advance((index * WAL_PAGE_BYTES) as u64);
            let long = size.offset(at) == 0;
            let mut page = vec![body; WAL_PAGE_BYTES];
            page[..2].copy_from_slice(&0xD110_u16.to_le_bytes());
            page[2..4].copy_from_slice(&(if long { FLAG_LONG } else { 0 }).to_le_bytes());
            page[4..8].copy_from_slice(&1_u32.to_le_bytes());
            page[8..16].copy_from_slice(&at.get().to_le_bytes());
            page[16..24].fill(0);
            if long {
                page[24..32].copy_from_slice(&SYSTEM.to_le_bytes());
                page[32..36].copy_from_slice(&u32::try_from(size.bytes()).unwrap().to_le_bytes());
                page[36..40].copy_from_slice(&8192_u32.to_le_bytes());
            }
            out.extend(page);
        }
        out
    }

    fn segment(number: u64) -> SegmentName {
        let size = SegmentSize::DEFAULT;
        size.segment_at(TimelineId::FIRST, Lsn::new(number * size.bytes()))
    }

    #[test]
    fn a_segment_must_be_what_its_name_says() {
        let size = SegmentSize::DEFAULT;
        let bytes = pages(size.start(segment(3)), 1, size, 7);
        let expected = Expected { system_identifier: Some(SYSTEM), segment_size: Some(size) };
        let header = check_segment_start(&bytes, segment(3), &expected).unwrap();
        assert_eq!((header.major, header.system_identifier, header.segment_size), (15, SYSTEM, size));
        assert!(matches!(
            check_segment_start(&bytes, segment(4), &expected),
            Err(WalPageError::Address { .. })
        ));
        assert!(matches!(
            check_segment_start(&bytes, segment(3), &Expected { system_identifier: Some(1), ..expected }),
            Err(WalPageError::SystemIdentifier { expected: 1, found: SYSTEM })
        ));
        let small = SegmentSize::try_from(1 << 20).unwrap();
        assert!(matches!(
            check_segment_start(&bytes, segment(3), &Expected { segment_size: Some(small), ..expected }),
            Err(WalPageError::SegmentSize { .. })
        ));
        assert_eq!(check_segment_start(&bytes[..30], segment(3), &expected), Err(WalPageError::Short(30)));
    }

    #[test]
    fn the_parents_timeline_is_allowed_but_not_a_later_one() {
        let size = SegmentSize::DEFAULT;
        let second = segment(3).on(TimelineId::new(2).unwrap());
        let mut bytes = pages(size.start(second), 1, size, 7);
        assert_eq!(check_segment_start(&bytes, second, &Expected::default()).unwrap().timeline, 1);
        bytes[4] = 3;
        assert!(matches!(
            check_segment_start(&bytes, second, &Expected::default()),
            Err(WalPageError::Timeline { segment: 2, found: 3 })
        ));
    }

    proptest! {
        #[test]
        fn any_cut_of_good_pages_is_good(
            first in 0_u64..5000, count in 1_usize..6, from in 0_usize..40_000, length in 0_usize..60_000,
        ) {
            let start = Lsn::new(first * 8192);
            let bytes = pages(start, count, SegmentSize::try_from(1 << 20).unwrap(), 9);
            let from = from.min(bytes.len());
            let cut = &bytes[from..(from + length).min(bytes.len())];
            check_pages(cut, start.advance(from as u64), Tail::Written).unwrap();
        }

        #[test]
        fn a_page_in_the_wrong_place_is_found(
            first in 0_u64..5000, count in 2_usize..6, bad in 0_usize..6, shift in 1_u64..1000,
        ) {
            let bad = bad % count;
            let start = Lsn::new(first * 8192);
            let mut bytes = pages(start, count, SegmentSize::DEFAULT, 9);
            let at = start.advance((bad * WAL_PAGE_BYTES) as u64);
            let lie = at.get().wrapping_sub(shift * 8192);
            bytes[bad * WAL_PAGE_BYTES + 8..][..8].copy_from_slice(&lie.to_le_bytes());
            prop_assert_eq!(
                check_pages(&bytes, start, Tail::MayBeZero),
                Err(WalPageError::Address { expected: at, found: Lsn::new(lie) })
            );
        }

        #[test]
        fn zero_pages_are_a_tail_only_when_asked_for(
            count in 1_usize..4, zero in 1_usize..4, speck in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let start = Lsn::new(1 << 30);
            let mut bytes = pages(start, count, SegmentSize::DEFAULT, 9);
            let written = bytes.len();
            bytes.resize(written + zero * WAL_PAGE_BYTES, 0);
            prop_assert!(check_pages(&bytes, start, Tail::Written).is_err());
            if let Some(speck) = speck {
                let at = written + speck.index(bytes.len() - written);
                bytes[at] = 1;
                prop_assert!(check_pages(&bytes, start, Tail::MayBeZero).is_err());
            } else {
                prop_assert!(check_pages(&bytes, start, Tail::MayBeZero).is_ok());
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = PageHeader::parse(&bytes);
            let _ = check_segment_start(&bytes, segment(3), &Expected::default());
        }
    }
}
