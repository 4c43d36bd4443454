//! `pgkeep backup`, `list` and `prune` against real servers.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::process;
use crate::server::{Mode, Server, for_each_major, majors};
use crate::site::{Site, watch};

#[test]
fn a_backup_on_its_own_streams_its_wal_and_leaves_no_slot() {
    for_each_major(|major| {
        let site = Site::start(major);
        site.server.load(1000);
        site.backup();
        assert_eq!(site.server.value("select count(*) from pg_replication_slots"), "0");
        site.server.load(7); // nobody archives this
        let restored = site.restore_and_start("restored", &[]);
        assert_eq!(restored.value("select count(*) from load"), "1000");
    });
}
