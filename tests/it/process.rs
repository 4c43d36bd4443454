//! Processes that cannot outlive the tests, and directories they can use.
//!
//! PostgreSQL refuses to run as root. When root runs the tests, servers and pgkeep alike run as the user
//! `postgres`, in directories of that user, so that a test sees the permissions a real deployment has.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// The unprivileged user of root's tests.
const ACCOUNT: &str = "postgres";

/// User and group that servers and pgkeep run as; `None`: the ones we have.
fn account() -> Option<(u32, u32)> {
    static ACCOUNT_IDS: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    *ACCOUNT_IDS.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let id = |what| {
            let output = Command::new("id").args([what, ACCOUNT]).output().expect("run `id`");
            String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or_else(|_| {
                panic!("root's tests need a user `{ACCOUNT}`; scripts/install-test-deps makes one")
            })
        };
        Some((id("-u"), id("-g")))
    })
}

/// Says that the test at hand, or a part of it, is left out, and why. Not with `eprintln!`, which the test harness
/// hides when a test passes.
pub fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("SKIPPED {test}: {why}\n");
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("standard error takes a line");
}

/// A command run by the unprivileged user, which gets `at_our_death` when this test process ends in any way,
/// SIGKILL and Ctrl-C included. Its pid is the program's own.
pub fn command(program: &Path, at_our_death: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", at_our_death]);
    if let Some((user, group)) = account() {
        command.args([format!("--reuid={user}"), format!("--regid={group}"), "--init-groups".to_owned()]);
    }
    command.arg(program);
    command
}

/// Starts `command` on a thread that lives as long as this process: Linux takes the death of the thread that
/// started a child for the death of its parent, and test threads end before the fixtures that tests share.
pub fn spawn(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                // A caller that is gone has no use for the child.
                let _ = reply.send(command.spawn());
            }
        });
        jobs
    });
    let (reply, child) = mpsc::channel();
    spawner.send((command, reply)).expect("the spawner never ends");
    child.recv().expect("the spawner answers every job")
}

/// Sends `signal`; a process that is gone already is fine.
pub fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a child has a positive pid");
    let _ = rustix::process::kill_process(pid, signal);
}

/// Waits until `child` has ended, at most `limit`; returns its exit code (128 + signal when one ended it).
pub fn wait(child: &mut Child, limit: Duration) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    poll(limit, || child.try_wait().expect("wait for a child of ours"))
        .map(|status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// Direct children of `pid`.
pub fn children(pid: u32) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|candidate| parent(*candidate) == Some(pid))
        .collect()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // pid (name) state ppid …: the name may hold blanks and parentheses, so count from its end.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

pub fn is_running(pid: u32) -> bool {
    // A zombie has ended; whoever waits for it is late.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| Some(stat.rsplit_once(')')?.1.trim_start().starts_with('Z')))
        .is_some_and(|zombie| !zombie)
}

/// Asks `probe` until it answers, at most `limit`.
pub fn poll<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        if begin.elapsed() > limit {
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A loopback port that nobody used a moment ago. Somebody may take it before it is used: try again then.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a loopback port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// Where scripts/install-test-deps put what the tests run; the same rule as in scripts/test-cache.
pub fn cache() -> PathBuf {
    let shared = PathBuf::from("/var/cache/pgkeep-tests");
    if let Some(named) = std::env::var_os("PGKEEP_TEST_CACHE").filter(|named| !named.is_empty()) {
        PathBuf::from(named)
    } else if rustix::process::geteuid().is_root() || shared.join("complete").exists() {
        shared
    } else {
        let home = PathBuf::from(std::env::var_os("HOME").expect("$HOME"));
        std::env::var_os("XDG_CACHE_HOME").map_or(home.join(".cache"), PathBuf::from).join("pgkeep-tests")
    }
}

/// A temporary directory that servers and pgkeep can write. Gone when dropped, unless `PGKEEP_TEST_KEEP` is set.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        // Short: the path of a Unix socket has room for 107 bytes.
        let mut directory =
            tempfile::Builder::new().prefix("pgk").tempdir().expect("make a temporary directory");
        give(directory.path());
        if std::env::var_os("PGKEEP_TEST_KEEP").is_some() {
            directory.disable_cleanup(true);
            eprintln!("kept: {}", directory.path().display());
        }
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Makes (if need be) the directory `name` inside.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(&path).expect("make a directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("set its mode");
        give(&path);
        path
    }

    /// Writes the file `name` inside.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).expect("write a file");
        give(&path);
        path
    }
}

/// Makes `path` belong to the user that servers and pgkeep run as.
pub fn give(path: &Path) {
    if let Some((user, group)) = account() {
        chown(path, Some(user), Some(group))
            .unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
    }
}

/// As [`give`], with all that is below.
pub fn give_tree(path: &Path) {
    if account().is_none() {
        return;
    }
    give(path);
    for entry in fs::read_dir(path).expect("read a directory").map(|entry| entry.expect("read a directory")) {
        let kind = entry.file_type().expect("a file has a type");
        if kind.is_dir() {
            give_tree(&entry.path());
        } else if kind.is_file() {
            give(&entry.path());
        }
    }
}

#[test]
fn a_child_dies_with_the_process_that_started_it() {
    // The death of a shell that starts a child as we do stands for our own.
    let scratch = Scratch::new();
    let pid_file = scratch.path().join("pid");
    let script = "setpriv --pdeathsig KILL sleep 300 & echo $! >\"$0\"; wait";
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg(&pid_file);
    let mut shell = spawn(shell).expect("start a shell");
    let sleeper: u32 =
        poll(Duration::from_secs(10), || fs::read_to_string(&pid_file).ok()?.trim().parse().ok())
            .expect("the shell tells its child's pid");
    assert!(is_running(sleeper));
    thread::sleep(Duration::from_millis(100)); // setpriv sets the signal before it becomes `sleep`
    signal(shell.id(), Signal::KILL);
    assert_eq!(wait(&mut shell, Duration::from_secs(10)), Some(137));
    assert!(poll(Duration::from_secs(10), || (!is_running(sleeper)).then_some(())).is_some());
}
