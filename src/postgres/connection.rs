//! One session with a server over any byte stream: startup, queries, and the two buffers.
//!
//! Shell. Everything that arrives unasked (parameters, notices) is dealt with here, in one place, so that
//! nothing above is ever surprised by it. Reading goes in large pieces into one buffer out of which
//! messages are cut without copying; the buffer is used again as soon as nobody holds a piece of it.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::Instant;

use super::auth::{Authenticator, Verdict};
use super::backup_stream::BackupStream;
use super::connect::ByteStream;
use super::error::{Error, Knock, OLDEST_MAJOR};
use super::replication::WalStream;
use super::wire::{MAX_GREETING, MAX_MESSAGE, Message, Row, ServerError, Step, frontend};

/// Bytes asked of the operating system at once: enough that calls cost nothing beside copying at
/// 1 GB/s. A piece cut out of the buffer keeps it alive, so that what a consumer holds costs it up to
/// this much memory.
const READ_BYTES: usize = 256 << 10;

/// Room below which the next read goes to a fresh buffer rather than to the rest of the old one.
const MIN_READ_BYTES: usize = 32 << 10;

/// Notices kept until they are taken: a base backup of a damaged cluster warns up to five times a file.
const MAX_NOTICES: usize = 100;

/// What kind of walsender to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Replication commands only. `pg_hba.conf` goes by the word `replication`.
    Physical,
    /// Replication commands and SQL. `pg_hba.conf` goes by the database's name.
    Database,
}

/// What to say at startup.
pub(super) struct Login<'a> {
    pub knock: &'a Knock,
    pub mode: Mode,
    pub application_name: &'a str,
    pub options: Option<&'a str>,
    pub authenticator: Authenticator,
}

/// An authenticated replication session.
///
/// Futures of its methods may be dropped only where the method says so; after any other dropped future,
/// and after any error but a refusal by the server, the next command fails and the connection is to be
/// closed.
pub struct Connection<S = ByteStream> {
    stream: S,
    inbox: BytesMut,
    outbox: BytesMut,
    /// The stream holds nothing back of what was written.
    is_flushed: bool,
    parameters: BTreeMap<String, String>,
    notices: VecDeque<ServerError>,
    pub(super) place: String,
    pub(super) mode: Mode,
    pub(super) activity: Activity,
    /// The server's clock when it last told it (µs since 2000), and ours then.
    pub(super) server_clock: Option<(i64, Instant)>,
}

/// What the session is in the midst of.
pub(super) enum Activity {
    /// The server waits for a command.
    Idle,
    /// A command was sent and its answers were not read to the end.
    Busy,
    Wal(Box<WalStream>),
    Backup(Box<BackupStream>),
}

impl<S> std::fmt::Debug for Connection<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("place", &self.place)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Introduces ourselves over a fresh byte stream and waits until the server is ready.
    pub(super) async fn start(stream: S, login: Login<'_>) -> Result<Self, Error> {
        let Login { knock, mode, application_name, options, mut authenticator } = login;
        let mut connection = Self {
            stream,
            inbox: BytesMut::new(),
            outbox: BytesMut::new(),
            is_flushed: true,
            parameters: BTreeMap::new(),
            notices: VecDeque::new(),
            place: knock.place.clone(),
            mode,
            activity: Activity::Busy,
            server_clock: None,
        };
        let mut parameters = vec![("user", knock.user.as_str()), ("application_name", application_name)];
        match mode {
            Mode::Physical => parameters.push(("replication", "true")),
            Mode::Database => {
                parameters.push(("replication", "database"));
                parameters.push(("database", &knock.database));
            }
        }
        parameters.extend(options.map(|options| ("options", options)));
        frontend::startup(&mut connection.outbox, &parameters);
        let mut accepted = false;
        loop {
            connection.flush().await?;
            let limit = if accepted { MAX_MESSAGE } else { MAX_GREETING };
            match connection.read_message(limit).await? {
                Message::Authentication(step) => {
                    let verdict = authenticator.step(step, &mut connection.outbox).map_err(|source| {
                        Error::Auth { place: knock.place.clone(), user: knock.user.clone(), source }
                    })?;
                    accepted |= verdict == Verdict::Accepted;
                }
                Message::Error(error) => return Err(knock.refused(error)),
                Message::Ready if accepted => break,
                Message::BackendKeyData | Message::NegotiateProtocolVersion => {}
                other => return Err(Error::Protocol(format!("{} during startup", other.name()))),
            }
        }
        connection.activity = Activity::Idle;
        match connection.parameter("server_version") {
            Some(version) if major(version).is_some_and(|major| major < OLDEST_MAJOR) => {
                Err(Error::TooOld { place: knock.place.clone(), version: version.to_owned() })
            }
            _ => Ok(connection),
        }
    }

    /// Where the server is, for messages: `db1:5432`.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// A setting that the server reports by itself, as it stands now.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Takes the notices and warnings that came since the last call, the oldest first; of very many, the
    /// last hundred.
    pub fn take_notices(&mut self) -> Vec<ServerError> {
        self.notices.drain(..).collect()
    }

    /// Says goodbye. Not needed: a closed stream tells the server as much.
    pub async fn close(mut self) {
        frontend::terminate(&mut self.outbox);
        // The server may be gone already, and nobody could do anything about it.
        let _ = self.flush().await;
        let _ = self.stream.shutdown().await;
    }

    /// Runs one command of the simple protocol and gives its rows.
    ///
    /// # Errors
    /// [`Error::Server`] when the server refuses; the connection then takes the next command.
    pub(super) async fn query(&mut self, command: &str) -> Result<Vec<Row>, Error> {
        self.begin(command).await?;
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            match self.next_message().await {
                Ok(Message::DataRow(row)) => rows.push(row),
                Ok(Message::Error(error)) => {
                    let ends = error.ends_session();
                    refused = Some(Error::Server { command: command.to_owned(), source: Box::new(error) });
                    if ends {
                        break;
                    }
                }
                Ok(Message::Ready) => {
                    self.activity = Activity::Idle;
                    break;
                }
                Ok(Message::RowDescription(_) | Message::CommandComplete(_) | Message::EmptyQuery) => {}
                Ok(other) => return Err(Error::Protocol(format!("{} after `{command}`", other.name()))),
                Err(Error::Closed) if refused.is_some() => break,
                Err(error) => return Err(error),
            }
        }
        refused.map_or(Ok(rows), Err)
    }

    /// Sends a command whose answers the caller reads.
    pub(super) async fn begin(&mut self, command: &str) -> Result<(), Error> {
        let is_idle = match &self.activity {
            Activity::Idle => true,
            Activity::Busy => false,
            Activity::Wal(stream) => stream.is_over(),
            Activity::Backup(stream) => stream.is_over(),
        };
        if !is_idle {
            return Err(Error::Protocol(format!("`{command}` in the midst of another command")));
        }
        self.activity = Activity::Busy;
        frontend::query(&mut self.outbox, command);
        self.flush().await
    }

    /// The next message that is an answer. May be dropped at any time without losing anything.
    pub(super) async fn next_message(&mut self) -> Result<Message, Error> {
        self.read_message(MAX_MESSAGE).await
    }

    async fn read_message(&mut self, limit: usize) -> Result<Message, Error> {
        loop {
            match Message::take(&mut self.inbox, limit)? {
                Step::Message(Message::ParameterStatus { name, value }) => {
                    self.parameters.insert(name, value);
                }
                Step::Message(Message::Notice(notice)) => {
                    if self.notices.len() == MAX_NOTICES {
                        self.notices.pop_front();
                    }
                    self.notices.push_back(notice);
                }
                Step::Message(Message::Notification) => {}
                Step::Message(message) => return Ok(message),
                Step::Needs(missing) => {
                    let spare = self.inbox.capacity() - self.inbox.len();
                    if spare < missing.max(MIN_READ_BYTES) {
                        self.inbox.reserve(missing.max(READ_BYTES));
                    }
                    // Cancel safe: bytes are in the buffer or were not read.
                    match self.stream.read_buf(&mut self.inbox).await {
                        Ok(0) => return Err(Error::Closed),
                        Ok(_) => {}
                        Err(error) if is_hang_up(&error) => return Err(Error::Closed),
                        Err(error) => return Err(Error::Io(error)),
                    }
                }
            }
        }
    }

    /// Puts a message of the copy stream into the outbox.
    pub(super) fn push(&mut self, write: impl FnOnce(&mut BytesMut)) {
        write(&mut self.outbox);
    }

    /// Sends the outbox. May be dropped at any time: what was not sent is sent next time.
    pub(super) async fn flush(&mut self) -> Result<(), Error> {
        while !self.outbox.is_empty() {
            self.is_flushed = false;
            match self.stream.write_buf(&mut self.outbox).await {
                Ok(0) => return Err(Error::Closed),
                Ok(_) => {}
                // A server that ends the session says why before it closes, and that, with all it sent
                // before, is still to be read: the next read tells the caller.
                Err(error) if is_hang_up(&error) => {
                    self.outbox.clear();
                    self.is_flushed = true;
                }
                Err(error) => return Err(Error::Io(error)),
            }
        }
        if !self.is_flushed {
            // TLS keeps records of its own.
            match self.stream.flush().await {
                Err(error) if !is_hang_up(&error) => return Err(Error::Io(error)),
                _ => self.is_flushed = true,
            }
        }
        Ok(())
    }
}

/// The single value of a one-row answer.
pub(super) fn single(rows: &[Row], column: usize) -> Option<&Bytes> {
    rows.first()?.get(column)
}

/// The major version at the start of `server_version`, such as `15.20 (Debian …)` or `19beta3`.
pub(super) fn major(server_version: &str) -> Option<u32> {
    let digits = server_version.bytes().take_while(u8::is_ascii_digit).count();
    server_version[..digits].parse().ok()
}

/// A server that is killed resets the connection; rustls calls a missing goodbye "unexpected EOF".
fn is_hang_up(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof)
}
