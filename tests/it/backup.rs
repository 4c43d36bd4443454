//! `pgkeep backup`, `list` and `prune` against real servers.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::process::{self, Scratch};
use crate::s3::{S3, unique_prefix};
use crate::server::{Mode, Server, for_each_major, majors};
use crate::site::{Site, ballast, watch};

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

/// What a command may have resident; an unoptimised program takes more for itself.
const MEMORY_LIMIT: u64 = if cfg!(debug_assertions) { 96 << 20 } else { 64 << 20 };

fn one_major() -> u32 {
    let majors = majors();
    if majors.contains(&17) { 17 } else { majors[0] }
}

#[test]
fn a_standby_can_be_backed_up_alone() {
    for_each_major(|major| {
        let mut site = Site::start(major);
        site.server.load(1000);
        let standby = site.server.standby();
        if major < 15 {
            // A backup of a standby begins at its last restartpoint. Before 15 a physical connection cannot learn
            // where that is, so WAL is streamed from the present segment on and the restartpoint must lie there.
            site.server.sql("checkpoint");
            let lsn = site.server.value("select pg_current_wal_lsn()");
            standby.wait_until(&format!("select pg_last_wal_replay_lsn() >= '{lsn}'"), "t");
            standby.sql("checkpoint");
        }
        standby.wait_until("select count(*) from load", "1000");
        site.set(
            "nodes",
            json!([{ "host": "127.0.0.1", "port": standby.port(), "user": "backup", "password": "secret" }]),
        );
        site.backup();
        assert_eq!(site.backups()[0]["backup_from"], "standby");
        assert_eq!(standby.value("select count(*) from pg_replication_slots"), "0");
        let restored = site.restore_and_start("restored", &[]);
        assert_eq!(restored.value("select count(*) from load"), "1000");
        drop(standby);
    });
}

/// A site whose next backup takes many seconds, with the backup under way.
fn slow_backup() -> (Site, std::process::Child) {
    let mut site = Site::start(one_major());
    ballast(&site, "ballast", 100);
    site.set("backup_rate_limit", json!(8 << 20));
    let child = site.command(&["backup", "--fast"]).spawn();
    site.server.wait_until("select phase from pg_stat_progress_basebackup", "streaming database files");
    std::thread::sleep(Duration::from_secs(1));
    (site, child)
}

/// Makes everything stored look `hours` old.
fn age(site: &Site, hours: u64) {
    let then = std::time::SystemTime::now() - Duration::from_secs(hours * 3600);
    for object in site.objects("backup/") {
        fs::File::options().write(true).open(object).unwrap().set_modified(then).unwrap();
    }
}

#[test]
fn a_killed_backup_is_never_listed_and_swept_later() {
    let (mut site, mut child) = slow_backup();
    assert!(site.objects("/record").is_empty(), "the record goes last");
    process::signal(child.id(), Signal::KILL);
    process::wait(&mut child, Duration::from_secs(10)).unwrap();
    assert!(site.backups().is_empty());
    site.try_restore("target", &[]).expect_code(3);
    let left = site.objects("backup/").len();
    assert!(left > 0);
    // It could be running somewhere else.
    site.run(&["prune"]).success();
    assert_eq!(site.objects("backup/").len(), left);
    site.set("backup_rate_limit", Value::Null);
    let next = site.backup();
    age(&site, 2);
    let plan = site.run(&["prune", "--dry-run", "--json"]).success().json();
    assert_eq!(plan["unfinished"][0]["verdict"], "drop", "{plan}");
    site.run(&["prune"]).success();
    let objects = site.objects("backup/");
    assert!(objects.iter().all(|object| object.to_string_lossy().contains(&next)), "{objects:?}");
    site.restore_and_start("target", &[]);
}

#[test]
fn an_interrupted_backup_tidies_up() {
    let (site, mut child) = slow_backup();
    process::signal(child.id(), Signal::TERM);
    let code = process::wait(&mut child, Duration::from_secs(10)).expect("it ends within seconds");
    assert_ne!(code, 0);
    assert_eq!(site.objects("backup/"), Vec::<std::path::PathBuf>::new());
    site.server.wait_until("select count(*) from pg_replication_slots", "0");
}

#[test]
fn a_backup_whose_wal_is_cut_off_tidies_up() {
    let (site, mut child) = slow_backup();
    site.server.sql(
        "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name ~ '^pgkeep_backup_'",
    );
    let code = process::wait(&mut child, Duration::from_secs(10)).expect("it ends within seconds");
    assert_ne!(code, 0);
    assert_eq!(site.objects("backup/"), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_backup_touches_no_local_disk() {
    let mut site = Site::start(one_major());
    let trace = site.scratch.directory("elsewhere");
    site.set("backup_rate_limit", Value::Null);
    // With nowhere to write but the archive.
    let output = site.command(&["backup", "--fast"]).env("TMPDIR", "/nonexistent").current_dir(&trace).run();
    output.success();
    assert_eq!(fs::read_dir(trace).unwrap().count(), 0);
}

#[test]
fn checksum_failures_are_kept_and_marked() {
    for_each_major(|major| {
        let mut site = Site::start(major);
        site.server.load(5000);
        let clean = site.backup();
        let file = site.server.value("select pg_relation_filepath('load')");
        let path = site.server.data_directory().join(file);
        site.server.stop(Mode::Fast);
        let mut bytes = fs::read(&path).unwrap();
        bytes[8192 + 4000] ^= 0xFF;
        fs::write(&path, bytes).unwrap();
        site.server.start_again();
        std::thread::sleep(Duration::from_secs(1));
        let output = site.run(&["backup", "--fast"]).success();
        assert!(output.stderr.contains("checksum"), "{}", output.stderr);
        let suspect = output.stdout.trim();
        let list = site.backups();
        assert!(
            list[0]["checksum_failures"].is_null() && !list[1]["checksum_failures"].is_null(),
            "{list:?}"
        );
        let text = site.run(&["list"]).success().stdout;
        assert!(text.lines().any(|line| line.contains(suspect) && line.contains("CHECKSUM")), "{text}");
        // The clean one is preferred, the other one can be had.
        let plan = site.try_restore("x", &["--dry-run", "--json", "--target-immediate"]).success().json();
        assert_eq!(plan["backup"], *clean);
        let plan = site.try_restore("x", &["--dry-run", "--json", "--backup", suspect]).success();
        assert!(plan.json()["warnings"][0].as_str().unwrap().contains("checksum"));
        // Retention never leaves only the marked one.
        site.set("basebackup_count", json!(1));
        site.run(&["prune"]).success();
        assert_eq!(site.backups().len(), 2);
    });
}

#[test]
fn a_large_database_takes_little_memory_and_many_packs() {
    let site = Site::start(one_major());
    ballast(&site, "ballast", 220);
    let sparse = site.server.data_directory().join("sparse");
    let file = fs::File::create(&sparse).unwrap();
    file.set_len((11 << 30) / 10).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"the end", (11 << 30) / 10 - 7).unwrap();
    process::give(&sparse);
    let backup = watch(site.command(&["backup", "--fast"]), Duration::from_mins(4));
    assert_eq!(backup.code, 0);
    assert!(site.objects("/pack/").len() >= 4);
    let target = site.directory("target");
    let restore = watch(site.command(&["restore", "--target-dir"]).arg(&target), Duration::from_mins(4));
    assert_eq!(restore.code, 0);
    Server::verify_backup(site.server.major(), &target).unwrap();
    for (name, run) in [("backup", &backup), ("restore", &restore)] {
        eprintln!("{name} of 1.3 GiB: {:?}, at most {} MiB", run.elapsed, run.peak_memory >> 20);
        assert!(run.peak_memory < MEMORY_LIMIT, "{name} took {} bytes", run.peak_memory);
    }
}

#[test]
fn many_relations_take_little_memory() {
    let builder = Server::builder(one_major());
    let builder = builder.conf("max_locks_per_transaction = 20000").conf("full_page_writes = off");
    let site = Site::of(builder.conf("autovacuum = off").conf("max_wal_size = 4GB").start());
    site.server.sql(
        "do $$ begin for i in 1..20000 loop execute format('create table many.t%s ()', i); end loop; end $$"
            .replace("do $$", "create schema many; do $$")
            .as_str(),
    );
    let backup = watch(site.command(&["backup", "--fast"]), Duration::from_mins(4));
    assert_eq!(backup.code, 0);
    let target = site.directory("target");
    let restore = watch(site.command(&["restore", "--target-dir"]).arg(&target), Duration::from_mins(4));
    assert_eq!(restore.code, 0);
    for (name, run) in [("backup", &backup), ("restore", &restore)] {
        eprintln!("{name} of 20,000 relations: {:?}, at most {} MiB", run.elapsed, run.peak_memory >> 20);
        assert!(run.peak_memory < MEMORY_LIMIT, "{name} took {} bytes", run.peak_memory);
    }
    let restored = Server::on_restored(site.server.major(), &target);
    restored.wait_recovered();
    assert_eq!(restored.value("select count(*) from pg_class where relname ~ '^t[0-9]+$'"), "20000");
}

#[test]
fn what_pruning_keeps_can_still_be_restored() {
    let mut site = Site::of(Server::builder(one_major()).segment_size_mib(1).start());
    let agent = site.agent();
    site.server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "1");
    let mut names = Vec::new();
    for _ in 0..4 {
        site.server.load(2000);
        site.server.switch_segment();
        names.push(site.backup());
        std::thread::sleep(Duration::from_secs(1));
    }
    site.server.load(1);
    Site::wait_archived(&site.server);
    drop(agent);
    let before = site.objects("");

    site.set("basebackup_count", json!(2));
    let plan = site.run(&["prune", "--dry-run", "--json"]).success().json();
    assert_eq!(site.objects(""), before);
    let verdicts: Vec<&str> = plan["backups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|backup| backup["verdict"].as_str().unwrap())
        .collect();
    assert_eq!(verdicts, ["drop", "drop", "keep", "keep"], "{plan}");
    let done = site.run(&["prune", "--json"]).success().json();
    assert_eq!(done["removed"]["backup_count"], 2);
    assert!(done["removed"]["segment_count"].as_u64().unwrap() > 0, "{done}");
    let kept: Vec<String> =
        site.backups().iter().map(|backup| backup["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(kept, names[2..]);
    for gone in &names[..2] {
        assert_eq!(site.objects(gone), Vec::<std::path::PathBuf>::new(), "{done}");
        site.try_restore("gone", &["--backup", gone]).expect_code(3);
    }
    let first = plan["first_wal_segment_kept"].as_str().unwrap().to_owned();
    assert!(
        site.objects("xlog/")
            .iter()
            .all(|path| path.file_name().unwrap().to_str().unwrap() >= first.as_str())
    );
    for (number, name) in kept.iter().enumerate() {
        let rows = (2000 * (number + 3)).to_string();
        let target = format!("at {name}");
        let restored = site.restore_and_start(&target, &["--backup", name, "--target-immediate"]);
        assert_eq!(restored.value("select count(*) from load"), rows);
        let restored = site.restore_and_start(&format!("from {name}"), &["--backup", name]);
        assert_eq!(restored.value("select count(*) from load"), "8001");
    }

    // By age, but never below the minimum.
    site.set("basebackup_count", Value::Null);
    site.set("basebackup_interval_hours", json!(0.000_01));
    site.set("basebackup_age_days_max", json!(0.000_01));
    site.set("basebackup_count_min", json!(2));
    site.run(&["prune"]).success();
    assert_eq!(site.backups().len(), 2);
    site.set("basebackup_count_min", json!(1));
    site.run(&["prune"]).success();
    assert_eq!(site.backups().len(), 1);
    // Pruning again finds nothing to do.
    let again = site.run(&["prune", "--json"]).success().json();
    assert_eq!(again["removed"]["object_count"], 0, "{again}");
}

#[test]
fn s3_takes_and_gives_back_backups() {
    let Some(s3) = S3::from_environment() else { return };
    let server = Server::builder(one_major()).segment_size_mib(1).start();
    server.create_role("backup", "LOGIN REPLICATION", "secret");
    let storage = s3.object_storage(&unique_prefix("backup"));
    let site = Site::with_storage(server, Scratch::new(), &storage);
    site.server.load(2000);
    ballast(&site, "ballast", 80); // more than one pack, in several parts
    let mut agent = site.agent();
    site.server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "1");
    let name = site.backup();
    site.server.load(500);
    Site::wait_archived(&site.server);
    agent.terminate();
    assert_eq!(site.backups()[0]["name"], *name);
    let restored = site.restore_and_start("target", &[]);
    assert_eq!(restored.value("select count(*) from load"), "2500");
    site.run(&["prune"]).success();
}
