//! The receiver: streams one timeline from a server into the repository.
//!
//! One loop over {cancel, timers, uploads done, the next message}. Messages are taken only while the
//! budget has room; timers and uploads always run, because a receiver that stops reporting is taken for
//! dead, and one that stops storing holds the server's WAL.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::assembler::{Chunk, PAGE_SIZE, SegmentAssembler, Step};
use super::budget::{Budget, SegmentMemory};
use super::error::Error;
use super::ledger::StoredLedger;
use super::tail::Tail;
use crate::catalog::Piece;
use crate::postgres::{
    Connection, Expected, LONG_HEADER_BYTES, Lsn, SegmentName, SegmentSize, TimelineId, WalFileName,
    WalMessage, check_segment_start,
};
use crate::repository::{self, Facts, Folder, ObjectName, Repository};

/// A status message goes out at least this often, whatever happens: a third of the shortest
/// `wal_sender_timeout` in use, and what the server's own receivers do by default.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// Answers that tell the server nothing new are at least this far apart. A server that shuts down
/// repeats its question as soon as it has an answer: 12,000 times a second were seen.
const REPEAT_INTERVAL: Duration = Duration::from_millis(100);

/// With the budget full for this long, storage takes no data; then the connection is let go, because a
/// client that stops reading can hold up the server's shutdown and even its checkpoints.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// How long the server is given, once cancelled, to send what it has: usually a millisecond is enough. What
/// a receiver far behind does not get, the slot keeps.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// Room that must be free before another message is read: XLogData carries at most 128 KiB
/// (`MAX_SEND_SIZE` in the server's walsender.c), and pages are charged when they are full.
const MESSAGE_ROOM: usize = 2 * PAGE_SIZE;

/// Segments that are being stored beside the one that fills, where they are compressed as they arrive: one
/// that is still compressed, one that is on its way to storage. Each holds its compressed bytes, which no
/// budget counts.
const MOST_SEGMENTS: usize = 2;

/// With this many chunks in the window, small ones are joined: four times what a full window of whole
/// pages has.
const MOST_CHUNKS: usize = 256;

/// Segments are held whole only while they compress to a `COMPACT`th: what they compress to is in memory
/// beside them. Until `COMPACT_RUN` of them did, one is held at a time.
const COMPACT: u64 = 4;
const COMPACT_RUN: u32 = 2;

/// What streaming needs to know besides the connection.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The unfinished segment is stored at least this often while it grows.
    pub flush_interval: Duration,
    /// How long storage may take while the server waits for an answer.
    pub shutdown_grace: Duration,
    pub budget: Budget,
    /// For segments that the server holds whole already.
    pub segment_memory: SegmentMemory,
}

impl Settings {
    /// Raw bytes of the unfinished segment kept at hand for its pieces. What lies before this window is in
    /// pieces already. Two fifths of the budget stay free for what is on its way.
    const fn window(&self) -> u64 {
        self.budget.limit() as u64 / 5 * 3
    }
}

/// How far archiving has come; what everyone else in the program sees of the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub timeline: TimelineId,
    /// Every byte below is received.
    pub received: Lsn,
    /// Every byte below is in the repository.
    pub stored: Lsn,
    /// Up to where the server had WAL when it last spoke.
    pub server: Lsn,
}

impl Position {
    /// Whether everything below `lsn` on `timeline` is stored, as far as it was received: a receiver that
    /// went over to a later timeline had stored the earlier one first.
    pub fn has_stored(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.timeline > timeline || (self.timeline == timeline && self.stored >= lsn)
    }
}

/// Why streaming of a timeline ended without error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The server went over to `next` at `switch`.
    Timeline { next: TimelineId, switch: Lsn },
    /// The server was shut down in order and has been told that everything is stored.
    ServerStopped,
    /// The caller cancelled; the tail is stored.
    Cancelled,
}

/// From where to stream which timeline.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub timeline: TimelineId,
    pub size: SegmentSize,
    /// A segment start.
    pub start: Lsn,
    pub pg_version: u32,
    /// What the first page of every segment must say.
    pub expected: Expected,
}

struct OpenSegment {
    name: SegmentName,
    sink: Sink,
    /// The newest bytes, kept for pieces; `None` when the server holds the whole segment already.
    window: Option<Window>,
}

/// Where the bytes of the open segment go.
enum Sink {
    /// To a task that compresses them as they come.
    Task(mpsc::Sender<Feed>),
    /// Into memory, until the segment is whole.
    Memory(BytesMut),
}

enum Feed {
    Bytes(Bytes),
    End,
}

#[derive(Default)]
struct Window {
    chunks: VecDeque<Chunk>,
    length: u64,
}

impl Window {
    fn push(&mut self, chunk: Chunk, budget: &Budget) {
        self.length += chunk.bytes.len() as u64;
        self.chunks.push_back(chunk);
        if self.chunks.len() >= MOST_CHUNKS {
            self.join_small(budget);
        }
    }

    /// Joins neighbours that are small, because each chunk costs memory of its own: a quiet server can
    /// need days for a segment and fill it with a hundred bytes a flush.
    fn join_small(&mut self, budget: &Budget) {
        let mut joined = VecDeque::new();
        let mut page = Vec::new();
        let mut start = Lsn::ZERO;
        for chunk in self.chunks.drain(..) {
            if page.len() + chunk.bytes.len() > PAGE_SIZE && !page.is_empty() {
                let bytes = budget.charge(std::mem::take(&mut page).into());
                joined.push_back(Chunk { start, bytes });
            }
            if page.is_empty() {
                start = chunk.start;
            }
            page.extend_from_slice(&chunk.bytes);
        }
        if !page.is_empty() {
            joined.push_back(Chunk { start, bytes: budget.charge(page.into()) });
        }
        self.chunks = joined;
    }
}

enum Done {
    /// With its stored length, and the memory it was held in, for the next one.
    Segment(SegmentName, u64, Option<BytesMut>),
    Piece(SegmentName, Piece),
    Cleaned,
    /// The segment was given up before its end, which is no failure.
    Abandoned,
}

/// Taking leave of a server that goes on. After its first answer to our question it looks for new WAL, and
/// whatever it finds it announces before its second answer. So then it is known what had been flushed when
/// the caller cancelled.
struct Farewell {
    until: Instant,
    answers: u8,
    /// Known with the second answer.
    goal: Option<Lsn>,
}

/// Streams `run` until it ends. `connection` must have been put into streaming.
pub async fn stream(
    connection: &mut Connection,
    repository: &Repository,
    run: Run,
    settings: &Settings,
    position: &watch::Sender<Option<Position>>,
    cancel: &CancellationToken,
) -> Result<Ended, Error> {
    let first = run.size.segment_at(run.timeline, run.start);
    let tail = Tail::resume(&stored_pieces(repository, first).await?);
    let stored = run.start.advance(u64::from(tail.end()));
    let mut stream = Stream {
        repository,
        run,
        settings,
        position,
        assembler: SegmentAssembler::new(run.timeline, run.size, run.start),
        ledger: StoredLedger::new(stored),
        has_pieces: tail.end() > 0,
        tail,
        open: None,
        tasks: JoinSet::new(),
        segments: 0,
        most_segments: MOST_SEGMENTS,
        compact_run: Some(0),
        held: 0,
        buffers: Vec::new(),
        piece_in_flight: None,
        to_clean: Vec::new(),
        server: run.start,
        reported: None,
        last_report: Instant::now(),
        asked: None,
        answer_due: false,
        stalled: None,
        farewell: None,
        steps: Vec::new(),
    };
    let ended = stream.run(connection, cancel).await;
    if let Err(Error::Server(_)) = ended {
        // Whatever became of the server, what it sent counts: these may be its last commits.
        let stored = tokio::time::timeout(settings.shutdown_grace, stream.settle()).await;
        if !matches!(stored, Ok(Ok(()))) {
            warn!("the connection was lost and its last WAL could not be stored");
        }
    }
    ended
}

/// The pieces stored of one segment.
async fn stored_pieces(repository: &Repository, segment: SegmentName) -> Result<Vec<Piece>, Error> {
    let listed = repository.list(Folder::PiecesOf(segment), None).await?;
    Ok(listed
        .into_iter()
        .filter_map(|object| match object.name {
            ObjectName::Piece { start, end, .. } => Some(Piece { start, end }),
            _ => None,
        })
        .collect())
}

struct Stream<'a> {
    repository: &'a Repository,
    run: Run,
    settings: &'a Settings,
    position: &'a watch::Sender<Option<Position>>,
    assembler: SegmentAssembler,
    ledger: StoredLedger,
    /// The pieces of the segment at hand.
    tail: Tail,
    /// There may be pieces, of this segment or one before it; without any, nothing is cleaned.
    has_pieces: bool,
    open: Option<OpenSegment>,
    tasks: JoinSet<Result<Done, Error>>,
    /// Segments whose tasks have not ended.
    segments: usize,
    /// With this many being stored beside the open one, that has to wait.
    most_segments: usize,
    /// How many segments became small; `None` once one did not, and none is held whole any more.
    compact_run: Option<u32>,
    /// How many segments are held whole at a time now.
    held: usize,
    /// Memory of segments that are stored, kept while more whole ones are to come: memory fresh from the
    /// system costs a third of what compressing its content does.
    buffers: Vec<BytesMut>,
    piece_in_flight: Option<SegmentName>,
    /// Whole segments whose pieces can go.
    to_clean: Vec<SegmentName>,
    server: Lsn,
    /// The positions of the last report.
    reported: Option<(Lsn, Lsn)>,
    last_report: Instant,
    /// Since when the server waits for us to have stored up to a position.
    asked: Option<(Instant, Lsn)>,
    /// A question came too soon after the last answer that had the same to say.
    answer_due: bool,
    /// Since when the budget has had no room.
    stalled: Option<Instant>,
    /// The caller cancelled: what the server has now is still received.
    farewell: Option<Farewell>,
    steps: Vec<Step>,
}

impl Stream<'_> {
    async fn run(&mut self, connection: &mut Connection, cancel: &CancellationToken) -> Result<Ended, Error> {
        let mut status = interval(STATUS_INTERVAL);
        status.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut flush = interval(self.settings.flush_interval);
        flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // That we stream is news, even from where an earlier connection got to.
        self.publish();
        self.position.send_modify(|_| {});
        loop {
            self.publish();
            let has_bytes = self.settings.budget.has_room(MESSAGE_ROOM);
            // The message that ends the open segment may begin one too many, but not go on with it.
            let others = self.segments - usize::from(self.open.is_some());
            let room = has_bytes && others < self.most_segments && !self.must_settle_first();
            self.stalled = if room { None } else { self.stalled.or_else(|| Some(Instant::now())) };
            let give_up = match (self.stalled, self.asked) {
                (Some(since), _) => Some(since + STALL_LIMIT),
                (None, Some((since, _))) => Some(since + self.settings.shutdown_grace),
                (None, None) => None,
            };
            let goal = self.farewell.as_ref().and_then(|farewell| farewell.goal);
            if goal.is_some_and(|goal| self.assembler.received() >= goal) {
                return self.finish(connection).await;
            }
            let answer_due = self.answer_due.then_some(self.last_report + REPEAT_INTERVAL);
            tokio::select! { biased;
                () = cancel.cancelled(), if self.farewell.is_none() => {
                    self.farewell = Some(Farewell { until: Instant::now() + FAREWELL_LIMIT, answers: 0, goal: None });
                    self.ask(connection).await?;
                }
                () = at(self.farewell.as_ref().map(|farewell| farewell.until)) => {
                    return self.finish(connection).await;
                }
                _ = status.tick() => self.report(connection).await?,
                () = at(answer_due) => self.report(connection).await?,
                () = at(give_up) => return self.let_go(connection, cancel).await,
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    self.record(done)?;
                    if self.reported != Some((self.assembler.received(), self.ledger.stored())) {
                        self.report(connection).await?;
                    }
                }
                _ = flush.tick() => self.flush()?,
                () = self.settings.budget.room(MESSAGE_ROOM), if !has_bytes => {}
                message = connection.next_wal(), if room => match message? {
                    WalMessage::XLogData { start, wal_end, bytes } => {
                        self.server = self.server.max(wal_end);
                        self.accept(start, bytes)?;
                    }
                    WalMessage::Keepalive { wal_end, reply_requested } => {
                        self.server = self.server.max(wal_end);
                        if reply_requested {
                            self.answer(connection).await?;
                        } else if let Some(farewell) = &mut self.farewell {
                            farewell.answers += 1;
                            match farewell.answers {
                                1 => self.ask(connection).await?,
                                2 => farewell.goal = Some(self.server),
                                _ => {}
                            }
                        }
                    }
                    WalMessage::TimelineEnded { next, switch } => {
                        self.settle().await?;
                        return Ok(Ended::Timeline { next, switch });
                    }
                    WalMessage::ServerStopped => {
                        self.settle().await?;
                        return Ok(Ended::ServerStopped);
                    }
                },
            }
        }
    }

    fn is_stored(&self) -> bool {
        self.ledger.stored() >= self.assembler.received()
    }

    fn publish(&self) {
        let now = Position {
            timeline: self.run.timeline,
            received: self.assembler.received().max(self.ledger.stored()),
            stored: self.ledger.stored(),
            server: self.server,
        };
        self.position.send_if_modified(|position| position.replace(now) != Some(now));
    }

    /// Tells the server how far we are. `flush` is what storage has confirmed, nothing else.
    async fn report(&mut self, connection: &mut Connection) -> Result<(), Error> {
        let (received, stored) = (self.assembler.received(), self.ledger.stored());
        // After a restart the pieces reach further than what this connection has received again.
        connection.send_status(received.max(stored), stored, false).await?;
        self.reported = Some((received, stored));
        self.last_report = Instant::now();
        self.answer_due = false;
        if self.asked.is_some_and(|(_, lsn)| stored >= lsn) {
            self.asked = None;
        }
        Ok(())
    }

    /// Asks the server for a sign of life.
    async fn ask(&self, connection: &mut Connection) -> Result<(), Error> {
        let (received, stored) = (self.assembler.received(), self.ledger.stored());
        Ok(connection.send_status(received.max(stored), stored, true).await?)
    }

    /// The server asks for a reply. It is alive and checks on us, or it shuts down or waits for a commit
    /// and will not go on before everything it sent is stored.
    async fn answer(&mut self, connection: &mut Connection) -> Result<(), Error> {
        let everything_arrived = self.assembler.received() >= self.server;
        if everything_arrived && !self.is_stored() {
            self.asked.get_or_insert_with(|| (Instant::now(), self.assembler.received()));
            return self.flush();
        }
        let news = self.reported != Some((self.assembler.received(), self.ledger.stored()));
        if news || self.last_report.elapsed() >= REPEAT_INTERVAL {
            return self.report(connection).await;
        }
        self.answer_due = true;
        Ok(())
    }

    fn accept(&mut self, start: Lsn, bytes: Bytes) -> Result<(), Error> {
        let mut steps = std::mem::take(&mut self.steps);
        self.assembler.push(start, bytes, &mut steps)?;
        for step in steps.drain(..) {
            match step {
                Step::Open(segment) => self.open(segment),
                Step::Append(chunk) => self.append(chunk)?,
                Step::Close(segment) => self.close(segment)?,
            }
        }
        self.steps = steps;
        Ok(())
    }

    fn open(&mut self, segment: SegmentName) {
        let end = self.run.size.end(segment);
        // A segment that the server holds whole will be whole before a piece of it could matter.
        let is_whole = self.server >= end;
        let held = if self.must_settle_first() { 0 } else { self.segments_to_hold() };
        self.held = held;
        let sink = if held > 0 {
            self.most_segments = held;
            let room = usize::try_from(self.run.size.bytes()).unwrap_or_default();
            Sink::Memory(self.buffers.pop().unwrap_or_else(|| BytesMut::with_capacity(room)))
        } else {
            self.most_segments = MOST_SEGMENTS;
            self.buffers.clear();
            let (feed, chunks) = mpsc::channel(feed_depth(self.run.size));
            self.tasks.spawn(store_segment(self.repository.clone(), segment, self.facts(), chunks));
            Sink::Task(feed)
        };
        self.segments += 1;
        let window = (!is_whole).then(Window::default);
        self.open = Some(OpenSegment { name: segment, sink, window });
    }

    /// How many segments to hold whole, from the next one on; zero when they are to be compressed as they
    /// arrive.
    fn segments_to_hold(&self) -> usize {
        let is_whole = self.server >= self.run.size.end(self.assembler.segment());
        let Some(run) = self.compact_run.filter(|_| is_whole) else { return 0 };
        let held = self.settings.segment_memory.segments(self.run.size);
        if run < COMPACT_RUN { held.min(1) } else { held }
    }

    /// Between two segments: whether the next ones are dealt with in the other way, and the memory of those
    /// before is still in use.
    fn must_settle_first(&self) -> bool {
        self.open.is_none() && self.segments > 0 && (self.held > 0) != (self.segments_to_hold() > 0)
    }

    fn facts(&self) -> Facts {
        Facts { pg_version: Some(self.run.pg_version) }
    }

    fn append(&mut self, mut chunk: Chunk) -> Result<(), Error> {
        let Some(open) = &mut self.open else { return Err(Error::Bug("WAL appended to no segment")) };
        if chunk.start == self.run.size.start(open.name) && chunk.bytes.len() >= LONG_HEADER_BYTES {
            check_segment_start(&chunk.bytes, open.name, &self.run.expected)?;
        }
        match &mut open.sink {
            Sink::Memory(segment) => segment.extend_from_slice(&chunk.bytes),
            Sink::Task(feed) => {
                // What waits must not keep the connection's read buffer, twice its own size, in memory.
                let bytes = Bytes::copy_from_slice(&chunk.bytes);
                chunk.bytes = self.settings.budget.charge(bytes);
                // The channel has room for every page of a segment, so it is full only if the task is gone.
                if feed.try_send(Feed::Bytes(chunk.bytes.clone())).is_err() {
                    return self.task_error();
                }
            }
        }
        let Some(window) = &mut open.window else { return Ok(()) };
        window.push(chunk, &self.settings.budget);
        self.trim_window()
    }

    /// Lets go of the oldest bytes in the window that are in pieces; what is not is then stored as one.
    fn trim_window(&mut self) -> Result<(), Error> {
        let Some(OpenSegment { name, window: Some(window), .. }) = &mut self.open else { return Ok(()) };
        let stored = self.run.size.start(*name).advance(u64::from(self.tail.end()));
        while window.length > self.settings.window()
            && let Some(oldest) = window.chunks.pop_front_if(|oldest| oldest.end() <= stored)
        {
            window.length -= oldest.bytes.len() as u64;
        }
        if window.length > self.settings.window() { self.store_piece() } else { Ok(()) }
    }

    fn close(&mut self, segment: SegmentName) -> Result<(), Error> {
        let Some(open) = self.open.take() else {
            return Err(Error::Bug("a segment closed that was not open"));
        };
        match open.sink {
            Sink::Memory(bytes) => {
                let store =
                    store_whole_segment(self.repository.clone(), segment, self.facts(), bytes.freeze());
                self.tasks.spawn(store);
            }
            Sink::Task(feed) => {
                if feed.try_send(Feed::End).is_err() {
                    return self.task_error();
                }
            }
        }
        debug!(%segment, "received segment");
        self.tail = Tail::default();
        Ok(())
    }

    /// A feed is closed only when its task has ended; its error says why.
    fn task_error(&mut self) -> Result<(), Error> {
        while let Some(done) = self.tasks.try_join_next() {
            self.record(done)?;
        }
        Err(Error::Bug("the task that stores a segment ended without a word"))
    }

    /// Stores what is not stored of the unfinished segment, unless that is under way.
    fn flush(&mut self) -> Result<(), Error> {
        if self.is_stored() || self.piece_in_flight.is_some() || self.open.is_none() {
            return Ok(());
        }
        if let Some(chunk) = self.assembler.flush() {
            self.append(chunk)?;
        }
        self.store_piece()
    }

    fn store_piece(&mut self) -> Result<(), Error> {
        if self.piece_in_flight.is_some() {
            return Ok(());
        }
        let Some(OpenSegment { name, window: Some(window), .. }) = &self.open else { return Ok(()) };
        let (Some(first), Some(last)) = (window.chunks.front(), window.chunks.back()) else { return Ok(()) };
        let offset = |lsn| offset_in(self.run.size, *name, lsn);
        let (available, received) = (offset(first.start), offset(last.end()));
        let Some(piece) = self.tail.next_piece(received, available) else { return Ok(()) };
        if piece.start < available {
            return Err(Error::Bug("bytes of the unfinished segment were let go before they were stored"));
        }
        let bytes: Vec<Bytes> = window
            .chunks
            .iter()
            .filter(|chunk| offset(chunk.end()) > piece.start)
            .map(|chunk| {
                let skip = piece.start.saturating_sub(offset(chunk.start)) as usize;
                chunk.bytes.slice(skip..)
            })
            .collect();
        let store = store_piece(self.repository.clone(), *name, piece, self.facts(), bytes);
        self.tasks.spawn(store);
        self.piece_in_flight = Some(*name);
        self.has_pieces = true;
        Ok(())
    }

    fn record(&mut self, done: Result<Result<Done, Error>, tokio::task::JoinError>) -> Result<(), Error> {
        match done.map_err(|_| Error::Bug("a task that stores WAL panicked"))?? {
            Done::Segment(segment, stored_length, buffer) => {
                self.segments -= 1;
                let is_compact = stored_length <= self.run.size.bytes() / COMPACT;
                self.compact_run = self.compact_run.filter(|_| is_compact).map(|run| run.saturating_add(1));
                let is_behind = self.server.bytes_since(self.assembler.received()) >= self.run.size.bytes();
                if let Some(mut buffer) = buffer.filter(|_| is_behind) {
                    buffer.clear();
                    self.buffers.push(buffer);
                }
                self.ledger.record(self.run.size.start(segment), self.run.size.end(segment));
                self.to_clean.push(segment);
            }
            Done::Piece(segment, piece) => {
                self.piece_in_flight = None;
                let start = self.run.size.start(segment);
                self.ledger
                    .record(start.advance(u64::from(piece.start)), start.advance(u64::from(piece.end)));
                if self.open.as_ref().is_some_and(|open| open.name == segment) {
                    let swallowed = self.tail.stored(piece);
                    let names = swallowed
                        .into_iter()
                        .map(|Piece { start, end }| ObjectName::Piece { segment, start, end })
                        .collect();
                    self.tasks.spawn(clean(self.repository.clone(), names));
                    self.trim_window()?;
                }
                // The server may wait for what has arrived since this piece was cut.
                if self.asked.is_some() {
                    self.flush()?;
                }
            }
            Done::Cleaned => {}
            Done::Abandoned => self.segments -= 1,
        }
        if self.has_pieces {
            // A piece that is still on its way would be left behind.
            let ready: Vec<_> =
                self.to_clean.extract_if(.., |segment| self.piece_in_flight != Some(*segment)).collect();
            for segment in ready {
                self.tasks.spawn(clean_segment(self.repository.clone(), segment));
            }
            self.has_pieces =
                !self.to_clean.is_empty() || self.piece_in_flight.is_some() || self.tail.end() > 0;
        } else {
            self.to_clean.clear();
        }
        Ok(())
    }

    /// Stores the tail and waits for everything under way.
    async fn settle(&mut self) -> Result<(), Error> {
        // Without a window there are no pieces: the server holds this segment whole and sends it again.
        while self.open.as_ref().is_some_and(|open| open.window.is_some()) {
            self.flush()?;
            if self.is_stored() && self.piece_in_flight.is_none() {
                break;
            }
            let Some(done) = self.tasks.join_next().await else { break };
            self.record(done)?;
        }
        // The unfinished segment itself is given up: its pieces stand for it.
        if let Some(OpenSegment { sink: Sink::Memory(_), .. }) = self.open.take() {
            self.segments -= 1;
        }
        while let Some(done) = self.tasks.join_next().await {
            self.record(done)?;
        }
        self.publish();
        Ok(())
    }

    /// Storage takes no data, or too slowly: lets the server go its way, then waits for what is under way.
    /// Thrown away it would have to be stored from its beginning, and slow storage would never get on.
    async fn let_go(
        &mut self,
        connection: &mut Connection,
        cancel: &CancellationToken,
    ) -> Result<Ended, Error> {
        let stalled = Error::StorageStalled(self.settings.shutdown_grace);
        if !matches!(tokio::time::timeout(FAREWELL_LIMIT, connection.stop()).await, Ok(Ok(()))) {
            return Err(stalled);
        }
        tokio::select! { biased;
            () = cancel.cancelled() => {}
            settled = self.settle() => settled?,
        }
        Err(stalled)
    }

    /// Ends because the caller wants it: the tail is stored, the server told, the connection closed.
    async fn finish(&mut self, connection: &mut Connection) -> Result<Ended, Error> {
        let grace = self.settings.shutdown_grace;
        tokio::time::timeout(grace, self.settle()).await.map_err(|_| Error::StorageStalled(grace))??;
        self.report(connection).await?;
        if let Err(error) = connection.stop().await {
            debug!(%error, "the connection ended without goodbye");
        }
        Ok(Ended::Cancelled)
    }
}

/// Pages of one segment, plus one more for each flush that cuts a page short, plus the end mark. A slot
/// in the channel costs some tens of bytes; the bytes themselves are charged to the budget.
fn feed_depth(size: SegmentSize) -> usize {
    let pages = usize::try_from(size.bytes()).unwrap_or(usize::MAX) / PAGE_SIZE;
    // One flush for every 8 KiB page of WAL is more than any interval can bring about: a flush
    // cuts a page only when a piece has been stored in between.
    pages + usize::try_from(size.bytes() >> 13).unwrap_or(usize::MAX).min(1 << 16) + 16
}

fn offset_in(size: SegmentSize, segment: SegmentName, lsn: Lsn) -> u32 {
    u32::try_from(lsn.bytes_since(size.start(segment))).unwrap_or(u32::MAX)
}

/// Resolves at `deadline`; never without one.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn store_segment(
    repository: Repository,
    segment: SegmentName,
    facts: Facts,
    mut chunks: mpsc::Receiver<Feed>,
) -> Result<Done, Error> {
    let mut writer = repository.writer(ObjectName::Wal(WalFileName::Segment(segment)), facts);
    while let Some(feed) = chunks.recv().await {
        match feed {
            Feed::Bytes(bytes) => writer.write(bytes).await?,
            Feed::End => {
                let stored = writer.finish().await?;
                debug!(%segment, stored = stored.stored_length, "stored segment");
                return Ok(Done::Segment(segment, stored.stored_length, None));
            }
        }
    }
    writer.abort().await;
    Ok(Done::Abandoned)
}

/// Stores a segment that is at hand as a whole.
async fn store_whole_segment(
    repository: Repository,
    segment: SegmentName,
    facts: Facts,
    plaintext: Bytes,
) -> Result<Done, Error> {
    let name = ObjectName::Wal(WalFileName::Segment(segment));
    let stored = repository.put(name, plaintext.clone(), facts).await?;
    debug!(%segment, stored = stored.stored_length, "stored segment");
    Ok(Done::Segment(segment, stored.stored_length, plaintext.try_into_mut().ok()))
}

async fn store_piece(
    repository: Repository,
    segment: SegmentName,
    piece: Piece,
    facts: Facts,
    bytes: Vec<Bytes>,
) -> Result<Done, Error> {
    let name = ObjectName::Piece { segment, start: piece.start, end: piece.end };
    let mut writer = repository.writer(name, facts);
    for bytes in bytes {
        writer.write(bytes).await?;
    }
    writer.finish().await?;
    Ok(Done::Piece(segment, piece))
}

async fn clean_segment(repository: Repository, segment: SegmentName) -> Result<Done, Error> {
    let pieces = match repository.list(Folder::PiecesOf(segment), None).await {
        Ok(pieces) => pieces.into_iter().map(|object| object.name).collect(),
        Err(error) => {
            leftover(&error);
            Vec::new()
        }
    };
    clean(repository, pieces).await
}

async fn clean(repository: Repository, names: Vec<ObjectName>) -> Result<Done, Error> {
    if !names.is_empty()
        && let Err(error) = repository.delete(names).await
    {
        leftover(&error);
    }
    Ok(Done::Cleaned)
}

/// Superfluous pieces do no harm; prune takes what stays behind.
fn leftover(error: &repository::Error) {
    warn!(%error, "superfluous pieces stay for now");
}
