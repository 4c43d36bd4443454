//! Cuts the files of a base backup into frames.
//!
//! Pure. A large file starts a frame of its own and is cut at fixed offsets, so that a later backup finds
//! the same bytes at the same place and can point to the frame that holds them already. Small files
//! share frames. Frames leave here raw and numbered; where they came to lie is told later, and then the
//! entries of the file list come out in the order of the archive, each when its last frame is placed.

use std::collections::VecDeque;

use crate::catalog::{EntryKind, EntryPath, Extent, FileEntry};
use crate::codec::{TarEntry, TarKind};
use crate::repository::FrameRef;

/// Raw bytes in a full frame.
pub const FRAME_SIZE: usize = 1 << 20;

/// From this size on a file has frames of its own. Below it, a frame each would make requests and
/// headers outweigh content.
const OWN_FRAMES: u64 = FRAME_SIZE as u64;

/// A frame's number, counted through the whole backup.
pub type FrameNumber = u64;

/// Raw bytes to be encoded as one frame.
#[derive(Debug, PartialEq, Eq)]
pub struct RawFrame {
    pub number: FrameNumber,
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
struct Piece {
    frame: FrameNumber,
    skip: u32,
    take: u32,
}

#[derive(Debug)]
struct Pending {
    path: EntryPath,
    entry: TarEntry,
    length: u64,
    crc32c: u32,
    pieces: Vec<Piece>,
}

/// Folds entries and their content into frames and file list entries.
#[derive(Debug, Default)]
pub struct Framer {
    /// The frame being filled; small files share it.
    frame: Vec<u8>,
    next: FrameNumber,
    current: Option<Pending>,
    /// Entries whose frames are not all placed, in the order of the archive.
    pending: VecDeque<Pending>,
    /// Where frames lie, from `first_placed` on.
    placed: VecDeque<FrameRef>,
    first_placed: FrameNumber,
}

impl Framer {
    /// Begins an entry; `path` is its place in the restored data directory. The length of a file is what
    /// arrives of it: the size announced here only decides whether it gets frames of its own.
    pub fn begin(&mut self, path: EntryPath, entry: TarEntry, frames: &mut Vec<RawFrame>) {
        match entry.kind {
            TarKind::File { size } => {
                if size >= OWN_FRAMES {
                    self.cut(frames);
                }
                self.current = Some(Pending { path, entry, length: 0, crc32c: 0, pieces: Vec::new() });
            }
            TarKind::Directory | TarKind::Symlink { .. } => {
                self.pending.push_back(Pending { path, entry, length: 0, crc32c: 0, pieces: Vec::new() });
            }
        }
    }

    /// Takes content of the file that was begun last.
    pub fn data(&mut self, mut data: &[u8], frames: &mut Vec<RawFrame>) {
        while !data.is_empty() {
            if self.frame.capacity() == 0 {
                self.frame.reserve_exact(FRAME_SIZE);
            }
            let take = (FRAME_SIZE - self.frame.len()).min(data.len());
            let (now, rest) = data.split_at(take);
            if let Some(current) = &mut self.current {
                current.crc32c = crc32c::crc32c_append(current.crc32c, now);
                current.length += take as u64;
                let length = u32::try_from(take).unwrap_or(u32::MAX);
                match current.pieces.last_mut() {
                    Some(last) if last.frame == self.next => last.take += length,
                    _ => {
                        let skip = u32::try_from(self.frame.len()).unwrap_or(u32::MAX);
                        current.pieces.push(Piece { frame: self.next, skip, take: length });
                    }
                }
            }
            self.frame.extend_from_slice(now);
            data = rest;
            if self.frame.len() == FRAME_SIZE {
                self.cut(frames);
            }
        }
    }

    /// Ends the file that was begun last. Returns its path, length and CRC-32C.
    pub fn end(&mut self, frames: &mut Vec<RawFrame>) -> Option<(&EntryPath, u64, u32)> {
        let current = self.current.take()?;
        if current.length >= OWN_FRAMES {
            self.cut(frames);
        }
        self.pending.push_back(current);
        self.pending.back().map(|file| (&file.path, file.length, file.crc32c))
    }

    /// Cuts what is left at the end of the backup.
    pub fn finish(&mut self, frames: &mut Vec<RawFrame>) {
        self.cut(frames);
    }

    /// Takes note of where the next frame lies; frames are placed in the order they were cut.
    pub fn place(&mut self, frame: FrameRef) {
        self.placed.push_back(frame);
    }

    /// The next entry of the file list whose frames are all placed.
    pub fn next_entry(&mut self) -> Option<FileEntry> {
        let end = self.first_placed + self.placed.len() as u64;
        let first = self.pending.front()?;
        if first.pieces.last().is_some_and(|piece| piece.frame >= end) {
            return None;
        }
        let first = self.pending.pop_front()?;
        let extents = first
            .pieces
            .iter()
            .filter_map(|piece| {
                let index = usize::try_from(piece.frame - self.first_placed).ok()?;
                let frame = *self.placed.get(index)?;
                Some(Extent { frame, skip: piece.skip, take: piece.take })
            })
            .collect();
        // No later entry can point before the last frame of this one.
        if let Some(last) = first.pieces.last() {
            while self.first_placed < last.frame {
                self.placed.pop_front();
                self.first_placed += 1;
            }
        }
        let TarEntry { kind, mode, modified, .. } = first.entry;
        let kind = match kind {
            TarKind::File { .. } => {
                EntryKind::File { size: first.length, mtime: modified, crc32c: first.crc32c, extents }
            }
            TarKind::Directory => EntryKind::Directory,
            TarKind::Symlink { target } => EntryKind::Symlink { target },
        };
        Some(FileEntry { path: first.path, mode, kind })
    }

    /// Whether every entry has come out.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.current.is_none()
    }

    fn cut(&mut self, frames: &mut Vec<RawFrame>) {
        if !self.frame.is_empty() {
            frames.push(RawFrame { number: self.next, bytes: std::mem::take(&mut self.frame) });
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::codec::{Compression, Digest};
    use crate::repository::{BackupName, PackId};
    use proptest::prelude::*;

    /// A place for frame `number`; the raw bytes are kept beside it.
    fn place_of(number: FrameNumber, raw_length: usize) -> FrameRef {
        let backup: BackupName = "20261121T100000Z".parse().unwrap();
        FrameRef {
            pack: PackId { backup, number: 1 },
            offset: number * 10,
            stored_length: 10,
            raw_length: u32::try_from(raw_length).unwrap(),
            compression: Compression::None,
            digest: Digest::of(&number.to_le_bytes()),
        }
    }

    fn file(name: &str, size: usize) -> TarEntry {
        let kind = TarKind::File { size: size as u64 };
        TarEntry { path: name.as_bytes().to_vec(), kind, mode: 0o600, modified: 7 }
    }

    /// Frames `files`, placing frames a few at a time, and puts every file together again from its extents.
    fn round_trip(files: &[Vec<u8>], cut: usize, lag: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let (mut framer, mut frames, mut raw) = (Framer::default(), Vec::new(), HashMap::new());
        let (mut waiting, mut entries) = (VecDeque::new(), Vec::new());
        let mut settle = |framer: &mut Framer, frames: &mut Vec<RawFrame>, lag: usize| {
            waiting.extend(frames.drain(..));
            while waiting.len() > lag {
                let frame = waiting.pop_front().unwrap();
                assert!(!frame.bytes.is_empty() && frame.bytes.len() <= FRAME_SIZE);
                framer.place(place_of(frame.number, frame.bytes.len()));
                raw.insert(frame.number * 10, frame.bytes);
            }
            while let Some(entry) = framer.next_entry() {
                let EntryKind::File { size, crc32c, extents, .. } = &entry.kind else { panic!() };
                let mut bytes = Vec::new();
                for extent in extents {
                    let frame = &raw[&extent.frame.offset];
                    let skip = extent.skip as usize;
                    bytes.extend_from_slice(&frame[skip..skip + extent.take as usize]);
                }
                assert_eq!(*size, bytes.len() as u64);
                assert_eq!(*crc32c, crc32c::crc32c(&bytes));
                entries.push((entry.path.as_bytes().to_vec(), bytes));
            }
        };
        for (number, content) in files.iter().enumerate() {
            let entry = file(&format!("base/{number}"), content.len());
            let path = EntryPath::new(entry.path.clone()).unwrap();
            framer.begin(path, entry, &mut frames);
            for part in content.chunks(cut) {
                framer.data(part, &mut frames);
            }
            let (_, length, _) = framer.end(&mut frames).unwrap();
            assert_eq!(length, content.len() as u64);
            settle(&mut framer, &mut frames, lag);
        }
        framer.finish(&mut frames);
        settle(&mut framer, &mut frames, 0);
        assert!(framer.is_empty());
        entries
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn files_come_together_from_their_extents(
            sizes in prop::collection::vec(
                prop_oneof![4 => 0_usize..40_000, 1 => FRAME_SIZE - 2..FRAME_SIZE + 3, 1 => 0_usize..3_000_000], 0..12),
            cut in 1_000_usize..200_000,
            lag in 0_usize..4,
        ) {
            let files: Vec<Vec<u8>> = sizes
                .iter()
                .enumerate()
                .map(|(seed, size)| (1..=u8::MAX).cycle().skip(seed % 251).take(*size).collect())
                .collect();
            let found = round_trip(&files, cut, lag);
            prop_assert_eq!(found.len(), files.len());
            for (number, (path, bytes)) in found.into_iter().enumerate() {
                prop_assert_eq!(path, format!("base/{number}").into_bytes());
                prop_assert!(bytes == files[number]);
            }
        }
    }

    #[test]
    fn a_large_file_is_cut_at_fixed_offsets_whatever_lies_before_it() {
        let large = vec![9; FRAME_SIZE * 2 + 5];
        for before in [0, 1, 500_000] {
            let (mut framer, mut frames) = (Framer::default(), Vec::new());
            for (name, content) in [("a", &vec![1; before]), ("b", &large)] {
                let entry = file(name, content.len());
                framer.begin(EntryPath::new(name).unwrap(), entry, &mut frames);
                framer.data(content, &mut frames);
                framer.end(&mut frames);
            }
            let lengths: Vec<usize> = frames.iter().map(|frame| frame.bytes.len()).collect();
            assert_eq!(lengths[lengths.len() - 3..], [FRAME_SIZE, FRAME_SIZE, 5]);
        }
    }
}
