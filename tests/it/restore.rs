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
use crate::site::Site;

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
    query(conninfo, &format!("select count(*), md5(string_agg(t::text, ',' order by t::text)) from {table} t"))
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
    query(&other, "create table there as select g, repeat(md5(g::text), 9) t from generate_series(1, 3000) g")
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
