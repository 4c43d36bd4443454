//! Encryption on a real server: what a host with the public key only can do, what it takes to restore, and
//! that nothing tampered with is ever restored.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgkeep::codec::{HashAlgorithm, KeyId, KeyRing, NewKeyPair};
use pgkeep::postgres::SegmentName;
use pgkeep::repository::{Error, Facts, ObjectName, Outcome, Repository, Settings};
use pgkeep::storage::Store;
use serde_json::{Value, json};

use crate::archiving::NO_AGENT;
use crate::binary::{Agent, Output, pgkeep};
use crate::process::cache;
use crate::server::{Server, for_each_major, majors};
use crate::site::Site;

/// Text that compression leaves as it is where it stands first.
const MARK: &str = "Zq7-not-to-be-seen-4Jx";

fn one_major() -> u32 {
    let majors = majors();
    if majors.contains(&17) { 17 } else { majors[0] }
}

/// A site with a table, and segments of 1 MiB. Snappy leaves text readable that is stored without encryption.
fn site_of(major: u32, algorithm: &str) -> Site {
    let mut site = Site::of(Server::builder(major).segment_size_mib(1).start());
    site.server.sql("create table steps (n int, t text)");
    step(&site.server, 1);
    site.configuration["compression"] = json!({ "algorithm": algorithm });
    site.set("wal_flush_interval", json!("100ms"));
    site
}

fn step(server: &Server, n: u32) {
    server.sql(&format!("insert into steps values ({n}, '{MARK} {n}')"));
}

fn steps(server: &Server) -> String {
    server.value("select coalesce(string_agg(n::text, ' ' order by n), '') from steps")
}

fn wait_streaming(server: &Server) {
    server.wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "1");
}

/// Gives the site the parts of a key called `name`, to write with.
fn give_key(site: &mut Site, name: &str, public: Option<&str>, private: Option<&str>) {
    let parts = json!({ "public": public, "private": private });
    site.set("encryption_keys", json!({ name: parts }));
    site.set("encryption_key_id", if public.is_some() { json!(name) } else { Value::Null });
}

/// Objects that show the mark.
fn readable(site: &Site) -> Vec<String> {
    let objects = site.objects("").into_iter();
    let shows =
        |path: &Path| fs::read(path).unwrap().windows(MARK.len()).any(|bytes| bytes == MARK.as_bytes());
    objects.filter(|path| shows(path)).map(|path| path.display().to_string()).collect()
}

fn fetch(site: &Site, url: &str, name: &str, into: &str) -> Output {
    pgkeep(["wal-fetch", "--url", url, "--config"])
        .arg(site.config_file())
        .arg(name)
        .arg(site.directory(into))
        .run()
}

#[test]
fn a_backup_host_has_the_public_key_only_and_a_restore_needs_the_private_one() {
    for_each_major(public_key_only);
}

fn public_key_only(major: u32) {
    let pair = NewKeyPair::generate();
    let mut site = site_of(major, "snappy");

    // The mark is one that can be found.
    let mut agent = site.agent();
    wait_streaming(&site.server);
    site.backup();
    site.server.switch_segment();
    Site::wait_archived(&site.server);
    agent.terminate();
    assert!(!readable(&site).is_empty(), "the mark is hidden without encryption, too");
    fs::remove_dir_all(site.archive().join("main")).unwrap();

    give_key(&mut site, "k1", Some(&pair.public), None);
    let mut agent = site.agent();
    wait_streaming(&site.server);
    step(&site.server, 2);
    let backup = site.backup();
    step(&site.server, 3);
    let whole = site.server.switch_segment();
    step(&site.server, 4);
    Site::wait_archived(&site.server);
    // Stopped within a segment whose beginning is stored in pieces, it goes on without opening them.
    agent.kill();
    assert!(!site.objects("xlog_partial/").is_empty());
    step(&site.server, 5);
    agent.start_again();
    wait_streaming(&site.server);
    step(&site.server, 6);
    Site::wait_archived(&site.server);
    assert_eq!(agent.status()["sites"][0]["archiving"]["last_error"], Value::Null, "{}", agent.status());

    // Everything but a restore works, and nothing shows.
    let backups = site.backups();
    assert_eq!(backups[0]["name"], json!(backup));
    assert_eq!(backups[0]["keys"][0]["key_id"], json!("k1"));
    assert!(site.run(&["list"]).success().stdout.contains("key k1"));
    site.run(&["prune", "--dry-run"]).success();
    pgkeep(["status", "--json", "--config"]).arg(agent.config_file()).run().success();
    assert_eq!(readable(&site), Vec::<String>::new());

    let private = "the private part of the encryption key `k1` is not configured";
    for url in [agent.url().as_str(), NO_AGENT] {
        let output = fetch(&site, url, &whole, "fetched").expect_code(200);
        assert!(output.stderr.contains(private), "{}", output.stderr);
        assert!(!site.directory("fetched").exists());
    }
    let output = site.try_restore("target", &[]).expect_code(2);
    assert!(output.stderr.lines().next().unwrap().contains(private), "{}", output.stderr);
    assert!(!site.directory("target").exists());

    // A key of that name, but another one.
    let other = NewKeyPair::generate();
    give_key(&mut site, "k1", None, Some(other.private.reveal()));
    let output = site.try_restore("target", &[]).expect_code(2);
    assert!(output.stderr.contains("private key `k1` does not open it"), "{}", output.stderr);
    fetch(&site, NO_AGENT, &whole, "fetched").expect_code(200);
    assert!(!site.directory("target").exists());

    // The right one, through an agent that does not have it.
    give_key(&mut site, "k1", None, Some(pair.private.reveal()));
    fetch(&site, &agent.url(), &whole, "fetched").success();
    assert_eq!(fs::read(site.directory("fetched")).unwrap().len(), 1 << 20);
    agent.terminate();
    let restored = site.restore_and_start("target", &[]);
    assert_eq!(steps(&restored), "1 2 3 4 5 6");

    // The restored server goes on in the same archive, which then has a second timeline, still with the
    // public key only; twice, since the second start has to read the fork it finds there.
    restored.sql("alter role backup password 'secret'");
    let mut configuration = site.configuration.clone();
    configuration["backup_sites"]["main"]["encryption_keys"] = json!({ "k1": { "public": pair.public } });
    configuration["backup_sites"]["main"]["encryption_key_id"] = json!("k1");
    configuration["backup_sites"]["main"]["nodes"][0]["port"] = json!(restored.port());
    for n in [7, 8] {
        let mut agent = Agent::start(&configuration);
        wait_streaming(&restored);
        step(&restored, n);
        restored.switch_segment();
        step(&restored, n + 10);
        Site::wait_archived(&restored);
        agent.terminate();
    }
    assert_eq!(site.objects("timeline/00000002.history").len(), 1);
    let again = site.restore_and_start("again", &[]);
    assert_eq!(steps(&again), "1 2 3 4 5 6 7 8 17 18");
    assert_eq!(readable(&site), Vec::<String>::new());
}

#[test]
fn every_compression_round_trips_encrypted() {
    let pair = NewKeyPair::generate();
    for algorithm in ["snappy", "lzma", "zstd"] {
        let mut site = site_of(one_major(), algorithm);
        give_key(&mut site, "k1", Some(&pair.public), Some(pair.private.reveal()));
        site.server.load(2000);
        let mut agent = site.agent();
        wait_streaming(&site.server);
        let backup = site.backup();
        step(&site.server, 2);
        let whole = site.server.switch_segment();
        step(&site.server, 3);
        Site::wait_archived(&site.server);
        let metadata =
            fs::read_to_string(site.archive().join(format!("main/xlog/{whole}.metadata"))).unwrap();
        let metadata: Value = serde_json::from_str(&metadata).unwrap();
        assert_eq!(metadata["compression-algorithm"], json!(algorithm));
        assert_eq!(metadata["encryption-key-id"], json!("k1"));
        // An agent with the private key serves what it has stored.
        fetch(&site, &agent.url(), &whole, "fetched").success();
        agent.terminate();
        let restored = site.restore_and_start("target", &[]);
        assert_eq!(steps(&restored), "1 2 3", "{algorithm}");
        assert_eq!(restored.value("select count(*) from load"), "2000");
        if algorithm != "snappy" {
            let fetched = fs::read(site.directory("fetched")).unwrap();
            read_by_the_format_alone(&site, &pair, &backup, &whole, &fetched);
        }
    }
}

/// The description of the format, as a program in another language, opens what we encrypted.
fn read_by_the_format_alone(site: &Site, pair: &NewKeyPair, backup: &str, segment: &str, fetched: &[u8]) {
    let python = cache().join("pghoard/bin/python");
    assert!(python.exists(), "`{}` is missing: scripts/install-test-deps puts it there", python.display());
    let key = site.scratch.write("private.pem", pair.private.reveal());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/read-archive.py");
    let run = |arguments: &[&str]| {
        let archive = site.archive().join("main");
        let mut command = Command::new(&python);
        let output = command.arg(&script).arg(archive).args(arguments).env("PRIVATE_KEY", &key).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    assert!(String::from_utf8(run(&["list"])).unwrap().starts_with(backup));
    assert!(run(&["wal", segment]) == fetched);
    let version = format!("{}\n", site.server.major());
    assert_eq!(String::from_utf8(run(&["file", backup, "PG_VERSION"])).unwrap(), version);
    assert_eq!(run(&["file", backup, "global/pg_control"]).len(), 8192);
}

/// Every way of changing an object that a writer of the bucket has.
fn changes(content: &[u8], other: &[u8]) -> Vec<(String, Vec<u8>)> {
    let length = content.len();
    let mut changes = Vec::new();
    // The start, the wrapped key, its end (an RSA key of 3072 bits), the middle, the codes at the end.
    for at in [0, 7, 8, 200, 391, 392, 400, length / 2, length.saturating_sub(33), length - 17, length - 1] {
        if at < length {
            let mut changed = content.to_vec();
            changed[at] ^= 0x01;
            changes.push((format!("bit at {at} of {length} flipped"), changed));
        }
    }
    for cut in [1, 16, 32, 40, length / 2, length] {
        if cut <= length {
            changes.push((format!("cut by {cut} of {length}"), content[..length - cut].to_vec()));
        }
    }
    changes.push(("longer by a byte".to_owned(), [content, b"\0"].concat()));
    changes.push(("exchanged for another of its kind".to_owned(), other.to_vec()));
    changes
}

/// A piece of the unfinished segment that no other piece can stand in for: the agent was stopped, and may have
/// left pieces that are part of a merged one, or of a whole segment.
fn needed_piece(site: &Site) -> PathBuf {
    let pieces = site.objects("xlog_partial/");
    let segment = pieces.iter().filter_map(|piece| piece.parent()).max().expect("a piece is stored");
    let bounds = |piece: &Path| {
        let name = piece.file_name().unwrap().to_str().unwrap().to_owned();
        let (start, end) = name.split_once('-').unwrap();
        [start, end].map(|hex| u32::from_str_radix(hex, 16).unwrap())
    };
    let of_segment = pieces.iter().filter(|piece| piece.parent() == Some(segment));
    let longest = of_segment.filter(|piece| bounds(piece)[0] == 0).max_by_key(|piece| bounds(piece)[1]);
    longest.expect("a piece from the segment's start").clone()
}

#[test]
fn nothing_tampered_with_is_ever_restored() {
    let pair = NewKeyPair::generate();
    let mut site = site_of(one_major(), "zstd");
    give_key(&mut site, "k1", Some(&pair.public), Some(pair.private.reveal()));
    let mut agent = site.agent();
    wait_streaming(&site.server);
    let first = site.backup();
    std::thread::sleep(Duration::from_secs(1));
    let second = site.backup();
    step(&site.server, 2);
    let segments = [site.server.switch_segment(), {
        step(&site.server, 3);
        site.server.switch_segment()
    }];
    step(&site.server, 4);
    Site::wait_archived(&site.server);
    agent.terminate();
    let object = |key: String| site.archive().join("main").join(key);

    // Of a backup. The record of one, moved to the other, names the other.
    for part in ["record", "files", "pack/000001"] {
        let path = object(format!("backup/{second}/{part}"));
        let (content, other) =
            (fs::read(&path).unwrap(), fs::read(object(format!("backup/{first}/{part}"))).unwrap());
        for (what, changed) in changes(&content, &other) {
            fs::write(&path, changed).unwrap();
            let output = site.try_restore("target", &["--backup", &second]);
            // Behind the last frame of a pack nobody looks: what is restored is right.
            if part.starts_with("pack") && what.starts_with("longer") {
                Server::verify_backup(site.server.major(), &site.directory("target")).unwrap();
            } else {
                assert_ne!(output.code, 0, "{part}: {what}");
            }
            assert!(
                output.code < 128 && !output.stderr.contains("panicked"),
                "{part}: {what}: {}",
                output.stderr
            );
            let _ = fs::remove_dir_all(site.directory("target"));
        }
        fs::write(&path, content).unwrap();
    }

    // A record that is whole, but says something else; its metadata goes, as its digest would tell.
    let record = object(format!("backup/{second}/record"));
    let stored = fs::read(&record).unwrap();
    let beside = object(format!("backup/{second}/record.metadata"));
    let metadata = fs::read(&beside).unwrap();
    fs::remove_file(&beside).unwrap();
    let text = String::from_utf8(zstd::decode_all(&stored[..]).unwrap()).unwrap();
    for (from, to) in [("\"timeline\":1", "\"timeline\":1 "), ("\"file_count\":", "\"file_count\":1")] {
        assert!(text.contains(from));
        fs::write(&record, text.replacen(from, to, 1)).unwrap();
        let output = site.try_restore("target", &["--backup", &second]).expect_code(7);
        assert!(output.stderr.contains("not the one that was stored with its key"), "{}", output.stderr);
        assert!(!site.directory("target").exists());
    }
    fs::write(&record, stored).unwrap();
    fs::write(&beside, metadata).unwrap();

    // Of WAL: a segment, and a piece of the one that is not whole yet.
    let piece = needed_piece(&site);
    let of_piece = piece.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let whole = object(format!("xlog/{}", segments[0]));
    let other = fs::read(object(format!("xlog/{}", segments[1]))).unwrap();
    for (path, name) in [(&whole, &segments[0]), (&piece, &of_piece)] {
        let content = fs::read(path).unwrap();
        fetch(&site, NO_AGENT, name, "fetched").success();
        let right = fs::read(site.directory("fetched")).unwrap();
        fs::remove_file(site.directory("fetched")).unwrap();
        let metadata =
            path.with_file_name(format!("{}.metadata", path.file_name().unwrap().to_str().unwrap()));
        let text = fs::read(&metadata).unwrap();
        // With the metadata as it was, and with none, which an attacker would not leave.
        for known in [true, false] {
            if !known {
                fs::remove_file(&metadata).unwrap();
                fetch(&site, NO_AGENT, name, "fetched").success();
                assert!(fs::read(site.directory("fetched")).unwrap() == right);
                fs::remove_file(site.directory("fetched")).unwrap();
            }
            for (what, changed) in changes(&content, &other) {
                fs::write(path, changed).unwrap();
                let output = fetch(&site, NO_AGENT, name, "fetched");
                assert_eq!(output.code, 200, "{name}: {what}, metadata {known}: {}", output.stderr);
                assert!(!site.directory("fetched").exists());
            }
            fs::write(path, &content).unwrap();
        }
        fs::write(&metadata, text).unwrap();
    }
    assert_eq!(steps(&site.restore_and_start("target", &[])), "1 2 3 4");
}

fn repository(store: &Store, pair: &NewKeyPair, private: bool) -> Repository {
    let id = KeyId::new("k1").unwrap();
    let mut keys = KeyRing::default();
    keys.add(&id, Some(&pair.public), private.then_some(&pair.private)).unwrap();
    keys.write_with(id).unwrap();
    let hash_algorithm = Some(HashAlgorithm::Sha1);
    let settings = Settings { keys, hash_algorithm, part_size: 1 << 20, ..Settings::default() };
    Repository::new(store.clone(), "main", settings)
}

#[tokio::test]
async fn a_host_without_the_private_key_knows_its_own_wal_again() {
    let (pair, store) = (NewKeyPair::generate(), Store::in_memory());
    let (host, owner) = (repository(&store, &pair, false), repository(&store, &pair, true));
    let segment = ObjectName::Wal("000000010000000000000007".parse().unwrap());
    let history = ObjectName::Wal("00000002.history".parse().unwrap());
    let forked = &b"1\t0/5000000\tat restore point \"payroll\"\n"[..];
    for (name, content) in [(segment, vec![7; 3 << 20]), (history, forked.to_vec())] {
        let put = |content: &[u8]| host.put(name, content.to_vec().into(), Facts::default());
        assert_eq!(put(&content).await.unwrap().outcome, Outcome::Created);
        assert_eq!(put(&content).await.unwrap().outcome, Outcome::AlreadySame);
        let other = [&content[..content.len() - 2], b"x\n"].concat();
        assert!(matches!(put(&other).await, Err(Error::Conflict { .. })), "{name}");
        assert!(matches!(put(b"short").await, Err(Error::Conflict { .. })), "{name}");
        let locked = host.get(name, u64::MAX).await.unwrap_err();
        assert!(locked.is_locked() && locked.hint().is_some(), "{locked}");
        assert_eq!(owner.get(name, u64::MAX).await.unwrap(), content);
        let metadata = owner.head(name).await.unwrap().metadata;
        assert_eq!(metadata.hash.is_some(), name == segment);
        assert!(!format!("{metadata:?}").contains("payroll"));
    }
    let locked = host.get(history, u64::MAX).await.unwrap_err();
    assert_eq!(host.outline(history, locked).await.unwrap(), &b"1\t0/5000000\tencrypted\n"[..]);

    // Uploaded in parts it has no digest beside it, and nobody can tell without the key.
    let piece: SegmentName = "000000010000000000000008".parse().unwrap();
    let piece = ObjectName::Piece { segment: piece, start: 0, end: 3 << 20 };
    let mut content = vec![0; 3 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    host.put(piece, content.clone().into(), Facts::default()).await.unwrap();
    let again = host.put(piece, content.clone().into(), Facts::default()).await;
    assert!(again.unwrap_err().is_locked());
    let again = owner.put(piece, content.into(), Facts::default()).await;
    assert_eq!(again.unwrap().outcome, Outcome::AlreadySame);
}
