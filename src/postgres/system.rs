//! Which cluster this is.
//!
//! Pure. Two clusters never share a system identifier unless one is a copy of the other, so an archive
//! accepts only what carries its own.

use serde::{Deserialize, Serialize};

use super::segment::SegmentSize;

/// What stays the same while one cluster runs, read once per connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemIdentity {
    pub system_identifier: u64,
    /// As `SHOW server_version_num`, such as 150020 for 15.20.
    pub server_version_num: u32,
    pub segment_size: SegmentSize,
}

impl SystemIdentity {
    /// PostgreSQL's major version, such as 15.
    pub const fn major(&self) -> u32 {
        self.server_version_num / 10_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_the_first_part() {
        let identity = SystemIdentity {
            system_identifier: 1,
            server_version_num: 150_020,
            segment_size: SegmentSize::DEFAULT,
        };
        assert_eq!(identity.major(), 15);
    }
}
