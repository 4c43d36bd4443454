//! Configuration: as written ([`RawConfig`]) and as meant ([`Config`]).
//!
//! ```text
//! file ─▶ JSON ─▶ secrets put in ─▶ RawConfig ─▶ Config
//! environment ─▶ JSON ──────────────▲
//! ```
//!
//! The file is PGHoard's, so that a PGHoard user changes nothing; a few keys are ours. Whatever goes
//! wrong is reported with its place in the file.

mod encryption;
mod environment;
mod error;
mod indirect;
mod keys;
mod load;
mod model;
mod nodes;
mod raw;
mod reporting;
mod show;
mod storage;
mod units;

pub use error::{Error, Problem, Warning};
pub use keys::json_schema;
pub use load::{Loaded, Source};
pub use model::{
    CheckpointMode, Config, Credentials, HttpConfig, NodeConfig, Retention, Schedule, SiteConfig, WalIntake,
};
pub use raw::RawConfig;
pub use reporting::{Reporting, StateFile, StorageStatsd};
