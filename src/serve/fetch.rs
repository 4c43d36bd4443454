//! Gets one WAL file out of the repository, for PostgreSQL to replay.
//!
//! Shell. The answer is one of three: the file's bytes; "does not exist", which ends a recovery and is
//! said only when storage said so; or "unknown" with a reason, for everything else.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::TryStreamExt;

use crate::catalog::{Join, Piece, Step, join_pieces};
use crate::postgres::{
    Expected, LONG_HEADER_BYTES, LongHeader, SegmentName, WalFileName, WalPageError, check_segment_start,
};
use crate::repository::{self, Folder, ObjectName, ObjectReader, Repository};

/// History files and backup labels are far below a kilobyte a timeline; more is not one.
pub(super) const SMALL_FILE_BYTES: u64 = 1 << 20;

/// How often the pieces of a segment are listed before we give up: each time, the agent has merged some.
const MOST_LISTINGS: u32 = 5;

/// What the tail of an unfinished segment is filled with, as PostgreSQL itself fills it.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Storage said so.
    #[error("`{0}` does not exist in the archive")]
    NotFound(WalFileName),
    /// It may exist or not; recovery must not go on without it.
    #[error(transparent)]
    Unknown(#[from] Unknown),
}

impl FetchError {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound(_) => None,
            Self::Unknown(error) => error.hint(),
        }
    }
}

/// Why a file cannot be had, although it may exist.
#[derive(Debug, thiserror::Error)]
pub enum Unknown {
    #[error(transparent)]
    Storage(#[from] repository::Error),
    #[error("what is stored as `{file}` is something else: {source}")]
    Mismatch { file: WalFileName, source: WalPageError },
    #[error("what is stored as `{file}` has {found} bytes where {expected} belong")]
    Length { file: WalFileName, expected: u64, found: u64 },
    #[error(
        "only the first {end} bytes of `{segment}` are stored, but the later segment `{later}` is whole: WAL is missing"
    )]
    Gap { segment: SegmentName, end: u32, later: SegmentName },
    #[error("pieces of `{0}` are stored, but none from its start")]
    NoStart(SegmentName),
    #[error("the pieces of `{0}` changed faster than they could be read")]
    Moving(SegmentName),
}

impl Unknown {
    /// Whether something is wrong with the archive itself, and waiting will not mend it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Storage(error) => matches!(error, repository::Error::Damaged { .. }),
            Self::Mismatch { .. } | Self::Length { .. } | Self::Gap { .. } | Self::NoStart(_) => true,
            Self::Moving(_) => false,
        }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Storage(error) => error.hint(),
            Self::Gap { .. } => Some(
                "recover to a target before the gap, or from a backup taken after it (`pgkeep list`)"
                    .to_owned(),
            ),
            Self::Mismatch { .. } => Some(
                "compare the object with its neighbours; do not delete it before you know its origin"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// A file that is there: its length, and its bytes as they are asked for.
pub struct Fetched {
    file: WalFileName,
    length: u64,
    source: Source,
    /// Read already, to be handed out first.
    front: Option<Bytes>,
    /// The newest chunk, kept back until it is known that nothing follows.
    held: Option<Bytes>,
    /// Whether to keep it back: the source may have more bytes than the file should. What a source gives
    /// of an announced length is verified before its last chunk.
    holds: bool,
    seen: u64,
}

enum Source {
    Nothing,
    Whole(Box<ObjectReader>),
    Joined(Box<Joined>),
}

/// Looks for `file` and begins to read it. `expected` is what is known of its cluster.
pub async fn fetch(
    repository: &Repository,
    expected: &Expected,
    file: WalFileName,
) -> Result<Fetched, FetchError> {
    match file {
        WalFileName::Segment(segment) => fetch_segment(repository, expected, segment).await,
        WalFileName::Partial(segment) => {
            let reader = repository.read(ObjectName::Wal(file)).await.map_err(|error| named(file, error))?;
            let announced = reader.plaintext_length();
            let mut source = Source::Whole(Box::new(reader));
            let (front, header) = read_header(&mut source, file, segment, expected).await?;
            let length = announced.unwrap_or(header.segment_size.bytes());
            if length > header.segment_size.bytes() {
                let expected = header.segment_size.bytes();
                return Err(Unknown::Length { file, expected, found: length }.into());
            }
            Ok(Fetched::new(file, length, source, Some(front)))
        }
        WalFileName::History(_) | WalFileName::BackupLabel(..) => {
            let content = repository.get(ObjectName::Wal(file), SMALL_FILE_BYTES).await;
            let content = content.map_err(|error| named(file, error))?;
            Ok(Fetched::new(file, content.len() as u64, Source::Nothing, Some(content)))
        }
    }
}

async fn fetch_segment(
    repository: &Repository,
    expected: &Expected,
    segment: SegmentName,
) -> Result<Fetched, FetchError> {
    let file = WalFileName::Segment(segment);
    for _ in 0..MOST_LISTINGS {
        let join = match locate(repository, segment, 0).await? {
            Located::Missing => return Err(FetchError::NotFound(file)),
            Located::Whole(reader) => {
                let announced = reader.plaintext_length();
                let mut source = Source::Whole(reader);
                let (front, header) = read_header(&mut source, file, segment, expected).await?;
                let length = header.segment_size.bytes();
                if let Some(found) = announced.filter(|&found| found != length) {
                    return Err(Unknown::Length { file, expected: length, found }.into());
                }
                return Ok(Fetched::new(file, length, source, Some(front)));
            }
            Located::Pieces(join) => join,
        };
        let end = join.end;
        let Some(joined) = Joined::open(repository, segment, join).await? else { continue };
        let mut source = Source::Joined(Box::new(joined));
        let (front, header) = read_header(&mut source, file, segment, expected).await?;
        let length = header.segment_size.bytes();
        if u64::from(end) > length {
            return Err(Unknown::Length { file, expected: length, found: end.into() }.into());
        }
        if u64::from(end) < length
            && let Some(later) = later_segment(repository, segment).await?
        {
            // The pieces may have become the whole segment while we looked.
            return match repository.head(ObjectName::Wal(file)).await {
                Ok(_) => continue,
                Err(error) if error.is_not_found() => Err(Unknown::Gap { segment, end, later }.into()),
                Err(error) => Err(Unknown::Storage(error).into()),
            };
        }
        if let Source::Joined(joined) = &mut source {
            joined.length = Some(length);
        }
        return Ok(Fetched::new(file, length, source, Some(front)));
    }
    Err(Unknown::Moving(segment).into())
}

fn named(file: WalFileName, error: repository::Error) -> FetchError {
    if error.is_not_found() { FetchError::NotFound(file) } else { Unknown::Storage(error).into() }
}

/// Reads as much as the first page's header takes, and checks it. Gives back what was read.
async fn read_header(
    source: &mut Source,
    file: WalFileName,
    segment: SegmentName,
    expected: &Expected,
) -> Result<(Bytes, LongHeader), Unknown> {
    let mut front = source.next().await?.unwrap_or_default();
    while front.len() < LONG_HEADER_BYTES
        && let Some(more) = source.next().await?
    {
        let mut longer = BytesMut::from(front);
        longer.extend_from_slice(&more);
        front = longer.freeze();
    }
    let header = check_segment_start(&front, segment, expected)
        .map_err(|source| Unknown::Mismatch { file, source })?;
    Ok((front, header))
}

impl Fetched {
    fn new(file: WalFileName, length: u64, source: Source, front: Option<Bytes>) -> Self {
        let holds = matches!(&source, Source::Whole(reader) if reader.plaintext_length().is_none());
        Self { file, length, source, front, held: None, holds, seen: 0 }
    }

    /// Bytes of the file.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The next bytes; `None` after the last. All [`Self::length`] bytes have been handed out only when
    /// every one of them is verified.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Unknown> {
        loop {
            let chunk = match self.front.take() {
                Some(front) => Some(front),
                None => self.source.next().await?,
            };
            let Some(chunk) = chunk else {
                return if self.seen == self.length {
                    Ok(self.held.take())
                } else {
                    Err(self.wrong_length())
                };
            };
            self.seen += chunk.len() as u64;
            if self.seen > self.length {
                return Err(self.wrong_length());
            }
            if chunk.is_empty() {
                continue;
            }
            if !self.holds {
                return Ok(Some(chunk));
            }
            if let Some(ready) = self.held.replace(chunk) {
                return Ok(Some(ready));
            }
        }
    }

    const fn wrong_length(&self) -> Unknown {
        Unknown::Length { file: self.file, expected: self.length, found: self.seen }
    }
}

impl Source {
    async fn next(&mut self) -> Result<Option<Bytes>, Unknown> {
        match self {
            Self::Nothing => Ok(None),
            Self::Whole(reader) => Ok(reader.next().await?),
            Self::Joined(joined) => joined.next().await,
        }
    }
}

/// A segment put together from its pieces and zero-filled.
struct Joined {
    repository: Repository,
    segment: SegmentName,
    steps: VecDeque<Step>,
    /// Up to where pieces were promised.
    end: u32,
    current: Option<Current>,
    offset: u32,
    /// The segment's size, once known.
    length: Option<u64>,
    listings: u32,
}

/// The object being read.
struct Current {
    reader: Box<ObjectReader>,
    /// Bytes still to leave out.
    skip: u64,
    /// Bytes still to come after those.
    left: u64,
}

impl Joined {
    /// Opens the first piece; `None` when it is gone already.
    async fn open(
        repository: &Repository,
        segment: SegmentName,
        join: Join,
    ) -> Result<Option<Self>, Unknown> {
        let mut joined = Self {
            repository: repository.clone(),
            segment,
            steps: join.steps,
            end: join.end,
            current: None,
            offset: 0,
            length: None,
            listings: 1,
        };
        Ok(joined.open_next_piece().await?.then_some(joined))
    }

    /// Whether the next piece, if there is one, was still there.
    async fn open_next_piece(&mut self) -> Result<bool, Unknown> {
        let Some(Step { piece, skip }) = self.steps.pop_front() else { return Ok(true) };
        let name = ObjectName::Piece { segment: self.segment, start: piece.start, end: piece.end };
        match self.repository.read(name).await {
            Ok(reader) => {
                let left = u64::from(piece.length() - skip);
                self.current = Some(Current { reader: Box::new(reader), skip: skip.into(), left });
                Ok(true)
            }
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Unknown> {
        loop {
            if let Some(current) = &mut self.current {
                let Some(mut chunk) = current.reader.next().await? else {
                    if current.skip > 0 || current.left > 0 {
                        return Err(self.wrong_piece());
                    }
                    self.current = None;
                    continue;
                };
                let skip = current.skip.min(chunk.len() as u64);
                chunk.advance(usize::try_from(skip).expect("at most the chunk's length"));
                current.skip -= skip;
                let Some(left) = current.left.checked_sub(chunk.len() as u64) else {
                    return Err(self.wrong_piece());
                };
                current.left = left;
                self.offset += u32::try_from(chunk.len()).expect("a segment has at most 2^30 bytes");
                if !chunk.is_empty() {
                    return Ok(Some(chunk));
                }
            } else if !self.steps.is_empty() {
                if !self.open_next_piece().await? {
                    self.locate_again().await?;
                }
            } else {
                return Ok(self.zeros());
            }
        }
    }

    /// A piece went away between listing and reading: a merged one or the whole segment took its place.
    async fn locate_again(&mut self) -> Result<(), Unknown> {
        let moving = Unknown::Moving(self.segment);
        self.listings += 1;
        if self.listings > MOST_LISTINGS {
            return Err(moving);
        }
        match (locate(&self.repository, self.segment, self.offset).await?, self.length) {
            (Located::Whole(reader), Some(length)) => {
                self.steps.clear();
                let skip = u64::from(self.offset);
                self.current = Some(Current { reader, skip, left: length - skip });
                Ok(())
            }
            (Located::Pieces(join), Some(length))
                if join.end >= self.end && u64::from(join.end) <= length =>
            {
                self.steps = join.steps;
                self.end = join.end;
                Ok(())
            }
            _ => Err(moving),
        }
    }

    fn zeros(&mut self) -> Option<Bytes> {
        let left = self.length?.checked_sub(self.offset.into()).filter(|&left| left > 0)?;
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
        self.offset += u32::try_from(count).expect("a segment has at most 2^30 bytes");
        Some(Bytes::from_static(&ZEROS[..count]))
    }

    fn wrong_piece(&self) -> Unknown {
        Unknown::Length {
            file: WalFileName::Segment(self.segment),
            expected: self.end.into(),
            found: self.offset.into(),
        }
    }
}

enum Located {
    Whole(Box<ObjectReader>),
    Pieces(Join),
    Missing,
}

/// Finds the segment whole, or its pieces from offset `from` on.
///
/// The order of the questions makes "missing" exact: pieces go only after the whole segment is stored, so
/// a segment whose whole is not there *after* no pieces were listed was not there when they were listed.
async fn locate(repository: &Repository, segment: SegmentName, from: u32) -> Result<Located, Unknown> {
    let whole = ObjectName::Wal(WalFileName::Segment(segment));
    let mut listed: Option<Vec<Piece>> = None;
    for _ in 0..MOST_LISTINGS {
        match repository.read(whole).await {
            Ok(reader) => return Ok(Located::Whole(Box::new(reader))),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
        if listed.as_ref().is_some_and(Vec::is_empty) {
            return Ok(Located::Missing);
        }
        let found = pieces(repository, segment).await?;
        let join = join_pieces(&found, from);
        // A hole may be a listing that missed a merge; the same hole twice is one.
        let settled = listed.as_ref() == Some(&found);
        match (join.steps.is_empty(), join.hole) {
            (false, hole) if !hole || settled => return Ok(Located::Pieces(join)),
            (true, _) if settled && from == 0 => return Err(Unknown::NoStart(segment)),
            // There were some from here on, or nobody would have asked.
            (true, _) if settled => return Err(Unknown::Moving(segment)),
            _ => listed = Some(found),
        }
    }
    Err(Unknown::Moving(segment))
}

async fn pieces(repository: &Repository, segment: SegmentName) -> Result<Vec<Piece>, Unknown> {
    let listed = repository.list(Folder::PiecesOf(segment), None).await?;
    Ok(listed
        .iter()
        .filter_map(|listed| match listed.name {
            ObjectName::Piece { start, end, .. } => Some(Piece { start, end }),
            _ => None,
        })
        .collect())
}

/// A whole segment of the same timeline that comes after `segment`.
async fn later_segment(
    repository: &Repository,
    segment: SegmentName,
) -> Result<Option<SegmentName>, Unknown> {
    let after = ObjectName::Wal(WalFileName::Segment(segment));
    let mut listing = repository.list_stream(Folder::Segments, Some(after));
    while let Some(listed) = listing.try_next().await? {
        if let ObjectName::Wal(WalFileName::Segment(later)) = listed.name {
            // The order of keys is that of timelines first.
            return Ok(Some(later).filter(|later| later.timeline() == segment.timeline()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::{Facts, Settings};
    use crate::serve::sample::{SIZE, segment, segment_bytes};
    use crate::storage::Store;

    fn repository() -> Repository {
        Repository::new(Store::in_memory(), "main", Settings::default())
    }

    async fn put(repository: &Repository, name: ObjectName, content: &[u8]) {
        repository.put(name, Bytes::copy_from_slice(content), Facts::default()).await.unwrap();
    }

    fn whole(number: u64) -> ObjectName {
        ObjectName::Wal(WalFileName::Segment(segment(number)))
    }

    async fn put_piece(repository: &Repository, number: u64, start: u32, end: u32) {
        let content = segment_bytes(segment(number));
        let name = ObjectName::Piece { segment: segment(number), start, end };
        put(repository, name, &content[start as usize..end as usize]).await;
    }

    async fn open(repository: &Repository, number: u64) -> Result<Fetched, FetchError> {
        fetch(repository, &Expected::default(), WalFileName::Segment(segment(number))).await
    }

    async fn rest(fetched: &mut Fetched) -> Result<Vec<u8>, Unknown> {
        let mut content = Vec::new();
        while let Some(chunk) = fetched.next().await? {
            content.extend_from_slice(&chunk);
        }
        Ok(content)
    }

    #[tokio::test]
    async fn pieces_are_joined_and_zero_filled() {
        let repository = repository();
        for (start, end) in [(0, 100_000), (90_000, 300_000), (300_000, 300_008), (400_000, 500_000)] {
            put_piece(&repository, 3, start, end).await;
        }
        let mut fetched = open(&repository, 3).await.unwrap();
        assert_eq!(fetched.length(), SIZE.bytes());
        let mut expected = segment_bytes(segment(3));
        expected[300_008..].fill(0);
        assert!(rest(&mut fetched).await.unwrap() == expected);
    }

    #[tokio::test]
    async fn the_end_of_the_archive_is_the_only_place_for_pieces() {
        let repository = repository();
        put_piece(&repository, 3, 0, 300_000).await;
        put(&repository, whole(5), &segment_bytes(segment(5))).await;
        let error = open(&repository, 3).await.err().unwrap();
        assert!(matches!(error, FetchError::Unknown(Unknown::Gap { end: 300_000, .. })), "{error}");
        // Pieces that make up the whole segment leave no gap, whether or not it has been stored as one.
        put_piece(&repository, 3, 300_000, 1 << 20).await;
        let mut fetched = open(&repository, 3).await.unwrap();
        assert!(rest(&mut fetched).await.unwrap() == segment_bytes(segment(3)));
        // On another timeline, a whole segment says nothing about this one.
        put_piece(&repository, 6, 0, 300_000).await;
        let child = segment(7).on(crate::postgres::TimelineId::new(2).unwrap());
        put(&repository, ObjectName::Wal(WalFileName::Segment(child)), &segment_bytes(child)).await;
        open(&repository, 6).await.unwrap();
    }

    #[tokio::test]
    async fn missing_is_said_only_of_what_has_no_trace() {
        let repository = repository();
        assert!(matches!(open(&repository, 3).await, Err(FetchError::NotFound(_))));
        put_piece(&repository, 3, 8192, 100_000).await;
        let error = open(&repository, 3).await.err().unwrap();
        assert!(matches!(error, FetchError::Unknown(Unknown::NoStart(_))), "{error}");
    }

    #[tokio::test]
    async fn pieces_that_go_while_they_are_read_are_found_in_their_successor() {
        // What takes the place of the second and third piece, once the first has been read.
        for merged in [true, false] {
            let repository = repository();
            for (start, end) in [(0, 300_000), (300_000, 600_000), (600_000, 700_000)] {
                put_piece(&repository, 3, start, end).await;
            }
            let mut fetched = open(&repository, 3).await.unwrap();
            let mut content = fetched.next().await.unwrap().unwrap().to_vec();
            if merged {
                put_piece(&repository, 3, 0, 700_000).await;
            } else {
                put(&repository, whole(3), &segment_bytes(segment(3))).await;
            }
            let gone = [(0, 300_000), (300_000, 600_000), (600_000, 700_000)];
            let gone = gone.map(|(start, end)| ObjectName::Piece { segment: segment(3), start, end });
            repository.delete(gone).await.unwrap();
            content.extend(rest(&mut fetched).await.unwrap());
            let mut expected = segment_bytes(segment(3));
            if merged {
                expected[700_000..].fill(0);
            }
            assert!(content == expected, "merged: {merged}");
        }
    }

    #[tokio::test]
    async fn pieces_that_are_lost_while_they_are_read_break_it_off() {
        let repository = repository();
        put_piece(&repository, 3, 0, 300_000).await;
        put_piece(&repository, 3, 300_000, 600_000).await;
        let mut fetched = open(&repository, 3).await.unwrap();
        let lost = ObjectName::Piece { segment: segment(3), start: 300_000, end: 600_000 };
        repository.delete([lost]).await.unwrap();
        assert!(matches!(rest(&mut fetched).await, Err(Unknown::Moving(_))));
    }

    #[tokio::test]
    async fn a_segment_must_be_the_one_asked_for() {
        let repository = repository();
        put(&repository, whole(3), &segment_bytes(segment(4))).await;
        assert!(matches!(
            open(&repository, 3).await,
            Err(FetchError::Unknown(Unknown::Mismatch { source: WalPageError::Address { .. }, .. }))
        ));
        put(&repository, whole(4), &segment_bytes(segment(4))[..500_000]).await;
        assert!(matches!(open(&repository, 4).await, Err(FetchError::Unknown(Unknown::Length { .. }))));
        put(&repository, whole(5), &segment_bytes(segment(5))).await;
        let other = Expected { system_identifier: Some(1), ..Expected::default() };
        assert!(matches!(
            fetch(&repository, &other, WalFileName::Segment(segment(5))).await,
            Err(FetchError::Unknown(Unknown::Mismatch { .. }))
        ));
    }

    #[tokio::test]
    async fn a_piece_that_is_not_as_long_as_its_name_says_is_refused() {
        for length in [299_999, 300_001] {
            let repository = repository();
            let name = ObjectName::Piece { segment: segment(3), start: 0, end: 300_000 };
            put(&repository, name, &segment_bytes(segment(3))[..length]).await;
            let error = match open(&repository, 3).await {
                Ok(mut fetched) => rest(&mut fetched).await.err(),
                Err(FetchError::Unknown(error)) => Some(error),
                Err(FetchError::NotFound(_)) => None,
            };
            assert!(matches!(error, Some(Unknown::Length { .. })), "{length}: {error:?}");
        }
    }

    #[tokio::test]
    async fn small_files_come_by_name() {
        let repository = repository();
        for (name, content) in
            [("00000002.history", "1\t0/5000000\tx\n"), ("000000010000000000000003.00000028.backup", "START")]
        {
            let file: WalFileName = name.parse().unwrap();
            let missing = fetch(&repository, &Expected::default(), file).await;
            assert!(matches!(missing, Err(FetchError::NotFound(_))));
            put(&repository, ObjectName::Wal(file), content.as_bytes()).await;
            let mut fetched = fetch(&repository, &Expected::default(), file).await.unwrap();
            assert_eq!(rest(&mut fetched).await.unwrap(), content.as_bytes());
        }
    }
}
