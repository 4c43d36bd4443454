//! How long PostgreSQL waits for one segment during recovery: `wal-fetch` through the agent, beside what
//! nobody can avoid (starting a process, decoding, syncing the file).
//!
//! `cargo bench --bench wal_fetch [-- DIRECTORY]`; the directory is where the store and the target lie.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a bench prints and may fail")]

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgkeep::codec::{Compression, Decoder, Expected as Content};
use pgkeep::postgres::SegmentName;
use pgkeep::repository::{Facts, ObjectName, Repository, Settings};
use pgkeep::serve::{Deps, Limits, Site, run};
use pgkeep::storage::{self, Access, StorageConfig};
use tokio_util::sync::CancellationToken;

const SEGMENT_BYTES: usize = 16 << 20;
const ROUNDS: usize = 41;

/// A segment of 16 MiB that compresses to about a third, as WAL of pgbench does.
fn segment_bytes() -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = Vec::with_capacity(SEGMENT_BYTES + 64);
    while bytes.len() < SEGMENT_BYTES {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(b"\x7f\x06\0\0\x40\x40\0\0a heap tuple\0\0\0\0");
    }
    bytes.truncate(SEGMENT_BYTES);
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &0xD110_u16.to_le_bytes());
    put(2, &2_u16.to_le_bytes());
    put(4, &1_u32.to_le_bytes());
    put(8, &(3_u64 << 24).to_le_bytes());
    put(32, &(16_u32 << 20).to_le_bytes());
    put(36, &8192_u32.to_le_bytes());
    bytes
}

fn median(name: &str, mut round: impl FnMut()) {
    round();
    let mut times: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let begin = Instant::now();
            round();
            begin.elapsed()
        })
        .collect();
    times.sort();
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    println!("{name:<58} {:7.2} ms   (best {:.2})", millis(times[ROUNDS / 2]), millis(times[0]));
}

fn command(program: &Path, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{} {arguments:?}", program.display());
}

fn main() {
    let place = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let scratch = match place {
        Some(place) => tempfile::tempdir_in(place),
        None => tempfile::tempdir(),
    };
    let scratch = scratch.unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let config = StorageConfig::Local { directory: scratch.path().join("store") };
    let store = runtime.block_on(storage::open(&config, Access::Write)).unwrap();
    let settings = Settings { compression: Compression::Zstd, level: 3, ..Settings::default() };
    let repository = Repository::new(store, "main", settings);
    let segment: SegmentName = "000000010000000000000003".parse().unwrap();
    let name = ObjectName::segment(segment);
    let content = segment_bytes();
    runtime.block_on(repository.put(name, content.clone().into(), Facts::default())).unwrap();

    let site = Site::new("main", tokio::sync::watch::channel(Some(repository.clone())).1);
    let deps = Deps {
        sites: vec![site],
        status: Arc::new(|| serde_json::Value::Null),
        metrics: Arc::new(String::new),
        ready: Arc::new(|| Ok(())),
        credentials: None,
        limits: Limits::default(),
    };
    let cancel = CancellationToken::new();
    let listener = runtime.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = runtime.spawn(run(listener, deps, cancel.clone()));

    let pgkeep = PathBuf::from(env!("CARGO_BIN_EXE_pgkeep"));
    let stored = fs::read(scratch.path().join(format!("store/main/xlog/{segment}"))).unwrap();
    println!("segment of {SEGMENT_BYTES} bytes, stored as {}; medians of {ROUNDS}", stored.len());
    median("start a process (/bin/true)", || command(Path::new("/bin/true"), &[]));
    median("pgkeep --help", || command(&pgkeep, &["--help"]));
    median("decode, digest included, from memory", || {
        let mut decoder = Decoder::new(Compression::Zstd, Content::default());
        let mut plaintext = Vec::with_capacity(1 << 20);
        let mut input = &stored[..];
        while !input.is_empty() || decoder.has_more() {
            plaintext.clear();
            decoder.push(&mut input, 512 << 10, &mut plaintext).unwrap();
        }
        decoder.finish().unwrap();
    });
    median("read through the repository", || {
        runtime.block_on(async {
            let mut reader = repository.read(name).await.unwrap();
            while reader.next().await.unwrap().is_some() {}
        });
    });
    let target = scratch.path().join("RECOVERYXLOG");
    median("write 16 MiB to a file", || fs::write(&target, &content).unwrap());
    median("write 16 MiB to a file and sync it", || {
        fs::write(&target, &content).unwrap();
        fs::File::open(&target).unwrap().sync_data().unwrap();
    });
    let (file, path) = (segment.to_string(), target.to_str().unwrap());
    median("wal-fetch through the agent, from exec to exit", || {
        fs::remove_file(path).ok();
        command(&pgkeep, &["wal-fetch", "--url", &url, &file, path]);
    });
    assert!(fs::read(&target).unwrap() == content);
    median("wal-fetch without an agent, from exec to exit", || {
        fs::remove_file(path).ok();
        let storage = format!("file://{}", scratch.path().join("store").display());
        let status = Command::new(&pgkeep)
            .args(["wal-fetch", "--url", "http://127.0.0.1:1", &file, path])
            .envs([("PGKEEP_STORAGE", storage.as_str()), ("PGKEEP_SITE", "main")])
            .status();
        assert!(status.unwrap().success());
    });
    cancel.cancel();
    runtime.block_on(server).unwrap().unwrap();
}
