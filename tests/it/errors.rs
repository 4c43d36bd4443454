//! What a person sees when something is wrong: one line with what failed, where and why; a hint with the next
//! step; the right exit status; never a secret; nothing lost.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::binary::{Agent, Output, configuration, local_storage, pgkeep};
use crate::http;
use crate::process::{self, Scratch};
use crate::s3::{S3, unique_prefix};
use crate::server::{Server, TLS_MAJORS, for_each_major, majors};

/// Appears in no message for any other reason.
const PASSWORD: &str = "hunter2-Pq7";

/// A storage directory, and configuration files beside it.
struct Desk(Scratch);

impl Desk {
    fn new() -> Self {
        Self(Scratch::new())
    }

    fn storage(&self) -> PathBuf {
        self.0.directory("storage")
    }

    fn local(&self) -> Value {
        local_storage(&self.storage())
    }

    fn node(&self, node: &Value) -> Value {
        json!({ "backup_sites": { "main": { "nodes": [node], "object_storage": self.local() } } })
    }

    fn run(&self, configuration: &Value, arguments: &[&str]) -> Output {
        let mut configuration = configuration.clone();
        // Whoever listens on 16000 here is none of ours.
        configuration["http_port"] = json!(process::free_port());
        let file = self.0.write("config.json", configuration.to_string());
        pgkeep(["--config"]).arg(file).args(arguments).run()
    }

    fn backup(&self, configuration: &Value) -> Output {
        self.run(configuration, &["backup", "--fast"])
    }
}

/// The error line without its `error: `, and the hints.
fn told(output: &Output) -> (String, Vec<String>) {
    assert!(!output.stderr.contains(PASSWORD) && !output.stdout.contains(PASSWORD), "{output:?}");
    let of = |prefix: &str| -> Vec<String> {
        output.stderr.lines().filter_map(|line| line.strip_prefix(prefix)).map(str::to_owned).collect()
    };
    let errors = of("error: ");
    assert_eq!(errors.len(), 1, "one line says what is wrong: {output:?}");
    assert!(!errors[0].ends_with('.') && !output.stderr.contains("panicked"), "{output:?}");
    (errors[0].clone(), of("hint: "))
}

/// Fails unless the command ended with `code`, an error that has all of `error`, and a hint with `hint`.
#[track_caller]
fn expect(output: &Output, code: i32, error: &[&str], hint: &str) {
    assert_eq!(output.code, code, "{output:?}");
    let (line, hints) = told(output);
    for part in error {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    assert!(hints.iter().any(|each| each.contains(hint)), "`{hint}` is not in {hints:?}");
}

fn node(server: &Server, user: &str, password: &str) -> Value {
    json!({ "host": "127.0.0.1", "port": server.port(), "user": user, "password": password })
}

/// All files below `directory` with their sizes.
fn inventory(directory: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                found.push((entry.path(), entry.metadata().unwrap().len()));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn what_the_server_refuses_is_told_with_the_step_that_mends_it() {
    for_each_major(|major| {
        let server = Server::builder(major).segment_size_mib(1).hba("host all all 127.0.0.1/32 md5").start();
        server.create_role("keeper", "login", PASSWORD);
        let place = server.host_port();
        let desk = Desk::new();
        let keeper = desk.node(&node(&server, "keeper", PASSWORD));

        // No line for replication: adding exactly the line of the hint lets the role knock…
        let output = desk.backup(&keeper);
        expect(&output, 1, &["pg_hba.conf", "`keeper`", &place], "add to the server's `pg_hba.conf`");
        let (_, hints) = told(&output);
        let line = hints[0].split_once("reload it: ").expect("the line stands at the end").1.to_owned();
        assert_eq!(line, "host replication keeper 127.0.0.1/32 scram-sha-256");
        server.set_hba(&[&line]);
        // …but without the right to replicate it comes no further; the hint is the statement to run…
        let output = process::poll(Duration::from_secs(20), || {
            Some(desk.backup(&keeper)).filter(|output| !output.stderr.contains("no `pg_hba.conf` line"))
        })
        .expect("the reloaded line counts");
        expect(&output, 1, &["`keeper`", &place, "REPLICATION"], "ALTER ROLE keeper REPLICATION");
        let (_, hints) = told(&output);
        server.sql(&hints[0]);
        // …and with both it works.
        desk.backup(&keeper).success();

        let before = inventory(&desk.storage());
        let output = desk.backup(&desk.node(&node(&server, "keeper", "wrong-Pq7")));
        expect(&output, 1, &["refuses the password of user `keeper`", &place], "PGPASSWORD");
        assert!(!output.stderr.contains("wrong-Pq7"), "{output:?}");
        let output =
            desk.backup(&desk.node(&json!({ "host": "127.0.0.1", "port": server.port(), "user": "keeper" })));
        expect(&output, 1, &["`keeper`", &place, "password"], "PGPASSWORD");
        assert_eq!(inventory(&desk.storage()), before);
    });
}

/// A server that lets everybody in and says it is of `version`.
fn server_of_version(version: &'static str) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            let mut length = [0; 4];
            while stream.read_exact(&mut length).is_ok() {
                let mut packet = vec![0; u32::from_be_bytes(length) as usize - 4];
                stream.read_exact(&mut packet).expect("a whole packet");
                if packet == 80_877_103_u32.to_be_bytes() || packet == 80_877_104_u32.to_be_bytes() {
                    stream.write_all(b"N").expect("refuse encryption");
                    continue;
                }
                let mut answer = b"R\0\0\0\x08\0\0\0\0".to_vec();
                let parameter = format!("server_version\0{version}\0");
                answer.push(b'S');
                answer.extend(u32::try_from(parameter.len() + 4).unwrap().to_be_bytes());
                answer.extend(parameter.as_bytes());
                answer.extend(b"Z\0\0\0\x05I");
                stream.write_all(&answer).expect("let it in");
                // Whatever it asks next, it gets no answer; it must not need one to see the version.
                let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
                let _ = stream.read_to_end(&mut Vec::new());
                break;
            }
        }
    });
    port
}

#[test]
fn a_server_that_is_too_old_is_refused_with_its_version() {
    for version in ["9.6.24", "12.22"] {
        let port = server_of_version(version);
        let desk = Desk::new();
        let output = desk.backup(&desk.node(&json!({ "host": "127.0.0.1", "port": port, "user": "backup" })));
        assert_eq!(output.code, 1, "{output:?}");
        let (line, _) = told(&output);
        let expected =
            format!("PostgreSQL {version} at `127.0.0.1:{port}` is too old; pgkeep needs 13 or later");
        assert_eq!(line, expected);
    }
}

#[test]
fn a_server_that_cannot_be_reached_is_named_with_the_reason() {
    let desk = Desk::new();
    let port = process::free_port();
    let output = desk.backup(&desk.node(&json!({ "host": "127.0.0.1", "port": port, "password": PASSWORD })));
    expect(&output, 1, &[&format!("`127.0.0.1:{port}`"), "Connection refused"], "is PostgreSQL running");
    let output = desk.backup(&desk.node(&json!({ "host": "/nowhere", "port": 5432 })));
    expect(&output, 1, &["`/nowhere/.s.PGSQL.5432`", "No such file"], "unix_socket_directories");
    let output = desk.backup(&desk.node(&json!({ "host": "db.invalid", "port": 5432 })));
    expect(&output, 1, &["`db.invalid:5432`"], "check `host`");
}

#[test]
fn tls_that_is_missing_or_not_trusted_is_told() {
    let desk = Desk::new();
    let majors = majors();
    let server = Server::start(majors[0]);
    server.create_role("backup", "login replication", PASSWORD);
    let mut plain = node(&server, "backup", PASSWORD);
    plain["sslmode"] = json!("require");
    let output = desk.backup(&desk.node(&plain));
    expect(&output, 1, &["does not offer TLS", "`sslmode=require`", &server.host_port()], "ssl = on");

    let Some(major) = majors.into_iter().find(|major| TLS_MAJORS.contains(major)) else { return };
    let (server, other) =
        (Server::builder(major).ssl(true).start(), Server::builder(major).ssl(true).start());
    server.create_role("backup", "login replication", PASSWORD);
    let mut encrypted = node(&server, "backup", PASSWORD);
    encrypted["sslmode"] = json!("verify-full");
    encrypted["sslrootcert"] = json!(other.ca_file());
    let output = desk.backup(&desk.node(&encrypted));
    expect(&output, 1, &["TLS", &server.host_port(), "`sslmode=verify-full`", "ertificate"], "sslrootcert");
    encrypted["sslrootcert"] = json!("/nowhere/ca.crt");
    let output = desk.backup(&desk.node(&encrypted));
    expect(&output, 1, &["/nowhere/ca.crt"], "sslrootcert");
    encrypted["sslrootcert"] = json!(server.ca_file());
    desk.backup(&desk.node(&encrypted)).success();
}

#[test]
fn a_site_takes_no_wal_and_no_backup_of_another_cluster() {
    let major = majors()[0];
    let (server, other) = (Server::start(major), Server::start(major));
    for each in [&server, &other] {
        each.create_role("backup", "login replication", PASSWORD);
    }
    let desk = Desk::new();
    desk.backup(&desk.node(&node(&server, "backup", PASSWORD))).success();
    let before = inventory(&desk.storage());
    let wrong = desk.node(&node(&other, "backup", PASSWORD));
    let identifier = |of: &Server| of.value("select system_identifier from pg_control_system()");
    let (mine, foreign) = (identifier(&server), identifier(&other));
    expect(&desk.backup(&wrong), 1, &[&mine, &foreign], "another site name or prefix");

    let agent = Agent::start(&wrong);
    let error = process::poll(Duration::from_secs(20), || {
        Some(agent.status()["sites"]["main"]["archiving"]["last_error"].clone()).filter(Value::is_object)
    })
    .expect("the agent tells it in /status");
    assert!(error["message"].as_str().unwrap().contains(&foreign), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("another site name or prefix"), "{error}");
    assert!(agent.log().contains("ERROR archiving stopped"), "{}", agent.log());
    assert_eq!(inventory(&desk.storage()), before);
}

#[test]
fn a_storage_directory_that_cannot_be_used_is_told_by_its_reason() {
    let desk = Desk::new();
    let at = |directory: &Path| {
        json!({ "backup_sites": { "main": {
            "nodes": ["host=/nowhere"], "object_storage": local_storage(directory) } } })
    };
    let missing = desk.0.path().join("missing");
    let empty = desk.0.directory("empty");
    for command in ["list", "status", "prune"] {
        let arguments: &[&str] = if command == "prune" { &["prune", "--dry-run"] } else { &[command] };
        let output = desk.run(&at(&missing), arguments);
        let url = format!("`file://{}`", missing.display());
        expect(&output, 6, &[&url, "no such directory"], "mounted");
        assert!(!missing.exists(), "reading creates nothing");
        expect(&desk.run(&at(&empty), arguments), 6, &["is empty", "mounted"], "mounted");
    }
    let target = desk.0.path().join("target");
    let restore = ["restore", "--target-dir", target.to_str().unwrap()];
    expect(&desk.run(&at(&empty), &restore), 6, &["is empty"], "mounted");
    // An init container that waves a missing archive through must not take lost storage for one.
    let waved = [restore.as_slice(), &["--if-backup-exists"]].concat();
    expect(&desk.run(&at(&empty), &waved), 6, &["is empty"], "mounted");
    assert!(!target.exists());

    let closed = desk.0.directory("closed");
    fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o500)).unwrap();
    let url = format!("cannot write in `file://{}`", closed.display());
    expect(&desk.backup(&at(&closed)), 6, &[&url, "access denied"], "write permission");
    expect(&desk.run(&at(&closed), &["run"]), 6, &["site `main`", &url, "access denied"], "write permission");
}

#[test]
fn a_bucket_that_cannot_be_used_is_told_by_its_reason() {
    let Some(s3) = S3::from_environment() else { return };
    let desk = Desk::new();
    let with = |key: &str, value: &str| {
        let mut storage = s3.object_storage(&unique_prefix("errors"));
        storage[key] = json!(value);
        json!({ "backup_sites": { "main": { "nodes": ["host=/nowhere"], "object_storage": storage } } })
    };
    let output = desk.run(&with("bucket_name", "pgkeep-missing"), &["list"]);
    expect(&output, 6, &["s3://pgkeep-missing/", "NoSuchBucket", &s3.endpoint()], "create the bucket");
    let output = desk.run(&with("aws_secret_access_key", PASSWORD), &["list"]);
    expect(&output, 6, &["access denied", "SignatureDoesNotMatch"], "check the access key");
    assert!(!output.stderr.contains(&s3.secret_key), "{output:?}");
    let output = desk.run(&with("aws_access_key_id", "nobody"), &["list"]);
    expect(&output, 6, &["access denied"], "check the access key");
}

/// A site in an S3 that nobody runs.
fn storage_down() -> Value {
    json!({ "backup_sites": { "main": { "nodes": ["host=/nowhere"], "object_storage": {
        "storage_type": "s3", "bucket_name": "b", "region": "us-east-1", "host": "127.0.0.1",
        "port": process::free_port(), "is_secure": false,
        "aws_access_key_id": "AKIA", "aws_secret_access_key": PASSWORD } } } })
}

#[test]
fn an_agent_whose_storage_is_down_lives_says_so_and_never_that_wal_does_not_exist() {
    let configuration = storage_down();
    expect(
        &Desk::new().run(&configuration, &["list"]),
        6,
        &["`s3://b?endpoint=http://127.0.0.1:", "Connection refused"],
        "endpoint can be reached",
    );
    let mut agent = Agent::start_without_storage(&configuration);
    let file = "000000010000000000000001";
    assert_eq!(agent.get(&format!("/main/archive/{file}")).status, 503);
    assert_eq!(http::head(agent.address(), &format!("/main/archive/{file}")).unwrap().status, 503);
    assert_eq!(
        http::put(agent.address(), "/main/archive/00000002.history", b"1\t0/1\tx\n").unwrap().status,
        503
    );
    assert_eq!(agent.get("/readyz").status, 503);
    assert_eq!(agent.status()["sites"]["main"]["archiving"]["state"], "opening storage");
    let fetched = pgkeep(["wal-fetch", file, "/nowhere/x", "--site", "main", "--url", &agent.url()]).run();
    expect_error(&fetched, 200, &["has not been reached yet", file]);
    let error = process::poll(Duration::from_secs(40), || {
        Some(agent.status()["sites"]["main"]["archiving"]["last_error"].clone()).filter(Value::is_object)
    })
    .expect("the agent tells why");
    assert!(error["message"].as_str().unwrap().contains("Connection refused"), "{error}");
    let ended = agent.terminate();
    assert_eq!(ended.code, 0);
    assert!(ended.elapsed < Duration::from_secs(5), "{ended:?}");
    assert!(!agent.log().contains(PASSWORD));
}

#[test]
fn a_port_in_use_is_told() {
    let desk = Desk::new();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut configuration = desk.node(&json!("host=/nowhere"));
    configuration["http_address"] = json!("127.0.0.1");
    configuration["http_port"] = json!(port);
    let file = desk.0.write("taken.json", configuration.to_string());
    let output = pgkeep(["run", "--config"]).arg(file).run();
    expect(&output, 1, &[&format!("cannot listen on 127.0.0.1:{port}"), "in use"], "http_port");
}

#[test]
fn a_site_that_is_not_meant_clearly_is_asked_for() {
    let desk = Desk::new();
    let site = json!({ "nodes": ["host=/nowhere"], "object_storage": desk.local() });
    let two = json!({ "backup_sites": { "east": site, "west": site } });
    for arguments in
        [["list"].as_slice(), &["status"], &["prune"], &["backup"], &["restore", "--target-dir", "/x"]]
    {
        let output = desk.run(&two, arguments);
        expect(&output, 2, &["`east`", "`west`"], "--site");
        let wrong = [arguments, &["--site", "north"]].concat();
        expect(&desk.run(&two, &wrong), 2, &["`north`", "`east`", "`west`"], "--site");
    }
}

#[test]
fn a_second_agent_waits_says_why_and_takes_over() {
    let server = Server::start(majors()[0]);
    server.create_role("backup", "login replication", "secret");
    let desk = Desk::new();
    let configuration = configuration(&server, &desk.local());
    let streams = |agent: &Agent| agent.status()["sites"]["main"]["archiving"]["state"] == "streaming";
    let limit = Duration::from_secs(30);
    let mut first = Agent::start(&configuration);
    process::poll(limit, || streams(&first).then_some(())).expect("the first one streams");
    let second = Agent::start(&configuration);
    process::poll(limit, || second.log().contains("is in use by another connection").then_some(()))
        .expect("the second one says why it does not");
    assert!(second.log().contains("pg_stat_replication"), "{}", second.log());
    thread::sleep(Duration::from_secs(3));
    // One reason, one line: it knocks several times a second at first.
    let lines = second.log().lines().filter(|line| line.contains("is in use by another")).count();
    assert!(lines <= 2, "{}", second.log());
    assert!(!streams(&second));
    assert_eq!(first.terminate().code, 0);
    process::poll(limit, || streams(&second).then_some(())).expect("the second one takes over");
    // What is over is told no longer, even if the server stays idle.
    process::poll(limit, || {
        second.status()["sites"]["main"]["archiving"]["last_error"].is_null().then_some(())
    })
    .expect("the error is forgotten");
    let status = second.status();
    assert_eq!(status["sites"]["main"]["gaps"], json!([]));
}

#[test]
fn a_bad_configuration_on_sighup_changes_nothing_and_a_good_one_counts() {
    let desk = Desk::new();
    let mut configuration = desk.node(&json!("host=/nowhere"));
    let agent = Agent::start(&configuration);
    let file = agent.config_file();
    fs::write(&file, "{\"http_port\": }").unwrap();
    agent.signal(Signal::HUP);
    let limit = Duration::from_secs(20);
    process::poll(limit, || agent.log().contains("the old one stays").then_some(())).expect("it is told");
    assert!(agent.log().contains("line 1, column 15"), "{}", agent.log());
    assert_eq!(agent.get("/healthz").status, 200);

    let port = process::free_port();
    configuration["http_address"] = json!("127.0.0.1");
    configuration["http_port"] = json!(port);
    fs::write(&file, configuration.to_string()).unwrap();
    agent.signal(Signal::HUP);
    let moved = (Ipv4Addr::LOCALHOST, port).into();
    let answer =
        process::poll(limit, || http::get(moved, "/healthz").ok()).expect("it serves on the new port");
    assert_eq!(answer.status, 200);
    assert!(http::get(agent.address(), "/healthz").is_err(), "and not on the old one");
}

#[test]
fn a_target_that_cannot_be_written_is_told_before_anything_is_read() {
    let server = Server::start(majors()[0]);
    server.create_role("backup", "login replication", PASSWORD);
    let desk = Desk::new();
    let configuration = desk.node(&node(&server, "backup", PASSWORD));
    desk.backup(&configuration).success();
    let closed = desk.0.directory("closed");
    fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o500)).unwrap();
    let target = closed.join("data");
    let output = desk.run(&configuration, &["restore", "--target-dir", target.to_str().unwrap()]);
    expect_error(&output, 1, &[target.to_str().unwrap(), "Permission denied"]);
    let full = desk.0.directory("full");
    fs::write(full.join("mine"), "precious").unwrap();
    let output = desk.run(&configuration, &["restore", "--target-dir", full.to_str().unwrap()]);
    expect(&output, 4, &[full.to_str().unwrap(), "not empty"], "another directory");
    assert_eq!(fs::read_to_string(full.join("mine")).unwrap(), "precious");
}

#[track_caller]
fn expect_error(output: &Output, code: i32, error: &[&str]) {
    assert_eq!(output.code, code, "{output:?}");
    let (line, _) = told(output);
    for part in error {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
}

#[test]
fn no_log_level_tells_a_secret() {
    let secret = "S3cret-of-the-agent";
    for (major, auth) in majors().into_iter().zip(["password", "md5", "scram-sha-256"].into_iter().cycle()) {
        let server = Server::builder(major).auth(auth).start();
        server.create_role("backup", "login replication", PASSWORD);
        let desk = Desk::new();
        let s3 = S3::from_environment();
        let storage =
            s3.as_ref().map_or_else(|| desk.local(), |s3| s3.object_storage(&unique_prefix("secrets")));
        let connection = server.conninfo("backup", PASSWORD);
        let configuration = json!({
            "webserver_username": "u", "webserver_password": secret,
            "backup_sites": { "main": { "nodes": [connection], "object_storage": storage } },
        });
        let agent = Agent::start_with(&configuration, &[("PGKEEP_LOG", "trace")]);
        let file = agent.config_file();
        let backup =
            pgkeep(["backup", "--fast", "--log-level", "trace", "--config"]).arg(&file).run().success();
        let mut outputs = vec![backup.stderr, backup.stdout];
        for arguments in [["status"].as_slice(), &["list", "--json"], &["config", "show"], &["prune"]] {
            let output =
                pgkeep(["--log-level", "trace", "--config"]).arg(&file).args(arguments).run().success();
            outputs.extend([output.stdout, output.stderr]);
        }
        outputs.push(agent.log());
        let shown = outputs.join("\n");
        assert!(shown.contains("TRACE") || shown.contains("DEBUG"), "the level counts");
        // What stands in the `Authorization` header, too.
        for secret in [PASSWORD, secret, "dTpTM2NyZXQ", s3.as_ref().map_or(PASSWORD, |s3| &s3.secret_key)] {
            let line = shown.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{secret} of a server with {auth}");
        }
    }
}
