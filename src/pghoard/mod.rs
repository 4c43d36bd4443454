//! PGHoard's base backups as something to restore: raw tar archives, `pghoard-bb-v1` and `-bb-v2`,
//! `pghoard-delta-v1` and `-v2`.
//!
//! ```text
//! control object ─▶ Source ─▶ parts: archive · chunk · bundle · delta file · what the manifest holds
//!                              └─▶ PartStream ─▶ Content, checked on the way
//! ```
//!
//! PGHoard notices little of what can happen to a bucket: it restores objects that were cut or altered
//! without a word. Everything that can be compared is compared here: stored and decoded lengths, digests of
//! delta files, the names each chunk may have, the server's own manifest where there is one. A part counts
//! only when its stream has ended without an error.

mod part_stream;
mod source;

pub use part_stream::PartStream;
pub use source::{Part, Source};
