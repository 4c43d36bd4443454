//! What `BASE_BACKUP` sends, as one sequence of events for all server versions.
//!
//! Pure. Up to 14 each archive is a copy stream of its own and the manifest is the last one; from 15 on
//! there is one copy stream whose messages say what they are. Either way user tablespaces come first and
//! the main data directory last, and a backup is whole only when the server has sent its stop position:
//! a stream that ends earlier is an error, however complete its archives look.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

use super::error::Error;
use super::lsn::Lsn;
use super::replication::{Grammar, field};
use super::timeline::TimelineId;
use super::wire::{Message, Row, ServerError};

/// A tablespace as `BASE_BACKUP` lists it; the main data directory has neither OID nor location.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tablespace {
    pub oid: Option<u32>,
    pub location: Option<String>,
    /// The server's estimate, in units of 1024 bytes; only when progress was asked for.
    pub size_kb: Option<u64>,
}

/// Where the backup begins and what will come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseBackupStart {
    /// Recovery needs WAL from here on.
    pub start_lsn: Lsn,
    pub timeline: TimelineId,
    /// In the order in which their archives come; the main data directory is the last.
    pub tablespaces: Vec<Tablespace>,
}

/// One event of a running base backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupEvent {
    /// The tar stream of a tablespace begins; `None` is the main data directory.
    ArchiveStart { tablespace: Option<Tablespace> },
    /// Bytes of the archive, or of the manifest, that began last. Never empty.
    Data(Bytes),
    /// The server's backup manifest begins.
    ManifestStart,
    /// Bytes done of the current archive (15 and later).
    Progress(u64),
    /// Everything was sent.
    Finished {
        /// Recovery must reach this position before the copy is consistent.
        stop_lsn: Lsn,
        timeline: TimelineId,
        /// XX001: the server saw damaged pages. All data was sent nevertheless; the notices of the
        /// connection name the pages.
        checksum_failure: Option<ServerError>,
    },
}

/// What a message meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupStep {
    /// Nothing yet; read on.
    Continue,
    Started(BaseBackupStart),
    Event(BackupEvent),
}

/// Folds the messages after `BASE_BACKUP` into events.
#[derive(Debug)]
pub struct BackupStream {
    grammar: Grammar,
    phase: Phase,
    start: Option<(Lsn, TimelineId)>,
    tablespaces: Vec<Tablespace>,
    /// Archives that are still to come, up to 14.
    to_come: VecDeque<Option<Tablespace>>,
    /// The copy stream that began last is the manifest, and the last one, up to 14.
    is_manifest: bool,
    stop: Option<(Lsn, TimelineId)>,
    error: Option<ServerError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The result set with the start position, then the one with the tablespaces.
    Start,
    Tablespaces,
    /// Between two copy streams, or before the only one.
    BeforeCopy,
    Copy,
    /// The only copy stream is over, or the last of several.
    AfterCopy,
    /// The result set with the stop position.
    Stop,
    Stopped,
    Over,
}

impl BackupStream {
    pub fn new(grammar: Grammar) -> Self {
        Self {
            grammar,
            phase: Phase::Start,
            start: None,
            tablespaces: Vec::new(),
            to_come: VecDeque::new(),
            is_manifest: false,
            stop: None,
            error: None,
        }
    }

    /// Whether the connection takes commands again.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// What the end of the byte stream means here.
    pub fn closed(&mut self) -> Error {
        self.phase = Phase::Over;
        self.error.take().map_or(Error::Closed, refused)
    }

    /// # Errors
    /// The server's own error once it is ready again, or [`Error::Protocol`] for a message that cannot
    /// come here; the backup is then worthless.
    pub fn accept(&mut self, message: Message) -> Result<BackupStep, Error> {
        match (self.phase, message) {
            (Phase::Over, _) => Err(Error::Protocol("message after the end of a base backup".to_owned())),
            (_, Message::Error(error)) => {
                if error.ends_session() {
                    self.phase = Phase::Over;
                    return Err(refused(error));
                }
                self.error = Some(error);
                Ok(BackupStep::Continue)
            }
            (phase, Message::Ready) => {
                self.phase = Phase::Over;
                self.finish(phase)
            }
            // Nothing but "ready" is due after an error.
            (_, _) if self.error.is_some() => Ok(BackupStep::Continue),
            (
                Phase::Start | Phase::Tablespaces | Phase::AfterCopy | Phase::Stop,
                Message::RowDescription(_),
            ) => {
                if self.phase == Phase::AfterCopy {
                    self.phase = Phase::Stop;
                }
                Ok(BackupStep::Continue)
            }
            (Phase::Start, Message::DataRow(row)) => {
                self.start = Some(position(&row)?);
                Ok(BackupStep::Continue)
            }
            (Phase::Start, Message::CommandComplete(_)) => {
                self.phase = Phase::Tablespaces;
                Ok(BackupStep::Continue)
            }
            (Phase::Tablespaces, Message::DataRow(row)) => {
                let location = row.text(1).map(str::to_owned);
                self.tablespaces.push(Tablespace { oid: field(&row, 0), location, size_kb: field(&row, 2) });
                Ok(BackupStep::Continue)
            }
            (Phase::Tablespaces, Message::CommandComplete(_)) => {
                self.phase = Phase::BeforeCopy;
                let user = |tablespace: &Tablespace| tablespace.oid.map(|_| tablespace.clone());
                self.to_come = self.tablespaces.iter().map(user).collect();
                let (start_lsn, timeline) = self
                    .start
                    .ok_or_else(|| Error::Protocol("base backup without a start position".to_owned()))?;
                let tablespaces = self.tablespaces.clone();
                Ok(BackupStep::Started(BaseBackupStart { start_lsn, timeline, tablespaces }))
            }
            (Phase::BeforeCopy, Message::CopyOut) => {
                self.phase = Phase::Copy;
                Ok(match (self.grammar, self.to_come.pop_front()) {
                    (Grammar::Parenthesised, _) => BackupStep::Continue,
                    (Grammar::Plain, Some(tablespace)) => {
                        BackupStep::Event(BackupEvent::ArchiveStart { tablespace })
                    }
                    (Grammar::Plain, None) => {
                        self.is_manifest = true;
                        BackupStep::Event(BackupEvent::ManifestStart)
                    }
                })
            }
            (Phase::Copy, Message::CopyData(data)) => self.data(data),
            (Phase::Copy, Message::CopyDone) => {
                let more = self.grammar == Grammar::Plain && !self.is_manifest;
                self.phase = if more { Phase::BeforeCopy } else { Phase::AfterCopy };
                Ok(BackupStep::Continue)
            }
            (Phase::Stop, Message::DataRow(row)) => {
                self.stop = Some(position(&row)?);
                Ok(BackupStep::Continue)
            }
            (Phase::Stop, Message::CommandComplete(_)) => {
                self.phase = Phase::Stopped;
                Ok(BackupStep::Continue)
            }
            (Phase::Stopped, Message::CommandComplete(_)) => Ok(BackupStep::Continue),
            (phase, message) => Err(Error::Protocol(format!(
                "message {} in phase {phase:?} of a base backup",
                message.name()
            ))),
        }
    }

    fn data(&self, mut data: Bytes) -> Result<BackupStep, Error> {
        if self.grammar == Grammar::Plain {
            return Ok(content(data));
        }
        let malformed = || Error::Protocol("malformed message in a base backup".to_owned());
        match data.try_get_u8().map_err(|_| malformed())? {
            b'd' => Ok(content(data)),
            b'n' => {
                let end = data.iter().position(|&byte| byte == 0).ok_or_else(malformed)?;
                let name = std::str::from_utf8(&data[..end]).map_err(|_| malformed())?;
                let tablespace = match name {
                    "base.tar" => None,
                    name => {
                        let oid = name.strip_suffix(".tar").and_then(|oid| oid.parse::<u32>().ok());
                        let listed = self.tablespaces.iter().find(|t| oid.is_some() && t.oid == oid);
                        Some(listed.ok_or_else(|| {
                            Error::Protocol(format!("archive `{name}` is of no tablespace that was listed"))
                        })?)
                    }
                };
                Ok(BackupStep::Event(BackupEvent::ArchiveStart { tablespace: tablespace.cloned() }))
            }
            b'm' => Ok(BackupStep::Event(BackupEvent::ManifestStart)),
            b'p' => {
                let done = data.try_get_u64().map_err(|_| malformed())?;
                Ok(BackupStep::Event(BackupEvent::Progress(done)))
            }
            _ => Err(malformed()),
        }
    }

    fn finish(&mut self, phase: Phase) -> Result<BackupStep, Error> {
        let finished = |stop: (Lsn, TimelineId), checksum_failure| {
            let (stop_lsn, timeline) = stop;
            Ok(BackupStep::Event(BackupEvent::Finished { stop_lsn, timeline, checksum_failure }))
        };
        match (self.error.take(), self.stop, phase) {
            (None, Some(stop), Phase::Stopped) => finished(stop, None),
            // Raised after everything, the stop position included, was sent.
            (Some(error), Some(stop), Phase::Stopped) if error.code == "XX001" => finished(stop, Some(error)),
            (Some(error), ..) => Err(refused(error)),
            (None, ..) => Err(Error::Protocol("base backup ended without a stop position".to_owned())),
        }
    }
}

fn content(data: Bytes) -> BackupStep {
    if data.is_empty() { BackupStep::Continue } else { BackupStep::Event(BackupEvent::Data(data)) }
}

fn position(row: &Row) -> Result<(Lsn, TimelineId), Error> {
    field(row, 0)
        .zip(field(row, 1))
        .ok_or_else(|| Error::Protocol("position of a base backup cannot be read".to_owned()))
}

fn refused(error: ServerError) -> Error {
    Error::Server { command: "BASE_BACKUP".to_owned(), source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::wire::{MAX_MESSAGE, Step, tests::encode};
    use bytes::{BufMut, BytesMut};
    use proptest::prelude::*;

    fn row(values: &[Option<&str>]) -> Message {
        let value = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        Message::DataRow(Row::new(values.iter().map(|text| text.map(value)).collect()))
    }

    fn result(rows: Vec<Message>) -> Vec<Message> {
        let mut all = vec![Message::RowDescription(vec!["x".into()])];
        all.extend(rows);
        all.push(Message::CommandComplete("SELECT".into()));
        all
    }

    fn failure(code: &str) -> Message {
        Message::Error(ServerError { severity: "ERROR".into(), code: code.into(), ..ServerError::default() })
    }

    const TABLESPACE: &str = "16385";

    /// A whole backup of one user tablespace and the data directory, as each grammar sends it.
    fn script(grammar: Grammar, archives: [&[Vec<u8>]; 3], failed: Option<&str>) -> Vec<Message> {
        let mut all = result(vec![row(&[Some("0/2000028"), Some("1")])]);
        all.extend(result(vec![
            row(&[Some(TABLESPACE), Some("/ts"), Some("10")]),
            row(&[None, None, Some("20")]),
        ]));
        match grammar {
            Grammar::Plain => {
                for chunks in archives {
                    all.push(Message::CopyOut);
                    all.extend(chunks.iter().map(|chunk| Message::CopyData(chunk.clone().into())));
                    all.push(Message::CopyDone);
                }
            }
            Grammar::Parenthesised => {
                all.push(Message::CopyOut);
                let typed = |tag: u8, rest: &[u8]| {
                    let mut data = BytesMut::new();
                    data.put_u8(tag);
                    data.put_slice(rest);
                    Message::CopyData(data.freeze())
                };
                for (index, chunks) in archives.iter().enumerate() {
                    all.push(match index {
                        0 => typed(b'n', b"16385.tar\0/ts\0"),
                        1 => typed(b'n', b"base.tar\0\0"),
                        _ => typed(b'm', b""),
                    });
                    all.extend(chunks.iter().map(|chunk| typed(b'd', chunk)));
                    if index < 2 {
                        all.push(typed(b'p', &7_u64.to_be_bytes()));
                    }
                }
                all.push(Message::CopyDone);
            }
        }
        all.extend(result(vec![row(&[Some("0/2000100"), Some("1")])]));
        all.push(match failed {
            Some(code) => failure(code),
            None => Message::CommandComplete("BASE_BACKUP".into()),
        });
        all.push(Message::Ready);
        all
    }

    fn events(grammar: Grammar, messages: Vec<Message>) -> Result<Vec<BackupStep>, Error> {
        let mut stream = BackupStream::new(grammar);
        let mut steps = Vec::new();
        for message in messages {
            match stream.accept(message)? {
                BackupStep::Continue => {}
                step => steps.push(step),
            }
        }
        if stream.is_over() { Ok(steps) } else { Err(stream.closed()) }
    }

    /// Archive by archive, the bytes that came.
    fn contents(steps: &[BackupStep]) -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = Vec::new();
        for step in steps {
            match step {
                BackupStep::Event(BackupEvent::ArchiveStart { .. } | BackupEvent::ManifestStart) => {
                    all.push(Vec::new());
                }
                BackupStep::Event(BackupEvent::Data(data)) => all.last_mut().unwrap().extend(data),
                _ => {}
            }
        }
        all
    }

    const GRAMMARS: [Grammar; 2] = [Grammar::Plain, Grammar::Parenthesised];

    #[test]
    fn both_grammars_tell_the_same_story() {
        for grammar in GRAMMARS {
            let chunks =
                [&[b"ts".to_vec()][..], &[b"ba".to_vec(), vec![], b"se".to_vec()], &[b"{}".to_vec()]];
            let steps = events(grammar, script(grammar, chunks, None)).unwrap();
            let BackupStep::Started(start) = &steps[0] else { panic!("starts") };
            assert_eq!((start.start_lsn, start.tablespaces.len()), (Lsn::new(0x0200_0028), 2));
            let BackupStep::Event(BackupEvent::ArchiveStart { tablespace: Some(first) }) = &steps[1] else {
                panic!("the user's tablespace comes first")
            };
            assert_eq!(
                (first.oid, first.location.as_deref(), first.size_kb),
                (Some(16385), Some("/ts"), Some(10))
            );
            assert_eq!(contents(&steps), [b"ts".to_vec(), b"base".to_vec(), b"{}".to_vec()]);
            assert!(matches!(
                steps.last(),
                Some(BackupStep::Event(BackupEvent::Finished { checksum_failure: None, .. }))
            ));
        }
    }

    #[test]
    fn checksum_failures_keep_the_backup_but_nothing_else_does() {
        for grammar in GRAMMARS {
            let steps = events(grammar, script(grammar, [&[], &[], &[]], Some("XX001"))).unwrap();
            assert!(matches!(
                steps.last(),
                Some(BackupStep::Event(BackupEvent::Finished { checksum_failure: Some(_), .. }))
            ));
            let promoted = events(grammar, script(grammar, [&[], &[], &[]], Some("55000")));
            assert_eq!(promoted.unwrap_err().code(), Some("55000"));
        }
    }

    proptest! {
        #[test]
        fn any_split_of_the_byte_stream_gives_the_same_archives(
            plain: bool,
            archives in prop::array::uniform3(
                prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..5)
            ),
            cuts in prop::collection::vec(1_usize..100, 1..20),
        ) {
            let grammar = GRAMMARS[usize::from(plain)];
            let messages = script(grammar, [&archives[0], &archives[1], &archives[2]], None);
            let bytes: Vec<u8> = messages.iter().flat_map(encode).collect();
            let mut inbox = BytesMut::new();
            let mut rest = bytes.as_slice();
            let mut received = Vec::new();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                inbox.extend_from_slice(now);
                rest = later;
                while let Step::Message(message) = Message::take(&mut inbox, MAX_MESSAGE).unwrap() {
                    received.push(message);
                }
                if rest.is_empty() {
                    break;
                }
            }
            let steps = events(grammar, received).unwrap();
            prop_assert_eq!(contents(&steps), archives.map(|chunks| chunks.concat()).to_vec());
        }

        #[test]
        fn a_stream_cut_anywhere_is_an_error(plain: bool, keep: prop::sample::Index) {
            let grammar = GRAMMARS[usize::from(plain)];
            let mut messages = script(grammar, [&[b"x".to_vec()], &[b"y".to_vec()], &[b"z".to_vec()]], None);
            messages.truncate(keep.index(messages.len()));
            prop_assert!(events(grammar, messages).is_err());
        }

        #[test]
        fn an_error_anywhere_before_the_stop_position_fails_the_backup(
            plain: bool, at: prop::sample::Index,
        ) {
            let grammar = GRAMMARS[usize::from(plain)];
            let mut messages = script(grammar, [&[b"x".to_vec()], &[b"y".to_vec()], &[b"z".to_vec()]], None);
            // The last five: stop row, its completion, the command's, ready.
            messages.truncate(at.index(messages.len() - 4));
            messages.push(failure("XX001"));
            messages.push(Message::Ready);
            let error = events(grammar, messages).unwrap_err();
            prop_assert_eq!(error.code(), Some("XX001"));
        }
    }
}
