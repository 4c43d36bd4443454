//! PGHoard's configuration with pgkeep: every key is known, and the signs by which PGHoard is watched are there.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::archiving::{Rig, archiving, flush_lsn, wait_for, wait_stored};
use crate::binary::{self, Agent, local_storage, pgkeep};
use crate::pghoard_http::{pghoard_bin, pghoard_is_installed};
use crate::process::{self, Scratch};
use crate::server::majors;

fn newest() -> u32 {
    *majors().last().expect("a version to test")
}

/// A file with every key that PGHoard 2.7 and its predecessors know, values as people write them.
fn every_key(rig: &Rig) -> Value {
    let local = |name: &str| rig.scratch.path().join(name);
    let port = rig.server.port();
    json!({
        "$schema": "x",
        "active": true,
        "alert_file_dir": local("alerts"),
        "backup_location": rig.scratch.directory("state"),
        "compression": { "algorithm": "snappy", "level": 0, "thread_count": 2 },
        "deleter_event_get_timeout": 1.0,
        "graceful_shutdown_compression_timeout": 3,
        "graceful_shutdown_upload_timeout": 5,
        "hash_algorithm": "sha1",
        "http_address": "127.0.0.1",
        "http_port": "16000",
        "json_state_file_path": local("state.json"),
        "log_level": "INFO",
        "maintenance_mode_file": local("maintenance"),
        "path_prefix": "",
        "pg_basebackup_path": "/usr/bin/pg_basebackup",
        "pg_receivexlog_path": "/usr/bin/pg_receivewal",
        "prometheus": { "tags": { "app": "shop", "shard": 1 } },
        "pushgateway": { "endpoint": "http://127.0.0.1:9", "job": "pghoard", "instance": "", "tags": {} },
        "restore_prefetch": 4,
        "restore_process_count": 2,
        "statsd": { "host": "127.0.0.1", "port": "9", "format": "datadog", "tags": { "app": "shop" } },
        "syslog": false,
        "syslog_address": "/dev/log",
        "syslog_facility": "local2",
        "tar_executable": "pghoard_gnutaremu",
        "transfer": { "thread_count": 2 },
        "upload_retries_warning_limit": 3,
        "webserver_password": null,
        "webserver_username": null,
        "backup_sites": { "main": {
            "active": true,
            "active_backup_mode": "walreceiver",
            "basebackup_age_days_max": 30,
            "basebackup_chunk_size": 2_147_483_648_u64,
            "basebackup_chunks_in_progress": 5,
            "basebackup_compression_threads": 0,
            "basebackup_count": 2,
            "basebackup_count_min": 2,
            "basebackup_delta_mode_chunk_size": 524_288_000,
            "basebackup_delta_mode_max_retries": 10,
            "basebackup_delta_mode_min_delta_file_size": 10_485_760,
            "basebackup_hour": 3,
            "basebackup_interval_hours": null,
            "basebackup_minute": 30,
            "basebackup_mode": "local-tar",
            "basebackup_threads": 1,
            "encryption_key_id": null,
            "nodes": [{
                "host": "127.0.0.1", "port": port.to_string(), "user": "backup", "password": "secret",
                "slot": "their_slot", "dbname": null,
            }],
            "object_storage": {
                "storage_type": "local",
                "directory": rig.scratch.path().join("archive"),
                "prefix": null,
                "notifier": null,
                "statsd_info": {
                    "host": "127.0.0.1", "port": 9, "message_format": "telegraf", "tags": {},
                    "operation_map": {},
                },
                "project_id": "p", "bucket_name": "b", "credential_file": "/x", "proxy_info": null,
                "connect_timeout": 5, "read_timeout": "60", "use_dualstack_endpoint": false,
                "user_agent_extra": "x", "segment_size": 5_242_880, "min_multipart_chunk_size": 5_242_880,
            },
            "pg_basebackup_path": "/usr/bin/pg_basebackup",
            "pg_bin_directory": "/usr/lib/postgresql/15/bin",
            "pg_data_directory": "/var/lib/postgresql/not-on-this-host",
            "pg_receivexlog": {
                "disk_space_check_interval": 10, "min_disk_free_bytes": null, "resume_multiplier": 1.5,
            },
            "pg_receivexlog_path": "/usr/bin/pg_receivewal",
            "pg_version": newest() * 10_000,
            "pg_xlog_directory": "/x",
            "prefix": "main",
            "stream_compression": false,
        }},
    })
}

fn config_file(rig: &Rig, config: &Value) -> String {
    rig.scratch.write("pghoard.json", config.to_string()).to_str().expect("a plain path").to_owned()
}

#[test]
fn every_key_of_pghoard_is_known_and_the_agent_runs_on_them() {
    let mut rig = Rig::new(newest(), 1);
    rig.config = every_key(&rig);
    let file = config_file(&rig, &rig.config);
    let checked = pgkeep(["config", "check", "--config", &file]).run().success();
    assert!(!checked.stdout.contains("unknown key"), "{}", checked.stdout);
    for line in checked.stdout.lines().filter(|line| line.contains("without effect")) {
        assert!(
            line.split_once("without effect; ").is_some_and(|(_, why)| why.len() > 10),
            "no reason: {line}"
        );
    }
    assert!(!checked.stdout.contains("not read yet"), "{}", checked.stdout);

    let mut agent = rig.agent();
    rig.wait_stored(&agent);
    // The node's slot is the one that is used, as PGHoard does; here it is made, too.
    assert_eq!(rig.server.value("select slot_name from pg_replication_slots where active"), "their_slot");
    assert_eq!(agent.terminate().code, 0);
}

#[test]
fn a_kubernetes_config_of_2016_means_what_it_said() {
    let mut rig = Rig::new(newest(), 1);
    let mut config = json!({
        "backup_location": "/tmp/pghoard-state-that-is-not-there",
        "backup_sites": { "default": {
            "active_backup_mode": "pg_receivexlog",
            "pg_data_directory": "/data/unreadable",
            "nodes": [{ "host": "127.0.0.1", "password": "secret", "port": rig.server.port(), "user": "backup" }],
            "object_storage": {
                "storage_type": "google", "project_id": "p", "bucket_name": "b",
                "credential_file": "/etc/creds.json",
            },
        }},
    });
    let file = config_file(&rig, &config);
    let refused = pgkeep(["config", "check", "--config", &file]).run().expect_code(2);
    let place = "backup_sites.default.object_storage.storage_type: ";
    assert!(refused.stderr.contains(place) && refused.stderr.contains("`s3`"), "{}", refused.stderr);

    config["backup_sites"]["default"]["object_storage"] = local_storage(&rig.scratch.path().join("archive"));
    let file = config_file(&rig, &config);
    pgkeep(["config", "check", "--config", &file]).run().success();
    let shown = pgkeep(["config", "show", "--json", "--config", &file]).run().success().json();
    let site = &shown["backup_sites"]["default"];
    assert_eq!(shown["http_port"], 16000);
    assert_eq!(site["prefix"], "default");
    assert_eq!(site["active_backup_mode"], "pg_receivexlog");
    assert_eq!(site["basebackup_interval_hours"], 24.0);
    assert_eq!((&site["basebackup_count"], &site["basebackup_count_min"]), (&json!(2), &json!(2)));
    assert_eq!(site["basebackup_hour"], Value::Null);

    rig.config = config;
    let agent = rig.agent();
    let lsn = flush_lsn(&rig.server);
    wait_for("WAL is stored", || {
        let status = &agent.status()["sites"]["default"]["archiving"];
        status["stored_lsn"].as_str().is_some_and(|stored| crate::archiving::lsn(stored) >= lsn)
    });
    // The first backup is due at once, and everything else is as PGHoard does it by default.
    wait_for("a base backup is taken", || {
        agent.status()["backup_sites"]["default"]["basebackups"]
            .as_array()
            .is_some_and(|list| !list.is_empty())
    });
}

#[test]
fn s3_takes_the_same_configuration() {
    let Some(s3) = crate::s3::S3::from_environment() else { return };
    let mut rig = Rig::new(newest(), 1);
    rig.site()["object_storage"] = s3.object_storage(&crate::s3::unique_prefix("pghoard-config"));
    let storage = &mut rig.site()["object_storage"];
    storage["port"] = json!(s3.port.to_string());
    storage["connect_timeout"] = json!("3");
    storage["read_timeout"] = json!(30);
    storage["user_agent_extra"] = json!("shop");
    storage["use_dualstack_endpoint"] = json!(true);
    let agent = rig.agent();
    rig.wait_stored(&agent);
}

#[test]
fn a_mode_that_nobody_knows_starts_nothing() {
    let rig =
        Rig::new(newest(), 1).set("active_backup_mode", "telepathy").set("basebackup_interval_hours", 1);
    let agent = rig.agent();
    std::thread::sleep(Duration::from_secs(7)); // longer than the schedule takes to look
    assert_eq!(rig.server.value("select count(*) from pg_replication_slots"), "0");
    assert_eq!(agent.status()["sites"]["main"]["backup"]["running"], false);
    assert!(agent.log().contains("nothing is started for a mode `telepathy`"), "{}", agent.log());
}

#[test]
fn storage_must_not_be_where_pghoard_works() {
    let scratch = Scratch::new();
    let directory = scratch.directory("both");
    let config = json!({
        "backup_location": directory,
        "backup_sites": { "main": { "nodes": ["host=db"], "object_storage": local_storage(&directory) } },
    });
    let file = scratch.write("pghoard.json", config.to_string());
    let refused = pgkeep(["config", "check", "--config"]).arg(file).run().expect_code(2);
    assert!(
        refused.stderr.contains("object_storage.directory: the same as `backup_location`"),
        "{}",
        refused.stderr
    );
}

#[test]
fn the_state_file_has_pghoards_keys_beside_ours() {
    let mut rig = Rig::new(newest(), 1).set("basebackup_interval_hours", 24);
    let file = rig.scratch.path().join("run/state.json");
    rig.config["json_state_file_path"] = json!(file);
    let mut agent = rig.agent();
    rig.wait_stored(&agent);
    rig.server.switch_segment();
    rig.server.load(100);
    rig.wait_stored(&agent);
    let read = || -> Value {
        // Always whole: it is replaced, never written in place.
        fs::read(&file).map_or(Value::Null, |text| serde_json::from_slice(&text).expect("valid JSON"))
    };
    wait_for("the backup is in the state file", || {
        read()["backup_sites"]["main"]["basebackups"].as_array().is_some_and(|list| !list.is_empty())
    });
    let state = read();
    for key in [
        "backup_sites",
        "compressors",
        "pg_basebackups",
        "pg_receivexlogs",
        "queues",
        "served_files",
        "startup_time",
        "transfer_agent_state",
        "walreceivers",
    ] {
        assert!(state.get(key).is_some(), "`{key}` is missing in {state}");
    }
    let backup = &state["backup_sites"]["main"]["basebackups"][0];
    assert!(
        backup["metadata"]["start-wal-segment"].as_str().is_some_and(|segment| segment.len() == 24),
        "{backup}"
    );
    assert!(!backup["name"].as_str().unwrap().contains('/'), "{backup}");
    assert_eq!(state["pg_receivexlogs"]["main"]["running"], true);
    assert!(state["walreceivers"]["main"]["last_flushed_lsn"].as_u64().is_some_and(|lsn| lsn > 0));
    let uploads = &state["transfer_agent_state"]["main"]["upload"];
    let segments = uploads["xlog"]["count"].as_u64().unwrap();
    assert!(segments > 0 && uploads["xlog"]["data"].as_u64().unwrap() > 0, "{uploads}");
    assert!(uploads["xlog"]["last_success"].as_str().is_some_and(|time| time.starts_with("20")), "{uploads}");
    assert_eq!(state["queues"], json!({ "compression_queue": 0, "transfer_queue": 0 }));
    assert_eq!(agent.status()["sites"]["main"]["site"], "main");

    // What was counted goes on after a restart.
    agent.terminate();
    agent.start_again();
    wait_for("the state is written again", || read()["startup_time"] != state["startup_time"]);
    assert!(read()["transfer_agent_state"]["main"]["upload"]["xlog"]["count"].as_u64().unwrap() >= segments);
}

#[test]
fn a_maintenance_file_holds_backups_back_until_it_goes() {
    let mut rig = Rig::new(newest(), 1).set("basebackup_interval_hours", 24);
    let file = rig.scratch.write("maintenance", "");
    rig.config["maintenance_mode_file"] = json!(file);
    let agent = rig.agent();
    rig.wait_stored(&agent);
    wait_for("it says that it waits", || agent.log().contains("waits while the maintenance file exists"));
    std::thread::sleep(Duration::from_secs(6)); // another look at the schedule
    let backup = || agent.status()["sites"]["main"]["backup"].clone();
    assert_eq!((&backup()["running"], &backup()["last"]), (&json!(false), &Value::Null));
    fs::remove_file(&file).unwrap();
    wait_for("the backup is taken", || backup()["last"].is_string());
}

/// Waits for an alert file and checks its content.
fn wait_for_alert(directory: &Path, name: &str) {
    let path = directory.join(name);
    wait_for(name, || path.exists());
    assert_eq!(fs::read_to_string(&path).unwrap(), "alert");
}

#[test]
fn alert_files_appear_with_pghoards_names() {
    let mut rig = Rig::new(newest(), 1);
    let alerts = rig.scratch.directory("alerts");
    rig.config["alert_file_dir"] = json!(alerts);
    let names = || -> Vec<String> {
        let names =
            fs::read_dir(&alerts).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    };

    rig.site()["nodes"][0]["password"] = json!("wrong");
    let agent = rig.agent();
    wait_for_alert(&alerts, "authentication_error");
    assert_eq!(names(), ["authentication_error"]);
    drop(agent);

    rig.site()["nodes"][0]["password"] = json!("secret");
    rig.site()["nodes"][0]["port"] = json!(process::free_port());
    let agent = rig.agent();
    wait_for_alert(&alerts, "configuration_error");
    drop(agent);

    rig.site()["nodes"][0]["port"] = json!(rig.server.port());
    rig.site()["pg_version"] = json!((newest() - 1) * 10_000);
    let agent = rig.agent();
    wait_for_alert(&alerts, "version_mismatch_error");
    // That is an alert and no reason to lose WAL.
    rig.wait_stored(&agent);
    assert!(!alerts.join("upload_retries_warning").exists());
}

#[test]
fn storage_that_keeps_failing_is_an_alert() {
    let mut rig = Rig::new(newest(), 1);
    let alerts = rig.scratch.directory("alerts");
    rig.config["backup_location"] = json!(alerts);
    rig.config["upload_retries_warning_limit"] = json!(1);
    let agent = rig.agent();
    rig.wait_stored(&agent);
    let (archive, away) = (rig.scratch.path().join("archive"), rig.scratch.path().join("away"));
    fs::rename(&archive, &away).unwrap();
    rig.server.load(1_000);
    wait_for_alert(&alerts, "upload_retries_warning");
    fs::rename(&away, &archive).unwrap();
    rig.wait_stored(&agent);
}

#[test]
fn systemd_is_told_how_the_agent_is() {
    let rig = Rig::new(newest(), 1);
    let socket_path = rig.scratch.path().join("notify");
    let socket = UnixDatagram::bind(&socket_path).unwrap();
    fs::set_permissions(&socket_path, fs::Permissions::from_mode(0o777)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let next = || {
        let mut message = [0; 256];
        let length = socket.recv(&mut message).expect("a message of the agent");
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let place = socket_path.to_str().unwrap().to_owned();
    let mut agent = Agent::start_with(&rig.config, &[("NOTIFY_SOCKET", &place)]);
    assert_eq!(next(), "READY=1\n");
    agent.signal(Signal::HUP);
    assert!(next().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(next(), "READY=1\n");
    wait_for("it runs anew", || agent.log().contains("starting anew"));
    assert_eq!(next(), "READY=1\n");
    agent.terminate();
    assert_eq!(next(), "STOPPING=1\n");
}

#[test]
fn syslog_gets_every_line() {
    let mut rig = Rig::new(newest(), 1);
    let socket_path = rig.scratch.path().join("log-socket");
    let socket = UnixDatagram::bind(&socket_path).unwrap();
    fs::set_permissions(&socket_path, fs::Permissions::from_mode(0o777)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    rig.config["syslog"] = json!(true);
    rig.config["syslog_address"] = json!(socket_path);
    rig.config["syslog_facility"] = json!("local5");
    let agent = rig.agent();
    let mut message = [0; 4096];
    let mut lines = Vec::new();
    while !lines.iter().any(|line: &String| line.contains("streaming WAL")) {
        let length = socket.recv(&mut message).expect("the line that it streams");
        lines.push(String::from_utf8_lossy(&message[..length]).into_owned());
    }
    let process = agent.pid().unwrap();
    // local5.info
    assert!(lines.iter().all(|line| line.starts_with('<')), "{lines:?}");
    let line = lines.iter().find(|line| line.contains("pgkeep runs")).expect("the first line");
    assert!(
        line.starts_with("<174>") && line.contains(&format!(" pgkeep[{process}]: INFO pgkeep runs")),
        "{line}"
    );
}

#[test]
fn sighup_reads_the_new_file() {
    let mut rig = Rig::new(newest(), 1);
    rig.config["log_level"] = json!("WARNING");
    let agent = rig.agent();
    rig.wait_stored(&agent);
    assert!(!agent.get("/metrics").text().contains("pghoard_"));
    let mut config: Value = serde_json::from_slice(&fs::read(agent.config_file()).unwrap()).unwrap();
    config["prometheus"] = json!({ "tags": { "app": "shop" } });
    config["log_level"] = json!("DEBUG");
    config["http_prot"] = json!(1);
    fs::write(agent.config_file(), config.to_string()).unwrap();
    agent.signal(Signal::HUP);
    wait_for("PGHoard's names appear", || {
        crate::http::get(agent.address(), "/metrics").is_ok_and(|answer| answer.text().contains("pghoard_"))
    });
    wait_for("the new level counts, and what is odd is told", || {
        // Refused, which is a debug line.
        let _ = crate::http::get(agent.address(), "/nonsense");
        agent.log().contains("DEBUG") && agent.log().contains("http_prot: unknown key")
    });
    // Counters have gone on.
    let text = agent.get("/metrics").text();
    assert!(text.contains("pgkeep_config_reloads_total{app=\"shop\",result=\"ok\"} 1\n"), "{text}");
    rig.server.load(100);
    rig.wait_stored(&agent);

    fs::write(agent.config_file(), "{").unwrap();
    agent.signal(Signal::HUP);
    wait_for("a bad file is told", || agent.log().contains("the old one stays"));
    assert!(agent.get("/metrics").text().contains("pghoard_"));
}

/// As PGHoard's compressor leaves a file that is not uploaded yet: framed snappy, and indented metadata with
/// numbers in it.
fn compressed(directory: &Path, name: &str, content: &[u8]) {
    fs::create_dir_all(directory).unwrap();
    let mut encoder = snap::write::FrameEncoder::new(fs::File::create(directory.join(name)).unwrap());
    encoder.write_all(content).unwrap();
    encoder.into_inner().unwrap();
    let metadata = json!({
        "pg-version": newest() * 10_000, "compression-algorithm": "snappy", "compression-level": 0,
        "original-file-size": content.len(), "host": "db1",
    });
    fs::write(directory.join(format!("{name}.metadata")), serde_json::to_string_pretty(&metadata).unwrap())
        .unwrap();
}

#[test]
fn what_pghoard_left_behind_is_stored_and_removed() {
    let mut rig = Rig::new(newest(), 16);
    let state = rig.scratch.directory("state");
    rig.config["backup_location"] = json!(state);
    let (xlog, incoming) = (state.join("main/xlog"), state.join("main/xlog_incoming"));
    for directory in
        [&xlog, &incoming, &state.join("main/timeline"), &state.join("main/basebackup_incoming/x")]
    {
        fs::create_dir_all(directory).unwrap();
    }
    // Three segments: compressed, plain, both; then the one that is being written, padded as pg_receivewal does.
    let mut segments = Vec::new();
    for _ in 0..3 {
        rig.server.load(1_000);
        segments.push(rig.server.switch_segment());
    }
    rig.server.load(2_000);
    let open = rig.server.value("select pg_walfile_name(pg_current_wal_flush_lsn())");
    let committed = flush_lsn(&rig.server);
    let wal_directory = rig.server.wal_directory();
    let wal = |segment: &str| fs::read(wal_directory.join(segment)).unwrap();
    compressed(&xlog, &segments[0], &wal(&segments[0]));
    fs::write(incoming.join(&segments[1]), wal(&segments[1])).unwrap();
    compressed(&xlog, &segments[2], &wal(&segments[2]));
    fs::write(incoming.join(&segments[2]), wal(&segments[2])).unwrap();
    let mut partial = wal(&open);
    let within = usize::try_from(committed % (16 << 20)).unwrap();
    partial[within..].fill(0);
    fs::write(incoming.join(format!("{open}.partial")), &partial).unwrap();
    fs::write(xlog.join(format!("{}.tmp-compress", segments[1])), b"half").unwrap();
    // What is not right must not get into the archive, and must not be lost either.
    let broken = segments[0].replace("00000001", "0000000A");
    compressed(&xlog, &broken, &wal(&segments[0]));
    let cut = segments[1].replacen("00000001", "00000007", 1);
    compressed(&xlog, &cut, &wal(&segments[1]));
    let whole = fs::read(xlog.join(&cut)).unwrap();
    fs::write(xlog.join(&cut), &whole[..whole.len() / 2]).unwrap();
    process::give_tree(&state);

    // Nothing may come from the server: only what was left can be what is stored.
    rig.site()["active"] = json!(false);
    let agent = rig.agent();
    wait_for("it is done", || agent.log().contains("what PGHoard left is stored and removed"));
    for segment in &segments {
        let stored = agent.get(&format!("/main/archive/{segment}"));
        assert_eq!(stored.status, 200, "{segment}: {}\n{}", stored.text(), agent.log());
        assert!(stored.body == wal(segment), "{segment} differs");
    }
    let pieces = rig.archive().pieces();
    let (_, pieces) = pieces.iter().find(|(segment, _)| **segment == open).expect("the unfinished segment");
    let end = usize::try_from(pieces[0].1).unwrap();
    assert!(partial[end..].iter().all(|byte| *byte == 0) && end + 64 > within, "{end} of {within}");
    let mut left: Vec<String> = [&xlog, &incoming]
        .iter()
        .flat_map(|directory| fs::read_dir(directory).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let mut expected: Vec<String> =
        [&broken, &cut].iter().flat_map(|name| [(*name).clone(), format!("{name}.metadata")]).collect();
    expected.sort();
    assert_eq!(left, expected, "{}", agent.log());
    assert_eq!(rig.archive().segments().len(), 3);
    assert!(agent.log().contains("unfinished base backups"), "{}", agent.log());
    drop(agent);

    // With what was left stored, streaming goes on from there without a gap.
    rig.site()["active"] = json!(true);
    let agent = rig.agent();
    rig.server.load(1_000);
    rig.server.switch_segment();
    rig.server.load(10);
    wait_stored(&agent, flush_lsn(&rig.server));
    rig.verify(&agent);
    assert_eq!(archiving(&agent)["state"], "streaming");
}

#[test]
fn what_a_pghoard_daemon_left_behind_is_stored_and_removed() {
    if !pghoard_is_installed() {
        return;
    }
    let mut rig = Rig::new(newest(), 16);
    let receivewal = rig.server.tool("pg_receivewal").expect("the newest version has its tools");
    let keys = ["--site", "main", "--key-id", "k1"];
    let keys = binary::program(&pghoard_bin("pghoard_create_keys"), keys).run().success().json();
    let state = rig.scratch.directory("state");
    let mut theirs = json!({
        "backup_location": state,
        "json_state_file_path": rig.scratch.path().join("state.json"),
        "maintenance_mode_file": rig.scratch.path().join("maintenance"),
        "alert_file_dir": rig.scratch.directory("alerts"),
        "http_port": process::free_port(),
        "transfer": { "thread_count": 1 },
        "compression": { "algorithm": "snappy", "thread_count": 1 },
        "graceful_shutdown_compression_timeout": 2,
        "graceful_shutdown_upload_timeout": 2,
    });
    theirs["backup_sites"]["main"] = keys["backup_sites"]["main"].clone();
    let site = &mut theirs["backup_sites"]["main"];
    site["basebackup_interval_hours"] = Value::Null;
    site["nodes"] = json!([rig.server.superuser_conninfo()]);
    site["pg_data_directory"] = json!(rig.server.data_directory());
    site["pg_bin_directory"] = json!(receivewal.parent());
    // Nothing can be stored there, so it all stays on disk.
    site["object_storage"] = local_storage(Path::new("/proc/nowhere"));
    let file = config_file(&rig, &theirs);
    let mut daemon = binary::program(&pghoard_bin("pghoard"), ["--config", &file]).spawn();
    let folder = |name: &str| state.join("main").join(name);
    let files = |name: &str| -> Vec<String> {
        let entries = fs::read_dir(folder(name)).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    wait_for("PGHoard receives", || files("xlog_incoming").iter().any(|name| name.ends_with(".partial")));
    let mut segments = Vec::new();
    for _ in 0..2 {
        rig.server.load(1_000);
        segments.push(rig.server.switch_segment());
    }
    rig.server.load(1_000);
    wait_for("PGHoard compresses", || {
        segments.iter().all(|segment| folder("xlog").join(format!("{segment}.metadata")).exists())
    });
    wait_for("PGHoard receives the unfinished segment", || {
        let of_next =
            |name: &String| name.ends_with(".partial") && segments.iter().all(|done| !name.starts_with(done));
        let written = |name: String| {
            fs::read(folder("xlog_incoming").join(name)).is_ok_and(|wal| wal.iter().any(|&byte| byte != 0))
        };
        files("xlog_incoming").into_iter().filter(of_next).any(written)
    });
    process::signal(daemon.id(), Signal::TERM);
    process::wait(&mut daemon, Duration::from_mins(1)).expect("PGHoard stops");

    theirs["backup_sites"]["main"]["object_storage"] = local_storage(&rig.scratch.path().join("archive"));
    // Nothing may come from the server.
    theirs["backup_sites"]["main"]["active"] = json!(false);
    rig.config = theirs;
    let agent = rig.agent();
    wait_for("it is done", || agent.log().contains("what PGHoard left is stored and removed"));
    for segment in &segments {
        let there = fs::read(rig.server.wal_directory().join(segment)).unwrap();
        assert!(
            agent.get(&format!("/main/archive/{segment}")).body == there,
            "{segment} differs\n{}",
            agent.log()
        );
    }
    for name in ["xlog", "xlog_incoming", "timeline"] {
        assert_eq!(files(name), [""; 0], "{name}\n{}", agent.log());
    }
    assert!(!rig.archive().pieces().is_empty(), "the unfinished segment is kept, too");
}
