//! How many bytes of received WAL may be in memory.
//!
//! Every chunk carries its share of the budget with it and gives it back when its last reader lets go,
//! so the limit holds whatever path the bytes take. The receiver reads from the server only while there
//! is room; TCP then slows the server down.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

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
}
