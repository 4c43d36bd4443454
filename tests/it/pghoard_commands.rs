//! PGHoard's programs under their own names, against our agent and against PGHoard's daemon.
#![expect(clippy::unwrap_used, reason = "the fixture is part of the tests")]

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::binary::{self, Agent, Output, Pgkeep, local_storage, pgkeep};
use crate::http;
use crate::pghoard_http::{pghoard_bin, pghoard_is_installed};
use crate::process::{self, Scratch, free_port};
use crate::server::{Mode, Server, majors};
use crate::site::Site;

const NAMES: [&str; 6] = [
    "pghoard",
    "pghoard_archive_cleanup",
    "pghoard_archive_sync",
    "pghoard_create_keys",
    "pghoard_postgres_command",
    "pghoard_restore",
];

/// A directory with the links.
struct Dress {
    scratch: Scratch,
    links: PathBuf,
}

impl Dress {
    fn new() -> Self {
        let scratch = Scratch::new();
        let links = scratch.directory("bin");
        pgkeep(["links"]).arg(&links).run().success();
        Self { scratch, links }
    }

    fn program(&self, name: &str, arguments: &[&str]) -> Pgkeep {
        binary::program(&self.links.join(name), arguments)
    }

    fn run(&self, name: &str, arguments: &[&str]) -> Output {
        self.program(name, arguments).run()
    }
}

fn major() -> u32 {
    *majors().last().unwrap()
}

/// A site that archives as PGHoard's manual has it: the literal line, found by its name alone.
fn archiving_site(dress: &Dress) -> (Site, Agent) {
    let builder = Server::builder(major()).conf("archive_mode = on").conf("archive_command = '/bin/false'");
    let mut site = Site::of(builder.start());
    site.set("active_backup_mode", json!("archive_command"));
    let agent = site.agent();
    let port = agent.address().port();
    let line = format!("pghoard_postgres_command --port {port} --mode archive --site main --xlog %f");
    site.server.sql(&format!("alter system set archive_command = '{line}'"));
    site.server.stop(Mode::Fast);
    site.server.set_programs(&dress.links);
    site.server.start_again();
    (site, agent)
}

fn wait_archived(server: &Server) -> String {
    let segment = server.switch_segment();
    server.wait_until(&format!("select last_archived_wal >= '{segment}' from pg_stat_archiver"), "t");
    segment
}

fn listed(agent: &Agent) -> Vec<Value> {
    let list: Value = serde_json::from_slice(&agent.get("/main/basebackup").body).unwrap();
    list["basebackups"].as_array().unwrap().clone()
}

/// Asks for a base backup as PGHoard's users do, and waits for it.
fn request_backup(agent: &Agent) -> Value {
    let before = listed(agent).len();
    assert_eq!(
        http::request(agent.address(), "PUT", "/main/archive/basebackup", &[], &[]).unwrap().status,
        201
    );
    let backup = process::poll(Duration::from_mins(2), || {
        let list = listed(agent);
        (list.len() > before).then(|| list.last().unwrap().clone())
    });
    backup.unwrap_or_else(|| panic!("no backup:\n{}", agent.log()))
}

#[test]
fn links_are_made_once_and_take_nothing_away() {
    let scratch = Scratch::new();
    let directory = scratch.directory("bin");
    let links = || pgkeep(["links"]).arg(&directory).run();
    links().success();
    links().success();
    for name in NAMES {
        assert_eq!(fs::read_link(directory.join(name)).unwrap(), binary::path(), "{name}");
    }
    fs::remove_file(directory.join("pghoard_restore")).unwrap();
    fs::remove_file(directory.join("pghoard")).unwrap();
    scratch.write("bin/pghoard_restore", "#!/usr/bin/python3\n");
    let refused = links().expect_code(1);
    assert!(
        refused.stderr.contains("pghoard_restore` is something else; nothing was changed"),
        "{}",
        refused.stderr
    );
    assert!(!directory.join("pghoard").exists());
    assert!(fs::read(directory.join("pghoard_restore")).unwrap().starts_with(b"#!"));
}

#[test]
fn help_version_and_wrong_usage_exit_as_they_should() {
    let dress = Dress::new();
    for name in NAMES {
        for flag in ["--help", "--version"] {
            let told = dress.run(name, &[flag]).success();
            assert!(told.stdout.contains(name), "{name} {flag}: {}", told.stdout);
        }
        let code = if name == "pghoard_postgres_command" { 255 } else { 2 };
        dress.run(name, &["--no-such-option"]).expect_code(code);
    }
    let restore = |arguments: &[&str]| dress.run("pghoard_restore", arguments);
    assert!(restore(&[]).expect_code(1).stdout.contains("get-basebackup"));
    restore(&["get-basebackup", "--config", "/x"]).expect_code(2);
    let archive = ["--mode", "archive", "--site", "main"];
    dress.run("pghoard_postgres_command", &archive).expect_code(2);
    let daemon = dress.run("pghoard", &["--config", "/nonexistent.json"]).expect_code(1);
    assert_eq!(daemon.stdout, "pghoard: '/nonexistent.json' doesn't exist\n");
    let daemon = dress.run("pghoard", &[]).expect_code(1);
    assert!(daemon.stdout.starts_with("pghoard: config file path must be given"), "{}", daemon.stdout);
    let broken = dress.scratch.write("broken.json", "{");
    let daemon = dress.program("pghoard", &[]).arg(&broken).run().expect_code(1);
    assert!(daemon.stdout.starts_with("pghoard: failed to load config "), "{}", daemon.stdout);
}

#[test]
fn the_hook_tells_missing_from_unknown() {
    let dress = Dress::new();
    let directory = dress.scratch.directory("data");
    let hook = |port: u16, arguments: &[&str]| {
        let port = port.to_string();
        let common = ["--port", &port, "--site", "main", "--retry-interval", "0.1"];
        dress.program("pghoard_postgres_command", &common).args(arguments).current_dir(&directory).run()
    };
    let restore = ["--mode", "restore", "--output", "x", "--xlog", "000000010000000000000003"];
    let nobody = hook(free_port(), &restore).expect_code(255);
    assert_eq!(nobody.stdout.matches("retries left").count(), 2, "{}", nobody.stdout);
    hook(free_port(), &["--mode", "archive", "--xlog", "000000010000000000000003"]).expect_code(2);
    let label = ["--mode", "archive", "--xlog", "000000010000000000000003.00000028.backup"];
    let ignored = hook(free_port(), &label).success();
    assert!(
        ignored.stdout.starts_with("Ignoring request to archive backup label '0000"),
        "{}",
        ignored.stdout
    );
    // Somebody else's 404 is nobody's word on the archive.
    for (head, code) in [
        ("404 Not Found\r\nServer: nginx", 255),
        ("404 Not Found\r\nServer: pghoard/2.7.0 Python/3.11.2", 4),
        ("401 Unauthorized\r\nServer: pghoard/2.7.0 Python/3.11.2", 255),
        ("201 Created\r\nServer: pghoard/2.7.0 Python/3.11.2", 255),
        ("500 Oops\r\nServer: pghoard/2.7.0 Python/3.11.2", 255),
    ] {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = format!("HTTP/1.0 {head}\r\nContent-Length: 0\r\n\r\n");
        std::thread::spawn(move || {
            use std::io::{Read, Write};
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        hook(port, &restore).expect_code(code);
    }
}

/// The life of an old deployment: `archive_command`, a requested backup, the init container's line, recovery by the
/// `restore_command` that it leaves behind; all with a password, and nothing but PGHoard's names.
#[test]
fn an_old_deployment_runs_unchanged() {
    let dress = Dress::new();
    let (mut site, agent) = archiving_site(&dress);
    site.server.sql("create table steps (n int); insert into steps values (1)");
    site.server.sql("alter system set work_mem = '7MB'");
    wait_archived(&site.server);
    let backup = request_backup(&agent);
    let name = backup["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("main/"), "{name}");
    site.server.sql("insert into steps values (2)");
    wait_archived(&site.server);

    let config = agent.config_file();
    let config = config.to_str().unwrap();
    let list = dress.run("pghoard_restore", &["list-basebackups", "--config", config]).success();
    let lines: Vec<&str> = list.stdout.lines().collect();
    assert_eq!(lines[0], "Available 'main' basebackups: ");
    assert!(lines[4].starts_with(&name) && lines[4].ends_with('Z'), "{}", list.stdout);
    let port = agent.address().port().to_string();
    let http = ["list-basebackups-http", "--port", &port, "--site", "main"];
    assert_eq!(dress.run("pghoard_restore", &http).success().stdout, list.stdout);

    // PGHoard's own program reads our list.
    if pghoard_is_installed() {
        let theirs = binary::program(&pghoard_bin("pghoard_restore"), http).run().success();
        assert!(theirs.stdout.contains(&name), "{}", theirs.stdout);
    }

    let data = site.server.data_directory().to_owned();
    site.server.stop(Mode::Immediate);
    fs::remove_dir_all(&data).unwrap();
    let target = data.to_str().unwrap();
    let status = dress.scratch.path().join("status.json");
    let restored = dress
        .program("pghoard_restore", &["--status-output-file", status.to_str().unwrap(), "get-basebackup"])
        .args(["--config", config, "--target-dir", target, "--restore-to-master"])
        .run()
        .success();
    assert!(restored.stdout.contains(&format!("\nSelecting '{name}' for restore")), "{}", restored.stdout);
    assert!(restored.stdout.contains("Basebackup restoration complete."), "{}", restored.stdout);
    let status: Value = serde_json::from_slice(&fs::read(status).unwrap()).unwrap();
    assert_eq!(status["progress_percent"], 1.0);
    let auto = fs::read_to_string(data.join("postgresql.auto.conf")).unwrap();
    let line = format!(
        "restore_command = 'pghoard_postgres_command --mode restore --port {port} --site main --output %p --xlog %f'"
    );
    assert!(auto.contains(&line) && auto.contains("work_mem = '7MB'"), "{auto}");
    assert!(data.join("recovery.signal").exists());
    site.server.start_again();
    site.server.wait_recovered();
    assert_eq!(site.server.value("select string_agg(n::text, ' ' order by n) from steps"), "1 2");
    assert_eq!(site.server.timeline(), 2);
    // After the promotion PostgreSQL archives the old timeline's last segment as `.partial`, and goes on.
    site.server.sql("insert into steps values (3)");
    let segment = wait_archived(&site.server);
    assert!(segment.starts_with("00000002"));
    assert_eq!(
        site.server.value("select count(*) from pg_ls_archive_statusdir() where name like '%.ready'"),
        "0"
    );
    let archived = |file: &str| agent.get(&format!("/main/archive/{file}")).status;
    assert_eq!(archived("00000002.history"), 200);

    // A restore that may not touch what is there, and one that may.
    let again = ["get-basebackup", "--config", config, "--target-dir", target];
    let refused = dress.run("pghoard_restore", &again).expect_code(1);
    assert!(
        refused.stdout.starts_with("FATAL: RestoreError: $PGDATA target directory"),
        "{}",
        refused.stdout
    );
    assert_eq!(site.server.value("select count(*) from steps"), "3");
    site.server.stop(Mode::Fast);
    let named = ["--overwrite", "--basebackup", &name, "--recovery-target-action", "promote"];
    dress.program("pghoard_restore", &again).args(named).run().success();
    assert!(data.join("standby.signal").exists(), "a standby unless told otherwise");
    site.server.start_again();
    assert_eq!(site.server.value("select pg_is_in_recovery()"), "t");
    site.server.wait_until("select max(n) from steps", "3");
}

#[test]
fn a_password_is_sent_and_a_named_backup_kept_to_with_a_time() {
    let dress = Dress::new();
    let mut site = Site::start(major());
    site.configuration["webserver_username"] = json!("hoarder");
    site.configuration["webserver_password"] = json!("it's 100% $ecret");
    let place = site.scratch.directory("far");
    site.server.sql(&format!("create tablespace far location '{}'", place.display()));
    site.server.sql("create table steps (n int); create table away tablespace far as select 1 as n");
    site.set("slot", json!("dress"));
    let mut agent = site.agent();
    let first = site.backup();
    site.server.sql("insert into steps values (1)");
    site.backup();
    site.server.sql("insert into steps values (2)");
    let time = site.server.value("select clock_timestamp()");
    std::thread::sleep(Duration::from_millis(1100));
    site.server.sql("insert into steps values (3)");
    site.server.switch_segment();
    Site::wait_archived(&site.server);

    let port = agent.address().port().to_string();
    let hook = |more: &[&str]| {
        let common =
            ["--port", &port, "--site", "main", "--mode", "restore", "--xlog", "000000010000000000000001"];
        dress.program("pghoard_postgres_command", &common).args(more).run().code
    };
    let credentials = ["--username", "hoarder", "--password", "it's 100% $ecret"];
    assert_eq!(hook(&[]), 255);
    assert_eq!(hook(&credentials), 0);
    let list = ["list-basebackups-http", "--port", &port, "--site", "main"];
    dress.run("pghoard_restore", &list).expect_code(1);
    let told = dress.program("pghoard_restore", &list).args(credentials).run().success();
    assert!(told.stdout.contains(&first), "{}", told.stdout);

    let config = agent.config_file();
    let get = ["get-basebackup", "--config", config.to_str().unwrap(), "--target-dir"];
    let target = site.directory("restored");
    let elsewhere = site.scratch.directory("elsewhere");
    let program = dress.links.join("pghoard_postgres_command");
    let arguments = |target: &Path| {
        let more =
            ["--basebackup", &format!("main/backup/{first}"), "--restore-to-primary"].map(str::to_owned);
        let target = target.to_str().unwrap().to_owned();
        let time = ["--recovery-target-time".to_owned(), time.clone()];
        let action =
            ["--recovery-target-action", "promote", "--pghoard-postgres-command-bin"].map(str::to_owned);
        let program = program.to_str().unwrap().to_owned();
        std::iter::once(target).chain(more).chain(time).chain(action).chain([program]).collect::<Vec<_>>()
    };
    // The tablespace's own directory is in use.
    let refused = dress.program("pghoard_restore", &get).args(arguments(&target)).run().expect_code(1);
    assert!(refused.stdout.contains("exists but is not empty, aborting."), "{}", refused.stdout);
    let map = |text: &str| ["--tablespace-dir".to_owned(), text.to_owned()];
    let wrong = map(&format!("nowhere={}", elsewhere.display()));
    dress.program("pghoard_restore", &get).args(arguments(&target)).args(wrong).run().expect_code(1);
    assert!(!target.exists(), "nothing is written before everything is known");
    let right = map(&format!("far={}", elsewhere.display()));
    dress.program("pghoard_restore", &get).args(arguments(&target)).args(right).run().success();

    // Where PGHoard's protocol writes, the agent must be told.
    agent.terminate();
    site.set("pg_data_directory", json!(target));
    let restoring = site.agent();
    let auto = fs::read_to_string(target.join("postgresql.auto.conf")).unwrap();
    let port_now = restoring.address().port().to_string();
    fs::write(
        target.join("postgresql.auto.conf"),
        auto.replace(&format!("--port {port}"), &format!("--port {port_now}")),
    )
    .unwrap();
    let restored = Server::on_restored(site.server.major(), &target);
    restored.wait_recovered();
    assert_eq!(restored.value("select string_agg(n::text, ' ' order by n) from steps"), "1 2");
    assert_eq!(restored.value("select n from away"), "1");
}

/// PGHoard's daemon on a site that archives through it.
struct Daemon {
    child: Child,
    address: SocketAddr,
    config: PathBuf,
    scratch: Scratch,
}

impl Daemon {
    fn start(server: &Server) -> Self {
        let scratch = Scratch::new();
        let port = free_port();
        let configuration = json!({
            "backup_location": scratch.directory("spool"),
            "http_port": port,
            "json_state_file_path": scratch.path().join("state.json"),
            "backup_sites": { "main": {
                "active_backup_mode": "archive_command",
                "basebackup_interval_hours": null,
                "nodes": [server.superuser_conninfo()],
                "pg_data_directory": server.data_directory(),
                "object_storage": local_storage(&scratch.directory("bucket")),
            } },
        });
        let config = scratch.write("pghoard.json", configuration.to_string());
        let path = process::cache().join(format!("postgres/{}/bin", server.major()));
        let child = binary::program(&pghoard_bin("pghoard"), ["--config", config.to_str().unwrap()])
            .env("PATH", format!("{}:/usr/bin:/bin", path.display()))
            .env("HOME", scratch.path())
            .current_dir(scratch.path())
            .spawn();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let answers = process::poll(Duration::from_mins(1), || http::get(address, "/main/status").ok());
        assert!(answers.is_some(), "PGHoard does not answer");
        Self { child, address, config, scratch }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Its workers end with it only when it ends in good order.
        process::signal(self.child.id(), Signal::INT);
        if process::wait(&mut self.child, Duration::from_secs(20)).is_none() {
            process::signal(self.child.id(), Signal::KILL);
            process::wait(&mut self.child, Duration::from_secs(5));
        }
    }
}

#[test]
fn our_programs_work_with_pghoards_daemon() {
    if !pghoard_is_installed() {
        return;
    }
    let dress = Dress::new();
    let server = Server::builder(major()).start();
    server.load(1000);
    let segment = server.switch_segment();
    let daemon = Daemon::start(&server);
    let port = daemon.address.port().to_string();
    let hook = |arguments: &[&str]| {
        let common = ["--port", &port, "--site", "main", "--retry-interval", "0.5"];
        let hook = dress.program("pghoard_postgres_command", &common).args(arguments);
        hook.current_dir(server.data_directory()).run()
    };
    hook(&["--mode", "archive", "--xlog", &segment]).success();
    hook(&["--mode", "archive", "--xlog", "0000000100000000000000FE"]).expect_code(3);
    assert!(daemon.scratch.path().join("bucket/main/xlog").join(&segment).exists());
    let restore = ["--mode", "restore", "--output", "pg_wal/RECOVERYXLOG", "--xlog"];
    hook(&[&restore[..], &[segment.as_str()]].concat()).success();
    let (written, given) =
        (server.wal_directory().join("RECOVERYXLOG"), server.wal_directory().join(&segment));
    assert!(fs::read(written).unwrap() == fs::read(given).unwrap());
    hook(&[&restore[..], &["0000000100000000000000FE"]].concat()).expect_code(4);
    hook(&["--mode", "restore", "--xlog", &segment]).success();
    // A mistyped site is no end of WAL.
    let common =
        ["--port", &port, "--site", "mian", "--output", "x", "--mode", "restore", "--xlog", &segment];
    dress.run("pghoard_postgres_command", &common).expect_code(255);
    let list = ["list-basebackups-http", "--port", &port, "--site", "main"];
    let told = dress.run("pghoard_restore", &list).success();
    let theirs = binary::program(&pghoard_bin("pghoard_restore"), list).run().success();
    assert_eq!(told.stdout, theirs.stdout);
    // Our archive_sync speaks with it as well: no base backup, so nothing can be verified.
    let config = daemon.config.to_str().unwrap();
    let synced = dress.run("pghoard_archive_sync", &["--config", config]).expect_code(1);
    assert!(synced.stdout.contains("FATAL: SyncError: No basebackups found"), "{}", synced.stdout);
}

#[test]
fn archive_sync_finds_what_a_failover_left_behind() {
    let dress = Dress::new();
    let (site, agent) = archiving_site(&dress);
    wait_archived(&site.server);
    request_backup(&agent);
    let config = agent.config_file();
    let config = config.to_str().unwrap();
    let sync = |more: &[&str]| dress.program("pghoard_archive_sync", &["--config", config]).args(more).run();
    let mut segments = Vec::new();
    for _ in 0..3 {
        site.server.load(100);
        segments.push(wait_archived(&site.server));
    }
    let told = sync(&[]).success();
    assert!(told.stderr.contains("Found all required WAL files"), "{}", told.stderr);
    let object = site.archive().join("main/xlog").join(&segments[1]);
    fs::remove_file(&object).unwrap();
    fs::remove_file(format!("{}.metadata", object.display())).ok();
    let told = sync(&[]).success();
    assert!(
        told.stderr.contains(&format!("WAL file '{}' needs to be archived", segments[1])),
        "{}",
        told.stderr
    );
    assert!(object.exists());

    // Gone here and there.
    fs::remove_file(&object).unwrap();
    fs::remove_file(format!("{}.metadata", object.display())).ok();
    fs::remove_file(site.server.wal_directory().join(&segments[1])).unwrap();
    let told = sync(&[]).expect_code(1);
    let text = format!("xlog file {} missing, integrity check from ", segments[1]);
    assert!(told.stdout.contains("FATAL: SyncError: ") && told.stdout.contains(&text), "{}", told.stdout);
    sync(&["--no-verify"]).success();
    let before = listed(&agent).len();
    sync(&["--create-new-backup-on-failure"]).success();
    let taken = process::poll(Duration::from_mins(2), || (listed(&agent).len() > before).then_some(()));
    assert!(taken.is_some(), "{}", agent.log());
    sync(&[]).success();

    // PGHoard's own program, with our agent.
    if pghoard_is_installed() {
        let theirs = binary::program(&pghoard_bin("pghoard_archive_sync"), ["--config", config]);
        let theirs = theirs.env("HOME", dress.scratch.path()).run().success();
        assert!(theirs.stderr.contains("Found all required WAL files"), "{}", theirs.stderr);
    }
}

#[test]
fn archive_cleanup_takes_what_no_backup_needs() {
    let dress = Dress::new();
    let (site, agent) = archiving_site(&dress);
    let config = agent.config_file();
    let clean = |more: &[&str]| {
        dress.program("pghoard_archive_cleanup", &["--config", config.to_str().unwrap()]).args(more).run()
    };
    let early = wait_archived(&site.server);
    clean(&[]).expect_code(1);
    let stored =
        [early.clone(), format!("{early}.metadata")].map(|name| site.archive().join("main/xlog").join(name));
    let kept = stored.clone().map(|path| fs::read(path).ok());
    site.server.load(100);
    wait_archived(&site.server);
    let backup = request_backup(&agent);
    let first = backup["metadata"]["start-wal-segment"].as_str().unwrap().to_owned();
    // The agent has pruned after the backup; PGHoard leaves such orphans behind a gap.
    process::poll(Duration::from_secs(30), || agent.log().contains("pruned").then_some(())).unwrap();
    for (path, content) in stored.iter().zip(kept) {
        if let Some(content) = content {
            fs::write(path, content).unwrap();
            process::give(path);
        }
    }
    let segments = || -> Vec<String> {
        let objects = site.objects("/xlog/");
        objects.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let before = segments();
    assert!(before.contains(&early) && before.contains(&first), "{before:?}");
    let told = clean(&["--dry-run"]).success();
    assert!(
        told.stderr.contains(&format!("Orphan WAL segment '{early}' needs to be deleted")),
        "{}",
        told.stderr
    );
    assert_eq!(segments(), before);
    clean(&[]).success();
    let after = segments();
    assert!(after.iter().all(|segment| *segment >= first) && after.contains(&first), "{after:?}");
    let told = clean(&[]).success();
    assert!(told.stderr.contains("Total orphan WAL segments size is 0 bytes"), "{}", told.stderr);
    site.restore_and_start("restored", &[]);
}

#[test]
fn keys_are_made_as_pghoard_makes_them() {
    let dress = Dress::new();
    let printed =
        dress.run("pghoard_create_keys", &["--site", "main", "--key-id", "k1", "--bits", "2048"]).success();
    let site = &printed.json()["backup_sites"]["main"];
    assert_eq!(site["encryption_key_id"], "k1");
    assert!(
        site["encryption_keys"]["k1"]["public"].as_str().unwrap().starts_with("-----BEGIN PUBLIC KEY-----\n")
    );
    dress.run("pghoard_create_keys", &["--key-id", "k1"]).expect_code(1);
    let storage = local_storage(&dress.scratch.directory("bucket"));
    let config =
        json!({ "backup_sites": { "main": { "pg_data_directory": "/x", "object_storage": storage } } });
    let path = dress.scratch.write("pghoard.json", config.to_string());
    let path = path.to_str().unwrap();
    let arguments = ["--key-id", "k2", "--bits", "2048", "--config", path];
    let saved = dress.run("pghoard_create_keys", &arguments).success();
    assert!(
        saved.stdout.starts_with(&format!("Saved new key_id 'k2' for site 'main' in '{path}'\nNOTE: ")),
        "{}",
        saved.stdout
    );
    let again = dress.run("pghoard_create_keys", &arguments).expect_code(1);
    assert!(again.stdout.contains("key_id 'k2' already defined for site 'main'"), "{}", again.stdout);
    let written: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(written["backup_sites"]["main"]["pg_data_directory"], "/x");
    // PGHoard's library takes them.
    let check = "import json, sys\nfrom rohmu.encryptor import Encryptor, Decryptor\n\
        k = json.load(open(sys.argv[1]))['backup_sites']['main']['encryption_keys']['k2']\n\
        e = Encryptor(k['public']); data = e.update(b'secret') + e.finalize()\n\
        d = Decryptor(k['private']); off = 0\n\
        from rohmu.encryptor import DecryptorFile\nimport io\n\
        assert DecryptorFile(io.BytesIO(data), k['private']).read() == b'secret'";
    binary::program(&pghoard_bin("python3"), ["-c", check, path]).run().success();
}

/// A bucket that PGHoard filled, with tablespaces, encrypted: listed as PGHoard lists it, restored by its own options.
#[test]
fn pghoards_bucket_is_listed_and_restored_by_its_own_options() {
    let dress = Dress::new();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pghoard/tablespaces.tar.zst");
    let unpack = "zstd -dqc --long=26 \"$0\" | tar -x -C \"$1\"";
    let mut tar = std::process::Command::new("bash");
    let unpacked = tar.args(["-o", "pipefail", "-c", unpack]).arg(&file).arg(dress.scratch.path()).status();
    assert!(unpacked.unwrap().success());
    process::give_tree(dress.scratch.path());
    let facts: Value =
        serde_json::from_slice(&fs::read(dress.scratch.path().join("facts.json")).unwrap()).unwrap();
    let site = facts["sites"].as_object().unwrap().keys().next().unwrap().clone();
    let target = dress.scratch.path().join("restored");
    let configuration = json!({
        "http_port": free_port(),
        "json_state_file_path": dress.scratch.path().join("state.json"),
        "backup_sites": { &site: {
            "active": false,
            "nodes": ["host=nowhere"],
            "pg_data_directory": target,
            "encryption_keys": facts["keys"],
            "object_storage": local_storage(&dress.scratch.path().join("bucket")),
        } },
    });
    let agent = Agent::start(&configuration);
    let config = agent.config_file();
    let config = config.to_str().unwrap();
    let list = ["list-basebackups", "--config", config, "--site", &site];
    let ours = dress.run("pghoard_restore", &list).success();
    if pghoard_is_installed() {
        let theirs = binary::program(&pghoard_bin("pghoard_restore"), list).run().success();
        assert_eq!(ours.stdout, theirs.stdout);
        let port = agent.address().port().to_string();
        let over_http = ["list-basebackups-http", "--port", &port, "--site", &site];
        let over_http = binary::program(&pghoard_bin("pghoard_restore"), over_http).run().success();
        assert_eq!(over_http.stdout, theirs.stdout);
    }

    let mut get: Vec<String> = ["get-basebackup", "--config", config, "--site", &site, "--restore-to-master"]
        .map(str::to_owned)
        .to_vec();
    let bin = dress.links.join("pghoard_postgres_command");
    get.extend(["--pghoard-postgres-command-bin".to_owned(), bin.to_str().unwrap().to_owned()]);
    get.extend(["--target-dir".to_owned(), target.to_str().unwrap().to_owned()]);
    get.extend(["--preserve-until".to_owned(), "2099-01-01T00:00:00".to_owned()]);
    let tablespaces: Vec<String> = facts["tablespaces"].as_object().unwrap().keys().cloned().collect();
    for (number, name) in tablespaces.iter().enumerate() {
        let place = dress.scratch.directory(&format!("place-{number}"));
        get.extend(["--tablespace-dir".to_owned(), format!("{name}={}", place.display())]);
    }
    let get: Vec<&str> = get.iter().map(String::as_str).collect();
    dress.run("pghoard_restore", &[&get[..], &["--no-cancel-preserve-on-success"]].concat()).success();
    // Kept until then, as PGHoard reads it.
    let requests = dress.scratch.path().join("bucket").join(&site).join("preservation_request");
    let kept: Vec<String> = fs::read_dir(&requests)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(kept.iter().any(|name| name.ends_with("_2099-01-01 00:00:00+00:00")), "{kept:?}");
    let metadata = kept.iter().find(|name| name.ends_with(".metadata")).expect("metadata beside it");
    let metadata: Value = serde_json::from_slice(&fs::read(requests.join(metadata)).unwrap()).unwrap();
    assert_eq!(metadata["preserve-until"], "2099-01-01 00:00:00+00:00");

    let restored = Server::on_restored(u32::try_from(facts["major"].as_u64().unwrap()).unwrap(), &target);
    restored.wait_recovered();
    assert_eq!(restored.value("select max(stage) from marks"), "6");
    for tablespace in &tablespaces {
        assert_eq!(restored.value(&format!("select sum(i) from \"in_{tablespace}\"")), "500500");
    }
}
