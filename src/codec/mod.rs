//! Bytes to bytes, synchronously: digest, compress, and back. Knows no files, no PostgreSQL, no async.
