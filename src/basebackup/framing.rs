//! Cuts the files of a base backup into frames.
//!
//! Pure. A large file starts a frame of its own and is cut at fixed offsets, so that a later backup finds
//! the same bytes at the same place and can point to the frame that holds them already. Small files
//! share frames. Frames leave here raw and numbered; where they came to lie is told later, and then the
//! entries of the file list come out in the order of the archive, each when its last frame is placed.

use std::collections::VecDeque;

use super::tar_stream::{TarEntry, TarKind};
use crate::catalog::{EntryKind, EntryPath, Extent, FileEntry};
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
