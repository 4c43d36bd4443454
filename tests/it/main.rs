//! Tests of the program from the outside, against real servers and a real S3.
//!
//! `make test` prepares the machine and runs them. By hand: `scripts/install-test-deps` once, then
//! `cargo test --test it`; `PGKEEP_TEST_MAJORS=17` keeps to one version of PostgreSQL.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "tests stand in the real world: its clock, its environment, its terminal"
)]
// A whole `pghoard.json` in one `json!`.
#![recursion_limit = "256"]
#![allow(clippy::unwrap_used, reason = "clippy sees tests only in the test functions themselves")]
#![allow(dead_code, reason = "fixtures may offer more than the tests of today use")]

// What tests stand on.
mod binary;
mod http;
mod ledger;
mod process;
mod s3;
mod server;
mod site;

// What they test.
mod architecture;
mod archiving;
mod archiving_faults;
mod backup;
mod commands;
mod config;
mod encryption;
mod envelope;
mod errors;
mod metrics;
mod pghoard_commands;
mod pghoard_config;
mod pghoard_http;
mod pghoard_restore;
mod restore;
mod serve;
mod storage;
