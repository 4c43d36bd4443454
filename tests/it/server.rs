//! Throwaway PostgreSQL servers, 13 to 18.
//!
//! ```ignore
//! let server = Server::builder(17).segment_size_mib(1).conf("wal_level = replica").start();
//! server.create_role("backup", "LOGIN REPLICATION", "secret");
//! server.sql("create table t (n int); insert into t values (1)");
//! assert_eq!(server.value("select n from t"), "1");
//! ```
//!
//! Every server has its own temporary directory, listens on 127.0.0.1 and on a Unix socket in that directory, and
//! dies with its value (or with the test process). Its log is printed when the test fails. `fsync` is off: these
//! tests kill processes, not machines.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use crate::process::{self, Scratch};

/// Every major version that pgkeep supports.
pub const MAJORS: [u32; 6] = [13, 14, 15, 16, 17, 18];

/// Those of [`MAJORS`] whose test builds can do TLS.
pub const TLS_MAJORS: [u32; 4] = [13, 14, 15, 17];

/// How long a server may take to start or stop before that is a failure. Generous: two cores, many servers.
const PATIENCE: Duration = Duration::from_mins(1);

pub type Rows = Vec<Vec<Option<String>>>;

/// The versions to test: all, or those that `PGKEEP_TEST_MAJORS` names (`PGKEEP_TEST_MAJORS=13,18`).
pub fn majors() -> Vec<u32> {
    match std::env::var("PGKEEP_TEST_MAJORS") {
        Ok(list) if !list.trim().is_empty() => list
            .split([',', ' '])
            .filter(|word| !word.is_empty())
            .map(|word| word.parse().unwrap_or_else(|_| panic!("PGKEEP_TEST_MAJORS: `{word}` is no number")))
            .collect(),
        _ => MAJORS.to_vec(),
    }
}

/// Runs `test` once for each of [`majors`] and names the version that failed.
pub fn for_each_major(test: impl Fn(u32)) {
    for major in majors() {
        eprintln!("--- PostgreSQL {major}");
        test(major);
    }
}

/// How to stop a server: PostgreSQL's own three ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Waits until every client has gone.
    Smart,
    /// Ends the sessions, writes a checkpoint, lets WAL senders send all of it.
    Fast,
    /// No checkpoint: the next start recovers from WAL.
    Immediate,
}

/// What a new server shall be like.
pub struct Builder {
    major: u32,
    segment_size_mib: u32,
    data_checksums: bool,
    conf: Vec<String>,
    hba: Vec<String>,
    auth: String,
    ssl: bool,
}

impl Builder {
    /// `initdb --wal-segsize`; PostgreSQL's own 16 unless told otherwise.
    pub fn segment_size_mib(mut self, size: u32) -> Self {
        self.segment_size_mib = size;
        self
    }

    /// On unless told otherwise.
    pub fn data_checksums(mut self, on: bool) -> Self {
        self.data_checksums = on;
        self
    }

    /// One more line for `postgresql.conf`.
    pub fn conf(mut self, line: &str) -> Self {
        self.conf.push(line.to_owned());
        self
    }

    /// One more line for `pg_hba.conf`. The first one takes the place of the lines that let every role in from
    /// 127.0.0.1, for replication too. The Unix socket stays open to all.
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.to_owned());
        self
    }

    /// The method of those lines, and of the passwords: `scram-sha-256` (as here if not told otherwise), `md5`,
    /// `password`, `trust`.
    pub fn auth(mut self, method: &str) -> Self {
        method.clone_into(&mut self.auth);
        self
    }

    /// TLS with a certificate for `localhost` and 127.0.0.1; [`Server::ca_file`] signed it. See [`TLS_MAJORS`].
    pub fn ssl(mut self, on: bool) -> Self {
        assert!(!on || TLS_MAJORS.contains(&self.major), "PostgreSQL {} here has no TLS", self.major);
        self.ssl = on;
        self
    }

    pub fn start(self) -> Server {
        let scratch = Scratch::new();
        let data_directory = scratch.directory("data");
        self.initdb(&data_directory);

        let mut conf = String::from(
            "fsync = off\nshared_buffers = 16MB\ntimezone = 'UTC'\nlc_messages = 'C'\nlog_line_prefix = '%m [%p] '\n\
             dynamic_shared_memory_type = mmap\n",
        );
        let encryption = if self.auth == "md5" { "md5" } else { "scram-sha-256" };
        writeln!(conf, "password_encryption = '{encryption}'").expect("write to a string");
        if self.ssl {
            make_certificates(&scratch);
            let at = scratch.path().display();
            writeln!(conf, "ssl = on\nssl_cert_file = '{at}/server.crt'\nssl_key_file = '{at}/server.key'")
                .expect("write to a string");
        }
        for line in &self.conf {
            writeln!(conf, "{line}").expect("write to a string");
        }
        append(&data_directory.join("postgresql.conf"), &conf);

        let mut server = Server::new(self.major, scratch, data_directory);
        if self.hba.is_empty() {
            let auth = &self.auth;
            server.write_hba(&[
                &format!("host all all 127.0.0.1/32 {auth}"),
                &format!("host replication all 127.0.0.1/32 {auth}"),
            ]);
        } else {
            server.write_hba(&self.hba.iter().map(String::as_str).collect::<Vec<_>>());
        }
        server.start_again();
        server
    }

    fn initdb(&self, data_directory: &Path) {
        let mut initdb = process::command(&program(self.major, "initdb").expect("initdb"), "KILL");
        initdb.arg("-D").arg(data_directory);
        initdb.args(["--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]);
        initdb.arg(format!("--wal-segsize={}", self.segment_size_mib));
        match (self.data_checksums, self.major) {
            (true, _) => _ = initdb.arg("--data-checksums"),
            // The first version to make them by itself.
            (false, 18..) => _ = initdb.arg("--no-data-checksums"),
            (false, _) => {}
        }
        run_tool(initdb);
    }
}

/// A running (or stopped) PostgreSQL server.
pub struct Server {
    major: u32,
    scratch: Scratch,
    data_directory: PathBuf,
    port: u16,
    postmaster: Option<Child>,
    /// Where its commands are looked for first.
    programs: Option<PathBuf>,
}

impl Server {
    pub fn builder(major: u32) -> Builder {
        assert!(
            program(major, "postgres").is_some(),
            "no PostgreSQL {major} in {}; run scripts/install-test-deps",
            process::cache().display()
        );
        Builder {
            major,
            segment_size_mib: 16,
            data_checksums: true,
            conf: Vec::new(),
            hba: Vec::new(),
            auth: "scram-sha-256".to_owned(),
            ssl: false,
        }
    }

    /// A plain server, ready.
    pub fn start(major: u32) -> Self {
        Self::builder(major).start()
    }

    fn new(major: u32, scratch: Scratch, data_directory: PathBuf) -> Self {
        Self { major, scratch, data_directory, port: process::free_port(), postmaster: None, programs: None }
    }

    /// A server on a data directory that somebody filled, on a port of its own; its files are given to the
    /// server's user. Returns when it accepts connections, which with `hot_standby` may be before recovery has
    /// ended: see [`Server::wait_recovered`].
    pub fn on_restored(major: u32, data_directory: &Path) -> Self {
        Self::try_on_restored(major, data_directory)
            .unwrap_or_else(|log| panic!("server does not start:\n{log}"))
    }

    /// As [`Server::on_restored`]; the server's log if it ends instead.
    pub fn try_on_restored(major: u32, data_directory: &Path) -> Result<Self, String> {
        process::give_tree(data_directory);
        if let Ok(tablespaces) = fs::read_dir(data_directory.join("pg_tblspc")) {
            for link in tablespaces.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()) {
                process::give_tree(&link);
            }
        }
        let mut server = Self::new(major, Scratch::new(), data_directory.to_owned());
        server.try_start()?;
        Ok(server)
    }

    /// A streaming standby of this server, a clone made by `pg_basebackup`.
    pub fn standby(&self) -> Self {
        let scratch = Scratch::new();
        let data_directory = scratch.directory("data");
        let mut clone = process::command(&self.tool("pg_basebackup").expect("pg_basebackup"), "KILL");
        clone.arg("-D").arg(&data_directory).args(["-X", "stream", "-c", "fast", "--no-sync"]);
        clone.arg("-d").arg(self.superuser_conninfo());
        run_tool(clone);
        let conninfo = self.superuser_conninfo();
        append(&data_directory.join("postgresql.auto.conf"), &format!("primary_conninfo = '{conninfo}'\n"));
        File::create(data_directory.join("standby.signal")).expect("make standby.signal");
        process::give(&data_directory.join("standby.signal"));
        let mut standby = Self::new(self.major, scratch, data_directory);
        standby.start_again();
        standby
    }

    // Where it is.

    pub fn major(&self) -> u32 {
        self.major
    }

    pub fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    pub fn wal_directory(&self) -> PathBuf {
        self.data_directory.join("pg_wal")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:PORT`
    pub fn host_port(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The directory of the Unix socket.
    pub fn socket_directory(&self) -> &Path {
        self.scratch.path()
    }

    /// A connection string for TCP.
    pub fn conninfo(&self, user: &str, password: &str) -> String {
        format!("host=127.0.0.1 port={} user={user} password={password} dbname=postgres", self.port)
    }

    /// A connection string for the Unix socket, as superuser; good for replication too.
    pub fn superuser_conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.scratch.path().display(), self.port)
    }

    /// What signed the certificate of a server with [`Builder::ssl`].
    pub fn ca_file(&self) -> PathBuf {
        self.scratch.path().join("ca.crt")
    }

    /// Everything the server has logged so far.
    pub fn log(&self) -> String {
        fs::read(self.log_file())
            .map_or_else(|_| String::new(), |log| String::from_utf8_lossy(&log).into_owned())
    }

    fn log_file(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    // What it says.

    /// Runs statements as superuser.
    pub fn sql(&self, statements: &str) {
        self.query(statements);
    }

    /// All rows that `sql` returns, as superuser; `None` is NULL.
    pub fn query(&self, sql: &str) -> Rows {
        self.try_query(sql).unwrap_or_else(|error| panic!("{sql}: {}", chain(&error)))
    }

    pub fn try_query(&self, sql: &str) -> Result<Rows, tokio_postgres::Error> {
        query(&self.superuser_conninfo(), sql)
    }

    /// The one value that `sql` returns, as superuser.
    pub fn value(&self, sql: &str) -> String {
        match self.query(sql).as_slice() {
            [row] => match row.as_slice() {
                [Some(value)] => value.clone(),
                _ => panic!("{sql}: {row:?} is not one value"),
            },
            rows => panic!("{sql}: {} rows", rows.len()),
        }
    }

    /// Waits until `sql` returns `expected`.
    pub fn wait_until(&self, sql: &str, expected: &str) {
        let mut last = String::new();
        let reached = process::poll(PATIENCE, || {
            last = self.try_query(sql).map_or_else(|error| chain(&error), |rows| format!("{rows:?}"));
            (last == format!("[[Some({expected:?})]]")).then_some(())
        });
        assert!(reached.is_some(), "{sql}: not `{expected}` within {PATIENCE:?} but {last}");
    }

    /// Waits until recovery has ended and the server takes writes.
    pub fn wait_recovered(&self) {
        self.wait_until("select pg_is_in_recovery()", "f");
    }

    // What happens to it.

    pub fn create_role(&self, name: &str, attributes: &str, password: &str) {
        self.sql(&format!("create role {name} {attributes} password '{password}'"));
    }

    /// Takes these lines for `pg_hba.conf` (besides the one for the Unix socket) at once.
    pub fn set_hba(&self, lines: &[&str]) {
        self.write_hba(lines);
        self.sql("select pg_reload_conf()");
    }

    fn write_hba(&self, lines: &[&str]) {
        let content = format!("local all all trust\nlocal replication all trust\n{}\n", lines.join("\n"));
        let file = self.data_directory.join("pg_hba.conf");
        fs::write(file, content).expect("write pg_hba.conf");
    }

    /// Adds `rows` rows to the table `load` (about 120 bytes of WAL and more for each).
    pub fn load(&self, rows: u64) {
        self.sql(&format!(
            "create table if not exists load (n bigint generated always as identity primary key, filler text);
             insert into load (filler) select md5(g::text) from generate_series(1, {rows}) g"
        ));
    }

    /// Ends the current WAL segment and returns its name.
    pub fn switch_segment(&self) -> String {
        self.value("select pg_walfile_name(pg_switch_wal())")
    }

    /// The timeline that a primary writes.
    pub fn timeline(&self) -> u32 {
        // Not what the control file says: that is the timeline of the last checkpoint.
        let segment = self.value("select pg_walfile_name(pg_current_wal_insert_lsn())");
        u32::from_str_radix(&segment[..8], 16).expect("a segment name begins with its timeline")
    }

    /// Makes a standby a primary.
    pub fn promote(&self) {
        assert_eq!(self.value("select pg_promote(true, 60)"), "t");
        self.wait_recovered();
    }

    /// Stops the server and tells how long that took.
    pub fn stop(&mut self, mode: Mode) -> Duration {
        let signal = match mode {
            Mode::Smart => Signal::TERM,
            Mode::Fast => Signal::INT,
            Mode::Immediate => Signal::QUIT,
        };
        let begin = Instant::now();
        let postmaster = self.postmaster.as_mut().expect("a running server");
        process::signal(postmaster.id(), signal);
        let status = process::wait(postmaster, PATIENCE);
        assert!(status.is_some(), "server does not stop ({mode:?}) within {PATIENCE:?}");
        self.postmaster = None;
        begin.elapsed()
    }

    /// Kills the postmaster and its children with SIGKILL, as the OOM killer or a lost node would.
    pub fn kill(&mut self) {
        let mut postmaster = self.postmaster.take().expect("a running server");
        // The postmaster first, or it would take the death of a child for a crash to recover from.
        let children = process::children(postmaster.id());
        process::signal(postmaster.id(), Signal::KILL);
        for child in &children {
            process::signal(*child, Signal::KILL);
        }
        process::wait(&mut postmaster, PATIENCE).expect("SIGKILL ends a process");
        let gone =
            process::poll(PATIENCE, || (!children.iter().any(|pid| process::is_running(*pid))).then_some(()));
        assert!(gone.is_some(), "children of the postmaster survive SIGKILL");
    }

    /// Starts a stopped or killed server on the same data and port.
    pub fn start_again(&mut self) {
        self.try_start().unwrap_or_else(|log| panic!("server does not start:\n{log}"));
    }

    /// Has the server find its `archive_command` and `restore_command` there, from its next start on.
    pub fn set_programs(&mut self, directory: &Path) {
        self.programs = Some(directory.to_owned());
    }

    /// The postmaster's pid, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.postmaster.as_ref().map(Child::id)
    }

    fn try_start(&mut self) -> Result<(), String> {
        assert!(self.postmaster.is_none(), "the server runs already");
        for _ in 0..5 {
            let logged = self.log().len();
            if self.start_once() {
                return Ok(());
            }
            let log = self.log().split_off(logged);
            // Another process was quicker to take the port. The first start of a server may use any other; later
            // ones keep it, because somebody may know it.
            if !log.contains("Address already in use") {
                return Err(log);
            }
            if logged == 0 {
                self.port = process::free_port();
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Err(self.log())
    }

    fn start_once(&mut self) -> bool {
        let log =
            File::options().create(true).append(true).open(self.log_file()).expect("open the server's log");
        // On SIGQUIT the postmaster ends its children before itself.
        let mut command = process::command(&program(self.major, "postgres").expect("postgres"), "QUIT");
        command.arg("-D").arg(&self.data_directory);
        // Here rather than in a file: a restored copy of the files must not claim the same place.
        command.args(["-c", &format!("port={}", self.port), "-c", "listen_addresses=127.0.0.1"]);
        command.args(["-c", &format!("unix_socket_directories={}", self.scratch.path().display())]);
        clean_environment(&mut command);
        if let Some(programs) = &self.programs {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let path = std::iter::once(programs.clone()).chain(std::env::split_paths(&path));
            command.env("PATH", std::env::join_paths(path).expect("no colons"));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("copy a file handle")).stderr(log);
        self.postmaster = Some(process::spawn(command).expect("start postgres"));

        let answered = process::poll(PATIENCE, || {
            if self.postmaster.as_mut()?.try_wait().expect("wait for postgres").is_some() {
                return Some(false);
            }
            self.try_query("select 1").ok().map(|_| true)
        });
        if answered == Some(true) {
            return true;
        }
        self.put_down();
        false
    }

    /// The quickest clean end: children, shared memory and all.
    fn put_down(&mut self) {
        if let Some(mut postmaster) = self.postmaster.take() {
            process::signal(postmaster.id(), Signal::QUIT);
            if process::wait(&mut postmaster, Duration::from_secs(10)).is_none() {
                self.postmaster = Some(postmaster);
                self.kill();
            }
        }
        self.remove_shared_memory();
    }

    /// A killed server leaves a System V segment behind; its id is the second word of the seventh line.
    fn remove_shared_memory(&self) {
        let Ok(pid_file) = fs::read_to_string(self.data_directory.join("postmaster.pid")) else { return };
        if let Some(id) = pid_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            let _ = Command::new("ipcrm").args(["-m", id]).stderr(Stdio::null()).status();
        }
    }

    // PostgreSQL's own tools.

    /// A client program that works with this server: its own, else the oldest newer one. `pg_waldump` reads one
    /// major version only, and the builds of 13 and 14 have none.
    pub fn tool(&self, name: &str) -> Option<PathBuf> {
        let candidates = if name == "pg_waldump" { self.major..=self.major } else { self.major..=MAJORS[5] };
        candidates.into_iter().find_map(|major| program(major, name))
    }

    /// A command for [`Server::tool`], run as the server's user.
    pub fn tool_command(&self, name: &str) -> Command {
        let program = self.tool(name).unwrap_or_else(|| panic!("no {name} for PostgreSQL {}", self.major));
        let mut command = process::command(&program, "KILL");
        clean_environment(&mut command);
        command
    }

    /// Checks a restored directory against its manifest; with the WAL too where there is some in `pg_wal`, and
    /// this version's own `pg_waldump`. `Err` is what the tool says.
    pub fn verify_backup(major: u32, directory: &Path) -> Result<(), String> {
        let own = program(major, "pg_verifybackup").is_some() && program(major, "pg_waldump").is_some();
        let has_wal = fs::read_dir(directory.join("pg_wal")).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|entry| entry.file_name().len() == 24))
        });
        let candidate = (major..=MAJORS[5]).find_map(|version| program(version, "pg_verifybackup"));
        let mut command = process::command(&candidate.expect("pg_verifybackup"), "KILL");
        if !own || !has_wal {
            command.arg("--no-parse-wal");
        }
        clean_environment(&mut command);
        let output = command.arg(directory).output().expect("run pg_verifybackup");
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(200)..].join("\n");
            eprintln!("--- log of PostgreSQL {} on port {}\n{tail}\n---", self.major, self.port);
        }
        self.put_down();
    }
}

/// Runs `sql` over a connection of its own.
pub fn query(conninfo: &str, sql: &str) -> Result<Rows, tokio_postgres::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("make a runtime");
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await?;
        let rows = async {
            let messages = client.simple_query(sql).await;
            drop(client); // ends the connection, and with it the join below
            messages
        };
        let (messages, _) = tokio::join!(rows, connection);
        let rows = messages?.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|n| row.get(n).map(str::to_owned)).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    })
}

/// The program `name` of exactly this major version.
fn program(major: u32, name: &str) -> Option<PathBuf> {
    Some(process::cache().join(format!("postgres/{major}/bin/{name}"))).filter(|path| path.exists())
}

fn run_tool(mut command: Command) {
    clean_environment(&mut command);
    let output = command.stdin(Stdio::null()).output().expect("run a PostgreSQL tool");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The developer's own `PGPASSWORD`, `PGHOST`… are not meant for test servers.
fn clean_environment(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    command.env("LC_ALL", "C");
    // Readable for the unprivileged user, unlike the directory that root may stand in.
    command.current_dir("/");
}

fn append(file: &Path, text: &str) {
    use std::io::Write;
    let mut file = File::options().append(true).open(file).expect("open a configuration file");
    file.write_all(text.as_bytes()).expect("write a configuration file");
}

/// The whole of an error: what tokio-postgres prints of a server's message is only `db error`.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        write!(text, ": {error}").expect("write to a string");
        source = error.source();
    }
    text
}

fn make_certificates(scratch: &Scratch) {
    let script = r#"
        set -e
        cd "$0"
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=pgkeep-test-ca -keyout ca.key -out ca.crt
        openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr
        printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\n' >server.ext
        openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile server.ext \
            -out server.crt
        chmod 600 ca.key server.key
    "#;
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(scratch.path());
    run_tool(command);
    for name in ["ca.key", "ca.crt", "server.key", "server.crt"] {
        process::give(&scratch.path().join(name));
    }
}

#[test]
fn servers_of_every_version_answer_stop_and_start_again() {
    for_each_major(|major| {
        let mut server = Server::builder(major).segment_size_mib(1).conf("max_wal_senders = 7").start();
        assert_eq!(server.value("show server_version_num").parse::<u32>().unwrap() / 10_000, major);
        assert_eq!(server.value("show wal_segment_size"), "1MB");
        assert_eq!(server.value("show data_checksums"), "on");
        assert_eq!(server.value("show max_wal_senders"), "7");
        server.load(100);
        assert_eq!(server.query("select null, count(*) from load"), [[None, Some("100".to_owned())]]);
        server.stop(Mode::Fast);
        assert!(server.try_query("select 1").is_err());
        server.start_again();
        assert_eq!(server.value("select count(*) from load"), "100");
    });
}

#[test]
fn a_standby_of_every_version_follows_and_is_promoted() {
    for_each_major(|major| {
        let mut primary = Server::builder(major).segment_size_mib(1).start();
        primary.load(1000);
        let standby = primary.standby();
        assert_eq!(standby.value("select pg_is_in_recovery()"), "t");
        primary.load(500);
        standby.wait_until("select count(*) from load", "1500");
        primary.kill();
        standby.promote();
        standby.load(1);
        assert_eq!(standby.value("select count(*) from load"), "1501");
        assert_eq!(standby.timeline(), 2);
    });
}

#[test]
fn a_killed_server_recovers_and_a_dropped_one_leaves_nothing() {
    let mut server = Server::start(*majors().last().unwrap());
    server.load(10);
    let first = server.pid().unwrap();
    server.kill();
    assert!(!process::is_running(first));
    server.start_again();
    assert_eq!(server.value("select count(*) from load"), "10");
    assert!(server.log().contains("database system was not properly shut down"));
    let postmaster = server.pid().unwrap();
    let children = process::children(postmaster);
    assert!(children.len() > 3, "{children:?}");
    let (port, directory) = (server.port(), server.scratch.path().to_owned());
    drop(server);
    assert!(!process::is_running(postmaster));
    assert!(children.iter().all(|pid| !process::is_running(*pid)));
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    assert!(!directory.exists());
}

#[test]
fn a_copy_of_a_server_starts_beside_it_and_passes_verification() {
    for_each_major(|major| {
        let server = Server::builder(major).segment_size_mib(1).start();
        server.load(50);
        let scratch = Scratch::new();
        let copy = scratch.directory("copy");
        let output = server
            .tool_command("pg_basebackup")
            .args(["-X", "stream", "-c", "fast", "-d", &server.superuser_conninfo(), "-D"])
            .arg(&copy)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Server::verify_backup(major, &copy).unwrap();
        let restored = Server::on_restored(major, &copy);
        restored.wait_recovered();
        assert_eq!(restored.value("select count(*) from load"), "50");
        assert_ne!(restored.port(), server.port());

        fs::write(scratch.path().join("copy/PG_VERSION"), "9.6\n").unwrap();
        drop(restored);
        assert!(Server::verify_backup(major, &copy).is_err());
        let Err(log) = Server::try_on_restored(major, &copy) else { panic!("9.6 cannot start here") };
        assert!(log.contains("not compatible with this version"), "{log}");
    });
}

#[test]
fn passwords_are_asked_for_over_tcp() {
    for auth in ["scram-sha-256", "md5", "password"] {
        let server = Server::builder(majors()[0])
            .auth(auth)
            .hba(&format!("host replication backup 127.0.0.1/32 {auth}"))
            .hba(&format!("host all sesame 127.0.0.1/32 {auth}"))
            .start();
        server.create_role("sesame", "LOGIN", "open");
        assert_eq!(query(&server.conninfo("sesame", "open"), "select 1").unwrap(), [[Some("1".to_owned())]]);
        assert!(
            chain(&query(&server.conninfo("sesame", "shut"), "select 1").unwrap_err()).contains("password")
        );
        let stranger = chain(&query(&server.conninfo("backup", "x"), "select 1").unwrap_err());
        assert!(stranger.contains("no pg_hba.conf entry"), "{stranger}");
    }
}

#[test]
fn certificates_are_signed_by_the_ca_that_is_named() {
    for major in majors().into_iter().filter(|major| TLS_MAJORS.contains(major)) {
        let server = Server::builder(major).ssl(true).start();
        assert_eq!(server.value("show ssl"), "on");
        let mut probe = Command::new("openssl");
        probe.args(["s_client", "-starttls", "postgres", "-verify_return_error", "-verify_ip", "127.0.0.1"]);
        probe.args(["-connect", &server.host_port(), "-CAfile"]).arg(server.ca_file());
        let output = probe.stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("Verify return code: 0 (ok)"), "PostgreSQL {major}: {text}");
    }
}
