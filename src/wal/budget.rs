//! How many bytes of received WAL may be in memory.
//!
//! Every chunk carries its share of the budget with it and gives it back when its last reader lets go,
//! so the limit holds whatever path the bytes take. The receiver reads from the server only while there
//! is room; TCP then slows the server down.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::postgres::SegmentSize;

/// A budget in bytes; cheap to clone, shared by all who draw from it.
#[derive(Clone, Debug)]
pub struct Budget {
    permits: Arc<Semaphore>,
    limit: usize,
}

struct Charged {
    bytes: Bytes,
    _share: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Budget {
    /// `limit` is in bytes.
    pub fn new(limit: usize) -> Self {
        let limit = limit.min(u32::MAX as usize);
        Self { permits: Arc::new(Semaphore::new(limit)), limit }
    }

    /// In bytes.
    pub const fn limit(&self) -> usize {
        self.limit
    }

    pub fn has_room(&self, bytes: usize) -> bool {
        self.permits.available_permits() >= bytes
    }

    /// Resolves when `bytes` would fit.
    pub async fn room(&self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // The semaphore is never closed, so this cannot fail; the permit goes back at once.
        drop(self.permits.acquire_many(bytes).await);
    }

    /// Charges `bytes` to the budget for as long as any part of them is held. When there is no room
    /// they go uncharged: callers check [`Budget::has_room`] before they take in more.
    pub fn charge(&self, bytes: Bytes) -> Bytes {
        let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        match Arc::clone(&self.permits).try_acquire_many_owned(size) {
            Ok(share) => Bytes::from_owner(Charged { bytes, _share: share }),
            Err(_) => bytes,
        }
    }
}

/// Memory to hold whole segments in while the receiver is behind the server: compressed in one go, a segment
/// costs a fifth less. A base backup needs the memory more and borrows it; segments are then compressed as
/// they arrive.
#[derive(Clone, Debug)]
pub struct SegmentMemory {
    limit: u64,
    lent: Arc<AtomicUsize>,
}

/// Segments this small are held in no larger number: each has a task and a put of its own.
const MOST_WHOLE_SEGMENTS: u64 = 8;

impl SegmentMemory {
    /// `limit` is in bytes.
    pub fn new(limit: u64) -> Self {
        Self { limit, lent: Arc::default() }
    }

    /// How many segments of `size` may be held. One alone would not be worth it: nothing could be received
    /// while it is compressed.
    pub fn segments(&self, size: SegmentSize) -> usize {
        let is_lent = self.lent.load(Ordering::Relaxed) > 0;
        let segments = if is_lent { 0 } else { (self.limit / size.bytes()).min(MOST_WHOLE_SEGMENTS) };
        if segments < 2 { 0 } else { usize::try_from(segments).unwrap_or(0) }
    }

    /// Takes the memory until the guard is dropped.
    pub fn lend(&self) -> Lent {
        self.lent.fetch_add(1, Ordering::Relaxed);
        Lent(Arc::clone(&self.lent))
    }
}

/// The memory is somebody else's.
#[derive(Debug)]
pub struct Lent(Arc<AtomicUsize>);

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_keeps_the_whole_charge_until_it_is_dropped() {
        let budget = Budget::new(10);
        let bytes = budget.charge(Bytes::from_static(b"123456"));
        let slice = bytes.slice(2..3);
        drop(bytes);
        assert!(!budget.has_room(5) && budget.has_room(4));
        drop(slice);
        assert!(budget.has_room(10));
    }

    #[test]
    fn whole_segments_are_held_only_where_two_fit_and_nobody_else_needs_the_memory() {
        let size = |bytes: u64| SegmentSize::try_from(bytes).unwrap();
        let memory = SegmentMemory::new(32 << 20);
        let segments = |mib: u64| memory.segments(size(mib << 20));
        assert_eq!([segments(1), segments(8), segments(16), segments(32)], [8, 4, 2, 0]);
        let lent = [memory.lend(), memory.lend()];
        assert_eq!(segments(16), 0);
        drop(lent);
        assert_eq!(segments(16), 2);
    }
}
