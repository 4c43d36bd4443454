//! HTTP on port 16000.
