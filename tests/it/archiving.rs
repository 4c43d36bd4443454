//! Continuous archiving on real servers: streaming, the unfinished segment, stops and kills of either side.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::binary::{Agent, configuration, local_storage, pgkeep};
use crate::ledger::Writer;
use crate::process::{self, Scratch};
use crate::server::{Builder, Server, for_each_major, majors};

/// How long archiving may take to get anywhere: two cores, many tests.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A server, an archive in a directory and the configuration that joins them. No base backups unless asked.
pub struct Rig {
    pub scratch: Scratch,
    pub server: Server,
    pub config: Value,
    pub segment_size: u64,
}

impl Rig {
    pub fn new(major: u32, segment_size_mib: u32) -> Self {
        Self::with(Server::builder(major).segment_size_mib(segment_size_mib).conf("wal_keep_size = '4GB'"))
    }

    /// The server as a careful administrator has it: one role, one line.
    pub fn with(server: Builder) -> Self {
        let server = server.hba("host replication backup 127.0.0.1/32 scram-sha-256").start();
        server.create_role("backup", "LOGIN REPLICATION", "secret");
        let scratch = Scratch::new();
        let archive = scratch.directory("archive");
        let mut config = configuration(&server, &local_storage(&archive));
        config["backup_sites"]["main"]["basebackup_interval_hours"] = Value::Null;
        let segment_size = segment_size(&server);
        Self { scratch, server, config, segment_size }
    }

    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.site()[key] = value.into();
        self
    }

    pub fn site(&mut self) -> &mut Value {
        &mut self.config["backup_sites"]["main"]
    }

    pub fn agent(&self) -> Agent {
        Agent::start(&self.config)
    }

    pub fn archive(&self) -> Archive {
        Archive { root: self.scratch.path().join("archive/main"), segment_size: self.segment_size }
    }

    /// Waits until all WAL that the server has written so far is stored.
    pub fn wait_stored(&self, agent: &Agent) -> u64 {
        let lsn = flush_lsn(&self.server);
        wait_stored(agent, lsn);
        lsn
    }

    /// Every whole segment of the archive follows the one before, and is what the server has. Returns how many.
    pub fn verify(&self, agent: &Agent) -> usize {
        let segments = self.archive().segments();
        assert_contiguous(&segments, self.segment_size);
        for segment in &segments {
            let there =
                fs::read(self.server.wal_directory().join(segment)).expect("the server keeps its WAL");
            let here = agent.get(&format!("/main/archive/{segment}"));
            assert_eq!(here.status, 200, "{segment}: {}", here.text());
            assert!(here.body == there, "{segment} differs from the server's");
        }
        segments.len()
    }
}

pub fn segment_size(server: &Server) -> u64 {
    server.value("select setting::bigint from pg_settings where name = 'wal_segment_size'").parse().unwrap()
}

/// What lies in a local archive, seen without pgkeep.
pub struct Archive {
    pub root: PathBuf,
    segment_size: u64,
}

impl Archive {
    pub fn names(&self, folder: &str) -> BTreeSet<String> {
        let Ok(entries) = fs::read_dir(self.root.join(folder)) else { return BTreeSet::new() };
        entries
            .map(|entry| entry.expect("read the archive").file_name().into_string().expect("plain names"))
            .filter(|name| !name.ends_with(".metadata") && !name.contains('#') && !name.starts_with('.'))
            .collect()
    }

    pub fn segments(&self) -> Vec<String> {
        self.names("xlog").into_iter().filter(|name| name.len() == 24).collect()
    }

    /// Stored pieces by segment; a segment whose pieces are gone is not there.
    pub fn pieces(&self) -> BTreeMap<String, Vec<(u64, u64)>> {
        // What is being written has another kind of name.
        let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
        self.names("xlog_partial")
            .into_iter()
            .map(|segment| {
                let names = self.names(&format!("xlog_partial/{segment}"));
                let pieces = names.iter().filter_map(|name| name.split_once('-'));
                (
                    segment,
                    pieces
                        .filter_map(|(start, end)| Some((number(start)?, number(end)?)))
                        .collect::<Vec<_>>(),
                )
            })
            .filter(|(_, pieces)| !pieces.is_empty())
            .collect()
    }

    /// Up to where `timeline` is stored without a hole, pieces included.
    pub fn end(&self, timeline: u32) -> u64 {
        let prefix = format!("{timeline:08X}");
        let number = |name: &String| segment_number(name, self.segment_size);
        let whole = self.segments().iter().filter(|name| name.starts_with(&prefix)).map(number).max();
        let mut end = whole.map_or(0, |number| (number + 1) * self.segment_size);
        for (segment, mut pieces) in self.pieces().into_iter().filter(|(name, _)| name.starts_with(&prefix)) {
            let start = number(&segment) * self.segment_size;
            pieces.sort_unstable();
            if end == 0 {
                end = start;
            }
            for (from, to) in pieces {
                if start + from <= end {
                    end = end.max(start + to);
                }
            }
        }
        end
    }
}

pub fn segment_number(name: &str, segment_size: u64) -> u64 {
    let part = |range| u64::from_str_radix(&name[range], 16).expect("a segment name");
    part(8..16) * ((1 << 32) / segment_size) + part(16..24)
}

pub fn assert_contiguous(segments: &[String], segment_size: u64) {
    for pair in segments.windows(2) {
        let numbers = [&pair[0], &pair[1]].map(|name| segment_number(name, segment_size));
        if pair[0][..8] == pair[1][..8] {
            assert_eq!(numbers[0] + 1, numbers[1], "hole between {} and {}", pair[0], pair[1]);
        }
    }
}

pub fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap_or_else(|| panic!("{text} is no LSN"));
    u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap()
}

pub fn flush_lsn(server: &Server) -> u64 {
    lsn(&server.value("select pg_current_wal_flush_lsn()"))
}

/// What the agent says of archiving.
pub fn archiving(agent: &Agent) -> Value {
    agent.status()["sites"]["main"]["archiving"].clone()
}

pub fn wait_stored(agent: &Agent, goal: u64) {
    let mut last = Value::Null;
    let reached = process::poll(PATIENCE, || {
        last = archiving(agent);
        last["stored_lsn"].as_str().is_some_and(|stored| lsn(stored) >= goal).then_some(())
    });
    assert!(reached.is_some(), "not stored up to {goal:X}: {last}\n{}", agent.log());
}

/// Waits until `condition` holds.
pub fn wait_for(what: &str, condition: impl Fn() -> bool) {
    assert!(process::poll(PATIENCE, || condition().then_some(())).is_some(), "{what} did not come to pass");
}

/// Writes `mib` MiB of WAL that does not compress to nothing, each in a commit of its own.
pub fn fill(server: &Server, mib: u64) {
    for _ in 0..mib {
        server.sql(
            "select pg_logical_emit_message(true, 'fill', string_agg(md5(random()::text), '')) \
             from generate_series(1, 32768)",
        );
    }
}

/// `pgkeep wal-fetch` into a file of its own.
pub fn fetch(config: &Path, url: &str, name: &str) -> Vec<u8> {
    let scratch = Scratch::new();
    let path = scratch.path().join(name);
    pgkeep(["wal-fetch", "--url", url, "--config"]).arg(config).arg(name).arg(&path).run().success();
    fs::read(path).unwrap()
}

/// Nobody listens there.
pub const NO_AGENT: &str = "http://127.0.0.1:1";

#[test]
fn every_version_is_archived_byte_for_byte_with_the_least_rights() {
    for_each_major(|major| {
        let rig = Rig::new(major, 1);
        let agent = rig.agent();
        rig.server.wait_until("select count(*) from pg_replication_slots where active", "1");
        rig.server.load(20_000);
        fill(&rig.server, 2);
        rig.server.switch_segment();
        rig.server.load(100);
        rig.wait_stored(&agent);
        assert!(rig.verify(&agent) >= 4);
        let segments = rig.archive().segments();
        for segment in [&segments[0], segments.last().unwrap()] {
            let there = fs::read(rig.server.wal_directory().join(segment)).unwrap();
            assert!(
                fetch(&agent.config_file(), &agent.url(), segment) == there,
                "{segment} through the agent"
            );
            assert!(fetch(&agent.config_file(), NO_AGENT, segment) == there, "{segment} from storage");
        }
        let status = pgkeep(["status", "--json", "--config"]).arg(agent.config_file()).run().success().json();
        assert_eq!(status["gaps"], json!([]), "{status}");
    });
}

#[test]
fn every_segment_size_is_archived_byte_for_byte() {
    let major = *majors().last().unwrap();
    for size in [1, 16, 64] {
        let rig = Rig::new(major, size);
        let agent = rig.agent();
        rig.wait_stored(&agent);
        for _ in 0..3 {
            fill(&rig.server, u64::from(size.min(8)));
            rig.server.switch_segment();
        }
        fill(&rig.server, 1);
        rig.wait_stored(&agent);
        assert!(rig.verify(&agent) >= 3, "segments of {size} MiB");
        // The unfinished segment: what was written, then zeros.
        let current = rig.server.value("select pg_walfile_name(pg_current_wal_lsn())");
        let written = usize::try_from(flush_lsn(&rig.server) % rig.segment_size).unwrap();
        rig.wait_stored(&agent);
        let body = fetch(&agent.config_file(), &agent.url(), &current);
        let there = fs::read(rig.server.wal_directory().join(&current)).unwrap();
        assert_eq!(body.len() as u64, rig.segment_size);
        assert!(body[..written] == there[..written], "the beginning of {current}");
        assert!(fetch(&agent.config_file(), NO_AGENT, &current)[..written] == there[..written]);
    }
}

#[test]
fn archives_what_pg_receivewal_beside_it_receives() {
    let major = majors().into_iter().rfind(|major| *major >= 15).unwrap_or(17);
    let rig = Rig::new(major, 1);
    let directory = rig.scratch.directory("received");
    let mut receivewal = rig.server.tool_command("pg_receivewal");
    receivewal.args(["--no-sync", "-d", &rig.server.superuser_conninfo(), "-D"]).arg(&directory);
    let mut receivewal = process::spawn(receivewal).unwrap();
    let agent = rig.agent();
    rig.server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "2");
    rig.server.load(50_000);
    rig.server.switch_segment();
    rig.wait_stored(&agent);
    let mut same = 0;
    for segment in rig.archive().segments() {
        let received = directory.join(&segment);
        if process::poll(Duration::from_secs(5), || received.exists().then_some(())).is_some() {
            let here = agent.get(&format!("/main/archive/{segment}")).body;
            assert!(here == fs::read(received).unwrap(), "{segment}");
            same += 1;
        }
    }
    process::signal(receivewal.id(), rustix::process::Signal::KILL);
    process::wait(&mut receivewal, PATIENCE);
    assert!(same >= 4, "only {same} segments were compared");
}

#[test]
fn pieces_are_stored_in_time_stay_few_and_go_with_their_segment() {
    let rig = Rig::new(*majors().last().unwrap(), 1).set("wal_flush_interval", "100ms");
    let agent = rig.agent();
    rig.wait_stored(&agent);
    rig.server.sql("create table trickle (n int)");
    let (mut most, mut slowest) = (0, Duration::ZERO);
    let begin = Instant::now();
    let mut commits = 0;
    while begin.elapsed() < Duration::from_secs(8) {
        rig.server.sql("insert into trickle values (1)");
        let committed = flush_lsn(&rig.server);
        let at = Instant::now();
        if commits % 10 == 0 {
            wait_stored(&agent, committed);
            slowest = slowest.max(at.elapsed());
        }
        commits += 1;
        most = most.max(rig.archive().pieces().values().map(Vec::len).max().unwrap_or(0));
    }
    assert!((2..=24).contains(&most), "{most} pieces of one segment");
    assert!(slowest < Duration::from_secs(2), "a commit took {slowest:?} to be stored");
    // Sees the current position; what is stored really is there.
    assert!(rig.archive().end(1) >= flush_lsn(&rig.server) - 64 * 1024);
    eprintln!("{commits} commits, at most {most} pieces, slowest {slowest:?}");
    let segment = rig.server.switch_segment();
    rig.server.sql("insert into trickle values (1)");
    wait_for("the pieces of a whole segment go", || {
        let archive = rig.archive();
        archive.segments().contains(&segment) && !archive.pieces().contains_key(&segment)
    });
    rig.verify(&agent);
}

#[test]
fn sigterm_stores_the_tail_and_the_bucket_alone_is_enough_to_go_on() {
    for major in [majors()[0], *majors().last().unwrap()] {
        // An interval so long that only stopping can be what stores the tail.
        let rig = Rig::new(major, 1).set("wal_flush_interval", 600);
        let mut agent = rig.agent();
        rig.server.wait_until("select count(*) from pg_replication_slots where active", "1");
        for _ in 0..3 {
            rig.server.load(7_000);
            let committed = flush_lsn(&rig.server);
            let ended = agent.terminate();
            assert_eq!(ended.code, 0, "{}", agent.log());
            assert!(ended.elapsed < Duration::from_secs(5), "took {:?}", ended.elapsed);
            let stored = rig.archive().end(1);
            assert!(stored >= committed, "stored up to {stored:X}, committed {committed:X}\n{}", agent.log());
            rig.server.load(3_000);
            // Another directory, another configuration file: as on an empty disk.
            agent = rig.agent();
            rig.server.wait_until("select count(*) from pg_replication_slots where active", "1");
        }
        rig.server.switch_segment();
        wait_stored(&agent, flush_lsn(&rig.server) / rig.segment_size * rig.segment_size);
        assert!(rig.verify(&agent) >= 5);
    }
}

#[test]
fn sigterm_in_a_catch_up_does_not_wait_for_the_segment_to_fill() {
    let rig = Rig::new(*majors().last().unwrap(), 16);
    let mut agent = rig.agent();
    rig.wait_stored(&agent);
    agent.terminate();
    fill(&rig.server, 100);
    agent.start_again();
    wait_for("archiving gets going", || archiving(&agent)["stored_lsn"].is_string());
    let ended = agent.terminate();
    assert_eq!(ended.code, 0);
    assert!(ended.elapsed < Duration::from_secs(8), "took {:?}\n{}", ended.elapsed, agent.log());
    agent.start_again();
    rig.wait_stored(&agent);
    rig.verify(&agent);
}

#[test]
fn kills_of_the_agent_under_load_leave_no_hole() {
    let rig = Rig::new(*majors().last().unwrap(), 1).set("wal_flush_interval", "100ms");
    let mut agent = rig.agent();
    let writer = Writer::start(&rig.server, Duration::from_millis(1));
    for cycle in 0_u64..8 {
        rig.server.load(5_000);
        writer.wait_for_more(10);
        // Anywhere between starting up and streaming.
        sleep(Duration::from_millis(cycle * 137 % 700));
        agent.kill();
        rig.server.load(2_000);
        agent.start_again();
    }
    writer.stop();
    rig.server.switch_segment();
    rig.wait_stored(&agent);
    assert!(rig.verify(&agent) >= 8);
    let status = pgkeep(["status", "--json", "--config"]).arg(agent.config_file()).run().success().json();
    assert_eq!(status["gaps"], json!([]), "{status}");
}

#[test]
fn kills_of_the_server_under_load_leave_no_hole() {
    for major in [majors()[0], *majors().last().unwrap()] {
        let mut rig = Rig::with(
            // What is sent must be on disk, or a killed server could forget it.
            Server::builder(major).segment_size_mib(1).conf("wal_keep_size = '4GB'"),
        );
        let agent = rig.agent();
        rig.wait_stored(&agent);
        let writer = Writer::start(&rig.server, Duration::from_millis(1));
        for _ in 0..3 {
            rig.server.load(15_000);
            writer.wait_for_more(20);
            rig.server.kill();
            rig.server.start_again();
        }
        // A crash of one process makes the postmaster start all others again.
        let victim = rig.server.value("select pid from pg_stat_activity where backend_type = 'checkpointer'");
        process::signal(victim.parse().unwrap(), rustix::process::Signal::KILL);
        wait_for("the server recovers", || {
            rig.server.log().matches("database system is ready to accept connections").count() >= 5
        });
        writer.wait_for_more(20);
        writer.stop();
        rig.server.switch_segment();
        rig.wait_stored(&agent);
        assert!(rig.verify(&agent) >= 4);
        assert_eq!(archiving(&agent)["state"], "streaming");
    }
}

#[test]
fn what_a_killed_server_had_sent_is_stored() {
    let mut rig = Rig::new(*majors().last().unwrap(), 16).set("wal_flush_interval", 600);
    let agent = rig.agent();
    rig.server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "1");
    rig.server.load(1_000);
    let committed = flush_lsn(&rig.server);
    let received = || archiving(&agent)["received_lsn"].as_str().is_some_and(|at| lsn(at) >= committed);
    wait_for("the commits are received", received);
    assert!(rig.archive().end(1) < committed, "nothing but the end of the server may store them here");
    rig.server.kill();
    wait_for("the commits are stored", || rig.archive().end(1) >= committed);
}

#[test]
fn an_idle_server_costs_next_to_nothing() {
    let rig = Rig::new(*majors().last().unwrap(), 16);
    let agent = rig.agent();
    rig.wait_stored(&agent);
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid().unwrap())).unwrap();
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        fields[11] + fields[12]
    };
    // The server itself writes a few bytes every 15 s for a while.
    let quiet = (0..5).any(|_| {
        rig.wait_stored(&agent);
        sleep(Duration::from_millis(500)); // superfluous pieces go a moment after
        let (written, pieces, before) = (flush_lsn(&rig.server), rig.archive().pieces(), ticks());
        sleep(Duration::from_secs(3));
        let spent = ticks() - before;
        assert!(spent < 30, "{spent} hundredths of a second of CPU in 3 s");
        let quiet = flush_lsn(&rig.server) == written;
        assert!(!quiet || rig.archive().pieces() == pieces, "nothing was written, so nothing is stored");
        quiet
    });
    assert!(quiet, "the server never was idle");
}

#[test]
fn a_catch_up_stays_within_its_memory() {
    let rig = Rig::new(*majors().last().unwrap(), 16);
    let mut agent = rig.agent();
    rig.wait_stored(&agent);
    agent.terminate();
    for _ in 0..30 {
        fill(&rig.server, 12);
        rig.server.switch_segment();
        fill(&rig.server, 1);
        rig.server.switch_segment();
    }
    agent.start_again();
    let begin = Instant::now();
    rig.wait_stored(&agent);
    let peak = agent.peak_memory() >> 20;
    eprintln!("60 segments in {:?}, at most {peak} MiB", begin.elapsed());
    // With the 13 MiB of the program itself not above 64.
    assert!(peak <= 51, "it took {peak} MiB");
    assert!(rig.archive().segments().len() >= 60);
}

#[test]
fn s3_is_streamed_to_across_restarts() {
    let Some(s3) = crate::s3::S3::from_environment() else { return };
    let mut rig = Rig::new(*majors().last().unwrap(), 1);
    rig.site()["object_storage"] = s3.object_storage(&crate::s3::unique_prefix("archiving"));
    let mut agent = rig.agent();
    rig.wait_stored(&agent);
    let first = segment_number(&rig.server.value("select pg_walfile_name(pg_current_wal_lsn())"), 1 << 20);
    rig.server.load(20_000);
    agent.terminate();
    rig.server.load(10_000);
    agent.start_again();
    rig.wait_stored(&agent);
    rig.server.load(5_000);
    agent.kill();
    agent.start_again();
    rig.server.switch_segment();
    rig.wait_stored(&agent);
    let end = flush_lsn(&rig.server) / rig.segment_size;
    assert!(end > first + 4);
    for number in first..end {
        let segment = format!("{:08X}{:08X}{:08X}", 1, number >> 12, number & 0xFFF);
        let there = fs::read(rig.server.wal_directory().join(&segment)).unwrap();
        assert!(agent.get(&format!("/main/archive/{segment}")).body == there, "{segment}");
        assert!(fetch(&agent.config_file(), NO_AGENT, &segment) == there, "{segment}");
    }
}
