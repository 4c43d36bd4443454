//! Replication commands and the answers to them, by server version.
//!
//! Pure: the texts of the commands, what travels inside the copy streams, and [`WalStream`], which folds
//! the server's messages into what a WAL receiver needs to know.
//!
//! Source: the chapter "Streaming Replication Protocol" of PostgreSQL's manual, and what servers 13 to 18
//! were seen to send.

use std::fmt;
use std::str::FromStr;

use bytes::{Buf, BufMut, Bytes};

use super::error::Error;
use super::lsn::Lsn;
use super::timeline::TimelineId;
use super::wire::{Message, Row, ServerError};

/// The name of a replication slot: 1 to 63 of `a-z`, `0-9` and `_`, as the server demands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotName(String);

/// A text that PostgreSQL does not take as the name of a replication slot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a replication slot name (1 to 63 of a-z, 0-9 and `_`)")]
pub struct SlotNameError(String);

impl SlotName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SlotName {
    type Err = SlotNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=63).contains(&text.len())
            && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
        if fits { Ok(Self(text.to_owned())) } else { Err(SlotNameError(text.to_owned())) }
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Answer to `IDENTIFY_SYSTEM`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemPosition {
    pub system_identifier: u64,
    pub timeline: TimelineId,
    /// How far WAL is flushed; on a standby, replayed or received.
    pub flush_lsn: Lsn,
}

impl SystemPosition {
    pub(super) fn parse(row: &Row) -> Option<Self> {
        Some(Self { system_identifier: field(row, 0)?, timeline: field(row, 1)?, flush_lsn: field(row, 2)? })
    }
}

/// What a physical replication slot holds back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    Missing,
    /// The server keeps WAL from here on. The timeline is not told by servers before 15.
    Reserved {
        restart_lsn: Lsn,
        timeline: Option<TimelineId>,
    },
    /// It holds back nothing: invalidated, or made without reserving WAL and never used.
    Invalidated,
    /// Servers before 15 tell only over SQL, which a physical replication connection does not speak.
    Unknown,
}

impl SlotState {
    /// From `READ_REPLICATION_SLOT`: a missing slot is a row of NULLs, an invalidated one has a type only.
    pub(super) fn parse(row: &Row) -> Self {
        match (row.get(0), field(row, 1)) {
            (None, _) => Self::Missing,
            (Some(_), None) => Self::Invalidated,
            (Some(_), Some(restart_lsn)) => Self::Reserved { restart_lsn, timeline: field(row, 2) },
        }
    }

    /// From [`slot_query`]: no row when it is missing.
    pub(super) fn parse_view(row: Option<&Row>) -> Self {
        match row {
            None => Self::Missing,
            Some(row) => match (row.text(1), field(row, 0)) {
                (Some("lost"), _) | (_, None) => Self::Invalidated,
                (_, Some(restart_lsn)) => Self::Reserved { restart_lsn, timeline: None },
            },
        }
    }
}

/// Reads a slot over SQL: `restart_lsn`, `wal_status`.
pub(super) fn slot_query(slot: &SlotName) -> String {
    format!("SELECT restart_lsn, wal_status FROM pg_replication_slots WHERE slot_name = '{slot}'")
}

/// The value of one column, if it is there and of that kind.
pub(super) fn field<T: FromStr>(row: &Row, column: usize) -> Option<T> {
    row.text(column)?.parse().ok()
}

pub(super) fn create_slot(slot: &SlotName, temporary: bool) -> String {
    // The form without parentheses is the only one that all of 13 to 18 take.
    let temporary = if temporary { "TEMPORARY " } else { "" };
    format!("CREATE_REPLICATION_SLOT \"{slot}\" {temporary}PHYSICAL RESERVE_WAL")
}

pub(super) fn start_replication(slot: Option<&SlotName>, start: Lsn, timeline: TimelineId) -> String {
    let slot = slot.map(|slot| format!("SLOT \"{slot}\" ")).unwrap_or_default();
    format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}")
}

/// A string literal of SQL; `standard_conforming_strings` is on in every supported server.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\0', "").replace('\'', "''"))
}

/// Which digest the server puts beside each file in its backup manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ManifestChecksums {
    /// The server's default, nearly free.
    #[default]
    Crc32c,
    /// Halves the server's speed.
    Sha256,
}

/// What to ask of `BASE_BACKUP`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// The user's text, put into `backup_label`.
    pub label: String,
    /// Checkpoint at once instead of spreading it over up to `checkpoint_timeout`.
    pub fast_checkpoint: bool,
    /// Upper bound in kB/s; the server takes 32 to 1048576.
    pub max_rate_kb: Option<u32>,
    /// Have the server count first, so that tablespaces come with their size.
    pub progress: bool,
    pub manifest_checksums: ManifestChecksums,
    /// Have the server check its pages' checksums on the way, where it has them.
    pub verify_checksums: bool,
}

impl BaseBackupOptions {
    /// The command, with a manifest, without WAL (which is archived on its own) and without waiting for
    /// the server's own archiving.
    pub fn command(&self, grammar: Grammar) -> String {
        let checksums = match self.manifest_checksums {
            ManifestChecksums::Crc32c => "CRC32C",
            ManifestChecksums::Sha256 => "SHA256",
        };
        let rate = self.max_rate_kb.map(|rate| rate.clamp(32, 1 << 20));
        let label = literal(&self.label);
        let when = |condition: bool, text: &str| condition.then(|| text.to_owned());
        match grammar {
            Grammar::Plain => {
                let options = [
                    Some(format!("LABEL {label}")),
                    when(self.progress, "PROGRESS"),
                    when(self.fast_checkpoint, "FAST"),
                    Some("NOWAIT".to_owned()),
                    rate.map(|rate| format!("MAX_RATE {rate}")),
                    when(!self.verify_checksums, "NOVERIFY_CHECKSUMS"),
                    Some(format!("MANIFEST 'yes' MANIFEST_CHECKSUMS '{checksums}'")),
                ];
                let options: Vec<String> = options.into_iter().flatten().collect();
                format!("BASE_BACKUP {}", options.join(" "))
            }
            Grammar::Parenthesised => {
                let checkpoint = if self.fast_checkpoint { "fast" } else { "spread" };
                let options = [
                    Some(format!("LABEL {label}")),
                    when(self.progress, "PROGRESS true"),
                    Some(format!("CHECKPOINT '{checkpoint}'")),
                    Some("WAIT false".to_owned()),
                    rate.map(|rate| format!("MAX_RATE {rate}")),
                    when(!self.verify_checksums, "VERIFY_CHECKSUMS false"),
                    Some(format!("MANIFEST 'yes', MANIFEST_CHECKSUMS '{checksums}'")),
                ];
                let options: Vec<String> = options.into_iter().flatten().collect();
                format!("BASE_BACKUP ({})", options.join(", "))
            }
        }
    }
}

/// The two languages of `BASE_BACKUP`: command and message sequence changed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grammar {
    /// Up to 14: options without commas, one copy stream for each archive.
    Plain,
    /// From 15 on: options in parentheses, one copy stream of typed messages.
    Parenthesised,
}

impl Grammar {
    pub const fn of_major(major: u32) -> Self {
        if major < 15 { Self::Plain } else { Self::Parenthesised }
    }
}

/// Answer to `START_REPLICATION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    Streaming,
    /// The start was exactly where the timeline was left: there is nothing to stream on it.
    TimelineEnded {
        next: TimelineId,
        switch: Lsn,
    },
}

/// What comes next out of a WAL stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalMessage {
    /// WAL bytes from `start` on. May cross the end of a segment, and may reach beyond a switch point that
    /// is announced later.
    XLogData {
        start: Lsn,
        /// How far the server could send now.
        wal_end: Lsn,
        bytes: Bytes,
    },
    Keepalive {
        wal_end: Lsn,
        /// The server wants a status at once: it is shutting down, or half its timeout is over.
        reply_requested: bool,
    },
    /// The timeline was left at `switch`; go on with `next`. The connection takes commands again.
    TimelineEnded { next: TimelineId, switch: Lsn },
    /// The server is shutting down and everything it had was sent and acknowledged.
    ServerStopped,
}

/// One message inside the copy stream.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Payload {
    message: WalMessage,
    /// The server's clock, µs since 2000-01-01 UTC.
    sent: i64,
}

fn payload(mut data: Bytes) -> Option<Payload> {
    match data.try_get_u8().ok()? {
        b'w' => {
            let start = Lsn::new(data.try_get_u64().ok()?);
            let wal_end = Lsn::new(data.try_get_u64().ok()?);
            let sent = data.try_get_i64().ok()?;
            // An address space that ends is worth an error, not a panic further on.
            start.get().checked_add(data.len() as u64)?;
            Some(Payload { message: WalMessage::XLogData { start, wal_end, bytes: data }, sent })
        }
        b'k' => {
            let wal_end = Lsn::new(data.try_get_u64().ok()?);
            let sent = data.try_get_i64().ok()?;
            let reply_requested = data.try_get_u8().ok()? != 0;
            Some(Payload { message: WalMessage::Keepalive { wal_end, reply_requested }, sent })
        }
        _ => None,
    }
}

/// Standby status update. `apply` is always zero: an archiver replays nothing, and must never look to the
/// primary as if it did.
pub(super) fn status_update(write: Lsn, flush: Lsn, clock: i64, reply_requested: bool) -> [u8; 34] {
    let mut update = [0; 34];
    let mut out = &mut update[..];
    out.put_u8(b'r');
    out.put_u64(write.get());
    out.put_u64(flush.get());
    out.put_u64(0);
    out.put_i64(clock);
    out.put_u8(u8::from(reply_requested));
    update
}

/// What to do after a message of a WAL stream.
#[derive(Debug)]
pub(super) enum WalStep {
    /// Nothing yet; read on.
    Continue,
    Started(Started),
    Message(WalMessage),
    /// Send `CopyDone`, then read on.
    AnswerCopyDone,
    /// Our own `CopyDone` was answered; the connection takes commands again.
    Stopped,
}

/// Folds the messages after `START_REPLICATION`, from its first answer to the last.
///
/// Errors come before the copy stream or inside it, and are followed by "ready" unless the server ends
/// the session.
#[derive(Debug)]
pub(super) struct WalStream {
    slot: Option<SlotName>,
    phase: Phase,
    /// We have sent `CopyDone`.
    stopping: bool,
    next: Option<(TimelineId, Lsn)>,
    error: Option<ServerError>,
    /// The server's clock when it last told it.
    sent: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Streaming,
    /// The server has sent its `CopyDone`.
    Ending,
    Over,
}

impl WalStream {
    pub fn new(slot: Option<SlotName>) -> Self {
        Self { slot, phase: Phase::Starting, stopping: false, next: None, error: None, sent: None }
    }

    /// Notes that `CopyDone` was sent of our own accord. `false`: there is no stream to end.
    pub fn stop(&mut self) -> bool {
        let streaming = self.phase == Phase::Streaming && !self.stopping;
        self.stopping = true;
        streaming
    }

    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    pub fn is_streaming(&self) -> bool {
        self.phase == Phase::Streaming && self.error.is_none()
    }

    pub fn server_clock(&self) -> Option<i64> {
        self.sent
    }

    /// What the end of the stream means here.
    pub fn closed(&mut self) -> Error {
        self.phase = Phase::Over;
        match self.error.take() {
            Some(error) => self.sort(error),
            None => Error::Closed,
        }
    }

    pub fn accept(&mut self, message: Message) -> Result<WalStep, Error> {
        match (self.phase, message) {
            (Phase::Over, _) => Err(Error::Protocol("message after the end of a WAL stream".to_owned())),
            (_, Message::Error(error)) => {
                if error.ends_session() {
                    self.phase = Phase::Over;
                    return Err(self.sort(error));
                }
                self.error = Some(error);
                Ok(WalStep::Continue)
            }
            (phase, Message::Ready) => {
                self.phase = Phase::Over;
                if let Some(error) = self.error.take() {
                    // Sorted by the phase in which it came.
                    self.phase = phase;
                    let error = self.sort(error);
                    self.phase = Phase::Over;
                    return Err(error);
                }
                Ok(match (phase, self.next) {
                    _ if self.stopping => WalStep::Stopped,
                    (Phase::Starting, Some((next, switch))) => {
                        WalStep::Started(Started::TimelineEnded { next, switch })
                    }
                    (_, Some((next, switch))) => WalStep::Message(WalMessage::TimelineEnded { next, switch }),
                    (Phase::Ending, None) => WalStep::Message(WalMessage::ServerStopped),
                    (_, None) => {
                        return Err(Error::Protocol("START_REPLICATION ended without a word".to_owned()));
                    }
                })
            }
            (Phase::Starting, Message::CopyBoth) => {
                self.phase = Phase::Streaming;
                Ok(WalStep::Started(Started::Streaming))
            }
            (Phase::Streaming, Message::CopyData(data)) => {
                let payload = payload(data)
                    .ok_or_else(|| Error::Protocol("malformed message in a WAL stream".to_owned()))?;
                self.sent = Some(payload.sent);
                // What was on its way when we stopped will be asked for again.
                Ok(if self.stopping { WalStep::Continue } else { WalStep::Message(payload.message) })
            }
            (Phase::Streaming, Message::CopyDone) => {
                self.phase = Phase::Ending;
                Ok(if self.stopping { WalStep::Continue } else { WalStep::AnswerCopyDone })
            }
            // At shutdown the server ends the command without ending the copy stream.
            (Phase::Streaming | Phase::Ending, Message::CommandComplete(tag)) if tag.starts_with("COPY") => {
                self.phase = Phase::Over;
                Ok(WalStep::Message(WalMessage::ServerStopped))
            }
            (Phase::Starting | Phase::Ending, Message::RowDescription(_) | Message::CommandComplete(_)) => {
                Ok(WalStep::Continue)
            }
            (Phase::Starting | Phase::Ending, Message::DataRow(row)) => {
                let next = field(&row, 0)
                    .zip(field(&row, 1))
                    .ok_or_else(|| Error::Protocol("next timeline cannot be read".to_owned()))?;
                self.next = Some(next);
                Ok(WalStep::Continue)
            }
            (phase, message) => {
                Err(Error::Protocol(format!("message {} in phase {phase:?} of a WAL stream", message.name())))
            }
        }
    }

    /// Sorts a refusal. The two that have no SQLSTATE of their own differ in when they come: a position
    /// outside the history is refused before the copy stream, one ahead of the server inside it.
    fn sort(&self, error: ServerError) -> Error {
        let source = Box::new(error);
        match (source.code.as_str(), &self.slot) {
            ("58P01", _) => Error::WalRemoved(source),
            ("XX000", _)
                if source.message.contains("not in this server's history")
                    || source.is_from("tliSwitchPoint")
                    || (self.phase == Phase::Starting && source.is_from("StartReplication")) =>
            {
                Error::NotInHistory(source)
            }
            ("XX000", _)
                if source.message.contains("ahead of the WAL flush position")
                    || (self.phase != Phase::Starting && source.is_from("StartReplication")) =>
            {
                Error::AheadOfServer(source)
            }
            ("55006", Some(slot)) => Error::SlotInUse(slot.clone(), source),
            ("42704", Some(slot)) => Error::SlotMissing(slot.clone(), source),
            ("55000", Some(slot)) => Error::SlotInvalidated(slot.clone(), source),
            _ => Error::Server { command: "START_REPLICATION".to_owned(), source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot() -> SlotName {
        "pgkeep".parse().unwrap()
    }

    fn row(values: &[Option<&str>]) -> Row {
        Row::new(
            values.iter().map(|value| value.map(|text| Bytes::copy_from_slice(text.as_bytes()))).collect(),
        )
    }

    fn error(code: &str, message: &str, severity: &str) -> Message {
        Message::Error(ServerError {
            severity: severity.into(),
            code: code.into(),
            message: message.into(),
            routine: Some("StartReplication".into()),
            ..ServerError::default()
        })
    }

    fn wal(start: u64, bytes: &[u8]) -> Message {
        let mut data = vec![b'w'];
        data.extend(start.to_be_bytes());
        data.extend((start + 1000).to_be_bytes());
        data.extend(7_i64.to_be_bytes());
        data.extend(bytes);
        Message::CopyData(data.into())
    }

    fn streaming() -> WalStream {
        let mut stream = WalStream::new(Some(slot()));
        assert!(matches!(stream.accept(Message::CopyBoth), Ok(WalStep::Started(Started::Streaming))));
        stream
    }

    fn next_timeline() -> Vec<Message> {
        vec![
            Message::RowDescription(vec!["next_tli".into(), "next_tli_startpos".into()]),
            Message::DataRow(row(&[Some("2"), Some("0/13029C78")])),
            Message::CommandComplete("START_STREAMING".into()),
            Message::CommandComplete("START_REPLICATION".into()),
        ]
    }

    #[test]
    fn a_timeline_ends_with_where_to_go_on() {
        let mut stream = streaming();
        assert!(matches!(
            stream.accept(wal(0x100, b"abc")),
            Ok(WalStep::Message(WalMessage::XLogData { start, .. })) if start == Lsn::new(0x100)
        ));
        assert!(matches!(stream.accept(Message::CopyDone), Ok(WalStep::AnswerCopyDone)));
        for message in next_timeline() {
            assert!(matches!(stream.accept(message), Ok(WalStep::Continue)));
        }
        let ended =
            WalMessage::TimelineEnded { next: TimelineId::new(2).unwrap(), switch: Lsn::new(0x1302_9C78) };
        assert!(matches!(stream.accept(Message::Ready), Ok(WalStep::Message(message)) if message == ended));
        assert!(stream.is_over());
    }

    #[test]
    fn a_start_at_the_switch_point_streams_nothing() {
        let mut stream = WalStream::new(None);
        for message in next_timeline() {
            assert!(matches!(stream.accept(message), Ok(WalStep::Continue)));
        }
        assert!(matches!(stream.accept(Message::Ready), Ok(WalStep::Started(Started::TimelineEnded { .. }))));
    }

    #[test]
    fn errors_are_sorted_by_code_and_by_when_they_come() {
        let mut early = WalStream::new(Some(slot()));
        early.accept(error("XX000", "Anfangspunkt …", "ERROR")).unwrap();
        assert!(matches!(early.accept(Message::Ready), Err(Error::NotInHistory(_))));
        let mut late = streaming();
        late.accept(error("XX000", "Anfangspunkt …", "ERROR")).unwrap();
        assert!(matches!(late.accept(Message::Ready), Err(Error::AheadOfServer(_))));
        let mut gone = streaming();
        gone.accept(error("58P01", "x", "ERROR")).unwrap();
        assert!(matches!(gone.accept(Message::Ready), Err(Error::WalRemoved(_))));
        let mut busy = WalStream::new(Some(slot()));
        busy.accept(error("55006", "x", "ERROR")).unwrap();
        assert!(matches!(busy.accept(Message::Ready), Err(Error::SlotInUse(name, _)) if name == slot()));
        let mut dead = streaming();
        assert!(matches!(dead.accept(error("57P01", "x", "FATAL")), Err(Error::Server { .. })));
        let mut cut = streaming();
        cut.accept(error("58P01", "x", "ERROR")).unwrap();
        assert!(matches!(cut.closed(), Error::WalRemoved(_)));
    }

    #[test]
    fn a_clean_shutdown_is_told_from_a_cut() {
        let mut stream = streaming();
        assert!(matches!(
            stream.accept(Message::CommandComplete("COPY 0".into())),
            Ok(WalStep::Message(WalMessage::ServerStopped))
        ));
        assert!(matches!(streaming().closed(), Error::Closed));
    }

    #[test]
    fn after_stop_what_was_on_its_way_is_dropped() {
        let mut stream = streaming();
        assert!(stream.stop());
        assert!(!stream.stop());
        assert!(matches!(stream.accept(wal(1, b"x")), Ok(WalStep::Continue)));
        assert!(matches!(stream.accept(Message::CopyDone), Ok(WalStep::Continue)));
        assert!(matches!(
            stream.accept(Message::CommandComplete("START_STREAMING".into())),
            Ok(WalStep::Continue)
        ));
        assert!(matches!(stream.accept(Message::Ready), Ok(WalStep::Stopped)));
    }

    #[test]
    fn slots_are_read_as_each_version_tells_them() {
        assert_eq!(SlotState::parse(&row(&[None, None, None])), SlotState::Missing);
        assert_eq!(SlotState::parse(&row(&[Some("physical"), None, None])), SlotState::Invalidated);
        assert_eq!(
            SlotState::parse(&row(&[Some("physical"), Some("0/10"), Some("3")])),
            SlotState::Reserved { restart_lsn: Lsn::new(16), timeline: TimelineId::new(3) }
        );
        assert_eq!(SlotState::parse_view(None), SlotState::Missing);
        assert_eq!(SlotState::parse_view(Some(&row(&[Some("0/10"), Some("lost")]))), SlotState::Invalidated);
        assert_eq!(
            SlotState::parse_view(Some(&row(&[Some("0/10"), Some("reserved")]))),
            SlotState::Reserved { restart_lsn: Lsn::new(16), timeline: None }
        );
    }

    #[test]
    fn slot_names_are_the_servers() {
        for text in ["", "A", "a-b", "a\"b", "é", &"a".repeat(64)] {
            assert!(text.parse::<SlotName>().is_err(), "{text}");
        }
        assert_eq!(
            create_slot(&slot(), true),
            "CREATE_REPLICATION_SLOT \"pgkeep\" TEMPORARY PHYSICAL RESERVE_WAL"
        );
    }

    #[test]
    fn the_backup_command_follows_the_grammar() {
        let options = BaseBackupOptions {
            label: "it's \\ here".into(),
            fast_checkpoint: true,
            max_rate_kb: Some(1),
            progress: true,
            manifest_checksums: ManifestChecksums::Sha256,
            verify_checksums: false,
        };
        assert_eq!(
            options.command(Grammar::of_major(14)),
            "BASE_BACKUP LABEL 'it''s \\ here' PROGRESS FAST NOWAIT MAX_RATE 32 NOVERIFY_CHECKSUMS \
             MANIFEST 'yes' MANIFEST_CHECKSUMS 'SHA256'"
        );
        assert_eq!(
            options.command(Grammar::of_major(15)),
            "BASE_BACKUP (LABEL 'it''s \\ here', PROGRESS true, CHECKPOINT 'fast', WAIT false, MAX_RATE 32, \
             VERIFY_CHECKSUMS false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'SHA256')"
        );
    }

    #[test]
    fn a_status_never_claims_to_have_applied_anything() {
        let update = status_update(Lsn::new(2), Lsn::new(1), -1, true);
        assert_eq!(update[0], b'r');
        assert_eq!(update[1..17], [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(update[17..25], [0; 8]);
        assert_eq!(update[25..], [255, 255, 255, 255, 255, 255, 255, 255, 1]);
    }

    proptest! {
        #[test]
        fn any_payload_is_read_or_refused(data in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = streaming().accept(Message::CopyData(data.into()));
        }

        #[test]
        fn wal_bytes_come_out_as_they_went_in(start in 0_u64..1 << 60, bytes: Vec<u8>) {
            let Ok(WalStep::Message(WalMessage::XLogData { start: got, bytes: out, .. })) =
                streaming().accept(wal(start, &bytes))
            else {
                panic!("WAL data")
            };
            prop_assert_eq!((got.get(), out.as_ref()), (start, bytes.as_slice()));
        }
    }
}
