//! PGHoard's HTTP: its routes and answers, asked by hand and by its own clients.
#![expect(clippy::unwrap_used, reason = "the fixture is part of the tests")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pgkeep::postgres::WalFileName;
use pgkeep::repository::ObjectName;
use pgkeep::secret::Secret;

use crate::binary::{Output, program};
use crate::http::{self, Response};
use crate::process::{self, Scratch, give_tree};
use crate::serve::{Serving, segment, segment_bytes};

/// A server with a data directory whose WAL directory is a link to another place.
struct Beside {
    serving: Serving,
    data: PathBuf,
    wal: PathBuf,
    requests: Arc<AtomicU32>,
    _scratch: Scratch,
}

impl Beside {
    fn start() -> Self {
        Self::start_with(0, |_| {})
    }

    fn start_with(read_ahead: usize, prepare: impl FnOnce(&Path)) -> Self {
        let scratch = Scratch::new();
        let base = scratch.path().canonicalize().unwrap();
        let (data, wal) = (scratch.directory("data"), scratch.directory("wal"));
        symlink(&wal, data.join("pg_wal")).unwrap();
        prepare(&wal);
        give_tree(&base);
        let requests = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&requests);
        let directory = data.clone();
        let serving = Serving::start_with(move |deps| {
            let site = &mut deps.sites[0];
            site.data_directory = Some(directory);
            site.read_ahead = read_ahead;
            site.request_backup = Arc::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
        });
        Self { serving, data, wal, requests, _scratch: scratch }
    }

    fn ask(&self, method: &str, path: &str, target: Option<&str>) -> Response {
        let header: Vec<(&str, &str)> =
            target.map(|path| ("x-pghoard-target-path", path)).into_iter().collect();
        http::request(self.serving.address, method, path, &header, &[]).unwrap()
    }

    /// As PGHoard's clients ask for a file.
    fn get(&self, file: &str, target: &str) -> u16 {
        self.ask("GET", &format!("/main/archive/{file}"), Some(target)).status
    }

    fn put(&self, file: &str) -> Response {
        self.ask("PUT", &format!("/main/archive/{file}"), None)
    }

    /// Where PostgreSQL wants a file.
    fn recovery_file(&self) -> PathBuf {
        self.data.join("pg_wal/RECOVERYXLOG")
    }

    fn fetch(&self, number: u64) -> u16 {
        self.get(&segment(number).to_string(), self.recovery_file().to_str().unwrap())
    }

    fn ready(&self, number: u64) -> PathBuf {
        self.wal.join(format!("{}.pghoard.prefetch", segment(number)))
    }

    fn in_wal_directory(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.wal).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// PGHoard's own client, beside the server.
    fn client(&self, arguments: &[&str]) -> Output {
        let port = self.serving.address.port().to_string();
        program(&pghoard_bin("pghoard_postgres_command"), ["--port", &port, "--site", "main"])
            .args(arguments)
            .current_dir(&self.data)
            .run()
    }
}

/// Whether PGHoard itself is there. Its source may be out of reach (`scripts/install-pghoard`); whoever asks then
/// leaves out what needs it, and it is printed that they do.
pub fn pghoard_is_installed() -> bool {
    let installed = process::cache().join("pghoard/package").exists();
    if !installed {
        process::skipped(
            "PGHoard is not installed (PGHOARD_SOURCE names a checkout for scripts/install-pghoard)",
        );
    }
    installed
}

/// One of PGHoard's own programs; `scripts/install-pghoard` puts them there.
pub fn pghoard_bin(name: &str) -> PathBuf {
    let path = process::cache().join("pghoard/bin").join(name);
    assert!(path.exists(), "{} is missing; scripts/install-pghoard installs PGHoard", path.display());
    path
}

#[test]
fn pages_about_base_backups_are_pghoards() {
    let beside = Beside::start();
    let list = beside.ask("GET", "/main/basebackup", None);
    assert_eq!((list.status, list.header("content-type")), (200, Some("application/json")));
    assert_eq!(list.text(), "{\n    \"basebackups\": []\n}");
    for path in ["/main/archive/basebackup", "/main/basebackup"] {
        let answer = beside.ask("PUT", path, None);
        assert_eq!((answer.status, answer.header("content-length")), (201, Some("0")), "{path}");
    }
    assert_eq!(beside.requests.load(Ordering::Relaxed), 2);
    assert_eq!(beside.ask("GET", "/main/status", None).status, 501);
    for (method, path) in [
        ("GET", "/other/basebackup"),
        ("PUT", "/other/basebackup"),
        ("GET", "/other/status"),
        ("PUT", "/other/archive/000000010000000000000003"),
        ("HEAD", "/other/archive/000000010000000000000003"),
    ] {
        assert_eq!(beside.ask(method, path, None).status, 404, "{method} {path}");
    }
    // Asked for as PGHoard's clients do, the answer is PGHoard's; asked for as ours do, it ends no recovery.
    let target = beside.recovery_file();
    let path = "/other/archive/000000010000000000000003";
    let answer = beside.ask("GET", path, target.to_str());
    assert_eq!(answer.status, 404);
    assert!(answer.text().starts_with("Site: 'other' not found"), "{}", answer.text());
    assert_eq!(beside.ask("GET", path, None).status, 400);
}

#[test]
fn a_file_goes_to_its_target_and_nowhere_else() {
    let beside = Beside::start();
    beside.serving.put_segment(3);
    assert_eq!(beside.fetch(3), 201);
    assert_eq!(fs::read(beside.wal.join("RECOVERYXLOG")).unwrap(), segment_bytes(3));
    let name = segment(3).to_string();
    let data = beside.data.to_str().unwrap();
    for (target, status) in [
        ("pg_wal/RECOVERYXLOG".to_owned(), 400),
        ("/tmp/RECOVERYXLOG".to_owned(), 400),
        (format!("{data}/../outside"), 400),
        (format!("{data}/missing/file"), 409),
        (format!("{data}/pg_wal/x"), 201),
        (format!("{}/y", beside.wal.display()), 201),
    ] {
        assert_eq!(beside.get(&name, &target), status, "{target}");
    }
    assert_eq!(beside.fetch(4), 404);
    assert_eq!(beside.ask("HEAD", &format!("/main/archive/{name}"), Some("/x")).status, 400);
    assert_eq!(beside.ask("HEAD", &format!("/main/xlog/{name}"), None).status, 200);
    assert_eq!(beside.ask("HEAD", &format!("/main/archive/{}", segment(4)), None).status, 404);
}

#[test]
fn a_put_without_a_body_takes_the_servers_own_file() {
    let beside = Beside::start();
    let name = |number| segment(number).to_string();
    for (file, content) in [
        (name(3), segment_bytes(3)),
        (name(4), segment_bytes(5)),
        (name(6), segment_bytes(6)[..500_000].to_vec()),
        (format!("{}.partial", name(7)), segment_bytes(7)),
        ("00000002.history".to_owned(), b"1\t0/500000\tno recovery target specified\n".to_vec()),
    ] {
        fs::write(beside.wal.join(file), content).unwrap();
    }
    symlink(beside.wal.join(name(3)), beside.wal.join(name(8))).unwrap();
    for (file, status) in [
        (name(3), 201),
        // PGHoard's clients know no other success.
        (name(3), 201),
        (name(4), 412),
        (name(6), 412),
        (format!("{}.partial", name(7)), 201),
        ("00000002.history".to_owned(), 201),
        (name(8), 404),
        (name(9), 404),
        ("nonsense".to_owned(), 400),
    ] {
        assert_eq!(beside.put(&file).status, status, "{file}");
    }
    assert!(beside.put(&name(9)).text().starts_with("N/A"));
    let mut other = segment_bytes(3);
    other[500_000] ^= 1;
    fs::write(beside.wal.join(name(3)), other).unwrap();
    assert_eq!(beside.put(&name(3)).status, 409);
    let stored = ObjectName::Wal(WalFileName::Segment(segment(3)));
    assert_eq!(beside.serving.content(stored), segment_bytes(3));
}

#[test]
fn every_request_needs_the_password_and_is_told_the_realm() {
    let serving = Serving::start_with(|deps| {
        deps.credentials = Some(("pghoard".to_owned(), Secret::new("s3cret".to_owned())));
    });
    serving.put_segment(3);
    let path = format!("/main/archive/{}", segment(3));
    let refused = http::request(serving.address, "GET", &path, &[], &[]).unwrap();
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Basic realm=\"pghoard\"")));
    assert_eq!(refused.text().trim_end(), "Authentication required");
    let given = [("authorization", "Basic cGdob2FyZDpzM2NyZXQ=")];
    assert_eq!(http::request(serving.address, "HEAD", &path, &given, &[]).unwrap().status, 200);
}

#[test]
fn what_lies_ready_is_taken_when_it_is_right_and_cleaned_up() {
    let beside = Beside::start_with(0, |wal| {
        fs::write(wal.join(format!("{}.x1y2.pghoard.tmp", segment(3))), b"half").unwrap();
        fs::write(wal.join(segment(1).to_string()), segment_bytes(1)).unwrap();
    });
    let cleaned = process::poll(Duration::from_secs(10), || {
        (beside.in_wal_directory() == [segment(1).to_string()]).then_some(())
    });
    assert!(cleaned.is_some(), "at the start: {:?}", beside.in_wal_directory());
    // Right, and not in the archive: only PGHoard can have put it there.
    fs::write(beside.ready(3), segment_bytes(3)).unwrap();
    assert_eq!(beside.fetch(3), 201);
    assert_eq!(fs::read(beside.wal.join("RECOVERYXLOG")).unwrap(), segment_bytes(3));
    // Not what its name says, cut short, and not what the archive has.
    let mut flipped = segment_bytes(4);
    flipped[600_000] ^= 1;
    for wrong in [segment_bytes(5), segment_bytes(4)[..600_000].to_vec(), flipped] {
        fs::write(beside.ready(4), &wrong).unwrap();
        beside.serving.put_segment(4);
        assert_eq!(beside.fetch(4), 201);
        assert!(fs::read(beside.wal.join("RECOVERYXLOG")).unwrap() == segment_bytes(4));
        assert!(!beside.ready(4).exists());
    }
    // Wrong, and nothing to put in its place.
    fs::write(beside.ready(9), segment_bytes(8)).unwrap();
    assert_eq!(beside.fetch(9), 404);
    assert!(!beside.ready(9).exists());
}

#[test]
fn the_next_segments_lie_ready_before_they_are_asked_for() {
    let beside = Beside::start_with(3, |_| {});
    for number in 253..260 {
        beside.serving.put_segment(number);
    }
    beside.serving.put_piece(260, 0, 100_000);
    assert_eq!(beside.fetch(253), 201);
    let lie_ready = |numbers: &[u64]| {
        let done = process::poll(Duration::from_secs(20), || {
            numbers.iter().all(|number| beside.ready(*number).exists()).then_some(())
        });
        assert!(done.is_some(), "{numbers:?}: {:?}", beside.in_wal_directory());
    };
    lie_ready(&[254, 255, 256]);
    assert!(!beside.ready(257).exists(), "no more than asked for");
    for number in [254, 255, 256] {
        assert!(fs::read(beside.ready(number)).unwrap() == segment_bytes(number));
    }
    // PGHoard's client takes a file without a word, and the next one follows.
    fs::rename(beside.ready(254), beside.recovery_file()).unwrap();
    lie_ready(&[257]);
    assert_eq!(beside.fetch(255), 201);
    assert!(!beside.ready(255).exists());
    assert_eq!(beside.fetch(256), 201);
    assert_eq!(beside.fetch(257), 201);
    assert_eq!(fs::read(beside.recovery_file()).unwrap(), segment_bytes(257));
    lie_ready(&[258, 259]);
    // What is there in pieces still grows.
    assert_eq!(beside.fetch(258), 201);
    assert_eq!(beside.fetch(259), 201);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(beside.in_wal_directory(), ["RECOVERYXLOG"]);
}

#[test]
fn a_reader_that_goes_elsewhere_leaves_nothing_behind() {
    let beside = Beside::start_with(2, |_| {});
    for number in 3..9 {
        beside.serving.put_segment(number);
    }
    assert_eq!(beside.fetch(6), 201);
    let ready = process::poll(Duration::from_secs(20), || {
        (beside.ready(7).exists() && beside.ready(8).exists()).then_some(())
    });
    assert!(ready.is_some());
    // As pg_rewind does.
    assert_eq!(beside.fetch(5), 201);
    assert_eq!(beside.fetch(4), 201);
    let gone = process::poll(Duration::from_secs(20), || {
        (beside.in_wal_directory() == ["RECOVERYXLOG"]).then_some(())
    });
    assert!(gone.is_some(), "{:?}", beside.in_wal_directory());
}

#[test]
fn pghoards_own_client_archives_and_restores() {
    if !pghoard_is_installed() {
        return;
    }
    let beside = Beside::start_with(2, |wal| {
        fs::write(wal.join(segment(3).to_string()), segment_bytes(3)).unwrap();
    });
    let name = |number| segment(number).to_string();
    beside.client(&["--mode", "archive", "--xlog", &name(3)]).expect_code(0);
    beside.client(&["--mode", "archive", "--xlog", &name(3)]).expect_code(0);
    beside.client(&["--mode", "archive", "--xlog", &name(4)]).expect_code(3);
    for number in 4..7 {
        beside.serving.put_segment(number);
    }
    let restore = |number| {
        beside.client(&["--mode", "restore", "--output", "pg_wal/RECOVERYXLOG", "--xlog", &name(number)])
    };
    restore(3).expect_code(0);
    assert_eq!(fs::read(beside.recovery_file()).unwrap(), segment_bytes(3));
    let ready = process::poll(Duration::from_secs(20), || beside.ready(5).exists().then_some(()));
    assert!(ready.is_some());
    for number in 4..7 {
        restore(number).expect_code(0);
        assert_eq!(fs::read(beside.recovery_file()).unwrap(), segment_bytes(number));
    }
    restore(7).expect_code(4);
    beside.client(&["--mode", "restore", "--xlog", &name(3)]).expect_code(0);
}

#[test]
fn the_go_client_and_curl_get_what_they_expect() {
    let beside = Beside::start();
    beside.serving.put_segment(3);
    let target = beside.recovery_file();
    // As Go's net/http writes it.
    let request = format!(
        "GET /main/archive/{} HTTP/1.1\r\nHost: {}\r\nUser-Agent: Go-http-client/1.1\r\nAuthorization: Basic Og==\r\n\
         X-Pghoard-Target-Path: {}\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n",
        segment(3),
        beside.serving.address,
        target.display()
    );
    let answer = String::from_utf8(http::raw(beside.serving.address, request.as_bytes()).unwrap()).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201 Created\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
    assert_eq!(fs::read(&target).unwrap(), segment_bytes(3));

    fs::write(beside.wal.join(segment(4).to_string()), segment_bytes(4)).unwrap();
    let url = format!("http://{}/main/archive/{}", beside.serving.address, segment(4));
    let curl = ["-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PUT"];
    let told = std::process::Command::new("curl").args(curl).arg(&url).output().unwrap();
    assert_eq!(String::from_utf8(told.stdout).unwrap(), "201");
    let header = format!("x-pghoard-target-path: {}", target.display());
    let curl = ["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", &header];
    let told = std::process::Command::new("curl").args(curl).arg(&url).output().unwrap();
    assert_eq!(String::from_utf8(told.stdout).unwrap(), "201");
    assert_eq!(fs::read(&target).unwrap(), segment_bytes(4));
}
