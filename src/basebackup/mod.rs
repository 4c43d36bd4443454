//! Taking a base backup: protocol stream, files, frames, record.
