//! What one can ask of a walsender, typed.
//!
//! Shell: sends the commands of [`replication`](super::replication) over a [`Connection`] and folds the
//! answers with the pure types beside it.

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::backup_stream::{BackupEvent, BackupStep, BackupStream, BaseBackupStart};
use super::connection::{Activity, Connection, Mode, major, single};
use super::error::Error;
use super::lsn::Lsn;
use super::replication::{
    self, BaseBackupOptions, Grammar, SlotName, SlotState, Started, SystemPosition, WalMessage, WalStep,
    WalStream, field,
};
use super::segment::SegmentSize;
use super::system::SystemIdentity;
use super::timeline::TimelineId;
use super::wire::{Message, ServerError, frontend};

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Which cluster this is, and where its WAL stands.
    pub async fn identify_system(&mut self) -> Result<SystemPosition, Error> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        rows.first()
            .and_then(SystemPosition::parse)
            .ok_or_else(|| Error::Protocol("answer to IDENTIFY_SYSTEM cannot be read".to_owned()))
    }

    /// The value of a setting, as `SHOW` prints it.
    ///
    /// # Errors
    /// SQLSTATE 42704 where this server does not know the setting, 42501 where our role may not read it.
    pub async fn show(&mut self, setting: &str) -> Result<String, Error> {
        let is_name =
            !setting.is_empty() && setting.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.".contains(&b));
        if !is_name {
            return Err(Error::Protocol(format!("`{setting}` is not the name of a setting")));
        }
        let rows = self.query(&format!("SHOW {setting}")).await?;
        let value = rows.first().and_then(|row| row.text(0)).map(str::to_owned);
        value.ok_or_else(|| Error::Protocol(format!("answer to SHOW {setting} cannot be read")))
    }

    /// What stays the same for as long as this cluster runs.
    pub async fn identity(&mut self) -> Result<SystemIdentity, Error> {
        let system_identifier = self.identify_system().await?.system_identifier;
        let server_version_num = self.show("server_version_num").await?;
        let segment_size = self.show("wal_segment_size").await?;
        let wrong = |what: &str| Error::Protocol(format!("`{what}` cannot be read"));
        Ok(SystemIdentity {
            system_identifier,
            server_version_num: server_version_num.parse().map_err(|_| wrong("server_version_num"))?,
            segment_size: SegmentSize::parse_setting(&segment_size).map_err(|_| wrong("wal_segment_size"))?,
        })
    }

    /// The text of a timeline's history file; `None` when the server has none, as for timeline 1.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Option<Bytes>, Error> {
        match self.query(&format!("TIMELINE_HISTORY {timeline}")).await {
            Ok(rows) => single(&rows, 1)
                .map(|content| Some(Bytes::copy_from_slice(content)))
                .ok_or_else(|| Error::Protocol("answer to TIMELINE_HISTORY cannot be read".to_owned())),
            // Undefined file.
            Err(error) if error.code() == Some("58P01") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the server is in recovery.
    ///
    /// From 14 on the server reports it unasked, and follows promotions. Before that, every transaction of
    /// a server in recovery is read-only, whatever a session may wish.
    pub async fn is_standby(&mut self) -> Result<bool, Error> {
        match self.parameter("in_hot_standby") {
            Some(value) => Ok(value == "on"),
            None => Ok(self.show("transaction_read_only").await? == "on"),
        }
    }

    /// Makes a physical slot that holds back WAL from the last checkpoint's redo position on. A temporary
    /// one goes with the connection, and with its first error.
    pub async fn create_slot(&mut self, slot: &SlotName, temporary: bool) -> Result<(), Error> {
        match self.query(&replication::create_slot(slot, temporary)).await {
            Ok(_) => Ok(()),
            Err(error) => Err(of_slot(slot, error)),
        }
    }

    /// # Errors
    /// [`Error::SlotMissing`], [`Error::SlotInUse`].
    pub async fn drop_slot(&mut self, slot: &SlotName) -> Result<(), Error> {
        match self.query(&format!("DROP_REPLICATION_SLOT \"{slot}\"")).await {
            Ok(_) => Ok(()),
            Err(error) => Err(of_slot(slot, error)),
        }
    }

    /// What a slot holds back. Servers before 15 tell only when the connection speaks SQL
    /// ([`Mode::Database`]), else the answer is [`SlotState::Unknown`].
    pub async fn read_slot(&mut self, slot: &SlotName) -> Result<SlotState, Error> {
        if self.server_major() >= 15 {
            let rows = self.query(&format!("READ_REPLICATION_SLOT \"{slot}\"")).await?;
            return Ok(rows.first().map_or(SlotState::Missing, SlotState::parse));
        }
        if self.mode == Mode::Physical {
            return Ok(SlotState::Unknown);
        }
        let rows = self.query(&replication::slot_query(slot)).await?;
        Ok(SlotState::parse_view(rows.first()))
    }

    /// PostgreSQL's major version, such as 15; zero when the server did not tell.
    pub fn server_major(&self) -> u32 {
        self.parameter("server_version").and_then(major).unwrap_or(0)
    }

    /// Moves a physical slot forward to `lsn`, which then is the oldest WAL it holds back; needs
    /// [`Mode::Database`]. Moves it at most to where the server itself is, and says where.
    ///
    /// # Errors
    /// SQLSTATE 55000 when the slot is there already or further.
    pub async fn advance_slot(&mut self, slot: &SlotName, lsn: Lsn) -> Result<Lsn, Error> {
        let command = format!("SELECT end_lsn FROM pg_replication_slot_advance('{slot}', '{lsn}')");
        match self.query(&command).await {
            Ok(rows) => rows
                .first()
                .and_then(|row| field(row, 0))
                .ok_or_else(|| Error::Protocol("answer to slot advance cannot be read".to_owned())),
            Err(error) if error.code() == Some("55000") => Err(error),
            Err(error) => Err(of_slot(slot, error)),
        }
    }

    /// Begins to stream WAL; then call [`next_wal`](Self::next_wal) until it says that the stream is over,
    /// and [`send_status`](Self::send_status) at least every third of `wal_sender_timeout`.
    ///
    /// # Errors
    /// Those of the slot, and [`Error::NotInHistory`]. [`Error::WalRemoved`] and [`Error::AheadOfServer`]
    /// come from the first `next_wal`.
    pub async fn start_replication(
        &mut self,
        slot: Option<&SlotName>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Started, Error> {
        self.begin(&replication::start_replication(slot, start, timeline)).await?;
        self.activity = Activity::Wal(Box::new(WalStream::new(slot.cloned())));
        match self.wal_step().await? {
            WalStep::Started(started) => Ok(started),
            step => Err(Error::Protocol(format!("{step:?} in answer to START_REPLICATION"))),
        }
    }

    /// The next message of the WAL stream. **May be dropped at any time** (in `tokio::select!`) without
    /// losing anything.
    ///
    /// After an error with SQLSTATE ([`Error::WalRemoved`], …), [`WalMessage::TimelineEnded`] and
    /// [`stop`](Self::stop) the connection takes commands again.
    pub async fn next_wal(&mut self) -> Result<WalMessage, Error> {
        match self.wal_step().await? {
            WalStep::Message(message) => Ok(message),
            step => Err(Error::Protocol(format!("{step:?} in a WAL stream"))),
        }
    }

    /// Reads until there is something to tell.
    async fn wal_step(&mut self) -> Result<WalStep, Error> {
        loop {
            // Also sends what a dropped future left behind.
            self.flush().await?;
            let message = self.next_message().await;
            let Activity::Wal(stream) = &mut self.activity else {
                return Err(Error::Protocol("no WAL stream is running".to_owned()));
            };
            let step = match message {
                Ok(message) => stream.accept(message)?,
                Err(Error::Closed) => return Err(stream.closed()),
                Err(error) => return Err(error),
            };
            let clock = stream.server_clock();
            match step {
                WalStep::Continue => {}
                WalStep::AnswerCopyDone => self.push(frontend::copy_done),
                step => {
                    self.server_clock = clock.map(|clock| (clock, Instant::now()));
                    return Ok(step);
                }
            }
        }
    }

    /// Tells the server how far we are: `write` is received, `flush` is safe for good. What is below
    /// `flush` may be removed by the server. Both are positions of the next byte; zero says nothing.
    ///
    /// May be dropped at any time: a status half sent goes out with the next call to anything. A server
    /// that is gone shows in the next [`next_wal`](Self::next_wal), after what it said last.
    pub async fn send_status(&mut self, write: Lsn, flush: Lsn, reply_requested: bool) -> Result<(), Error> {
        match &self.activity {
            Activity::Wal(stream) if stream.is_streaming() => {}
            // The stream has just ended; the server takes no status any more, and the next message says so.
            Activity::Wal(_) => return Ok(()),
            _ => return Err(Error::Protocol("no WAL stream is running".to_owned())),
        }
        // The server only shows this time to its users. Its own clock, carried on, needs no clock of ours.
        let clock = self.server_clock.map_or(0, |(clock, at)| {
            clock.saturating_add(i64::try_from(at.elapsed().as_micros()).unwrap_or(i64::MAX))
        });
        let status = replication::status_update(write, flush, clock, reply_requested);
        self.push(|out| frontend::copy_data(out, &status));
        self.flush().await
    }

    /// Ends the WAL stream; the connection then takes commands again. WAL that was on its way is dropped.
    pub async fn stop(&mut self) -> Result<(), Error> {
        let Activity::Wal(stream) = &mut self.activity else { return Ok(()) };
        if stream.is_over() {
            return Ok(());
        }
        if stream.stop() {
            self.push(frontend::copy_done);
        }
        loop {
            match self.wal_step().await? {
                WalStep::Stopped => return Ok(()),
                WalStep::Message(WalMessage::ServerStopped) => return Err(Error::Closed),
                _ => {}
            }
        }
    }

    /// Begins a base backup and waits for the server's checkpoint, which takes long unless it is `fast`.
    /// Then call [`next_backup`](Self::next_backup) until it says [`BackupEvent::Finished`].
    pub async fn base_backup(&mut self, options: &BaseBackupOptions) -> Result<BaseBackupStart, Error> {
        let grammar = Grammar::of_major(self.server_major());
        self.begin(&options.command(grammar)).await?;
        self.activity = Activity::Backup(Box::new(BackupStream::new(grammar)));
        match self.backup_step().await? {
            BackupStep::Started(start) => Ok(start),
            step => Err(Error::Protocol(format!("{step:?} in answer to BASE_BACKUP"))),
        }
    }

    /// The next event of the base backup. May be dropped at any time without losing anything.
    pub async fn next_backup(&mut self) -> Result<BackupEvent, Error> {
        match self.backup_step().await? {
            BackupStep::Event(event) => Ok(event),
            step => Err(Error::Protocol(format!("{step:?} in a base backup"))),
        }
    }

    async fn backup_step(&mut self) -> Result<BackupStep, Error> {
        loop {
            let message: Result<Message, Error> = self.next_message().await;
            let Activity::Backup(stream) = &mut self.activity else {
                return Err(Error::Protocol("no base backup is running".to_owned()));
            };
            match message {
                Ok(message) => match stream.accept(message)? {
                    BackupStep::Continue => {}
                    step => return Ok(step),
                },
                Err(Error::Closed) => return Err(stream.closed()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sorts a refusal of a command about a slot.
fn of_slot(slot: &SlotName, error: Error) -> Error {
    let sort: fn(SlotName, Box<ServerError>) -> Error = match error.code() {
        Some("42704") => Error::SlotMissing,
        Some("42710") => Error::SlotExists,
        Some("55006") => Error::SlotInUse,
        Some("55000") => Error::SlotInvalidated,
        _ => return error,
    };
    match error {
        Error::Server { source, .. } => sort(slot.clone(), source),
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::auth::Authenticator;
    use super::super::connection::Login;
    use super::super::conninfo::ChannelBindingPolicy;
    use super::super::error::Knock;
    use super::super::wire::tests::encode;
    use super::super::wire::{Authentication, Row};
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    fn knock() -> Knock {
        Knock { place: "pipe".into(), user: "backup".into(), database: "replication".into(), local: None }
    }

    fn row(values: &[&str]) -> Message {
        Message::DataRow(Row::new(
            values.iter().map(|text| Some(Bytes::copy_from_slice(text.as_bytes()))).collect(),
        ))
    }

    fn parameter(name: &str, value: &str) -> Message {
        Message::ParameterStatus { name: name.into(), value: value.into() }
    }

    fn greeting(version: &str) -> Vec<Message> {
        vec![
            Message::Authentication(Authentication::Ok),
            parameter("server_version", version),
            Message::BackendKeyData,
            Message::Ready,
        ]
    }

    fn error(code: &str, severity: &str) -> Message {
        Message::Error(ServerError { code: code.into(), severity: severity.into(), ..ServerError::default() })
    }

    /// A session whose server has written `messages` beforehand; gives the server's end too.
    async fn session(messages: Vec<Message>) -> (Result<Connection<DuplexStream>, Error>, DuplexStream) {
        let (ours, mut theirs) = duplex(1 << 20);
        for message in messages {
            theirs.write_all(&encode(&message)).await.unwrap();
        }
        let knock = knock();
        let authenticator = Authenticator::new("backup", None, ChannelBindingPolicy::Prefer, false, None);
        let login = Login {
            knock: &knock,
            mode: Mode::Physical,
            application_name: "test",
            options: None,
            authenticator,
        };
        (Connection::start(ours, login).await, theirs)
    }

    fn wal(start: u64, bytes: &[u8]) -> Message {
        let mut data = vec![b'w'];
        data.extend(start.to_be_bytes());
        data.extend(u64::MAX.to_be_bytes());
        data.extend(0_i64.to_be_bytes());
        data.extend(bytes);
        Message::CopyData(data.into())
    }

    #[tokio::test]
    async fn what_comes_unasked_is_kept_and_changes_nothing() {
        let mut script = greeting("15.20 (Debian 15.20-1)");
        script.extend([
            Message::RowDescription(vec!["systemid".into()]),
            parameter("in_hot_standby", "off"),
            Message::Notice(ServerError { message: "hello".into(), ..ServerError::default() }),
            Message::Notification,
            row(&["7", "1", "0/10"]),
            Message::CommandComplete("IDENTIFY_SYSTEM".into()),
            Message::Ready,
        ]);
        let (connection, _server) = session(script).await;
        let mut connection = connection.unwrap();
        let position = connection.identify_system().await.unwrap();
        assert_eq!((position.system_identifier, position.flush_lsn), (7, Lsn::new(16)));
        assert!(!connection.is_standby().await.unwrap());
        assert_eq!(connection.server_major(), 15);
        assert_eq!(connection.take_notices()[0].message, "hello");
        assert_eq!(connection.take_notices(), []);
    }

    #[tokio::test]
    async fn a_refused_command_leaves_the_session_usable_and_a_fatal_one_does_not() {
        let mut script = greeting("13.23");
        script.extend([error("42704", "ERROR"), Message::Ready]);
        script.extend([row(&["1"]), Message::CommandComplete("SHOW".into()), Message::Ready]);
        script.push(error("57P01", "FATAL"));
        let (connection, _server) = session(script).await;
        let mut connection = connection.unwrap();
        let slot: SlotName = "gone".parse().unwrap();
        assert!(
            matches!(connection.drop_slot(&slot).await, Err(Error::SlotMissing(name, _)) if name == slot)
        );
        assert_eq!(connection.show("x").await.unwrap(), "1");
        assert!(connection.show("x").await.unwrap_err().is_transient());
        assert!(matches!(connection.show("x").await, Err(Error::Protocol(_))));
    }

    #[tokio::test]
    async fn only_names_of_settings_are_shown() {
        let (connection, _server) = session(greeting("18.6")).await;
        let mut connection = connection.unwrap();
        for name in ["", "a; b", "a'b"] {
            assert!(matches!(connection.show(name).await, Err(Error::Protocol(_))), "{name}");
        }
    }

    #[tokio::test]
    async fn an_old_server_and_a_refusal_are_named() {
        let (connection, _server) = session(greeting("12.22")).await;
        assert!(matches!(connection, Err(Error::TooOld { version, .. }) if version == "12.22"));
        let (connection, _server) = session(vec![error("57P03", "FATAL")]).await;
        assert!(connection.unwrap_err().is_transient());
    }

    #[tokio::test]
    async fn a_status_on_a_stream_that_has_just_ended_is_not_sent() {
        let mut script = greeting("15.0");
        script.extend([Message::CopyBoth, wal(0, b"x"), Message::CommandComplete("COPY 0".into())]);
        let (connection, mut server) = session(script).await;
        let mut connection = connection.unwrap();
        let started = connection.start_replication(None, Lsn::ZERO, TimelineId::FIRST).await.unwrap();
        assert_eq!(started, Started::Streaming);
        connection.send_status(Lsn::new(1), Lsn::ZERO, false).await.unwrap();
        assert!(matches!(connection.next_wal().await, Ok(WalMessage::XLogData { .. })));
        assert_eq!(connection.next_wal().await.unwrap(), WalMessage::ServerStopped);
        connection.send_status(Lsn::new(1), Lsn::ZERO, false).await.unwrap();
        drop(connection);
        let mut sent = Vec::new();
        server.read_to_end(&mut sent).await.unwrap();
        let statuses = sent.windows(6).filter(|window| *window == b"d\0\0\0\x26r").count();
        assert_eq!(statuses, 1);
    }

    #[tokio::test]
    async fn the_last_words_are_heard_although_nobody_listens_any_more() {
        let mut script = greeting("15.0");
        script.extend([Message::CopyBoth, wal(0, b"x"), Message::CommandComplete("COPY 0".into())]);
        let (connection, server) = session(script).await;
        let mut connection = connection.unwrap();
        connection.start_replication(None, Lsn::ZERO, TimelineId::FIRST).await.unwrap();
        drop(server);
        connection.send_status(Lsn::new(1), Lsn::ZERO, false).await.unwrap();
        assert!(matches!(connection.next_wal().await, Ok(WalMessage::XLogData { .. })));
        assert_eq!(connection.next_wal().await.unwrap(), WalMessage::ServerStopped);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The stream arrives in pieces of any size while the futures that read it are dropped at every
        /// pause, as `select!` does.
        #[test]
        fn dropped_futures_lose_nothing(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..12),
            pieces in prop::collection::vec(1_usize..120, 1..20),
        ) {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let (connection, mut server) = session(greeting("17.0")).await;
                let mut connection = connection.unwrap();
                let mut script = encode(&Message::CopyBoth);
                let mut at = 0;
                for bytes in &messages {
                    script.extend(encode(&wal(at, bytes)));
                    at += bytes.len() as u64;
                }
                let end = [
                    Message::CopyDone,
                    row(&["2", "0/10"]),
                    Message::CommandComplete("START_STREAMING".into()),
                    Message::Ready,
                ];
                script.extend(end.iter().flat_map(encode));
                let feed = async {
                    let mut rest = script.as_slice();
                    for piece in pieces.iter().cycle() {
                        let (now, later) = rest.split_at((*piece).min(rest.len()));
                        server.write_all(now).await.unwrap();
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        rest = later;
                        if rest.is_empty() {
                            break;
                        }
                    }
                    server
                };
                let receive = async {
                    connection.start_replication(None, Lsn::ZERO, TimelineId::FIRST).await.unwrap();
                    let mut got = Vec::new();
                    loop {
                        let next =
                            tokio::time::timeout(Duration::from_millis(3), connection.next_wal()).await;
                        match next {
                            Err(_) => connection.send_status(Lsn::ZERO, Lsn::ZERO, false).await.unwrap(),
                            Ok(Ok(WalMessage::XLogData { start, bytes, .. })) => {
                                assert_eq!(start.get(), got.len() as u64);
                                got.extend_from_slice(&bytes);
                            }
                            Ok(Ok(WalMessage::TimelineEnded { next, switch })) => {
                                assert_eq!((next.get(), switch), (2, Lsn::new(16)));
                                return got;
                            }
                            Ok(other) => panic!("{other:?}"),
                        }
                    }
                };
                let (_server, got) = tokio::join!(feed, receive);
                assert_eq!(got, messages.concat());
            });
        }
    }
}
