//! Remembers, outside the database, which commits the database acknowledged.
//!
//! After a disaster and a restore, the difference between this and what the server holds is what was lost.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use tokio_postgres::NoTls;

use crate::server::Server;

/// One row of the table `ledger` whose commit was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    pub row: i64,
    /// Just before the row was sent, and just after its commit was acknowledged.
    pub sent: SystemTime,
    pub acknowledged: SystemTime,
}

/// The acknowledged commits, in order.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Vec<Commit>);

impl Ledger {
    pub fn commits(&self) -> &[Commit] {
        &self.0
    }

    /// Commits acknowledged before `time`: a restore to that time must have them.
    pub fn acknowledged_before(&self, time: SystemTime) -> Self {
        Self(self.0.iter().copied().filter(|commit| commit.acknowledged < time).collect())
    }

    /// Those that `server` does not hold.
    pub fn missing_in(&self, server: &Server) -> Vec<Commit> {
        let there: HashSet<i64> = server
            .query("select row_number from ledger")
            .into_iter()
            .filter_map(|row| row.into_iter().next().flatten()?.parse().ok())
            .collect();
        self.0.iter().copied().filter(|commit| !there.contains(&commit.row)).collect()
    }
}

/// Commits a row every so often until stopped, through restarts of the server.
pub struct Writer {
    ledger: Arc<Mutex<Ledger>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Writes to the table `ledger` of `server`, with `pause` between two rows.
    pub fn start(server: &Server, pause: Duration) -> Self {
        server.sql("create table if not exists ledger (row_number bigint primary key, written timestamptz)");
        let ledger = Arc::new(Mutex::new(Ledger::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (ledger, stop, conninfo) =
                (Arc::clone(&ledger), Arc::clone(&stop), server.superuser_conninfo());
            move || write(&conninfo, pause, &ledger, &stop)
        });
        Self { ledger, stop, thread: Some(thread) }
    }

    /// What has been acknowledged so far.
    pub fn ledger(&self) -> Ledger {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `count` more rows are acknowledged.
    pub fn wait_for_more(&self, count: usize) {
        let goal = self.ledger().0.len() + count;
        let reached =
            crate::process::poll(Duration::from_mins(1), || (self.ledger().0.len() >= goal).then_some(()));
        assert!(reached.is_some(), "the server did not acknowledge {count} more rows within a minute");
    }

    pub fn stop(mut self) -> Ledger {
        self.end();
        self.ledger()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end();
    }
}

fn write(conninfo: &str, pause: Duration, ledger: &Mutex<Ledger>, stop: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("make a runtime");
    let mut row = 0;
    while !stop.load(Ordering::Relaxed) {
        // Ends with an error when the server goes; then a new connection, a little later.
        let _ = runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(conninfo, NoTls).await?;
            let rows = async {
                while !stop.load(Ordering::Relaxed) {
                    // A row whose outcome is unknown is not written again: its number may be taken.
                    row += 1;
                    let sent = SystemTime::now();
                    let insert = format!("insert into ledger values ({row}, clock_timestamp())");
                    client.batch_execute(&insert).await?;
                    let commit = Commit { row, sent, acknowledged: SystemTime::now() };
                    ledger.lock().unwrap_or_else(PoisonError::into_inner).0.push(commit);
                    tokio::time::sleep(pause).await;
                }
                Ok(())
            };
            tokio::pin!(connection);
            tokio::select! {
                outcome = rows => outcome,
                outcome = &mut connection => outcome,
            }
        });
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_ledger_knows_what_a_lost_server_had_acknowledged() {
    let mut server = Server::start(crate::server::majors()[0]);
    let writer = Writer::start(&server, Duration::from_millis(1));
    writer.wait_for_more(20);
    server.kill();
    server.start_again();
    writer.wait_for_more(20);
    let ledger = writer.stop();
    assert!(ledger.commits().len() >= 40);
    assert!(ledger.missing_in(&server).is_empty());
    let lost = ledger.commits()[7];
    server.sql(&format!("delete from ledger where row_number = {}", lost.row));
    assert_eq!(ledger.missing_in(&server), [lost]);
    assert!(ledger.acknowledged_before(lost.acknowledged).missing_in(&server).is_empty());
}
