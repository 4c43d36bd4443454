//! One server, the storage of its site, and commands on both.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::binary::{Agent, Output, Pgkeep, configuration, local_storage, pgkeep};
use crate::process::{self, Scratch};
use crate::server::Server;

pub struct Site {
    pub server: Server,
    pub scratch: Scratch,
    pub configuration: Value,
}

impl Site {
    /// A plain server with the role that backs it up, and a local directory as storage.
    pub fn start(major: u32) -> Self {
        Self::of(Server::start(major))
    }

    /// For a server without a role `backup`.
    pub fn of(server: Server) -> Self {
        server.create_role("backup", "LOGIN REPLICATION", "secret");
        let scratch = Scratch::new();
        let storage = local_storage(&scratch.directory("archive"));
        Self::with_storage(server, scratch, &storage)
    }

    pub fn with_storage(server: Server, scratch: Scratch, storage: &Value) -> Self {
        let mut configuration = configuration(&server, storage);
        // A port where nobody answers, as there is no agent yet.
        configuration["http_port"] = json!(process::free_port());
        // Backups are taken when a test asks for one.
        configuration["backup_sites"]["main"]["basebackup_interval_hours"] = Value::Null;
        let site = Self { server, scratch, configuration };
        site.write_configuration();
        site
    }

    /// Sets a key of the site's configuration.
    pub fn set(&mut self, key: &str, value: Value) {
        self.configuration["backup_sites"]["main"][key] = value;
        self.write_configuration();
    }

    fn write_configuration(&self) {
        self.scratch.write("config.json", self.configuration.to_string());
    }

    pub fn config_file(&self) -> PathBuf {
        self.scratch.path().join("config.json")
    }

    pub fn agent(&self) -> Agent {
        Agent::start(&self.configuration)
    }

    pub fn command(&self, arguments: &[&str]) -> Pgkeep {
        pgkeep(["--config"]).arg(self.config_file()).args(arguments)
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).run()
    }

    /// Takes a backup and returns its name.
    pub fn backup(&self) -> String {
        self.run(&["backup", "--fast"]).success().stdout.trim().to_owned()
    }

    /// The backups that `list` shows.
    pub fn backups(&self) -> Vec<Value> {
        let list = self.run(&["list", "--json"]).success().json();
        list["backups"].as_array().expect("a list of backups").clone()
    }

    pub fn directory(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Restores into the directory `name`, whatever comes of it.
    pub fn try_restore(&self, name: &str, arguments: &[&str]) -> Output {
        self.command(&["restore", "--target-dir"]).arg(self.directory(name)).args(arguments).run()
    }

    /// Restores into the directory `name`, which then passes `pg_verifybackup`.
    pub fn restore(&self, name: &str, arguments: &[&str]) -> PathBuf {
        self.try_restore(name, arguments).success();
        let directory = self.directory(name);
        Server::verify_backup(self.server.major(), &directory).expect("pg_verifybackup");
        directory
    }

    /// As [`Site::restore`], then starts a server there and waits until it has recovered.
    pub fn restore_and_start(&self, name: &str, arguments: &[&str]) -> Server {
        let directory = self.restore(name, arguments);
        let restored = Server::on_restored(self.server.major(), &directory);
        restored.wait_recovered();
        restored
    }

    /// Waits until everything that `server` has written is stored.
    pub fn wait_archived(server: &Server) {
        let lsn = server.value("select pg_current_wal_flush_lsn()");
        let stored = format!("select count(*) > 0 from pg_stat_replication where flush_lsn >= '{lsn}'");
        server.wait_until(&stored, "t");
    }

    /// Where the local directory of the storage lies.
    pub fn archive(&self) -> PathBuf {
        self.scratch.path().join("archive")
    }

    /// The stored objects whose key contains `part`, without their metadata, sorted.
    pub fn objects(&self, part: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        collect(&self.archive(), &mut found);
        found.retain(|path| {
            let key = path.strip_prefix(self.archive()).expect("below the archive").to_string_lossy();
            key.contains(part) && !key.ends_with(".metadata") && !key.contains('#')
        });
        found.sort();
        found
    }
}

fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("read a directory") {
        let path = entry.expect("read a directory").path();
        if path.is_dir() { collect(&path, found) } else { found.push(path) }
    }
}

/// A file of `mib` MiB in the data directory that does not compress.
pub fn ballast(site: &Site, name: &str, mib: usize) {
    let path = site.server.data_directory().join(name);
    let mut file = fs::File::create(&path).unwrap();
    let mut reader = blake3::Hasher::new().update(name.as_bytes()).finalize_xof();
    let mut block = vec![0; 1 << 20];
    for _ in 0..mib {
        reader.fill(&mut block);
        std::io::Write::write_all(&mut file, &block).unwrap();
    }
    process::give(&path);
}

/// The most memory a process has had resident, in bytes, as last seen before it ended.
pub struct Watched {
    pub peak_memory: u64,
    pub elapsed: Duration,
    pub code: i32,
}

/// Runs a command to its end, looking at its memory meanwhile.
pub fn watch(command: Pgkeep, limit: Duration) -> Watched {
    let begin = std::time::Instant::now();
    let mut child = command.spawn();
    let pid = child.id();
    let mut peak_memory = 0;
    let code = process::poll(limit, || {
        if let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status"))
            && let Some(line) = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))
        {
            peak_memory = line.trim().trim_end_matches(" kB").parse::<u64>().expect("kB") * 1024;
        }
        process::wait(&mut child, Duration::ZERO)
    });
    if code.is_none() {
        process::signal(pid, rustix::process::Signal::KILL);
        process::wait(&mut child, Duration::from_secs(10));
    }
    Watched { peak_memory, elapsed: begin.elapsed(), code: code.expect("it ends in time") }
}
