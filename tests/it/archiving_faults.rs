//! Continuous archiving when something goes wrong or changes: shutdowns, promotions, lost slots, strangers,
//! two agents, storage that fails, and `archive_command` in place of streaming.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde_json::{Value, json};

use crate::archiving::{
    Archive, NO_AGENT, Rig, archiving, assert_contiguous, fetch, fill, flush_lsn, lsn, wait_for, wait_stored,
};
use crate::binary::{self, Agent, pgkeep};
use crate::process::Scratch;
use crate::server::{Mode, Server, for_each_major, majors};

fn status_of(agent: &Agent) -> Value {
    pgkeep(["status", "--json", "--config"]).arg(agent.config_file()).run().success().json()
}

fn wait_streaming(server: &Server) {
    server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "1");
}

#[test]
fn a_fast_shutdown_is_not_held_up_and_everything_is_stored() {
    for major in majors().into_iter().filter(|major| [13, 15, 17, 18].contains(major)) {
        let mut rig = Rig::new(major, 16);
        rig.server.load(1_000);
        let without = rig.server.stop(Mode::Fast);
        rig.server.start_again();
        // An interval so long that the server's own question must be what stores the tail.
        let rig = rig.set("wal_flush_interval", 600);
        let agent = rig.agent();
        wait_streaming(&rig.server);
        rig.server.load(1_000);
        let committed = flush_lsn(&rig.server);
        let mut rig = rig;
        let with = rig.server.stop(Mode::Fast);
        eprintln!("PostgreSQL {major}: fast stop {without:?} without, {with:?} with the agent");
        assert!(with < without + Duration::from_secs(2), "{with:?} with the agent, {without:?} without");
        assert!(rig.archive().end(1) > committed, "the shutdown checkpoint is stored too");
        rig.server.start_again();
        rig.server.load(100);
        rig.server.switch_segment();
        wait_stored(&agent, flush_lsn(&rig.server) / rig.segment_size * rig.segment_size);
        rig.verify(&agent);
    }
}

/// Takes the right to write from (or gives it back to) every directory of the archive.
fn set_mode(archive: &Archive, mode: u32) {
    let pieces = archive.names("xlog_partial").into_iter().map(|segment| format!("xlog_partial/{segment}"));
    for folder in ["", "xlog", "xlog_partial", "timeline"].map(str::to_owned).into_iter().chain(pieces) {
        // Pieces come and go.
        let _ = fs::set_permissions(archive.root.join(folder), fs::Permissions::from_mode(mode));
    }
}

#[test]
fn storage_that_fails_holds_no_shutdown_up_and_is_caught_up_with() {
    for major in [majors()[0], *majors().last().unwrap()] {
        let mut rig = Rig::new(major, 1).set("shutdown_grace", 2);
        let agent = rig.agent();
        rig.server.load(1_000);
        rig.wait_stored(&agent);
        set_mode(&rig.archive(), 0o500);
        rig.server.load(10_000);
        wait_for("the failure is reported", || archiving(&agent)["last_error"].is_object());
        let acknowledged = archiving(&agent)["stored_lsn"].as_str().map(lsn).unwrap();
        assert!(acknowledged < flush_lsn(&rig.server), "nothing may be called stored now");
        set_mode(&rig.archive(), 0o700);
        rig.wait_stored(&agent);
        assert_eq!(archiving(&agent)["last_error"], Value::Null, "an error that has passed");
        set_mode(&rig.archive(), 0o500);
        rig.server.load(1_000);
        let took = rig.server.stop(Mode::Fast);
        assert!(took < Duration::from_secs(8), "the fast stop took {took:?}");
        set_mode(&rig.archive(), 0o700);
        rig.server.start_again();
        rig.server.switch_segment();
        wait_stored(&agent, flush_lsn(&rig.server) / rig.segment_size * rig.segment_size);
        assert!(rig.verify(&agent) >= 2);
        assert_eq!(status_of(&agent)["gaps"], json!([]));
    }
}

#[test]
fn a_promotion_of_the_server_it_streams_from_is_followed() {
    for_each_major(|major| {
        let mut rig = Rig::new(major, 1);
        rig.server.load(1_000);
        let standby = rig.server.standby();
        rig.site()["nodes"] = json!([node(&standby)]);
        let agent = rig.agent();
        wait_streaming(&standby);
        rig.server.load(10_000);
        let goal = flush_lsn(&rig.server);
        wait_stored(&agent, goal);
        standby.promote();
        standby.load(10_000);
        standby.switch_segment();
        wait_stored(&agent, flush_lsn(&standby) / rig.segment_size * rig.segment_size);
        let archive = rig.archive();
        assert!(archive.names("timeline").contains("00000002.history"));
        let segments = archive.segments();
        assert_contiguous(&segments, rig.segment_size);
        let second: Vec<_> = segments.iter().filter(|name| name.starts_with("00000002")).collect();
        assert!(second.len() >= 2, "{segments:?}");
        for segment in second {
            let there = fs::read(standby.wal_directory().join(segment)).unwrap();
            assert!(agent.get(&format!("/main/archive/{segment}")).body == there, "{segment}");
        }
        let modified = |name: &str| fs::metadata(archive.root.join(name)).unwrap().modified().unwrap();
        let first = segments.iter().find(|name| name.starts_with("00000002")).unwrap();
        assert!(modified("timeline/00000002.history") <= modified(&format!("xlog/{first}")));
        let status = status_of(&agent);
        assert_eq!(status["gaps"], json!([]), "{status}");
        let timelines: Vec<_> =
            status["timelines"].as_array().unwrap().iter().map(|each| each["timeline"].clone()).collect();
        // The old timeline's end is a point that one can restore to.
        assert_eq!(timelines, [json!(1), json!(2)], "{status}");
    });
}

fn node(server: &Server) -> Value {
    json!({ "host": "127.0.0.1", "port": server.port(), "user": "backup", "password": "secret" })
}

#[test]
fn finds_the_primary_and_follows_a_failover() {
    for major in [majors()[0], *majors().last().unwrap()] {
        let mut rig = Rig::new(major, 1);
        let standby = rig.server.standby();
        rig.site()["nodes"] = json!([node(&standby), node(&rig.server)]);
        let agent = rig.agent();
        wait_for("the agent streams", || archiving(&agent)["state"] == "streaming");
        assert_eq!(agent.status()["sites"]["main"]["server"]["standby"], false);
        assert_eq!(rig.server.value("select count(*) from pg_replication_slots where active"), "1");
        rig.server.load(5_000);
        let goal = rig.wait_stored(&agent);
        standby.wait_until(&format!("select pg_last_wal_replay_lsn() >= '0/{goal:X}'"), "t");
        rig.server.kill();
        standby.promote();
        standby.load(5_000);
        standby.switch_segment();
        wait_stored(&agent, flush_lsn(&standby) / rig.segment_size * rig.segment_size);
        let status = status_of(&agent);
        assert_eq!(status["gaps"], json!([]), "{status}");
        assert_contiguous(&rig.archive().segments(), rig.segment_size);
        assert!(rig.archive().segments().iter().any(|name| name.starts_with("00000002")));
    }
}

#[test]
fn a_gap_is_reported_and_healed_by_a_base_backup() {
    for_each_major(|major| {
        let builder = Server::builder(major)
            .segment_size_mib(1)
            .conf("max_wal_size = '2MB'")
            .conf("min_wal_size = '2MB'")
            .conf("wal_keep_size = 0");
        // Every so many hours: none is due by itself but the first.
        let mut rig = Rig::with(builder)
            .set("basebackup_interval_hours", 24)
            .set("backup_checkpoint", "fast")
            .set("basebackup_count", 5);
        let mut agent = rig.agent();
        wait_for("the first base backup", || status_of(&agent)["backups"] == 1);
        rig.wait_stored(&agent);
        agent.terminate();
        rig.server.sql("select pg_drop_replication_slot(slot_name) from pg_replication_slots");
        fill(&rig.server, 12);
        rig.server.sql("checkpoint");
        fill(&rig.server, 1);
        rig.server.sql("checkpoint");
        agent.start_again();
        wait_for("a second base backup", || status_of(&agent)["backups"] == 2);
        let status = status_of(&agent);
        assert_eq!(status["gaps"].as_array().unwrap().len(), 1, "{status}");
        assert!(agent.log().contains("gap"), "{}", agent.log());
        assert_eq!(agent.status()["sites"]["main"]["gaps"].as_array().unwrap().len(), 1);
        rig.server.load(5_000);
        rig.wait_stored(&agent);
        if major != 18 {
            return;
        }
        // Once more; and this time the agent that finds the gap is killed before it has taken the backup.
        agent.terminate();
        rig.server.sql("select pg_drop_replication_slot(slot_name) from pg_replication_slots");
        fill(&rig.server, 12);
        rig.server.sql("checkpoint");
        fill(&rig.server, 1);
        rig.server.sql("checkpoint");
        rig.site()["backup_rate_limit"] = json!(32 << 10);
        let mut found = rig.agent();
        wait_for("the gap is found", || found.log().contains("gap"));
        rig.server.load(5_000);
        rig.server.switch_segment();
        rig.wait_stored(&found);
        found.kill();
        agent.start_again();
        wait_for("a third base backup", || status_of(&agent)["backups"] == 3);
    });
}

#[test]
fn an_invalidated_slot_is_made_anew() {
    for major in majors() {
        let builder = Server::builder(major)
            .segment_size_mib(1)
            .conf("max_wal_size = '2MB'")
            .conf("min_wal_size = '2MB'")
            .conf("max_slot_wal_keep_size = '3MB'");
        let rig = Rig::with(builder)
            .set("basebackup_interval_hours", 24)
            .set("backup_checkpoint", "fast")
            .set("basebackup_count", 5);
        let mut agent = rig.agent();
        wait_for("the first base backup", || status_of(&agent)["backups"] == 1);
        rig.wait_stored(&agent);
        agent.terminate();
        for _ in 0..3 {
            fill(&rig.server, 5);
            rig.server.sql("checkpoint");
        }
        assert_eq!(rig.server.value("select wal_status from pg_replication_slots"), "lost");
        agent.start_again();
        wait_for("a second base backup", || status_of(&agent)["backups"] == 2);
        assert_eq!(status_of(&agent)["gaps"].as_array().unwrap().len(), 1, "PostgreSQL {major}");
        rig.server.load(1_000);
        rig.wait_stored(&agent);
        rig.server.wait_until("select wal_status in ('reserved', 'extended') from pg_replication_slots", "t");
    }
}

#[test]
fn another_cluster_is_refused_and_nothing_of_it_stored() {
    let major = *majors().last().unwrap();
    let rig = Rig::new(major, 1);
    let mut agent = rig.agent();
    rig.server.load(1_000);
    rig.server.switch_segment();
    rig.wait_stored(&agent);
    agent.terminate();
    let mut other = Rig::new(major, 1);
    other.site()["object_storage"] = rig.config["backup_sites"]["main"]["object_storage"].clone();
    let identifier = |server: &Server| server.value("select system_identifier from pg_control_system()");
    let before = (rig.archive().segments(), rig.archive().pieces());
    let stranger = other.agent();
    other.server.load(1_000);
    wait_for("the refusal is reported", || archiving(&stranger)["last_error"].is_object());
    let message = archiving(&stranger)["last_error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains(&identifier(&rig.server)), "{message}");
    assert!(message.contains(&identifier(&other.server)), "{message}");
    assert_eq!((rig.archive().segments(), rig.archive().pieces()), before);
    assert_eq!(other.server.value("select count(*) from pg_replication_slots"), "0");
}

#[test]
fn a_second_agent_does_no_harm() {
    let major = *majors().last().unwrap();
    let rig = Rig::new(major, 1).set("wal_flush_interval", "100ms");
    let mut first = rig.agent();
    wait_streaming(&rig.server);
    let second = rig.agent();
    wait_for("the second one is told", || archiving(&second)["last_error"].is_object());
    let message = archiving(&second)["last_error"]["message"].to_string();
    assert!(message.contains("active"), "{message}");
    rig.server.load(10_000);
    rig.wait_stored(&first);
    // It takes over when the first one goes.
    first.terminate();
    rig.server.load(1_000);
    rig.wait_stored(&second);
    first.start_again();

    // A third one, with a slot of its own, archives the same.
    let mut third = rig;
    third.site()["slot"] = json!("other");
    let other = third.agent();
    third.server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "2");
    for _ in 0..5 {
        third.server.load(3_000);
        std::thread::sleep(Duration::from_millis(200));
    }
    third.server.switch_segment();
    let end = flush_lsn(&third.server) / third.segment_size * third.segment_size;
    wait_stored(&other, end);
    wait_stored(&second, end);
    assert!(third.verify(&other) >= 4);
    assert_eq!(status_of(&other)["gaps"], json!([]));
    assert!(!other.log().contains("other content") && !second.log().contains("other content"));
}

/// `archive_command` with the agent at `url`, or without one through the configuration.
fn archive_command(config: &std::path::Path, url: &str) -> String {
    let program = binary::path().display();
    format!("archive_command = '{program} wal-push %p --url {url} --config {}'", config.display())
}

#[test]
fn archive_command_takes_every_kind_of_file_with_and_without_an_agent() {
    for_each_major(|major| {
        for with_agent in [true, false] {
            let mut rig = Rig::with(
                Server::builder(major)
                    .segment_size_mib(1)
                    .conf("wal_keep_size = '4GB'")
                    .conf("archive_mode = on")
                    .conf("archive_command = ''"),
            )
            .set("active_backup_mode", "archive_command");
            let agent = with_agent.then(|| rig.agent());
            let config = rig.scratch.write("push.json", rig.config.to_string());
            let url = agent.as_ref().map_or(NO_AGENT.to_owned(), Agent::url);
            let command = archive_command(&config, &url);
            set_archiving(&rig.server, &command);
            rig.server.load(5_000);
            // Taking it makes a `.backup` file.
            let standby = rig.server.standby();
            rig.server.load(1); // at the start of a segment there is nothing to switch
            let last = rig.server.switch_segment();
            rig.server
                .wait_until(&format!("select last_archived_wal >= '{last}' from pg_stat_archiver"), "t");
            set_archiving(&standby, &command);
            rig.server.load(3_000);
            let goal = flush_lsn(&rig.server);
            standby.wait_until(&format!("select pg_last_wal_replay_lsn() >= '0/{goal:X}'"), "t");
            // The old primary must not archive what the promoted one does.
            rig.server.kill();
            standby.promote();
            standby.load(3_000);
            let last = standby.switch_segment();
            standby.wait_until(&format!("select last_archived_wal >= '{last}' from pg_stat_archiver"), "t");
            assert_eq!(standby.value("select failed_count from pg_stat_archiver"), "0");
            let names = rig.archive().names("xlog");
            assert!(names.iter().any(|name| name.ends_with(".partial")), "{names:?}");
            assert!(names.iter().any(|name| name.ends_with(".backup")), "{names:?}");
            assert!(rig.archive().names("timeline").contains("00000002.history"));
            for segment in rig.archive().segments() {
                let directory = if segment.starts_with("00000002") { &standby } else { &rig.server };
                let there = fs::read(directory.wal_directory().join(&segment));
                if let Ok(there) = there {
                    assert!(fetch(&config, &url, &segment) == there, "{segment}");
                }
            }

            // The same file again, and another one under its name.
            let path = standby.wal_directory().join(&last);
            let push = |path: &std::path::Path| {
                pgkeep(["wal-push", "--url", &url, "--config"]).arg(&config).arg(path).run()
            };
            push(&path).success();
            let elsewhere = Scratch::new();
            let mut bytes = fs::read(&path).unwrap();
            let end = bytes.len();
            bytes[end - 100] ^= 1;
            let other = elsewhere.write(&last, &bytes);
            let refused = push(&other).expect_code(1);
            assert!(
                refused.stderr.contains("REFUSED") && refused.stderr.contains(&last),
                "{}",
                refused.stderr
            );
            bytes[end - 100] ^= 1;
            assert!(fetch(&config, &url, &last) == bytes, "{last} was overwritten");
        }
    });
}

fn set_archiving(server: &Server, command: &str) {
    server.sql(&format!("alter system set {}", command.replace("archive_command =", "archive_command to")));
    server.sql("select pg_reload_conf()");
}
