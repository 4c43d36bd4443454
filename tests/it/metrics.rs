//! What is counted, as those who collect it get it: Prometheus, a Pushgateway, statsd, a notifier.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::archiving::{Rig, wait_for};
use crate::binary::Agent;
use crate::server::majors;

fn newest() -> u32 {
    *majors().last().expect("a version to test")
}

/// The series of an exposition by name with labels; fails on any line that is not well-formed.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut types = BTreeMap::new();
    let mut series = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a name and a type");
            assert!(matches!(kind, "counter" | "gauge"), "{line}");
            assert!(types.insert(name, kind).is_none(), "`{name}` has two types");
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in {line:?}"));
        let bare = name.split('{').next().expect("split gives one part at least");
        assert!(bare.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{line}");
        assert!(types.contains_key(bare), "no type before {line}");
        assert!(name == bare || name.ends_with('}'), "{line}");
        let value = value.parse().unwrap_or_else(|_| panic!("no number in {line:?}"));
        assert!(series.insert(name.to_owned(), value).is_none(), "twice: {line}");
    }
    series
}

fn scrape(agent: &Agent) -> BTreeMap<String, f64> {
    let answer = agent.get("/metrics");
    assert_eq!(answer.status, 200);
    assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("text/plain; version=0.0.4")));
    parse(&answer.text())
}

#[test]
fn prometheus_scrapes_both_families_and_counters_count() {
    let mut rig = Rig::new(newest(), 1).set("basebackup_interval_hours", 24);
    rig.config["prometheus"] = json!({ "tags": { "app": "shop" } });
    let agent = rig.agent();
    rig.wait_stored(&agent);
    wait_for("the first backup is there", || {
        scrape(&agent).get("pgkeep_backups_total{app=\"shop\",result=\"ok\",site=\"main\"}") == Some(&1.0)
    });
    rig.server.switch_segment();
    rig.server.load(10);
    rig.wait_stored(&agent);
    let uploads = "pghoard_upload_size{app=\"shop\",result=\"ok\",site=\"main\",type=\"xlog\"}";
    wait_for("a segment is counted", || scrape(&agent).contains_key(uploads));
    let first = scrape(&agent);
    for name in [
        "pghoard_basebackup_completed{app=\"shop\"}",
        "pghoard_backup_time{app=\"shop\",basebackup_mode=\"pgkeep\"}",
        "pghoard_basebackup_bytes_uploaded{app=\"shop\",delta=\"False\",site=\"main\"}",
        "pghoard_backup_stream_basebackup_requested{app=\"shop\",site=\"main\"}",
        "pghoard_last_upload_age{app=\"shop\",site=\"main\",type=\"xlog\"}",
        "pghoard_last_upload_age{app=\"shop\",site=\"main\",type=\"basebackup\"}",
        "pghoard_xlogs_since_basebackup{app=\"shop\",site=\"main\"}",
        "pghoard_total_upload_size{app=\"shop\",site=\"main\",type=\"xlog\"}",
        "pghoard_compressed_size_ratio{algorithm=\"zstd\",app=\"shop\",site=\"main\",type=\"xlog\"}",
        "pghoard_seconds_since_backup_progress_stalled{app=\"shop\"}",
        "pgkeep_archiving_up{app=\"shop\",site=\"main\"}",
        "pgkeep_wal_lag_bytes{app=\"shop\",site=\"main\"}",
        "pgkeep_wal_oldest_unstored_seconds{app=\"shop\",site=\"main\"}",
        "pgkeep_backup_last_duration_seconds{app=\"shop\",site=\"main\"}",
        "pgkeep_backups_stored{app=\"shop\",site=\"main\"}",
        "pgkeep_start_time_seconds{app=\"shop\"}",
    ] {
        assert!(first.contains_key(name), "{name} is missing in {first:#?}");
    }
    assert!((first["pgkeep_archiving_up{app=\"shop\",site=\"main\"}"] - 1.0).abs() < f64::EPSILON);
    let ratio =
        first["pghoard_compressed_size_ratio{algorithm=\"zstd\",app=\"shop\",site=\"main\",type=\"xlog\"}"];
    assert!(ratio > 0.0 && ratio < 1.0, "{ratio}");

    rig.server.switch_segment();
    rig.server.load(10);
    rig.wait_stored(&agent);
    wait_for("the counter has grown", || scrape(&agent)[uploads] > first[uploads]);
    let second = scrape(&agent);
    for (name, value) in first.iter().filter(|(name, _)| name.contains("_total{")) {
        assert!(second[name] >= *value, "{name} went back from {value} to {}", second[name]);
    }
}

#[test]
fn the_age_of_what_storage_lacks_is_what_a_recovery_would_lose() {
    let rig = Rig::new(newest(), 1);
    let mut server = rig.server;
    let agent = Agent::start(&rig.config);
    crate::archiving::wait_stored(&agent, crate::archiving::flush_lsn(&server));
    let age = || scrape(&agent).get("pgkeep_wal_oldest_unstored_seconds{site=\"main\"}").copied();
    wait_for("everything is stored", || age().is_some_and(|age| age < 1.5));
    server.kill();
    wait_for("it grows while nothing is heard of the server", || age().is_some_and(|age| age > 4.0));
    assert!(scrape(&agent)["pgkeep_archiving_up{site=\"main\"}"].abs() < f64::EPSILON);
    server.start_again();
    wait_for("everything is stored again", || age().is_some_and(|age| age < 1.5));
}

/// Collects datagrams until `enough` of them say what is wanted.
fn datagrams(socket: &UdpSocket, enough: impl Fn(&[String]) -> bool) -> Vec<String> {
    let mut lines = Vec::new();
    let mut message = [0; 2048];
    let begin = Instant::now();
    while !enough(&lines) {
        assert!(begin.elapsed() < Duration::from_mins(1), "not all came: {lines:#?}");
        if let Ok(length) = socket.recv(&mut message) {
            lines.push(String::from_utf8(message[..length].to_vec()).expect("plain text"));
        }
    }
    lines
}

fn udp() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a port");
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("set a timeout");
    let port = socket.local_addr().expect("it is bound").port();
    (socket, port)
}

#[test]
fn statsd_is_told_in_both_forms() {
    for (format, expected) in [
        (
            "telegraf",
            [
                "pghoard.upload_size,app=shop,result=ok,site=main,type=xlog:",
                "pghoard.last_upload_age,app=shop,site=main,type=xlog:",
                "pgkeep_wal_lag_bytes,app=shop,site=main:",
            ],
        ),
        ("datadog", ["pghoard.upload_size:", "pghoard.last_upload_age:", "pgkeep_wal_lag_bytes:"]),
    ] {
        let mut rig = Rig::new(newest(), 1);
        let (socket, port) = udp();
        let (storage_socket, storage_port) = udp();
        rig.config["statsd"] = json!({ "host": "127.0.0.1", "port": port.to_string(), "format": format, "tags": { "app": "shop" } });
        rig.site()["object_storage"]["statsd_info"] = json!({
            "host": "127.0.0.1", "port": storage_port, "message_format": format,
            "operation_map": { "store_file": "put" },
        });
        let agent = rig.agent();
        rig.wait_stored(&agent);
        rig.server.switch_segment();
        rig.server.load(10);
        let lines = datagrams(&socket, |lines| {
            expected.iter().all(|start| lines.iter().any(|line| line.starts_with(start)))
                && lines.iter().any(|line| {
                    line.starts_with(expected[0]) && line.contains("type:xlog") || format == "telegraf"
                })
        });
        let upload = lines.iter().find(|line| {
            line.starts_with(expected[0]) && (format == "telegraf" || line.ends_with("type:xlog"))
        });
        let upload = upload.expect("a segment");
        if format == "telegraf" {
            assert!(upload.ends_with("|c"), "{upload}");
        } else {
            assert!(upload.ends_with("|c|#app:shop,result:ok,site:main,type:xlog"), "{upload}");
        }
        let tag = if format == "telegraf" {
            "rohmu_operation_count,operation=put:1|c"
        } else {
            "rohmu_operation_count:1|c|#operation:put"
        };
        datagrams(&storage_socket, |lines| lines.iter().any(|line| line == tag));
    }
}

/// A listener that takes any POST; gives path and body of each.
fn http_listener() -> (u16, mpsc::Receiver<(String, String)>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a port");
    let port = listener.local_addr().expect("it is bound").port();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sender = sender.clone();
            thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                loop {
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if reader.read_line(&mut head).unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let lower = head.to_ascii_lowercase();
                    let length = lower.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
                    let mut body = vec![0; length.and_then(|length| length.parse().ok()).unwrap_or(0)];
                    reader.read_exact(&mut body).expect("the whole body");
                    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
                    assert!(head.starts_with("POST "), "{head}");
                    let answer = reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
                    if answer.is_err() || sender.send((path, String::from_utf8(body).expect("text"))).is_err()
                    {
                        return;
                    }
                }
            });
        }
    });
    (port, receiver)
}

#[test]
fn a_pushgateway_gets_everything_under_pghoards_job() {
    let mut rig = Rig::new(newest(), 1);
    let (port, requests) = http_listener();
    rig.config["pushgateway"] =
        json!({ "endpoint": format!("http://127.0.0.1:{port}/"), "tags": { "app": "shop" } });
    let agent = rig.agent();
    rig.wait_stored(&agent);
    rig.server.switch_segment();
    rig.server.load(10);
    let counted = "pghoard_upload_size{app=\"shop\",result=\"ok\",site=\"main\",type=\"xlog\"}";
    let begin = Instant::now();
    loop {
        let (path, body) = requests.recv_timeout(Duration::from_secs(30)).expect("a push");
        let series = parse(&body);
        assert!(path.starts_with("/metrics/job/pghoard/instance/"), "{path}");
        if path.ends_with("/main") && series.contains_key(counted) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_mins(1), "no push has a segment");
    }
    drop(agent);
}

#[test]
fn a_gateway_that_never_answers_holds_nobody_up() {
    let mut rig = Rig::new(newest(), 1);
    // Accepts, and says nothing.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = silent.local_addr().unwrap().port();
    rig.config["pushgateway"] = json!({ "endpoint": format!("http://127.0.0.1:{port}") });
    rig.site()["object_storage"]["notifier"] =
        json!({ "notifier_type": "http", "url": format!("http://127.0.0.1:{port}/hook") });
    let mut agent = rig.agent();
    for _ in 0..3 {
        rig.server.load(1_000);
        rig.server.switch_segment();
        rig.server.load(1);
        rig.wait_stored(&agent);
    }
    let ended = agent.terminate();
    assert_eq!(ended.code, 0);
    assert!(ended.elapsed < Duration::from_secs(8), "took {:?}", ended.elapsed);
}

#[test]
fn a_notifier_hears_of_every_object() {
    let mut rig = Rig::new(newest(), 1);
    let (port, requests) = http_listener();
    rig.site()["object_storage"]["notifier"] =
        json!({ "notifier_type": "http", "url": format!("http://127.0.0.1:{port}/hook?token=x") });
    let agent = rig.agent();
    rig.wait_stored(&agent);
    let segment = rig.server.switch_segment();
    rig.server.load(10);
    let (mut uploaded, mut deleted) = (false, false);
    while !(uploaded && deleted) {
        let (path, body) = requests.recv_timeout(Duration::from_secs(30)).expect("a notice");
        assert_eq!(path, "/hook?token=x");
        let notice: Value = serde_json::from_str(&body).expect("JSON");
        let key = notice["key"].as_str().expect("a key");
        match notice["op"].as_str() {
            Some("UPLOAD") if key == format!("main/xlog/{segment}") => {
                assert!(notice["size"].as_u64().is_some_and(|size| size > 0), "{notice}");
                assert_eq!(notice["metadata"]["original-file-size"], "1048576", "{notice}");
                assert!(notice["last_modified"].is_string(), "{notice}");
                uploaded = true;
            }
            // The pieces of a segment go when it is stored as a whole.
            Some("DELETE") => deleted = true,
            Some("UPLOAD") => {}
            other => panic!("{other:?}"),
        }
    }
    drop(agent);
}
