//! The HTTP server, and `wal-fetch` and `wal-push` before it.
#![expect(clippy::unwrap_used, reason = "the fixture is part of the tests")]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgkeep::postgres::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};
use pgkeep::repository::{Facts, Folder, ObjectName, Repository, Settings};
use pgkeep::secret::Secret;
use pgkeep::serve::{self, Deps, Limits, Site};
use pgkeep::storage::{self, Access, StorageConfig};
use tokio_util::sync::CancellationToken;

use crate::binary::{Output, pgkeep};
use crate::http;
use crate::process::{Scratch, free_port, give_tree};

const SEGMENT_BYTES: u64 = 1 << 20;
const HISTORY: &str = "1\t0/500000\tno recovery target specified\n";

pub fn segment(number: u64) -> SegmentName {
    let size = SegmentSize::try_from(SEGMENT_BYTES).unwrap();
    size.segment_at(TimelineId::FIRST, Lsn::new(number * SEGMENT_BYTES))
}

/// Segment `number` as PostgreSQL 15 begins it, then bytes that do not repeat.
pub fn segment_bytes(number: u64) -> Vec<u8> {
    let start = number * SEGMENT_BYTES;
    let words =
        (0..SEGMENT_BYTES / 8).map(|word| (start / 8 + word).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 13);
    let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &0xD110_u16.to_le_bytes());
    put(2, &2_u16.to_le_bytes());
    put(4, &1_u32.to_le_bytes());
    put(8, &start.to_le_bytes());
    put(16, &[0; 8]);
    put(24, &7_300_000_000_000_000_001_u64.to_le_bytes());
    put(32, &(1_u32 << 20).to_le_bytes());
    put(36, &8192_u32.to_le_bytes());
    bytes
}

/// A server over a local directory, with a place for clients to write to.
pub struct Serving {
    pub scratch: Scratch,
    pub address: SocketAddr,
    pub repository: Repository,
    runtime: tokio::runtime::Runtime,
    cancel: CancellationToken,
}

impl Serving {
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    pub fn start_with(change: impl FnOnce(&mut Deps)) -> Self {
        let scratch = Scratch::new();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let directory = scratch.path().join("store");
        let config = StorageConfig::Local { directory };
        let store = runtime.block_on(storage::open(&config, Access::Write)).unwrap();
        let repository = Repository::new(store, "main", Settings::default());
        let site = Site::new("main", tokio::sync::watch::channel(Some(repository.clone())).1);
        let mut deps = Deps {
            sites: vec![site],
            status: Arc::new(|| serde_json::json!({ "site": "main" })),
            metrics: Arc::new(|| "a 1\n".to_owned()),
            ready: Arc::new(|| Err("not yet".to_owned())),
            credentials: None,
            limits: Limits::default(),
        };
        change(&mut deps);
        let cancel = CancellationToken::new();
        let listener = runtime.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(serve::run(listener, deps, cancel.clone()));
        Self { scratch, address, repository, runtime, cancel }
    }

    pub fn put(&self, name: ObjectName, content: impl Into<Bytes>) {
        self.runtime.block_on(self.repository.put(name, content.into(), Facts::default())).unwrap();
    }

    /// What is stored under a name.
    pub fn content(&self, name: ObjectName) -> Bytes {
        self.runtime.block_on(self.repository.get(name, 1 << 30)).unwrap()
    }

    pub fn put_segment(&self, number: u64) {
        self.put(ObjectName::segment(segment(number)), segment_bytes(number));
    }

    pub fn put_piece(&self, number: u64, start: u32, end: u32) {
        let content = segment_bytes(number)[start as usize..end as usize].to_vec();
        self.put(ObjectName::Piece { segment: segment(number), start, end }, content);
    }

    /// The file that holds a stored segment.
    pub fn object(&self, number: u64) -> PathBuf {
        self.scratch.path().join(format!("store/main/xlog/{}", segment(number)))
    }

    pub fn get(&self, path: &str) -> http::Response {
        http::get(self.address, path).unwrap()
    }

    pub fn status_of(&self, number: u64) -> u16 {
        self.get(&format!("/main/archive/{}", segment(number))).status
    }

    pub fn target(&self) -> PathBuf {
        self.scratch.path().join("RECOVERYXLOG")
    }

    pub fn fetch(&self, file: &str) -> Output {
        fetch(&format!("http://{}", self.address), file, &self.target())
    }

    pub fn push(&self, path: &Path) -> Output {
        pgkeep(["wal-push", "--url", &format!("http://{}", self.address)]).arg(path).run()
    }

    /// What lies in the directory that clients write to, the store left out.
    pub fn left_behind(&self) -> Vec<String> {
        let entries = fs::read_dir(self.scratch.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "store").collect()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn fetch(url: &str, file: &str, target: &Path) -> Output {
    pgkeep(["wal-fetch", "--url", url, file]).arg(target).run()
}

/// A server that reads a request and answers every one with `answer`.
fn foreign_server(answer: impl Into<Vec<u8>>) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = answer.into();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&answer);
        }
    });
    url
}

#[test]
fn a_stored_file_arrives_whole_under_its_name() {
    let serving = Serving::start();
    serving.put_segment(3);
    serving.put(ObjectName::Wal("00000002.history".parse().unwrap()), HISTORY);
    for site in ["main", "-"] {
        let answer = serving.get(&format!("/{site}/archive/{}", segment(3)));
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-length"), Some("1048576"));
        assert!(answer.header("server").unwrap().starts_with("pgkeep/"));
        assert!(answer.body == segment_bytes(3));
    }
    let answer = http::head(serving.address, &format!("/main/xlog/{}", segment(3))).unwrap();
    assert_eq!((answer.status, answer.header("content-length")), (200, Some("1048576")));
    assert_eq!(serving.get("/main/timeline/00000002.history").text(), HISTORY);

    serving.fetch(&segment(3).to_string()).success();
    assert!(fs::read(serving.target()).unwrap() == segment_bytes(3));
    assert_eq!(serving.left_behind(), ["RECOVERYXLOG"]);
    let relative =
        pgkeep(["wal-fetch", "--url", &format!("http://{}", serving.address), "00000002.history", "x"]);
    relative.current_dir(serving.scratch.path()).run().success();
    assert_eq!(fs::read_to_string(serving.scratch.path().join("x")).unwrap(), HISTORY);
}

#[test]
fn missing_is_said_only_when_storage_says_so() {
    let serving = Serving::start();
    serving.put_segment(3);
    assert_eq!(serving.status_of(4), 404);
    serving.fetch(&segment(4).to_string()).expect_code(1);
    serving.fetch("00000007.history").expect_code(1);
    assert_eq!(serving.left_behind(), [""; 0]);
    // A store whose root is gone, as when it was not mounted, says nothing about its objects.
    fs::remove_dir_all(serving.scratch.path().join("store")).unwrap();
    for number in [3, 4] {
        assert_eq!(serving.status_of(number), 503);
        let answer = http::head(serving.address, &format!("/main/archive/{}", segment(number))).unwrap();
        assert_eq!(answer.status, 503);
    }
    let output = serving.fetch(&segment(4).to_string()).expect_code(200);
    assert!(output.stderr.contains("cannot fetch `000000010000000000000004`"), "{}", output.stderr);
    // An unknown site is no missing file.
    assert_eq!(serving.get(&format!("/other/archive/{}", segment(4))).status, 400);
    let url = format!("http://{}", serving.address);
    let output = pgkeep(["wal-fetch", "--site", "other", "--url", &url, "00000007.history", "/x/y"]).run();
    assert!(output.expect_code(200).stderr.contains("no site `other`"));
}

#[test]
fn a_damaged_object_never_arrives() {
    let serving = Serving::start();
    serving.put_segment(3);
    let stored = fs::read(serving.object(3)).unwrap();
    for at in [10, stored.len() / 2, stored.len() - 3] {
        let mut damaged = stored.clone();
        damaged[at] ^= 4;
        fs::write(serving.object(3), damaged).unwrap();
        // Seen at once, or when the head is out already and only breaking off is left.
        let answer = http::get(serving.address, &format!("/main/archive/{}", segment(3)));
        assert!(answer.map_or(true, |answer| answer.status == 503), "byte {at}");
    }
    fs::write(serving.object(3), &stored[..stored.len() - 100]).unwrap();
    serving.fetch(&segment(3).to_string()).expect_code(200);
    assert_eq!(serving.left_behind(), [""; 0]);
}

#[test]
fn an_object_in_the_place_of_another_is_not_served() {
    let serving = Serving::start();
    serving.put_segment(3);
    serving.put_segment(4);
    for suffix in ["", ".metadata"] {
        let place = |number| PathBuf::from(format!("{}{suffix}", serving.object(number).display()));
        fs::copy(place(4), place(3)).unwrap();
    }
    let answer = serving.get(&format!("/main/archive/{}", segment(3)));
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("is something else"), "{}", answer.text());
    assert_eq!(serving.status_of(4), 200);
}

#[test]
fn the_unfinished_segment_is_served_from_its_pieces_but_never_before_a_whole_one() {
    let serving = Serving::start();
    serving.put_piece(3, 0, 300_000);
    serving.put_piece(3, 200_000, 400_008);
    serving.fetch(&segment(3).to_string()).success();
    let mut expected = segment_bytes(3);
    expected[400_008..].fill(0);
    assert!(fs::read(serving.target()).unwrap() == expected);
    serving.put_segment(4);
    let answer = serving.get(&format!("/main/archive/{}", segment(3)));
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("WAL is missing"), "{}", answer.text());
    serving.put_segment(3);
    assert!(serving.get(&format!("/main/archive/{}", segment(3))).body == segment_bytes(3));
}

#[test]
fn nothing_but_a_plain_name_is_a_file() {
    let serving = Serving::start();
    serving.put_segment(3);
    let name = segment(3).to_string();
    for path in [
        format!("/main/archive/../archive/{name}"),
        format!("/main/archive/..%2farchive%2f{name}"),
        format!("/main/archive/{name}%00"),
        format!("/main/archive/{}", name.to_lowercase() + "x"),
        format!("/main//archive/{name}"),
        format!("/main/archive/{}", "0".repeat(5000)),
        "/main/archive/%2e%2e%2f%2e%2e%2fetc%2fpasswd".to_owned(),
        "/main/archive/pg_control".to_owned(),
        "/nowhere".to_owned(),
    ] {
        for method in ["GET", "HEAD", "PUT"] {
            let answer = http::request(serving.address, method, &path, &[], b"").unwrap();
            assert_eq!(answer.status, 400, "{method} {path}");
        }
    }
    assert_eq!(http::request(serving.address, "DELETE", "/", &[], b"").unwrap().status, 405);
}

#[test]
fn malformed_and_slow_clients_are_shown_the_door() {
    let limits = Limits { connections: 2, head_timeout: Duration::from_millis(700), ..Limits::default() };
    let serving = Serving::start_with(|deps| deps.limits = limits);
    serving.put_segment(3);
    for request in [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"garbage\r\n\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n".to_vec(),
        format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20)).into_bytes(),
        format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(500)).into_bytes(),
        format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000)).into_bytes(),
    ] {
        // It may hang up before everything is sent.
        if let Ok(answer) = http::raw(serving.address, &request) {
            assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        }
    }
    // Clients that hold every connection and send nothing more are gone after a while.
    let idle: Vec<TcpStream> = [&b""[..], b"GET / HT"]
        .map(|begin| {
            let mut stream = TcpStream::connect(serving.address).unwrap();
            stream.write_all(begin).unwrap();
            stream
        })
        .into();
    assert_eq!(serving.status_of(3), 200);
    drop(idle);
}

#[test]
fn a_client_that_stops_reading_holds_up_nobody_for_long() {
    let limits = Limits { fetches: 1, stall_timeout: Duration::from_millis(700), ..Limits::default() };
    let serving = Serving::start_with(|deps| deps.limits = limits);
    // More than the sockets' buffers take.
    let size = 64 << 20;
    let mut content = vec![0; size];
    content[..1 << 20].copy_from_slice(&segment_bytes(64));
    content[32..36].copy_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
    let large: SegmentName = "000000010000000000000001".parse().unwrap();
    serving.put(ObjectName::segment(large), content);
    let mut stuck = TcpStream::connect(serving.address).unwrap();
    write!(stuck, "GET /main/archive/{large} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut first = [0; 12];
    stuck.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    let begin = Instant::now();
    assert_eq!(serving.status_of(9), 404);
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn an_archived_file_is_never_replaced() {
    let serving = Serving::start();
    let path = format!("/main/archive/{}", segment(3));
    let content = segment_bytes(3);
    assert_eq!(http::put(serving.address, &path, &content).unwrap().status, 201);
    assert_eq!(http::put(serving.address, &path, &content).unwrap().status, 200);
    let mut other = content.clone();
    other[700_000] ^= 1;
    let answer = http::put(serving.address, &path, &other).unwrap();
    assert_eq!(answer.status, 409);
    assert!(answer.text().contains("other content"), "{}", answer.text());
    assert!(serving.get(&path).body == content);

    let file = serving.scratch.write(&segment(3).to_string(), &content);
    serving.push(&file).success();
    fs::write(&file, &other).unwrap();
    let output = serving.push(&file).expect_code(1);
    assert!(output.stderr.contains("REFUSED"), "{}", output.stderr);
    assert!(serving.get(&path).body == content);
}

#[test]
fn what_is_not_what_its_name_says_is_not_archived() {
    let serving = Serving::start();
    let put = |name: &str, content: &[u8]| {
        http::put(serving.address, &format!("/main/archive/{name}"), content).unwrap().status
    };
    let name = segment(4).to_string();
    assert_eq!(put(&name, &segment_bytes(3)), 412);
    assert_eq!(put(&name, &segment_bytes(4)[..100_000]), 400);
    assert_eq!(put("00000002.history", b"gibberish"), 412);
    assert_eq!(put("00000002.history", HISTORY.as_bytes()), 201);
    let chunked = [("transfer-encoding", "chunked")];
    let answer =
        http::request(serving.address, "POST", &format!("/main/archive/{name}"), &chunked, b"").unwrap();
    assert_eq!(answer.status, 405);
    // Without a body the file would be read here, where this site has no data directory.
    assert_eq!(put(&name, b""), 400);
    let output = serving.push(&serving.scratch.write("notes.txt", "x")).expect_code(1);
    assert!(output.stderr.contains("`notes.txt` is not the name"), "{}", output.stderr);
    let listed = serving.runtime.block_on(serving.repository.list(Folder::Segments, None)).unwrap();
    assert_eq!(listed, []);
}

#[test]
fn a_body_that_breaks_off_stores_nothing() {
    let serving = Serving::start();
    let content = segment_bytes(3);
    let mut stream = TcpStream::connect(serving.address).unwrap();
    let head =
        format!("PUT /main/archive/{} HTTP/1.1\r\nhost: x\r\ncontent-length: 1048576\r\n\r\n", segment(3));
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&content[..700_000]).unwrap();
    drop(stream);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(serving.status_of(3), 404);
    // And the place in the queue is free again.
    let path = format!("/main/archive/{}", segment(3));
    assert_eq!(http::put(serving.address, &path, &content).unwrap().status, 201);
}

#[test]
fn wal_fetch_believes_no_stranger_and_leaves_no_half_file() {
    let scratch = Scratch::new();
    let target = scratch.path().join("RECOVERYXLOG");
    let name = segment(3).to_string();
    let content = segment_bytes(3);
    let with_body = |server: &str, length: usize, body: &[u8]| {
        let mut answer = format!("HTTP/1.1 200 OK\r\n{server}content-length: {length}\r\n\r\n").into_bytes();
        answer.extend_from_slice(body);
        answer
    };
    let agent = "server: pgkeep/9\r\n";
    for answer in [
        b"HTTP/1.1 404 Not Found\r\nserver: nginx\r\ncontent-length: 0\r\n\r\n".to_vec(),
        b"HTTP/1.0 404 File not found\r\nServer: SimpleHTTP/0.6 Python/3.11\r\n\r\n".to_vec(),
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_vec(),
        b"HTTP/1.1 404 Not Found\r\nserver: pgkeep/9\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
        b"HTTP/1.1 500 Oops\r\nserver: pgkeep/9\r\ncontent-length: 0\r\n\r\n".to_vec(),
        b"rubbish\r\n\r\n".to_vec(),
        with_body("", content.len(), &content),
        with_body(agent, content.len(), &segment_bytes(4)),
        with_body(agent, 8192, &content[..8192]),
        with_body(agent, 8192, &content[..8200]),
    ] {
        let output = fetch(&foreign_server(answer.clone()), &name, &target).expect_code(200);
        assert!(!target.exists());
        assert!(output.stderr.contains(&name), "{}", output.stderr);
    }
    let cut = foreign_server(with_body(agent, content.len(), &content[..700_000]));
    fetch(&cut, &name, &target).expect_code(200);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    // Nobody there at all: asked again for a few seconds.
    let output = fetch(&format!("http://127.0.0.1:{}", free_port()), &name, &target).expect_code(200);
    assert!(output.elapsed > Duration::from_secs(3) && output.elapsed < Duration::from_secs(10));
    assert!(output.stderr.contains("hint: start the agent"), "{}", output.stderr);
}

#[test]
fn no_mistake_in_a_restore_command_ends_a_recovery() {
    let serving = Serving::start();
    serving.put_segment(3);
    let name = segment(3).to_string();
    let url = format!("http://{}", serving.address);
    for arguments in [
        vec!["wal-fetch"],
        vec!["wal-fetch", &name],
        vec!["wal-fetch", "--nonsense", &name, "x"],
        vec!["wal-fetch", "--url", "nonsense", &name, "x"],
        vec!["wal-fetch", "--url", "https://127.0.0.1", &name, "x"],
        vec!["wal-fetch", "--url", &url, "RECOVERYXLOG", "/tmp/x"],
        vec!["wal-fetch", "--url", &url, &name, "/nonexistent/x"],
        vec!["wal-fetch", "--url", &url, &name, "/"],
        vec!["wal-fetch", "--url", &url, &name, "/proc/x"],
        vec!["wal-fech", &name, "pg_wal/RECOVERYXLOG"],
    ] {
        let output = pgkeep(&arguments).run();
        assert_eq!(output.code, 200, "{arguments:?}: {}", output.stderr);
    }
    let output = pgkeep(["wal-push", "--nonsense"]).run();
    assert_eq!(output.code, 1);
}

#[test]
fn without_an_agent_storage_is_asked() {
    let serving = Serving::start();
    serving.put_segment(3);
    let storage = format!("file://{}", serving.scratch.path().join("store").display());
    // The server of this test runs as another user.
    give_tree(&serving.scratch.path().join("store"));
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let unavailable = foreign_server("HTTP/1.1 503 x\r\nserver: pgkeep/9\r\ncontent-length: 0\r\n\r\n");
    let target = serving.target();
    let fetch = |url: &str, storage: &str, number: u64| {
        pgkeep(["wal-fetch", "--url", url, &segment(number).to_string()])
            .arg(&target)
            .env("PGKEEP_STORAGE", storage)
            .env("PGKEEP_SITE", "main")
            .run()
    };
    for url in [&nobody, &unavailable] {
        let output = fetch(url, &storage, 3).success();
        assert!(output.elapsed < Duration::from_secs(5));
        assert!(fs::read(&target).unwrap() == segment_bytes(3));
        fs::remove_file(&target).unwrap();
        fetch(url, &storage, 4).expect_code(1);
        fetch(url, "file:///nonexistent", 4).expect_code(200);
        fetch(url, "nonsense", 4).expect_code(200);
    }
    let push = |content: &[u8]| {
        let file = serving.scratch.write(&segment(5).to_string(), content);
        pgkeep(["wal-push", "--url", &nobody])
            .arg(file)
            .env("PGKEEP_STORAGE", &storage)
            .env("PGKEEP_SITE", "main")
            .run()
    };
    push(&segment_bytes(5)).success();
    push(&segment_bytes(5)).success();
    let mut other = segment_bytes(5);
    other[9000] ^= 1;
    assert!(push(&other).expect_code(1).stderr.contains("REFUSED"));
    push(&segment_bytes(6)).expect_code(1);
    assert!(serving.get(&format!("/main/archive/{}", segment(5))).body == segment_bytes(5));
}

#[test]
fn files_are_written_and_read_only_within_the_data_directory() {
    let data = Scratch::new();
    let wal = data.path().join("pg_wal");
    fs::create_dir(&wal).unwrap();
    let serving = Serving::start_with(|deps| deps.sites[0].data_directory = Some(data.path().to_owned()));
    serving.put_segment(3);
    let get = |number: u64, target: &Path| {
        let target = target.to_str().unwrap();
        let headers = [("x-pghoard-target-path", target)];
        http::request(serving.address, "GET", &format!("/main/archive/{}", segment(number)), &headers, b"")
            .unwrap()
            .status
    };
    assert_eq!(get(3, &wal.join("RECOVERYXLOG")), 201);
    assert!(fs::read(wal.join("RECOVERYXLOG")).unwrap() == segment_bytes(3));
    assert_eq!(get(4, &wal.join("RECOVERYXLOG4")), 404);
    for target in [serving.target(), wal.join("../../x"), PathBuf::from("relative"), wal.join("..")] {
        assert_eq!(get(3, &target), 400, "{}", target.display());
    }
    assert_eq!(get(3, &wal.join("missing/x")), 409);
    fs::remove_file(wal.join("RECOVERYXLOG")).unwrap();
    // A damaged object is not written either.
    let stored = fs::read(serving.object(3)).unwrap();
    fs::write(serving.object(3), &stored[..stored.len() - 10]).unwrap();
    assert_eq!(get(3, &wal.join("RECOVERYXLOG")), 503);
    assert_eq!(fs::read_dir(&wal).unwrap().count(), 0);

    let put = |name: &str| {
        http::request(serving.address, "PUT", &format!("/main/archive/{name}"), &[], b"").unwrap().status
    };
    fs::write(wal.join(segment(5).to_string()), segment_bytes(5)).unwrap();
    std::os::unix::fs::symlink(wal.join(segment(5).to_string()), wal.join(segment(6).to_string())).unwrap();
    assert_eq!(put(&segment(5).to_string()), 201);
    // PGHoard's clients know no other success.
    assert_eq!(put(&segment(5).to_string()), 201);
    assert_eq!(put(&segment(6).to_string()), 404);
    assert_eq!(put("00000002.history"), 404);
    assert!(serving.get(&format!("/main/archive/{}", segment(5))).body == segment_bytes(5));
}

#[test]
fn whoever_must_log_in_must_log_in() {
    let serving = Serving::start_with(|deps| {
        deps.credentials = Some(("agent".to_owned(), Secret::new("hunter2".to_owned())));
    });
    serving.put_segment(3);
    let path = format!("/main/archive/{}", segment(3));
    let answer = serving.get(&path);
    assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Basic realm=\"pghoard\"")));
    let with = |value: &str| {
        http::request(serving.address, "GET", &path, &[("authorization", value)], b"").unwrap().status
    };
    assert_eq!(with("Basic YWdlbnQ6aHVudGVyMg=="), 200);
    assert_eq!(with("basic YWdlbnQ6aHVudGVyMg=="), 200);
    assert_eq!(with("Basic YWdlbnQ6aHVudGVyMw=="), 401);
    assert_eq!(with("Bearer YWdlbnQ6aHVudGVyMg=="), 401);
    assert_eq!(with("x"), 401);
    assert_eq!(serving.get("/status").status, 401);
    assert_eq!(serving.get("/healthz").status, 200);
    serving.fetch(&segment(3).to_string()).expect_code(200);
    let command = || {
        let url = format!("http://{}", serving.address);
        pgkeep(["wal-fetch", "--url", &url, &segment(3).to_string()]).arg(serving.target())
    };
    command().env("PGKEEP_HTTP_USERNAME", "agent").env("PGKEEP_HTTP_PASSWORD", "hunter2").run().success();
    let output = command().env("PGKEEP_HTTP_USERNAME", "agent").env("PGKEEP_HTTP_PASSWORD", "hunter3").run();
    assert!(!output.expect_code(200).stderr.contains("hunter"));
}

#[test]
fn probes_and_status_answer() {
    let serving = Serving::start();
    assert_eq!(serving.get("/").status, 200);
    assert_eq!(serving.get("/healthz").status, 200);
    let ready = serving.get("/readyz");
    assert_eq!((ready.status, ready.text().as_str()), (503, "not yet\n"));
    let status = serving.get("/status");
    assert_eq!(status.header("content-type"), Some("application/json"));
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&status.body).unwrap()["site"], "main");
}

#[test]
fn several_sites_must_be_told_apart() {
    let serving = Serving::start_with(|deps| {
        let first = &deps.sites[0];
        let second = Site::new("second", first.repository.clone());
        deps.sites.push(second);
    });
    serving.put_segment(3);
    assert_eq!(serving.get(&format!("/-/archive/{}", segment(3))).status, 400);
    assert_eq!(serving.get(&format!("/second/archive/{}", segment(3))).status, 200);
    let file: WalFileName = segment(3).to_string().parse().unwrap();
    serving.fetch(&file.to_string()).expect_code(200);
}
