//! Buckets that PGHoard filled: listed, restored, pruned, and refused when they are damaged.
//!
//! The buckets in `tests/fixtures/pghoard` were made by PGHoard's own daemon, see
//! `scripts/make-pghoard-fixtures`: every mode of base backup, every codec, with and without encryption, two
//! timelines, tablespaces. `PGKEEP_TEST_PGHOARD_WORLDS` names a directory with more of them
//! (`make-pghoard-fixtures --full`), which then are restored too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::binary::{Output, Pgkeep, local_storage, pgkeep};
use crate::process::{self, Scratch};
use crate::server::Server;

/// A bucket, the keys to it, and what the database held when.
struct World {
    scratch: Scratch,
    facts: Value,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pghoard")
}

impl World {
    fn unpack(name: &str) -> Self {
        Self::of(&fixtures().join(format!("{name}.tar.zst")))
    }

    fn of(file: &Path) -> Self {
        let scratch = Scratch::new();
        let unpack = "zstd -dqc --long=26 \"$0\" | tar -x -C \"$1\"";
        let mut command = Command::new("bash");
        command.args(["-o", "pipefail", "-c", unpack]).arg(file).arg(scratch.path());
        let status = command.status().unwrap();
        assert!(status.success(), "unpack {}", file.display());
        process::give_tree(scratch.path());
        let facts = serde_json::from_slice(&fs::read(scratch.path().join("facts.json")).unwrap()).unwrap();
        Self { scratch, facts }
    }

    fn sites(&self) -> Vec<String> {
        self.facts["sites"].as_object().unwrap().keys().cloned().collect()
    }

    fn major(&self) -> u32 {
        u32::try_from(self.facts["major"].as_u64().unwrap()).unwrap()
    }

    fn bucket(&self) -> PathBuf {
        self.scratch.path().join("bucket")
    }

    fn mark(&self, stage: u64) -> &Value {
        let marks = self.facts["marks"].as_array().unwrap();
        marks.iter().find(|mark| mark["stage"] == json!(stage)).unwrap()
    }

    /// The key of the newest backup of a site.
    fn newest(&self, site: &str) -> String {
        self.facts["objects"][site].as_array().unwrap().last().unwrap().as_str().unwrap().to_owned()
    }

    fn configuration(&self, site: &str) -> Value {
        json!({
            "http_port": process::free_port(),
            "backup_sites": {
                site: {
                    "active": false,
                    "nodes": [],
                    "encryption_keys": self.facts["keys"],
                    "object_storage": local_storage(&self.bucket()),
                }
            }
        })
    }

    fn command(&self, configuration: &Value, arguments: &[&str]) -> Pgkeep {
        let file = self.scratch.write("config.json", configuration.to_string());
        pgkeep(["--config"]).arg(file).args(arguments)
    }

    fn run(&self, site: &str, arguments: &[&str]) -> Output {
        self.command(&self.configuration(site), arguments).run()
    }

    fn backups(&self, site: &str) -> Vec<Value> {
        let list = self.run(site, &["list", "--json"]).success().json();
        assert_eq!(list["damaged"], json!([]));
        list["backups"].as_array().unwrap().clone()
    }

    /// Where each tablespace of the world is to go.
    fn mappings(&self, name: &str) -> Vec<String> {
        let tablespaces = self.facts["tablespaces"].as_object().unwrap();
        tablespaces
            .keys()
            .enumerate()
            .flat_map(|(number, tablespace)| {
                let place = self.scratch.path().join(format!("{name}-tablespace-{number}"));
                ["--tablespace".to_owned(), format!("{tablespace}={}", place.display())]
            })
            .collect()
    }

    fn target(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn try_restore(&self, site: &str, name: &str, arguments: &[&str]) -> Output {
        let mappings = self.mappings(name);
        self.command(&self.configuration(site), &["restore", "--target-dir"])
            .arg(self.target(name))
            .args(arguments)
            .args(mappings)
            .run()
    }

    fn restore_and_start(&self, site: &str, name: &str, arguments: &[&str]) -> Server {
        self.try_restore(site, name, arguments).success();
        let server = Server::on_restored(self.major(), &self.target(name));
        server.wait_recovered();
        server
    }

    /// All stored objects of a site below `folder`, without their metadata.
    fn objects(&self, site: &str, folder: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.bucket().join(site).join(folder), &mut found);
        found.retain(|path| path.extension().is_none_or(|extension| extension != "metadata"));
        found.sort();
        found
    }
}

fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, found) } else { found.push(path) }
    }
}

/// The stages that a server has seen, and whether its table is whole.
fn check(server: &Server, world: &World, stage: u64) {
    let stages = server.value("select string_agg(stage::text, ' ' order by stage) from marks");
    let expected: Vec<String> = (1..=stage).map(|stage| stage.to_string()).collect();
    assert_eq!(stages, expected.join(" "));
    // Every mark was followed by fifty rows, and the mark itself comes first.
    let rows: u64 = server.value("select count(*) from filler").parse().unwrap();
    let whole = world.mark(stage.max(2))["rows"].as_u64().unwrap();
    assert!(rows == whole || rows + 50 == whole || stage == 1, "{rows} rows at stage {stage}");
    assert_eq!(server.value("select count(*) from filler where text <> md5(i::text)"), "0");
    server.sql("reindex table filler");
    assert_eq!(server.value("show work_mem"), "7MB", "the settings of ALTER SYSTEM are lost");
}

#[test]
fn every_bucket_is_listed_and_restored_to_its_end() {
    let mut files: Vec<PathBuf> =
        fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap().path()).collect();
    if let Some(more) = std::env::var_os("PGKEEP_TEST_PGHOARD_WORLDS") {
        files.extend(fs::read_dir(more).unwrap().map(|entry| entry.unwrap().path()));
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "zst"));
    assert!(files.len() >= 4);
    for file in files {
        let world = World::of(&file);
        for site in world.sites() {
            eprintln!("--- {} {site}", file.display());
            let backups = world.backups(&site);
            let names: Vec<&Value> = backups.iter().map(|backup| &backup["name"]).collect();
            let expected: Vec<&Value> = world.facts["objects"][&site].as_array().unwrap().iter().collect();
            assert_eq!(names, expected);
            for backup in &backups {
                assert_eq!(backup["server_version_num"].as_u64().unwrap() / 10_000, u64::from(world.major()));
                assert_eq!(backup["timeline"], json!(1));
            }
            let status = world.run(&site, &["status", "--json"]).success().json();
            assert_eq!(status["system_identifier"], world.facts["system_identifier"]);
            assert_eq!(status["gaps"], json!([]));
            assert_eq!(status["timelines"][1]["earliest"]["backup"], backups[0]["name"]);

            let server = world.restore_and_start(&site, &format!("restored-{site}"), &[]);
            check(&server, &world, 6);
            assert_eq!(server.value("select timeline_id from pg_control_checkpoint()"), "3");
            for tablespace in world.facts["tablespaces"].as_object().unwrap().keys() {
                assert_eq!(server.value(&format!("select sum(i) from \"in_{tablespace}\"")), "500500");
            }
        }
    }
}

#[test]
fn backups_are_restored_to_every_kind_of_target() {
    let world = World::unpack("zstd");
    let site = "delta-encrypted";
    let oldest = world.facts["objects"][site][0].as_str().unwrap();
    let text = |stage, key: &str| world.mark(stage)[key].as_str().unwrap().to_owned();
    let cases = [
        ("lsn", vec!["--target-lsn".to_owned(), text(2, "lsn")], 2),
        ("time", vec!["--target-time".to_owned(), text(3, "time")], 3),
        ("xid", vec!["--target-xid".to_owned(), text(3, "xid")], 3),
        ("name", vec!["--target-name".to_owned(), "between".to_owned()], 2),
        // PGHoard never stored the last segment of the old timeline.
        ("timeline", vec!["--target-timeline".to_owned(), "1".to_owned()], 3),
        ("immediate", vec!["--target-immediate".to_owned()], 1),
        ("named", vec!["--target-time".to_owned(), text(5, "time")], 5),
    ];
    for (name, arguments, stage) in cases {
        eprintln!("--- {name}");
        let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        // An explicit name counts, whatever the target; and the name may be given without its ending.
        arguments
            .extend(["--backup", if name == "named" { oldest } else { oldest.split_once('.').unwrap().0 }]);
        let server = world.restore_and_start(site, name, &arguments);
        check(&server, &world, stage);
    }
    // Without a name the newest backup before the target is taken.
    let plan = world.try_restore(site, "plan", &["--dry-run", "--json", "--target-lsn", &text(2, "lsn")]);
    assert_eq!(plan.success().json()["backup"], json!(oldest));
    assert!(!world.target("plan").exists());
    let early = world.try_restore(site, "early", &["--target-time", "2020-01-01 00:00:00+00"]);
    assert!(early.expect_code(5).stderr.contains("can be restored from"));
    let unknown = world.try_restore(site, "unknown", &["--backup", "2026-01-01_00-00_0"]);
    assert!(unknown.expect_code(3).stderr.contains("2026-01-01_00-00_0"));
}

#[test]
fn a_raw_backup_is_restored_to_a_time_and_old_names_and_little_metadata_will_do() {
    let world = World::unpack("snappy");
    let site = "basic-plain";
    let time = world.mark(2)["time"].as_str().unwrap().to_owned();
    let server = world.restore_and_start(site, "time", &["--target-time", &time]);
    check(&server, &world, 2);
    drop(server);
    // As PGHoard of 2016 named and described it.
    let object = world.bucket().join(world.newest(site));
    let old = object.with_file_name("2016-03-01_0");
    fs::rename(&object, &old).unwrap();
    let metadata = metadata_of(&object);
    let kept: serde_json::Map<String, Value> = metadata
        .as_object()
        .unwrap()
        .iter()
        .filter(|(key, _)| {
            ["compression-algorithm", "start-wal-segment", "start-time"].contains(&key.as_str())
        })
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    set_metadata(&old, &json!(kept));
    assert_eq!(world.backups(site)[0]["name"], json!("basic-plain/basebackup/2016-03-01_0"));
    let server = world.restore_and_start(site, "old", &["--backup", "2016-03-01_0"]);
    check(&server, &world, 6);
}

fn metadata_of(object: &Path) -> Value {
    let file = with_suffix(object, ".metadata");
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

fn set_metadata(object: &Path, metadata: &Value) {
    let file = with_suffix(object, ".metadata");
    fs::write(&file, metadata.to_string()).unwrap();
    process::give(&file);
    process::give(object);
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Takes away what a local store knows of stored bytes, so that only the content can tell; as in a bucket
/// on S3.
fn forget_hashes(world: &World, site: &str) {
    for object in world.objects(site, "") {
        let mut metadata = metadata_of(&object);
        let map = metadata.as_object_mut().unwrap();
        for key in ["_hash", "Content-Length"] {
            map.remove(key);
        }
        set_metadata(&object, &metadata);
    }
}

/// What is done to an object, and whether it must show even where nobody kept a hash of the stored bytes.
#[derive(Clone, Copy, Debug)]
enum Damage {
    /// Its last bytes are gone.
    Truncated(usize),
    /// One bit in its middle is another.
    Flipped,
    Gone,
}

impl Damage {
    fn on(self, object: &Path) -> Vec<u8> {
        let before = fs::read(object).unwrap();
        match self {
            Self::Truncated(by) => fs::write(object, &before[..before.len() - by.min(before.len())]).unwrap(),
            Self::Flipped => {
                let mut bytes = before.clone();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x10;
                fs::write(object, bytes).unwrap();
            }
            Self::Gone => fs::remove_file(object).unwrap(),
        }
        before
    }
}

/// Every object of the newest backup of a site, damaged in every way, one at a time.
fn refuses_damage(world: &World, site: &str, damages: &[Damage]) {
    let base = world.newest(site);
    let base = Path::new(&base).file_name().unwrap().to_str().unwrap().split('.').next().unwrap().to_owned();
    let mut objects = Vec::new();
    for folder in ["basebackup", "basebackup_chunk", "basebackup_delta_chunk"] {
        let of_backup = |path: &PathBuf| path.to_string_lossy().contains(&base);
        objects.extend(world.objects(site, folder).into_iter().filter(of_backup));
    }
    // Of the delta files, two that this backup uses: those that it does not use do no harm to it.
    let newest = world.newest(site);
    world.try_restore(site, "whole", &["--backup", &newest]).success();
    let mut restored = Vec::new();
    collect(&world.target("whole"), &mut restored);
    let used: Vec<String> = restored.iter().map(|file| blake2s(&fs::read(file).unwrap())).collect();
    let is_used = |path: &PathBuf| used.iter().any(|digest| path.ends_with(digest));
    let delta_files = world.objects(site, "basebackup_delta").into_iter().filter(is_used);
    objects.extend(delta_files.take(2));
    fs::remove_dir_all(world.target("whole")).unwrap();
    for number in 0..world.facts["tablespaces"].as_object().unwrap().len() {
        fs::remove_dir_all(world.target(&format!("whole-tablespace-{number}"))).unwrap();
    }
    for object in objects {
        for damage in damages {
            let before = damage.on(&object);
            let said = world.try_restore(site, "damaged", &["--backup", &newest]);
            let file = object.file_name().unwrap().to_str().unwrap();
            assert_ne!(said.code, 0, "{damage:?} {file} was not noticed\n{}", said.stderr);
            // Without the only object that makes it exist there is no backup at all.
            let is_no_backup = said.code == 3 && matches!(damage, Damage::Gone);
            let named = said.stderr.contains(file);
            assert!(
                named || is_no_backup,
                "{damage:?} {file}: the message does not name it\n{}",
                said.stderr
            );
            assert!(
                !world.target("damaged").join("global/pg_control").exists(),
                "PostgreSQL could start on what {damage:?} {file} left"
            );
            fs::write(&object, before).unwrap();
            process::give(&object);
        }
    }
    // Nothing else was wrong; and what the refused restores left is in nobody's way.
    world.try_restore(site, "damaged", &[]).success();
}

fn blake2s(bytes: &[u8]) -> String {
    use blake2::Digest as _;
    pgkeep::catalog::FileDigest::new(blake2::Blake2s256::digest(bytes).into()).to_string()
}

const DAMAGES: [Damage; 4] = [Damage::Truncated(1), Damage::Truncated(40), Damage::Flipped, Damage::Gone];

#[test]
fn damage_is_refused_and_named_in_raw_backups() {
    refuses_damage(&World::unpack("snappy"), "basic-plain", &DAMAGES);
    refuses_damage(&World::unpack("zstd"), "pipe-encrypted", &DAMAGES);
}

#[test]
fn damage_is_refused_and_named_in_chunks() {
    refuses_damage(&World::unpack("zstd"), "local-tar-delta-stats-plain", &DAMAGES);
    refuses_damage(&World::unpack("tablespaces"), "local-tar-encrypted", &DAMAGES);
}

#[test]
fn damage_is_refused_and_named_in_delta_backups() {
    refuses_damage(&World::unpack("lzma"), "delta-plain", &DAMAGES);
}

#[test]
fn damage_shows_without_any_hash_of_the_stored_bytes() {
    for (name, site) in [
        ("zstd", "pipe-encrypted"),
        ("zstd", "delta-encrypted"),
        ("lzma", "delta-plain"),
        ("tablespaces", "local-tar-encrypted"),
        ("snappy", "basic-plain"),
    ] {
        let world = World::unpack(name);
        forget_hashes(&world, site);
        refuses_damage(&world, site, &DAMAGES);
    }
}

#[test]
fn swapped_objects_are_refused() {
    for (name, site, folder) in [
        ("zstd", "local-tar-delta-stats-plain", "basebackup_chunk"),
        ("lzma", "delta-plain", "basebackup_delta"),
        ("lzma", "delta-plain", "basebackup_delta_chunk"),
    ] {
        let world = World::unpack(name);
        forget_hashes(&world, site);
        let base = world.newest(site);
        let base = Path::new(&base).file_name().unwrap().to_str().unwrap().split('.').next().unwrap();
        let mut objects = world.objects(site, folder);
        if folder != "basebackup_delta" {
            objects.retain(|path| path.to_string_lossy().contains(base));
        }
        objects.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).unwrap().len()));
        let (one, other) = (&objects[0], &objects[1]);
        for suffix in ["", ".metadata"] {
            let (one, other) = (with_suffix(one, suffix), with_suffix(other, suffix));
            let spare = with_suffix(&one, "x");
            fs::rename(&one, &spare).unwrap();
            fs::rename(&other, &one).unwrap();
            fs::rename(&spare, &other).unwrap();
        }
        let said = world.try_restore(site, "swapped", &[]);
        assert_eq!(said.code, 7, "{}", said.stderr);
    }
}

#[test]
fn damaged_wal_is_not_given_to_postgresql() {
    let world = World::unpack("snappy");
    let site = "basic-plain";
    let segment = &world.objects(site, "xlog")[2];
    let name = segment.file_name().unwrap().to_str().unwrap();
    let fetch = |place: &str| {
        let place = world.scratch.path().join(place);
        world.command(&world.configuration(site), &["wal-fetch", name]).arg(&place).run()
    };
    fetch("whole").success();
    let before = Damage::Flipped.on(segment);
    let said = fetch("flipped");
    assert!(said.code > 125, "{} {}", said.code, said.stderr);
    assert!(said.stderr.contains(name), "{}", said.stderr);
    // The hash of another segment: the content is whole, and not what was archived.
    fs::write(segment, before).unwrap();
    let mut metadata = metadata_of(segment);
    metadata["hash"] = json!("a9993e364706816aba3e25717850c26c9cd0d89d");
    set_metadata(segment, &metadata);
    assert!(fetch("other").code > 125);
    assert!(!world.scratch.path().join("other").exists());
}

#[test]
fn a_backup_that_lost_its_tablespaces_is_refused_before_anything_is_written() {
    let world = World::unpack("snappy");
    let site = "basic-plain";
    // What basic mode leaves of a cluster with a tablespace: the map, and none of its files.
    let object = world.bucket().join(world.newest(site));
    let plain = snap_decode(&fs::read(&object).unwrap());
    let mut archive = tar::Builder::new(Vec::new());
    for (number, entry) in tar::Archive::new(plain.as_slice()).entries().unwrap().enumerate() {
        let mut entry = entry.unwrap();
        let header = entry.header().clone();
        archive.append(&header, &mut entry).unwrap();
        if number == 0 {
            let map = b"16385 /mnt/fast\n";
            let mut header = tar::Header::new_ustar();
            header.set_size(map.len() as u64);
            header.set_mode(0o600);
            archive.append_data(&mut header, "tablespace_map", &map[..]).unwrap();
        }
    }
    let archive = archive.into_inner().unwrap();
    fs::write(&object, &archive).unwrap();
    let mut metadata = metadata_of(&object);
    let map = metadata.as_object_mut().unwrap();
    for key in ["_hash", "Content-Length", "compression-algorithm", "compression-level"] {
        map.remove(key);
    }
    map.insert("original-file-size".to_owned(), json!(archive.len().to_string()));
    set_metadata(&object, &metadata);
    for arguments in [&[][..], &["--dry-run"]] {
        let said = world.try_restore(site, "lost", arguments).expect_code(7);
        assert!(said.stderr.contains("16385 /mnt/fast"), "{}", said.stderr);
        assert!(!world.target("lost").exists());
    }
}

/// PGHoard's snappy, by the reference decoder.
fn snap_decode(stored: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    std::io::Read::read_to_end(&mut snap::read::FrameDecoder::new(stored), &mut plain).unwrap();
    plain
}

/// The members of a stored tar archive that is compressed with zstd.
fn members(object: &Path) -> Vec<(tar::Header, String, Vec<u8>)> {
    let plain = zstd::decode_all(fs::read(object).unwrap().as_slice()).unwrap();
    let mut archive = tar::Archive::new(plain.as_slice());
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
        (entry.header().clone(), entry.path().unwrap().to_str().unwrap().to_owned(), content)
    });
    entries.collect()
}

/// Takes away what does not fit an object any more that a test has written anew.
fn set_format(object: &Path, metadata: &Value, format: &str) {
    let mut metadata = metadata.clone();
    let map = metadata.as_object_mut().unwrap();
    for key in ["_hash", "Content-Length", "original-file-size", "compression-algorithm"] {
        map.remove(key);
    }
    map.insert("format".to_owned(), json!(format));
    set_metadata(object, &metadata);
}

/// PGHoard 1.4 and 1.5 put into one archive what later ones put into a control object and chunks.
#[test]
fn the_first_chunked_format_is_restored() {
    let world = World::unpack("zstd");
    let site = "local-tar-delta-stats-plain";
    let control = world.bucket().join(world.newest(site));
    let chunks = world.objects(site, "basebackup_chunk");
    let mut archive = tar::Builder::new(Vec::new());
    for object in [&control].into_iter().chain(&chunks) {
        for (mut header, name, content) in members(object) {
            archive.append_data(&mut header, name, content.as_slice()).unwrap();
        }
    }
    fs::write(&control, archive.into_inner().unwrap()).unwrap();
    set_format(&control, &metadata_of(&control), "pghoard-bb-v1");
    for chunk in chunks {
        fs::remove_file(chunk).unwrap();
    }
    let server = world.restore_and_start(site, "v1", &[]);
    check(&server, &world, 6);
}

/// Until 2022 every file of a delta backup that was not embedded was an object of its own.
#[test]
fn the_first_delta_format_is_restored() {
    let world = World::unpack("zstd");
    let site = "local-tar-delta-stats-plain";
    let control = world.bucket().join(world.newest(site));
    let folder = world.bucket().join(site).join("basebackup_delta");
    fs::create_dir_all(&folder).unwrap();
    process::give(&folder);
    let (mut files, mut directories) = (Vec::new(), vec![".".to_owned()]);
    for chunk in world.objects(site, "basebackup_chunk") {
        for (header, name, content) in members(&chunk) {
            let path = name.strip_prefix("pgdata/").unwrap().trim_end_matches('/').to_owned();
            if header.entry_type().is_dir() {
                directories.push(path);
                continue;
            }
            let embedded = content.len() <= 150;
            let digest = if embedded { String::new() } else { blake2s(&content) };
            if !embedded {
                let object = folder.join(&digest);
                let stored = zstd::encode_all(content.as_slice(), 3).unwrap();
                fs::write(&object, stored).unwrap();
                set_metadata(
                    &object,
                    &json!({"compression-algorithm": "zstd", "format": "pghoard-delta-v1"}),
                );
            }
            use base64::Engine as _;
            files.push(json!({
                "relative_path": path,
                "file_size": content.len(),
                "stored_file_size": 0,
                "mtime_ns": 1_700_000_000_000_000_000_u64,
                "hexdigest": digest,
                "content_b64": embedded.then(|| base64::engine::general_purpose::STANDARD.encode(&content)),
            }));
        }
        fs::remove_file(chunk).unwrap();
    }
    let mut archive = tar::Builder::new(Vec::new());
    for (mut header, name, mut content) in members(&control) {
        if name == ".pghoard_tar_metadata.json" {
            let mut json: Value = serde_json::from_slice(&content).unwrap();
            let map = json.as_object_mut().unwrap();
            map.remove("chunks");
            map.remove("delta_stats");
            let state = json!({"root_globs": ["**/*"], "empty_dirs": directories, "files": files});
            map.insert("manifest".to_owned(), json!({"snapshot_result": {"state": state}}));
            content = json.to_string().into_bytes();
            header.set_size(content.len() as u64);
        }
        archive.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    fs::write(&control, archive.into_inner().unwrap()).unwrap();
    set_format(&control, &metadata_of(&control), "pghoard-delta-v1");
    let server = world.restore_and_start(site, "v1", &[]);
    check(&server, &world, 6);
    drop(server);
    // Its files are known by their content.
    let object = world.objects(site, "basebackup_delta")[0].clone();
    let stored = zstd::encode_all(&b"other content"[..], 3).unwrap();
    fs::write(&object, stored).unwrap();
    let said = world.try_restore(site, "altered", &[]).expect_code(7).stderr;
    assert!(said.contains(object.file_name().unwrap().to_str().unwrap()), "{said}");
}

#[test]
fn paths_that_lead_out_are_refused() {
    let world = World::unpack("snappy");
    let site = "basic-plain";
    let object = world.bucket().join(world.newest(site));
    let plain = snap_decode(&fs::read(&object).unwrap());
    let metadata = metadata_of(&object);
    for path in ["../outside", "/tmp/pgkeep-outside", "base/../../outside"] {
        // A member of the same size with another name, and the checksum that fits.
        let mut archive = plain.clone();
        let at = archive.windows(11).position(|part| part == b"PG_VERSION\0").unwrap();
        archive[at..at + 100].fill(0);
        archive[at..at + path.len()].copy_from_slice(path.as_bytes());
        archive[at + 148..at + 156].fill(b' ');
        let sum: u32 = archive[at..at + 512].iter().map(|byte| u32::from(*byte)).sum();
        archive[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        fs::write(&object, archive).unwrap();
        let mut metadata = metadata.clone();
        let map = metadata.as_object_mut().unwrap();
        for key in ["_hash", "Content-Length", "compression-algorithm"] {
            map.remove(key);
        }
        set_metadata(&object, &metadata);
        let said = world.try_restore(site, "hostile", &[]).expect_code(7).stderr;
        assert!(said.contains("leads out"), "{said}");
        assert!(!world.target("outside").exists());
    }
}

#[test]
fn tablespaces_go_where_name_path_or_oid_say() {
    let world = World::unpack("tablespaces");
    let site = "local-tar-encrypted";
    let tablespaces = world.facts["tablespaces"].as_object().unwrap();
    let (first, odd) = (&tablespaces["first"], &tablespaces["odd, name"]);
    let mapping = |old: &Value, name: &str| {
        let old = old.as_str().map_or_else(|| old.to_string(), str::to_owned);
        format!("{old}={}", world.scratch.path().join(name).display())
    };
    let one = mapping(&first["path"], "by-path");
    let two = mapping(&odd["oid"], "by-oid");
    let command = || world.command(&world.configuration(site), &["restore", "--target-dir"]);
    command().arg(world.target("mapped")).args(["--tablespace", &one, "--tablespace", &two]).run().success();
    let server = Server::on_restored(world.major(), &world.target("mapped"));
    server.wait_recovered();
    assert_eq!(server.value("select sum(i) from \"in_odd, name\""), "500500");
    let place = server.value(&format!("select pg_tablespace_location({})", first["oid"]));
    assert_eq!(Path::new(&place), world.scratch.path().join("by-path"));
    let unknown = command().arg(world.target("unknown")).args(["--tablespace", "other=/x"]).run();
    let said = unknown.expect_code(2).stderr;
    assert!(said.contains("`odd, name`") && said.contains("other"), "{said}");
    assert!(!world.target("unknown").exists());
}

#[test]
fn without_its_key_a_backup_is_listed_and_kept_and_not_restored() {
    let world = World::unpack("zstd");
    let site = "delta-encrypted";
    let mut configuration = world.configuration(site);
    configuration["backup_sites"][site].as_object_mut().unwrap().remove("encryption_keys");
    configuration["backup_sites"][site]["basebackup_count"] = json!(1);
    let list = world.command(&configuration, &["list", "--json"]).run().success().json();
    assert_eq!(list["backups"].as_array().unwrap().len(), 2);
    let restore = world.command(&configuration, &["restore", "--target-dir"]).arg(world.target("x")).run();
    assert_ne!(restore.code, 0);
    assert!(restore.stderr.contains("fixture"), "{}", restore.stderr);
    assert!(!world.target("x").exists());
    let before = world.objects(site, "");
    let prune = world.command(&configuration, &["prune", "--json"]).run().success().json();
    assert_eq!(prune["backups"][0]["verdict"], json!("keep"));
    assert!(prune["backups"][0]["reason"].as_str().unwrap().contains("cannot be read"), "{prune}");
    assert_eq!(world.objects(site, "basebackup_delta"), {
        let mut delta = before.clone();
        delta.retain(|path| path.to_string_lossy().contains("/basebackup_delta/"));
        delta
    });
}

#[test]
fn pruning_takes_what_no_kept_backup_needs() {
    let world = World::unpack("lzma");
    let site = "delta-plain";
    // The newest is to be preserved; that keeps none that is older.
    let mut configuration = world.configuration(site);
    configuration["backup_sites"][site]["basebackup_count"] = json!(1);
    let before = world.objects(site, "");
    let dry = world.command(&configuration, &["prune", "--dry-run", "--json"]).run().success().json();
    assert_eq!(dry["backups"][0]["verdict"], json!("drop"), "{dry}");
    assert_eq!(world.objects(site, ""), before);
    let report = world.command(&configuration, &["prune", "--json"]).run().success().json();
    assert_eq!(report["removed"]["backup_count"], json!(1), "{report}");
    let kept = world.newest(site);
    let backups = world.backups(site);
    assert_eq!(backups.len(), 1);
    assert_eq!(backups[0]["name"], json!(kept));
    let after = world.objects(site, "");
    let dropped = world.facts["objects"][site][0].as_str().unwrap().split('.').next().unwrap().to_owned();
    let dropped = Path::new(&dropped).file_name().unwrap().to_str().unwrap();
    assert!(!after.iter().any(|path| path.to_string_lossy().contains(dropped)), "{after:?}");
    let shared = |objects: &[PathBuf]| {
        objects.iter().filter(|path| path.to_string_lossy().contains("/basebackup_delta/")).count()
    };
    assert!(shared(&after) < shared(&before), "files of the dropped backup only are gone");
    assert!(shared(&after) > 0);
    for object in before.iter().filter(|object| !after.contains(object)) {
        assert!(!with_suffix(object, ".metadata").exists(), "{}", object.display());
    }
    let first = backups[0]["start_wal_segment"].as_str().unwrap();
    for segment in world.objects(site, "xlog") {
        assert!(segment.file_name().unwrap().to_str().unwrap() >= first);
    }
    let server = world.restore_and_start(site, "pruned", &[]);
    check(&server, &world, 6);
}

#[test]
fn a_preserved_backup_stays_and_keeps_the_newer_ones() {
    let world = World::unpack("zstd");
    let site = "delta-encrypted";
    let mut configuration = world.configuration(site);
    configuration["backup_sites"][site]["basebackup_count"] = json!(1);
    let oldest = world.facts["objects"][site][0].as_str().unwrap();
    let name = Path::new(oldest).file_name().unwrap().to_str().unwrap();
    let folder = world.bucket().join(site).join("preservation_request");
    fs::create_dir_all(&folder).unwrap();
    process::give(&folder);
    let request = folder.join(format!("{name}_2099-01-01 00:00:00+00:00"));
    fs::write(&request, "").unwrap();
    let until = json!({"preserve-backup": name, "preserve-until": "2099-01-01 00:00:00+00:00"});
    set_metadata(&request, &until);
    let prune = world.command(&configuration, &["prune", "--json"]).run().success().json();
    for backup in prune["backups"].as_array().unwrap() {
        assert_eq!(backup["verdict"], json!("keep"), "{prune}");
    }
    assert_eq!(world.backups(site).len(), 2);
    // When its time is over it goes, and the request with it.
    set_metadata(&request, &json!({"preserve-backup": name, "preserve-until": "2020-01-01 00:00:00+00:00"}));
    let prune = world.command(&configuration, &["prune", "--json"]).run().success().json();
    assert_eq!(prune["removed"]["backup_count"], json!(1), "{prune}");
    assert!(!request.exists());
}

#[test]
fn a_site_that_was_moved_goes_on_with_what_it_was() {
    let world = World::unpack("zstd");
    let mut configuration = world.configuration("pipe-encrypted");
    configuration["backup_sites"]["new"] = json!({
        "active": false,
        "nodes": [],
        "moved_from": ["pipe-encrypted"],
        "object_storage": local_storage(&world.bucket()),
    });
    let run = |arguments: &[&str]| world.command(&configuration, &["--site", "new"]).args(arguments);
    let list = run(&["list", "--json"]).run().success().json();
    assert_eq!(list["backups"][0]["name"], json!(world.newest("pipe-encrypted")));
    run(&["restore", "--target-dir"]).arg(world.target("moved")).run().success();
    // The hook finds the WAL in the old site.
    let server = Server::on_restored(world.major(), &world.target("moved"));
    server.wait_recovered();
    check(&server, &world, 6);
}
