//! `pgkeep restore`, proven by starting PostgreSQL on what it wrote.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::process::{self, Scratch};
use crate::server::{Mode, Rows, Server, for_each_major, majors, query};
use crate::site::{Site, ballast};

/// The numbers in the table `steps`, as one word.
fn steps(server: &Server) -> String {
    server.value("select coalesce(string_agg(n::text, ' ' order by n), '') from steps")
}

fn step(server: &Server, n: u32) {
    server.sql(&format!("insert into steps values ({n})"));
}

/// Names that a careless program would stumble over.
fn odd_names() -> Vec<Vec<u8>> {
    vec![
        b"with  blanks 'and' \"quotes\" \\ $HOME %f".to_vec(),
        b"no utf-8 \xff\xfe\xe9".to_vec(),
        b"two\nlines".to_vec(),
        [b"long-".as_slice(), &[b'x'; 79]].concat(),
    ]
}

/// Everything a table holds, as one digest.
fn digest(conninfo: &str, table: &str) -> Rows {
    query(
        conninfo,
        &format!("select count(*), md5(string_agg(t::text, ',' order by t::text)) from {table} t"),
    )
    .unwrap_or_else(|error| panic!("{table}: {error:?}"))
}

fn in_database(server: &Server, database: &str) -> String {
    server.superuser_conninfo().replace("dbname=postgres", &format!("dbname={database}"))
}

#[test]
fn everything_comes_back_at_every_target() {
    for_each_major(everything_comes_back);
}

fn everything_comes_back(major: u32) {
    let in_place = major >= 15;
    let mut builder = Server::builder(major).segment_size_mib(1);
    if in_place {
        builder = builder.conf("allow_in_place_tablespaces = on");
    }
    let site = Site::of(builder.start());
    let server = &site.server;
    let far = site.scratch.directory("far away");
    server.sql(&format!("create tablespace far location '{}'", far.display()));
    server.sql("create database other");
    if in_place {
        server.sql("create tablespace near location ''");
    }
    let near = if in_place { "tablespace near" } else { "" };
    let other = in_database(server, "other");
    query(
        &other,
        "create table there as select g, repeat(md5(g::text), 9) t from generate_series(1, 3000) g",
    )
    .unwrap();
    server.sql(&format!(
        "create table steps (n int, at timestamptz default clock_timestamp());
         create table far_rows tablespace far as select g from generate_series(1, 5000) g;
         create table near_rows {near} as select g from generate_series(1, 500) g;
         create unlogged table fleeting as select g from generate_series(1, 100) g;"
    ));
    server.load(20_000);
    step(server, 1);
    let odd = server.data_directory().join("odd directory");
    fs::create_dir(&odd).unwrap();
    process::give(&odd);
    for name in odd_names() {
        fs::write(odd.join(OsStr::from_bytes(&name)), &name).unwrap();
    }
    process::give_tree(&odd);

    let agent = site.agent();
    server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "1");
    site.backup();

    step(server, 2);
    let xid = server.value("insert into steps values (3) returning pg_current_xact_id()");
    server.sql("insert into far_rows select g from generate_series(1, 5000) g; update near_rows set g = -g");
    step(server, 4);
    let time = server.value("select clock_timestamp()");
    std::thread::sleep(Duration::from_millis(20));
    step(server, 5);
    let lsn = server.value("select pg_current_wal_insert_lsn()");
    step(server, 6);
    server.sql("select pg_create_restore_point('it''s half way')");
    step(server, 7);
    server.load(5000);
    query(&other, "delete from there where g % 7 = 0; create index on there (g)").unwrap();
    Site::wait_archived(server);

    let tables = ["steps", "far_rows", "near_rows", "load"];
    let expected: Vec<Rows> =
        tables.iter().map(|table| digest(&server.superuser_conninfo(), table)).collect();
    let expected_there = digest(&other, "there");
    drop(agent);

    let remap = format!("{}={}", far.display(), site.directory("far 0").display());
    let restored = site.restore_and_start("latest", &["--tablespace", &remap]);
    for (table, expected) in tables.iter().zip(&expected) {
        assert_eq!(&digest(&restored.superuser_conninfo(), table), expected, "{table}");
    }
    assert_eq!(digest(&in_database(&restored, "other"), "there"), expected_there);
    assert_eq!(restored.value("select count(*) from fleeting"), "0");
    for name in odd_names() {
        let file = restored.data_directory().join("odd directory").join(OsStr::from_bytes(&name));
        assert_eq!(fs::read(file).unwrap(), name);
    }
    check_with_amcheck(&restored);
    assert_eq!(
        restored.value("select pg_tablespace_location(oid) from pg_tablespace where spcname = 'far'"),
        site.directory("far 0").display().to_string()
    );
    drop(restored);

    let oid = server.value("select oid from pg_tablespace where spcname = 'far'");
    let targets: [(&str, &[&str], &str); 5] = [
        ("time", &["--target-time", &time], "1 2 3 4"),
        ("lsn", &["--target-lsn", &lsn], "1 2 3 4 5"),
        ("name", &["--target-name", "it's half way"], "1 2 3 4 5 6"),
        ("xid", &["--target-xid", &xid], "1 2 3"),
        ("immediate", &["--target-immediate"], "1"),
    ];
    for (name, arguments, expected) in targets {
        let remap = format!("{oid}={}", site.directory(&format!("far {name}")).display());
        let restored = site.restore_and_start(name, &[arguments, &["--tablespace", &remap]].concat());
        assert_eq!(steps(&restored), expected, "PostgreSQL {major}, {name}");
        drop(restored);
        fs::remove_dir_all(site.directory(name)).unwrap();
    }
}

/// Heaps and indexes against each other, with the tool where it is there, else with the extension.
fn check_with_amcheck(server: &Server) {
    let has = "select count(*) from pg_available_extensions where name = 'amcheck'";
    if server.value(has) == "0" {
        eprintln!("PostgreSQL {}: no amcheck here", server.major());
        return;
    }
    if server.major() >= 14 && server.tool("pg_amcheck").is_some() {
        let output = server
            .tool_command("pg_amcheck")
            .args(["--all", "--install-missing", "--heapallindexed", "-U", "postgres", "-h"])
            .arg(server.socket_directory())
            .args(["-p", &server.port().to_string()])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "pg_amcheck: {said}");
        return;
    }
    server.sql(
        "create extension amcheck;
         select bt_index_check(i.indexrelid, true) from pg_index i join pg_class c on c.oid = i.indexrelid
         join pg_am a on a.oid = c.relam where a.amname = 'btree' and c.relpersistence = 'p'",
    );
}

/// The version for tests of what does not depend on it.
fn one_major() -> u32 {
    let majors = majors();
    if majors.contains(&17) { 17 } else { majors[0] }
}

/// A server with small segments and the table `steps`, holding 1.
fn small_site(major: u32) -> Site {
    let site = Site::of(Server::builder(major).segment_size_mib(1).start());
    site.server.sql("create table steps (n int, at timestamptz default clock_timestamp())");
    step(&site.server, 1);
    site
}

fn wait_streaming(server: &Server) {
    server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "1");
}

#[test]
fn a_standby_follows_its_primary() {
    for_each_major(|major| {
        let site = small_site(major);
        let agent = site.agent();
        wait_streaming(&site.server);
        site.backup();
        step(&site.server, 2);
        Site::wait_archived(&site.server);
        let primary = site.server.superuser_conninfo();
        let directory = site.restore("standby", &["--standby", "--primary-conninfo", &primary]);
        let standby = Server::on_restored(major, &directory);
        assert_eq!(standby.value("select pg_is_in_recovery()"), "t");
        standby.wait_until("select count(*) from pg_stat_wal_receiver where status = 'streaming'", "1");
        step(&site.server, 3);
        standby.wait_until("select count(*) from steps", "3");
        drop(agent);
    });
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_written() {
    let site = small_site(one_major());
    let target = site.directory("target");
    let refuse = |arguments: &[&str], code: i32, word: &str| {
        let output = site.try_restore("target", arguments).expect_code(code);
        assert!(output.stderr.contains(word), "{arguments:?}: no `{word}` in {}", output.stderr);
        assert!(!target.exists(), "{arguments:?} made the directory");
        // The plan comes to the same.
        site.try_restore("target", &[arguments, &["--dry-run"]].concat()).expect_code(code);
    };

    // An empty directory may be one whose file system is not mounted, where the backups are.
    refuse(&["--if-backup-exists"], 6, "not mounted");
    site.run(&["prune"]).success();
    refuse(&[], 3, "no backup");
    site.try_restore("target", &["--if-backup-exists"]).success();
    assert!(!target.exists());

    let far = site.scratch.directory("far");
    site.server.sql(&format!("create tablespace far location '{}'", far.display()));
    let before = site.server.value("select clock_timestamp()");
    site.backup();
    let elsewhere = format!("{}={}", far.display(), site.directory("new far").display());
    let elsewhere = ["--tablespace", elsewhere.as_str()];
    let beyond = "FF/0";
    refuse(&["--backup", "20010101T000000Z"], 3, "20010101T000000Z");
    refuse(&["--backup", "yesterday"], 2, "yesterday");
    refuse(&["--target-time", &before], 5, "outside");
    refuse(&["--target-time", "2999-01-01 00:00:00+00"], 5, "outside");
    refuse(&["--target-lsn", beyond], 5, "outside");
    refuse(&["--target-timeline", "7"], 5, "timeline 7");
    refuse(&["--target-time", "soon"], 2, "soon");
    refuse(&["--target-lsn", beyond, "--target-immediate"], 2, "cannot be used with");
    refuse(&[], 4, far.to_str().unwrap());
    refuse(&["--tablespace", "no mapping"], 2, "OLD=NEW");
    refuse(&["--tablespace", "/no/where=/tmp/x", elsewhere[0], elsewhere[1]], 2, "/no/where");
    refuse(&["--primary-conninfo", "host=x"], 2, "--standby");
    let inside = format!("{}={}", far.display(), target.join("inside").display());
    refuse(&["--tablespace", &inside], 2, "inside");

    // What the dry run promises.
    let plan =
        site.try_restore("target", &[&elsewhere[..], &["--dry-run", "--json"]].concat()).success().json();
    assert_eq!(plan["outcome"], "planned");
    let text = site.try_restore("target", &[&elsewhere[..], &["--dry-run"]].concat()).success().stdout;
    assert!(text.contains("restore_command") && text.contains("nothing was changed"), "{text}");
    assert!(!target.exists() && !site.directory("new far").exists());

    // A directory in use.
    site.scratch.directory("target");
    site.scratch.write("target/notes.txt", "mine");
    let other = site.try_restore("target", &elsewhere).expect_code(4);
    assert!(other.stderr.contains("not empty"), "{}", other.stderr);
    site.try_restore("target", &[&elsewhere[..], &["--if-empty"]].concat()).expect_code(4);
    fs::remove_file(target.join("notes.txt")).unwrap();
    site.restore("target", &elsewhere);
    site.try_restore("target", &elsewhere).expect_code(4);
    site.try_restore("target", &[&elsewhere[..], &["--if-empty"]].concat()).success();

    // Storage that is not there is not an empty one.
    fs::rename(site.archive(), site.directory("unplugged")).unwrap();
    for arguments in [&[][..], &["--if-backup-exists"]] {
        site.try_restore("another", arguments).expect_code(6);
        assert!(!site.directory("another").exists());
    }
}

#[test]
fn a_missing_segment_is_named() {
    let site = small_site(one_major());
    let agent = site.agent();
    wait_streaming(&site.server);
    let backup = site.backup();
    step(&site.server, 2);
    let time = site.server.value("select clock_timestamp()");
    std::thread::sleep(Duration::from_millis(20));
    let before = site.server.value("select pg_current_wal_insert_lsn()");
    site.server.load(10);
    site.server.switch_segment();
    site.server.load(10);
    let lost = site.server.switch_segment();
    site.server.load(10);
    Site::wait_archived(&site.server);
    drop(agent);
    let objects = site.objects(&format!("xlog/{lost}"));
    assert_eq!(objects.len(), 1, "{objects:?}");
    fs::remove_file(&objects[0]).unwrap();

    for target in [&[][..], &["--target-time", &time]] {
        let output = site.try_restore("target", target).expect_code(8);
        assert!(output.stderr.contains(&lost), "{}", output.stderr);
        assert!(!site.directory("target").exists());
    }
    let restored = site.restore_and_start("target", &["--target-lsn", &before]);
    assert_eq!(steps(&restored), "1 2");
    drop(restored);
    // The next backup makes the archive whole again; the time before it still cannot be had.
    let next = site.backup();
    assert_ne!(next, backup);
    assert_eq!(steps(&site.restore_and_start("again", &[])), "1 2");
}

#[test]
fn the_newest_backup_that_reaches_the_target_is_taken() {
    let site = small_site(one_major());
    let agent = site.agent();
    wait_streaming(&site.server);
    let first = site.backup();
    step(&site.server, 2);
    let between = site.server.value("select clock_timestamp()");
    let lsn = site.server.value("select pg_current_wal_insert_lsn()");
    std::thread::sleep(Duration::from_millis(20));
    step(&site.server, 3);
    std::thread::sleep(Duration::from_secs(1));
    let second = site.backup();
    step(&site.server, 4);
    let after = site.server.value("select clock_timestamp()");
    std::thread::sleep(Duration::from_millis(1200)); // until the store's clock shows it
    step(&site.server, 5);
    Site::wait_archived(&site.server);
    drop(agent);

    let cases: [(&[&str], &str, &str); 5] = [
        (&["--target-time", &between], &first, "1 2"),
        (&["--target-lsn", &lsn], &first, "1 2"),
        (&["--target-time", &after], &second, "1 2 3 4"),
        (&[], &second, "1 2 3 4 5"),
        (&["--backup", &first], &first, "1 2 3 4 5"),
    ];
    for (number, (target, backup, expected)) in cases.iter().enumerate() {
        let plan = site.try_restore("x", &[target, &["--dry-run", "--json"][..]].concat()).success().json();
        assert_eq!(plan["backup"], *backup, "{target:?}");
        let restored = site.restore_and_start(&format!("target {number}"), target);
        assert_eq!(steps(&restored), *expected, "{target:?}");
    }
}

/// Points the site at another server, as after a restore.
fn move_to(site: &mut Site, server: &Server) {
    site.set(
        "nodes",
        json!([{ "host": "127.0.0.1", "port": server.port(), "user": "backup", "password": "secret" }]),
    );
    site.set("pg_data_directory", json!(server.data_directory()));
}

#[test]
fn both_sides_of_a_fork_can_be_restored() {
    for_each_major(both_sides_of_a_fork);
}

fn both_sides_of_a_fork(major: u32) {
    let mut site = small_site(major);
    let mut agent = site.agent();
    wait_streaming(&site.server);
    site.backup();
    step(&site.server, 2);
    let before = site.server.value("select clock_timestamp()");
    std::thread::sleep(Duration::from_millis(20));
    step(&site.server, 3);
    Site::wait_archived(&site.server);
    agent.terminate();
    site.server.stop(Mode::Immediate);

    let restored = site.restore_and_start("restored", &[]);
    assert_eq!((steps(&restored).as_str(), restored.timeline()), ("1 2 3", 2));
    move_to(&mut site, &restored);
    let mut agent = site.agent();
    wait_streaming(&restored);
    step(&restored, 4);
    let after = restored.value("select clock_timestamp()");
    std::thread::sleep(Duration::from_millis(1200));
    step(&restored, 5);
    Site::wait_archived(&restored);

    let restore = |site: &Site, name: &str, arguments: &[&str], expected: &str| {
        let again = site.restore_and_start(name, arguments);
        assert_eq!(steps(&again), expected, "PostgreSQL {major}, {name}");
    };
    restore(&site, "before", &["--target-time", &before], "1 2");
    restore(&site, "after", &["--target-time", &after], "1 2 3 4");
    restore(&site, "latest", &[], "1 2 3 4 5");
    restore(&site, "old branch", &["--target-timeline", "current"], "1 2 3");
    restore(&site, "old branch by number", &["--target-timeline", "1"], "1 2 3");
    site.backup();
    step(&restored, 6);
    Site::wait_archived(&restored);
    restore(&site, "second backup", &[], "1 2 3 4 5 6");
    agent.terminate();

    // The history file decides the way: whatever is wrong with it, no wrong way is taken.
    let history = site.objects("00000002.history").remove(0);
    let segment = site.objects("xlog/0000000200").remove(0);
    let good = fs::read(&history).unwrap();
    for (what, bytes) in damaged(&good, &fs::read(&segment).unwrap()) {
        fs::write(&history, bytes).unwrap();
        let output = site.try_restore("damaged", &[]);
        assert_ne!(output.code, 0, "history {what}");
        assert!(
            output.stderr.contains("timeline 2") || output.stderr.contains("00000002.history"),
            "{what}: {}",
            output.stderr
        );
        assert!(!site.directory("damaged").exists());
    }
    fs::write(&history, good).unwrap();
}

/// What can become of an object: cut short, a bit flipped at the start, in the middle and at the end, emptied, exchanged.
fn damaged(good: &[u8], other: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let flip = |at: usize| {
        let mut bytes = good.to_vec();
        bytes[at] ^= 0x10;
        bytes
    };
    vec![
        ("cut short", good[..good.len() / 2].to_vec()),
        ("one byte short", good[..good.len() - 1].to_vec()),
        ("emptied", Vec::new()),
        ("flipped at 0", flip(0)),
        ("flipped in the middle", flip(good.len() / 2)),
        ("flipped at the end", flip(good.len() - 1)),
        ("swapped", other.to_vec()),
        ("prolonged", [good, other].concat()),
    ]
}

#[test]
fn damage_to_a_backup_is_found_and_named() {
    let site = small_site(one_major());
    site.server.load(1000);
    let first = site.backup();
    site.server.load(1000);
    std::thread::sleep(Duration::from_secs(1));
    let second = site.backup();
    let mut number = 0;
    for part in ["record", "files", "pack/000001"] {
        let object = |backup: &str| site.objects(&format!("backup/{backup}/{part}")).remove(0);
        let good = fs::read(object(&second)).unwrap();
        for (what, bytes) in damaged(&good, &fs::read(object(&first)).unwrap()) {
            if part.starts_with("pack") && what == "prolonged" {
                continue; // its frames are where they were
            }
            number += 1;
            fs::write(object(&second), bytes).unwrap();
            let target = format!("target {number}");
            let output = site.try_restore(&target, &["--backup", &second]);
            assert_eq!(output.code, 7, "{part} {what}: {}", output.stderr);
            assert!(output.stderr.contains(&second), "{part} {what}: {}", output.stderr);
            let directory = site.directory(&target);
            assert!(!directory.join("global/pg_control").exists(), "{part} {what}: PostgreSQL could start");
            let _ = fs::remove_dir_all(directory);
            if part == "record" {
                // Without a name, the one before is taken, and it is said.
                let plan = site.try_restore(&target, &["--dry-run", "--json"]).success();
                assert_eq!(plan.json()["backup"], *first);
                assert!(plan.stderr.contains(&second), "{}", plan.stderr);
                let list = site.run(&["list", "--json"]).success().json();
                assert_eq!(list["damaged"][0]["name"], *second);
                let prune = site.run(&["prune", "--json"]).success().json();
                assert_eq!(prune["removed"]["object_count"], 0, "{prune}");
            }
        }
        fs::remove_file(object(&second)).unwrap();
        let output = site.try_restore("gone", &["--backup", &second]);
        assert_eq!(output.code, if part == "record" { 3 } else { 7 }, "{part} gone: {}", output.stderr);
        let _ = fs::remove_dir_all(site.directory("gone"));
        let path = site.archive().join("x");
        fs::write(&path, &good).unwrap();
        process::give(&path);
        let place = site.objects(&format!("backup/{second}/")).remove(0);
        let root = place.ancestors().find(|path| path.ends_with(&second)).unwrap().to_owned();
        fs::rename(path, root.join(part)).unwrap();
    }
    site.restore("whole again", &["--backup", &second]);
}

#[test]
fn recovery_stops_at_damaged_wal_instead_of_ending_there() {
    let major = one_major();
    let mut site = small_site(major);
    let mut agent = site.agent();
    wait_streaming(&site.server);
    site.backup();
    let whole: Vec<String> = (0..3)
        .map(|n| {
            step(&site.server, 10 + n);
            site.server.switch_segment()
        })
        .collect();
    step(&site.server, 20);
    Site::wait_archived(&site.server);
    std::thread::sleep(Duration::from_millis(1500));
    step(&site.server, 21);
    Site::wait_archived(&site.server);
    agent.terminate();
    site.server.stop(Mode::Immediate);
    let template = site.restore("template", &[]);

    let segment = site.objects(&format!("xlog/{}", whole[1])).remove(0);
    let other_segment = site.objects(&format!("xlog/{}", whole[2])).remove(0);
    let pieces = site.objects("xlog_partial/");
    let piece = pieces[0].clone();
    let elsewhere = pieces.last().filter(|last| **last != piece).unwrap_or(&other_segment).clone();
    for (object, other) in [(segment, other_segment), (piece, elsewhere)] {
        let good = fs::read(&object).unwrap();
        for (what, bytes) in damaged(&good, &fs::read(&other).unwrap()) {
            fs::write(&object, bytes).unwrap();
            let scratch = Scratch::new();
            let directory = scratch.path().join("data");
            copy_tree(&template, &directory);
            process::give_tree(&directory);
            match Server::try_on_restored(major, &directory) {
                // `hot_standby` lets us in before recovery ends.
                Ok(server) => {
                    let ended = process::poll(Duration::from_secs(20), || {
                        match server.try_query("select pg_is_in_recovery()") {
                            Ok(rows) => (rows == [[Some("f".to_owned())]]).then_some(true),
                            Err(_) => Some(false),
                        }
                    });
                    let name = object.display();
                    assert_ne!(ended, Some(true), "{name} {what}: recovery ended\n{}", server.log());
                    assert!(says_what_is_damaged(&server.log()), "{name} {what}: {}", server.log());
                }
                Err(log) => assert!(says_what_is_damaged(&log), "{what}: {log}"),
            }
        }
        fs::write(&object, good).unwrap();
    }
    let restored = Server::on_restored(major, &template);
    restored.wait_recovered();
    assert_eq!(steps(&restored), "1 10 11 12 20 21");
}

fn says_what_is_damaged(log: &str) -> bool {
    log.contains("cannot fetch `0000000")
}

fn copy_tree(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

#[test]
fn garbage_in_the_bucket_disturbs_nobody() {
    let site = small_site(one_major());
    let backup = site.backup();
    let root = site.objects(&format!("{backup}/record")).remove(0);
    let root = root.ancestors().nth(3).unwrap().to_owned();
    let garbage = [
        "notes.txt",
        "backup/notes.txt",
        "backup/20990101T000000Z/notes.txt",
        "backup/latest/record",
        "xlog/notes.txt",
        "xlog/0000000100000000000000FF.tmp",
        "xlog/zzz/000000010000000000000001",
        "xlog_partial/000000010000000000000009/zzz",
        "xlog_partial/notes.txt",
        "timeline/notes.txt",
        "timeline/00000009.history.bak",
        "basebackup/other",
        "backup/20990101T000000Z/pack/zzz",
        "no utf-8 \u{fffd}/x",
    ];
    for name in garbage {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, []).unwrap();
    }
    fs::create_dir_all(root.join("backup/20980101T000000Z/pack")).unwrap();
    fs::create_dir_all(root.join("xlog/000000010000000000000044")).unwrap();
    process::give_tree(&root);
    assert_eq!(site.backups().len(), 1);
    site.run(&["status"]).success();
    site.run(&["prune"]).success();
    assert_eq!(steps(&site.restore_and_start("target", &[])), "1");
}

#[test]
fn a_restore_cut_short_cannot_be_started_and_is_replaced() {
    let major = one_major();
    let site = small_site(major);
    let far = site.scratch.directory("far");
    site.server.sql(&format!("create tablespace far location '{}'", far.display()));
    site.server.sql("create table far_rows tablespace far as select g from generate_series(1, 1000) g");
    site.server.sql("alter table steps set tablespace far");
    ballast(&site, "ballast", 120);
    site.backup();
    fs::remove_file(site.server.data_directory().join("ballast")).unwrap();
    let new = site.directory("new far");
    let mapping = format!("{}={}", far.display(), new.display());
    let target = site.directory("target");
    for signal in [Signal::KILL, Signal::TERM] {
        let mut child =
            site.command(&["restore", "--tablespace", &mapping, "--target-dir"]).arg(&target).spawn();
        process::poll(Duration::from_secs(30), || target.join("ballast").exists().then_some(()))
            .expect("it writes");
        process::signal(child.id(), signal);
        let code = process::wait(&mut child, Duration::from_secs(10)).expect("it ends");
        assert_ne!(code, 0);
        assert!(!target.join("global/pg_control").exists());
        let log = Server::try_on_restored(major, &target).err().expect("it does not start");
        assert!(!log.contains("ready to accept"), "{log}");
    }

    // Only what the restore itself has begun is replaced, and not what is mine.
    let mine = site.scratch.directory("mine");
    let precious = site.scratch.write("mine/precious", "data");
    let wrong = format!("{}={}", far.display(), mine.display());
    site.try_restore("target", &["--tablespace", &wrong]).expect_code(4);
    assert!(precious.exists(), "a restore has removed what is not its own");

    let restored = site.restore_and_start("target", &["--if-empty", "--tablespace", &mapping]);
    assert_eq!(steps(&restored), "1");
    assert!(!target.join(".pgkeep-restore").exists() && !new.join(".pgkeep-restore").exists());
}

#[test]
fn a_full_disk_is_said_and_a_second_try_with_room_works() {
    let site = small_site(one_major());
    ballast(&site, "ballast", 64);
    site.backup();
    let volume = site.scratch.directory("volume");
    let mount = |options: &str| {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&volume);
        mount.output().is_ok_and(|output| output.status.success())
    };
    if !mount("size=64m") {
        process::skipped("mounting a small file system takes root");
        return;
    }
    let _unmount = Unmount(volume.clone());
    process::give(&volume);
    let output = site.try_restore("volume", &[]).expect_code(1);
    assert!(
        output.stderr.contains("No space left") && output.stderr.contains("make room"),
        "{}",
        output.stderr
    );
    assert!(!volume.join("global/pg_control").exists());
    assert!(mount("remount,size=512m"));
    assert_eq!(steps(&site.restore_and_start("volume", &[])), "1");
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn the_restore_command_works_from_the_oddest_places() {
    let mut site = small_site(one_major());
    let odd = "it's \"my\" 100% $HOME dir; \\x";
    let place = site.scratch.directory(odd);
    let agent = site.agent();
    wait_streaming(&site.server);
    site.backup();
    step(&site.server, 2);
    Site::wait_archived(&site.server);
    let config = site.scratch.write(&format!("{odd}/config file.json"), site.configuration.to_string());
    let restore = |site: &Site, name: &str| {
        let target = place.join(name);
        crate::binary::pgkeep(["restore", "--config"])
            .arg(&config)
            .arg("--target-dir")
            .arg(&target)
            .run()
            .success();
        let restored = Server::on_restored(site.server.major(), &target);
        restored.wait_recovered();
        assert_eq!(steps(&restored), "1 2", "{name}");
    };
    // An agent runs, but elsewhere than the configuration says: storage answers.
    restore(&site, "no agent's data");
    // The agent answers.
    site.configuration["http_port"] = json!(agent.address().port());
    let config = site.scratch.write(&format!("{odd}/config file.json"), site.configuration.to_string());
    let target = place.join("the agent's data");
    crate::binary::pgkeep(["restore", "--config"])
        .arg(&config)
        .arg("--target-dir")
        .arg(&target)
        .run()
        .success();
    let restored = Server::on_restored(site.server.major(), &target);
    restored.wait_recovered();
    assert_eq!(steps(&restored), "1 2");
}
