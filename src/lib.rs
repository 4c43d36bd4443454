//! pgkeep: backup and WAL archiving for PostgreSQL.
//!
//! Data moves one way, left to right when writing and right to left when reading:
//!
//! ```text
//! PostgreSQL ──replication──▶ postgres ─▶ wal | basebackup ─▶ repository{ codec ─▶ storage } ─▶ catalog
//! PostgreSQL ◀─restore_command── serve ◀── repository ◀── catalog ◀── restore · retention
//! ```
//!
//! Each room below knows only the rooms of lower levels; `docs/design.md` tells why, and
//! `tests/it/architecture.rs` holds the line.

// level 0: values and bytes
pub mod codec;
pub mod postgres;
pub mod secret;
// level 1: the outside world, seen through narrow doors
pub mod observe;
pub mod runtime;
pub mod storage;
// level 2: typed names, one pipeline, receipts
pub mod repository;
// level 3: what the repository holds, as values
pub mod catalog;
// level 4: what pgkeep does
pub mod basebackup;
pub mod pghoard;
pub mod restore;
pub mod retention;
pub mod serve;
pub mod wal;
// level 5: one program
pub mod agent;
pub mod config;
// level 6: what a person types
pub mod cli;
