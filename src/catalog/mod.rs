//! What the repository holds, as values.
