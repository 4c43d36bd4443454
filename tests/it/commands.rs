//! What the commands print, for people and for programs, and what the agent answers over HTTP.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::binary::{Agent, Output, configuration, local_storage, pgkeep};
use crate::http;
use crate::process::{self, Scratch};
use crate::server::{Server, majors};

/// A server, an agent that streams from it, and their archive.
struct Stage {
    server: Server,
    agent: Agent,
    scratch: Scratch,
}

impl Stage {
    fn start(more: &Value) -> Self {
        let stage = Self::start_without_status(more);
        stage.wait("a base backup", |site| site["backup"]["last"].is_string());
        stage
    }

    fn start_without_status(more: &Value) -> Self {
        let server = Server::builder(majors()[0]).segment_size_mib(1).start();
        server.create_role("backup", "login replication", "secret");
        let scratch = Scratch::new();
        let mut configuration = configuration(&server, &local_storage(&scratch.directory("storage")));
        for (key, value) in more.as_object().unwrap() {
            configuration[key] = value.clone();
        }
        let agent = Agent::start(&configuration);
        Self { server, agent, scratch }
    }

    fn site(&self) -> Value {
        self.agent.status()["sites"]["main"].clone()
    }

    fn wait(&self, what: &str, reached: impl Fn(&Value) -> bool) {
        process::poll(Duration::from_mins(1), || reached(&self.site()).then_some(()))
            .unwrap_or_else(|| panic!("no {what}: {:#}\n{}", self.site(), self.agent.log()));
    }

    /// Ends the current segment; waits until it is in the archive.
    fn archive_segment(&self) -> String {
        self.server.load(10);
        let segment = self.server.switch_segment();
        // Over HTTP the segment is there before it is whole, made of its pieces.
        let whole = self.scratch.path().join("storage/main/xlog").join(&segment);
        process::poll(Duration::from_secs(30), || whole.exists().then_some(())).expect("it is archived");
        segment
    }

    fn run(&self, arguments: &[&str]) -> Output {
        pgkeep(["--config"]).arg(self.agent.config_file()).args(arguments).run()
    }
}

fn is_time(value: &Value) -> bool {
    // At most milliseconds.
    value.as_str().is_some_and(|text| text.ends_with('Z') && text.len() <= "2026-11-21T10:00:00.123Z".len())
}

#[test]
fn list_status_and_prune_tell_people_and_programs_the_same() {
    let stage = Stage::start(&json!({}));
    stage.archive_segment();
    stage.run(&["backup", "--fast", "--note", "before the upgrade"]).success();

    let list = stage.run(&["list", "--json"]).success().json();
    let backups = list["backups"].as_array().unwrap();
    assert_eq!((&list["site"], backups.len(), &list["damaged"]), (&json!("main"), 2, &json!([])));
    let newest = &backups[1];
    assert_eq!(newest["note"], "before the upgrade");
    assert!(is_time(&newest["start_time"]) && is_time(&newest["stop_time"]), "{newest:#}");
    let name = newest["name"].as_str().unwrap();
    let text = stage.run(&["list"]).success().stdout;
    let heading: Vec<_> = text.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        heading,
        ["BACKUP", "FINISHED", "TOOK", "SERVER", "TIMELINE", "START", "STOP", "SIZE", "STORED", "NOTE"]
    );
    let row = text.lines().nth(2).unwrap();
    assert!(row.starts_with(name) && row.ends_with("before the upgrade") && row.contains(" MiB "), "{text}");

    let status = stage.run(&["status", "--json"]).success().json();
    assert_eq!(status["gaps"], json!([]));
    assert_eq!(status["backups"], 2);
    assert_eq!(status["latest_backup"]["name"], *name);
    assert_eq!(status["agent"]["archiving"]["state"], "streaming");
    assert_eq!(status["agent"]["archiving"]["last_error"], Value::Null);
    let identifier = stage.server.value("select system_identifier from pg_control_system()");
    assert_eq!(status["system_identifier"], identifier.as_str());
    let window = &status["timelines"][0];
    assert_eq!((&window["timeline"], &window["gaps"]), (&json!(1), &json!([])));
    assert_eq!(window["earliest"]["backup"], backups[0]["name"]);
    let text = stage.run(&["status"]).success().stdout;
    assert!(text.starts_with("agent     streaming from 127.0.0.1:"), "{text}");
    assert!(text.contains("backups   2, newest: ") && text.contains("none"), "{text}");

    let planned = stage.run(&["prune", "--dry-run", "--json"]).success().json();
    assert_eq!((&planned["dry_run"], &planned["removed"]), (&json!(true), &Value::Null));
    let verdicts: Vec<_> =
        planned["backups"].as_array().unwrap().iter().map(|each| &each["verdict"]).collect();
    assert_eq!(verdicts, ["keep", "keep"]);
    assert!(planned["backups"][0]["reason"].as_str().is_some_and(|reason| !reason.is_empty()));
    let text = stage.run(&["prune"]).success().stdout;
    assert!(text.contains("removed 0 backups and "), "{text}");
    assert_eq!(stage.run(&["list", "--json"]).json()["backups"].as_array().unwrap().len(), 2);
}

#[test]
fn a_gap_is_told_where_it_is() {
    let stage = Stage::start(&json!({}));
    let segments = [stage.archive_segment(), stage.archive_segment(), stage.archive_segment()];
    let lost = stage.scratch.path().join("storage/main/xlog").join(&segments[1]);
    fs::remove_file(&lost).unwrap_or_else(|error| panic!("{}: {error}", lost.display()));
    let status = stage.run(&["status", "--json"]).success().json();
    assert_eq!(status["gaps"].as_array().unwrap().len(), 1, "{status:#}");
    assert!(status["gaps"][0]["missing"].as_str().unwrap().contains(&segments[1]), "{status:#}");
    assert!(stage.run(&["status"]).success().stdout.contains(&segments[1]));
}

#[test]
fn every_command_has_a_short_help_with_examples() {
    let commands = [
        &[][..],
        &["run"],
        &["backup"],
        &["restore"],
        &["list"],
        &["status"],
        &["prune"],
        &["wal-fetch"],
        &["wal-push"],
        &["config"],
    ];
    for command in commands {
        let help = pgkeep(command.iter().chain(&["--help"])).run().success();
        assert!(help.stdout.contains("Example"), "{}", help.stdout);
        assert!(help.stdout.lines().count() <= 60, "{command:?} says too much");
        let after = help.stdout.split("Global options:").nth(1).unwrap();
        for line in after.lines() {
            assert!(line.chars().count() <= 100, "{command:?}: {line}");
        }
        assert!(help.stderr.is_empty());
    }
    // Wrong usage says what is right.
    let wrong = pgkeep(["lsit"]).run().expect_code(2);
    assert!(wrong.stderr.contains("'list'"), "{}", wrong.stderr);
}

#[test]
fn the_agent_answers_requests_of_every_kind() {
    let stage = Stage::start(&json!({}));
    let segment = stage.archive_segment();
    let at = stage.agent.address();
    let status_of = |method: &str, path: &str| http::request(at, method, path, &[], &[]).unwrap().status;

    let got = stage.agent.get(&format!("/main/archive/{segment}"));
    assert_eq!((got.status, got.body.len()), (200, 1 << 20));
    assert_eq!(got.header("server"), Some(concat!("pgkeep/", env!("CARGO_PKG_VERSION"))));
    // One site: its name may be left out.
    assert_eq!(stage.agent.get(&format!("/-/archive/{segment}")).body, got.body);
    let head = http::head(at, &format!("/main/archive/{segment}")).unwrap();
    assert_eq!((head.status, head.header("content-length")), (200, Some("1048576")));
    for path in ["/main/archive/0000000100000000000000F0", "/main/archive/00000009.history"] {
        let missing = stage.agent.get(path);
        assert_eq!(missing.status, 404);
        assert!(missing.text().ends_with("does not exist in the archive\n"), "{}", missing.text());
        assert_eq!(status_of("HEAD", path), 404);
    }
    // Never 404: PostgreSQL would take it for the end of the archive.
    for path in [
        "/other/archive/000000010000000000000001",
        "/main/archive/../../../etc/passwd",
        "/main/archive/..%2f..%2fetc%2fpasswd",
        "/main/archive/%00",
        "/main/archive/000000010000000000000001/../x",
        "/main/archive/00000001000000000000000G",
        "/main/archive/",
        "//archive/000000010000000000000001",
        "/main",
        "/nothing",
    ] {
        assert_eq!(status_of("GET", path), 400, "{path}");
        // HEAD is PGHoard's question, and so is the answer about a site that is not known.
        let expected = if path.starts_with("/other/") { 404 } else { 400 };
        assert_eq!(status_of("HEAD", path), expected, "{path}");
        assert_eq!(http::put(at, path, b"x").unwrap().status, 400, "{path}");
    }
    let inside = stage.server.data_directory().join("pg_wal/RECOVERYXLOG");
    for target in ["/etc/passwd", "../../../etc/passwd", "/tmp/x", "PG_VERSION"] {
        let headers = [("x-pghoard-target-path", target)];
        let answer = http::request(at, "GET", &format!("/main/archive/{segment}"), &headers, &[]).unwrap();
        assert!((400..500).contains(&answer.status) && answer.status != 404, "{target}: {answer:?}");
    }
    let headers = [("x-pghoard-target-path", inside.to_str().unwrap())];
    let answer = http::request(at, "GET", &format!("/main/archive/{segment}"), &headers, &[]).unwrap();
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(fs::read(inside).unwrap(), got.body);

    // PUT: the same again is fine, other bytes are refused and change nothing.
    let path = format!("/main/archive/{segment}");
    assert_eq!(http::put(at, &path, &got.body).unwrap().status, 200);
    let mut other = got.body.clone();
    *other.last_mut().unwrap() ^= 1;
    let refused = http::put(at, &path, &other).unwrap();
    assert_eq!(refused.status, 409, "{}", refused.text());
    assert_eq!(stage.agent.get(&path).body, got.body);
    assert_eq!(http::put(at, "/main/archive/00000001000000000000000A", b"garbage").unwrap().status / 100, 4);

    for (method, path) in [("DELETE", path.as_str()), ("POST", "/status"), ("PATCH", "/healthz")] {
        assert!([400, 405].contains(&status_of(method, path)), "{method} {path}");
    }
    for bytes in [
        &b"GARBAGE\r\n\r\n"[..],
        b"GET /status HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PUT /main/archive/00000002.history HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    ] {
        // What is no HTTP may be answered by nothing but a closed connection.
        let answer = String::from_utf8_lossy(&http::raw(at, bytes).unwrap_or_default()).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    let many = format!("GET /status HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(5000));
    let answer = http::raw(at, many.as_bytes()).unwrap_or_default();
    assert!(!answer.starts_with(b"HTTP/1.1 2"));
    for path in ["/healthz", "/readyz", "/status", "/"] {
        assert_eq!(status_of("GET", path), 200, "{path}: the agent is well after all this");
    }
    assert_eq!(stage.site()["archiving"]["state"], "streaming");
}

#[test]
fn a_password_is_asked_for_and_the_hooks_know_it() {
    let stage =
        Stage::start_without_status(&json!({ "webserver_username": "u", "webserver_password": "p-Qq7" }));
    let at = stage.agent.address();
    for path in ["/status", "/main/archive/00000002.history", "/nothing"] {
        assert_eq!(http::get(at, path).unwrap().status, 401, "{path}");
    }
    for path in ["/healthz", "/readyz"] {
        assert_ne!(http::get(at, path).unwrap().status, 401, "{path}: probes cannot log in");
    }
    let target = stage.scratch.path().join("fetched");
    let hook = |arguments: &[&str], password: &str| {
        pgkeep(["--site", "main"])
            .args(arguments)
            .args(["--url", &stage.agent.url()])
            .env("PGKEEP_HTTP_USERNAME", "u")
            .env("PGKEEP_HTTP_PASSWORD", password)
            .run()
    };
    let history = stage.scratch.write("00000002.history", "1\t0/3000000\tno recovery target specified\n");
    hook(&["wal-push", history.to_str().unwrap()], "p-Qq7").success();
    hook(&["wal-fetch", "00000002.history", target.to_str().unwrap()], "p-Qq7").success();
    assert_eq!(fs::read(&target).unwrap(), fs::read(&history).unwrap());
    hook(&["wal-fetch", "00000003.history", target.to_str().unwrap()], "p-Qq7").expect_code(1);
    let wrong = hook(&["wal-fetch", "00000002.history", target.to_str().unwrap()], "w-Qq7").expect_code(200);
    assert!(wrong.stderr.contains("PGKEEP_HTTP_PASSWORD") && !wrong.stderr.contains("w-Qq7"), "{wrong:?}");
    hook(&["wal-push", history.to_str().unwrap()], "w-Qq7").expect_code(1);
}

#[test]
fn another_server_on_the_agents_port_is_not_believed() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nServer: nginx\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let url = format!("http://{address}");
    let fetched = pgkeep(["wal-fetch", "000000010000000000000001", "/nowhere/x", "--url", &url]).run();
    let fetched = fetched.expect_code(200);
    assert!(fetched.stderr.contains(&address.to_string()) && fetched.stderr.contains("nginx"), "{fetched:?}");
}
