//! The built program: one command at a time, or as an agent.
//!
//! It runs as the user that servers run as, without the developer's `PG*`, `AWS_*` and `PGKEEP_*` variables and
//! without a home directory, so that only what a test says counts.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::http::{self, Response};
use crate::process::{self, Scratch};
use crate::server::Server;

/// The program, at a place from which servers may run it too (`restore_command`).
pub fn path() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let built = Path::new(env!("CARGO_BIN_EXE_pgkeep"));
        if everybody_reaches(built) {
            return built.to_owned();
        }
        // Root's working tree may be closed to the user `postgres`. The cache is not, and the number of such
        // copies is that of the working trees on the machine.
        let directory = process::cache().join("bin");
        fs::create_dir_all(&directory).expect("make a directory in the cache");
        let tree = blake3::hash(built.as_os_str().as_encoded_bytes()).to_hex();
        let place = directory.join(format!("pgkeep-{}", &tree[..16]));
        let fresh = directory.join(format!("pgkeep-{}.{}", &tree[..16], std::process::id()));
        fs::copy(built, &fresh).expect("copy the program");
        fs::rename(&fresh, &place).expect("name the copy");
        place
    })
}

fn everybody_reaches(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    !rustix::process::geteuid().is_root()
        || path
            .ancestors()
            .all(|part| part.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0))
}

fn command() -> Command {
    command_of(path())
}

fn command_of(program: &Path) -> Command {
    let mut command = process::command(program, "KILL");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["PG", "AWS_", "RUST_LOG"].iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command.env("HOME", "/nonexistent").current_dir("/");
    command
}

/// What a finished command left.
#[derive(Debug)]
pub struct Output {
    /// The exit code; 128 + signal when a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub elapsed: Duration,
}

impl Output {
    /// Fails the test unless the exit code is `code`.
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "\n--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr);
        self
    }

    pub fn success(self) -> Self {
        self.expect_code(0)
    }

    /// What was printed, read as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in:\n{}", self.stdout))
    }
}

/// One run of a command: `pgkeep(["list", "--json"]).env("PGKEEP_SITE", "a").run().success()`.
pub struct Pgkeep {
    command: Command,
    stdin: Vec<u8>,
    limit: Duration,
}

pub fn pgkeep<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Pgkeep {
    let mut command = command();
    command.args(arguments);
    Pgkeep { command, stdin: Vec::new(), limit: Duration::from_mins(2) }
}

/// A run of another program, or of ours under another name.
pub fn program<A: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = A>) -> Pgkeep {
    let mut command = command_of(program);
    command.args(arguments);
    Pgkeep { command, stdin: Vec::new(), limit: Duration::from_mins(2) }
}

impl Pgkeep {
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn current_dir(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// How long it may run: two minutes unless told otherwise.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it and leaves it to the test. It dies with the test process, not with the value.
    pub fn spawn(mut self) -> Child {
        self.command.stdin(Stdio::null());
        process::spawn(self.command).expect("start pgkeep")
    }

    pub fn run(mut self) -> Output {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let begin = Instant::now();
        let line = format!("{:?}", self.command);
        let mut child = process::spawn(self.command).expect("start pgkeep");
        let mut stdin = child.stdin.take().expect("piped");
        let bytes = self.stdin;
        let feeder = thread::spawn(move || {
            // It need not read what it is given.
            let _ = stdin.write_all(&bytes);
        });
        let stdout = collect(child.stdout.take().expect("piped"));
        let stderr = collect(child.stderr.take().expect("piped"));
        let code = process::wait(&mut child, self.limit);
        let elapsed = begin.elapsed();
        if code.is_none() {
            process::signal(child.id(), Signal::KILL);
            process::wait(&mut child, Duration::from_secs(10));
        }
        let (stdout, stderr) =
            (stdout.join().expect("read its output"), stderr.join().expect("read its errors"));
        feeder.join().expect("feed it");
        let Some(code) = code else {
            panic!("{line} did not end within {:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}", self.limit)
        };
        Output { code, stdout, stderr, elapsed }
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A configuration with one site, `main`, that streams from `server` as role `backup`, password `secret`.
pub fn configuration(server: &Server, object_storage: &Value) -> Value {
    json!({
        "backup_sites": {
            "main": {
                "nodes": [{ "host": "127.0.0.1", "port": server.port(), "user": "backup", "password": "secret" }],
                "pg_data_directory": server.data_directory(),
                "object_storage": object_storage,
            }
        }
    })
}

/// The `object_storage` of a local directory.
pub fn local_storage(directory: &Path) -> Value {
    json!({ "storage_type": "local", "directory": directory })
}

/// `pgkeep run` with a configuration file in a directory of its own. Dies with its value.
pub struct Agent {
    scratch: Scratch,
    configuration: Value,
    environment: Vec<(OsString, OsString)>,
    address: SocketAddr,
    /// What answers 200 once the agent counts as started.
    probe: &'static str,
    child: Option<Child>,
}

/// How an agent ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// The exit code; 128 + signal when a signal ended it.
    pub code: i32,
    pub elapsed: Duration,
}

impl Agent {
    /// Starts an agent and waits until its storage is open (`/readyz`). Its HTTP address is chosen here.
    pub fn start(configuration: &Value) -> Self {
        Self::start_with(configuration, &[])
    }

    /// As [`Agent::start`], with environment variables.
    pub fn start_with(configuration: &Value, environment: &[(&str, &str)]) -> Self {
        Self::start_until("/readyz", configuration, environment)
    }

    /// As [`Agent::start`], for an agent whose storage cannot be reached: waits until it lives (`/healthz`).
    pub fn start_without_storage(configuration: &Value) -> Self {
        Self::start_until("/healthz", configuration, &[])
    }

    fn start_until(probe: &'static str, configuration: &Value, environment: &[(&str, &str)]) -> Self {
        let mut agent = Self {
            scratch: Scratch::new(),
            configuration: configuration.clone(),
            environment: environment.iter().map(|(name, value)| (name.into(), value.into())).collect(),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            probe,
            child: None,
        };
        agent.start_again();
        agent
    }

    /// Starts a stopped or killed agent, on another port.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "the agent runs already");
        for _ in 0..5 {
            let logged = self.log().len();
            if self.start_once() {
                return;
            }
            let log = self.log().split_off(logged);
            // Another process may have been quicker to take the port: then try another one.
            assert!(log.to_lowercase().contains("in use"), "the agent does not start:\n{log}");
        }
        panic!("the agent found no free port five times in a row");
    }

    fn start_once(&mut self) -> bool {
        let port = process::free_port();
        self.address.set_port(port);
        self.configuration["http_address"] = json!("127.0.0.1");
        self.configuration["http_port"] = json!(port);
        let file = self.scratch.write("config.json", self.configuration.to_string());
        let log =
            File::options().create(true).append(true).open(self.log_file()).expect("open the agent's log");
        let mut command = command();
        command.arg("run").arg("--config").arg(file).envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("copy a file handle")).stderr(log);
        let mut child = process::spawn(command).expect("start an agent");
        let address = self.address;
        let answered = process::poll(Duration::from_secs(30), || {
            if child.try_wait().expect("wait for a child of ours").is_some() {
                return Some(false);
            }
            http::get(address, self.probe).ok().filter(|answer| answer.status == 200).map(|_| true)
        });
        if answered == Some(true) {
            self.child = Some(child);
            return true;
        }
        process::signal(child.id(), Signal::KILL);
        process::wait(&mut child, Duration::from_secs(10));
        let probe = self.probe;
        assert!(answered.is_some(), "the agent does not answer on http://{address}{probe}:\n{}", self.log());
        false
    }

    /// Where it serves HTTP.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn config_file(&self) -> PathBuf {
        self.scratch.path().join("config.json")
    }

    pub fn get(&self, path: &str) -> Response {
        http::get(self.address, path).unwrap_or_else(|error| panic!("GET {path}: {error}\n{}", self.log()))
    }

    /// `GET /status`
    pub fn status(&self) -> Value {
        let response = self.get("/status");
        serde_json::from_slice(&response.body)
            .unwrap_or_else(|error| panic!("{error} in {}", response.text()))
    }

    /// Everything it has logged so far, through all its starts.
    pub fn log(&self) -> String {
        fs::read(self.log_file())
            .map_or_else(|_| String::new(), |log| String::from_utf8_lossy(&log).into_owned())
    }

    fn log_file(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The most memory it has had resident since it started, without the pages of the program file: those are
    /// 13 MiB in a release build and twice as much in a debug build. In bytes.
    pub fn peak_memory(&self) -> u64 {
        let pid = self.pid().expect("a running agent");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read /proc");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("the field is there");
            line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of kB") * 1024
        };
        field("VmHWM:") - field("RssFile:")
    }

    /// Sends any signal (SIGHUP, SIGSTOP…).
    pub fn signal(&self, signal: Signal) {
        process::signal(self.pid().expect("a running agent"), signal);
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> Option<i32> {
        process::wait(self.child.as_mut()?, Duration::ZERO)
    }

    /// Asks it to end (SIGTERM) and waits.
    pub fn terminate(&mut self) -> Ended {
        self.end(Signal::TERM)
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Ended {
        self.end(Signal::KILL)
    }

    fn end(&mut self, signal: Signal) -> Ended {
        let begin = Instant::now();
        let mut child = self.child.take().expect("a running agent");
        process::signal(child.id(), signal);
        let code = process::wait(&mut child, Duration::from_mins(1));
        let elapsed = begin.elapsed();
        let Some(code) = code else {
            self.child = Some(child);
            panic!("the agent did not end within a minute of {signal:?}:\n{}", self.log())
        };
        Ended { code, elapsed }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::signal(child.id(), Signal::KILL);
            process::wait(&mut child, Duration::from_secs(10));
        }
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- log of the agent\n{}\n---", lines[lines.len().saturating_sub(200)..].join("\n"));
        }
    }
}

#[test]
fn the_program_is_where_servers_can_run_it() {
    assert!(everybody_reaches(path()), "{}", path().display());
    assert_eq!(fs::read(path()).unwrap(), fs::read(env!("CARGO_BIN_EXE_pgkeep")).unwrap());
}
