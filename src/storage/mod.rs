//! The configured object store and nothing above it. Keys are opaque here.
//!
//! What every store must give to the rooms above, whatever it gives by itself:
//! - a put is there, durably, when it has returned, or not at all;
//! - user metadata stays with the object (a local directory keeps it in PGHoard's `.metadata` files);
//! - listings come in the order of their keys and in bounded memory;
//! - a store that is gone (no bucket, a mount point with nothing mounted) is an error, never an empty store.

mod error;
mod faulty;
mod local;
mod observed;
mod open;
mod s3;
mod store;
mod walk;

pub use error::Error;
pub use faulty::{Fault, FaultPlan, Faulty, Operation};
pub use observed::{Answer, Asked, Observer, StoreEvent};
pub use open::{Access, Options, S3Config, StorageConfig, open, open_with};
pub use store::{ConditionalPut, PROBE, Store};
